"""Spacings: the n points of a run between noise and picture. NumPy float64, on the host.

A spacing is a callable (schedule, n, steps_offset) -> times (n,), sigmas (n,): from noise to picture, sigmas strictly
descending, times in [0, T - 1] in units of training timesteps. The clean end is not one of them; samplers append it.
Only `leading` and its like read the offset. Spacings with options are frozen dataclasses, so all of them are hashable.

One name means different points to different samplers of diffusers. There is a table for each of its families.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from sdjax.schedule import Schedule

Points = tuple[np.ndarray, np.ndarray]
Spacing = Callable[[Schedule, int, int], Points]


def leading(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """Multiples of T // n, moved up by the offset as far as the last timestep allows (Lin et al. 2023, table 2)."""
    stride = schedule.num_train_timesteps // n
    offset = min(steps_offset, schedule.num_train_timesteps - 1 - (n - 1) * stride)
    return _at(schedule, np.arange(n)[::-1] * stride + offset)


def linspace(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """Even fractional steps over all of training, both ends included (a run of one step is the clean end)."""
    return _at(schedule, np.linspace(0, schedule.num_train_timesteps - 1, n)[::-1])


def trailing(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """Even steps down from the last timestep, the noisiest always included (Lin et al. 2023, table 2)."""
    total = schedule.num_train_timesteps
    # arange, as in diffusers, so that halves round alike; rounding may give it one element too many.
    return _at(schedule, np.arange(total, 0, -total / n)[:n].round() - 1)


def leading_open(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """`leading` of n + 1 points without the last, at which these samplers are at the clean end already."""
    total = schedule.num_train_timesteps
    stride = max(total // (n + 1), 1)  # where n is T diffusers asks n times for the same timestep
    return _at(schedule, np.arange(n, 0, -1) * stride + min(steps_offset, total - 1 - n * stride))


def linspace_open(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """n + 1 even steps rounded to whole timesteps, without the last."""
    total = schedule.num_train_timesteps
    # Where n is T there is no room for one more: diffusers asks for some timestep twice, here the last one is kept.
    return _at(schedule, np.linspace(0, total - 1, min(n + 1, total)).round()[::-1][:n])


def simple(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """Every (T / n)-th of the timesteps, from the last one down (ComfyUI's and A1111's "simple")."""
    total = schedule.num_train_timesteps
    # In floats, as they do: where T / n is not one, a multiple may fall just short of a whole number.
    return _at(schedule, total - 1 - (np.arange(n) * (total / n)).astype(int))


def sgm_uniform(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """n + 1 even fractional steps over all of training without the last (ComfyUI's and A1111's "sgm_uniform").

    Sigmas go linearly in their logarithm between timesteps, as k-diffusion's t_to_sigma does, not as `linspace`.
    """
    total = schedule.num_train_timesteps
    times = np.linspace(total - 1, 0, n + 1)[:-1]
    return times, np.exp(np.interp(times, np.arange(total), np.log(schedule.sigmas)))


# Sabour et al. 2024, "Align Your Steps", for Stable Diffusion 1.5: research.nvidia.com/labs/toronto-ai/AlignYourSteps;
# with the digits of ComfyUI's nodes_align_your_steps.py. The last one is where the tenth step ends.
_ALIGNED = (
    14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016,
    0.3977456272, 0.1515232662, 0.0291671582,
)  # fmt: skip


def align_your_steps(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """Ten levels optimized for Stable Diffusion 1.5, other numbers of them log-linearly between (Sabour et al. 2024).

    As in ComfyUI and diffusers the eleventh gives way to the clean end; A1111 makes it a step of its own.

    Raises:
      ValueError: a schedule whose sigmas do not reach from 14.6 to 0.03.
    """
    even = np.linspace(0, 1, len(_ALIGNED))
    sigmas = np.exp(np.interp(np.linspace(0, 1, n + 1)[:-1], even, np.log(_ALIGNED)))
    return _with_times("align_your_steps", schedule, sigmas)


@dataclass(frozen=True)
class Between:
    """Sigmas by a formula from the highest to the lowest, which are those of another spacing where not given.

    Args:
      sigma_min, sigma_max: the ends.
      ends: the spacing whose first and last sigma are the ends. diffusers' timestep_spacing decides on it there.
      whole_times: whether the model is told the nearest whole timestep, as diffusers' DPM-Solvers do. Several points
        may then have the same time; their sigmas differ.

    Raises:
      ValueError: a number out of its range; when called, sigmas that the schedule does not have or float64 not tell
        apart.
    """

    _: KW_ONLY
    sigma_min: float | None = None
    sigma_max: float | None = None
    ends: Spacing = linspace
    whole_times: bool = False

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if not isinstance(self.whole_times, bool):
            raise ValueError(f"whole_times: expected True or False, got {self.whole_times!r}")

    def __call__(self, schedule: Schedule, n: int, steps_offset: int) -> Points:
        _, ends = self.ends(schedule, n, steps_offset)
        high = ends[0] if self.sigma_max is None else self.sigma_max
        low = ends[-1] if self.sigma_min is None else self.sigma_min
        times, sigmas = _with_times(type(self).__name__.lower(), schedule, self.between(high, low, n))
        return (times.round() if self.whole_times else times), sigmas

    def between(self, high: float, low: float, n: int) -> np.ndarray:
        """(n,) sigmas from high to low."""
        raise NotImplementedError


@dataclass(frozen=True)
class Karras(Between):
    """Even steps in sigma^(1 / rho) (Karras et al. 2022, eq. 5). Args: rho, 7 in the paper; those of `Between`."""

    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("rho", self.rho)

    def between(self, high: float, low: float, n: int) -> np.ndarray:
        ramp = np.linspace(0, 1, n)
        return ((1 - ramp) * high ** (1 / self.rho) + ramp * low ** (1 / self.rho)) ** self.rho


@dataclass(frozen=True)
class Exponential(Between):
    """Even steps in log sigma; rho other than 1 is their power: the polyexponential of k-diffusion's sampling.py.

    Args: rho; those of `Between`.
    """

    rho: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("rho", self.rho)

    def between(self, high: float, low: float, n: int) -> np.ndarray:
        return np.exp(math.log(low) + np.linspace(1, 0, n) ** self.rho * (math.log(high) - math.log(low)))


@dataclass(frozen=True)
class Beta(Between):
    """Even steps in the beta distribution's quantiles, taken over sigma as diffusers and A1111 do.

    Lee et al. 2024 ("Beta sampling is all you need") and ComfyUI take them over timesteps.
    Args: alpha, beta, of the distribution; those of `Between`.
    """

    alpha: float = 0.6
    beta: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("alpha", self.alpha)
        _check_positive("beta", self.beta)

    def between(self, high: float, low: float, n: int) -> np.ndarray:
        from scipy.special import betaincinv  # jax depends on it; a fifth of a second that only this needs

        return low + betaincinv(self.alpha, self.beta, 1 - np.linspace(0, 1, n)) * (high - low)


@dataclass(frozen=True)
class Timesteps:
    """The timesteps themselves: whole numbers, from noise to picture, each smaller than the one before.

    Raises:
      ValueError: something else; when called, one that training does not have, or another number of steps.
    """

    timesteps: Sequence[int]

    def __post_init__(self) -> None:
        timesteps = _listed("timesteps", self.timesteps, Integral, "whole numbers")
        _check_descending("timesteps", timesteps)
        object.__setattr__(self, "timesteps", timesteps)

    def __call__(self, schedule: Schedule, n: int, steps_offset: int) -> Points:
        _check_number("timesteps", self.timesteps, n)
        _check_range("timesteps", self.timesteps, 0, schedule.num_train_timesteps - 1)
        return _at(schedule, np.array(self.timesteps))


@dataclass(frozen=True)
class Sigmas:
    """The noise levels themselves, from noise to picture, without the 0 at the end, which samplers append.

    They may be a hundredth beyond those of training, because published tables are rounded.

    Raises:
      ValueError: something else; when called, one that training does not have, or another number of steps.
    """

    sigmas: Sequence[float]

    def __post_init__(self) -> None:
        sigmas = _listed("sigmas", self.sigmas, Real, "numbers")
        if sigmas[-1] == 0:
            raise ValueError("sigmas: the last one is 0; leave it out, the sampler appends it")
        _check_descending("sigmas", sigmas)
        object.__setattr__(self, "sigmas", sigmas)

    def __call__(self, schedule: Schedule, n: int, steps_offset: int) -> Points:
        _check_number("sigmas", self.sigmas, n)
        return _with_times("sigmas", schedule, np.array(self.sigmas, np.float64))


@dataclass(frozen=True)
class Distilled:
    """n of the timesteps that a consistency model was distilled on: diffusers' LCMScheduler and TCDScheduler.

    Args:
      original_inference_steps: how many those are; the multiples of T // original_inference_steps, minus 1.

    Raises:
      ValueError: not a whole number; when called, more of them than timesteps, or fewer than n.
    """

    original_inference_steps: int = 50

    def __post_init__(self) -> None:
        count = self.original_inference_steps
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise ValueError(f"original_inference_steps: expected a whole number from 1, got {count!r}")

    def __call__(self, schedule: Schedule, n: int, steps_offset: int) -> Points:
        total, count = schedule.num_train_timesteps, self.original_inference_steps
        if not n <= count <= total:
            raise ValueError(
                f"original_inference_steps: expected from {n}, the number of steps, to {total}, that of timesteps,"
                f" got {count}"
            )
        kept = np.floor(np.linspace(0, count, n, endpoint=False)).astype(int)
        return _at(schedule, (np.arange(count, 0, -1) * (total // count) - 1)[kept])


@dataclass(frozen=True)
class Whole:
    """The whole timesteps nearest to another spacing's, with the sigmas that these have.

    For samplers that look alphas_cumprod up by timestep. It is exactly 0 at zero terminal SNR, and so the sigma is
    here 1e16, whose alpha is 0 beside anything in float64, and not the 4096 of `Schedule.sigmas`.

    Raises:
      ValueError: when called, points that fall on the same timestep.
    """

    spacing: Spacing

    def __call__(self, schedule: Schedule, n: int, steps_offset: int) -> Points:
        times = self.spacing(schedule, n, steps_offset)[0].round()
        if np.any(np.diff(times) >= 0):
            name = getattr(self.spacing, "__name__", repr(self.spacing))
            raise ValueError(f"num_inference_steps: {n} of {name} do not fall on as many whole timesteps; take fewer")
        share = schedule.alphas_cumprod[times.astype(int)]
        share = np.where(share == 0, 1e-32, share)
        return times, np.sqrt((1.0 - share) / share)


def fixed_length(spacing: Spacing) -> int | None:
    """The only number of steps that a spacing can have, None where it can have any."""
    match spacing:
        case Timesteps(points) | Sigmas(points):
            return len(points)
        case Whole(inner):
            return fixed_length(inner)
    return None


def _training(schedule: Schedule, n: int, steps_offset: int) -> Points:
    """All of training, whatever n is: the ends of DPM-Solvers' sigmas."""
    return _at(schedule, np.arange(schedule.num_train_timesteps)[::-1])


def _at(schedule: Schedule, times: np.ndarray) -> Points:
    times = times.astype(np.float64)
    return times, schedule.sigma_at(times)


def _with_times(name: str, schedule: Schedule, sigmas: np.ndarray) -> Points:
    _check_descending(name, sigmas)
    _check_range(name, sigmas, 0.99 * schedule.sigmas[0], 1.01 * schedule.sigmas[-1])
    return schedule.time_of(sigmas), sigmas


def _listed(name: str, points: Any, kind: type, expected: str) -> tuple[Any, ...]:
    listed = tuple(np.atleast_1d(points).tolist())
    if not listed or not all(isinstance(point, kind) and not isinstance(point, bool) for point in listed):
        raise ValueError(f"{name}: expected one or more {expected}, got {points!r}")
    return listed


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def _check_number(name: str, points: Sequence[float], n: int) -> None:
    if len(points) != n:
        raise ValueError(f"num_inference_steps: there are {len(points)} {name}, so it must be that, got {n}")


def _check_descending(name: str, points: Sequence[float] | np.ndarray) -> None:
    for before, after in itertools.pairwise(points):
        if not before > after:
            raise ValueError(f"{name}: each must be smaller than the one before, from noise to picture; {after} is not")


def _check_range(name: str, points: Sequence[float] | np.ndarray, low: float, high: float) -> None:
    for point in points:
        if not low <= point <= high:
            raise ValueError(f"{name}: the schedule has those from {low:.6g} to {high:.6g}, got {point:.6g}")


Table = tuple[tuple[str, Spacing], ...]

_ANY = (  # of A1111 and ComfyUI, to whom all samplers are alike
    ("sgm_uniform", sgm_uniform),
    ("simple", simple),
    ("align_your_steps", align_your_steps),
)

# DDPM, DDIM, PNDM: they know whole timesteps only.
WHOLE: Table = (
    ("leading", Whole(leading)),
    ("linspace", Whole(linspace)),
    ("trailing", Whole(trailing)),
    ("simple", Whole(simple)),
    ("align_your_steps", Whole(align_your_steps)),
)

# Those of them that are diffusers', whose steps it takes to be a stride of T // n timesteps.
STRIDED = tuple(spacing for _, spacing in WHOLE[:3])

# Consistency models: LCM, TCD.
DISTILLED: Table = (("distilled", Whole(Distilled())), *WHOLE)

# Euler, Heun, LMS, DPM-Solver SDE: fractional timesteps, sigmas between the ends of `linspace`.
FRACTIONAL: Table = (
    ("leading", leading),
    ("linspace", linspace),
    ("trailing", trailing),
    ("karras", Karras()),
    ("exponential", Exponential()),
    ("polyexponential", Exponential()),  # k-diffusion's default is the same
    ("beta", Beta()),
    *_ANY,
)

# KDPM2 and its ancestral variant: as the others, but for rounding the times of "karras", and of nothing else.
KDPM2: Table = tuple((name, Karras(whole_times=True) if name == "karras" else spacing) for name, spacing in FRACTIONAL)

# DPM-Solver multistep and singlestep, DEIS, UniPC, SA-Solver: whole timesteps, sigmas between the ends of training.
# diffusers rounds the times of "karras" and "lu" and cuts those of "exponential" and "beta" off instead, which is a
# mistake (its pull request 13768); with "squared_cosine" the multistep one cuts them all off (issue 12771). Here all
# are rounded. Its singlestep one always has the "linspace" of here.
_DPM_EXPONENTIAL = Exponential(ends=_training, whole_times=True)
DPM: Table = (
    ("leading", leading_open),
    ("linspace", linspace_open),
    ("trailing", trailing),
    ("karras", Karras(ends=_training, whole_times=True)),
    ("exponential", _DPM_EXPONENTIAL),
    ("polyexponential", _DPM_EXPONENTIAL),
    ("lu", _DPM_EXPONENTIAL),  # even steps in lambda (Lu et al. 2022), which is -log sigma
    ("beta", Beta(ends=_training, whole_times=True)),
    *_ANY,
)

# What can be told in plain values and made again of them, by their names.
_FUNCTIONS: dict[str, Spacing] = {
    spacing.__name__: spacing
    for spacing in (
        leading, linspace, trailing, leading_open, linspace_open, simple, sgm_uniform, align_your_steps, _training
    )
}  # fmt: skip
_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Karras, Exponential, Beta, Timesteps, Sigmas, Distilled, Whole)
}


def to_plain(spacing: str | Spacing) -> str | dict[str, Any]:
    """What `from_plain` makes the spacing of again: the kind and its options, as JSON can hold them; a name stays.

    A function of your own becomes a kind that only you know.
    """
    if isinstance(spacing, str):
        return spacing
    if not dataclasses.is_dataclass(spacing) or type(spacing) not in _KINDS.values():
        return {"kind": getattr(spacing, "__name__", type(spacing).__name__)}
    fields = {field.name: (getattr(spacing, field.name), field.default) for field in dataclasses.fields(spacing)}
    changed = {name: value for name, (value, default) in fields.items() if value != default}
    return {"kind": type(spacing).__name__} | {
        name: to_plain(value) if callable(value) else value for name, value in changed.items()
    }


def from_plain(plain: Mapping[str, Any]) -> Spacing:
    """The inverse of `to_plain` for spacings with options. Raises ValueError for what none of them is."""
    options = dict(plain)
    called = str(options.pop("kind", None))
    if called in _FUNCTIONS and not options:
        return _FUNCTIONS[called]
    kind = _KINDS.get(called)
    if kind is None:
        raise ValueError(f"spacing: expected the kind {', '.join(_KINDS)}, got {plain!r:.100}")
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    required = {name for name, needed in known.items() if needed}
    if not required <= options.keys() <= known.keys():
        raise ValueError(f"spacing: {kind.__name__} has {', '.join(known)}, got {', '.join(options) or 'none'}")
    for name in {"ends", "spacing"} & options.keys():
        if not isinstance(options[name], Mapping):
            raise ValueError(f"spacing: {name} can be {', '.join(_FUNCTIONS)}, got {options[name]!r:.60}")
        options[name] = from_plain(options[name])
    made: Spacing = kind(**options)
    return made
