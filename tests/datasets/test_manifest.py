"""Lists of images and masks, as people have them: tables with other columns, files in many folders, faults."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_seg import images
from ssl_seg.config import UserError, load
from ssl_seg.data.splits import hold_out
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.manifest import Manifest
from ssl_seg.testing import check_dataset
from tests.faults import message_of

CLASSES = ["ground", "leaf"]
ROWS = [
    {
        "image": f"scans/{patient}/{number}.png",
        "mask": f"drawn/{patient}_{number}.png",
        "group": patient,
        "split": split,
    }
    for patient, split in (("a", "train"), ("b", "train"), ("c", "val"))
    for number in (1, 2)
]


def put_files(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for row in ROWS:
        for column in ("image", "mask"):
            (folder / row[column]).parent.mkdir(parents=True, exist_ok=True)
        images.write_image(folder / row["image"], random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        images.write_mask(folder / row["mask"], random.integers(0, 2, (12, 16), dtype=np.uint8))
    return folder


def put_list(folder: Path, rows: list[dict[str, Any]] = ROWS, name: str = "all.csv", delimiter: str = ",") -> str:
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # with the mark that spreadsheets write
            table = csv.DictWriter(file, [*rows[0]], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    ("name", "delimiter"), [("all.csv", ","), ("all.csv", ";"), ("all.tsv", "\t"), ("all.json", ""), ("all.jsonl", "")]
)
def test_every_kind_of_list_is_the_same_data_set(name: str, delimiter: str, tmp_path: Path) -> None:
    listed = Manifest(images=put_list(put_files(tmp_path), name=name, delimiter=delimiter), classes=CLASSES)
    check_dataset(listed)
    assert [listed.name(index) for index in range(len(listed))] == [row["image"] for row in ROWS]
    assert [listed.sequence(index) for index in range(len(listed))] == ["a", "a", "b", "b", "c", "c"]


def test_it_reads_as_a_folder_does(tmp_path: Path) -> None:
    put_files(tmp_path)
    rows = [row for row in ROWS if row["group"] == "a"]
    for row in rows:
        (tmp_path / row["mask"]).rename(tmp_path / "drawn" / Path(row["image"]).name)
    same = [{**row, "mask": f"drawn/{Path(row['image']).name}"} for row in rows]
    meaning = {"mapping": {1: 0, 0: 1}, "classes": CLASSES}
    listed = Manifest(images=put_list(tmp_path, same), **meaning)
    folder = Folder(images=str(tmp_path / "scans" / "a"), masks=str(tmp_path / "drawn"), **meaning)
    for index in range(2):
        ours, theirs = listed.read(index), folder.read(index)
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.label, theirs.label)


def test_lines_are_chosen_by_what_they_say_and_without_classes_there_are_no_masks(tmp_path: Path) -> None:
    path = put_list(put_files(tmp_path))
    train = load(Manifest, {"images": path, "classes": CLASSES, "where": {"split": "train"}})
    assert len(train) == 4
    pool = Manifest(images=path, where={"split": "val", "group": "c"})
    check_dataset(pool)
    assert (len(pool), pool.class_names) == (2, ())
    assert pool.read(0).label is None


def test_a_hold_out_keeps_a_group_whole(tmp_path: Path) -> None:
    listed = Manifest(images=put_list(put_files(tmp_path)), classes=CLASSES)
    rest, held = hold_out(listed)
    groups = [{part.dataset.sequence(index) for index in part.indices} for part in (rest, held)]
    assert all(groups)
    assert not groups[0] & groups[1]


def test_paths_may_begin_elsewhere_and_lead_outside(tmp_path: Path) -> None:
    put_files(tmp_path / "data")
    (tmp_path / "lists").mkdir()
    path = put_list(tmp_path / "lists")
    assert "no file" in message_of(lambda: len(Manifest(images=path, classes=CLASSES)))
    assert len(Manifest(images=path, classes=CLASSES, root=str(tmp_path / "data"))) == len(ROWS)
    outside = [
        {**row, "image": f"../data/{row['image']}", "mask": str(tmp_path / "data" / row["mask"])} for row in ROWS
    ]
    listed = Manifest(images=put_list(tmp_path / "lists", outside), classes=CLASSES)
    check_dataset(listed)
    assert listed.name(0) == "data/scans/a/1.png"
    assert listed.notes() == ()


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"file": "a.png"}], {}, "no column image; it has file: say by columns which it is"),
        ([{"imgae": "a.png"}], {}, "no column image; did you mean imgae?"),
        ([{**ROWS[0], "mask": " "}], {"classes": CLASSES}, "line 2 has no mask"),
        ([{**ROWS[0], "mask": "drawn/none.png"}], {"classes": CLASSES}, "line 2: no file"),
        ([{**ROWS[0], "mask": "all.csv"}], {"classes": CLASSES}, "is of a kind that is not read"),
        ([ROWS[0], ROWS[1], ROWS[0]], {}, "lines 2 and 4 are both of scans/a/1.png; keep one"),
        (ROWS, {"where": {"split": "dev"}}, "no line of split: dev; change where"),
        (ROWS, {"where": {"spilt": "val"}}, "no column spilt; did you mean split?"),
        (ROWS, {"columns": {"group": "patient"}}, "no column patient"),
    ],
)
def test_what_is_wrong_with_a_list_is_one_line(
    rows: list[dict[str, Any]], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = put_list(put_files(tmp_path), rows)
    message = message_of(lambda: len(load(Manifest, {"images": path, **options})))
    assert said in message
    assert "all.csv" in message


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "image,mask\nscans/a/1.png\n", "line 2: 1 columns, but the first has 2"),
        ("a.csv", "image,image\na,b\n", "names a column twice"),
        ("a.csv", "", "no line; fill it"),
        ("a.json", '{"image": 1', "is no list in JSON"),
        ("a.json", '["scans/a/1.png"]', "entry 1 is"),
        ("a.json", '{"image": "a.png"}', "entry 1 is"),
        ("a.json", "[" * 100_000, "is no list in JSON"),
        ("a.csv", b"image\n\xff.png\n", "is not UTF-8"),
        ("a.csv", None, "cannot be read"),
    ],
)
def test_what_is_no_list_is_one_line(name: str, text: str | bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in message_of(lambda: len(Manifest(images=str(path))))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"masks": "drawn"}, "the list names them, in its column mask; drop the key"),
        ({"images": "photos"}, "is no list (.csv .tsv .json .jsonl); of a folder write type: folder"),
        ({"ignore": [3]}, "classes: missing, so masks are not read"),
        ({"classes": CLASSES, "mapping": {5: "tree"}}, "tree"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
        load(Manifest, {"images": "all.csv", **options})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_bytes_end_in_a_traceback(tmp_path: Path, content: bytes) -> None:
    for suffix in (".csv", ".json", ".jsonl"):
        path = tmp_path / f"any{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError):
            len(Manifest(images=str(path), classes=CLASSES))
