"""Guidance against the formulas and diffusers' rescaling."""

import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from sdjax import guidance

RNG = np.random.default_rng(0)
CONDITIONAL, UNCONDITIONAL = RNG.normal(size=(2, 3, 5, 4, 4)).astype(np.float32)


def guide(scale, rescale=0.0):
    with jax.numpy_dtype_promotion("strict"):
        return np.asarray(guidance.guide(CONDITIONAL, UNCONDITIONAL, np.float32(scale), np.float32(rescale)))


def test_is_the_formula():
    np.testing.assert_allclose(
        guide(7.5), UNCONDITIONAL + np.float32(7.5) * (CONDITIONAL - UNCONDITIONAL), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(guide(1.0), CONDITIONAL, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(guide(0.0), UNCONDITIONAL)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_is_diffusers(rescale):
    guided, text = (torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for x in (guide(7.5), CONDITIONAL))
    reference = np.moveaxis(rescale_noise_cfg(guided, text, guidance_rescale=rescale).numpy(), 1, -1)
    # They divide by the sample's deviation and we by the population's; the ratio is the same.
    np.testing.assert_allclose(guide(7.5, rescale), reference, rtol=1e-5, atol=1e-5)


def test_rescaling_a_flat_output_has_a_gradient():
    flat = np.ones((1, 2, 2, 1), np.float32)
    gradient = jax.grad(lambda c: guidance.guide(c, flat, np.float32(2), np.float32(1)).sum())(flat)
    assert np.isfinite(gradient).all()


def test_one_scale_per_row():
    steps = np.array([2, 2, 3, 4])
    np.testing.assert_array_equal(guidance.per_row(7.5, 5, steps), np.full(4, 7.5, np.float32))
    np.testing.assert_array_equal(guidance.per_row([0, 1, 2, 3, 4], 5, steps), [2, 2, 3, 4])
    np.testing.assert_array_equal(guidance.per_row(np.arange(5.0), 5, steps), [2, 2, 3, 4])


@pytest.mark.parametrize("scale", [[1.0, 2.0], "7", None, float("inf"), [1, 2, 3, 4, float("nan")]])
def test_refuses_other_scales(scale):
    with pytest.raises(ValueError, match="guidance_scale"):
        guidance.per_row(scale, 5, np.arange(5))


@pytest.mark.parametrize("rescale", [-0.1, 1.1, float("nan"), "0.5"])
def test_refuses_other_rescales(rescale):
    with pytest.raises(ValueError, match=r"guidance\.rescale"):
        guidance.Options(rescale=rescale)
