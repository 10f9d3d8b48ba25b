"""Views and several models: whatever is asked, whole and in tiles it is the mean of the shares."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_seg import images
from ssl_seg.config import load
from ssl_seg.images import read_mask
from ssl_seg.stages.looking import Looker, Views, load_model
from ssl_seg.stages.predict import PredictConfig, predict
from ssl_seg.stages.tiles import Tiles
from ssl_seg.weights import export
from tests.faults import message_of
from tests.weights.test_onnx import BASIC, exported

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


# ---- a model that is asked in Python ----


@pytest.fixture(scope="module", params=[None, (48, 72)], ids=["own size", "resized"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run whose images had 12 bits in 16, and a folder of photographs of several kinds."""
    folder = tmp_path_factory.mktemp("asked")
    exported(folder / "run", BASIC, resize=request.param, range=[0.0, 4095.0])
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    photo = Image.fromarray(cv2.resize(random.integers(0, 256, (9, 12, 3), dtype=np.uint8), (100, 66)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    photo.save(folder / "photos" / "turned.jpg", exif=exif)
    photo.save(folder / "photos" / "plain.png")
    photo.convert("L").save(folder / "photos" / "grey.bmp")
    deep = random.integers(0, 4096, (60, 70)).astype(np.uint16)
    (folder / "deep").mkdir()
    Image.fromarray(deep).save(folder / "deep" / "deep.png")
    return folder


def test_a_model_predicts_the_masks_that_the_command_writes(run: Path, tmp_path: Path) -> None:
    model = load_model(run / "run")
    wanted = {}
    for folder in ("photos", "deep"):
        images_of = {"images": {"type": "folder", "images": str(run / folder)}}
        config = load(PredictConfig, {"model": str(run / "run"), "data": images_of, "workers": 0, "overlays": False})
        masks = predict(config, tmp_path / folder).out / "masks"
        wanted |= {path.stem: read_mask(path) for path in masks.iterdir()}
    assert set(wanted) == {"turned", "plain", "grey", "deep"}
    assert len(np.unique(wanted["plain"])) > 1
    for path in [*(run / "photos").iterdir(), run / "deep" / "deep.png"]:
        mask = wanted[path.stem]
        assert np.array_equal(model.predict(path), mask), path.name
        assert np.array_equal(model.predict(str(path)), mask)
        with Image.open(path) as picture:
            assert np.array_equal(model.predict(picture), mask), path.name
    pixels = np.asarray(Image.open(run / "photos" / "plain.png"))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for given in (pixels, tensor, tensor.float() / 255):
        found = model.predict(given)
        assert found.dtype == np.uint8
        assert np.array_equal(found, wanted["plain"])
    values = np.asarray(Image.open(run / "deep" / "deep.png")).astype(np.uint16)
    assert np.array_equal(model.predict(values), wanted["deep"])


def test_a_loaded_model_is_a_pair_as_in_version_0_1(run: Path) -> None:
    loaded = load_model(run / "run")
    model, resize = loaded
    assert model is loaded
    assert (loaded[0], loaded[1]) == (model, resize)
    former, size = export.load_model(run / "run")
    assert resize == size
    image = torch.rand(1, 3, 50, 60)
    with torch.no_grad():
        assert torch.equal(model(image), former(image))
    assert not model.training


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "an image of type int: give a path, a Pillow image, an array or a tensor"),
        (np.zeros((4, 8, 8), dtype=np.uint8), "an array of shape (4, 8, 8): give (H, W, 3), or (H, W) of grey"),
        (np.zeros((8, 0, 3), dtype=np.uint8), "an array of shape (8, 0, 3): give (H, W, 3)"),
        (torch.zeros(1, 3, 8, 8), "a tensor of shape (1, 3, 8, 8): give one image, (3, H, W)"),
        (torch.full((3, 8, 8), 200.0), "a tensor of values from 200 to 200: give RGB in [0, 1], not normalized"),
        (torch.full((3, 8, 8), torch.nan), "a tensor of values from nan to nan: give RGB in [0, 1]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "a tensor of torch.int64: give RGB in [0, 1], or uint8"),
        ("no/such.png", "no/such.png"),
    ],
)
def test_what_is_no_image_is_one_line(given: object, message: str, tmp_path: Path) -> None:
    exported(tmp_path / "run", BASIC)
    model = load_model(tmp_path / "run")
    assert message_of(lambda: model.predict(given)).startswith(message)
    said = message_of(lambda: model.predict(np.zeros((8, 8, 3))))
    assert said.startswith("an array of float64: its white is not known; give uint8 from 0 to 255")


def deep(name: str, folder: Path) -> Path:
    """A small picture of 12 bits in 16, in a form in which Pillow alone would give other pixels."""
    values = (np.arange(48).reshape(6, 8) * 85).astype(np.uint16)
    path = folder / f"{name}.{'png' if name == 'turned' else 'tif'}"
    picture = Image.fromarray(values)
    if name == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path, exif=exif)
    else:
        picture.save(path, tiffinfo={262: 0} if name == "white is zero" else {})
    return path


@pytest.mark.parametrize("name", ["plain", "turned", "white is zero"])
@pytest.mark.parametrize("value_range", [None, (0.0, 4095.0)])
def test_a_picture_of_pillow_is_what_its_file_is(name: str, value_range: images.Range | None, tmp_path: Path) -> None:
    path = deep(name, tmp_path)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(images.picture_of(picture, value_range), images.picture_of(path, value_range))


def test_a_picture_that_pillow_cannot_give_whole_is_one_line(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4, 3), 4000, np.uint16))
    with Image.open(tmp_path / "deep.png") as picture:
        assert "Pillow keeps 8; give its path" in message_of(lambda: images.picture_of(picture, (0.0, 4095.0)))
    numbers = Image.fromarray(np.full((4, 4), 200, np.int32))
    assert "a picture of mode I: its white is not known" in message_of(lambda: images.picture_of(numbers))
    images.write_image(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with Image.open(tmp_path / "cut.png") as picture:
        assert message_of(lambda: images.picture_of(picture)).startswith("the picture: cannot be read")
