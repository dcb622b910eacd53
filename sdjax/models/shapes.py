"""The parameter trees of configurations as `jax.ShapeDtypeStruct`s: nothing is computed, not even a zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.models.config import Config
from sdjax.models.controlnet import ControlNet
from sdjax.models.text_encoder import TextEncoder
from sdjax.models.tiny_decoder import TinyDecoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE

Params = Any


def shapes(config: Config) -> Params:
    """The parameter tree of a configuration as `jax.ShapeDtypeStruct`s, without making any array."""
    length = config.text_encoder.max_positions
    size = 2 ** (len(config.unet.channels) - 1)

    # All within eval_shape: not even a zero is computed.
    def text_encoder() -> Params:
        return TextEncoder(config.text_encoder).init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))

    def unet() -> Params:
        latents = jnp.zeros((1, size, size, config.unet.in_channels))
        context = jnp.zeros((1, length, config.unet.context_width))
        return UNet(config.unet).init(jax.random.key(0), latents, jnp.zeros(1), context)

    def vae() -> Params:
        pixels = jnp.zeros((1, config.vae.factor, config.vae.factor, 3))
        return VAE(config.vae).init(jax.random.key(0), pixels, jnp.zeros((1, 1, 1, config.vae.latent_channels)))

    models = {"text_encoder": text_encoder, "unet": unet, "vae": vae}
    return {name: jax.eval_shape(init)["params"] for name, init in models.items()}


def control_shapes(config: Config, hint_channels: tuple[int, ...]) -> Params:
    """The parameter tree of a ControlNet for a model of this configuration, without making any array."""
    unet = dataclasses.replace(config.unet, in_channels=config.unet.out_channels)
    size, factor = 2 ** (len(unet.channels) - 1), 2 ** (len(hint_channels) - 1)

    def init() -> Params:
        latents = jnp.zeros((1, size, size, unet.in_channels))
        context = jnp.zeros((1, config.text_encoder.max_positions, unet.context_width))
        hint = jnp.zeros((1, factor * size, factor * size, 3))
        return ControlNet(unet, hint_channels).init(jax.random.key(0), latents, jnp.zeros(1), context, hint)

    return jax.eval_shape(init)["params"]


def tiny_decoder_shapes() -> Params:
    """The parameter tree of TAESD's decoder, without making any array."""
    return jax.eval_shape(lambda: TinyDecoder().init(jax.random.key(0), jnp.zeros((1, 1, 1, 4))))["params"]
