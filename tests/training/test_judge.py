"""The judge against one that composites every candidate picture, pixel by pixel."""

import itertools

import numpy as np
import pytest

from sdjax.training import judge
from sdjax.training.judge import SCALES, SHIFTS, nearest_sprite, psnr

SIZE = 20
PALETTE = np.array([[255, 255, 255], [20, 40, 200], [200, 30, 30], [250, 220, 60]], np.uint8)


def sprites(count, size=SIZE, seed=0):
    """Blobs of colour with soft alpha; some reach the edge."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    found = []
    for _ in range(count):
        cy, cx, r = rng.uniform((0.25, 0.25, 0.2), (0.75, 0.75, 0.45))
        alpha = np.clip((r - np.hypot(y - cy, x - cx)) * size / 2, 0, 1)
        colour = rng.uniform(0, 1, (3, 3)) @ np.stack([np.ones_like(x), x, y]).reshape(3, -1)
        colour = np.clip(colour.T.reshape(size, size, 3), 0, 1)
        found.append(np.concatenate([colour, alpha[..., None]], -1))
    return (np.stack(found) * 255).round().astype(np.uint8)


def resized(sprite, scale):
    """About its centre, premultiplied: every new pixel is a triangle-weighted mean of old ones, nothing outside."""
    size = len(sprite)
    support = max(1.0, 1 / scale)
    centres = (np.arange(size) + 0.5 - size / 2) / scale + size / 2
    margin = 8
    places = np.arange(-margin, size + margin) + 0.5
    weights = np.maximum(0, 1 - np.abs(places - centres[:, None]) / support)
    weights = (weights / weights.sum(1, keepdims=True))[:, margin:-margin]
    return np.einsum("yi,xj,ijc->yxc", weights, weights, sprite)


def moved(sprite, dy, dx):
    size = len(sprite)
    found = np.zeros_like(sprite)
    for y, x in itertools.product(range(size), range(size)):
        if 0 <= y - dy < size and 0 <= x - dx < size:
            found[y, x] = sprite[y - dy, x - dx]
    return found


def candidates(sprite):
    """All placements of a sprite (S, S, 4) with premultiplied alpha in [0, 1]."""
    sprite = sprite / 255.0
    sprite = np.concatenate([sprite[..., :3] * sprite[..., 3:], sprite[..., 3:]], -1)
    for scale in SCALES:
        scaled = sprite if scale == 1 else resized(sprite, scale)
        for dy, dx in SHIFTS:
            yield moved(scaled, dy, dx)


def over(candidate, background):
    return candidate[..., :3] + (1 - candidate[..., 3:]) * background


def border(picture):
    inner = np.ones(picture.shape[:2], bool)
    inner[2:-2, 2:-2] = False
    return picture[inner]


def pictures(seed=3):
    """Noisy pictures, each near one sprite at some place and size on some background."""
    rng = np.random.default_rng(seed)
    found = []
    for sprite in sprites(6):
        places = list(candidates(sprite))
        picture = over(places[rng.integers(len(places))], PALETTE[rng.integers(4)] / 255)
        found.append(np.clip(picture + rng.normal(0, 0.15, picture.shape), 0, 1))
    return (np.stack(found) * 255).round().astype(np.uint8)


def test_the_judge_finds_what_compositing_finds():
    given, known = pictures(), sprites(6)
    verdict = nearest_sprite(given, known, PALETTE)
    for picture, sprite, distance, background in zip(given / 255, *verdict, strict=True):
        own = np.median(border(picture), 0)
        errors = np.array([min(np.square(picture - over(c, own)).mean() for c in candidates(s)) for s in known])
        assert sprite == errors.argmin()
        # Float32 sums of a thousand numbers that nearly cancel, and PIL's resizing: 1.3e-7 was seen.
        assert abs(distance - errors.min()) < 1e-6
        assert background == np.square(own - PALETTE / 255).sum(1).argmin()


def test_exact_pictures_are_found_exactly():
    """At every shift and scale that is searched; on the border of each lies nothing but its background."""
    known = sprites(5)
    known[:, [0, 1, 2, 3, -1, -2, -3, -4], :, 3] = known[:, :, [0, 1, 2, 3, -1, -2, -3, -4], 3] = 0
    for (k, sprite), (b, colour) in itertools.product(enumerate(known), enumerate(PALETTE)):
        placed = [over(c, colour / 255) for c in candidates(sprite)]
        placed = (np.stack(placed) * 255).round().astype(np.uint8)
        verdict = nearest_sprite(placed, known, PALETTE)
        assert (verdict.sprite == k).all()
        assert (verdict.background == b).all()
        assert (verdict.distance >= 0).all()
        assert (verdict.distance < 1e-5).all()  # 8 bits: (1 / 255)^2 / 12 = 1.3e-6


def test_what_leaves_at_one_side_does_not_come_back():
    known = sprites(2).astype(np.float32)
    for shift in (*SHIFTS, (3, -1)):
        expected = np.stack([moved(sprite, *shift) for sprite in known])
        assert np.array_equal(judge._shifted(known, shift), expected)


@pytest.mark.parametrize("size", [8, 64, 200])
def test_other_sizes(size):
    known = sprites(3, size)
    alpha = known[..., 3:] / 255
    verdict = nearest_sprite((known[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8), known, PALETTE)
    assert verdict.sprite.tolist() == [0, 1, 2]


def test_psnr():
    """Closed form: an error of d everywhere is 20 log10(255 / d) decibels; one picture's is its own."""
    a = np.full((4, 6, 5, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 1
    b[2] -= 50
    b[3, 0] = 255
    expected = [
        10 * np.log10(255**2 / 1e-10),
        20 * np.log10(255),
        20 * np.log10(255 / 50),
        10 * np.log10(255**2 / (155**2 / 6)),
    ]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-12)
    assert np.array_equal(psnr(a, b), psnr(b, a))  # uint8 does not wrap round
