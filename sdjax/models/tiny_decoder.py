"""The decoder of TAESD (Bohan 2023), a fortieth of the autoencoder's size: previews of what a run is about to make."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.layers import Conv, Dtype

WIDTH = 64
BLOCKS = (3, 3, 3, 1)  # residual blocks of each size, the smallest first


class Block(nn.Module):
    """Three convolutions around a skip, (B, H, W, C) -> (B, H, W, C). Its activations count as layers."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(Conv(WIDTH, self.dtype, name="conv_0")(x))
        h = nn.relu(Conv(WIDTH, self.dtype, name="conv_2")(h))
        return nn.relu(Conv(WIDTH, self.dtype, name="conv_4")(h) + x)


class TinyDecoder(nn.Module):
    """Latents as the UNet sees them (B, h, w, 4) -> pictures (B, 8 h, 8 w, 3), about [-1, 1], float32."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        x = 3.0 * jnp.tanh(latents / 3.0)
        x = nn.relu(Conv(WIDTH, self.dtype, name="layers_0")(x.astype(self.dtype)))
        i = 2  # the layers are numbered as in its files, activations and repetitions too
        for level, blocks in enumerate(BLOCKS):
            for _ in range(blocks):
                x = Block(self.dtype, name=f"layers_{i}")(x)
                i += 1
            if level < len(BLOCKS) - 1:
                x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
                x = Conv(WIDTH, self.dtype, use_bias=False, name=f"layers_{i + 1}")(x)
                i += 2
        return Conv(3, self.dtype, name=f"layers_{i}")(x).astype(jnp.float32) * 2.0 - 1.0
