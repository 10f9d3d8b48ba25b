"""Images of any number of channels: what is stored is what is read, or a line says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_seg import images
from ssl_seg.config import load
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.stack import Stack
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.images.values import in_bytes
from ssl_seg.testing import check_dataset
from tests.faults import message_of

Writer = Callable[[Path, np.ndarray], object]
TWELVE = (0.0, 4095.0)
GREY = {"photometric": "minisblack"}
FORMS: dict[str, tuple[str, Writer]] = {  # how programs store bands, by tifffile and numpy
    "channels last": (".tif", lambda path, a: write(path, a, planarconfig="contig", **GREY)),
    "planes": (".tif", lambda path, a: write(path, first(a), planarconfig="separate", **GREY)),
    "packed": (
        ".tif",
        lambda path, a: write(path, a, planarconfig="contig", compression="zlib", tile=(16, 16), **GREY),
    ),
    "pages": (".tif", lambda path, a: write(path, first(a), **GREY)),
    "pages without a word": (".tiff", lambda path, a: write(path, first(a), metadata=None, **GREY)),
    "ImageJ": (".tif", lambda path, a: write(path, first(a), imagej=True, metadata={"axes": "CYX"})),
    "OME": (".ome.tif", lambda path, a: write(path, first(a), metadata={"axes": "CYX"})),
    "RGB and more": (".tif", lambda path, a: write(path, a, photometric="rgb")),
    "with overviews and masks, as GDAL": (".tif", lambda path, a: write_as_gdal(path, a)),
    "npy": (".npy", np.save),
    "npy, of another machine": (".npy", lambda path, a: np.save(path, a.astype(a.dtype.newbyteorder(">")))),
    "npy, channels first": (".npy", lambda path, a: np.save(path, first(a))),
    "npz": (".npz", lambda path, a: np.savez_compressed(path, a)),
}


def write(path: Path, values: np.ndarray, **how: Any) -> None:
    tifffile.imwrite(path, values, **how)


def write_as_gdal(path: Path, values: np.ndarray) -> None:
    """Cloud-optimized: the picture, its mask of transparency, and both again at half the size."""
    how = {"planarconfig": "contig", "compression": "zlib", "tile": (16, 16), "metadata": None}
    mask = np.ones(values.shape[:2], dtype=bool)
    with tifffile.TiffWriter(path) as file:
        file.write(values, **how, **GREY)
        file.write(mask, subfiletype=4, photometric="mask", metadata=None)
        file.write(values[::2, ::2].copy(), subfiletype=1, **how, **GREY)
        file.write(mask[::2, ::2].copy(), subfiletype=5, photometric="mask", metadata=None)


def first(values: np.ndarray) -> np.ndarray:
    """`(H, W, C)` -> `(C, H, W)`"""
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def bands(channels: int, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 4096, (20, 30, channels)).astype(dtype)


def refused(path: Path, channels: int, value_range: images.Range | None = None) -> str:
    said = message_of(lambda: images.read_image(path, value_range, channels))
    assert path.name in said
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [4, 7])
def test_every_form_of_bands_gives_the_values_that_were_stored(tmp_path: Path, form: str, channels: int) -> None:
    suffix, save = FORMS[form]
    values, path = bands(channels), tmp_path / f"a{suffix}"
    save(path, values)
    wanted = np.rint(values * (255 / 4095)).astype(np.uint8)
    np.testing.assert_array_equal(images.read_image(path, TWELVE, channels), wanted)
    np.testing.assert_array_equal(images.read_image(path, None, channels), np.rint(values / 257).astype(np.uint8))
    assert images.read_header(path, channels).size == (20, 30)
    assert images.largest_value(path, channels) == values.max()
    assert images.default_range(path, channels) == (0, 65535)
    found = images.examine(path, TWELVE, channels)
    assert found.kind == f"16 bits {channels} channels"
    assert found.used == (values.min(), values.max())
    # Never another number of them, and never the first page alone.
    assert f"has {channels} channels" in refused(path, channels + 1)
    if form != "RGB and more":  # of which a picture shows the first three
        assert str(channels) in refused(path, 3)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)), min_size=2, max_size=8), st.integers(0, 99))
def test_a_range_for_each_channel_is_that_of_each_alone(pairs: list[tuple[float, float]], seed: int) -> None:
    ranges = tuple((black, black + width) for black, width in pairs)
    values = np.random.default_rng(seed).uniform(-1500, 2500, (5, 6, len(ranges))).astype(np.float32)
    values[0, 0] = np.nan
    alone = [in_bytes(values[..., channel], own) for channel, own in enumerate(ranges)]
    np.testing.assert_array_equal(in_bytes(values, ranges), np.stack(alone, axis=-1))


def test_float_bands_need_a_range_and_one_or_as_many_as_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, bands(4, "float32"))
    assert "float32 values have no white of their own" in refused(path, 4)
    assert "range has 2 pairs for 4 channels" in refused(path, 4, ((0.0, 1.0), (0.0, 2.0)))
    assert images.read_image(path, (TWELVE,) * 4, 4).shape == (20, 30, 4)
    assert images.takes_range(path, 4)
    np.save(path, np.zeros((20, 30, 4), np.uint8))
    assert "has 8 bits a channel" in refused(path, 4, TWELVE)
    assert not images.takes_range(path, 4)


def test_axes_that_nobody_can_tell_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 50, 4), np.uint8))
    assert "first or last axis may be the 4 channels" in refused(path, 4)
    np.save(path, np.zeros((2, 4, 20, 30), np.uint8))
    assert "save (H, W, C) or (C, H, W)" in refused(path, 4)
    np.save(path, np.zeros((20, 30), np.uint8))
    assert "has 1 channel " in refused(path, 4)
    depths = tmp_path / "depths.tif"
    tifffile.imwrite(depths, np.zeros((4, 20, 30), np.uint8), imagej=True, metadata={"axes": "ZYX"})
    assert "4 pages that are no channels (ZYX); read them by {type: stack}" in refused(depths, 4)


def test_files_of_numpy_hold_numbers_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "no array of numpy" in refused(path, 4)
    np.save(path, np.zeros((20, 30, 4), complex))
    assert "complex128 values are no image" in refused(path, 4)
    np.save(path, bands(4))
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or cut off" in refused(path, 4)
    several = tmp_path / "a.npz"
    np.savez(several, one=bands(4), two=bands(4))
    assert "holds 2 arrays" in refused(several, 4)
    several.write_bytes(several.read_bytes()[:200])
    assert "damaged or cut off" in refused(several, 4)
    with path.open("wb") as file:  # a header that promises a terabyte
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<u2", "fortran_order": False, "shape": (400_000, 400_000, 4)}
        )
    assert "pixels by its header" in refused(path, 4)
    empty = tmp_path / "b.npy"
    empty.touch()
    assert "empty (0 bytes)" in refused(empty, 4)


def test_one_channel_is_grey_and_no_colour_is_lost(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    for name, saved in {"grey.png": grey, "alike.png": np.repeat(grey[..., None], 3, axis=-1)}.items():
        Image.fromarray(saved).save(tmp_path / name)
        np.testing.assert_array_equal(images.read_image(tmp_path / name, channels=1), grey[..., None])
        assert images.read_image(tmp_path / name).shape == (20, 30, 3)
    coloured = np.stack([grey, grey, grey // 2], axis=-1)
    Image.fromarray(coloured).save(tmp_path / "colours.png")
    assert "has colours, and the network takes one channel" in refused(tmp_path / "colours.png", 1)
    assert "has 3 channels" in refused(tmp_path / "colours.png", 4)
    assert images.examine(tmp_path / "colours.png", channels=1).image is None
    np.save(tmp_path / "grey.npy", grey)
    for channels in (1, 3):
        found = images.read_image(tmp_path / "grey.npy", channels=channels)
        np.testing.assert_array_equal(found, np.repeat(grey[..., None], channels, axis=-1))


def test_alpha_is_a_channel_where_four_are_wanted(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    Image.fromarray(values, "RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png", channels=4), values)


def test_a_composite_is_the_first_channels() -> None:
    for channels in range(1, 9):
        image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), dtype=np.uint8)
        shown = images.composite(image)
        assert shown.shape == (4, 5, 3)
        np.testing.assert_array_equal(shown[..., : min(channels, 3)], image[..., :3])
    np.testing.assert_array_equal(images.composite(image[..., :1])[..., 2:], image[..., :1])
    assert not images.composite(image[..., :2])[..., 2].any()


def test_a_folder_and_a_stack_have_as_many_channels_as_the_network(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (suffix, save) in enumerate(FORMS.values()):
        save(folder / f"{number}{suffix}", bands(4))
    plain = load(Folder, {"images": str(folder), "range": [0, 4095]})
    assert "channels" not in plain.dump()
    asked = plain.in_channels(4)
    assert len(asked) == len(FORMS)
    check_dataset(asked)
    assert load(Folder, asked.dump()) == asked
    dark = load(Folder, {"images": str(folder), "channels": 4}).notes()
    assert "write range: [0, 4095]" in dark[0]
    assert "the network takes 5" in message_of(lambda: asked.in_channels(5))
    each = load(Folder, {"images": str(folder), "channels": 4, "range": [[0, 4095]] * 4})
    np.testing.assert_array_equal(each.read(0).image, asked.read(0).image)
    said = message_of(lambda: load(Folder, {"images": str(folder), "range": [[0, 1], [3, 2]]}))
    assert "black (3) has to be less than white (2)" in said

    pages = np.random.default_rng(0).integers(0, 4096, (3, 4, 20, 30), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", pages, imagej=True, metadata={"axes": "ZCYX"})
    stack = load(Stack, {"images": f"{tmp_path}/stack.tif"})
    assert "model.channels=4 for all of them" in message_of(lambda: stack.read(0))
    check_dataset(stack.in_channels(4))
    wanted = np.rint(pages[1].transpose(1, 2, 0) * (255 / 4095)).astype(np.uint8)
    np.testing.assert_array_equal(stack.in_channels(4).read(1).image, wanted)
    one = load(Stack, {"images": f"{tmp_path}/stack.tif", "channel": 2}).in_channels(1)
    np.testing.assert_array_equal(one.read(1).image, wanted[..., 2:3])


def test_drawn_images_have_their_lightness_alone() -> None:
    drawn = load(Synthetic, {"count": 2, "size": [32, 32]})
    assert "channels" not in drawn.dump()
    check_dataset(drawn.in_channels(1))
    assert "the network takes 4" in message_of(lambda: drawn.in_channels(4))
