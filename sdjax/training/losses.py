"""What each part of the model is trained to minimise. All are means over the batch, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def autoencoder_loss(
    reconstruction: jax.Array, images: jax.Array, mean: jax.Array, logvar: jax.Array, kl_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error plus a small KL divergence to the standard normal (Rombach et al. 2022, appendix G).

    Args:
      reconstruction, images: (B, H, W, 3) in [-1, 1].
      mean, logvar: (B, h, w, z) of q(z | x).
      kl_weight: of the divergence per latent number; it keeps latents near the origin and smooth.

    Returns:
      The loss, and its parts by name: `psnr` in decibels for a peak-to-peak range of 2.
    """
    error = jnp.mean(jnp.square(reconstruction - images))
    # KL(N(mean, var) || N(0, 1)), Kingma & Welling 2014, appendix B.
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return error + kl_weight * divergence, {"psnr": 10 * jnp.log10(4.0 / error), "kl": divergence}


def contrastive_loss(
    image_features: jax.Array, text_features: jax.Array, log_temperature: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3).

    Args:
      image_features, text_features: (B, D); row i of one belongs to row i of the other.
      log_temperature: (), the logarithm of the factor on the cosine similarities.

    Returns:
      The loss, and `accuracy`: how often a picture's own caption is the nearest of the batch.
    """
    image_features = unit_length(image_features)
    text_features = unit_length(text_features)
    logits = jnp.exp(log_temperature) * image_features @ text_features.T
    labels = jnp.arange(logits.shape[0])
    by_image = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    by_text = optax.softmax_cross_entropy_with_integer_labels(logits.T, labels).mean()
    return 0.5 * (by_image + by_text), {"accuracy": jnp.mean(logits.argmax(1) == labels)}


def unit_length(features: jax.Array) -> jax.Array:
    """(B, D) -> (B, D), each row divided by its Euclidean length."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def denoising_loss(output: jax.Array, target: jax.Array, weights: jax.Array) -> jax.Array:
    """Ho et al. 2020, eq. 14, with a weight per picture. output, target: (B, h, w, z); weights: (B,). Returns ()."""
    return jnp.mean(weights * jnp.square(output - target).mean((1, 2, 3)))


def min_snr_weights(alphas_cumprod: jax.Array, prediction: str, gamma: float = 5.0) -> jax.Array:
    """Hang et al. 2023, eq. 9: the loss of every training step, weighted by min(SNR, gamma) as seen in x0.

    Args:
      alphas_cumprod: (B,) at the timesteps of the batch.
      prediction: "epsilon", "v" or "sample".
      gamma: where the weight of the nearly clean steps is cut.

    Returns:
      (B,) factors of the squared error of the model's raw output.
    """
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    clipped = jnp.minimum(snr, gamma)
    return {"epsilon": clipped / snr, "v": clipped / (snr + 1.0), "sample": clipped}[prediction]
