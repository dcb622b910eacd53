"""Judges of the shipped model's pictures: which sprite of the data set, and which background, is it nearest to?"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

Array = np.ndarray

# The candidates are moved and resized a little, so that a right picture in a slightly other place is still right.
SHIFTS = tuple((dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2))
SCALES = (0.92, 1.0, 1.08)


class Verdict(NamedTuple):
    """What each picture was judged to be."""

    sprite: Array  # (B,) int: index of the nearest sprite
    distance: Array  # (B,) float: its mean squared error, pixels in [0, 1]
    background: Array  # (B,) int: index of the nearest palette colour


def psnr(pictures: Array, references: Array) -> Array:
    """Peak signal-to-noise ratio in decibels, one per picture. Both (B, H, W, 3) uint8; returns (B,) float64."""
    error = np.square(pictures.astype(np.float64) - references.astype(np.float64)).mean((1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-10))


def nearest_sprite(pictures: Array, sprites: Array, palette: Array) -> Verdict:
    """The nearest sprite to each picture, over all sprites at small shifts and scales on the picture's own background.

    A picture's background is the median colour of its outermost two pixels; its name is that of the nearest
    palette colour. Every candidate is composited on that median colour, and the smallest squared error wins.

    Args:
      pictures: (B, S, S, 3) uint8.
      sprites: (N, S, S, 4) uint8, straight alpha.
      palette: (P, 3) uint8.
    """
    size = pictures.shape[1]
    x = pictures.astype(np.float32) / 255
    frame = np.ones((size, size), bool)
    frame[2:-2, 2:-2] = False
    own = np.median(x[:, frame], axis=1)  # (B, 3)
    to_palette = np.square(own[:, None] - palette[None].astype(np.float32) / 255).sum(-1)

    best = np.full(len(x), np.inf, np.float32)
    sprite = np.zeros(len(x), np.int64)
    for scale in SCALES:
        scaled = np.stack([_scaled(s, scale) for s in sprites])
        for shift in SHIFTS:
            error = _errors(x, own, _shifted(scaled, shift))  # (B, N)
            nearest = error.argmin(1)
            value = error[np.arange(len(x)), nearest]
            sprite = np.where(value < best, nearest, sprite)
            best = np.minimum(value, best)
    # An exact match comes out as the rounding of its terms, of either sign.
    return Verdict(sprite, np.maximum(best, 0.0) / x[0].size, to_palette.argmin(1))


def _scaled(sprite: Array, scale: float) -> Array:
    """A sprite with premultiplied alpha in [0, 1], resized about its centre and cropped or padded to its old size."""
    wide = sprite.astype(np.float32) / 255
    wide[..., :3] *= wide[..., 3:]
    if scale == 1.0:
        return wide
    size = sprite.shape[0]
    margin = size * (1 - 1 / scale) / 2  # of the source box; outside of the sprite it is transparent
    pad = math.ceil(max(-margin, 0.0)) + 2
    padded = np.pad(wide, ((pad, pad), (pad, pad), (0, 0)))
    box = (margin + pad, margin + pad, size - margin + pad, size - margin + pad)
    channels = [
        Image.fromarray(padded[..., c], "F").resize((size, size), Image.Resampling.BILINEAR, box) for c in range(4)
    ]
    return np.stack([np.asarray(c) for c in channels], -1)


def _shifted(sprites: Array, shift: tuple[int, int]) -> Array:
    """(N, S, S, 4) moved down and to the right; what leaves at one side does not come back at the other."""
    size = sprites.shape[1]
    pad = max(abs(pixels) for pixels in shift)
    padded = np.pad(sprites, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = (pad - pixels for pixels in shift)
    return padded[:, top : top + size, left : left + size]


def _errors(x: Array, own: Array, candidates: Array) -> Array:
    """Squared distances (B, N) of pictures x to candidates on each picture's own background colour.

    A candidate is c = s + (1 - a) b with premultiplied s, so |x - c|^2 expands into inner products that are
    matrix multiplications; no composite is ever made.
    """
    n = len(candidates)
    s, clear = candidates[..., :3], 1.0 - candidates[..., 3]  # (N, S, S, 3), (N, S, S)
    flat_s, flat_clear = s.reshape(n, -1), clear.reshape(n, -1)
    x_s = x.reshape(len(x), -1) @ flat_s.T
    x_clear = np.stack([x[..., c].reshape(len(x), -1) @ flat_clear.T for c in range(3)], -1)  # (B, N, 3)
    s_clear = np.stack([(s[..., c].reshape(n, -1) * flat_clear).sum(1) for c in range(3)], -1)  # (N, 3)
    x_c = x_s + (x_clear * own[:, None]).sum(-1)
    c_c = np.square(flat_s).sum(1)[None] + 2 * own @ s_clear.T
    c_c = c_c + np.square(own).sum(1)[:, None] * np.square(flat_clear).sum(1)[None]
    return np.square(x).sum((1, 2, 3))[:, None] - 2 * x_c + c_c
