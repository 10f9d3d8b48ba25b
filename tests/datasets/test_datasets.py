from __future__ import annotations

import json
import os
import pickle
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from pydantic import ValidationError

from ssl_seg.config import UserError, load
from ssl_seg.data.splits import sample_digest
from ssl_seg.datasets import Dataset, Example
from ssl_seg.datasets.camvid import CLASSES, Camvid
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.images import write_image, write_mask
from ssl_seg.testing import check_dataset
from ssl_seg.worlds import World
from tests.processes import Child

SIZE = (6, 8)
GENERATOR = np.random.default_rng(0)
IDS = (np.arange(48, dtype=np.uint8) % 4).reshape(SIZE)


def picture() -> np.ndarray:
    return GENERATOR.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def put_images(folder: Path, *names: str) -> None:
    for name in names:
        write_image(folder / f"{name}.png", picture())


def labelled(root: Path, mask: np.ndarray, **options) -> Folder:
    """A data set of one image, `a b/é.png`, and its mask."""
    put_images(root / "images", "a b/é")
    write_image(root / "masks" / "a b" / "é.png", mask)
    return Folder(images=str(root / "images"), masks=str(root / "masks"), **options)


def coloured(ids: np.ndarray, colours: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(colours, dtype=np.uint8)[ids]


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def config_refusal(**fields) -> str:
    with pytest.raises(UserError) as caught:
        load(Folder, fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- folder: which files


def test_images_are_found_in_subfolders_in_order_and_hidden_ones_are_not(tmp_path):
    put_images(tmp_path, "b", "a/z", "a/B", ".hidden", ".git/c", "leerer Raum/ü")
    Image.fromarray(picture()).save(tmp_path / "LOUD.JPG")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    folder = Folder(images=str(tmp_path))
    names = [folder.name(index) for index in range(len(folder))]
    assert names == ["LOUD.JPG", "a/B.png", "a/z.png", "b.png", "leerer Raum/ü.png"]
    assert [folder.sequence(index) for index in range(len(folder))] == ["", "a", "a", "", "leerer Raum"]
    assert folder.class_names == ()
    assert folder.read(0).label is None
    check_dataset(folder)


def test_links_list_each_image_once(tmp_path):
    outside = tmp_path / "outside"
    put_images(outside, "far")
    root = tmp_path / "photos"
    put_images(root, "a/one")
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    (root / "a" / "again.png").symlink_to(root / "a" / "one.png")
    (root / "far.png").symlink_to(outside / "far.png")
    (root / "far_again.png").symlink_to(outside / "far.png")
    folder = Folder(images=str(root))
    assert [folder.name(index) for index in range(len(folder))] == ["a/one.png", "far.png"]


def names_of(folder: Folder) -> list[str]:
    return [folder.name(index) for index in range(len(folder))]


def test_linked_folders_are_followed_each_real_one_once(tmp_path):
    root, outside = tmp_path / "photos", tmp_path / "outside"
    put_images(root, "a/one")
    put_images(outside, "x/two", "three")
    (outside / "back").symlink_to(outside / "x", target_is_directory=True)
    (outside / "to_photos").symlink_to(root, target_is_directory=True)
    for name in ("linked", "again"):
        (root / name).symlink_to(outside, target_is_directory=True)
    (root / "b").symlink_to(root / "a", target_is_directory=True)
    (root / "three.png").symlink_to(outside / "three.png")
    folder = Folder(images=str(root))
    assert names_of(folder) == ["a/one.png", "again/three.png", "again/x/two.png"]
    assert [folder.sequence(index) for index in range(3)] == ["a", "again", "again/x"]
    assert folder.notes() == ()
    check_dataset(folder)


def test_a_link_that_leads_back_up_is_told(tmp_path):
    put_images(tmp_path / "photos", "a/one")
    put_images(tmp_path, "beside")
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    folder = Folder(images=f"{tmp_path}/photos")
    assert names_of(folder) == ["a/one.png"]
    assert "links to a folder above them, which are not followed: 1 (a/up)" in folder.notes()[0]


def test_a_link_to_the_masks_is_no_folder_of_images(tmp_path):
    put_images(tmp_path / "images", "a", "sub/b")
    for name in ("a", "sub/b"):
        write_mask(tmp_path / "masks" / f"{name}.png", IDS)
    (tmp_path / "images" / "masks").symlink_to(tmp_path / "masks", target_is_directory=True)
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=4)
    assert names_of(folder) == ["a.png", "sub/b.png"]


def test_a_broken_link_is_named(tmp_path):
    put_images(tmp_path, "a")
    gone = tmp_path / "gone.png"
    gone.symlink_to(tmp_path / "nowhere.png")
    assert "gone.png: a link to a file that is missing" in refusal(len, Folder(images=str(tmp_path)))
    gone.unlink()
    gone.symlink_to(gone)
    assert "gone.png: a link to a file that is missing" in refusal(len, Folder(images=str(tmp_path)))
    gone.unlink()
    (tmp_path / "clip2").symlink_to(tmp_path / "unmounted")
    assert "clip2: a link to a folder or file that is missing" in refusal(len, Folder(images=str(tmp_path)))


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder, and for this process none of the rights of root, if it has them: those of the folder hold."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


def lock_out(folder: Path) -> None:
    folder.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("locked", ["clip", "deep/clip", "linked"])
def test_a_folder_that_cannot_be_read_is_named(locked):
    with as_nobody() as root:
        put_images(root / "photos", "a", "deep/b")
        place = root / "photos" / locked
        if locked == "linked":
            place.symlink_to(root / "private" / "clip", target_is_directory=True)
            put_images(root / "private" / "clip", "c")
            lock_out(root / "private")
        else:
            put_images(place, "c")
            lock_out(place)
        message = refusal(len, Folder(images=str(root / "photos")))
        assert f"{place}: cannot be read (Permission denied)" in message
        os.seteuid(os.getuid())
        (root / "private" if locked == "linked" else place).chmod(0o755)
        assert len(Folder(images=str(root / "photos"))) == 3


def test_roots_that_cannot_be_reached_are_named():
    with as_nobody() as root:
        put_images(root / "private" / "train", "a")
        lock_out(root / "private")
        for dataset in (Folder(images=f"{root}/private/train"), Camvid(root=f"{root}/private")):
            assert "train: cannot be read (Permission denied)" in refusal(len, dataset)
        unnamed = Folder(images=str(root), masks=f"{root}/private/masks")
        assert "private/masks: cannot be read (Permission denied)" in refusal(len, unnamed)
        os.seteuid(os.getuid())
        (root / "private").chmod(0o755)


def test_an_unknown_home_is_named():
    for dataset in (Folder(images="~nobody_of_this_name/a"), Camvid(root="~nobody_of_this_name")):
        assert "~nobody_of_this_name" in refusal(len, dataset)


def test_what_runs_have_drawn_is_left_out_and_told(tmp_path):
    put_images(tmp_path, "a", "runs/one/pictures/b", "studies/s/changed/c", "masked/overlays/d", "drive/e", "drive/x/f")
    for name, content in {
        "runs/one/run.json": {"stage": "pretrain", "config": {}},
        "studies/s/study.json": {"seeds": [0], "cells": []},
        "masked/classes.json": {"classes": ["a"], "model": "runs/one"},
        "drive/run.json": {"driver": "somebody else's"},
        "drive/x/classes.json": ["of another program"],
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    folder = Folder(images=str(tmp_path))
    assert names_of(folder) == ["a.png", "drive/e.png", "drive/x/f.png"]
    (note,) = folder.notes()
    assert note.startswith(f"{tmp_path}: subfolders that a run or another command has written, which are left out: 3 (")
    assert "(masked, runs/one, studies/s)" in note
    assert len(Folder(images=f"{tmp_path}/runs/one/pictures")) == 1  # whoever names them means them
    assert "which are left out: 1 (one)" in refusal(len, Folder(images=f"{tmp_path}/runs"))


def test_pictures_that_are_not_read_are_told(tmp_path):
    put_images(tmp_path, "a")
    for name in ("IMG_1.HEIC", "raw/b.cr2", "raw/.c.dng", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (note,) = Folder(images=str(tmp_path)).notes()
    assert "pictures of a kind that is not read; convert them, or take them out: 2 (IMG_1.HEIC, raw/b.cr2)" in note
    assert "not read; convert them, or take them out: 1 (b.cr2)" in refusal(len, Folder(images=f"{tmp_path}/raw"))


def test_names_match_however_unicode_writes_their_letters(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "forêt/é") for form in ("NFC", "NFD"))
    put_images(tmp_path / "images", decomposed)
    write_mask(tmp_path / "masks" / f"{composed}.png", IDS)
    files = {"images": f"{tmp_path}/images", "masks": f"{tmp_path}/masks", "classes": 4}
    folder = Folder(**files)
    assert names_of(folder) == [f"{decomposed}.png"]
    np.testing.assert_array_equal(folder.read(0).label, IDS)
    put_images(tmp_path / "images", composed)
    assert "differ by how Unicode writes the same letters" in refusal(len, Folder(**files))
    assert len(Folder(images=f"{tmp_path}/images")) == 2


def test_a_missing_and_an_empty_folder_are_named(tmp_path):
    assert f"{tmp_path}/none: no such folder" in refusal(len, Folder(images=f"{tmp_path}/none"))
    assert f"{tmp_path}: no image in it" in refusal(len, Folder(images=str(tmp_path)))
    put_images(tmp_path / "images", "a")
    no_masks = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=2)
    assert f"{tmp_path}/masks: no such folder" in refusal(len, no_masks)


def test_the_files_are_listed_once_and_travel_with_the_object(tmp_path):
    put_images(tmp_path, "a", "b")
    folder = Folder(images=str(tmp_path))
    assert len(folder) == 2
    put_images(tmp_path, "c")
    assert len(folder) == 2
    assert len(pickle.loads(pickle.dumps(folder))) == 2
    assert len(Folder(images=str(tmp_path))) == 3


def test_masks_are_found_by_stem_in_any_suffix_and_extra_masks_are_left_out(tmp_path):
    put_images(tmp_path / "images", "x.v1", "sub/y")
    (tmp_path / "masks" / "sub").mkdir(parents=True)
    Image.fromarray(IDS).save(tmp_path / "masks" / "x.v1.BMP")
    Image.fromarray(IDS + 1).save(tmp_path / "masks" / "sub" / "y.tif")
    Image.fromarray(IDS).save(tmp_path / "masks" / "extra.png")
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=5)
    assert [folder.name(index) for index in range(len(folder))] == ["sub/y.png", "x.v1.png"]
    np.testing.assert_array_equal(folder.read(0).label, IDS + 1)
    np.testing.assert_array_equal(folder.read(1).label, IDS)
    check_dataset(folder)


