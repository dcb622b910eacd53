"""The choice between attention's two ways, and what they lower to; there is no GPU here to run the other on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from torch.nn.functional import scaled_dot_product_attention

from sdjax.models.config import SD1, SD2_BASE, TINY
from sdjax.models.unet import UNet
from sdjax.ops import attention as ops
from sdjax.pipeline import shapes

AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 3)
CALL = "__cudnn$fmha"


class Versions:
    """What jaxlib tells where cuDNN is."""

    @staticmethod
    def cudnn_get_version():
        return 91100


@pytest.fixture
def gpu(monkeypatch):
    """A machine with such a GPU, as far as tracing and lowering can see."""

    def pretend(capability):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(ops, "cuda_capability", lambda: capability)
        monkeypatch.setattr(cudnn, "cuda_versions", Versions)
        at_least = lambda wanted: capability >= tuple(int(part) for part in wanted.split("."))  # noqa: E731
        monkeypatch.setattr(cudnn, "check_compute_capability", at_least)
        same = lambda wanted: capability == tuple(int(part) for part in wanted.split("."))  # noqa: E731
        monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", same)

    return pretend


def arrays(length, keys, heads, size, dtype, masked=False, batch=2):
    def abstract(count):
        return jax.ShapeDtypeStruct((batch, count, heads, size), dtype)

    mask = jax.ShapeDtypeStruct((batch, keys), bool) if masked else None
    return abstract(length), abstract(keys), abstract(keys), mask


def lowered(function, arguments, platform):
    # Anew for each platform and each machine: JAX would give back what it traced before.
    return jax.jit(lambda *a: function(*a)).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_on_this_machine_it_is_blocks():
    assert ops.cuda_capability() is None
    text = lowered(ops.attention, arguments := arrays(4096, 77, 8, 40, jnp.bfloat16), "cpu")
    assert CALL not in text
    assert text == lowered(lambda *a: ops.plain(*a, causal=False), arguments, "cpu")


@pytest.mark.parametrize("capability", [AMPERE, ADA, HOPPER, BLACKWELL])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_choice_is_what_jax_allows(gpu, capability, dtype):
    """Over every size of a head to 264, and lengths of both kinds: chosen exactly where JAX does not raise."""
    gpu(capability)
    for size, (length, keys), masked in itertools.product(
        [4, 10, 40, 128, 136, 256, 264],
        [(4096, 4096), (64, 77), (64, 154), (65, 154)],
        [False, True],
    ):
        *qkv, mask = arrays(length, keys, 2, size, dtype, masked)
        bias = jnp.ones((2, 1, length, keys), bool) if masked else None

        def call(*qkv, bias=bias):
            return jax.nn.dot_product_attention(*qkv, mask=bias, implementation="cudnn").astype(jnp.float32).sum()

        try:
            jax.eval_shape(jax.grad(call) if masked else call, *qkv)  # without a mask it has a gradient of its own
            allowed = True
        except (NotImplementedError, ValueError):
            allowed = False
        chosen = ops.cudnn_takes(qkv[0].shape, qkv[1].shape, dtype, masked, capability)
        assert chosen == allowed, (size, length, keys, masked)
        # And these never raise.
        jax.eval_shape(ops.attention, *qkv, mask)
        jax.eval_shape(jax.grad(lambda *a: ops.attention(*a).astype(jnp.float32).sum(), (0, 1, 2)), *qkv, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_lowered_for_cuda(gpu, masked, causal):
    gpu(HOPPER)
    arguments = arrays(154, 154, 8, 40, jnp.bfloat16, masked)
    text = lowered(lambda *a: ops.attention(*a, causal=causal), arguments, "cuda")
    assert (f"{CALL}ScaleBiasSoftmax" if masked else f"{CALL}Softmax") in text
    assert ("CAUSAL" in text) == causal


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_other_platforms_get_blocks_on_a_machine_with_a_gpu(gpu, platform):
    gpu(HOPPER)
    arguments = arrays(4096, 4096, 8, 40, jnp.bfloat16)
    assert lowered(ops.attention, arguments, "cuda").count(CALL) == 1
    assert CALL not in lowered(ops.attention, arguments, platform)


def test_without_cudnn_it_is_blocks(gpu, monkeypatch, caplog):
    gpu(HOPPER)
    monkeypatch.setattr(cudnn, "cuda_versions", None)
    arguments = arrays(64, 77, 8, 40, jnp.bfloat16)
    assert CALL not in lowered(ops.attention, arguments, "cuda")
    assert "cuDNN is not detected" in caplog.text


@pytest.mark.parametrize(("config", "heads"), [(SD1, 32), (SD2_BASE, 32), (TINY, 12)])
def test_the_unet_on_a_hopper(gpu, config, heads):
    """All its attention is cuDNN's: two in each transformer."""
    gpu(HOPPER)
    text = lowered(unet(config), unet_arguments(config, jnp.bfloat16), "cuda")
    assert text.count(f"{CALL}Softmax") == heads
    assert "stablehlo.while" not in text


