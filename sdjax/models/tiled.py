"""The VAE's decoder tile by tile: the whole picture's at the memory of one tile's maps.

Behind the first doubling the decoder is convolutions, which see a neighbourhood, and group norms, which see the whole
picture by two numbers a group. So every tile is computed with as much around it as its pixels see, and with the
statistics of the whole picture: nothing is blended, and there are no seams to hide. The statistics come from passes
over all tiles before: a pass gathers each norm's as they are with those that the pass before it gathered. Every
pass puts at least one more norm right to rounding, and all others closer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sdjax.models.config import VAEConfig
from sdjax.models.layers import GroupNorm, apply
from sdjax.models.vae import VAE
from sdjax.ops.normalization import normalize

PASSES = 4  # before the one that makes the picture; docs/fast.md has what fewer and more give


class Moments(NamedTuple):
    """Of a norm's groups, each (G,) float32."""

    number: jax.Array
    mean: jax.Array
    variance: jax.Array


Statistics = dict[str, Moments]  # by the norm's path


def reach(config: VAEConfig) -> int:
    """How far `VAE.decode_rest` sees beyond a pixel of its result, in pixels of its input, rounded up."""
    blocks = 2 * (config.blocks_per_level + 1)  # convolutions of one level, each seeing one pixel further
    seen = 1 + blocks  # of the last level, with the convolution behind it
    for _ in config.channels[2:]:
        seen = -(-(seen + 1) // 2) + blocks  # the doubling's own convolution is on its larger side
    return seen if len(config.channels) > 1 else 1


def decode(config: VAEConfig, dtype: Any, params: Any, z: jax.Array, tile: int) -> jax.Array:
    """`VAE.decode` one picture at a time, and of each one tile at a time.

    Args:
      z: (B, h, w, latent_channels), before the scale.
      tile: pixels of a tile's side, a multiple of the VAE's factor. What is computed is larger by what it sees.

    Returns:
      (B, H, W, 3) float32, about [-1, 1], unclipped.
    """
    vae = VAE(config, dtype)

    def picture(z: jax.Array) -> jax.Array:
        x = apply(vae, params, z[None], method="decode_first")
        scale = config.factor * z.shape[0] // x.shape[1]
        if tile >= config.factor * max(z.shape[:2]):
            return apply(vae, params, x, method="decode_rest")[0]
        return _rest(vae, params, x, tile // scale, scale)

    return lax.map(picture, z)


def _rest(vae: VAE, params: Any, x: jax.Array, tile: int, scale: int) -> jax.Array:
    """`VAE.decode_rest` of one map (1, H', W', C) in tiles of so many of its pixels -> (H, W, 3)."""
    size = x.shape[1:3]
    sides = [min(tile, length) for length in size]
    windows = [min(side + 2 * reach(vae.config), length) for side, length in zip(sides, size, strict=True)]
    corners = jnp.asarray([(i, j) for i in range(0, size[0], tile) for j in range(0, size[1], tile)])
    limits = jnp.asarray([length - side for length, side in zip(size, sides, strict=True)])
    rooms = jnp.asarray([length - window for length, window in zip(size, windows, strict=True)])

    # Only the map and the statistics are kept for a gradient, not what is inside of all tiles.
    @jax.checkpoint
    def window(corner: jax.Array, known: Statistics) -> tuple[jax.Array, jax.Array, Statistics]:
        """The pixels of the tile, where they lie, and the statistics of what is the tile's alone."""
        # The last tile of a row is moved in to be whole; a window never leaves the picture, so that where it ends at
        # the picture's edge, zeros are what lies beyond.
        place = jnp.minimum(corner, limits)
        start = jnp.clip(place - reach(vae.config), 0, rooms)
        around = lax.dynamic_slice(x, (0, *start, 0), (1, *windows, x.shape[-1]))
        own = tuple(
            (jnp.arange(n) >= corner[k] - start[k]) & (jnp.arange(n) < corner[k] - start[k] + tile)
            for k, n in enumerate(windows)
        )
        with _statistics(own, known) as found:
            pixels = apply(vae, params, around, method="decode_rest")[0]
        first = (place - start) * scale
        cut = lax.dynamic_slice(pixels, (*first, 0), (sides[0] * scale, sides[1] * scale, 3))
        return cut, place * scale, found

    known: Statistics = {}
    for _ in range(PASSES):
        known = _joined(lax.map(lambda corner, known=known: window(corner, known)[2], corners))

    def paint(whole: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        cut, place, _ = window(corner, known)
        return lax.dynamic_update_slice(whole, cut, (*place, 0)), None

    return lax.scan(paint, jnp.zeros((size[0] * scale, size[1] * scale, 3), jnp.float32), corners)[0]


def _joined(parts: Statistics) -> Statistics:
    """The statistics of all tiles as those of the whole (Chan et al. 1979): (tiles, G) each -> (G,)."""

    def join(part: Moments) -> Moments:
        share = part.number / part.number.sum(0, keepdims=True)
        mean = (share * part.mean).sum(0)
        variance = (share * (part.variance + jnp.square(part.mean - mean[None]))).sum(0)
        return Moments(part.number.sum(0), mean, variance)

    return {name: join(part) for name, part in parts.items()}


@contextmanager
def _statistics(own: tuple[jax.Array, ...], known: Statistics) -> Iterator[Statistics]:
    """While this lasts, group norms take the known statistics, and leave those of their input in what is yielded.

    Args:
      own: which rows and which columns of the first map count.
      known: by the norm's path; a norm that is not among them takes those of its own input.
    """
    found: Statistics = {}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        norm = context.module
        if not isinstance(norm, GroupNorm):
            return call(*args, **kwargs)
        x, name = args[0], "/".join(norm.path)
        rows, columns = (jnp.repeat(each, n // len(each)) for each, n in zip(own, x.shape[1:3], strict=True))
        counts = (rows[:, None] & columns[None, :]).astype(jnp.float32).reshape(1, -1, 1, 1)
        grouped = x.astype(jnp.float32).reshape(1, -1, norm.groups, x.shape[-1] // norm.groups)
        number = counts.sum() * grouped.shape[3]
        mean = (counts * grouped).sum((1, 3)) / number
        variance = (counts * jnp.square(grouped - mean[:, None, :, None])).sum((1, 3)) / number
        found[name] = Moments(jnp.broadcast_to(number, mean[0].shape), mean[0], variance[0])
        use, own_params = known.get(name, found[name]), norm.variables["params"]
        mean, variance = (each[None, None, :, None] for each in (use.mean, use.variance))
        return normalize(x, mean, variance, own_params["scale"], own_params["bias"], norm.epsilon)

    with nn.intercept_methods(intercept):
        yield found
