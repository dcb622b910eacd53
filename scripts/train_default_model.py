"""Train the model that ships, end to end, on what `scripts/make_dataset.py` wrote:

    python scripts/train_default_model.py clip vae judge unet export --data emoji64.npz --run runs/emoji

Stages, each resumed where it stopped when the command is given again:

  clip    a small CLIP on pictures and captions; its text encoder is the model's
  vae     the autoencoder
  judge   the small CLIP's image tower further, the text encoder frozen, until it tells pictures that differ in style
          or background alone; `benchmarks/default_model.py` asks it
  unet    the denoiser, on the latents of all training pictures, with the text encoder frozen
  export  the running means of all as two bfloat16 files: the model, and what the judge has besides

`--start` takes what a run has not made itself from a model file: its text encoder and autoencoder, and the denoiser to
go on from. So the model that ships can be trained further without the run that made it.

Held-out combinations of concept, style and colour (`sdjax.training.data.split`) are seen by no stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.checkpoints import native, safetensors
from sdjax.models.config import Config, TextEncoderConfig, UNetConfig, VAEConfig
from sdjax.models.shapes import shapes
from sdjax.models.text_encoder import TextEncoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.schedule import Schedule, add_noise, target
from sdjax.tokenizer import Tokenizer
from sdjax.training import data, loop, losses
from sdjax.training.contrastive import CLIP

CONFIG = Config(
    text_encoder=TextEncoderConfig(width=96, num_layers=4, num_heads=4, mlp_width=384),
    unet=UNetConfig(
        channels=(64, 128, 192),
        blocks_per_level=1,
        attention_levels=(False, True, True),
        num_heads=(4, 4, 4),
        context_width=96,
        norm_groups=16,
    ),
    vae=VAEConfig(channels=(32, 64, 128), blocks_per_level=1, norm_groups=8),
    prediction="v",
    image_size=data.SIZE,
)
SPLIT_SEED = 0
# Stands for every word that no caption has: a token that none uses, put between words at random while training,
# whose embedding all such tokens get at export. So words the model does not know leave a picture as it is.
UNKNOWN_TOKEN = 49405


LONGEST_CAPTION = 40  # tokens, start and end included, with room for the unknown ones


class Pictures:
    """The training combinations: their pixels, and the captions drawn for a step."""

    def __init__(self, path: Path) -> None:
        self.dataset = data.load_dataset(path)
        self.triples, self.held_out = data.split(self.dataset, SPLIT_SEED)
        self.tokenizer = Tokenizer()

    def __len__(self) -> int:
        return len(self.triples)

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """(B,) -> (B, 64, 64, 3) float32 in [-1, 1]."""
        return to_model(data.render(self.dataset, self.triples[indices]))

    def tokens(self, indices: np.ndarray, step: int, empty: float) -> np.ndarray:
        """(B,) -> (B, 77): a caption each, by chance the empty one, and now and then with unknown words in it."""
        rng = np.random.default_rng((SPLIT_SEED, step))
        captions = [data.caption_of(self.dataset, *self.triples[i], rng) for i in indices]
        tokens = self.tokenizer(["" if rng.random() < empty else caption for caption in captions])
        for row in tokens:
            while rng.random() < 0.15:
                place = rng.integers(1, 1 + np.argmax(row))  # after the start token, at the latest before the end
                row[place + 1 :] = row[place:-1].copy()
                row[place] = UNKNOWN_TOKEN
        return tokens


def to_model(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def muon(rate: float, steps: int, falling: float = 0.25) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for matrices and convolutions, Adam for the rest; the rate falls over the last share of steps.

    On the autoencoder it reached in 160 steps a PSNR of 22.4 dB, where Adam at its best rate reached 18.6.
    """

    def dimensions(params: Any) -> Any:
        def of(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            if path[-1].key != "kernel":
                return None
            return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    def schedule(peak: float) -> optax.Schedule:
        warm = 100
        fall = min(int(falling * steps), steps - warm)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warm),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, peak / 100, fall),
            ],
            [warm, steps - fall],
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(rate),
            muon_weight_dimension_numbers=dimensions,
            adam_learning_rate=schedule(0.1 * rate),
            adam_b2=0.99,
        ),
    )


