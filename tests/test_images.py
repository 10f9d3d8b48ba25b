from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional as F

from ssl_seg import images
from ssl_seg.config import UserError
from ssl_seg.images import (
    read_header,
    read_image,
    read_mask,
    read_palette,
    resize_image,
    resize_mask,
    write_image,
    write_mask,
)

GENERATOR = np.random.default_rng(0)
PICTURE = GENERATOR.integers(0, 256, (12, 16, 3), dtype=np.uint8)
IDS = GENERATOR.integers(0, 12, (12, 16), dtype=np.uint8)
WIDE = np.arange(0, 65536, 341, dtype=np.uint16)[:192].reshape(12, 16)  # 0 to 65131
ALPHA = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (12, 1))


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by the specification's section 11, for layouts that Pillow does not write; every row begins with a 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def refusal(function, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        function(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def attempt(function, path: Path) -> tuple[np.ndarray | None, str]:
    """The array and '', or None and the message of a UserError; any other error goes through."""
    try:
        return function(path), ""
    except UserError as error:
        return None, str(error)


# ---- images: modes


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_an_image_survives_writing_and_reading(tmp_path_factory, array):
    path = tmp_path_factory.getbasetemp() / "round trip é.png"
    write_image(path, array)
    read = read_image(path)
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.uint8
    assert read.flags.writeable


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_and_not_saturated(tmp_path, suffix):
    read = read_image(saved(tmp_path / f"wide.{suffix}", Image.fromarray(WIDE)))
    expected = np.round(WIDE / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(read, np.stack([expected] * 3, axis=-1))


def test_big_endian_and_32_bit_grey_are_scaled(tmp_path):
    expected = np.round(WIDE / 65535 * 255).astype(np.uint8)
    big = tmp_path / "big.tif"
    Image.frombytes("I;16B", (16, 12), WIDE.astype(">u2").tobytes()).save(big)
    plain = tmp_path / "plain.pgm"
    plain.write_bytes(b"P5 16 12 65535\n" + WIDE.astype(">u2").tobytes())
    long = saved(tmp_path / "long.tif", Image.fromarray(WIDE.astype(np.int32)))
    for path in (big, plain, long):
        np.testing.assert_array_equal(read_image(path)[..., 0], expected)


def test_grey_of_more_than_16_bits_and_float_pixels_are_refused(tmp_path):
    long = saved(tmp_path / "long.tif", Image.fromarray(WIDE.astype(np.int32) * 1000))
    assert "do not fit 16 bits" in refusal(read_image, long)
    real = saved(tmp_path / "real.tif", Image.fromarray(WIDE.astype(np.float32)))
    assert "mode F" in refusal(read_image, real)
    assert "mode F" in refusal(read_mask, real)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def test_transparent_pixels_show_white(tmp_path):
    rgba = Image.fromarray(np.dstack([PICTURE, ALPHA]))
    grey_alpha = Image.fromarray(np.dstack([PICTURE[..., 0], ALPHA]))
    grey = np.repeat(PICTURE[..., :1], 3, axis=-1)
    np.testing.assert_allclose(read_image(saved(tmp_path / "a.png", rgba)), on_white(PICTURE, ALPHA), atol=1)
    np.testing.assert_allclose(read_image(saved(tmp_path / "b.png", grey_alpha)), on_white(grey, ALPHA), atol=1)


def test_transparent_palette_entries_show_white(tmp_path):
    colours = GENERATOR.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(IDS)
    image.putpalette(colours.tobytes())
    alphas = bytes(range(0, 240, 20))
    expected = on_white(colours[IDS], np.frombuffer(alphas, dtype=np.uint8)[IDS])
    np.testing.assert_allclose(read_image(saved(tmp_path / "many.png", image, transparency=alphas)), expected, atol=1)
    one = np.where((IDS == 3)[..., None], 255, colours[IDS])
    np.testing.assert_array_equal(read_image(saved(tmp_path / "one.png", image, transparency=3)), one)


def test_the_transparent_colour_of_grey_and_rgb_shows_white(tmp_path):
    colour = tuple(int(value) for value in PICTURE[4, 5])
    rgb = saved(tmp_path / "rgb.png", Image.fromarray(PICTURE), transparency=colour)
    expected = np.where((colour == PICTURE).all(-1, keepdims=True), 255, PICTURE)
    np.testing.assert_array_equal(read_image(rgb), expected)
    grey = saved(tmp_path / "grey.png", Image.fromarray(IDS), transparency=7)
    np.testing.assert_array_equal(read_image(grey)[..., 0], np.where(IDS == 7, 255, IDS))


def test_bilevel_grey_and_palette_pictures_become_rgb(tmp_path):
    bits = IDS > 5
    read = read_image(saved(tmp_path / "bits.png", Image.fromarray(bits)))
    np.testing.assert_array_equal(read, np.repeat(bits[..., None] * np.uint8(255), 3, axis=-1))
    read = read_image(saved(tmp_path / "grey.png", Image.fromarray(IDS)))
    np.testing.assert_array_equal(read, np.repeat(IDS[..., None], 3, axis=-1))
    colours = GENERATOR.integers(0, 256, (256, 3), dtype=np.uint8)
    write_mask(tmp_path / "palette.png", IDS, colours)
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), colours[IDS])


