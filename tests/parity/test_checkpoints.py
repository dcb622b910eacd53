"""The tables of names against diffusers' own converter: the same original file through both, equal to the bit."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from transformers import CLIPTextModel

from sdjax import checkpoints, pipeline
from sdjax.checkpoints import native, safetensors
from sdjax.models.config import SD1, TINY, TextEncoderConfig, UNetConfig, VAEConfig

from .test_models import text_encoder, unet, vae, write_folder

# All 1130 names of Stable Diffusion 1.x, its numbers of levels, blocks and layers, at a thousandth of its size.
NARROW = dataclasses.replace(
    SD1,
    text_encoder=TextEncoderConfig(width=8, num_heads=2, mlp_width=16),
    unet=UNetConfig(channels=(8, 16, 24, 24), num_heads=(2, 2, 2, 2), context_width=8, norm_groups=4),
    vae=VAEConfig(channels=(8, 16, 24, 24), norm_groups=4),
)

NARROW_2 = dataclasses.replace(
    NARROW,
    text_encoder=TextEncoderConfig(width=8, num_layers=23, num_heads=2, mlp_width=16, activation="gelu", padding_id=0),
    unet=dataclasses.replace(NARROW.unet, linear_projection=True),
)


@pytest.mark.parametrize("config", [NARROW, NARROW_2, TINY], ids=["SD 1's names", "SD 2's names", "tiny"])
def test_original_names(tmp_path, config):
    rng = np.random.default_rng(0)
    shapes = native.flatten(pipeline.shapes(config))
    params = native.unflatten({name: rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()})
    safetensors.write(tmp_path / "model.safetensors", checkpoints.export(params, config, "ldm"), {"format": "pt"})
    folder = tmp_path / "folder"
    write_folder(folder, config, {"text_encoder": text_encoder(config), "unet": unet(config), "vae": vae(config)})

    # diffusers looks into the folder for configurations only.
    file = str(tmp_path / "model.safetensors")
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_single_file(file, config=str(folder), subfolder="unet"),
        "vae": diffusers.AutoencoderKL.from_single_file(file, config=str(folder), subfolder="vae"),
        "text_encoder": create_diffusers_clip_model_from_ldm(
            CLIPTextModel,
            checkpoint={name: torch.from_numpy(np.array(x)) for name, x in safetensors.read(file)[0].items()},
            subfolder="text_encoder",
            config=str(folder),
            local_files_only=True,
        ),
    }
    theirs = {f"{part}.{name}": x.numpy() for part, model in parts.items() for name, x in model.state_dict().items()}
    theirs = {name: x for name, x in theirs.items() if not name.endswith("position_ids")}
    ours = checkpoints.export(params, config, "diffusers")
    # transformers has dropped the `text_model.` from its own names.
    ours = {name.replace("text_encoder.text_model.", "text_encoder."): x for name, x in ours.items()}
    theirs = {name.replace("text_encoder.text_model.", "text_encoder."): x for name, x in theirs.items()}
    assert ours.keys() == theirs.keys()
    assert not [name for name, x in ours.items() if x.shape != theirs[name].shape or (x != theirs[name]).any()]


def test_folders_that_diffusers_wrote_round_trip(tmp_path):
    """A folder of `save_pretrained`, in files of .bin too, read by us and exported: the same state dicts to the bit."""
    parts = {"text_encoder": text_encoder(TINY), "unet": unet(TINY), "vae": vae(TINY)}
    write_folder(tmp_path, TINY, parts)
    parts["unet"].save_pretrained(tmp_path / "unet", safe_serialization=False)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    config, params = checkpoints.load(tmp_path, pipeline.shapes)
    assert config == TINY
    ours = checkpoints.export(params, config, "diffusers")
    ours = {name.replace("text_encoder.text_model.", "text_encoder."): x for name, x in ours.items()}
    theirs = {f"{part}.{name}": x.numpy() for part, model in parts.items() for name, x in model.state_dict().items()}
    assert ours.keys() == theirs.keys()
    assert all(x.shape == theirs[name].shape and x.tobytes() == theirs[name].tobytes() for name, x in ours.items())
