"""Prediction tile by tile: every pixel once, the whole image's answer where the network does not see beyond a tile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_seg import cli, images
from ssl_seg.config import load
from ssl_seg.datasets import Dataset, Example
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.models import ModelConfig, SegmentationModel, evaluating
from ssl_seg.norm.convert import OneByOne
from ssl_seg.norm.layers import SwitchNorm2d
from ssl_seg.segment import Segment
from ssl_seg.stages import looking
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.predict import PredictConfig, predict
from ssl_seg.stages.scoring import measure
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import build_module
from ssl_seg.stages.tiles import InTiles, Look, Tiles, in_tiles, of_norms
from tests.faults import message_of
from tests.small import MODEL, finetuning

CPU = torch.device("cpu")
BASIC = {"encoder": {"type": "segnet_basic"}, "decoder": {"type": "segnet_basic"}}  # sees 19 pixels to each side
UNET = {"encoder": {"name": "mobilenetv2_035"}, "decoder": {"channels": [16, 16, 8, 8, 8]}}  # sees some hundred


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3)).astype(np.uint8)


def joined(image: np.ndarray, look: Look, tiles: Tiles, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the blocks say, and how often each pixel is said."""
    found, times = None, torch.zeros(image.shape[:2])
    for block in in_tiles(image, look, tiles, multiple, CPU):
        found = torch.zeros(len(block.values), *image.shape[:2]) if found is None else found
        found[:, block.rows, block.columns] = block.values
        times[block.rows, block.columns] += 1
    assert found is not None
    return found, times


@settings(max_examples=60)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    size=st.integers(64, 200),
    share=st.floats(0, 0.5),
    multiple=st.sampled_from([1, 4, 32]),
)
def test_blocks_cover_each_pixel_once_and_tiles_begin_on_the_strides(
    height: int, width: int, size: int, share: float, multiple: int
) -> None:
    image = noise(height, width)
    corners = np.moveaxis(np.indices((height, width)), 0, -1)
    image[..., :2] = corners % 256
    tiles = Tiles(size=size, overlap=int(size * share))
    seen: list[tuple[int, int]] = []

    def same(tile: torch.Tensor) -> torch.Tensor:
        assert max(tile.shape[-2:]) <= size
        seen.append((round(255 * tile[0, 0, 0, 0].item()), round(255 * tile[0, 1, 0, 0].item())))
        return tile[0].clone()

    found, times = joined(image, same, tiles, multiple)
    assert (times == 1).all()
    torch.testing.assert_close(found, torch.from_numpy(image).permute(2, 0, 1).float() / 255, rtol=0, atol=1e-6)
    assert all(row % multiple == 0 and column % multiple == 0 for row, column in seen)


def network(values: dict[str, Any]) -> SegmentationModel:
    """With random weights, and norms that have seen something."""
    module = build_module(load(ModelConfig, values), {"segment": Segment(num_classes=3)}, seed=0)
    model = SegmentationModel(module.encoder, module.heads["segment"], ("a", "b", "c"))
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 96, 96))
    return model.eval()


