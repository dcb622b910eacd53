"""Conversion to native files, as a function and as a script."""

import hashlib
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import pytest

from sdjax import checkpoints
from sdjax.checkpoints import CheckpointError, native, safetensors
from sdjax.models.config import TINY

from .conftest import assert_equal


def test_conversion(tmp_path, both_sets, params, shapes, save_torch):
    source = save_torch(tmp_path / "a.ckpt", both_sets, epoch=1)
    checkpoints.convert(source, tmp_path / "b", shapes, ema=False)
    assert_equal(checkpoints.load(tmp_path / "b", shapes)[1], params)
    metadata = safetensors.read(tmp_path / "b")[1]
    assert metadata["source"] == "a.ckpt"
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["weights"] == "last"
    checkpoints.convert(source, tmp_path / "b", shapes, dtype="bfloat16")
    assert safetensors.read(tmp_path / "b")[1]["weights"] == "averaged"
    assert {x.dtype.name for x in native.flatten(checkpoints.load(tmp_path / "b", shapes)[1]).values()} == {"bfloat16"}


def test_conversion_of_a_folder_and_in_place(tmp_path, folder, params, shapes):
    checkpoints.convert(folder[0], tmp_path / "a", shapes)
    checkpoints.convert(tmp_path / "a", tmp_path / "a", shapes)
    config, found = checkpoints.load(tmp_path / "a", shapes)
    assert config == TINY
    assert_equal(found, params)


def test_wrong_arguments(tmp_path, params, shapes):
    with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16, got 'float16'"):
        checkpoints.convert(tmp_path, tmp_path, shapes, dtype="float16")
    with pytest.raises(ValueError, match="layout: expected diffusers or ldm, got 'a1111'"):
        checkpoints.export(params, TINY, "a1111")


def test_errors_are_value_errors():
    assert issubclass(CheckpointError, ValueError)


SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_ckpt.py"


@pytest.mark.parametrize("good", [True, False])
def test_the_script(tmp_path, folder, shapes, params, good):
    source = folder[0] if good else tmp_path / "missing.ckpt"
    command = [sys.executable, str(SCRIPT), str(source), str(tmp_path / "b"), "--no-ema", "--dtype", "bfloat16"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in run.stderr
    if good:
        assert run.returncode == 0, run.stderr
        assert_equal(checkpoints.load(tmp_path / "b", shapes)[1], params, ml_dtypes.bfloat16)
    else:
        assert run.returncode == 2
        assert f"{source}: there is no such file" in run.stderr
