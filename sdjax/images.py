"""A person's pictures and masks: files, PIL images and arrays, with what goes wrong with them.

Inside, a picture is an RGB PIL image and a mask an "L" one, white where it is to be repainted. `load_image` and
`load_mask` are the only ways in. Nothing here changes Pillow's global settings.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from sdjax import files

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

MAX_PIXELS = 2**26  # 8192 × 8192: 200 MB once decoded, and far more than any model here can use

# What pictures come in. Pillow reads many more, EPS by starting another program, which a stranger's file must not do.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
_SAVED_AS: dict[str, dict[str, Any]] = {
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "quality": 95},
}


def load_image(source: ImageSource, *, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB picture, upright, from a file, a PIL image or an array.

    Files and PIL images of any mode: EXIF orientation is applied, transparency is put on white, 16- and 32-bit values
    are scaled to 8 bits (32-bit ones by the smallest of the 1-, 8-, 16- and 31-bit ranges that holds them), of an
    animation the first frame is taken. No ICC profile is applied; an RGB picture keeps its own.

    Args:
        source: a path, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16, or float or
            bool in [0, 1].
        name: what to call it in an error.
        max_pixels: width times height that is accepted; checked before pixels are decoded.

    Raises:
        ValueError: no such file, an empty, truncated or damaged one, another format, too many pixels, values out of
            range, or an array of another shape or dtype.
    """
    with _reading(source, name):
        return _flatten(_open(source, max_pixels), "white")


def load_mask(source: ImageSource, *, name: str = "mask_image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An "L" mask, white where the picture is to be repainted, from what `load_image` takes.

    It is the source's luminance. Transparency is put on black, as what nobody painted on is to be kept.

    Raises:
        ValueError: as `load_image`; also for a mask of zeros and ones out of 255, which would repaint nothing.
    """
    with _reading(source, name):
        mask = _flatten(_open(source, max_pixels), "black").convert("L")
        if mask.getextrema()[1] == 1:
            raise ValueError("its values are 0 and 1 of 255, which repaints nothing; make it bool, or 0 and 255")
        return mask


@contextlib.contextmanager
def _reading(source: object, name: str) -> Iterator[None]:
    """Names the source in whatever goes wrong; Pillow's decoders raise nearly any exception on damaged bytes."""
    try:
        yield
    except Exception as error:
        where = f"{name} {os.fspath(source)!r}" if isinstance(source, str | os.PathLike) else name
        raise ValueError(f"{where}: {str(error) or type(error).__name__}") from error


def _open(source: object, max_pixels: int) -> Image.Image:
    """Decoded, upright, and of at most 8 bits a channel."""
    if isinstance(source, str | os.PathLike):
        with _open_file(source, _FORMATS) as image:
            return _decode(image, max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels)
    if hasattr(source, "__array__"):
        return _decode(_from_array(np.asarray(source)), max_pixels)
    raise ValueError(f"expected a path, a PIL image or an array, got {type(source).__name__}")


def _open_file(path: str | os.PathLike[str], formats: tuple[str, ...]) -> Image.Image:
    if not os.path.isfile(path):
        raise ValueError("is not a file" if os.path.exists(path) else "no such file")
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty (0 bytes)")
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"not a readable {', '.join(formats)} file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the file declares too many pixels: {error}") from error


def _decode(image: Image.Image, max_pixels: int) -> Image.Image:
    if not 0 < image.width * image.height <= max_pixels:
        raise ValueError(
            f"the picture has {image.width} x {image.height} pixels, expected 1 to {max_pixels} in all; make it smaller"
        )
    image.load()
    with contextlib.suppress(SyntaxError):  # EXIF that cannot be parsed turns nothing
        image = ImageOps.exif_transpose(image)
    # Pillow's own conversions clip these to 0 ... 255.
    if image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), [65535]))
    if image.mode == "I":
        return Image.fromarray(_eight_bits(np.asarray(image), [255, 65535, 2**31 - 1]))
    if image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image), [1, 255, 65535]))
    return image


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (3, 4))) or values.size == 0:
        raise ValueError(f"expected an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {values.shape}")
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    if values.dtype == np.uint16:
        return Image.fromarray(_eight_bits(values, [65535]))
    if values.dtype == bool or np.issubdtype(values.dtype, np.floating):
        return Image.fromarray(_eight_bits(values, [1]))
    raise ValueError(f"expected an array of uint8, uint16, float in [0, 1] or bool, got {values.dtype}")


def _eight_bits(values: np.ndarray, ranges: Sequence[int]) -> np.ndarray:
    """uint8, scaled from 0 ... the smallest of the ranges that holds all values."""
    low, high = float(values.min()), float(values.max())
    slack = 1e-4  # what float arithmetic may overshoot
    top = next((top for top in ranges if low >= -slack and high <= top + slack), None)
    if top is None:  # NaN ends here too
        raise ValueError(f"values run from {low:g} to {high:g}, expected 0 to {ranges[-1]}")
    return np.rint(np.clip(values.astype(np.float32) / top, 0, 1) * 255).astype(np.uint8)


