"""The parameter trees of configurations as `jax.ShapeDtypeStruct`s: nothing is computed, not even a zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
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
    latents, context = _inputs(config)
    pixels = _array(1, config.vae.factor, config.vae.factor, 3)
    return {
        "text_encoder": _parameters(TextEncoder(config.text_encoder), _array(1, length, dtype=jnp.int32)),
        "unet": _parameters(UNet(config.unet), latents, _array(1), context),
        "vae": _parameters(VAE(config.vae), pixels, _array(1, 1, 1, config.vae.latent_channels)),
    }


def control_shapes(config: Config, hint_channels: tuple[int, ...]) -> Params:
    """The parameter tree of a ControlNet for a model of this configuration, without making any array."""
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, in_channels=config.unet.out_channels))
    latents, context = _inputs(config)
    size = latents.shape[1] * 2 ** (len(hint_channels) - 1)
    return _parameters(ControlNet(config.unet, hint_channels), latents, _array(1), context, _array(1, size, size, 3))


def tiny_decoder_shapes() -> Params:
    """The parameter tree of TAESD's decoder, without making any array."""
    return _parameters(TinyDecoder(), _array(1, 1, 1, 4))


def _inputs(config: Config) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The smallest latents that a UNet takes, and a context."""
    size = 2 ** (len(config.unet.channels) - 1)
    latents = _array(1, size, size, config.unet.in_channels)
    return latents, _array(1, config.text_encoder.max_positions, config.unet.context_width)


def _array(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _parameters(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Params:
    # No random key: nothing is drawn, so no initializer is traced (`sdjax.models.layers.parameter`).
    return jax.eval_shape(lambda *inputs: module.apply({}, *inputs, mutable="params")[1]["params"], *inputs)
