"""Masks that are called otherwise than their images, and some images of a folder alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssl_seg.config import UserError, load
from ssl_seg.datasets.folder import Folder, Pattern
from ssl_seg.images import write_image, write_mask
from ssl_seg.testing import check_dataset
from tests.faults import message_of


def write(folder: Path, images: dict[str, str]) -> None:
    """Images with their masks, by paths; each mask holds the number of its image."""
    for number, (image, mask) in enumerate(images.items()):
        write_image(folder / image, np.full((6, 8, 3), 40 * number, dtype=np.uint8))
        if mask:
            write_mask(folder / mask, np.full((6, 8), number, dtype=np.uint8))


def labels(folder: Folder) -> dict[str, int]:
    return {folder.name(i): int(folder.read(i).label[0, 0]) for i in range(len(folder))}


@pytest.mark.parametrize(
    ("pattern", "images"),
    [
        ("annot/ann_{name}.png", {"photos/a.png": "annot/ann_a.png", "photos/deep/b.png": "annot/deep/ann_b.png"}),
        ("annot/{name}.mask", {"photos/a.png": "annot/a.mask.png", "photos/b.c.png": "annot/b.c.mask.png"}),
        ("photos/{name}_mask.png", {"photos/a.png": "photos/a_mask.png", "photos/b.png": "photos/b_mask.png"}),
    ],
)
def test_a_mask_is_found_by_its_pattern(pattern: str, images: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, images)
    folder = load(Folder, {"images": str(tmp_path / "photos"), "masks": f"{tmp_path}/{pattern}", "classes": 2})
    assert labels(folder) == {name.removeprefix("photos/"): number for number, name in enumerate(images)}
    check_dataset(folder)
    assert load(Folder, {key: value for key, value in folder.dump().items() if key != "type"}) == folder


@pytest.mark.parametrize("masks", ["a/{name}{name}.png", "a/{name}/b.png", "{stem}.png", "a/{}.png"])
def test_what_is_no_pattern_is_refused(masks: str) -> None:
    with pytest.raises(ValueError, match=r"is no pattern; write \{name\} once"):
        Pattern.of(masks)


def test_a_missing_mask_is_told_with_the_pattern_or_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, {"photos/leaf.png": "annot/ann_leaf.png"})
    given = {"images": str(tmp_path / "photos"), "masks": str(tmp_path / "annot"), "classes": 2}
    said = message_of(lambda: len(load(Folder, given)))
    assert f"there is ann_leaf.png: if masks are called so, write masks: {tmp_path}/annot/ann_{{name}}.png" in said
    (tmp_path / "annot" / "ann_leaf.png").rename(tmp_path / "annot" / "laef.png")
    assert "the nearest name is laef.png" in message_of(lambda: len(load(Folder, given)))
    wrong = {**given, "masks": f"{tmp_path}/annot/an_{{name}}.png"}
    assert "no mask for 1 of the 1 images" in message_of(lambda: len(load(Folder, wrong)))


def test_one_folder_for_images_and_masks_is_refused_where_nothing_tells_them_apart(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "a_mask.png"})
    said = message_of(lambda: len(load(Folder, {"images": str(tmp_path), "masks": f"{tmp_path}/", "classes": 2})))
    assert "is named for images and for masks" in said
    assert f"masks: {tmp_path}/{{name}}_mask.png" in said


def test_some_images_alone(tmp_path: Path) -> None:
    write(tmp_path, {f"photos/{name}.png": f"annot/{name}.png" for name in ("a", "b", "one/a", "one/b", "two/a")})
    given = {"images": str(tmp_path / "photos"), "masks": str(tmp_path / "annot"), "classes": 5}
    folder = load(Folder, {**given, "only": ["one", "b.png"]})
    assert labels(folder) == {"b.png": 1, "one/a.png": 2, "one/b.png": 3}
    assert message_of(lambda: len(load(Folder, {**given, "only": ["one/c.png"]}))).count(
        "no such image; the nearest is"
    )
    for outside in ("../x", "/x"):
        with pytest.raises(UserError, match="does not lie in images"):
            load(Folder, {**given, "only": [outside]})
    assert "only" not in load(Folder, given).dump()
