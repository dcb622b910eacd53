"""Configurations that come from files: a diffusers folder's JSON read into ours, and any of ours checked.

Whatever in a folder's configuration would change the network, and our models do not have, is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdjax.checkpoints import schedulers
from sdjax.checkpoints.errors import CheckpointError
from sdjax.models.config import Config, TextEncoderConfig

MAX_JSON = 1 << 20  # bytes

# Fields with which diffusers and transformers change what is computed, at the one value that our models have.
# Absent or null is taken as that value: the older the folder, the fewer of them there are.
TEXT_ENCODER_FIXED = {"layer_norm_eps": 1e-5, "model_type": "clip_text_model"}
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": False,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
CONTROLNET_FIXED = {
    **{name: value for name, value in UNET_FIXED.items() if name not in ("conv_in_kernel", "conv_out_kernel")},
    "controlnet_conditioning_channel_order": "rgb",
    "conditioning_channels": 3,
    "global_pool_conditions": False,
}
VAE_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
ACTIVATIONS = ("quick_gelu", "gelu")
# What texts are filled up with: the end token, or as OpenCLIP does, the token 0.
PADDINGS = {"<|endoftext|>": TextEncoderConfig.padding_id, "!": 0}
# The names of the parts' classes in their files, FlaxUNet2DConditionModel and its like without the Flax.
CLASSES = {"clip_text_model": "text_encoder", "UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
UNET_LEVELS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file. Raises CheckpointError where the file is missing, too large or something else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file, which a diffusers folder has")
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: larger than the configuration of a model")
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return fields


def read_folder(folder: Path) -> Config:
    """The configuration of a diffusers folder from its `*/config.json` and `scheduler/scheduler_config.json`.

    Raises:
      CheckpointError: a file is missing or malformed, or describes another model than Stable Diffusion 1 or 2 is.
    """
    paths = {part: folder / part / "config.json" for part in CLASSES.values()}
    fields = {part: read_json(path) for part, path in paths.items()}
    schedule = folder / "scheduler" / "scheduler_config.json"
    with _told(folder):
        parts = {part: _part(part, path, fields[part]) for part, path in paths.items()}
        config = Config.from_dict({**parts, **schedulers.read(schedule, read_json(schedule))})
    if isinstance(size := fields["unet"].get("sample_size"), int):
        config = dataclasses.replace(config, image_size=size * config.vae.factor)
    check(config, folder)
    return config


def read_part(path: Path) -> tuple[str, Any]:
    """Which part of a model a `config.json` is of, "text_encoder", "unet" or "vae", and its configuration.

    Raises:
      CheckpointError: the file is missing or malformed, or of another model.
    """
    fields = read_json(path)
    said = fields.get("_class_name") or fields.get("model_type")
    kind = said.removeprefix("Flax") if isinstance(said, str) else ""
    if kind not in CLASSES:
        raise CheckpointError(f"{path}: it configures {said!r:.60}; parts of a model are {', '.join(CLASSES)}")
    part = CLASSES[kind]
    with _told(path):
        return part, getattr(Config.from_dict({part: _part(part, path, fields)}), part)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What is wrong with a configuration, as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: its configuration lacks, or has an unknown, {error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read: {error}") from error


def _part(part: str, path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a part's `config.json` says, as our fields."""
    readers: dict[str, tuple[Mapping[str, Any], Callable[[Path, Mapping[str, Any]], dict[str, Any]]]] = {
        "text_encoder": (TEXT_ENCODER_FIXED, _text_encoder),
        "unet": (UNET_FIXED, _unet),
        "vae": (VAE_FIXED, _vae),
    }
    fixed, read = readers[part]
    _refuse_others(path, fields, fixed)
    return read(path, fields)


def check_controlnet(path: Path, config: Config) -> None:
    """Whether a ControlNet's `config.json` is of one for a model of this configuration.

    Raises:
      CheckpointError: it is missing, malformed, or of another.
    """
    fields = read_json(path)
    if fields.get("_class_name") != "ControlNetModel":
        raise CheckpointError(f"{path}: it configures {fields.get('_class_name')!r:.60}, not a ControlNetModel")
    _refuse_others(path, fields, CONTROLNET_FIXED)
    try:
        heads = tuple(_heads(fields, len(config.unet.channels)))
    except TypeError as error:
        raise CheckpointError(f"{path}: it cannot be read: {error}") from error
    if heads != config.unet.num_heads:
        raise CheckpointError(
            f"{path}: for another model: attention has {heads!r:.60} heads, {config.unet.num_heads} here"
        )
    if (groups := fields.get("norm_num_groups", 32)) != config.unet.norm_groups:
        raise CheckpointError(
            f"{path}: for another model: norms have {groups!r:.20} groups, {config.unet.norm_groups} here"
        )


