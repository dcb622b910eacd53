"""The judge of pictures against compositing by hand."""

import numpy as np
import pytest

from sdjax.training import data, evaluation

RNG = np.random.default_rng(0)
PALETTE = np.array([[255, 255, 255], [200, 30, 30], [30, 60, 200]], np.uint8)


def blobs(count, size=32):
    """Sprites of random colours and outlines, transparent at the edge."""
    sprites = np.zeros((count, size, size, 4), np.uint8)
    sprites[:, 6:-6, 6:-6, :3] = RNG.integers(0, 256, (count, 5, 5, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    sprites[:, 6:-6, 6:-6, 3] = 255 * RNG.integers(0, 2, (count, 5, 5), np.uint8).repeat(4, 1).repeat(4, 2)
    return sprites


SPRITES = blobs(12)


def test_finds_each_sprite_on_each_background():
    for number, colour in enumerate(PALETTE):
        verdict = evaluation.judge(data.composite(SPRITES, colour), SPRITES, PALETTE)
        np.testing.assert_array_equal(verdict.sprite, np.arange(12))
        np.testing.assert_array_equal(verdict.background, number)
        assert verdict.distance.max() < 1e-5


def test_small_shifts_and_noise_do_not_matter():
    pictures = np.roll(data.composite(SPRITES, PALETTE[1]), (2, -2), (1, 2)).astype(int)
    pictures = np.clip(pictures + RNG.integers(-20, 21, pictures.shape), 0, 255).astype(np.uint8)
    verdict = evaluation.judge(pictures, SPRITES, PALETTE)
    np.testing.assert_array_equal(verdict.sprite, np.arange(12))
    np.testing.assert_array_equal(verdict.background, 1)


def test_distance_is_that_of_the_composite():
    """The expansion into inner products against making every composite."""
    pictures = RNG.integers(0, 256, (3, 32, 32, 3), np.uint8)
    verdict = evaluation.judge(pictures, SPRITES, PALETTE)
    for picture, sprite, distance in zip(pictures, verdict.sprite, verdict.distance, strict=True):
        frame = np.ones((32, 32), bool)
        frame[2:-2, 2:-2] = False
        own = np.median(picture[frame].astype(np.float32) / 255, axis=0)
        errors = []
        for candidate in SPRITES:
            for scale in evaluation.SCALES:
                scaled = evaluation._scaled(candidate, scale)
                for shift in evaluation.SHIFTS:
                    moved = np.roll(scaled, shift, (0, 1))
                    made = moved[..., :3] + (1 - moved[..., 3:]) * own
                    errors.append((np.square(made - picture.astype(np.float32) / 255).mean(), len(errors)))
        best, where = min(errors)
        assert where // (len(evaluation.SCALES) * len(evaluation.SHIFTS)) == sprite
        assert distance == pytest.approx(best, rel=1e-4)


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] = 16
    assert evaluation.psnr(b, a)[1] == pytest.approx(20 * np.log10(255 / 16))
    assert evaluation.psnr(b, a)[0] > 100