def test_cmyk_becomes_the_colours_that_its_inks_leave(tmp_path):
    inks = GENERATOR.integers(0, 256, (12, 16, 4), dtype=np.uint8)
    path = saved(tmp_path / "print.tif", Image.frombytes("CMYK", (16, 12), inks.tobytes()))
    light = 255.0 - inks
    np.testing.assert_allclose(read_image(path), light[..., :3] * light[..., 3:] / 255, atol=1.5)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"moving.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_image(path), np.array(frames[0]))


# ---- orientation


def oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("number", range(1, 9))
def test_exif_orientation_is_applied_to_images_and_masks(tmp_path, number, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"turned.{suffix}", Image.fromarray(PICTURE), exif=oriented(number), **options)
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(path), expected)
    assert np.array_equal(expected, PICTURE) == (number == 1)
    if suffix != "webp":
        np.testing.assert_array_equal(read_mask(path), expected)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_photograph_is_turned_as_opencv_turns_it(tmp_path, number):
    smooth = cv2.resize(PICTURE[:2, :3], (48, 32))
    path = saved(tmp_path / "photo.jpg", Image.fromarray(smooth), exif=oriented(number), quality=95)
    expected = cv2.imread(str(path))[..., ::-1]
    np.testing.assert_allclose(read_image(path), expected, atol=8)


@pytest.mark.parametrize("number", [3, 6])
def test_a_wide_mask_is_turned_too(tmp_path, number):
    path = saved(tmp_path / "wide.png", Image.fromarray(WIDE), exif=oriented(number))
    np.testing.assert_array_equal(read_mask(path), np.rot90(WIDE, {3: 2, 6: -1}[number]))


def test_malformed_metadata_does_not_cost_the_picture(tmp_path):
    exif = oriented(6)
    exif[0x011A] = 72.0  # x resolution
    raw = bytearray(exif.tobytes())
    entry = raw.index(struct.pack(">H", 0x011A))
    raw[entry + 3] = 7  # its type becomes "undefined", on which Pillow's exif_transpose raises TypeError
    path = saved(tmp_path / "odd.png", Image.fromarray(PICTURE), exif=bytes(raw))
    np.testing.assert_array_equal(read_image(path), np.rot90(PICTURE, -1))
    path = saved(tmp_path / "garbage.png", Image.fromarray(PICTURE), exif=b"Exif\0\0garbage")
    np.testing.assert_array_equal(read_image(path), PICTURE)


# ---- damage


DAMAGED = {
    "png": encode(Image.fromarray(PICTURE), "PNG"),
    "ids": encode(Image.fromarray(IDS), "PNG"),
    "jpeg": encode(Image.fromarray(PICTURE), "JPEG"),
    "progressive": encode(Image.fromarray(PICTURE), "JPEG", progressive=True),
    "gif": encode(Image.fromarray(PICTURE), "GIF"),
    "bmp": encode(Image.fromarray(PICTURE), "BMP"),
    "webp": encode(Image.fromarray(PICTURE), "WEBP"),
    "tiff": encode(Image.fromarray(PICTURE), "TIFF"),
    "lzw": encode(Image.fromarray(PICTURE), "TIFF", compression="tiff_lzw"),
    "ppm": encode(Image.fromarray(PICTURE), "PPM"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, name):
    path = tmp_path / "cut.bin"
    path.write_bytes(DAMAGED[name])
    whole = read_image(path)
    refusals = []
    for length in range(1, len(DAMAGED[name])):
        path.write_bytes(DAMAGED[name][:length])
        read, message = attempt(read_image, path)
        if message:
            refusals.append(message)
        else:
            np.testing.assert_array_equal(read, whole)
    assert len(refusals) > 0.9 * len(DAMAGED[name])
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in refusals)


