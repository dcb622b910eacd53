"""Group and layer normalisation: statistics in float32 by two passes, whatever the dtype of the input.

A group norm stays in float32: what follows is an activation, which a CPU would compute in bfloat16 at half the speed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


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
    # Rank 4, pixels flattened: XLA's CPU kernels are wrong or slow from rank 6 up.
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    # Two passes: E[x^2] - E[x]^2 loses three digits at the means that occur in trained VAEs.
    variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
    return normalize(x, mean, variance, scale, bias, epsilon)


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