def test_masks_inside_the_image_folder_or_beside_the_images_are_no_images(tmp_path):
    put_images(tmp_path / "nested", "a", "b")
    for name in ("a", "b"):
        write_mask(tmp_path / "nested" / "masks" / f"{name}.png", IDS)
    nested = Folder(images=f"{tmp_path}/nested", masks=f"{tmp_path}/nested/masks", classes=4)
    assert [nested.name(index) for index in range(len(nested))] == ["a.png", "b.png"]
    beside = tmp_path / "beside"
    write_mask(beside / "a.png", IDS)
    Image.fromarray(picture()).save(beside / "a.jpg")
    folder = Folder(images=str(beside), masks=f"{beside}/", classes=4)
    assert [folder.name(index) for index in range(len(folder))] == ["a.jpg"]
    np.testing.assert_array_equal(folder.read(0).label, IDS)


def test_images_without_masks_are_counted_and_named(tmp_path):
    put_images(tmp_path / "images", "a", "b", "c", "d", "e")
    write_mask(tmp_path / "masks" / "c.png", IDS)
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=4)
    message = refusal(len, folder)
    assert f"{tmp_path}/masks: no mask for 4 of the 5 images of {tmp_path}/images (a.png, b.png, d.png and 1" in message
    assert "add them or remove the images" in message


