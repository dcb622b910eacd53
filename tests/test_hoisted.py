"""What the UNet and ControlNets compute ahead of the loop: the same values, and not once more at every step."""

import dataclasses

import jax
import numpy as np
import pytest

import sdjax
from sdjax import guidance, pipeline, program
from sdjax.models import low_rank
from sdjax.models.config import TINY
from sdjax.models.controlnet import ControlNet
from sdjax.models.hoisted import context_projections, known_results, time_projections
from sdjax.models.layers import apply
from sdjax.models.shapes import control_shapes
from sdjax.models.unet import UNet

pytestmark = pytest.mark.usefixtures("no_disk_cache")

HINT = (16, 32)


class Caught(Exception):
    """What the program would have been given."""


@pytest.fixture(scope="module")
def model(tiny):
    """The tiny one with a LoRA beside its keys, and a ControlNet."""
    rng = np.random.default_rng(1)

    def drawn(*shape):
        return rng.normal(size=shape).astype(np.float32) / np.sqrt(max(shape[-1], 1), dtype=np.float32)

    name = "unet.mid_block.attentions_0.transformer_blocks_0.attn2.to_k"
    kernel = tiny.params["unet"]["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_k"]["kernel"]
    changes = {name: (drawn(len(kernel), 3), drawn(3, kernel.shape[1]))}
    params = low_rank.attach(tiny.params, "style", changes, 0.7)
    control = jax.tree.map(lambda leaf: drawn(*leaf.shape), control_shapes(TINY, HINT))
    return dataclasses.replace(tiny, params=params, controls={"lines": pipeline.Net("0" * 64, control)})


def spoilt(params, path=()):
    """The same tree with NaN in everything that is to be computed ahead."""
    if not isinstance(params, dict):
        ahead = path[-3:-1] in [("attn2", "to_k"), ("attn2", "to_v")] or {"time_emb_proj", "time_embedding"} & {*path}
        return np.full_like(params, np.nan) if ahead else params
    return {name: spoilt(child, (*path, name)) for name, child in params.items()}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet", "controls"])
def test_models_give_the_same_with_what_is_known(model, part):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 6, 10, 4)).astype(np.float32)
    states = rng.normal(size=(2, 7, TINY.unet.context_width)).astype(np.float32)
    times = np.full(2, 321.5, np.float32)
    if part == "unet":
        net, params, rest = UNet(TINY.unet), model.params["unet"], []
    else:
        net, params = ControlNet(TINY.unet, HINT), model.controls["lines"].params
        rest = [rng.random((2, 12, 20, 3), np.float32)]
    known = context_projections(params, states, "float32") | time_projections(TINY.unet, params, times[:1], "float32")
    assert {path.split("/")[-1] for path in known} == {"to_k", "to_v", "time_emb_proj"}

    expected = apply(net, params, latents, times, states, *rest)
    with known_results(known):
        found = apply(net, spoilt(params), latents, times, states, *rest)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert abs(np.asarray(theirs)).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * abs(np.asarray(theirs)).max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"guidance_scale": 1.0}, marks=pytest.mark.slow),
        {"prompt": "a [cat:dog:0.5] in the rain", "num_images_per_prompt": 2},
        pytest.param({"prompt": "a cat AND a dog"}, marks=pytest.mark.slow),
        pytest.param({"guidance": guidance.Options(perturbed=1.0, perpendicular=0.5)}, marks=pytest.mark.slow),
        pytest.param(
            {"guidance": guidance.Options(interval=(0.2, 0.6)), "fast": sdjax.Fast(deep_cache=2)},
            marks=pytest.mark.slow,
        ),
        pytest.param({"fast": sdjax.Fast(gate=0.4)}, marks=pytest.mark.slow),
        pytest.param(
            {"controls": {"lines": sdjax.Control(np.full((24, 32, 3), 90, np.uint8))}}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "unguided", "scheduled", "AND", "other guidance", "interval and cache", "gate", "control"],
)
def test_a_step_computes_none_of_it(model, options, monkeypatch):
    def caught(*call):
        raise Caught(*call)

    monkeypatch.setattr(program, "run_stepwise", caught)
    options = {"prompt": "a cat", "output_type": "latent", "height": 24, "width": 32, **options}
    with pytest.raises(Caught) as found:
        sdjax.generate(model=model, num_inference_steps=4, seed=1, callback=lambda *_: None, **options)
    job, params, inputs = found.value.args
    state, conditions = jax.jit(program.start, static_argnums=0)(job, params, inputs)
    step = jax.jit(program.step, static_argnums=0)
    for number in range(4):
        _, expected = step(job, params, inputs, conditions, state, number)
        state, found = step(job, spoilt(params), inputs, conditions, state, number)
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(found, expected)
