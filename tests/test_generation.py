"""generate() on a tiny model: what is asked for comes back, the same whichever way it is computed."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax import guidance, images, noise, plan, program, recipe, samplers

pytestmark = pytest.mark.usefixtures("no_disk_cache")

SMALL = {"height": 24, "width": 32, "num_inference_steps": 4}


@pytest.fixture
def make(tiny):
    """generate() with the tiny model; small and as arrays unless told otherwise."""

    def make(prompt="a cat", **options):
        return sdjax.generate(prompt, model=tiny, **{"seed": 1, "output_type": "np", **SMALL, **options})

    return make


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((24, 32), bool)
    mask[5:14, 9:20] = True
    return mask


def largest(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.slow
def test_forms_of_the_result(make):
    array = make(["a cat", "a dog"])
    assert array.shape == (2, 24, 32, 3)
    assert array.dtype == np.uint8
    assert largest(array[0], array[1]) > 10
    pictures = make(["a cat", "a dog"], output_type="pil")
    assert [np.array_equal(p, a) for p, a in zip(pictures, array, strict=True)] == [True, True]
    latents = make(output_type="latent")
    assert latents.shape == (1, 12, 16, 4)
    assert latents.dtype == np.float32


@pytest.mark.slow
def test_latents_are_those_the_pictures_are_decoded_from(make, tiny):
    latents = make(output_type="latent")
    decoded = tiny.decode_latents(latents / tiny.config.vae.scaling_factor)
    pixels = np.clip(np.rint(np.asarray(decoded) * 127.5 + 127.5), 0, 255)
    assert largest(make(), pixels) <= 1


@pytest.mark.slow
def test_prompts_times_pictures_of_each(make):
    many = make(["a cat", "a dog"], num_images_per_prompt=2, batch_size=2)
    assert len(many) == 4
    assert largest(many[1], make("a cat", seed=2)[0]) <= 1
    assert largest(many[2], make("a dog", seed=3)[0]) <= 1


def test_a_picture_is_its_seeds_alone(make):
    alone = make(seed=7)[0]
    assert largest(alone, make(["a cat"] * 3, seed=5, batch_size=2)[2]) <= 1
    assert largest(alone, make(["a dog", "a cat"], seed=[1, 7])[1]) <= 1
    assert largest(alone, make(seed=7 + 2**32)[0]) > 10


def test_chunks_of_one_shape(make):
    prompts = ["a", "b", "c"]
    chunks = make(prompts, batch_size=2)
    assert len(chunks) == 3
    assert largest(make(prompts, batch_size=1), chunks) <= 1


def test_stepwise_gives_the_same(make):
    seen = []
    stepwise = make(callback=lambda step, total, latents: seen.append((step, total, latents.shape)))
    assert np.array_equal(stepwise, make())
    assert seen == [(step, 4, (1, 12, 16, 4)) for step in (1, 2, 3, 4)]


def test_progress_bar(make, capsys):
    assert np.array_equal(make(progress=True), make())
    assert "4/4" in capsys.readouterr().err


def test_callback_stops(make):
    steps = []

    def stop(step, total, latents):
        steps.append(step)
        return len(steps) != 6

    pictures = make(["a", "b", "c"], batch_size=1, callback=stop)
    assert steps == [1, 2, 3, 4, 1, 2]
    assert len(pictures) == 1
    assert np.array_equal(pictures[0], make("a")[0])
    assert make(callback=lambda *_: False).shape == (0, 24, 32, 3)


def test_interrupt_keeps_what_is_finished(make):
    def interrupt(step, total, latents):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt

    calls = 0
    assert len(make(["a", "b", "c"], batch_size=1, callback=interrupt)) == 1
    calls = 5
    with pytest.raises(KeyboardInterrupt):
        make(callback=interrupt)


@pytest.mark.slow
def test_guidance_matters_and_one_is_none_at_all(make):
    plain = make(guidance_scale=1.0)
    assert largest(plain, make(guidance_scale=5.0)) > 3
    assert largest(plain, make(negative_prompt="ignored", guidance_scale=0.5)) == 0
    # Guided by 1 for some steps and 2 for none: the two-evaluation program at scale 1 gives the conditional output.
    assert largest(plain, make(guidance_scale=[1.0, 1.0, 1.0, 1.0 + 1e-6])) <= 1


def test_negative_prompt_matters(make):
    assert largest(make(), make(negative_prompt="a dog")) > 3


def test_negative_equal_to_the_prompt_is_no_guidance(make):
    assert largest(make(negative_prompt="a cat", guidance_scale=9.0), make(guidance_scale=1.0)) <= 1


@pytest.mark.slow
def test_rescale_and_clip_skip_matter(make):
    assert largest(make(), make(guidance=guidance.Options(rescale=0.7))) > 0
    assert largest(make(), make(clip_skip=1)) > 3


@pytest.mark.slow
def test_given_start_noise(make, tiny):
    seed = jax.numpy.asarray(np.array([[0, 1]], np.uint32))
    normal = np.asarray(noise.normal(seed, noise.START, 0, (12, 16, 4)))
    assert np.array_equal(make(sampler="ddim", latents=normal), make(sampler="ddim"))
    assert largest(make(sampler="ddim", latents=-normal), make(sampler="ddim")) > 10


def test_any_multiple_of_the_factor(make):
    # 26 x 38 pixels are latents of 13 x 19, whose halves are odd.
    assert make(height=26, width=38).shape == (1, 26, 38, 3)


def test_image_to_image(make, photo):
    weak, strong = (make(image=photo, strength=s, num_inference_steps=20)[0] for s in (0.05, 0.95))
    nothing = make(image=photo, strength=0.05, num_inference_steps=20, prompt="another")[0]
    assert largest(weak, strong) > 10
    assert np.abs(weak.astype(int) - nothing).mean() < np.abs(weak.astype(int) - strong).mean()


@pytest.mark.slow
def test_one_image_for_all_and_one_each(make, photo):
    both = make(["a cat", "a dog"], image=[photo, photo[::-1].copy()])
    assert largest(both[0], make("a cat", image=photo)[0]) <= 1
    assert largest(both[1], make("a dog", image=photo[::-1].copy(), seed=2)[0]) <= 1
    assert largest(make(["a cat", "a dog"], image=photo)[1], make("a dog", image=photo, seed=2)[0]) <= 1


def test_inpainting_leaves_the_rest_to_the_bit(make, photo, mask):
    picture = make(image=photo, mask_image=mask)[0]
    assert np.array_equal(picture[~mask], photo[~mask])
    assert (picture[mask] != photo[mask]).mean() > 0.5
    soft = make(image=photo, mask_image=mask, mask_blur=2)[0]
    reach = np.zeros_like(mask)
    reach[0:22, 1:28] = True
    assert np.array_equal(soft[~reach], photo[~reach])
    assert not np.array_equal(soft[~mask], photo[~mask])


def test_inpainting_knows_the_surroundings_at_all_levels(make, photo, mask):
    """At strength 1 the masked part's own content hardly matters, its surroundings do."""
    hidden = photo.copy()
    hidden[6:13, 10:19] = 0  # within the mask, but its latents see a pixel or two across the border
    other = 255 - photo
    picture, same, changed = (make(image=p, mask_image=mask)[0][mask].astype(int) for p in (photo, hidden, other))
    assert np.abs(picture - same).mean() < np.abs(picture - changed).mean()


