"""The loop on a regression small enough to watch: it learns, resumes to the bit, and loses nothing."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.training import loop

TRUE = np.array([[1.0], [-2.0], [0.5]], np.float32)


def loss(params, batch, key):
    x, y = batch
    noise = 0.01 * jax.random.normal(key, y.shape)
    return jnp.square(x @ params["w"] + noise - y).mean(), {"size": jnp.abs(params["w"]).max()}


def batches(step):
    x = np.random.default_rng(step).normal(size=(16, 3)).astype(np.float32)
    return x, x @ TRUE


def train(directory, steps, batches=batches, **settings):
    params = {"w": jnp.zeros((3, 1))}
    settings = loop.Settings(steps, **{"log_every": 5, **settings})
    return loop.train(loss, optax.adam(0.05), params, batches, settings, directory)


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_it_learns(tmp_path):
    state = train(tmp_path, 200, ema_decay=0.9)
    np.testing.assert_allclose(state.params["w"], TRUE, atol=0.05)
    np.testing.assert_allclose(state.ema["w"], TRUE, atol=0.05)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 201, 5))
    assert lines[-1]["loss"] < 0.01 * lines[0]["loss"]
    assert {"size", "gradient_norm", "seconds_per_step"} <= lines[0].keys()


def test_resuming_is_exact(tmp_path):
    whole = train(tmp_path / "whole", 10)
    train(tmp_path / "parts", 6)
    parts = train(tmp_path / "parts", 10)
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_latest_is_the_last_state(tmp_path):
    state = train(tmp_path, 7)
    saved = loop.latest(tmp_path)
    assert int(saved.step) == 7
    np.testing.assert_array_equal(saved.ema["w"], state.ema["w"])
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        loop.latest(tmp_path / "elsewhere")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint(tmp_path, number):
    def interrupted(step):
        if step == 3:
            os.kill(os.getpid(), number)
        return batches(step)

    before = signal.getsignal(number)
    assert int(train(tmp_path, 100, interrupted).step) == 4
    assert int(loop.latest(tmp_path).step) == 4
    assert signal.getsignal(number) is before


def test_going_on_after_a_signal_is_exact(tmp_path):
    def interrupted(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(step)

    train(tmp_path, 100, interrupted)
    whole = train(tmp_path / "whole", 10)
    for a, b in zip(leaves(train(tmp_path, 10)), leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_no_number_keeps_the_older_checkpoint(tmp_path):
    def poisoned(step):
        x, y = batches(step)
        return x, y * np.float32("nan" if step == 8 else 1)

    with pytest.raises(FloatingPointError, match="at step 9"):
        train(tmp_path, 20, poisoned, save_every=5)
    saved = loop.latest(tmp_path)
    assert int(saved.step) == 5
    assert np.isfinite(saved.params["w"]).all()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "log_every": 0}, {"steps": 1, "ema_decay": 1.0}])
def test_refuses_other_settings(wrong):
    with pytest.raises(ValueError, match="must"):
        loop.Settings(**wrong)


def strict_lines(directory):
    """The metrics by a reader of JSON that knows no NaN."""

    def refuse(word):
        raise AssertionError(word)

    return [json.loads(line, parse_constant=refuse) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_nothing_is_saved_between_a_bad_loss_and_its_report(tmp_path):
    """Checkpoints that come oftener than metrics would push out the last good ones."""

    def poisoned(step):
        x, y = batches(step)
        return x, y * np.float32("nan" if step == 12 else 1)

    with pytest.raises(FloatingPointError, match="loss is nan at step 13"):
        train(tmp_path, 100, poisoned, log_every=50, save_every=5)
    saved = loop.latest(tmp_path)
    assert int(saved.step) == 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


def test_a_gradient_that_is_no_number_is_found_before_it_is_saved(tmp_path):
    """The loss of that step is finite; the parameters after it are not."""

    def steep(params, batch, key):
        return jnp.sqrt(jnp.square(params["w"]).sum()), {}  # infinitely steep at 0

    with pytest.raises(FloatingPointError, match="gradient_norm is nan at step 1"):
        loop.train(steep, optax.sgd(0.1), {"w": jnp.zeros(3)}, batches, loop.Settings(1), tmp_path)
    with pytest.raises(FileNotFoundError):
        loop.latest(tmp_path)


def test_metrics_are_means_since_the_line_before(tmp_path):
    def numbered(params, batch, key):
        return 0.0 * params["w"].sum() + batch, {"tiny": 1e-8 * batch}

    loop.train(numbered, optax.sgd(0.1), {"w": jnp.zeros(3)}, np.float32, loop.Settings(7, log_every=3), tmp_path)
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["loss"] for line in lines] == [1.0, 4.0, 6.0]
    np.testing.assert_allclose([line["tiny"] for line in lines], [1e-8, 4e-8, 6e-8], rtol=1e-5)
    assert all(line["seconds_per_step"] > 0 for line in lines)


def test_the_caller_keeps_the_initial_parameters(tmp_path):
    initial = {"w": jnp.ones((3, 1))}
    state = loop.train(loss, optax.adam(0.05), initial, batches, loop.Settings(2), tmp_path)
    assert np.array_equal(initial["w"], np.ones((3, 1)))  # not donated to the first step
    assert not np.array_equal(state.params["w"], initial["w"])


def test_the_running_mean(tmp_path):
    """By hand: decay min(0.7, (1 + n) / (10 + n)) after n updates, from the initial parameters on."""
    step = jax.jit(loop.make_step(loss, optax.adam(0.05), loop.Settings(9, ema_decay=0.7)))
    state = loop.create_state({"w": jnp.ones((3, 1))}, optax.adam(0.05))
    mean = np.ones((3, 1))
    for n in range(30):
        state, _ = step(state, batches(n))
        decay = min(0.7, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * np.asarray(state.params["w"], np.float64)
        np.testing.assert_allclose(state.ema["w"], mean, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 30


def test_randomness_is_of_the_seed_and_the_step():
    state = loop.create_state({"w": jnp.ones((3, 1))}, optax.sgd(0.0))
    steps = [jax.jit(loop.make_step(loss, optax.sgd(0.0), loop.Settings(9, seed=seed))) for seed in (0, 0, 1)]
    one, same, other = (float(step(state, batches(0))[1]["loss"]) for step in steps)
    later = float(steps[0](state._replace(step=jnp.int32(1)), batches(0))[1]["loss"])
    assert one == same
    assert len({one, other, later}) == 3


def test_a_finished_run_is_returned_at_once(tmp_path):
    state = train(tmp_path, 5)

    def never(step):
        raise AssertionError(step)

    again = train(tmp_path, 5, never)
    for a, b in zip(leaves(state), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    train(tmp_path, 9, save_every=2)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == [8, 9]


def test_another_model_s_run_is_not_resumed(tmp_path):
    train(tmp_path, 2)
    other = {"w": jnp.zeros((4, 1)), "b": {"c": jnp.zeros(2)}}
    message = r"other parameters: b/c is None there and \(2,\) here; w is \(3, 1\) there and \(4, 1\) here"
    with pytest.raises(ValueError, match=message):
        loop.train(loss, optax.adam(0.05), other, batches, loop.Settings(4), tmp_path)
    assert int(loop.latest(tmp_path).step) == 2


def test_looking_for_a_checkpoint_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        loop.latest(tmp_path / "mistyped")
    assert not (tmp_path / "mistyped").exists()


def test_in_another_thread_signals_are_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert int(pool.submit(train, tmp_path, 3).result().step) == 3
    assert signal.getsignal(signal.SIGTERM) is before
