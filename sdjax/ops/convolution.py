"""Two-dimensional convolution of channels-last pictures."""

from __future__ import annotations

import jax
from jax import lax

from sdjax.ops.matmul import matmul

Padding = tuple[tuple[int, int], tuple[int, int]]


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
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
