"""Approximations against the same made of others' parts: tomesd's merging; diffusers' UNet, its attention replaced."""

import jax
import numpy as np
import pytest
import tomesd
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0

import sdjax
from sdjax.models import merged
from sdjax.models.layers import apply
from sdjax.models.unet import UNet

from .test_pipeline import GUIDANCE, TOLERANCE, both, torch_of

PROMPT, STEPS = "a cat", 5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return both(4, tmp_path_factory.mktemp("model"))


@pytest.fixture
def top_left(monkeypatch):
    """The tokens that others are merged into are not drawn."""
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, *_: jax.numpy.zeros(shape, int))


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (2, 2)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_merging_is_tomesd_s(size, share, top_left):
    height, width = size
    count = int(share * height * width)
    x = np.random.default_rng(0).normal(size=(3, height * width, 10)).astype(np.float32)
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        torch.from_numpy(x), width, height, 2, 2, count, no_rand=True
    )
    expected = merge(torch.from_numpy(x)) if count else torch.from_numpy(x)
    targets = (height // 2) * (width // 2)
    order = merged._order(size, jax.random.key(0))
    matching = merged.match(jax.numpy.asarray(x), order, targets, count)
    found = merged.merge(jax.numpy.asarray(x), matching)
    assert found.shape[1] == expected.shape[1]
    assert matching.merged.shape[1] == min(count, height * width - targets)
    # In which order the remaining tokens are is nobody's business, since attention does not see it.
    again = unmerge(expected) if count else expected
    np.testing.assert_allclose(merged.split(found, matching), again, atol=1e-6)


@pytest.mark.slow
def test_a_unet_with_merged_tokens_is_tomesd_s(models, top_left):
    parts, model = models
    rng = np.random.default_rng(1)
    x, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 9, 12, 4), (2, 77, 40)))
    time = np.array([3.0, 700.0], np.float32)
    unet = parts["unet"]

    def theirs():
        with torch.no_grad():
            given = torch_of(x), torch.from_numpy(time), torch.from_numpy(context)
            return np.moveaxis(unet(*given).sample.numpy(), 1, -1)

    exact = theirs()
    tomesd.apply_patch(unet, ratio=0.5, max_downsample=1, use_rand=False)
    try:
        expected = theirs()
    finally:
        tomesd.remove_patch(unet)
    with merged.merged_attention(0.5, (9, 12), jax.random.key(0)):
        found = apply(UNet(model.config.unet), model.params["unet"], x, time, context)
    largest = np.abs(expected).max()
    assert np.abs(expected - exact).max() > 1e-3 * largest
    assert np.abs(found - expected).max() < TOLERANCE * largest


class Gated:
    """Cross-attention that gives, once settled, the mean of what it gave last for both halves of the batch."""

    def __init__(self):
        self.plain, self.settled, self.kept = AttnProcessor2_0(), False, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if self.settled:
            return self.kept
        found = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        self.kept = sum(found.chunk(2)) / 2
        return found


@pytest.mark.slow
def test_a_gated_run_by_diffusers_parts(models):
    parts, model = models
    unet, gate = parts["unet"], 0.4
    start = np.random.default_rng(0).normal(size=(1, 12, 16, 4)).astype(np.float32)
    schedule = DDIMScheduler.from_config(parts["scheduler"].config, set_alpha_to_one=False)
    schedule.set_timesteps(STEPS)
    with torch.no_grad():
        tokens = torch.from_numpy(model.tokenizer(["", PROMPT])).long()
        context = parts["text_encoder"](tokens).last_hidden_state
        processors = {name: Gated() if "attn2" in name else AttnProcessor2_0() for name in unet.attn_processors}
        plain = unet.attn_processors
        unet.set_attn_processor(dict(processors))
        x = torch_of(start)
        for i, time in enumerate(schedule.timesteps):
            if i / STEPS < gate:
                u, c = unet(torch.cat([x, x]), time, context).sample.chunk(2)
                m = u + GUIDANCE * (c - u)
            else:
                for each in processors.values():
                    each.settled = True
                m = unet(x, time, context[1:]).sample
            x = schedule.step(m, time, x).prev_sample
        unet.set_attn_processor(plain)
    expected = np.moveaxis(x.numpy(), 1, -1)

    def ours(**options):
        return sdjax.generate(
            PROMPT, model=model, latents=start, height=24, width=32, num_inference_steps=STEPS, seed=0,
            guidance_scale=GUIDANCE, sampler="ddim", output_type="latent", **options,
        )  # fmt: skip

    found, exact = ours(fast=sdjax.Fast(gate=gate)), ours()
    assert np.abs(found - exact).max() > 1e-3 * np.abs(exact).max()
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()