def _flatten(image: Image.Image, background: str) -> Image.Image:
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")
    image.info.clear()  # what is saved later carries the picture's colour profile, nothing else of its metadata
    if profile:
        image.info["icc_profile"] = profile
    return image


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture at another size, by Pillow's Lanczos filter, as diffusers resizes."""
    return image.resize((width, height), Image.Resampling.LANCZOS)


def resize_mask(mask: Image.Image, width: int, height: int) -> Image.Image:
    """The mask at another size, binarised: 255 where the resized one is at least 0.5, else 0.

    diffusers' pipelines treat a PIL mask so: Lanczos, then the threshold.
    """
    return binarize(resize(mask, width, height))


def binarize(mask: Image.Image) -> Image.Image:
    """255 where the "L" mask is at least 0.5 of white, else 0."""
    return mask.point([255 if value / 255 >= 0.5 else 0 for value in range(256)])


def blur_mask(mask: Image.Image, radius: float) -> Image.Image:
    """The mask with soft edges: a Gaussian blur of `radius` pixels; 0 leaves it as it is."""
    if not 0 <= radius < float("inf"):
        raise ValueError(f"radius: expected 0 or more pixels, got {radius}")
    return mask.filter(ImageFilter.GaussianBlur(radius))


def crop_region(mask: Image.Image, padding: int, width: int, height: int) -> Box:
    """The part of a picture to work on when only what is masked is to be repainted at full resolution.

    The mask's bounding box, padded, then widened along one side to the proportions of `width` × `height`, and moved,
    and if need be cut, to lie within the picture (diffusers' get_crop_region). A mask without white gives the whole
    picture.

    Args:
        mask: "L", of the picture's size; everything above 0 counts as masked.
        padding: pixels around the bounding box.
        width, height: the size that the region will be resized to.
    """
    if padding < 0:
        raise ValueError(f"padding: expected 0 or more pixels, got {padding}")
    box = mask.getbbox()
    if box is None:
        return (0, 0, mask.width, mask.height)
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, mask.width), min(box[3] + padding, mask.height)
    proportion = width / height
    if (right - left) / (bottom - top) > proportion:
        top, bottom = _widen(top, bottom, int((right - left) / proportion), mask.height)
    else:
        left, right = _widen(left, right, int((bottom - top) * proportion), mask.width)
    return (left, top, right, bottom)


def _widen(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """The range of the given length about the middle of start ... stop, moved into 0 ... limit."""
    start = start - (length - (stop - start)) // 2
    start = max(min(start, limit - length), 0)
    return start, min(start + length, limit)


def paste(original: Image.Image, generated: Image.Image, mask: Image.Image, region: Box | None = None) -> Image.Image:
    """The generated picture where the mask is white, the original's own pixels, to the bit, where it is black.

    Args:
        original: RGB.
        generated: RGB, of the original's size; with a region any size, it is resized to the region.
        mask: "L", of the original's size; values between are blends.
        region: where in the original the generated picture lies; outside of it everything is the original's.
    """
    if region is not None:
        left, top, right, bottom = region
        part = resize(generated, right - left, bottom - top)
        generated = original.copy()
        generated.paste(part, (left, top))
    for name, image, mode in (("original", original, "RGB"), ("generated", generated, "RGB"), ("mask", mask, "L")):
        if image.mode != mode or image.size != original.size:
            raise ValueError(
                f"{name}: expected mode {mode} and {original.width} x {original.height} pixels, "
                f"got {image.mode} and {image.width} x {image.height}; resize it first"
            )
    return Image.composite(generated, original, mask)


def save_png(path: str | os.PathLike[str], image: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Writes a PNG, whole or not at all, with named texts in it (Latin-1 as tEXt, all else as iTXt).

    Raises:
        ValueError: a text's name is not 1 to 79 printable ASCII characters, or a text is not valid Unicode.
        OSError: the file cannot be written; nothing is left of it, and an older one of that name stays.
    """
    info = PngInfo()
    for key, value in (text or {}).items():
        if not re.fullmatch("[ -~]{1,79}", key):
            raise ValueError(f"text: a PNG's texts are named by 1 to 79 printable ASCII characters, not {key!r}")
        info.add_text(key, value)
    _write(path, image, format="PNG", pnginfo=info)


def save_image(path: str | os.PathLike[str], image: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Writes what the path's ending says: .png as `save_png` does; .jpg, .jpeg and .webp, which hold no texts.

    Raises:
        ValueError: another ending.
        OSError: as `save_png`.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        save_png(path, image, text)
    elif suffix in _SAVED_AS:
        _write(path, image, **_SAVED_AS[suffix])
    else:
        raise ValueError(f"path {os.fspath(path)!r}: expected an ending of .png, {', '.join(_SAVED_AS)}")


def _write(path: str | os.PathLike[str], image: Image.Image, **options: Any) -> None:
    with files.whole(path) as file:
        image.save(file, icc_profile=image.info.get("icc_profile"), **options)


def read_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in a PNG, by name. Raises ValueError for what is no PNG, a damaged one, or one of too many pixels."""
    with _reading(path, "path"), _open_file(path, ("PNG",)) as image:
        assert isinstance(image, PngImageFile)
        _decode(image, MAX_PIXELS)
        return {key: str(value) for key, value in image.text.items()}
