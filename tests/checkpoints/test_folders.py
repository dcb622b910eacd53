"""Folders in diffusers' layout: every form of their weights, and the configurations that are refused."""

import contextlib
import dataclasses
import json
import random

import numpy as np
import pytest

import sdjax
from sdjax import checkpoints
from sdjax.checkpoints import CheckpointError, configurations, native, safetensors
from sdjax.models.config import TINY

from .conftest import CONFIGS, assert_equal


def test_folders(folder, params, shapes):
    path, _ = folder
    config, found = checkpoints.load(path, shapes)
    assert config == TINY
    assert_equal(found, params)


def test_folders_of_bin_files(folder, params, shapes, save_torch):
    path, _ = folder
    for file in path.glob("*/*.safetensors"):
        stem = "pytorch_model" if file.parent.name == "text_encoder" else file.stem
        save_torch(file.with_name(f"{stem}.bin"), safetensors.read(file)[0])
        file.unlink()
    assert_equal(checkpoints.load(path, shapes)[1], params)


def test_folders_of_half_precision_files(folder, params, shapes):
    path, _ = folder
    for file in path.glob("*/*.safetensors"):
        safetensors.write(file.with_name(f"{file.stem}.fp16.safetensors"), *safetensors.read(file), "float16")
        file.unlink()
    assert_equal(checkpoints.load(path, shapes)[1], params, np.float16)


@pytest.mark.parametrize("variant", ["fp16", None])
def test_a_variant_in_shards(folder, params, shapes, variant):
    """As diffusers writes it: the shards' names end with the variant, their index' has it before the last ending."""
    path, _ = folder
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    file.rename(path / "unet" / shard)
    index = {"weight_map": dict.fromkeys(safetensors.read(path / "unet" / shard)[0], shard)}
    (path / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (path / part / f"{stem}.safetensors").rename(path / part / f"{stem}.fp16.safetensors")
    assert_equal(checkpoints.load(path, shapes, variant=variant)[1], params)


def test_folders_of_shards(folder, params, shapes):
    path, _ = folder
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    arrays, _ = safetensors.read(file)
    shards = {name: f"{file.stem}-0000{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for shard in set(shards.values()):
        safetensors.write(path / "unet" / shard, {n: x for n, x in arrays.items() if shards[n] == shard}, {})
    file.unlink()
    index = path / "unet" / f"{file.name}.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert_equal(checkpoints.load(path, shapes)[1], params)
    for outside in ("../vae/diffusion_pytorch_model.safetensors", "..", "/etc/passwd", "missing.safetensors", "a\0b"):
        index.write_text(json.dumps({"weight_map": {**shards, "x": outside}}))
        with pytest.raises(CheckpointError, match="no file beside it"):
            checkpoints.load(path, shapes)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        checkpoints.load(path, shapes)


def test_folders_with_the_old_names(folder, params, shapes):
    path, _ = folder
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    arrays, _ = safetensors.read(file)
    for new, name in old.items():
        arrays = {n.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): x for n, x in arrays.items()}
    safetensors.write(file, arrays, {})
    file = path / "text_encoder" / "model.safetensors"
    arrays = {name.removeprefix("text_model."): x for name, x in safetensors.read(file)[0].items()}
    safetensors.write(file, arrays | {"embeddings.position_ids": np.arange(77)[None]}, {})
    assert_equal(checkpoints.load(path, shapes)[1], params)


def test_the_schedule_of_a_folder(folder, shapes):
    path, change = folder
    change("scheduler/scheduler_config.json", prediction_type="v_prediction", beta_start=0.001, beta_schedule="linear")
    config, _ = checkpoints.load(path, shapes)
    expected = dataclasses.replace(TINY, prediction="v", beta_start=0.001, beta_schedule="linear")
    assert config == expected
    cosine = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}
    change("scheduler/scheduler_config.json", prediction_type="v_prediction", **cosine)
    config, _ = checkpoints.load(path, shapes)
    assert config == dataclasses.replace(TINY, prediction="v", beta_schedule="squared_cosine", zero_terminal_snr=True)
    assert checkpoints.describe(path)["readable"]


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"steps_offset": 0, "clip_sample": True}, {}),  # its pipelines put these right
        ({"timestep_spacing": "trailing"}, {"spacings": ("trailing",)}),
        ({"timestep_spacing": "linspace", "use_karras_sigmas": True}, {"spacings": ("karras", "linspace")}),
        ({"set_alpha_to_one": True}, {"set_alpha_to_one": True}),
    ],
)
def test_what_a_folder_says_of_samplers(tmp_path, folder, shapes, fields, expected):
    path, change = folder
    change(SCHEDULER, **fields)
    config = dataclasses.replace(TINY, **expected)
    assert checkpoints.load(path, shapes)[0] == config
    for layout, target in (("native", "a"), ("diffusers", "b")):  # and it is kept
        checkpoints.convert(path, tmp_path / target, shapes, layout=layout)
        assert checkpoints.load(tmp_path / target, shapes)[0] == config


def test_ddim_ends_clean_where_its_file_does_not_say(folder, shapes):
    path, _ = folder
    fields = {name: x for name, x in CONFIGS[SCHEDULER].items() if name != "set_alpha_to_one"}
    for kind, expected in (("DDIMScheduler", True), ("PNDMScheduler", False)):
        (path / SCHEDULER).write_text(json.dumps(fields | {"_class_name": kind}))
        assert checkpoints.load(path, shapes)[0].set_alpha_to_one is expected


