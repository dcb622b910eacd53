"""Two-dimensional convolution of channels-last pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

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
        # Only a result in float32 keeps XLA's CPU backend from widening bfloat16 factors first.
        contract_last = (((3,), (0,)), ((), ()))
        return lax.dot_general(x, kernel[0, 0], contract_last, preferred_element_type=jnp.float32).astype(x.dtype)
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
