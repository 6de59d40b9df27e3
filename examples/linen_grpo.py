"""Trains a Flax Linen model with DAPO, a variant of GRPO.

    python examples/linen_grpo.py

The model answers with six tokens and is rewarded if most of the token ids are even. Each step
samples a group of responses to every prompt, compares them, and makes the better ones more likely.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from opsd_jax import losses

VOCAB, WIDTH, PROMPT, RESPONSE, PROMPTS, GROUP = 32, 32, 3, 6, 8, 8
OPTIONS = losses.PRESETS["dapo"]


class Model(nn.Module):
    """A recurrent network that uses its embedding as its head."""

    def setup(self):
        self.embedding = nn.Embed(VOCAB, WIDTH)
        self.rnn = nn.RNN(nn.GRUCell(WIDTH))

    def __call__(self, tokens):
        return self.rnn(self.embedding(tokens))

    def unembed(self, hidden):
        return self.embedding.attend(hidden)


MODEL = Model()


def unembed(params, hidden):
    return MODEL.apply({"params": params}, hidden, method="unembed")


def head(params, prompt, response) -> losses.Head:
    """Returns a `Head` whose column t predicts the response token t.

    The first response token is predicted at the last prompt token.
    """
    tokens = jnp.concatenate([prompt, response], axis=1)
    hidden = MODEL.apply({"params": params}, tokens)
    return losses.Head(unembed, params, hidden[:, PROMPT - 1 : -1])


@jax.jit
def sample(params, prompt, key):
    """Samples responses [B, RESPONSE] and returns them with their log-probabilities."""
    response = jnp.zeros((len(prompt), RESPONSE), jnp.int32)
    logprobs = jnp.zeros(response.shape)
    for t in range(RESPONSE):
        logits = unembed(params, head(params, prompt, response).hidden[:, t])
        tokens = jax.random.categorical(jax.random.fold_in(key, t), logits)
        response = response.at[:, t].set(tokens)
        logprobs = logprobs.at[:, t].set(losses.token_logprobs(logits, tokens))
    return response, logprobs


@jax.jit
def train_step(state: TrainState, batch):
    def loss_fn(params):
        loss = losses.policy_gradient(
            student=head(params, batch["prompt"], batch["response"]),
            tokens=batch["response"],
            mask=jnp.ones(batch["response"].shape, bool),
            advantages=batch["advantages"],
            behaviour_logprobs=batch["logprobs"],
            row_weight=batch["row_weight"],
            options=OPTIONS,
        )
        return loss.mean

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def main(steps: int = 40) -> list[float]:
    key = jax.random.key(0)
    params = MODEL.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=optax.adam(1e-2))
    rewards = []
    for step in range(steps):
        prompt_key, sample_key = jax.random.split(jax.random.fold_in(key, step))
        prompt = jax.random.randint(prompt_key, (PROMPTS, PROMPT), 0, VOCAB)
        prompt = jnp.repeat(prompt, GROUP, axis=0)
        response, logprobs = sample(state.params, prompt, sample_key)
        reward = (jnp.sum(response % 2 == 0, axis=1) > RESPONSE // 2).astype(jnp.float32)
        batch = {
            "prompt": prompt,
            "response": response,
            "logprobs": logprobs,
            "advantages": OPTIONS.advantages(reward, GROUP),
            "row_weight": losses.informative(reward, GROUP),
        }
        state = train_step(state, batch)
        rewards.append(float(reward.mean()))
    return rewards


if __name__ == "__main__":
    curve = main()
    print(f"mean reward: {curve[0]:.2f} -> {curve[-1]:.2f}")
