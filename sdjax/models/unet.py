"""The denoiser of latent diffusion: a U-Net with cross-attention to the text (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.config import UNetConfig
from sdjax.models.layers import (
    Attention,
    Conv,
    Dense,
    Downsample,
    Dtype,
    GroupNorm,
    LayerNorm,
    ResnetBlock,
    Upsample,
    gelu,
    in_blocks,
    timestep_embedding,
)


class GEGLU(nn.Module):
    """x V * gelu(x W), both from one matrix (Shazeer 2020), (B, T, D) -> (B, T, width)."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(Dense(2 * self.width, self.dtype, name="proj")(x).astype(jnp.float32), 2, -1)
        return (value * gelu(gate)).astype(self.dtype)


class FeedForward(nn.Module):
    """(B, T, D) -> (B, T, D), four times as wide inside."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layers(_: nn.Module, x: jax.Array) -> jax.Array:
            h = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
            return Dense(x.shape[-1], self.dtype, name="net_2")(h)

        return in_blocks(layers, self, x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward, each around a skip; (B, T, D) -> (B, T, D)."""

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, key_mask: jax.Array | None) -> jax.Array:
        x = x + Attention(self.num_heads, self.dtype, name="attn1")(LayerNorm(name="norm1")(x))
        x = x + Attention(self.num_heads, self.dtype, name="attn2")(LayerNorm(name="norm2")(x), context, key_mask)
        return x + FeedForward(self.dtype, name="ff")(LayerNorm(name="norm3")(x))


class Transformer(nn.Module):
    """A transformer block over the pixels as tokens, around a skip; (B, H, W, C) -> (B, H, W, C)."""

    config: UNetConfig
    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, key_mask: jax.Array | None) -> jax.Array:
        b, h, w, c = x.shape
        tokens = GroupNorm(self.config.norm_groups, 1e-6, name="norm")(x)
        tokens = self.project("proj_in", tokens).reshape(b, h * w, c)
        block = TransformerBlock(self.num_heads, self.dtype, name="transformer_blocks_0")
        tokens = block(tokens, context, key_mask).reshape(b, h, w, c)
        return x + self.project("proj_out", tokens)

    def project(self, name: str, x: jax.Array) -> jax.Array:
        if self.config.linear_projection:
            return Dense(x.shape[-1], self.dtype, name=name)(x)
        return Conv(x.shape[-1], self.dtype, size=1, padding=((0, 0), (0, 0)), name=name)(x)


class TimeEmbedding(nn.Module):
    """Sinusoids through two layers, (B, C) -> (B, 4C)."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(Dense(self.width, self.dtype, name="linear_1")(x))
        return Dense(self.width, self.dtype, name="linear_2")(h)


class Level(nn.Module):
    """What the three stages share: a residual block, and a transformer where the level has one."""

    config: UNetConfig
    level: int
    dtype: Dtype

    def resnet(self, j: int, x: jax.Array, time: jax.Array) -> jax.Array:
        config = self.config
        block = ResnetBlock(config.channels[self.level], config.norm_groups, 1e-5, self.dtype, name=f"resnets_{j}")
        return block(x, time)

    def transformer(self, j: int, x: jax.Array, context: jax.Array, key_mask: jax.Array | None) -> jax.Array:
        heads = self.config.num_heads[self.level]
        return Transformer(self.config, heads, self.dtype, name=f"attentions_{j}")(x, context, key_mask)


class DownBlock(Level):
    """One level of the way down. Returns its output, half the size unless it is the last, and the skips it leaves."""

    @nn.compact
    def __call__(
        self, x: jax.Array, time: jax.Array, context: jax.Array, key_mask: jax.Array | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for j in range(self.config.blocks_per_level):
            x = self.resnet(j, x, time)
            if self.config.attention_levels[self.level]:
                x = self.transformer(j, x, context, key_mask)
            skips.append(x)
        if self.level < len(self.config.channels) - 1:
            x = Downsample(self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(Level):
    """Residual, transformer, residual at the smallest size, (B, H, W, C) -> (B, H, W, C)."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array, key_mask: jax.Array | None) -> jax.Array:
        x = self.resnet(0, x, time)
        x = self.transformer(0, x, context, key_mask)
        return self.resnet(1, x, time)


