"""What algorithms there are, and what there is to know of each besides its function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdjax import spacings
from sdjax.samplers.adams import ipndm, lms, plms, pndm
from sdjax.samplers.cfg_pp import ddim_cfg_pp, dpmpp_2m_cfg_pp, euler_ancestral_cfg_pp, euler_cfg_pp
from sdjax.samplers.ddim import ddim, ddim_inverse
from sdjax.samplers.ddpm import ddpm
from sdjax.samplers.dpm2 import dpm2, dpm2_ancestral
from sdjax.samplers.dpm_solver import (
    deis,
    dpm_multistep,
    dpm_singlestep,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_3m_sde,
)
from sdjax.samplers.dpmpp_ancestral import dpmpp_2s_ancestral, dpmpp_sde
from sdjax.samplers.er_sde import er_sde
from sdjax.samplers.euler import euler, euler_ancestral
from sdjax.samplers.heun import heun, restart
from sdjax.samplers.lcm import lcm, tcd
from sdjax.samplers.res import res_multistep
from sdjax.samplers.run import Scale, Value
from sdjax.samplers.sa_solver import sa_solver
from sdjax.samplers.unipc import unipc
from sdjax.spacings import DISTILLED, DPM, FRACTIONAL, KDPM2, WHOLE, Spacing, Whole


@dataclass(frozen=True)
class Algorithm:
    """A row of the registry.

    Args:
      function: (run, x, **options) -> x: it steps from noise to the clean latents by what `Run` offers.
      names: ours; then those of diffusers and of A1111 where they differ by more than case.
      scale: of its latents: "vp", the model's, or "ve", x0 + sigma·noise.
      spacings: those that its points may have.
      spacing: the default: diffusers' for Stable Diffusion 1.5, or the inventor's where diffusers has no such sampler.
      ends: where its last step may end, the default first: "zero", at no noise, or "min", at the first timestep's.
      inverse: whether it goes from the clean latents to noise, over the same points.
    """

    function: Callable[..., Value]
    names: tuple[str, ...]
    scale: Scale
    spacings: spacings.Table
    spacing: str
    ends: tuple[str, ...] = ("zero",)
    inverse: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def options(self) -> dict[str, Any]:
        """The names of its options, with their defaults."""
        parameters = list(inspect.signature(self.function).parameters.values())[2:]
        return {parameter.name: parameter.default for parameter in parameters}

    def points(self, spacing: str | Spacing) -> Spacing:
        """One of its spacings by name; or another, on whole timesteps where it knows no others."""
        if isinstance(spacing, str):
            return dict(self.spacings)[spacing]
        whole = all(isinstance(own, Whole) for _, own in self.spacings)
        return Whole(spacing) if whole and not isinstance(spacing, Whole) else spacing


EITHER = ("zero", "min")

ALGORITHMS = (
    Algorithm(ddpm, ("ddpm", "DDPMScheduler"), "vp", WHOLE, "leading"),
    Algorithm(ddim, ("ddim", "DDIMScheduler"), "vp", WHOLE, "leading"),
    Algorithm(ddim_inverse, ("ddim_inverse", "DDIMInverseScheduler"), "vp", WHOLE, "leading", inverse=True),
    Algorithm(ddim_cfg_pp, ("ddim_cfg_pp", "DDIM CFG++"), "vp", WHOLE, "leading"),
    Algorithm(plms, ("plms", "PNDMScheduler"), "vp", WHOLE, "leading"),
    Algorithm(pndm, ("pndm",), "vp", WHOLE, "leading"),
    Algorithm(lms, ("lms", "LMSDiscreteScheduler"), "ve", FRACTIONAL, "linspace"),
    Algorithm(ipndm, ("ipndm", "IPNDMScheduler"), "ve", FRACTIONAL, "linspace"),
    Algorithm(euler, ("euler", "EulerDiscreteScheduler"), "ve", FRACTIONAL, "linspace"),
    Algorithm(
        euler_ancestral,
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", "Euler a"),
        "ve",
        FRACTIONAL,
        "linspace",
    ),
    Algorithm(euler_cfg_pp, ("euler_cfg_pp", "Euler CFG++"), "ve", FRACTIONAL, "linspace"),
    Algorithm(euler_ancestral_cfg_pp, ("euler_ancestral_cfg_pp", "Euler a CFG++"), "ve", FRACTIONAL, "linspace"),
    Algorithm(heun, ("heun", "HeunDiscreteScheduler"), "ve", FRACTIONAL, "linspace"),
    Algorithm(restart, ("restart",), "ve", FRACTIONAL, "karras"),
    Algorithm(dpm2, ("dpm2", "KDPM2DiscreteScheduler"), "ve", KDPM2, "linspace"),
    Algorithm(dpm2_ancestral, ("dpm2_ancestral", "KDPM2AncestralDiscreteScheduler", "DPM2 a"), "ve", KDPM2, "linspace"),
    Algorithm(dpm_multistep, ("dpm_multistep",), "vp", DPM, "linspace", ("min", "zero")),
    Algorithm(dpm_singlestep, ("dpm_singlestep",), "vp", DPM, "linspace", ("min", "zero")),
    Algorithm(deis, ("deis", "DEISMultistepScheduler"), "vp", DPM, "linspace", ("min", "zero")),
    Algorithm(dpmpp_2m, ("dpmpp_2m", "DPMSolverMultistepScheduler", "DPM++ 2M"), "vp", DPM, "linspace", EITHER),
    Algorithm(functools.partial(dpmpp_2m, order=3), ("dpmpp_3m",), "vp", DPM, "linspace", EITHER),
    Algorithm(dpmpp_2m_cfg_pp, ("dpmpp_2m_cfg_pp", "DPM++ 2M CFG++"), "ve", FRACTIONAL, "karras"),
    Algorithm(dpmpp_2s, ("dpmpp_2s", "DPMSolverSinglestepScheduler"), "vp", DPM, "linspace", EITHER),
    Algorithm(functools.partial(dpmpp_2s, order=3), ("dpmpp_3s",), "vp", DPM, "linspace", EITHER),
    Algorithm(dpmpp_2s_ancestral, ("dpmpp_2s_ancestral", "DPM++ 2S a"), "ve", FRACTIONAL, "karras"),
    Algorithm(dpmpp_sde, ("dpmpp_sde", "DPMSolverSDEScheduler", "DPM++ SDE"), "ve", FRACTIONAL, "linspace"),
    Algorithm(dpmpp_2m_sde, ("dpmpp_2m_sde", "DPM++ 2M SDE"), "vp", DPM, "linspace", EITHER),
    Algorithm(dpmpp_3m_sde, ("dpmpp_3m_sde", "DPM++ 3M SDE"), "vp", FRACTIONAL, "karras"),
    Algorithm(unipc, ("unipc", "UniPCMultistepScheduler"), "vp", DPM, "linspace", EITHER),
    Algorithm(sa_solver, ("sa_solver", "SASolverScheduler", "SA-Solver"), "vp", DPM, "linspace", ("min", "zero")),
    Algorithm(res_multistep, ("res_multistep", "RES multistep"), "vp", FRACTIONAL, "karras"),
    Algorithm(er_sde, ("er_sde", "ER SDE"), "ve", FRACTIONAL, "karras"),
    Algorithm(lcm, ("lcm", "LCMScheduler"), "vp", DISTILLED, "distilled"),
    Algorithm(tcd, ("tcd", "TCDScheduler"), "vp", DISTILLED, "distilled"),
)
