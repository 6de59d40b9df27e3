"""The optimiser of a stage: AdamW with clipping and a learning-rate schedule."""

from __future__ import annotations

import ml_collections
import optax


def make_optimizer(config: ml_collections.ConfigDict, updates: int) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm, warm-up, and a constant or cosine learning rate.

    Args:
      config: a stage's `optimizer` (see opsd_jax/config.py).
      updates: of the whole stage; the cosine ends there.
    """
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup,
            decay_steps=updates,
            end_value=config.learning_rate * config.final_fraction,
        )
    elif config.warmup:
        rate = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
    else:  # a linear schedule of no steps would stay at its first value, 0
        rate = optax.constant_schedule(config.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            rate,
            config.b1,
            config.b2,
            mu_dtype=config.moment_dtype,
            weight_decay=config.weight_decay,
        ),
    )