def test_empty_mask_returns_the_picture(make, photo):
    assert np.array_equal(make(image=photo, mask_image=np.zeros((24, 32), bool))[0], photo)


def test_only_the_masked_part(make, photo, mask):
    big = np.kron(photo, np.ones((4, 4, 1), np.uint8))
    big_mask = np.kron(mask, np.ones((4, 4), bool)).astype(bool)
    options = {"image": big, "mask_image": big_mask, "padding_mask_crop": 8, "output_type": "pil"}
    picture = np.asarray(make(**options)[0])
    assert picture.shape == big.shape
    assert np.array_equal(picture[~big_mask], big[~big_mask])
    assert (picture[big_mask] != big[big_mask]).mean() > 0.5


@pytest.mark.slow
def test_the_edge_of_the_masked_part_is_blended_once(make, monkeypatch):
    """As diffusers' `apply_overlay` does it: where the mask is grey, so much of what was made."""
    monkeypatch.setattr(program, "decode", lambda job, _, latents: jnp.ones((len(latents), *job.output_shape)))
    black = Image.new("RGB", (128, 96))
    mask = Image.new("L", (128, 96))
    mask.paste(255, (40, 30, 90, 70))
    # Of a size that no other test has, since programs are kept.
    options = {"padding_mask_crop": 4, "mask_blur": 6, "output_type": "pil", "height": 20, "width": 28}
    picture = np.asarray(make(image=black, mask_image=mask, **options)[0])
    np.testing.assert_array_equal(picture, np.asarray(images.blur_mask(mask, 6))[..., None].repeat(3, -1))


