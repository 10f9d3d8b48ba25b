"""`check_dataset`: the conformance test of a data set."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np

from ssl_seg.datasets import Dataset, Example
from ssl_seg.testing.common import check_config


def check_dataset(dataset: Dataset, *, reads: int = 8) -> None:
    """Raise AssertionError, with what is wrong in a sentence, for a data set that breaks the contract of `Dataset`.

    Give it a small one: all names are asked for, and `reads` examples, spread from the first to the last, are read
    four times each.
    """
    count = len(dataset)
    assert count > 0, "the data set is empty; check it with at least one image"
    _check_class_names(dataset.class_names)
    check_config(dataset, Dataset)
    names = [dataset.name(index) for index in range(count)]
    (common, times), *_ = Counter(names).most_common(1)
    assert times == 1, f"{times} images are named {common!r}; names have to be unique"

    travelled = pickle.loads(pickle.dumps(dataset))
    assert len(travelled) == count, f"{len(travelled)} images after pickling, not {count}: loader workers get a copy"
    for index in sorted({step * (count - 1) // max(1, reads - 1) for step in range(reads)}):
        example = dataset.read(index)
        where = f"read({index})"
        _check_example(where, example, len(dataset.class_names), dataset.num_channels)
        assert example.name == names[index], f"{where} is named {example.name!r}, but name({index}) is {names[index]!r}"
        assert isinstance(dataset.sequence(index), str), f"sequence({index}) is not a str; give '' where there is none"
        assert isinstance(dataset.doubt(index), str), f"doubt({index}) is not a str; give '' where there is none"
        kept = pickle.loads(pickle.dumps(example))
        _check_same_example(f"{where} is not pure: a second read", dataset.read(index), kept)
        _check_same_example(f"{where} after pickling the data set", travelled.read(index), kept)
        _check_same_label(f"label({index})", dataset.label(index), kept.label)
        example.image.fill(7)  # as a loader may, which crops in place
        if example.label is not None:
            example.label.fill(7)
        _check_same_example(f"{where}, after its arrays were written to,", dataset.read(index), kept)


def _check_class_names(names: tuple[str, ...]) -> None:
    assert isinstance(names, tuple), f"class_names is a {type(names).__name__}, not a tuple"
    assert all(isinstance(name, str) and name for name in names), f"class_names holds something but words: {names!r}"
    assert len(set(names)) == len(names), f"class_names holds a name twice: {names!r}"
    assert len(names) <= 255, f"{len(names)} classes; ids are 8 bits and 255 is ignored"


def _check_example(where: str, example: Example, num_classes: int, num_channels: int) -> None:
    assert isinstance(example, Example), f"{where} gives a {type(example).__name__}, not an Example"
    assert isinstance(example.name, str), f"the name of {where} is {example.name!r}, not a word"
    assert example.name, f"{where} has no name"
    image = example.image
    assert isinstance(image, np.ndarray), f"the image of {where} is a {type(image).__name__}, not a numpy array"
    assert image.dtype == np.uint8, f"the image of {where} is {image.dtype}, not uint8"
    wanted = (*image.shape[:2], num_channels)
    assert image.shape == wanted, f"the image of {where} is {image.shape}, not (H, W, {num_channels})"
    assert image.size, f"the image of {where} has no pixel: {image.shape}"
    assert image.flags.writeable, f"the image of {where} is read-only, which torch warns of; copy it"
    label = example.label
    if num_classes == 0:
        assert label is None, f"{where} has a label, but class_names is empty"
        return
    assert label is not None, f"{where} has no label, but class_names names {num_classes} classes"
    assert isinstance(label, np.ndarray), f"the label of {where} is a {type(label).__name__}, not a numpy array"
    assert label.dtype == np.uint8, f"the label of {where} is {label.dtype}, not uint8"
    assert label.shape == image.shape[:2], f"the label of {where} is {label.shape} for an image {image.shape}"
    assert label.flags.writeable, f"the label of {where} is read-only, which torch warns of; copy it"
    wrong = [int(value) for value in np.unique(label) if num_classes <= value != 255]
    assert not wrong, f"the label of {where} holds {wrong}; ids are 0 to {num_classes - 1}, and 255 to be ignored"


def _check_same_example(what: str, example: Example, kept: Example) -> None:
    assert example.name == kept.name, f"{what} is named {example.name!r}, not {kept.name!r}"
    assert np.array_equal(example.image, kept.image), f"{what} gives another image"
    _check_same_label(what, example.label, kept.label)


def _check_same_label(what: str, label: np.ndarray | None, kept: np.ndarray | None) -> None:
    if kept is None:
        assert label is None, f"{what} gives a label where there was none"
    else:
        assert label is not None, f"{what} gives no label where there was one"
        assert np.array_equal(label, kept), f"{what} gives another label"
