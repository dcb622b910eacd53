"""Losses against their formulas and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.models.config import TINY
from sdjax.schedule import PREDICTIONS, Schedule, add_noise, target
from sdjax.training import contrastive, losses


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def test_autoencoder():
    """Mean squared error and torch's KL divergence, per latent number; PSNR for a range of 2."""
    images, reconstruction = np.tanh(normal(3, 8, 6, 3)), np.tanh(normal(3, 8, 6, 3, seed=1))
    mean, logvar = normal(3, 4, 3, 2, seed=2), normal(3, 4, 3, 2, seed=3)
    loss, parts = losses.autoencoder_loss(reconstruction, images, mean, logvar, 0.01)
    error = np.square(reconstruction.astype(np.float64) - images).mean()
    q = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(0.5 * logvar)))
    divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean().item()
    # Means of hundreds of float32 numbers: 2e-7 was seen.
    np.testing.assert_allclose(parts["kl"], divergence, rtol=2e-6)
    np.testing.assert_allclose(parts["psnr"], 20 * np.log10(2 / np.sqrt(error)), rtol=2e-6)
    np.testing.assert_allclose(loss, error + 0.01 * divergence, rtol=2e-6)
    nothing = losses.autoencoder_loss(images, images, jnp.zeros_like(mean), jnp.zeros_like(logvar), 1.0)[0]
    assert nothing == 0


@pytest.mark.parametrize("batch", [1, 7])
def test_contrastive(batch):
    """CLIP's loss by torch's cross-entropy, in float64, and its gradients."""
    inputs = normal(batch, 5), normal(batch, 5, seed=1), np.float32(1.3)
    ours = jax.jit(jax.value_and_grad(losses.contrastive_loss, (0, 1, 2), has_aux=True))
    (loss, parts), gradients = ours(*inputs)

    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in inputs]
    images, texts = (torch.nn.functional.normalize(x, dim=-1) for x in tensors[:2])
    logits, labels = tensors[2].exp() * images @ texts.T, torch.arange(batch)
    expected = sum(torch.nn.functional.cross_entropy(x, labels) for x in (logits, logits.T)) / 2
    expected.backward()
    # 4e-7 was seen.
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-6, atol=1e-6)
    for found, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(found, tensor.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts["accuracy"], (logits.argmax(1) == labels).double().mean())


def test_contrastive_of_pairs_that_match():
    """The lengths of features do not matter; captions and pictures in the same order are right, shifted all wrong."""
    features = np.eye(4, dtype=np.float32)
    loss, parts = losses.contrastive_loss(features * 7, features * 0.1, jnp.log(100.0))
    assert parts["accuracy"] == 1
    assert loss < 1e-6
    loss, parts = losses.contrastive_loss(features, np.roll(features, 1, 0), jnp.log(100.0))
    assert parts["accuracy"] == 0
    np.testing.assert_allclose(loss, 100, rtol=1e-5)


def test_denoising():
    output, wanted, weights = normal(3, 4, 6, 2), normal(3, 4, 6, 2, seed=1), np.array([1, 0, 3], np.float32)
    each = np.square(output.astype(np.float64) - wanted).mean((1, 2, 3))
    np.testing.assert_allclose(losses.denoising_loss(output, wanted, weights), (each[0] + 3 * each[2]) / 3, rtol=2e-6)
    ones = torch.nn.functional.mse_loss(torch.from_numpy(output), torch.from_numpy(wanted)).item()
    np.testing.assert_allclose(losses.denoising_loss(output, wanted, np.ones(3, np.float32)), ones, rtol=2e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr(prediction, gamma):
    """Hang et al. 2023, table 1: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, itself for x0."""
    share = Schedule().alphas_cumprod
    snr = share / (1 - share)
    expected = np.minimum(snr, gamma) / {"epsilon": snr, "v": snr + 1, "sample": np.ones(1000)}[prediction]
    found = losses.min_snr_weights(share.astype(np.float32), prediction, gamma)
    # 1 - share loses digits of float32 where share is near 1: 2.6e-5 was seen.
    np.testing.assert_allclose(found, expected, rtol=3e-4)


def test_min_snr_is_one_loss_in_x0():
    """Whatever the model predicts, a picture's loss is min(SNR, gamma) times the squared error of its x0."""
    schedule, timesteps = Schedule(), np.array([5, 300, 600, 990])
    x0, noise, error = normal(4, 4, 6, 2), normal(4, 4, 6, 2, seed=1), normal(4, 4, 6, 2, seed=2, scale=0.1)
    share = schedule.alphas_cumprod[timesteps]
    snr = share / (1 - share)
    expected = np.mean(np.minimum(snr, 5) * np.square(error.astype(np.float64)).mean((1, 2, 3)))
    alpha, std = (np.sqrt(x).reshape(4, 1, 1, 1) for x in (share, 1 - share))
    x_t = np.asarray(add_noise(schedule, x0, noise, timesteps), np.float64)
    wrong = x0 + error.astype(np.float64)  # what the model would have x0 to be
    outputs = {"epsilon": (x_t - alpha * wrong) / std, "v": (alpha * x_t - wrong) / std, "sample": wrong}
    for prediction, output in outputs.items():
        weights = losses.min_snr_weights(share.astype(np.float32), prediction)
        wanted = target(schedule, prediction, x0, noise, timesteps)
        loss = losses.denoising_loss(output.astype(np.float32), wanted, weights)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_unit_length():
    found = losses.unit_length(normal(5, 3) * 1e3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_a_caption_ends_at_its_first_end_token():
    """Whatever fills up the window behind it; the order of its words counts, and where it ends."""
    model = contrastive.CLIP(TINY.text_encoder)
    end = TINY.text_encoder.vocab_size - 1
    ids = np.full((4, 9), end, np.int32)
    ids[:, :4] = [[1, 5, 6, 7], [1, 5, 6, 7], [1, 6, 5, 7], [1, 5, 6, end]]
    ids[1, 6:] = 3

    @jax.jit
    def features(key):
        params = model.init(key, ids, method="encode_texts")
        return model.apply(params, ids, method="encode_texts")

    found = features(jax.random.key(0))
    assert found.shape == (4, TINY.text_encoder.width)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-3
    assert np.abs(found[0] - found[3]).max() > 1e-3
