"""Our own files: one safetensors file of a model's whole tree, its configuration in the metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sdjax.checkpoints import safetensors
from sdjax.checkpoints.errors import CheckpointError
from sdjax.models.config import Config

FORMAT = "sdjax"
VERSION = "1"


def save(
    path: str | os.PathLike[str],
    params: Any,
    config: Config,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a tree of arrays and its configuration, whole or not at all.

    Args:
      path: of the file; it is replaced if there is one.
      params: nested dicts of arrays.
      config: of the model.
      dtype: to round the numbers to, "float32", "bfloat16", ...; None keeps theirs.
      metadata: more strings to keep, such as where the numbers came from.
    """
    arrays = flatten(params)
    if dtype is not None:
        arrays = {name: array.astype(jax.numpy.dtype(dtype)) for name, array in arrays.items()}
    texts = {"format": FORMAT, "version": VERSION, "config": json.dumps(config.to_dict()), **(metadata or {})}
    safetensors.write(path, arrays, texts)


def is_native(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is one of ours."""
    return metadata.get("format") == FORMAT


def config_of(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> Config:
    """The configuration in a native file's metadata. Raises CheckpointError where it is none."""
    if (written := metadata.get("version")) != VERSION:
        raise CheckpointError(f"{path}: its format is sdjax {written!r}, this version reads {VERSION}")
    try:
        return Config.from_dict(json.loads(metadata["config"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read: {error}") from error


def flatten(params: Any) -> dict[str, np.ndarray]:
    """Nested dicts to one of dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree
