"""Worlds drawn to files: what is written is what the data set draws, by any number of processes, or nothing is."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pytest
from torch import Tensor

from ssl_seg import images, rng
from ssl_seg.config import UserError, load
from ssl_seg.data.synth import SHEET_WIDTH, sheet, synth
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.figures import panels
from ssl_seg.worlds import Scene, World, edges
from tests.processes import Child, command


class Sliding(World):
    """A grey level a frame; the fourth scene cannot be drawn where `fault` is set."""

    moves = True
    fault: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("ground",)

    def draw(self, key: Tensor, size: tuple[int, int], frame: int = 0) -> Scene:
        if self.fault and int(key) % 3 == 0:
            raise UserError("a scene: cannot be drawn; draw another")
        label = np.zeros(size, dtype=np.uint8)
        return Scene(np.full((*size, 3), 10 * frame, dtype=np.uint8), label)


def test_a_folder_of_drawn_images_knows_its_classes(tmp_path: Path) -> None:
    drawn = synth(shapes(2), tmp_path / "out", jobs=1)
    found = Folder(images=str(drawn.out / "images"), masks=str(drawn.out / "masks"))
    assert found.class_names == drawn.class_names
    np.testing.assert_array_equal(found.read(1).label, shapes(2).scene(1).label)
    assert Folder(images=found.images, masks=found.masks, classes=9).class_names[0] == "class_0", "what is given wins"
    (drawn.out / "dataset.json").write_text('{"class_names": "ground"}')
    with pytest.raises(UserError, match="classes is missing"):
        len(Folder(images=found.images, masks=found.masks))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def shapes(count: int, size: tuple[int, int] = (30, 40)) -> Synthetic:
    return Synthetic(kind="shapes", count=count, size=size, seed=4)


def test_the_files_hold_what_the_data_set_draws(tmp_path: Path) -> None:
    dataset = shapes(6)
    drawn = synth(dataset, tmp_path / "out", ("depth", "instances", "edges"), jobs=1)
    for index in range(6):
        scene = dataset.scene(index)
        name = f"shapes_{index:06d}.png"
        np.testing.assert_array_equal(images.read_image(drawn.out / "images" / name), scene.image)
        np.testing.assert_array_equal(images.read_mask(drawn.out / "masks" / name), scene.label)
        for part, kept in (("depth", scene.depth), ("instances", scene.instances)):
            stored = images.read_mask(drawn.out / part / name)
            assert stored.dtype == np.uint16
            np.testing.assert_array_equal(stored, kept)
        np.testing.assert_array_equal(images.read_mask(drawn.out / "edges" / name), edges(scene) * 255)
    assert (drawn.count, drawn.class_names) == (6, dataset.class_names)


def test_a_folder_data_set_reads_the_same_arrays(tmp_path: Path) -> None:
    dataset = shapes(3)
    drawn = synth(dataset, tmp_path / "out", jobs=1)
    folder = load(Dataset, drawn.dataset)
    assert isinstance(folder, Folder)
    assert folder.class_names == dataset.class_names
    assert len(folder) == 3
    for index in range(3):
        np.testing.assert_array_equal(folder.read(index).image, dataset.read(index).image)
        np.testing.assert_array_equal(folder.read(index).label, dataset.read(index).label)


def test_the_config_beside_draws_the_same_again(tmp_path: Path) -> None:
    dataset = Synthetic(kind={"type": "shapes", "cue": ["colour"], "noise": 0.1}, count=2, size=(20, 30), seed=8)
    kept = json.loads((synth(dataset, tmp_path / "out", ("edges",), 1).out / "dataset.json").read_text())
    assert kept.pop("class_names") == list(dataset.class_names)
    assert kept.pop("with") == ["edges"]
    assert load(Dataset, kept) == dataset


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    written = [digests(synth(shapes(11), tmp_path / str(jobs), ("depth",), jobs).out) for jobs in (1, 2, 3)]
    assert written[0] == written[1] == written[2]
    assert len(written[0]) == 3 * 11 + 2


def test_it_draws_after_this_process_has_drawn_with_threads(tmp_path: Path) -> None:
    stdout, stderr = Child(draw_with_threads, tmp_path / "out").communicate()
    assert stdout.strip() == "2", stderr


def draw_with_threads(out: Path) -> None:
    cv2.setNumThreads(2)
    dataset = Synthetic(kind="shapes", count=3, size=(500, 700))
    dataset.scene(0)
    synth(dataset, out, jobs=2)
    print(cv2.getNumThreads())


def test_frames_lie_in_a_subfolder_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Synthetic(kind=Sliding(), count=5, clip=2, size=(8, 8))
    drawn = synth(dataset, tmp_path / "out", jobs=1)
    names = sorted(path.relative_to(drawn.out / "images").as_posix() for path in drawn.out.rglob("images/*/*.png"))
    assert names[:3] == [
        "sliding_000000/sliding_000000.png",
        "sliding_000000/sliding_000001.png",
        "sliding_000001/sliding_000002.png",
    ]
    folder = load(Dataset, drawn.dataset)
    assert [folder.sequence(index) for index in range(5)] == [dataset.sequence(index) for index in range(5)]
    assert [int(folder.image(index).image.max()) for index in range(5)] == [0, 10, 0, 10, 0]


def test_what_the_world_does_not_draw_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    squares = Synthetic(kind="squares", count=2, size=(8, 8))
    for extras, named in ((("depth",), "squares does not draw it"), (("deph",), "choose of depth, instances, edges")):
        with pytest.raises(UserError, match=named):
            synth(squares, out, extras, 1)
    with pytest.raises(UserError, match="size: 100000 x 100000 are more than"):
        load(Synthetic, {"count": 1, "size": (10**5, 10**5)})
    assert not list(tmp_path.iterdir())
    assert (synth(squares, out, ("edges",), 1).out / "edges" / "squares_000001.png").is_file()
    before = digests(out)
    with pytest.raises(UserError, match="exists already"):
        synth(squares, out)
    assert digests(out) == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(UserError, match="cannot be drawn"):
        synth(Synthetic(kind=Sliding(fault=True), count=40, size=(8, 8)), tmp_path / "new" / "out", jobs=jobs)
    assert not list((tmp_path / "new").iterdir())


class Halting(World):
    """The seventh scene that is drawn stops or ends its process, as long as a file is there."""

    fault: str
    signum: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("ground",)

    def draw(self, key: Tensor, size: tuple[int, int], frame: int = 0) -> Scene:
        if int(key) == int(rng.fold_in(rng.fold_in(rng.as_key(0), "halting"), 6)) and Path(self.fault).exists():
            os.kill(os.getpid(), self.signum)
        return Scene(np.full((*size, 3), int(key) % 251, dtype=np.uint8), np.zeros(size, dtype=np.uint8))


@pytest.mark.parametrize(
    ("signum", "said"),
    [
        (signal.SIGSTOP, r"image 6 \(halting_000006\) was not drawn within 1 s"),
        (signal.SIGKILL, "a process was killed"),
    ],
)
def test_a_process_that_stands_still_or_dies_is_one_line(
    signum: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_seg.data.synth.PATIENCE", 1.0)
    fault = tmp_path / "fault"
    fault.touch()
    dataset = Synthetic(kind=Halting(fault=str(fault), signum=signum), count=24, size=(8, 8))
    with pytest.raises(UserError, match=said) as caught:
        synth(dataset, tmp_path / "out", jobs=2)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["fault"], "nothing half made is left"
    assert not multiprocessing.active_children()
    fault.unlink()
    assert synth(dataset, tmp_path / "out", jobs=2).count == 24, "the same command goes on"
    assert digests(synth(dataset, tmp_path / "alone", jobs=1).out) == digests(tmp_path / "out")


def test_what_a_kill_has_left_is_cleared_by_the_next_start(tmp_path: Path) -> None:
    rest = tmp_path / ".ssl_seg-new-out" / "images"
    rest.mkdir(parents=True)
    (rest / "shapes_000900.png").write_bytes(b"half a file")
    synth(shapes(2), tmp_path / "out", jobs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "images" / "shapes_000900.png").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_every_process_and_leaves_no_folder(tmp_path: Path, signum: int, code: int) -> None:
    process = command("synth", "shapes", "--count", "100000", "--jobs", "2", "--out", tmp_path / "out")
    while not list(tmp_path.rglob("masks/*.png")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    said = process.communicate()[1].splitlines()  # comes when the last worker has closed its stderr too
    assert process.returncode == code
    assert not (tmp_path / "out").exists()
    if signum != signal.SIGKILL:
        assert not list(tmp_path.iterdir())
        assert said[-1].endswith(f"{tmp_path / 'out'} was not written")
        assert "Traceback" not in "".join(said)


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("extras", [(), ("depth", "instances", "edges")])
def test_the_sheet_is_as_wide_as_a_screen(count: int, extras: tuple[str, ...]) -> None:
    for size in ((30, 40), (4, 3), (20, 4000)):
        drawn = sheet(shapes(count, size), extras)
        assert SHEET_WIDTH * 0.5 < drawn.shape[1] < SHEET_WIDTH * 1.1


def test_the_legend_shows_every_class_in_its_colour() -> None:
    names = tuple(f"class_{number}" for number in range(11))
    colours = panels.palette(11)
    strips = [panels.legend(names, colours, width) for width in (2000, 600, 150)]
    for strip, width in zip(strips, (2000, 600, 150), strict=True):
        assert strip.shape[1] == width
        pixels = {tuple(pixel) for pixel in strip.reshape(-1, 3).tolist()}
        assert {tuple(colour) for colour in colours[:11].tolist()} <= pixels
        assert strip.max(axis=-1).min() < 16 < colours[:11].max(axis=-1).min(), "the names, in black"
        assert (strip[:, -1] == 255).all(), "nothing is cut off at the right"
    assert strips[1].shape[0] < strips[2].shape[0], "wrapped, as large"
