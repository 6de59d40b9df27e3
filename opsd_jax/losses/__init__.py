"""Loss functions on arrays, for use in any train step. They need no config, model or tokenizer.

Start with `sft`, `policy_gradient`, `opsd` and `joint`. Each of them takes logits, or a `Head` that
computes the logits of a chunk of tokens at a time. docs/losses.md has all equations and default
values.
"""

from opsd_jax.losses.advantage import advantages, informative, overlong_penalty
from opsd_jax.losses.divergence import (
    DIVERGENCES,
    forward_kl,
    jsd,
    kl_estimates,
    reverse_kl,
    sampled_kl,
    skewed_kl,
    top_k,
)
from opsd_jax.losses.fused import token_values, weighted_loss
from opsd_jax.losses.gate import GATES, gate_weights, parse_gate
from opsd_jax.losses.head import Head
from opsd_jax.losses.joint import joint
from opsd_jax.losses.likelihood import entropy, token_logprobs
from opsd_jax.losses.opsd import OPSD, opsd
from opsd_jax.losses.policy_gradient import (
    PRESETS,
    PolicyGradient,
    policy_gradient,
    response_logprobs,
)
from opsd_jax.losses.reduction import position_weights, token_weights, weighted_sum
from opsd_jax.losses.result import Loss
from opsd_jax.losses.sft import sft

__all__ = [
    "DIVERGENCES",
    "GATES",
    "OPSD",
    "PRESETS",
    "Head",
    "Loss",
    "PolicyGradient",
    "advantages",
    "entropy",
    "forward_kl",
    "gate_weights",
    "informative",
    "joint",
    "jsd",
    "kl_estimates",
    "opsd",
    "overlong_penalty",
    "parse_gate",
    "policy_gradient",
    "position_weights",
    "response_logprobs",
    "reverse_kl",
    "sampled_kl",
    "sft",
    "skewed_kl",
    "token_logprobs",
    "token_values",
    "token_weights",
    "top_k",
    "weighted_loss",
    "weighted_sum",
]
