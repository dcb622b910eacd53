"""What the program does at its edges: pixels, ranges, masks. The whole of it: test_generation.py, parity/."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax import program


def test_pixels_there_and_back():
    levels = np.arange(256, dtype=np.uint8)
    unit = np.asarray(program.to_unit(levels))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, levels / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(program.to_pixels(unit), levels)


def test_values_out_of_range_are_clipped():
    np.testing.assert_array_equal(program.to_pixels(np.array([-9, -1, 0, 1, 9], np.float32)), [0, 0, 128, 255, 255])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 8]))
def test_no_masked_pixel_is_left_half_known(seed, h, w, factor):
    rng = np.random.default_rng(seed)
    mask = np.maximum(rng.random((2, h * factor, w * factor, 1), np.float32) - 0.9, 0)  # soft edges count as masked
    pooled = np.asarray(program.max_pool(mask, factor))
    assert pooled.shape == (2, h, w, 1)
    for b, y, x in np.ndindex(2, h, w):
        cell = mask[b, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert pooled[b, y, x, 0] == (cell > 0).any()
