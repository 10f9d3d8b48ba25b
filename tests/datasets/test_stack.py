"""Stacks: the pages in their order, never black, and what tifffile would pass over is refused. Oracle: its `imread`."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from omegaconf import OmegaConf
from PIL import Image

from ssl_seg import cli
from ssl_seg.config import UserError, load
from ssl_seg.data.loading import Whole, pack
from ssl_seg.data.splits import hold_out, names_of
from ssl_seg.data.workers import Workers, collected
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.stack import Stack, write_stack
from ssl_seg.images import read_mask, scaled, write_mask
from ssl_seg.testing import check_dataset
from tests.faults import message_of
from tests.small import MODEL, TRAIN, UNTRACKED, Textured

SIZE = (8, 9)
RANDOM = np.random.default_rng(0)
DEEP = RANDOM.integers(0, 4096, (5, *SIZE), dtype=np.uint16)
DEEP[0, 0, 0] = 4000  # so that 12 bits are used
IDS = RANDOM.integers(0, 3, (5, *SIZE), dtype=np.uint8)
TWELVE = (0.0, 4095.0)


def put(path: Path, values: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"photometric": "minisblack"} if values.ndim == 3 else {}  # else three pages are written as RGB
    tifffile.imwrite(path, values, **{**plain, **options})
    return path


def of(path: Path, **options: Any) -> Stack:
    return Stack(images=str(path), **options)


def pages(stack: Dataset) -> list[np.ndarray]:
    return [stack.image(index).image for index in range(len(stack))]


def labelled(root: Path, masks: np.ndarray, images: np.ndarray = DEEP, **options: Any) -> Stack:
    put(root / "images.tif", images)
    put(root / "masks.tif", masks)
    return load(Stack, {"images": f"{root}/images.tif", "masks": f"{root}/masks.tif", "classes": 3, **options})


def same(found: list[np.ndarray], values: np.ndarray, value_range: tuple[float, float]) -> None:
    """`values` (N, H, W) or (N, H, W, 3), all pages in their order."""
    assert len(found) == len(values)
    for page, own in zip(found, values, strict=True):
        shown = np.rint(np.interp(own, value_range, (0, 255)))
        np.testing.assert_array_equal(page, np.stack([shown] * 3, axis=-1) if own.ndim == 2 else shown)


# ---- pages and their order


WRITTEN = {
    "plain": {},
    "deflate": {"compression": "zlib"},
    "big endian": {"byteorder": ">"},
    "big": {"bigtiff": True},
    "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
    "ome": {"ome": True, "metadata": {"axes": "TYX"}},
    "tiled": {"tile": (16, 16)},
    "strips": {"rowsperstrip": 3, "metadata": None},
}


@pytest.mark.parametrize("options", WRITTEN.values(), ids=WRITTEN)
def test_every_page_is_an_image_in_the_file_s_order(tmp_path: Path, options: dict[str, Any]) -> None:
    stack = of(put(tmp_path / "a.tif", DEEP, **options))
    same(pages(stack), tifffile.imread(tmp_path / "a.tif"), TWELVE)
    assert names_of(stack) == tuple(f"a/{page:04d}" for page in range(5))
    assert {stack.sequence(page) for page in range(5)} == {"a"}
    check_dataset(stack)


def test_pages_that_were_written_one_by_one_are_one_stack(tmp_path: Path) -> None:
    for name, options in (("series.tif", {}), ("bare.tif", {"metadata": None})):
        with tifffile.TiffWriter(tmp_path / name) as writer:
            for page in DEEP:
                writer.write(page, **options)
        same(pages(of(tmp_path / name)), DEEP, TWELVE)


def test_a_large_imagej_stack_has_no_directories(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tif", DEEP, imagej=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as tiff:
        first = tiff.pages[0]
        end = first.offset + 2 + 12 * len(first.tags)
    with path.open("r+b") as file:  # as ImageJ ends those of more than 4 GB: after the first
        file.seek(end)
        file.write(b"\0\0\0\0")
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == 1
    same(pages(of(path)), DEEP, TWELVE)


@pytest.mark.parametrize("axes", ["TZCYX", "ZTCYX", "TCZYX", "CZTYX", "CTZYX"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_channels_are_colours_and_all_other_axes_count_pages(
    tmp_path: Path, axes: str, compression: str | None
) -> None:
    lengths = {"T": 2, "Z": 4, "C": 3, "Y": 8, "X": 9}
    values = RANDOM.integers(0, 4096, [lengths[axis] for axis in axes], dtype=np.uint16)
    values.ravel()[0] = 4095
    stack = of(put(tmp_path / "a.tif", values, ome=True, metadata={"axes": axes}, compression=compression))
    read = tifffile.imread(tmp_path / "a.tif")
    expected = np.moveaxis(read, axes.index("C"), -1).reshape(8, *SIZE, 3)
    same(pages(stack), expected, TWELVE)
    one = of(tmp_path / "a.tif", channel=1)
    same(pages(one), expected[..., 1], TWELVE)


def test_rgb_pages_are_colours_however_they_lie(tmp_path: Path) -> None:
    colours = RANDOM.integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
    pixel_by_pixel = put(tmp_path / "a.tif", colours, photometric="rgb")
    planes = np.moveaxis(colours, -1, 1)
    by_planes = put(tmp_path / "b.tif", planes, photometric="rgb", planarconfig="separate")
    imagej = put(tmp_path / "c.tif", planes, imagej=True, metadata={"axes": "ZCYX"})
    for path in (pixel_by_pixel, by_planes, imagej):
        np.testing.assert_array_equal(pages(of(path)), colours)
        assert of(path).value_range() is None


def test_other_numbers_of_channels_are_refused_with_what_to_write(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tif", np.zeros((2, 4, *SIZE), np.uint8), imagej=True, metadata={"axes": "ZCYX"})
    assert "pages of 4 channels (ZCYX); write channel: 0 to 3 for one of them" in message_of(lambda: len(of(path)))
    assert len(of(path, channel=3)) == 2
    assert "there is no channel 4; write another" in message_of(lambda: len(of(path, channel=4)))


def test_stacks_of_a_folder_and_what_is_held_out_of_them(tmp_path: Path) -> None:
    put(tmp_path / "b.tif", DEEP)
    put(tmp_path / "deep" / "a.ome.tiff", DEEP, metadata={"axes": "ZYX"})
    stack = of(tmp_path)
    assert names_of(stack)[4:6] == ("b/0004", "deep/a.ome/0000")
    same(pages(stack), np.concatenate([DEEP, DEEP]), TWELVE)
    kept, held = hold_out(stack)
    assert names_of(held) == ("b/0004", "deep/a.ome/0004"), "the end of each"
    assert len(kept) == 8
    for number in range(8):
        put(tmp_path / f"c{number}.tif", DEEP)
    _, held = hold_out(of(tmp_path))
    assert len(held) == 10
    assert len({name.rpartition("/")[0] for name in names_of(held)}) == 2, "whole stacks"
    put(tmp_path / "b.tiff", DEEP)
    assert "differ by their suffix only" in message_of(lambda: len(of(tmp_path)))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_workers_read_the_same_pages(tmp_path: Path, compression: str | None) -> None:
    stack = of(put(tmp_path / "a.tif", DEEP, compression=compression))
    order = [3, 0, 4, 1, 2, 3]
    expected = [stack.image(index).image for index in order]  # opened before the workers are forked
    packs = collected(Whole(stack, with_labels=False), [[index] for index in order], Workers(2, section=""), pack)
    for image, packed in zip(expected, packs, strict=True):
        np.testing.assert_array_equal(packed.image[0].permute(1, 2, 0).numpy(), image)
    assert pickle.loads(pickle.dumps(stack)) == stack


# ---- what is black and white


def test_the_file_says_how_many_bits_are_used(tmp_path: Path) -> None:
    dark = DEEP // 8  # less than 10 bits
    ome = {"ome": True, "metadata": {"axes": "ZYX", "SignificantBits": 12}}
    stack = of(put(tmp_path / "a.tif", dark, **ome))
    assert stack.value_range() == TWELVE
    same(pages(stack), dark, TWELVE)
    assert "0 is black and 4095 white, since the files declare 12 bits; to keep it" in stack.notes()[0]
    wrong = of(put(tmp_path / "b.tif", DEEP * 2, **ome))
    said = message_of(lambda: wrong.image(0))
    assert f"page 0 holds {DEEP[0].max() * 2}, more than the bits that the files declare (4095)" in said
    assert "write range: [0, 8191]" in said


@pytest.mark.parametrize("white", [1023.0, 65535.0])
def test_what_imagej_shows_as_white_counts_where_it_says_anything(tmp_path: Path, white: float) -> None:
    path = put(tmp_path / "a.tif", DEEP // 64, imagej=True, metadata={"axes": "ZYX", "min": 0.0, "max": white})
    assert of(path).value_range() == ((0, 1023) if white == 1023 else (0, 63))
    brighter = put(tmp_path / "b.tif", DEEP, imagej=True, metadata={"axes": "ZYX", "min": 0.0, "max": white})
    assert of(brighter).value_range() == TWELVE


def test_the_largest_value_of_all_pages_tells_the_bits_and_one_range_is_for_all(tmp_path: Path) -> None:
    put(tmp_path / "a.tif", DEEP // 100)
    last = DEEP // 100
    last[-1, -1, -1] = 2048
    put(tmp_path / "b.tif", last)
    stack = of(tmp_path)
    assert stack.value_range() == of(tmp_path, range="bits").value_range() == TWELVE
    same(pages(stack)[:5], DEEP // 100, TWELVE)
    assert "the largest value is 2048" in stack.notes()[0]
    declared = {"ome": True, "metadata": {"axes": "ZYX", "SignificantBits": 10}}
    put(tmp_path / "b.tif", DEEP * 2, **declared)  # a lie, beside a stack that declares nothing
    assert "b.tif: page 0 holds" in message_of(lambda: of(tmp_path).image(5))
    deep = of(put(tmp_path / "c" / "c.tif", DEEP.astype(np.uint32) * 2**10))
    assert "range: [0, 4194303]" in deep.notes()[0]


def test_percentiles_are_those_of_the_values_and_what_is_told_can_be_written_down(tmp_path: Path) -> None:
    values = RANDOM.normal(3.0, 2.0, (7, 40, 50)).astype(np.float32)
    values[2, 3, 4] = 1e6  # a hot pixel
    path = put(tmp_path / "a.tif", values)
    stack = of(path, range="percentile")
    black, white = stack.value_range()
    np.testing.assert_allclose((black, white), np.percentile(values, (0.1, 99.9)), rtol=1e-5)
    same(pages(stack), values, (black, white))
    assert f"range: [{black:g}, {white:g}]" in stack.notes()[0]
    assert of(path, range=(float(f"{black:g}"), float(f"{white:g}"))).value_range() == (black, white)
    values[:] = np.nan
    empty = of(put(tmp_path / "b.tif", values), range="percentile")
    assert "write range: [black, white]" in message_of(lambda: empty.image(0))


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_values_without_a_white_of_their_own_want_a_range(tmp_path: Path, dtype: str) -> None:
    path = put(tmp_path / "a.tif", (DEEP - 100.0).astype(dtype))
    said = f"{dtype} values have no white of their own"
    assert said in message_of(lambda: of(path).notes())
    assert said in message_of(lambda: of(path, range="bits").image(0))
    same(pages(of(path, range=(0, 4000))), DEEP - 100.0, (0, 4000))
    same(pages(of(path).in_range((0, 4000))), DEEP - 100.0, (0, 4000))
    assert of(path).value_range() is None


def test_8_bits_are_as_they_are_and_white_may_be_0(tmp_path: Path) -> None:
    grey = (DEEP // 16).astype(np.uint8)
    np.testing.assert_array_equal(np.array(pages(of(put(tmp_path / "a.tif", grey))))[..., 1], grey)
    assert "leave range out" in message_of(lambda: of(tmp_path / "a.tif", range=(0, 9)).image(0))
    inverted = put(tmp_path / "b.tif", grey, photometric="miniswhite")
    np.testing.assert_array_equal(np.array(pages(of(inverted)))[..., 0], 255 - grey)


def test_a_model_s_range_is_taken_where_none_is_given(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tif", DEEP)
    assert of(path).in_range((0, 1000)).value_range() == (0, 1000)
    assert of(path, range="percentile").in_range((0, 1000)).range == "percentile"
    grey = of(put(tmp_path / "b.tif", IDS))
    assert grey.in_range((0, 1000)) is grey


# ---- masks


def test_masks_mean_what_they_mean_in_a_folder(tmp_path: Path) -> None:
    stack = labelled(tmp_path, IDS, classes=["a", "b"], mapping={2: "ignore"})
    for page in range(5):
        np.testing.assert_array_equal(stack.label(page), np.where(IDS[page] == 2, 255, IDS[page]))
    check_dataset(stack)
    assert stack.files(3) == (tmp_path / "images.tif", tmp_path / "masks.tif")
    two = labelled(tmp_path / "two", IDS // 2 * 255, classes=2)
    assert "masks.tif (mask of" in message_of(lambda: two.read(1))
    assert "page 1: holds only 0 and 255" in message_of(lambda: two.read(1))
    three = labelled(tmp_path / "three", IDS // 2 * 255)
    assert "all masks hold only 0 and 255 for 3 classes" in message_of(lambda: three.notes())
    deep = labelled(tmp_path / "deep", IDS.astype(np.uint16) + 300, mapping={300: 0, 301: 1, 302: 2})
    np.testing.assert_array_equal(deep.label(4), IDS[4])


def test_masks_of_a_folder_are_found_by_their_path(tmp_path: Path) -> None:
    for number, name in enumerate(("x/b.tif", "a.tif")):
        put(tmp_path / "images" / name, DEEP[: 3 + number])
        put(tmp_path / "masks" / name, IDS[: 3 + number])
    both = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks"), "classes": 3}
    stack = load(Stack, both)
    assert names_of(stack) == tuple(f"a/{page:04d}" for page in range(4)) + tuple(
        f"x/b/{page:04d}" for page in range(3)
    )
    for index in range(7):
        np.testing.assert_array_equal(stack.read(index).label, IDS[index % 4])
    (tmp_path / "masks" / "a.tif").unlink()
    assert "no mask for 1 of the 2 images" in message_of(lambda: len(load(Stack, both)))


MASK_FAULTS = {
    "number": (IDS[:4], "4 pages, and its images"),
    "size": (IDS[:, :7], "pages of 7 x 9 pixels (H x W)"),
    "float": (IDS.astype(np.float32), "1 channels of float32 values are no class ids"),
    "negative": (IDS.astype(np.int16) - 1, "ids -1 to 1 do not fit 16 bits"),
}


@pytest.mark.parametrize(("masks", "said"), MASK_FAULTS.values(), ids=MASK_FAULTS)
def test_masks_that_do_not_fit_are_refused(tmp_path: Path, masks: np.ndarray, said: str) -> None:
    assert said in message_of(lambda: labelled(tmp_path, masks).read(0))


def test_masks_in_another_order_are_refused(tmp_path: Path) -> None:
    for name, axes in (("images", "TZYX"), ("masks", "ZTYX")):
        values = np.zeros((2, 3, *SIZE) if axes[0] == "T" else (3, 2, *SIZE), np.uint8)
        put(tmp_path / f"{name}.tif", values, ome=True, metadata={"axes": axes})
    stack = Stack(images=f"{tmp_path}/images.tif", masks=f"{tmp_path}/masks.tif", classes=2)
    assert "its pages are in the order ZT, and those of" in message_of(lambda: len(stack))


def test_palettes_are_indices_of_masks_and_no_images(tmp_path: Path) -> None:
    colours = RANDOM.integers(0, 65536, (3, 256), dtype=np.uint16)
    path = put(tmp_path / "masks.tif", IDS, photometric="palette", colormap=colours)
    put(tmp_path / "images.tif", DEEP)
    stack = Stack(images=f"{tmp_path}/images.tif", masks=str(path), classes=3)
    np.testing.assert_array_equal(stack.label(2), IDS[2])
    assert "has a palette (ImageJ: a lookup table)" in message_of(lambda: len(of(path)))
    coloured = load(Stack, {**stack.dump(), "mapping": {"#000000": 0}})
    assert "mapping names colours" in message_of(lambda: len(coloured))
    greys = np.tile(np.arange(256, dtype=np.uint16)[::-1] * 257, (3, 1))
    put(path, IDS, photometric="palette", colormap=greys)
    assert "greys that are not the ids" in message_of(lambda: len(load(Stack, stack.dump())))


# ---- faults


def test_a_cut_is_never_read_as_a_shorter_stack(tmp_path: Path) -> None:
    """At each of many lengths: refused, or the very pages."""
    for name, options in WRITTEN.items():
        whole = put(tmp_path / "whole.tif", DEEP, **options).read_bytes()
        refused = 0
        for end in range(0, len(whole), 41):
            path = tmp_path / f"{name}-{end}.tif"
            path.write_bytes(whole[:end])
            stack = of(path, range=TWELVE)
            try:
                found = pages(stack)
            except UserError:
                assert message_of(lambda stack=stack: pages(stack)).startswith(str(path))
                refused += 1
            else:
                same(found, DEEP, TWELVE)
        assert refused > len(whole) // 41 // 2


def test_one_damaged_page_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tif", DEEP, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[3].dataoffsets[0]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 20)
    stack = of(path)
    assert stack.value_range() == TWELVE
    assert f"{path}, page 3: no TIFF, damaged or cut off" in message_of(lambda: stack.image(3))
    np.testing.assert_array_equal(stack.image(4).image, scaled(DEEP[4], TWELVE))


def test_what_tifffile_would_fill_up_or_sort_is_refused(tmp_path: Path) -> None:
    ome = put(tmp_path / "a.ome.tif", DEEP, ome=True, metadata={"axes": "ZYX"})
    ome.write_bytes(ome.read_bytes().replace(b'SizeZ="5"', b'SizeZ="7"'))
    assert str(ome) in message_of(lambda: len(of(ome)))
    ome.write_bytes(ome.read_bytes().replace(b"<Pixels ", b"<Pixels<"))
    assert str(ome) in message_of(lambda: len(of(ome)))
    imagej = put(tmp_path / "b.tif", DEEP, imagej=True, metadata={"axes": "ZYX"})
    imagej.write_bytes(imagej.read_bytes().replace(b"slices=5", b"slices=9"))
    assert str(imagej) in message_of(lambda: len(of(imagej)))
    with tifffile.TiffWriter(tmp_path / "c.tif") as writer:
        for number, page in enumerate(DEEP):
            writer.write(page, metadata=None, compression="zlib" if number % 2 else None)
    assert "several kinds" in message_of(lambda: len(of(tmp_path / "c.tif")))
    with tifffile.TiffWriter(tmp_path / "d.tif") as writer:
        for number in range(3):
            writer.write(np.zeros((8, 9 + number), np.uint8), metadata=None)
    assert "several kinds" in message_of(lambda: len(of(tmp_path / "d.tif")))
    turned = put(tmp_path / "e.tif", DEEP, extratags=[(274, "H", 1, 6, True)])
    assert "orientation tag; save them upright" in message_of(lambda: len(of(turned)))


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="it is installed")
def test_a_compression_that_wants_another_package_is_named_at_the_start(tmp_path: Path) -> None:
    frames = [Image.fromarray(page) for page in IDS]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:], compression="tiff_lzw")
    said = message_of(lambda: len(of(tmp_path / "a.tif")))
    assert "compressed by LZW, for which another package is needed; pip install imagecodecs" in said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": "a.tif", "masks": "a.tif", "classes": 2}, "images and masks are one path"),
        ({"images": "a.tif", "masks": "b.tif"}, "classes is missing"),
        ({"images": "a.tif", "range": [3, 2]}, "black (3) has to be less than white (2)"),
        ({"images": "a.tif", "range": "percentiles"}, "range"),
        ({"images": "a.tif", "classes": 2}, "classes is given without masks"),
    ],
)
def test_a_wrong_configuration_is_one_line(fields: dict[str, Any], said: str) -> None:
    assert said in message_of(lambda: load(Stack, fields))


def test_files_that_are_not_there_or_no_stacks_are_named(tmp_path: Path) -> None:
    assert "no such file or folder" in message_of(lambda: len(of(tmp_path / "none.tif")))
    assert "no image in it or its subfolders (.tif .tiff)" in message_of(lambda: len(of(tmp_path)))
    put(tmp_path / "a.tif", DEEP)
    put(tmp_path / "b.tif", IDS)
    assert "name a data set for each kind" in message_of(lambda: len(of(tmp_path)))
    one = Stack(images=f"{tmp_path}/a.tif", masks=str(tmp_path), classes=3)
    assert "both a file, or both a folder" in message_of(lambda: len(one))


# ---- what is written


@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif"])
def test_a_stack_of_masks_can_be_read_as_such(tmp_path: Path, name: str) -> None:
    for number, page in enumerate(IDS):
        write_mask(tmp_path / f"{number}.png", page)
    write_stack(tmp_path / "deep" / name, [tmp_path / f"{number}.png" for number in range(5)])
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "deep" / name), IDS)
    stack = Stack(images=str(put(tmp_path / "images.tif", DEEP)), masks=str(tmp_path / "deep" / name), classes=3)
    np.testing.assert_array_equal([stack.label(page) for page in range(5)], IDS)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [name], "nothing half written"


# ---- from the command line


def command(*words: str) -> None:
    assert cli.run(lambda: cli.app(args=list(words), standalone_mode=False)) == 0


def test_finetune_and_predict_on_a_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve bits, learnt from and predicted into one stack again; a half-made folder is continued."""
    scenes = [Textured(size=(64, 64)).read(index) for index in range(5)]
    images = np.stack([scene.image[..., 1] for scene in scenes]).astype(np.uint16) * 16
    masks = np.stack([scene.label for scene in scenes])
    put(tmp_path / "images.tif", images, compression="zlib")
    put(tmp_path / "masks.tif", masks)
    data = {"type": "stack", "images": f"{tmp_path}/images.tif", "masks": f"{tmp_path}/masks.tif", "classes": 2}
    values = {"data": {"labelled": data}, "model": MODEL, "augment": {"crop": [64, 64]}, "tracking": UNTRACKED}
    values |= {"train": {**TRAIN, "steps": 2, "batch_size": 2}, "leaks": {"check": False}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    command("finetune", f"{tmp_path}/config.yaml", "--out", f"{tmp_path}/run")
    assert "data.labelled: " in (said := capsys.readouterr().err)
    assert "0 is black and 4095 white" in said
    assert json.loads((tmp_path / "run" / "split.json").read_text())["val"] == ["images/0004"]

    path = tmp_path / "images.tif"
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[3].dataoffsets[0]
    path.write_bytes(whole[:start] + b"\xff" * 20 + whole[start + 20 :])
    words = [f"model={tmp_path}/run", "data.images.type=stack", f"data.images.images={path}", "device=cpu"]
    words = ["predict", *words, "workers=1", "--out", f"{tmp_path}/out"]
    assert cli.run(lambda: cli.app(args=words, standalone_mode=False)) == 2
    assert not (tmp_path / "out" / "masks" / "images.tif").exists()
    path.write_bytes(whole)
    command(*words)
    joined = tifffile.imread(tmp_path / "out" / "masks" / "images.tif")
    assert joined.dtype == np.uint8
    assert joined.shape == masks.shape
    for number, page in enumerate(joined):
        np.testing.assert_array_equal(page, read_mask(tmp_path / "out" / "masks" / "images" / f"{number:04d}.png"))
    again = {"images": str(path), "masks": f"{tmp_path}/out/masks/images.tif", "classes": 2}
    np.testing.assert_array_equal(load(Stack, again).label(4), joined[4])
    assert [file.name for file in (tmp_path / "out" / "masks").iterdir() if file.is_file()] == ["images.tif"]
