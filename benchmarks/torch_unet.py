"""The UNet of Stable Diffusion 1.5 in PyTorch modules, with diffusers' names, for `benchmarks/gpu.py` to compete with.

It is what a PyTorch user would run: channels-last convolutions and scaled_dot_product_attention, so that torch.compile
has nothing in its way. A state dict of diffusers' UNet2DConditionModel fits it (tests/test_benchmarks.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Resnet(nn.Module):
    """norm, SiLU, convolution, twice, around a skip; the time enters in the middle."""

    def __init__(self, channels: int, features: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, 1e-5)
        self.conv1 = nn.Conv2d(channels, features, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, features)
        self.norm2 = nn.GroupNorm(groups, features, 1e-5)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, features, 1) if channels != features else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(time)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context, heads)
        self.ff = FeedForward(width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A transformer block over the pixels as tokens, around a skip."""

    def __init__(self, width: int, context: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([Block(width, context, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class Sampler(nn.Module):
    """A convolution that halves, or follows a doubling."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, 1)


class Level(nn.Module):
    """The blocks of one size; its parts are called as in diffusers' down, middle and up blocks."""

    def __init__(self, resnets: list[Resnet], transformers: list[Transformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if transformers:
            self.attentions = nn.ModuleList(transformers)


class Embedding(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)


class UNet(nn.Module):
    """latents (B, C, h, w), timesteps (B,), context (B, T, D) -> (B, C, h, w).

    attention: whether each level has transformers, from the largest map to the smallest.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (320, 640, 1280, 1280),
        blocks: int = 2,
        attention: tuple[bool, ...] = (True, True, True, False),
        heads: int = 8,
        context: int = 768,
        groups: int = 32,
        latents: int = 4,
    ) -> None:
        super().__init__()
        self.width = channels[0]
        time, last = 4 * self.width, len(channels) - 1

        def level(inputs: list[int], width: int, transformers: int) -> Level:
            resnets = [Resnet(count, width, time, groups) for count in inputs]
            return Level(resnets, [Transformer(width, context, heads, groups) for _ in range(transformers)])

        self.time_embedding = Embedding(self.width, time)
        self.conv_in = nn.Conv2d(latents, self.width, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        below, skips = self.width, [self.width]
        for i, width in enumerate(channels):
            down = level([below] + [width] * (blocks - 1), width, blocks * attention[i])
            skips += [width] * blocks
            if i < last:
                down.downsamplers = nn.ModuleList([Sampler(width, 2)])
                skips.append(width)
            self.down_blocks.append(down)
            below = width
        self.mid_block = level([below, below], below, 1)
        for i in range(last, -1, -1):
            width = channels[i]
            up = level(
                [(width if j else below) + skips.pop() for j in range(blocks + 1)], width, (blocks + 1) * attention[i]
            )
            if i > 0:
                up.upsamplers = nn.ModuleList([Sampler(width, 1)])
            self.up_blocks.append(up)
            below = width
        self.conv_norm_out = nn.GroupNorm(groups, self.width, 1e-5)
        self.conv_out = nn.Conv2d(self.width, latents, 3, padding=1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = timesteps.float()[:, None] * frequencies[None]
        time = self.time_embedding.linear_1(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        time = F.silu(self.time_embedding.linear_2(F.silu(time)))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for j, resnet in enumerate(level.resnets):
                x = resnet(x, time)
                if hasattr(level, "attentions"):
                    x = level.attentions[j](x, context)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0].conv(x)
                skips.append(x)
        x = self.mid_block.resnets[0](x, time)
        x = self.mid_block.resnets[1](self.mid_block.attentions[0](x, context), time)
        for level in self.up_blocks:
            for j, resnet in enumerate(level.resnets):
                x = resnet(torch.cat([x, skips.pop()], 1), time)
                if hasattr(level, "attentions"):
                    x = level.attentions[j](x, context)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0].conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))
