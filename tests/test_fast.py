"""Ways to be faster: DeepCache against loops by hand and against the whole UNet; what goes together, and what not."""

import dataclasses

import jax
import numpy as np
import pytest

import sdjax
from sdjax import fast, guidance, program, recipe
from sdjax.models.config import TINY
from sdjax.models.layers import apply
from sdjax.models.unet import ShallowUNet, UNet

pytestmark = pytest.mark.usefixtures("no_disk_cache")

SIZE = {"height": 24, "width": 32}
STEPS, SCALE = 5, 5.0
INTERVAL = guidance.Options(interval=(0.2, 0.8))
START = np.random.default_rng(0).normal(size=(1, 12, 16, 4)).astype(np.float32)


@pytest.fixture
def make(tiny):
    """The latents of one picture."""

    def make(prompt="a cat", every=2, **options):
        options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "sampler": "euler", "seed": 3, **options}
        options = {"output_type": "latent", "fast": sdjax.Fast(deep_cache=every), **options}
        return sdjax.generate(prompt, model=tiny, latents=START, **SIZE, **options)

    return make


@pytest.fixture
def by_hand(tiny):
    """The same by a sampler's own function in float64, the UNet's two parts called one by one."""
    config, params = tiny.config.unet, tiny.params["unet"]
    whole = jax.jit(lambda *a: apply(UNet(config), params, *a, mutable=["deep"]))
    shallow = jax.jit(lambda *a: apply(ShallowUNet(config), params, *a))

    def by_hand(every, sampler="euler"):
        kept, calls = {}, 0

        def output(x, time, text):
            context = tiny.encode_text(tiny.tokenizer([text]))
            if calls % every:
                return np.asarray(shallow(x, time, context, kept[text]), np.float64)
            m, found = whole(x, time, context)
            kept[text] = found["deep"]["entering"][0]
            return np.asarray(m, np.float64)

        class Machine:
            def evaluate(self, x_in, call):
                nonlocal calls
                x, time = np.asarray(x_in, np.float32), np.full(1, call.time, np.float32)
                u = output(x, time, "")
                m = u + SCALE * (output(x, time, "a cat") - u)
                calls += 1
                return m, m

            def normal(self, row, span):
                raise AssertionError("these samplers draw none")

            def end_step(self, x, row, blend):
                return x

        own = tiny.sampler(sampler)
        return own.run(Machine(), START * float(own.rows(STEPS).start_noise), STEPS)[1]

    return by_hand


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_loop_by_hand_is_the_program_s(make, by_hand, sampler):
    """Heun's steps are of two calls, and it is calls that count."""
    found, expected = make(sampler=sampler), by_hand(2, sampler)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    exact = make(sampler=sampler, every=None)
    assert np.abs(found - exact).max() > 1e-3 * np.abs(exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [(32,), (32, 64), (32, 48, 64)])
def test_with_what_its_own_call_hands_up_it_is_the_whole(live, channels):
    levels = len(channels)
    sizes = {"channels": channels, "num_heads": (4,) * levels, "attention_levels": (True,) * levels}
    config = dataclasses.replace(TINY.unet, **sizes)
    params = live(dataclasses.replace(TINY, unet=config))["unet"]
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 13, 19, 4), (2, 77, 40)))
    arguments = (x, np.array([3.0, 700.0], np.float32), context)
    output, found = apply(UNet(config), params, *arguments, mutable=["deep"])
    deep = found["deep"]["entering"][0]
    same = apply(ShallowUNet(config), params, *arguments, deep)
    np.testing.assert_allclose(same, output, atol=1e-5 * float(np.abs(output).max()))


@pytest.mark.slow
def test_both_drivers_give_the_same_and_the_recipe_says_it(make):
    pictures = make(output_type="pil", every=3)
    assert np.array_equal(pictures[0], make(output_type="pil", every=3, callback=lambda *_: None)[0])
    assert recipe.from_json(pictures[0].info[recipe.KEY]).fast == {"deep_cache": 3}
    assert recipe.from_json(make(output_type="pil", every=None)[0].info[recipe.KEY]).fast == {}


