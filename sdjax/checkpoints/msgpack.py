"""The files of Flax's serialization, in which diffusers and transformers kept models before they dropped Flax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from sdjax.checkpoints.errors import CheckpointError

ARRAY = 1  # Flax's code for an extension that holds an array: its shape, dtype and bytes, packed again
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}
MAX_DEPTH = 32
MAX_ENTRIES = 10_000  # names in all


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.msgpack`, by dotted names.

    Raises:
      CheckpointError: it is no such file, not whole, or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    entries = 0

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal entries
        entries += len(pairs)
        tree = dict(pairs)
        if entries > MAX_ENTRIES or len(tree) < len(pairs) or any(not key or "." in key for key in tree):
            raise CheckpointError(
                f"{path}: a name is twice in it, empty or dotted; or it has over {MAX_ENTRIES} entries"
            )
        return tree

    try:
        tree = msgpack.unpackb(
            data,
            ext_hook=lambda code, body: _array(path, code, body),
            object_pairs_hook=once,
            strict_map_key=True,
            # Small things in great number are what memory would be spent on.
            max_array_len=0,
            max_map_len=MAX_ENTRIES,
            max_str_len=1024,
            max_bin_len=0,
        )
    except CheckpointError:
        raise
    except Exception as error:  # msgpack's own, and ValueError for what is too deep, too long or no text
        raise CheckpointError(f"{path}: not a whole file of Flax's serialization: {error!s:.200}") from error
    arrays: dict[str, np.ndarray] = {}
    _flatten(path, tree, "", 0, arrays)
    return arrays


def _array(path: Path, code: int, body: bytes) -> np.ndarray:
    if code != ARRAY:
        raise CheckpointError(f"{path}: an extension of kind {code}, which is no array")
    try:
        shape, dtype, numbers = msgpack.unpackb(
            body, use_list=True, max_array_len=8, max_map_len=0, max_ext_len=0, max_str_len=32
        )
    except Exception as error:
        raise CheckpointError(f"{path}: an array without shape, dtype and numbers: {error!s:.100}") from error
    sizes = isinstance(shape, list) and all(isinstance(n, int) and 0 <= n < 2**40 for n in shape) and len(shape) <= 8
    if not sizes or dtype not in DTYPES or not isinstance(numbers, bytes):
        raise CheckpointError(f"{path}: an array of the shape {shape!r:.80} and dtype {dtype!r:.40}")
    if math.prod(shape) * DTYPES[dtype].itemsize != len(numbers):
        raise CheckpointError(f"{path}: an array {shape!r:.80} of {dtype} has {len(numbers)} bytes")
    return np.frombuffer(numbers, DTYPES[dtype]).reshape(shape)


def _flatten(path: Path, node: Any, name: str, depth: int, arrays: dict[str, np.ndarray]) -> None:
    if isinstance(node, np.ndarray):
        arrays[name] = node
    elif isinstance(node, Mapping) and depth < MAX_DEPTH:
        if "__msgpack_chunked_array__" in node:
            raise CheckpointError(
                f"{path}: {name:.80} is in chunks, as arrays above a gigabyte are; no model has those"
            )
        for key, child in node.items():
            _flatten(path, child, f"{name}.{key}" if name else str(key), depth + 1, arrays)
    else:
        raise CheckpointError(f"{path}: {name:.80} is a {type(node).__name__}, not an array")
