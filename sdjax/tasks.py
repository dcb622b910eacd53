"""What the pictures of one call differ in, as arrays, and chunks of it as the arguments of the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from sdjax import guidance as guidance_functions
from sdjax import images, noise, samplers
from sdjax.canvas import Canvas
from sdjax.images import ImageSource
from sdjax.job import Followed, Guide, Inputs, Picture
from sdjax.prompts import Conditioning


class Task(NamedTuple):
    """Everything that the N pictures of one call differ in; chunks of it go through the program."""

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    prompt: Conditioning
    negative: Conditioning | None
    empty: Conditioning | None
    canvases: list[Canvas] | None
    latents: np.ndarray | None  # (N, h, w, z)
    controls: list[Followed]  # of N pictures


def inputs(
    task: Task,
    chosen: np.ndarray,
    rows: samplers.Rows,
    guide: Guide,
    whole: np.ndarray | None = None,
    settled: np.ndarray | None = None,
) -> Inputs:
    """The program's arguments for the pictures of these numbers."""
    prompts = (task.prompt, task.negative, task.empty)
    prompt, negative, empty = jax.tree.map(lambda part: part[chosen], prompts)
    picture = None
    if task.canvases is not None:
        parts = [task.canvases[i] for i in chosen]
        masks = [part.mask for part in parts if part.mask is not None]
        picture = Picture(np.stack([part.pixels for part in parts]), np.stack(masks) if masks else None)
    return Inputs(
        prompt=prompt,
        negative=negative,
        empty=empty,
        seeds=noise.seed_words([task.seeds[i] for i in chosen]),
        rows=rows,
        guide=guide,
        picture=picture,
        controls=tuple(Followed(each.hint[chosen], each.scale) for each in task.controls),
        whole=whole,
        settled=settled,
        start_noise=None if task.latents is None else task.latents[chosen],
    )


def place(inputs: Inputs, mesh: Mesh | None) -> Inputs:
    """The arguments on a mesh: what has a batch is shared out over all its axes, the rest is everywhere."""
    if mesh is None:
        return inputs
    shared = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    common = {"rows", "guide", "whole", "settled"}
    plain = {k: v for k, v in inputs._asdict().items() if k != "controls"}
    placed = {k: jax.device_put(v, everywhere if k in common else shared) for k, v in plain.items()}
    placed["controls"] = tuple(
        Followed(jax.device_put(each.hint, shared), jax.device_put(each.scale, everywhere)) for each in inputs.controls
    )
    return Inputs(**placed)


def guide(
    options: guidance_functions.Options, rows: samplers.Rows, scales: np.ndarray, steps: int, guided: bool, edits: bool
) -> Guide:
    """What the program needs of the options; without guidance only the threshold is left."""

    def number(value: float | None) -> np.ndarray | None:
        return None if value is None else np.asarray(value, np.float32)

    within = None
    if options.interval is not None and guided:
        share = np.asarray(rows.step) / steps
        within = (options.interval[0] <= share) & (share < options.interval[1])
    perpendicular = options.perpendicular if guided else None
    rescale = np.asarray(options.rescale, np.float32)
    return Guide(
        scales,
        rescale,
        within,
        number(options.threshold),
        number(options.quantile),
        number(perpendicular),
        number(options.perturbed),
        number(options.image_scale) if edits and guided else None,
        None if options.loss is None else number(options.loss_scale),
    )


def regions(sources: Sequence[ImageSource], composition: np.ndarray, latent_shape: tuple[int, int, int]) -> np.ndarray:
    """The weights (B, P) of prompts under AND, each times its mask at the latents' size: (B, P, h, w, 1)."""
    h, w, _ = latent_shape
    if not 1 < len(sources) == composition.shape[1] or np.any(composition == 0):
        raise ValueError(f"regions: got {len(sources)} masks; every prompt must join as many prompts by AND")
    masks = [images.load_mask(source, name=f"regions[{i}]") for i, source in enumerate(sources)]
    shares = [np.asarray(mask.resize((w, h), Image.Resampling.BOX), np.float32) / np.float32(255) for mask in masks]
    return composition[:, :, None, None, None] * np.stack(shares)[None, :, :, :, None]


def per_picture(conditioning: Conditioning, repeats: int, rows: samplers.Rows) -> Conditioning:
    """Each prompt for as many pictures; its steps as rows of the sampler."""
    by_row = conditioning._replace(variants=conditioning.variants[..., np.asarray(rows.step)])
    return jax.tree.map(lambda part: np.repeat(part, repeats, 0), by_row)


def by_row(scales: np.ndarray, rows: samplers.Rows) -> np.ndarray:
    """Numbers for each of the user's steps, for each row of the sampler."""
    return np.where(rows.active, scales[np.asarray(rows.step)], 0).astype(np.float32)
