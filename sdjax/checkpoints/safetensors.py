"""The safetensors format: arrays mapped from a checked file, and written whole or not at all.

The format (its own repository's README): 8 bytes, the header's length as a little-endian integer; the header, a JSON
object name -> {dtype, shape, data_offsets} with an optional "__metadata__" of strings; the numbers, without holes.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from sdjax import files
from sdjax.checkpoints.arrays import ALIGNMENT, FLOATS, contiguous, is_finite
from sdjax.checkpoints.errors import CheckpointError, shorten

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 16_000_000  # bytes: a hundred thousand tensors; parsed, JSON takes thirty times its size
MAX_RANK = 8
AHEAD = 2  # tensors; the largest has 150 MB

T = TypeVar("T")
S = TypeVar("S")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, mapped from it read-only, and its metadata.

    Every name, shape and offset is checked before any array exists. Nothing is copied.

    Raises:
      CheckpointError: not such a file, or one whose header does not describe it exactly.
    """
    header, start, size = _header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: its metadata is not an object of strings")
    entries = {name: _entry(path, name, fields) for name, fields in header.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise CheckpointError(
                f"{path}: {name!r:.80} begins at byte {begin} of the data, the tensor before ends at {end}"
            )
        end = stop
    if start + end > size:
        raise CheckpointError(f"{path}: it is truncated: the header describes {start + end} bytes, the file has {size}")
    if start + end < size:
        raise CheckpointError(f"{path}: {size - start - end} bytes follow the {start + end} that the header describes")
    data = np.asarray(np.memmap(path, np.uint8, "r"))[start:]
    arrays = {
        name: data[begin:stop].view(dtype).reshape(shape) for name, (dtype, shape, begin, stop) in entries.items()
    }
    return arrays, metadata


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    dtype: str | None = None,
) -> None:
    """Writes a file that every reader of the format accepts, atomically: a temporary file, synced, then renamed.

    Arrays whose size is a multiple of 64 bytes come first and begin at multiples of 64 bytes of the file. `dtype`
    rounds them as they are written, a few at a time.

    Raises:
      ValueError: an array or a dtype that the format does not have.
      CheckpointError: numbers that are not finite, or no longer are when they are rounded; no file is written.
    """
    dtypes = {name: array.dtype if dtype is None else np.dtype(dtype) for name, array in arrays.items()}
    codes = {known: code for code, known in DTYPES.items()}
    if other := next((name for name in arrays if dtypes[name] not in codes), None):
        raise ValueError(f"{other}: a safetensors file cannot hold numbers of the dtype {dtypes[other]}")
    sizes = {name: array.size * dtypes[name].itemsize for name, array in arrays.items()}
    # Within a class by falling item size, so that none begins off its own alignment.
    order = sorted(arrays, key=lambda name: (sizes[name] % ALIGNMENT > 0, -dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        stop = offset + sizes[name]
        shape = list(arrays[name].shape)
        header[name] = {"dtype": codes[dtypes[name]], "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with files.whole(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        broken: set[str] = set()
        overflown: set[str] = set()
        laid = _ahead(lambda name: _laid(arrays[name], dtypes[name]), order)
        for name, (array, finite) in zip(order, laid, strict=True):
            if not finite:
                (overflown if is_finite(arrays[name]) else broken).add(name)
            file.write(array.reshape(-1).view(np.uint8).data)
        if broken:
            raise CheckpointError(f"{path}: not written: NaN or infinity in {len(broken)} tensors ({shorten(broken)})")
        if overflown:
            raise CheckpointError(
                f"{path}: not written: numbers too large for {dtype} in {len(overflown)} tensors ({shorten(overflown)})"
            )


def _laid(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """The array as a file has it, and whether its numbers are finite."""
    laid = contiguous(array, dtype)
    return laid, dtype.name not in FLOATS or is_finite(laid)


def _ahead(function: Callable[[T], S], items: Iterable[T]) -> Iterator[S]:
    """`map`, up to AHEAD items ahead of what is asked for, in a thread: NumPy lets others run beside it."""
    with ThreadPoolExecutor(1) as pool:
        results: collections.deque[Future[S]] = collections.deque()
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > AHEAD:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()


def _header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data begins, and the file's size."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER:
            raise CheckpointError(f"{path}: not a safetensors file: a header of {length} bytes is declared")
        if length > size - 8:
            raise CheckpointError(
                f"{path}: it is truncated: a header of {length} bytes is declared, the file has {size}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not the JSON of a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not an object")
    return header, 8 + length, size


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name!r:.80} occurs twice")
        table[name] = value
    return table


def _entry(path: Any, name: str, fields: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of one tensor, checked by themselves."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the entry of {name!r:.80} is not dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name!r:.80} has the dtype {dtype!r:.80}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(n) for n in shape):
        raise CheckpointError(f"{path}: {name!r:.80} has the shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise CheckpointError(f"{path}: {name!r:.80} has the data_offsets {offsets!r:.80}")
    begin, stop = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - begin != expected:
        raise CheckpointError(f"{path}: {name!r:.80} needs {expected} bytes, its data_offsets span {stop - begin}")
    if expected == 0 and math.prod(n for n in shape if n) >= 2**31:
        raise CheckpointError(f"{path}: {name!r:.80} is empty and larger than an array can be")
    return DTYPES[dtype], tuple(shape), begin, stop


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62
