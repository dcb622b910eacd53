"""Two-dimensional convolution of channels-last pictures."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.ops.matmul import matmul
from sdjax.ops.strips import Padding, change_of_product, in_strips

# From so many on, products of matrices are faster than XLA's convolution on a CPU.
CHANNELS = 128
# What they are made of lies there many times over; so many numbers at a time stay in a CPU's cache.
STRIP = 2**21


def convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Cross-correlation of x with kernel, as PyTorch's Conv2d.

    Args:
      x: (B, H, W, C). Channels last and kernels HWIO are the only layout that XLA's CPU backend
        hands to its fast kernels from inside a scan, and the one Hopper GPUs want.
      kernel: (height, width, C, O), of x's dtype.
      stride: of both axes.
      padding: zeros ((above, below), (left, right)).

    Returns:
      (B, H', W', O), of x's dtype.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return matmul(x, kernel[0, 0], x.dtype).astype(x.dtype)
    if min(kernel.shape[2:]) >= CHANNELS and jax.default_backend() == "cpu":
        return _as_product(x, kernel, stride, padding)
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _as_product(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`convolution` as one product, of what the kernel sees from each place (im2col), strip by strip of the map."""
    tall, wide, channels, _ = kernel.shape
    down, across = (
        (length + sum(added) - size) // stride + 1
        for length, added, size in zip(x.shape[1:3], padding, (tall, wide), strict=True)
    )
    count = -(-len(x) * down * across * tall * wide * channels // STRIP)
    return in_strips(lambda x: _product(x, kernel, stride), x, padding, down, stride, tall - stride, count)[:, :down]


@functools.partial(_as_product.defjvp, symbolic_zeros=True)
def _as_product_jvp(
    stride: int, padding: Padding, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _product(jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel, stride)

    return _as_product(*primals, stride, padding), change_of_product(whole, primals, tangents).astype(primals[0].dtype)


def _product(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Of a map with its border, float32."""
    x = x.astype(kernel.dtype)
    batch, height, width, channels = x.shape
    tall, wide = kernel.shape[:2]
    ends = stride * ((height - tall) // stride) + 1, stride * ((width - wide) // stride) + 1
    views = [
        lax.slice(x, (0, i, j, 0), (batch, i + ends[0], j + ends[1], channels), (1, stride, stride, 1))
        for i in range(tall)
        for j in range(wide)
    ]
    return matmul(jnp.concatenate(views, -1), kernel.reshape(tall * wide * channels, -1), x.dtype)
