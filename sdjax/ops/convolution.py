"""Two-dimensional convolution of channels-last pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.ops.matmul import matmul

Padding = tuple[tuple[int, int], tuple[int, int]]

# From so many on, products of matrices in bfloat16 are faster than XLA's convolution on a CPU, which widens them first.
CHANNELS = 128


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
    if x.dtype == jnp.bfloat16 and min(kernel.shape[2:]) >= CHANNELS and jax.default_backend() == "cpu":
        return _by_places(x, kernel, stride, padding)
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _by_places(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`convolution` as a sum of products, one for each place in the kernel."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, *size, channels = x.shape
    down, across = ((side - taken) // stride for side, taken in zip(size, kernel.shape, strict=False))
    total: jax.Array | None = None
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            last = (batch, i + stride * down + 1, j + stride * across + 1, channels)
            product = matmul(lax.slice(x, (0, i, j, 0), last, (1, stride, stride, 1)), kernel[i, j], x.dtype)
            total = product if total is None else total + product
    assert total is not None
    return total.astype(x.dtype)
