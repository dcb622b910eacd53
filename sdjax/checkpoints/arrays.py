"""Arrays of a model's size: whether their numbers are finite, and how they are laid out anew."""

from __future__ import annotations

import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
CHUNK = 1 << 18  # numbers at a time: they stay in the processor's cache
PIECE = 1 << 20  # bytes, likewise
# XLA's CPU backend uses an array where it lies, without a copy, when it begins at a multiple of this.
ALIGNMENT = 64


def is_finite(x: np.ndarray) -> bool:
    """Whether a floating-point array has neither NaN nor infinity; reads it once, in pieces."""
    # Exponents of all ones are infinities and NaNs. As integers, because NumPy has no fast isfinite for 16 bits.
    integer = np.dtype(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(integer)
    flat = x.ravel("K").view(integer)  # in the order of the memory: a transposed view is not copied
    return not any(((flat[start : start + CHUNK] & infinity) == infinity).any() for start in range(0, flat.size, CHUNK))


def contiguous(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in this dtype and in the order of its axes: itself if it is so, else an aligned copy."""
    if x.flags.c_contiguous and x.dtype == dtype:
        return x
    size = x.size * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    laid = room[start : start + size].view(dtype).reshape(x.shape)
    # Piece by piece of what the array is a view of, so that each is in the cache while it is read in another order.
    outer = int(np.argmax(x.strides)) if x.ndim else 0
    length = max(1, PIECE // max(x.strides[outer], 1)) if x.ndim else 1
    with np.errstate(over="ignore"):  # who rounds looks for infinities afterwards
        if x.size * x.itemsize <= PIECE:
            laid[...] = x
            return laid
        for begin in range(0, x.shape[outer], length):
            piece = (*[slice(None)] * outer, slice(begin, begin + length))
            laid[piece] = x[piece]
    return laid
