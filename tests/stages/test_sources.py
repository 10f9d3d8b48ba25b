"""Files that are others when a run goes on are named; those that only look so by their time are not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_seg import images
from ssl_seg.config import UserError, load
from ssl_seg.stages import sources
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from tests.small import Textured, finetuning, pretraining

PARTS = {"pool": 40, "labelled": 4, "val": 3, "test": 3}  # more of the pool than the leak guard samples


def drawn(folder: Path) -> None:
    for seed, (part, count) in enumerate(PARTS.items()):
        dataset = Textured(count=count, seed=seed)
        for index in range(count):
            example = dataset.read(index)
            images.write_image(folder / part / "images" / f"{index:02}.png", example.image)
            images.write_mask(folder / part / "masks" / f"{index:02}.png", example.label, np.zeros((2, 3), np.uint8))


def reading(folder: Path, *parts: str, masks: bool = True) -> dict[str, Any]:
    found = {}
    for part in parts:
        own = {"type": "folder", "images": str(folder / part / "images")}
        found[part] = {**own, "masks": str(folder / part / "masks"), "classes": 2} if masks else own
    return found


def pretraining_on(folder: Path, **more: Any) -> Callable[..., object]:
    values = {**pretraining(steps=2), "data": reading(folder, "pool", "val", masks=False), **more}
    return lambda out, *allowed: pretrain(load(PretrainConfig, values), Options(out, False, allowed, quiet=True))


def finetuning_on(folder: Path) -> Callable[..., object]:
    data = reading(folder, "labelled", "val", "test")
    values = {**finetuning(steps=2), "data": data}
    return lambda out, *allowed: finetune(load(FinetuneConfig, values), Options(out, False, allowed, quiet=True))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, a pretraining and a fine-tuning on them."""
    folder = tmp_path_factory.mktemp("sources")
    drawn(folder)
    pretraining_on(folder)(folder / "pretrained")
    finetuning_on(folder)(folder / "finetuned")
    return folder


def change(path: Path) -> None:
    """Another picture under the same name."""
    values = images.read_mask(path) if "masks" in path.parts else images.read_image(path)
    if "masks" in path.parts:
        images.write_mask(path, 1 - values, np.zeros((2, 3), np.uint8))
    else:
        images.write_image(path, np.ascontiguousarray(values[::-1]))


@pytest.mark.parametrize(
    ("stage", "file", "said"),
    [
        ("pretrained", "pool/images/17.png", r"data\.pool: 1 of 40 images are not .* \(17\.png first\)"),
        ("finetuned", "labelled/masks/02.png", r"data\.labelled: 1 of 4 masks are not .* \(02\.png first\)"),
        ("finetuned", "test/images/02.png", r"data\.test: 1 of 3 images"),
    ],
)
def test_a_changed_file_is_named_and_refused_unless_allowed(
    stage: str, file: str, said: str, begun: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(begun / stage, tmp_path / "run")
    again = pretraining_on(begun) if stage == "pretrained" else finetuning_on(begun)
    kept = shutil.copy2(begun / file, tmp_path / "kept.png")
    change(begun / file)
    record = (run / "files.json").read_bytes()
    try:
        with pytest.raises(UserError, match=said) as caught:
            again(run)
        assert "\n" not in str(caught.value)
        assert (run / "files.json").read_bytes() == record, "what is refused changes no record"
        again(run, f"data.{file.partition('/')[0]}")
        again(run)  # the new file is the run's own now
    finally:
        shutil.copy2(kept, begun / file)


def test_files_that_were_copied_or_saved_anew_with_equal_pixels_go_on(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(begun / "pretrained", tmp_path / "run")
    saved_anew = begun / "pool/images/03.png"
    kept = shutil.copy2(saved_anew, tmp_path / "kept.png")
    images.write_image(saved_anew, images.read_image(saved_anew), noisy=True)
    assert saved_anew.stat().st_size != Path(kept).stat().st_size
    for index in (5, 9):
        os.utime(begun / f"pool/images/{index:02}.png")
    read = []
    real = sources.fingerprint
    monkeypatch.setattr(sources, "fingerprint", lambda own, workers: read.append(len(own)) or real(own, workers))
    try:
        pretraining_on(begun)(run)
        assert read == [3], "no other file is read again"
        pretraining_on(begun)(run)
        assert read == [3], "and these once"
    finally:
        shutil.copy2(kept, saved_anew)
    assert not capsys.readouterr().err


def test_without_a_leak_check_sizes_tell_and_times_are_told(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unchecked = {"leaks": {"check": False}}
    pretraining_on(begun, **unchecked)(tmp_path / "run")
    path = begun / "pool/images/20.png"
    kept = shutil.copy2(path, tmp_path / "kept.png")
    values = {**pretraining(steps=2), "data": reading(begun, "pool", "val", masks=False), **unchecked}
    os.utime(path)
    pretrain(load(PretrainConfig, values), Options(tmp_path / "run"))
    assert "data.pool: 1 images have another time" in capsys.readouterr().err
    try:
        images.write_image(path, images.read_image(path), noisy=True)
        with pytest.raises(UserError, match=r"data\.pool: 1 of 40 images"):
            pretraining_on(begun, **unchecked)(tmp_path / "run")
    finally:
        shutil.copy2(kept, path)


def test_a_run_that_has_not_written_down_its_files_goes_on(begun: Path, tmp_path: Path) -> None:
    run = shutil.copytree(begun / "finetuned", tmp_path / "run")
    (run / "files.json").unlink()
    finetuning_on(begun)(run)
    record = json.loads((run / "files.json").read_text())
    assert set(record) == {f"{part}{kind}" for part in ("labelled", "val", "test") for kind in ("", " masks")}
    assert all(len(digest) == 64 for part in record.values() for digest in part["sha256"])
    record["labelled"]["bytes"].pop()
    (run / "files.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"files\.json: labelled is not as a run writes it") as caught:
        finetuning_on(begun)(run)
    assert "\n" not in str(caught.value)
