"""Textual inversions in the files of the web UI and of diffusers, against diffusers' pipeline and by hand."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import sdjax
from sdjax.checkpoints import CheckpointError, safetensors
from sdjax.models.config import TINY
from sdjax.prompts import windows
from sdjax.tokenizer import Tokenizer

from .test_models import TOLERANCE, enliven, relative_error, text_encoder, unet, vae, write_folder
from .test_tokenizer import reference  # noqa: F401 - a fixture

VECTORS = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)


@pytest.fixture(scope="module")
def both(tmp_path_factory, reference):  # noqa: F811
    """diffusers' pipeline and our model with the same weights, and a folder for files."""
    folder = tmp_path_factory.mktemp("model")
    parts = {"text_encoder": text_encoder(TINY), "unet": unet(TINY), "vae": vae(TINY)}
    for seed, model in enumerate(parts.values()):
        enliven(model, seed)
    write_folder(folder / "model", TINY, parts)
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=reference,
        scheduler=diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, sdjax.load(folder / "model", dtype="float32"), folder


def test_diffusers_files(both):
    pipe, model, folder = both
    safetensors.write(folder / "a.safetensors", {"<cat-toy>": VECTORS}, {})
    torch.save({"<one>": torch.from_numpy(VECTORS[0])}, folder / "b.bin")
    for name in ("a.safetensors", "b.bin"):
        pipe.load_textual_inversion(str(folder), weight_name=name)
        model = model.with_embedding(folder / name)
    assert [word for word, _ in model.tokenizer.words] == ["<cat-toy>", "<one>"]
    for prompt in ("a photo of <cat-toy> on <one>.", "<one>", "<one>,<one> <cat-toy>", "a cat"):
        with torch.no_grad():
            expected = pipe.encode_prompt(prompt, "cpu", 1, False)[0].numpy()
        ours = model.encode_text(model.tokenizer([prompt]))
        assert relative_error(ours, expected) < TOLERANCE, prompt


def test_web_ui_files(both):
    _, model, folder = both
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.from_numpy(VECTORS)}, "name": "x", "step": 5},
        folder / "My-Style.pt",
    )
    safetensors.write(folder / "easy.safetensors", {"emb_params": VECTORS.astype(np.float16)}, {})
    model = model.with_embedding(folder / "My-Style.pt").with_embedding(folder / "easy.safetensors", "<negative>")
    assert model.tokenizer.encode("a my-style b") == [320, 49408, 49409, 49410, 321]
    table = model.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[49408:], np.concatenate([VECTORS, VECTORS.astype(np.float16)]))
    ids, weights = windows(model.tokenizer, "a (MY-STYLE, <Negative>:1.5)")
    assert ids[0, 1:10].tolist() == [320, 49408, 49409, 49410, 267, 49411, 49412, 49413, 49407]
    assert weights[0, 1:10].tolist() == [1, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1]
    assert model.source.endswith(" + My-Style + <negative>")
    with pytest.raises(ValueError, match=r"no words of textual inversions \(My-Style, <negative>\)"):
        model.save(folder / "out.safetensors")


def test_a_word_is_no_part_of_another():
    tokenizer = Tokenizer(words=(("art", (49408,)), ("art-deco", (49409, 49410))))
    plain = Tokenizer()
    assert tokenizer.encode("ART art-deco") == [49408, 49409, 49410]
    assert tokenizer.encode("art_s artist smart cart3") == plain.encode("art_s artist smart cart3")
    assert tokenizer.encode("an art.") == [*plain.encode("an"), 49408, *plain.encode(".")]


@pytest.mark.slow
def test_pictures_use_it(both):
    _, model, folder = both
    safetensors.write(folder / "c.safetensors", {"<w>": 5 * VECTORS}, {})
    changed = model.with_embedding(folder / "c.safetensors")
    options = {"seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    same = [sdjax.generate("a cat", model=m, **options) for m in (model, changed)]
    np.testing.assert_array_equal(*same)
    other = sdjax.generate("a <w>", model=changed, **options)
    assert np.abs(other - sdjax.generate("a <w>", model=model, **options)).max() > 1e-3
    assert changed.fingerprint != model.fingerprint


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": VECTORS, "b": VECTORS}, "no textual inversion, which has one tensor of vectors; this has: a, b"),
        ({"emb_params": np.ones((2, 768), np.float32)}, "of 768 numbers, for Stable Diffusion 1; this model's have 40"),
        ({"emb_params": np.ones((80, 40), np.float32)}, "80 vectors"),
        ({"emb_params": VECTORS * np.nan}, "NaN or infinity"),
        ({"emb_params": np.ones((2, 40), np.int32)}, "no textual inversion"),
        ({"clip_l": np.ones((2, 768), np.float32), "clip_g": np.ones((2, 1280), np.float32)}, "no textual inversion"),
    ],
)
def test_refusals(both, tensors, message):
    _, model, folder = both
    save_file(tensors, folder / "d.safetensors")
    with pytest.raises(CheckpointError, match=message):
        model.with_embedding(folder / "d.safetensors")


@pytest.mark.parametrize("word", ["", "two words", "a:b", "(x)", "<w>"])
def test_bad_words(both, word):
    _, model, folder = both
    safetensors.write(folder / "e.safetensors", {"<W>": VECTORS}, {})
    model = model.with_embedding(folder / "e.safetensors")
    with pytest.raises(ValueError, match="word: "):
        model.with_embedding(folder / "e.safetensors", word)
