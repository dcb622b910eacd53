"""Recipes: written and read back whole, by the web UI's rules too, and never trusted."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdjax import images, recipe, samplers, spacings
from sdjax.recipe import Recipe
from sdjax.schedule import Schedule

VERSIONS = {"sdjax": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "platform": "cpu", "device": "cpu"}
PLAIN = Recipe(
    prompt="a red fox",
    negative_prompt="",
    num_inference_steps=20,
    guidance_scale=7.5,
    sampler="euler_ancestral",
    sampler_options={"spacing": "linspace", "prediction": "epsilon", "steps_offset": 1},
    strength=None,
    clip_skip=0,
    seed=1234,
    height=512,
    width=768,
    rescale=0.0,
    model="v1-5-pruned.safetensors",
    model_sha256="0123456789abcdef",
    dtype="float32",
    driver="scan",
    batch=4,
    index=2,
    task="text",
    image_sha256=None,
    mask_sha256=None,
    mask_blur=0.0,
    padding_mask_crop=None,
    windows=1,
    versions=VERSIONS,
)
FULL = dataclasses.replace(
    PLAIN,
    prompt='a "red" fox,\nfound: ünïcode 🦊',
    negative_prompt="blurry, <lora:x:1>",
    num_inference_steps=3,
    guidance_scale=(7.5, 1.0, 3.25),
    sampler="ddim",
    sampler_options={"spacing": "karras", "eta": 0.5, "set_alpha_to_one": False, "order": (1, 2)},
    strength=0.75,
    clip_skip=1,
    seed=2**64 - 1,
    rescale=0.7,
    model="my model, v2: final.ckpt",
    driver="stepwise",
    task="inpaint",
    image_sha256="ab" * 32,
    mask_sha256="cd" * 32,
    mask_blur=4.0,
    padding_mask_crop=32,
    latents_sha256="ef" * 32,
    schedule=dataclasses.asdict(Schedule(kind="linear", zero_terminal_snr=True)),
)


def save(path, text):
    images.save_png(path, Image.new("RGB", (8, 8)), text)
    return path


def stored(change=()):
    """What `texts` writes as JSON, with some fields changed."""
    return json.loads(recipe.texts(PLAIN)["sdjax"]) | dict(change)


@pytest.mark.parametrize("one", [PLAIN, FULL])
def test_what_is_written_is_read(tmp_path, one):
    assert recipe.read(save(tmp_path / "a.png", recipe.texts(one))) == one


def test_numpy_numbers_are_written_as_numbers():
    one = dataclasses.replace(PLAIN, sampler_options={"eta": np.float32(0.5)})
    assert recipe.from_json(recipe.texts(one)["sdjax"]).sampler_options == {"eta": 0.5}


def test_the_web_uis_text():
    assert recipe.texts(PLAIN)["parameters"] == (
        "a red fox\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 1234, Size: 768x512, Model: v1-5-pruned,"
        " Version: sdjax 0.1.0"
    )
    assert recipe.texts(FULL)["parameters"] == (
        'a "red" fox,\nfound: ünïcode 🦊\n'
        "Negative prompt: blurry, <lora:x:1>\n"
        f"Steps: 3, Sampler: DDIM, Schedule type: Karras, Seed: {2**64 - 1}, Size: 768x512,"
        ' Model: "my model, v2: final", Denoising strength: 0.75, Mask blur: 4, Clip skip: 2, Version: sdjax 0.1.0'
    )


def test_a_picture_of_the_web_ui(tmp_path):
    text = (
        "a castle, (dawn:1.2)\non a hill\n"
        "Negative prompt: lowres, bad\nhands\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 42, Size: 640x448, Model hash: 6ce0161689,"
        ' Model: "a, b", Clip skip: 2, Lora hashes: "x: 1a2b, y: 3c4d", Version: v1.9.4'
    )
    got = recipe.read(save(tmp_path / "a.png", {"parameters": text}))
    assert got.prompt == "a castle, (dawn:1.2)\non a hill"
    assert got.negative_prompt == "lowres, bad\nhands"
    assert (got.num_inference_steps, got.guidance_scale, got.seed) == (28, 6.5, 42)
    assert (got.width, got.height, got.clip_skip, got.model) == (640, 448, 1, "a, b")
    assert (got.sampler, got.sampler_options) == ("dpmpp_2m", {"spacing": "karras"})
    assert (got.task, got.strength) == ("text", None)
    model = SimpleNamespace(dtype="float32", source="default", fingerprint="00")
    assert recipe.differences(got, model, VERSIONS) == [
        "It was made by another program (v1.9.4); expect something similar."
    ]


def test_a_newer_web_ui_names_the_schedule_apart():
    got = recipe.from_parameters(
        "x\nSteps: 5, Sampler: Euler a, Schedule type: Karras, Seed: 1, Denoising strength: 0.5"
    )
    assert (got.sampler, got.sampler_options, got.task, got.strength) == (
        "euler_ancestral",
        {"spacing": "karras"},
        "image",
        0.5,
    )
    enlarged = recipe.from_parameters("x\nSteps: 5, Sampler: Heun, Seed: 1, Denoising strength: 0.5, Hires upscale: 2")
    assert (enlarged.sampler, enlarged.task) == ("heun", "text")


@pytest.mark.parametrize("one", [PLAIN, dataclasses.replace(FULL, guidance_scale=2.0, model="x.ckpt")])
def test_our_own_parameters_are_read_back_as_far_as_they_go(one):
    got = recipe.from_parameters(recipe.texts(one)["parameters"])
    for name in ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "sampler", "strength"):
        assert getattr(got, name) == getattr(one, name)
    for name in ("clip_skip", "seed", "height", "width", "task", "mask_blur"):
        assert getattr(got, name) == getattr(one, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a last line"),
        ("only a prompt", "expected a last line"),
        ("x\nSteps: 20, Sampler: Euler, CFG scale: 7", "seed"),
        ("x\nSteps: many, Sampler: Euler, Seed: 1", "Steps"),
        ("x\nSteps: 1, Sampler: Euler, Seed: 1, Size: large", "Size"),
        ("x\nSteps: 1, Sampler: Euler, Seed: 1, CFG scale: nan", "guidance_scale"),
        ("x\nSteps: 1, Sampler: Euler, Seed: 1, Denoising strength: 7", "strength"),
        ("x\nSteps: 1, Sampler: Euler, Seed: " + "9" * 5000, "Seed"),
        ("x" * 2**19, "characters"),
    ],
)
def test_a_web_ui_text_that_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        recipe.from_parameters(text)


@pytest.mark.parametrize(
    "line",
    [
        "a: " * 80_000,
        "," * 250_000,
        "aa:\\" * 60_000,
        'aa: "\\", ' * 25_000,
        " " * 250_000,
        "aa " * 80_000,
        "a" * 250_000,
    ],
)
def test_no_text_takes_long(line):
    # A regular expression that looks for its start everywhere needs the square of these lengths.
    assert len(recipe._pairs(line)) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "another version"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"num_inference_steps": 20.0}, "num_inference_steps"),
        ({"guidance_scale": [1.0]}, "guidance_scale"),
        ({"guidance_scale": ["a"] * 20}, "guidance_scale"),
        ({"guidance_scale": 10**400}, "guidance_scale"),
        ({"sampler": "a\x1b[2J"}, "sampler"),
        ({"sampler_options": {"a b": 1}}, "sampler_options"),
        ({"sampler_options": {"eta": {"x": 1}}}, "eta"),
        ({"sampler_options": {"eta": [[1]]}}, "eta"),
        ({"strength": 0.5}, "strength"),
        ({"task": "image"}, "strength"),
        ({"task": "video"}, "task"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"height": 10**9}, "height"),
        ({"rescale": 2}, "rescale"),
        ({"model": "x\n"}, "model"),
        ({"model_sha256": "../etc"}, "model_sha256"),
        ({"dtype": "float16"}, "dtype"),
        ({"driver": "fast"}, "driver"),
        ({"index": 4}, "index"),
        ({"versions": {"jax": 1}}, "versions"),
        ({"versions": {"jax": "\x1b[2J"}}, "versions"),
        ({"surprise": 1}, "unknown fields: 'surprise'"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        recipe.from_json(json.dumps(stored(change)))


def test_missing_fields_are_named():
    fields = stored()
    del fields["seed"], fields["width"]
    with pytest.raises(ValueError, match="missing fields: seed, width"):
        recipe.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "NaN", '{"format": 1, "seed": Infinity}', "[" * 100_000, "9" * 5000, "x" * 2**19]
)
def test_json_that_is_no_recipe(text):
    with pytest.raises(ValueError, match=r"."):
        recipe.from_json(text)


def test_the_file_is_named_in_errors(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png: its recipe cannot be used: .*version"):
        recipe.read(save(tmp_path / "a.png", {"sdjax": "{}"}))
    with pytest.raises(ValueError, match=r"b\.png: there is no recipe"):
        recipe.read(save(tmp_path / "b.png", {"Comment": "hello"}))
    with pytest.raises(ValueError, match=r"c\.png.*no such file"):
        recipe.read(tmp_path / "c.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "d.jpg")
    with pytest.raises(ValueError, match=r"d\.jpg.*PNG"):
        recipe.read(tmp_path / "d.jpg")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Recipe)]), JSON, min_size=1))
def test_whatever_is_in_a_field_it_is_a_recipe_or_a_value_error(change):
    try:
        got = recipe.from_json(json.dumps(stored(change)))
    except ValueError:
        return
    assert recipe.from_json(recipe.texts(got)["sdjax"]) == got


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text())
def test_whatever_the_web_ui_text_it_is_a_recipe_or_a_value_error(start, end):
    try:
        recipe.from_parameters(f"{start}\nSteps: 5, Sampler: Euler, Seed: 1, {end}")
    except ValueError:
        return


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_the_bytes_it_is_a_value_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.png"
    info = PngImagePlugin.PngInfo()
    info.add(b"tEXt", b"sdjax\0" + data)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match=r"."):
        recipe.read(path)


def test_differences_are_sentences():
    model = SimpleNamespace(dtype="float32", source="other.ckpt", fingerprint="ffff")
    same = SimpleNamespace(dtype="float32", source="renamed", fingerprint=PLAIN.model_sha256)
    assert recipe.differences(PLAIN, same, VERSIONS) == []
    assert recipe.differences(PLAIN, model, VERSIONS | {"jax": "0.11.0", "platform": "gpu"}) == [
        "It was made with jax 0.10.2; here is 0.11.0.",
        "It was made with platform cpu; here is gpu.",
        "It was made with other weights: other.ckpt here is not the v1-5-pruned.safetensors of then.",
    ]
    assert recipe.differences(PLAIN, SimpleNamespace(dtype="bfloat16", source="x", fingerprint="f"), VERSIONS) == [
        "It was made with dtype float32; here is bfloat16."
    ]


def test_it_needs_no_jax():
    done = subprocess.run([sys.executable, "-c", "import sdjax.recipe, sys; sys.exit('jax' in sys.modules)"])
    assert done.returncode == 0


SPACINGS = [
    spacings.Karras(rho=5.0),
    spacings.Karras(ends=spacings.trailing, sigma_max=9.0),
    spacings.Exponential(),
    spacings.Beta(alpha=0.5, whole_times=True),
    spacings.Timesteps((999, 500, 20)),
    spacings.Sigmas((14.0, 2.5, 0.1)),
    spacings.Distilled(original_inference_steps=25),
    spacings.Whole(spacings.Karras(ends=spacings.trailing)),
    spacings.trailing,
    "karras",
]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_sampler_comes_back_with_its_spacing(spacing):
    one = samplers.create("euler", spacing=spacing)
    read = recipe.from_json(recipe.texts(dataclasses.replace(PLAIN, sampler_options=one.settings))["sdjax"])
    assert samplers.create("euler", **read.sampler_options) == one


def test_a_function_is_not_what_the_sampler_calls_so():
    """DPM-Solvers' "linspace" is `linspace_open`."""
    one = samplers.create("dpmpp_2m", spacing=spacings.linspace)
    read = recipe.from_json(recipe.texts(dataclasses.replace(PLAIN, sampler_options=one.settings))["sdjax"])
    assert samplers.create("dpmpp_2m", **read.sampler_options).spacing is spacings.linspace


