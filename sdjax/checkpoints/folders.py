"""diffusers' folders, written: what `StableDiffusionPipeline.from_pretrained` and we ourselves read back."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import tokenizer
from sdjax.checkpoints import configurations, safetensors, schedulers
from sdjax.checkpoints.contents import PARTS, STEMS
from sdjax.models.config import Config


def write(path: Path, tensors: Mapping[str, np.ndarray], config: Config, dtype: str | None, source: str) -> None:
    """Writes a folder, whole or not at all.

    Args:
      path: of the folder, which must not be there.
      tensors: diffusers' names, with the part's before them, as `export` makes them.
      config: of the model.
      dtype: to round the numbers to; None keeps theirs.
      source: what it was made of, for the files' metadata.

    Raises:
      FileExistsError: the path is there.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name")
    texts = _texts(config)
    temporary = path.absolute().with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    temporary.mkdir()
    try:
        for part in PARTS:
            own = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
            (temporary / part).mkdir()
            metadata = {"format": "pt", "source": source}
            safetensors.write(temporary / part / f"{STEMS[part][0]}.safetensors", own, metadata, dtype)
        for name, text in texts.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            with open(temporary / name, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _texts(config: Config) -> dict[str, str]:
    """Every file but the weights, by its name."""
    paddings = {i: token for token, i in configurations.PADDINGS.items()}
    if config.text_encoder.padding_id not in paddings:
        raise ValueError(f"layout: diffusers' tokenizer has no name for the padding {config.text_encoder.padding_id}")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = paddings[config.text_encoder.padding_id]
    kind = "InstructPix2Pix" if config.edits else "Inpaint" if config.inpaints else ""
    objects: dict[str, Any] = {
        "model_index.json": {
            "_class_name": f"StableDiffusion{kind}Pipeline",
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
        "text_encoder/config.json": _text_encoder(config),
        "unet/config.json": _unet(config),
        "vae/config.json": _vae(config),
        "scheduler/scheduler_config.json": schedulers.write(config),
        "tokenizer/special_tokens_map.json": special,
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": config.text_encoder.max_positions,
            **special,
        },
    }
    written = {name: json.dumps(fields, indent=2) + "\n" for name, fields in objects.items()}
    return written | {f"tokenizer/{name}": text for name, text in tokenizer.vocabulary_files().items()}


def _text_encoder(config: Config) -> dict[str, Any]:
    sizes = config.text_encoder
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.max_positions,
        "hidden_size": sizes.width,
        "projection_dim": sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.mlp_width,
        "hidden_act": sizes.activation,
        "layer_norm_eps": configurations.TEXT_ENCODER_FIXED["layer_norm_eps"],
        "bos_token_id": tokenizer.START_ID,
        "eos_token_id": tokenizer.END_ID,
        "pad_token_id": sizes.padding_id,
    }


def _unet(config: Config) -> dict[str, Any]:
    sizes = config.unet
    kinds = {attends: kind for kind, attends in configurations.UNET_LEVELS.items()}
    down = [kinds[attends] for attends in sizes.attention_levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "block_out_channels": sizes.channels,
        "layers_per_block": sizes.blocks_per_level,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in down[::-1]],
        "attention_head_dim": sizes.num_heads,  # diffusers' name for their number
        "cross_attention_dim": sizes.context_width,
        "use_linear_projection": sizes.linear_projection,
        "norm_num_groups": sizes.norm_groups,
        "sample_size": config.image_size // config.vae.factor,
    }


def _vae(config: Config) -> dict[str, Any]:
    sizes = config.vae
    levels = len(sizes.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": sizes.latent_channels,
        "block_out_channels": sizes.channels,
        "layers_per_block": sizes.blocks_per_level,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": sizes.norm_groups,
        "scaling_factor": sizes.scaling_factor,
        "sample_size": config.image_size,
    }
