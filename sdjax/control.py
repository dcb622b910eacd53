"""Pictures that a ControlNet follows: a person's wishes for a run, checked, as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax import guidance, images


@dataclasses.dataclass(frozen=True)
class Control:
    """What one of a model's ControlNets is to follow.

    Attributes:
      image: what that ControlNet reads: edges, a depth map, a pose; a path, PIL picture or array, or one per prompt. It
        is scaled to the size of the pictures.
      scale: how strongly, one number or one per step. 0 leaves the picture alone.
      interval: the share of the steps made in which it counts, (0, 1) for all.
    """

    image: images.ImageSource | Sequence[images.ImageSource]
    scale: float | Sequence[float] = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        start, stop = self.interval
        if not 0.0 <= start < stop <= 1.0:
            raise ValueError(f"controls: an interval is two numbers from 0 to 1, rising, got {self.interval!r}")


def read(
    controls: Mapping[str, Control] | None,
    known: Sequence[str],
    prompts: int,
    size: tuple[int, int],
    steps: int,
    first: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By ControlNet: its pictures (prompts, H, W, 3) uint8, and its scale at each of the user's steps (steps,) float32.

    Args:
      controls: by the names that `with_controlnet` gave.
      known: those names.
      prompts: how many there are.
      size: (H, W) of the pictures.
      steps: of the whole run.
      first: the first of them that is made.

    Raises:
      ValueError: an unknown name, a picture that cannot be read, another number of pictures or scales.
    """
    read = {}
    # In the model's order, so that the order in which they are named compiles nothing new.
    order = [*known, *(name for name in controls or {} if name not in known)]
    for name, control in sorted((controls or {}).items(), key=lambda item: order.index(item[0])):
        if name not in known:
            there = ", ".join(known) or "none; add one with model.with_controlnet"
            raise ValueError(f"controls: the model has no ControlNet {name!r}; it has {there}")
        if not isinstance(control, Control):
            raise ValueError(f"controls: expected a sdjax.Control for {name!r}, got {type(control).__name__}")
        sources: list[Any] = list(control.image) if isinstance(control.image, (list, tuple)) else [control.image]
        if len(sources) not in (1, prompts):
            raise ValueError(f"controls: got {len(sources)} pictures for {name!r} and {prompts} prompts")
        height, width = size
        loaded = [images.load_image(source, name=f"controls[{name!r}].image") for source in sources]
        pixels = np.stack([np.asarray(images.resize(picture, width, height)) for picture in loaded])
        scales = guidance.per_row(control.scale, steps, np.arange(steps), name=f"controls[{name!r}].scale")
        # diffusers' rule: of those made a step counts that lies in the interval from its beginning to its end.
        i, made = np.arange(steps) - first, steps - first
        counts = (i / made >= control.interval[0]) & ((i + 1) / made <= control.interval[1])
        read[name] = np.broadcast_to(pixels, (prompts, *pixels.shape[1:])), scales * counts
    return read
