"""What is minimised, against torch and the papers' formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.schedule import Schedule
from sdjax.training import losses

RNG = np.random.default_rng(0)


def test_autoencoder_loss():
    images, reconstruction = RNG.uniform(-1, 1, (2, 3, 4, 4, 3)).astype(np.float32)
    mean, logvar = RNG.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
    value, parts = losses.autoencoder_loss(reconstruction, images, mean, logvar, kl_weight=0.3)
    posterior = torch.distributions.Normal(torch.from_numpy(mean), torch.exp(0.5 * torch.from_numpy(logvar)))
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean().item()
    error = np.square(images - reconstruction).mean()
    np.testing.assert_allclose(value, error + 0.3 * divergence, rtol=1e-5)
    np.testing.assert_allclose(parts["kl"], divergence, rtol=1e-5)
    np.testing.assert_allclose(parts["psnr"], 10 * np.log10(2**2 / error), rtol=1e-5)


def test_contrastive_loss_is_clip():
    images, texts = RNG.normal(size=(2, 8, 5)).astype(np.float32)
    value, parts = losses.contrastive_loss(images, texts, jnp.float32(1.3))
    a, b = (torch.nn.functional.normalize(torch.from_numpy(x), dim=-1) for x in (images, texts))
    logits = np.exp(1.3) * a @ b.T
    labels = torch.arange(8)
    cross = torch.nn.functional.cross_entropy
    np.testing.assert_allclose(value, (cross(logits, labels) + cross(logits.T, labels)).item() / 2, rtol=1e-5)
    np.testing.assert_allclose(parts["accuracy"], (logits.argmax(1) == labels).float().mean().item())


def test_denoising_loss_weighs_pictures():
    output, target = RNG.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
    weights = np.array([0.0, 1.0, 2.0], np.float32)
    expected = (weights * np.square(output - target).mean((1, 2, 3))).mean()
    np.testing.assert_allclose(losses.denoising_loss(output, target, weights), expected, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_min_snr_is_one_loss_of_the_clean_latents(prediction):
    """Whatever is predicted, the weighted error is min(SNR, 5) times that of x0 (Hang et al. 2023, section 3.4)."""
    alpha_bar = Schedule().alphas_cumprod[[1, 100, 500, 999]]
    weights = np.asarray(losses.min_snr_weights(jnp.asarray(alpha_bar, jnp.float32), prediction))
    snr = alpha_bar / (1 - alpha_bar)
    # The squared error of x0 for a unit squared error of the output.
    of_x0 = {"epsilon": (1 - alpha_bar) / alpha_bar, "v": 1 - alpha_bar, "sample": np.ones(4)}[prediction]
    np.testing.assert_allclose(weights, np.minimum(snr, 5.0) * of_x0, rtol=1e-3)
