"""The data set's backgrounds, names, captions, split and order, on a set small enough to check by hand."""

import importlib.util
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.training import data
from sdjax.training.names import BARE, RENAMED, WITH_THE, short_name, short_names, with_article

ROOT = Path(__file__).parents[2]
CONCEPTS = (ROOT / "sdjax/default_model/concepts.txt").read_text(encoding="utf-8").splitlines()
COLOURS = list(data.COLOURS)
NAMES = ("red apple", "fox", "paperclip", "owl", "hourglass done", "chopsticks")


def arrays(only_flat=("paperclip",)):
    """What the data set's file holds, of six concepts, one of which has no 3d sprite."""
    pairs = [
        (concept, style)
        for concept, style in itertools.product(range(len(NAMES)), range(2))
        if not (style == 1 and NAMES[concept] in only_flat)
    ]
    rng = np.random.default_rng(0)
    return {
        "sprites": rng.integers(0, 256, (len(pairs), 64, 64, 4), np.uint8),
        "concept": np.array([concept for concept, _ in pairs], np.int32),
        "style": np.array([style for _, style in pairs], np.int32),
        "names": np.array(NAMES),
        "groups": np.array(["Objects"] * len(NAMES)),
        "subgroups": np.array(["tool"] * len(NAMES)),
        "sources": np.array(["font.ttf"]),
        "sources_sha256": np.array(["00"]),
    }


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "small.npz", **arrays())
    return tmp_path / "small.npz"


@pytest.fixture
def dataset(path):
    return data.load_dataset(path)


def test_load_gives_what_was_saved(dataset):
    np.testing.assert_array_equal(dataset.sprites, arrays()["sprites"])
    assert dataset.names == NAMES
    assert dataset.sources == (("font.ttf", "00"),)
    assert data.concepts(dataset) == ["red apple", "fox", "paperclip", "owl", "hourglass", "chopsticks"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sprites": np.zeros((11, 32, 32, 4), np.uint8)}, "sprites: expected uint8"),
        ({"sprites": np.zeros((11, 64, 64, 4), np.float32)}, "sprites: expected uint8"),
        ({"concept": np.zeros(3, np.int32)}, "concept: expected int32"),
        ({"concept": np.arange(11, dtype=np.int32)}, "concept: expected 0 to 5, got 0 to 10"),
        ({"style": np.full(11, 2, np.int32)}, "style: expected 0 to 1"),
        ({"style": np.zeros(11, np.int32)}, "a pair occurs twice"),
        ({"groups": np.array(["Objects"])}, "groups: expected 6"),
        ({"names": np.array([*NAMES, "moon"]), "groups": np.array([""] * 7), "subgroups": np.array([""] * 7)}, "moon"),
    ],
)
def test_load_refuses_arrays_that_do_not_fit(tmp_path, change, message):
    np.savez(tmp_path / "bad.npz", **(arrays() | change))
    with pytest.raises(ValueError, match=message):
        data.load_dataset(tmp_path / "bad.npz")


