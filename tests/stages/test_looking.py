"""Views and several models: whatever is asked, whole and in tiles it is the mean of the shares."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_seg.config import load
from ssl_seg.stages.looking import Looker, Views
from ssl_seg.stages.tiles import Tiles
from tests.faults import message_of

CPU = torch.device("cpu")


class Pixelwise(nn.Module):
    """Shares by each pixel's colour and, `lean` times, by how far to the right it lies in what is looked at."""

    class_names = ("a", "b", "c")

    def __init__(self, factor: float, lean: float = 0.0) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.encoder = SimpleNamespace(multiple=4)
        self.factor, self.lean = factor, lean

    def forward(self, image: Tensor) -> Tensor:
        rightward = torch.linspace(0, 1, image.shape[-1]).expand(image.shape[-2:])
        return self.factor * image + self.lean * torch.stack([rightward, -rightward, 0 * rightward])


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def whole(looker: Looker, image: np.ndarray) -> Tensor:
    found = torch.full((3, *image.shape[:2]), torch.nan)
    for block in looker.blocks(image, "a"):
        found[:, block.rows, block.columns] = block.values
    return found


def as_batch(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def test_flips_are_averaged_as_shares() -> None:
    model, image = Pixelwise(3, lean=5), noise(30, 40)
    found = whole(Looker.of([(model, None)], CPU, views=Views(flips=True)), image)
    batch = as_batch(image)
    both = [model(batch).softmax(1), model(batch.flip(-1)).flip(-1).softmax(1)]
    torch.testing.assert_close(found, torch.stack(both).mean(0)[0])
    assert (found - both[0][0]).abs().max() > 0.1


def test_scales_are_averaged_at_the_image_s_size() -> None:
    even = np.full((37, 50, 3), (200, 120, 40), dtype=np.uint8)
    model = Pixelwise(3)
    looked = [(model, None)]
    plain = whole(Looker.of(looked, CPU), even)
    torch.testing.assert_close(whole(Looker.of(looked, CPU, views=Views(scales=(0.5, 1, 1.6))), even), plain)
    image = noise(37, 50)
    half, once, both = (
        whole(Looker.of(looked, CPU, views=Views(scales=own)), image) for own in [(0.5,), (1,), (0.5, 1)]
    )
    torch.testing.assert_close(both, (half + once) / 2)
    assert half.std() < 0.8 * once.std(), "noise is averaged away at half the size"


def test_several_models_and_flips_in_tiles_answer_as_of_the_whole() -> None:
    models = [(Pixelwise(2), None), (Pixelwise(-9), None)]
    image = noise(150, 201)
    tiles = Tiles(size=64, overlap=32)
    found = whole(Looker.of(models, CPU, tiles=tiles, views=Views(flips=True)), image)
    mean = torch.stack([model(as_batch(image)).softmax(1)[0] for model, _ in models]).mean(0)
    torch.testing.assert_close(found, mean, atol=1e-5, rtol=0)
    scaled = whole(Looker.of(models, CPU, tiles=tiles, views=Views(scales=(0.5, 1))), image)
    torch.testing.assert_close(scaled.sum(0), torch.ones(150, 201), atol=1e-5, rtol=0)


def test_models_that_resize_differently_answer_at_the_image_s_size() -> None:
    even = np.full((30, 20, 3), (200, 120, 40), dtype=np.uint8)
    found = whole(Looker.of([(Pixelwise(3), (8, 8)), (Pixelwise(3), (64, 48))], CPU), even)
    torch.testing.assert_close(found, whole(Looker.of([(Pixelwise(3), None)], CPU), even))


@pytest.mark.parametrize(
    ("values", "said"), [({"scales": []}, "scales: "), ({"scales": [9]}, "scales.0: "), ({"scale": 1}, "unknown key")]
)
def test_views_that_cannot_be_are_refused(values: dict[str, object], said: str) -> None:
    assert said in message_of(lambda: load(Views, values))
