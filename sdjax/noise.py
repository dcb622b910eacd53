"""Every random draw: an image's noise depends on its own seed, on what the noise is for and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# What a draw is for. Draws of different streams are independent, whatever the seed and the row.
START = 0  # the latents that sampling starts from
STEP = 1  # what a sampler adds, one draw per row of its table
ENCODE = 2  # the sample from the VAE's posterior
PATH = 3  # Brownian motion in sigma, one draw per node of a tree

# The tree's nodes halve intervals of sigma / (sigma + 1), so that they lie close where sigmas are small.
_DEPTH = 16
_HIGHEST = 1e4  # sigma; that of zero terminal SNR is 4096


def seed_words(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """The seeds as keys of the threefry generator: all 64 bits of each count. Pure NumPy.

    Args:
      seeds: B integers in [0, 2^64).

    Returns:
      (B, 2) uint32: the high and the low word. Below 2^32 it is the data of `jax.random.key(seed)`.

    Raises:
      ValueError: a seed that is not such an integer, by name.
    """
    words = np.empty((len(seeds), 2), np.uint32)
    for i, seed in enumerate(seeds):
        if isinstance(seed, (bool, np.bool_)) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected an integer from 0 to 2^64 - 1, got {seed!r} for picture {i}")
        words[i] = int(seed) >> 32, int(seed) & 0xFFFFFFFF
    return words


def normal(words: jax.Array | np.ndarray, stream: int, row: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """One standard normal per image: key = seed's words, then `fold_in(stream)`, then `fold_in(row)`.

    Bits are the same whatever the batch, the position in it, the device and the settings of the process.

    Args:
      words: (B, 2) uint32 from `seed_words`.
      stream: `START`, `STEP`, ...
      row: the row of the sampler's table, an integer that may be traced; 0 for draws that happen once.
      shape: of one image's noise.

    Returns:
      (B, *shape) float32.
    """

    def draw(key_data: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, stream), row)
        return jax.random.normal(key, shape, jnp.float32)

    with jax.threefry_partitionable(True):  # the other algorithm of the same name draws other bits
        return jax.vmap(draw)(jnp.asarray(words))


def brownian(words: jax.Array | np.ndarray, spans: jax.Array | np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """The noises of a whole run as one Brownian motion in sigma per image: W(start) - W(end), to unit variance.

    The path belongs to the seed: a run of half as many steps follows the same one. It is a virtual tree (Li et al.
    2020, "Scalable gradients for stochastic differential equations", section 4): W at any sigma comes of as many
    normals as the tree is deep, each of them a function of the seed and of its node alone.

    Args:
      words: (B, 2) uint32 from `seed_words`.
      spans: (T, 2) sigmas, the larger first, that do not overlap: `Rows.span`. Where both are equal the noise is 0.
      shape: of one image's noise.

    Returns:
      (T, B, *shape) float32.
    """
    spans = jnp.asarray(spans, jnp.float32)

    def increment(span: jax.Array) -> jax.Array:
        length = span[0] - span[1]
        difference = _path(words, span[0], shape) - _path(words, span[1], shape)
        return difference * jax.lax.rsqrt(jnp.where(length > 0, length, 1.0))

    return jax.lax.map(increment, spans)


def _path(words: jax.Array | np.ndarray, sigma: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """W(sigma) of each image, (B, *shape)."""

    def sigma_of(u: jax.Array) -> jax.Array:
        return u / (1.0 - u + 1.0 / _HIGHEST)

    def descend(depth: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        node, low, high, at_low, at_high = state
        middle = 0.5 * (low + high)
        at_middle = bridge(node, sigma_of(middle), low, high, at_low, at_high)
        upper = sigma >= sigma_of(middle)
        return (
            2 * node + upper.astype(node.dtype),
            jnp.where(upper, middle, low),
            jnp.where(upper, high, middle),
            jnp.where(upper, at_middle, at_low),
            jnp.where(upper, at_high, at_middle),
        )

    def bridge(node: jax.Array, at: jax.Array, low: jax.Array, high: jax.Array, *ends: jax.Array) -> jax.Array:
        """A normal of the conditional distribution of W between two known values."""
        below, above = sigma_of(low), sigma_of(high)
        share = (at - below) / (above - below)
        std = jnp.sqrt(jnp.maximum((at - below) * (1.0 - share), 0.0))
        return ends[0] + share * (ends[1] - ends[0]) + std * normal(words, PATH, node, shape)

    zero = jnp.zeros((len(words), *shape), jnp.float32)
    top = _HIGHEST**0.5 * normal(words, PATH, 0, shape)
    root = (jnp.asarray(1), jnp.asarray(0.0), jnp.asarray(1.0), zero, top)
    node, *ends = jax.lax.fori_loop(0, _DEPTH, descend, root)
    return bridge(node, sigma, *ends)
