"""The noise schedule of training and the timesteps that sampling visits: NumPy float64, on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("scaled_linear", "linear")
PREDICTIONS = ("epsilon", "v", "sample")


@dataclass(frozen=True)
class Schedule:
    """How much noise each of the timesteps of training holds (Ho et al. 2020, section 2).

    Args:
      num_train_timesteps: T; timestep t runs from 0 (almost clean) to T - 1 (almost noise).
      beta_start, beta_end: the variance that the first and the last timestep add, 0 < beta_start <= beta_end < 1.
      kind: "scaled_linear" (linear in the square root of beta: Stable Diffusion) or "linear" (Ho et al.).

    Raises:
      ValueError: a number out of its range, an unknown kind.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    kind: str = "scaled_linear"

    def __post_init__(self) -> None:
        if not isinstance(self.num_train_timesteps, Integral) or self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps: expected an integer from 1, got {self.num_train_timesteps!r}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start, beta_end: expected 0 < start <= end < 1, got {self.beta_start!r}, {self.beta_end!r}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is not a schedule; there are {', '.join(KINDS)}")

    @cached_property
    def betas(self) -> np.ndarray:
        """(T,) float64, the variance added by each timestep."""
        if self.kind == "scaled_linear":
            return _constant(np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2)
        return _constant(np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps))

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float64, the share of the variance that is still the picture's (the paper's alpha bar)."""
        return _constant(np.cumprod(1.0 - self.betas))

    @cached_property
    def sigmas(self) -> np.ndarray:
        """(T,) float64, ascending: noise per signal, the sigma of Karras et al. 2022."""
        return _constant(np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod))

    def sigma_at(self, times: np.ndarray) -> np.ndarray:
        """Sigmas at fractional timesteps, linearly between their neighbours."""
        return np.interp(times, np.arange(self.num_train_timesteps), self.sigmas)

    def time_of(self, sigmas: np.ndarray) -> np.ndarray:
        """Fractional timesteps that hold these sigmas, linearly between the logarithms of their neighbours."""
        return np.interp(np.log(sigmas), np.log(self.sigmas), np.arange(self.num_train_timesteps, dtype=np.float64))


def add_noise(schedule: Schedule, x0: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """The forward process q(x_t | x_0) (Ho et al. 2020, eq. 4).

    Args:
      x0, noise: (B, ...) float32, clean latents and a standard normal.
      timesteps: (B,) integers in [0, T).

    Returns:
      (B, ...) float32: sqrt(alpha bar) x0 + sqrt(1 - alpha bar) noise.
    """
    alpha, std = _at(schedule, timesteps, x0.ndim)
    return alpha * x0 + std * noise


def target(schedule: Schedule, prediction: str, x0: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """What a model of this prediction type is trained to return for `add_noise(schedule, x0, noise, timesteps)`.

    Args:
      prediction: "epsilon" (the noise), "sample" (x0) or "v" (Salimans & Ho 2022: alpha noise - std x0).
      x0, noise, timesteps: as for `add_noise`.

    Raises:
      ValueError: an unknown prediction type.
    """
    check_prediction(prediction)
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    alpha, std = _at(schedule, timesteps, x0.ndim)
    return alpha * noise - std * x0


def check_prediction(prediction: str) -> None:
    """Raises ValueError unless this is one of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: {prediction!r} is not a prediction type; there are {', '.join(PREDICTIONS)}")


def _constant(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False  # it is cached and handed out
    return array


def _at(schedule: Schedule, timesteps: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """sqrt(alpha bar) and sqrt(1 - alpha bar) of each picture, shaped (B, 1, ...)."""
    share = schedule.alphas_cumprod
    tables = np.stack([np.sqrt(share), np.sqrt(1.0 - share)]).astype(np.float32)
    alpha, std = (jnp.asarray(table)[timesteps].reshape((-1,) + (1,) * (ndim - 1)) for table in tables)
    return alpha, std


# A spacing names the n points of a run, from noise to picture: (schedule, n, steps_offset) -> times (n,), sigmas (n,).
# Times are in units of training timesteps. The first four words are those of Lin et al. 2023, table 2, and diffusers.
Spacing = Callable[[Schedule, int, int], tuple[np.ndarray, np.ndarray]]


def leading(schedule: Schedule, n: int, steps_offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Multiples of T // n, moved up by the offset as far as the last timestep allows."""
    stride = schedule.num_train_timesteps // n
    offset = min(steps_offset, schedule.num_train_timesteps - 1 - (n - 1) * stride)
    return _whole(schedule, np.arange(n)[::-1] * stride + offset)


def linspace(schedule: Schedule, n: int, steps_offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Even fractional steps over all of training, both ends included (a run of one step is the clean end)."""
    times = np.linspace(0, schedule.num_train_timesteps - 1, n)[::-1]
    return times, schedule.sigma_at(times)


def linspace_rounded(schedule: Schedule, n: int, steps_offset: int) -> tuple[np.ndarray, np.ndarray]:
    """`linspace` on whole timesteps."""
    return _whole(schedule, np.linspace(0, schedule.num_train_timesteps - 1, n)[::-1].round().astype(int))


def trailing(schedule: Schedule, n: int, steps_offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Even steps down from the last timestep, the noisiest always included."""
    total = schedule.num_train_timesteps
    # arange, as in diffusers, so that halves round alike; rounding may give it one element too many.
    return _whole(schedule, np.arange(total, 0, -total / n)[:n].round().astype(int) - 1)


def karras(schedule: Schedule, n: int, steps_offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Even steps in sigma^(1/7) between the ends of `linspace` (Karras et al. 2022, eq. 5)."""
    _, sigmas = linspace(schedule, n, steps_offset)
    first, last = sigmas[0] ** (1 / 7), sigmas[-1] ** (1 / 7)
    sigmas = (first + np.linspace(0, 1, n) * (last - first)) ** 7
    return schedule.time_of(sigmas), sigmas


def _whole(schedule: Schedule, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return timesteps.astype(np.float64), schedule.sigmas[timesteps]
