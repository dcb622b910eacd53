"""What an algorithm sees of the run it is part of: noise levels, the model, noise. Numbers and symbols alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from sdjax.schedule import Schedule

Value = Any  # whatever adds up and takes factors: float64 arrays, or the symbols of symbols.py
Scale = Literal["vp", "ve"]


class Level(NamedTuple):
    """A noise level: latents are alpha·x0 + std·noise in the model's scale ("vp"), x0 + sigma·noise in "ve"."""

    time: float  # what the model is told, in training timesteps
    sigma: float

    @property
    def alpha_bar(self) -> float:
        """Ho et al.'s alpha bar: the signal's share of the variance."""
        return 1.0 / (1.0 + self.sigma**2)

    @property
    def alpha(self) -> float:
        return math.sqrt(self.alpha_bar)

    @property
    def std(self) -> float:
        return self.sigma * self.alpha

    @property
    def lam(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, the lambda of Lu et al. 2022; infinite where clean."""
        return -math.log(self.sigma) if self.sigma > 0 else math.inf


CLEAN = Level(0.0, 0.0)


Pair = tuple[float, float]  # coefficients of [x_in, model output]


class Output:
    """One call of the model, as the two things that papers speak of, whatever the model was trained to return.

    Each is made when it is first asked for: a sampler uses one or two of the four.
    """

    def __init__(self, x_in: Value, guided: Value, unguided: Value, to_x0: Pair, to_epsilon: Pair) -> None:
        self._x_in = x_in
        self._guided = guided
        self._unguided = unguided
        self._to_x0 = to_x0
        self._to_epsilon = to_epsilon

    @cached_property
    def x0(self) -> Value:
        return self._to_x0[0] * self._x_in + self._to_x0[1] * self._guided

    @cached_property
    def epsilon(self) -> Value:
        return self._to_epsilon[0] * self._x_in + self._to_epsilon[1] * self._guided

    @cached_property
    def unguided_x0(self) -> Value:
        return self._to_x0[0] * self._x_in + self._to_x0[1] * self._unguided

    @cached_property
    def unguided_epsilon(self) -> Value:
        return self._to_epsilon[0] * self._x_in + self._to_epsilon[1] * self._unguided


@dataclass(frozen=True)
class Call:
    """One call of the model: a row of the table."""

    row: int
    step: int
    time: float
    to_x0: Pair  # the predicted clean latents


class Machine(Protocol):
    """Who computes: the tracer of symbols.py, or a test on float64 arrays."""

    def evaluate(self, x_in: Value, call: Call) -> tuple[Value, Value]:
        """The model's guided and unguided raw outputs."""

    def normal(self, row: int, span: tuple[float, float]) -> Value:
        """The standard normal of a row."""

    def end_step(self, x: Value, row: int, blend: tuple[float, float]) -> Value:
        """The latents between two of the user's steps, which inpainting may change."""


class Run:
    """One run of an algorithm over its noise levels.

    Args:
      schedule: of training.
      levels: of the whole run, the last one where it ends. A rule that counts steps sees them all.
      first: the first of them that is run; later ones with image-to-image.
      num_inference_steps: of the whole run, which a stride is a share of.
      prediction: what the model returns: "epsilon", "v" or "sample".
      scale: of the algorithm's latents.
      strided: whether diffusers' rules for timesteps that are a stride apart are to be followed to the letter.
    """

    def __init__(
        self,
        schedule: Schedule,
        levels: tuple[Level, ...],
        first: int,
        num_inference_steps: int,
        prediction: str,
        scale: Scale,
        machine: Machine,
        strided: bool = False,
    ) -> None:
        self.schedule = schedule
        self.levels = levels
        self.first = first
        self.num_inference_steps = num_inference_steps
        self.strided = strided
        self._prediction = prediction
        self._scale = scale
        self._machine = machine
        self._step = first
        self._row = -1  # the last call of the model
        self._ended = True  # whether its step is over
        self._drawn = -1  # the last row whose noise is spent

    @property
    def stride(self) -> int:
        """Training timesteps per step, rounded down."""
        return self.schedule.num_train_timesteps // self.num_inference_steps

    @property
    def remaining(self) -> int:
        """Steps of the whole run from the present one on, itself included: 1 in the last."""
        return len(self.levels) - 1 - self._step

    def level(self, sigma: float) -> Level:
        """A noise level between those of the steps, for methods that call the model there."""
        return Level(float(self.schedule.time_of(np.asarray(sigma))), float(sigma))

    def steps(self) -> Iterator[tuple[Level, Level]]:
        """The noise levels at the beginning and the end of each step that is run."""
        for step in range(self.first, len(self.levels) - 1):
            self._step = step
            yield self.levels[step], self.levels[step + 1]

    def model(self, x: Value, level: Level) -> Output:
        """Calls the model on latents x, in the algorithm's scale, of this noise level."""
        x_in = x / self._size(level)
        self._row += 1
        self._ended = False
        to_x0, to_epsilon = _conversion(self._prediction, level)
        guided, unguided = self._machine.evaluate(x_in, Call(self._row, self._step, level.time, to_x0))
        return Output(x_in, guided, unguided, to_x0, to_epsilon)

    def noise(self, before: Level, after: Level) -> Value:
        """A fresh standard normal; the two levels say which stretch of Brownian motion it is.

        It is the noise of the last call of the model, or, once the step has ended or when that is spent, of the next.
        """
        row = max(self._row + self._ended, self._drawn + 1)
        if row > self._row + 1:
            raise ValueError("a sampler draws one noise per call of the model, this one draws more")
        self._drawn = row
        return self._machine.normal(row, (before.sigma, after.sigma))

    def noised(self, x: Value, std: float, before: Level, after: Level) -> Value:
        """x and so much of a fresh standard normal, see `noise`; where it is none, nothing is drawn."""
        return x + std * self.noise(before, after) if std else x

    def end_step(self, x: Value) -> Value:
        """Declares x the latents at the end of the step, and returns them as the next step must use them."""
        if self._ended:
            raise ValueError("a sampler calls the model at least once in every step, this one ends one without")
        self._ended = True
        return self._machine.end_step(x, self._row, self._blend(self._step + 1))

    def start(self, x: Value) -> Value:
        """Latents in the model's scale at the first level, in the algorithm's."""
        return self._size(self.levels[self.first]) * x

    def _size(self, level: Level) -> float:
        return 1.0 if self._scale == "vp" else 1.0 / level.alpha

    def _blend(self, index: int) -> tuple[float, float]:
        if index == len(self.levels) - 1:
            return 1.0, 0.0  # what is known is put back clean, also where the last level is not quite
        level = self.levels[index]
        return self._size(level) * level.alpha, self._size(level) * level.std


def _conversion(prediction: str, level: Level) -> tuple[Pair, Pair]:
    """Coefficients of [x_in, model output] in x0 and in epsilon; x_in = alpha x0 + std epsilon."""
    alpha, std = level.alpha, level.std
    if prediction == "epsilon":
        return (1.0 / alpha, -std / alpha), (0.0, 1.0)
    if prediction == "v":  # Salimans & Ho 2022, appendix D
        return (alpha, -std), (std, alpha)
    return (0.0, 1.0), (1.0 / std, -alpha / std)
