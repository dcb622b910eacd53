"""The loop on a regression small enough to watch: it learns, resumes to the bit, and loses nothing."""

import json
import os
import signal

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
    return loop.train(loss, optax.adam(0.05), params, batches, loop.Settings(steps, log_every=5, **settings), directory)


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