def test_the_unet_on_an_ampere(gpu):
    """Heads of 160 are too large there."""
    gpu(AMPERE)
    assert lowered(unet(SD1), unet_arguments(SD1, jnp.bfloat16), "cuda").count(f"{CALL}Softmax") == 20


def test_its_gradient_lowers(gpu):
    """Also that of the attention to 77 tokens, which JAX refuses: it is the blocks'."""
    gpu(HOPPER)
    call = unet(TINY)
    text = lowered(
        jax.grad(lambda params, *rest: call(params, *rest).sum()), unet_arguments(TINY, jnp.bfloat16), "cuda"
    )
    assert f"{CALL}SoftmaxBackward" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_unet_lowers_for_a_tpu(dtype):
    exported = export.export(jax.jit(unet(TINY, dtype)), platforms=["tpu"])(*unet_arguments(TINY, dtype))
    assert exported.platforms == ("tpu",)
    assert CALL not in exported.mlir_module()


def unet(config, dtype="bfloat16"):
    return lambda params, *rest: UNet(config.unet, jnp.dtype(dtype)).apply({"params": params}, *rest)


def unet_arguments(config, dtype):
    sizes, side = config.unet, config.image_size // config.vae.factor
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes(config)["unet"])
    return (
        params,
        jax.ShapeDtypeStruct((2, side, side, sizes.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.float32),
        jax.ShapeDtypeStruct((2, 77, sizes.context_width), jnp.float32),
    )


@pytest.mark.parametrize(("dtype", "most"), [("float32", 5e-6), ("bfloat16", 1e-2)])  # 1.1e-6, 4.7e-3 measured
@pytest.mark.parametrize(("length", "keys"), [(77, 77), (1025, 1025), (1500, 77)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_attention(length, keys, masked, dtype, most):
    """Against PyTorch's in float64, with the gradients; of the largest number of each."""
    rng = np.random.default_rng(0)
    q, k, v, pull = (jnp.asarray(rng.standard_normal((2, n, 3, 40)), dtype) for n in (length, keys, keys, length))
    mask = rng.random((2, keys)) < 0.7 if masked else None
    theirs = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (q, k, v)]
    seen = None if mask is None else torch.tensor(mask)[:, None, None]
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in theirs), attn_mask=seen).transpose(1, 2)
    out.backward(torch.tensor(np.asarray(pull, np.float64)))
    mask = None if mask is None else jnp.asarray(mask)

    @jax.jit
    def differentiated(*qkv):
        found, pull_back = jax.vjp(lambda *qkv: ops.attention(*qkv, mask), *qkv)
        return found, *pull_back(pull)

    found = [jax.jit(ops.attention)(q, k, v, mask), *differentiated(q, k, v)]
    pairs = zip(found, [out.detach(), out.detach(), *[x.grad for x in theirs]], strict=True)
    for ours, expected in pairs:
        assert ours.dtype == dtype
        expected = expected.numpy()
        assert np.abs(np.asarray(ours, np.float64) - expected).max() / np.abs(expected).max() < most


def test_scores_are_never_whole():
    """Nor with a gradient: it takes less memory than the scores of one head in float32 would."""
    arguments = arrays(4096, 4096, 4, 8, jnp.bfloat16, batch=1)

    def memory(function):
        return jax.jit(function).lower(*arguments[:3]).compile().memory_analysis().temp_size_in_bytes

    def loss(*qkv):
        return ops.attention(*qkv).astype(jnp.float32).sum()

    assert memory(ops.attention) < 4096 * 4096 * 4
    assert memory(jax.grad(loss, (0, 1, 2))) < 4096 * 4096 * 4
