"""The optimizer of a stage: AdamW with gradient clipping and a learning-rate schedule."""

from __future__ import annotations

import dataclasses

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
    # In bfloat16, the second moment would lose its relative changes of 1 - b2.
    moment_dtype: str = option(
        "float32",
        "Dtype of Adam's first moment; the second has the dtype of the parameters.",
        choices=("float32", "bfloat16"),
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
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            rate,
            options.b1,
            options.b2,
            mu_dtype=options.moment_dtype,
            weight_decay=options.weight_decay,
        ),
    )
