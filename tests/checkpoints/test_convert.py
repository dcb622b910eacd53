"""Conversion to native files and to other programs' layouts."""

import hashlib

import diffusers
import numpy as np
import pytest
import torch

import sdjax
from sdjax import checkpoints
from sdjax.checkpoints import CheckpointError, native, safetensors
from sdjax.models.config import TINY, TINY_2

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
    with pytest.raises(ValueError, match="layout: expected native, diffusers or ldm, got 'onnx'"):
        checkpoints.convert(tmp_path, tmp_path, shapes, layout="onnx")


def test_errors_are_value_errors():
    assert issubclass(CheckpointError, ValueError)


@pytest.mark.parametrize("config", [TINY, TINY_2], ids=["SD 1", "SD 2"])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_other_layouts_round_trip(tmp_path, shapes, live, config, layout):
    """Written, read again and written again: equal to the bit, the configuration too."""
    params = live(config)
    checkpoints.save(tmp_path / "a", params, config)
    for start, end in (("a", "b"), ("b", "c")):
        checkpoints.convert(tmp_path / start, tmp_path / end, shapes, layout=layout if end == "b" else "native")
    found, read = checkpoints.load(tmp_path / "c", shapes)
    assert_equal(read, params)
    assert found == config
    assert not list(tmp_path.glob(".*"))
    if layout == "diffusers":
        with pytest.raises(FileExistsError):
            checkpoints.convert(tmp_path / "a", tmp_path / "b", shapes, layout=layout)


@pytest.mark.slow
def test_diffusers_reads_our_folder(tmp_path, shapes, live):
    """Its pipeline loads what we write, and makes the same latents of the same words and noise."""
    checkpoints.save(tmp_path / "a", live(TINY_2), TINY_2)
    checkpoints.convert(tmp_path / "a", tmp_path / "b", shapes, layout="diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "b", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(1, 16, 12, 4)).astype(np.float32)
    options = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 32, "width": 24, "output_type": "latent"}
    latents = torch.from_numpy(np.moveaxis(noise, -1, 1))
    expected = pipe("a cat, a dog", negative_prompt="red", latents=latents, **options).images.numpy()
    model = sdjax.load(tmp_path / "a")
    found = sdjax.generate("a cat, a dog", "red", model=model, latents=noise, sampler="ddim", **options)
    error = np.abs(found - np.moveaxis(expected, 1, -1)).max() / np.abs(expected).max()
    assert error < 1e-4
