"""The three models against diffusers and transformers, from a folder that these wrote and our loader read.

Errors are relative: the largest difference over the largest value. All weights are random and live: no norm is where it
starts, no bias is zero, so a module that was left out or misread shows.
"""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from sdjax import checkpoints, pipeline
from sdjax.checkpoints import names, native, weights
from sdjax.models.config import SD1, SD1_EDITING, SD1_INPAINTING, SD2_V, TINY, TINY_2
from sdjax.models.perturbed import identity_attention
from sdjax.models.text_encoder import TextEncoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE

# Design, section 4. Measured on a CPU: at most 9e-7 at the tiny size, 6e-6 at the full one.
TOLERANCE = 1e-4


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


def enliven(model, seed):
    """Every parameter moved off its start: vectors (biases, norms) by 0.2, matrices by a fifth of their own size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.ndim == 1 else 0.2 * parameter.std()
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def redraw(model, wanted, scale, seed):
    """Parameters whose names have one of these in them drawn anew: they are zero at the start, and would hide much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in wanted):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def text_encoder(config):
    sizes = config.text_encoder
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.mlp_width,
            hidden_act=sizes.activation,
        )
    )


def unet(config):
    sizes = config.unet
    kinds = ["CrossAttn" if attends else "" for attends in sizes.attention_levels]
    return diffusers.UNet2DConditionModel(
        in_channels=sizes.in_channels,
        block_out_channels=sizes.channels,
        layers_per_block=sizes.blocks_per_level,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in kinds[::-1]],
        attention_head_dim=sizes.num_heads,
        use_linear_projection=sizes.linear_projection,
        cross_attention_dim=sizes.context_width,
        norm_num_groups=sizes.norm_groups,
        sample_size=config.image_size // config.vae.factor,
    )


def vae(config):
    sizes = config.vae
    return diffusers.AutoencoderKL(
        block_out_channels=sizes.channels,
        layers_per_block=sizes.blocks_per_level,
        down_block_types=["DownEncoderBlock2D"] * len(sizes.channels),
        up_block_types=["UpDecoderBlock2D"] * len(sizes.channels),
        norm_num_groups=sizes.norm_groups,
    )


def write_folder(path, config, parts, **options):
    """A diffusers folder of these parts as their own libraries write it."""
    for name, model in parts.items():
        model.save_pretrained(path / name, **options)
    diffusers.PNDMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        steps_offset=1,
        prediction_type={"v": "v_prediction", "epsilon": "epsilon"}[config.prediction],
    ).save_pretrained(path / "scheduler")
    # Published folders do not say it, and samplers of another kind then keep their own.
    file = path / "scheduler" / "scheduler_config.json"
    fields = json.loads(file.read_text())
    del fields["timestep_spacing"]
    file.write_text(json.dumps(fields))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return read_back(tmp_path_factory.mktemp("folder"), TINY)


def read_back(path, config):
    """The reference's models and our parameters of the same folder."""
    parts = {"text_encoder": text_encoder(config), "unet": unet(config), "vae": vae(config)}
    for seed, model in enumerate(parts.values()):
        enliven(model, seed)
    write_folder(path, config, parts)
    read, params = checkpoints.load(path, pipeline.shapes)
    assert read == config
    return parts, params


def test_perturbed_attention(tiny):
    """Against diffusers' own processor, which switches the attention off for the second half of a batch."""
    parts, params = tiny
    theirs = parts["unet"]
    before = theirs.attn_processors
    rng = np.random.default_rng(3)
    x, context = rng.normal(size=(4, 8, 8, 4)).astype(np.float32), rng.normal(size=(4, 77, 40)).astype(np.float32)
    middle = {name for name in before if name.startswith("mid_block") and "attn1" in name}
    assert len(middle) == 1
    identity = diffusers.models.attention_processor.PAGIdentitySelfAttnProcessor2_0()
    theirs.set_attn_processor({name: identity if name in middle else before[name] for name in before})
    try:
        with torch.no_grad():
            expected = theirs(torch.from_numpy(np.moveaxis(x, -1, 1)), 100, torch.from_numpy(context)).sample.numpy()
    finally:
        theirs.set_attn_processor(before)

    def ours(x, context):
        with identity_attention(np.arange(4) >= 2):
            return UNet(TINY.unet).apply({"params": params["unet"]}, x, np.full(4, 100, np.float32), context)

    assert relative_error(jax.jit(ours)(x, context), np.moveaxis(expected, 1, -1)) < TOLERANCE


