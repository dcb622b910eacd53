"""Which sampler to use: `python benchmarks/samplers.py pictures distances errors costs`

Four results, written to benchmarks/results:

  pictures   samplers.png: every sampler at 5, 10, 20 and 50 steps, one prompt and seed, the model that ships
  distances  samplers.json and samplers_distances.png: how far samplers without noise are from the ODE's solution
             (Heun's method, 500 steps), against calls of the model: the root mean square of each picture's latents
             over the solution's, averaged over prompts and seeds; needs `pip install -e ".[bench]"`
  errors     samplers_errors.md: the largest error of each sampler that diffusers has too, over the runs of
             tests/parity/test_samplers.py; needs `pip install -e ".[test]"`
  costs      samplers_costs.json: what a table of 50 steps costs on the host, in milliseconds, and what a row costs
             beside the call of the model in it, for one picture of the model that ships
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

import sdjax
from sdjax import noise, samplers

RESULTS = Path(__file__).parent / "results"
PROMPT = "a 3d emoji of a fox on a blue background"
PROMPTS = (
    PROMPT,
    "a flat emoji of an owl on a pink background",
    "a 3d emoji of a guitar on a yellow background",
    "a flat emoji of a rocket on a white background",
)
STEPS = (5, 10, 20, 50)
SCALE = 7.5
CFG_PP_SCALE = 0.6  # where CFG++ does what 7.5 does else
CALLS = (3, 5, 7, 10, 14, 20, 28, 40)


def names(inverse: bool = False) -> list[str]:
    return [algorithm.name for algorithm in samplers.ALGORITHMS if algorithm.inverse is inverse]


def pictures(path: Path) -> None:
    """A row for each sampler, a column for each number of steps."""
    model = sdjax.load()
    size, left, top = model.config.image_size, 170, 20
    sheet = Image.new("RGB", (left + len(STEPS) * size, top + len(names()) * size), "white")
    draw = ImageDraw.Draw(sheet)
    for column, steps in enumerate(STEPS):
        draw.text((left + column * size + size // 2, top // 2), f"{steps} steps", fill="black", anchor="mm")
    for row, name in enumerate(names()):
        draw.text((left - 8, top + row * size + size // 2), name, fill="black", anchor="rm")
        for column, steps in enumerate(STEPS):
            scale = CFG_PP_SCALE if name.endswith("cfg_pp") else SCALE
            picture = sdjax.generate(
                PROMPT, model=model, sampler=name, num_inference_steps=steps, guidance_scale=scale, seed=0
            )[0]
            sheet.paste(picture, (left + column * size, top + row * size))
    sheet.save(path)


def distances() -> dict[str, Any]:
    """By sampler: calls of the model, and the distance to the solution with a 95 % interval."""
    model = sdjax.load()
    config = model.config
    context = model.encode_text(model.tokenizer(list(PROMPTS)))
    empty = jnp.broadcast_to(model.encode_text(model.tokenizer([""])), context.shape)
    size = config.image_size // config.vae.factor
    start = noise.normal(
        noise.seed_words(range(len(PROMPTS))), noise.START, 0, (size, size, config.vae.latent_channels)
    )

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        unguided, guided = (model.unet(x, t, each) for each in (empty, context))
        return unguided + SCALE * (guided - unguided)

    run = jax.jit(lambda x, rows: samplers.sample(denoise, x, rows, noise=jnp.zeros((len(rows), *x.shape))))

    def make(name: str, spacing: str, steps: int) -> tuple[int, np.ndarray]:
        rows = model.sampler(name, spacing=spacing).rows(steps)
        first = rows.start_noise if model.sampler(name).algorithm.scale == "ve" else np.float32(1)
        return len(rows), np.asarray(run(first * start, rows.padded(samplers.bucket(len(rows)))))

    _, solution = make("heun", "linspace", 500)
    found: dict[str, Any] = {}
    for name in names():
        sampler = model.sampler(name)
        rows = sampler.rows(10)
        if rows.span.any() or rows.reads_unguided or name in ("lcm", "tcd"):
            continue  # with noise, or for other models
        for spacing in ("karras", "trailing"):
            if spacing not in dict(sampler.algorithm.spacings):
                continue
            for steps in CALLS:
                calls, latents = make(name, spacing, steps)
                error = np.sqrt(np.square(latents - solution).mean((1, 2, 3)) / np.square(solution).mean((1, 2, 3)))
                spread = 1.96 * error.std(ddof=1) / np.sqrt(len(error))
                point = {"steps": steps, "calls": calls, "distance": float(error.mean()), "interval": float(spread)}
                found.setdefault(f"{name}, {spacing}", []).append(point)
    return found


def figure(found: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.figure(figsize=(9, 6))
    best = sorted(found, key=lambda name: min(p["distance"] for p in found[name] if p["calls"] <= 20))
    for name in best[:14]:
        points = [point for point in found[name] if point["calls"] <= 50]
        plt.plot([p["calls"] for p in points], [p["distance"] for p in points], marker="o", markersize=3, label=name)
    plt.xscale("log")
    plt.yscale("log")
    plt.xlabel("calls of the model")
    plt.ylabel("distance to the ODE's solution")
    plt.xticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"])
    plt.minorticks_off()
    plt.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def errors() -> str:
    """A table in Markdown."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import pytest
    from parity import test_samplers as cases

    worst: dict[str, list[float]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for case in cases.CASES:
            for kind in cases.runs(case):
                worst.setdefault(f"`{case.id}` | {case.kind.__name__}", []).append(cases.compare(case, *kind, patch)[0])
    lines = ["| sampler | diffusers 0.42.1 | runs | largest error at any step |", "|---|---|---|---|"]
    lines += [f"| {name} | {len(found)} | {max(found):.1e} |" for name, found in worst.items()]
    return "\n".join(lines) + "\n"


def costs() -> dict[str, Any]:
    """Medians over repetitions, all in one process."""

    def median(call: Callable[[], Any], repeats: int) -> float:
        call()
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(call())
            found.append(time.perf_counter() - start)
        return 1e3 * statistics.median(found)

    model = sdjax.load()
    made = [model.sampler(name) for name in names()]
    tables = {sampler.name: median(functools.partial(sampler.rows, 50), 9) for sampler in made}

    config = model.config
    size = config.image_size // config.vae.factor
    x = jnp.ones((1, size, size, config.vae.latent_channels))
    context = model.encode_text(model.tokenizer(["", PROMPT]))
    rows = model.sampler("ddpm").rows(50).padded(samplers.bucket(50))

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        unguided, guided = model.unet(jnp.tile(x, (2, 1, 1, 1)), jnp.tile(t, 2), context)[:, None]
        return unguided + SCALE * (guided - unguided)

    run = functools.partial(samplers.sample, key=jax.random.key(0))
    whole = jax.jit(lambda x, rows: run(denoise, x, rows))
    alone = jax.jit(lambda x, rows: run(lambda x, t: x, x, rows))  # all that is not the model
    per_row = {name: median(lambda f=f: f(x, rows), 9) / 50 for name, f in (("whole", whole), ("alone", alone))}
    return {
        "jax": version("jax"),
        "table of 50 steps, ms": {name: round(value, 2) for name, value in tables.items()},
        "a row with its model, ms": round(per_row["whole"], 3),
        "a row without, noise included, ms": round(per_row["alone"], 4),
        "share": round(per_row["alone"] / per_row["whole"], 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["pictures", "distances", "errors", "costs"])
    what = parser.parse_args().what
    RESULTS.mkdir(exist_ok=True)
    if "pictures" in what:
        pictures(RESULTS / "samplers.png")
    if "distances" in what:
        found = distances()
        (RESULTS / "samplers.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        figure(found, RESULTS / "samplers_distances.png")
    if "errors" in what:
        (RESULTS / "samplers_errors.md").write_text(errors(), encoding="utf-8")
    if "costs" in what:
        (RESULTS / "samplers_costs.json").write_text(json.dumps(costs(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
