"""The noise schedule of training: NumPy float64, on the host; and the forward process with its inverse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("scaled_linear", "linear", "squared_cosine", "sigmoid")
PREDICTIONS = ("epsilon", "v", "sample")


@dataclass(frozen=True)
class Schedule:
    """How much noise each of the timesteps of training holds (Ho et al. 2020, section 2).

    Args:
      num_train_timesteps: T; timestep t runs from 0 (almost clean) to T - 1 (almost noise).
      beta_start, beta_end: the variance that the first and the last timestep add, 0 < beta_start <= beta_end < 1;
        "squared_cosine" has no use for them.
      kind: how beta grows: "scaled_linear" (linear in its square root: Stable Diffusion), "linear" (Ho et al.),
        "squared_cosine" (Nichol & Dhariwal 2021; diffusers' squaredcos_cap_v2) or "sigmoid" (Xu et al. 2022, GeoDiff).
      zero_terminal_snr: whether all of it is rescaled so that the last timestep is noise alone (Lin et al. 2023,
        Algorithm 1; diffusers' rescale_betas_zero_snr). Nothing can be told of x0 from the noise in it, so the model
        must predict "v" or "sample": see `check_prediction`.

    Raises:
      ValueError: a number out of its range, an unknown kind, noise levels that float64 cannot tell apart.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    kind: str = "scaled_linear"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.num_train_timesteps, Integral) or self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps: expected an integer from 1, got {self.num_train_timesteps!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is not a schedule; there are {', '.join(KINDS)}")
        if self.kind != "squared_cosine" and not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start, beta_end: expected 0 < start <= end < 1, got {self.beta_start!r}, {self.beta_end!r}"
            )
        if not isinstance(self.zero_terminal_snr, bool):
            raise ValueError(f"zero_terminal_snr: expected True or False, got {self.zero_terminal_snr!r}")
        if self.zero_terminal_snr and self.num_train_timesteps == 1:
            raise ValueError(
                "zero_terminal_snr: the first timestep keeps its noise; num_train_timesteps must be 2 or more"
            )
        shares = np.cumprod(1.0 - self._unscaled_betas)
        if not (shares[0] < 1 and shares[-1] > 0 and np.all(np.diff(shares) < 0)):
            raise ValueError(
                f"beta_start, beta_end: over {self.num_train_timesteps} timesteps {self.beta_start!r} to"
                f" {self.beta_end!r} make noise levels that float64 cannot tell apart; take larger betas where"
                " they add nothing, smaller ones or fewer timesteps where nothing of the picture is left"
            )

    @cached_property
    def betas(self) -> np.ndarray:
        """(T,) float64, the variance added by each timestep."""
        if not self.zero_terminal_snr:
            return self._unscaled_betas
        # Algorithm 1 of Lin et al.: the signal's scale is shifted to end at 0 and stretched to begin where it did.
        scale = np.sqrt(np.cumprod(1.0 - self._unscaled_betas))
        share = ((scale - scale[-1]) * scale[0] / (scale[0] - scale[-1])) ** 2
        return _constant(1.0 - share / np.append(1.0, share[:-1]))

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float64, the share of the variance that is still the picture's (the paper's alpha bar).

        Its last number is exactly 0 at zero terminal SNR.
        """
        return _constant(np.cumprod(1.0 - self.betas))

    @cached_property
    def sigmas(self) -> np.ndarray:
        """(T,) float64, ascending and finite: noise per signal, the sigma of Karras et al. 2022.

        At zero terminal SNR the last would be infinite. It is 4096 there, as in diffusers' samplers that step in sigma.
        """
        share = self.alphas_cumprod.copy()
        if self.zero_terminal_snr:
            # Of thousands of timesteps the last but one can have less signal than 2^-24 already.
            share[-1] = 2.0**-24 if share[-2] > 2.0**-24 else share[-2] / 2
        return _constant(np.sqrt((1.0 - share) / share))

    def sigma_at(self, times: np.ndarray) -> np.ndarray:
        """Sigmas at fractional timesteps, linearly between their neighbours."""
        return np.interp(times, np.arange(self.num_train_timesteps), self.sigmas)

    def time_of(self, sigmas: np.ndarray) -> np.ndarray:
        """Fractional timesteps that hold these sigmas, linearly between the logarithms of their neighbours."""
        return np.interp(np.log(sigmas), np.log(self.sigmas), np.arange(self.num_train_timesteps, dtype=np.float64))

    def check_prediction(self, prediction: str) -> None:
        """Raises ValueError unless a model of this prediction type can be trained and sampled on this schedule."""
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: {prediction!r} is not a prediction type; there are {', '.join(PREDICTIONS)}")
        if self.zero_terminal_snr and prediction == "epsilon":
            raise ValueError(
                "prediction: 'epsilon' says nothing of the picture at zero terminal SNR, where the last timestep is"
                " noise alone; such models predict 'v' or 'sample', or set zero_terminal_snr=False"
            )

    @cached_property
    def _unscaled_betas(self) -> np.ndarray:
        start, end, total = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.kind == "scaled_linear":
            return _constant(np.linspace(start**0.5, end**0.5, total) ** 2)
        if self.kind == "linear":
            return _constant(np.linspace(start, end, total))
        if self.kind == "sigmoid":
            return _constant(start + (end - start) / (1.0 + np.exp(-np.linspace(-6, 6, total))))
        # Eq. 17 of Nichol & Dhariwal; their cap of 0.999 leaves the last timestep a little of the picture.
        share = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        return _constant(np.minimum(1.0 - share[1:] / share[:-1], 0.999))


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
      ValueError: an unknown prediction type, or "epsilon" at zero terminal SNR.
    """
    schedule.check_prediction(prediction)
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    alpha, std = _at(schedule, timesteps, x0.ndim)
    return alpha * noise - std * x0


def remove_noise(
    schedule: Schedule, prediction: str, x: jax.Array, output: jax.Array, timesteps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The inverse of `add_noise`: the picture and the noise in x, by what a model returns for it.

    Args:
      prediction: what the output is, as for `target`; with "epsilon" it is the noise, from a model or the true one.
      x, output: (B, ...) float32, noisy latents and the model's output.
      timesteps: (B,) integers in [0, T).

    Returns:
      x0, noise: (B, ...) float32, with x = sqrt(alpha bar) x0 + sqrt(1 - alpha bar) noise.

    Raises:
      ValueError: an unknown prediction type, or "epsilon" at zero terminal SNR.
    """
    schedule.check_prediction(prediction)
    return separate(prediction, x, output, *_at(schedule, timesteps, x.ndim))


def separate(
    prediction: str, x: jax.Array, output: jax.Array, alpha: jax.Array, std: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x0 and noise in x = alpha x0 + std noise, by what a model of this prediction type returns for x."""
    if prediction == "epsilon":
        return (x - std * output) / alpha, output
    if prediction == "sample":
        return output, (x - alpha * output) / std
    return alpha * x - std * output, std * x + alpha * output


def _constant(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False  # it is cached and handed out
    return array


def _at(schedule: Schedule, timesteps: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """sqrt(alpha bar) and sqrt(1 - alpha bar) of each picture, shaped (B, 1, ...)."""
    share = schedule.alphas_cumprod
    tables = np.stack([np.sqrt(share), np.sqrt(1.0 - share)]).astype(np.float32)
    alpha, std = (jnp.asarray(table)[timesteps].reshape((-1,) + (1,) * (ndim - 1)) for table in tables)
    return alpha, std
