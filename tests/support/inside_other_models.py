"""Checks the losses on a model of another library, in an environment that has this library.

    python inside_other_models.py tunix|gemma EXAMPLE

The `Head` of the example must give the losses and the gradients of the logits that the model itself
returns, and the example must run. See tests/losses/test_other_models.py.
"""

import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import losses

ROWS, PROMPT, RESPONSE = 8, 5, 9


def tunix(example, vocab):
    """Yields (name, make_params, head, logits) for Qwen3 with a tied and with its own head."""
    from flax import nnx
    from tunix.models.qwen3.model import ModelConfig, Qwen3

    for tied in (True, False):
        config = ModelConfig(2, vocab, 32, 64, 4, 8, 2, 10_000, 1e-6, use_tied_embedding=tied)
        make = lambda seed, config=config: nnx.split(Qwen3(config, rngs=nnx.Rngs(seed)))
        graphdef, _ = make(0)

        def logits(params, tokens, graphdef=graphdef):
            length = tokens.shape[1]
            positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
            causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (ROWS, length, length))
            return nnx.merge(graphdef, params)(tokens, positions, None, causal)[0]

        def head(params, tokens, graphdef=graphdef):
            return example["head"](nnx.merge(graphdef, params), tokens, PROMPT)

        yield f"tied={tied}", lambda seed, make=make: make(seed)[1], head, logits


def gemma(example, vocab):
    """Yields (name, make_params, head, logits) for Gemma with a soft cap."""
    model, tokens = example["MODEL"], jnp.ones((1, 4), jnp.int32)
    yield (
        "soft cap",
        lambda seed: model.init(jax.random.key(seed), tokens)["params"],
        lambda params, tokens: example["head"](params, tokens, PROMPT),
        lambda params, tokens: model.apply({"params": params}, tokens).logits,
    )


def check(params, teacher, tokens, head, logits):
    """Asserts that losses and gradients are those of the model's own logits."""
    rng = np.random.default_rng(0)
    common = {"mask": jnp.asarray(rng.random((ROWS, RESPONSE)) < 0.7)}
    sampled = {"tokens": tokens[:, PROMPT:]}
    correct = jnp.asarray(rng.random(ROWS) < 0.5)
    outcomes = (correct, ~correct, jnp.zeros(ROWS, bool))
    rollouts = {
        "advantages": jnp.asarray(rng.standard_normal(ROWS), jnp.float32),
        "behaviour_logprobs": jnp.asarray(-3 - rng.random((ROWS, RESPONSE)), jnp.float32),
    }
    every = {
        "sft": lambda s, t: losses.sft(student=s, **common, **sampled),
        "opsd": lambda s, t: losses.opsd(student=s, teacher=t, outcomes=outcomes, **common),
        "pg": lambda s, t: losses.policy_gradient(student=s, **common, **sampled, **rollouts),
    }
    own = lambda params, tokens: logits(params, tokens)[:, PROMPT - 1 : -1]
    for name, loss in every.items():
        ours, theirs = (
            jax.jit(jax.value_and_grad(
                lambda p, of=of, loss=loss: loss(of(p, tokens), of(teacher, tokens)).mean
            ))(params)
            for of in (head, own)
        )  # fmt: skip
        assert abs(float(theirs[0])) > 1e-3, name
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(theirs[1]))
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
        print(f"{name}: {float(ours[0]):.6f}")


def main(library, path):
    example = runpy.run_path(path)
    vocab = example["VOCAB"]
    ids = np.random.default_rng(1).integers(1, vocab, (ROWS, PROMPT + RESPONSE))
    for name, make, head, logits in {"tunix": tunix, "gemma": gemma}[library](example, vocab):
        print(name)
        # Three times the initial parameters predict far from uniformly.
        params, teacher = (jax.tree.map(lambda x: 3 * x, make(seed)) for seed in (0, 1))
        check(params, teacher, jnp.asarray(ids, jnp.int32), head, logits)
    curve = example["main"]()
    assert curve[-1] < 0.3 * curve[0], curve


if __name__ == "__main__":
    main(*sys.argv[1:])
