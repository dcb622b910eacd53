"""TAESD's decoder against diffusers' AutoencoderTiny."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

import sdjax
import sdjax.recipe
from sdjax.checkpoints import CheckpointError, native, safetensors
from sdjax.models.config import TINY, VAEConfig

from .test_models import TOLERANCE, enliven, relative_error


@pytest.fixture(scope="module")
def both(tmp_path_factory, live):
    """diffusers' model and ours with the same decoder; the folder has its files."""
    folder = tmp_path_factory.mktemp("taesd")
    theirs = enliven(diffusers.AutoencoderTiny(), 0)
    theirs.save_pretrained(folder / "taesd")
    config = dataclasses.replace(TINY, vae=VAEConfig(channels=(8, 8, 8, 8), blocks_per_level=1, norm_groups=4))
    native.save(folder / "model.safetensors", live(config), config)
    return theirs, sdjax.load(folder / "model.safetensors"), folder


def test_decoder(both):
    theirs, model, folder = both
    latents = 2 * np.random.default_rng(0).normal(size=(2, 5, 7, 4)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(np.moveaxis(latents, -1, 1))).sample.numpy()
    expected = np.moveaxis(expected, 1, -1)
    # The original's file counts the clamp as its first layer.
    state = theirs.state_dict()
    original = {
        f"{int(name.split('.')[2]) + 1}.{name.split('.', 3)[3]}": x for name, x in state.items() if "decoder" in name
    }
    torch.save(original, folder / "taesd_decoder.pth")
    file = folder / "taesd" / "diffusion_pytorch_model.safetensors"
    for path in (folder / "taesd", file, folder / "taesd_decoder.pth"):
        tiny = model.with_tiny_decoder(path)
        pictures = sdjax.pipeline._tiny("float32", tiny.tiny_decoder.params, latents)
        assert pictures.shape == (2, 40, 56, 3)
        assert relative_error(pictures, expected) < TOLERANCE
    shown = tiny.preview(latents)
    assert np.abs(shown - np.clip(expected * 127.5 + 127.5, 0, 255)).max() <= 0.51
    whole = model.preview(latents)
    assert whole.shape == shown.shape
    assert (whole != shown).any()


@pytest.mark.slow
def test_previews_of_a_run(both):
    _, model, folder = both
    model, seen = model.with_tiny_decoder(folder / "taesd"), []
    sdjax.generate(
        "a", model=model, seed=0, num_inference_steps=3, callback=lambda *given: seen.append(model.preview(given[2]))
    )
    assert [picture.shape for picture in seen] == [(1, 64, 64, 3)] * 3


@pytest.mark.slow
def test_a_run_that_it_decodes(both):
    """The picture is the decoder's of the exact run's latents, and its recipe says by which."""
    _, model, folder = both
    tiny, options = model.with_tiny_decoder(folder / "taesd"), {"seed": 0, "num_inference_steps": 2}
    (picture,) = sdjax.generate("a", model=tiny, fast=sdjax.Fast(tiny_vae=True), **options)
    latents = sdjax.generate("a", model=model, output_type="latent", **options)
    assert np.abs(np.asarray(picture, int) - tiny.preview(latents)[0]).max() <= 1
    found = sdjax.recipe.from_json(picture.info[sdjax.recipe.KEY])
    assert (found.fast, found.tiny_vae_sha256) == ({"tiny_vae": True}, tiny.tiny_decoder.digest)
    assert sdjax.recipe.differences(found, tiny, found.versions) == []
    other = dataclasses.replace(tiny, tiny_decoder=tiny.tiny_decoder._replace(digest="0" * 64))
    assert sdjax.recipe.differences(found, other, found.versions) == ["It was decoded by another TAESD."]
    with pytest.raises(ValueError, match="TAESD decodes no tiles"):
        sdjax.generate("a", model=tiny, fast=sdjax.Fast(tiny_vae=True), vae_tile=64)


def test_refusals(both, tiny, tmp_path):
    _, model, folder = both
    with pytest.raises(CheckpointError, match="TAESD is for latents of 4 channels"):
        tiny.with_tiny_decoder(folder / "taesd")
    safetensors.write(tmp_path / "a.safetensors", {"x": np.ones(3, np.float32)}, {})
    with pytest.raises(CheckpointError, match="no decoder of TAESD"):
        model.with_tiny_decoder(tmp_path / "a.safetensors")
    safetensors.write(tmp_path / "a.safetensors", {"1.weight": np.ones((64, 4, 3, 3), np.float32)}, {})
    with pytest.raises(CheckpointError, match=r"missing \(.*1.bias"):
        model.with_tiny_decoder(tmp_path / "a.safetensors")
