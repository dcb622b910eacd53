"""Classifier-free guidance: pure functions on the outputs of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Scalar = jax.Array | np.ndarray


@dataclass(frozen=True)
class Options:
    """What guidance does besides its scale.

    Args:
      rescale: in [0, 1], how far the guided output is brought back to the contrast of the unguided picture
        (Lin et al. 2023, section 3.4, their phi). 0 is plain guidance, 0.7 what they recommend for models
        trained to a zero terminal signal.

    Raises:
      ValueError: a value out of its range.
    """

    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.rescale, (int, float)) and 0 <= self.rescale <= 1):
            raise ValueError(f"guidance.rescale: expected a number from 0 to 1, got {self.rescale!r}")


def guide(conditional: jax.Array, unconditional: jax.Array, scale: Scalar, rescale: Scalar) -> jax.Array:
    """Classifier-free guidance (Ho & Salimans 2022), optionally rescaled (Lin et al. 2023, eqs. 14-16).

    Args:
      conditional, unconditional: (B, h, w, C) float32, the model's raw outputs with and without the prompt.
      scale: () float32, u + scale (c - u); 1 is the conditional output.
      rescale: () float32, `Options.rescale`. A value like the scale, so that changing it compiles nothing; at 0
        the result is the plain one to the bit.

    Returns:
      (B, h, w, C) float32.
    """
    guided = unconditional + scale * (conditional - unconditional)
    axes = tuple(range(1, guided.ndim))
    wanted, got = (jnp.var(x, axis=axes, keepdims=True) for x in (conditional, guided))
    # A flat output has no contrast to bring back or to bring it back to; the inner `where`s keep gradients finite too.
    sound = (wanted > 0) & (got > 0)
    ratio = jnp.where(sound, wanted, 1.0) / jnp.where(sound, got, 1.0)
    factor = jnp.where(sound | (got == 0), jnp.sqrt(ratio), 0.0)
    rescale = jnp.asarray(rescale)
    return rescale * (factor * guided) + (1.0 - rescale) * guided


def per_row(guidance_scale: float | Sequence[float], num_inference_steps: int, step: np.ndarray) -> np.ndarray:
    """The scale of each row of a sampler's table.

    Args:
      guidance_scale: a number, or `num_inference_steps` of them, one per step of the whole run: image-to-image
        begins in the middle and uses those from there on.
      step: (T,) `rows.step`, the user's step that each row belongs to.

    Returns:
      (T,) float32. Guidance may be left out of the program when all of `guidance_scale` is at most 1.

    Raises:
      ValueError: another length, or what is no finite number.
    """
    scales: list[Any]
    if isinstance(guidance_scale, (Sequence, np.ndarray)) and np.ndim(guidance_scale):
        scales = list(guidance_scale)
    else:
        scales = [guidance_scale] * num_inference_steps
    if len(scales) != num_inference_steps:
        raise ValueError(
            f"guidance_scale: got {len(scales)} numbers for num_inference_steps={num_inference_steps};"
            " give one number, or one per step of the whole run"
        )
    for i, value in enumerate(scales):
        if not (isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)):
            raise ValueError(f"guidance_scale: expected finite numbers, got {value!r} for step {i}")
    return np.asarray(scales, np.float32)[step]