def test_lossy_masks_are_refused(tmp_path):
    put_images(tmp_path / "images", "a")
    (tmp_path / "masks").mkdir()
    Image.fromarray(IDS).save(tmp_path / "masks" / "a.jpg")
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=4)
    assert f"{tmp_path}/masks/a.jpg: masks in a lossy format" in refusal(len, folder)
    (tmp_path / "masks" / "a.jpg").rename(tmp_path / "masks" / "a.png")
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=4)
    assert "JPEG does not keep class ids" in refusal(folder.read, 0)


def test_two_files_for_one_stem_are_refused_only_where_there_are_masks(tmp_path):
    put_images(tmp_path / "images", "a")
    Image.fromarray(picture()).save(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "a.png", IDS)
    assert len(Folder(images=f"{tmp_path}/images")) == 2
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=4)
    assert f"{tmp_path}/images: a.jpg and a.png differ by their suffix only" in refusal(len, folder)
    (tmp_path / "images" / "a.jpg").unlink()
    Image.fromarray(IDS).save(tmp_path / "masks" / "a.tif")
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=4)
    assert f"{tmp_path}/masks: a.png and a.tif differ by their suffix only" in refusal(len, folder)


# ---- folder: what masks mean


def test_ids_names_and_ignored_ids(tmp_path):
    mask = IDS.copy()
    mask[0, :3] = (7, 255, 9)
    folder = labelled(tmp_path, mask, classes=("sky", "road", "tree", "car"), ignore=(7, 9))
    example = folder.read(0)
    expected = IDS.copy()
    expected[0, :3] = 255
    np.testing.assert_array_equal(example.label, expected)
    assert example.name == "a b/é.png"
    assert folder.class_names == ("sky", "road", "tree", "car")
    check_dataset(folder)


def test_a_count_names_the_classes(tmp_path):
    assert labelled(tmp_path, IDS, classes=4).class_names == ("class_0", "class_1", "class_2", "class_3")


