"""The layers all three models are made of. Parameters are float32 or as given; computation is in `dtype`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sdjax.models.low_rank import changes_of
from sdjax.ops import winograd
from sdjax.ops.attention import attention
from sdjax.ops.convolution import Padding, convolution
from sdjax.ops.matmul import matmul
from sdjax.ops.normalization import group_norm, layer_norm

Dtype = Any

# Of tokens, the values between whose layers fit into a CPU's cache.
TOKENS = 1024


def apply(module: nn.Module, params: Any, *arguments: Any, **options: Any) -> Any:
    """What the module returns with these parameters."""
    return module.apply({"params": params}, *arguments, **options)


def parameter(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> jax.Array:
    """`module.param` without tracing the initializer where the array is there, which took a second of every start.

    Without a random key it is zero: all that `sdjax.models.shapes` asks for is its shape.

    Raises:
      ValueError: the array that is there has another shape.
    """
    if module.has_variable("params", name):
        found: jax.Array = module.get_variable("params", name)
        if found.shape != shape:
            raise ValueError(f"{'/'.join(module.path)}/{name}: expected the shape {shape}, got {found.shape}")
        return found
    if module.is_mutable_collection("params") and not module.has_rng("params"):
        zero = jnp.zeros(shape)
        module.put_variable("params", name, zero)
        return zero
    return module.param(name, initializer, shape)


def in_blocks(layers: Callable[[nn.Module, jax.Array], jax.Array], module: nn.Module, x: jax.Array) -> jax.Array:
    """What layers of this module give for tokens (B, T, D), each on its own; on a CPU some of them at a time."""
    batch, length, width = x.shape
    count = -(-batch * length // TOKENS)
    if count == 1 or jax.default_backend() != "cpu":
        return layers(module, x)
    size = -(-length // count)
    blocks = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0))).reshape(batch, count, size, width)

    def block(module: nn.Module, _: None, x: jax.Array) -> tuple[None, jax.Array]:
        return None, layers(module, x)

    scan = nn.scan(block, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
    _, out = scan(module, None, blocks)
    return out.reshape(batch, count * size, width)[:, :length]


class Dense(nn.Module):
    """x W + b over the last axis, (..., I) -> (..., O); products are summed in float32."""

    features: int
    dtype: Dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        out = matmul(x, kernel, self.dtype)
        for change in changes_of(self):
            low = matmul(x, change["down"], self.dtype)
            out = out + change["weight"] * matmul(low, change["up"], self.dtype)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            out = out + bias.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return out.astype(self.dtype)


class Conv(nn.Module):
    """A convolution, (B, H, W, I) -> (B, H', W', O).

    doubled: the size (H', W') to which the map is doubled first, by repetition; at most (2H, 2W), cropped. None: it is
    taken as it is.
    """

    features: int
    dtype: Dtype
    size: int = 3
    stride: int = 1
    padding: Padding = ((1, 1), (1, 1))
    use_bias: bool = True
    doubled: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, dtype = x.astype(self.dtype), self.dtype
        taken = x if self.doubled is None else repeated(x, self.doubled)
        if self.has_variable("params", "winograd"):  # `sdjax.models.prepared` put it there, in place of the kernel
            prepared: list[jax.Array] = self.get_variable("params", "winograd")
            bias: jax.Array = self.get_variable("params", "bias")
            if self.doubled is None:
                out = winograd.convolution(x, prepared, bias)
            else:
                out = winograd.upsampled(x, prepared, bias, self.doubled)
        else:
            shape = (self.size, self.size, x.shape[-1], self.features)
            kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape)
            out = convolution(taken, kernel.astype(dtype), self.stride, self.padding)
            if self.use_bias:
                bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
                out = out + bias.astype(dtype).reshape(1, 1, 1, -1)
        for change in changes_of(self):
            low = convolution(taken, change["down"].astype(dtype), self.stride, self.padding)
            out = out + (change["weight"] * matmul(low, change["up"], dtype)).astype(dtype)
        return out


def repeated(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """(B, H, W, C) -> (B, *size, C), every pixel twice along both axes, cropped to the size.

    An odd map was rounded up on the way down, so its double is one too large: cropping it is what PyTorch's nearest
    interpolation to an odd size gives.
    """
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return x[:, : size[0], : size[1]]


class Embedding(nn.Module):
    """A learnt vector for each of `size` numbers: (...) int32 -> (..., width). NaN beyond the last one."""

    size: int
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        draw = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        table = parameter(self, "embedding", draw, (self.size, self.width))
        return jnp.take(table.astype(self.dtype), ids, axis=0)


class GroupNorm(nn.Module):
    """`sdjax.ops.normalization.group_norm` with its parameters."""

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return group_norm(x, scale, bias, self.groups, self.epsilon)


class LayerNorm(nn.Module):
    """`sdjax.ops.normalization.layer_norm` with its parameters and PyTorch's epsilon."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon)


class Attention(nn.Module):
    """Multi-head attention from x (B, T, D) to context (B, S, E); self-attention where context is None."""

    num_heads: int
    dtype: Dtype
    qkv_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, key_mask: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        context = x if context is None else context

        def project(name: str, tokens: jax.Array) -> jax.Array:
            heads = Dense(width, self.dtype, self.qkv_bias, name=name)(tokens)
            return heads.reshape(*tokens.shape[:2], self.num_heads, -1)

        out = attention(project("to_q", x), project("to_k", context), project("to_v", context), key_mask)
        return Dense(width, self.dtype, name="to_out_0")(out.reshape(x.shape))


class ResnetBlock(nn.Module):
    """norm, SiLU, convolution, twice, around a skip (He et al. 2016); the time embedding enters in the middle.

    x: (B, H, W, I); time: (B, E), already through SiLU, or None in the VAE. Returns (B, H, W, features).
    """

    features: int
    groups: int
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm1")(x))
        h = Conv(self.features, self.dtype, name="conv1")(h)
        if time is not None:
            h = h + Dense(self.features, self.dtype, name="time_emb_proj")(time)[:, None, None, :]
        h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm2")(h))
        h = Conv(self.features, self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, self.dtype, size=1, padding=((0, 0), (0, 0)), name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """Halves height and width, (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C) with the UNet's padding of 1.

    The VAE pads below and to the right only, ((0, 1), (0, 1)), as its checkpoints were trained.
    """

    dtype: Dtype
    padding: Padding = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Conv(x.shape[-1], self.dtype, stride=2, padding=self.padding, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then convolves.

    size: (H', W') of the result, at most (2H, 2W); None is the double.
    """

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        size = (2 * x.shape[1], 2 * x.shape[2]) if size is None else tuple(size)
        return Conv(x.shape[-1], self.dtype, doubled=size, name="conv")(x)


def gelu(x: jax.Array) -> jax.Array:
    """x times the share of the normal distribution below x (Hendrycks & Gimpel 2016), float32.

    By erf, as PyTorch does it: JAX's own takes erfc, which is twice as slow, and its digits are lost in what follows.
    """
    x = x.astype(jnp.float32)
    return 0.5 * x * (1.0 + lax.erf(math.sqrt(0.5) * x))


def timestep_embedding(timesteps: jax.Array, width: int) -> jax.Array:
    """Sinusoids of the time (Vaswani et al. 2017, section 3.5), cosines first.

    Args:
      timesteps: (B,) float32; fractions of a training step are fine.
      width: even.

    Returns:
      (B, width) float32.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
