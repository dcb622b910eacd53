"""The `sdjax` command as a stranger meets it: help, refusals, names of files, recipes made again."""

import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax import (
    checkpoints,
    cli,
    generation,
    images,
    loading,
    options,
    outputs,
    pipeline,
    plan,
    recipe,
    samplers,
    spacings,
)
from sdjax.models.config import TINY
from sdjax.schedule import PREDICTIONS
from sdjax.tokenizer import Tokenizer

VERSIONS = {"sdjax": sdjax.__version__, "jax": "0.10.2", "jaxlib": "0.10.2", "platform": "cpu", "device": "cpu"}
PLAIN = recipe.Recipe(
    prompt="a red fox",
    negative_prompt="",
    num_inference_steps=20,
    guidance_scale=7.5,
    sampler="ddim",
    sampler_options={"spacing": "linspace", "prediction": "epsilon", "steps_offset": 1},
    strength=None,
    clip_skip=0,
    seed=1234,
    height=512,
    width=768,
    rescale=0.0,
    model="default",
    model_sha256="0123456789abcdef",
    dtype="float32",
    driver="scan",
    batch=1,
    index=0,
    task="text",
    image_sha256=None,
    mask_sha256=None,
    mask_blur=0.0,
    padding_mask_crop=None,
    windows=1,
    versions=VERSIONS,
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDJAX_CACHE", "off")


@pytest.fixture
def made(monkeypatch):
    """generate() and load() replaced by what remembers its arguments; pictures are the colour of their seed."""
    calls = []

    def load(path=None, *, dtype=None):
        calls.append(("load", path, dtype))
        return SimpleNamespace(
            dtype=dtype or "float32",
            source="default" if path is None else os.path.basename(path),
            fingerprint=PLAIN.model_sha256,
            config=TINY,
            sampler=samplers.create,
            tokenizer=Tokenizer(),
        )

    def generate(prompt, negative_prompt="", *, seed, **given):
        calls.append(given | {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed})
        result = []
        for i, (text, s) in enumerate(zip(prompt, seed, strict=True)):
            picture = Image.new("RGB", (8, 8), (s % 256, 0, 0))
            one = dataclasses.replace(PLAIN, prompt=text, negative_prompt=negative_prompt, seed=s, index=0)
            picture.info.update(recipe.texts(one), number=str(i))
            result.append(picture)
        return result

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(generation, "generate", generate)
    monkeypatch.setattr(plan, "versions", lambda: dict(VERSIONS))
    return calls


def run(*argv):
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as error:  # argparse's
        return error.code


def files(folder="."):
    return sorted(path for path in os.listdir(folder) if path.endswith((".png", ".jpg", ".webp", ".tmp")))


def save(name, one, colour=(0, 0, 0)):
    images.save_png(name, Image.new("RGB", (8, 8), colour), recipe.texts(one))
    return name


# Without JAX


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["convert", "--help"], 0),
        (["info", "--help"], 0),
        (["cache"], 0),
        (["--version"], 0),
        ([], 2),
        (["paint"], 2),
        (["generate"], 2),
        (["generate", "a", "--steps", "0"], 2),
        (["generate", "a", "--strenght", "1"], 2),
        (["generate", "a", "-o", "nowhere/a.png"], 2),
        (["generate", "a", "-o", "a.tiff"], 2),
        (["generate", "a", "--image", "none.png"], 2),
        (["generate", "a", "--model", "none.ckpt"], 2),
        (["generate", "--from", "none.png"], 2),
        (["convert", "none.ckpt", "a.safetensors"], 2),
        (["info", "none.png"], 2),
    ],
)
def test_help_and_what_is_plainly_wrong_are_answered_without_jax(argv, status):
    program = (
        "import sys\nfrom sdjax import cli\n"
        f"try: status = cli.main({argv!r})\nexcept SystemExit as error: status = error.code\n"
        "print('jax' in sys.modules, 'flax' in sys.modules, status, file=sys.__stderr__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *said, last = done.stderr.splitlines()
    assert last == f"False False {status}", done.stderr
    assert "Traceback" not in done.stderr
    if status:
        assert "error: " in said[-1]
        assert done.stdout == ""


def test_the_help_tells_generates_own_defaults(capsys):
    assert run("generate", "--help") == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    defaults = {name: p.default for name, p in inspect.signature(sdjax.generate).parameters.items()}
    for option, name in {
        "--steps N": "num_inference_steps",
        "--guidance-scale X": "guidance_scale",
        "--sampler NAME": "sampler",
        "--clip-skip N": "clip_skip",
        "--mask-blur PIXELS": "mask_blur",
        "--images-per-prompt N": "num_images_per_prompt",
    }.items():
        told = re.search(r"\(default: ([^)]*)\)", text[text.index(option, text.index("what to make:")) :])[1]
        assert told == str(defaults[name]), option


def test_every_argument_of_generate_has_an_option(capsys):
    run("generate", "--help")
    text = capsys.readouterr().out
    elsewhere = {
        "controls",
        "fast",
        "guidance",
        "latents",
        "output_type",
        "progress",
        "callback",
        "mesh",
        "num_images_per_prompt",
    }
    names = set(inspect.signature(sdjax.generate).parameters) - elsewhere - {"prompt"}
    assert [name for name in names if f"--{name.replace('_', '-')}" not in text] == []
    assert set(cli.PASSED) < names


def test_dtypes_are_those_there_are():
    assert options.DTYPES == loading.DTYPES == checkpoints.DTYPES
    assert ("native", *checkpoints.LAYOUTS) == options.LAYOUTS
    assert options.PREDICTIONS == PREDICTIONS


def test_version_names_jax_too(capsys):
    assert run("--version") == 0
    assert re.fullmatch(r"sdjax \S+ \(jax \S+, jaxlib \S+\)\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "1.5"], "whole number"),
        (["--strength", "0"], "above 0 and up to 1, got '0'"),
        (["--guidance-threshold", "0"], "a number, 0.001 or more, got '0'"),
        (["--gate", "0.0005"], "a number, 0.001 to 1, got '0.0005'"),
        (["--strength", "nan"], "got 'nan'"),
        (["--seed", 2**64], "0 to 2^64 - 1"),
        (["--seed", "-1"], "0 to 2^64 - 1"),
        (["--cfg", "a"], "a number, or one per step"),
        (["--cfg", "1,inf"], "a number, or one per step"),
        (["--mask-blur", "inf"], "0 or more"),
        (["--sampler-option", "eta"], "NAME=VALUE"),
        (["--dtype", "float16"], "float32"),
    ],
)
def test_values_out_of_range_are_refused_by_name(option, message, capsys, made):
    assert run("generate", "a", *option) == 2
    said = capsys.readouterr().err
    assert option[0] in said
    assert message in said
    assert made == []


