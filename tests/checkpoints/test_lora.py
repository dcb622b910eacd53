"""LoRA files in every spelling, and what is refused. tests/parity/test_lora.py compares with PEFT and diffusers."""

import json

import ml_dtypes
import numpy as np
import pytest

import sdjax
from sdjax.checkpoints import CheckpointError, lora, native, safetensors
from sdjax.models.config import TINY

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY = "unet.down_blocks_0.attentions_0.transformer_blocks_0.attn1.to_q"
OUT = "unet.down_blocks_0.attentions_0.transformer_blocks_0.attn1.to_out_0"
rng = np.random.default_rng(0)
DOWN, UP = rng.normal(size=(3, 32)).astype(np.float32), rng.normal(size=(32, 3)).astype(np.float32)


@pytest.fixture
def read(tmp_path, shapes):
    """(tensors, metadata) -> the changes, through a file."""

    def call(tensors, metadata=None, name="a.safetensors"):
        safetensors.write(tmp_path / name, tensors, metadata or {})
        return lora.read(tmp_path / name, TINY, native.flatten(shapes(TINY)))

    return call


def assert_changes(found, expected):
    assert found.keys() == expected.keys()
    for module, (down, up) in expected.items():
        np.testing.assert_allclose(found[module].down, down, rtol=1e-6)
        np.testing.assert_allclose(found[module].up, up, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "down", "up", "target"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_down", "lora_up", QUERY),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", "lora_down", "lora_up", QUERY),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", "lora_down", "lora_up", OUT),
        (f"unet.{ATTENTION}.to_q", "lora_A", "lora_B", QUERY),
        (f"unet.{ATTENTION}.to_q", "lora_A.default", "lora_B.default", QUERY),
        (f"base_model.model.{ATTENTION}.to_q", "lora_A", "lora_B", QUERY),
        (f"unet.{ATTENTION}.to_out.0", "lora.down", "lora.up", OUT),
        (f"unet.{ATTENTION}.processor", "to_q_lora.down", "to_q_lora.up", QUERY),
        (f"{ATTENTION}.processor", "to_out_lora.down", "to_out_lora.up", OUT),
    ],
)
def test_spellings(read, module, down, up, target):
    assert_changes(read({f"{module}.{down}.weight": DOWN, f"{module}.{up}.weight": UP}), {target: (DOWN.T, UP.T)})


@pytest.mark.parametrize(
    "module",
    [
        "lora_te_text_model_encoder_layers_1_mlp_fc1",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
        "text_encoder.encoder.layers.1.mlp.fc1",
        "base_model.model.text_model.encoder.layers.1.mlp.fc1",
    ],
)
@pytest.mark.parametrize("matrices", [("lora_down", "lora_up"), ("lora_linear_layer.down", "lora_linear_layer.up")])
def test_text_encoders(read, module, matrices):
    down, up = DOWN[:, :1].repeat(40, 1), UP[:1].repeat(96, 0)
    found = read({f"{module}.{matrices[0]}.weight": down, f"{module}.{matrices[1]}.weight": up})
    assert_changes(found, {"text_encoder.encoder.layers_1.mlp.fc1": (down.T, up.T)})


def pair(down=DOWN, up=UP, module="lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v", **more):
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up} | {
        f"{module}.{name}": np.asarray(x) for name, x in more.items()
    }


MIDDLE = "unet.mid_block.attentions_0.transformer_blocks_0.attn1.to_v"
# The middle of the tiny model is 64 wide.
DOWN_64, UP_64 = rng.normal(size=(3, 64)).astype(np.float32), rng.normal(size=(64, 3)).astype(np.float32)


def test_an_integer_alpha(read):
    assert_changes(read(pair(DOWN_64, UP_64, alpha=np.int64(6))), {MIDDLE: (DOWN_64.T, 2 * UP_64.T)})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_alpha(read, dtype):
    tensors = pair(DOWN_64.astype(dtype), UP_64.astype(dtype), alpha=np.array(6, dtype))
    assert_changes(read(tensors), {MIDDLE: (tensors_as_float(tensors)[0].T, 2 * tensors_as_float(tensors)[1].T)})


