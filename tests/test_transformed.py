"""Transformed kernels on disk: what a second process maps, and what it must not."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import sdjax
from sdjax import checkpoints, cli, compilation_cache, generation, transformed
from sdjax.models import prepared
from sdjax.ops import winograd

OPTIONS = {"seed": 1, "num_inference_steps": 1, "height": 16, "width": 24, "output_type": "latent"}
SIDES = {"down": (2, 64), "up": (64, 2)}  # of a LoRA's matrices in the middle of the tiny model


@pytest.fixture(autouse=True)
def everything(monkeypatch, tmp_path):
    """Even a tiny model's kernels are transformed; and a cache of the test's own."""
    monkeypatch.setattr(prepared, "WIDE", 0)
    monkeypatch.setattr(prepared, "FEWEST_CHANNELS", 1)
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tiny_file, tmp_path):
    return shutil.copy2(tiny_file, tmp_path / "own.safetensors")


@pytest.fixture
def unmade(monkeypatch):
    """From here on a test fails where a kernel is transformed."""

    def forbid():
        def transform(*_):
            raise AssertionError("a kernel was transformed")

        monkeypatch.setattr(winograd, "_prepare", transform)

    return forbid


def leaves(model):
    return jax.tree.leaves(model.prepared)


def test_they_are_mapped_to_the_bit(file, unmade):
    first = sdjax.load(file)
    kept = first.keep_prepared()
    assert kept.is_file()
    assert not kept.parent.stat().st_mode & 0o077
    unmade()
    second = sdjax.load(file)
    assert len(leaves(first)) == len(leaves(second))
    for mine, theirs in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    # They lie in the file: nothing of them was copied.
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(kept) in line]
    low, high = (int(side, 16) for side in mapped[-1].split()[0].split("-"))
    kernels = [x for known in second._transformed.values() for x in known[1]]
    inside = [low <= x.unsafe_buffer_pointer() < high for x in kernels if x.nbytes % 64 == 0]
    assert sum(inside) > 20
    assert all(inside)
    assert second.keep_prepared() == kept  # it is there, and nothing is made for it


def test_a_lora_beside_the_weights_finds_them(file, tmp_path, unmade):
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
    low = {f"{module}.lora_{side}.weight": np.ones(shape, np.float32) for side, shape in SIDES.items()}
    checkpoints.safetensors.write(tmp_path / "style.safetensors", low, {})
    sdjax.load(file).keep_prepared()
    model = sdjax.load(file).with_lora(tmp_path / "style.safetensors")
    unmade()
    assert leaves(model)
    assert model.keep_prepared() is not None


def change(file):
    os.utime(file, ns=(1, 1))


def other_dtype(_):
    return {"dtype": "bfloat16"}


@pytest.mark.parametrize("differently", [change, other_dtype])
def test_another_file_or_dtype_does_not_find_them(file, differently):
    sdjax.load(file).keep_prepared()
    options = differently(file) or {}
    assert sdjax.load(file, **options)._transformed == {}


def test_another_transform_does_not_find_them(file, tmp_path, monkeypatch):
    sdjax.load(file).keep_prepared()
    (tmp_path / "winograd.py").write_text("POINTS = ()")
    monkeypatch.setattr(winograd, "__file__", str(tmp_path / "winograd.py"))
    assert sdjax.load(file)._transformed == {}


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def others(path):
    checkpoints.safetensors.write(path, {"unet.conv_in.kernel.0": np.zeros((3, 3), np.float32)}, {})


def unknown(path):
    checkpoints.safetensors.write(path, {"else.0": np.zeros((3, 3), np.float32)}, {})


def gap(path):
    arrays, _ = checkpoints.safetensors.read(path)
    arrays = {name: np.array(x) for name, x in arrays.items()}
    del arrays[next(name for name in arrays if name.endswith(".0"))]
    checkpoints.safetensors.write(path, arrays, {})


def unnumbered(path):
    checkpoints.safetensors.write(path, {"unet.conv_in.kernel.x": np.zeros((3, 3), np.float32)}, {})


@pytest.mark.parametrize("damage", [cut, empty, others, unknown, gap, unnumbered])
def test_a_damaged_file_is_made_again(file, damage, caplog):
    kept = sdjax.load(file).keep_prepared()
    damage(kept)
    model = sdjax.load(file)
    assert model._transformed == {}
    assert "made again" in caplog.text
    assert not kept.exists()
    assert model.keep_prepared() == kept
    assert sdjax.load(file)._transformed


def test_what_an_earlier_version_made_of_it_goes(file, monkeypatch):
    older = sdjax.load(file).keep_prepared()
    other = older.with_name(f"other-{older.name.partition('-')[2]}")
    other.write_bytes(older.read_bytes())
    monkeypatch.setattr(transformed, "prepared", SimpleNamespace(__file__=__file__))
    newer = sdjax.load(file).keep_prepared()
    assert newer != older
    assert sorted(newer.parent.iterdir()) == sorted([newer, other])


def test_another_part_leaves_nothing_of_the_old_one(file, tmp_path):
    model = sdjax.load(file)
    leaves(model)
    old = {id(x) for x in jax.tree.leaves(model.params["unet"])}
    other = model.with_part(file, "unet")
    assert old & model._transformed.keys()
    assert other._transformed
    assert not old & other._transformed.keys()


def test_a_folder_that_others_may_write_to_is_not_trusted(file, tmp_path):
    kept = sdjax.load(file).keep_prepared()
    compilation_cache.is_usable.cache_clear()
    (tmp_path / "cache").chmod(0o777)
    assert sdjax.load(file)._transformed == {}
    kept.unlink()
    with pytest.raises(ValueError, match="nothing can be kept"):
        sdjax.load(file).keep_prepared()
    compilation_cache.is_usable.cache_clear()


def test_what_is_refused(file, tmp_path, monkeypatch):
    model = sdjax.load(file)
    with pytest.raises(ValueError, match="out of one file"):
        model.with_part(file, "vae").keep_prepared()
    with pytest.raises(ValueError, match="out of one file"):
        model.with_loras_merged().keep_prepared()
    checkpoints.convert(file, tmp_path / "folder", sdjax.pipeline.shapes, layout="diffusers")
    with pytest.raises(ValueError, match="out of one file"):
        sdjax.load(tmp_path / "folder").keep_prepared()
    monkeypatch.setenv("SDJAX_CACHE", "off")
    with pytest.raises(ValueError, match="switched off"):
        model.keep_prepared()
    assert sdjax.load(file)._transformed == {}


def test_of_a_small_model_there_is_nothing_to_keep(file, monkeypatch, tmp_path):
    monkeypatch.setattr(prepared, "WIDE", 512)
    assert sdjax.load(file).keep_prepared() is None
    assert not (tmp_path / "cache" / "kernels").exists()


def test_on_a_gpu_they_are_neither_read_nor_kept(file, monkeypatch):
    kept = sdjax.load(file).keep_prepared()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = sdjax.load(file, dtype="float32")
    assert model._transformed == {}
    assert model.keep_prepared() is None
    assert kept.is_file()


def test_from_the_command_line(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "compile", lambda *_, **__: None)
    how = ["--height", "16", "--width", "24", "--steps", "1", "--model", str(file)]
    assert cli.main(["compile", "--weights", *how]) == 0
    assert "weights kept in" in capsys.readouterr().err
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    assert cli.main(["cache"]) == 0
    shown = float(capsys.readouterr().out.split(": ")[1].split(" MiB")[0])
    assert (shown + 0.1) * 2**20 > kept.stat().st_size
    assert cli.main(["cache", "--clear"]) == 0
    assert not kept.exists()


def test_wrong_arguments_keep_nothing(file, tmp_path):
    assert cli.main(["compile", "--weights", "--height", "17", "--model", str(file)]) == 2
    assert not (tmp_path / "cache" / "kernels").exists()


@pytest.mark.slow
def test_pictures_are_the_same(file):
    expected = sdjax.generate("a cat", model=sdjax.load(file), **OPTIONS)
    sdjax.compile("a cat", model=sdjax.load(file), weights=True, **OPTIONS)
    model = sdjax.load(file)
    assert model._transformed
    np.testing.assert_array_equal(sdjax.generate("a cat", model=model, **OPTIONS), expected)