# Making pictures


def test_a_picture_is_written_and_named(made, capsys):
    assert run("generate", "A red fox, at dawn!", "--seed", 7) == 0
    assert capsys.readouterr().out == "a-red-fox-at-dawn-7.png\n"
    assert recipe.read("a-red-fox-at-dawn-7.png").seed == 7
    assert made[0] == ("load", None, None)
    assert made[1]["prompt"] == ["A red fox, at dawn!"]
    assert made[1]["seed"] == [7]
    assert made[1]["batch_size"] == 1
    assert made[1]["progress"] is False  # there is no terminal
    assert "callback" not in made[1]


def test_options_go_to_generate_and_nothing_else_does(made):
    Image.new("RGB", (8, 8), "red").save("in.png")
    Image.new("L", (8, 8), 255).save("mask.png")
    assert run(
        "generate", "a", "b", "--negative-prompt", "bad", "--image", "in.png", "--mask-image", "mask.png",
        "--strength", 0.5, "--steps", 3, "--cfg", "7,5,1", "--guidance-rescale", 0.7, "--sampler", "ddim",
        "--spacing", "trailing", "--sampler-option", "eta=0.5", "--clip-skip", 1, "--seed", 5, "--images-per-prompt", 2,
        "--height", 64, "--width", 128, "--batch-size", 3, "--mask-blur", 2, "--padding-mask-crop", 8,
        "--dtype", "bfloat16", "--no-progress",
    ) == 0  # fmt: skip
    assert made[0] == ("load", None, "bfloat16")
    first, second = made[1:]
    assert (first["prompt"], first["seed"]) == (["a", "a", "b"], [5, 6, 7])
    assert (second["prompt"], second["seed"]) == (["b"], [8])  # of the same compiled shape
    assert first.pop("sampler").options == (("eta", 0.5), ("set_alpha_to_one", False))
    assert first.pop("guidance").rescale == 0.7
    assert (first.pop("image").mode, first.pop("mask_image").mode) == ("RGB", "L")
    del first["prompt"], first["seed"], first["model"]
    assert first == {
        "negative_prompt": "bad", "strength": 0.5, "num_inference_steps": 3, "guidance_scale": (7.0, 5.0, 1.0),
        "clip_skip": 1, "height": 64, "width": 128, "batch_size": 3, "mask_blur": 2.0, "padding_mask_crop": 8,
        "progress": False,
    }  # fmt: skip
    assert len(files()) == 4 + 2


