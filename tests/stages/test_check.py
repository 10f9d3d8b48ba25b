"""`ssl-seg check`: faults planted in folders are each found, and nothing else; the command it ends with trains."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from ssl_seg import cli, images
from ssl_seg.cli import training
from ssl_seg.config import UserError, load
from ssl_seg.datasets.guess import Held, guess
from ssl_seg.datasets.masks import IGNORE, Meaning
from ssl_seg.leaks import guard
from ssl_seg.stages.check import Checked, check
from ssl_seg.stages.findings import Finding
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.stages.pretrain import PretrainConfig
from tests.small import MODEL, UNTRACKED

SIZE = (70, 90)
SHORT = ["train.steps=2", "train.batch_size=2", "train.workers=0", "train.device=cpu", "augment.crop=[64,64]"]
SHORT += [f"model={json.dumps(MODEL)}", f"tracking={json.dumps(UNTRACKED)}"]


def picture(seed: int) -> np.ndarray:
    """No two are alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (23, 30, 3), dtype=np.uint8)
    return cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC)


def ids(seed: int, classes: int = 2) -> np.ndarray:
    """Stripes of all classes, as wide as the seed says."""
    return (np.add.outer(np.arange(SIZE[0]), np.zeros(SIZE[1])) // (8 + seed % 3) % classes).astype(np.uint8)


def name(number: int) -> str:
    """Letters alone, which are no numbering."""
    return f"{'abcdefghijklmnopqrstuvwxyz'[number]}x"


def write(folder: Path, count: int = 12, **change: Any) -> Path:
    """Images and masks; `change` gives each mask another form."""
    for number in range(count):
        images.write_image(folder / "images" / f"{name(number)}.png", picture(number))
        images.write_mask(folder / "masks" / f"{name(number)}.png", change.get("mask", ids)(number))
    return folder


def of(folder: Path, *, masks: bool = True, out: Path | None = None, **values: Any) -> Checked:
    """As the command asks of folders."""
    given = {"type": "folder", "images": str(folder / "images"), **({"masks": str(folder / "masks")} if masks else {})}
    kind, part = (FinetuneConfig, "labelled") if masks else (PretrainConfig, "pool")
    tasks = {} if masks else {"tasks": {"denoise": {}}}
    config = load(kind, {"data": {part: {**given, **values}}, **tasks, "train": {"workers": 0}})
    return check(config, out, quiet=True, propose=True)


def kinds(found: Sequence[Finding]) -> list[tuple[str, tuple[str, ...]]]:
    return sorted((one.kind, one.files) for one in found)


def run(*words: object) -> int:
    return cli.run(partial(cli.app, args=[str(word) for word in words], prog_name="ssl-seg", standalone_mode=False))


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Fourteen faults among twenty-two images."""
    folder = write(tmp_path / "planted", 22, mask=lambda number: ids(number, 3))
    pictures, masks = folder / "images", folder / "masks"
    whole = (pictures / "ax.png").read_bytes()
    (pictures / "ax.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "bx.png").write_bytes(b"")
    (masks / "cx.png").write_bytes(b"no picture")
    images.write_mask(masks / "dx.png", ids(3, 3)[:-1])
    strange = ids(4, 3)
    strange[3, 3] = 9
    images.write_mask(masks / "ex.png", strange)
    images.write_mask(masks / "fx.png", np.zeros(SIZE, np.uint8))
    images.write_mask(masks / "gx.png", np.full(SIZE, IGNORE, np.uint8))
    (masks / "hx.png").rename(masks / "hx_mask.png")
    (masks / "ix.png").unlink()
    images.write_mask(masks / "quite_another.png", ids(0))
    Image.fromarray(picture(9)[..., 0]).save(pictures / "jx.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (pictures / "kx.png").unlink()
    Image.fromarray(picture(10)).save(pictures / "kx.jpg", exif=exif, quality=95)
    (masks / "lx.png").unlink()
    Image.fromarray(ids(11)).save(masks / "lx.jpg")
    images.write_image(pictures / "mx.png", picture(13))  # as nx
    images.write_image(pictures / "ox.png", picture(15)[:, ::-1])  # as px, mirrored
    return folder


def test_planted_faults_are_each_found_and_nothing_else(planted: Path) -> None:
    found = of(planted, classes=["ground", "leaf", "stem"])
    assert kinds(found.faults) == [
        ("ids", ("ex.png",)),
        ("image", ("ax.png",)),
        ("image", ("bx.png",)),
        ("mask", ("cx.png",)),
        ("no mask", ("hx.png",)),
        ("no mask", ("ix.png",)),
        ("no mask", ("lx.png",)),
        ("size", ("dx.png",)),
        ("size", ("kx.jpg",)),
    ]
    text = {one.files[0]: one.text for one in found.faults}
    assert "damaged or cut off" in text["ax.png"]
    assert "empty (0 bytes)" in text["bx.png"]
    assert "ids 9 are no class" in text["ex.png"]
    assert "the nearest is hx_mask.png" in text["hx.png"]
    assert "none that is near" in text["ix.png"]
    assert "lx.jpg is in a lossy format" in text["lx.png"]
    assert "69 x 90 pixels (H x W), but its image" in text["dx.png"]
    assert "turned by its EXIF orientation (6)" in text["kx.jpg"]
    noted = [one for one in found.notes if one.kind not in ("folder", "small")]
    assert kinds(noted) == [
        ("ignored", ("gx.png",)),
        ("kinds", ()),
        ("no image", ("quite_another.png",)),
        ("single", ("fx.png",)),
        ("twice", ("mx.png", "nx.png")),
        ("twice", ("ox.png", "px.png")),
    ]
    told = {one.kind: one.text for one in noted}
    assert "1 of 18 masks show one class only: 1 ground (fx.png)" in told["single"]
    assert "19 of 8 bits RGB" in told["kinds"]
    assert "1 of 8 bits grey (jx.png)" in told["kinds"]
    assert "mirrored" in told["twice"]
    assert found.command is None
    (part,) = found.parts
    assert (part.images, part.masks) == (22, 18)


def test_counts_are_those_of_the_masks(tmp_path: Path) -> None:
    masks = [np.random.default_rng(number).integers(0, 3, SIZE).astype(np.uint8) for number in range(6)]
    masks[0][masks[0] == 2] = 0
    masks[1][:5] = IGNORE
    (part,) = of(write(tmp_path, 6, mask=masks.__getitem__)).parts
    every = np.concatenate([mask.ravel() for mask in masks])
    counted = every[every != IGNORE]
    assert [own.share for own in part.classes] == pytest.approx([(counted == own).mean() for own in range(3)])
    assert [own.masks for own in part.classes] == [6, 6, 5]
    assert part.ignored == pytest.approx((every == IGNORE).mean())
    assert part.values == ("0", "1", "2", "255")
    assert part.sizes == {"90 x 70": 6}
    assert part.kinds == {"8 bits RGB": 6}


def test_a_clean_folder_is_told_so_and_its_command_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("labelled data"), mask=lambda number: ids(number) * 255)
    assert run("check", "labelled data", "--classes", "ground, green leaf", "train.workers=0", "--out", "look") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "images  12, all 90 x 70, 8 bits RGB"
    assert said[1].startswith("masks   12, 2 values; classes: ground 5")
    assert any("mapping: {255: 1}" in line for line in said)
    assert images.read_image("look/sheet.png").shape[1] > 900
    assert json.loads(Path("look/check.json").read_text())["faults"] == []
    (command,) = [line.removeprefix("next: ") for line in said if line.startswith("next: ")]
    program, *words = shlex.split(command)
    assert program == "ssl-seg"
    assert run(*words, *SHORT, "--quiet") == 0
    assert Path("runs/first/result.json").is_file()
    assert run("check", "labelled data", "train.workers=0", "--quiet") == 0
    assert "--out runs/first_2" in capsys.readouterr().out


def test_images_alone_are_a_pool_and_the_command_pretrains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("photos"))
    assert run("check", "photos/images", "train.workers=0", "--quiet", "--out", "look") == 0
    assert images.read_image("look/sheet.png").shape == (24 + 3 * (24 + 240 + 4) - 4, 4 * 240 + 3 * 4, 3)
    said = capsys.readouterr().out.splitlines()
    assert not [line for line in said if line.startswith("masks")]
    (command,) = [line.removeprefix("next: ") for line in said if line.startswith("next: ")]
    assert run(*shlex.split(command)[1:], *SHORT, "--quiet") == 0
    assert Path("runs/first/encoder").is_dir()


def test_json_alone_is_on_stdout(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", planted / "images", planted / "masks", "--json", "train.workers=0") == 1
    record = json.loads(capsys.readouterr().out)
    assert {own["kind"] for own in record["faults"]} == {"image", "mask", "ids", "no mask", "size"}
    assert record["command"] is None


def test_of_a_config_every_part_is_looked_at_and_a_leak_between_them_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, first in (("labelled", 0), ("val", 12)):
        for number in range(6):
            images.write_image(tmp_path / part / "images" / f"{name(number)}.png", picture(first + number))
            images.write_mask(tmp_path / part / "masks" / f"{name(number)}.png", ids(number))
    images.write_image(tmp_path / "val" / "images" / "zz.png", picture(2))
    images.write_mask(tmp_path / "val" / "masks" / "zz.png", ids(2))
    config = tmp_path / "mine.yaml"
    lines = ["data:"]
    for part in ("labelled", "val"):
        folder = tmp_path / part
        lines.append(f"  {part}: {{type: folder, images: {folder}/images, masks: {folder}/masks, classes: 2}}")
    config.write_text("\n".join(lines))
    assert run("check", config, "train.workers=0", "--json", "--quiet") == 1
    record = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in record["parts"]] == ["labelled", "val"]
    (leak,) = record["faults"]
    assert (leak["kind"], leak["part"], leak["files"]) == ("leak", "labelled", ["cx.png", "zz.png"])
    (tmp_path / "val" / "images" / "zz.png").unlink()
    assert run("check", config, "train.workers=0", "--quiet") == 0
    assert f"next: ssl-seg finetune {config} train.workers=0 --out runs/first" in capsys.readouterr().out
    assert run("check", config, "data.val.classes=3", "train.workers=0", "--quiet") == 1
    assert "data.val: its classes" in capsys.readouterr().out


def test_a_data_set_that_is_no_folder_is_looked_at_too() -> None:
    config = load(PretrainConfig, {"data": {"pool": {"type": "synthetic", "count": 3}}, "tasks": {"denoise": {}}})
    found = check(config, quiet=True, words=["mine.yaml"])
    assert found.parts[0].images == 3
    assert found.command == "ssl-seg pretrain mine.yaml --out runs/first"


def test_frames_of_a_video_are_told(tmp_path: Path) -> None:
    """A camera that moves on over a wide picture."""
    wide = cv2.resize(np.random.default_rng(5).integers(0, 256, (20, 400, 3), dtype=np.uint8), (1200, 70))
    for number in range(40):
        images.write_image(tmp_path / "images" / f"clip_{number:03}.png", wide[:, 4 * number : 4 * number + 90])
    found = of(tmp_path, masks=False)
    (told,) = [one for one in found.notes if one.kind == "neighbours"]
    assert "images are frames beside others of a video (clip_0" in told.text
    assert len(told.files) >= 38


def test_copies_are_told_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In halves, and bit by bit: of three copies two are told, each once."""
    monkeypatch.setattr(guard, "FEW", 8)
    for number in range(26):
        copied = {3: 20, 11: 20, 4: 6}.get(number, number)
        images.write_image(tmp_path / "images" / f"{name(number)}.png", picture(copied))
    found = [set(one.files) for one in of(tmp_path, masks=False).notes if one.kind == "twice"]
    groups = [set(map(name, own)) for own in ((3, 11, 20), (4, 6))]
    assert sorted(len(pair) for pair in found) == [2, 2, 2]
    assert sum({file.removesuffix(".png") for file in pair} <= groups[0] for pair in found) == 2
    assert sum({file.removesuffix(".png") for file in pair} == groups[1] for pair in found) == 1


def test_sixteen_bits_get_a_range_and_it_is_in_the_command(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        deep = picture(number)[..., 0].astype(np.uint16) * 16
        Image.fromarray(deep).save(tmp_path / "images" / f"{name(number)}.png")
    found = of(tmp_path, masks=False)
    assert found.parts[0].suggested == {"range": [0.0, 4095.0]}
    assert found.parts[0].kinds == {"16 bits grey": 6}
    (told,) = [one.text for one in found.notes if one.kind == "dark"]
    assert "range: [0, 4095] is taken" in told
    assert found.command is not None
    assert typed(found.command)["data"]["pool"]["range"] == [0, 4095]
    Image.fromarray(picture(9)).save(tmp_path / "images" / "zz.png")
    assert of(tmp_path, masks=False).parts[0].suggested == {}, "with 8 bits beside them there can be none"


def test_floats_without_a_white_get_one(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.fromarray(picture(number)[..., 0].astype(np.float32) / 255 - 0.5).save(
            tmp_path / "images" / f"{name(number)}.tif"
        )
    found = of(tmp_path, masks=False)
    assert not found.faults
    low, high = found.parts[0].suggested["range"]
    assert -0.5 <= low < 0 < high <= 0.5


def typed(command: str) -> dict[str, Any]:
    """The values that a proposed command stands for."""
    stage, *words = shlex.split(command.removeprefix("ssl-seg "))
    options = {}
    while words[0].startswith("--") and words[0] != "--out":
        options[words[0].removeprefix("--")] = words[1]
        del words[:2]
    read = training.finetune_values if stage == "finetune" else training.pretrain_values
    return read(words[: words.index("--out")], **options)


@pytest.mark.parametrize(
    "words", [["classes=2"], ["classes=2", "ignore=[7]"], ["classes=[a,b]", "mapping={0: 1, 1: 0}"]]
)
def test_keys_that_were_typed_are_said_once(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "my pictures", 6)
    folders = [str(tmp_path / "my pictures" / name) for name in ("images", "masks")]
    assert run("check", *folders, *(f"data.labelled.{word}" for word in words), "train.workers=0") == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    config = load(FinetuneConfig, typed(command.removeprefix("next: ")))
    given = ["type=folder", f"images={folders[0]}", f"masks={folders[1]}", *words]
    asked = load(FinetuneConfig, [f"data.labelled.{word}" for word in given])
    assert config.data.labelled.label(0).tolist() == asked.data.labelled.label(0).tolist()
    assert config.train.workers == 0


def test_names_that_an_option_cannot_say_are_in_a_key(tmp_path: Path) -> None:
    write(tmp_path, 6)
    names = ["a, b", "on"]
    found = of(tmp_path, classes=names)
    assert found.command is not None
    assert "--classes" not in found.command
    assert typed(found.command)["data"]["labelled"]["classes"] == names


def coloured(number: int) -> np.ndarray:
    return np.array([(0, 0, 0), (0, 255, 0), (128, 64, 0)], np.uint8)[ids(number, 3)]


@pytest.mark.parametrize(
    ("form", "classes", "mapping", "ignore"),
    [
        (lambda n: ids(n, 3), 3, None, ()),
        (lambda n: ids(n) * 255, 2, {"255": 1}, ()),
        (lambda n: ids(n, 3) + 1, 3, {"1": 0, "2": 1, "3": 2}, ()),
        (lambda n: np.array([0, 1, 250], np.uint8)[ids(n, 3)], 2, None, (250,)),
        (lambda n: np.array([0, 7, 8, 11], np.uint8)[ids(n, 4)], 4, {"7": 1, "8": 2, "11": 3}, ()),
        (coloured, 3, {"#000000": 0, "#00ff00": 1, "#804000": 2}, ()),
    ],
    ids=["ids", "black and white", "from one", "a gap", "gaps", "colours"],
)
def test_what_values_mean_is_proposed_and_can_be_read(
    form: Any, classes: int, mapping: Mapping[str, int] | None, ignore: tuple[int, ...], tmp_path: Path
) -> None:
    write(tmp_path, 6, mask=lambda number: ids(number))
    for number in range(6):
        images.write_image(tmp_path / "masks" / f"{name(number)}.png", form(number))
    found = of(tmp_path)
    assert not found.faults
    suggested = found.parts[0].suggested
    assert len(suggested["classes"]) == classes
    assert suggested.get("mapping") == mapping
    assert tuple(suggested.get("ignore", ())) == ignore
    assert found.command is not None
    folder = load(FinetuneConfig, typed(found.command)).data.labelled
    stored, label = form(0), folder.label(0)
    assert label is not None
    assert set(np.unique(label)) <= {*range(classes), IGNORE}
    assert (label == IGNORE).mean() == pytest.approx((stored == 250).mean() if ignore else 0)


def test_smoothed_edges_are_a_fault(tmp_path: Path) -> None:
    def disc(number: int) -> np.ndarray:
        return cv2.GaussianBlur(cv2.circle(np.zeros(SIZE, np.uint8), (45, 35), 20 + number, 255, -1), (0, 0), 1)

    write(tmp_path, 4, mask=disc)
    (fault, *_) = of(tmp_path).faults
    assert "edges that were smoothed" in fault.text


@given(
    st.dictionaries(st.integers(0, 255), st.integers(1, 1000), min_size=2, max_size=12),
    st.integers(0, 12),
    st.integers(1, 50),
)
def test_what_is_proposed_is_always_a_meaning(pixels: dict[int, int], named: int, masks: int) -> None:
    """Where no names are given it fits all that most masks show; it is never refused."""
    held = Held(masks, False, pixels, dict.fromkeys(pixels, masks))
    names = tuple(f"kind {number}" for number in range(named))
    proposed = guess(held, names)
    assert proposed.classes == names or not names
    meaning = Meaning.of(proposed.classes, proposed.ignore, {str(key): own for key, own in proposed.mapping.items()})
    if not names and not proposed.fault and masks > 1 and len(proposed.classes) > 1:
        label = meaning.label(np.array([sorted(pixels)]))
        assert set(label.ravel()) <= {*range(len(proposed.classes)), IGNORE}


@given(st.lists(st.text("ab'\"$ é{},:#!\\", min_size=1, max_size=6), min_size=2, max_size=4, unique=True))
def test_names_come_through_the_shell(names: list[str]) -> None:
    from ssl_seg.stages.check import _short_words

    folder = {"type": "folder", "images": "a b/c'd", "masks": "m", "classes": names, "mapping": {"#00ff00": 0}}
    command = " ".join(["ssl-seg finetune", *_short_words("labelled", folder), "--out runs/first"])
    assert typed(command)["data"]["labelled"] | {"type": "folder"} == folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such file or recipe"),
        (["empty"], "empty: no image in it"),
        (["empty", "empty", "empty"], "check: name the folder of the images, then that of the masks"),
        (["data/images", "--classes", "a,b"], "--classes goes with these"),
        (["data/images", "--out", "data"], "--out data: exists already"),
        (["data", "data.labelled.colours=3"], "unknown key 'colours'"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("data"), 3)
    Path("empty").mkdir()
    assert run("check", *words, "train.workers=0", "--quiet") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1


def test_workers_see_the_same(planted: Path) -> None:
    config = {"data": {"labelled": {"type": "folder", "images": f"{planted}/images", "masks": f"{planted}/masks"}}}
    one, two = (
        check(load(FinetuneConfig, {**config, "train": {"workers": count}}), quiet=True, propose=True)
        for count in (0, 2)
    )
    assert one == two


def test_a_folder_that_exists_is_not_written_into(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        of(write(tmp_path, 3), out=tmp_path)
