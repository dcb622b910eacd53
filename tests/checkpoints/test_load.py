"""Native and original files, and what can be wrong with their tensors."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch

import sdjax
from sdjax import checkpoints
from sdjax.checkpoints import CheckpointError, native, safetensors
from sdjax.models.config import TINY

from .conftest import assert_equal

# Native files.


def test_native_files_are_mapped(tmp_path, params, shapes):
    checkpoints.save(tmp_path / "a.safetensors", params, TINY)
    config, found = checkpoints.load(tmp_path / "a.safetensors", shapes)
    assert config == TINY
    assert_equal(found, params)
    assert not any(x.flags.owndata or x.flags.writeable for x in native.flatten(found).values())


def test_native_files_of_any_configuration(tmp_path, shapes):
    config = dataclasses.replace(
        TINY, unet=dataclasses.replace(TINY.unet, in_channels=9, linear_projection=True), prediction="v"
    )
    tree = native.flatten(shapes(config))
    params = native.unflatten({name: np.ones(x.shape, ml_dtypes.bfloat16) for name, x in tree.items()})
    checkpoints.save(tmp_path / "a", params, config)
    found = checkpoints.load(tmp_path / "a", shapes)
    assert found[0] == config
    assert_equal(found[1], params, ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "its format is sdjax '2'"),
        ({"config": "{"}, "configuration cannot be read"),
        ({"config": "[]"}, "configuration cannot be read"),
        ({"config": "[" * 100_000}, "configuration cannot be read"),
        ({"config": '{"colour": 1}'}, "unknown field 'colour'"),
        ({"config": '{"prediction": 1}'}, "config.prediction"),
        ({"config": '{"prediction": "x0"}'}, "says of prediction"),
        ({"config": '{"beta_start": -1.0}'}, "says of beta_start"),
        ({"config": '{"beta_end": NaN}'}, "says of beta_start, beta_end"),
        ({"config": '{"steps_offset": -1}'}, "says of steps_offset"),
        ({"config": '{"unet": {"channels": []}}'}, "says of unet.channels"),
        ({"config": '{"unet": {"channels": ["a"]}}'}, "says of unet.channels"),
        ({"config": '{"unet": {"channels": [320, 640, 1280, 1281]}}'}, "says of unet.num_heads, unet.channels"),
        ({"config": '{"unet": {"norm_groups": 0}}'}, "says of unet.norm_groups"),
        ({"config": '{"unet": {"context_width": 1000000000000}}'}, "says of unet.context_width"),
        ({"config": '{"unet": {"blocks_per_level": 1000}}'}, "says of unet.blocks_per_level"),
        ({"config": '{"unet": {"in_channels": 5}}'}, "says of unet.in_channels"),
        ({"config": '{"text_encoder": {"activation": "tanh"}}'}, "says of text_encoder.activation"),
        ({"config": '{"vae": {"scaling_factor": 0.0}}'}, "says of vae.scaling_factor"),
        ({"config": '{"image_size": 513}'}, "says of image_size"),
    ],
)
def test_native_files_with_a_wrong_configuration(tmp_path, shapes, metadata, message):
    texts = {"format": "sdjax", "version": "1", "config": "{}", **metadata}
    safetensors.write(tmp_path / "a", {"x": np.zeros(1)}, texts)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path / "a", shapes)


def test_native_files_with_names_inside_of_names(tmp_path, shapes):
    texts = {"format": "sdjax", "version": "1", "config": json.dumps(TINY.to_dict())}
    safetensors.write(tmp_path / "a", {"unet": np.zeros(1), "unet.conv_in": np.zeros(1)}, texts)
    with pytest.raises(CheckpointError, match="unexpected"):
        checkpoints.load(tmp_path / "a", shapes)


def untraced(config):
    raise AssertionError("a file that was checked as it was written is checked again")


NAME = "unet.conv_out.bias"


def test_what_was_checked_as_it_was_written_is_trusted(tmp_path, params, shapes):
    path = tmp_path / "a"
    checkpoints.save(path, params, TINY, targets=shapes(TINY))
    config, found = checkpoints.load(path, untraced)
    assert config == TINY
    assert_equal(found, params)


@pytest.mark.parametrize("change", ["another name", "another shape", "another dtype", "another configuration"])
def test_what_was_changed_since_is_not(tmp_path, params, shapes, change):
    path = tmp_path / "a"
    checkpoints.save(path, params, TINY, targets=shapes(TINY))
    arrays, metadata = safetensors.read(path)
    arrays = dict(arrays)
    if change == "another name":
        arrays["unet.bias"] = arrays.pop(NAME)
    elif change == "another shape":
        arrays[NAME] = arrays[NAME][:3]
    elif change == "another dtype":
        arrays[NAME] = arrays[NAME].astype(np.int32)
    else:
        wider = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, blocks_per_level=3))
        metadata["config"] = json.dumps(wider.to_dict())
    safetensors.write(path, arrays, metadata)
    with pytest.raises(CheckpointError, match="its tensors are not those of the model"):
        checkpoints.load(path, shapes)


@pytest.mark.slow
def test_numbers_that_somebody_spoilt_are_found_in_the_end(tmp_path, params, shapes, unchecked):
    path = tmp_path / "a"
    checkpoints.save(path, params, TINY, targets=shapes(TINY))
    arrays, metadata = safetensors.read(path)
    safetensors.write(path, {**arrays, NAME: np.full_like(arrays[NAME], np.nan)}, metadata)
    model = sdjax.load(path)
    with pytest.raises(FloatingPointError, match="latents"):
        sdjax.generate("a", model=model, num_inference_steps=1, height=16, width=16, sampler="ddim")


def test_another_tree_than_the_configuration_has_is_not_saved(tmp_path, params, shapes):
    tree = {**params, "unet": {**params["unet"], "more": np.zeros(1)}}
    with pytest.raises(ValueError, match=r"unexpected \(1\): unet.more"):
        checkpoints.save(tmp_path / "a", tree, TINY, targets=shapes(TINY))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, params, number):
    tree = {**params, "spoilt": np.array([0, number], np.float32)}
    with pytest.raises(ValueError, match=r"not written: NaN or infinity in 1 tensors \(spoilt\)"):
        checkpoints.save(tmp_path / "a", tree, TINY)
    assert not list(tmp_path.iterdir())


def test_numbers_too_large_for_the_dtype(tmp_path, params, shapes):
    largest = np.finfo(np.float32).max  # beyond bfloat16's
    unet = {**params["unet"], "conv_out": {**params["unet"]["conv_out"], "bias": np.full(4, largest)}}
    checkpoints.save(tmp_path / "a", {**params, "unet": unet}, TINY)
    with pytest.raises(CheckpointError, match=rf"too large for bfloat16 in 1 tensors \({NAME}\)"):
        checkpoints.convert(tmp_path / "a", tmp_path / "b", shapes, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=f"too large for bfloat16 in 1 tensors: {NAME}"):
        sdjax.load(tmp_path / "a", dtype="bfloat16")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    sdjax.load(tmp_path / "a", dtype="float32")


# Original files.


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_original_files(tmp_path, original, params, shapes, dtype, ending):
    path = tmp_path / f"a.{ending}"
    state = {name: x.astype(dtype) for name, x in original.items()}
    if ending == "ckpt":
        tensors = {
            name: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
            if dtype == ml_dtypes.bfloat16
            else torch.from_numpy(x)
            for name, x in state.items()
        }
        torch.save({"state_dict": tensors, "global_step": 5}, path)
    else:
        safetensors.write(path, state, {"format": "pt"})
    config, found = checkpoints.load(path, shapes)
    assert config == TINY
    assert_equal(found, params, dtype)


def test_the_name_of_a_file_does_not_matter(tmp_path, original, params, shapes, save_torch):
    assert_equal(checkpoints.load(save_torch(tmp_path / "a.safetensors", original), shapes)[1], params)
    safetensors.write(tmp_path / "a.ckpt", original, {})
    assert_equal(checkpoints.load(tmp_path / "a.ckpt", shapes)[1], params)


def test_buffers_are_passed_over(tmp_path, original, params, shapes):
    buffers = {name: np.zeros(3, np.int64) for name in ("betas", "logvar", "sqrt_alphas_cumprod")}
    buffers["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    safetensors.write(tmp_path / "a", original | buffers, {})
    assert_equal(checkpoints.load(tmp_path / "a", shapes)[1], params)


def test_old_names_of_the_text_encoder(tmp_path, original, params, shapes):
    state = {name.replace(".text_model.", "."): x for name, x in original.items()}
    assert state.keys() != original.keys()
    safetensors.write(tmp_path / "a", state, {})
    assert_equal(checkpoints.load(tmp_path / "a", shapes)[1], params)


def test_moving_averages(tmp_path, both_sets, params, shapes):
    safetensors.write(tmp_path / "a", both_sets, {})
    averaged = {**params, "unet": native.unflatten({n: x + 1 for n, x in native.flatten(params["unet"]).items()})}
    for ema, expected in ((None, averaged), (True, averaged), (False, params)):
        assert_equal(checkpoints.load(tmp_path / "a", shapes, ema=ema)[1], expected)


def test_incomplete_averages(tmp_path, both_sets, shapes):
    del both_sets["model_ema.diffusion_modelout2bias"]
    safetensors.write(tmp_path / "a", both_sets, {})
    with pytest.raises(CheckpointError, match=r"missing \(1\): model_ema.diffusion_modelout2bias"):
        checkpoints.load(tmp_path / "a", shapes)
    checkpoints.load(tmp_path / "a", shapes, ema=False)


def test_averages_that_are_not_there(tmp_path, original, params, shapes):
    safetensors.write(tmp_path / "a", original, {})
    checkpoints.save(tmp_path / "b", params, TINY)
    for file in "ab":
        checkpoints.load(tmp_path / file, shapes, ema=False)
        with pytest.raises(CheckpointError, match="leave ema out"):
            checkpoints.load(tmp_path / file, shapes, ema=True)


def test_everything_wrong_with_the_tensors_is_said_at_once(tmp_path, original, shapes):
    del original["model.diffusion_model.out.2.bias"]
    del original["first_stage_model.quant_conv.weight"]
    original["model.diffusion_model.out.3.bias"] = np.zeros(3)
    original["first_stage_model.quant_conv.bias"] = np.zeros((8, 1), np.float32)
    original["model.diffusion_model.out.0.bias"] = original["model.diffusion_model.out.0.bias"].astype(np.int8)
    original["cond_stage_model.transformer.final_layer_norm.bias"] = np.zeros(40)
    safetensors.write(tmp_path / "a", original, {})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(tmp_path / "a", shapes)
    for part in (
        "missing (2): first_stage_model.quant_conv.weight, model.diffusion_model.out.2.bias",
        "unexpected (1): model.diffusion_model.out.3.bias",
        "wrong shape (1): first_stage_model.quant_conv.bias [8, 1] instead of [8]",
        "not floating point (1): model.diffusion_model.out.0.bias int8",
        "twice, under two names (1): cond_stage_model.transformer.",
    ):
        assert part in str(caught.value)


def test_long_lists_are_counted(tmp_path, original, shapes):
    state = {name: x for name, x in original.items() if not name.startswith("first_stage_model.")}
    safetensors.write(tmp_path / "a", state, {})
    with pytest.raises(CheckpointError, match=r"missing \(\d+\): (\S+, ){4}\S+ and \d+ more$"):
        checkpoints.load(tmp_path / "a", shapes)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite(tmp_path, original, shapes, unchecked, number, dtype):
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    state = {name: x.astype(dtype) for name, x in original.items()}
    state[name][-1, -1, -1, -1] = number
    safetensors.write(tmp_path / "a", state, {})
    with pytest.raises(CheckpointError, match=f"NaN or infinity in 1 of its tensors: {name}"):
        checkpoints.load(tmp_path / "a", shapes)