def test_samplers_are_set_up_as_the_folder_says(folder):
    path, change = folder
    change(SCHEDULER, timestep_spacing="trailing", use_karras_sigmas=True, set_alpha_to_one=True)
    model = sdjax.load(path)
    options = {name: model.sampler(name).spacing for name in ("ddim", "euler", "dpmpp_2m", "restart", "lcm")}
    expected = {"ddim": "trailing", "euler": "karras", "dpmpp_2m": "karras", "restart": "karras", "lcm": "distilled"}
    assert options == expected
    assert model.sampler("euler", spacing="linspace").spacing == "linspace"
    assert dict(model.sampler("ddim").options)["set_alpha_to_one"] is True
    assert dict(model.sampler("ddim", set_alpha_to_one=False).options)["set_alpha_to_one"] is False


def test_refinements_of_a_scheduler_are_counted(folder, shapes, caplog):
    path, change = folder
    change(SCHEDULER, interpolation_type="log_linear", sigma_min=0.1, final_sigmas_type="zero")
    checkpoints.load(path, shapes)
    assert "2 settings are passed over: interpolation_type is 'log_linear', sigma_min is 0.1" in caplog.text


def test_what_has_no_variants(tmp_path, folder, params, shapes):
    checkpoints.save(tmp_path / "a", params, TINY)
    with pytest.raises(CheckpointError, match="one file, which has no variants; leave variant='fp16' out"):
        checkpoints.load(tmp_path / "a", shapes, variant="fp16")


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "folder of 'StableDiffusionXLPipeline'"),
        ("model_index.json", {"_class_name": None}, "folder of None"),
        ("text_encoder/config.json", {"hidden_act": "gelu_new"}, "text_encoder.activation"),
        ("unet/config.json", {"use_linear_projection": "yes"}, "unet.linear_projection"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ("unet/config.json", {"act_fn": "gelu", "freq_shift": 1}, "act_fn is 'gelu', freq_shift is 1"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "SimpleDownBlock2D"]}, "SimpleDownBlock2D"),
        ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "backwards"),
        ("unet/config.json", {"up_block_types": [1, 2]}, "cannot be read"),
        ("unet/config.json", {"layers_per_block": [2, 3]}, "layers_per_block differs between levels"),
        ("unet/config.json", {"block_out_channels": "wide"}, "unet.channels"),
        ("unet/config.json", {"attention_head_dim": 5}, "says of unet.num_heads"),
        ("unet/config.json", {"cross_attention_dim": 41}, "says of unet.context_width"),
        ("unet/config.json", {"cross_attention_dim": 1.5}, "unet.context_width"),
        ("vae/config.json", {"latent_channels": 16}, "says of unet.in_channels, unet.out_channels"),
        ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv is False"),
        ("vae/config.json", {"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ("vae/config.json", {"scaling_factor": "x"}, "cannot be read"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "unknown, 'flow'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "says of zero_terminal_snr"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "quadratic"}, "unknown, 'quadratic'"),
        (SCHEDULER, {"trained_betas": [0.1]}, r"trained_betas is \[0.1\]; the samplers"),
        (SCHEDULER, {"thresholding": True}, "thresholding is True; the samplers"),
        (SCHEDULER, {"timestep_spacing": "even"}, "timestep_spacing is 'even'; the samplers"),
        (SCHEDULER, {"set_alpha_to_one": 1}, "set_alpha_to_one"),
        ("text_encoder/config.json", {"hidden_size": None}, "text_encoder.width"),
    ],
)
def test_folders_of_other_models(folder, shapes, file, fields, message):
    path, change = folder
    change(file, **fields)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path, shapes)
    assert not checkpoints.describe(path)["readable"]


def test_damaged_folders(folder, shapes):
    path, change = folder
    for name, message in (("unet/config.json", "no such file"), ("vae/config.json", "no such file")):
        text = (path / name).read_text()
        (path / name).unlink()
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(path, shapes)
        for text_of_another, complaint in (("{", "not JSON"), ("[]", "not a JSON object"), (" " * 2**21, "larger")):
            (path / name).write_text(text_of_another)
            with pytest.raises(CheckpointError, match=complaint):
                checkpoints.load(path, shapes)
        (path / name).write_text(text)
    weights = path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model\.safetensors: a git-LFS pointer"):
        checkpoints.load(path, shapes)
    weights.unlink()
    with pytest.raises(CheckpointError, match="vae: no weights in it"):
        checkpoints.load(path, shapes)
    change("vae/config.json", latent_channels=None)
    with pytest.raises(CheckpointError):
        checkpoints.load(path, shapes)


def test_a_lacking_field(folder, shapes):
    path, _ = folder
    (path / "unet/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks, or has an unknown, 'down_block_types'"):
        checkpoints.load(path, shapes)


def test_any_values_in_the_configurations(folder):
    path, change = folder
    rng = random.Random(0)
    values = [None, 0, -1, True, 1.5, float("nan"), "x", [], [1], {}, 10**30, [[1]], ["a"], [0, 0], [1] * 100]
    for _ in range(200):
        for file, fields in CONFIGS.items():
            changed = rng.sample(sorted(fields), rng.randint(0, 1))
            change(file, **{name: rng.choice(values) for name in changed})
        with contextlib.suppress(CheckpointError):
            configurations.read_folder(path)
        config = TINY.to_dict()
        part = rng.choice([config, config["unet"], config["vae"], config["text_encoder"]])
        part[rng.choice(list(part))] = rng.choice(values)
        with contextlib.suppress(CheckpointError):
            native.config_of({"version": "1", "config": json.dumps(config)}, "file")
