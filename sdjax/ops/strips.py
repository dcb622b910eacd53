"""A map a few rows at a time, so that what lies between stays in a CPU's cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def wide_slice(x: jax.Array, first: jax.Array, size: int, axis: int) -> jax.Array:
    """`lax.dynamic_slice_in_dim` in float32.

    Of bfloat16 XLA's CPU backend would make a float32 copy of the whole array, ahead of a loop too, and slice that.
    So it is sliced as integers; they are the upper halves of float32's.
    """
    if x.dtype != jnp.bfloat16:
        return lax.dynamic_slice_in_dim(x, first, size, axis).astype(jnp.float32)
    bits = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(x, jnp.uint16), first, size, axis)
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


@wide_slice.defjvp
def _wide_slice_jvp(size: int, axis: int, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    x, first = primals
    change = lax.dynamic_slice_in_dim(tangents[0], first, size, axis).astype(jnp.float32)
    return wide_slice(x, first, size, axis), change
