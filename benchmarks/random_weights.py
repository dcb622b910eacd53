"""Random weights for benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdjax.checkpoints import native
from sdjax.models.config import Config
from sdjax.models.shapes import shapes


def random_weights(config: Config) -> Any:
    """A model's parameters in float32, of the scale of trained ones, so that nothing overflows or dies out."""
    rng = np.random.default_rng(0)
    leaves = {}
    for name, leaf in native.flatten(shapes(config)).items():
        normal = rng.standard_normal(leaf.shape, np.float32)
        kind = name.rsplit(".", 1)[1]
        if kind == "scale":
            leaves[name] = 1 + np.float32(0.1) * normal
        elif kind == "bias":
            leaves[name] = np.float32(0.1) * normal
        else:
            inputs = leaf.shape[:-1] if kind == "kernel" else leaf.shape[-1:]  # an embedding's rows are of length 1
            leaves[name] = normal / np.sqrt(np.prod(inputs), dtype=np.float32)
    return native.unflatten(leaves)
