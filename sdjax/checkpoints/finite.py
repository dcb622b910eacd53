"""Whether numbers are finite: neither NaN nor infinity."""

from __future__ import annotations

import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
CHUNK = 1 << 18  # numbers at a time: they stay in the processor's cache


def is_finite(x: np.ndarray) -> bool:
    """Whether a floating-point array has neither NaN nor infinity; reads it once, in pieces."""
    # Exponents of all ones are infinities and NaNs. As integers, because NumPy has no fast isfinite for 16 bits.
    integer = np.dtype(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(integer)
    flat = x.ravel("K").view(integer)  # in the order of the memory: a transposed view is not copied
    return not any(((flat[start : start + CHUNK] & infinity) == infinity).any() for start in range(0, flat.size, CHUNK))