def test_what_is_not_given_is_generates_default(made):
    assert run("generate", "a") == 0
    assert set(made[1]) == {
        "prompt", "negative_prompt", "seed", "model", "sampler", "guidance", "batch_size", "progress",
    }  # fmt: skip
    assert made[1]["sampler"].name == "ddpm"


def test_a_terminal_gets_a_bar(made, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("generate", "a") == 0
    assert made[1]["progress"] is True
    assert run("generate", "a", "--no-progress") == 0
    assert made[3]["progress"] is False


def test_prompts_from_a_file(made, monkeypatch):
    with open("prompts.txt", "wb") as file:
        file.write("\ufeffa fox\r\n\r\n  a whale 🐋 \n".encode())
    assert run("generate", "a cat", "--prompts-file", "prompts.txt") == 0
    assert made[1]["prompt"] == ["a cat", "a fox", "a whale 🐋"]
    monkeypatch.setattr("sys.stdin", open("prompts.txt", encoding="utf-8-sig"))  # noqa: SIM115
    assert run("generate", "--prompts-file", "-") == 0
    assert made[3]["prompt"] == ["a fox", "a whale 🐋"]


def test_prompts_files_that_are_none(capsys, made):
    with open("latin.txt", "wb") as file:
        file.write(b"caf\xe9")
    assert run("generate", "--prompts-file", "latin.txt") == 2
    assert run("generate", "--prompts-file", "none.txt") == 2
    open("empty.txt", "w").close()
    assert run("generate", "--prompts-file", "empty.txt") == 2
    assert capsys.readouterr().err.count("sdjax: error: ") == 3
    assert made == []


def test_a_prompt_without_quotes_is_noticed(made, capsys):
    assert run("generate", "a", "red", "fox") == 0
    assert "these are 3 prompts" in capsys.readouterr().err
    assert run("generate", "a fox", "whale") == 0
    assert "quotes" not in capsys.readouterr().err


def test_a_prompt_of_broken_bytes_is_refused(made, capsys):
    assert run("generate", os.fsdecode(b"caf\xe9")) == 2
    assert "not valid text" in capsys.readouterr().err


# Names of files


def test_names_are_never_used_twice(made):
    assert run("generate", "a fox", "a fox!", "--seed", 1) == 0
    assert files() == ["a-fox-1.png", "a-fox-2.png"]
    assert run("generate", "a fox", "--seed", 1) == 0
    assert run("generate", "a fox", "--seed", 1) == 0
    assert files() == ["a-fox-1-2.png", "a-fox-1-3.png", "a-fox-1.png", "a-fox-2.png"]
    assert run("generate", "🦊", "--seed", 1) == 0
    assert "picture-1.png" in files()


@pytest.mark.parametrize("folder", ["out", "out/"])
def test_a_folder(made, folder, capsys):
    os.mkdir("out")
    assert run("generate", "a fox", "a cat", "--seed", 1, "-o", folder) == 0
    assert files("out") == ["a-cat-2.png", "a-fox-1.png"]
    assert capsys.readouterr().out.split() == [os.path.join("out", "a-fox-1.png"), os.path.join("out", "a-cat-2.png")]


def test_patterns(made):
    os.mkdir("out")
    assert run("generate", "a", "b", "--seed", 9, "-o", "out/{i:03}-{seed}.png") == 0
    assert files("out") == ["000-9.png", "001-10.png"]


def test_a_file_named_in_full_is_replaced(made):
    for _ in range(2):
        assert run("generate", "a", "-o", "./a.png") == 0
    assert files() == ["a.png"]


def test_jpeg_is_written_and_said_to_carry_no_recipe(made, capsys):
    assert run("generate", "a", "-o", "a.jpg") == 0
    assert "carries no recipe" in capsys.readouterr().err


@pytest.mark.parametrize("ending", outputs.ENDINGS)
def test_every_ending_can_be_written(ending):
    images.save_image(f"a{ending}", Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a.png", "same name"),
        ("{seed:03x}.png", "not known"),
        ("{prompt}.png", "not known"),
        ("{i!r}.png", "not known"),
        ("{}.png", "not known"),
        ("{i.real}.png", "not known"),
        ("{i:999}.png", "not known"),
        ("{i.png", "-o {i.png: expected '}'"),
        ("none/{i}.png", "no folder none"),
        ("none/", "no folder none"),
        ("none", "no folder that exists"),
        ("{i}.gif", "ending"),
        ("taken-{i}.png", "taken-1.png exists"),
    ],
)
def test_names_that_cannot_be_are_refused_before_anything_is_computed(made, capsys, output, message):
    open("taken-1.png", "w").close()
    assert run("generate", "a b", "c", "-o", output) == 2
    assert message in capsys.readouterr().err
    assert made == []
    assert files() == ["taken-1.png"]


