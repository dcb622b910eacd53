"""UniPC: a predictor, and a corrector that costs no call of the model."""

from __future__ import annotations

from collections.abc import Sequence

from sdjax.samplers import options
from sdjax.samplers.exponential import by_difference, interpolated, of_data
from sdjax.samplers.run import Level, Run, Value

SOLVERS = ("bh1", "bh2")


def unipc(run: Run, x: Value, *, order: int = 2, solver_type: str = "bh2", lower_order_final: bool = True) -> Value:
    """The unified predictor-corrector (Zhao et al. 2023, Algorithms 5 and 6), on x0.

    When the model has been called at the predicted latents, the step that led there is taken again with that output
    as one more point of the polynomial.

    Args:
      order: 1 to 3, of the predictor; fewer at the start.
      solver_type: B(h) of the paper's section 3.3, which weighs the difference of two outputs: "bh1" is h, "bh2" is
        exp(h) - 1.
      lower_order_final: whether the last steps have orders 2 and 1. At no noise at the end it must.

    Raises:
      ValueError: "bh1" at no noise at the end, where its h is infinite.
    """
    options.whole("order", order, 1, 3)
    options.choice("solver_type", solver_type, SOLVERS)
    options.flag("lower_order_final", lower_order_final)
    if run.levels[-1].sigma == 0 and (solver_type == "bh1" or not lower_order_final):
        raise ValueError(
            "solver_type, lower_order_final: a last step to no noise needs 'bh2' and True; or take final_sigma='min'"
        )
    past: list[tuple[Level, Value]] = []  # the newest first
    before, used = x, 0  # the latents that the last step began with, and its order
    for now, after in run.steps():
        output = (now, run.model(x, now).x0)
        if past:
            corrected = [past[0], output, *past[1:used]]
            x = _step(before, past[0][0], now, corrected, solver_type)
        past = [output, *past[: order - 1]]
        used = min(len(past), run.remaining) if lower_order_final else len(past)
        if after.sigma == now.sigma:
            used = 1
        before = x
        x = run.end_step(_step(x, now, after, past[:used], solver_type))
    return x


def _step(x: Value, s: Level, t: Level, outputs: Sequence[tuple[Level, Value]], solver_type: str) -> Value:
    integral = of_data(s, t)
    if len(outputs) != 2:
        return integral.keep * x + interpolated(outputs, s, t, integral.moments)
    # Zhao et al.'s remark on order 2: half of B(h), which no equation then determines.
    b = integral.moments[0] if solver_type == "bh2" else t.alpha * (t.lam - s.lam)
    return integral.keep * x + by_difference(outputs, s, t, integral.moments[0], 0.5 * b)
