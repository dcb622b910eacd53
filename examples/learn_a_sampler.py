"""Five steps, learnt: `python examples/learn_a_sampler.py rows.npz`

A sampler's table is an argument of the program, so its numbers have gradients like any other. This example starts from
DPM++ 2M at five steps and moves the table until its latents come nearest to where a thousand calls of the model
arrive. What it learnt is measured on other concepts and other seeds, against DPM++ 2M at the spacing that suits those
best. Half an hour on two cores; the table is of use wherever model, guidance scale and number of steps are the same.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from importlib.resources import files
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sdjax
from sdjax import noise, samplers
from sdjax.samplers import REGISTERS, Rows

STEPS = 5
SCALE = 7.5
BATCH = 8


class Pairs(NamedTuple):
    """Prompts and the noise that their pictures start from."""

    context: jax.Array  # (B, T, D)
    start: jax.Array  # (B, h, w, z)

    def __getitem__(self, index):
        return Pairs(self.context[index], self.start[index])


def pairs(model: sdjax.StableDiffusion, count: int, held_out: bool) -> Pairs:
    """Random prompts with a seed each; of every other concept, and of no seed that the other half has."""
    rng = np.random.default_rng(int(held_out))
    concepts = files("sdjax").joinpath("default_model", "concepts.txt").read_text(encoding="utf-8").split("\n")[:-1]
    colours = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
    chosen = rng.choice(concepts[int(held_out) :: 2], count, replace=False)
    prompts = [
        f"a {rng.choice(['flat', '3d'])} emoji of a {concept} on a {rng.choice(colours)} background"
        for concept in chosen
    ]
    config = model.config
    size = config.image_size // config.vae.factor
    words = noise.seed_words(range(100_000 * held_out, 100_000 * held_out + count))
    start = noise.normal(words, noise.START, 0, (size, size, config.vae.latent_channels))
    return Pairs(model.encode_text(model.tokenizer(prompts)), start)


def sampling(model: sdjax.StableDiffusion) -> Callable[[Rows, Pairs], jax.Array]:
    """(rows, pairs) -> clean latents, by classifier-free guidance."""
    empty = model.encode_text(model.tokenizer([""]))

    def run(rows: Rows, batch: Pairs) -> jax.Array:
        both = jnp.concatenate([jnp.broadcast_to(empty, batch.context.shape), batch.context])

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            unguided, guided = jnp.split(model.unet(jnp.tile(x, (2, 1, 1, 1)), jnp.tile(t, 2), both), 2)
            return unguided + SCALE * (guided - unguided)

        return samplers.sample(
            denoise, rows.start_noise * batch.start, rows, noise=jnp.zeros((len(rows), *batch.start.shape))
        )

    return run


def in_batches(run: Callable[[Rows, Pairs], jax.Array], rows: Rows, every: Pairs) -> jax.Array:
    compiled = jax.jit(run)
    return jnp.concatenate([compiled(rows, every[i : i + BATCH]) for i in range(0, len(every.start), BATCH)])


def distances(found: jax.Array, solution: jax.Array) -> jax.Array:
    """(B,): root mean square of the difference, over that of the solution."""
    return jnp.sqrt(jnp.square(found - solution).mean((1, 2, 3)) / jnp.square(solution).mean((1, 2, 3)))


def learn(
    run: Callable[[Rows, Pairs], jax.Array], rows: Rows, every: Pairs, solution: jax.Array, updates: int
) -> tuple[Rows, list[float]]:
    """Adam on the table's numbers; the registers it does not use stay unused. Returns the table and every loss."""
    used = np.flatnonzero(np.any(rows.update[:, :, REGISTERS + 1] != 0, axis=0))
    columns = np.append(used, REGISTERS + 1)  # the model's output
    free = {"input": np.zeros_like(rows.input), "update": np.zeros_like(rows.update), "time": np.ones_like(rows.time)}
    free["input"][:, used] = 1
    free["update"][np.ix_(range(len(rows)), used, columns)] = 1

    def table(learnt: dict[str, jax.Array]) -> Rows:
        return dataclasses.replace(rows, **{**learnt, "time": 1000 * learnt["time"]})

    def loss(learnt: dict[str, jax.Array], batch: Pairs, target: jax.Array) -> jax.Array:
        return jnp.square(distances(run(table(learnt), batch), target)).mean()

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, updates)))

    @jax.jit
    def update(learnt, state, batch, target):
        value, gradient = jax.value_and_grad(loss)(learnt, batch, target)
        change, state = optimizer.update(jax.tree.map(jnp.multiply, gradient, free), state)
        return optax.apply_updates(learnt, change), state, value

    learnt = {"input": rows.input, "update": rows.update, "time": rows.time / np.float32(1000)}
    learnt = jax.tree.map(jnp.asarray, learnt)
    state, losses = optimizer.init(learnt), []
    for number in range(updates):
        chosen = np.random.default_rng(number).choice(len(every.start), min(BATCH, len(every.start)), replace=False)
        learnt, state, value = update(learnt, state, every[chosen], solution[chosen])
        losses.append(float(value))
    return jax.tree.map(np.asarray, table(learnt)), losses


def interval(values: np.ndarray) -> dict[str, float]:
    """The mean, and half the width of its 95 % interval."""
    return {"mean": float(values.mean()), "±": float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))}


def main(train: int = 64, held_out: int = 24, updates: int = 250, solution_steps: int = 500) -> tuple[Rows, dict]:
    model = sdjax.load()
    run = sampling(model)
    solve = model.sampler("heun", spacing="linspace")  # two calls a step
    known, new = pairs(model, train, held_out=False), pairs(model, held_out, held_out=True)
    # To learn from, a tenth of the calls is exact enough; what is measured is measured against all of them.
    targets = in_batches(run, solve.rows(max(2, solution_steps // 10)), known)
    solution = in_batches(run, solve.rows(solution_steps), new)

    spacings = [spacing for spacing, _ in model.sampler("dpmpp_2m").algorithm.spacings]
    tables = {spacing: model.sampler("dpmpp_2m", spacing=spacing).rows(STEPS) for spacing in spacings}

    def errors(rows: Rows) -> np.ndarray:
        return np.asarray(distances(in_batches(run, rows, new), solution))

    peers = {spacing: errors(rows) for spacing, rows in tables.items()}
    best = min(peers, key=lambda spacing: peers[spacing].mean())

    rows, losses = learn(run, tables[best], known, targets, updates)
    ours = errors(rows)
    report = {
        "pairs": {"learnt from": train, "held out": held_out},
        "updates": updates,
        "loss": [losses[0], losses[-1]],
        "DPM++ 2M": {spacing: interval(values) for spacing, values in peers.items()},
        "best spacing": best,
        "learnt": interval(ours),
        "gain on each": interval(peers[best] - ours),
    }
    return rows, report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="where the table is written, .npz")
    parser.add_argument("--train", type=int, default=64, help="pairs of prompt and seed to learn from")
    parser.add_argument("--held-out", type=int, default=24, help="pairs to measure by")
    parser.add_argument("--updates", type=int, default=250)
    parser.add_argument("--solution-steps", type=int, default=500, help="of Heun's method, two calls each")
    arguments = vars(parser.parse_args())
    path = arguments.pop("path")
    found, figures = main(**arguments)
    np.savez(path, **dataclasses.asdict(found))
    print(json.dumps(figures, indent=2, ensure_ascii=False))
