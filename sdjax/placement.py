"""Weights on their way to the devices, and what tells them apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import checkpoints

Params = Any


def placed(path: str | Path, params: Params, dtype: str) -> tuple[str, Params]:
    """The digest of weights as they are computed with, and these on the device.

    Raises:
      CheckpointError: some are too large for the dtype; the path is for its message.
    """
    leaves, widest = checkpoints.flatten(params), jnp.finfo(dtype).max
    # Already of this dtype, a file's memory-mapped arrays are used as they lie.
    host = {name: checkpoints.contiguous(np.asarray(x), jnp.dtype(dtype)) for name, x in leaves.items()}
    narrowed = [name for name, x in leaves.items() if jnp.finfo(x.dtype).max > widest]
    if overflown := [name for name in narrowed if not checkpoints.is_finite(host[name])]:
        raise checkpoints.CheckpointError(
            f"{path}: numbers too large for {dtype} in {len(overflown)} tensors: {checkpoints.shorten(overflown)}"
        )
    tree = checkpoints.unflatten(host)
    return digest(tree), jax.device_put(tree)


def everywhere(params: Params, mesh: jax.sharding.Mesh | None) -> Params:
    """Parameters on every device of a mesh; where there is none, as they are."""
    if mesh is None:
        return params
    return jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def combined(*digests: str) -> str:
    """One for several, in this order."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def digest(params: Params) -> str:
    """16 hexadecimal digits from the names, shapes and dtypes of all tensors, and the first 4 KiB of each."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x.reshape(-1)[: 4096 // x.itemsize]).tobytes())
    return digest.hexdigest()[:16]