# What goes wrong


def test_a_value_error_is_one_line_and_writes_nothing(made, monkeypatch, capsys):
    def refuse(*_, **__):
        raise checkpoints.errors.CheckpointError("a.ckpt: \x1b[2J is missing")

    monkeypatch.setattr(loading, "load", refuse)
    assert run("generate", "a") == 2
    assert capsys.readouterr().err == "sdjax: error: a.ckpt: \\x1b[2J is missing\n"
    assert files() == []


def failing(error, after=1):
    """generate() that raises in the call after so many."""
    calls = []
    works = generation.generate

    def generate(*args, **options):
        calls.append(1)
        if len(calls) > after:
            raise error
        return works(*args, **options)

    return generate


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (FloatingPointError("picture 0: not finite"), 1, "not finite"),
        (MemoryError(), 1, "--batch-size"),
        (RuntimeError("RESOURCE_EXHAUSTED: 20 GiB"), 1, "--batch-size) or smaller ones"),
    ],
)
def test_what_is_finished_is_saved(made, monkeypatch, capsys, error, status, message):
    monkeypatch.setattr(generation, "generate", failing(error))
    assert run("generate", "a", "b", "c", "--seed", 1, "--batch-size", 2) == status
    out, err = capsys.readouterr()
    assert out.split() == files() == ["a-1.png", "b-2.png"]
    assert f"sdjax: {'interrupted' if status == 130 else 'error: '}" in err
    assert message in err


