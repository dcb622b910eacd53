"""Checks of what a sampler is told: each raises a ValueError that names the option, what came and what is expected."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def whole(name: str, value: Any, least: int, most: int) -> None:
    """A whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {value!r}")


def number(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """A finite number from `least` to `most`."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not least <= float(value) <= most:
        upper = "" if math.isinf(most) else f" to {most:g}"
        raise ValueError(f"{name}: expected a number from {least:g}{upper}, got {value!r}")


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of some words."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not known; there are {', '.join(choices)}")
