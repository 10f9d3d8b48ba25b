from __future__ import annotations

import io
import os
import random
import socket
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
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch.nn import functional as F

from ssl_seg import images
from ssl_seg.config import UserError
from ssl_seg.images import (
    doubt,
    largest_value,
    limits,
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


def tiff(tags: dict[int, int | tuple[int, ...] | bytes], data: bytes, pages: int = 1) -> bytes:
    """A TIFF by the specification's section 2, for what Pillow does not write: pages that share one strip of data.

    `tags` are added to those of 8-bit grey of 12 x 16; values of several are of 16 bits.
    """
    whole = {256: 16, 257: 12, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 12, 279: len(data), **tags}
    file = bytearray(b"II*\0" + struct.pack("<I", 0) + data)
    link = 4  # where the place of the next directory is to be written
    for _ in range(pages):
        entries = []
        for tag, value in sorted(whole.items()):
            if isinstance(value, int):
                entries.append(struct.pack("<HHII", tag, 4, 1, value))
                continue
            kind, count = (2, len(value)) if isinstance(value, bytes) else (3, len(value))
            packed = value if isinstance(value, bytes) else struct.pack(f"<{count}H", *value)
            inside = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", len(file))
            file += packed if len(packed) > 4 else b""
            entries.append(struct.pack("<HHI", tag, kind, count) + inside)
        file[link : link + 4] = struct.pack("<I", len(file))
        file += struct.pack("<H", len(entries)) + b"".join(entries)
        link = len(file)
        file += bytes(4)
    return bytes(file)


def behind(first: bytes, second: bytes) -> bytes:
    """The pages of two such TIFFs in one. Of the second the places of directories are moved, not those of data."""
    joined = bytearray(first + second)
    (start,) = struct.unpack_from("<I", second, 4)
    link = len(first) - 4
    while start:
        place = len(first) + start
        joined[link : link + 4] = struct.pack("<I", place)
        link = place + 2 + 12 * struct.unpack_from("<H", joined, place)[0]
        (start,) = struct.unpack_from("<I", joined, link)
    return bytes(joined)


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(function, path: Path, *options) -> str:
    with pytest.raises(UserError) as caught:
        function(path, *options)
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
    for path in (big, plain):
        np.testing.assert_array_equal(read_image(path)[..., 0], expected)


def test_12_bits_of_their_own_are_scaled_by_12_bits(tmp_path):
    values = WIDE >> 4
    bits = np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 4:]
    path = put(tmp_path / "twelve.tif", tiff({258: 12}, np.packbits(bits.reshape(12, -1), axis=-1).tobytes()))
    np.testing.assert_array_equal(read_image(path)[..., 0], np.rint(values / 4095 * 255))


def test_16_bits_whose_0_is_white_are_turned_round_as_8_bits_are(tmp_path):
    deep = put(tmp_path / "deep.tif", tiff({258: 16, 262: 0}, WIDE.tobytes()))
    flat = put(tmp_path / "flat.tif", tiff({262: 0}, IDS.tobytes()))
    np.testing.assert_array_equal(read_image(deep)[..., 0], 255 - np.rint(WIDE / 257))
    np.testing.assert_array_equal(read_image(flat)[..., 0], 255 - IDS)
    np.testing.assert_array_equal(read_mask(deep), WIDE)


# ---- images: values that need a range