@pytest.mark.parametrize("options", [{}, {"mask_image": True}, {"mask_image": True, "padding_mask_crop": 4}])
def test_a_picture_keeps_its_colour_profile(tiny, photo, mask, options):
    source = Image.fromarray(photo)
    source.info["icc_profile"] = b"a profile"
    options = options | ({"mask_image": mask} if "mask_image" in options else {})
    bound = inspect.signature(sdjax.generate).bind("a cat", model=tiny, image=source, **SMALL, **options)
    bound.apply_defaults()
    made = plan.plan(**bound.arguments).picture(photo, 0)
    assert made.info["icc_profile"] == b"a profile"
    assert set(made.info) == {"icc_profile", recipe.KEY, recipe.PARAMETERS}


def test_recipe_is_in_every_picture(make, photo, mask):
    picture = make(["a cat", "a dog"], image=photo, mask_image=mask, output_type="pil", sampler="euler")[1]
    written = recipe.from_json(picture.info[recipe.KEY])
    assert (written.prompt, written.seed, written.index, written.batch) == ("a dog", 2, 1, 2)
    assert (written.sampler, written.task, written.strength) == ("euler", "inpaint", 1.0)
    assert written.versions["jax"] == jax.__version__
    assert "Seed: 2" in picture.info["parameters"]
    json.loads(picture.info[recipe.KEY])


def test_nothing_compiles_anew(make, compilations):
    """Other prompts, seeds, steps, strengths, guidance and samplers run the same program; eager operations count."""
    make()
    compilations.clear()
    make("something else entirely", negative_prompt="and a negative", seed=2**63, num_inference_steps=64)
    make(guidance_scale=2, sampler="euler_ancestral")
    make(guidance_scale=[2, 3, 4, 5.5], sampler="ddim", guidance=guidance.Options(rescale=0.3))
    make(sampler=samplers.create("euler", spacing="karras", prediction="v"))
    assert compilations == []
    make(height=32)  # the listener does hear
    assert compilations


def test_strength_compiles_nothing(make, photo):
    make(image=photo, strength=0.5)
    size = program.run_scanned.jitted._cache_size()
    make(image=255 - photo, strength=0.9, num_inference_steps=30, sampler="euler")
    assert program.run_scanned.jitted._cache_size() == size


@pytest.mark.slow
def test_says_that_it_compiles(make, caplog):
    make(height=40)
    assert "compiling" in caplog.text
    caplog.clear()
    make(height=40)
    assert "compiling" not in caplog.text


@pytest.mark.slow
def test_long_prompts_are_not_cut(make):
    words = " ".join(["cat"] * 100)
    assert largest(make(words), make(words + " dog")) > 0
    # A short negative beside it is itself, not itself and an empty window.
    assert largest(make(words, guidance_scale=1.0), make(words, negative_prompt=words, guidance_scale=3.0)) <= 1


@pytest.mark.slow
def test_windows_that_hold_nothing_do_not_count(make):
    words = " ".join(["cat"] * 160)  # three windows; programs are compiled for four
    assert make(words).shape == (1, 24, 32, 3)


