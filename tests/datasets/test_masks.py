"""What masks mean: whatever they are written as, the same picture gives the same labels, or one line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from ssl_seg.config import UserError, load, read_words
from ssl_seg.datasets.folder import Folder
from ssl_seg.images import write_image
from tests.images.test_images import png

SIZE = (4, 8)
BLACK, WHITE, GREEN, BROWN = (0, 0, 0), (255, 255, 255), (0, 255, 0), (128, 64, 0)
COLOURS = (BLACK, GREEN, BROWN)
BY_COLOUR = {"#000000": "ground", "#00ff00": "leaf", "128,64,0": "stem"}
PLANTS = ("ground", "leaf", "stem")


def ids_of(*values: int) -> np.ndarray:
    """Every value in turn, `(H, W)`."""
    return np.resize(np.array(values, dtype=np.uint8), SIZE)


def with_palette(indices: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette([channel for colour in palette for channel in colour])
    return image


def renumbered(greys: np.ndarray, order: Sequence[int]) -> Image.Image:
    """The same picture with a palette of the greys that occur, in any order, as a program that shrinks files has it."""
    palette = [grey for grey in order if grey in greys]
    indices = np.vectorize(palette.index)(greys).astype(np.uint8)
    return with_palette(indices, [(grey, grey, grey) for grey in palette])


def painted(ids: np.ndarray, order: Sequence[int]) -> Image.Image:
    """COLOURS of ids, with a palette that has them in another order."""
    return with_palette(np.vectorize(list(order).index)(ids).astype(np.uint8), [COLOURS[place] for place in order])


def few_bits(values: np.ndarray, bits: int) -> bytes:
    """A PNG of greys of 1, 2 or 4 bits."""
    spread = np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(len(values), -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(spread, axis=-1))
    return png(values.shape[1], values.shape[0], bits, 0, rows)


def folder_of(root: Path, masks: Mapping[str, Image.Image | bytes | np.ndarray], **options: Any) -> Folder:
    """A data set of these masks, each with an image of its size."""
    (root / "masks").mkdir(parents=True)
    for name, mask in masks.items():
        path = root / "masks" / f"{name}.png"
        if isinstance(mask, bytes):
            path.write_bytes(mask)
        else:
            (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path)
        with Image.open(path) as image:
            write_image(root / "images" / f"{name}.png", np.zeros((image.height, image.width, 3), dtype=np.uint8))
    return Folder(images=str(root / "images"), masks=str(root / "masks"), **options)


def labels_of(folder: Folder) -> list[list[int]]:
    return [sorted(set(folder.read(index).label.ravel().tolist())) for index in range(len(folder))]


def refusal(folder: Folder) -> str:
    with pytest.raises(UserError) as caught:
        [folder.read(index) for index in range(len(folder))]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- every way to write a picture


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, list[np.ndarray], list[str], list[int]]:
    """A number of classes, three masks of class ids and 255, how each is written, and an order of the greys."""
    classes = draw(st.integers(2, 90))
    chosen = st.sampled_from([0, 1, 17, 34, 85, classes - 1, 255]).filter(lambda grey: grey < classes or grey == 255)
    masks = [ids_of(*draw(st.lists(chosen, min_size=1, max_size=6))) for _ in range(3)]
    written = [draw(st.sampled_from(["grey", "palette", "channels", "16 bits", "few bits"])) for _ in masks]
    return classes, masks, written, draw(st.permutations(range(256)))


def write_as(how: str, greys: np.ndarray, order: Sequence[int]) -> Image.Image | bytes | np.ndarray:
    if how == "palette":
        return renumbered(greys, order)
    if how == "channels":
        return np.repeat(greys[..., None], 3, axis=-1)
    if how == "16 bits":
        return greys.astype(np.uint16)
    if how == "few bits":  # as few as keep it
        bits = next((bits for bits in (1, 2, 4) if not (greys % (255 // (2**bits - 1))).any()), None)
        return greys if bits is None else few_bits(greys // (255 // (2**bits - 1)), bits)
    return greys


def attempt(folder: Folder, index: int) -> np.ndarray | str:
    """The label, or the line that refuses it."""
    try:
        return folder.read(index).label
    except UserError as error:
        return str(error)


@given(pictures())
def test_the_same_picture_gives_the_same_labels_however_it_is_written(picture):
    classes, masks, written, order = picture
    held = {int(grey) for greys in masks for grey in np.unique(greys)}
    assume(not held <= {0, 255})  # which is a question of its own
    with tempfile.TemporaryDirectory() as root:
        ways = enumerate(zip(masks, written, strict=True))
        files = {str(number): write_as(how, greys, order) for number, (greys, how) in ways}
        folder = folder_of(Path(root), files, classes=classes)
        settled = Folder(images=folder.images, masks=folder.masks, classes=classes, mapping={255: "ignore"})
        asked = any(set(np.unique(greys)) <= {0, 255} and greys.any() for greys in masks)
        for index, greys in enumerate(masks):
            np.testing.assert_array_equal(settled.read(index).label, greys)
            label = attempt(folder, index)
            if isinstance(label, str):
                assert asked, label
                assert "mapping: {255: ignore}" in label
                assert "\n" not in label
            else:
                np.testing.assert_array_equal(label, greys)


@given(st.lists(st.tuples(st.permutations(range(3)), st.booleans()), min_size=1, max_size=3))
def test_colours_that_are_mapped_mean_the_same_by_palette_and_by_channels(masks):
    ids = ids_of(0, 1, 2, 2)
    with tempfile.TemporaryDirectory() as root:
        files = {}
        for number, (order, channels) in enumerate(masks):
            image = painted(ids, order)
            files[str(number)] = image.convert("RGB") if channels else image
        folder = folder_of(Path(root), files, classes=PLANTS, mapping=BY_COLOUR)
        for index in range(len(masks)):
            np.testing.assert_array_equal(folder.read(index).label, ids)


# ---- palettes


def test_greys_in_any_order_are_ids_and_that_is_told(tmp_path):
    greys = ids_of(0, 1, 3, 11, 255)
    masks = {"a": renumbered(greys, (3, 255, 0, 11, 1)), "b": renumbered(greys, (11, 1, 0, 3, 255)), "c": greys}
    folder = folder_of(tmp_path, masks, classes=11, ignore=(11,))
    assert labels_of(folder) == [[0, 1, 3, 255]] * 3
    (note,) = folder.notes()
    assert (
        note == f"{tmp_path}/masks: palettes of greys: the greys are taken for ids (0, 1, 3, 11, 255), not the indices"
    )
    assert folder.notes(with_labels=False) == ()


def test_indices_are_ids_where_greys_are_no_classes_and_that_is_told(tmp_path):
    spread = [(grey, grey, grey) for grey in (0, 60, 120, 240)]
    masks = {"a": with_palette(ids_of(0, 1, 2), spread[:3]), "b": with_palette(ids_of(0, 3), spread)}
    folder = folder_of(tmp_path, masks, classes=4)
    assert labels_of(folder) == [[0, 1, 2], [0, 3]]
    assert "the indices are taken for ids (0, 1, 2, 3), since grey 60 is no class" in folder.notes()[0]


def test_one_reading_holds_for_all_masks_of_a_folder(tmp_path):
    # Alone, the greys of the second would all be classes.
    spread = [(grey, grey, grey) for grey in (0, 3, 6, 9)]
    masks = {"a": with_palette(ids_of(2, 3), spread), "b": with_palette(ids_of(0, 1), spread)}
    assert labels_of(folder_of(tmp_path, masks, classes=5)) == [[2, 3], [0, 1]]


def test_greys_among_colours_are_only_for_viewers(tmp_path):
    # The wall of ADE20K is of grey 120, and there are 150 classes.
    masks = {"a": with_palette(ids_of(0, 1), [BLACK, (120, 120, 120), (180, 120, 120)])}
    folder = folder_of(tmp_path, masks, classes=150)
    assert labels_of(folder) == [[0, 1]]
    assert folder.notes() == ()


@pytest.mark.parametrize("shade", [0, 255])
def test_a_palette_that_shows_all_alike_tells_nothing(tmp_path, shade):
    alike = [(shade, shade, shade)] * 256
    masks = {"a": with_palette(ids_of(0, 1), alike), "b": with_palette(ids_of(2), alike)}
    folder = folder_of(tmp_path, masks, classes=3)
    assert labels_of(folder) == [[0, 1], [2]]
    assert folder.notes() == ()
    assert "b.png" in refusal(Folder(images=folder.images, masks=folder.masks, classes=2))


def test_palettes_that_differ_are_refused_with_both_ways_to_write_it(tmp_path):
    ids = ids_of(0, 1, 2)
    masks = {"a": painted(ids, (0, 1, 2)), "b": painted(ids, (2, 0, 1))}
    folder = folder_of(tmp_path, masks, classes=PLANTS)
    message = refusal(folder)
    assert (
        f"{tmp_path}/masks/b.png: its palette gives #804000 the index 0, and that of {tmp_path}/masks/a.png" in message
    )
    assert "mapping: {'#000000': CLASS, '#00ff00': CLASS, '#804000': CLASS}" in message
    assert "mapping: {0: 0, 1: 1, 2: 2} where indices are right" in message
    files = {"images": folder.images, "masks": folder.masks, "classes": PLANTS}
    assert labels_of(Folder(**files, mapping=BY_COLOUR)) == [[0, 1, 2]] * 2
    stored = [Folder(**files, mapping={0: 0, 1: 1, 2: 2}).read(index).label[0, 0] for index in range(2)]
    assert stored == [0, 1]


def test_palettes_may_differ_in_what_no_mask_uses(tmp_path):
    masks = {
        "a": with_palette(ids_of(0, 1), [BLACK, GREEN, WHITE]),
        "b": with_palette(ids_of(0, 2), [BLACK, WHITE, BROWN]),
    }
    assert labels_of(folder_of(tmp_path, masks, classes=PLANTS)) == [[0, 1], [0, 2]]


def test_a_colour_of_two_indices_is_refused(tmp_path):
    masks = {
        "a": with_palette(ids_of(0, 1), [BLACK, GREEN, BROWN]),
        "b": with_palette(ids_of(0, 2), [BLACK, WHITE, GREEN]),
    }
    assert "b.png: its palette gives #00ff00 the index 2" in refusal(folder_of(tmp_path, masks, classes=PLANTS))


def test_a_colour_that_no_mapping_names_is_told(tmp_path):
    masks = {"a": painted(ids_of(0, 1, 2), (1, 0, 2))}
    folder = folder_of(tmp_path, masks, classes=PLANTS, mapping={"#000000": 0, "#00ff00": 1})
    assert "colours #804000 are in no mapping" in refusal(folder)


def test_indices_that_are_mapped_too_are_read_where_colours_are_not_all_named(tmp_path):
    masks = {"a": painted(ids_of(0, 1, 2), (1, 0, 2))}
    folder = folder_of(tmp_path, masks, classes=PLANTS, mapping={"#ff0000": 0, 0: 2, 1: 1, 2: "ignore"})
    assert folder.read(0).label[0, :3].tolist() == [1, 2, 255]  # what is 0 is stored as 1


def test_grey_masks_are_read_by_colour_where_colours_alone_are_mapped(tmp_path):
    masks = {"a": ids_of(0, 255), "b": few_bits(ids_of(0, 1), 1), "c": with_palette(ids_of(0, 1), [WHITE, BLACK])}
    folder = folder_of(tmp_path, masks, classes=2, mapping={"#000000": 0, "#ffffff": 1})
    assert [folder.read(index).label[0, :2].tolist() for index in range(3)] == [[0, 1], [0, 1], [1, 0]]


def test_greys_and_indices_that_are_both_no_classes_are_told(tmp_path):
    masks = {"a": with_palette(ids_of(0, 1, 2, 3), [(grey, grey, grey) for grey in (0, 9, 1, 8)])}
    message = refusal(folder_of(tmp_path, masks, classes=3))
    assert "neither the greys (0, 1, 8, 9) nor the indices (0, 1, 2, 3) are classes (0 to 2" in message


# ---- black and white


def test_0_and_255_alone_are_asked_about_whatever_the_number_of_classes(tmp_path):
    masks = {"a": ids_of(0), "b": np.repeat(ids_of(0, 255)[..., None], 3, axis=-1)}
    folder = folder_of(tmp_path, masks, classes=PLANTS)
    message = refusal(folder)
    assert f"{tmp_path}/masks: all masks hold only 0 and 255 for 3 classes" in message
    assert "mapping: {255: 1} if 255 is 'leaf', or mapping: {255: ignore}" in message
    files = {"images": folder.images, "masks": folder.masks, "classes": PLANTS}
    assert labels_of(Folder(**files, mapping={255: 1})) == [[0], [0, 1]]
    assert labels_of(Folder(**files, mapping={255: "ignore"})) == [[0], [0, 255]]
    Image.fromarray(ids_of(0, 2)).save(tmp_path / "masks" / "a.png")
    assert labels_of(Folder(**files)) == [[0, 2], [0, 255]]  # one mask of many may hold no more


def test_white_of_one_bit_is_1(tmp_path):
    masks = {"a": few_bits(ids_of(0, 1), 1), "b": with_palette(ids_of(0, 1), [BLACK, WHITE])}
    folder = folder_of(tmp_path, masks, classes=2)
    assert labels_of(folder) == [[0, 1]] * 2
    assert folder.notes() == ()
    wide = Folder(images=folder.images, masks=folder.masks, classes=2, mapping={255: 1})
    assert labels_of(wide) == [[0, 1]] * 2


@pytest.mark.parametrize(
    "masks",
    [
        {"a": few_bits(ids_of(1), 1), "b": ids_of(0, 1, 2)},  # a program made one bit of 255, or a person of an object
        {"a": with_palette(ids_of(0, 1), [WHITE, BLACK])},
    ],
    ids=["beside ids", "white first"],
)
def test_white_that_may_be_an_id_or_ignored_is_asked_about(tmp_path, masks):
    folder = folder_of(tmp_path, masks, classes=3)
    assert "stores white as" in refusal(folder)
    assert "mapping: {1: 1, 255: 1} if it is 'class_1', or mapping: {255: ignore}" in refusal(folder)
    files = {"images": folder.images, "masks": folder.masks, "classes": 3}
    for mapping, expected in (({1: 1, 255: 1}, 1), ({255: "ignore"}, 255)):
        label = Folder(**files, mapping=mapping).read(0).label
        assert label[0, 0] == expected


# ---- ids


@pytest.mark.parametrize("number", [1, ("leaf",)])
def test_one_class_is_refused_with_the_form_for_two(tmp_path, number):
    message = refusal(folder_of(tmp_path, {"a": ids_of(0, 255)}, classes=number))
    name = "leaf" if number == ("leaf",) else "class_0"
    assert f"one class, '{name}', leaves nothing to tell it from; write classes: [background, {name}]" in message
    assert "mapping: {255: 1}" in message


@pytest.mark.parametrize("ignored", [{"ignore": (0,)}, {"mapping": {0: "ignore"}}])
def test_a_first_class_that_is_ignored_is_asked_about_with_whole_mappings(tmp_path, ignored):
    folder = folder_of(tmp_path, {"a": ids_of(0, 1, 2)}, classes=("leaf", "stem", "soil"), **ignored)
    message = refusal(folder)
    assert "id 0 is ignored, which is class 'leaf'" in message
    assert "mapping: {0: ignore, 1: 0, 2: 1, 3: 2} if 1 is 'leaf'" in message
    assert "mapping: {0: ignore, 1: 1, 2: 2} if 1 is 'stem'" in message
    files = {"images": folder.images, "masks": folder.masks, "classes": ("leaf", "stem", "soil")}
    assert labels_of(Folder(**files, mapping={0: "ignore", 1: 0, 2: 1, 3: 2})) == [[0, 1, 255]]
    assert labels_of(Folder(**files, mapping={0: "ignore", 1: 1, 2: 2})) == [[1, 2, 255]]


def test_the_hint_for_one_id_too_many_has_the_whole_mapping(tmp_path):
    message = refusal(folder_of(tmp_path, {"a": ids_of(0, 1, 2, 3)}, classes=("leaf", "stem", "soil")))
    assert "ids 3 are no class" in message
    assert "if 1 is 'leaf' and 0 is unlabelled, write mapping: {0: ignore, 1: 0, 2: 1, 3: 2}" in message
    numbered = refusal(folder_of(tmp_path / "numbered", {"a": ids_of(0, 1, 2)}, classes=("1", "2")))
    assert "write mapping: {0: ignore, 1: 1, 2: 2}" in numbered


def test_ids_that_begin_with_1_are_noticed_where_classes_are_missing(tmp_path):
    message = refusal(folder_of(tmp_path, {"a": ids_of(1, 2, 3, 255)}))
    assert "write classes: 4" in message
    assert "classes: 3 and mapping: {0: ignore, 1: 0, 2: 1, 3: 2}" in message


# ---- words


def in_yaml(classes: str, mapping: str = "{}") -> Folder:
    return load(Folder, read_words(["images=i", "masks=m", f"classes={classes}", f"mapping={mapping}"]))


@pytest.mark.parametrize(
    ("classes", "mapping", "words"),
    [
        ("[on, off]", "{0: 0}", "classes: True is what YAML makes of yes, on and true; put the word in quotes"),
        ("[se, no, dk]", "{0: se}", "classes: False is what YAML makes of no, off and false"),
        ("yes", "{}", "classes: give 2 to 255 different names"),
        ("['on', 'off']", "{0: on, 255: off}", "mapping: True is what YAML makes of yes, on and true"),
        ("[a, null]", "{}", "classes: None is no word; put names in quotes"),
        ("[a, 1.50]", "{}", "classes: 1.5 is no word"),
        ("[a, ignore]", "{3: ignore}", "a class is called ignore"),
        ("[1, 2, 3]", "{10: 0}", "mapping 10: 0 is no class; write one of 1, 2, 3 or ignore"),
    ],
)
def test_words_that_yaml_reads_as_something_else_are_refused(classes, mapping, words):
    with pytest.raises(UserError) as caught:
        in_yaml(classes, mapping)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "mapping", "stored", "expected"),
    [
        ("['on', 'off']", "{0: 'on', 255: 'off'}", [0, 255], [0, 1]),
        ("[1, 2, 3]", "{10: 1, 20: '2', 30: ignore}", [10, 20, 30], [0, 1, 255]),
        ("['01', '02']", "{10: '02'}", [10], [1]),
        ("[a, b]", "{10: 1, 20: '0'}", [10, 20], [1, 0]),
    ],
)
def test_names_come_before_ids(tmp_path, classes, mapping, stored, expected):
    config = in_yaml(classes, mapping)
    again = load(Folder, json.loads(json.dumps(config.dump())))
    assert again == config
    folder = folder_of(tmp_path, {"a": ids_of(*stored)}, classes=config.classes, mapping=config.mapping)
    assert folder.read(0).label[0, : len(stored)].tolist() == expected