def test_flipped_bits_never_change_the_ids_of_a_png(tmp_path):
    path = tmp_path / "ids.png"
    data = DAMAGED["ids"]
    for position in range(8 * 8, 8 * len(data)):  # the first eight bytes are the signature
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        read, message = attempt(read_mask, path)
        if not message:
            np.testing.assert_array_equal(read, IDS)


def test_no_mutation_of_a_file_escapes_as_another_error(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "fuzzed.bin"
    slowest = 0.0
    messages = []
    for _ in range(600):
        data = bytearray(draw.choice(list(DAMAGED.values())))
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.choice([0, 1, 127, 255, draw.randrange(256)])
        path.write_bytes(data)
        begin = time.perf_counter()
        messages += [attempt(function, path)[1] for function in (read_image, read_mask)]
        slowest = max(slowest, time.perf_counter() - begin)
    assert not any("\n" in message for message in messages)
    assert 50 < messages.count("") < len(messages) - 50
    assert slowest < 2.0


def test_what_is_no_image_is_refused_by_name(tmp_path):
    empty = tmp_path / "empty.png"
    empty.touch()
    text = tmp_path / "text.png"
    text.write_text("hello")
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    expected = {
        empty: "0 bytes",
        text: "no image of a known format",
        pipe: "not a file",
        tmp_path: "not a file",
        tmp_path / "absent.png": "No such file",
    }
    for path, words in expected.items():
        for function in (read_image, read_mask):
            message = refusal(function, path)
            assert message.startswith(f"{path}: ")
            assert words in message


def test_a_format_outside_the_list_is_refused_whatever_its_name(tmp_path):
    path = tmp_path / "script.png"
    Image.fromarray(PICTURE).save(path, format="EPS")
    assert "no image of a known format" in refusal(read_image, path)


def test_a_name_with_a_line_break_is_shown_on_one_line(tmp_path):
    path = tmp_path / "two\nlines.png"
    path.touch()
    assert "two\\nlines.png" in refusal(read_image, path)


def bombs() -> dict[str, bytes]:
    side = 60000
    tiff = bytearray(encode(Image.new("1", (300, 300)), "TIFF"))
    for tag in (256, 257):  # width and height; one entry is tag, type (4: 32 bits), count and value
        entry = tiff.index(struct.pack("<HHI", tag, 4, 1))
        tiff[entry + 8 : entry + 12] = struct.pack("<I", side)
    bmp = bytearray(encode(Image.new("L", (4, 4)), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    gif = bytearray(encode(Image.new("L", (4, 4)), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    return {
        "png": png(side, side, 8, 0, bytes(100)),
        "just above": png(2**14, 2**13 + 1, 8, 0, bytes(100)),
        "tiff": bytes(tiff),
        "bmp": bytes(bmp),
        "gif": bytes(gif),
        "ppm": f"P6 {side} {side} 255\n".encode() + bytes(100),
    }


@pytest.mark.parametrize("name", bombs())
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch, name):
    path = tmp_path / "bomb"
    path.write_bytes(bombs()[name])
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    begin = time.perf_counter()
    for function in (read_image, read_mask):
        assert f"more than {images.MAX_PIXELS} pixels" in refusal(function, path)
    assert time.perf_counter() - begin < 0.5


def test_the_pixel_limit_is_exact(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.fromarray(PICTURE))
    monkeypatch.setattr(images, "MAX_PIXELS", 12 * 16)
    assert read_image(path).shape == (12, 16, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 12 * 16 - 1)
    assert "more than 191 pixels" in refusal(read_image, path)


# ---- masks


@given(arrays.arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_a_mask_survives_writing_and_reading(tmp_path_factory, array):
    path = tmp_path_factory.getbasetemp() / "ids.png"
    write_mask(path, array)
    read = read_mask(path)
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


def test_a_short_palette_keeps_every_id_and_shows_its_colours(tmp_path):
    ids = IDS.copy()
    ids[0] = 255
    write_mask(tmp_path / "ids.png", ids, palette=[(0, 0, 0), (255, 0, 0)])
    np.testing.assert_array_equal(read_mask(tmp_path / "ids.png"), ids)
    assert (read_image(tmp_path / "ids.png")[ids == 1] == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_a_palette_mask_gives_indices(tmp_path, suffix):
    image = Image.fromarray(IDS)
    image.putpalette(bytes(GENERATOR.integers(0, 256, 768, dtype=np.uint8)))
    options = {"optimize": False} if suffix == "gif" else {}
    np.testing.assert_array_equal(read_mask(saved(tmp_path / f"ids.{suffix}", image, **options)), IDS)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_the_palette_of_a_mask_is_what_a_viewer_shows(tmp_path, suffix):
    image = Image.fromarray(IDS)
    image.putpalette(bytes(GENERATOR.integers(0, 256, 768, dtype=np.uint8)))
    path = saved(tmp_path / f"ids.{suffix}", image, **({"optimize": False} if suffix == "gif" else {}))
    np.testing.assert_array_equal(read_palette(path)[read_mask(path)], np.array(image.convert("RGB")))


def test_few_bits_have_a_palette_of_greys_and_whole_bytes_have_none(tmp_path):
    for depth in (1, 2, 4):
        path = tmp_path / f"{depth}.png"
        path.write_bytes(png(8, 1, depth, 0, b"\0" + bytes(depth)))
        assert read_palette(path)[:, 0].tolist() == list(range(0, 256, 255 // (2**depth - 1)))
    for name, array in (("grey", IDS), ("wide", WIDE), ("colours", PICTURE)):
        assert read_palette(saved(tmp_path / f"{name}.png", Image.fromarray(array))) is None


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_a_header_tells_the_turn_without_the_pixels(tmp_path, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(PICTURE), exif=exif)
    turned = read_header(path)
    assert turned.orientation == 6
    assert set(turned.size) == set(PICTURE.shape[:2])
    upright = saved(tmp_path / f"b.{suffix}", Image.fromarray(PICTURE))
    assert read_header(upright) == (1, PICTURE.shape[:2])


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_a_bilevel_mask_gives_0_and_1(tmp_path, suffix):
    read = read_mask(saved(tmp_path / f"bits.{suffix}", Image.fromarray(IDS > 5)))
    np.testing.assert_array_equal(read, IDS > 5)
    assert read.dtype == np.uint8


@pytest.mark.parametrize("depth", [2, 4])
def test_greys_of_2_and_4_bits_are_not_spread(tmp_path, depth):
    ids = IDS % 2**depth
    bits = np.unpackbits(ids[..., None], axis=-1)[..., -depth:].reshape(12, -1)
    rows = np.packbits(bits, axis=-1)
    path = tmp_path / "small.png"
    path.write_bytes(png(16, 12, depth, 0, b"".join(b"\0" + row.tobytes() for row in rows)))
    np.testing.assert_array_equal(read_mask(path), ids)
    np.testing.assert_array_equal(read_image(path)[..., 0], ids * (255 // (2**depth - 1)))


def test_colours_are_kept_and_alpha_is_dropped(tmp_path):
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "a.png", Image.fromarray(PICTURE))), PICTURE)
    rgba = Image.fromarray(np.dstack([PICTURE, ALPHA]))
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "b.png", rgba)), PICTURE)
    grey_alpha = Image.fromarray(np.dstack([IDS, ALPHA]))
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "c.png", grey_alpha)), IDS)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_wide_ids_are_kept(tmp_path, suffix):
    np.testing.assert_array_equal(read_mask(saved(tmp_path / f"a.{suffix}", Image.fromarray(WIDE))), WIDE)
    big = Image.frombytes("I;16B", (16, 12), WIDE.astype(">u2").tobytes())
    read = read_mask(saved(tmp_path / "big.tif", big))
    np.testing.assert_array_equal(read, WIDE)
    assert read.dtype == np.uint16


@pytest.mark.parametrize(("suffix", "format"), [("jpg", "JPEG"), ("webp", "WEBP"), ("ppm", "PPM")])
def test_a_format_that_changes_ids_is_refused(tmp_path, suffix, format):
    path = saved(tmp_path / f"ids.{suffix}", Image.fromarray(PICTURE))
    assert f"{format} does not keep class ids" in refusal(read_mask, path)
    hidden = path.rename(tmp_path / "ids.png")
    assert f"{format} does not keep class ids" in refusal(read_mask, hidden)


def test_masks_whose_values_pillow_would_change_are_refused(tmp_path):
    deep = tmp_path / "deep.png"
    cv2.imwrite(str(deep), np.stack([WIDE] * 3, axis=-1))
    assert "16 bits a channel" in refusal(read_mask, deep)
    upside_down = saved(tmp_path / "down.tif", Image.fromarray(IDS), tiffinfo={262: 0})
    assert "white is 0" in refusal(read_mask, upside_down)
    inks = saved(tmp_path / "inks.tif", Image.new("CMYK", (4, 4)))
    assert "mode CMYK" in refusal(read_mask, inks)


# ---- writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"
    write_mask(path, IDS)

    def fill_the_disk(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(UserError, match=r"mask\.png: cannot be written \(No space left on device; \d+ bytes needed"):
        write_mask(path, IDS + 1)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]
    np.testing.assert_array_equal(read_mask(path), IDS)


def test_writing_makes_folders_and_takes_long_names(tmp_path):
    path = tmp_path / "new folder" / ("é" * 125 + "x.png")  # 255 bytes
    write_image(path, PICTURE)
    np.testing.assert_array_equal(read_image(path), PICTURE)


def test_only_png_is_written_and_a_file_is_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"a\.jpg: pictures are written as PNG"):
        write_image(tmp_path / "a.jpg", PICTURE)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_image(tmp_path / "file" / "a.png", PICTURE)


