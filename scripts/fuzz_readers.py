"""Fuzzes the readers of files that strangers made, guided by coverage (atheris, which is libFuzzer):

    pip install atheris
    python scripts/fuzz_readers.py zip --inputs 1000000 --corpus corpus/zip

Targets:

  pickle       the stack machine, on bare pickles
  zip          PyTorch's files: the input is the pickle and the numbers of an archive, which may itself be damaged
  safetensors  the input is the header and the numbers of a file, which may itself be damaged
  msgpack      the input is a file of Flax's, or the array in one, which may itself be damaged

Whatever is not a value or a `CheckpointError` (for bare pickles a `PickleError`) is a finding: it is printed, and the
input is kept. So are five seconds for one input, and memory beyond 512 MB. What is read is read to its last number.
libFuzzer prints the coverage reached as `cov`. Inputs that reached something new are kept in the corpus and begin the
next run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import atheris
import numpy as np
from msgpack import ExtType, packb

with atheris.instrument_imports(include=["sdjax", "zipfile", "pickletools"]):
    from sdjax.checkpoints import msgpack, pickles, pytorch, safetensors
    from sdjax.checkpoints.errors import CheckpointError

LARGEST = 4096  # bytes of an input
# In memory: a million files would wear a disk out.
FILE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "input"


def fuzz_pickle(data: bytes) -> None:
    with contextlib.suppress(pickles.PickleError):
        pickles.loads(data)


def fuzz_zip(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    places = _places(given)
    numbers = given.ConsumeBytes(given.ConsumeIntInRange(0, 64))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a/data.pkl", given.ConsumeBytes(LARGEST))
        archive.writestr("a/data/0", numbers)
    _read(lambda path: pytorch.read(path)[0], _damaged(packed.getvalue(), places))


def fuzz_safetensors(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    places = _places(given)
    numbers = given.ConsumeBytes(given.ConsumeIntInRange(0, 64))
    header = given.ConsumeBytes(LARGEST)
    whole = len(header).to_bytes(8, "little") + header + numbers
    _read(lambda path: safetensors.read(path)[0], _damaged(whole, places))


def fuzz_msgpack(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    places = _places(given)
    bare = given.ConsumeBool()
    rest = given.ConsumeBytes(LARGEST)
    _read(msgpack.read, _damaged(rest if bare else packb({"a": {"b": ExtType(1, rest)}}), places))


def _places(given: atheris.FuzzedDataProvider) -> list[tuple[int, int]]:
    """Where a file is to be damaged, and by which byte."""
    count = given.ConsumeIntInRange(0, 3)
    return [(given.ConsumeIntInRange(0, LARGEST), given.ConsumeIntInRange(0, 255)) for _ in range(count)]


def _damaged(whole: bytes, places: list[tuple[int, int]]) -> bytes:
    damaged = bytearray(whole)
    for place, value in places if whole else []:
        damaged[place % len(whole)] = value
    return bytes(damaged)


def _read(read: Callable[[Path], Mapping[str, np.ndarray]], data: bytes) -> None:
    FILE.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        for array in read(FILE).values():
            array.tobytes()


def seeds(target: str) -> list[bytes]:
    """Sound files to begin with."""
    state = {"a": [1, 2.5, ("x", None, True)], "state_dict": {"w": b"\0" * 8}, 3: {"y"}}
    pickled = [pickle.dumps(state, protocol) for protocol in range(6)]
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQK\0(K\x02t(K\x01ttR."
    tensor = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + storage[:-1] + b"s."
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"b":"c"}}'
    array = packb(((2,), "float32", b"\0" * 8))
    # Taken apart from behind: no damage; how many bytes of numbers there are at the start, or whether it is a file.
    return {
        "pickle": [*pickled, tensor],
        "zip": [b"\0" * 8 + program + b"\x08\0" for program in (*pickled, tensor)],
        "safetensors": [b"\0" * 8 + header + b"\x08\0"],
        "msgpack": [packb({"a": {"b": ExtType(1, array)}}) + b"\1\0", array + b"\0\0"],
    }[target]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = {"pickle": fuzz_pickle, "zip": fuzz_zip, "safetensors": fuzz_safetensors, "msgpack": fuzz_msgpack}
    parser.add_argument("target", choices=targets)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--corpus", type=Path, help="folder of inputs, made if missing (default: a temporary one)")
    parser.add_argument("--seconds", type=int, default=5, help="for one input; more where others stop the process")
    parser.add_argument("--findings", default="finding-", help="what the names of findings' files begin with")
    arguments = parser.parse_args()
    corpus = arguments.corpus or Path(tempfile.mkdtemp())
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds(arguments.target)):
        (corpus / f"seed-{i}").write_bytes(seed)
    limits = [f"-timeout={arguments.seconds}", "-rss_limit_mb=512", f"-max_len={LARGEST}"]
    limits.append(f"-artifact_prefix={arguments.findings}")
    atheris.Setup([sys.argv[0], f"-atheris_runs={arguments.inputs}", *limits, str(corpus)], targets[arguments.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
