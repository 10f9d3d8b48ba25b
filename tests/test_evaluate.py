"""Scores at the labels' own resolution, against scikit-learn; pretext figures that are the same at every evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import nn

from ssl_seg.config import UserError, load
from ssl_seg.data import Subset
from ssl_seg.datasets import Dataset, Example
from ssl_seg.evaluate import (
    EvaluateConfig,
    evaluate,
    named_scores,
    prediction_panel,
    score_segmentation,
    score_tasks,
    task_pictures,
)
from ssl_seg.pictures import GAP, grid, overlay, palette
from ssl_seg.pretrain import PretrainConfig
from ssl_seg.stage import build_module
from tests.small import Textured, pretraining


class Halves(Dataset):
    """Images of several sizes, dark on the left and bright on the right; the mask says which, with a border ignored."""

    count: int = 3

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("dark", "bright", "never")

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Example:
        height, width = 40 + 7 * index, 50 + 11 * index
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[:, width // 2 :] = 255
        label = (image[..., 0] > 0).astype(np.uint8)
        label[:, width // 2 - 2 : width // 2 + 2] = 255
        return Example(image, label, f"halves_{index}")


class Brightness(nn.Module):
    """Class 1 where it is bright, wrong in the top quarter; logits at half of the input's resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        bright = nn.functional.avg_pool2d(image[:, :1], 2)
        bright[:, :, : bright.shape[2] // 4] = 1 - bright[:, :, : bright.shape[2] // 4]
        return torch.cat([1 - bright, bright, torch.full_like(bright, -9)], dim=1)


@pytest.mark.parametrize("resize", [None, (24, 32), (80, 100)])
def test_scores_are_scikit_learns_at_the_label_s_resolution(resize: tuple[int, int] | None) -> None:
    scores = score_segmentation(Brightness(), Halves(), resize)
    labels = [Halves().read(index).label for index in range(3)]
    assert scores.confusion.sum() == sum((label != 255).sum() for label in labels)
    named = named_scores(scores, Halves().class_names)
    assert named["iou/never"] is None, "neither there nor predicted"
    assert named["miou"] == pytest.approx((named["iou/dark"] + named["iou/bright"]) / 2)
    truth, prediction = [], []
    for index, label in enumerate(labels):
        image = torch.from_numpy(Halves().read(index).image / 255).permute(2, 0, 1)[None].float()
        expected = (image[0, 0] > 0.5).numpy()
        expected[: label.shape[0] // 4] ^= True
        truth.append(label.ravel())
        prediction.append(expected.ravel())
    counted = np.concatenate(truth) != 255
    oracle = jaccard_score(np.concatenate(truth)[counted], np.concatenate(prediction)[counted], average="macro")
    assert named["miou"] == pytest.approx(oracle, abs=0.05)  # the quarter's edge moves by a pixel or two


def test_an_image_without_a_mask_cannot_be_scored() -> None:
    class Bare(Halves):
        def read(self, index: int) -> Example:
            return Example(super().read(index).image, None, "bare")

    with pytest.raises(UserError, match="bare: has no mask"):
        score_segmentation(Brightness(), Bare())


def test_task_scores_repeat_and_do_not_depend_on_the_batch() -> None:
    config = load(PretrainConfig, pretraining())
    module = build_module(config.model, config.tasks, 0)
    first = score_tasks(module, config.data.val, config.augment, batch_size=16)
    assert first == score_tasks(module, config.data.val, config.augment, batch_size=16)
    assert score_tasks(module, config.data.val, config.augment, batch_size=1) == pytest.approx(first, rel=1e-4)
    assert {"denoise/loss", "denoise/psnr", "rotate/loss", "rotate/accuracy"} <= set(first)
    assert module.training, "the mode is put back"


def test_pictures_have_a_row_an_image() -> None:
    config = load(PretrainConfig, pretraining())
    module = build_module(config.model, config.tasks, 0)
    sheets = task_pictures(module, config.data.val, config.augment)
    assert sheets["denoise"].shape == (3 * 64 + 2 * GAP, 3 * 64 + 2 * GAP, 3)
    panel = prediction_panel(Brightness(), Subset(Halves(), (1, 2)))
    rows, below = panel[: 2 * 54 + GAP], panel[2 * 54 + GAP :]
    assert rows.shape == (2 * 54 + GAP, 3 * 72 + 2 * GAP, 3)
    for colour in palette(3)[:3]:  # dark, bright, never
        assert (below == colour).all(axis=2).any()


def test_the_model_s_classes_must_be_the_data_s(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Brightness()
    model.class_names = ("ground", "disc")
    monkeypatch.setattr("ssl_seg.evaluate.load_model", lambda path: (model, None))
    assert evaluate(EvaluateConfig(model="x", data={"test": Textured(count=1)}, workers=0)).out is None
    with pytest.raises(UserError, match=r"data\.test: has the classes dark, bright, never"):
        evaluate(EvaluateConfig(model="x", data={"test": Halves()}))


def test_class_colours_differ_and_ids_without_a_class_are_grey() -> None:
    for count in (2, 11, 30):
        colours = palette(count)[:count].astype(int)
        distances = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 999 * np.eye(count, dtype=int)
        assert distances.min() > 20
    assert palette(11)[255].tolist() == [224, 224, 224]


def test_a_grid_keeps_panels_in_their_places() -> None:
    red, blue = np.full((4, 6, 3), (255, 0, 0), np.uint8), np.full((2, 3, 3), (0, 0, 255), np.uint8)
    sheet = grid([[red, blue], [blue]])
    assert sheet.shape == (8 + GAP, 12 + GAP, 3)
    assert (sheet[:4, 6 + GAP :] == (0, 0, 255)).all()
    assert (sheet[4 + GAP :, 6 + GAP :] == 255).all()
    assert overlay(red, np.zeros((4, 6), np.uint8), palette(2)).shape == red.shape
