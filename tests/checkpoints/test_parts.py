"""A part of a model from its own file or folder, or out of a whole one, in place of the one that is there."""

import dataclasses
import json

import numpy as np
import pytest

import sdjax
from sdjax import checkpoints
from sdjax.checkpoints import CheckpointError, native, safetensors
from sdjax.models.config import TINY, TINY_2

from .conftest import assert_equal


@pytest.fixture(scope="module")
def model(tiny_file):
    return sdjax.load(tiny_file)


@pytest.fixture
def files(tmp_path, params):
    """The same part under every spelling: (part, file name) -> path."""
    diffusers, ldm = (checkpoints.export(params, TINY, layout) for layout in ("diffusers", "ldm"))
    own = native.flatten(params)
    roots = {
        "vae": ("vae.", "first_stage_model."),
        "unet": ("unet.", "model.diffusion_model."),
        "text_encoder": ("text_encoder.", "cond_stage_model.transformer."),
    }

    def write(part, spelling):
        root, ldm_root = roots[part]
        if spelling == "whole":
            tensors = ldm
        elif spelling == "ldm":
            tensors = {name: x for name, x in ldm.items() if name.startswith(ldm_root)}
        elif spelling == "bare ldm":
            tensors = {name.removeprefix(ldm_root): x for name, x in ldm.items() if name.startswith(ldm_root)}
            if part == "vae":
                tensors |= {"loss.discriminator.main.0.weight": np.ones(3), "model_ema.decay": np.ones(())}
        elif spelling == "bare diffusers":
            tensors = {name.removeprefix(root): x for name, x in diffusers.items() if name.startswith(root)}
        else:
            tensors = {name: x for name, x in own.items() if name.startswith(root)}
        safetensors.write(tmp_path / "part.safetensors", tensors, {})
        return tmp_path / "part.safetensors"

    return write


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
@pytest.mark.parametrize("spelling", ["whole", "ldm", "bare ldm", "bare diffusers", "ours"])
def test_spellings(model, params, files, part, spelling):
    path = files(part, spelling)
    changed = model.with_part(path, part if spelling == "whole" else None)
    assert_equal(changed.params, {**model.params, part: params[part]})
    assert changed.config == model.config
    assert changed.source == f"{model.source} + part.safetensors"
    assert changed.fingerprint != model.fingerprint
    if spelling == "whole":
        with pytest.raises(CheckpointError, match=r"several parts \(text_encoder, unet, vae\); say which"):
            model.with_part(path)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_folders(model, params, folder, part):
    path, change = folder
    change("vae/config.json", _class_name="AutoencoderKL", scaling_factor=0.5)
    for changed in (model.with_part(path, part), model.with_part(path / part)):
        assert_equal(changed.params, {**model.params, part: params[part]})
        assert changed.config.vae.scaling_factor == (0.5 if part == "vae" else TINY.vae.scaling_factor)
    with pytest.raises(CheckpointError, match="several parts"):
        model.with_part(path)


def test_refusals(model, files, folder, tmp_path, unchecked):
    path, change = folder
    change("vae/config.json", _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match="part: expected one of unet, vae, text_encoder"):
        model.with_part(path, "scheduler")
    with pytest.raises(CheckpointError, match="this is a UNet, not an autoencoder"):
        model.with_part(path / "unet", "vae")
    with pytest.raises(CheckpointError, match="none of what this model could have is in it: a UNet"):
        model.with_part(files("vae", "ldm"), "unet")
    for part, fields, message in (
        ("vae", {"latent_channels": 8}, "says of unet.in_channels, unet.out_channels"),
        ("vae", {"block_out_channels": [16, 32, 32], "down_block_types": ["DownEncoderBlock2D"] * 3}, "missing|wrong"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "it configures 'AutoencoderTiny'"),
        ("vae", {"latent_channels": None}, "cannot be read"),
        ("unet", {"time_cond_proj_dim": 3}, "time_cond_proj_dim is 3"),
        ("text_encoder", {"hidden_size": 48}, "text_encoder.*(context_width|num_heads)|unet.context_width"),
    ):
        file = path / part / "config.json"
        before = file.read_text()
        change(f"{part}/config.json", **fields)
        with pytest.raises(CheckpointError, match=message):
            model.with_part(path / part)
        file.write_text(before)
    tensors = safetensors.read(files("vae", "bare ldm"))[0]
    name = "encoder.conv_in.bias"
    for wrong, message in (
        (tensors | {name: tensors[name] * np.nan}, f"NaN or infinity .*{name}"),
        (tensors | {name: tensors[name][:3]}, f"wrong shape .*{name}"),
        ({n: x for n, x in tensors.items() if n != name}, rf"missing \(1\): .*{name}"),
        (tensors | {"encoder.more": np.ones(3)}, r"unexpected \(1\): .*encoder.more"),
    ):
        safetensors.write(tmp_path / "wrong.safetensors", wrong, {})
        with pytest.raises(CheckpointError, match=message):
            model.with_part(tmp_path / "wrong.safetensors")
    (path / "vae" / "config.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="not a JSON object"):
        model.with_part(path / "vae")


def test_a_part_brings_its_configuration(model, params, tmp_path):
    """A file of ours says how its part is to be computed, and that is what is done."""
    vae = dataclasses.replace(TINY, vae=dataclasses.replace(TINY.vae, scaling_factor=0.5))
    checkpoints.save(tmp_path / "vae", params, vae)
    assert model.with_part(tmp_path / "vae", "vae").config == vae
    checkpoints.save(tmp_path / "two", params, TINY_2)
    changed = model.with_part(tmp_path / "two", "text_encoder")
    assert changed.config.text_encoder == TINY_2.text_encoder
    assert changed.tokenizer.padding_id == 0
    with pytest.raises(CheckpointError, match="its UNet predicts 'v', and the model 'epsilon'"):
        model.with_part(tmp_path / "two", "unet")


def test_averages_are_preferred(model, params, both_sets, original, tmp_path):
    safetensors.write(tmp_path / "both.safetensors", both_sets, {})
    averaged = model.with_part(tmp_path / "both.safetensors", "unet").params["unet"]
    for name, x in native.flatten(params["unet"]).items():
        np.testing.assert_array_equal(native.flatten(averaged)[name], x + 1)
    assert original


def test_what_was_added_must_fit(model, folder):
    path, change = folder
    nets = dataclasses.replace(model, controls={"a": sdjax.pipeline.Net("0", {})})
    change("unet/config.json", _class_name="UNet2DConditionModel", attention_head_dim=8)
    assert model.with_part(path / "unet").config.unet.num_heads == (8, 8)
    with pytest.raises(ValueError, match="do not fit this unet"):
        nets.with_part(path / "unet")