def check_text_encoder(theirs, params, config, clip_skip, batch=2):
    ids = np.random.default_rng(0).integers(0, config.text_encoder.vocab_size, (batch, 77), np.int32)
    with torch.no_grad():
        states = theirs(torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states
        layers = getattr(theirs, "text_model", theirs)  # transformers 5.6 removed the wrapper
        expected = layers.final_layer_norm(states[-1 - clip_skip]).numpy()
    encode = jax.jit(TextEncoder(config.text_encoder).apply, static_argnums=2)
    assert relative_error(encode({"params": params}, ids, clip_skip), expected) < TOLERANCE


def check_unet(theirs, params, config, size, batch=2):
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(batch, *size, config.unet.in_channels)).astype(np.float32)
    context = rng.normal(size=(batch, 77, config.unet.context_width)).astype(np.float32)
    times = np.array([999, 3], np.float32)[:batch]  # each picture of a batch has its own
    with torch.no_grad():
        noisy = torch.from_numpy(latents).permute(0, 3, 1, 2)
        expected = theirs(noisy, torch.from_numpy(times), torch.from_numpy(context)).sample
    ours = jax.jit(UNet(config.unet).apply)({"params": params}, latents, times, context)
    assert relative_error(ours, expected.permute(0, 2, 3, 1).numpy()) < TOLERANCE


def check_encode(theirs, params, config, size, batch=2):
    images = np.random.default_rng(2).uniform(-1, 1, (batch, *size, 3)).astype(np.float32)
    with torch.no_grad():
        moments = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
    encode = jax.jit(lambda variables, x: VAE(config.vae).apply(variables, x, method="encode"))
    mean, logvar = encode({"params": params}, images)
    assert relative_error(mean, moments.mean.permute(0, 2, 3, 1).numpy()) < TOLERANCE
    assert relative_error(logvar, moments.logvar.permute(0, 2, 3, 1).numpy()) < TOLERANCE


def check_decode(theirs, params, config, size, batch=2):
    z = np.random.default_rng(3).normal(size=(batch, *size, config.vae.latent_channels)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(z).permute(0, 3, 1, 2)).sample
    decode = jax.jit(lambda variables, x: VAE(config.vae).apply(variables, x, method="decode"))
    ours = decode({"params": params}, z)
    assert relative_error(ours, expected.permute(0, 2, 3, 1).numpy()) < TOLERANCE


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_text_encoder(tiny, clip_skip):
    parts, params = tiny
    check_text_encoder(parts["text_encoder"], params["text_encoder"], TINY, clip_skip)


# 13 x 9 is odd on the way down, 7 x 5, so the way up crops.
@pytest.mark.parametrize("size", [(8, 8), (13, 9)])
def test_unet(tiny, size):
    parts, params = tiny
    check_unet(parts["unet"], params["unet"], TINY, size)


def test_stable_diffusion_2(tmp_path):
    parts, params = read_back(tmp_path, TINY_2)
    check_text_encoder(parts["text_encoder"], params["text_encoder"], TINY_2, 0)
    check_unet(parts["unet"], params["unet"], TINY_2, (13, 9))


class OpenCLIP(torch.nn.Module):
    """Its text tower as it lies in original files of Stable Diffusion 2, with torch's own attention."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.token_embedding = torch.nn.Embedding(sizes.vocab_size, sizes.width)
        self.positional_embedding = torch.nn.Parameter(torch.randn(sizes.max_positions, sizes.width))
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(self.block() for _ in range(sizes.num_layers + 1))
        self.ln_final = torch.nn.LayerNorm(sizes.width)
        self.text_projection = torch.nn.Parameter(torch.randn(sizes.width, sizes.width))

    def block(self):
        sizes = self.sizes
        return torch.nn.ModuleDict(
            {
                "ln_1": torch.nn.LayerNorm(sizes.width),
                "attn": torch.nn.MultiheadAttention(sizes.width, sizes.num_heads, batch_first=True),
                "ln_2": torch.nn.LayerNorm(sizes.width),
                "mlp": torch.nn.ModuleDict(
                    {
                        "c_fc": torch.nn.Linear(sizes.width, sizes.mlp_width),
                        "c_proj": torch.nn.Linear(sizes.mlp_width, sizes.width),
                    }
                ),
            }
        )

    def forward(self, ids):
        """The state that goes into the last block, after the final norm: what Stable Diffusion 2 uses."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((77, 77), -torch.inf).triu(1)
        for block in self.transformer.resblocks[:-1]:
            h = block["ln_1"](x)
            x = x + block["attn"](h, h, h, need_weights=False, attn_mask=mask)[0]
            x = x + block["mlp"]["c_proj"](torch.nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x))))
        return self.ln_final(x)


