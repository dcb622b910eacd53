"""The safetensors format: equal to its own library in both directions, and strict with files that it would refuse."""

import json
import os
import random
import stat
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.safetensors import ALIGNMENT, DTYPES, MAX_HEADER, read, write

ARRAYS = {
    **{f"of {code}": (np.arange(12).reshape(3, 4) % 2).astype(dtype) for code, dtype in DTYPES.items()},
    "scalar": np.float32(3.5).reshape(()),
    "empty": np.zeros((0, 3), np.float16),
    "large": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "ümlaut": np.ones(3, np.uint8),
}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_round_trip(tmp_path):
    write(tmp_path / "a.safetensors", ARRAYS, {"key": "värde"})
    arrays, metadata = read(tmp_path / "a.safetensors")
    assert_equal(arrays, ARRAYS)
    assert metadata == {"key": "värde"}


def test_the_library_reads_what_we_write(tmp_path):
    write(tmp_path / "a.safetensors", ARRAYS, {"key": "value"})
    assert_equal(safetensors.numpy.load_file(tmp_path / "a.safetensors"), ARRAYS)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"key": "value"}


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5).bfloat16(), "c": torch.zeros(0)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    arrays, metadata = read(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    expected = {"a": tensors["a"].numpy(), "b": np.ones(5, ml_dtypes.bfloat16), "c": np.zeros(0, np.float32)}
    assert_equal(arrays, expected)


def test_arrays_are_mapped_read_only_and_aligned(tmp_path):
    write(tmp_path / "a.safetensors", {"a": np.zeros((16, 16), np.float32), "b": np.zeros(3, np.uint8)}, {})
    array = read(tmp_path / "a.safetensors")[0]["a"]
    assert array.ctypes.data % ALIGNMENT == 0
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_writing_rounds(tmp_path):
    write(tmp_path / "a.safetensors", {"a": np.array([1 + 2**-8, 3], np.float32)}, {}, "bfloat16")
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors")[0]["a"], np.array([1, 3], ml_dtypes.bfloat16))


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.ones(3)}, {})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(path, {"a": np.zeros(3)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_mapped_file_can_be_replaced(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.ones(3)}, {})
    arrays, _ = read(path)
    write(path, {"a": arrays["a"] + 1}, {})
    np.testing.assert_array_equal(arrays["a"], 1)
    np.testing.assert_array_equal(read(path)[0]["a"], 2)


def test_files_have_ordinary_permissions(tmp_path):
    write(tmp_path / "a.safetensors", {}, {})
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_dtypes_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match="a: a safetensors file cannot hold numbers of the dtype complex64"):
        write(tmp_path / "a.safetensors", {"a": np.zeros(1, np.complex64)}, {})


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


EIGHT = bytes(8)
WHOLE = file({"a": entry()}, EIGHT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header of 0 bytes"),
        (WHOLE[:5], "truncated"),
        (WHOLE[:20], "truncated"),
        (WHOLE[:-1], "truncated"),
        (WHOLE + b"x", "1 bytes follow"),
        (file(b"{}", length=2**63), "not a safetensors file"),
        (file(b"{}", length=2**64 - 1), "not a safetensors file"),
        (file(b"{}", length=MAX_HEADER + 1), "not a safetensors file"),
        (file(b"{}", length=MAX_HEADER), "truncated"),
        (file(b"{}", length=0), "not a safetensors file"),
        (file(b"{}}", EIGHT), "not the JSON"),
        (file(b"\xff\xfe{}"), "not the JSON"),
        (file(b"[" * 100_000), "not the JSON"),
        (file(b"[]"), "not an object"),
        (file(b'{"a": ' + b"9" * 5000 + b"}"), "not the JSON"),
        (file(b'{"a": {}, "a": {}}'), "'a' occurs twice"),
        (file(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', EIGHT), "occurs twice"),
        (file({"__metadata__": {"a": 1}}), "metadata"),
        (file({"__metadata__": []}), "metadata"),
        (file({"a": 3}), "the entry of 'a'"),
        (file({"a": entry(extra=1)}, EIGHT), "the entry of 'a'"),
        (file({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "the entry of 'a'"),
        (file({"a": entry("F8_E4M3")}, EIGHT), "'a' has the dtype 'F8_E4M3'; known are F64, F32"),
        (file({"a": entry(3)}, EIGHT), "dtype"),
        (file({"a": entry(shape=(-2, -1))}, EIGHT), "shape"),
        (file({"a": entry(shape=(2.0,))}, EIGHT), "shape"),
        (file({"a": entry(shape=(True, 2))}, EIGHT), "shape"),
        (file({"a": entry(shape=("2",))}, EIGHT), "shape"),
        (file({"a": entry(shape=(1,) * 40)}, EIGHT), "shape"),
        (file({"a": entry(shape=(2**32, 2**32, 2))}, EIGHT), "needs 147573952589676412928 bytes"),
        (file({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}), "shape"),
        (file({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}), "larger than an array"),
        (file({"a": entry(offsets=(0, 7))}, EIGHT), "span 7"),
        (file({"a": entry(offsets=(8, 0))}, EIGHT), "span -8"),
        (file({"a": entry(offsets=(-8, 0))}, EIGHT), "data_offsets"),
        (file({"a": entry(offsets=(0, 8, 16))}, EIGHT), "data_offsets"),
        (file({"a": entry(offsets=(0, 2**64))}, EIGHT), "data_offsets"),
        (file({"a": entry(offsets=(8, 16))}, EIGHT * 2), "begins at byte 8"),  # a hole
        (file({"a": entry(), "b": entry()}, EIGHT), "begins at byte 0"),  # both on the same bytes
        (file({"a": entry(), "b": entry(offsets=(4, 12))}, EIGHT * 2), "begins at byte 4"),
    ],
)
def test_bad_files(tmp_path, data, message):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.safetensors")


def test_many_names_take_linear_time(tmp_path):
    names = [f'"{i}":0' for i in range(100_000)]
    (tmp_path / "a").write_bytes(file(("{" + ",".join([*names, '"99999":0']) + "}").encode()))
    began = time.process_time()
    with pytest.raises(CheckpointError, match="'99999' occurs twice"):
        read(tmp_path / "a")
    assert time.process_time() - began < 5  # 0.1 s here; in quadratic time it would be minutes


def test_truncated_and_damaged_files(tmp_path):
    write(tmp_path / "whole", {"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.int8)}, {"k": "v"})
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read(tmp_path / "cut")
    rng = random.Random(0)
    for i in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / f"{i % 7}").write_bytes(damaged)
        try:
            arrays, _ = read(tmp_path / f"{i % 7}")
        except CheckpointError:
            continue
        for array in arrays.values():
            array.sum()
