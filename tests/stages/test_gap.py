"""`ssl-seg gap`: how far folders of images lie from each other, and what is written about it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from ssl_seg import cli, images
from ssl_seg.config import UserError, load
from ssl_seg.stages import gap as stage
from ssl_seg.stages.gap import GapConfig, Gaps, gap
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from tests.small import pretraining
from tests.stages.test_select import SMALL, picture


def folder(path: Path, kinds: str, first: int = 0, blur: float = 0) -> Path:
    """A picture a letter: d of dots, s of stripes."""
    for number, kind in enumerate(kinds, start=first):
        image = picture("dots" if kind == "d" else "stripes", number)
        images.write_image(path / f"{number:02}.png", cv2.GaussianBlur(image, (0, 0), blur) if blur else image)
    return path


def config_of(target: Path, *pools: Path, **values: Any) -> GapConfig:
    named = {pool.name: {"type": "folder", "images": str(pool)} for pool in pools}
    data = {"target": {"type": "folder", "images": str(target)}, "pools": named}
    return load(GapConfig, {"data": data, "model": SMALL, "workers": 0, "device": "cpu", "neighbours": 1, **values})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gaps, Path]:
    """Pools in which ever more is of another kind."""
    base = tmp_path_factory.mktemp("gap")
    torch.manual_seed(0)
    pools = [
        folder(base / name, kinds, 20) for name, kinds in (("all", 8 * "s"), ("half", 4 * "ds"), ("none", 8 * "d"))
    ]
    return gap(config_of(folder(base / "target", 10 * "d"), *pools), base / "out", quiet=True), base / "out"


def test_it_grows_with_what_is_of_another_kind_and_is_nought_for_the_same(mixed: tuple[Gaps, Path]) -> None:
    found, _ = mixed
    assert [pool.name for pool in found.pools] == ["none", "half", "all"]
    same, half, other = found.pools
    assert abs(same.gap) < 0.05 < half.gap < other.gap <= 1
    assert same.interval is not None
    assert same.interval.low < 0 < same.interval.high
    assert same.behind is None
    assert other.behind is not None
    assert other.behind.low > 0
    assert (other.reached, other.inside) == (0, 0)
    assert same.reached > 0.5
    assert half.inside <= 0.5
    assert found.halves is not None
    assert found.halves < half.gap
    assert found.blurred > 0


def test_the_files_name_the_images_by_their_nearness(mixed: tuple[Gaps, Path]) -> None:
    found, out = mixed
    record = json.loads((out / "gap.json").read_text())
    _, half, _ = record["pools"]
    assert half["gap"] == found.pools[1].gap
    assert half["interval"][0] < half["gap"] < half["interval"][1]
    names = [entry["name"] for entry in half["images"]]
    assert {int(name[:2]) % 2 for name in names[:4]} == {0}  # dots
    assert {int(name[:2]) % 2 for name in names[4:]} == {1}
    assert len(half["target"]) == 10
    assert record["config"]["neighbours"] == 1
    sheet = images.read_image(out / "sheet.png")
    assert sheet.shape == (3 * 3 * (24 + 2 * 160 + 4), 7 * 160 + 6 * 4, 3)
    dots, stripes = (picture(kind, 0).mean() for kind in ("dots", "stripes"))
    nearest, farthest = (sheet[top + 24 + 60 : top + 24 + 100, 40:120].mean() for top in (348 * 3, 348 * 4))
    assert abs(nearest - dots) < 25
    assert abs(farthest - stripes) < 25
    assert images.read_image(out / "map.png").std() > 1


def test_it_grows_with_a_blur(tmp_path: Path) -> None:
    torch.manual_seed(0)
    target = folder(tmp_path / "target", 8 * "s")
    pools = [folder(tmp_path / f"blur{sigma}", 8 * "s", 10, sigma) for sigma in (4, 0, 2, 1)]
    assert [pool.name for pool in gap(config_of(target, *pools), quiet=True).pools] == [
        "blur0",
        "blur1",
        "blur2",
        "blur4",
    ]


def test_the_command_takes_folders_a_run_and_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=1)), Options(tmp_path / "run", quiet=True))
    target, near = folder(tmp_path / "target", 6 * "d"), folder(tmp_path / "near", 4 * "d", 4)
    words = [
        "gap",
        str(target),
        str(near),
        "data.pools.drawn={type: synthetic, count: 5}",
        "--with",
        str(tmp_path / "run"),
    ]
    words += ["neighbours=1", "workers=0", "device=cpu", "--out", str(tmp_path / "out")]
    call = partial(cli.app, args=words, prog_name="ssl-seg", standalone_mode=False)
    assert cli.run(call) == 0
    told = capsys.readouterr()
    assert f"from 6 target images, by the encoder of {tmp_path / 'run'}" in told.out
    assert f"nearest: {near}" in told.out
    assert f"{near}: 2 of its images are the target's too" in told.out
    assert "drawn (5 images)" in told.out
    assert f"data.pools.{near}: no interval, for it has 4 images in 4 blocks" in told.err
    assert cli.run(call) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["neighbours=1"], "gap: name the folder of the target images, then those of pools"),
        (["target"], "gap: name the folder of the target images, then those of pools"),
        (["target", "nothing"], "nothing: no such file or recipe"),
        (["data.target={type: folder, images: target}", "empty"], "empty: no image in it"),
        (["target", "pool", "neighbours=0"], "neighbours"),
        (["target", "pool", "neighbours=1", "--with", "empty"], "empty: holds no weights"),
        (["target", "pool"], "data.target: 6 images that may all be neighbours in one video"),
        (["target", "target=3"], "target"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(Path("target"), 6 * "d")
    folder(Path("pool"), 2 * "d")
    Path("empty").mkdir()
    every = ["gap", *words, "workers=0", "model.encoder.name=mobilenetv2_035", "model.encoder.pretrained=false"]
    assert cli.run(partial(cli.app, args=every, prog_name="ssl-seg", standalone_mode=False)) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert line.startswith("ssl-seg: ")


def test_of_many_images_some_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "MOST", 6)
    target, pool = folder(tmp_path / "target", 6 * "d"), folder(tmp_path / "pool", 11 * "d", 10)
    (found,) = gap(config_of(target, pool)).pools
    assert found.count == 6
    assert "data.pools.pool: 6 of 11 images are looked at, evenly apart" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    target, pool = folder(tmp_path / "target", 6 * "d"), folder(tmp_path / "pool", 6 * "d", 10)
    (pool / "12.png").write_bytes((pool / "12.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"12\.png"):
        gap(config_of(target, pool), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_of_one_picture_many_times_has_no_neighbourhood_to_lie_in(tmp_path: Path) -> None:
    for name in ("target", "pool"):
        for number in range(6):
            images.write_image(tmp_path / name / f"{number}.png", np.full((40, 40, 3), 90, dtype=np.uint8))
    (found,) = gap(config_of(tmp_path / "target", tmp_path / "pool")).pools
    assert found.gap == pytest.approx(0, abs=1e-3)
    assert found.shared == 6
