"""3x3 convolutions with fewer products, exact but for rounding (Winograd 1980; Lavin & Gray 2016, arXiv 1509.09308).

A tile of m x m results takes (m + 2)^2 products for every pair of channels in place of 9 m^2: 2.25 times fewer for
m = 2, four times for m = 4. Each product's place in the tile is one matrix product over channels, which is what XLA's
CPU backend is best at; its own convolution is 2 to 5 times slower. A GPU has better kernels of its own.

Y = A^T [(G g G^T) * (B^T d B)] A, where the matrices evaluate polynomials at n - 1 points and at infinity (Toom-Cook).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from sdjax.ops.matmul import matmul
from sdjax.ops.strips import Padding, change_of_product, in_strips

# A map is taken in strips of so many numbers for each m, so that what lies between stays in a CPU's cache.
STRIP = {2: 2**20, 4: 2**21}
# With fewer small tiles at a time the products, as many as without strips, wait for their matrices.
TILES = 512
# The usual points of m = 4, which are 0, ±1 and ±2, have twice the error of these.
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


class Transform(NamedTuple):
    """The three matrices of m results out of n = m + 2 inputs."""

    results: np.ndarray  # A^T, (m, n)
    kernel: np.ndarray  # G, (n, 3)
    inputs: np.ndarray  # B^T, (n, n)


@functools.cache
def transform(m: int) -> Transform:
    """Of tiles of m x m results, m one of POINTS."""
    points, n = POINTS[m], m + 2
    results, kernel, inputs = np.zeros((m, n)), np.zeros((n, 3)), np.zeros((n, n))
    for j, point in enumerate(points):
        others = [other for other in points if other != point]
        results[:, j] = point ** np.arange(m)
        kernel[j] = point ** np.arange(3) / np.prod([point - other for other in others])
        inputs[j, :-1] = np.poly(others)[::-1]
    results[-1, -1] = kernel[-1, -1] = 1.0
    inputs[-1] = np.poly(points)[::-1]
    # Powers of two between the kernel and the inputs, so that neither gets small beside the other.
    scale = 2.0 ** np.round(np.log2(np.linalg.norm(inputs, axis=1, keepdims=True)))
    return Transform(results, kernel * scale, inputs / scale)


def prepare(kernel: np.ndarray, m: int, dtype: jax.typing.DTypeLike) -> list[np.ndarray]:
    """(3, 3, I, O) -> the kernel as `convolution` takes it: G g G^T, made in float32 and rounded once.

    Of small tiles n^2 times (I, O), row by row of a tile's places; of large ones n times (n, I, O), column by column.
    """
    along = transform(m).kernel
    if m == 2:
        return list(_prepare(kernel, np.einsum("ai,bj->abij", along, along), dtype))
    places = _prepare(kernel, np.einsum("ai,bj->baij", along, along), dtype)
    return list(places.reshape(len(along), len(along), *kernel.shape[2:]))


def prepare_upsampled(kernel: np.ndarray, dtype: jax.typing.DTypeLike) -> list[np.ndarray]:
    """(3, 3, I, O) -> 9 times (I, O), the kernel as `upsampled` takes it, made in float32 and rounded once."""
    along = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    return list(_prepare(kernel, np.einsum("ai,bj->abij", along, along), dtype))


def _prepare(kernel: np.ndarray, places: np.ndarray, dtype: jax.typing.DTypeLike) -> np.ndarray:
    """(3, 3, I, O) and (n, n, 3, 3) -> (n^2, I, O)."""
    matrix = places.reshape(-1, 9).astype(np.float32)
    flat, dtype = kernel.reshape(9, -1), np.dtype(dtype)
    # JAX takes an array as it lies, without a copy, where it begins at a multiple of 64 bytes.
    size = len(matrix) * flat.shape[1] * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    out = buffer[-buffer.ctypes.data % 64 :][:size].view(dtype).reshape(len(matrix), -1)
    step = 32768  # of numbers, so that what lies between stays in a cache
    for first in range(0, flat.shape[1], step):
        part = slice(first, first + step)
        out[:, part] = matrix @ flat[:, part].astype(np.float32)
    return out.reshape(len(matrix), *kernel.shape[2:])


@jax.custom_jvp
def convolution(x: jax.Array, prepared: Sequence[jax.Array], bias: jax.Array) -> jax.Array:
    """The 3x3 convolution of stride 1 with a border of zeros.

    Args:
      x: (B, H, W, I), of any size.
      prepared: what `prepare` returns, in the dtype of the products; they are summed in float32.
      bias: (O,), added in float32.

    Returns:
      (B, H, W, O), of x's dtype.
    """
    batch, height, width, _ = x.shape
    m = _tile(prepared)
    down, across = -(-height // m), -(-width // m)  # tiles
    count = _strips(x, batch * down * across, m)

    def layer(x: jax.Array) -> jax.Array:
        return _tiles(x, prepared, m)[:, :, :width] + _wide(bias)

    return in_strips(layer, x, _padding(x, m), down, m, 2, count)[:, :height]


@functools.partial(convolution.defjvp, symbolic_zeros=True)
def _convolution_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    m = _tile(primals[1])

    def whole(x: jax.Array, prepared: Sequence[jax.Array]) -> jax.Array:
        _, height, width, _ = x.shape
        return _tiles(jnp.pad(x, ((0, 0), *_padding(x, m), (0, 0))), prepared, m)[:, :height, :width]

    return convolution(*primals), _change(whole, primals, tangents)


def _padding(x: jax.Array, m: int) -> Padding:
    """Of whole tiles with a border of one."""
    _, height, width, _ = x.shape
    return (1, -height % m + 1), (1, -width % m + 1)


def _strips(x: jax.Array, tiles: int, m: int) -> int:
    count = -(-x.size // STRIP[m])
    return min(count, max(tiles // TILES, 1)) if m == 2 else count


def _tile(prepared: Sequence[jax.Array]) -> int:
    return len(prepared) - 2 if prepared[0].ndim == 3 else math.isqrt(len(prepared)) - 2


def _tiles(x: jax.Array, prepared: Sequence[jax.Array], m: int) -> jax.Array:
    """Of whole tiles with a border of one: (B, m down + 2, m across + 2, I) -> (B, m down, m across, O) float32."""
    batch, height, width, channels = x.shape
    n, down, across = m + 2, (height - 2) // m, (width - 2) // m
    to_results, _, to_places = transform(m)

    def rows(i: int) -> jax.Array:
        """Row i of every tile."""
        row = lax.slice(x, (0, i, 0, 0), (batch, i + m * (down - 1) + 1, width, channels), (1, m, 1, 1))
        return row.astype(jnp.float32)

    def columns(row: jax.Array, j: int) -> jax.Array:
        return lax.slice(row, (0, 0, j, 0), (batch, down, j + m * (across - 1) + 1, channels), (1, 1, m, 1))

    def half(row: jax.Array, kernels: Sequence[jax.Array]) -> jax.Array:
        """A row of places: the results along it, (B, down, m across, O)."""
        tiles = [combine(weights, [columns(row, j) for j in range(n)]) for weights in to_places]
        products = [matmul(tile, kernel, kernel.dtype) for tile, kernel in zip(tiles, kernels, strict=True)]
        halves = jnp.stack([combine(weights, products) for weights in to_results], 3)
        return halves.reshape(batch, down, across * m, -1)

    if m == 2:
        each = [combine(weights, [rows(i) for i in range(n)]) for weights in to_places]
        halves = [half(row, prepared[a * n : (a + 1) * n]) for a, row in enumerate(each)]
    else:
        # In loops, because the time that XLA takes to load a compiled program grows with its products times its
        # instructions: without them Stable Diffusion 1.5 in float32 took 24 s.
        combined = lax.map(lambda weights: sum(weights[i] * rows(i) for i in range(n)), to_places.astype(np.float32))
        stacked = lax.map(lambda each: half(each[0], each[1]), (combined, list(prepared)))
        halves = [stacked[a] for a in range(n)]
    out = jnp.stack([combine(weights, halves) for weights in to_results], 2)
    return out.reshape(batch, down * m, across * m, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def upsampled(x: jax.Array, prepared: Sequence[jax.Array], bias: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """The same convolution of the map doubled by repetition, with four times fewer products.

    Along one axis, with the differences d[i] = x[i] - x[i - 1] and the kernel's sum s, two neighbouring results are

      y[2i] = s x[i] - w[0] d[i],    y[2i + 1] = s x[i] + w[2] d[i + 1]:

    three products for two results, which both axes together make nine for four.

    Args:
      x: (B, H, W, I).
      prepared: what `prepare_upsampled` returns, in the dtype of the products; they are summed in float32.
      bias: (O,), added in float32.
      size: (H', W') of the doubled map, each 2H, or 2H - 1 where its last row is cut off before the convolution.

    Returns:
      (B, H', W', O), of x's dtype.
    """
    batch, height, width, _ = x.shape
    whole = size == (2 * height, 2 * width)  # else the last rows are not like the others
    count = _strips(x, batch * height * width, 2) if whole else 1

    def layer(x: jax.Array) -> jax.Array:
        cut = (x.shape[1] * 2 - 4, size[1]) if whole else size
        return _doubled(x, prepared, cut) + _wide(bias)

    return in_strips(layer, x, ((1, 1), (1, 1)), height, 1, 2, count)[:, : size[0]]


@functools.partial(upsampled.defjvp, symbolic_zeros=True)
def _upsampled_jvp(
    size: tuple[int, ...], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    def whole(x: jax.Array, prepared: Sequence[jax.Array]) -> jax.Array:
        return _doubled(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), prepared, size)

    return upsampled(*primals, size), _change(whole, primals, tangents)


def _doubled(x: jax.Array, prepared: Sequence[jax.Array], size: tuple[int, ...]) -> jax.Array:
    """`upsampled` of a map with a border of one, (B, H + 2, W + 2, I) -> (B, H', W', O) float32."""
    x = x.astype(jnp.float32)

    def inner(x: jax.Array, axis: int) -> jax.Array:
        return lax.slice_in_dim(x, 1, x.shape[axis] - 1, axis=axis)

    def difference(x: jax.Array, axis: int) -> jax.Array:
        """One longer along the axis than what is within the border."""
        return lax.slice_in_dim(x, 1, None, axis=axis) - lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)

    down, level = difference(x, 1), inner(x, 1)
    maps = {
        (0, 0): inner(level, 2),
        (0, 1): difference(level, 2),
        (1, 0): inner(down, 2),
        (1, 1): difference(down, 2),
    }
    kinds = (1, 0, 1)  # of the three products along an axis: of differences, of the map itself, of differences

    def product(a: int, b: int) -> jax.Array:
        matrix = prepared[3 * a + b]
        return matmul(maps[kinds[a], kinds[b]], matrix, matrix.dtype)

    def interleave(first: jax.Array, middle: jax.Array, last: jax.Array, axis: int) -> jax.Array:
        length, cut = middle.shape[axis], size[axis - 1] % 2
        even = middle - lax.slice_in_dim(first, 0, length, axis=axis)
        odd = middle + lax.slice_in_dim(last, 1, length + 1, axis=axis)
        if cut:  # what the last even one sees after it is not there
            beyond = [(0, 0)] * 4
            beyond[axis] = (length - 1, 0)
            even = even + jnp.pad(lax.slice_in_dim(last, length, length + 1, axis=axis), beyond)
        both = jnp.stack([even, odd], axis + 1)
        return both.reshape(*both.shape[:axis], 2 * length, *both.shape[axis + 2 :])

    first, middle, last = (interleave(product(a, 0), product(a, 1), product(a, 2), 2) for a in range(3))
    return interleave(first, middle, last, 1)[:, : size[0], : size[1]]


def _change(product: Callable[[Any, Any], jax.Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> jax.Array:
    """The tangent of product(x, prepared) + bias, of x's dtype."""
    change = change_of_product(product, primals[:2], tangents[:2])
    if not isinstance(tangents[2], SymbolicZero):
        change = change + _wide(tangents[2])
    return change.astype(primals[0].dtype)


def _wide(bias: jax.Array) -> jax.Array:
    """(O,) -> (1, 1, 1, O) float32."""
    return bias.astype(jnp.float32).reshape(1, 1, 1, -1)


def combine(weights: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    """The sum of weight times array, without what is times 0 or 1."""
    terms = [
        array if weight == 1.0 else -array if weight == -1.0 else float(weight) * array
        for weight, array in zip(weights, arrays, strict=True)
        if weight != 0.0
    ]
    return functools.reduce(jnp.add, terms)
