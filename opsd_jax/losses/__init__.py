"""Loss functions of arrays, without config, model or tokenizer: for train steps of your own."""

from opsd_jax.losses.divergence import reverse_kl
from opsd_jax.losses.gate import GATES, gate_weights, parse_gate
from opsd_jax.losses.likelihood import entropy, token_logprobs
from opsd_jax.losses.policy_gradient import clipped_surrogate, group_advantages
from opsd_jax.losses.reduction import sequence_mean, token_mean

__all__ = [
    "GATES",
    "clipped_surrogate",
    "entropy",
    "gate_weights",
    "group_advantages",
    "parse_gate",
    "reverse_kl",
    "sequence_mean",
    "token_logprobs",
    "token_mean",
]
