"""What `benchmarks/cpu.py` measures of sdjax alone, each in a process of its own; the answer is a line of JSON.

    python benchmarks/whole.py picture FILE DTYPE           a worker: see `picture`
    python benchmarks/whole.py memory FILE DTYPE SIZE       the peak of a picture of SIZE x SIZE, one step, decoded
    python benchmarks/whole.py compile FILE DTYPE SIZE      of the whole program of such a picture
    python benchmarks/whole.py dispatch FILE DTYPE          from nothing to the first step's being under way
    python benchmarks/whole.py weights FILE DTYPE           keeps the transformed weights, for the next of these

What is compiled is kept in SDJAX_CACHE, as always.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

PROMPT = "a castle at dawn"


def picture(file: Path, dtype: str) -> None:
    """Each line of standard input is something to time: "latent 12", "whole 20" (steps), "decode", "text"."""
    import jax
    import numpy as np

    import sdjax

    model = sdjax.load(file, dtype=dtype)
    tokens = model.tokenizer(["", PROMPT])
    z = jax.numpy.asarray(np.random.default_rng(0).standard_normal((1, 64, 64, 4)), "float32")

    def run(what: str, steps: str = "1") -> None:
        if what == "decode":
            jax.block_until_ready(model.decode_latents(z))
        elif what == "text":
            jax.block_until_ready(model.encode_text(tokens))
        else:
            kind = "latent" if what == "latent" else "np"
            generate(model, num_inference_steps=int(steps), output_type=kind)

    for what in ("latent", "whole", "decode", "text"):
        run(what)
    answer({"ready": True})
    for line in sys.stdin:
        start = time.perf_counter()
        run(*line.split())
        answer({"seconds": time.perf_counter() - start})


def generate(model: Any, size: int = 512, **options: Any) -> Any:
    import sdjax

    return sdjax.generate(PROMPT, model=model, height=size, width=size, seed=0, **options)


def memory(file: Path, dtype: str, size: str) -> None:
    """Peaks of resident memory in bytes: all, what is no file's, and what is; they need not fall together."""
    peaks = {"VmRSS": 0, "RssAnon": 0, "RssFile": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    import sdjax

    generate(sdjax.load(file, dtype=dtype), int(size), num_inference_steps=1, output_type="np")
    over.set()
    watcher.join()
    answer({"all": peaks["VmRSS"], "own": peaks["RssAnon"], "file": peaks["RssFile"]})


def compile(file: Path, dtype: str, size: str) -> None:
    """Seconds of tracing, lowering and XLA in the first picture of a process, and of all of it."""
    import jax

    import sdjax

    spent: dict[str, float] = {}

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            name = event.rsplit("/", 1)[1]
            spent[name] = spent.get(name, 0.0) + duration

    model = sdjax.load(file, dtype=dtype)
    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    generate(model, int(size), num_inference_steps=1, output_type="np")
    answer({"seconds": sum(spent.values()), "first picture": time.perf_counter() - start, **spent})


def dispatch(file: Path, dtype: str) -> None:
    """Seconds from the interpreter's start to the import, the weights, and the return of the first step's call."""
    start = time.perf_counter()
    import sdjax

    imported = time.perf_counter()
    model = sdjax.load(file, dtype=dtype)
    loaded = time.perf_counter()
    dispatched = []

    def stop(*_: Any) -> bool:
        dispatched.append(time.perf_counter())
        return False

    generate(model, num_inference_steps=20, callback=stop, output_type="latent")
    answer(
        {
            "seconds": dispatched[0] - start,
            "import": imported - start,
            "load": loaded - imported,
            "first step": dispatched[0] - loaded,
        }
    )


def weights(file: Path, dtype: str) -> None:
    import sdjax

    answer({"path": str(sdjax.load(file, dtype=dtype).keep_prepared())})


def answer(record: dict[str, Any]) -> None:
    _answers.write(json.dumps(record) + "\n")
    _answers.flush()


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "w")  # libraries may print what they like
    os.dup2(2, 1)
    command, file, *rest = sys.argv[1:]
    commands = {"picture": picture, "memory": memory, "compile": compile, "dispatch": dispatch, "weights": weights}
    commands[command](Path(file), *rest)