def _text_encoder(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": fields["vocab_size"],
        "max_positions": fields["max_position_embeddings"],
        "width": fields["hidden_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "mlp_width": fields["intermediate_size"],
        "activation": fields.get("hidden_act", "quick_gelu"),
        "padding_id": _padding(path.parent.parent / "tokenizer", fields),
    }


def _padding(folder: Path, text_encoder: Mapping[str, Any]) -> int:
    """The token id that the folder's tokenizer fills up with; by the kind of text encoder where it does not say."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the first overrides the second
        path = folder / name
        token = read_json(path).get("pad_token") if path.is_file() else None
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            if token not in PADDINGS:
                raise CheckpointError(f"{path}: its pad_token is {token!r:.40}; sdjax has {' and '.join(PADDINGS)}")
            return PADDINGS[token]
    return 0 if text_encoder.get("hidden_act") == "gelu" else TextEncoderConfig.padding_id


def _unet(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    levels = [UNET_LEVELS[kind] for kind in fields["down_block_types"]]
    if [kind.replace("Up", "Down") for kind in fields["up_block_types"]][::-1] != fields["down_block_types"]:
        raise CheckpointError(f"{path}: its up_block_types are not its down_block_types backwards")
    return {
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "channels": fields["block_out_channels"],
        "blocks_per_level": _same(path, fields["layers_per_block"], "layers_per_block"),
        "attention_levels": levels,
        "num_heads": _heads(fields, len(levels)),
        "context_width": _same(path, fields["cross_attention_dim"], "cross_attention_dim"),
        "linear_projection": fields.get("use_linear_projection") or False,
        "norm_groups": fields.get("norm_num_groups", 32),
    }


def _heads(fields: Mapping[str, Any], levels: int) -> Any:
    """Of attention, for each level. In diffusers' UNets of this age "attention_head_dim" is their number."""
    heads = fields.get("num_attention_heads") or fields.get("attention_head_dim", 8)
    return [heads] * levels if isinstance(heads, int) else heads


def _vae(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {*fields["down_block_types"], *fields["up_block_types"]}
    if kinds != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise CheckpointError(f"{path}: blocks of kinds that sdjax does not have: {', '.join(sorted(kinds)):.200}")
    return {
        "latent_channels": fields["latent_channels"],
        "channels": fields["block_out_channels"],
        "blocks_per_level": fields["layers_per_block"],
        "norm_groups": fields.get("norm_num_groups", 32),
        "scaling_factor": float(fields.get("scaling_factor", 0.18215)),
    }


def _same(path: Path, value: Any, name: str) -> Any:
    """One number for all levels, which newer files may repeat for each."""
    if isinstance(value, list) and value:
        if value.count(value[0]) != len(value):
            raise CheckpointError(f"{path}: {name} differs between levels, which sdjax does not have: {value!r:.80}")
        return value[0]
    return value


def _refuse_others(path: Path, fields: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    found = {name: _same(path, fields.get(name), name) for name in fixed}
    others = [f"{name} is {found[name]!r:.40}" for name in fixed if found[name] not in (None, fixed[name])]
    if others:
        raise CheckpointError(
            f"{path}: {', '.join(others)}; the networks of sdjax, those of Stable Diffusion 1 and 2, do not have that"
        )


def check(config: Config, path: str | os.PathLike[str]) -> None:
    """Whether a configuration from a file describes a network that can be built, of a size that exists.

    Raises:
      CheckpointError: it names the fields that do not.
    """
    text, unet, vae = config.text_encoder, config.unet, config.vae
    wrong = [f"{part}{name}" for part, fields in _parts(config) for name, value in fields if not _is_size(value)]
    if not wrong:
        rules = {
            "text_encoder.num_layers": text.num_layers <= 128,
            "text_encoder.num_heads": text.width % text.num_heads == 0,
            "text_encoder.activation": text.activation in ACTIVATIONS,
            "text_encoder.padding_id": 0 <= text.padding_id < text.vocab_size,
            "unet.blocks_per_level": unet.blocks_per_level <= 16,
            "unet.attention_levels": len(unet.attention_levels) == len(unet.channels),
            "unet.num_heads": len(unet.num_heads) == len(unet.channels)
            and not any(width % heads for width, heads in zip(unet.channels, unet.num_heads, strict=True)),
            "unet.channels": not any(width % unet.norm_groups for width in unet.channels) and unet.channels[0] % 2 == 0,
            "unet.context_width": unet.context_width == text.width,
            "unet.in_channels": unet.in_channels == vae.latent_channels or config.edits or config.inpaints,
            "unet.out_channels": unet.out_channels == vae.latent_channels,
            "vae.blocks_per_level": vae.blocks_per_level <= 16,
            "vae.channels": not any(width % vae.norm_groups for width in vae.channels),
            "vae.scaling_factor": 0 < vae.scaling_factor < math.inf,
            "beta_start, beta_end": 0 < config.beta_start <= config.beta_end < 1,
            "beta_schedule": config.beta_schedule in schedulers.BETA_SCHEDULES.values(),
            "zero_terminal_snr": not (config.zero_terminal_snr and config.prediction == "epsilon"),
            "steps_offset": 0 <= config.steps_offset <= config.num_train_timesteps,
            "spacings": all(isinstance(spacing, str) for spacing in config.spacings)
            and set(config.spacings) <= {*schedulers.TIMESTEP_SPACINGS, *schedulers.SIGMAS.values()},
            "prediction": config.prediction in schedulers.PREDICTIONS.values(),
            "image_size": config.image_size % vae.factor == 0,
        }
        wrong = [name for name, right in rules.items() if not right]
    if wrong:
        raise CheckpointError(f"{path}: no model of sdjax can have what its configuration says of {', '.join(wrong)}")


def _parts(config: Config) -> list[tuple[str, Any]]:
    """Each part's name and fields, the configuration's own last; but those that may be 0."""
    parts = {"text_encoder.": config.text_encoder, "unet.": config.unet, "vae.": config.vae, "": config}
    no_sizes = (*(part.removesuffix(".") for part in parts), "steps_offset", "padding_id", "spacings")
    return [
        (part, [(name, value) for name, value in vars(fields).items() if name not in no_sizes])
        for part, fields in parts.items()
    ]


def _is_size(value: Any) -> bool:
    """Whether an integer is one that a network could have; so are the members of a tuple, and what is no integer."""
    if isinstance(value, tuple):
        same = len({type(member) for member in value}) == 1 and isinstance(value[0], int)
        return len(value) <= 8 and same and all(_is_size(member) for member in value)
    return not isinstance(value, int) or isinstance(value, bool) or 1 <= value <= 1 << 20