def train_clip(pictures: Pictures, run: Path, steps: int) -> loop.State:
    model, batch = CLIP(CONFIG.text_encoder), 192

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images, tokens = batch
        images = images + 0.05 * jax.random.normal(key, images.shape)
        return losses.contrastive_loss(*model.apply({"params": params}, images, tokens))

    def batches(step: int) -> Any:
        indices = data.batch_indices(SPLIT_SEED, step, batch, len(pictures))
        # Attention is causal and the features are read at the first end token, so what comes after changes nothing.
        return pictures.pixels(indices), pictures.tokens(indices, step, empty=0.0)[:, :LONGEST_CAPTION]

    params = initial(lambda key: model.init(key, *batches(0)), seed=1)
    return loop.train(loss, muon(0.01, steps), params, batches, loop.Settings(steps, seed=1), run / "clip")


def train_vae(pictures: Pictures, run: Path, steps: int) -> loop.State:
    model, batch = VAE(CONFIG.vae), 8  # many small steps teach it more than half as many of 16
    size = data.SIZE // CONFIG.vae.factor
    latents = (batch, size, size, CONFIG.vae.latent_channels)

    def loss(params: Any, images: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        noise = jax.random.normal(key, latents)
        reconstruction, mean, logvar = model.apply({"params": params}, images, noise)
        return losses.autoencoder_loss(reconstruction, images, mean, logvar, kl_weight=1e-4)

    def batches(step: int) -> Any:
        # Backgrounds of all colours, so that the autoencoder serves a user's own pictures too.
        rng = np.random.default_rng((SPLIT_SEED, step))
        sprites = data.batch_indices(SPLIT_SEED, step, batch, len(pictures.dataset.sprites))
        palette = np.array(list(data.COLOURS.values()))
        near = palette[rng.integers(len(palette), size=batch)] + rng.normal(0, 16, (batch, 3))
        colours = np.where(rng.random((batch, 1)) < 0.6, near, rng.uniform(0, 255, (batch, 3)))
        colours = np.clip(np.round(colours), 0, 255).astype(np.uint8)
        return to_model(data.composite(pictures.dataset.sprites[sprites], colours))

    params = initial(lambda key: model.init(key, batches(0), jnp.zeros(latents)), seed=2)
    return loop.train(loss, muon(0.01, steps), params, batches, loop.Settings(steps, seed=2), run / "vae")


def train_judge(pictures: Pictures, run: Path, steps: int) -> loop.State:
    """The contrast is with near misses, and the pictures are spoilt in ways that do not change what they show."""
    model, vae, threes = CLIP(CONFIG.text_encoder), VAE(CONFIG.vae), 64
    towers = dict(loop.latest(run / "clip").ema)
    frozen = {"text_encoder": towers.pop("text_encoder"), "vae": loop.latest(run / "vae").ema}
    known = {tuple(triple): i for i, triple in enumerate(pictures.triples.tolist())}

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images, tokens, frozen = batch
        for_order, for_size, for_latents, for_contrast, for_light, for_noise = jax.random.split(key, 6)
        # Half of them as the autoencoder decodes latents that are not quite right: what a model draws is no sharper.
        order = jax.random.permutation(for_order, len(images))
        images, tokens, soft = images[order], tokens[order], len(images) // 2
        mean, _ = vae.apply({"params": frozen["vae"]}, images[:soft], method="encode")
        size = jax.random.uniform(for_size, (soft, 1, 1, 1), maxval=0.6) * mean.std()
        mean = mean + size * jax.random.normal(for_latents, mean.shape)
        images = images.at[:soft].set(vae.apply({"params": frozen["vae"]}, mean, method="decode"))
        contrast = jax.random.uniform(for_contrast, (len(images), 1, 1, 1), minval=0.8, maxval=1.3)
        light = 0.05 * jax.random.normal(for_light, (len(images), 1, 1, 3))
        centre = images.mean((1, 2, 3), keepdims=True)
        images = jnp.clip(centre + contrast * (images - centre) + light, -1.0, 1.0)
        images = images + 0.05 * jax.random.normal(for_noise, images.shape)
        params = {**params, "text_encoder": frozen["text_encoder"]}
        return losses.contrastive_loss(*model.apply({"params": params}, images, tokens))

    def near_misses(step: int) -> list[tuple[int, int, int]]:
        """Combinations, each with one that differs in style alone and one in colour alone, where there are such."""
        rng = np.random.default_rng((SPLIT_SEED, step))
        chosen: dict[tuple[int, int, int], None] = {}  # in order, each once: equal captions would contradict
        for i in rng.permutation(len(pictures)):
            concept, style, colour = (int(x) for x in pictures.triples[i])
            for triple in (
                (concept, style, colour),
                (concept, 1 - style, colour),
                (concept, style, int(rng.integers(len(data.COLOURS)))),
            ):
                if triple in known:
                    chosen[triple] = None
            if len(chosen) >= 3 * threes:
                break
        return list(chosen)[: 3 * threes]

    def batches(step: int) -> Any:
        chosen = near_misses(step)
        names, colours = data.concepts(pictures.dataset), list(data.COLOURS)
        tokens = pictures.tokenizer([data.canonical(names[c], data.STYLES[s], colours[k]) for c, s, k in chosen])
        return to_model(data.render(pictures.dataset, np.array(chosen))), tokens[:, :LONGEST_CAPTION], frozen

    params = jax.tree.map(jnp.asarray, towers)
    settings = loop.Settings(steps, seed=4, ema_decay=0.98)
    return loop.train(loss, muon(0.005, steps, falling=1.0), params, batches, settings, run / "judge")


def encode_all(pictures: Pictures, vae: Any) -> tuple[np.ndarray, float]:
    """Every training picture's latents, the mean of q(z | x), scaled to a standard deviation of 1; and the scale."""
    encode = jax.jit(lambda params, x: VAE(CONFIG.vae).apply({"params": params}, x, method="encode")[0])
    chunks = np.array_split(np.arange(len(pictures)), max(1, len(pictures) // 64))
    latents = np.concatenate([np.asarray(encode(vae, pictures.pixels(chunk))) for chunk in chunks])
    scale = float(1.0 / latents.std())
    return latents * scale, scale


def made(run: Path, stage: str, start: Path | None) -> Any:
    """The running mean of a stage, or where the run has not made it, its part of the model file `start`."""
    try:
        return loop.latest(run / stage).ema
    except FileNotFoundError:
        if start is None:
            raise
    arrays, _ = safetensors.read(start)
    tree = native.unflatten({name: x.astype(np.float32) for name, x in arrays.items()})
    return {"text_encoder": tree["text_encoder"]} if stage == "clip" else tree[stage]


def train_unet(pictures: Pictures, run: Path, steps: int, start: Path | None = None) -> loop.State:
    model, batch, schedule = UNet(CONFIG.unet), 64, Schedule()
    text_encoder = TextEncoder(CONFIG.text_encoder)
    frozen = made(run, "clip", start)["text_encoder"]
    latents, _ = encode_all(pictures, made(run, "vae", start))
    drawn = np.flatnonzero(data.drawn(pictures.dataset)[pictures.triples[:, 0]])

    def loss(params: Any, examples: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        clean, tokens, frozen = examples
        for_noise, for_time = jax.random.split(key)
        noise = jax.random.normal(for_noise, clean.shape)
        # One timestep in each of `batch` equal parts of the range (Kingma et al. 2021, appendix I.1).
        times = (jnp.arange(batch) + jax.random.uniform(for_time)) / batch * schedule.num_train_timesteps
        timesteps = jnp.minimum(times, schedule.num_train_timesteps - 1).astype(jnp.int32)
        noisy = add_noise(schedule, clean, noise, timesteps)
        context = text_encoder.apply({"params": frozen}, tokens)
        output = model.apply({"params": params}, noisy, timesteps.astype(jnp.float32), context)
        # What a picture shows is decided where noise hides all of it and the words alone tell. The error of the
        # velocity weighs those timesteps as much as the others; that of the noise, a hundredth as much.
        velocity = target(schedule, CONFIG.prediction, clean, noise, timesteps)
        return losses.denoising_loss(output, velocity, jnp.ones(batch)), {}

    def batches(step: int) -> Any:
        indices = drawn[data.batch_indices(SPLIT_SEED, step, batch, len(drawn))]
        return latents[indices], pictures.tokens(indices, step, empty=0.1), frozen

    if start is None:
        context = jnp.zeros((1, 77, CONFIG.unet.context_width))
        params = initial(lambda key: model.init(key, jnp.asarray(latents[:1]), jnp.zeros(1), context), seed=3)
    else:
        params = jax.tree.map(jnp.asarray, made(run, "unet", start))
    # The mean reaches back 500 steps: short beside the fall of the rate, or it would keep what was before.
    settings = loop.Settings(steps, seed=3, ema_decay=0.998)
    return loop.train(loss, muon(0.01, steps, falling=1.0), params, batches, settings, run / "unet")


def initial(init: Callable[[jax.Array], Any], seed: int) -> Any:
    """Fresh parameters, drawn in one compiled program."""
    return jax.jit(init)(jax.random.key(seed))["params"]


def export(pictures: Pictures, run: Path, model: Path, judge: Path, start: Path | None) -> None:
    """Writes the model and, where the run has one, what the judge has besides the model's text encoder, in bfloat16."""
    clip, vae, unet = (made(run, stage, start) for stage in ("clip", "vae", "unet"))
    if (run / "judge").is_dir():
        native.save(judge, loop.latest(run / "judge").ema, CONFIG, dtype="bfloat16")

    embedding = clip["text_encoder"]["embeddings"]["token_embedding"]
    seen = pictures.tokenizer([caption for name in data.concepts(pictures.dataset) for caption in data.captions(name)])
    unknown = np.setdiff1d(np.arange(CONFIG.text_encoder.vocab_size), seen)
    rows = np.array(embedding["embedding"])
    rows[unknown] = rows[UNKNOWN_TOKEN]
    embedding["embedding"] = rows
    _, scale = encode_all(pictures, vae)
    config = dataclasses.replace(CONFIG, vae=dataclasses.replace(CONFIG.vae, scaling_factor=scale))
    params = {"text_encoder": clip["text_encoder"], "unet": unet, "vae": vae}
    native.save(model, params, config, dtype="bfloat16", targets=shapes(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=["clip", "vae", "judge", "unet", "export"])
    parser.add_argument("--data", type=Path, required=True, help="what scripts/make_dataset.py wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and metrics, made if missing")
    parser.add_argument("--start", type=Path, help="a model file, in place of stages that the run has not made")
    parser.add_argument("--model", type=Path, default=Path("sdjax/default_model/model.safetensors"))
    parser.add_argument("--judge", type=Path, default=Path("benchmarks/judge.safetensors"))
    parser.add_argument("--clip-steps", type=int, default=900)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--judge-steps", type=int, default=500)
    parser.add_argument("--unet-steps", type=int, default=12000)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells every file it writes
    pictures = Pictures(arguments.data)
    trainers = {
        "clip": (train_clip, arguments.clip_steps),
        "vae": (train_vae, arguments.vae_steps),
        "judge": (train_judge, arguments.judge_steps),
        "unet": (functools.partial(train_unet, start=arguments.start), arguments.unet_steps),
    }
    for stage in arguments.stages:
        if stage == "export":
            export(pictures, arguments.run, arguments.model, arguments.judge, arguments.start)
            continue
        trainer, steps = trainers[stage]
        if int(trainer(pictures, arguments.run, steps).step) < steps:
            break  # a signal; the next stage would build on what is half done


if __name__ == "__main__":
    main()
