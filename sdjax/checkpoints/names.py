"""The names of tensors: our tree's against those of diffusers' folders and of the original (CompVis) files.

Our modules have diffusers' names, with `resnets_0` for `resnets.0`. A name is where x what x leaf: a place in the
network, a part of the block that is there, `kernel`, `scale`, `embedding` or `bias`. A row of the tables below is about
one of the three, so some 35 rows name the 686 tensors of the UNet. How a tensor's axes move follows from the kind of
its module, which is declared, never from its shape: matrices of queries and keys are square.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from sdjax.models.config import Config, UNetConfig, VAEConfig


class Kind(enum.Enum):
    """How a tensor of a PyTorch file lies in ours."""

    SAME = "same"
    LINEAR = "linear"  # (O, I) -> (I, O)
    CONV = "conv"  # (O, I, H, W) -> (H, W, I, O)
    POINTWISE = "pointwise"  # (O, I, 1, 1) -> (I, O): a matrix that was written as a 1x1 convolution

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """A view of x, an array of `their_shape`."""
        if self is Kind.CONV:
            return x.transpose(2, 3, 1, 0)
        if self is Kind.POINTWISE:
            return x[:, :, 0, 0].T
        return x.T if self is Kind.LINEAR else x

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`, a view too."""
        if self is Kind.CONV:
            return x.transpose(3, 2, 0, 1)
        if self is Kind.POINTWISE:
            return x.T[:, :, None, None]
        return x.T if self is Kind.LINEAR else x

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in their file of what has this shape in ours."""
        if self is Kind.CONV:
            return (shape[3], shape[2], shape[0], shape[1])
        if self is Kind.POINTWISE:
            return (shape[1], shape[0], 1, 1)
        return shape[::-1] if self is Kind.LINEAR else shape


class Source(NamedTuple):
    """Where a tensor of ours comes from: of a tensor of theirs, one of so many equal parts along the first axis."""

    name: str
    kind: Kind
    part: int = 0
    parts: int = 1

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in their file, all parts together, of what has this shape in ours."""
        rows, *rest = self.kind.their_shape(shape)
        return (self.parts * rows, *rest)