def test_three_equal_channels_are_one(tmp_path):
    folder = labelled(tmp_path, np.repeat(IDS[..., None], 3, axis=-1), classes=4)
    np.testing.assert_array_equal(folder.read(0).label, IDS)


def test_palette_masks_are_read_by_index(tmp_path):
    folder = labelled(tmp_path, IDS, classes=4)
    write_mask(tmp_path / "masks" / "a b" / "é.png", IDS, palette=[(9, 9, 9), (200, 0, 0), (0, 200, 0), (0, 0, 200)])
    np.testing.assert_array_equal(folder.read(0).label, IDS)


COLOURS = [(0, 0, 0), (255, 0, 0), (0, 128, 255), (1, 2, 3)]


@pytest.mark.parametrize(
    "mapping",
    [
        {"#000000": 0, "#FF0000": 1, "#0080ff": 2, "#010203": "ignore"},
        {"0,0,0": "sky", "255, 0, 0": "road", "0,128,255": "2", "1,2,3": 255},
    ],
)
def test_colours_are_mapped(tmp_path, mapping):
    folder = labelled(tmp_path, coloured(IDS, COLOURS), classes=("sky", "road", "car"), mapping=mapping)
    np.testing.assert_array_equal(folder.read(0).label, np.where(IDS == 3, 255, IDS))
    check_dataset(folder)


def test_a_black_mask_counts_as_a_colour_where_colours_are_mapped(tmp_path):
    black = np.zeros((*SIZE, 3), dtype=np.uint8)
    folder = labelled(tmp_path, black, classes=2, mapping={"#000000": 1, "#ffffff": 0})
    assert (folder.read(0).label == 1).all()


def test_colours_without_a_mapping_are_listed(tmp_path):
    folder = labelled(tmp_path, coloured(IDS, COLOURS), classes=4)
    message = refusal(folder.read, 0)
    assert f"{tmp_path}/masks/a b/é.png (mask of {tmp_path}/images/a b/é.png)" in message
    assert "#000000, #0080ff, #010203, #ff0000" in message
    assert 'mapping: {"#000000": 0, ...}' in message
    partly = Folder(images=folder.images, masks=folder.masks, classes=4, mapping={"#000000": 0, "#ff0000": 1})
    assert "colours #0080ff, #010203 are in no mapping" in refusal(partly.read, 0)


def test_ids_where_only_colours_are_mapped_are_refused(tmp_path):
    folder = labelled(tmp_path, IDS, classes=2, mapping={"#000000": 0})
    assert "holds ids (0, 1, 2, 3), but mapping names colours only" in refusal(folder.read, 0)


def test_ids_out_of_range_name_both_files(tmp_path):
    mask = IDS.astype(np.uint16)
    mask[0, :2] = (300, 17)
    folder = labelled(tmp_path, mask, classes=4)
    message = refusal(folder.read, 0)
    assert f"{tmp_path}/masks/a b/é.png (mask of {tmp_path}/images/a b/é.png): ids 17, 300 are no class" in message
    assert "mapping: {17: ignore}" in message
    mended = Folder(images=folder.images, masks=folder.masks, classes=4, mapping={17: "ignore", 300: 2, 2: 2})
    assert mended.read(0).label[0, :3].tolist() == [2, 255, 2]


def test_a_mask_of_another_size_names_both_files_and_sizes(tmp_path):
    folder = labelled(tmp_path, np.zeros((8, 6), dtype=np.uint8), classes=4)
    message = refusal(folder.read, 0)
    assert f"{tmp_path}/masks/a b/é.png: 8 x 6 pixels" in message
    assert f"{tmp_path}/images/a b/é.png has 6 x 8" in message


def put_turned(root: Path, name: str, orientation: int, size: tuple[int, int], mask_size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1]).save(root / "images" / f"{name}.jpg", exif=exif)
    write_mask(root / "masks" / f"{name}.png", np.zeros(mask_size, dtype=np.uint8))


def test_a_mask_of_the_unturned_size_is_told_by_exif(tmp_path):
    put_turned(tmp_path, "a", 6, (6, 8), (6, 8))
    message = refusal(Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=2).read, 0)
    assert "a.png: 6 x 8 pixels (H x W), but its image" in message
    assert "has 8 x 6 when it is turned by its EXIF orientation (6)" in message
    assert "turn the mask alike" in message


def test_turns_that_no_size_shows_are_told(tmp_path):
    put_turned(tmp_path, "as size tells", 6, (6, 8), (8, 6))
    put_turned(tmp_path, "upright", 1, (6, 8), (6, 8))
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=2)
    assert folder.notes() == ()
    put_turned(tmp_path, "square", 8, (6, 6), (6, 6))
    put_turned(tmp_path, "upside down", 3, (6, 8), (6, 8))
    folder = Folder(images=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=2)
    (note,) = folder.notes()
    assert "EXIF turns or mirrors 2 of the images (square.jpg, upside down.jpg)" in note
    assert folder.notes(with_labels=False) == ()


