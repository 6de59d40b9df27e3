"""Trains Tunix's Qwen3 with OPSD.

    pip install google-tunix && pip install --no-deps . && python examples/tunix_qwen3.py

The sizes are tiny; `ModelConfig.qwen3_0p6b()` and the weights of Tunix's loader go in their place.
As in examples/nnx_opsd.py, the teacher is a frozen copy that sees a hint before the question.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.qwen3.model import ModelConfig, Qwen3

from opsd_jax import losses

VOCAB, QUESTION, HINT, RESPONSE = 64, 6, 4, 10


def hidden_states(model: Qwen3, tokens: jax.Array) -> jax.Array:
    """Returns the hidden states [B, T, D] after the final norm, for rows without padding."""
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (len(tokens), length, length))
    x = model.embedder.encode(tokens)
    for layer in model.layers:
        _, x = layer(x, positions, None, causal)
    return model.final_norm(x)


def head(model: Qwen3, tokens: jax.Array, prompt: int) -> losses.Head:
    """Returns a `Head` whose column t predicts the response token t."""
    graphdef, params = nnx.split(model)

    def unembed(params, hidden):
        model = nnx.merge(graphdef, params)
        if model.config.use_tied_embedding:
            return model.embedder.decode(hidden)
        return model.lm_head(hidden[None])[0]  # lm_head takes [B, T, D] only

    return losses.Head(unembed, params, hidden_states(model, tokens)[:, prompt - 1 : -1])


@nnx.jit
def train_step(model: Qwen3, teacher: Qwen3, optimizer: nnx.Optimizer, batch) -> jax.Array:
    """Makes one update. Returns the divergence from the teacher, in nats per token."""
    asked = jnp.concatenate([batch["question"], batch["response"]], axis=1)
    hinted = jnp.concatenate([batch["hint"], asked], axis=1)

    def loss_fn(model):
        return losses.opsd(
            student=head(model, asked, QUESTION),
            teacher=head(teacher, hinted, HINT + QUESTION),
            mask=batch["mask"],
            outcomes=(batch["correct"], ~batch["correct"], jnp.zeros_like(batch["correct"])),
            options=losses.OPSD(gate=losses.GATES["correct"]),
        ).mean

    loss, gradient = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradient)
    return loss


def main(steps: int = 40, tied: bool = True) -> list[float]:
    config = ModelConfig(2, VOCAB, 32, 64, 4, 8, 2, 10_000, 1e-6, use_tied_embedding=tied)
    model = Qwen3(config, rngs=nnx.Rngs(0))
    teacher, optimizer = nnx.clone(model), nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(1), 4)
    ids = lambda key, length: jax.random.randint(key, (16, length), 0, VOCAB)
    batch = {"question": ids(keys[0], QUESTION), "hint": ids(keys[1], HINT)}
    batch["response"] = ids(keys[2], RESPONSE)
    batch["mask"] = jnp.arange(RESPONSE) < jnp.arange(16)[:, None] + 1
    batch["correct"] = jax.random.bernoulli(keys[3], 0.5, (16,))  # in place of a verifier
    return [float(train_step(model, teacher, optimizer, batch)) for _ in range(steps)]


if __name__ == "__main__":
    curve = main()
    print(f"divergence from the teacher: {curve[0]:.4f} -> {curve[-1]:.4f} nats per token")
