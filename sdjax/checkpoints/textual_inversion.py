"""Textual inversions (Gal et al. 2022): a word, and the vectors that the text encoder reads in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdjax.checkpoints import contents
from sdjax.checkpoints.arrays import FLOATS, is_finite
from sdjax.checkpoints.errors import CheckpointError, shorten

MAX_VECTORS = 75  # a window of the text encoder
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}


def read(path: Path, width: int) -> tuple[str, np.ndarray]:
    """The word that the file calls itself, and its vectors.

    The web UI's `.pt` and `.safetensors`, whose word is the file's name, and diffusers' files, which have it in them.

    Args:
      path: of the file.
      width: of the model's embeddings.

    Returns:
      The word, and (n, width) float32.

    Raises:
      CheckpointError: it is no such file, or for another model; numbers that are not finite.
    """
    opened = contents.read(path)
    vectors = {name: x for name, x in opened.tensors.items() if x.dtype.name in FLOATS and x.ndim in (1, 2) and x.size}
    if len(vectors) != 1 or len(opened.tensors) != 1:
        names = shorten(opened.tensors)
        raise CheckpointError(f"{path}: no textual inversion, which has one tensor of vectors; this has: {names}")
    [(name, found)] = vectors.items()
    found = found.reshape(-1, found.shape[-1])
    if found.shape[-1] != width:
        family = FAMILIES.get(found.shape[-1], "another model")
        raise CheckpointError(f"{path}: vectors of {found.shape[-1]} numbers, for {family}; this model's have {width}")
    if len(found) > MAX_VECTORS:
        raise CheckpointError(f"{path}: {len(found)} vectors; a window of text has {MAX_VECTORS}")
    if not is_finite(found):
        raise CheckpointError(f"{path}: NaN or infinity among its numbers; the file is damaged")
    word = path.stem if name in ("*", "emb_params") else name
    return word, found.astype(np.float32)
