"""The emoji data set: sprites on plain backgrounds, their captions, what is held out. NumPy only, every draw seeded."""

import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdjax.training.names import indefinite, short_name, short_names, with_article

SIZE = 64
STYLES = ("flat", "3d")
# Plain and far apart in RGB, and chosen beside the sprites: the red is darker and the yellow paler than the emojis'
# own, so that hearts and faces stay visible; the white is pure because paper is what people expect.
COLOURS = {
    "red": (178, 34, 52),
    "orange": (236, 136, 62),
    "yellow": (250, 224, 116),
    "green": (74, 152, 96),
    "blue": (66, 112, 204),
    "purple": (124, 78, 168),
    "pink": (244, 168, 196),
    "white": (255, 255, 255),
}

# {concept}, {style} and {colour} are the bare words, {look} is the style as a noun; {a_concept} and {a_background}
# carry their article, {emoji} is the indefinite "a fox emoji". What a caption leaves out is free, so all are true.
LOOKS = {"flat": "flat style", "3d": "3d"}
CANONICAL = "a {style} emoji of {a_concept} on {a_background}"
LOOSE = (
    "{concept}, {style}",
    "{concept}, {style}, {colour} background",
    "{concept}, {style} style, {colour} background",
    "{colour} background, {concept}, {style}",
    "{colour} background, {style} emoji of {a_concept}",
    "{style} {concept} on {a_background}",
    "{style} emoji, {concept}, {colour} background",
    "a {style} emoji of {a_concept}",
    "a picture of {a_concept} in {look}",
    "a picture of {a_concept} in {look} on {a_background}",
    "{a_concept} on {a_background}",
    "{concept} on {colour}",
    "{concept}, {colour} background",
    "an emoji of {a_concept}",
    "{emoji}",
    "{emoji} in {look}",
    "{concept} {style}",
    "{a_concept}",
    "{concept}",
)
CANONICAL_SHARE = 0.5
HELD_OUT_PER_CONCEPT = 2  # of 2 styles x 8 colours: 12.5 %
# Of the concepts whose names another shares in part, those that people ask for.
WANTED = (
    "grinning face", "red heart", "broken heart", "red apple", "green apple", "hot dog", "birthday cake", "palm tree",
    "Christmas tree", "teddy bear", "polar bear", "soccer ball", "police car", "crescent moon",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Dataset:
    """The sprites and what they show.

    Attributes:
        sprites: (N, 64, 64, 4) uint8, straight (not premultiplied) RGBA.
        concept: (N,) int32, index into `names`.
        style: (N,) int32, index into STYLES; a concept has each style at most once.
        names: Unicode's short name of each concept, in emoji order; `concepts` gives the spoken ones.
        groups, subgroups: Unicode's, of each concept.
        sources: (file name, sha256) of what the sprites were made from.
    """

    sprites: np.ndarray
    concept: np.ndarray
    style: np.ndarray
    names: tuple[str, ...]
    groups: tuple[str, ...]
    subgroups: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        if self.sprites.dtype != np.uint8 or self.sprites.shape[1:] != (SIZE, SIZE, 4):
            raise ValueError(
                f"sprites: expected uint8 (N, {SIZE}, {SIZE}, 4), got {self.sprites.dtype} {self.sprites.shape}"
            )
        limits = {"concept": len(self.names), "style": len(STYLES)}
        for name, limit in limits.items():
            array = getattr(self, name)
            if array.dtype != np.int32 or array.shape != (len(self.sprites),):
                raise ValueError(f"{name}: expected int32 ({len(self.sprites)},), got {array.dtype} {array.shape}")
            if array.size and not (array.min() >= 0 and array.max() < limit):
                raise ValueError(f"{name}: expected 0 to {limit - 1}, got {array.min()} to {array.max()}")
        for name in ("groups", "subgroups"):
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"{name}: expected {len(self.names)}, one per name, got {len(getattr(self, name))}")
        pairs = np.stack([self.concept, self.style], axis=1)
        if len(np.unique(pairs, axis=0)) != len(pairs):
            raise ValueError("concept, style: a pair occurs twice; keep one sprite of each")
        missing = sorted(set(range(len(self.names))) - set(self.concept.tolist()))
        if missing:
            raise ValueError(f"concept: no sprite shows {[self.names[i] for i in missing]}; drop these names")


