"""What is computed in other ways than it is written, most of it on a CPU, against PyTorch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from sdjax.models import layers, prepared
from sdjax.models.layers import apply
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.ops import attention, convolution, winograd

SIZES = [(8, 8), (7, 9), (5, 1), (17, 30)]
# Of the largest value, in each dtype, for small tiles and large ones.
ERRORS = {("float32", 2): 1e-6, ("float32", 4): 3e-6, ("bfloat16", 2): 1e-2}


BIAS = np.linspace(-2, 2, 24, dtype=np.float32)


def wide(x):
    return np.array(x.astype(jnp.float32))


def picture(size, channels=24):
    return np.random.default_rng(0).standard_normal((2, *size, channels), np.float32)


def kernel(inputs=24, features=20):
    return np.random.default_rng(1).standard_normal((3, 3, inputs, features), np.float32)


def by_torch(x, kernel, doubled=None):
    """In float64."""
    x = torch.from_numpy(x).double().permute(0, 3, 1, 2)
    if doubled is not None:
        x = functional.interpolate(x, doubled)
    return functional.conv2d(x, torch.from_numpy(kernel).double().permute(3, 2, 0, 1), padding=1).permute(0, 2, 3, 1)


def error(found, expected):
    expected = expected.numpy()
    assert found.shape == expected.shape
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.fixture(params=[1, 3000, 20000], ids=["rows", "strips", "large strips"])
def strips(request, monkeypatch):
    """As many as there are rows of tiles, and fewer, the last of them not full."""
    monkeypatch.setattr(winograd, "STRIP", dict.fromkeys(winograd.STRIP, request.param))
    monkeypatch.setattr(winograd, "TILES", 1)


def check_convolution(size, dtype, m, features=20):
    weights, x = kernel(features=features), jnp.asarray(picture(size), dtype)
    found = jax.jit(lambda *a: winograd.convolution(*a))(x, winograd.prepare(weights, m, dtype), BIAS[:features])
    assert found.dtype == dtype
    assert error(found, by_torch(wide(x), weights) + BIAS[:features]) < ERRORS[dtype, m]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "m"), ERRORS)
def test_convolution(size, dtype, m):
    check_convolution(size, dtype, m)


@pytest.mark.parametrize("size", [*SIZES, (31, 30)])
def test_in_strips(strips, size):
    check_convolution(size, "float32", 4)


@pytest.mark.parametrize(("dtype", "m"), ERRORS)
@pytest.mark.parametrize("features", [20, 24], ids=["", "in place"])
def test_in_strips_of_every_kind(strips, dtype, m, features):
    check_convolution((17, 31), dtype, m, features)


@pytest.mark.parametrize("size", [(8, 7)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (0, 1))])
@pytest.mark.parametrize("strip", [2**21, 2000, 1])
@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e-6), ("bfloat16", 4e-3)])  # half a last place is 2e-3
def test_one_product(size, stride, padding, strip, dtype, largest, monkeypatch):
    """What a CPU gets, whole and in strips, against PyTorch in float64 on the same rounded numbers."""
    monkeypatch.setattr(convolution, "CHANNELS", 1)
    monkeypatch.setattr(convolution, "STRIP", strip)
    x, own = (jnp.asarray(array, dtype) for array in (picture(size), kernel()))
    theirs = [torch.from_numpy(np.array(array, np.float64)) for array in (x, own)]
    padded = functional.pad(theirs[0].permute(0, 3, 1, 2), (*padding[1], *padding[0]))
    expected = functional.conv2d(padded, theirs[1].permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1)
    found = jax.jit(lambda x, own: convolution.convolution(x, own, stride, padding))(x, own)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert error(np.asarray(found, np.float64), expected) < largest


@pytest.mark.slow
def test_a_unet_in_blocks_of_tokens(tiny, monkeypatch):
    """Feed-forward layers of some tokens at a time, the last block not full; and their gradient."""
    rng = np.random.default_rng(0)
    config = tiny.config.unet
    latents = rng.standard_normal((2, 7, 11, config.in_channels), np.float32)
    arguments = np.array([3.0, 700.0], np.float32), rng.standard_normal((2, 77, config.context_width), np.float32)

    def run(tokens):
        monkeypatch.setattr(layers, "TOKENS", tokens)
        return jax.value_and_grad(lambda x: jnp.sin(apply(UNet(config), tiny.params["unet"], x, *arguments)).sum())(
            latents
        )

    whole, parts = run(2 * 7 * 11), run(50)
    for found, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("size", [(7, 8), (5, 1)])
@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolution_of_a_doubled_map(size, cut, dtype):
    check_doubled(size, (2 * size[0] - cut[0], 2 * size[1] - cut[1]), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolution_of_a_doubled_map_in_strips(strips, dtype):
    check_doubled((17, 30), (34, 60), dtype)


def check_doubled(size, doubled, dtype):
    x, own = jnp.asarray(picture(size), dtype), winograd.prepare_upsampled(kernel(), dtype)
    found = jax.jit(lambda *a: winograd.upsampled(*a, doubled))(x, own, BIAS[:20])
    assert found.dtype == dtype
    assert error(found, by_torch(wide(x), kernel(), doubled) + BIAS[:20]) < ERRORS[dtype, 2]


@pytest.mark.parametrize("way", ["small", "large", "doubled", "product"])
def test_gradients_are_the_convolutions(monkeypatch, way):
    """By the map, by what its products are with, and by the bias; and of the map alone. All in strips."""
    monkeypatch.setattr(winograd, "STRIP", dict.fromkeys(winograd.STRIP, 1))
    monkeypatch.setattr(winograd, "TILES", 1)
    x, weights = picture((6, 7)), kernel(4, 5)[:, :, :, :5]
    x, bias = x[..., :4], BIAS[:5]
    if way == "product":
        monkeypatch.setattr(convolution, "CHANNELS", 1)
        monkeypatch.setattr(convolution, "STRIP", 1)

    def ours(x, weights, bias):
        if way == "product":
            return convolution.convolution(x, weights, 1, ((1, 1), (1, 1))) + bias.reshape(1, 1, 1, -1)
        if way == "doubled":
            along = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], np.float32)
            own = jnp.einsum("ai,bj,ijIO->abIO", along, along, weights)
            return winograd.upsampled(x, list(own.reshape(9, 4, 5)), bias, (12, 14))
        m = {"small": 2, "large": 4}[way]
        along = winograd.transform(m).kernel.astype(np.float32)
        own = jnp.einsum("ai,bj,ijIO->abIO" if m == 2 else "ai,bj,ijIO->baIO", along, along, weights)
        return winograd.convolution(x, list(own.reshape(-1, 4, 5) if m == 2 else own), bias)

    def theirs(x, weights, bias):
        x = x.permute(0, 3, 1, 2)
        x = functional.interpolate(x, (12, 14)) if way == "doubled" else x
        return functional.conv2d(x, weights.permute(3, 2, 0, 1), bias, padding=1)

    found = jax.jit(jax.grad(lambda *a: jnp.sin(ours(*a)).sum(), (0, 1, 2)))(x, weights, bias)
    alone = jax.jit(jax.grad(lambda x: jnp.sin(ours(x, weights, bias)).sum()))(x)
    given = [torch.from_numpy(array).double().requires_grad_() for array in (x, weights, bias)]
    theirs(*given).sin().sum().backward()
    for each, expected in zip((*found, alone), (*given, given[0]), strict=True):
        assert error(each, expected.grad) < 2e-5


@pytest.fixture
def everything(monkeypatch):
    """Even a tiny model's kernels are transformed."""
    monkeypatch.setattr(prepared, "WIDE", 0)
    monkeypatch.setattr(prepared, "FEWEST_CHANNELS", 1)


