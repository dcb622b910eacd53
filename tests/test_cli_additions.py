"""What is added to a model on the command line, for real, with a tiny model."""

import json

import numpy as np
import pytest
from PIL import Image

from sdjax import checkpoints, cli, pipeline
from sdjax.checkpoints import names, native, safetensors, weights
from sdjax.models.config import TINY


@pytest.fixture
def files(tmp_path, tiny_file, monkeypatch):
    """A LoRA, an autoencoder and two ControlNets for the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDJAX_CACHE", "off")
    rng = np.random.default_rng(0)
    module = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {"lora_down": rng.normal(size=(2, 64)), "lora_up": rng.normal(size=(64, 2))}
    safetensors.write("lora.safetensors", {f"{module}.{n}.weight": x.astype(np.float32) for n, x in lora.items()}, {})
    whole = checkpoints.export(native.unflatten(safetensors.read(tiny_file)[0]), TINY, "ldm")
    vae = {name: 0.9 * x for name, x in whole.items() if name.startswith("first_stage_model.")}
    safetensors.write("vae.safetensors", vae, {})
    leaves = native.flatten({"control": pipeline.control_shapes(TINY, (4, 8))})
    for name in ("canny", "depth"):
        control = {key: 0.2 * rng.normal(size=x.shape).astype(np.float32) for key, x in leaves.items()}
        safetensors.write(f"{name}.safetensors", weights.export(control, names.ldm(TINY, leaves)), {})
    vectors = rng.normal(size=(2, TINY.text_encoder.width)).astype(np.float32)
    safetensors.write("sks.safetensors", {"emb_params": vectors}, {})
    safetensors.write("two.safetensors", {"<two>": 2 * vectors}, {})
    Image.new("RGB", (20, 20), "red").save("red.png")
    return tiny_file


def generate(model, *options, prompt="a"):
    code = cli.main(
        ["generate", prompt, "--model", str(model), "--steps", "2", "--seed", "0", "--height", "16", "--width", "16",
         "--sampler", "ddim", "-o", "out.png", *options]
    )  # fmt: skip
    assert code == 0
    picture = Image.open("out.png")
    return np.asarray(picture, np.int16), json.loads(picture.info["sdjax"])


@pytest.mark.slow
def test_each_changes_the_picture(files):
    plain, recipe = generate(files)
    assert recipe["model"] == "tiny.safetensors"
    assert recipe["controls"] == {}
    lora, recipe = generate(files, "--lora", "lora.safetensors:0.5")
    assert recipe["model"] == "tiny.safetensors + lora:0.5"
    assert np.abs(lora - plain).max() > 1
    vae, recipe = generate(files, "--vae", "vae.safetensors")
    assert recipe["model"] == "tiny.safetensors + vae.safetensors"
    assert np.abs(vae - plain).max() > 1
    plain_word, _ = generate(files, prompt="a sks")
    words = ["--embedding", "sks.safetensors", "--embedding", "two.safetensors"]
    word, recipe = generate(files, *words, prompt="a sks")
    assert recipe["model"] == "tiny.safetensors + sks + <two>"
    assert np.abs(word - plain_word).max() > 1
    net = ["--controlnet", "canny.safetensors", "--control-image", "red.png"]
    control, recipe = generate(files, *net, *net, "--control-scale", "0.7", "--control-scale", "0.4")
    assert {name: one["scale"] for name, one in recipe["controls"].items()} == {"canny": 0.7, "canny 2": 0.4}
    assert np.abs(control - plain).max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--embedding", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--embedding", "lora.safetensors"], "no textual inversion"),
        (["--embedding", "sks.safetensors", "--embedding", "sks.safetensors"], "the model has 'sks' already"),
        (["--vae", "lora.safetensors"], "none of what this model could have"),
        (["--controlnet", "canny.safetensors"], "there are 1, 0 --control-image"),
        (["--controlnet", "lora.safetensors", "--control-image", "red.png"], "no ControlNet"),
        (["--controlnet", "canny.safetensors", "--control-image", "no.png"], "--control-image"),
    ],
)
def test_refusals(files, capsys, options, message):
    assert cli.main(["generate", "a", "--model", str(files), *options]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_picture_made_with_them_says_what_to_give_again(files, capsys):
    generate(files, "--lora", "lora.safetensors")
    assert cli.main(["generate", "--from", "out.png", "--model", str(files)]) != 0
    assert "made with 'tiny.safetensors + lora:1'" in capsys.readouterr().err
    generate(files, "--controlnet", "canny.safetensors", "--control-image", "red.png")
    assert cli.main(["generate", "--from", "out.png", "--model", str(files)]) != 0
    assert "followed a ControlNet" in capsys.readouterr().err