def tensors_as_float(tensors):
    return [x.astype(np.float32) for x in tensors.values()]


def test_alpha_in_configurations(read, tmp_path):
    peft = {
        f"unet.{ATTENTION}.to_q.lora_A.weight": DOWN,
        f"unet.{ATTENTION}.to_q.lora_B.weight": UP,
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v.lora_A.weight": DOWN_64,
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v.lora_B.weight": UP_64,
    }
    said = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_v": 12}}
    expected = {QUERY: (DOWN.T, 2 * UP.T), MIDDLE: (DOWN_64.T, 4 * UP_64.T)}
    assert_changes(read(peft, {"lora_adapter_metadata": json.dumps(said)}), expected)
    root = {QUERY: (DOWN.T, 6 / 3**0.5 * UP.T), MIDDLE: (DOWN_64.T, 12 / 3**0.5 * UP_64.T)}
    assert_changes(read(peft, {"lora_adapter_metadata": json.dumps(said | {"unet.use_rslora": True})}), root)
    assert_changes(read(peft), {QUERY: (DOWN.T, UP.T), MIDDLE: (DOWN_64.T, UP_64.T)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "alpha_pattern": {"to_v": 12}}))
    assert_changes(read(peft, name="adapter_model.safetensors"), expected)
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"lora_alpha": "x"}', "lora_alpha is 'x'"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "no number that could be one"),
        ('{"lora_alpha": NaN}', "no number that could be one"),
        ('{"alpha_pattern": ["x"]}', "plain names of modules"),
        ('{"alpha_pattern": {"(a+)+$": 1}}', "plain names of modules"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read(peft, name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        read(peft, name="adapter_model.safetensors")
    for text, message in (("[1]", "is no object"), ("{", "cannot be read")):
        with pytest.raises(CheckpointError, match=message):
            read(peft, {"lora_adapter_metadata": text})
    # A pattern is a whole name, or the end of one after a dot.
    said = {"unet.lora_alpha": 3, "unet.alpha_pattern": {"o_v": 12}}
    assert_changes(
        read(peft, {"lora_adapter_metadata": json.dumps(said)}), {QUERY: (DOWN.T, UP.T), MIDDLE: (DOWN_64.T, UP_64.T)}
    )


def test_locon(read):
    """A convolution's change with a window between its two matrices, and with the window in the first."""
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = rng.normal(size=(3, 32)), rng.normal(size=(3, 3, 3, 3)), rng.normal(size=(32, 3))
    down, mid, up = (x.astype(np.float32) for x in (down, mid, up))
    tensors = pair(down[:, :, None, None], up[:, :, None, None], module)
    whole = np.einsum("or,rshw,si->hwio", up, mid, down)
    for given in (
        tensors | {f"{module}.lora_mid.weight": mid},
        pair(np.einsum("rshw,si->rihw", mid, down), up[:, :, None, None], module),
    ):
        found = read(given)["unet.down_blocks_0.resnets_0.conv1"]
        np.testing.assert_allclose(found.down @ found.up, whole, rtol=1e-4, atol=1e-4)


def test_matrices_for_pointwise_convolutions(read):
    module = "lora_unet_mid_block_attentions_0_proj_in"
    for down, up in ((DOWN_64, UP_64), (DOWN_64[..., None, None], UP_64[..., None, None])):
        found = read(pair(down, up, module))["unet.mid_block.attentions_0.proj_in"]
        assert found.down.shape == (1, 1, 64, 3)
        np.testing.assert_array_equal(found.down @ found.up, (UP_64 @ DOWN_64).T[None, None])


CONVOLUTION = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": np.ones(3)}, "no LoRA: none of its 1 tensors"),
        (pair(DOWN_64, UP_64) | {"text_model.x": np.ones(3)}, r"not tensors of a LoRA \(1\): text_model.x"),
        (pair(module="lora_unet_mid_block_attentions_9_x"), r"modules the model has not \(1\): .*attentions_9_x"),
        (pair(DOWN, UP_64), r"of a wrong shape \(1\): .*to_v \[3, 32\] and \[64, 3\] for \[64, 64\]"),
        (pair(DOWN_64[:2], UP_64), "of a wrong shape"),
        (pair(DOWN_64, UP_64[..., None]), "of a wrong shape"),
        (pair(DOWN_64 * np.nan, UP_64), r"with NaN or infinity \(1\)"),
        (pair(DOWN_64, UP_64, alpha=np.float32(np.inf)), r"with NaN or infinity \(1\)"),
        (pair(DOWN_64, UP_64, alpha=np.ones(3, np.float32)), "not tensors of a LoRA"),
        (pair(DOWN_64, UP_64, alpha=np.float64(1e300)), r"with NaN or infinity \(1\)"),
        (pair(DOWN_64[:0], UP_64[:, :0]), "of a wrong shape"),
        # A window that would make gigabytes of two small matrices.
        (
            pair(np.ones((1, 9000, 1, 1)), np.ones((32, 1, 1, 1)), CONVOLUTION)
            | {f"{CONVOLUTION}.lora_mid.weight": np.ones((1, 1, 99, 99))},
            "of a wrong shape",
        ),
        (
            pair(DOWN_64, UP_64) | pair(DOWN_64, UP_64, "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v"),
            r"twice, under two names \(1\)",
        ),
        (
            {f"unet.{ATTENTION}.to_q.lora_{m}.{n}.weight": x for n in "ab" for m, x in (("A", DOWN), ("B", UP))},
            r"twice, under two names \(2\)",
        ),
        (pair(DOWN_64.astype(np.int32), UP_64), "not tensors of a LoRA"),
        ({"lora_unet_mid_block_x.lora_down.weight": DOWN}, "modules the model has not"),
        ({f"unet.{ATTENTION}.to_q.lora_A.weight": DOWN}, r"halves \(1\): unet\..*to_q"),
        ({f"unet.{ATTENTION}.to_q.alpha": np.float32(1)}, "halves"),
        ({"lora_unet_x.hada_w1_a": DOWN}, "LoHa"),
        ({"lora_unet_x.lokr_w1": DOWN}, "LoKr"),
        (pair(dora_scale=np.ones(3)), "DoRA"),
        ({"lora_te2_text_model_x.lora_down.weight": DOWN}, "Stable Diffusion XL"),
        ({"lora_unet_input_blocks_4_1_transformer_blocks_3_x.alpha": DOWN}, "Stable Diffusion XL"),
        ({"transformer.single_transformer_blocks.0.x.lora_A.weight": DOWN}, "FLUX"),
    ],
)
def test_refusals(read, tensors, message, unchecked):
    with pytest.raises(CheckpointError, match=message):
        read({name: np.asarray(x) for name, x in tensors.items()})


