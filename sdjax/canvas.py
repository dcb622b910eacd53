"""The pictures and masks that a run starts from, at the size it works at, and the way back into their originals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdjax import arguments, images
from sdjax.images import ImageSource
from sdjax.models.config import Config


class Canvas(NamedTuple):
    """One picture to start from, as the program takes it, and how what comes back is put into the original."""

    pixels: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray | None  # (H, W, 1) float32, 1 = repaint
    original: Image.Image | None = None  # with `padding_mask_crop`: the whole picture, its mask, the part worked on
    whole_mask: Image.Image | None = None
    region: images.Box | None = None
    profile: bytes | None = None  # the picture's colour profile (ICC), which is that of what is made of it


def read_canvases(
    config: Config,
    sources: list[ImageSource] | None,
    mask_sources: list[ImageSource] | None,
    height: int | None,
    width: int | None,
    mask_blur: float,
    padding: int | None,
) -> tuple[list[Canvas] | None, int, int]:
    """The pictures to start from at the size to work at, and that size."""
    if not (isinstance(mask_blur, (int, float)) and 0 <= mask_blur < math.inf):
        raise ValueError(f"mask_blur: expected a radius in pixels, 0 or more, got {mask_blur!r}")
    if padding is not None:
        arguments.whole("padding_mask_crop", padding, 0)
    if mask_sources is None and (mask_blur or padding is not None):
        raise ValueError("mask_blur, padding_mask_crop: they concern a mask_image, and there is none")
    if sources is None:
        return None, *arguments.size(config, height, width, None)
    # A picture given once for many prompts is read once.
    load_image = _once(lambda i, source: images.load_image(source, name=f"image[{i}]"))
    pictures = [load_image(i, source) for i, source in enumerate(sources)]
    height, width = arguments.size(config, height, width, pictures[0] if padding is None else None)
    if mask_sources is None:
        return [_canvas(p, images.resize(p, width, height), None) for p in pictures], height, width

    load_mask = _once(lambda i, source: images.load_mask(source, name=f"mask_image[{i}]"))
    canvases = []
    for i, (picture, source) in enumerate(zip(pictures, mask_sources, strict=True)):
        mask = load_mask(i, source)
        if padding is None:
            mask = images.blur_mask(images.resize_mask(mask, width, height), mask_blur)
            canvases.append(_canvas(picture, images.resize(picture, width, height), mask))
        else:
            mask = images.blur_mask(images.resize_mask(mask, *picture.size), mask_blur)
            region = images.crop_region(mask, padding, width, height)
            part = images.resize(picture.crop(region), width, height)
            part_mask = images.resize(mask.crop(region), width, height)
            canvas = _canvas(picture, part, part_mask)
            canvases.append(canvas._replace(original=picture, whole_mask=mask, region=region))
    return canvases, height, width


def _canvas(picture: Image.Image, at_work: Image.Image, mask: Image.Image | None) -> Canvas:
    alpha = None if mask is None else np.asarray(mask, np.float32)[..., None] / np.float32(255)
    return Canvas(np.asarray(at_work), alpha, profile=picture.info.get("icc_profile"))


def _once(load: Callable[[int, ImageSource], Image.Image]) -> Callable[[int, ImageSource], Image.Image]:
    """The same loader, which reads one object that comes several times only the first time."""
    seen: dict[int, Image.Image] = {}

    def cached(i: int, source: ImageSource) -> Image.Image:
        if id(source) not in seen:
            seen[id(source)] = load(i, source)
        return seen[id(source)]

    return cached
