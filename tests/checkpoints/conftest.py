"""A tiny model's weights in all the forms in which they come."""

import json

import numpy as np
import pytest
import torch

from sdjax import checkpoints, pipeline
from sdjax.checkpoints import identity, names, native, safetensors
from sdjax.models.config import TINY


def assert_equal(found, expected, dtype=np.float32):
    found, expected = native.flatten(found), native.flatten(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.astype(dtype).tobytes()


@pytest.fixture(scope="session")
def shapes():
    """`pipeline.shapes`, tracing each configuration once."""
    known = {}
    return lambda config: known[config] if config in known else known.setdefault(config, pipeline.shapes(config))


@pytest.fixture(scope="session")
def params(shapes):
    """Another number in every place of a tiny model's tree."""
    rng = np.random.default_rng(0)
    leaves = native.flatten(shapes(TINY))
    return native.unflatten({name: rng.normal(size=x.shape).astype(np.float32) for name, x in leaves.items()})


@pytest.fixture
def tiny_original(monkeypatch):
    """Has an original file of the tiny size taken for one of Stable Diffusion 1.x."""
    monkeypatch.setitem(identity.CONFIGS, (TINY.unet.context_width, TINY.unet.in_channels), TINY)


@pytest.fixture
def unchecked(monkeypatch):
    """Has numbers written that are not finite, as other programs write them."""
    monkeypatch.setattr(safetensors, "is_finite", lambda _: True)


@pytest.fixture
def original(params, tiny_original):
    """The original names of `params`: a new dict of arrays, to be spoilt."""
    return {name: np.ascontiguousarray(x) for name, x in checkpoints.export(params, TINY, "ldm").items()}


@pytest.fixture
def both_sets(original):
    """An original file of training: the averages are the last weights plus one."""
    averages = {
        names.ema_name(name): x + 1 for name, x in original.items() if name.startswith("model.diffusion_model.")
    }
    counters = {"model_ema.decay": np.float32(0.9999).reshape(()), "model_ema.num_updates": np.int32(7).reshape(())}
    return original | averages | counters


# The fields that a folder of 2022 has.
CONFIGS = {
    "text_encoder/config.json": {
        "hidden_act": "quick_gelu",
        "hidden_size": 40,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 49408,
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 4,
        "block_out_channels": [32, 64],
        "center_input_sample": False,
        "cross_attention_dim": 40,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 8,
        "out_channels": 4,
        "sample_size": 32,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "out_channels": 3,
        "sample_size": 64,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
}


@pytest.fixture
def folder(tmp_path, params):
    """A diffusers folder of `params`, and a function that changes one of its JSON files."""
    path = tmp_path / "folder"
    for name, fields in CONFIGS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(fields))
    arrays = checkpoints.export(params, TINY, "diffusers")
    for part, file in FILES.items():
        safetensors.write(path / part / f"{file}.safetensors", of_part(arrays, part), {"format": "pt"})

    def change(name, **fields):
        (path / name).write_text(json.dumps({**CONFIGS[name], **fields}))

    return path, change


FILES = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def of_part(arrays, part):
    return {name.removeprefix(f"{part}."): x for name, x in arrays.items() if name.startswith(f"{part}.")}


@pytest.fixture(scope="session")
def save_torch():
    """Writes a dict of arrays with torch.save, as a file of training with objects around it or as a bare dict."""

    def save(path, arrays, **around):
        state = {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
        torch.save({"state_dict": state, **around} if around else state, path)
        return path

    return save