# ---- folder: values of more than 8 bits


def deep(root: Path, *largest: int) -> Folder:
    """Pictures of 16 bits, one for each of the values that they reach."""
    root.mkdir(parents=True)
    for number, white in enumerate(largest):
        values = np.linspace(0, white, 48).round().astype(np.uint16).reshape(SIZE)
        Image.fromarray(values).save(root / f"{number:02}.png")
    return Folder(images=str(root))


def test_pictures_that_use_a_part_of_16_bits_are_told_with_the_range_to_write(tmp_path):
    (note,) = deep(tmp_path / "dark", *[900] * 20, 3500).notes()
    assert "no value is above 900 of 65535; if less than that is white, write range: [0, 1023]" in note
    folder = deep(tmp_path / "darker", *[3500] * 3)
    (note,) = folder.notes(with_labels=False)
    assert f"{tmp_path}/darker: nearly black: in 3 images" in note
    assert "range: [0, 4095]" in note
    mended = Folder(images=folder.images, range=(0, 4095))
    assert mended.notes() == ()
    assert folder.image(0).image.max() == 14
    assert mended.image(0).image.max() == round(3500 / 4095 * 255)


def test_pictures_that_are_dark_for_good_are_not_spoken_of(tmp_path):
    assert deep(tmp_path / "night", 900, 900, 50_000, 900).notes() == ()
    assert deep(tmp_path / "cap", 0, 0).notes() == ()
    put_images(tmp_path / "eight bits", "a", "b")
    assert Folder(images=str(tmp_path / "eight bits")).notes() == ()


def test_a_range_is_in_the_config_where_it_is_given_and_moves_the_digest(tmp_path):
    plain = deep(tmp_path / "images", 3500)
    ranged = load(Dataset, {**plain.dump(), "range": [0, 4095]})
    assert "range" not in plain.dump()
    assert ranged.dump()["range"] == [0, 4095]
    assert load(Dataset, ranged.dump()) == ranged
    assert sample_digest(plain) != sample_digest(ranged)
    assert "black (9) has to be less than white (9)" in config_refusal(images="i", range=[9, 9])
    assert "range: write [black, white], two finite numbers" in config_refusal(images="i", range=[0, float("inf")])


@pytest.mark.parametrize("channels", [1, 3])
def test_0_and_255_for_two_classes_are_asked_about(tmp_path, channels):
    two = (IDS > 1) * np.uint8(255)
    mask = two if channels == 1 else np.repeat(two[..., None], 3, axis=-1)
    folder = labelled(tmp_path, mask, classes=("ground", "crop"))
    message = refusal(folder.read, 0)
    assert "mapping: {255: 1} if 255 is 'crop'" in message
    assert "mapping: {255: ignore}" in message
    paths = {"images": folder.images, "masks": folder.masks, "classes": ("ground", "crop")}
    np.testing.assert_array_equal(Folder(**paths, mapping={255: 1}).read(0).label, IDS > 1)
    np.testing.assert_array_equal(Folder(**paths, mapping={255: "ignore"}).read(0).label, two)
    np.testing.assert_array_equal(Folder(**paths, ignore=(255,)).read(0).label, two)


def test_255_alone_is_asked_about_and_0_alone_is_not(tmp_path):
    white = labelled(tmp_path / "white", np.full(SIZE, 255, dtype=np.uint8), classes=2)
    assert "0 and 255" in refusal(white.read, 0)
    black = labelled(tmp_path / "black", np.zeros(SIZE, dtype=np.uint8), classes=2)
    assert not black.read(0).label.any()
    three = labelled(tmp_path / "three", np.full(SIZE, 255, dtype=np.uint8), classes=3)
    assert (three.read(0).label == 255).all()
    mixed = labelled(tmp_path / "mixed", np.where(IDS == 3, 255, IDS % 2).astype(np.uint8), classes=2)
    np.testing.assert_array_equal(mixed.read(0).label, np.where(IDS == 3, 255, IDS % 2))


def test_an_id_whose_class_another_id_was_mapped_to_is_no_class(tmp_path):
    folder = labelled(tmp_path, IDS, classes=2, mapping={1: 0, 2: 1, 3: "ignore"})
    message = refusal(folder.read, 0)
    assert "id 0 is not in mapping, which gives its class 'class_0' to another id" in message
    assert "mapping: {0: 0}" in message
    mended = Folder(images=folder.images, masks=folder.masks, classes=2, mapping={0: 0, 1: 0, 2: 1, 3: "ignore"})
    np.testing.assert_array_equal(mended.read(0).label, np.array([0, 0, 1, 255])[IDS])


