"""Folders of diffusers' Flax models, which their owners cannot open any more, and hostile files of their kind."""

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdjax
from sdjax import checkpoints
from sdjax.checkpoints import CheckpointError, names, native
from sdjax.checkpoints import msgpack as reader
from sdjax.models.config import TINY

from .conftest import assert_equal

STEMS = {"text_encoder": "flax_model", "unet": "diffusion_flax_model", "vae": "diffusion_flax_model"}


@pytest.fixture
def flax_folder(folder, params):
    """The folder with its weights as Flax wrote them, in bfloat16 as most of the published ones are."""
    path, change = folder
    change("model_index.json", _class_name="FlaxStableDiffusionPipeline")
    leaves = native.flatten(params)
    table = names.flax(TINY, leaves)
    for part, stem in STEMS.items():
        tree = {
            source.name.removeprefix(f"{part}."): jnp.asarray(leaves[target], jnp.bfloat16)
            for target, source in table.items()
            if target.startswith(f"{part}.")
        }
        for file in (path / part).glob("*.safetensors"):
            file.unlink()
        (path / part / f"{stem}.msgpack").write_bytes(flax.serialization.to_bytes(native.unflatten(tree)))
    return path


def test_a_folder(flax_folder, params, shapes):
    config, found = checkpoints.load(flax_folder, shapes)
    assert config == TINY
    assert_equal(found, params, jnp.bfloat16)
    described = checkpoints.describe(flax_folder)
    assert described["format"] == "diffusers-Flax folder"
    assert described["readable"]
    assert described["dtypes"] == {"bfloat16": len(native.flatten(params))}


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_part(flax_folder, folder, params, tiny_file, part):
    model = sdjax.load(tiny_file, dtype="float32")
    folder[1]("vae/config.json", _class_name="FlaxAutoencoderKL")
    for path in (flax_folder, flax_folder / part):
        found = model.with_part(path, part).params[part]
        rounded = {name: x.astype(jnp.bfloat16) for name, x in native.flatten(params[part]).items()}
        assert_equal(found, native.unflatten(rounded))


# Read in the code of diffusers 0.35.2 and transformers 4.53, the last with Flax.
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("unet.time_embedding.linear_1.kernel", None),
        ("unet.down_blocks_0.attentions_0.transformer_blocks_0.attn1.to_out_0.bias", None),
        ("unet.up_blocks_1.attentions_2.transformer_blocks_0.ff.net_0.proj.kernel", None),
        ("vae.encoder.mid_block.attentions_0.to_q.kernel", "vae.encoder.mid_block.attentions_0.query.kernel"),
        ("vae.decoder.mid_block.attentions_0.to_out_0.bias", "vae.decoder.mid_block.attentions_0.proj_attn.bias"),
        ("vae.decoder.mid_block.attentions_0.group_norm.scale", None),
        (
            "text_encoder.encoder.layers_1.self_attn.q_proj.kernel",
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.kernel",
        ),
        (
            "text_encoder.embeddings.token_embedding.embedding",
            "text_encoder.text_model.embeddings.token_embedding.embedding",
        ),
    ],
)
def test_published_names(shapes, ours, theirs):
    table = names.flax(TINY, native.flatten(shapes(TINY)))
    assert table[ours].name == (theirs or ours)


def test_a_folder_with_both_is_read_from_the_others(folder, params, shapes):
    for part, stem in STEMS.items():
        (folder[0] / part / f"{stem}.msgpack").write_bytes(b"not looked at")
    assert_equal(checkpoints.load(folder[0], shapes)[1], params)


def test_what_is_wrong_is_said(flax_folder, shapes):
    file = flax_folder / "unet" / "diffusion_flax_model.msgpack"
    tree = flax.serialization.msgpack_restore(file.read_bytes())
    for change, message in (
        ({"conv_in": {"bias": tree["conv_in"]["bias"]}}, r"missing \(1\): unet.conv_in.kernel"),
        ({"conv_in": {**tree["conv_in"], "bias": tree["conv_in"]["bias"] * np.nan}}, "NaN or infinity"),
        ({"more": np.ones(3, np.float32)}, r"unexpected \(1\): unet.more"),
    ):
        file.write_bytes(flax.serialization.to_bytes({**tree, **change}))
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(flax_folder, shapes)


def array(shape, dtype="float32", numbers=b"\0" * 8, code=1):
    return msgpack.packb({"x": msgpack.ExtType(code, msgpack.packb((shape, dtype, numbers)))})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a whole file"),
        (array((2,))[:-1], "not a whole file"),
        (array((3,)), "has 8 bytes"),
        (array((2**39, 2**39)), "has 8 bytes"),
        (array((2,), "object"), "dtype 'object'"),
        (array((2,), "V8"), "dtype 'V8'"),
        (array((-2, -1)), r"an array of the shape \[-2, -1\]"),
        (array("2"), "an array of the shape '2'"),
        (array((2,), numbers="text"), "an array of the shape"),
        (array((2,), code=3), "an extension of kind 3"),
        (msgpack.packb({"x": msgpack.ExtType(1, b"\x90")}), "without shape, dtype and numbers"),
        (msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb([[]] * 1000))}), "without shape, dtype and numbers"),
        (array((1,) * 9), "without shape, dtype and numbers"),
        (msgpack.packb({"x": {"__msgpack_chunked_array__": True}}), "in chunks"),
        (msgpack.packb({"x": [1, 2]}), "not a whole file"),
        (b"\x82\xa1x\xc0\xa1x\xc0", "a name is twice in it"),
        (msgpack.packb({"a.b": 1}), "a name is twice in it, empty or dotted"),
        (msgpack.packb({str(i): {str(j): 0 for j in range(200)} for i in range(60)}), "over 10000 entries"),
        (msgpack.packb(3), "is a int"),
        (b"\x81\xa1x" * 100 + b"\xc0", "is a dict, not an array"),
        (b"\x91" * 100_000, "not a whole file"),
    ],
)
def test_hostile_files(tmp_path, data, message):
    (tmp_path / "a.msgpack").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        reader.read(tmp_path / "a.msgpack")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 40))
def test_any_bytes(tmp_path_factory, data, cut):
    path = tmp_path_factory.getbasetemp() / "any.msgpack"
    whole = array((2,))
    for text in (data, whole[:cut] + data, data + whole):
        path.write_bytes(text)
        try:
            found = reader.read(path)
        except CheckpointError:
            continue
        assert all(isinstance(x, np.ndarray) for x in found.values())
