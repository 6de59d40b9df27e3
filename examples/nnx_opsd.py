"""OPSD around a Flax NNX model of one's own: python examples/nnx_opsd.py

The model sees a question; the teacher, its frozen copy, sees the question after a hint. The train
step moves the model towards its informed self, on correct responses only.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from opsd_jax import losses

WORDS, WIDTH, QUESTION, HINT, RESPONSE = 64, 32, 6, 4, 10


class Model(nnx.Module):
    """One block of causal attention, and a soft-capped head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        return self.norm(x + self.attention(x, mask=nnx.make_causal_mask(tokens)))

    def unembed(self, hidden):
        return 30 * jnp.tanh(self.head(hidden) / 30)


def head(model: Model, prompt, response) -> losses.Head:
    """What predicts each token of the response: the states from the prompt's last token on."""
    hidden = model(jnp.concatenate([prompt, response], axis=1))
    graphdef, params = nnx.split(model)
    unembed = lambda params, hidden: nnx.merge(graphdef, params).unembed(hidden)
    return losses.Head(unembed, params, hidden[:, prompt.shape[1] - 1 : -1])


@nnx.jit
def train_step(model: Model, teacher: Model, optimizer: nnx.Optimizer, batch):
    def loss_fn(model):
        hinted = jnp.concatenate([batch["hint"], batch["question"]], axis=1)
        loss = losses.opsd(
            student=head(model, batch["question"], batch["response"]),
            teacher=head(teacher, hinted, batch["response"]),
            mask=batch["mask"],
            groups=(batch["correct"], batch["incorrect"], batch["truncated"]),
            options=losses.OPSD(gate=losses.GATES["correct"]),
        )
        return loss.mean

    loss, gradient = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradient)
    return loss


def main(steps: int = 60) -> list[float]:
    model = Model(nnx.Rngs(0))
    teacher = nnx.clone(model)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(1), 4)
    rows = 16
    words = lambda key, length: jax.random.randint(key, (rows, length), 0, WORDS)
    group = jax.random.randint(keys[3], (rows,), 0, 3)  # what a verifier says
    batch = {
        "question": words(keys[0], QUESTION),
        "hint": words(keys[1], HINT),
        "response": words(keys[2], RESPONSE),
        "mask": jnp.arange(RESPONSE) < jnp.arange(rows)[:, None] + 1,
        "correct": group == 0,
        "incorrect": group == 1,
        "truncated": group == 2,
    }
    return [float(train_step(model, teacher, optimizer, batch)) for _ in range(steps)]


if __name__ == "__main__":
    curve = main()
    print(f"divergence from the teacher: {curve[0]:.4f} -> {curve[-1]:.4f} nats a token")
