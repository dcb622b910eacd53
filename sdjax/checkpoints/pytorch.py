"""PyTorch's files (`torch.save` since version 1.6) without PyTorch: arrays mapped from a zip of numbers and a pickle.

The archive has one top folder: `data.pkl`, the pickle of the saved object, in which every storage is a persistent
reference ("storage", class, key, device, length); `data/<key>`, its numbers, never compressed; `byteorder`.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import Any, BinaryIO, NamedTuple, cast

import ml_dtypes
import numpy as np

from sdjax.checkpoints import pickles
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.pickles import Call, Global, Persistent

STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
MAX_MEMBERS = 100_000
MAX_DIRECTORY = 1 << 24  # bytes: 160 of each
MAX_RANK = 8


class Member(NamedTuple):
    """Where the bytes of a file in the archive lie."""

    begin: int
    size: int


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The tensors of a saved state dict, mapped from the file read-only, and the names saved beside them.

    The state dict is the saved object itself, or an entry of it: "state_dict" as Lightning writes it, or
    "string_to_param", the vectors of a textual inversion. Whatever else was saved (callbacks, optimizers, numpy
    scalars) is passed over. Nothing in the file is executed.

    Returns:
      The arrays by name, and the strings that are keys of what is no tensor, in the state dict or beside it.

    Raises:
      CheckpointError: not such a file, not whole, or one whose tensors lie outside of what it holds.
    """
    data, members = _archive(path)
    saved = _pickle(path, data, members)
    outer = tuple(key for key in saved if isinstance(key, str))
    entry = next((entry for entry in ("state_dict", "string_to_param") if entry in saved), None)
    state = saved if entry is None else saved[entry]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: its {entry} is not a dict of tensors")
    state = {key: _without_parameter(value) for key, value in state.items() if isinstance(key, str)}
    tensors = {key: value for key, value in state.items() if isinstance(value, Call) and value.name in TENSORS}
    for key, value in state.items():
        if isinstance(value, Call) and key not in tensors and value.name.startswith("torch._utils._rebuild"):
            raise CheckpointError(
                f"{path}: {key!r:.80} is made by {value.name:.80}, a kind of tensor that sdjax does not read"
            )
    arrays = {key: _tensor(f"{path}: {key!r:.80}", call.arguments, data, members) for key, call in tensors.items()}
    others = (key for key in (*state, *outer) if key not in arrays)
    return arrays, tuple(dict.fromkeys(others))


def _archive(path: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, Member]]:
    """The file's bytes, mapped, and its members by their names without the top folder."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(cast(BinaryIO, _Shy(file))) as archive:
            entries = archive.infolist()
        data = np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # zipfile documents BadZipFile, but damaged directories raise much else
        raise CheckpointError(
            f"{path}: its zip directory cannot be read, it is truncated or damaged: {error}"
        ) from error
    if len(entries) > MAX_MEMBERS:
        raise CheckpointError(f"{path}: {len(entries)} files in the archive; at most {MAX_MEMBERS} are read")
    # Names serve as keys only: nothing is ever unpacked to the disk.
    tops = [entry.filename[: -len("data.pkl")] for entry in entries if entry.filename.endswith("/data.pkl")]
    tops = [top for top in tops if top.count("/") == 1]
    if len(tops) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote: {len(tops)} data.pkl in it")
    members: dict[str, Member] = {}
    for entry in entries:
        if not entry.filename.startswith(tops[0]):
            continue
        name = entry.filename[len(tops[0]) :]
        if name in members:
            raise CheckpointError(f"{path}: {entry.filename!r} is twice in the archive")
        members[name] = _member(path, entry, data)
    return data, members


class _Shy:
    """A file that no more than a directory's bytes are read from at once: zipfile takes six times as much of memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError(f"a directory of {size} bytes; at most {MAX_DIRECTORY} are read")
        return self._file.read(size if size >= 0 else 1 << 17)  # all that is left: zipfile looks for a comment's end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _member(path: str | os.PathLike[str], entry: zipfile.ZipInfo, data: np.ndarray) -> Member:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1 or entry.compress_size != entry.file_size:
        raise CheckpointError(f"{path}: {entry.filename!r} is compressed or encrypted, as torch.save never writes")
    header = data[entry.header_offset : entry.header_offset + 30].tobytes() if entry.header_offset >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{path}: {entry.filename!r} is not where the archive's directory says")
    # The local header repeats the name and has its own extra field: torch pads with it to 64 bytes.
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    begin = entry.header_offset + 30 + names
    if begin + entry.file_size > data.size:
        raise CheckpointError(f"{path}: {entry.filename!r} ends beyond the file; it is truncated")
    return Member(begin, entry.file_size)


