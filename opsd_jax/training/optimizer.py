"""The optimizer of a stage: AdamW with gradient clipping and a learning-rate schedule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from opsd_jax.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The options of AdamW and its learning-rate schedule."""

    learning_rate: float = option(2e-4, "Learning rate after the warm-up.", above=0)
    schedule: str = option(
        "constant",
        "Learning rate after the warm-up: 'constant', or 'cosine' decay until the stage ends.",
        choices=("constant", "cosine"),
    )
    final_fraction: float = option(
        0.1, "Final learning rate of the cosine schedule, as a fraction of the peak.", at_least=0
    )
    warmup: int = option(
        0, "Optimizer updates over which the learning rate rises linearly from 0.", at_least=0
    )
    b1: float = option(0.9, "Decay rate of Adam's first moment.", at_least=0, below=1)
    b2: float = option(0.98, "Decay rate of Adam's second moment.", at_least=0, below=1)
    weight_decay: float = option(0.0, "Decoupled weight decay of AdamW.", at_least=0)
    moment_dtype: str = option(
        "float32", "Dtype of Adam's first moment.", choices=("float32", "bfloat16")
    )
    second_moment_dtype: str = option(
        "parameters",
        "Dtype of Adam's second moment: 'parameters' for that of the parameters, or 'bfloat16', "
        "rounded at random so that it is right on average.",
        choices=("parameters", "bfloat16"),
        added=True,
    )
    clip_norm: float = option(1.0, "Gradients are scaled down to this global norm.", above=0)


def make_optimizer(options: OptimizerOptions, updates: int) -> optax.GradientTransformation:
    """Returns AdamW with global-norm clipping, warm-up, and a constant or cosine learning rate.

    Args:
      options: the section `optimizer` of the stage's config.
      updates: number of optimizer updates in the whole stage; the cosine schedule ends there.
    """
    if options.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=options.learning_rate,
            warmup_steps=options.warmup,
            decay_steps=updates,
            end_value=options.learning_rate * options.final_fraction,
        )
    elif options.warmup:
        rate = optax.linear_schedule(0.0, options.learning_rate, options.warmup)
    else:  # linear_schedule with 0 steps would keep the learning rate at 0
        rate = optax.constant_schedule(options.learning_rate)
    adam = optax.scale_by_adam(options.b1, options.b2, mu_dtype=options.moment_dtype)
    if options.second_moment_dtype == "bfloat16":
        adam = with_rounded_second_moment(adam)
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.chain(  # as optax.adamw
            adam,
            optax.add_decayed_weights(options.weight_decay),
            optax.scale_by_learning_rate(rate),
        ),
    )


def with_rounded_second_moment(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes `optax.scale_by_adam` store its second moment in bfloat16, by stochastic rounding.

    Rounding to the nearest bfloat16, which has 8 bits, would lose relative changes below 2^-9, and
    a step changes the moment by 1 - b2, often 2^-10. Rounding up or down at random, with the
    probabilities that make the expected value exact, keeps them on average. The random bits depend
    on the number of the update only. An update uses the moment before it is rounded.

    Args:
      adam: a `scale_by_adam`, whose state has `count` and `nu`.
    """

    def init(params):
        state = adam.init(params)
        return state._replace(nu=jax.tree.map(lambda nu: nu.astype(jnp.bfloat16), state.nu))

    def update(gradients, state, params=None):
        exact = jax.tree.map(lambda nu, g: nu.astype(g.dtype), state.nu, gradients)
        updates, new = adam.update(gradients, state._replace(nu=exact), params)
        leaves, structure = jax.tree.flatten(new.nu)
        key = jax.random.fold_in(jax.random.key(0), new.count)
        rounded = [
            stochastically_rounded(nu, jax.random.fold_in(key, i)) for i, nu in enumerate(leaves)
        ]
        return updates, new._replace(nu=jax.tree.unflatten(structure, rounded))

    return optax.GradientTransformation(init, update)


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds to one of the two nearest bfloat16 numbers, with the expected value `x`.

    Args:
      x: finite numbers, of any shape, at least 0.
      key: selects the random bits.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16)  # carries into the bits that are kept
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