def load_dataset(path: str | Path) -> Dataset:
    """Read what `scripts/make_dataset.py` wrote.

    Raises:
        ValueError: no such file, not such a file, or its arrays do not fit together.
    """
    if not Path(path).is_file():
        raise ValueError(f"path: no such file: {path}; make it with scripts/make_dataset.py")
    unreadable = f"path: {path} is not a readable .npz; make it with scripts/make_dataset.py"
    if not zipfile.is_zipfile(path):
        raise ValueError(unreadable)
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(unreadable) from error
    expected = {"sprites", "concept", "style", "names", "groups", "subgroups", "sources", "sources_sha256"}
    if expected - arrays.keys():
        raise ValueError(f"path: {path} lacks the arrays {sorted(expected - arrays.keys())}; make it anew")
    return Dataset(
        sprites=arrays["sprites"],
        concept=arrays["concept"],
        style=arrays["style"],
        names=tuple(arrays["names"].tolist()),
        groups=tuple(arrays["groups"].tolist()),
        subgroups=tuple(arrays["subgroups"].tolist()),
        sources=tuple(zip(arrays["sources"].tolist(), arrays["sources_sha256"].tolist(), strict=True)),
    )


def concepts(dataset: Dataset) -> list[str]:
    """The spoken name of each concept, unique: what captions and the model's list of concepts use."""
    return short_names(dataset.names)


def drawn(dataset: Dataset) -> np.ndarray:
    """Which concepts the small model learns to draw: those with a name of their own. (len(names),) bool.

    That is a name of one word, or of two whose last ends no other name: "fox" and "light bulb", not the 110 faces, 24
    clocks and 20 hearts, which look alike and which a sentence tells apart. And those that are wanted all the same.
    """
    names = concepts(dataset)
    ends = Counter(name.split()[-1].rstrip("s") for name in names)

    def own(name: str) -> bool:
        words = name.split()
        return len(words) == 1 or (len(words) == 2 and ends[words[-1].rstrip("s")] == 1)

    return np.array([own(name) or name in WANTED for name in names])


