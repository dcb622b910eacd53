"""The decoder in tiles against the whole decode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax import recipe
from sdjax.models import tiled
from sdjax.models.config import TINY, VAEConfig
from sdjax.models.layers import apply
from sdjax.models.vae import VAE

# Four levels, as Stable Diffusion has them, two of one width.
DEEP = VAEConfig(channels=(8, 16, 24, 24), blocks_per_level=2, norm_groups=4)


def both(config, params, z, tile):
    """The whole decode and the tiled one."""
    whole = jax.jit(lambda z: apply(VAE(config), params, z, method="decode"))(z)
    return np.asarray(whole), np.asarray(jax.jit(lambda z: tiled.decode(config, jnp.float32, params, z, tile))(z))


def latents(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "shape", "tile"),
    [(TINY.vae, (2, 21, 16, 4), 16), (DEEP, (1, 19, 16, 4), 64), (TINY.vae, (1, 8, 30, 4), 16)],
)
def test_passes_lead_to_the_whole_decode(live, monkeypatch, config, shape, tile):
    """With a pass for every norm each tile sees all it must and nothing else: what is left is rounding."""
    params = live(dataclasses.replace(TINY, vae=config))["vae"]
    norms = sum(2 * (config.blocks_per_level + 1) for _ in config.channels[1:]) + 1
    monkeypatch.setattr(tiled, "PASSES", norms)
    whole, found = both(config, params, latents(*shape), tile)
    assert found.shape == whole.shape
    # 5e-6 of the largest value was seen; a window one pixel too small gives far more.
    assert np.abs(found - whole).max() < 1e-4 * np.abs(whole).max()


def test_a_tile_as_large_as_the_picture_is_the_whole_decode(live):
    params = live(TINY)["vae"]
    whole, found = both(TINY.vae, params, latents(3, 9, 12, 4), 24)
    np.testing.assert_allclose(found, whole, atol=1e-5 * np.abs(whole).max())


def test_the_reach_of_stable_diffusion():
    assert tiled.reach(VAEConfig()) == 12  # 48 pixels, 6 latents


def test_decode_latents(tiny):
    z = latents(2, 16, 12, 4)
    whole, found = (np.asarray(tiny.decode_latents(z, tile)) for tile in (None, 16))
    assert 0 < np.abs(found - whole).max() < 0.05 * np.abs(whole).max()
    for wrong in (15, 14, 0, -16, 16.0, True):
        with pytest.raises(ValueError, match="tile: expected a multiple of 2 pixels, 16 or more"):
            tiny.decode_latents(z, wrong)


@pytest.mark.slow
def test_generate(tiny, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", "off")

    def make(**options):
        common = {"seed": 1, "height": 24, "width": 32, "num_inference_steps": 2}
        return sdjax.generate(["a cat", "a dog"], model=tiny, **common, **options)

    pictures = make(vae_tile=16)
    assert recipe.from_json(pictures[0].info[recipe.KEY]).vae_tile == 16
    assert recipe.from_json(make()[0].info[recipe.KEY]).vae_tile is None
    stepwise = make(vae_tile=16, callback=lambda *_: None)
    difference = 0.0
    for tile, again, exact in zip(pictures, stepwise, make(), strict=True):
        assert np.array_equal(tile, again)
        difference = max(difference, np.abs(np.asarray(tile, int) - np.asarray(exact, int)).max())
    assert difference <= 2
    with pytest.raises(ValueError, match="vae_tile: expected a multiple of 2 pixels, 16 or more, got 17"):
        make(vae_tile=17)


@pytest.mark.slow
def test_gradients_go_through(live):
    params = live(TINY)["vae"]

    def total(z):
        return jnp.square(tiled.decode(TINY.vae, jnp.float32, params, z, 16)).sum()

    z, along = latents(1, 10, 10, 4), 0.01 * latents(1, 10, 10, 4)[::-1]
    slope = jnp.vdot(jax.jit(jax.grad(total))(z), along)
    f = jax.jit(total)
    np.testing.assert_allclose(slope, (f(z + along) - f(z - along)) / 2, rtol=0.02)
