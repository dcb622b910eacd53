"""LoRA files: kohya's names, diffusers' and PEFT's, brought to our modules and axes.

A module's change is a matrix down (R, I), a matrix up (O, R), in LoCon files (Yeh et al. 2023) convolutions, perhaps
one of the window's size between them, and a number alpha: it adds alpha / R · up down to the kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints import configurations, contents, names
from sdjax.checkpoints.arrays import FLOATS, is_finite
from sdjax.checkpoints.contents import Contents
from sdjax.checkpoints.errors import CheckpointError, shorten
from sdjax.models.config import Config

# Brought to kohya's roles, which stand at a name's end.
SPELLINGS = (
    (r"\.lora_A(\.\w+)?\.weight$", ".lora_down.weight"),
    (r"\.lora_B(\.\w+)?\.weight$", ".lora_up.weight"),
    (r"(\.processor)?\.to_out_lora\.(down|up)\.weight$", r".to_out.0.lora_\2.weight"),
    (r"(\.processor)?\.(to_[qkv])_lora\.(down|up)\.weight$", r".\2.lora_\3.weight"),
    (r"\.lora(_linear_layer)?\.(down|up)\.weight$", r".lora_\2.weight"),
)
ROLE = re.compile(r"(?P<module>.+)\.(?:lora_(?P<matrix>down|up|mid)\.weight|(?P<alpha>alpha))")
PREFIX = re.compile(r"base_model\.model\.|lora_(?=unet|te)")
# What says that a file is no plain LoRA of Stable Diffusion 1 or 2.
OTHERS = (
    (r"hada_|\.hada", "LoHa, Hadamard products"),
    (r"lokr_|\.lokr", "LoKr, Kronecker products"),
    (r"dora_scale|lora_magnitude_vector", "DoRA, which also scales the columns of a weight"),
    (
        r"lora_te2_|lora_unet_(input|output)_blocks_\d+_1_transformer_blocks_[1-9]|text_encoder_2\.",
        "Stable Diffusion XL",
    ),
    (r"lora_unet_(double|single)_blocks|transformer\.(single_)?transformer_blocks", "FLUX or Stable Diffusion 3"),
)


class LowRank(NamedTuple):
    """What is added to one kernel: down @ up, of rank R. (I, R), or for a convolution (kh, kw, I, R); and (R, O)."""

    down: np.ndarray
    up: np.ndarray


def read(path: Path, config: Config, targets: Mapping[str, Any]) -> dict[str, LowRank]:
    """The changes in a LoRA file, by our module (dotted name); alpha / R is in `up`.

    Args:
      path: of a `.safetensors`, or of a PyTorch file.
      config: of the model that it is for.
      targets: what has the `shape` of each of the model's tensors (dotted names).

    Raises:
      CheckpointError: it is no LoRA, or of a kind or for a model that this is not; a tensor is left over, missing, of
        a wrong shape or not finite. All problems of a kind are in one message, and nothing is taken from such a file.
    """
    opened = contents.read(path)
    for pattern, kind in OTHERS:
        if found := next((name for name in opened.tensors if re.search(pattern, name)), None):
            raise CheckpointError(f"{path}: a LoRA of another kind ({kind}), by its tensor {found:.120}")
    modules, left_over, twice = _modules(opened.tensors)
    if not modules:
        raise CheckpointError(f"{path}: no LoRA: none of its {len(opened.tensors)} tensors is one's")
    ours = _table(config, targets)
    unknown = [module for module in modules if _flat(module) not in ours]
    halves = [module for module, parts in modules.items() if not {"down", "up"} <= parts.keys()]
    by_target = {ours[_flat(module)]: module for module in modules if _flat(module) in ours}
    twice += [m for m in modules if _flat(m) in ours and by_target[ours[_flat(m)]] != m]
    _refuse(
        path,
        {
            "not tensors of a LoRA": left_over,
            "for modules the model has not": unknown,
            "halves": halves,
            "twice, under two names": twice,
        },
    )

    scalings = _scalings(path, opened)
    wrong, broken, changes = [], [], {}
    for module, parts in modules.items():
        target = ours[_flat(module)]
        kernel = targets[f"{target}.kernel"].shape
        change = _change(parts, kernel)
        if change is None:
            shapes = " and ".join(str(list(parts[part].shape)) for part in ("down", "up"))
            wrong.append(f"{module} {shapes} for {list(kernel)}")
            continue
        rank = change.up.shape[0]
        alpha = float(parts["alpha"].reshape(())) if "alpha" in parts else None
        scale = alpha / rank if alpha is not None else scalings(module, rank)
        with np.errstate(over="ignore", invalid="ignore"):
            changes[target] = LowRank(change.down, change.up * np.float32(scale))
        if not all(is_finite(x) for x in changes[target]):
            broken.append(module)
    _refuse(path, {"of a wrong shape": wrong, "with NaN or infinity": broken})
    return changes


def _modules(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, np.ndarray]], list[str], list[str]]:
    """By the file's module: its "down", "up", "mid" and "alpha"; names that are none of these; and those met again."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    left_over, twice = [], []
    for name, tensor in tensors.items():
        spelt = name
        for pattern, replacement in SPELLINGS:
            spelt = re.sub(pattern, replacement, spelt)
        role = ROLE.fullmatch(spelt)
        floats = tensor.dtype.name in FLOATS
        if role is None or not (
            floats if role["matrix"] else tensor.size == 1 and (floats or tensor.dtype.kind == "i")
        ):
            left_over.append(name)
            continue
        parts = modules.setdefault(role["module"], {})
        if (part := role["matrix"] or "alpha") in parts:
            twice.append(name)
        parts[part] = tensor
    return modules, left_over, twice