def composite(sprites: np.ndarray, rgb: np.ndarray | tuple[int, int, int]) -> np.ndarray:
    """Lay sprites over plain backgrounds: alpha * sprite + (1 - alpha) * rgb, rounded to nearest.

    Args:
        sprites: (B, H, W, 4) uint8, straight RGBA.
        rgb: one colour (3,) or one per sprite (B, 3), 0 to 255.

    Returns:
        (B, H, W, 3) uint8.
    """
    alpha = sprites[..., 3:].astype(np.uint32)
    background = np.asarray(rgb, np.uint32).reshape(-1, 1, 1, 3)
    # 255 is odd, so there are no ties and adding 127 rounds exactly.
    return ((sprites[..., :3] * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def render(dataset: Dataset, triples: np.ndarray) -> np.ndarray:
    """The pictures of (concept, style, colour) triples (B, 3): (B, 64, 64, 3) uint8.

    Raises:
        ValueError: a concept does not exist in that style.
    """
    sprite_of = np.full((len(dataset.names), len(STYLES)), -1)
    sprite_of[dataset.concept, dataset.style] = np.arange(len(dataset.sprites))
    chosen = sprite_of[triples[:, 0], triples[:, 1]]
    if (chosen < 0).any():
        concept, style, _ = triples[np.argmax(chosen < 0)]
        raise ValueError(f"triples: {dataset.names[concept]!r} has no {STYLES[style]} sprite")
    return composite(dataset.sprites[chosen], np.array(list(COLOURS.values()))[triples[:, 2]])


def canonical(concept: str, style: str, colour: str) -> str:
    """The caption that says all: "a 3d emoji of an owl on a blue background"."""
    return _fill(CANONICAL, concept, style, colour)


def caption(concept: str, style: str, colour: str, rng: np.random.Generator) -> str:
    """The canonical caption half of the time, else one of the looser ones, all equally likely."""
    loose = rng.integers(len(LOOSE))
    return _fill(CANONICAL if rng.random() < CANONICAL_SHARE else LOOSE[loose], concept, style, colour)


def captions(concept: str) -> list[str]:
    """Every caption that a concept can get, in all styles and colours; some come several times."""
    return [
        _fill(template, concept, style, colour)
        for template in (CANONICAL, *LOOSE)
        for style in STYLES
        for colour in COLOURS
    ]


def caption_of(dataset: Dataset, concept: int, style: int, colour: int, rng: np.random.Generator) -> str:
    """A caption of one (concept, style, colour) triple, given by its indices."""
    return caption(short_name(dataset.names[concept]), STYLES[style], list(COLOURS)[colour], rng)


def _fill(template: str, concept: str, style: str, colour: str) -> str:
    return template.format(
        concept=concept,
        style=style,
        look=LOOKS[style],
        colour=colour,
        a_concept=with_article(concept),
        a_background=indefinite(f"{colour} background"),
        emoji=indefinite(f"{concept} emoji"),
    )


def split(dataset: Dataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide all (concept, style, colour) triples into those trained on and those held out.

    Of each concept that has every style, HELD_OUT_PER_CONCEPT triples of different colours are held out, each in one
    style: training has the same concept on the same background in another style, and in the same style on others. So
    every concept, style, colour and every pair of them is trained on, and only the combination is new.

    Returns:
        train (M, 3) and held_out (K, 3) int32: indices into names, STYLES, COLOURS; both sorted.
    """
    rng = np.random.default_rng(seed)
    held_out = []
    counts = np.bincount(dataset.concept, minlength=len(dataset.names))
    for concept in np.flatnonzero(counts == len(STYLES)):
        for colour in rng.choice(len(COLOURS), HELD_OUT_PER_CONCEPT, replace=False):
            held_out.append((concept, rng.integers(len(STYLES)), colour))
    everything = {
        (concept, style, colour)
        for concept, style in zip(dataset.concept.tolist(), dataset.style.tolist(), strict=True)
        for colour in range(len(COLOURS))
    }
    held = {(int(concept), int(style), int(colour)) for concept, style, colour in held_out}
    return (
        np.array(sorted(everything - held), np.int32).reshape(-1, 3),
        np.array(sorted(held), np.int32).reshape(-1, 3),
    )


def benchmark_prompts(dataset: Dataset, seed: int, count: int = 200) -> list[tuple[str, str, str]]:
    """Held-out (concept, style, colour) words to measure the model by, each of another concept.

    Args:
        seed: the split's; the prompts are drawn from its held-out triples.

    Raises:
        ValueError: fewer than `count` concepts have a held-out triple.
    """
    _, held_out = split(dataset, seed)
    candidates = np.intersect1d(held_out[:, 0], np.flatnonzero(drawn(dataset)))
    if count > len(candidates):
        raise ValueError(f"count: {count} prompts wanted, but only {len(candidates)} concepts have held-out triples")
    rng = np.random.default_rng((seed, count))
    names = concepts(dataset)
    chosen = []
    for concept in rng.choice(candidates, count, replace=False):
        _, style, colour = rng.choice(held_out[held_out[:, 0] == concept])
        chosen.append((names[concept], STYLES[style], list(COLOURS)[colour]))
    return chosen


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Which of n examples make up the batch of a step: a pure function, so resuming needs the step alone.

    The examples are read in a new order each epoch; a batch may begin in one epoch and end in the next.

    Returns:
        (batch_size,) int64 in [0, n).

    Raises:
        ValueError: n or batch_size below 1, or a negative step.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            f"expected n >= 1, batch_size >= 1, step >= 0, got n={n}, batch_size={batch_size}, step={step}"
        )
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n)
        indices[epochs == epoch] = order[positions[epochs == epoch]]
    return indices
