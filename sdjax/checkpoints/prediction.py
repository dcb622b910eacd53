"""What an original file's UNet was trained to return, which no tensor's name or shape says."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import numpy as np

from sdjax.checkpoints import names
from sdjax.checkpoints.contents import Contents
from sdjax.models.config import SD2_BASE, SD2_V, Config

logger = logging.getLogger(__name__)

MAX_YAML = 1 << 20  # bytes
# ComfyUI's rule for Stable Diffusion 2: in this tensor the models of the velocity are wider spread than the others.
TELLING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SPREAD = 0.09


def configured(path: Path, opened: Contents, config: Config, prediction: str | None) -> Config:
    """The configuration of an original file with its prediction type.

    That is what the caller says; or what the file's metadata say (`modelspec.prediction_type`); or the
    `parameterization` in a `.yaml` of the same name beside it, which these files were published with; or, for Stable
    Diffusion 2, what the numbers of the UNet suggest.
    """
    if prediction is None:
        prediction = _metadata(opened) or _sidecar(path.with_suffix(".yaml"))
    if config != SD2_V:
        return dataclasses.replace(config, prediction=prediction or config.prediction)
    if prediction is None:
        prediction = _by_spread(path, opened)
    return config if prediction == "v" else dataclasses.replace(SD2_BASE, prediction=prediction)


def _metadata(opened: Contents) -> str | None:
    said = str(opened.metadata.get("modelspec.prediction_type", "")).lower()
    return {"v": "v", "epsilon": "epsilon"}.get(said)


def _sidecar(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_YAML)
    except (OSError, UnicodeDecodeError):
        return None
    if found := re.search(r"""^[ \t]*parameterization[ \t]*:[ \t]*["']?(\w+)""", text, re.MULTILINE):
        return {"v": "v", "eps": "epsilon", "x0": "sample"}.get(found[1])
    return "epsilon" if "ldm.models.diffusion" in text else None  # the original code's default


def _by_spread(path: Path, opened: Contents) -> str:
    found = opened.tensors.get(TELLING, opened.tensors.get(names.ema_name(TELLING)))
    prediction = "v" if found is not None and np.std(found.astype(np.float64)) > SPREAD else "epsilon"
    meant = {"v": "the velocity (768 pixels)", "epsilon": "the noise (512 pixels)"}[prediction]
    logger.warning(
        "%s: nothing says what this Stable Diffusion 2 predicts; by its numbers it is %s. If its pictures are noise,"
        ' load it with prediction="%s"',
        path.name,
        meant,
        "epsilon" if prediction == "v" else "v",
    )
    return prediction