def test_open_clip(tmp_path):
    sizes = dataclasses.replace(TINY_2.text_encoder, num_layers=23)  # the last, the 24th, is in the file
    config = dataclasses.replace(TINY_2, text_encoder=sizes)
    theirs = enliven(OpenCLIP(sizes), 0)
    targets = {name: x for name, x in native.flatten(pipeline.shapes(config)).items() if name.startswith("text")}
    file = {f"cond_stage_model.model.{name}": x.numpy() for name, x in theirs.state_dict().items()}
    params = native.unflatten(weights.assemble(tmp_path, file, names.ldm(config, targets), targets))["text_encoder"]
    ids = np.random.default_rng(0).integers(0, sizes.vocab_size, (2, 77), np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).numpy()
    assert relative_error(TextEncoder(sizes).apply({"params": params}, ids, 0), expected) < TOLERANCE


def test_vae_encode(tiny):
    parts, params = tiny
    check_encode(parts["vae"], params["vae"], TINY, (18, 10))


def test_vae_decode(tiny):
    parts, params = tiny
    check_decode(parts["vae"], params["vae"], TINY, (9, 5))


class ModelCheckpoint:
    """Stands for Lightning's callback: an object that a checkpoint of training holds beside the weights."""

    def __init__(self):
        self.best_model_score = np.float64(0.5)


def write_original(path, config, parts):
    """One file with the original names, as Lightning's trainer wrote the published ones.

    tests/parity/test_checkpoints.py has diffusers read these names.
    """
    theirs = {f"{part}.{name}": x for part, model in parts.items() for name, x in model.state_dict().items()}
    theirs = {names.spelling(name): x.numpy() for name, x in theirs.items()}
    targets = native.flatten(pipeline.shapes(config))
    params = weights.assemble(path, theirs, names.folder(config, targets), targets)
    original = weights.export(params, names.ldm(config, targets))
    state = {name: torch.from_numpy(x) for name, x in original.items()}
    if config.text_encoder.activation == "quick_gelu":
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["betas"] = torch.linspace(0, 1, 1000)
    callbacks = {ModelCheckpoint: ModelCheckpoint(), "score": np.float64(1)}
    torch.save({"epoch": 1, "global_step": 470000, "state_dict": state, "callbacks": callbacks}, path)


@pytest.mark.full_size
@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (SD1, [(64, 64), (65, 49)]),
        (SD1_INPAINTING, [(64, 64)]),
        (SD1_EDITING, [(64, 64)]),
        (SD2_V, [(64, 64)]),
    ],
)
def test_full_size(tmp_path, config, sizes):
    parts = {"text_encoder": text_encoder(config), "unet": unet(config), "vae": vae(config)}
    for seed, model in enumerate(parts.values()):
        enliven(model, seed)
    write_original(tmp_path / "model.ckpt", config, parts)
    # The random numbers' spread says nothing of what a Stable Diffusion 2 predicts.
    read, params = checkpoints.load(tmp_path / "model.ckpt", pipeline.shapes, prediction=config.prediction)
    assert read == config
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    extra = (config.unet.in_channels - 4) * 9 * 320  # weights of the first convolution
    text, unet_ = (340_387_840, 865_910_724) if config == SD2_V else (123_060_480, 859_520_964 + extra)
    assert counts == {"text_encoder": text, "unet": unet_, "vae": 83_653_863}
    for size in sizes:
        check_unet(parts["unet"], params["unet"], config, size, batch=1)
    if config == SD2_V:
        check_text_encoder(parts["text_encoder"], params["text_encoder"], config, 0)
    if config == SD1:  # the other parts are the same
        check_text_encoder(parts["text_encoder"], params["text_encoder"], config, 0)
        check_text_encoder(parts["text_encoder"], params["text_encoder"], config, 1)
        check_encode(parts["vae"], params["vae"], config, (256, 192), batch=1)
        check_decode(parts["vae"], params["vae"], config, (32, 24), batch=1)
