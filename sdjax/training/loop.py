"""One training loop for all parts: a pure step, batches by step number, checkpoints that resume to the bit."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

Params = Any
Batch = Any
Loss = Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

logger = logging.getLogger(__name__)

# XLA's experimental CPU kernels are slow at the transposed products of a backward pass: without them a step of
# the default model's VAE takes 0.6 of the time (jax 0.10.2).
CPU_COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


class State(NamedTuple):
    """What a run is at one step: with the seed and the data this determines all that follows."""

    step: jax.Array  # shape=(), dtype=int32: updates made
    params: Params
    ema: Params  # the running mean of params, which is what is published
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how often; what is learnt is in the loss, how it is learnt in the optimizer."""

    steps: int
    seed: int = 0
    ema_decay: float = 0.999
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


def create_state(params: Params, optimizer: optax.GradientTransformation) -> State:
    """The state before the first update; the running mean starts at the parameters."""
    # The step donates its state: neither the mean nor the caller may share the parameters' buffers.
    params, ema = (jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params) for _ in range(2))
    return State(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, settings: Settings
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """One update as a pure function (state, batch) -> (state, metrics).

    Its randomness is a function of the seed and the step alone, so a resumed run repeats an uninterrupted one.
    """

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # A young mean forgets faster, or it would hold the random start for thousands of steps.
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(settings.ema_decay, (1.0 + count) / (10.0 + count))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        metrics = {"loss": value, "gradient_norm": optax.global_norm(gradients), **metrics}
        return State(state.step + 1, params, ema, optimizer_state), metrics

    return step


def train(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    initial: Params,
    batches: Callable[[int], Batch],
    settings: Settings,
    directory: Path,
) -> State:
    """Trains from the newest checkpoint in `directory`, or from `initial` where there is none.

    SIGINT and SIGTERM end the run after the current step, with a checkpoint. Metrics are appended to
    `directory/metrics.jsonl`, one JSON object a line: means over the steps since the line before.

    Args:
      loss: (params, batch, key) -> scalar and metrics by name.
      optimizer: an optax transformation.
      initial: the parameters of step 0; also the tree that a checkpoint must match.
      batches: step -> the batch of that step, the same whenever it is asked.
      settings: see `Settings`.
      directory: made if missing.

    Returns:
      The last state: of `settings.steps` updates, or fewer after a signal.

    Raises:
      ValueError: the checkpoint is of other parameters than `initial`.
      FloatingPointError: the loss or its gradient was not finite; the newest checkpoint is from before.
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    options = {} if jax.default_backend() != "cpu" else CPU_COMPILER_OPTIONS
    step = jax.jit(make_step(loss, optimizer, settings), donate_argnums=0, compiler_options=options)
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()  # named, so that what it saved can be asked about
    manager = ocp.CheckpointManager(directory / "checkpoints", options=keep, item_handlers=handler)
    with manager, _stop_on_signal() as stopped:
        state = create_state(initial, optimizer)
        if manager.latest_step() is not None:
            saved = manager.item_metadata(manager.latest_step()).tree["params"]
            _check_same_parameters(saved, state.params, directory)
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
            logger.info("resumed at step %d", int(state.step))
        pending: list[dict[str, jax.Array]] = []
        start = time.perf_counter()
        for number in range(int(state.step), settings.steps):
            state, metrics = step(state, batches(number))
            pending.append(metrics)
            if len(pending) > 1:  # JAX would run dozens of steps ahead, and a signal would wait for all of them
                jax.block_until_ready(pending[-2])
            done, last = number + 1, number + 1 == settings.steps or stopped.is_set()
            log, save = (done % every == 0 or last for every in (settings.log_every, settings.save_every))
            if log or save:
                _check_finite(pending, done)
            if log:
                record = _means(pending) | {
                    "step": done,
                    "seconds_per_step": (time.perf_counter() - start) / len(pending),
                }
                _append(directory / "metrics.jsonl", record)
                pending, start = [], time.perf_counter()
            if save:
                manager.save(done, args=ocp.args.StandardSave(state))
            if last:
                break
    return state


def latest(directory: Path) -> State:
    """The newest checkpoint that `train` left in `directory`, as NumPy arrays in plain dicts; the optimizer's is raw.

    Raises:
      FileNotFoundError: there is none.
    """
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    with ocp.CheckpointManager(Path(directory).absolute() / "checkpoints", options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"{directory} holds no checkpoint of a training run")
        saved = manager.restore(step, args=ocp.args.StandardRestore())
    return State(**jax.tree.map(np.asarray, saved))


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set instead of ending the process in the middle of a step."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # Python hands signals to the main thread only
        return
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_same_parameters(saved: Params, initial: Params, directory: Path) -> None:
    """Raises ValueError unless both trees have the same names and shapes."""

    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}

    there, here = shapes(saved), shapes(initial)
    differing = sorted(name for name in there | here if there.get(name) != here.get(name))
    if differing:
        listed = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing)
        raise ValueError(f"{directory} holds a run of other parameters: {listed}. Train in a folder of its own")


def _check_finite(metrics: list[dict[str, jax.Array]], done: int) -> None:
    """Raises FloatingPointError at the first of these steps, of which `done` is the last, that spoilt the state."""
    for step, values in enumerate(metrics, done - len(metrics) + 1):
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(f"{name} is {float(values[name])} at step {step}")


def _means(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    return {name: float(sum(float(m[name]) for m in metrics) / len(metrics)) for name in metrics[0]}


def _append(path: Path, record: dict[str, float]) -> None:
    with path.open("a") as file:
        short = {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in record.items()}
        file.write(json.dumps(short) + "\n")
    logger.info("%s", record)
