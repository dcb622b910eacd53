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
