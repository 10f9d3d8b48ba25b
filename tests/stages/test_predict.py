"""A folder of masks: whole or told what it lacks, never of two models, never outside of itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from torch import nn

from ssl_seg import cli, images
from ssl_seg.config import UserError, load
from ssl_seg.datasets import Dataset, Example
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.predict import PredictConfig, mask_names, predict, tempered, thresholded
from ssl_seg.stages.setup import Options
from ssl_seg.stages.uncertainty import DropoutSampling, sample
from tests.faults import message_of
from tests.small import MODEL, Textured, finetuning

CUT = "b.png"


class Bright(nn.Module):
    """Class 1 where it is bright."""

    class_names = ("dark", "bright")

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.encoder = SimpleNamespace(multiple=1)
        self.seen = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return torch.stack([0.5 - image[:, 0], image[:, 0] - 0.5], dim=1)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Bright:
    made = Bright()
    info = {"class_names": ["dark", "bright"], "sha256": "1"}
    monkeypatch.setattr("ssl_seg.stages.uncertainty.load_model", lambda _: (made, None))
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
    done = predict(of(photos), out)
    assert (len(done.names), done.made) == (3, 1)
    assert 0 < done.looking <= done.seconds
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


class Dropping(Bright):
    """A batch norm and a dropout before the same answer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 4 * super().forward(self.dropout(self.norm(image)))


@pytest.fixture
def dropping(model: Bright, monkeypatch: pytest.MonkeyPatch) -> Dropping:
    made = Dropping().eval()
    monkeypatch.setattr("ssl_seg.stages.uncertainty.load_model", lambda _: (made, None))
    return made


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """Two images that can be read."""
    for name in ("a.png", "deep/c.png"):
        noise = np.random.default_rng(len(name)).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        images.write_image(tmp_path / "waves" / name, noise)
    return tmp_path / "waves"


def test_shares_and_how_unsure_it_is_are_pictures_beside_the_masks(
    dropping: Dropping, waves: Path, tmp_path: Path
) -> None:
    dropping.class_names = ("dark", "b/right: all")
    wanted = {"uncertainty": {"samples": 5, "seed": 2}, "probabilities": True}
    out = predict(load(PredictConfig, {**of(waves).dump(), **wanted}), tmp_path / "out").out
    for name in ("a.png", "deep/c.png"):
        image = torch.from_numpy(images.read_image(waves / name)).permute(2, 0, 1)[None].float() / 255
        found = sample(dropping, image, (8, 12), DropoutSampling(samples=5, seed=2), [name])
        dark, bright = (images.read_mask(out / "probabilities" / of_class / name) for of_class in CLASSES)
        np.testing.assert_array_equal(bright, (255 * found.mean[0, 1]).round().numpy())
        np.testing.assert_allclose(dark.astype(int) + bright, 255, atol=1)
        np.testing.assert_array_equal(images.read_mask(out / "masks" / name), found.mean[0].argmax(0).numpy())
        unsure = images.read_mask(out / "uncertainty" / name)
        np.testing.assert_array_equal(unsure, (255 * found.deviation[0]).round().numpy())
        assert unsure.max() > 60 > unsure.min()
    record = json.loads((out / "classes.json").read_text())
    assert record["uncertainty"] == {"samples": 5, "seed": 2}
    assert "statistics" not in record


CLASSES = ("0_dark", "1_b_right__all")


def test_shares_without_samples_are_those_of_the_mask(dropping: Dropping, waves: Path, tmp_path: Path) -> None:
    plain = predict(of(waves), tmp_path / "plain").out
    asked = load(PredictConfig, {**of(waves).dump(), "probabilities": True, "overlays": False})
    out = predict(asked, tmp_path / "shares").out
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"masks", "probabilities"}
    mask = images.read_mask(plain / "masks" / "a.png")
    np.testing.assert_array_equal(images.read_mask(out / "masks" / "a.png"), mask)
    assert (images.read_mask(out / "probabilities" / "1_bright" / "a.png")[mask == 1] >= 128).all()
    assert set(json.loads((plain / "classes.json").read_text())) == {
        "classes", "model", "sha256", "resize", "finished", "unread"
    }  # fmt: skip


def test_each_image_is_normalized_by_its_own_statistics(dropping: Dropping, waves: Path, tmp_path: Path) -> None:
    """Noise is brighter than its own mean in half of the pixels, and than fresh statistics, whose mean is 0, in all."""
    masks = {}
    for word in ("running", "image"):
        config = load(PredictConfig, {**of(waves).dump(), "statistics": word})
        out = predict(config, tmp_path / word).out
        masks[word] = images.read_mask(out / "masks" / "a.png")
        assert json.loads((out / "classes.json").read_text()).get("statistics", "running") == word
    image = images.read_image(waves / "a.png")[..., 0] / 255
    np.testing.assert_array_equal(masks["image"], (image - image.mean()) / image.std() > 0.5)
    np.testing.assert_array_equal(masks["running"], image > 0.5)


