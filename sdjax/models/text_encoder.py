"""CLIP's text transformer: token ids -> a context for the UNet (Radford et al. 2021, section 2.4)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.config import TextEncoderConfig
from sdjax.models.layers import Dense, Dtype, Embedding, LayerNorm, gelu
from sdjax.ops.attention import attention


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class SelfAttention(nn.Module):
    """Causal multi-head attention, (B, T, D) -> (B, T, D)."""

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def heads(name: str) -> jax.Array:
            return Dense(x.shape[-1], self.dtype, name=name)(x).reshape(*x.shape[:2], self.num_heads, -1)

        out = attention(heads("q_proj"), heads("k_proj"), heads("v_proj"), causal=True)
        return Dense(x.shape[-1], self.dtype, name="out_proj")(out.reshape(x.shape))


class MLP(nn.Module):
    """Two matrices around an activation, (B, T, D) -> (B, T, D)."""

    width: int
    activation: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = ACTIVATIONS[self.activation](Dense(self.width, self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], self.dtype, name="fc2")(h)


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer, (B, T, D) -> (B, T, D)."""

    config: TextEncoderConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + SelfAttention(self.config.num_heads, self.dtype, name="self_attn")(LayerNorm(name="layer_norm1")(x))
        mlp = MLP(self.config.mlp_width, self.config.activation, self.dtype, name="mlp")
        return x + mlp(LayerNorm(name="layer_norm2")(x))


class Encoder(nn.Module):
    """The layers; the last `skip` of them are left out."""

    config: TextEncoderConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, skip: int) -> jax.Array:
        for i in range(self.config.num_layers - skip):
            x = EncoderLayer(self.config, self.dtype, name=f"layers_{i}")(x)
            self.sow("intermediates", f"layers_{i}", x)
        return x


class Embeddings(nn.Module):
    """Token embeddings plus learnt positions, (B, T) -> (B, T, D)."""

    config: TextEncoderConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, token_ids: jax.Array) -> jax.Array:
        config = self.config
        tokens = Embedding(config.vocab_size, config.width, self.dtype, name="token_embedding")(token_ids)
        positions = Embedding(config.max_positions, config.width, self.dtype, name="position_embedding")
        return tokens + positions(jnp.arange(token_ids.shape[1]))[None]


class TextEncoder(nn.Module):
    """token_ids (B, T) int32, T <= 77 -> (B, T, D) after the final layer norm.

    clip_skip: layers left out at the end, as diffusers counts (0 none, 1 the penultimate layer's output).
    """

    config: TextEncoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, token_ids: jax.Array, clip_skip: int = 0) -> jax.Array:
        x = Embeddings(self.config, self.dtype, name="embeddings")(token_ids)
        x = Encoder(self.config, self.dtype, name="encoder")(x, clip_skip)
        return LayerNorm(name="final_layer_norm")(x)
