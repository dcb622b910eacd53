"""Ways to be faster that change the picture a little. All are off by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fast:
    """What of the exact computation is left out.

    Args:
      deep_cache: N >= 2: the whole UNet runs in every N-th call; in those between only its level at the latents' own
        size, on what the last whole call handed up to it (Ma et al. 2023, DeepCache, section 3.2, with its cached
        branch at the last level). None runs it all.
      gate: the share of the steps made after which guidance ends and cross-attention is not computed any more: it gives
        what it gave last, the mean of with and without the prompt (Zhang et al. 2024, T-GATE, algorithm 1; they take
        0.4). None never ends them.
      merge: up to 0.75, the share of the tokens at the largest maps with attention that self-attention sees as one
        with those most like them (Bolya & Hoffman 2023, token merging; they take 0.5). None merges none.
      tiny_vae: pictures are decoded by TAESD (Bohan 2023), which the model must have (`with_tiny_decoder`).

    Raises:
      ValueError: a value out of its range.
    """

    deep_cache: int | None = None
    gate: float | None = None
    merge: float | None = None
    tiny_vae: bool = False

    def __post_init__(self) -> None:
        if (every := self.deep_cache) is not None:
            if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or not 2 <= every <= 1000:
                raise ValueError(f"fast.deep_cache: expected a whole number from 2 to 1000, or None, got {every!r}")
            object.__setattr__(self, "deep_cache", int(every))
        for name, least, most in (("gate", 1e-3, 1.0), ("merge", 1e-3, 0.75)):
            if (share := getattr(self, name)) is not None:
                object.__setattr__(self, name, _share(f"fast.{name}", share, least, most))
        if not isinstance(self.tiny_vae, bool):
            raise ValueError(f"fast.tiny_vae: expected True or False, got {self.tiny_vae!r}")


def _share(name: str, value: Any, least: float, most: float) -> float:
    real = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not (real and least <= value <= most):
        raise ValueError(f"{name}: expected a number from {least:g} to {most:g}, or None, got {value!r}")
    return float(value)


def whole_calls(every: int, within: np.ndarray | None, count: int) -> np.ndarray:
    """(T,) bool: the rows of a sampler in which the whole UNet runs.

    Args:
      every: `Fast.deep_cache`.
      within: (T,) bool, the rows with guidance, where it has an interval.
      count: T.

    The count begins anew where guidance begins or ends: the unguided evaluation was not kept up meanwhile.
    """
    begins = np.zeros(count, bool)
    begins[0] = True
    if within is not None:
        begins[1:] = within[1:] != within[:-1]
    rows = np.arange(count)
    return (rows - np.maximum.accumulate(np.where(begins, rows, 0))) % every == 0


def settled_calls(gate: float, step: np.ndarray) -> np.ndarray:
    """(T,) bool: the rows of a sampler behind the gate.

    Args:
      gate: `Fast.gate`.
      step: (T,) the user's step that each row belongs to. Of those that a run makes the first is never behind it.
    """
    first = step[0]
    return (step - first) / (step.max() + 1 - first) >= gate