def test_load_refuses_files_that_are_not_the_data_set(tmp_path, path):
    with pytest.raises(ValueError, match="no such file"):
        data.load_dataset(tmp_path / "none.npz")
    whole = path.read_bytes()
    changed = whole[:5000] + b"\0\xff" * 50 + whole[5100:]
    for content in (b"", b"not a zip", whole[:1000], whole[: len(whole) // 2], changed):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable"):
            data.load_dataset(tmp_path / "bad.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="not a readable"):
        data.load_dataset(tmp_path / "array.npy")
    np.savez(tmp_path / "less.npz", sprites=arrays()["sprites"])
    with pytest.raises(ValueError, match="concept"):
        data.load_dataset(tmp_path / "less.npz")


@pytest.mark.parametrize("colour", COLOURS)
def test_composite_is_pillows_alpha_composite(dataset, colour):
    ours = data.composite(dataset.sprites, data.COLOURS[colour])
    assert ours.dtype == np.uint8
    for sprite, picture in zip(dataset.sprites, ours, strict=True):
        background = Image.new("RGBA", (64, 64), data.COLOURS[colour])
        pillows = np.asarray(Image.alpha_composite(background, Image.fromarray(sprite)))[..., :3]
        # Pillow rounds its weights as well as its result, hence one level.
        assert np.abs(picture.astype(int) - pillows).max() <= 1


def test_composite_rounds_to_nearest_and_takes_a_colour_each():
    levels = np.arange(256, dtype=np.uint8)
    alpha, value = np.meshgrid(levels, levels, indexing="ij")
    sprites = np.stack([value, value, value, alpha], axis=-1)[None].repeat(2, axis=0)
    rgb = np.array([[0, 100, 255], [255, 7, 31]])
    weight = alpha[None, ..., None] / 255
    exact = weight * value[None, ..., None] + (1 - weight) * rgb[:, None, None, :]
    np.testing.assert_array_equal(data.composite(sprites, rgb), np.floor(exact + 0.5 + 1e-9))


def test_render_puts_the_sprite_of_a_triple_on_its_colour(dataset):
    triples = np.array([[3, 1, COLOURS.index("blue")], [0, 0, COLOURS.index("white")]])
    pictures = data.render(dataset, triples)
    owl_in_3d = np.flatnonzero((dataset.concept == 3) & (dataset.style == 1))
    np.testing.assert_array_equal(pictures[:1], data.composite(dataset.sprites[owl_in_3d], data.COLOURS["blue"]))
    np.testing.assert_array_equal(pictures[1:], data.composite(dataset.sprites[:1], data.COLOURS["white"]))
    with pytest.raises(ValueError, match="'paperclip' has no 3d sprite"):
        data.render(dataset, np.array([[2, 1, 0]]))


@pytest.mark.parametrize(
    ("name", "spoken"),
    [
        ("red apple", "a red apple"),
        ("olive", "an olive"),
        ("unicorn", "a unicorn"),
        ("ewe", "a ewe"),
        ("euro banknote", "a euro banknote"),
        ("umbrella", "an umbrella"),
        ("unamused face", "an unamused face"),
        ("onion", "an onion"),
        ("hourglass done", "an hourglass"),
        ("house", "a house"),
        ("x-ray", "an X-ray"),
        ("sport utility vehicle", "an SUV"),
        ("chopsticks", "chopsticks"),
        ("bread", "bread"),
        ("Tokyo tower", "Tokyo Tower"),
        ("ballet shoes", "ballet shoes"),
        ("kaaba", "the Kaaba"),
        ("mount fuji", "Mount Fuji"),
        ("lady beetle", "a ladybug"),
        ("front-facing baby chick", "a chick facing forward"),
        ("twelve o\u2019clock", "a clock at twelve o'clock"),
        ("one-thirty", "a clock at half past one"),
        ("one-piece swimsuit", "a swimsuit"),
        ("man\u2019s shoe", "a man's shoe"),
    ],
)
def test_names_are_spoken_with_the_right_article(name, spoken):
    assert with_article(short_name(name)) == spoken


def test_names_stay_unique():
    assert len(set(RENAMED.values())) == len(RENAMED)
    with pytest.raises(ValueError, match="'snowman without snow' and 'snowman without snow'"):
        short_names(["snowman without snow", "fox", "snowman without snow"])


def test_names_without_or_with_a_definite_article_are_in_the_set():
    assert len(set(CONCEPTS) & BARE) > 20  # of all the data set's, those that the model draws
    assert set(CONCEPTS) & WITH_THE


def test_the_list_of_concepts_is_ascii_and_unique():
    assert len(CONCEPTS) == len(set(CONCEPTS)) >= 500
    assert all(name.isascii() and name == name.strip() and name for name in CONCEPTS)


def test_captions():
    assert data.canonical("owl", "3d", "orange") == "a 3d emoji of an owl on an orange background"
    assert data.canonical("chopsticks", "flat", "red") == "a flat emoji of chopsticks on a red background"
    rng = np.random.default_rng(0)
    drawn = Counter(data.caption("owl", "3d", "orange", rng) for _ in range(4000))
    assert len(drawn) == 1 + len(data.LOOSE)  # no two templates come to the same words, and each is drawn
    assert 0.47 < drawn["a 3d emoji of an owl on an orange background"] / 4000 < 0.53
    assert {"owl", "owl, 3d", "an owl emoji", "owl 3d", "an owl on an orange background"} <= drawn.keys()
    for text in drawn:
        assert "owl" in text
        assert "flat" not in text
        assert not any(colour in text for colour in COLOURS if colour != "orange")
    flat = {data.caption("the Kaaba", "flat", "red", rng) for _ in range(1000)}
    assert not any("in flat on" in text or text.endswith("in flat") for text in flat)


def test_captions_depend_on_the_generator_alone(dataset):
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [data.caption_of(dataset, 4, 1, 2, rng) for _ in range(50)]

    assert draw(1) == draw(1) != draw(2)
    assert "a 3d emoji of an hourglass on a yellow background" in draw(1)


def test_split_holds_out_combinations_only(dataset):
    train, held_out = data.split(dataset, seed=3)
    everything = {
        (concept, style, colour)
        for concept, style in zip(dataset.concept.tolist(), dataset.style.tolist(), strict=True)
        for colour in range(len(COLOURS))
    }
    train_set, held_set = set(map(tuple, train.tolist())), set(map(tuple, held_out.tolist()))
    assert len(train_set) == len(train)
    assert len(held_set) == len(held_out)
    assert train_set | held_set == everything
    assert not train_set & held_set
    assert 0.10 <= len(held_set) / len(everything) <= 0.15
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(triple[first], triple[second]) for triple in everything}
        assert {(triple[first], triple[second]) for triple in train_set} == pairs
    assert 2 not in held_out[:, 0]  # the paperclip has one style, so holding it out would hide it on that colour


def test_split_depends_on_the_seed_alone(dataset):
    np.testing.assert_array_equal(data.split(dataset, 5)[1], data.split(dataset, 5)[1])
    assert data.split(dataset, 5)[1].tolist() != data.split(dataset, 6)[1].tolist()


def test_benchmark_prompts_are_held_out_and_of_distinct_concepts(dataset):
    names = data.concepts(dataset)
    prompts = data.benchmark_prompts(dataset, seed=3, count=5)
    _, held_out = data.split(dataset, seed=3)
    triples = [[names.index(concept), data.STYLES.index(s), COLOURS.index(c)] for concept, s, c in prompts]
    assert all(triple in held_out.tolist() for triple in triples)
    assert len({concept for concept, _, _ in prompts}) == 5
    assert prompts == data.benchmark_prompts(dataset, seed=3, count=5)
    with pytest.raises(ValueError, match="only 5 concepts"):
        data.benchmark_prompts(dataset, seed=3, count=6)


def test_the_committed_prompts():
    prompts = json.loads((ROOT / "benchmarks/prompts.json").read_text(encoding="utf-8"))["prompts"]
    assert len(prompts) == 200
    assert len({row["concept"] for row in prompts}) == 200
    for row in prompts:
        assert row["concept"] in CONCEPTS
        assert row["prompt"] == data.canonical(row["concept"], row["style"], row["colour"])
    assert {row["colour"] for row in prompts} == set(COLOURS)
    assert {row["style"] for row in prompts} == set(data.STYLES)


@pytest.mark.parametrize(("batch_size", "n"), [(4, 10), (7, 5), (3, 3), (1, 1), (16, 5)])
def test_batches_read_every_example_once_an_epoch(batch_size, n):
    steps = 6 * n
    read = np.concatenate([data.batch_indices(9, step, batch_size, n) for step in range(steps)])
    epochs = read[: len(read) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.arange(n)[None].repeat(len(epochs), axis=0))
    if n > 3:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_a_batch_is_a_function_of_seed_and_step():
    late = data.batch_indices(1, 1000, 64, 14_000)
    for step in range(3):
        data.batch_indices(1, step, 64, 14_000)
    np.testing.assert_array_equal(late, data.batch_indices(1, 1000, 64, 14_000))
    assert late.tolist() != data.batch_indices(2, 1000, 64, 14_000).tolist()
    # The same examples in the same order whatever the size of the batch, so that it may change between runs.
    np.testing.assert_array_equal(late[:32], data.batch_indices(1, 2000, 32, 14_000))


@pytest.mark.parametrize("arguments", [(0, -1, 4, 10), (0, 0, 0, 10), (0, 0, 4, 0)])
def test_impossible_batches_are_refused(arguments):
    with pytest.raises(ValueError, match="expected n >= 1"):
        data.batch_indices(*arguments)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_dataset", ROOT / "scripts/make_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("corner", [(10, 20), (0, 0), (98, 108)])
def test_sprites_are_fitted_centred_and_keep_their_colour(script, corner):
    picture = Image.new("RGBA", (128, 128))
    picture.paste((200, 100, 50, 255), (*corner, corner[0] + 30, corner[1] + 20))
    sprite = np.asarray(script.fit(picture.convert("RGBa"), 64, 3))
    rows, columns = (np.flatnonzero((sprite[..., 3] > 127).any(axis=axis)) for axis in (1, 0))
    assert (columns[0], columns[-1]) == (3, 60)
    assert abs(len(rows) - 58 * 20 / 30) <= 1
    assert abs(rows[0] - (63 - rows[-1])) <= 1
    # Edges are as bright as the middle: what is transparent has no colour to mix in.
    visible = sprite[sprite[..., 3] > 100]
    assert np.abs(visible[:, :3].astype(int) - (200, 100, 50)).max() <= 2


def test_only_the_chosen_emojis_are_read(script, tmp_path):
    (tmp_path / "emoji-test.txt").write_text(
        "# group: Smileys & Emotion\n# subgroup: heart\n"
        "2764 FE0F  ; fully-qualified     # \u2764\ufe0f E0.6 red heart\n"
        "2764       ; unqualified         # \u2764 E0.6 red heart\n"
        "# group: People & Body\n# subgroup: person\n"
        "1F9D1      ; fully-qualified     # \U0001f9d1 E5.0 person\n"
        "# group: Flags\n# subgroup: flag\n"
        "1F3C1      ; fully-qualified     # \U0001f3c1 E0.6 chequered flag\n"
        "# group: Animals & Nature\n# subgroup: animal-mammal\n"
        "1F98A      ; fully-qualified     # \U0001f98a E3.0 fox\n",
        encoding="utf-8",
    )
    assert script.read_emoji_test(tmp_path / "emoji-test.txt") == [
        ("\u2764\ufe0f", "red heart", "Smileys & Emotion", "heart"),
        ("\U0001f98a", "fox", "Animals & Nature", "animal-mammal"),
    ]


def test_captions_are_all_that_can_be_drawn():
    rng = np.random.default_rng(0)
    drawn = {data.caption("fox", style, colour, rng) for style in data.STYLES for colour in COLOURS for _ in range(400)}
    assert drawn == set(data.captions("fox"))
