"""CLIP in small: an image tower beside the text encoder, trained so that a picture and its caption agree.

Only the text encoder goes into the model that ships. Both towers together are the second judge of
`benchmarks/default_model.py`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.config import TextEncoderConfig
from sdjax.models.layers import Conv, Dense, Downsample, GroupNorm, ResnetBlock
from sdjax.models.text_encoder import TextEncoder


class ImageEncoder(nn.Module):
    """A small residual network, (B, H, W, 3) in [-1, 1] -> (B, features); H and W multiples of 16."""

    features: int
    channels: tuple[int, ...] = (64, 128, 192)
    groups: int = 16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = Conv(self.channels[0], jnp.float32, size=4, stride=4, padding=((0, 0), (0, 0)), name="stem")(images)
        for i, channels in enumerate(self.channels):
            if i > 0:
                x = Downsample(jnp.float32, name=f"downsamplers_{i}")(x)
            x = ResnetBlock(channels, self.groups, 1e-6, jnp.float32, name=f"resnets_{i}")(x)
        x = nn.silu(GroupNorm(self.groups, 1e-6, name="norm_out")(x))
        # Concatenated rather than averaged positions: where a shape sits in the picture tells concepts apart.
        return Dense(self.features, jnp.float32, name="projection")(x.reshape(x.shape[0], -1))


class CLIP(nn.Module):
    """Both towers. images (B, H, W, 3), token_ids (B, T) -> image features, text features (B, D), log temperature."""

    config: TextEncoderConfig

    def setup(self) -> None:
        self.text_encoder = TextEncoder(self.config)
        self.text_projection = Dense(self.config.width, jnp.float32, use_bias=False)
        self.image_encoder = ImageEncoder(self.config.width)
        # CLIP's start: a factor of 1 / 0.07 on the cosines.
        self.log_temperature = self.param("log_temperature", nn.initializers.constant(2.659), ())

    def encode_images(self, images: jax.Array) -> jax.Array:
        return self.image_encoder(images)

    def encode_texts(self, token_ids: jax.Array) -> jax.Array:
        """The state at the first end token, which has seen the whole caption, projected."""
        states = self.text_encoder(token_ids)
        ends = jnp.argmax(token_ids, -1)  # the end token has the largest id, and argmax takes the first
        return self.text_projection(jnp.take_along_axis(states, ends[:, None, None], 1)[:, 0])

    def __call__(self, images: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        # CLIP bounds the factor by 100.
        temperature = jnp.minimum(self.log_temperature, 4.6052)
        return self.encode_images(images), self.encode_texts(token_ids), temperature
