"""Ways to be faster that change the picture a little. All are off by default."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fast:
    """What of the exact computation is left out.

    Args:
      deep_cache: N >= 2: the whole UNet runs in every N-th call; in those between only its level at the latents' own
        size, on what the last whole call handed up to it (Ma et al. 2023, DeepCache, section 3.2, with its cached
        branch at the last level). None runs it all.

    Raises:
      ValueError: a value out of its range.
    """

    deep_cache: int | None = None

    def __post_init__(self) -> None:
        every = self.deep_cache
        if every is None:
            return
        if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or not 2 <= every <= 1000:
            raise ValueError(f"fast.deep_cache: expected a whole number from 2 to 1000, or None, got {every!r}")
        object.__setattr__(self, "deep_cache", int(every))


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
