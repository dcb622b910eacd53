"""LoRA files that PEFT and diffusers wrote, and kohya's names by diffusers' converter, against what these compute."""

import dataclasses

import diffusers
import jax
import numpy as np
import peft
import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

import sdjax
from sdjax.checkpoints import safetensors
from sdjax.models.config import TINY, TINY_2

from .test_models import TOLERANCE, enliven, redraw, relative_error, text_encoder, unet, vae, write_folder

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "conv_in", "downsamplers.0.conv", "time_emb_proj"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]
RANKS = {"to_k": 2, "conv1": 5, "fc1": 4}  # others have 3


def adapted(model, modules, seed):
    """The model with a random adapter; alpha / r is not 1 and differs from module to module."""
    ranks = {name: rank for name, rank in RANKS.items() if name in modules}
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, rank_pattern=ranks, target_modules=modules))
    return redraw(model, ["lora_"], 0.3, seed)


@pytest.fixture(scope="module", params=[TINY, TINY_2], ids=["SD 1", "SD 2"])
def models(request, tmp_path_factory):
    """diffusers' models with an adapter each, ours of the same folder without, and the file's folder."""
    config, path = request.param, tmp_path_factory.mktemp("lora")
    parts = {"text_encoder": text_encoder(config), "unet": unet(config), "vae": vae(config)}
    for seed, model in enumerate(parts.values()):
        enliven(model, seed)
    write_folder(path / "model", config, parts)
    adapted(parts["unet"], ATTENTION + CONVOLUTIONS, 5)
    adapted(parts["text_encoder"], TEXT, 6)
    return parts, sdjax.load(path / "model", dtype="float32"), path


def tensors_of(parts):
    return {
        name: peft.get_peft_model_state_dict(parts[name], adapter_name="default") for name in ("unet", "text_encoder")
    }


def write_diffusers(parts, folder):
    states = tensors_of(parts)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        unet_lora_adapter_metadata=parts["unet"].peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=parts["text_encoder"].peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


def kohya(parts):
    """Kohya's names, with alpha beside every pair."""
    tensors = {}
    for part, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
        state = {f"base_model.model.{name}": x for name, x in tensors_of(parts)[part].items()}
        if part == "text_encoder":
            state = {f"base_model.model.text_model.{n.removeprefix('base_model.model.')}": x for n, x in state.items()}
        for name, x in convert_state_dict_to_kohya(state).items():
            tensors[f"{prefix}{name.removeprefix('lora_unet').removeprefix('base_model_model')}"] = x.numpy()
    for name in [name for name in tensors if name.endswith(".alpha")]:
        tensors[name] = np.float32(6)
    return {name: np.asarray(x, np.float32) for name, x in tensors.items()}


def check(parts, model, weight=1.0):
    """Both networks of the model against PEFT's."""
    for part in ("unet", "text_encoder"):
        for module in parts[part].modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", weight)
    rng = np.random.default_rng(1)
    latents, times = rng.normal(size=(2, 13, 9, 4)).astype(np.float32), np.array([999, 3], np.float32)
    ids = rng.integers(0, 49408, (2, 77), np.int32)
    with torch.no_grad():
        context = parts["text_encoder"](torch.from_numpy(ids).long()).last_hidden_state
        noisy = torch.from_numpy(latents).permute(0, 3, 1, 2)
        expected = parts["unet"](noisy, torch.from_numpy(times), context).sample.permute(0, 2, 3, 1)
    assert relative_error(model.encode_text(ids), context.numpy()) < TOLERANCE
    assert relative_error(model.unet(latents, times, context.numpy()), expected.numpy()) < TOLERANCE


@pytest.mark.slow
def test_diffusers_file(models):
    parts, model, path = models
    file = write_diffusers(parts, path / "diffusers")
    changed = model.with_lora(file)
    check(parts, changed)
    check(parts, changed.with_lora_weight("pytorch_lora_weights", 0.4), 0.4)
    check(parts, changed.with_lora_weight("pytorch_lora_weights", -0.7).with_loras_merged(), -0.7)
    with pytest.raises(AssertionError):
        check(parts, model)


def test_kohya_file(models):
    parts, model, path = models
    tensors = kohya(parts)
    assert sum(name.endswith(".alpha") for name in tensors) == len(tensors) // 3 > 30
    safetensors.write(path / "kohya.safetensors", tensors, {})
    check(parts, model.with_lora(path / "kohya.safetensors", 0.8), 0.8)
    # The same in a PyTorch file, the parts' orders mixed and in half precision.
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in reversed(tensors.items())}, path / "kohya.pt")
    check(parts, model.with_lora(path / "kohya.pt"))


@pytest.mark.slow
def test_several_add_up(models):
    parts, model, path = models
    safetensors.write(path / "a.safetensors", kohya(parts), {})
    twice = model.with_lora(path / "a.safetensors", 0.5).with_lora(path / "a.safetensors", 0.75, "b")
    assert [(lora.name, lora.weight) for lora in twice.loras] == [("a", 0.5), ("b", 0.75)]
    check(parts, twice, 1.25)
    check(parts, twice.with_lora_weight("a", -0.5).with_loras_merged(), 0.25)


def test_a_weight_compiles_nothing(models, compilations):
    parts, model, path = models
    safetensors.write(path / "c.safetensors", kohya(parts), {})
    model = model.with_lora(path / "c.safetensors", 0.5)
    check(parts, model, 0.5)
    compilations.clear()
    check(parts, model.with_lora_weight("c", 0.3), 0.3)
    assert not compilations


@pytest.mark.slow
def test_gradient_with_respect_to_a_weight(models):
    """The weight is a number in the tree of parameters, so it has a gradient like any other."""
    parts, model, path = models
    safetensors.write(path / "d.safetensors", kohya(parts), {})
    model = model.with_lora(path / "d.safetensors", 0.5)
    ids = np.arange(77)[None]

    def norm(params):
        return dataclasses.replace(model, params=params).encode_text(ids).sum()

    gradient = jax.grad(norm, allow_int=True)(model.params)["text_encoder"]["encoder"]["layers_0"]["mlp"]["fc1"]
    assert abs(gradient["lora"]["0"]["weight"]) > 0
