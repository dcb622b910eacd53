"""SA-Solver: Adams' methods for the SDE, as stochastic as one likes where one likes."""

from __future__ import annotations

from collections.abc import Sequence

from sdjax.samplers import options
from sdjax.samplers.exponential import by_difference, interpolated, of_data
from sdjax.samplers.run import Level, Run, Value


def sa_solver(
    run: Run,
    x: Value,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    tau_start: float = 200.0,
    tau_end: float = 800.0,
    lower_order_final: bool = True,
) -> Value:
    """Stochastic Adams-Bashforth and -Moulton (Xue et al. 2023, Algorithm 1), on x0.

    Args:
      predictor_order: 1 to 3, how many outputs the predictor's polynomial goes through; fewer at the start.
      corrector_order: 1 to 4, the same of the corrector, the newest output included.
      tau: the paper's tau, 0 for the ODE and 1 for the SDE of Song et al., at timesteps from `tau_start` to
        `tau_end`; 0 elsewhere.
      lower_order_final: whether the orders fall at the end.
    """
    options.whole("predictor_order", predictor_order, 1, 3)
    options.whole("corrector_order", corrector_order, 1, 4)
    options.number("tau", tau, 0, 2)
    options.number("tau_start", tau_start, 0)
    options.number("tau_end", tau_end, 0)
    options.flag("lower_order_final", lower_order_final)
    past: list[tuple[Level, Value]] = []  # the newest first
    before, spent, used, eta = x, None, 1, 0.0  # of the last step: its latents, noise, corrector's order, tau squared
    for now, after in run.steps():
        output = (now, run.model(x, now).x0)
        if past:
            corrected = [output, *past][:used]
            x = _step(before, past[0][0], now, corrected, eta)
            x = x + spent if spent is not None else x
        past = [output, *past[: max(predictor_order, corrector_order - 1) - 1]]
        left = run.remaining if lower_order_final else 4
        count = min(predictor_order, left, len(past))
        used = min(corrector_order, left + 1, len(past) + 1)
        eta = tau**2 if tau_start <= now.time <= tau_end else 0.0
        if after.sigma in (0, now.sigma):
            count = 1
        before = x
        x = _step(x, now, after, past[:count], eta)
        noise = of_data(now, after, eta).noise
        spent = noise * run.noise(now, after) if noise else None
        x = run.end_step(x + spent if spent is not None else x)
    return x


def _step(x: Value, s: Level, t: Level, outputs: Sequence[tuple[Level, Value]], eta: float) -> Value:
    integral = of_data(s, t, eta)
    if len(outputs) != 2:
        return integral.keep * x + interpolated(outputs, s, t, integral.moments)
    # Two outputs: the paper's appendix takes the first term of the second moment's series.
    second = 0.5 * t.alpha * (1 + eta) * (t.lam - s.lam)
    ordered = sorted(outputs, key=lambda each: each[0].lam != s.lam)  # the output at s first
    return integral.keep * x + by_difference(ordered, s, t, integral.moments[0], second)