@pytest.mark.slow
def test_names_and_weights(tiny_file, tmp_path):
    model = sdjax.load(tiny_file)
    safetensors.write(tmp_path / "style.safetensors", pair(DOWN_64, UP_64), {})
    changed = model.with_lora(tmp_path / "style.safetensors", 0.5)
    assert changed.source == f"{model.source} + style:0.5"
    assert changed.fingerprint not in (model.fingerprint, changed.with_lora_weight("style", 0.6).fingerprint)
    again = changed.with_lora_weight("style", 0.1).with_lora_weight("style", 0.5)
    assert again.fingerprint == changed.fingerprint
    merged = changed.with_loras_merged()
    assert (merged.source, merged.fingerprint, merged.loras) == (changed.source, changed.fingerprint, ())
    for wrong, message in (
        (lambda: changed.with_lora(tmp_path / "style.safetensors"), "there is a LoRA 'style' already"),
        (lambda: model.with_lora(tmp_path / "style.safetensors", np.inf), "expected a finite number"),
        (lambda: changed.with_lora_weight("other", 1), "no LoRA 'other'; there are style"),
        (lambda: model.with_lora_weight("style", 1), "there are none"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    changed.save(tmp_path / "saved.safetensors")
    latents, context = np.ones((1, 8, 8, 4), np.float32), np.ones((1, 77, 40), np.float32)
    saved = sdjax.load(tmp_path / "saved.safetensors").unet(latents, 500, context)
    np.testing.assert_allclose(saved, changed.unet(latents, 500, context), rtol=0, atol=1e-4)
    assert np.abs(saved - model.unet(latents, 500, context)).max() > 1e-2