def _pickle(path: str | os.PathLike[str], data: np.ndarray, members: dict[str, Member]) -> dict[Any, Any]:
    order = members.get("byteorder")
    if order is not None and (written := _bytes(data, order, 16)) != b"little":
        raise CheckpointError(f"{path}: its numbers are {written!r}-endian; only little-endian files are read")
    program = members["data.pkl"]
    if program.size > pickles.MAX_SIZE:
        raise CheckpointError(f"{path}: a pickle of {program.size} bytes; at most {pickles.MAX_SIZE} are read")
    try:
        saved = pickles.loads(_bytes(data, program, program.size))
    except pickles.PickleError as error:
        raise CheckpointError(f"{path}: its data.pkl cannot be read: {error}") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path}: what was saved is not a dict of tensors; save model.state_dict()")
    return saved


def _bytes(data: np.ndarray, member: Member, limit: int) -> bytes:
    return data[member.begin : member.begin + min(member.size, limit)].tobytes()


def _without_parameter(value: Any) -> Any:
    is_parameter = isinstance(value, Call) and value.name in PARAMETERS
    return value.arguments[0] if is_parameter and isinstance(value.arguments, tuple) and value.arguments else value


def _tensor(where: str, arguments: Any, data: np.ndarray, members: dict[str, Member]) -> np.ndarray:
    """(storage, offset, size, stride, ...) -> a view of the file, once all of it is known to lie in the storage."""
    if not isinstance(arguments, tuple) or len(arguments) < 4 or not isinstance(arguments[0], Persistent):
        raise CheckpointError(f"{where} is not a tensor with a storage")
    storage, offset, size, stride = arguments[:4]
    numbers = _storage(where, storage.key, data, members)
    if not _are_sizes((offset,)) or not _are_sizes(size) or not _are_sizes(stride) or len(size) != len(stride):
        raise CheckpointError(f"{where} has an offset, size and stride that are not those of a tensor")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A stride of 0 repeats numbers: a few bytes could stand for a terabyte.
    if math.prod(size) > numbers.size or (math.prod(size) > 0 and last >= numbers.size):
        raise CheckpointError(f"{where} reaches beyond its storage of {numbers.size} numbers")
    if math.prod(size) == 0:
        return _empty(where, size, numbers.dtype)
    strides = tuple(step * numbers.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(numbers[offset:], size, strides, writeable=False)


def _storage(where: str, key: Any, data: np.ndarray, members: dict[str, Member]) -> np.ndarray:
    if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage" or not isinstance(key[1], Global):
        raise CheckpointError(f"{where} refers to something that is not a storage")
    _, kind, name, _, count = key
    if kind.name not in STORAGES:
        raise CheckpointError(f"{where} has numbers of {kind.name}; known are {', '.join(STORAGES)}")
    dtype = STORAGES[kind.name]
    member = members.get(f"data/{name}") if isinstance(name, str) else None
    if member is None:
        raise CheckpointError(f"{where} has its numbers in a file that is not in the archive")
    if not _are_sizes((count,)) or count * dtype.itemsize != member.size:
        raise CheckpointError(
            f"{where} needs another count of {dtype} numbers than the {member.size} bytes of {name!r}"
        )
    return data[member.begin : member.begin + member.size].view(dtype)


def _empty(where: str, size: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if math.prod(n for n in size if n) >= 2**31:
        raise CheckpointError(f"{where} is empty and larger than an array can be")
    return np.zeros(size, dtype)


# Values that fail this are not shown in messages: what a hostile pickle builds can be too deep or too wide to print.
def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= MAX_RANK
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in values)
    )
