"""A diffusers folder's `scheduler_config.json`: the noise schedule of training, and how samplers are set up for it.

Which sampler, of which order and kind, is not taken from it: `generate(sampler=)` says that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.checkpoints.errors import CheckpointError
from sdjax.models.config import Config

logger = logging.getLogger(__name__)

BETA_SCHEDULES = {
    "scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "squared_cosine", "sigmoid": "sigmoid",
}  # fmt: skip
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
# Flags that say a spacing of sigmas, for the schedulers that have it; the others keep the timesteps'.
SIGMAS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
}
# Without these a model's pictures would be others, and nothing here does the same.
FIXED = {"trained_betas": None, "thresholding": False, "use_flow_sigmas": False}
# Refinements that samplers here do not have, at the value at which they do nothing.
PASSED_OVER = {
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "sigma_max": None,
    "sigma_min": None,
    "timestep_type": "discrete",
}


def read(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a `Config` that a scheduler's file says. What it refines beyond them is counted in a warning.

    Raises:
      KeyError: a beta schedule or prediction type that is not known.
      CheckpointError: a setting without which the pictures would be others.
    """
    others = _unlike(FIXED, fields)
    spacing = fields.get("timestep_spacing")
    if spacing not in (None, *TIMESTEP_SPACINGS):
        others.append(f"timestep_spacing is {spacing!r:.40}")
    if others:
        raise CheckpointError(f"{path}: {', '.join(others)}; the samplers of sdjax do not have that")
    if passed_over := _unlike(PASSED_OVER, fields):
        logger.warning("%s: %d settings are passed over: %s", path, len(passed_over), ", ".join(passed_over))
    # diffusers' own defaults, where the file leaves a field out.
    is_ddim = fields.get("_class_name") == "DDIMScheduler"
    return {
        "num_train_timesteps": fields.get("num_train_timesteps", 1000),
        "beta_start": float(fields.get("beta_start", 0.0001)),
        "beta_end": float(fields.get("beta_end", 0.02)),
        "beta_schedule": BETA_SCHEDULES[fields.get("beta_schedule", "linear")],
        "zero_terminal_snr": fields.get("rescale_betas_zero_snr", False),
        # Its pipelines for Stable Diffusion set `steps_offset` to 1 and `clip_sample` to False, whatever is written.
        "steps_offset": 1,
        "set_alpha_to_one": fields.get("set_alpha_to_one", is_ddim),
        "spacings": [
            *(name for flag, name in SIGMAS.items() if fields.get(flag) is True),
            *([spacing] if spacing else []),
        ],
        "prediction": PREDICTIONS[fields.get("prediction_type", "epsilon")],
    }


def _unlike(expected: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """The fields that are there and are not as expected, in words."""
    return [
        f"{name} is {fields[name]!r:.40}" for name, value in expected.items() if fields.get(name) not in (None, value)
    ]


def write(config: Config) -> dict[str, Any]:
    """The inverse of `read`."""
    kinds = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    fields = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": kinds[config.beta_schedule],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "prediction_type": predictions[config.prediction],
        "steps_offset": config.steps_offset,
        "set_alpha_to_one": config.set_alpha_to_one,
        "clip_sample": False,
    }
    flags = {flag: True for flag, name in SIGMAS.items() if name in config.spacings}
    spacing = next((name for name in config.spacings if name in TIMESTEP_SPACINGS), None)
    return {**fields, **flags, **({"timestep_spacing": spacing} if spacing else {})}
