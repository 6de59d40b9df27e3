"""Rotary position embeddings (Su et al., arXiv 2104.09864), and scalings to longer contexts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.options import ConfigError, option

TYPES = ("default", "linear", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled to a longer context.

    The fields have the names and the meaning that they have in a Hugging Face `config.json`.
    """

    rope_type: str = option("default", "Method of scaling; 'default' is none.", choices=TYPES)
    factor: float = option(1.0, "Ratio of the longer context to the original.", at_least=1)
    original_max_position_embeddings: int = option(
        8192, "Original context in tokens, for 'llama3' and 'yarn'.", at_least=1
    )
    low_freq_factor: float = option(
        1.0,
        "'llama3': frequencies with fewer turns in the original context are divided by factor.",
        at_least=1,
    )
    high_freq_factor: float = option(
        4.0,
        "'llama3': frequencies with more turns in the original context are kept.",
        at_least=1,
    )
    beta_fast: float = option(
        32.0,
        "'yarn': frequencies with more turns in the original context are kept.",
        at_least=1,
    )
    beta_slow: float = option(
        1.0,
        "'yarn': frequencies with fewer turns in the original context are divided by factor.",
        at_least=1,
    )
    attention_factor: float = option(
        0.0, "'yarn': factor of the cosines and sines; 0 is 1 + ln(factor) / 10.", at_least=0
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if expected := field.metadata["bounds"].expected(value):
                raise ConfigError(
                    f"model.rope_scaling.{field.name} is {value!r}; expected {expected}."
                )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise ConfigError(
                    f"model.rope_scaling.{low} is {getattr(self, low)}; expected less than "
                    f"{high} = {getattr(self, high)}."
                )


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Angles a position, [C / 2] in float32, and the factor of cosines and sines.

    At position 8,192 the last bit of a frequency moves the angle by 5e-4. So they are made on the
    host, in the steps and precisions of transformers, and are the same wherever the model runs.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = np.power(theta, exponent, dtype=np.float64).astype(np.float32)
    frequency = np.float32(1) / wavelength
    factor = np.float32(scaling.factor)
    match scaling.rope_type:
        case "linear":
            return frequency / factor, 1.0
        case "llama3":
            return _llama3(frequency, factor, scaling), 1.0
        case "yarn":
            low, high = (
                head_dim
                * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
                / (2 * math.log(theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
            index = np.arange(head_dim // 2, dtype=np.float32)
            ramp = np.clip((index - low) / np.float32(max(high - low, 1e-3)), 0, 1)
            keep = (1 - ramp).astype(np.float32)
            frequency = 1 / (factor * wavelength) * (1 - keep) + frequency * keep
            lengthened = 1 + 0.1 * math.log(scaling.factor)
            return frequency.astype(np.float32), scaling.attention_factor or lengthened
    return frequency, 1.0


def _llama3(frequency: np.ndarray, factor: np.float32, scaling: RopeScaling) -> np.ndarray:
    """Low frequencies divided by the factor, high ones as they are, and a ramp between the two."""
    context = np.float32(scaling.original_max_position_embeddings)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    wavelength = np.float32(2 * math.pi) / frequency
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequency / factor + smooth * frequency
    scaled = np.where(wavelength > context / low, frequency / factor, between)
    return np.where(wavelength < context / high, frequency, scaled).astype(np.float32)


def table(
    positions_BxT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each [B, T, 1, C / 2] in float32, of the rotary angles."""
    frequency, factor = frequencies(head_dim, theta, scaling)
    # Not an einsum: a TPU's matrix unit would round the positions to bfloat16.
    angle = positions_BxT[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_BxTxNxC: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair of components, taken from the two halves of C, by its position's angle."""
    cos, sin = table
    a, b = jnp.split(x_BxTxNxC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxC.dtype)
