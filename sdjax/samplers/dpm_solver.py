"""DPM-Solver and DPM-Solver++, over several steps or within groups of them; and DEIS, which is the first of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sdjax.samplers import options
from sdjax.samplers.exponential import Integral, by_difference, interpolated, of_data, of_noise
from sdjax.samplers.run import Level, Output, Run, Value

SOLVERS = ("midpoint", "heun")

Outputs = Sequence[tuple[Level, Value]]  # what the model returned where, the newest first
Exact = Callable[[Level, Level], Integral]


def dpmpp_2m(
    run: Run, x: Value, *, order: int = 2, solver_type: str = "midpoint", lower_order_final: bool = True
) -> Value:
    """DPM-Solver++ multistep (Lu et al. 2022b, Algorithm 2): A1111's DPM++ 2M.

    Args:
      order: 1 to 3, how many outputs the polynomial goes through; fewer at the start.
      solver_type: how order 2 weighs their difference: "heun" by its integral, "midpoint" by half the output's.
      lower_order_final: whether runs of fewer than 15 steps lower the order at the end. A last step to no noise
        always has order 1.
    """
    return _multistep(run, x, _x0, of_data, order, solver_type, lower_order_final)


def dpm_multistep(
    run: Run, x: Value, *, order: int = 2, solver_type: str = "midpoint", lower_order_final: bool = True
) -> Value:
    """DPM-Solver multistep (Lu et al. 2022a and its code): `dpmpp_2m` on the noise in place of x0."""
    return _multistep(run, x, _epsilon, of_noise, order, solver_type, lower_order_final)


def deis(run: Run, x: Value, *, order: int = 2, lower_order_final: bool = True) -> Value:
    """DEIS in log rho (Zhang & Chen 2022, section 3, tAB-DEIS): rho is our sigma, so it is DPM-Solver by integrals.

    Args:
      order, lower_order_final: as for `dpmpp_2m`.
    """
    return _multistep(run, x, _epsilon, of_noise, order, "heun", lower_order_final)


def dpmpp_2m_sde(
    run: Run,
    x: Value,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Value:
    """DPM-Solver++ multistep for the SDE (Lu et al. 2022b, Algorithm 4): A1111's DPM++ 2M SDE.

    Args:
      order, solver_type, lower_order_final: as for `dpmpp_2m`.
      eta: share of the SDE's noise, 0 to 1.
      s_noise: factor of the noise.
    """
    return _multistep(run, x, _x0, _of_sde(eta, s_noise), order, solver_type, lower_order_final)


def dpmpp_3m_sde(run: Run, x: Value, *, eta: float = 1.0, s_noise: float = 1.0) -> Value:
    """k-diffusion's DPM++ 3M SDE: `dpmpp_2m_sde` through three outputs, weighing the curve by half of its integral.

    Args:
      eta, s_noise: as for `dpmpp_2m_sde`.
    """
    full = _of_sde(eta, s_noise)

    def halved(s: Level, t: Level) -> Integral:
        exact = full(s, t)
        return exact._replace(moments=(*exact.moments[:2], 0.5 * exact.moments[2]))

    return _multistep(run, x, _x0, halved, 3, "heun", lower_order_final=False)


def dpmpp_2s(
    run: Run, x: Value, *, order: int = 2, solver_type: str = "midpoint", lower_order_final: bool = False
) -> Value:
    """DPM-Solver++ singlestep (Lu et al. 2022b, Algorithm 1): groups of steps, each from where its group began.

    Args:
      order: 1 to 3, the steps of a group.
      solver_type: as for `dpmpp_2m`; with order 3 "midpoint" leaves out the second output (Lu et al. 2022a).
      lower_order_final: whether the last group is not a whole one. A last step to no noise always has order 1.
    """
    return _singlestep(run, x, _x0, of_data, order, solver_type, lower_order_final)


def dpm_singlestep(
    run: Run, x: Value, *, order: int = 2, solver_type: str = "midpoint", lower_order_final: bool = False
) -> Value:
    """DPM-Solver singlestep (Lu et al. 2022a, Algorithms 1 and 2): `dpmpp_2s` on the noise in place of x0."""
    return _singlestep(run, x, _epsilon, of_noise, order, solver_type, lower_order_final)


def _multistep(
    run: Run,
    x: Value,
    of: Callable[[Output], Value],
    exact: Exact,
    order: int,
    solver_type: str,
    lower_order_final: bool,
) -> Value:
    _check(order, solver_type, lower_order_final)
    past: Outputs = []
    for now, after in run.steps():
        past = [(now, of(run.model(x, now))), *past[: order - 1]]
        count = len(past)
        if after.sigma in (0, now.sigma):  # where the polynomial has no length
            count = 1
        elif lower_order_final and run.num_inference_steps < 15:
            count = min(count, run.remaining)
        integral = exact(now, after)
        x = integral.keep * x + _through(past[:count], now, after, integral, solver_type)
        x = run.end_step(run.noised(x, integral.noise, now, after))
    return x


def _singlestep(
    run: Run,
    x: Value,
    of: Callable[[Output], Value],
    exact: Exact,
    order: int,
    solver_type: str,
    lower_order_final: bool,
) -> Value:
    _check(order, solver_type, lower_order_final)
    orders = _orders(run, order, lower_order_final)
    start: Value = x
    group: list[tuple[Level, Value]] = []
    for (now, after), wanted in zip(run.steps(), orders[run.first :], strict=True):
        count = min(wanted, len(group) + 1)
        if count == 1:
            start, group = x, []
        group = [*group, (now, of(run.model(x, now)))]
        first = group[0][0]
        integral = exact(first, after)
        if count == 3 and solver_type == "midpoint":
            step = interpolated([group[0], group[2]], first, after, integral.moments)
        else:
            step = _through(group, first, after, integral, solver_type)
        x = run.end_step(integral.keep * start + step)
    return x


def _orders(run: Run, order: int, lower_order_final: bool) -> list[int]:
    """Of each step of the whole run: 1, 2, ... in every group; a last group that is whole is split in two."""
    count, to_clean = run.num_inference_steps, run.levels[-1].sigma == 0
    orders = [1 + i % order for i in range(count)]
    if (lower_order_final or to_clean) and order > 1 and count % order == 0:
        orders[-order:] = [1, 2, 1] if order == 3 else [1, 1]
    if to_clean:
        orders[-1] = 1
    return orders


def _through(outputs: Outputs, s: Level, t: Level, integral: Integral, solver_type: str) -> Value:
    if len(outputs) == 2 and solver_type == "midpoint":
        return by_difference(outputs, s, t, integral.moments[0], 0.5 * integral.moments[0])
    return interpolated(outputs, s, t, integral.moments)


def _x0(output: Output) -> Value:
    return output.x0


def _epsilon(output: Output) -> Value:
    return output.epsilon


def _of_sde(eta: float, s_noise: float) -> Exact:
    options.number("eta", eta, 0, 1)
    options.number("s_noise", s_noise, 0)

    def exact(s: Level, t: Level) -> Integral:
        integral = of_data(s, t, eta)
        return integral._replace(noise=s_noise * integral.noise)

    return exact


def _check(order: Any, solver_type: Any, lower_order_final: Any) -> None:
    options.whole("order", order, 1, 3)
    options.choice("solver_type", solver_type, SOLVERS)
    options.flag("lower_order_final", lower_order_final)
