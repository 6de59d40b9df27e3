"""Rotary position embeddings (Su et al., arXiv 2104.09864), and scalings to longer contexts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

TYPES = ("default", "linear", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the angles are changed; the names are those of a Hugging Face `config.json`."""

    rope_type: str = "default"  # one of TYPES: not at all, or as Llama 3.1 or YaRN do it
    factor: float = 1.0  # by which the context was lengthened
    original_max_position_embeddings: int = 8192  # the context before that: "yarn" and "llama3"
    low_freq_factor: float = 1.0  # of "llama3", as the next
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # of "yarn", as the next two
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # of cosines and sines; 0: 1 + ln(factor) / 10

    def __post_init__(self):
        if self.rope_type not in TYPES:
            raise ValueError(
                f"model.rope_scaling.rope_type is {self.rope_type!r}; expected one of {TYPES}."
            )
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "attention_factor" else 1
            if field.name != "rope_type" and not least <= value < math.inf:
                raise ValueError(
                    f"model.rope_scaling.{field.name} is {value}; expected at least {least}."
                )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(
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