def test_pictures_that_are_missing_after_ctrl_c_are_an_interruption(made, monkeypatch):
    works = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *args, **options: works(*args, **options)[:1])
    assert run("generate", "a", "b", "--seed", 1) == 130
    assert files() == ["a-1.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_a_compiled_program_at_once(tmp_path):
    # Like a scanned loop this neither returns to Python nor lets it look at signals.
    program = (
        "import ctypes, sys\nfrom sdjax import cli\n"
        "with cli._at_once():\n    print('in', flush=True)\n    ctypes.PyDLL(None).sleep(30)\n"
    )
    ignored = signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs, as these tests may be, ignore it
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    signal.signal(signal.SIGINT, ignored)
    assert process.stdout.readline() == b"in\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT
    process.stdout.close()


def test_python_has_its_own_signals_back(made):
    before = signal.getsignal(signal.SIGINT)
    assert run("generate", "a fox") == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_our_own_mistakes_show_where_they_are(made, monkeypatch):
    monkeypatch.setattr(generation, "generate", failing(TypeError("a bug"), after=0))
    with pytest.raises(TypeError):
        run("generate", "a")


def test_a_full_disk(made, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "a.png")

    monkeypatch.setattr(images, "save_image", full)
    assert run("generate", "a") == 1
    assert "No space left on device" in capsys.readouterr().err


def test_the_log_goes_to_standard_error_once(made, monkeypatch, capsys):
    import logging

    works = generation.generate

    def generate(*args, **options):
        logging.getLogger("sdjax.program").warning("compiling")
        return works(*args, **options)

    monkeypatch.setattr(generation, "generate", generate)
    for _ in range(2):
        assert run("generate", "a fox") == 0
        assert capsys.readouterr().err == "sdjax: compiling\n"


# Made again


def test_from_repeats_every_argument(made, capsys):
    save("a.png", dataclasses.replace(PLAIN, guidance_scale=3.0, negative_prompt="bad", rescale=0.5), (210, 0, 0))
    assert run("generate", "--from", "a.png", "-o", "b.png") == 0
    given = made[1]
    assert made[0] == ("load", None, "float32")
    assert (given["prompt"], given["negative_prompt"], given["seed"]) == (["a red fox"], "bad", [1234])
    assert (given["num_inference_steps"], given["guidance_scale"], given["batch_size"]) == (20, 3.0, 1)
    assert (given["height"], given["width"], given["clip_skip"]) == (512, 768, 0)
    assert (given["sampler"].name, given["sampler"].spacing) == ("ddim", "linspace")
    assert given["guidance"].rescale == 0.5
    assert (given["progress"], given.get("callback")) == (False, None)
    assert "strength" not in given
    assert capsys.readouterr().err == ""  # nothing differs, but for what our generate() makes up


def test_from_tells_whether_it_came_out_the_same(made, capsys):
    save("a.png", PLAIN, (1234 % 256, 0, 0))
    assert run("generate", "--from", "a.png", "-o", "b.png") == 0
    assert capsys.readouterr().err == "sdjax: the same, pixel by pixel, as a.png\n"
    save("a.png", PLAIN, (9, 0, 0))
    assert run("generate", "--from", "a.png", "-o", "b.png") == 0
    assert capsys.readouterr().err == "sdjax: not the same, pixel by pixel, as a.png\n"


def test_from_takes_the_place_in_the_batch(made):
    save("a.png", dataclasses.replace(PLAIN, batch=4, index=2))
    assert run("generate", "--from", "a.png", "-o", "b.png") == 0
    assert (made[1]["prompt"], made[1]["seed"], made[1]["batch_size"]) == (["a red fox"] * 4, [1234] * 4, 4)
    with Image.open("b.png") as picture:
        assert recipe.from_json(picture.text["sdjax"]).prompt == "a red fox"


@pytest.mark.parametrize(("batch", "index", "place"), [(4, 2, 0), (4, 0, 1), (1, 0, 1)])
def test_from_takes_the_number_of_windows(made, batch, index, place):
    save("a.png", dataclasses.replace(PLAIN, batch=batch, index=index, windows=2))
    assert run("generate", "--from", "a.png", "-o", "b.png") == 0
    prompts = made[1]["prompt"]
    assert prompts[index] == "a red fox"
    assert len(prompts[place].split()) == 76  # which needs two windows
    assert len(prompts) == max(batch, 2)
    assert made[1]["batch_size"] == batch


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("driver", ["scan", "stepwise"])
def test_from_takes_the_driver(made, monkeypatch, terminal, driver):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    save("a.png", dataclasses.replace(PLAIN, driver=driver))
    assert run("generate", "--from", "a.png", "-o", "b.png") == 0
    assert made[1]["progress"] == (driver == "stepwise" and terminal)
    assert ("callback" in made[1]) == (driver == "stepwise" and not terminal)


def test_options_change_the_recipe(made, capsys):
    save("a.png", dataclasses.replace(PLAIN, sampler_options={"spacing": "trailing", "eta": 0.5, "steps_offset": 0}))
    assert run("generate", "a blue fox", "--from", "a.png", "--cfg", 4, "--seed", 3, "-o", "b.png") == 0
    assert (made[1]["prompt"], made[1]["guidance_scale"], made[1]["seed"]) == (["a blue fox"], 4.0, [3])
    assert made[1]["num_inference_steps"] == 20
    sampler = made[1]["sampler"]
    assert (sampler.spacing, sampler.steps_offset, dict(sampler.options)["eta"]) == ("trailing", 0, 0.5)
    assert run("generate", "--from", "a.png", "--spacing", "linspace", "-o", "b.png") == 0
    assert (made[3]["sampler"].spacing, dict(made[3]["sampler"].options)["eta"]) == ("linspace", 0.5)
    assert run("generate", "--from", "a.png", "--sampler", "Euler a", "-o", "b.png") == 0
    assert (made[5]["sampler"].name, made[5]["sampler"].options) == (
        "euler_ancestral",
        (("eta", 1.0), ("s_noise", 1.0)),
    )
    assert run("generate", "--from", "a.png", "--images-per-prompt", 3, "-o", "c{seed}.png") == 0
    assert (made[7]["seed"][0], made[7]["batch_size"]) == (1234, 1)
    assert "same" not in capsys.readouterr().err


def test_from_says_what_is_not_as_it_was(made, capsys):
    save("a.png", dataclasses.replace(PLAIN, versions=VERSIONS | {"jax": "0.9.0"}, model_sha256="ab" * 8))
    assert run("generate", "--from", "a.png", "--dtype", "bfloat16", "-o", "b.png") == 0
    said = capsys.readouterr().err
    assert "sdjax: It was made with jax 0.9.0; here is 0.10.2.\n" in said
    assert "sdjax: It was made with dtype float32; here is bfloat16.\n" in said


def test_from_needs_the_model_the_image_and_the_mask(made, capsys):
    Image.new("RGB", (8, 8), "red").save("in.png")
    Image.new("L", (8, 8), 255).save("mask.png")
    open("m.ckpt", "w").close()
    save(
        "a.png",
        dataclasses.replace(
            PLAIN, model="v2, final.ckpt", task="inpaint", strength=0.75, mask_blur=4.0, padding_mask_crop=32
        ),
    )
    options = ["generate", "--from", "a.png", "-o", "b.png"]
    for option, value, message in (
        ("--image", "in.png", "--image: the picture was made from another one"),
        ("--mask-image", "mask.png", "--mask-image: the picture was made from another one"),
        ("--model", "m.ckpt", "--model: the picture was made with 'v2, final.ckpt'"),
    ):
        assert run(*options) == 2
        assert message in capsys.readouterr().err
        options += [option, value]
    assert made == []
    assert run(*options) == 0
    assert made[0] == ("load", "m.ckpt", "float32")
    assert (made[1]["strength"], made[1]["mask_blur"], made[1]["padding_mask_crop"]) == (0.75, 4.0, 32)


def test_from_refuses_start_noise_and_strangers(made, capsys):
    save("a.png", dataclasses.replace(PLAIN, latents_sha256="ab" * 32))
    assert run("generate", "--from", "a.png") == 2
    assert "start noise" in capsys.readouterr().err
    for sampler_options in ({"eta": "x"}, {"spacing": 5}, {"steps_offset": None}, {"prediction": [1]}, {"model": 1}):
        save("a.png", dataclasses.replace(PLAIN, sampler_options=sampler_options))
        assert run("generate", "--from", "a.png", "-o", "b.png") == 2, sampler_options
        assert "sdjax: error: " in capsys.readouterr().err
    assert files() == ["a.png"]


# On a tiny model


@pytest.fixture
def original(tiny_file):
    """Arguments that make pictures with it, fast."""
    return ["generate", "--model", tiny_file, "--steps", 3, "--height", 24, "--width", 32, "--seed", 1]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).tolist()


