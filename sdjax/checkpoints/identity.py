"""What model a checkpoint is, by the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints import contents, names, native
from sdjax.checkpoints.contents import Contents
from sdjax.models.config import SD1, SD1_EDITING, SD1_INPAINTING, SD2_INPAINTING, SD2_V, Config


class Identity(NamedTuple):
    """`config` is that of an original file that sdjax reads, and None for everything else."""

    kind: str
    config: Config | None = None


# The first pattern that some name begins with decides: what is particular comes before what many models share.
FAMILIES = (
    (r"lora_|.*\.(lora_(up|down|[AB]|linear_layer)|lora\.(up|down)|hada_w1_a|lokr_w1)\b|.*_lora\.", "a LoRA"),
    (r"string_to_param$|string_to_token$|emb_params$|<.+>$", "a textual inversion, one word's embedding"),
    (r"control_model\.|(.*\.)?(input_hint_block|controlnet_cond_embedding|zero_convs)\.", "a ControlNet"),
    (r"(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r".*motion_modules\.", "a motion module of AnimateDiff"),
    (r"conditioner\.embedders\.", "Stable Diffusion XL"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?(double_blocks|single_transformer_blocks)\.", "FLUX"),
)
# A part by itself, once it is clear that nothing else is there.
PARTS = (
    (r"(model\.diffusion_model\.)?input_blocks\.|down_blocks\.\d+\.resnets\.\d+\.time_emb_proj\.", "a UNet alone"),
    (r"(first_stage_model\.)?(encoder|decoder)\.(down|up|mid)(_block(s)?)?\.", "an autoencoder (VAE) alone"),
    (r"(cond_stage_model\.transformer\.)?(text_model\.)?(encoder\.layers|embeddings)\.", "a text encoder alone"),
)
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionInstructPix2PixPipeline",
    "FlaxStableDiffusionPipeline",
    "FlaxStableDiffusionImg2ImgPipeline",
    "FlaxStableDiffusionInpaintPipeline",
)
CONFIG = "sdjax.config"  # in the metadata of an original file that we wrote
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
INPUT = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
IN_CHANNELS = {
    4: "",
    9: " for inpainting",
    5: " with a depth map as its input",
    7: " for upscaling",
    8: " of the InstructPix2Pix kind",
}
CONFIGS = {
    (768, 4): SD1,
    (768, 8): SD1_EDITING,
    (768, 9): SD1_INPAINTING,
    (1024, 4): SD2_V,
    (1024, 9): SD2_INPAINTING,
}


def identify(opened: Contents) -> Identity:
    """What the tensors are, in words that finish the sentence "this is ..."."""
    if opened.format in (contents.FOLDER, contents.FLAX):
        return _folder(opened)
    if opened.is_native:
        return Identity("a native file of sdjax")
    tensors = opened.tensors
    for pattern, kind in FAMILIES:
        if _any(pattern, (*tensors, *opened.others)):
            return Identity(kind)
    context, inputs = _shape(tensors, CONTEXT), _shape(tensors, INPUT)
    whole = _any(r"first_stage_model\.", tensors) or _any(r"cond_stage_model\.", tensors)
    if whole and len(context) == 2 and len(inputs) == 4:
        family = CONTEXT_WIDTHS.get(context[1], f"a latent diffusion model with a context {context[1]} wide")
        version = IN_CHANNELS.get(inputs[1], f" with {inputs[1]} input channels")
        return Identity(family + version, CONFIGS.get((context[1], inputs[1])))
    for pattern, kind in PARTS:
        if _any(pattern, tensors):
            return Identity(kind)
    return Identity("no model that sdjax knows" if tensors else "a file without tensors")


def configuration(opened: Contents, path: Path) -> Config | None:
    """What a file that sdjax wrote says of itself, in whatever layout; None where another program wrote it.

    Raises:
      CheckpointError: it says what no model could have.
    """
    if opened.is_native:
        return native.config_of(opened.metadata, path)
    return native.parse(opened.metadata[CONFIG], path) if CONFIG in opened.metadata else None


def has_averages(tensors: Iterable[str]) -> bool:
    """Whether an original file has the moving averages of its UNet beside the last values."""
    return any(name.startswith(f"{names.EMA_ROOT}diffusion_model") for name in tensors)


def _folder(opened: Contents) -> Identity:
    pipeline = opened.metadata.get("_class_name")
    if pipeline not in PIPELINES:
        return Identity(f"a diffusers folder of {pipeline!r:.80}")
    if opened.format == contents.FLAX:  # its matrices lie as ours do
        telling = (
            ("unet.down_blocks_0.attentions_0.transformer_blocks_0.attn2.to_k.kernel", 0),
            ("unet.conv_in.kernel", 2),
        )
    else:
        telling = (
            ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
            ("unet.conv_in.weight", 1),
        )
    context, inputs = (_size(opened.tensors, name, axis) for name, axis in telling)
    family = CONTEXT_WIDTHS.get(context, "Stable Diffusion of another size")
    return Identity(family + IN_CHANNELS.get(inputs, " with other input channels"))


def _size(tensors: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    shape = _shape(tensors, name)
    return shape[axis] if axis < len(shape) else 0


def _any(pattern: str, strings: Iterable[str]) -> bool:
    compiled = re.compile(pattern)
    return any(compiled.match(string) for string in strings)


def _shape(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    """Of the tensor or its moving average; () if there is neither."""
    found: Any = tensors.get(name, tensors.get(names.ema_name(name)))
    return () if found is None else found.shape
