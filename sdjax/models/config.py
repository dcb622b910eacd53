"""The sizes of a model: frozen dataclasses, one tree of them per checkpoint family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextEncoderConfig:
    """CLIP's text transformer (Radford et al. 2021)."""

    vocab_size: int = 49408
    max_positions: int = 77
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # "gelu" in OpenCLIP's models
    padding_id: int = 49407  # after the end token: the end token again, or 0 as OpenCLIP has it


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser (Rombach et al. 2022): a U-Net with cross-attention to the text."""

    # 9 for inpainting: latents, mask, latents of the masked picture; 8 for editing: latents, latents of the picture.
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks_per_level: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_width: int = 768
    linear_projection: bool = False  # SD 2 projects into its transformers with a matrix, SD 1 with a 1x1 convolution
    norm_groups: int = 32


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pixels and latents (Esser et al. 2021, with a KL term)."""

    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215  # makes the latents' standard deviation about 1

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class Config:
    """Everything about a checkpoint but its weights, its noise schedule included."""

    text_encoder: TextEncoderConfig = TextEncoderConfig()
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    beta_schedule: str = "scaled_linear"  # `Schedule.kind`
    zero_terminal_snr: bool = False
    steps_offset: int = 1
    set_alpha_to_one: bool = False  # where the last step of DDIM and its like ends: `samplers.create`
    spacings: tuple[str, ...] = ()  # of samplers' steps, the first that a sampler has; none: each sampler's own
    prediction: str = "epsilon"  # what the UNet was trained to return: "epsilon", "v" or "sample"
    image_size: int = 512  # pixels per side that the model was trained at

    @property
    def edits(self) -> bool:
        """Whether the model takes a picture beside the latents (InstructPix2Pix, Brooks et al. 2023)."""
        return self.unet.in_channels == 2 * self.vae.latent_channels

    @property
    def inpaints(self) -> bool:
        """Whether the model takes a mask and the masked picture beside the latents."""
        return self.unet.in_channels == 2 * self.vae.latent_channels + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises ValueError for an unknown field or one of the wrong kind."""
        parts = {"text_encoder": TextEncoderConfig, "unet": UNetConfig, "vae": VAEConfig}
        fields = {k: _build(parts[k], v, k) if k in parts else v for k, v in fields.items()}
        return _build(cls, fields, "config")


def _build(cls: type, fields: Any, where: str) -> Any:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object, got {type(fields).__name__}")
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    values = {}
    for name, value in fields.items():
        if name not in defaults:
            raise ValueError(f"{where}: unknown field {name!r:.80}; known are {', '.join(defaults)}")
        value = tuple(value) if isinstance(value, list) else value
        if type(value) is not type(defaults[name]):
            raise ValueError(f"{where}.{name}: expected {type(defaults[name]).__name__}, got {value!r:.80}")
        values[name] = value
    return cls(**values)


SD1 = Config()
SD1_INPAINTING = dataclasses.replace(SD1, unet=dataclasses.replace(SD1.unet, in_channels=9))
SD1_EDITING = dataclasses.replace(SD1, unet=dataclasses.replace(SD1.unet, in_channels=8))
# OpenCLIP's ViT-H has one layer more, which SD 2 does not use.
SD2_BASE = Config(
    text_encoder=TextEncoderConfig(
        width=1024, num_layers=23, num_heads=16, mlp_width=4096, activation="gelu", padding_id=0
    ),
    unet=UNetConfig(num_heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
)
SD2_INPAINTING = dataclasses.replace(SD2_BASE, unet=dataclasses.replace(SD2_BASE.unet, in_channels=9))
SD2_V = dataclasses.replace(SD2_BASE, prediction="v", image_size=768)

# Every part of SD 1 at a size for tests: all kinds of blocks, head sizes that are not powers of two, in milliseconds.
TINY = Config(
    text_encoder=TextEncoderConfig(width=40, num_layers=2, num_heads=4, mlp_width=96),
    unet=UNetConfig(
        channels=(32, 64),
        blocks_per_level=2,
        attention_levels=(True, False),
        num_heads=(4, 4),
        context_width=40,
        norm_groups=8,
    ),
    vae=VAEConfig(channels=(16, 32), blocks_per_level=1, norm_groups=8),
    image_size=64,
)
# What SD 2 has otherwise: the activation, the padding, heads of one size, a matrix for a convolution, the velocity.
TINY_2 = dataclasses.replace(
    TINY,
    text_encoder=dataclasses.replace(TINY.text_encoder, activation="gelu", padding_id=0),
    unet=dataclasses.replace(TINY.unet, num_heads=(2, 4), linear_projection=True),
    prediction="v",
)