# ---- resizing


def test_shrinking_by_a_whole_number_is_the_mean():
    means = F.avg_pool2d(torch.from_numpy(PICTURE).permute(2, 0, 1).float(), kernel_size=(3, 4))
    np.testing.assert_allclose(resize_image(PICTURE, (4, 4)), means.permute(1, 2, 0), atol=0.51)


def test_growing_is_bilinear_between_pixel_centres():
    image = torch.from_numpy(PICTURE).permute(2, 0, 1)[None].float()
    expected = F.interpolate(image, size=(31, 40), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    np.testing.assert_allclose(resize_image(PICTURE, (31, 40)), expected, atol=1)


def test_a_side_that_shrinks_is_averaged_even_if_the_other_grows():
    means = F.avg_pool2d(torch.from_numpy(PICTURE).permute(2, 0, 1).float(), kernel_size=(4, 1))[None]
    expected = F.interpolate(means, size=(3, 32), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    np.testing.assert_allclose(resize_image(PICTURE, (3, 32)), expected, atol=1.5)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 255))
def test_a_flat_image_stays_flat_at_any_size(height, width, level):
    flat = np.full((12, 16, 3), level, dtype=np.uint8)
    np.testing.assert_array_equal(resize_image(flat, (height, width)), np.full((height, width, 3), level))


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_mask_is_resized_to_the_nearest_centre(height, width):
    places = np.arange(12, dtype=np.uint16)[:, None] * 100 + np.arange(16, dtype=np.uint16)
    resized = resize_mask(places, (height, width))
    assert resized.shape == (height, width)
    assert resized.dtype == np.uint16
    rows, columns = resized // 100 + 0.5, resized % 100 + 0.5
    wanted_rows = (np.arange(height)[:, None] + 0.5) * 12 / height
    wanted_columns = (np.arange(width) + 0.5) * 16 / width
    assert np.abs(rows - wanted_rows).max() <= 0.501  # halfway between two centres either will do
    assert np.abs(columns - wanted_columns).max() <= 0.501


def test_mask_and_image_stay_in_place_when_resized_together():
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:25, 5:30] = 1
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)
    for size in ((15, 15), (17, 23), (100, 90)):
        small = resize_mask(mask, size)
        seen = resize_image(image, size)[..., 0] / 255
        assert np.abs(seen - small)[np.abs(seen - 0.5) > 0.45].max() < 0.5


def test_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize_image(PICTURE, (12, 16)), PICTURE)
    np.testing.assert_array_equal(resize_mask(IDS, (12, 16)), IDS)