@pytest.mark.slow
def test_a_run_of_whole_calls_is_the_exact_one(make):
    exact = make(every=None, num_inference_steps=1)
    np.testing.assert_allclose(make(every=2, num_inference_steps=1), exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.slow
def test_with_an_interval_and_perturbed_attention(make):
    """Where guidance begins the whole UNet runs: whole calls all the way are the exact run."""
    options = {"guidance": guidance.Options(interval=(0.2, 0.6), perturbed=1.0)}
    exact, found = make(every=None, **options), make(every=2, **options)
    assert np.isfinite(found).all()
    assert np.abs(found - exact).max() > 1e-3
    # Guided steps 1 and 3 alternate with unguided ones, if each stretch is one step: all calls are whole.
    options = {"guidance": guidance.Options(interval=(0.5, 0.9)), "num_inference_steps": 2}
    exact = make(every=None, **options)
    np.testing.assert_allclose(make(every=2, **options), exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.slow
def test_another_interval_compiles_nothing(make):
    make(every=2)
    size = program.run_scanned.jitted._cache_size()
    make(every=3)
    assert program.run_scanned.jitted._cache_size() == size


def test_which_calls_are_whole():
    assert fast.whole_calls(3, None, 7).tolist() == [True, False, False, True, False, False, True]
    within = np.array([False, True, True, True, True, False, False])
    assert fast.whole_calls(3, within, 7).tolist() == [True, True, False, False, True, True, False]


def test_which_calls_are_settled():
    """By the steps that a run makes, which need not begin with 0; rows that fill up are none."""
    step = np.array([4, 4, 5, 5, 6, 6, 7, 7, 0, 0])
    assert fast.settled_calls(0.5, step).tolist() == [False] * 4 + [True] * 4 + [False] * 2
    assert fast.settled_calls(1e-3, step).tolist() == [False] * 2 + [True] * 6 + [False] * 2
    assert not fast.settled_calls(1.0, step).any()


@pytest.mark.slow
def test_behind_no_gate_and_with_nothing_merged_it_is_the_exact_run(make):
    exact = make(every=None)
    for way in (sdjax.Fast(gate=1.0), sdjax.Fast(merge=0.001)):
        np.testing.assert_allclose(make(fast=way), exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.slow
def test_another_gate_compiles_nothing(make):
    make(fast=sdjax.Fast(gate=0.4))
    size = program.run_scanned.jitted._cache_size()
    make(fast=sdjax.Fast(gate=0.6))
    assert program.run_scanned.jitted._cache_size() == size


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("perturbed", [None, 1.0])
def test_all_ways_together(make, scale, perturbed):
    """Each changes the picture, with guidance and without it, and both drivers agree."""
    options = {"guidance_scale": scale, "guidance": guidance.Options(perturbed=perturbed)}
    every = {"deep_cache": 2, "gate": 0.4, "merge": 0.5}
    found = make(fast=sdjax.Fast(**every), **options)
    assert np.isfinite(found).all()
    stepwise = make(fast=sdjax.Fast(**every), callback=lambda *_: None, **options)
    np.testing.assert_allclose(stepwise, found, atol=1e-5 * np.abs(found).max())
    for left_out in every:
        others = {name: value for name, value in every.items() if name != left_out}
        assert np.abs(make(fast=sdjax.Fast(**others), **options) - found).max() > 1e-4, left_out


@pytest.mark.slow
def test_what_is_remembered_is_each_picture_s_own(tiny):
    """A picture of a batch is what it is alone."""
    common = {"model": tiny, "num_inference_steps": 3, "sampler": "euler", "output_type": "latent", **SIZE}
    common["fast"] = sdjax.Fast(deep_cache=2, gate=0.4, merge=0.5)
    both = sdjax.generate(["a cat", "a dog"], seed=[5, 9], **common)
    alone = sdjax.generate("a dog", seed=9, **common)
    np.testing.assert_allclose(both[1], alone[0], atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize("wrong", [1, 0, 2.5, True, "3"])
def test_refusals(wrong):
    with pytest.raises(ValueError, match=r"fast\.deep_cache: expected a whole number from 2 to 1000, or None"):
        sdjax.Fast(deep_cache=wrong)


@pytest.mark.parametrize(("name", "most"), [("gate", "1"), ("merge", r"0\.75")])
@pytest.mark.parametrize("wrong", [0.0, 1.1, True, "0.5", float("nan")])
def test_refused_shares(name, most, wrong):
    with pytest.raises(ValueError, match=rf"fast\.{name}: expected a number from 0\.001 to {most}, or None"):
        sdjax.Fast(**{name: wrong})


def test_what_does_not_go_together(make, tiny):
    for match, options in (
        ("fast.gate: it says where guidance ends", {"fast": sdjax.Fast(gate=0.4), "guidance": INTERVAL}),
        ("fast.gate: behind it one prompt", {"fast": sdjax.Fast(gate=0.4), "prompt": "a cat AND a dog"}),
        ("fast.tiny_vae: the model has no TAESD", {"fast": sdjax.Fast(tiny_vae=True)}),
    ):
        with pytest.raises(ValueError, match=match):
            make(**options)
    with pytest.raises(ValueError, match=r"fast\.merge: 2 x 2 pixels are too few"):
        sdjax.generate("a", model=tiny, height=2, width=2, fast=sdjax.Fast(merge=0.5))
    with pytest.raises(ValueError, match=r"fast\.tiny_vae: expected True or False"):
        sdjax.Fast(tiny_vae=1)