OF_NO_WHITE = {
    "8 in 32 bits": tiff({258: 32}, IDS.astype(np.uint32).tobytes()),
    "all of 32 bits": tiff({258: 32}, (WIDE * np.uint32(65521)).astype(np.uint32).tobytes()),
    "signed 16 bits": tiff({258: 16, 339: 2}, (WIDE.astype(np.int32) // 8 - 1000).astype(np.int16).tobytes()),
    "float": tiff({258: 32, 339: 3}, (WIDE / 65535).astype(np.float32).tobytes()),
}
VALUES = {
    "8 in 32 bits": IDS,
    "all of 32 bits": WIDE * np.int64(65521),
    "signed 16 bits": WIDE.astype(np.int32) // 8 - 1000,
    "float": WIDE / 65535,
}


def by_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255)


@pytest.mark.parametrize("name", OF_NO_WHITE)
def test_values_without_a_white_of_their_own_are_refused_without_a_range_and_scaled_with_one(tmp_path, name):
    path = put(tmp_path / "values.tif", OF_NO_WHITE[name])
    message = refusal(read_image, path)
    assert "range: [black, white]" in message
    assert f"({VALUES[name].min():.7g} to " in message
    low, high = float(VALUES[name].min()), float(np.quantile(VALUES[name], 0.9))
    read = read_image(path, (low, high))
    np.testing.assert_allclose(read[..., 0], by_range(VALUES[name], low, high), atol=1e-6)
    assert read.shape == (12, 16, 3)
    assert read.dtype == np.uint8


def test_what_is_no_number_is_black(tmp_path):
    values = (WIDE / 65535).astype(np.float32)
    values[0, :3] = (np.nan, np.inf, -np.inf)
    read = read_image(put(tmp_path / "a.tif", tiff({258: 32, 339: 3}, values.tobytes())), (0.0, 1.0))
    assert read[0, :3, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("number", [1, 3, 6])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_12_bits_in_16_are_scaled_by_a_range(tmp_path, suffix, number):
    values = WIDE >> 4
    path = saved(tmp_path / f"grey.{suffix}", Image.fromarray(values), exif=oriented(number))
    assert read_image(path).max() < 26  # nearly black
    expected = np.rot90(by_range(values, 0, 4095), {1: 0, 3: 2, 6: -1}[number])
    np.testing.assert_array_equal(read_image(path, (0, 4095))[..., 0], expected)
    assert largest_value(path) == values.max()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_colours_keep_their_lower_bytes_where_a_range_asks(tmp_path, suffix):
    values = GENERATOR.integers(0, 4096, (12, 16, 3), dtype=np.uint16)
    path = tmp_path / f"colours.{suffix}"
    cv2.imwrite(str(path), values[..., ::-1])
    np.testing.assert_array_equal(read_image(path, (0, 4095)), by_range(values, 0, 4095))
    assert values.max() <= largest_value(path) <= values.max() + 255


def test_deep_colours_are_not_read_turned(tmp_path):
    values = GENERATOR.integers(0, 4096, (12, 16, 3), dtype=np.uint16)
    path = put(tmp_path / "a.tif", tiff({258: (16,) * 3, 262: 2, 274: 3, 277: 3}, values.tobytes()))
    assert "turned by EXIF" in refusal(read_image, path, (0, 4095))
    np.testing.assert_array_equal(read_image(path), np.rot90(values >> 8, 2))


def test_a_range_is_for_more_than_8_bits_of_grey_or_colours(tmp_path):
    assert "8 bits a channel" in refusal(read_image, saved(tmp_path / "a.png", Image.fromarray(PICTURE)), (0, 100))
    plain = put(tmp_path / "plain.pgm", b"P5 16 12 4095\n" + (WIDE >> 4).astype(">u2").tobytes())
    np.testing.assert_array_equal(read_image(plain)[..., 0], np.rint((WIDE >> 4) / 4095 * 255))
    assert "says itself" in refusal(read_image, plain, (0, 4095))
    alpha = tmp_path / "alpha.png"
    cv2.imwrite(str(alpha), np.stack([WIDE] * 4, axis=-1))
    assert "mode RGBA" in refusal(read_image, alpha, (0, 4095))


def test_signed_bytes_are_no_picture_and_no_negative_ids(tmp_path):
    low = put(tmp_path / "low.tif", tiff({339: 2}, (IDS.astype(np.int8) - 1).tobytes()))
    assert "signed 8-bit" in refusal(read_image, low)
    assert "negative ids" in refusal(read_mask, low)
    np.testing.assert_array_equal(read_mask(put(tmp_path / "ids.tif", tiff({339: 2}, IDS.tobytes()))), IDS)


# ---- images: bands and pages


def planes(values: np.ndarray, bits: int, **tags) -> bytes:
    """Bands `(C, H, W)` as a TIFF that stores one after another."""
    count = len(values)
    size = values[0].nbytes
    data = values.tobytes()
    offsets = tuple(8 + size * band for band in range(count))
    layout = {258: (bits,) * count, 262: 2, 277: count, 284: 2, 273: offsets, 279: (size,) * count}
    return tiff({**layout, **{int(tag[1:]): value for tag, value in tags.items()}}, data)


def test_colours_plane_by_plane_are_right_or_refused(tmp_path):
    flat = put(tmp_path / "flat.tif", planes(np.moveaxis(PICTURE, -1, 0), 8))
    np.testing.assert_array_equal(read_image(flat), PICTURE)
    deep = put(tmp_path / "deep.tif", planes(np.stack([WIDE, WIDE[::-1], WIDE[:, ::-1]]), 16))
    for function in (read_image, read_mask):
        assert "plane by plane" in refusal(function, deep)


def test_bands_that_are_neither_grey_nor_colours_are_counted(tmp_path):
    five = put(tmp_path / "five.tif", planes(np.stack([IDS] * 5), 8, t262=1))
    two = put(tmp_path / "two.tif", tiff({258: (8, 8), 277: 2, 338: (0,)}, np.stack([IDS] * 2, -1).tobytes()))
    double = put(tmp_path / "double.tif", tiff({258: 64, 339: 3}, bytes(12 * 16 * 8)))
    for function in (read_image, read_mask):
        assert "a TIFF of 5 bands of 8-bit values" in refusal(function, five)
        assert "a TIFF of 2 bands of 8-bit values" in refusal(function, two)
        assert "a TIFF of 1 band of 64-bit float values" in refusal(function, double)
        assert "compression 34712" in refusal(function, put(tmp_path / "jp2.tif", tiff({259: 34712}, bytes(9))))


@pytest.mark.parametrize("function", [read_image, read_mask])
def test_pages_are_counted_and_refused(tmp_path, function):
    grey = [Image.fromarray(IDS)] * 20
    stack = saved(tmp_path / "stack.tif", grey[0], save_all=True, append_images=grey[1:])
    assert "a TIFF of 20 pages" in refusal(function, stack)
    words = b"ImageJ=1.53t\nimages=7\nslices=7\n\0"
    assert "a TIFF of 7 pages" in refusal(function, put(tmp_path / "a.tif", tiff({270: words}, IDS.tobytes() * 7)))
    words = b'{"shape": [3, 12, 16], "axes": "ZYX", "truncated": true}\0'
    assert "a TIFF of 3 pages" in refusal(function, put(tmp_path / "b.tif", tiff({270: words}, IDS.tobytes() * 3)))
    assert "a TIFF of 4 pages" in refusal(function, put(tmp_path / "c.tif", tiff({32997: 4}, IDS.tobytes() * 4)))
    words = b'{"shape": [12, 16, 3], "truncated": true}\0'
    one = tiff({258: (8,) * 3, 262: 2, 277: 3, 270: words}, PICTURE.tobytes())
    np.testing.assert_array_equal(function(put(tmp_path / "d.tif", one)), PICTURE)


@pytest.mark.parametrize("kind", [{254: 1}, {254: 4}, {255: 2}, {254: 5}])
def test_smaller_copies_and_transparency_masks_are_no_pages(tmp_path, kind):
    path = put(tmp_path / "pyramid.tif", behind(tiff({}, IDS.tobytes()), tiff(kind, IDS.tobytes(), pages=2)))
    with Image.open(path) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(read_mask(path), IDS)
    np.testing.assert_array_equal(read_image(path)[..., 0], IDS)
    alone = put(tmp_path / "alone.tif", tiff(kind, IDS.tobytes()))
    assert "a smaller copy" in refusal(read_image, alone)


@pytest.mark.parametrize(
    "tags",
    [{278: 4}, {273: 0}, {278: 6, 273: (8, 0), 279: (96, 96)}, {322: 16, 323: 8, 324: 8, 325: 128}],
    ids=["two strips missing", "no place", "a strip without a place", "a tile missing"],
)
def test_a_tiff_with_holes_is_refused(tmp_path, tags):
    assert "never written" in refusal(read_image, put(tmp_path / "holes.tif", tiff(tags, IDS.tobytes())))
    rows = put(tmp_path / "rows.tif", tiff({278: 6, 273: (8, 104), 279: (96, 96)}, IDS.tobytes()))
    np.testing.assert_array_equal(read_mask(rows), IDS)


def test_the_first_page_is_judged_whatever_follows(tmp_path):
    deep = planes(np.stack([WIDE, WIDE[::-1], WIDE[:, ::-1]]), 16)
    small = tiff({254: 1}, IDS.tobytes())
    assert "plane by plane" in refusal(read_image, put(tmp_path / "pyramid.tif", behind(deep, small)))


def test_a_ring_of_pages_ends(tmp_path):
    ring = bytearray(tiff({}, IDS.tobytes()))
    ring[-4:] = ring[4:8]
    np.testing.assert_array_equal(read_mask(put(tmp_path / "ring.tif", bytes(ring))), IDS)


def test_a_phone_s_second_picture_is_left_out(tmp_path):
    path = tmp_path / "phone.jpg"
    Image.fromarray(PICTURE).save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (5, 5))])
    assert read_image(path).shape == (12, 16, 3)
    assert doubt(path) == ""


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


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"moving.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_image(path), np.array(frames[0]))
    assert "the first frame" in doubt(path)
    if suffix != "webp":
        assert "an animation" in refusal(read_mask, path)


