"""A map a few rows at a time, so that what lies between stays in a CPU's cache.

XLA's CPU backend takes slices of bfloat16 at a place known only when it runs from a float32 copy of the whole, which it
makes ahead of the loop, and rounds into such a place one number at a time. So bfloat16 goes through loops as integers,
the upper halves of float32's. They have no gradients: what is computed so has a rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

Padding = tuple[tuple[int, int], tuple[int, int]]


def in_strips(
    layer: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    padding: Padding,
    rows: int,
    step: int,
    border: int,
    count: int,
) -> jax.Array:
    """What a layer gives for a map, strip by strip. Only of one strip does it have a gradient.

    Args:
      layer: (B, step n + border, W, C) -> (B, m n, W', O), for any n and one m. It is given x's dtype or float32.
      x: (B, H, W, C).
      padding: zeros ((above, below), (left, right)) around it; rows that the last strip lacks are more of them.
      rows: n of the whole map.
      step, border: of the layer.
      count: about how many strips; there are no more than rows.

    Returns:
      (B, at least m rows, W', O), of x's dtype.
    """
    at_once = -(-rows // min(count, rows))
    count = -(-rows // at_once)
    (above, below), sides = padding
    below += max(0, step * at_once * count + border - x.shape[1] - above - below)
    if count == 1:
        return layer(jnp.pad(x, ((0, 0), (above, below), sides, (0, 0)))).astype(x.dtype)
    source = as_integers(jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0))))

    def strip(source: jax.Array, i: jax.Array) -> jax.Array:
        part = widened(lax.dynamic_slice_in_dim(source, i * (step * at_once), step * at_once + border, 1))
        # Padding is where XLA ends a fusion: without, all that reads the strip would slice and widen it again.
        part = jnp.pad(part, ((0, 0), (0, 0), sides, (0, 0)))
        return as_integers(layer(part).astype(x.dtype))

    batch, taken, *rest = jax.eval_shape(strip, source, jnp.int32(0)).shape
    if (batch, taken, *rest) == (len(x), step * at_once, *x.shape[2:]):
        # In place: no strip reads the rows that an earlier one has written.
        out = lax.fori_loop(0, count, lambda i, out: _written(out, strip(out, i), i), source)
    else:
        # Any one number will do, all are written. Zeros would be shared by all such loops and copied for each.
        empty = jnp.broadcast_to(source[:1, :1, :1, :1], (batch, taken * count, *rest))
        out = lax.fori_loop(0, count, lambda i, out: _written(out, strip(source, i), i), empty)
    return lax.bitcast_convert_type(out, x.dtype)


def _written(out: jax.Array, strip: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(out, strip, i * strip.shape[1], 1)


def as_integers(x: jax.Array) -> jax.Array:
    """bfloat16 -> uint16, the same bits; another dtype stays."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def widened(x: jax.Array) -> jax.Array:
    """What `as_integers` returns -> float32."""
    if x.dtype != jnp.uint16:
        return x.astype(jnp.float32)
    return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)


def change_of_product(
    product: Callable[[Any, Any], jax.Array], factors: tuple[Any, Any], changes: tuple[Any, Any]
) -> jax.Array:
    """The tangent of what is linear in each of two factors; nothing is computed for a change that is zero.

    Args:
      product: of factors that are an array and a tree of arrays, float32.
      factors, changes: of these, as a rule of `jax.custom_jvp` with symbolic zeros is given them.
    """
    x, weights = factors
    by_x, by_weights = changes

    def there(change: Any) -> bool:
        return not isinstance(change, SymbolicZero)

    change = jnp.zeros(jax.eval_shape(product, x, weights).shape)
    if there(by_x):
        change = change + product(by_x, weights)
    if any(map(there, jax.tree.leaves(by_weights))):
        filled = jax.tree.map(lambda each: each if there(each) else jnp.zeros(each.shape, each.dtype), by_weights)
        change = change + product(x, filled)
    return change
