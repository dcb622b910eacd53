"""What a program is made for, what it is given, and what goes from stage to stage: names for arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from sdjax.models.config import Config
from sdjax.prompts import Conditioning
from sdjax.samplers.rows import Rows

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Job:
    """What a compiled program is made for. Everything else is an argument of it."""

    config: Config
    dtype: str
    height: int  # pixels, as the width a multiple of the VAE's factor
    width: int
    guided: bool  # False: the negative prompt is not evaluated at all
    clip_skip: int = 0
    decode: bool = True  # False: the result is latents
    brownian: bool = False  # True: the rows' noises are one Brownian motion
    loss: Callable[[jax.Array], jax.Array] | None = None  # `guidance.Options.loss`
    controls: int = 0  # how many ControlNets there are; params["controls"] has them by their places
    vae_tile: int | None = None  # pixels of the tiles that pictures are decoded in, one at a time
    merge: float | None = None  # `Fast.merge`
    tiny_vae: bool = False  # params["tiny_decoder"] decodes
    blend: bool = True  # False: what is not masked is not put back into the pixels; who asked does it

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, z) of one picture."""
        vae = self.config.vae
        return self.height // vae.factor, self.width // vae.factor, vae.latent_channels

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Of one picture of the result."""
        return (self.height, self.width, 3) if self.decode else self.latent_shape


class Picture(NamedTuple):
    """The picture that a job starts from."""

    image: Array  # (B, H, W, 3) uint8
    mask: Array | None  # (B, H, W, 1) float32, 1 = repaint; between where its edge is blurred, or was cropped


class Followed(NamedTuple):
    """What a ControlNet is to follow, and how strongly."""

    hint: Array  # (B, H, W, 3) uint8
    scale: Array  # (T,) float32


class Guide(NamedTuple):
    """How outputs of the model become one; None is what a job does without. T rows."""

    scale: Array  # (T,) float32
    rescale: Array  # () float32, as the following of `guidance.Options`
    within: Array | None = None  # (T,) bool: rows in the interval
    threshold: Array | None = None  # () float32
    quantile: Array | None = None  # () float32
    perpendicular: Array | None = None  # () float32
    perturbed: Array | None = None  # () float32
    image_scale: Array | None = None  # () float32, of a model that edits
    loss_scale: Array | None = None  # () float32, with a loss


class Inputs(NamedTuple):
    """The arguments of the program that differ from picture to picture and run to run; B pictures, T rows.

    None stands for what a job has not got; its presence is part of the compiled shape. The three noises are drawn
    from the seeds where they are None; given, they make a run comparable with another program's.
    """

    prompt: Conditioning  # the user's steps in it are rows here: `variants` is (B, P, T)
    negative: Conditioning | None  # with guidance; P is 1
    empty: Conditioning | None  # with a perpendicular negative prompt: the one that says nothing
    seeds: Array  # (B, 2) uint32
    rows: Rows  # of T rows, padded
    guide: Guide
    picture: Picture | None = None
    controls: tuple[Followed, ...] = ()  # one for each of the job's
    whole: Array | None = None  # (T,) bool: rows in which the whole UNet runs; None is all, see `Fast.deep_cache`
    settled: Array | None = None  # (T,) bool: rows behind the gate of `Fast.gate`
    start_noise: Array | None = None  # (B, h, w, z) standard normal
    step_noise: Array | None = None  # (T, B, h, w, z)
    encode_noise: Array | None = None  # (B, h, w, z)


class Context(NamedTuple):
    """Conditionings behind the text encoder, all variants of all prompts: of K evaluations of the UNet."""

    states: jax.Array  # (B, K, V, 77 N, D)
    windows: Array  # (B, K, V, N) bool
    variants: Array  # (B, K, T) int32


class Ahead(NamedTuple):
    """What the UNet or a ControlNet computes of contexts and times alone, by the path of what makes it."""

    contexts: dict[str, jax.Array]  # (B, K, V, 77 N, C) of each, keys and values
    times: dict[str, jax.Array]  # (T, C) of each


class Conditions(NamedTuple):
    """What stays the same through the loop."""

    # What guidance leads away from, the unguided one first, then a perpendicular one; the prompts; a perturbed one.
    context: Context
    ahead: dict[str, Ahead]  # of the "unet", and of ControlNets by their places
    path: jax.Array | None  # (T, B, h, w, z), the rows' noises where they are one Brownian motion
    extra: jax.Array | None  # (B, h, w, z + 1): mask and masked picture; or (B, h, w, z), the picture to be edited
    clean: jax.Array | None  # (B, h, w, z): the picture's latents, scaled
    noise: Array  # (B, h, w, z): the noise the run started from
    repaint: jax.Array | None  # (B, h, w, 1): 1 where any pixel of a latent is to be repainted


class Memory(NamedTuple):
    """What later calls of the UNet take from earlier ones."""

    # (B, K, h, w, C): what came up to its last level in its last whole call, where rows go without.
    deep: jax.Array | None
    # (B, T, C) of each cross-attention, by its path: what it gave on the average of the evaluations, with a gate.
    crossed: dict[str, jax.Array] | None


class State(NamedTuple):
    """What goes from row to row."""

    registers: jax.Array  # (R, B, h, w, z)
    memory: Memory


class Result(NamedTuple):
    """What a program returns."""

    # (B, H, W, 3) uint8; or the latents (B, h, w, z) float32, scaled, where the job does not decode
    pictures: jax.Array
    finite_latents: jax.Array  # (B,) bool
    finite_pixels: jax.Array  # (B,) bool
