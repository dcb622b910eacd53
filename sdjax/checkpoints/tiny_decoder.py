"""TAESD's decoder: in its own files, layers counted with the clamp before them, or in diffusers' AutoencoderTiny."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import contents, native, weights
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.names import LEAVES, Kind, Source


def read(path: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the decoder.

    Args:
      path: of `taesd_decoder.safetensors` or `.pth`, or of diffusers' file or folder, whose encoder is left alone.
      targets: what has the `shape` of each of the decoder's tensors (dotted names).

    Raises:
      CheckpointError: it is no such file, not whole, or its numbers are not finite.
    """
    tensors: Mapping[str, np.ndarray]
    tensors = contents.read_part(path, "vae") if path.is_dir() else contents.read(path).tensors
    theirs = {name: x for name, x in tensors.items() if name.startswith("decoder.layers.")}
    if theirs:
        offset, prefix = 0, "decoder.layers."
    elif tensors and all(re.match(r"\d+\.", name) for name in tensors):
        theirs, offset, prefix = dict(tensors), 1, ""
    else:
        raise CheckpointError(
            f"{path}: no decoder of TAESD, whose tensors are 1.weight, ... or decoder.layers.0.weight, ..."
        )
    sources = {}
    for target in targets:
        layer, *convolution, leaf = target.split(".")
        number = int(layer.removeprefix("layers_")) + offset
        inner = [part.replace("conv_", "conv.") for part in convolution]
        name = ".".join([f"{prefix}{number}", *inner, LEAVES[leaf]])
        sources[target] = Source(name, Kind.CONV if leaf == "kernel" else Kind.SAME)
    return native.unflatten(weights.assemble(path, theirs, sources, targets, spelling=str))