def _table(config: Config, targets: Mapping[str, Any]) -> dict[str, str]:
    """Every name that a module of ours may have in such a file, flat, to its own."""
    table = {}
    kernels = [target for target in targets if target.endswith(".kernel") and not target.startswith("vae.")]
    for layout in (names.folder, names.ldm):
        for target, source in layout(config, kernels).items():
            module = source.name.removesuffix(".weight")
            for root, short in (
                ("model.diffusion_model.", "unet."),
                ("cond_stage_model.transformer.", "text_encoder."),
            ):
                module = module.replace(root, short) if module.startswith(root) else module
            part, rest = module.split(".", 1)
            spellings = [module, rest] if part == "unet" else [module, f"te.{rest}", f"te1.{rest}"]
            spellings += [spelling.replace(".text_model.", ".") for spelling in spellings]
            spellings += [rest] if rest.startswith("text_model.") else []  # PEFT's, of the text encoder alone
            table.update({_flat(spelling): target.removesuffix(".kernel") for spelling in spellings})
    return table


def _flat(module: str) -> str:
    return PREFIX.sub("", module, count=1).replace(".", "_")


def _change(parts: Mapping[str, np.ndarray], kernel: tuple[int, ...]) -> LowRank | None:
    """The two matrices with our axes, in float32; None where they do not make this kernel."""
    window, (inputs, outputs) = kernel[:-2] or (1, 1), kernel[-2:]
    down, up = (x[..., None, None] if x.ndim == 2 else x for x in (parts["down"], parts["up"]))
    if down.ndim != 4 or up.ndim != 4 or 0 in (*down.shape, *up.shape) or up.shape != (outputs, up.shape[1], 1, 1):
        return None
    rank = down.shape[0]
    if "mid" in parts:
        fits = parts["mid"].shape == (up.shape[1], rank, *window) and down.shape == (rank, inputs, 1, 1)
    else:
        fits = up.shape[1] == rank and down.shape == (rank, inputs, *window)
    if not fits:
        return None
    down, up = (x.astype(np.float32) for x in (down, up))
    if "mid" in parts:  # down, window, up: the first two are one convolution
        down = np.einsum("rshw,si->rihw", parts["mid"].astype(np.float32), down[:, :, 0, 0])
    down = down.transpose(2, 3, 1, 0) if len(kernel) == 4 else down[:, :, 0, 0].T
    return LowRank(down, up[:, :, 0, 0].T)


def _scalings(path: Path, opened: Contents) -> Any:
    """(module, rank) -> alpha / rank where no tensor says it: PEFT writes it into a configuration, others leave 1."""
    said: Any = {}
    if text := opened.metadata.get("lora_adapter_metadata"):
        try:
            said = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its lora_adapter_metadata cannot be read: {error}") from error
        if not isinstance(said, dict):
            raise CheckpointError(f"{path}: its lora_adapter_metadata is no object")
    elif path.stem == "adapter_model":
        own = configurations.read_json(path.with_name("adapter_config.json"))
        said = {f"{part}.{key}": value for key, value in own.items() for part in ("unet", "text_encoder")}

    def scaling(module: str, rank: int) -> float:
        part = "text_encoder" if module.startswith("text_encoder") else "unet"
        patterns = said.get(f"{part}.alpha_pattern") or {}
        # PEFT takes them for regular expressions; a stranger's are not run.
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in patterns):
            raise CheckpointError(f"{path}: its alpha_pattern is not one of plain names of modules")
        own = [value for name, value in patterns.items() if f".{module}".endswith(f".{name}")]
        alpha = own[0] if own else said.get(f"{part}.lora_alpha")
        if alpha is None:
            return 1.0
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            raise CheckpointError(f"{path}: its lora_alpha is {alpha!r:.40}, no number that could be one")
        return float(alpha) / (rank**0.5 if said.get(f"{part}.use_rslora") else rank)

    return scaling


def _refuse(path: Path, problems: Mapping[str, list[str]]) -> None:
    if any(problems.values()):
        lists = "; ".join(f"{what} ({len(items)}): {shorten(items)}" for what, items in problems.items() if items)
        raise CheckpointError(f"{path}: this LoRA is not one for the model, and none of it is taken: {lists}")
