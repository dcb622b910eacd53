"""Sizes, ranges, masks and crops against diffusers' VaeImageProcessor."""

import numpy as np
import pytest
from PIL import Image

from sdjax import images, program

image_processor = pytest.importorskip("diffusers.image_processor")
PICTURES = image_processor.VaeImageProcessor(vae_scale_factor=8)
MASKS = image_processor.VaeImageProcessor(
    vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
)  # as the inpainting pipeline makes it


def picture(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def channels_last(tensor) -> np.ndarray:
    return tensor.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(64, 64), (97, 53), (31, 200)])
@pytest.mark.parametrize("target", [(64, 64), (72, 104)])
def test_pictures(size, target):
    batch = [picture(seed, *size) for seed in (0, 1)]
    ours = program.to_unit(np.stack([images.resize(images.load_image(image), *target) for image in batch]))
    theirs = PICTURES.preprocess(batch, width=target[0], height=target[1])
    np.testing.assert_allclose(ours, channels_last(theirs), atol=1.2e-7, rtol=0)  # one rounding of a number below 1


@pytest.mark.parametrize("size", [(64, 64), (97, 53), (31, 200)])
@pytest.mark.parametrize("target", [(64, 64), (72, 104)])
def test_masks(size, target):
    batch = [picture(seed, *size) for seed in (2, 3)]
    ours = [images.resize_mask(images.load_mask(image.convert("L")), *target) for image in batch]
    assert {value for mask in ours for value in np.unique(mask)} == {0, 255}
    theirs = MASKS.preprocess([image.convert("L") for image in batch], width=target[0], height=target[1])
    np.testing.assert_array_equal(np.stack(ours)[..., None] / 255, channels_last(theirs))


def test_pixels():
    import torch

    decoded = np.random.default_rng(4).normal(size=(2, 8, 16, 3)).astype(np.float32)
    theirs = PICTURES.postprocess(torch.from_numpy(decoded.transpose(0, 3, 1, 2)), output_type="pil")
    np.testing.assert_array_equal(program.to_pixels(decoded), np.stack([np.asarray(image) for image in theirs]))


def test_blur():
    mask = images.binarize(picture(5, 60, 40).convert("L"))
    for radius in (1, 4, 7.5):
        np.testing.assert_array_equal(
            np.asarray(images.blur_mask(mask, radius)), np.asarray(image_processor.VaeImageProcessor.blur(mask, radius))
        )


def test_crop_region():
    rng = np.random.default_rng(6)
    for _ in range(300):
        width, height = rng.integers(8, 80, 2)
        xs, ys = np.sort(rng.integers(0, width + 1, 2)), np.sort(rng.integers(0, height + 1, 2))
        mask = Image.new("L", (int(width), int(height)))
        mask.paste(255, (int(xs[0]), int(ys[0]), int(xs[1]) + 1, int(ys[1]) + 1))
        if mask.getbbox() is None:
            continue
        padding = int(rng.integers(0, 20))
        target = [int(side) for side in rng.integers(8, 128, 2)]
        theirs = image_processor.VaeImageProcessor.get_crop_region(mask, *target, pad=padding)
        assert images.crop_region(mask, padding, *target) == theirs


@pytest.mark.parametrize("region", [None, (10, 6, 42, 38)])
def test_paste(region):
    original, mask = picture(7, 64, 48), images.binarize(picture(8, 64, 48).convert("L"))
    if region is not None:  # diffusers' mask lies within its region
        inside = Image.new("L", mask.size)
        inside.paste(mask.crop(region), region)
        mask = inside
    generated = picture(9, *((64, 48) if region is None else (96, 96)))
    ours = images.paste(original, generated, mask, region)
    theirs = PICTURES.apply_overlay(mask, original, generated, region)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
