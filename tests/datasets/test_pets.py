"""Oxford-IIIT Pet by its own layout, beside torchvision's class on the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import OxfordIIITPet

from ssl_seg.config import load
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.pets import CLASSES, OFFICIAL, Pets
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.testing import check_dataset
from tests.faults import message_of

SIZE = (24, 30)
LISTS = {
    "trainval": ("Abyssinian_100", "Abyssinian_101", "american_bulldog_100", "Egyptian_Mau_14", "pug_9"),
    "test": ("Abyssinian_201", "pug_201"),
}
TRIMAP = (np.arange(SIZE[0] * SIZE[1]) % 3 + 1).astype(np.uint8).reshape(SIZE)


def put_pets(root: Path, comments: bool = True) -> Path:
    """What the two archives unpack to, with what is odd in them; of the lists, the one of all images has comments."""
    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    trimaps = root / "annotations" / "trimaps"
    trimaps.mkdir(parents=True)
    for split, names in LISTS.items():
        head = ["#Image CLASS-ID SPECIES BREED ID", "#All images with 1st letter as captial are cat images"]
        lines = [f"{name} {number} 1 1" for number, name in enumerate(names, start=1)]
        (root / "annotations" / f"{split}.txt").write_text("\n".join([*head * comments, *lines, ""]))
        for name in (*names, f"unlisted_of_{split}_1"):
            Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(root / "images" / f"{name}.jpg")
            Image.fromarray(np.roll(TRIMAP, len(name))).save(trimaps / f"{name}.png")
            (trimaps / f"._{name}.png").write_bytes(b"\0\5\26\7")
    (root / "images" / "Abyssinian_100.mat").write_bytes(b"MATLAB")
    # As in the archive: pictures of other formats and modes under the same suffix.
    grey = random.integers(0, 256, SIZE, dtype=np.uint8)
    with (root / "images" / "Egyptian_Mau_14.jpg").open("wb") as file:
        Image.fromarray(np.dstack([grey] * 4)).save(file, format="PNG")
    with (root / "images" / "Abyssinian_101.jpg").open("wb") as file:
        Image.fromarray(grey).save(file, format="GIF")
    return root


def names_of(dataset: Dataset) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


@pytest.mark.parametrize("split", ["trainval", "test"])
@pytest.mark.parametrize("labels", [3, 2, None])
def test_it_conforms(split: str, labels: int | None, tmp_path: Path) -> None:
    pets = Pets(root=str(put_pets(tmp_path)), split=split, labels=labels)
    check_dataset(pets)
    assert names_of(pets) == [f"{name}.jpg" for name in LISTS[split]], "those of the list, in its order"
    assert pets.class_names == CLASSES[: labels or 0]
    assert load(Dataset, pets.dump()) == pets


@pytest.mark.filterwarnings("ignore:.*unclosed file", "ignore:Exception ignored in")  # torchvision's
def test_images_and_trimaps_are_torchvision_s(tmp_path: Path) -> None:
    put_pets(tmp_path / "oxford-iiit-pet", comments=False)  # which torchvision takes for images
    for split in LISTS:
        theirs = OxfordIIITPet(str(tmp_path), split=split, target_types=["category", "segmentation"])
        ours = Pets(root=f"{tmp_path}/oxford-iiit-pet", split=split)
        assert len(ours) == len(theirs) == len(LISTS[split])
        for index, (image, (_, trimap)) in enumerate(theirs):
            example = ours.read(index)
            if example.name == "Egyptian_Mau_14.jpg":
                continue  # torchvision drops alpha, and here white shows through
            np.testing.assert_array_equal(example.image, np.asarray(image))
            np.testing.assert_array_equal(example.label, np.asarray(trimap) - 1)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    pets = Pets(root=str(put_pets(tmp_path)))
    stored = np.asarray(Image.open(tmp_path / "images" / "Egyptian_Mau_14.jpg")).astype(float)
    white = 255 - stored[..., 3:] * (1 - stored[..., :3] / 255)
    np.testing.assert_allclose(pets.image(3).image, white, atol=1)


def test_the_border_is_a_class_or_ignored(tmp_path: Path) -> None:
    put_pets(tmp_path)
    border = Pets(root=str(tmp_path)).label(0) == CLASSES.index("border")
    two = Pets(root=str(tmp_path), labels=2).label(0)
    assert border.any()
    np.testing.assert_array_equal(two == 255, border)
    assert set(np.unique(two)) == {0, 1, 255}


def test_a_pool_needs_no_trimaps(tmp_path: Path) -> None:
    put_pets(tmp_path)
    (tmp_path / "annotations" / "trimaps").rename(tmp_path / "elsewhere")
    pool = Pets(root=str(tmp_path))
    assert pool.image(0).label is None
    assert pool.image(0).image.shape == (*SIZE, 3)
    assert len(pool.notes(with_labels=False)) == 1, "how many of the published images are there"
    check_dataset(Pets(root=str(tmp_path), labels=None))
    message = message_of(lambda: pool.notes(with_labels=True))
    assert message.startswith(f"{tmp_path}: no mask for 5 of the 5 images (annotations/trimaps/Abyssinian_100.png, ")
    assert "unpack annotations.tar.gz there, or remove these images" in message
    assert message_of(lambda: pool.read(0)) == message


def test_listed_images_that_are_not_there_are_left_out_and_told(tmp_path: Path) -> None:
    put_pets(tmp_path)
    (tmp_path / "images" / "pug_9.jpg").unlink()
    (tmp_path / "annotations" / "trimaps" / "pug_9.png").unlink()
    pets = Pets(root=str(tmp_path))
    assert names_of(pets) == [f"{name}.jpg" for name in LISTS["trainval"][:-1]]
    (note,) = pets.notes()
    assert note == f"{tmp_path}: 4 images of this split of pets are there, of 3,680 that were published"


def test_a_whole_split_is_not_told_of(tmp_path: Path) -> None:
    names = [f"breed_of_no_name_{number}" for number in range(3669)]
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "test.txt").write_text("\n".join(f"{name} 1 1 1" for name in names))
    for name in names:
        (tmp_path / "images" / f"{name}.jpg").touch()
    whole = Pets(root=str(tmp_path), split="test")
    assert len(whole) == 3669
    assert whole.notes(with_labels=False) == ()


def test_what_is_missing_is_told_with_its_archive(tmp_path: Path) -> None:
    pets = {"root": str(tmp_path)}
    said = f"{tmp_path}: no folder images in it, as pets has; unpack images.tar.gz there, or give as root the folder"
    assert message_of(lambda: len(Pets(**pets))).startswith(said)
    (tmp_path / "images.tar.gz").touch()
    assert "unpack images.tar.gz, which lies there, or" in message_of(lambda: len(Pets(**pets)))
    (tmp_path / "images").mkdir()
    assert "no folder annotations in it" in message_of(lambda: len(Pets(**pets)))
    (tmp_path / "annotations").mkdir()
    said = f"{tmp_path}/annotations/trainval.txt: cannot be read (No such file or directory); unpack annotations.tar.gz"
    assert message_of(lambda: len(Pets(**pets))).startswith(said)
    (tmp_path / "annotations" / "trainval.txt").write_text("pug_1 1 1 1\n")
    assert "images: none of the images that annotations/trainval.txt lists" in message_of(lambda: len(Pets(**pets)))
    assert "no folder images" in message_of(lambda: len(Pets(root=f"{tmp_path}/none")))


@pytest.mark.parametrize("line", ["pug_2", "../pug_2 1 1 1", "pug_2 1 1 1 1", "pug/2 1 1 1"])
def test_a_list_of_another_form_is_refused(line: str, tmp_path: Path) -> None:
    put_pets(tmp_path)
    (tmp_path / "annotations" / "trainval.txt").write_text(f"pug_9 1 1 1\n\n{line}\n")
    message = message_of(lambda: len(Pets(root=str(tmp_path))))
    assert f"{tmp_path}/annotations/trainval.txt: line 3 is no name with class, species and breed" in message


def test_masks_of_another_kind_and_size_are_refused(tmp_path: Path) -> None:
    pets = Pets(root=str(put_pets(tmp_path)))
    path = tmp_path / "annotations" / "trimaps" / "Abyssinian_100.png"
    Image.fromarray(TRIMAP - 1).save(path)
    message = message_of(lambda: pets.read(0))
    assert message.startswith(f"{path}: is no mask of pets, for it holds ids 0; unpack annotations")
    Image.fromarray(np.dstack([TRIMAP, TRIMAP, TRIMAP * 2])).save(path)
    assert "is no mask of pets, for it holds colours" in message_of(lambda: pets.read(0))
    Image.fromarray(TRIMAP[:-1]).save(path)
    assert f"{path}: 23 x 30 pixels (H x W), but its image" in message_of(lambda: pets.read(0))


def test_images_that_exif_turns_are_told(tmp_path: Path) -> None:
    put_pets(tmp_path)
    path = tmp_path / "images" / "pug_9.jpg"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)
    *_, note = Pets(root=str(tmp_path)).notes()
    assert "EXIF turns or mirrors 1 of the images (images/pug_9.jpg)" in note


def test_the_recipe_loads() -> None:
    config = load(FinetuneConfig, ["pets_labelled", "data.labelled.root=a", "data.val.root=a"])
    assert config.data.labelled == Pets(root="a", split="trainval")
    assert config.data.val == Pets(root="a", split="test")
    assert config.train.encoder_lr == 0
    assert config.train.steps * config.train.batch_size // OFFICIAL["trainval"] == 20
    assert config.data.resize == (128, 128)


@pytest.mark.parametrize(("fields", "words"), [({"split": "train"}, "split"), ({"labels": 4}, "labels"), ({}, "root")])
def test_a_wrong_key_is_one_line(fields: dict[str, object], words: str) -> None:
    given = {"root": "r"} if fields else {}
    assert message_of(lambda: load(Dataset, {"type": "pets", **given, **fields})).startswith(words)
