"""Norms against PyTorch's: values, gradients, blocks of any number, means far from 0; and what memory they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.ops import normalization
from sdjax.ops.normalization import group_norm, layer_norm

GROUPS = 4


def arrays(shape, dtype="float32", mean=0.0):
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.normal(size=size).astype(np.float32) for size in (shape, shape[-1:], shape[-1:]))
    return jnp.asarray(x * (1 + np.arange(shape[-1], dtype=np.float32)) + mean, dtype), scale, bias


def by_torch(x, scale, bias):
    """In float64, of what x is after rounding."""
    x = torch.tensor(np.asarray(x.astype(jnp.float32)), dtype=torch.float64, requires_grad=True)
    out = torch.nn.functional.group_norm(
        x.movedim(-1, 1), GROUPS, torch.tensor(scale).double(), torch.tensor(bias).double(), 1e-5
    )
    return x, out.movedim(1, -1)


@pytest.mark.parametrize("block", [2**21, 400])
@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (1, 7, 7, 12), (3, 11, 8), (2, 1, 1, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_group_norm_and_its_gradient(monkeypatch, block, shape, dtype):
    monkeypatch.setattr(normalization, "BLOCK", block)
    x, scale, bias = arrays(shape, dtype)
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    norm = functools.partial(group_norm, groups=GROUPS, epsilon=1e-5)
    found, back = jax.vjp(norm, x, scale, bias)
    theirs, expected = by_torch(x, scale, bias)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected.detach(), atol=2e-6 * abs(expected.detach()).max().item())
    expected.backward(torch.tensor(weights).double())
    gradient, by_scale, by_bias = back(weights)
    size = theirs.grad.abs().max().item()
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), theirs.grad, atol=(2e-5 if dtype == "float32" else 1e-2) * size
    )
    normed = (expected.detach() - bias) / scale
    along = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(by_bias, weights.sum(along), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_scale, (weights * np.asarray(normed)).sum(along), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [2**21, 400])
def test_a_mean_far_from_zero_costs_no_digits(monkeypatch, block):
    monkeypatch.setattr(normalization, "BLOCK", block)
    x, scale, bias = arrays((2, 8, 9, 8), mean=1000.0)
    expected = by_torch(x, scale, bias)[1].detach()
    np.testing.assert_allclose(group_norm(x, scale, bias, GROUPS, 1e-5), expected, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's way")
def test_no_float32_copy_of_a_large_bfloat16_map():
    x = jax.ShapeDtypeStruct((1, 256, 256, 128), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((128,), jnp.bfloat16)

    def layer(x, scale):
        return jax.nn.silu(group_norm(x, scale, scale, 32, 1e-6)).astype(jnp.bfloat16)

    memory = jax.jit(layer).lower(x, scale).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.2 * 4 * normalization.BLOCK < 4 * x.size


@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 1, 12)])
def test_layer_norm(shape):
    x, scale, bias = arrays(shape, mean=3.0)
    expected = torch.nn.functional.layer_norm(
        *(torch.tensor(np.asarray(x)), shape[-1:]), *map(torch.tensor, (scale, bias))
    )
    np.testing.assert_allclose(layer_norm(x, scale, bias, 1e-5), expected, atol=1e-5)
