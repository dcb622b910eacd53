"""A sampler: an algorithm with everything that it needs to know, which makes the table of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from sdjax.samplers.registry import ALGORITHMS, Algorithm
from sdjax.samplers.rows import Rows
from sdjax.samplers.run import CLEAN, Level, Machine, Run, Value
from sdjax.samplers.symbols import Tracer
from sdjax.schedule import Schedule
from sdjax.spacings import STRIDED, Spacing, fixed_length, from_plain, to_plain


@dataclass(frozen=True)
class Sampler:
    """An algorithm and its settings; hashable. `create` makes it and checks its arguments."""

    algorithm: Algorithm
    schedule: Schedule
    spacing: str | Spacing
    prediction: str
    steps_offset: int
    final_sigma: str
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.algorithm.name

    @property
    def points(self) -> Spacing:
        """The function of its spacing."""
        return self.algorithm.points(self.spacing)

    @property
    def settings(self) -> dict[str, Any]:
        """What `create` takes besides the name and the schedule to make it again, in plain values."""
        own: dict[str, Any] = {
            "spacing": to_plain(self.spacing),
            "prediction": self.prediction,
            "steps_offset": self.steps_offset,
        }
        return own | {"final_sigma": self.final_sigma} | dict(self.options)

    def rows(
        self, num_inference_steps: int, strength: float = 1.0, *, exact_steps: bool = False, dtype: Any = np.float32
    ) -> Rows:
        """The table of a run. Milliseconds, on the host, in NumPy.

        Args:
          num_inference_steps: of the whole run, 1 to the schedule's number of training timesteps.
          strength: in (0, 1]; the last int(num_inference_steps * strength) steps are run, as in diffusers.
          exact_steps: with it num_inference_steps are run whatever the strength, the last of a run of
            int(num_inference_steps / strength), as in ComfyUI.
          dtype: of the numbers, which are computed in float64.

        Raises:
          ValueError: a number out of its range, or no step left to run.
        """
        tracer = Tracer(self.name)
        run, x = self.run(tracer, tracer.start, num_inference_steps, strength, exact_steps=exact_steps)
        rows = tracer.rows(x)
        first = run.levels[run.first]
        # Where the points begin at the noisiest level, diffusers' sigma-scaled samplers start at exactly sigma·noise.
        pure = 1.0 if self.algorithm.scale == "vp" or self.spacing == "leading" else first.std
        rows = dataclasses.replace(rows, start=np.array([first.alpha, first.std]), start_noise=np.array(pure))
        fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
        return Rows(**{name: a.astype(dtype) if a.dtype == np.float64 else a for name, a in fields.items()})

    def run(
        self,
        machine: Machine,
        x: Value,
        num_inference_steps: int,
        strength: float = 1.0,
        *,
        exact_steps: bool = False,
    ) -> tuple[Run, Value]:
        """Runs the algorithm itself, on whatever the machine computes with, from latents x in the model's scale."""
        total, first = self._steps(num_inference_steps, strength, exact_steps)
        times, sigmas = self.points(self.schedule, total, self.steps_offset)
        lowest = float(sigmas[-1])
        if lowest > self.schedule.sigmas[0] * (1 + 1e-9):  # else they are one level, up to rounding
            lowest = float(self.schedule.sigmas[0])
        end = CLEAN if self.final_sigma == "zero" else Level(0.0, lowest)
        levels = (*(Level(float(t), float(sigma)) for t, sigma in zip(times, sigmas, strict=True)), end)
        if self.algorithm.inverse:
            levels, first = levels[first:][::-1], 0
        return self.run_over(machine, x, levels, first, total, self.points in STRIDED)

    def run_over(
        self,
        machine: Machine,
        x: Value,
        levels: tuple[Level, ...],
        first: int,
        num_inference_steps: int,
        strided: bool = False,
    ) -> tuple[Run, Value]:
        """The same over any noise levels, of which `first` is the one to begin at. strided: see `Run`."""
        algorithm = self.algorithm
        run = Run(self.schedule, levels, first, num_inference_steps, self.prediction, algorithm.scale, machine, strided)
        return run, algorithm.function(run, run.start(x), **dict(self.options))

    def _steps(self, num_inference_steps: int, strength: float, exact_steps: bool) -> tuple[int, int]:
        """The steps of the whole run, and the first that is run."""
        most = self.schedule.num_train_timesteps
        if not is_integer(num_inference_steps) or not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps: expected an integer from 1 to {most}, got {num_inference_steps!r}")
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"strength: expected a number above 0 and up to 1, got {strength!r}")
        if exact_steps:
            total = int(num_inference_steps / strength)
            if total > most:
                raise ValueError(
                    f"strength: {num_inference_steps} steps at {strength!r} are the last of {total}, and the schedule"
                    f" has {most} timesteps; take fewer steps or a strength of at least {num_inference_steps / most:g}"
                )
            return total, total - num_inference_steps
        count = int(num_inference_steps * strength)
        if count == 0:
            raise ValueError(
                f"strength: {strength!r} of num_inference_steps={num_inference_steps} leaves no step to run;"
                f" take a strength of at least {math.ceil(1e4 / num_inference_steps) / 1e4:g} or more steps"
            )
        return num_inference_steps, num_inference_steps - count