def test_a_picture_is_made_again_to_the_bit(original, tiny_file, capsys):
    assert run(*original, "a fox", "a cat", "a dog", "-o", "{i}.png") == 0
    assert recipe.read("1.png").index == 1
    capsys.readouterr()
    assert run("generate", "--from", "1.png", "--model", tiny_file, "-o", "again.png") == 0
    assert "the same, pixel by pixel, as 1.png" in capsys.readouterr().err.splitlines()[-1]
    assert pixels("again.png") == pixels("1.png") != pixels("2.png")
    again, first = recipe.read("again.png"), recipe.read("1.png")
    assert again == first


@pytest.mark.slow
def test_a_schedule_that_is_not_the_models_is_taken_up(tiny_file):
    model = sdjax.load(tiny_file)
    schedule = dataclasses.replace(model.schedule(), beta_end=0.02)
    sampler = model.sampler("ddim", schedule=schedule, spacing=spacings.Timesteps((999, 400)))
    options = {"seed": 1, "num_inference_steps": 2, "height": 16, "width": 16}
    first = sdjax.generate("a fox", model=model, sampler=sampler, **options)[0]
    images.save_png("a.png", first, {recipe.KEY: first.info[recipe.KEY], recipe.PARAMETERS: ""})
    assert run("generate", "--from", "a.png", "--model", tiny_file, "-o", "b.png", "--no-progress") == 0
    assert recipe.read("b.png") == recipe.read("a.png")
    assert pixels("b.png") == pixels("a.png")


