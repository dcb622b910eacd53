"""Samplers: each is one short function, run once on the host into a table that one compiled program runs."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from sdjax import schedule as schedules
from sdjax.samplers.ddim import ddim
from sdjax.samplers.ddpm import ddpm
from sdjax.samplers.euler import euler, euler_ancestral
from sdjax.samplers.rows import REGISTERS, Rows, bucket, initial_registers, restore, sample, step
from sdjax.samplers.run import CLEAN, Level, Machine, Output, Run, Scale, Value
from sdjax.samplers.symbols import Tracer
from sdjax.schedule import Schedule, Spacing

__all__ = [
    "ALGORITHMS", "REGISTERS", "Algorithm", "Level", "Output", "Rows", "Run", "Sampler",
    "bucket", "create", "initial_registers", "restore", "sample", "step",
]  # fmt: skip


@dataclass(frozen=True)
class Algorithm:
    """A row of the registry: what there is to know of an algorithm besides its function.

    Args:
      function: (run, x, **options) -> x: it steps from noise to the clean latents by what `Run` offers.
      names: ours; then those of diffusers and of A1111 where they differ by more than case.
      scale: of its latents: "vp", the model's, or "ve", x0 + sigma·noise.
      spacings: those that its points may have.
      spacing: the default, diffusers' for Stable Diffusion 1.5.
    """

    function: Callable[..., Value]
    names: tuple[str, ...]
    scale: Scale
    spacings: tuple[tuple[str, Spacing], ...]
    spacing: str

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def options(self) -> dict[str, Any]:
        """The names of its options, with their defaults."""
        parameters = list(inspect.signature(self.function).parameters.values())[2:]
        return {parameter.name: parameter.default for parameter in parameters}


_WHOLE = (
    ("leading", schedules.leading),
    ("linspace", schedules.linspace_rounded),
    ("trailing", schedules.trailing),
)
_FRACTIONAL = (
    ("leading", schedules.leading),
    ("linspace", schedules.linspace),
    ("trailing", schedules.trailing),
    ("karras", schedules.karras),
)

ALGORITHMS = (
    Algorithm(ddpm, ("ddpm", "DDPMScheduler"), "vp", _WHOLE, "leading"),
    Algorithm(ddim, ("ddim", "DDIMScheduler"), "vp", _WHOLE, "leading"),
    Algorithm(euler, ("euler", "EulerDiscreteScheduler"), "ve", _FRACTIONAL, "linspace"),
    Algorithm(
        euler_ancestral,
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", "Euler a"),
        "ve",
        _FRACTIONAL,
        "linspace",
    ),
)


@dataclass(frozen=True)
class Sampler:
    """An algorithm with everything that it needs to know; hashable. `create` makes it and checks its arguments."""

    algorithm: Algorithm
    schedule: Schedule
    spacing: str
    prediction: str
    steps_offset: int
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.algorithm.name

    @property
    def settings(self) -> dict[str, Any]:
        """What `create` takes besides the name and the schedule to make it again."""
        own = {"spacing": self.spacing, "prediction": self.prediction, "steps_offset": self.steps_offset}
        return own | dict(self.options)

    @property
    def reads_unguided(self) -> bool:
        """Whether it needs the unguided output even where guidance is off."""
        return bool(np.any(self.rows(min(4, self.schedule.num_train_timesteps)).update[:, :, REGISTERS + 2]))

    def rows(self, num_inference_steps: int, strength: float = 1.0, dtype: Any = np.float32) -> Rows:
        """The table of a run. Milliseconds, on the host, in NumPy.

        Args:
          num_inference_steps: of the whole run, 1 to the schedule's number of training timesteps.
          strength: in (0, 1]; the last int(num_inference_steps * strength) steps are run, as in diffusers.
          dtype: of the numbers, which are computed in float64.

        Raises:
          ValueError: a number out of its range, or no step left to run.
        """
        tracer = Tracer(self.name)
        run, x = self.run(tracer, tracer.start, num_inference_steps, strength)
        rows = tracer.rows(x)
        first = run.levels[run.first]
        # Where the points begin at the noisiest level, diffusers' sigma-scaled samplers start at exactly sigma·noise.
        pure = 1.0 if self.algorithm.scale == "vp" or self.spacing == "leading" else first.std
        rows = dataclasses.replace(rows, start=np.array([first.alpha, first.std]), start_noise=np.array(pure))
        fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
        return Rows(**{name: a.astype(dtype) if a.dtype == np.float64 else a for name, a in fields.items()})

    def run(self, machine: Machine, x: Value, num_inference_steps: int, strength: float = 1.0) -> tuple[Run, Value]:
        """Runs the algorithm itself, on whatever the machine computes with, from latents x in the model's scale."""
        first = self._first_step(num_inference_steps, strength)
        spacing = dict(self.algorithm.spacings)[self.spacing]
        times, sigmas = spacing(self.schedule, num_inference_steps, self.steps_offset)
        levels = (*(Level(float(t), float(sigma)) for t, sigma in zip(times, sigmas, strict=True)), CLEAN)
        run = Run(self.schedule, levels, first, self.prediction, self.algorithm.scale, machine)
        return run, self.algorithm.function(run, run.start(x), **dict(self.options))

    def _first_step(self, num_inference_steps: int, strength: float) -> int:
        total = self.schedule.num_train_timesteps
        if not _is_integer(num_inference_steps) or not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps: expected an integer from 1 to {total}, got {num_inference_steps!r}")
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"strength: expected a number above 0 and up to 1, got {strength!r}")
        count = int(num_inference_steps * strength)
        if count == 0:
            raise ValueError(
                f"strength: {strength!r} of num_inference_steps={num_inference_steps} leaves no step to run;"
                f" take a strength of at least {math.ceil(1e4 / num_inference_steps) / 1e4:g} or more steps"
            )
        return num_inference_steps - count


