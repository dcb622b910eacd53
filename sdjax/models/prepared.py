"""Parameters as a platform's compiled programs take them: on a CPU, the 3x3 kernels transformed once per model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sdjax.ops import winograd

Params = Any

# Where one of a kernel's two numbers of channels is below this, the transforms of the map cost more than they save.
FEWEST_CHANNELS = 128
# A model without any kernel of so many channels is small: it would save seconds of computing, and take tens of seconds
# more to compile.
WIDE = 512
# Kernels with more channels on both sides than this lie where the maps are small, and are most of the memory: four
# times theirs would be too much, and gain little.
MOST_CHANNELS_OF_LARGE_TILES = 640

Known = dict[int, tuple[Any, list[jax.Array]]]
# What a kernel becomes: a transform of it, with what that takes besides.
Become = Callable[..., list[Any]]


def prepare(params: Params, dtype: str, known: Known) -> Params:
    """The same tree; in a large model, 3x3 kernels of residual blocks and upsamplers as `sdjax.ops.winograd` has them.

    Such a one is called "winograd" in place of "kernel", a list of arrays: XLA would copy each slice of one array.
    Nothing else is copied.

    Args:
      params: nested dicts of arrays, in any dtype.
      dtype: of computation; the transform is made in float32 and rounded to it once.
      known: what is made is kept here, by the kernel's identity beside the kernel, and taken from here the next time.
    """

    def kept(kernel: jax.Array, transform: Callable[..., list[np.ndarray]], *arguments: Any) -> list[jax.Array]:
        if id(kernel) not in known:
            known[id(kernel)] = kernel, jax.device_put(transform(np.asarray(kernel), *arguments))
        return known[id(kernel)][1]

    return _replaced(params, dtype, kept)


def prepared_shapes(params: Params, dtype: str) -> Params:
    """What `prepare` returns, where nothing is transformed: the shapes of kernels that would be."""

    def shapes(kernel: jax.Array, transform: Callable[..., list[np.ndarray]], *arguments: Any) -> list[Any]:
        small = transform(np.zeros((*kernel.shape[:2], 1, 1), np.float32), *arguments)
        return [jax.ShapeDtypeStruct((*each.shape[:-2], *kernel.shape[2:]), each.dtype) for each in small]

    return _replaced(params, dtype, shapes)


def _replaced(params: Params, dtype: str, become: Become) -> Params:
    """The tree with that in the place of kernels that are transformed."""

    def visit(node: Params, parent: str, name: str) -> Params:
        if not isinstance(node, Mapping):
            return node
        kernel = node.get("kernel")
        if kernel is not None and kernel.ndim == 4 and min(kernel.shape[2:]) >= FEWEST_CHANNELS:
            rest = {key: value for key, value in node.items() if key != "kernel"}
            if parent.startswith("upsamplers") and name == "conv":
                return {**rest, "winograd": become(kernel, winograd.prepare_upsampled, dtype)}
            if parent.startswith("resnets") and name in ("conv1", "conv2"):
                return {**rest, "winograd": become(kernel, winograd.prepare, _tile(kernel, dtype), dtype)}
        return {key: visit(child, name, key) for key, child in node.items()}

    widest = max((min(x.shape[2:]) for x in jax.tree.leaves(params) if x.ndim == 4), default=0)
    return visit(params, "", "") if widest >= WIDE else params


def _tile(kernel: jax.Array, dtype: str) -> int:
    # bfloat16 has not the digits for large tiles: 2e-2 of the largest value are lost, with small ones 4e-3.
    return 4 if dtype == "float32" and min(kernel.shape[2:]) <= MOST_CHANNELS_OF_LARGE_TILES else 2