def shares_by(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.no_grad()
    def look(tile: torch.Tensor) -> torch.Tensor:
        return model(tile)[0].softmax(dim=0)

    return look


@pytest.mark.parametrize("size", [(300, 210), (131, 402), (257, 256)])
def test_a_network_that_sees_no_farther_than_the_margin_answers_as_of_the_whole(size: tuple[int, int]) -> None:
    model, image = network(BASIC), noise(*size)
    look = shares_by(model)
    whole = look(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    assert whole.std() > 0.01, "else nothing is compared"
    found, _ = joined(image, look, Tiles(size=128, overlap=64), model.encoder.multiple)
    assert (found - whole).abs().max() > 1e-4, "16 pixels are less than the 19 that it sees to each side"
    found, _ = joined(image, look, Tiles(size=192, overlap=96), model.encoder.multiple)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_a_model_in_tiles_scores_as_the_whole_where_it_sees_no_farther_than_the_margin() -> None:
    model, size = network(BASIC), (64, 240)
    batch = torch.from_numpy(noise(*size)).permute(2, 0, 1)[None].float() / 255
    tiled = InTiles(model, Tiles(size=192, overlap=96), model.encoder.multiple)
    with torch.no_grad():
        torch.testing.assert_close(tiled(batch).softmax(dim=1), model(batch).softmax(dim=1), rtol=0, atol=1e-5)
    assert tiled.largest(size) == (64, 192)
    whole, parts = (measure(own, OneImage(size=size)) for own in (model, tiled))
    assert np.abs(whole.confusions.total() - parts.confusions.total()).sum() <= 2, "of 15,360 pixels"
    assert parts.confidences.ece == pytest.approx(whole.confidences.ece, abs=1e-5)
    assert parts.confidences.aurc == pytest.approx(whole.confidences.aurc, abs=1e-5)


class OneImage(Dataset):
    """Noise, and a mask of three classes."""

    size: tuple[int, int]

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("a", "b", "c")

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Example:
        image = noise(*self.size)
        return Example(image, image[..., 0] % 3, "noise.png")


def test_seams_are_never_worse_than_hard_ones() -> None:
    """Of a network that sees farther than any margin: how far it is from the whole image's answer."""
    model = network(UNET)
    scene = Synthetic(kind="street", count=1, size=(384, 512)).read(0).image
    look = shares_by(model)
    whole = look(torch.from_numpy(scene).permute(2, 0, 1)[None] / 255)
    errors = {}
    for overlap in (0, 32, 64, 96):
        found, _ = joined(scene, look, Tiles(size=192, overlap=overlap), model.encoder.multiple)
        errors[overlap] = ((found - whole).abs().mean().item(), (found - whole).abs().max().item())
    means, largest = zip(*errors.values(), strict=True)
    assert list(means) == sorted(means, reverse=True), errors
    assert largest[-1] < largest[0], errors


def test_norms_that_take_the_statistics_of_each_tile_are_told() -> None:
    assert of_norms(network(UNET)) == ""
    assert of_norms(network({**UNET, "norm": "group"})) == (
        "; group norm's statistics are of each tile by itself, so masks differ from those of a whole image"
    )
    assert "batch norm's statistics (statistics: image)" in of_norms(OneByOne(network(UNET)))
    assert "switch norm's" in of_norms(SwitchNorm2d(8))


@pytest.mark.parametrize(
    ("values", "said"),
    [({"size": 128, "overlap": 65}, "overlap: 65 is more than half of the size, 128"), ({"size": 32}, "size: ")],
)
def test_tiles_that_cannot_be_are_refused(values: dict[str, Any], said: str) -> None:
    assert said in message_of(lambda: load(Tiles, values))


def test_tiles_smaller_than_the_strides_are_refused() -> None:
    tiles = Tiles(size=64, overlap=32)
    said = message_of(lambda: list(in_tiles(noise(100, 100), lambda tile: tile[0], tiles, 64, CPU)))
    assert said.startswith("tiles: of a size of 64 with an overlap of 32 begin less than 64 pixels after one another")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small network with dropout."""
    folder = tmp_path_factory.mktemp("trained")
    finetune(load(FinetuneConfig, {**finetuning(steps=1), "model": MODEL}), Options(folder / "run", quiet=True))
    images.write_image(folder / "photos" / "large.png", noise(150, 220))
    images.write_image(folder / "photos" / "small.png", noise(60, 90))
    return folder


def asked(folder: Path, **keys: Any) -> PredictConfig:
    data = {"images": {"type": "folder", "images": str(folder / "photos")}}
    return load(PredictConfig, {"model": str(folder / "run"), "data": data, "workers": 0, "device": "cpu", **keys})


def test_the_command_predicts_in_tiles(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures of all kinds, at the image's size; a smaller image is looked at whole, and its mask is the same."""
    words = [f"model={trained}/run", "data.images.type=folder", f"data.images.images={trained}/photos", "workers=0"]
    words += ["device=cpu", "probabilities=true", "uncertainty.samples=2"]
    for out, more in (("tiles", ["tiles={size: 96, overlap: 32}"]), ("whole", [])):
        command = ["predict", *words, *more, "--out", str(tmp_path / out)]
        assert cli.run(lambda command=command: cli.app(args=command, standalone_mode=False)) == 0
    assert "tiles: of 96 pixels; group norm's statistics are of each tile" in capsys.readouterr().err
    kinds = sorted(path.relative_to(tmp_path / "tiles").parent for path in (tmp_path / "tiles").rglob("large.png"))
    assert [str(kind) for kind in kinds] == [
        "masks",
        "overlays",
        "probabilities/0_ground",
        "probabilities/1_disc",
        "uncertainty",
    ]
    for kind in kinds:
        assert images.read_image(tmp_path / "tiles" / kind / "large.png").shape == (150, 220, 3)
        same = [(tmp_path / out / kind / "small.png").read_bytes() for out in ("tiles", "whole")]
        assert same[0] == same[1]
    shares = [images.read_image(tmp_path / "tiles" / kind / "large.png")[..., 0].astype(int) for kind in kinds[2:4]]
    assert np.abs(sum(shares) - 255).max() <= 1
    assert (images.read_mask(tmp_path / "tiles" / "masks" / "large.png") == (shares[1] > shares[0]))[
        shares[0] != shares[1]
    ].all()
    other = asked(trained, tiles={"size": 128, "overlap": 32})
    assert "exists already" in message_of(lambda: predict(other, tmp_path / "tiles"))


def test_an_image_that_may_not_fit_into_memory_is_looked_at_in_tiles(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def risky(_: nn.Module, size: tuple[int, int], out: None = None) -> float | None:
        return 1e12 if max(size) > 100 else None

    monkeypatch.setattr(looking, "memory_at_risk", risky)
    monkeypatch.setattr(looking, "Tiles", lambda: Tiles(size=96, overlap=32))
    predict(asked(trained), tmp_path / "foretold")
    said = capsys.readouterr().err
    assert "large.png: 150 x 220 pixels may not fit into memory at once, and are looked at in tiles of 96" in said
    assert "small.png" not in said
    predict(asked(trained, tiles={"size": 96, "overlap": 32}), tmp_path / "asked")
    for name in ("large.png", "small.png"):
        masks = [(tmp_path / out / "masks" / name).read_bytes() for out in ("foretold", "asked")]
        assert masks[0] == masks[1]


def test_a_model_that_resizes_has_no_use_for_tiles(tmp_path: Path) -> None:
    values = finetuning(steps=1)
    values["data"] = {**values["data"], "resize": [64, 64]}
    finetune(load(FinetuneConfig, values), Options(tmp_path / "run", quiet=True))
    images.write_image(tmp_path / "photos" / "a.png", noise(100, 100))
    said = message_of(lambda: predict(asked(tmp_path, tiles={}), tmp_path / "out"))
    assert said == "tiles: the model looks at every image at 64 x 64 pixels; drop the key"
    assert not (tmp_path / "out" / "masks").exists()


def test_evaluation_mode_is_left_as_it_was() -> None:
    model = network(BASIC).train()
    with evaluating(model):
        joined(noise(100, 100), shares_by(model), Tiles(size=64, overlap=16), model.encoder.multiple)
    assert model.training
