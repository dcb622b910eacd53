"""What a path is: refusals of other things by name, and descriptions."""

import json

import numpy as np
import pytest
import torch

from sdjax import checkpoints
from sdjax.checkpoints import CheckpointError, identity, names, native, safetensors
from sdjax.models.config import SD1, SD1_EDITING, SD1_INPAINTING, SD2_INPAINTING, SD2_V, TINY


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4265146304\n", "a git-LFS pointer"),
        (b"\n<!DOCTYPE html><html><head>", "a web page"),
        (b"<html lang=en>", "a web page"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before version 1.6"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x1f\x8b\x08\0", "a packed archive"),
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (b"Not Found", "neither a safetensors nor a PyTorch file"),
        (b"\0" * 1000, "neither a safetensors nor a PyTorch file"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, shapes, data, kind):
    path = tmp_path / "v1-5.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=kind):
        checkpoints.load(path, shapes)
    assert kind in checkpoints.describe(path)["kind"]


def test_paths_without_a_model(tmp_path, shapes):
    for path, message in (
        (tmp_path / "missing.ckpt", "there is no such file or folder$"),
        (tmp_path, "a folder without a model_index.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(path, shapes)
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"did you mean .* a\.ckpt"):
        checkpoints.load(tmp_path, shapes)
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match="one part of a diffusers folder"):
        checkpoints.load(tmp_path, shapes)


TO_K = identity.CONTEXT
CONV_IN = identity.INPUT


def unet_of(context, channels):
    whole = {"first_stage_model.quant_conv.bias": (8,)}
    return {TO_K: (320, context), CONV_IN: (320, channels, 3, 3), **whole}


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"lora_unet_down_blocks_0.lora_up.weight": (3, 3)}, "a LoRA"),
        ({"unet.down_blocks.0.attn1.processor.to_q_lora.down.weight": (3, 3)}, "a LoRA"),
        ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (3, 3)}, "a LoRA"),
        ({"lora_te_x.hada_w1_a": (3, 3)}, "a LoRA"),
        ({"emb_params": (2, 768)}, "a textual inversion"),
        ({"<cat-toy>": (768,)}, "a textual inversion"),
        ({"control_model.zero_convs.0.0.weight": (3, 3)}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (3, 3), "down_blocks.0.resnets.0.x": (1,)}, "a ControlNet"),
        ({"image_proj.proj.weight": (3, 3)}, "an IP-Adapter"),
        ({"down_blocks.0.motion_modules.0.x": (3,)}, "a motion module"),
        ({"conditioner.embedders.0.x": (3,), **unet_of(2048, 4)}, "Stable Diffusion XL"),
        (unet_of(2048, 4), "Stable Diffusion XL"),
        ({"model.diffusion_model.joint_blocks.0.x": (3,)}, "Stable Diffusion 3"),
        ({"double_blocks.0.x": (3,)}, "FLUX"),
        (unet_of(1024, 5), "Stable Diffusion 2.x with a depth map"),
        (unet_of(500, 4), "a latent diffusion model with a context 500 wide"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (3,)}, "a UNet alone"),
        ({"down_blocks.0.resnets.0.time_emb_proj.weight": (3,)}, "a UNet alone"),
        ({"encoder.down.0.block.0.conv1.weight": (3,)}, r"an autoencoder \(VAE\) alone"),
        ({"decoder.up_blocks.0.resnets.0.conv1.weight": (3,)}, r"an autoencoder \(VAE\) alone"),
        ({"text_model.encoder.layers.0.x": (3,)}, "a text encoder alone"),
        ({"model.layers.0.x": (3,)}, "no model that sdjax knows"),
        ({}, "a file without tensors"),
    ],
)
def test_other_models_are_named(tmp_path, shapes, tensors, kind):
    path = tmp_path / "a.safetensors"
    safetensors.write(path, {name: np.zeros(shape, np.float16) for name, shape in tensors.items()}, {})
    with pytest.raises(
        CheckpointError, match=f"this is {kind}.*; sdjax reads whole checkpoints of Stable Diffusion 1 and 2"
    ):
        checkpoints.load(path, shapes)
    found = checkpoints.describe(path)
    assert not found["readable"]
    assert found["tensors"] == len(tensors)


def test_textual_inversions_of_torch(tmp_path, shapes):
    torch.save(
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.ones(2, 768)}}, tmp_path / "a.pt"
    )
    with pytest.raises(CheckpointError, match="this is a textual inversion"):
        checkpoints.load(tmp_path / "a.pt", shapes)


def hollow(path, tensors):
    """A safetensors file of this header, its gigabytes of numbers a hole."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


@pytest.mark.parametrize(
    ("config", "kind", "parameters"),
    [
        (SD1, "Stable Diffusion 1.x", 1_066_235_307),
        (SD1_INPAINTING, "Stable Diffusion 1.x for inpainting", 1_066_249_707),
        (SD1_EDITING, "Stable Diffusion 1.x of the InstructPix2Pix kind", 1_066_246_827),
        (SD2_V, "Stable Diffusion 2.x", 1_289_952_427),
        (SD2_INPAINTING, "Stable Diffusion 2.x for inpainting", 1_289_966_827),
    ],
)
def test_descriptions_of_full_size(tmp_path, shapes, config, kind, parameters):
    targets = native.flatten(shapes(config))
    table = names.ldm(config, targets)
    tensors = {source.name: source.their_shape(targets[target].shape) for target, source in table.items()}
    assert len(tensors) == (1130 if config.text_encoder == SD1.text_encoder else 686 + 248 + 280)
    hollow(tmp_path / "a.ckpt", tensors)
    assert checkpoints.describe(tmp_path / "a.ckpt") == {
        "file": str(tmp_path / "a.ckpt"),
        "kind": kind,
        "format": "safetensors",
        "readable": True,
        "tensors": len(tensors),
        "parameters": parameters,
        "dtypes": {"float16": len(tensors)},
        "averages": False,
        "metadata": {},
    }
    del tensors["first_stage_model.quant_conv.weight"]
    hollow(tmp_path / "b.ckpt", tensors)
    with pytest.raises(CheckpointError, match=r"missing \(1\): first_stage_model.quant_conv.weight"):
        checkpoints.load(tmp_path / "b.ckpt", shapes)  # before any number is read


def test_descriptions(tmp_path, folder, both_sets, params):
    safetensors.write(tmp_path / "a", both_sets, {})
    assert checkpoints.describe(tmp_path / "a")["averages"]
    checkpoints.save(tmp_path / "b", params, TINY, metadata={"source": "somewhere"})
    found = checkpoints.describe(tmp_path / "b")
    assert found["kind"] == "a native file of sdjax"
    assert found["readable"]
    assert found["metadata"]["source"] == "somewhere"
    found = checkpoints.describe(folder[0])
    assert found["kind"] == "Stable Diffusion of another size"
    assert found["format"] == "diffusers folder"
    assert found["readable"]
    assert json.dumps(found)
    whole = (tmp_path / "b").read_bytes()
    (tmp_path / "c").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoints.describe(tmp_path / "c")
