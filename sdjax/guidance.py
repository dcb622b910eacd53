"""Classifier-free guidance: pure functions on the outputs of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
      interval: (start, stop) in [0, 1], the share of the run's steps in which there is guidance, those counted that
        image-to-image leaves out; outside of it the unguided output is not computed, and the scale is 1
        (Kynkäänniemi et al. 2024).
      threshold: the largest absolute value of the predicted clean latents, scaled as the UNet sees them; None is no
        limit.
      quantile: with a threshold: latents are scaled down to it from this quantile of their size, in place of cutting
        off what is beyond (Saharia et al. 2022, section 2.3; they take 0.995). None cuts.
      perpendicular: with it the negative prompt pushes only across the direction of the prompt, with this weight
        (Armandpour et al. 2023, Perp-Neg), and guidance is away from the empty prompt. It costs a third evaluation.
      perturbed: with it the output is also pushed away, by so much, from one whose middle self-attention was switched
        off (Ahn et al. 2024, PAG; 3 is usual). It costs another evaluation, and works without a prompt too.
      image_scale: of a model that edits pictures (InstructPix2Pix), how close to the picture it stays
        (Brooks et al. 2023, eq. 3, their s_I). Its guidance costs a third evaluation; where the guidance scale is at
        most 1 there is none, as in diffusers.
      loss: pictures (B, H, W, 3) in about [-1, 1] -> (B,), differentiable by JAX: every step goes down its gradient
        by the latents, through the decoder and the UNet (Bansal et al. 2023, forward universal guidance).
      loss_scale: the predicted clean latents move against that gradient, by so many times its size.

    Raises:
      ValueError: a value out of its range.
    """

    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    threshold: float | None = None
    quantile: float | None = None
    perpendicular: float | None = None
    perturbed: float | None = None
    image_scale: float = 1.5
    loss: Callable[[jax.Array], jax.Array] | None = None
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        _check("rescale", self.rescale, 0, 1)
        if self.interval is not None:
            if not (isinstance(self.interval, (tuple, list)) and len(self.interval) == 2):
                raise ValueError(f"guidance.interval: expected (start, stop), got {self.interval!r}")
            for end in self.interval:
                _check("interval", end, 0, 1)
            if not self.interval[0] < self.interval[1]:
                raise ValueError(f"guidance.interval: expected start < stop, got {self.interval!r}")
            object.__setattr__(self, "interval", tuple(float(end) for end in self.interval))
        if self.threshold is not None:
            _check("threshold", self.threshold, 1e-3, 1e6)
        if self.quantile is not None:
            _check("quantile", self.quantile, 0, 1)
            if self.threshold is None:
                raise ValueError("guidance.quantile: it says how to reach a threshold, and there is none")
        if self.perpendicular is not None:
            _check("perpendicular", self.perpendicular, 0, 1e3)
        if self.perturbed is not None:
            _check("perturbed", self.perturbed, 0, 1e3)
        _check("image_scale", self.image_scale, 0, 1e3)
        if not (self.loss is None or callable(self.loss)):
            raise ValueError(f"guidance.loss: expected a function of pictures, got {self.loss!r}")
        _check("loss_scale", self.loss_scale, -1e9, 1e9)


def _check(name: str, value: Any, least: float, most: float) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (real and least <= value <= most):
        raise ValueError(f"guidance.{name}: expected a number from {least:g} to {most:g}, got {value!r}")


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


def compose(conditional: jax.Array, unconditional: jax.Array, weights: Scalar) -> jax.Array:
    """Several prompts of one picture as one output (Liu et al. 2022, "Composable diffusion", eq. 11).

    Args:
      conditional: (B, P, h, w, C) float32, the outputs with each of the prompts.
      unconditional: (B, h, w, C) float32.
      weights: (B, P) float32, or (B, P, h, w, 1) where prompts have regions.

    Returns:
      (B, h, w, C) float32: u + sum of weights (c - u), to be guided like any conditional output.
    """
    weights = jnp.asarray(weights)
    if weights.ndim == 2:
        weights = weights[:, :, None, None, None]
    return unconditional + (weights * (conditional - unconditional[:, None])).sum(1)


def across(conditional: jax.Array, unconditional: jax.Array, negative: jax.Array, weight: Scalar) -> jax.Array:
    """Takes from the conditional output what the negative prompt adds across it (Armandpour et al. 2023, eq. 6).

    Args:
      conditional, unconditional, negative: (B, h, w, C) float32, outputs with the prompt, with none and with the
        negative prompt.
      weight: () float32.

    Returns:
      (B, h, w, C) float32: c - weight·n, n being the part of (negative - u) that is perpendicular to (c - u).
    """
    axes = tuple(range(1, conditional.ndim))
    main, other = conditional - unconditional, negative - unconditional
    size = jnp.sum(main * main, axes, keepdims=True)
    along = jnp.sum(main * other, axes, keepdims=True) / jnp.where(size > 0, size, 1.0)
    return conditional - jnp.asarray(weight) * (other - along * main)


def limit(x0: jax.Array, threshold: Scalar, quantile: Scalar | None) -> jax.Array:
    """Predicted clean latents within a threshold: cut off, or by a quantile scaled down (Saharia et al. 2022, 2.3).

    Args:
      x0: (B, h, w, C) float32.
      threshold: () float32, above 0.
      quantile: () float32 in [0, 1]; each picture is divided by that quantile of its size, where it is beyond the
        threshold. None: all is only cut.
    """
    threshold = jnp.asarray(threshold)
    if quantile is None:
        return jnp.clip(x0, -threshold, threshold)
    size = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), jnp.asarray(quantile), axis=1)
    size = jnp.maximum(size, threshold).reshape(-1, *[1] * (x0.ndim - 1))
    return jnp.clip(x0, -size, size) * (threshold / size)


def per_row(
    scale: float | Sequence[float], num_inference_steps: int, step: np.ndarray, name: str = "guidance_scale"
) -> np.ndarray:
    """The scale of each row of a sampler's table.

    Args:
      scale: a number, or `num_inference_steps` of them, one per step of the whole run: image-to-image
        begins in the middle and uses those from there on.
      step: (T,) `rows.step`, the user's step that each row belongs to.
      name: of the argument, for messages.

    Returns:
      (T,) float32. Guidance may be left out of the program when all of them are at most 1.

    Raises:
      ValueError: another length, or what is no finite number.
    """
    scales: list[Any]
    if isinstance(scale, (Sequence, np.ndarray)) and np.ndim(scale):
        scales = list(scale)
    else:
        scales = [scale] * num_inference_steps
    if len(scales) != num_inference_steps:
        raise ValueError(
            f"{name}: got {len(scales)} numbers for num_inference_steps={num_inference_steps};"
            " give one number, or one per step of the whole run"
        )
    for i, value in enumerate(scales):
        if not (isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)):
            raise ValueError(f"{name}: expected finite numbers, got {value!r} for step {i}")
    return np.asarray(scales, np.float32)[step]