@pytest.mark.slow
def test_nan_is_an_error(make, tiny):
    broken = jax.tree.map(lambda x: x, tiny.params)
    broken["vae"]["decoder"]["conv_out"]["bias"] = jax.numpy.full(3, np.nan)
    model = dataclasses.replace(tiny, params=broken)
    with pytest.raises(FloatingPointError, match="picture 0: the VAE's pixels"):
        sdjax.generate("a cat", model=model, seed=1, output_type="np", **SMALL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": 3}, "prompt: expected text"),
        ({"prompt": []}, "prompt: got an empty list"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "prompt has 2, negative_prompt has 3"),
        ({"prompt": "cat " * 700}, "at most 8"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected an integer from 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"strength": 0.5}, "strength: .* there is no image"),
        ({"strength": 0.0, "image": True}, "strength: expected a number above 0"),
        ({"strength": 1.5, "image": True}, "strength: expected a number above 0"),
        ({"strength": 0.1, "image": True}, "leaves no step to run"),
        ({"mask_image": True}, "mask_image: .* there is no image"),
        ({"mask_blur": 2}, "there is none"),
        ({"mask_blur": -1, "image": True, "mask_image": True}, "mask_blur"),
        ({"padding_mask_crop": 2, "image": True}, "there is none"),
        ({"padding_mask_crop": -2, "image": True, "mask_image": True}, "padding_mask_crop"),
        ({"padding_mask_crop": 2, "image": True, "mask_image": True}, 'output_type "pil"'),
        ({"image": "missing.png"}, "no such file"),
        ({"image": 3}, r"image\[0\]"),
        ({"sampler": "nonsense"}, "ddpm.*ddim.*euler"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale: got 2 numbers"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"seed": -1}, "seed: expected 0"),
        ({"seed": 2**64}, "seed: expected 0"),
        ({"seed": 2**64 - 1, "num_images_per_prompt": 2}, "for picture 1"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 pictures"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"height": 23}, "height: must be a multiple of 2, got 23; nearest: 22 or 24"),
        ({"width": 0}, "width"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"clip_skip": 2}, "clip_skip"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"latents": np.zeros((1, 3, 3, 4))}, r"latents: expected shape \(1, 12, 16, 4\)"),
        ({"latents": np.full((1, 12, 16, 4), np.inf)}, "latents: some numbers"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"height": 2**16, "width": 2**16, "batch_size": 64, "num_images_per_prompt": 64}, "GiB"),
    ],
)
def test_refusals_before_anything_is_compiled(make, photo, mask, options, words):
    stand_in = {"image": photo, "mask_image": mask}
    options = {name: stand_in[name] if value is True else value for name, value in options.items()}
    size = program.run_scanned.jitted._cache_size()
    with pytest.raises(ValueError, match=words):
        make(**options)
    assert program.run_scanned.jitted._cache_size() == size


def test_an_empty_prompt_is_allowed(make):
    assert make("").shape == (1, 24, 32, 3)


def test_a_drawn_seed_is_in_the_recipe(tiny, caplog):
    with caplog.at_level("INFO"):
        picture = sdjax.generate("a cat", model=tiny, **SMALL)[0]
    seed = recipe.from_json(picture.info[recipe.KEY]).seed
    assert str(seed) in caplog.text
    assert np.array_equal(picture, sdjax.generate("a cat", model=tiny, seed=seed, **SMALL)[0])


def test_takes_a_path(tiny_file, make):
    pictures = sdjax.generate("a cat", model=tiny_file, seed=1, output_type="np", **SMALL)
    assert np.array_equal(pictures, make())


@pytest.mark.slow
def test_pictures_of_other_sizes_are_resized(make):
    picture = Image.new("RGBA", (77, 55), (255, 0, 0, 128))
    assert make(image=picture).shape == (1, 24, 32, 3)
    assert make(image=picture, height=None, width=None).shape == (1, 54, 76, 3)


def test_versions_name_the_device():
    assert plan.versions()["platform"] == jax.default_backend()
