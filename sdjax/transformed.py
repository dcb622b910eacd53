"""Transformed kernels on disk, which another process maps in place of making them.

Of Stable Diffusion 1.5 the transform takes seconds and its result gigabytes; so they are kept only where somebody asks
for it. They lie in the cache's folder, under a name made from the checkpoint's size and time of change, samples of its
weights, the dtype, and the source of the transform. What an earlier version of that source made of the same is deleted
when there is a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax import compilation_cache
from sdjax.checkpoints import CheckpointError, flatten, safetensors
from sdjax.models import prepared
from sdjax.ops import winograd

logger = logging.getLogger(__name__)

Params = Any


def place(checkpoint: Path, digest: str, dtype: str) -> Path | None:
    """Where those of a checkpoint are or would be; None for a folder, and where the cache is switched off.

    digest: of samples of its weights.
    """
    folder = compilation_cache.location()
    if folder is None or not checkpoint.is_file():
        return None
    found = checkpoint.stat()
    what = hashlib.sha256(f"{found.st_size} {found.st_mtime_ns} {digest} {dtype}".encode())
    how = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in (prepared, winograd)))
    return folder / compilation_cache.KERNELS / f"{what.hexdigest()}-{how.hexdigest()[:16]}.safetensors"


def read(path: Path, params: Params, dtype: str) -> prepared.Known:
    """What `write` left there for these parameters; nothing where there is no such file. A damaged one is deleted."""
    if not path.is_file() or not compilation_cache.is_usable(path.parent.parent):
        return {}
    try:
        arrays, _ = safetensors.read(path)
        found: dict[str, dict[int, np.ndarray]] = {}
        for name, array in arrays.items():
            kernel, _, number = name.rpartition(".")
            found.setdefault(kernel, {})[int(number)] = array
        kernels = {name: kernel for name, kernel in flatten(params).items() if name in found}
        if len(kernels) < len(found):
            raise CheckpointError(f"{path}: it is another model's")
        for name, each in found.items():
            shape = kernels[name].shape[2:]
            if any(each[i].shape[-2:] != shape or each[i].dtype != np.dtype(dtype) for i in range(len(each))):
                raise CheckpointError(f"{path}: {name!r:.80} is another model's")
    except (CheckpointError, OSError, ValueError, KeyError) as error:
        logger.warning("transformed weights could not be used and are made again: %s", error)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return {}
    return {
        id(kernel): (kernel, jax.device_put([found[name][i] for i in range(len(found[name]))]))
        for name, kernel in kernels.items()
    }


def write(path: Path, params: Params, known: prepared.Known) -> None:
    """Keeps there what is known of these parameters' kernels.

    Raises:
      ValueError: the folder cannot be used; the log says why.
      OSError: the disk is full.
    """
    folder = path.parent.parent
    if not compilation_cache.is_usable(folder):
        raise ValueError(f"SDJAX_CACHE: nothing can be kept in {folder}")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    arrays = {
        f"{name}.{i}": np.asarray(each)
        for name, kernel in flatten(params).items()
        if id(kernel) in known
        for i, each in enumerate(known[id(kernel)][1])
    }
    safetensors.write(path, arrays, {"format": "sdjax transformed kernels"})
    for older in path.parent.glob(f"{path.name.partition('-')[0]}-*"):
        if older != path:
            with contextlib.suppress(OSError):
                older.unlink()
