"""A folder of masks: whole or told what it lacks, never of two models, never outside of itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_seg import images
from ssl_seg.config import UserError
from ssl_seg.datasets import Dataset, Example
from ssl_seg.stages.predict import PredictConfig, mask_names, predict
from tests.faults import message_of

CUT = "b.png"


class Bright(nn.Module):
    """Class 1 where it is bright."""

    class_names = ("dark", "bright")

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return torch.stack([0.5 - image[:, 0], image[:, 0] - 0.5], dim=1)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Bright:
    made = Bright()
    info = {"class_names": ["dark", "bright"], "sha256": "1"}
    monkeypatch.setattr("ssl_seg.stages.predict.load_model", lambda _: (made, None))
    monkeypatch.setattr("ssl_seg.stages.predict.read_model_info", lambda path: info | {"sha256": path})
    return made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, of which one is cut off."""
    for number, name in enumerate(("a.png", CUT, "deep/c.png")):
        images.write_image(tmp_path / "photos" / name, np.full((9 + number, 12, 3), 200, dtype=np.uint8))
    cut = tmp_path / "photos" / CUT
    cut.write_bytes(cut.read_bytes()[:-20])
    return tmp_path / "photos"


def of(photos: Path, model: str = "m", workers: int = 0) -> PredictConfig:
    data = {"images": {"type": "folder", "images": str(photos)}}
    return PredictConfig(model=model, data=data, workers=workers, device="cpu")


def mend(photos: Path) -> None:
    images.write_image(photos / CUT, np.full((10, 12, 3), 200, dtype=np.uint8))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_left_out_and_the_same_command_does_the_rest(
    workers: int, model: Bright, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said = message_of(lambda: predict(of(photos, workers=workers), out))
    assert said.startswith(f"data.images: 1 of 3 images cannot be predicted and have no mask ({CUT} first)")
    assert f"{photos / CUT}: damaged or cut off" in capsys.readouterr().err
    assert json.loads((out / "classes.json").read_text())["unread"].keys() == {CUT}
    kept = (out / "masks" / "a.png").stat().st_mtime_ns
    mend(photos)
    assert len(predict(of(photos), out).names) == 3
    assert model.seen == 3, "each image once"
    assert (out / "masks" / "a.png").stat().st_mtime_ns == kept
    for name in ("a.png", CUT, "deep/c.png"):
        assert (images.read_mask(out / "masks" / name) == 1).all()
        assert (out / "overlays" / name).is_file()
    with pytest.raises(UserError, match="exists already; name a new folder"):
        predict(of(photos), out)


def test_a_mask_of_an_image_that_has_changed_or_of_no_whole_file_is_made_again(
    model: Bright, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    message_of(lambda: predict(of(photos), out))
    images.write_image(photos / "a.png", np.zeros((9, 12, 3), dtype=np.uint8))
    (out / "masks" / "deep" / "c.png").write_bytes(b"")
    mend(photos)
    predict(of(photos), out)
    assert (images.read_mask(out / "masks" / "a.png") == 0).all()
    assert (images.read_mask(out / "masks" / "deep" / "c.png") == 1).all()


def test_a_damaged_image_may_be_removed_too(model: Bright, photos: Path, tmp_path: Path) -> None:
    message_of(lambda: predict(of(photos), tmp_path / "out"))
    (photos / CUT).unlink()
    assert predict(of(photos), tmp_path / "out").names == ("a.png", "deep/c.png")


def test_masks_of_another_model_are_neither_kept_nor_overwritten(model: Bright, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message_of(lambda: predict(of(photos), out))
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    assert "holds masks of another model (m, " in message_of(lambda: predict(of(photos, model="other"), out))
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == before


def test_a_folder_that_cannot_be_made_is_told_before_any_work(model: Bright, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    cases = [
        (tmp_path / "file", "exists already; name a new folder"),
        (tmp_path / "file" / "out", "cannot be written (Not a directory)"),
        (tmp_path / ("x" * 300), "cannot be a path here (File name too long)"),
        (Path("/proc/out"), "cannot be written (No such file or directory)"),
        (tmp_path / "mine", "exists already; name a new folder"),
    ]
    for out, named in cases:
        assert named in message_of(lambda out=out: predict(of(photos), out))
    assert model.seen == 0
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


class Named(Dataset):
    """Images of these names alone."""

    names_: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names_)

    def name(self, index: int) -> str:
        return self.names_[index]

    def read(self, index: int) -> Example:
        return Example(np.zeros((8, 8, 3), dtype=np.uint8), None, self.name(index))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a/x.png", "a/x.jpg"), "a/x.png would be given the same mask as a/x.jpg"),
        (("frame", "frame.png"), "frame would be given the same mask as frame.png"),
        (("a.jpg", "a.png/b.jpg"), "a.jpg would be given a mask with the name of a folder"),
        (("/data/a.png",), "/data/a.png would be given a mask outside of --out"),
        (("../a.png",), "../a.png would be given a mask outside of --out"),
        (("é" * 127,), "whose name has more than 255 bytes"),
    ],
)
def test_names_that_no_two_masks_or_no_file_can_have_are_refused(names: tuple[str, ...], said: str) -> None:
    assert said in message_of(lambda: mask_names(Named(names_=names)))


def test_the_longest_name_that_a_file_can_have_is_fine() -> None:
    longest = "x" * 251 + ".jpg"
    assert mask_names(Named(names_=(longest, "a.b/c.tiff"))) == ("x" * 251 + ".png", "a.b/c.png")
