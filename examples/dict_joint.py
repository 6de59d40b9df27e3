"""Trains a model with policy gradient and OPSD in one step; its parameters are a dict of arrays.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/dict_joint.py

The arrays are sharded over a mesh: rows over the axis `data`, and the vocabulary of the head over
`tensor`. The model is two functions, without a class or a framework.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax import losses

VOCAB, WIDTH, PROMPT, HINT, RESPONSE, ROWS = 64, 16, 4, 3, 8, 16
SPECS = {"embedding": P(), "mix": P(), "head": P(None, "tensor")}
OPTIMIZER = optax.adam(1e-2)


def init(key):
    normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape) * WIDTH**-0.5
    return {
        "embedding": 4 * normal(0, VOCAB, WIDTH),
        "mix": normal(1, WIDTH, WIDTH),
        "head": normal(2, WIDTH, VOCAB),
    }


def forward(params, tokens):
    """Returns hidden states [B, T, D]; each depends on its token and on the tokens before it."""
    x = params["embedding"][tokens]
    mean = jnp.cumsum(x, axis=1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]
    return jnp.tanh((x + mean) @ params["mix"])


def unembed(params, hidden):
    return jnp.dot(hidden, params["head"], preferred_element_type=jnp.float32)


def head(params, prompt, response) -> losses.Head:
    """Returns a `Head` whose column t predicts the response token t.

    The first response token is predicted at the last prompt token.
    """
    hidden = forward(params, jnp.concatenate([prompt, response], axis=1))
    return losses.Head(unembed, params, hidden[:, prompt.shape[1] - 1 : -1])


def train_step(params, opt_state, teacher, batch):
    def loss_fn(params):
        hinted = jnp.concatenate([batch["hint"], batch["prompt"]], axis=1)
        total, policy, opsd = losses.joint(
            student=head(params, batch["prompt"], batch["response"]),
            teacher=head(teacher, hinted, batch["response"]),
            tokens=batch["response"],
            mask=batch["mask"],
            advantages=batch["advantages"],
            outcomes=batch["outcomes"],
            behaviour_logprobs=batch["logprobs"],
            policy_weight=0.2,
            partition=P("data"),
        )
        return total.mean, {"policy": policy.mean, "divergence": opsd.mean}

    (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, metrics


def main(steps: int = 30) -> list[dict[str, float]]:
    tensor = 2 if jax.device_count() % 2 == 0 else 1
    shape = (jax.device_count() // tensor, tensor)
    mesh = jax.make_mesh(shape, ("data", "tensor"), (AxisType.Auto, AxisType.Auto))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        params = {name: put(x, SPECS[name]) for name, x in init(jax.random.key(0)).items()}
        teacher, opt_state = params, OPTIMIZER.init(params)
        keys = jax.random.split(jax.random.key(1), 4)
        random_tokens = lambda key, length: jax.random.randint(key, (ROWS, length), 0, VOCAB)
        prompt, response = random_tokens(keys[0], PROMPT), random_tokens(keys[2], RESPONSE)
        mask = jnp.arange(RESPONSE) < jnp.arange(ROWS)[:, None] % RESPONSE + 1
        correct = jax.random.bernoulli(keys[3], 0.5, (ROWS,))  # in place of a verifier
        behaviour = head(params, prompt, response)
        batch = {
            "prompt": prompt,
            "hint": random_tokens(keys[1], HINT),
            "response": response,
            "mask": mask,
            "outcomes": (correct, ~correct, jnp.zeros(ROWS, bool)),
            "advantages": losses.advantages(correct.astype(jnp.float32), group_size=4),
            "logprobs": losses.response_logprobs(student=behaviour, tokens=response, mask=mask),
        }
        batch = jax.tree.map(lambda x: put(x, P("data")), batch)
        step, curve = jax.jit(train_step), []
        for _ in range(steps):
            params, opt_state, metrics = step(params, opt_state, teacher, batch)
            curve.append({name: float(x) for name, x in metrics.items()})
    return curve


if __name__ == "__main__":
    first, *_, last = main()
    for name in first:
        print(f"{name}: {first[name]:.4f} -> {last[name]:.4f}")
