"""Checks the losses on Tunix's Qwen3, in an environment that has Tunix. See test_other_models.py.

The `Head` of examples/tunix_qwen3.py must give the loss and the gradients of the logits that the
model itself returns.
"""

import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.qwen3.model import ModelConfig, Qwen3

from opsd_jax import losses

example = runpy.run_path(sys.argv[1])
ROWS, PROMPT, RESPONSE, VOCAB = 8, 5, 9, 96
rng = np.random.default_rng(0)
tokens = jnp.asarray(rng.integers(0, VOCAB, (ROWS, PROMPT + RESPONSE)), jnp.int32)
mask = jnp.asarray(rng.random((ROWS, RESPONSE)) < 0.7)
correct = jnp.asarray(rng.random(ROWS) < 0.5)
outcomes = (correct, ~correct, jnp.zeros(ROWS, bool))
advantages = jnp.asarray(rng.standard_normal(ROWS), jnp.float32)
behaviour = jnp.asarray(-3 - rng.random((ROWS, RESPONSE)), jnp.float32)


def model_logits(model):
    """Returns the logits that the model itself computes for the response."""
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (ROWS, length, length))
    return model(tokens, positions, None, causal)[0][:, PROMPT - 1 : -1]


def every_loss(student, teacher):
    """Returns the three losses."""
    targets = tokens[:, PROMPT:]
    return {
        "sft": losses.sft(student=student, tokens=targets, mask=mask).mean,
        "opsd": losses.opsd(student=student, teacher=teacher, mask=mask, outcomes=outcomes).mean,
        "policy_gradient": losses.policy_gradient(
            student=student,
            tokens=targets,
            mask=mask,
            behaviour_logprobs=behaviour,
            advantages=advantages,
        ).mean,
    }


for tied in (True, False):
    config = ModelConfig(2, VOCAB, 32, 64, 4, 8, 2, 10_000, 1e-6, use_tied_embedding=tied)
    model, teacher = Qwen3(config, rngs=nnx.Rngs(0)), Qwen3(config, rngs=nnx.Rngs(1))
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda x: 3 * x, params)  # predictions far from uniform

    def losses_of(params, sources, graphdef=graphdef, teacher=teacher):
        return every_loss(sources(nnx.merge(graphdef, params)), sources(teacher))

    head = lambda model: example["head"](model, tokens, PROMPT)
    for name in ("sft", "opsd", "policy_gradient"):
        value = lambda params, sources, name=name: losses_of(params, sources)[name]
        ours, theirs = (
            jax.jit(jax.value_and_grad(value), static_argnums=1)(params, sources)
            for sources in (head, model_logits)
        )
        assert float(abs(theirs[0])) > 1e-3, name
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(theirs[1]))
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
        print(f"tied={tied} {name}: {float(ours[0]):.6f}")

curve = example["main"]()
assert curve[-1] < 0.3 * curve[0], curve