def test_prompts_beside_it_are_as_long_as_they_must_be(made, tiny_file):
    """A negative prompt takes windows too; and with regions all prompts join as many."""
    long = " ".join(["a"] * 80)
    for given, prompt, expected in (
        ({"negative_prompt": long}, "a", ["a"]),
        ({"windows": 2}, "a AND b", ["a AND b", f"a AND {' '.join(['a'] * 76)}"]),
        ({"windows": 2, "batch": 2, "index": 1}, "a", [" ".join(["a"] * 76), "a"]),
    ):
        save("in.png", dataclasses.replace(PLAIN, **{"prompt": prompt, "windows": 2, **given}))
        assert run("generate", "--from", "in.png", "--model", tiny_file, "-o", "out.png") == 0
        assert made[-1]["prompt"] == expected


@pytest.mark.slow
def test_a_part_of_a_picture_is_made_again_to_the_bit(original, tiny_file, capsys):
    Image.effect_noise((64, 48), 80).convert("RGB").save("in.png")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (10, 10, 30, 30))
    mask.save("mask.png")
    sources = ["--image", "in.png", "--mask-image", "mask.png", "--model", tiny_file]
    assert run(*original, "a fox", *sources, "--padding-mask-crop", 4, "--mask-blur", 2, "-o", "a.png") == 0
    capsys.readouterr()
    assert run("generate", "--from", "a.png", *sources, "-o", "b.png") == 0
    assert "the same, pixel by pixel" in capsys.readouterr().err
    Image.effect_noise((64, 48), 80).convert("RGB").save("in.png")
    assert run("generate", "--from", "a.png", *sources, "-o", "b.png") == 0
    assert "warning: the image is not the one" in capsys.readouterr().err