@given(st.dictionaries(st.integers(0, 65535), st.integers(0, 9) | st.just("ignore"), min_size=1))
def test_a_mapping_means_what_it_says_for_every_stored_id(mapping):
    folder = Folder(images="i", masks="m", classes=10, mapping=mapping)
    stored = np.array([list(mapping)], dtype=np.uint16)
    expected = [255 if value == "ignore" else value for value in mapping.values()]
    assert folder._meaning.label(stored).tolist() == [expected]


def test_masks_without_classes_say_what_they_hold(tmp_path):
    many = labelled(tmp_path / "ids", IDS)
    assert f"{tmp_path}/ids/masks: classes is missing; 1 of 1 masks hold ids 0, 1, 2, 3: write classes: 4" in refusal(
        len, many
    )
    assert "write classes: 4" in refusal(lambda: many.class_names)
    two = labelled(tmp_path / "two", (IDS > 1) * np.uint8(255))
    assert "write classes: 2 and mapping: {255: 1}" in refusal(two.read, 0)
    colours = labelled(tmp_path / "colours", coloured(IDS, COLOURS))
    assert "colours #000000, #0080ff, #010203, #ff0000: write classes and mapping" in refusal(colours.read, 0)


# ---- folder: configuration


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"classes": 3}, "classes is given without masks"),
        ({"mapping": {1: 0}}, "mapping is given without masks"),
        ({"masks": "m", "classes": 0}, "give 2 to 255 different names"),
        ({"masks": "m", "classes": 256}, "give 2 to 255 different names"),
        ({"masks": "m", "classes": "road"}, "give 2 to 255 different names"),
        ({"masks": "m", "classes": ["a", "a"]}, "give 2 to 255 different names"),
        ({"masks": "m", "classes": 3, "mapping": {"red": 1}}, "key 'red' is no stored value"),
        ({"masks": "m", "classes": 3, "mapping": {"256,0,0": 1}}, "key '256,0,0' is no stored value"),
        ({"masks": "m", "classes": 3, "mapping": {65536: 1}}, "key 65536 is no stored value"),
        ({"masks": "m", "classes": 3, "mapping": {"#ff0000": 0, "255,0,0": 1}}, "two keys mean the same"),
        ({"masks": "m", "classes": 3, "mapping": {7: 3}}, "mapping 7: 3 is no class; write 0 to 2"),
        ({"masks": "m", "classes": 3, "mapping": {7: "roda"}}, "mapping 7: 'roda' is no class"),
        ({"masks": "m", "classes": 3, "mapping": {7: 1}, "ignore": [7]}, "id 7 is in ignore and in mapping"),
        ({"masks": "m", "classes": 3, "ignore": [-1]}, "ignore.0"),
        ({"masks": "m", "classes": 3, "colours": {}}, "unknown key 'colours'"),
        ({}, "images: missing"),
    ],
)
def test_a_wrong_configuration_is_one_line(fields, words):
    given_images = {"images": "i"} if fields else {}
    assert words in config_refusal(**given_images, **fields)


def test_a_mapping_written_in_yaml_arrives(tmp_path):
    recipe = tmp_path / "data.yaml"
    recipe.write_text(
        "type: folder\nimages: i\nmasks: m\nclasses: [a, b]\nmapping: {255: b, '#ff0000': ignore, '1,2,3': 0}"
    )
    folder = load(Dataset, [str(recipe)])
    assert folder.mapping == {"255": "b", "#ff0000": "ignore", "#010203": 0}
    again = tmp_path / "again.yaml"
    again.write_text(folder.to_yaml())
    assert load(Dataset, [str(again)]) == folder
    assert load(Dataset, [str(recipe), "mapping={255: 0}"]).mapping["255"] == 0


# ---- camvid


def put_camvid(root: Path, images: str, masks: str, **frames: list[str]) -> None:
    for split, names in frames.items():
        for name in names:
            put_images(root / images.format(split), name)
            write_mask(root / masks.format(split) / f"{name}.png", np.where(IDS == 3, 11, IDS).astype(np.uint8))


FRAMES = {"train": ["0001TP_0", "0001TP_1", "0016E5_0"], "val": ["0016E5_1"]}


@pytest.mark.parametrize("layout", [("images/{0}", "masks/{0}"), ("{0}", "{0}annot")])
def test_camvid_reads_both_layouts(tmp_path, layout):
    put_camvid(tmp_path, *layout, **FRAMES)
    train = Camvid(root=str(tmp_path))
    assert [train.name(index) for index in range(len(train))] == [f"train/{name}.png" for name in FRAMES["train"]]
    assert [train.sequence(index) for index in range(len(train))] == ["0001TP", "0001TP", "0016E5"]
    assert train.class_names == CLASSES
    assert len(CLASSES) == 11
    np.testing.assert_array_equal(train.read(2).label, np.where(IDS == 3, 255, IDS))
    both = Camvid(root=str(tmp_path), split="all")
    assert len(both) == 4
    assert both.name(3) == "val/0016E5_1.png"
    for dataset in (train, both):
        check_dataset(dataset)
        assert dataset.notes() == ()


