"""jit, vmap and grad over sampling: a grid of samplers in one call, gradients in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import noise, samplers

from .oracle import NAMES, SHAPE, assert_close, draws, jax_model

X, NOISES = (array.astype(np.float32) for array in draws(64))
# Restart's runs are longer, and the way back ends elsewhere.
GRID = [samplers.create(name).rows(7) for name in NAMES if name not in ("restart", "ddim_inverse")]


def run(rows, x=X):
    return samplers.sample(jax_model, x, rows, noise=NOISES[: len(rows)])


def test_a_grid_of_samplers():
    """Each as alone, though shorter tables are filled up."""
    together = jax.jit(jax.vmap(run, in_axes=(samplers.STACKED,)))(samplers.stack(GRID))
    assert together.shape == (len(GRID), *SHAPE)
    alone = jax.jit(run)
    for rows, picture in zip(GRID, together, strict=True):
        assert_close(picture, np.asarray(alone(rows.padded(64)), np.float64), 1e-5)


def primitives(jaxpr, name):
    """How often a primitive occurs, in inner ones too."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == name
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    count += primitives(inner, name)
    return count


def test_a_grid_is_one_batched_call_of_the_model():
    """The condition stays one, and what the model computes is there once, for all samplers."""
    jaxpr = jax.make_jaxpr(jax.vmap(run, in_axes=(samplers.STACKED,)))(samplers.stack(GRID)).jaxpr
    assert primitives(jaxpr, "cond") == 1
    assert primitives(jaxpr, "sin") == 1  # the model's
    assert str(jaxpr).count(f"f32[{len(GRID)},{','.join(map(str, SHAPE))}] = sin") == 1


def test_seeds_and_scales():
    """Of what a program takes besides, too: starts, and factors of the model's output."""
    rows = samplers.create("dpmpp_2m").rows(5)
    starts, scales = np.stack([X, -X, 2 * X]), np.array([0.5, 1.0, 2.0], np.float32)

    def scaled(x, scale):
        return samplers.sample(lambda x, t: scale * jax_model(x, t), x, rows)

    grid = jax.jit(jax.vmap(jax.vmap(scaled, (None, 0)), (0, None)))(starts, scales)
    assert grid.shape == (3, 3, *SHAPE)
    alone = jax.jit(scaled)
    for i in range(3):
        for j in range(3):
            assert_close(grid[i, j], np.asarray(alone(starts[i], scales[j]), np.float64), 1e-5)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_3m", "unipc"])
def test_gradient_by_the_start(name):
    rows = samplers.create(name).rows(5).padded(64)
    direction = draws(1, seed=5)[0].astype(np.float32)
    loss = jax.jit(lambda x: jnp.mean(jnp.square(run(rows, x))))
    slope = float((jax.jit(jax.grad(loss))(X) * direction).sum())

    def difference(h):
        return float(loss(X + np.float32(h) * direction) - loss(X - np.float32(h) * direction)) / (2 * h)

    np.testing.assert_allclose((4 * difference(2e-3) - difference(4e-3)) / 3, slope, rtol=1e-2)


def test_memory_of_a_gradient():
    """Registers times rows, and the model's own memory once."""

    def wide(x, t):  # a model that holds 64 times its input
        hidden = jnp.sin(jnp.repeat(x, 64, -1) * jnp.linspace(0, 4, 64 * SHAPE[-1]).reshape(1, 1, 1, -1))
        return 0.1 * hidden.reshape(*x.shape, 64).mean(-1)

    words = noise.seed_words([1, 2])

    def memory(count):
        rows = samplers.create("euler").rows(count)
        loss = jax.jit(jax.grad(lambda x, rows: samplers.sample(wide, x, rows, key=words).sum()))
        return loss.lower(X, rows).compile().memory_analysis().temp_size_in_bytes

    few, many = memory(8), memory(64)
    one_more_row = (many - few) / 56
    registers = X.nbytes * samplers.REGISTERS
    assert registers <= one_more_row < 2 * registers  # and not 64 times the latents


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_bfloat16(name):
    """The table and the latents are float32 whatever the model computes in: all stays finite, and close."""
    rows = samplers.create(name).rows(7).padded(64)

    def rough(x, t):
        return jax_model(x.astype(jnp.bfloat16).astype(jnp.float32), t).astype(jnp.bfloat16)

    found = coarse(rough, rows)
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()
    exact = np.asarray(coarse(jax_model, rows))
    assert np.abs(found - exact).max() < 0.2 * np.abs(exact).max()


coarse = jax.jit(lambda model, rows: samplers.sample(model, X, rows, noise=NOISES), static_argnums=0)
