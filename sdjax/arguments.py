"""The checks of what a person hands to `generate`: each returns it in one form or raises a ValueError naming it."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from sdjax.models.config import Config

LARGEST_SEED = 2**64 - 1


def whole(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`; True is none."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: expected a whole number, {least} or more, got {value!r}")
    return int(value)


def in_step(named: dict[str, Any]) -> dict[str, list[Any] | None]:
    """Every argument as a list of one common length: single values are repeated, lists must be equally long.

    A str, a path, a picture and an array are single values; None stays None.
    """
    lists = {
        name: list(value) if isinstance(value, (list, tuple)) else None if value is None else [value]
        for name, value in named.items()
    }
    for name, values in lists.items():
        if values is not None and not values:
            raise ValueError(f"{name}: got an empty list; give at least one")
    lengths = {name: len(values) for name, values in lists.items() if values is not None and len(values) != 1}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"{' and '.join(lengths)}: lists must be equally long, or of one element; {told}")
    count = max(lengths.values(), default=1)
    return {name: None if v is None else v * count if len(v) == 1 else v for name, v in lists.items()}


def texts(name: str, values: list[Any]) -> list[str]:
    """A list of str."""
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected text, got {type(value).__name__}: {value!r:.60}")
    return values


def seeds(seed: Any, count: int) -> list[int]:
    """One seed per picture, 0 to 2^64 - 1: seed + i, or those given, or seed + i of a drawn one."""
    if isinstance(seed, (list, tuple, np.ndarray)):
        if len(seed) != count:
            raise ValueError(f"seed: got {len(seed)} seeds for {count} pictures; give one per picture, or a number")
        values = list(seed)
    else:
        first = secrets.randbits(32) if seed is None else seed
        if isinstance(first, bool) or not isinstance(first, (int, np.integer)):
            raise ValueError(f"seed: expected a whole number, a list of them or None, got {seed!r}")
        values = [int(first) + i for i in range(count)]
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= LARGEST_SEED:
            raise ValueError(f"seed: expected 0 to 2^64 - 1 = {LARGEST_SEED}, got {value!r} for picture {i}")
    return [int(value) for value in values]


def task(config: Config, has_image: bool, has_mask: bool, strength: Any) -> None:
    """What goes together: a mask and a strength with a picture, a mask with the inpainting model, and so on."""
    if has_mask and not has_image:
        raise ValueError("mask_image: it says where a picture is to be repainted, and there is no image")
    if strength is not None and not has_image:
        raise ValueError("strength: it says how much of a given picture is made anew, and there is no image")
    if config.edits:
        if not has_image:
            raise ValueError("image: this model edits a picture, and there is none")
        if has_mask or strength not in (None, 1):
            raise ValueError(
                "mask_image, strength: this model sees the picture and starts from noise; it takes neither"
            )
    if config.inpaints and not has_mask:
        raise ValueError("image, mask_image: this model is made for inpainting and needs both")


def size(config: Config, height: Any, width: Any, picture: Image.Image | None) -> tuple[int, int]:
    """Height and width in pixels, multiples of the VAE's factor.

    Without a wish it is the model's own size; or the given picture's, rounded down, and where that has more than four
    times the pixels the model was trained at, scaled down to as many as that.
    """
    factor, own = config.vae.factor, config.image_size
    if picture is None:
        fitting = [own, own]
    else:
        scale = 1.0
        if picture.width * picture.height > 4 * own**2:
            scale = (own**2 / (picture.width * picture.height)) ** 0.5
        fitting = [max(factor, int(side * scale) // factor * factor) for side in (picture.height, picture.width)]
    height, width = (side if wish is None else wish for wish, side in zip((height, width), fitting, strict=True))
    for name, value in (("height", height), ("width", width)):
        whole(name, value, 1)
        if value % factor:
            below = value // factor * factor
            near = f"{below + factor}" if below == 0 else f"{below} or {below + factor}"
            raise ValueError(f"{name}: must be a multiple of {factor}, got {value}; nearest: {near}")
    return int(height), int(width)


def tile(name: str, value: Any, config: Config) -> int:
    """Pixels of a tile's side: a multiple of the VAE's factor, at least 8 latents. Smaller ones are mostly overlap."""
    factor = config.vae.factor
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value % factor or value < 8 * factor:
        raise ValueError(f"{name}: expected a multiple of {factor} pixels, {8 * factor} or more, got {value!r}")
    return int(value)


def start_noise(latents: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """(B, h, w, z) finite float32, or None."""
    if latents is None:
        return None
    array = np.asarray(latents, np.float32)
    if array.shape != shape:
        raise ValueError(f"latents: expected shape {shape} (pictures, height, width, channels), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("latents: some numbers are not finite")
    return array


def fits_in_memory(config: Config, height: int, width: int, batch: int, params: Any) -> None:
    """Refuses a job that plainly cannot fit, by an estimate of its largest moment: the VAE's widest maps.

    They are two float32 maps of the decoder's first level's channels. XLA's plan for Stable Diffusion's is 1.5 times as
    much on a CPU in bfloat16, 3.4 times in float32. The estimate is meant to be low: what it refuses is hopeless.
    """
    pixels = batch * height * width
    maps = 2 * pixels * config.vae.channels[0] * 4
    weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))  # they may be shapes alone
    available = _memory()
    if available is not None and weights + maps > available:
        gib = 2.0**30
        raise ValueError(
            f"batch_size, height, width: {batch} pictures of {width} x {height} need about "
            f"{(weights + maps) / gib:.1f} GiB, and there are {available / gib:.1f}; make fewer at once or smaller ones"
        )


def _memory() -> int | None:
    """Bytes of the default device, or of the machine when that is the CPU; None where it cannot be told."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # not on Windows


def one_per_picture(values: Sequence[Any], repeats: int) -> list[Any]:
    """Each value `repeats` times, one after the other."""
    return [value for value in values for _ in range(repeats)]
