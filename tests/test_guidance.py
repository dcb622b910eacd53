"""Guidance against its closed form, and the scale of each row."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import guidance, samplers
from sdjax.guidance import Options, guide, per_row

SHAPE = (3, 4, 6, 4)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def outputs():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2, *SHAPE)) * [[[[[1.0]]], [[[0.5]]], [[[3.0]]]]] + 0.3).astype(np.float32)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 7.5, 30.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_closed_form(scale, rescale):
    """Lin et al. 2023, eqs. 14-16, in float64."""
    c, u = outputs()
    found = jax.jit(guide)(c, u, np.float32(scale), np.float32(rescale))
    assert found.dtype == jnp.float32
    c, u = c.astype(np.float64), u.astype(np.float64)
    guided = u + scale * (c - u)
    ratio = c.std((1, 2, 3), keepdims=True) / guided.std((1, 2, 3), keepdims=True)
    expected = rescale * (guided * ratio) + (1 - rescale) * guided
    # Of the largest number: 1.6e-7 was seen.
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_no_rescale_is_plain_guidance_to_the_bit():
    c, u = outputs()
    scale = np.float32(7.5)
    assert np.array_equal(guide(c, u, scale, np.float32(0)), jnp.asarray(u) + scale * (jnp.asarray(c) - u))


def test_scale_1_is_the_conditional_output_and_0_the_unconditional():
    c, u = outputs()
    # u + (c - u) rounds twice: 5e-7 was seen.
    np.testing.assert_allclose(guide(c, u, np.float32(1), np.float32(0)), c, rtol=0, atol=1e-6)
    np.testing.assert_allclose(guide(c, u, np.float32(1), np.float32(1)), c, rtol=0, atol=2e-6)
    assert np.array_equal(guide(c, u, np.float32(0), np.float32(0)), u)


def test_rescaling_restores_the_contrast_of_each_picture():
    c, u = outputs()
    found = np.asarray(guide(c, u, np.float32(7.5), np.float32(1)), np.float64)
    np.testing.assert_allclose(found.std((1, 2, 3)), c.std((1, 2, 3)), rtol=1e-5)
    together = guide(c, u, np.float32(7.5), np.float32(0.7))
    for i in range(len(c)):  # what is a picture's own is not the batch's
        alone = guide(c[i : i + 1], u[i : i + 1], np.float32(7.5), np.float32(0.7))
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-6, atol=1e-6)


def test_flat_outputs_stay_finite():
    """Nothing to rescale: neither the output nor its gradient divides by zero."""
    flat, other = np.full(SHAPE, 0.25, np.float32), outputs()[0]

    @jax.jit
    def total(c, u, rescale):
        return jax.value_and_grad(lambda c, u: guide(c, u, np.float32(7.5), rescale).sum(), (0, 1))(c, u)

    assert np.array_equal(guide(flat, flat, np.float32(7.5), np.float32(0.7)), flat)
    assert not np.asarray(guide(flat, other, np.float32(7.5), np.float32(1))).any()  # as in diffusers
    for c, u in ((flat, flat), (flat, other), (other, flat)):
        for rescale in (0.0, 0.7, 1.0):
            value, gradients = total(c, u, np.float32(rescale))
            assert np.isfinite(value)
            assert np.isfinite(gradients).all()


@pytest.mark.parametrize("rescale", [-0.1, 1.1, float("nan"), float("inf"), "0.7", None])
def test_options_out_of_range(rescale):
    with pytest.raises(
        ValueError, match=re.escape(f"guidance.rescale: expected a number from 0 to 1, got {rescale!r}")
    ):
        Options(rescale=rescale)


def test_options_within_range():
    assert Options() == Options(rescale=0.0)
    assert Options(rescale=1).rescale == 1
    with pytest.raises(AttributeError):
        guidance.Options().rescale = 0.5


def test_one_scale_for_all_rows():
    step = samplers.create("ddpm").rows(20, 0.5).step
    for scale in (7.5, 7, np.float32(7.5), np.int64(3)):
        scales = per_row(scale, 20, step)
        assert scales.dtype == np.float32
        assert scales.tolist() == [float(scale)] * 10


def test_a_scale_for_every_step():
    """Counted over the whole run: image-to-image uses the last of them, a step of two rows one of them twice."""
    scales = [float(i) for i in range(20)]
    for given in (scales, tuple(scales), np.arange(20), np.arange(20.0)):
        assert per_row(given, 20, samplers.create("ddpm").rows(20).step).tolist() == scales
        assert per_row(given, 20, samplers.create("ddpm").rows(20, 0.5).step).tolist() == scales[10:]
        assert per_row(given, 20, np.array([17, 17, 18, 18, 19])).tolist() == [17, 17, 18, 18, 19]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([7.5, 7.5], "guidance_scale: got 2 numbers for num_inference_steps=3; give one number, or one per step"),
        ([], "guidance_scale: got 0 numbers for num_inference_steps=3; give one number, or one per step"),
        ("7.5", "guidance_scale: expected finite numbers, got '7.5' for step 0"),
        (None, "guidance_scale: expected finite numbers, got None for step 0"),
        (float("nan"), "guidance_scale: expected finite numbers, got nan for step 0"),
        ([1.0, float("inf"), 1.0], "guidance_scale: expected finite numbers, got inf for step 1"),
        ([1.0, 1.0, "a"], "guidance_scale: expected finite numbers, got 'a' for step 2"),
        (np.array(7.5), "guidance_scale: expected finite numbers, got array(7.5) for step 0"),
    ],
)
def test_what_per_row_refuses(scale, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        per_row(scale, 3, np.arange(3))