@pytest.mark.slow
@pytest.mark.parametrize("large", [0, 640])
def test_the_models_with_them_are_the_models(tiny, everything, monkeypatch, large):
    monkeypatch.setattr(prepared, "MOST_CHANNELS_OF_LARGE_TILES", large)
    params = prepared.prepare(tiny.params, "float32", {})
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert any("upsamplers_0']['conv']['winograd" in name for name in names)
    assert not any("resnets" in name and "conv1']['kernel" in name for name in names)

    rng = np.random.default_rng(0)
    config = tiny.config
    latents = rng.standard_normal((2, 7, 10, config.unet.in_channels), np.float32)
    context = rng.standard_normal((2, 77, config.unet.context_width), np.float32)
    arguments = latents, jnp.array([7.0, 900.0]), context
    plain, fast = (apply(UNet(config.unet), each["unet"], *arguments) for each in (tiny.params, params))
    np.testing.assert_allclose(fast, plain, rtol=0, atol=3e-5 * float(jnp.abs(plain).max()))

    z = rng.standard_normal((1, 6, 5, config.vae.latent_channels), np.float32)
    plain, fast = (apply(VAE(config.vae), each["vae"], z, method="decode") for each in (tiny.params, params))
    np.testing.assert_allclose(fast, plain, rtol=0, atol=3e-5 * float(jnp.abs(plain).max()))


@pytest.mark.slow
def test_transforms_are_made_once(tiny, everything):
    known = {}
    first, second = (prepared.prepare(tiny.params, "float32", known) for _ in range(2))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, first, second)))


def test_shapes_of_what_is_not_made_yet(tiny, everything):
    made, shapes = prepared.prepare(tiny.params, "bfloat16", {}), prepared.prepared_shapes(tiny.params, "bfloat16")
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert kinds(made) == kinds(shapes)
    assert any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))


def test_a_small_model_stays_as_it_is(tiny):
    assert prepared.prepare(tiny.params, "float32", {}) is tiny.params


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(1500, 1500), (1024, 2500), (2100, 77)])
def test_attention_in_blocks(length, keys, masked, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 2, 8), np.float32) for n in (length, keys, keys))
    mask = rng.random((2, keys)) > 0.3 if masked else None
    monkeypatch.setattr(attention, "SCORES", 400 * keys)  # so that there are several, the last one overlapping
    found = attention.attention(*map(jnp.asarray, (q, k, v)), None if mask is None else jnp.asarray(mask))
    theirs = functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).double().transpose(1, 2) for x in (q, k, v)),
        attn_mask=None if mask is None else torch.from_numpy(mask)[:, None, None, :],
    )
    np.testing.assert_allclose(found, theirs.transpose(1, 2).numpy(), atol=1e-6)