def test_a_real_picture_leaves_no_doubt(tmp_path):
    for suffix in ("gif", "png", "webp", "tif", "bmp", "ppm"):
        assert doubt(saved(tmp_path / f"still.{suffix}", Image.fromarray(PICTURE))) == ""


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


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("number", [1, 3, 8])
def test_the_orientation_is_told_without_the_pixels(tmp_path, number, suffix):
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(PICTURE), exif=oriented(number))
    header = read_header(path)
    assert header.orientation == number
    assert sorted(header.size) == [12, 16]


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
    zero = tmp_path / "zero.png"
    zero.symlink_to("/dev/zero")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    linked = tmp_path / "linked.png"
    linked.symlink_to(folder)
    piped = tmp_path / "piped.png"
    piped.symlink_to(pipe)
    plugged = tmp_path / "plugged.png"
    plug = socket.socket(socket.AF_UNIX)
    plug.bind(str(plugged))
    plug.close()
    expected = {
        zero: "not a file",
        folder: "not a file",
        linked: "not a file",
        piped: "not a file",
        plugged: "not a file",
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


# ---- damage that decoders pass over


CUTS = [{}, {"optimize": True}, {"restart_marker_rows": 1}, {"subsampling": 0}]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", CUTS)
def test_a_jpeg_that_was_cut_and_closed_again_has_lost_pixels(tmp_path, mode, options):
    noise = Image.fromarray(GENERATOR.integers(0, 256, (64, 80, 3), dtype=np.uint8)).convert(mode)
    whole = encode(noise, "JPEG", **options)
    path = tmp_path / "cut.jpg"
    for tail in (b"", b"\0" * 50, b"\xff\xd9", b"more"):  # what cameras and editors leave behind a picture
        assert doubt(put(path, whole + tail)) == ""
    for share in (0.6, 0.8, 0.95):
        put(path, whole[: int(len(whole) * share)] + b"\xff\xd9")
        assert read_image(path).shape == (64, 80, 3)  # Pillow fills it with grey
        assert "premature end of data segment" in refusal(doubt, path)


def test_a_progressive_jpeg_that_was_cut_has_lost_pixels_or_only_detail(tmp_path):
    whole = encode(Image.fromarray(cv2.resize(PICTURE, (80, 64))), "JPEG", progressive=True)
    verdicts = []
    for length in range(len(whole) // 2, len(whole) - 2, 7):
        path = put(tmp_path / "cut.jpg", whole[:length] + b"\xff\xd9")
        verdicts += [attempt(doubt, path)[1] or attempt(read_image, path)[1] or "read"]
    assert verdicts.count("read") <= 0.05 * len(verdicts)  # cut between two passes over the whole picture


def test_bytes_too_many_in_a_jpeg_are_a_doubt(tmp_path):
    whole = DAMAGED["jpeg"]
    path = put(tmp_path / "more.jpg", whole[:-2] + bytes(9) + whole[-2:])
    assert doubt(path) == "a JPEG that may be damaged (Corrupt JPEG data: extraneous bytes before marker 0xd9)"


# ---- headers without an end


def segments(marker: bytes, data: bytes, count: int) -> bytes:
    jpeg = DAMAGED["jpeg"]
    return jpeg[:2] + (marker + struct.pack(">H", len(data) + 2) + data) * count + jpeg[2:]


def chunks(kind: bytes, data: bytes, count: int, at: int) -> bytes:
    whole = DAMAGED["png"]
    return whole[:at] + png_chunk(kind, data) * count + whole[at:]


GIF_HEAD = 13 + 3 * (2 << (DAMAGED["gif"][10] & 7))
ENDLESS = {
    "a comment in a PPM": b"P6\n#" + b"a" * 3000 + b"\n16 12 255\n" + PICTURE.tobytes(),
    "spaces in a PPM": b"P6" + b" " * 3000 + b"16 12 255\n" + PICTURE.tobytes(),
    "chunks before a PNG's data": chunks(b"abCd", b"", 1500, 33),
    "chunks behind a PNG's data": chunks(b"abCd", b"", 1500, -12),
    "a JPEG's segments": segments(b"\xff\xee", b"", 1500),
    "a JPEG's EXIF": segments(b"\xff\xe1", b"Exif\0\0ab", 1500),
    "bytes between a JPEG's segments": DAMAGED["jpeg"][:2] + b"\xff" * 3000 + DAMAGED["jpeg"][2:],
    "a GIF's comment": DAMAGED["gif"][:GIF_HEAD] + b"\x21\xfe" + b"\1a" * 1500 + b"\0" + DAMAGED["gif"][GIF_HEAD:],
    "a TIFF's tags": tiff(dict.fromkeys(range(1000, 2500), 1), IDS.tobytes()),
    "a TIFF's pages": tiff({}, IDS.tobytes(), pages=1500),
    "a TIFF's strips": tiff({257: 3000, 273: (8,) * 3000, 278: 1, 279: (16,) * 3000}, IDS.tobytes()),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_header_that_never_ends_is_refused(tmp_path, monkeypatch, name):
    path = put(tmp_path / "endless", ENDLESS[name])
    monkeypatch.setattr(limits, "MAX_PIECES", 1000)
    assert "in more pieces than a picture can have" in refusal(read_image, path)


def test_no_real_picture_is_in_too_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_PIECES", 300)  # of a hundred thousand
    large = Image.fromarray(GENERATOR.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "tif", "gif", "bmp", "ppm"):
        assert read_image(saved(tmp_path / f"a.{suffix}", large)).shape == (300, 400, 3)
    parts = cv2.imencode(".png", np.array(large))[1].tobytes()
    assert parts.count(b"IDAT") > 40  # libpng's have 8 kB
    assert read_image(put(tmp_path / "parts.png", parts)).shape == (300, 400, 3)


def test_comments_among_the_numbers_of_a_text_are_few(tmp_path):
    few = put(tmp_path / "few.ppm", b"P2 2 1 255\n# a comment\n7 # another\n9\n")
    np.testing.assert_array_equal(read_image(few)[..., 0], [[7, 9]])
    many = put(tmp_path / "many.ppm", b"P2 2 1 255\n" + b"#\n" * 2000 + b"7 9\n")
    assert "2000 comments" in refusal(read_image, many)


def test_long_texts_and_profiles_cost_no_png(tmp_path, monkeypatch):
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    text = saved(tmp_path / "text.png", Image.fromarray(PICTURE), pnginfo=info)
    profile = saved(tmp_path / "profile.png", Image.fromarray(PICTURE), icc_profile=bytes(3_000_000))
    for path in (text, profile):
        np.testing.assert_array_equal(read_image(path), PICTURE)
        np.testing.assert_array_equal(read_mask(path), PICTURE)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2_000_000)
    for path in (text, profile):
        assert "of text beside the picture" in refusal(read_image, path)


def test_a_png_has_one_colour_profile(tmp_path):
    profile = b"a\0\0" + zlib.compress(bytes(1000))
    np.testing.assert_array_equal(read_image(put(tmp_path / "a.png", chunks(b"iCCP", profile, 1, 33))), PICTURE)
    assert "two colour profiles" in refusal(read_image, put(tmp_path / "b.png", chunks(b"iCCP", profile, 2, 33)))


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
    monkeypatch.setattr(limits, "MAX_PIXELS", 12 * 16)
    assert read_image(path).shape == (12, 16, 3)
    monkeypatch.setattr(limits, "MAX_PIXELS", 12 * 16 - 1)
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


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_mask_that_differs_in_transparency_alone_is_refused(tmp_path, mode):
    image = Image.new(mode, IDS.shape[::-1])
    image.putalpha(Image.fromarray((IDS > 5).astype(np.uint8) * 255))
    assert "only its transparency differs" in refusal(read_mask, saved(tmp_path / "cut_out.png", image))
    image.putalpha(0)
    assert not read_mask(saved(tmp_path / "empty.png", image)).any()


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