def test_a_picture_that_is_missing_is_made_and_masks_made_otherwise_are_not_mixed(
    dropping: Dropping, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sampled = load(PredictConfig, {**of(photos).dump(), "uncertainty": {"samples": 2}})
    message_of(lambda: predict(sampled, out))
    mend(photos)
    other = load(PredictConfig, {**of(photos).dump(), "uncertainty": {"samples": 3}})
    said = "holds masks that were made with another uncertainty; give that, or name a new folder"
    assert said in message_of(lambda: predict(other, out))
    assert said in message_of(lambda: predict(of(photos), out))
    (out / "uncertainty" / "a.png").unlink()
    predict(load(PredictConfig, {**sampled.dump(), "probabilities": True}), out)
    for folder in ("masks", "overlays", "uncertainty", *(f"probabilities/{name}" for name in ("0_dark", "1_bright"))):
        assert {path.relative_to(out / folder).as_posix() for path in (out / folder).rglob("*.png")} == {
            "a.png", CUT, "deep/c.png"
        }  # fmt: skip


def test_a_network_without_dropout_is_refused_before_any_mask(model: Bright, waves: Path, tmp_path: Path) -> None:
    sampled = load(PredictConfig, {**of(waves).dump(), "uncertainty": {}})
    assert message_of(lambda: predict(sampled, tmp_path / "out")).startswith("uncertainty: the model has no dropout")
    assert model.seen == 0


HALF = {"type": "segnet", "dropout": 0.5}
BAYESIAN = pytest.param({"encoder": HALF, "decoder": HALF}, marks=pytest.mark.slow, id="segnet")


@pytest.mark.parametrize("network", [pytest.param(MODEL, id="fpn"), BAYESIAN])
def test_a_trained_network_with_dropout_predicts_by_the_command(
    network: dict[str, Any], waves: Path, tmp_path: Path
) -> None:
    """As the pages have it: the same maps whenever it is asked with the same seed."""
    values = {**finetuning(steps=1, batch_size=1, optimizer="sgd"), "model": network}
    images.write_image(waves / "deep" / "c.png", Textured().read(0).image[:40, :60])
    values["data"] = {"labelled": values["data"]["labelled"], "val": {**values["data"]["val"], "count": 1}}
    finetune(load(FinetuneConfig, values), Options(tmp_path / "run", quiet=True))
    asked = [f"model={tmp_path}/run", "data.images.type=folder", f"data.images.images={waves}", "workers=0"]
    asked += ["uncertainty.samples=3", "statistics=image", "device=cpu", "--out"]
    for out in ("once", "twice"):
        command = ["predict", *asked, str(tmp_path / out)]
        assert cli.run(lambda command=command: cli.app(args=command, standalone_mode=False)) == 0
    for folder in ("masks", "uncertainty"):
        once, twice = (images.read_mask(tmp_path / out / folder / "deep" / "c.png") for out in ("once", "twice"))
        np.testing.assert_array_equal(once, twice)
    assert once.max() > 0, "unsure of something"


# ---- several models, thresholds, entropy ----


@pytest.fixture
def two(model: Bright, monkeypatch: pytest.MonkeyPatch) -> dict[str, Bright]:
    """Two models of the same classes, of which the second is four times as sure of the contrary."""
    made = {"a": Bright(), "b": Contrary()}
    monkeypatch.setattr("ssl_seg.stages.uncertainty.load_model", lambda path: (made[path].eval(), None))
    return made


class Contrary(Bright):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return -4 * super().forward(image)


def test_several_models_answer_by_the_mean_of_their_shares(two: dict[str, Bright], waves: Path, tmp_path: Path) -> None:
    asked = load(PredictConfig, {**of(waves).dump(), "model": ["a", "b"], "probabilities": True, "entropy": True})
    out = predict(asked, tmp_path / "out").out
    image = torch.from_numpy(images.read_image(waves / "a.png")).permute(2, 0, 1)[None].float() / 255
    mean = torch.stack([own(image).softmax(1)[0] for own in two.values()]).mean(0).detach().numpy()
    np.testing.assert_array_equal(images.read_mask(out / "masks" / "a.png"), mean.argmax(0))
    shown = images.read_mask(out / "probabilities" / "1_bright" / "a.png")
    np.testing.assert_allclose(shown, 255 * mean[1], atol=0.51)
    unsure = images.read_mask(out / "entropy" / "a.png")
    np.testing.assert_allclose(unsure, 255 * stats.entropy(mean, axis=0, base=2), atol=0.51)
    record = json.loads((out / "classes.json").read_text())
    assert record["model"] == ["a", "b"]
    assert record["sha256"] == ["a", "b"]


def test_models_of_other_classes_and_samples_of_several_are_refused(
    two: dict[str, Bright], waves: Path, tmp_path: Path
) -> None:
    values = {**of(waves).dump(), "model": ["a", "b"]}
    sampled = load(PredictConfig, {**values, "uncertainty": {"samples": 2}})
    assert "uncertainty: samples are of one model" in message_of(lambda: predict(sampled, tmp_path / "out"))
    two["b"].class_names = ("dark", "light")
    said = message_of(lambda: predict(load(PredictConfig, values), tmp_path / "other"))
    assert said.startswith("model: b tells dark, light apart, and a dark, bright; name seeds")


@settings(max_examples=30, deadline=None)
@given(shares=arrays(np.float32, (4, 2, 3), elements=st.floats(0, 1, width=32)), named=st.sets(st.integers(0, 3)))
def test_thresholds_by_their_rule(shares: np.ndarray, named: set[int]) -> None:
    threshold = {number: 0.2 + 0.1 * number for number in sorted(named, reverse=True)}
    if not threshold:
        return
    found = thresholded(torch.from_numpy(shares), threshold)
    for place in np.ndindex(2, 3):
        own = shares[(slice(None), *place)]
        others = [number for number in range(4) if number not in threshold] or list(range(4))
        rest = max(others, key=lambda number: (own[number], -number))
        multiples = {number: own[number] / np.float32(least) for number, least in threshold.items()}
        best = max(multiples, key=lambda number: (multiples[number], -number))
        assert found[place].item() == (best if multiples[best] >= 1 else rest)


def test_a_class_with_a_low_threshold_is_found_more_often(model: Bright, waves: Path, tmp_path: Path) -> None:
    masks = {}
    for least in (0.3, 0.5, 0.7):
        asked = load(PredictConfig, {**of(waves).dump(), "threshold": {"bright": least}})
        masks[least] = images.read_mask(predict(asked, tmp_path / str(least)).out / "masks" / "a.png").sum()
    assert masks[0.3] > masks[0.5] > masks[0.7]
    asked = load(PredictConfig, {**of(waves).dump(), "threshold": {"light": 0.5}})
    assert "threshold: the model knows no 'light'" in message_of(lambda: predict(asked, tmp_path / "none"))
    assert {"threshold", "views", "entropy"}.isdisjoint(of(waves).dump())


def test_a_temperature_changes_shares_and_no_mask(
    model: Bright, waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for temperature in (None, 0.5, 4.0):
        words = {"probabilities": True, "entropy": True, "temperature": temperature}
        out = predict(load(PredictConfig, {**of(waves).dump(), **words}), tmp_path / str(temperature)).out
        folders = ("masks", "probabilities/1_bright", "entropy")
        found[temperature] = [images.read_mask(out / folder / "a.png") for folder in folders]
    image = images.read_image(waves / "a.png")[..., 0] / 255
    for temperature, (mask, bright, unsure) in found.items():
        np.testing.assert_array_equal(mask, found[None][0])
        share = 1 / (1 + np.exp(-(2 * image - 1) / (temperature or 1)))
        np.testing.assert_allclose(bright / 255, share, atol=0.5 / 255 + 1e-6)
        assert (unsure.astype(int) <= found[4.0][2]).all()
    out = tmp_path / "4.0"
    assert json.loads((out / "classes.json").read_text())["temperature"] == 4.0
    assert "temperature" not in of(waves).dump()
    assert "temperature: changes no mask; give probabilities=true" in message_of(
        lambda: load(PredictConfig, {**of(waves).dump(), "temperature": 2.0})
    )
    for wrong in ("train", 0, True):
        assert "temperature: write val, or a number from 0.05 to 20" in message_of(
            lambda wrong=wrong: load(PredictConfig, {**of(waves).dump(), "entropy": True, "temperature": wrong})
        )
    asked = load(PredictConfig, {**of(waves).dump(), "entropy": True, "temperature": "val"})
    monkeypatch.setattr("ssl_seg.stages.scoring.read_model_info", lambda _: {})
    assert "temperature: m has none" in message_of(lambda: predict(asked, tmp_path / "none"))
    several = load(PredictConfig, {**asked.dump(), "model": ["m", "n"]})
    assert "fitted to one model that looks once" in message_of(lambda: predict(several, tmp_path / "two"))


@settings(max_examples=30, deadline=None)
@given(
    arrays(np.float32, (4, 3, 5), elements=st.floats(-30, 30, width=32)),
    st.floats(0.05, 20),
)
def test_tempered_shares_are_those_of_divided_logits(values: np.ndarray, temperature: float) -> None:
    logits = torch.from_numpy(values).double()
    shares = tempered(logits.softmax(dim=0), temperature)
    torch.testing.assert_close(shares, (logits / temperature).softmax(dim=0), rtol=0, atol=1e-9)
    assert tempered(shares, None) is shares


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
