"""A map a few rows at a time, so that what lies between stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def in_strips(
    layer: Callable[[jax.Array], jax.Array], x: jax.Array, rows: int, step: int, border: int, count: int
) -> jax.Array:
    """What a layer gives for a map, strip by strip.

    Args:
      layer: (B, step n + border, W, C) -> (B, m n, W', O), for any n and one m.
      x: (B, H, W, C), with its border; rows that the last strip lacks are zeros.
      rows: n of the whole map.
      step, border: of the layer.
      count: about how many strips; there are no more than rows.

    Returns:
      (B, at least m rows, W', O).
    """
    at_once = -(-rows // min(count, rows))
    count = -(-rows // at_once)
    x = jnp.pad(x, ((0, 0), (0, max(0, step * at_once * count + border - x.shape[1])), (0, 0), (0, 0)))
    if count == 1:
        return layer(x)

    def strip(first: jax.Array) -> jax.Array:
        return layer(lax.dynamic_slice_in_dim(x, first, step * at_once + border, 1))

    strips = lax.map(strip, step * at_once * jnp.arange(count))
    return jnp.moveaxis(strips, 0, 1).reshape(x.shape[0], -1, *strips.shape[3:])
