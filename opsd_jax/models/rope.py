"""Rotary position embeddings (Su et al., arXiv 2104.09864) and their scaling to longer contexts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.options import ConfigError, check_bounds, option

TYPES = ("default", "linear", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Options for scaling the rotary frequencies to a longer context.

    The fields have the names and the meaning that they have in a Hugging Face `config.json`.
    """

    rope_type: str = option(
        "default", "Method of scaling; 'default' does not scale.", choices=TYPES
    )
    factor: float = option(1.0, "Ratio of the longer context to the original.", at_least=1)
    original_max_position_embeddings: int = option(
        8192, "Original context in tokens, for 'llama3' and 'yarn'.", at_least=1
    )
    low_freq_factor: float = option(
        1.0,
        "'llama3': frequencies with fewer turns than this in the original context are divided by "
        "factor.",
        at_least=1,
    )
    high_freq_factor: float = option(
        4.0,
        "'llama3': frequencies with more turns than this in the original context are kept.",
        at_least=1,
    )
    beta_fast: float = option(
        32.0,
        "'yarn': frequencies with more turns than this in the original context are kept.",
        at_least=1,
    )
    beta_slow: float = option(
        1.0,
        "'yarn': frequencies with fewer turns than this in the original context are divided by "
        "factor.",
        at_least=1,
    )
    attention_factor: float = option(
        0.0, "'yarn': factor of the cosines and sines; 0 means 1 + ln(factor) / 10.", at_least=0
    )

    def __post_init__(self):
        """Raises ConfigError if a field is invalid, or a lower limit is not below the upper one."""
        check_bounds(self, "model.rope_scaling")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise ConfigError(
                    f"model.rope_scaling.{low} is {getattr(self, low)}; expected a value below "
                    f"{high} = {getattr(self, high)}."
                )


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Computes the rotary frequencies, and the factor that multiplies the cosines and sines.

    An error in the last bit of a frequency moves the angle at position 8,192 by 5e-4. The
    frequencies are therefore computed on the host, in the order and with the precisions of Hugging
    Face transformers, and are the same on every device.

    Args:
      head_dim: C, the head size.
      theta: The base of the frequencies.
      scaling: How the frequencies are scaled. "yarn" is YaRN (Peng et al., arXiv 2309.00071).

    Returns:
      `(frequencies, factor)`: the angles per position in radians, float32 [C / 2], and a number.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.power(theta, exponent, dtype=np.float64).astype(np.float32)
    frequency = np.float32(1) / inverse
    match scaling.rope_type:
        case "linear":
            return frequency / np.float32(scaling.factor), 1.0
        case "llama3":
            return _llama3(frequency, scaling), 1.0
        case "yarn":
            lengthened = 1 + 0.1 * math.log(scaling.factor)
            factor = scaling.attention_factor or lengthened
            return _yarn(inverse, theta, head_dim, scaling), factor
    return frequency, 1.0


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Scales the rotary frequencies [C / 2] with the method of Llama 3.1.

    Low frequencies are divided by the factor, high frequencies stay unchanged, and the frequencies
    in between are interpolated.
    """
    factor = np.float32(scaling.factor)
    context = np.float32(scaling.original_max_position_embeddings)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    wavelength = np.float32(2 * math.pi) / frequency
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequency / factor + smooth * frequency
    scaled = np.where(wavelength > context / low, frequency / factor, between)
    return np.where(wavelength < context / high, frequency, scaled).astype(np.float32)


def _yarn(inverse: np.ndarray, theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    """Computes YaRN's rotary frequencies [C / 2] from the inverses of the unscaled frequencies."""
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
    scaled = 1 / (np.float32(scaling.factor) * inverse)
    return (scaled * (1 - keep) + np.float32(1) / inverse * keep).astype(np.float32)


def table(
    positions_BxT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[jax.Array, jax.Array]:
    """Computes the cosines and sines of the rotary angles at each token's position.

    Args:
      positions_BxT: int32, the position of each token.
      head_dim, theta, scaling: See `frequencies`.

    Returns:
      `(cosines, sines)`, both float32 [B, T, 1, C / 2].
    """
    frequency, factor = frequencies(head_dim, theta, scaling)
    # A TPU would round the positions to bfloat16 in an einsum. An elementwise product is exact.
    angle = positions_BxT[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_BxTxNxC: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies rotary embeddings: rotates each pair of components by its angle in `table`.

    Component i of the first half of C is paired with component i of the second half.

    Args:
      x_BxTxNxC: Queries or keys with N heads, of any float dtype.
      table: The cosines and sines from `table`.

    Returns:
      The rotated array, computed in float32 and returned in the dtype of `x_BxTxNxC`.
    """
    cos, sin = table
    a, b = jnp.split(x_BxTxNxC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxC.dtype)
