"""Stable Diffusion, whole, in JAX: `sdjax.generate("a 3d emoji of a fox on a blue background")`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdjax import guidance as guidance
    from sdjax import prompts as prompts
    from sdjax import samplers as samplers
    from sdjax import spacings as spacings
    from sdjax.checkpoints.errors import CheckpointError as CheckpointError
    from sdjax.control import Control as Control
    from sdjax.fast import Fast as Fast
    from sdjax.generation import compile as compile
    from sdjax.generation import generate as generate
    from sdjax.loading import load as load
    from sdjax.pipeline import StableDiffusion as StableDiffusion
    from sdjax.schedule import Schedule as Schedule

__version__ = "0.1.0"

# Where each public name lives; it is imported when it is first asked for, so that `import sdjax` costs nothing.
_HOMES = {
    "CheckpointError": "sdjax.checkpoints.errors",
    "Control": "sdjax.control",
    "Fast": "sdjax.fast",
    "Schedule": "sdjax.schedule",
    "StableDiffusion": "sdjax.pipeline",
    "compile": "sdjax.generation",
    "generate": "sdjax.generation",
    "guidance": "sdjax",
    "load": "sdjax.loading",
    "prompts": "sdjax",
    "samplers": "sdjax",
    "spacings": "sdjax",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    home = _HOMES[name]
    if home == "sdjax":  # a module of the package, which importing makes an attribute of it
        return importlib.import_module(f"sdjax.{name}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
