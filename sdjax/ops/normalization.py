"""Group and layer normalisation: statistics in float32 by two passes, whatever the dtype of the input.

A group norm stays in float32: what follows is an activation, which a CPU would compute in bfloat16 at half the speed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.ops.strips import as_integers, widened

# So many values at a time stay in a CPU's cache.
BLOCK = 2**21


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float) -> jax.Array:
    """Wu & He 2018: each of `groups` runs of channels is brought to mean 0 and variance 1 over its pixels.

    Args:
      x: (B, ..., C), any number of axes between batch and channels.
      scale, bias: (C,).
      groups: a divisor of C.
      epsilon: added to the variance.

    Returns:
      An array of x's shape, float32.
    """
    # Rank 3, pixels flattened: XLA's CPU kernels are wrong or slow from rank 6 up.
    mean, variance = moments(x.reshape(x.shape[0], -1, x.shape[-1]), groups)
    return normalize(x, mean, variance, scale, bias, epsilon)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def moments(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """(B, P, C) -> mean and variance (B, 1, G, 1) of each of the groups of channels, float32.

    Those of blocks of pixels come first, and of single channels, then what these have among themselves: the variance of
    a whole is its parts' and that of their means. So a CPU reads a large map once, and keeps no float32 copy of it.
    """
    batch, pixels, channels = x.shape
    size = pixels
    if jax.default_backend() == "cpu":
        fit = max(BLOCK // (batch * channels), 1)
        size = next(size for size in range(min(fit, pixels), 0, -1) if pixels % size == 0)

    def block(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Two passes: E[x^2] - E[x]^2 loses three digits at the means that occur in trained VAEs.
        mean = part.mean(1, keepdims=True)
        return mean[:, 0], jnp.square(part - mean).mean(1)

    if size == pixels:
        means, variances = (each[:, None] for each in block(x.astype(jnp.float32)))
    else:
        starts, source = size * jnp.arange(pixels // size), as_integers(x)
        each = lax.map(lambda start: block(widened(lax.dynamic_slice_in_dim(source, start, size, 1))), starts)
        means, variances = (jnp.moveaxis(part, 0, 1) for part in each)
    grouped = (batch, -1, groups, channels // groups)
    means, variances = means.reshape(grouped), variances.reshape(grouped)
    mean = means.mean((1, 3), keepdims=True)
    return mean, (variances + jnp.square(means - mean)).mean((1, 3), keepdims=True)


@moments.defjvp
def _moments_jvp(groups: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Any, Any]:
    (x,), (change,) = primals, tangents
    mean, variance = moments(x, groups)
    shape = (x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = x.astype(jnp.float32).reshape(shape) - mean
    changes = change.astype(jnp.float32).reshape(shape)
    by_mean, by_variance = ((factor * changes).mean((1, 3), keepdims=True) for factor in (1.0, 2.0 * centred))
    return (mean, variance), (by_mean, by_variance)


def normalize(
    x: jax.Array, mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """What `group_norm` does with the statistics of its groups, here given: mean and variance (B, 1, G, 1)."""
    groups = mean.shape[2]
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    gain = lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32).reshape(1, 1, groups, -1)
    normed = (grouped - mean) * gain + bias.astype(jnp.float32).reshape(1, 1, groups, -1)
    return normed.reshape(x.shape)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Ba et al. 2016, over the last axis. x: (..., D); scale, bias: (D,). Returns x's shape and dtype."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    along_last = (1,) * (x.ndim - 1) + (-1,)
    normed = centred * lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32).reshape(along_last)
    return (normed + bias.astype(jnp.float32).reshape(along_last)).astype(x.dtype)