def test_camvid_keeps_chosen_drives(tmp_path):
    put_camvid(tmp_path, "{0}", "{0}annot", **FRAMES)
    chosen = Camvid(root=str(tmp_path), split="all", drives=("0016E5",))
    assert [chosen.name(index) for index in range(len(chosen))] == ["train/0016E5_0.png", "val/0016E5_1.png"]
    check_dataset(chosen)
    message = refusal(len, Camvid(root=str(tmp_path), split="val", drives=("0001TP",)))
    assert "no drive '0001TP' in split 'val'; known: 0016E5" in message


def test_camvid_understands_the_drive_that_yaml_reads_as_a_number():
    dataset = load(Dataset, ["type=camvid", "root=r", "drives=[0001TP, 0016E5]"])
    assert dataset.drives == ("0001TP", "0016E5")


def test_camvid_names_a_missing_split(tmp_path):
    put_camvid(tmp_path, "{0}", "{0}annot", **FRAMES)
    message = refusal(len, Camvid(root=str(tmp_path), split="test"))
    assert f"{tmp_path}: no split 'test' of CamVid" in message
    assert "testannot" in message
    assert "no split 'all'" in refusal(len, Camvid(root=f"{tmp_path}/none", split="all"))


# ---- synthetic


def test_squares_hold_one_flat_box_of_the_stated_size():
    dataset = Synthetic(count=40)
    places = set()
    for index in range(len(dataset)):
        example = dataset.read(index)
        assert example.image.shape == (512, 512, 3)
        count, _, stats, _ = cv2.connectedComponentsWithStats(example.label)
        left, top, width, height, area = stats[1].tolist()
        assert count == 2
        assert 90 <= width <= 100
        assert 90 <= height <= 100
        assert area == width * height
        inside = example.image[example.label == 1].astype(int)
        outside = example.image[example.label == 0].astype(int)
        assert (inside == inside[0]).all()
        assert (outside == outside[0]).all()
        assert np.abs(inside[0] - outside[0]).min() >= 64
        places.add((left, top, width, height))
    assert len(places) == 40
    assert dataset.class_names == ("background", "square")
    assert dataset.name(12) == "squares_000012"


def test_sides_and_places_reach_both_ends():
    dataset = Synthetic(count=600, size=(16, 16))  # sides are 3 px
    boxes = [cv2.boundingRect(dataset.read(index).label) for index in range(len(dataset))]
    assert {size for _, _, *sizes in boxes for size in sizes} == {3}
    assert {left for left, _, _, _ in boxes} == set(range(14))
    assert {top for _, top, _, _ in boxes} == set(range(14))
    sides = [cv2.boundingRect(Synthetic(count=200).read(index).label)[2] for index in range(200)]
    assert {min(sides), max(sides)} == {90, 100}


@given(st.integers(2, 70), st.integers(2, 70), st.integers(0, 2**62))
def test_the_box_is_inside_whatever_the_size(height, width, seed):
    example = Synthetic(count=1, size=(height, width), seed=seed).read(0)
    left, top, box_width, box_height = cv2.boundingRect(example.label)
    short = min(height, width)
    low, high = max(2, 90 * short / 512 - 0.5), max(2, 100 * short / 512 + 0.5)
    assert low <= box_height <= high
    assert low <= box_width <= high
    assert example.label.sum() == box_width * box_height
    assert left + box_width <= width
    assert top + box_height <= height


def test_squares_are_the_same_in_another_process_and_differ_by_seed_and_number():
    stdout, stderr = Child(print_digest, Synthetic(seed=3), 7).communicate()
    digests = [digest(Synthetic(seed=seed), index) for seed in (3, 4) for index in (7, 8)]
    assert stdout.strip() == digests[0], stderr
    assert len(set(digests)) == 4


def digest(dataset: Synthetic, index: int) -> str:
    return sha256(dataset.read(index).image.tobytes()).hexdigest()


def print_digest(dataset: Synthetic, index: int) -> None:
    print(digest(dataset, index))


def test_a_picture_does_not_depend_on_how_many_there_are():
    np.testing.assert_array_equal(Synthetic(count=3).read(2).image, Synthetic(count=500).read(2).image)
    with pytest.raises(IndexError):
        Synthetic(count=3).read(3)


