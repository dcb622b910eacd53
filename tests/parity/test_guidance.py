"""Guidance and its rescaling against diffusers."""

import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from sdjax.guidance import guide


@pytest.mark.parametrize("scale", [0.5, 1.0, 7.5])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance(scale, rescale):
    c, u = np.random.default_rng(0).normal(0.2, 1, (2, 3, 4, 6, 4)).astype(np.float32)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(guide)(c, u, np.float32(scale), np.float32(rescale))
    text, uncond = torch.from_numpy(c), torch.from_numpy(u)
    expected = uncond + scale * (text - uncond)  # StableDiffusionPipeline.__call__
    if rescale > 0:
        expected = rescale_noise_cfg(expected, text, guidance_rescale=rescale)
    expected = expected.numpy()
    # Of the largest number: 2.8e-7 was seen.
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