def create(
    name: str | Algorithm,
    schedule: Schedule = Schedule(),  # noqa: B008 - frozen
    spacing: str | Spacing | Mapping[str, Any] | None = None,
    prediction: str = "epsilon",
    steps_offset: int = 1,
    final_sigma: str | None = None,
    **options: Any,
) -> Sampler:
    """A sampler, with diffusers' defaults for Stable Diffusion 1.5.

    Args:
      name: ours ("ddpm", "euler_ancestral"), diffusers' ("DDPMScheduler") or A1111's ("Euler a"), in any case; or an
        algorithm of your own.
      schedule: the noise schedule that the model was trained with.
      spacing: which points it visits: a name ("leading", "linspace", "trailing", "karras", ...), or one of
        `sdjax.spacings` with options, as `Sampler.settings` has it, too; or your own function. None: the sampler's own.
      prediction: what the model returns: "epsilon", "v" or "sample".
      steps_offset: added to the timesteps of the leading spacing.
      final_sigma: where the last step ends: "zero", or for some samplers "min", the first timestep's noise level.
        None: the sampler's own.
      **options: of the algorithm: `eta` and `set_alpha_to_one` of "ddim", `variance_type` of "ddpm".

    Raises:
      ValueError: an unknown name, spacing, prediction type or option (it lists those there are), a bad value.
    """
    algorithm = name if isinstance(name, Algorithm) else find(name)
    known = algorithm.options
    for option in options:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{option}: {algorithm.name} has no such option; {there}")
    spacings = [spacing for spacing, _ in algorithm.spacings]
    spacing = algorithm.spacing if spacing is None else from_plain(spacing) if isinstance(spacing, Mapping) else spacing
    if spacing not in spacings and not callable(spacing):
        raise ValueError(f"spacing: {algorithm.name} has no spacing {spacing!r}; there are {', '.join(spacings)}")
    schedule.check_prediction(prediction)
    if not is_integer(steps_offset) or not 0 <= steps_offset < schedule.num_train_timesteps:
        last = schedule.num_train_timesteps - 1
        raise ValueError(f"steps_offset: expected an integer from 0 to {last}, got {steps_offset!r}")
    final_sigma = algorithm.ends[0] if final_sigma is None else final_sigma
    if final_sigma not in algorithm.ends:
        raise ValueError(f"final_sigma: {algorithm.name} can end at {' or '.join(algorithm.ends)}, got {final_sigma!r}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    chosen = tuple(sorted((known | given).items()))
    sampler = Sampler(algorithm, schedule, spacing, prediction, int(steps_offset), final_sigma, chosen)
    sampler.rows(fixed_length(sampler.points) or 1)  # an option with a bad value is refused here
    return sampler


def find(name: str) -> Algorithm:
    """The algorithm of a name: ours, diffusers' or A1111's. Raises ValueError, with those there are, for another."""
    for algorithm in ALGORITHMS:
        if isinstance(name, str) and name.casefold() in [known.casefold() for known in algorithm.names]:
            return algorithm
    listed = "; ".join(", ".join(algorithm.names) for algorithm in ALGORITHMS)
    raise ValueError(f"sampler: {name!r} is not known; there are {listed}")


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