def test_what_generate_refuses_is_one_line(original, capsys):
    assert run(*original, "a fox", "--height", 25, "-o", "a.png") == 2
    assert "sdjax: error: height: must be a multiple of 2" in capsys.readouterr().err
    assert run(*original, "a fox", "--sampler", "magic") == 2
    assert "'magic' is not known" in capsys.readouterr().err
    assert run(*original, "a fox", "--sampler-option", "set_alpha_to_one=1") == 2
    assert files() == []


# The other commands


def test_info_of_a_picture(capsys):
    save("a.png", dataclasses.replace(PLAIN, prompt="a\x1b[2J fox\x9b"))
    assert run("info", "a.png") == 0
    out = capsys.readouterr().out
    assert "prompt: a\\x1b[2J fox\\x9b\n" in out
    assert "seed: 1234\n" in out
    assert run("info", "a.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 1234


def test_info_of_what_is_none(capsys):
    Image.new("RGB", (8, 8)).save("a.png")
    assert run("info", "a.png") == 2
    assert "there is no recipe" in capsys.readouterr().err


def test_info_of_a_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "describe", lambda path: f"{path}: a \x1b model", raising=False)
    open("a.ckpt", "w").close()
    assert run("info", "a.ckpt") == 0
    assert capsys.readouterr().out == "a.ckpt: a \\x1b model\n"
    monkeypatch.setattr(checkpoints, "describe", lambda path: {"kind": "SD 1", "tensors": 686}, raising=False)
    assert run("info", ".") == 0
    assert capsys.readouterr().out == "kind: SD 1\ntensors: 686\n"


def test_convert(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(checkpoints, "convert", lambda *args, **options: calls.append((args, options)), raising=False)
    open("a.ckpt", "w").close()
    assert run("convert", "a.ckpt", "b.safetensors") == 0
    assert run("convert", "a.ckpt", "b.safetensors", "--no-ema", "--dtype", "bfloat16") == 0
    plain = {"ema": None, "dtype": None, "prediction": None, "layout": "native", "hash_source": True}
    assert [options for _, options in calls] == [plain, plain | {"ema": False, "dtype": "bfloat16"}]
    assert [str(path) for path in calls[0][0][:2]] == ["a.ckpt", "b.safetensors"]
    assert calls[0][0][2] is pipeline.shapes
    assert capsys.readouterr().out == "b.safetensors\n" * 2
    open("c.safetensors", "w").close()
    for target, message in (
        ("a.ckpt", "the source itself"),
        ("c.safetensors", "exists"),
        ("x/b", "no folder x"),
        (".", "a folder"),
    ):
        assert run("convert", "a.ckpt", target) == 2
        assert message in capsys.readouterr().err
    assert len(calls) == 2
    assert (
        run(
            "convert",
            "a.ckpt",
            "c.safetensors",
            "--overwrite",
            "--layout",
            "ldm",
            "--prediction",
            "v",
            "--no-hash-source",
        )
        == 0
    )
    assert calls[-1][1] == plain | {"layout": "ldm", "prediction": "v", "hash_source": False}
    assert run("convert", "a.ckpt", "c.safetensors", "--overwrite", "--layout", "diffusers") == 2  # never a folder


def test_cache(monkeypatch, capsys, tmp_path):
    assert run("cache") == 0
    assert capsys.readouterr().out == "switched off by SDJAX_CACHE\n"
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    (tmp_path / "a-cache").write_bytes(bytes(2**21))
    (tmp_path / "a-atime").write_bytes(bytes(8))
    assert run("cache") == 0
    assert capsys.readouterr().out == f"{tmp_path}: 2.0 MiB\n"
    assert run("cache", "--clear") == 0
    assert capsys.readouterr().out == f"{tmp_path}: 2.0 MiB deleted\n"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/x")
    assert run("cache") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}: 0.0 MiB\n"
    assert "JAX_COMPILATION_CACHE_DIR is set" in err