# What each module is, by the last of its name.
MODULES = {
    Kind.CONV: (
        "conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out", "quant_conv",
        "post_quant_conv", "blocks", "controlnet_down_blocks", "controlnet_mid_block",
    ),
    Kind.LINEAR: (
        "linear_1", "linear_2", "time_emb_proj", "to_q", "to_k", "to_v", "to_out_0", "proj", "net_2", "q_proj",
        "k_proj", "v_proj", "out_proj", "fc1", "fc2",
    ),
    Kind.SAME: (
        "norm", "norm1", "norm2", "norm3", "group_norm", "conv_norm_out", "layer_norm1", "layer_norm2",
        "final_layer_norm", "token_embedding", "position_embedding",
    ),
}  # fmt: skip
KINDS = {module: kind for kind, modules in MODULES.items() for module in modules}
# Modules of which there are several, numbered.
LISTS = (
    "down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|to_out|net|layers|blocks|"
    "controlnet_down_blocks"
)
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Our tree's parts in an original file, and in a diffusers folder (by the name of the subfolder).
LDM_ROOTS = {
    "unet": "model.diffusion_model.",
    "control": "control_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
FOLDER_ROOTS = {"unet": "unet.", "control": "control.", "vae": "vae.", "text_encoder": "text_encoder."}
EMA_ROOT = "model_ema."

# Parts of blocks, where the original files call them otherwise.
LDM_PARTS = {
    "unet": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "vae": {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out_0": "proj_out",
    },
    "text_encoder": {},
}
LDM_PARTS["control"] = LDM_PARTS["unet"]

# The text encoder of Stable Diffusion 2 is OpenCLIP's in original files: diffusers' names, and what they are there.
OPEN_CLIP_ROOT = "cond_stage_model.model."
OPEN_CLIP = (
    (r"embeddings\.token_embedding\.", "token_embedding."),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.", r"transformer.resblocks.\1.attn.in_proj_"),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"transformer.resblocks.\1.attn."),
    (r"encoder\.layers\.(\d+)\.layer_norm", r"transformer.resblocks.\1.ln_"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"final_layer_norm\.", "ln_final."),
)
PACKED = ("q_proj", "k_proj", "v_proj")  # one matrix in torch's attention

# Our names, and what they were in diffusers' and transformers' Flax models.
FLAX = (
    (r"text_encoder\.", "text_encoder.text_model."),
    (r"(text_encoder\..*\.layers)_(\d+)\.", r"\1.\2."),
    (r"(vae\..*\.attentions_0)\.to_q\.", r"\1.query."),
    (r"(vae\..*\.attentions_0)\.to_k\.", r"\1.key."),
    (r"(vae\..*\.attentions_0)\.to_v\.", r"\1.value."),
    (r"(vae\..*\.attentions_0)\.to_out_0\.", r"\1.proj_attn."),
)

# Other spellings of one layout, brought to the one that the tables have.
SPELLINGS = (
    # Files written by transformers since 5.6, or before 4.26.
    (r"(text_encoder\.|cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.", r"\1text_model.\2."),
    # diffusers' VAE before 0.14.
    (r"(vae\.\w+\.mid_block\.attentions\.0\.)query\.", r"\1to_q."),
    (r"(vae\.\w+\.mid_block\.attentions\.0\.)key\.", r"\1to_k."),
    (r"(vae\.\w+\.mid_block\.attentions\.0\.)value\.", r"\1to_v."),
    (r"(vae\.\w+\.mid_block\.attentions\.0\.)proj_attn\.", r"\1to_out.0."),
)

# Tensors that hold nothing a model needs.
BUFFERS = (
    # The noise schedule's numbers, which the configuration has.
    r"betas",
    r"(sqrt_recip_|sqrt_recipm1_|sqrt_|sqrt_one_minus_|log_one_minus_)?alphas_cumprod(_prev)?",
    r"posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)",
    r"logvar",
    # What an autoencoder was trained by.
    r"first_stage_model\.(loss|model_ema)\..*",
    # Counters and indices.
    r"model_ema\.(decay|num_updates)",
    r"(cond_stage_model\.transformer|text_encoder)\.text_model\.embeddings\.position_ids",
    # CLIP's way to compare texts with pictures.
    r"(cond_stage_model|cond_stage_model\.(transformer|model)|text_encoder)\.(text_projection(\.weight)?|logit_scale)",
    # OpenCLIP's causal mask, and its last layer, of which Stable Diffusion 2 takes the input.
    r"cond_stage_model\.model\.(attn_mask|transformer\.resblocks\.23\..*)",
)


def spelling(name: str) -> str:
    """The name as the tables have it."""
    return _respelt(name, SPELLINGS)


def is_buffer(name: str) -> bool:
    """Whether the tensor of this name, in the tables' spelling, is none of the model's weights."""
    return any(re.fullmatch(pattern, name) for pattern in BUFFERS)


def folder(config: Config, targets: Iterable[str]) -> dict[str, Source]:
    """Where each of our tensors (dotted names) is in a diffusers folder, with the subfolder before the name."""
    return {target: _source(target, config, FOLDER_ROOTS, {}, {}) for target in targets}


def flax(config: Config, targets: Iterable[str]) -> dict[str, Source]:
    """Where each of our tensors (dotted names) is in a folder of diffusers' Flax models: nearly where it is in ours."""
    sources = {}
    for target in targets:
        name = target
        for pattern, replacement in FLAX:
            name = re.sub(rf"^{pattern}", replacement, name)
        sources[target] = Source(name, Kind.SAME)
    return sources


def ldm(config: Config, targets: Collection[str]) -> dict[str, Source]:
    """Where each of our tensors (dotted names) is in an original file, `model.diffusion_model.` ..."""
    unet = _unet_places(config.unet)
    places = {"unet": unet, "vae": _vae_places(config.vae), "text_encoder": {}}
    places["control"] = {**unet, **_control_places(config.unet, targets)}
    sources = {}
    # The originals have two text encoders, and only OpenCLIP's has the exact GELU.
    open_clip = config.text_encoder.activation == "gelu"
    for target in targets:
        root = target.split(".", 1)[0]
        source = _source(target, config, LDM_ROOTS, places[root], LDM_PARTS[root])
        if root == "vae" and source.kind is Kind.LINEAR:
            source = source._replace(kind=Kind.POINTWISE)  # the original's attention over pixels is 1x1 convolutions
        if root == "text_encoder" and open_clip:
            source = _open_clip(target, source)
        sources[target] = source
    return sources


def averaged(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The same with the UNet's moving averages, whose names Lightning modules keep without the dots."""
    prefix = LDM_ROOTS["unet"]
    return {
        target: source._replace(name=ema_name(source.name)) if source.name.startswith(prefix) else source
        for target, source in sources.items()
    }


def ema_name(name: str) -> str:
    """`model.diffusion_model.out.2.bias` -> `model_ema.diffusion_modelout2bias`."""
    return EMA_ROOT + name.removeprefix("model.").replace(".", "")


def _source(
    target: str, config: Config, roots: Mapping[str, str], places: Mapping[str, str], parts: Mapping[str, str]
) -> Source:
    root, *modules, leaf = target.split(".")
    kind = Kind.SAME
    if leaf == "kernel":
        kind = KINDS.get(modules[-1]) or KINDS[re.sub(r"_\d+$", "", modules[-1])]
    if root in ("unet", "control") and modules[-1] in ("proj_in", "proj_out") and config.unet.linear_projection:
        kind = Kind.LINEAR if leaf == "kernel" else kind
    prefix = roots[root]
    if root == "text_encoder" and not prefix.endswith("text_model."):
        prefix += "text_model."
    # The longest place that the module lies in, its part there, and below both diffusers' names.
    depth = next((n for n in range(len(modules), 0, -1) if ".".join(modules[:n]) in places), 0)
    path = [_dotted(module) for module in modules]
    if depth:
        path = [places[".".join(modules[:depth])], *path[depth:]]
        if len(path) > 1:
            path[1] = parts.get(modules[depth], path[1])
    return Source(prefix + ".".join([*path, LEAVES[leaf]]), kind)


def _open_clip(target: str, source: Source) -> Source:
    name = _respelt(source.name.removeprefix(LDM_ROOTS["text_encoder"]), OPEN_CLIP)
    module = target.split(".")[-2]
    place = {"part": PACKED.index(module), "parts": len(PACKED)} if module in PACKED else {}
    return Source(OPEN_CLIP_ROOT + name, source.kind, **place)


def _respelt(name: str, table: Iterable[tuple[str, str]]) -> str:
    """The name with its beginning replaced by the first row whose pattern that is."""
    for pattern, replacement in table:
        name, found = re.subn(rf"^{pattern}", replacement, name)
        if found:
            break
    return name


def _dotted(module: str) -> str:
    return re.sub(rf"^({LISTS})_(\d+)$", r"\1.\2", module)


def _unet_places(config: UNetConfig) -> dict[str, str]:
    """The original UNet counts its blocks through: a downsampler is a block, an upsampler the end of one."""
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets_0": "middle_block.0",
        "mid_block.attentions_0": "middle_block.1",
        "mid_block.resnets_1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    last, rows = len(config.channels) - 1, config.blocks_per_level + 1
    for i, j in itertools.product(range(last + 1), range(rows)):
        if j < config.blocks_per_level:
            places[f"down_blocks_{i}.resnets_{j}"] = f"input_blocks.{i * rows + j + 1}.0"
            places[f"down_blocks_{i}.attentions_{j}"] = f"input_blocks.{i * rows + j + 1}.1"
        places[f"up_blocks_{i}.resnets_{j}"] = f"output_blocks.{i * rows + j}.0"
        places[f"up_blocks_{i}.attentions_{j}"] = f"output_blocks.{i * rows + j}.1"
    for i in range(last):
        after_attention = 2 if config.attention_levels[last - i] else 1
        places[f"down_blocks_{i}.downsamplers_0.conv"] = f"input_blocks.{(i + 1) * rows}.0.op"
        places[f"up_blocks_{i}.upsamplers_0.conv"] = f"output_blocks.{(i + 1) * rows - 1}.{after_attention}.conv"
    return places


def _control_places(config: UNetConfig, targets: Collection[str]) -> dict[str, str]:
    """What a ControlNet has besides the UNet's way down. Every second module of the hint's is an activation."""
    hint = "controlnet_cond_embedding"
    count = sum(target.startswith(f"control.{hint}.") and target.endswith(".kernel") for target in targets)
    blocks = [f"{hint}.conv_in", *(f"{hint}.blocks_{i}" for i in range(count - 2)), f"{hint}.conv_out"]
    return {
        **{block: f"input_hint_block.{2 * i}" for i, block in enumerate(blocks)},
        **{
            f"controlnet_down_blocks_{i}": f"zero_convs.{i}.0"
            for i in range(len(config.channels) * (config.blocks_per_level + 1))
        },
        "controlnet_mid_block": "middle_block_out.0",
    }


def _vae_places(config: VAEConfig) -> dict[str, str]:
    """The original autoencoder numbers the decoder's levels from the pixels, diffusers from the latents."""
    places = {}
    for side in ("encoder", "decoder"):
        places[f"{side}.mid_block.resnets_0"] = f"{side}.mid.block_1"
        places[f"{side}.mid_block.attentions_0"] = f"{side}.mid.attn_1"
        places[f"{side}.mid_block.resnets_1"] = f"{side}.mid.block_2"
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
    last = len(config.channels) - 1
    for i, j in itertools.product(range(last + 1), range(config.blocks_per_level + 1)):
        places[f"encoder.down_blocks_{i}.resnets_{j}"] = f"encoder.down.{i}.block.{j}"
        places[f"encoder.down_blocks_{i}.downsamplers_0"] = f"encoder.down.{i}.downsample"
        places[f"decoder.up_blocks_{i}.resnets_{j}"] = f"decoder.up.{last - i}.block.{j}"
        places[f"decoder.up_blocks_{i}.upsamplers_0"] = f"decoder.up.{last - i}.upsample"
    return places