def test_a_small_picture_is_drawn_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    scene = Synthetic.scene
    monkeypatch.setattr(Synthetic, "scene", lambda self, index: drawn.append(index) or scene(self, index))
    first = Synthetic(kind="nuclei", count=4, size=(30, 40), seed=77).read(2)
    kept = first.image.copy()
    first.image[:] = 0  # what a reader does to its own copy
    again = Synthetic(kind="nuclei", count=4, size=(30, 40), seed=77).read(2)
    np.testing.assert_array_equal(again.image, kept)
    np.testing.assert_array_equal(again.label, first.label)
    assert drawn == [2]
    for other in ({"seed": 78}, {"size": (30, 41)}, {"kind": "shapes"}, {"kind": {"type": "nuclei", "noise": 0.2}}):
        Synthetic.model_validate({"kind": "nuclei", "count": 4, "size": (30, 40), "seed": 77, **other}).read(2)
    assert drawn == [2] * 5
    large = Synthetic(size=(300, 300))
    large.read(0), large.read(0)
    assert drawn[5:] == [0, 0]


def test_every_world_can_be_chosen_and_conforms():
    for kind in World.names():
        check_dataset(Synthetic(kind=kind, count=12, size=(40, 56)))
    with pytest.raises(ValidationError):
        Synthetic(kind="circles")
    with pytest.raises(ValidationError):
        Synthetic(count=0)


# ---- the conformance test itself


class Fake(Dataset):
    """A data set that conforms until a field breaks it."""

    package: ClassVar[str] = "ssl_seg.datasets"
    fault: str = ""
    cached_image: ClassVar[np.ndarray] = np.zeros((4, 5, 3), np.uint8)
    cached_label: ClassVar[np.ndarray] = np.zeros((4, 5), np.uint8)
    reads: ClassVar[list[int]] = []

    @property
    def class_names(self) -> tuple[str, ...]:
        return {"twins": ("a", "a"), "unlabelled": (), "list": ["a", "b"]}.get(self.fault, ("a", "b"))

    def __len__(self) -> int:
        return 0 if self.fault == "empty" else 3

    def name(self, index: int) -> str:
        return "same" if self.fault == "names" else f"fake_{index}"

    def sequence(self, index: int) -> str:
        return None if self.fault == "sequence" else ""

    def read(self, index: int) -> Example:
        self.reads.append(index)
        image = np.full((4, 5, 3), index, dtype=np.uint8)
        label = np.full((4, 5), index % 2, dtype=np.uint8)
        good = Example(image, label, self.name(index))
        frozen = image.copy()
        frozen.setflags(write=False)
        broken = {
            "other name": replace(good, name="other"),
            "float": replace(good, image=image / 255),
            "chw": replace(good, image=image.transpose(2, 0, 1)),
            "read-only": replace(good, image=frozen),
            "no label": replace(good, label=None),
            "int64": replace(good, label=label.astype(np.int64)),
            "size": replace(good, label=label[:2]),
            "ids": replace(good, label=label + np.uint8(2)),
            "random": replace(good, image=image + np.uint8(len(self.reads) % 251)),
            "shared image": replace(good, image=self.cached_image),
            "shared label": replace(good, label=self.cached_label),
        }
        return broken.get(self.fault, good)

    def label(self, index: int) -> np.ndarray | None:
        label = super().label(index)
        return label[::-1] + np.uint8(1) if self.fault == "other label" else label

    def __getstate__(self):
        state = super().__getstate__()
        if self.fault == "pickle":
            state["__dict__"] = {**state["__dict__"], "fault": "empty"}
        return state

    def dump(self):
        dumped = super().dump()
        return {**dumped, "fault": "x"} if self.fault == "dump" else dumped


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("empty", "is empty"),
        ("twins", "holds a name twice"),
        ("list", "not a tuple"),
        ("unlabelled", "has a label, but class_names is empty"),
        ("names", "3 images are named 'same'"),
        ("sequence", "not a str"),
        ("other name", r"named 'other', but name\(0\) is 'fake_0'"),
        ("float", "float64, not uint8"),
        ("chw", r"not \(H, W, 3\)"),
        ("read-only", "read-only"),
        ("no label", "has no label"),
        ("int64", "int64, not uint8"),
        ("size", "for an image"),
        ("ids", r"holds \[2\]"),
        ("random", "not pure"),
        ("other label", r"label\(0\) gives another label"),
        ("shared image", "written to, gives another image"),
        ("shared label", "written to, gives another label"),
        ("pickle", "after pickling"),
        ("dump", "another config"),
    ],
)
def test_check_dataset_names_each_fault(fault, words):
    with pytest.raises(AssertionError, match=words):
        check_dataset(Fake(fault=fault))


def test_check_dataset_passes_what_conforms():
    check_dataset(Fake())
