"""The autoencoder between pixels and latents (Esser et al. 2021; Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.config import VAEConfig
from sdjax.models.layers import Attention, Conv, Downsample, Dtype, GroupNorm, ResnetBlock, Upsample

EPSILON = 1e-6


class MidAttention(nn.Module):
    """Single-head self-attention over all pixels, around a skip; (B, H, W, C) -> (B, H, W, C)."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, EPSILON, name="group_norm")(x).reshape(b, h * w, c)
        # The parameters of an attention layer, but the norm sits beside them in the checkpoints.
        nn.share_scope(self, attend := Attention(1, self.dtype, qkv_bias=True))
        return x + attend(tokens).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual, attention, residual; (B, H, W, C) -> (B, H, W, C)."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(x.shape[-1], self.groups, EPSILON, self.dtype, name="resnets_0")(x)
        x = MidAttention(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.groups, EPSILON, self.dtype, name="resnets_1")(x)


class EncoderBlock(nn.Module):
    """Residual blocks of one size, then half of it unless it is the last."""

    config: VAEConfig
    level: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        for j in range(config.blocks_per_level):
            features = config.channels[self.level]
            x = ResnetBlock(features, config.norm_groups, EPSILON, self.dtype, name=f"resnets_{j}")(x)
        if self.level < len(config.channels) - 1:
            x = Downsample(self.dtype, padding=((0, 1), (0, 1)), name="downsamplers_0")(x)
        return x


class DecoderBlock(nn.Module):
    """Residual blocks of one size, one more than in the encoder, then double of it unless it is the last."""

    config: VAEConfig
    level: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        for j in range(config.blocks_per_level + 1):
            features = config.channels[self.level]
            x = ResnetBlock(features, config.norm_groups, EPSILON, self.dtype, name=f"resnets_{j}")(x)
        if self.level > 0:
            x = Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """(B, H, W, 3) -> moments (B, h, w, 2 * latent_channels)."""

    config: VAEConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        x = Conv(config.channels[0], dtype, name="conv_in")(images.astype(dtype))
        for i in range(len(config.channels)):
            x = EncoderBlock(config, i, dtype, name=f"down_blocks_{i}")(x)
            self.sow("intermediates", f"down_blocks_{i}", x)
        x = MidBlock(config.norm_groups, dtype, name="mid_block")(x)
        self.sow("intermediates", "mid_block", x)
        x = nn.silu(GroupNorm(config.norm_groups, EPSILON, name="conv_norm_out")(x))
        return Conv(2 * config.latent_channels, dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """(B, h, w, latent_channels) -> (B, H, W, 3), unclipped."""

    config: VAEConfig
    dtype: Dtype

    def setup(self) -> None:
        config, dtype, levels = self.config, self.dtype, len(self.config.channels)
        self.conv_in = Conv(config.channels[-1], dtype)
        self.mid_block = MidBlock(config.norm_groups, dtype)
        self.up_blocks = [DecoderBlock(config, levels - 1 - i, dtype) for i in range(levels)]
        self.conv_norm_out = GroupNorm(config.norm_groups, EPSILON)
        self.conv_out = Conv(3, dtype)

    def first(self, z: jax.Array) -> jax.Array:
        """Up to the first doubling and with it: what is cheap, and where every pixel sees every other."""
        x = self.mid_block(self.conv_in(z))
        self.sow("intermediates", "mid_block", x)
        x = self.up_blocks[0](x)
        self.sow("intermediates", "up_blocks_0", x)
        return x

    def rest(self, x: jax.Array) -> jax.Array:
        """From there to the pixels: convolutions and norms."""
        for i, block in enumerate(self.up_blocks[1:], 1):
            x = block(x)
            self.sow("intermediates", f"up_blocks_{i}", x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.rest(self.first(z))


class VAE(nn.Module):
    """Encoder and decoder with the 1x1 convolutions between them and the latents.

    `scaling_factor` is not applied here: `encode` returns, and `decode` takes, latents before the scale.
    """

    config: VAEConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        z = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = Conv(2 * z, self.dtype, size=1, padding=((0, 0), (0, 0)))
        self.post_quant_conv = Conv(z, self.dtype, size=1, padding=((0, 0), (0, 0)))

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images (B, H, W, 3) in [-1, 1] -> mean and log-variance (B, h, w, z) of q(z | x), float32.

        The log-variance is clamped to [-30, 20], as in the reference.
        """
        moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: jax.Array) -> jax.Array:
        """Latents before the scale (B, h, w, z) -> pictures (B, H, W, 3), about [-1, 1], unclipped float32."""
        return self.decode_rest(self.decode_first(z))

    def decode_first(self, z: jax.Array) -> jax.Array:
        """The part of `decode` that sees the picture as a whole, (B, h, w, z) -> (B, 2h, 2w, C)."""
        return self.decoder.first(self.post_quant_conv(z.astype(self.dtype)))

    def decode_rest(self, x: jax.Array) -> jax.Array:
        """The part of `decode` that sees only a neighbourhood, and statistics, (B, 2h, 2w, C) -> (B, H, W, 3)."""
        return self.decoder.rest(x).astype(jnp.float32)

    def __call__(self, images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """images (B, H, W, 3), noise (B, h, w, z) -> the reconstruction from a sample of q(z | x), its mean and logvar.

        The reparametrised sample is mean + exp(logvar / 2) noise (Kingma & Welling 2014, eq. 10).
        """
        mean, logvar = self.encode(images)
        return self.decode(mean + jnp.exp(0.5 * logvar) * noise), mean, logvar