def create(
    name: str | Algorithm,
    schedule: Schedule = Schedule(),  # noqa: B008 - frozen
    spacing: str | None = None,
    prediction: str = "epsilon",
    steps_offset: int = 1,
    **options: Any,
) -> Sampler:
    """A sampler, with diffusers' defaults for Stable Diffusion 1.5.

    Args:
      name: ours ("ddpm", "euler_ancestral"), diffusers' ("DDPMScheduler") or A1111's ("Euler a"), in any case; or an
        algorithm of your own.
      schedule: the noise schedule that the model was trained with.
      spacing: which points it visits: "leading", "linspace", "trailing", and for some "karras". None: its own.
      prediction: what the model returns: "epsilon", "v" or "sample".
      steps_offset: added to the timesteps of the leading spacing.
      **options: of the algorithm: `eta` and `set_alpha_to_one` of "ddim", `variance_type` of "ddpm".

    Raises:
      ValueError: an unknown name, spacing, prediction type or option (it lists those there are), a bad value.
    """
    algorithm = name if isinstance(name, Algorithm) else _find(name)
    known = algorithm.options
    for option in options:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{option}: {algorithm.name} has no such option; {there}")
    spacings = [spacing for spacing, _ in algorithm.spacings]
    spacing = algorithm.spacing if spacing is None else spacing
    if spacing not in spacings:
        raise ValueError(f"spacing: {algorithm.name} has no spacing {spacing!r}; there are {', '.join(spacings)}")
    schedules.check_prediction(prediction)
    if not _is_integer(steps_offset) or not 0 <= steps_offset < schedule.num_train_timesteps:
        last = schedule.num_train_timesteps - 1
        raise ValueError(f"steps_offset: expected an integer from 0 to {last}, got {steps_offset!r}")
    sampler = Sampler(
        algorithm, schedule, spacing, prediction, int(steps_offset), tuple(sorted((known | options).items()))
    )
    sampler.rows(1)  # an option with a bad value is refused here
    return sampler


def _find(name: str) -> Algorithm:
    for algorithm in ALGORITHMS:
        if isinstance(name, str) and name.casefold() in [known.casefold() for known in algorithm.names]:
            return algorithm
    listed = "; ".join(", ".join(algorithm.names) for algorithm in ALGORITHMS)
    raise ValueError(f"sampler: {name!r} is not known; there are {listed}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
