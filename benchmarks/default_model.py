"""How good is the model that ships? `python benchmarks/default_model.py --data runs/emoji64.npz`

The 200 prompts of `prompts.json` name a concept, a style and a background whose combination no part of the model was
trained on; they were fixed before the denoiser's last training. Each is made once, with the default sampler, steps and
guidance and seed 0: no picking. Two judges look at every picture:

* the nearest sprite (`sdjax.training.judge`): the picture's background is the median colour of its border,
  named after the nearest of the eight; on that background every sprite of the data set, all concepts in both styles, is
  laid at nine shifts of up to 2 pixels and three sizes, and the one with the smallest squared error is what the picture
  shows;
* the small CLIP whose text encoder the model has, its image tower trained further on real pictures (the stage `judge`
  of scripts/train_default_model.py), zero-shot: of the captions of all concepts, styles and backgrounds, the one whose
  features are most like the picture's.

Also measured are the second judge's verdicts on the real pictures and on their reconstructions, which it can hardly be
expected to exceed, and the autoencoder: PSNR of the means' reconstructions of held-out composites, in decibels.
"""

from __future__ import annotations

import argparse
import itertools
import json
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import sdjax
from sdjax.checkpoints import native, safetensors
from sdjax.tokenizer import Tokenizer
from sdjax.training import data
from sdjax.training.contrastive import CLIP
from sdjax.training.judge import nearest_sprite, psnr

HERE = Path(__file__).parent
COLUMNS = 16  # of the contact sheet


def by_sprite(pictures: np.ndarray, dataset: data.Dataset) -> np.ndarray:
    """(B, 3): concept, style and colour as the nearest sprite has them."""
    verdict = nearest_sprite(pictures, dataset.sprites, np.array(list(data.COLOURS.values()), np.uint8))
    return np.stack([dataset.concept[verdict.sprite], dataset.style[verdict.sprite], verdict.background], -1)


def by_clip(pictures: np.ndarray, dataset: data.Dataset, model: sdjax.StableDiffusion, judge: Path) -> np.ndarray:
    """(B, 3): concept, style and colour of the caption that the small CLIP finds nearest."""
    towers = native.unflatten(safetensors.read(judge)[0])
    params = {**towers, "text_encoder": model.params["text_encoder"]}
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    clip = CLIP(model.config.text_encoder)
    triples = np.array(
        [
            (concept, style, colour)
            for concept, style in zip(dataset.concept, dataset.style, strict=True)
            for colour in range(len(data.COLOURS))
        ]
    )
    names, colours = data.concepts(dataset), list(data.COLOURS)
    captions = [data.canonical(names[c], data.STYLES[s], colours[k]) for c, s, k in triples]
    tokens = Tokenizer()(captions)
    length = int(tokens.argmax(-1).max()) + 1  # attention is causal: what follows the end token changes nothing
    encode_texts = jax.jit(lambda ids: clip.apply({"params": params}, ids, method="encode_texts"))
    encode_images = jax.jit(lambda x: clip.apply({"params": params}, x, method="encode_images"))
    texts = np.concatenate([np.asarray(encode_texts(part)) for part in _batches(tokens[:, :length], 256)])
    images = np.concatenate(
        [np.asarray(encode_images(part / np.float32(127.5) - 1)) for part in _batches(pictures, 50)]
    )
    texts, images = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (texts, images))
    return triples[(images @ texts.T).argmax(1)]


def autoencoder_psnr(model: sdjax.StableDiffusion, dataset: data.Dataset, held_out: np.ndarray) -> np.ndarray:
    """One figure per picture, for the first 256 held-out combinations in a fixed random order."""
    chosen = held_out[np.random.default_rng(0).permutation(len(held_out))[:256]]
    pictures = data.render(dataset, chosen)
    return psnr(reconstructed(model, pictures), pictures)


def reconstructed(model: sdjax.StableDiffusion, pictures: np.ndarray) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 through the autoencoder, by the means of their latents."""
    decoded = []
    for part in _batches(pictures, 40):
        mean, _ = model.encode_image(part / np.float32(127.5) - 1)
        decoded.append(np.asarray(model.decode_latents(mean)))
    return np.clip(np.rint(np.concatenate(decoded) * 127.5 + 127.5), 0, 255).astype(np.uint8)


def _batches(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[i : i + size] for i in range(0, len(array), size)]


def sheet(pictures: np.ndarray) -> Image.Image:
    """All pictures on one, row by row."""
    rows = -(-len(pictures) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * data.SIZE, rows * data.SIZE), "white")
    for (row, column), picture in zip(itertools.product(range(rows), range(COLUMNS)), pictures, strict=False):
        canvas.paste(Image.fromarray(picture), (column * data.SIZE, row * data.SIZE))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what scripts/make_dataset.py wrote")
    parser.add_argument("--model", type=Path, help="a native file in place of the model that ships")
    parser.add_argument("--judge", type=Path, default=HERE / "judge.safetensors")
    parser.add_argument("--count", type=int, default=200, help="of the prompts, the first so many")
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "default_model.json")
    parser.add_argument("--sheet", type=Path, default=HERE / "results" / "default_model.png")
    arguments = parser.parse_args()

    dataset = data.load_dataset(arguments.data)
    fixed = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    prompts = fixed["prompts"][: arguments.count]
    names, colours = data.concepts(dataset), list(data.COLOURS)
    asked = np.array(
        [(names.index(p["concept"]), data.STYLES.index(p["style"]), colours.index(p["colour"])) for p in prompts]
    )
    _, held_out = data.split(dataset, fixed["split_seed"])
    if not {tuple(t) for t in asked.tolist()} <= {tuple(t) for t in held_out.tolist()}:
        raise SystemExit("prompts.json belongs to another data set: some of its combinations are trained on")

    model = sdjax.load(arguments.model)
    pictures = sdjax.generate(
        [p["prompt"] for p in prompts],
        model=model,
        seed=[0] * len(prompts),
        sampler=arguments.sampler,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        output_type="np",
    )
    report = {
        "prompts": len(prompts),
        "sampler": arguments.sampler,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "jax": version("jax"),
        "model": model.fingerprint,
        "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
    }
    for judge, verdict in (
        ("nearest_sprite", by_sprite(pictures, dataset)),
        ("clip", by_clip(pictures, dataset, model, arguments.judge)),
    ):
        right = verdict == asked
        shares = [round(100 * float(share), 1) for share in right.mean(0)]
        report[judge] = dict(zip(("concept", "style", "background"), shares, strict=True))
        report[judge]["wrong_concepts"] = [
            f"{prompts[i]['prompt']}: {names[verdict[i, 0]]}" for i in np.flatnonzero(~right[:, 0])
        ]
    # What the second judge can be expected to say of pictures without fault.
    real = data.render(dataset, asked)
    for kind, shown in (("real_pictures", real), ("reconstructions", reconstructed(model, real))):
        shares = [round(100 * float(x), 1) for x in (by_clip(shown, dataset, model, arguments.judge) == asked).mean(0)]
        report[f"clip_on_{kind}"] = dict(zip(("concept", "style", "background"), shares, strict=True))
    psnr = autoencoder_psnr(model, dataset, held_out)
    report["autoencoder_psnr"] = {"mean": round(float(psnr.mean()), 2), "least": round(float(psnr.min()), 2)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(arguments.sheet)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
