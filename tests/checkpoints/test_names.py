"""The tables of names. tests/parity/test_checkpoints.py has diffusers' own converter agree with them."""

import dataclasses

import numpy as np
import pytest

from sdjax import checkpoints
from sdjax.checkpoints import names, native, weights
from sdjax.checkpoints.names import Kind
from sdjax.models.config import SD1, TINY


@pytest.fixture(scope="module")
def sd1(shapes):
    return native.flatten(shapes(SD1))


def by_source(table):
    return {source.name: target for target, source in table.items()}


def test_the_tables_are_bijections_with_the_published_counts(sd1):
    for table in (names.ldm(SD1, sd1), names.folder(SD1, sd1), names.averaged(names.ldm(SD1, sd1))):
        assert len(by_source(table)) == len(sd1) == 686 + 248 + 196


# Read in published files and in the code of CompVis/stable-diffusion.
@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("model.diffusion_model.time_embed.0.weight", "unet.time_embedding.linear_1.kernel"),
        ("model.diffusion_model.input_blocks.0.0.weight", "unet.conv_in.kernel"),
        (
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.norm1.weight",
            "unet.down_blocks_1.attentions_0.transformer_blocks_0.norm1.scale",
        ),
        ("model.diffusion_model.input_blocks.3.0.op.bias", "unet.down_blocks_0.downsamplers_0.conv.bias"),
        ("model.diffusion_model.input_blocks.11.0.in_layers.2.weight", "unet.down_blocks_3.resnets_1.conv1.kernel"),
        ("model.diffusion_model.middle_block.1.proj_in.weight", "unet.mid_block.attentions_0.proj_in.kernel"),
        ("model.diffusion_model.output_blocks.2.1.conv.weight", "unet.up_blocks_0.upsamplers_0.conv.kernel"),
        ("model.diffusion_model.output_blocks.5.2.conv.weight", "unet.up_blocks_1.upsamplers_0.conv.kernel"),
        (
            "model.diffusion_model.output_blocks.8.0.skip_connection.bias",
            "unet.up_blocks_2.resnets_2.conv_shortcut.bias",
        ),
        (
            "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
            "unet.up_blocks_3.attentions_2.transformer_blocks_0.ff.net_0.proj.kernel",
        ),
        ("model.diffusion_model.out.0.weight", "unet.conv_norm_out.scale"),
        (
            "first_stage_model.encoder.down.2.downsample.conv.weight",
            "vae.encoder.down_blocks_2.downsamplers_0.conv.kernel",
        ),
        ("first_stage_model.encoder.mid.attn_1.q.weight", "vae.encoder.mid_block.attentions_0.to_q.kernel"),
        ("first_stage_model.decoder.mid.attn_1.norm.weight", "vae.decoder.mid_block.attentions_0.group_norm.scale"),
        ("first_stage_model.decoder.up.3.block.0.norm2.bias", "vae.decoder.up_blocks_0.resnets_0.norm2.bias"),
        ("first_stage_model.decoder.up.1.upsample.conv.bias", "vae.decoder.up_blocks_2.upsamplers_0.conv.bias"),
        ("first_stage_model.decoder.norm_out.weight", "vae.decoder.conv_norm_out.scale"),
        ("first_stage_model.post_quant_conv.weight", "vae.post_quant_conv.kernel"),
        (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            "text_encoder.embeddings.token_embedding.embedding",
        ),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight",
            "text_encoder.encoder.layers_11.mlp.fc2.kernel",
        ),
    ],
)
def test_published_names(sd1, original, ours):
    assert by_source(names.ldm(SD1, sd1))[original] == ours


def test_names_of_moving_averages():
    assert (
        names.ema_name("model.diffusion_model.input_blocks.0.0.weight")
        == "model_ema.diffusion_modelinput_blocks00weight"
    )


def test_square_matrices_are_transposed_by_their_kind(sd1):
    table = names.ldm(SD1, sd1)
    square = [name for name, x in sd1.items() if len(x.shape) == 2 and x.shape[0] == x.shape[1]]
    assert len(square) > 100
    attention = "mid_block.attentions_0.to_"
    for name in square:
        pointwise = name.startswith("vae.") and attention in name
        assert table[name].kind is (Kind.POINTWISE if pointwise else Kind.LINEAR)


def test_kinds_are_inverted_to_the_bit():
    rng = np.random.default_rng(0)
    for kind, shape in {
        Kind.SAME: (3,),
        Kind.LINEAR: (3, 4),
        Kind.CONV: (5, 4, 3, 2),
        Kind.POINTWISE: (4, 3, 1, 1),
    }.items():
        theirs = rng.normal(size=shape)
        ours = kind.to_ours(theirs)
        assert kind.their_shape(ours.shape) == shape
        np.testing.assert_array_equal(kind.to_theirs(ours), theirs)
        assert np.shares_memory(ours, theirs)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_export_is_the_inverse_of_reading(params, layout):
    table = checkpoints.LAYOUTS[layout]
    targets = native.flatten(params)
    theirs = {name: x.copy() for name, x in checkpoints.export(params, TINY, layout).items()}
    ours = weights.assemble("file", theirs, table(TINY, targets), targets)
    again = checkpoints.export(native.unflatten(ours), TINY, layout)
    assert again.keys() == theirs.keys()
    assert all(again[name].tobytes() == x.tobytes() and again[name].shape == x.shape for name, x in theirs.items())
    assert all(ours[name].tobytes() == x.tobytes() for name, x in targets.items())


def test_linear_projections_are_matrices(shapes):
    config = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, linear_projection=True))
    targets = native.flatten(shapes(config))
    for table in (names.folder(config, targets), names.ldm(config, targets)):
        kind = table["unet.mid_block.attentions_0.proj_in.kernel"].kind
        assert kind is Kind.LINEAR
        assert table["unet.mid_block.attentions_0.proj_in.bias"].kind is Kind.SAME


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("text_encoder.embeddings.x", "text_encoder.text_model.embeddings.x"),
        ("text_encoder.text_model.embeddings.x", "text_encoder.text_model.embeddings.x"),
        ("cond_stage_model.transformer.encoder.x", "cond_stage_model.transformer.text_model.encoder.x"),
        ("vae.encoder.mid_block.attentions.0.query.bias", "vae.encoder.mid_block.attentions.0.to_q.bias"),
        ("vae.decoder.mid_block.attentions.0.key.bias", "vae.decoder.mid_block.attentions.0.to_k.bias"),
        ("vae.decoder.mid_block.attentions.0.value.bias", "vae.decoder.mid_block.attentions.0.to_v.bias"),
        ("vae.decoder.mid_block.attentions.0.proj_attn.bias", "vae.decoder.mid_block.attentions.0.to_out.0.bias"),
        ("vae.encoder.conv_in.bias", "vae.encoder.conv_in.bias"),
    ],
)
def test_spellings(name, spelling):
    assert names.spelling(name) == spelling


BUFFERS = [
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "model_ema.decay",
    "model_ema.num_updates", "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "text_encoder.text_model.embeddings.position_ids", "text_encoder.text_projection.weight",
    "cond_stage_model.logit_scale",
]  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers(name):
    assert names.is_buffer(name)


@pytest.mark.parametrize("name", ["betas.weight", "alphas", "model_ema.other", "unet.betas", "logvar2", ""])
def test_other_names_are_not_buffers(name):
    assert not names.is_buffer(name)
