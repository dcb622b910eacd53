"""Algorithms of a user's own: several calls a step, history, noise before the call, the unguided output; misuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import samplers, spacings
from sdjax.samplers import REGISTERS, Algorithm
from sdjax.samplers.symbols import Symbol

from .oracle import SHAPE, Numbers, assert_close, draws, model

SPACINGS = (("linspace", spacings.linspace), ("karras", spacings.Karras()))


def algorithm(function, scale="ve"):
    return Algorithm(function, (function.__name__,), scale, SPACINGS, "karras")


def heun(run, x):
    """Karras et al. 2022, algorithm 1: two calls a step."""
    for now, after in run.steps():
        d = (x - run.model(x, now).x0) / now.sigma
        ahead = x + (after.sigma - now.sigma) * d
        if after.sigma > 0:
            d = 0.5 * d + 0.5 / after.sigma * (ahead - run.model(ahead, after).x0)
        x = run.end_step(x + (after.sigma - now.sigma) * d)
    return x


def dpmpp_2m(run, x):
    """Lu et al. 2022, DPM-Solver++(2M): what the last step predicted is remembered."""
    last = last_h = None
    for now, after in run.steps():
        x0 = run.model(x, now).x0
        if after.sigma == 0:
            x = run.end_step(x0)
            continue
        h = math.log(now.sigma / after.sigma)
        d = x0 if last is None else (1 + h / last_h / 2) * x0 - h / last_h / 2 * last
        x = run.end_step(after.sigma / now.sigma * x - math.expm1(-h) * d)
        last, last_h = x0, h
    return x


def lms(run, x):
    """Fourth order in what it remembers (coefficients of equal steps, which serve here)."""
    history = []
    for now, after in run.steps():
        history = [(x - run.model(x, now).x0) / now.sigma, *history][:4]
        weights = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
        d = sum(
            (w * h for w, h in zip(weights[len(history)][1:], history[1:], strict=True)),
            weights[len(history)][0] * history[0],
        )
        x = run.end_step(x + (after.sigma - now.sigma) * d)
    return x


def churn(run, x):
    """Karras et al. 2022, algorithm 2: noise before the model is called, but not at every step."""
    for now, after in run.steps():
        hat = samplers.Level(now.time, now.sigma * (1.2 if 0.1 < now.sigma < 5 else 1.0))
        if hat.sigma == now.sigma:
            x0 = run.model(x, now).x0
            x = run.end_step(x + (after.sigma / now.sigma - 1) * (x - x0))
            continue
        noisy = x + math.sqrt(hat.sigma**2 - now.sigma**2) * run.noise(hat, now)
        d = (noisy - run.model(noisy, hat).x0) / hat.sigma
        x = run.end_step(noisy + (after.sigma - hat.sigma) * d)
    return x


def two_noises(run, x):
    """A step of two calls and two noises, the first of which is kept for the second (DPM++ SDE's pair)."""
    for now, after in run.steps():
        x0 = run.model(x, now).x0
        first = run.noise(now, after)
        if after.sigma > 0:
            x0 = 0.5 * x0 + 0.5 * run.model(x0 + after.sigma * first, after).x0
            first = 0.6 * first + 0.8 * run.noise(now, after)
        x = run.end_step(x0 + after.sigma * first)
    return x


def momentum(run, x):
    """Keeps the latents of the step before, as they were after it ended."""
    before = None
    for now, after in run.steps():
        x0 = run.model(x, now).x0
        ahead = x + (after.sigma / now.sigma - 1) * (x - x0)
        ahead, before = (ahead if before is None else ahead + 0.05 * (x - before)), x
        x = run.end_step(ahead)
    return x


def looks_back(run, x):
    """Shows the model what it remembers, named before the latents."""
    last = None
    for now, after in run.steps():
        x0 = run.model(x if last is None else 0.1 * last + 0.9 * x, now).x0
        x = run.end_step(x + (after.sigma / now.sigma - 1) * (x - x0))
        last = x0
    return x


def cfgpp(run, x):
    """CFG++ (Chung et al. 2024): the guided x0, and noise as the unguided output says."""
    for now, after in run.steps():
        output = run.model(x, now)
        x = run.end_step(output.x0 + after.sigma * output.unguided_epsilon)
    return x


def denoise(np, x, t):
    """Guided and unguided outputs that differ, by little: far apart, CFG++ multiplies every rounding by 100 here."""
    guided = model(np, x, t)
    return guided, guided - 0.1 * np.sin(x)


class Inpaints(Numbers):
    """Replaces half of the latents after every step."""

    known = np.arange(SHAPE[3]) % 2 == 0

    def __init__(self, noise, clean, start):
        super().__init__(noise, lambda x, t: denoise(np, x, t))
        self.clean, self.start = clean, start

    def end_step(self, x, row, blend):
        x = np.where(self.known, blend[0] * self.clean + blend[1] * self.start, x)
        return super().end_step(x, row, blend)


@jax.jit
def inpaint(rows, x, noise, clean, start, repaint):
    def body(registers, each):
        row, n = each

        def live():
            after, x0 = samplers.step(lambda x_in, t: denoise(jnp, x_in, t), registers, row, n)
            return samplers.restore(after, row, repaint, clean, start), x0

        return jax.lax.cond(row.active, live, lambda: (registers, x))

    return jax.lax.scan(body, samplers.initial_registers(x), (rows[:], noise))


@pytest.mark.parametrize("function", [heun, dpmpp_2m, lms, churn, two_noises, momentum, looks_back, cfgpp])
@pytest.mark.parametrize("known", [False, True])
def test_a_custom_algorithm(function, known):
    """The table does what the function does, also where inpainting changes the latents between its steps."""
    (x, noises), (clean, start) = draws(40), draws(2, seed=1)[1]
    for prediction, strength in (("epsilon", 1.0), ("v", 0.63)):
        sampler = samplers.create(algorithm(function), prediction=prediction)
        rows = sampler.rows(20, strength).padded(40)
        machine = Inpaints(noises, clean, start)
        machine.known = machine.known & known
        _, expected = sampler.run(machine, x, 20, strength)
        repaint = np.broadcast_to(~machine.known, SHAPE).astype(np.float32)
        arrays = (array.astype(np.float32) for array in (x, noises, clean, start))
        registers, x0 = inpaint(rows, *arrays, repaint)
        # As for the registered ones: 1.3e-6 was seen.
        assert_close(registers[0], expected, 2e-6)
        for k, its_x0 in enumerate(machine.x0):
            assert_close(x0[k], its_x0, 2e-6)
        assert rows.reads_unguided == (function is cfgpp)


def test_rows_of_a_step_of_two_calls():
    rows = samplers.create(algorithm(heun)).rows(5)
    assert list(rows.step) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert np.array_equal(rows.blend.any(1), [False, True] * 4 + [True])
    rows = samplers.create(algorithm(heun)).rows(5, 0.5)
    assert list(rows.step) == [3, 3, 4]


def test_a_noise_before_the_call_is_that_row_s_own():
    """Nothing is kept for it, also when the rows before it drew none; it spans the two levels it was drawn between."""
    rows = samplers.create(algorithm(churn)).rows(20)
    noisy = rows.input[:, REGISTERS] != 0
    assert noisy.any()
    assert not noisy[:3].any()
    assert not noisy[-1]
    assert np.array_equal(rows.span[:, 0] > rows.span[:, 1], noisy)
    np.testing.assert_allclose(rows.span[noisy, 0], 1.2 * rows.span[noisy, 1], rtol=1e-6)
    assert not rows.update[:, 1:].any()


def test_registers_hold_what_later_rows_read():
    """And no more: DPM++ 2M its latents and one x0, Heun its latents, its first slope and where that led."""
    for function, count in ((dpmpp_2m, 2), (heun, 3), (lms, 4), (momentum, 2), (churn, 1)):
        rows = samplers.create(algorithm(function)).rows(20)
        assert rows.update.any((0, 2)).sum() == count, function.__name__


def remembers(count):
    def algorithm(run, x):
        outputs = []
        for now, _ in run.steps():
            outputs.append(run.model(x, now).x0)
            kept = outputs[-1]
            if len(outputs) == run.num_inference_steps:
                for weight, output in enumerate(outputs):
                    kept = kept + 0.01 * weight * output
            x = run.end_step(kept)
        return x

    algorithm.__name__ = "remembers"
    return algorithm


def misuse(body):
    """An algorithm of one step's body."""

    def clumsy(run, x):
        for now, after in run.steps():
            x = body(run, x, now, after)
        return x

    return clumsy


def draws_twice(run, x, now, after):
    x0 = run.model(x, now).x0
    run.noise(now, after)
    return run.end_step(x0 + run.noise(now, after) + run.noise(now, after))


def ends_with_the_next_noise(run, x, now, after):
    x0 = run.model(x, now).x0 + run.noise(now, after)
    return run.end_step(x0 + run.noise(now, after))


def ends_without_a_call(run, x, now, after):
    return run.end_step(x)


def ends_twice(run, x, now, after):
    return run.end_step(run.end_step(run.model(x, now).x0))


def returns_what_no_step_ended_with(run, x, now, after):
    return 2.0 * run.end_step(run.model(x, now).x0)


def forgets_to_end(run, x, now, after):
    return run.model(x, now).x0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (draws_twice, "a sampler draws one noise per call of the model, this one draws more"),
        (ends_with_the_next_noise, "clumsy: row 0 ends with the noise of the next; a row draws one noise"),
        (ends_without_a_call, "a sampler calls the model at least once in every step, this one ends one without"),
        (ends_twice, "a sampler calls the model at least once in every step, this one ends one without"),
        (returns_what_no_step_ended_with, "clumsy: an algorithm must return the latents of its last end_step"),
        (forgets_to_end, "clumsy: an algorithm must return the latents of its last end_step"),
    ],
)
def test_misuse_is_refused_by_name(body, message):
    with pytest.raises(ValueError, match=message):
        samplers.create(algorithm(misuse(body)))


def test_more_values_than_registers():
    sampler = samplers.create(algorithm(remembers(9)))
    assert sampler.rows(REGISTERS).update.any((0, 2)).sum() <= REGISTERS
    with pytest.raises(ValueError, match="remembers: row 8 must keep 9 values for later, a table has 8 registers"):
        sampler.rows(20)


def test_symbols_are_linear():
    """Sums, factors, quotients; nothing else has a table."""
    a, b = Symbol(0, {}, "guided"), Symbol(0, {}, "noise")
    combined = (2 * a - b / np.float64(4) + np.float64(3) * b - -a).expand(0)
    assert combined == {a: 3.0, b: 2.75}
    assert (a - a).expand(0) == {}
    for forbidden in (
        lambda: a * b,
        lambda: a / b,
        lambda: 1 / a,
        lambda: a + 1.0,
        lambda: 1.0 - a,
        lambda: a**2,
        lambda: a * np.ones(3),
        lambda: math.exp(a),
    ):
        with pytest.raises(TypeError):
            forbidden()
