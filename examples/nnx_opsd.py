"""Trains a Flax NNX model with OPSD.

    python examples/nnx_opsd.py

The model sees a question. The teacher is a frozen copy of the model and sees a hint before the
question. The train step moves the model towards the teacher, on correct responses only.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from opsd_jax import losses

VOCAB, WIDTH, QUESTION, HINT, RESPONSE = 64, 32, 6, 4, 10


class Model(nnx.Module):
    """One block of causal attention with a soft-capped head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        return self.norm(x + self.attention(x, mask=nnx.make_causal_mask(tokens)))

    def unembed(self, hidden):
        return 30 * jnp.tanh(self.head(hidden) / 30)


def head(model: Model, prompt, response) -> losses.Head:
    """Returns a `Head` whose column t predicts the response token t.

    The first response token is predicted at the last prompt token.
    """
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
            outcomes=(batch["correct"], batch["incorrect"], batch["truncated"]),
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
    random_tokens = lambda key, length: jax.random.randint(key, (rows, length), 0, VOCAB)
    outcome = jax.random.randint(keys[3], (rows,), 0, 3)  # in place of a verifier
    batch = {
        "question": random_tokens(keys[0], QUESTION),
        "hint": random_tokens(keys[1], HINT),
        "response": random_tokens(keys[2], RESPONSE),
        "mask": jnp.arange(RESPONSE) < jnp.arange(rows)[:, None] + 1,
        "correct": outcome == 0,
        "incorrect": outcome == 1,
        "truncated": outcome == 2,
    }
    return [float(train_step(model, teacher, optimizer, batch)) for _ in range(steps)]


if __name__ == "__main__":
    curve = main()
    print(f"divergence from the teacher: {curve[0]:.4f} -> {curve[-1]:.4f} nats per token")