@pytest.mark.parametrize("algorithm", samplers.ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_every_sampler_comes_back(algorithm):
    one = samplers.create(algorithm)
    read = recipe.from_json(recipe.texts(dataclasses.replace(PLAIN, sampler_options=one.settings))["sdjax"])
    assert samplers.create(algorithm.name, **read.sampler_options) == one


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"kind": "eval"}, "expected the kind Karras, "),
        ({}, "expected the kind Karras, "),
        ({"kind": "Karras", "x": 1}, "Karras has sigma_min, sigma_max, ends, .* got x"),
        ({"kind": "Karras", "ends": "os.system"}, "ends can be leading, "),
        ({"kind": "Karras", "rho": "a"}, "rho: expected a number above 0"),
        ({"kind": "Whole"}, "Whole has spacing, got none"),
        ({"kind": "Timesteps", "timesteps": [3, 9]}, "from noise to picture"),
    ],
)
def test_a_spacing_that_is_none(plain, message):
    read = recipe.from_json(json.dumps(stored({"sampler_options": {"spacing": plain}})))
    with pytest.raises(ValueError, match=message):
        samplers.create("euler", **read.sampler_options)


def test_a_recipe_of_what_json_has_not_is_written():
    """The pictures are made by then: a sampler's own option that cannot be told must not lose them."""
    one = dataclasses.replace(PLAIN, sampler_options={"most": float("inf"), "least": (float("nan"), 1.0)})
    assert recipe.from_json(recipe.texts(one)["sdjax"]).sampler_options == {"most": "inf", "least": ("nan", 1.0)}


def test_guidance_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="guidance: expected an object with no more than interval, "):
        recipe.from_json(json.dumps(stored({"guidance": {"foo": 1}})))


def test_without_the_taesd_it_was_decoded_by():
    one = dataclasses.replace(PLAIN, model_sha256=None, tiny_vae_sha256="abcdef01")
    model = SimpleNamespace(dtype="float32", source="x", fingerprint="f", tiny_decoder=None)
    assert recipe.differences(one, model, VERSIONS) == ["It was decoded by another TAESD."]
