"""ControlNet (Zhang et al. 2023): the UNet's way down once more, which a picture enters, added to the UNet's skips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.config import UNetConfig
from sdjax.models.layers import Conv, Dtype
from sdjax.models.unet import way_down

HINT_CHANNELS = (16, 32, 96, 256)  # of all published ones; a factor of 8 between picture and latents


class HintEmbedding(nn.Module):
    """The control picture at the latents' size, (B, H, W, 3) in [0, 1] -> (B, h, w, features)."""

    features: int
    channels: tuple[int, ...]
    dtype: Dtype

    @nn.compact
    def __call__(self, hint: jax.Array) -> jax.Array:
        x = nn.silu(Conv(self.channels[0], self.dtype, name="conv_in")(hint.astype(self.dtype)))
        for i, (same, next_) in enumerate(zip(self.channels[:-1], self.channels[1:], strict=True)):
            x = nn.silu(Conv(same, self.dtype, name=f"blocks_{2 * i}")(x))
            x = nn.silu(Conv(next_, self.dtype, stride=2, name=f"blocks_{2 * i + 1}")(x))
        return Conv(self.features, self.dtype, name="conv_out")(x)


class ControlNet(nn.Module):
    """What is added to the UNet's skips and to its middle.

    latents: (B, h, w, in_channels); timesteps: (B,); context: (B, S, D); hint: (B, H, W, 3) in [0, 1];
    key_mask: (B, S) bool or None. Returns as many maps as the UNet has skips, and one of the smallest size.
    """

    config: UNetConfig
    hint_channels: tuple[int, ...] = HINT_CHANNELS
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        hint: jax.Array,
        key_mask: jax.Array | None = None,
    ) -> tuple[list[jax.Array], jax.Array]:
        config, dtype = self.config, self.dtype
        embedding = HintEmbedding(config.channels[0], self.hint_channels, dtype, name="controlnet_cond_embedding")
        context = context.astype(dtype)
        x, skips, _, _ = way_down(config, dtype, latents, timesteps, context, key_mask, embedding(hint))

        def projected(name: str, x: jax.Array) -> jax.Array:
            return Conv(x.shape[-1], dtype, size=1, padding=((0, 0), (0, 0)), name=name)(x)

        added = [projected(f"controlnet_down_blocks_{i}", skip) for i, skip in enumerate(skips)]
        return added, projected("controlnet_mid_block", x)


def hint_channels(params: Mapping[str, Any]) -> tuple[int, ...]:
    """Of a ControlNet's parameters."""
    embedding = params["controlnet_cond_embedding"]
    blocks = range(1, len(embedding) - 2, 2)
    return tuple(embedding[name]["kernel"].shape[-1] for name in ("conv_in", *(f"blocks_{i}" for i in blocks)))
