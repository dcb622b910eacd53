"""Pictures of every kind and every kind of damage, in and out. Parity with diffusers: tests/parity/test_images.py."""

import os
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from sdjax import images

H, W = 12, 20
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)


def png(width, height, depth, colour_type, data):
    """A PNG as the standard says, of any depth and of any claim about its size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


# --- load_image: kinds of sources


def test_path_pil_and_array_are_one(tmp_path, picture):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    for source in (path, str(path), Image.open(path), Image.fromarray(picture), picture, picture / np.float32(255)):
        np.testing.assert_array_equal(pixels(images.load_image(source)), picture)


def test_arrays_of_every_kind(picture):
    grey = picture[..., 0]
    tripled = np.repeat(grey[..., None], 3, axis=-1)
    wide = grey.astype(np.uint16) * 257
    for source in (grey, grey[..., None], wide, grey / 255.0, (grey / 255).astype(np.float16)):
        np.testing.assert_array_equal(pixels(images.load_image(source)), tripled)
    np.testing.assert_array_equal(pixels(images.load_image(grey > 100)), np.where(tripled > 100, 255, 0))
    clear = np.concatenate([picture, np.zeros((H, W, 1), np.uint8)], -1)
    assert (pixels(images.load_image(clear)) == 255).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 8, 9)), r"expected an array of shape \(H, W\).*got \(3, 8, 9\)"),
        (np.zeros((1, 8, 9, 3)), r"got \(1, 8, 9, 3\)"),
        (np.zeros((0, 8, 3)), r"got \(0, 8, 3\)"),
        (np.zeros((8, 9, 3), np.int64), "expected an array of uint8, uint16, float .*, got int64"),
        (np.full((8, 9, 3), -0.5), "values run from -0.5 to -0.5, expected 0 to 1"),
        (np.full((8, 9, 3), 127.0), "values run from 127 to 127, expected 0 to 1"),
        (np.full((8, 9, 3), np.nan), "values run from nan to nan"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels, expected 1 to"),
        (None, "expected a path, a PIL image or an array, got NoneType"),
        (3, "got int"),
        ([[0, 1]], "got list"),
    ],
)
def test_what_is_no_picture_is_named(source, message):
    with pytest.raises(ValueError, match=r"^image\[2\]: .*" + message):
        images.load_image(source, name="image[2]")
    with pytest.raises(ValueError, match="^mask_image: .*" + message):
        images.load_mask(source)


# --- load_image: modes and files


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (0, 255, 255), RED),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),  # a fifth of red, four fifths of white
        ("RGBa", (0, 0, 0, 0), WHITE),
        ("PA", (0, 0), WHITE),
        ("I;16", 257 * 77, (77, 77, 77)),
        ("I;16B", 257 * 77, (77, 77, 77)),
        ("I", 77, (77, 77, 77)),
        ("I", 257 * 77, (77, 77, 77)),
        ("I", 2**31 - 1, WHITE),
        ("F", 0.5, (128, 128, 128)),
        ("F", 77.0, (77, 77, 77)),
    ],
)
def test_modes(mode, colour, expected):
    image = Image.new(mode, (W, H), colour)
    np.testing.assert_array_equal(pixels(images.load_image(image)), np.full((H, W, 3), expected))
    assert image.mode == mode  # the caller's is left alone


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)
    expected = np.rint(values / 257)[..., None].repeat(3, -1)
    Image.fromarray(values).save(tmp_path / "16.png")
    Image.fromarray(values).save(tmp_path / "16.tiff")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "i.tiff")
    Image.fromarray(values / np.float32(65535)).save(tmp_path / "f.tiff")
    (tmp_path / "16.pgm").write_bytes(b"P5 %d %d 65535\n" % (W, H) + values.astype(">u2").tobytes())
    for name in ("16.png", "16.tiff", "i.tiff", "f.tiff", "16.pgm"):
        np.testing.assert_array_equal(pixels(images.load_image(tmp_path / name)), expected, err_msg=name)


def test_sixteen_bit_colour(tmp_path):
    values = np.random.default_rng(1).integers(0, 65536, (H, W, 4)).astype(">u2")
    values[..., 3] = 65535
    for colour_type, channels in ((2, 3), (6, 4)):
        rows = b"".join(b"\0" + row[:, :channels].tobytes() for row in values)
        (tmp_path / "rgb.png").write_bytes(png(W, H, 16, colour_type, rows))
        loaded = pixels(images.load_image(tmp_path / "rgb.png")).astype(float)
        assert abs(loaded - values[..., :3] / 257).max() < 1  # Pillow keeps the upper byte


def test_negative_integers_are_refused():
    with pytest.raises(ValueError, match="values run from -5 to -5, expected 0 to 2147483647"):
        images.load_image(Image.new("I", (W, H), -5))


def test_palette_with_and_without_transparency(tmp_path, picture):
    palette = Image.fromarray(picture).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    indices = np.asarray(palette)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(pixels(images.load_image(tmp_path / "p.png")), expected)
    palette.save(tmp_path / "t.png", transparency=3)
    palette.save(tmp_path / "t.gif", transparency=3)
    palette.save(tmp_path / "tt.png", transparency=bytes([255, 255, 255, 0]))
    white = np.where((indices == 3)[..., None], 255, expected)
    assert (white != expected).any()
    for name in ("t.png", "t.gif", "tt.png"):
        np.testing.assert_array_equal(pixels(images.load_image(tmp_path / name)), white, err_msg=name)


def test_a_transparent_colour_of_an_rgb_png(tmp_path, picture):
    picture[3, 4] = (9, 8, 7)
    Image.fromarray(picture).save(tmp_path / "rgb.png", transparency=(9, 8, 7))
    picture[3, 4] = WHITE
    np.testing.assert_array_equal(pixels(images.load_image(tmp_path / "rgb.png")), picture)


def test_alpha_is_composited_over_white(picture):
    alpha = np.random.default_rng(1).integers(0, 256, (H, W, 1), np.uint8)
    expected = 255 + (picture.astype(float) - 255) * (alpha / 255)
    loaded = pixels(images.load_image(np.concatenate([picture, alpha], -1)))
    assert abs(loaded - expected).max() <= 1


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (W, H), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", icc_profile=b"not for RGB")
    loaded = images.load_image(tmp_path / "cmyk.jpg")
    assert abs(pixels(loaded).astype(int) - RED).max() <= 3
    assert loaded.info == {}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path, suffix):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = (250, 20, 20)  # distinct quarters, larger than JPEG's blocks
    upright[16:, :24] = (20, 250, 20)
    upright[:16, 24:] = (20, 20, 250)
    # How each orientation stores an upright picture (TIFF 6.0, section 8): which edges the first row and column show.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[274] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(np.ascontiguousarray(array)).save(path, exif=exif)
        loaded = images.load_image(path)
        centres = (slice(8, None, 16), slice(12, None, 24))  # of the quarters, far from where JPEG smears
        assert abs(pixels(loaded).astype(int) - upright)[centres].max() < 8, orientation
        assert loaded.size == (48, 32)
        np.testing.assert_array_equal(np.asarray(images.load_mask(path)), np.asarray(loaded.convert("L")))


def test_sixteen_bits_and_exif_together(tmp_path):
    values = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(values).save(tmp_path / "16.png", exif=exif)
    loaded = pixels(images.load_image(tmp_path / "16.png"))
    np.testing.assert_array_equal(loaded[..., 0], np.rint(values[::-1, ::-1] / 257))


def test_exif_that_cannot_be_parsed_turns_nothing(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "broken.png", exif=b"Exif\0\0this is not a TIFF header")
    np.testing.assert_array_equal(pixels(images.load_image(tmp_path / "broken.png")), picture)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    first, second = Image.new("RGB", (W, H), RED), Image.new("RGB", (W, H), (0, 0, 255))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **options)
    assert getattr(Image.open(tmp_path / f"a.{suffix}"), "n_frames", 1) == 2
    np.testing.assert_array_equal(pixels(images.load_image(tmp_path / f"a.{suffix}")), np.full((H, W, 3), RED))


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1)])
def test_extreme_shapes(tmp_path, size):
    Image.new("RGB", size, RED).save(tmp_path / "thin.png")
    loaded = images.load_image(tmp_path / "thin.png")
    assert loaded.size == size
    np.testing.assert_array_equal(pixels(images.resize(loaded, 16, 8)), np.full((8, 16, 3), RED))


def test_the_file_ending_does_not_matter(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.jpg")
    np.testing.assert_array_equal(pixels(images.load_image(tmp_path / "named.jpg")), picture)


def test_a_colour_profile_is_kept_and_nothing_else(tmp_path, picture):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[271] = "a maker"
    Image.fromarray(picture).save(tmp_path / "a.png", icc_profile=profile, exif=exif, dpi=(72, 72))
    assert images.load_image(tmp_path / "a.png").info == {"icc_profile": profile}


# --- damage


def refused(path, *, name="image"):
    with pytest.raises(ValueError, match=name) as error:
        images.load_image(path)
    assert repr(str(path)) in str(error.value)
    return str(error.value)


def test_files_that_are_not_there(tmp_path):
    assert "no such file" in refused(tmp_path / "none.png")
    assert "is not a file" in refused(tmp_path)
    assert "no such file" in refused("https://example.com/a.png")
    assert "no such file" in refused("x" * 10_000)
    (tmp_path / "empty.png").touch()
    assert "empty (0 bytes)" in refused(tmp_path / "empty.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "is not a file" in refused(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    "content",
    [b"hello, I am a text", b"<html>please log in</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(1000)],
)
def test_files_that_are_no_pictures(tmp_path, content):
    (tmp_path / "picture.png").write_bytes(content)
    refused(tmp_path / "picture.png")


def test_other_programs_are_not_started_for_a_file(tmp_path):
    Image.new("RGB", (W, H)).save(tmp_path / "picture.eps")
    assert "not a readable PNG, JPEG" in refused(tmp_path / "picture.eps")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "avif"])
def test_truncated_files(tmp_path, suffix):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    data = whole.read_bytes()
    images.load_image(whole)
    for part in (0.1, 0.5, 0.9):
        cut.write_bytes(data[: int(len(data) * part)])
        refused(cut)
        with pytest.raises(ValueError, match="mask_image"):
            images.load_mask(cut)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
def test_damaged_files_load_or_are_refused_by_name(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / "damaged"
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(path, kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert images.load_image(path).mode == "RGB"
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right


def test_declared_sizes_are_refused_before_pixels_are_decoded(tmp_path, monkeypatch):
    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    path = tmp_path / "bomb.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, which only warns up to twice its limit
        for width, height in ((20_000, 20_000), (10_000, 9_000), (2**26 + 1, 1), (2**31 - 1, 2**31 - 1)):
            path.write_bytes(png(width, height, 8, 2, b""))
            assert "pixels" in refused(path)
            with pytest.raises(ValueError, match=r"path .*bomb.png.*pixels"):
                images.read_text(path)
    path.write_bytes(png(100, 101, 8, 2, b""))
    with pytest.raises(ValueError, match="100 x 101 pixels, expected 1 to 10000 in all"):
        images.load_image(path, max_pixels=10_000)
    with pytest.raises(ValueError, match="100 x 101 pixels"):
        images.load_image(Image.open(path), max_pixels=10_000)
    with pytest.raises(ValueError, match=r"mask_image .*100 x 101 pixels"):
        images.load_mask(path, max_pixels=10_000)


def test_the_size_limit_is_ours_not_pillows_global_one(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(20_000, 20_000, 8, 2, b""))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as many programs set it
    assert "20000 x 20000 pixels" in refused(path)
    assert Image.MAX_IMAGE_PIXELS is None


def test_pillows_globals_stay(tmp_path, picture):
    def settings_of_pillow():
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK

    before = settings_of_pillow()
    images.save_png(tmp_path / "a.png", images.load_image(picture), {"a": "b"})
    images.read_text(tmp_path / "a.png")
    images.load_mask(tmp_path / "a.png")
    assert settings_of_pillow() == before


# --- masks


def test_masks_are_luminance_and_unpainted_is_kept(tmp_path):
    strokes = np.zeros((H, W, 4), np.uint8)
    strokes[2:5, 3:9] = 255
    strokes[..., 0] = 255  # a colour hidden under alpha 0
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    expected = np.zeros((H, W), np.uint8)
    expected[2:5, 3:9] = 255
    for source in (tmp_path / "strokes.png", expected, expected > 0, expected / 255.0, Image.fromarray(expected)):
        mask = images.load_mask(source)
        assert mask.mode == "L"
        np.testing.assert_array_equal(np.asarray(mask), expected)
    grey = images.load_mask(Image.new("RGB", (W, H), (255, 0, 0)))
    assert np.asarray(grey)[0, 0] == 76  # ITU-R 601: 0.299 of red


@pytest.mark.parametrize("value", [0, 255])
def test_uniform_masks_are_legal(value):
    mask = images.load_mask(np.full((H, W), value, np.uint8))
    np.testing.assert_array_equal(np.asarray(images.resize_mask(mask, 7, 9)), np.full((9, 7), value))


def test_a_mask_of_zeros_and_ones_is_refused():
    with pytest.raises(ValueError, match=r"mask_image: .* 0 and 1 of 255, which repaints nothing; make it bool"):
        images.load_mask(np.eye(8, dtype=np.uint8))


def test_masks_are_binarised_at_a_half():
    values = np.array([[0.0, 0.25, 0.4999, 0.5, 0.5001, 1.0]])
    mask = images.binarize(images.load_mask(values))
    np.testing.assert_array_equal(np.asarray(mask), [[0, 0, 0, 255, 255, 255]])
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    np.testing.assert_array_equal(np.asarray(images.binarize(levels))[0], np.where(np.arange(256) >= 128, 255, 0))


def test_blur_keeps_far_pixels_exact():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    sharp = Image.fromarray(mask)
    soft = np.asarray(images.blur_mask(sharp, 3)).astype(int)
    assert (soft[:, :16] == 0).all()
    assert (soft[:, 48:] == 255).all()
    assert (np.diff(soft, axis=1) >= 0).all()
    assert 0 < soft[0, 30] < soft[0, 33] < 255
    np.testing.assert_array_equal(np.asarray(images.blur_mask(sharp, 0)), mask)
    for radius in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="radius: expected 0 or more"):
            images.blur_mask(sharp, radius)


# --- crop and paste


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_crop_region_holds_the_mask_and_lies_inside(data):
    width, height = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    mask = Image.new("L", (width, height))
    mask.paste(255, (left, top, right, bottom))
    x0, y0, x1, y1 = images.crop_region(mask, data.draw(st.integers(0, 40)), 48, 32)
    assert 0 <= x0 <= left < right <= x1 <= width
    assert 0 <= y0 <= top < bottom <= y1 <= height
    if x1 - x0 < width and y1 - y0 < height:  # unless the picture's edge cuts it, the proportions are kept
        assert abs((x1 - x0) * 32 - (y1 - y0) * 48) <= 48


def test_crop_region_of_an_empty_mask_is_the_picture():
    assert images.crop_region(Image.new("L", (30, 20)), 5, 64, 64) == (0, 0, 30, 20)
    with pytest.raises(ValueError, match="padding: expected 0 or more pixels, got -1"):
        images.crop_region(Image.new("L", (30, 20)), -1, 64, 64)


def test_paste_leaves_the_original_to_the_bit(picture):
    rng = np.random.default_rng(2)
    generated = rng.integers(0, 256, (H, W, 3), np.uint8)
    soft = rng.integers(0, 256, (H, W), np.uint8)
    soft[:4], soft[4:6] = 0, 255
    result = pixels(images.paste(*map(Image.fromarray, (picture, generated, soft))))
    np.testing.assert_array_equal(result[soft == 0], picture[soft == 0])
    np.testing.assert_array_equal(result[soft == 255], generated[soft == 255])
    weight = soft[..., None] / 255
    assert abs(result - (weight * generated + (1 - weight) * picture)).max() <= 1


def test_paste_of_a_region(picture):
    mask = np.zeros((H, W), np.uint8)
    mask[3:7, 5:9] = 255
    mask[0, 0] = 255  # outside of the region
    original, mask_image = Image.fromarray(picture), Image.fromarray(mask)
    result = pixels(images.paste(original, Image.new("RGB", (64, 64), RED), mask_image, (4, 2, 10, 8)))
    expected = picture.copy()
    expected[3:7, 5:9] = RED
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(np.asarray(original), picture)


def test_paste_refuses_what_does_not_fit():
    rgb, mask = Image.new("RGB", (8, 6)), Image.new("L", (8, 6))
    with pytest.raises(ValueError, match="generated: expected mode RGB and 8 x 6 pixels, got RGB and 6 x 8"):
        images.paste(rgb, Image.new("RGB", (6, 8)), mask)
    with pytest.raises(ValueError, match="mask: expected mode L and 8 x 6 pixels, got RGB"):
        images.paste(rgb, rgb, rgb)


# --- writing

TEXTS = {
    "parameters": "a fox\nNegative prompt: blurry\nSteps: 20, Size: 64x64",
    "sdjax": '{"prompt": "日本語 🦊 é", "seed": 18446744073709551615}',
    "Latin": "café ÿ \x80\x9f",
    "empty": "",
}


def test_png_texts_survive(tmp_path, picture):
    path = tmp_path / "a.png"
    images.save_png(path, Image.fromarray(picture), TEXTS)
    assert images.read_text(path) == TEXTS
    assert {type(value) for value in images.read_text(str(path)).values()} == {str}
    np.testing.assert_array_equal(pixels(images.load_image(path)), picture)
    # The chunks as PNG's standard has them: tEXt is Latin-1, iTXt is UTF-8.
    data = path.read_bytes()
    assert b"tEXtparameters\0a fox\n" in data
    assert b"iTXtsdjax\0\0\0\0\0" + TEXTS["sdjax"].encode() in data
    images.save_png(path, Image.fromarray(picture))
    assert images.read_text(path) == {}


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.from_regex(r"\A[A-Za-z0-9][ -~]{0,20}\Z"), st.text(max_size=100), max_size=3))
def test_png_texts_of_any_content(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.png"
    images.save_png(path, Image.new("RGB", (1, 1)), text)
    assert images.read_text(path) == text


@pytest.mark.parametrize("key", ["", "x" * 80, "näme", "a\0b", "a\nb", "a\n"])
def test_names_of_texts_are_checked(tmp_path, key):
    with pytest.raises(ValueError, match="1 to 79 printable ASCII"):
        images.save_png(tmp_path / "a.png", Image.new("RGB", (1, 1)), {key: "x"})
    assert not list(tmp_path.iterdir())


def test_read_text_refuses_other_files(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"path '.*a.jpg': not a readable PNG file"):
        images.read_text(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"path '.*b.png': no such file"):
        images.read_text(tmp_path / "b.png")


def test_a_text_bomb_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a" * 50_000_000, zip=True)
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"a.png.*too large"):
        images.read_text(tmp_path / "a.png")


@pytest.mark.parametrize("failing", ["save", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, failing, error):
    def fail(*args, **_):
        if failing == "save":
            args[1].write(b"half a picture")
        raise error

    path = tmp_path / "a.png"
    path.write_bytes(b"the older one")
    image = Image.new("RGB", (4, 4))
    monkeypatch.setattr(
        *{"save": (Image.Image, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[failing], fail
    )
    with pytest.raises(type(error)):
        images.save_png(path, image, TEXTS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"the older one"


def test_an_unwritable_place(tmp_path):
    with pytest.raises(FileNotFoundError):
        images.save_png(tmp_path / "none" / "a.png", Image.new("RGB", (4, 4)))
    with pytest.raises(OSError, match="directory"):
        images.save_png(tmp_path, Image.new("RGB", (4, 4)))
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.parent.glob(".*.tmp"))


def test_written_files_have_ordinary_permissions(tmp_path):
    images.save_png(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.png", "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".JPEG", ".webp"])
def test_save_by_ending(tmp_path, suffix):
    smooth = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    path = Path(tmp_path / f"a{suffix}")
    images.save_image(path, smooth, {"parameters": "a fox"})
    assert abs(pixels(images.load_image(path)).astype(int) - np.asarray(smooth)).max() <= 6
    if suffix.lower() == ".png":
        assert images.read_text(path) == {"parameters": "a fox"}
    with pytest.raises(ValueError, match=r"expected an ending of .png, .jpg, .jpeg, .webp"):
        images.save_image(tmp_path / "a.exe", smooth)
