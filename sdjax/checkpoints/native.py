"""Our own files: one safetensors file of a model's whole tree, its configuration in the metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.checkpoints import configurations, safetensors, weights
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.names import Kind, Source
from sdjax.models.config import Config

FORMAT = "sdjax"
VERSION = "1"
SEAL = "checked"  # in the metadata


def save(
    path: str | os.PathLike[str],
    params: Any,
    config: Config,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    targets: Mapping[str, Any] | None = None,
) -> None:
    """Writes a tree of arrays and its configuration, whole or not at all.

    Args:
      path: of the file; it is replaced if there is one.
      params: nested dicts of arrays.
      config: of the model.
      dtype: to round the numbers to, "float32", "bfloat16", ...; None keeps theirs. It is done tensor by tensor.
      metadata: more strings to keep, such as where the numbers came from.
      targets: the configuration's tree of what has the `shape` of each leaf. The tree is held against it once, here,
        and not whenever the file is loaded.

    Raises:
      ValueError: an array or a dtype that the format does not have; NaN or infinity; another tree than `targets`.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    texts = {"format": FORMAT, "version": VERSION, "config": json.dumps(config.to_dict()), **(metadata or {})}
    if targets is not None:
        leaves = flatten(targets)
        weights.match(path, arrays, {name: Source(name, Kind.SAME) for name in leaves}, leaves, spelling=str)
        dtypes = {name: array.dtype if dtype is None else np.dtype(dtype) for name, array in arrays.items()}
        texts[SEAL] = _seal(texts, {name: (dtypes[name], array.shape) for name, array in arrays.items()})
    safetensors.write(path, arrays, texts, dtype)


def is_sealed(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the file has the tree that `save` held against its configuration, and wrote with finite numbers."""
    return SEAL in metadata and metadata[SEAL] == _seal(metadata, {n: (x.dtype, x.shape) for n, x in tensors.items()})


def _seal(metadata: Mapping[str, str], tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    """What another configuration, or other names, dtypes or shapes, would have otherwise. It is no signature."""
    lines = sorted(f"{name!r} {dtype} {shape}" for name, (dtype, shape) in tensors.items())
    return hashlib.sha256("\n".join([metadata["version"], metadata["config"], *lines]).encode()).hexdigest()


def is_native(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is one of ours."""
    return metadata.get("format") == FORMAT


def config_of(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> Config:
    """The configuration in a native file's metadata. Raises CheckpointError where it is none."""
    if (written := metadata.get("version")) != VERSION:
        raise CheckpointError(f"{path}: its format is sdjax {written!r:.20}, this version reads {VERSION}")
    return parse(metadata.get("config", ""), path)


def parse(text: str, path: str | os.PathLike[str]) -> Config:
    """A configuration as JSON. Raises CheckpointError where it is none that a model could have."""
    try:
        config = Config.from_dict(json.loads(text))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read: {error}") from error
    configurations.check(config, path)
    return config


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts to one of dotted names."""
    leaves: dict[str, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            leaves |= {f"{name}.{rest}": leaf for rest, leaf in flatten(node).items()}
        else:
            leaves[name] = node
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{name!r:.80}: a part of this name is a tensor's already")
        if last in node:
            raise CheckpointError(f"{name!r:.80}: it is the beginning of other tensors' names")
        node[last] = leaf
    return tree