class UpBlock(Level):
    """One level of the way up. Takes its skips from the end of `skips`; doubles the size unless it is the last."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        time: jax.Array,
        context: jax.Array,
        key_mask: jax.Array | None,
    ) -> jax.Array:
        for j in range(self.config.blocks_per_level + 1):
            x = self.resnet(j, jnp.concatenate([x, skips.pop()], -1), time)
            if self.config.attention_levels[self.level]:
                x = self.transformer(j, x, context, key_mask)
        if self.level > 0:
            # The next level's skips have the size this map had before it was halved, which may have been odd.
            x = Upsample(self.dtype, name="upsamplers_0")(x, skips[-1].shape[1:3])
        return x


def largest_map_with_attention(config: UNetConfig, size: Sequence[int]) -> tuple[int, int]:
    """(H, W) of the first level that has a transformer, for latents of (h, w)."""
    factor = 2 ** config.attention_levels.index(True)
    height, width = (-(-side // factor) for side in size)
    return height, width


def entrance(config: UNetConfig, dtype: Dtype, latents: jax.Array, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first map and the time, (B, C) -> (B, 4C), with the modules of whichever module calls it."""
    width = config.channels[0]
    time = TimeEmbedding(4 * width, dtype, name="time_embedding")(timestep_embedding(timesteps, width))
    # Every residual block starts with the SiLU.
    return Conv(width, dtype, name="conv_in")(latents.astype(dtype)), nn.silu(time)


def exit_(config: UNetConfig, dtype: Dtype, x: jax.Array) -> jax.Array:
    """From the last map to the output, likewise."""
    x = nn.silu(GroupNorm(config.norm_groups, 1e-5, name="conv_norm_out")(x))
    return Conv(config.out_channels, dtype, name="conv_out")(x).astype(jnp.float32)


def way_down(
    config: UNetConfig,
    dtype: Dtype,
    latents: jax.Array,
    timesteps: jax.Array,
    context: jax.Array,
    key_mask: jax.Array | None,
    hint: jax.Array | None = None,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array], jax.Array]:
    """From the latents to the middle block's output, with the modules of whichever module calls it.

    hint: (B, h, w, C), added to the first map, or None. Also returns the skips, the levels' outputs and the time.
    """
    last = len(config.channels) - 1
    x, time = entrance(config, dtype, latents, timesteps)
    x = x if hint is None else x + hint
    skips, levels = [x], []
    for i in range(last + 1):
        x, more = DownBlock(config, i, dtype, name=f"down_blocks_{i}")(x, time, context, key_mask)
        skips += more
        levels.append(x)
    return MidBlock(config, last, dtype, name="mid_block")(x, time, context, key_mask), skips, levels, time


class UNet(nn.Module):
    """The raw model output: the noise, the velocity or the clean latents, as the checkpoint was trained.

    latents: (B, h, w, in_channels); timesteps: (B,) float32; context: (B, S, D);
    key_mask: (B, S) bool, False for context tokens that do not count, or None;
    control: what a ControlNet returns, to be added to the skips and to the middle, or None.
    Returns (B, h, w, out_channels) float32.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        key_mask: jax.Array | None = None,
        control: tuple[list[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        config, dtype, last = self.config, self.dtype, len(self.config.channels) - 1
        context = context.astype(dtype)
        x, skips, levels, time = way_down(config, dtype, latents, timesteps, context, key_mask)
        for i, level in enumerate(levels):
            self.sow("intermediates", f"down_blocks_{i}", level)
        self.sow("intermediates", "mid_block", x)
        if control is not None:
            added, middle = control
            skips = [skip + more for skip, more in zip(skips, added, strict=True)]
            x = x + middle
        for i in range(last + 1):
            if i == last:
                self.sow("deep", "entering", x)
            x = UpBlock(config, last - i, dtype, name=f"up_blocks_{i}")(x, skips, time, context, key_mask)
            self.sow("intermediates", f"up_blocks_{i}", x)
        return exit_(config, dtype, x)


class ShallowUNet(nn.Module):
    """The UNet's level at the latents' own size, with the UNet's parameters (Ma et al. 2023, DeepCache).

    deep: (B, h, w, C), what came up from the levels below in another call of the UNet: what that leaves
      in the collection "deep" as "entering".
    added: a ControlNet's for this level's skips, or None. The rest is as in `UNet`.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        deep: jax.Array,
        key_mask: jax.Array | None = None,
        added: list[jax.Array] | None = None,
    ) -> jax.Array:
        config, dtype, last = self.config, self.dtype, len(self.config.channels) - 1
        context = context.astype(dtype)
        x, time = entrance(config, dtype, latents, timesteps)
        _, more = DownBlock(config, 0, dtype, name="down_blocks_0")(x, time, context, key_mask)
        skips = [x, *more[: config.blocks_per_level]]  # not the halved one
        if added is not None:
            skips = [skip + each for skip, each in zip(skips, added, strict=True)]
        x = UpBlock(config, 0, dtype, name=f"up_blocks_{last}")(deep.astype(dtype), skips, time, context, key_mask)
        return exit_(config, dtype, x)
