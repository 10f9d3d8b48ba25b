"""Portraits on masks made by hand: theirs against OpenCV's filter, ours by what a lens does and a brush does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_seg import cli, images
from ssl_seg.config import load
from ssl_seg.stages import portrait as module
from ssl_seg.stages.portrait import (
    BEHIND,
    BORDER,
    SUBJECT,
    PortraitConfig,
    background,
    classic,
    guided,
    matte,
    outline,
    soft,
)
from tests.faults import message_of


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def disc(height: int, width: int, radius: float, sharp: float = 2.0) -> np.ndarray:
    """The share of a round subject in the middle, `(H, W)` float32; its outline some pixels wide."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    off = np.hypot(rows - height / 2, columns - width / 2) - radius
    return (1 / (1 + np.exp(np.clip(off / sharp, -50, 50)))).astype(np.float32)


def options(**keys: object) -> PortraitConfig:
    return load(PortraitConfig, {"model": "m", "images": ["a"], "subject": "s", **keys})


# ---- theirs ----


def test_classic_is_their_two_kernels_pixel_for_pixel() -> None:
    image = noise(40, 50)
    kinds = np.full((40, 50), BEHIND, dtype=np.uint8)
    kinds[10:30, 12:38] = BORDER
    kinds[13:27, 15:35] = SUBJECT
    drawn = classic(image, kinds)
    softened = cv2.filter2D(image, -1, np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16)
    blurred = cv2.filter2D(image, -1, np.ones((5, 5)) / 25)
    for kind, wanted in ((SUBJECT, image), (BORDER, softened), (BEHIND, blurred)):
        np.testing.assert_array_equal(drawn[kinds == kind], wanted[kinds == kind])


def test_without_a_border_it_is_made_a_pixel_to_either_side() -> None:
    image = noise(20, 20)
    kinds = np.full((20, 20), BEHIND, dtype=np.uint8)
    kinds[5:15, 5:15] = SUBJECT
    with_border = kinds.copy()
    with_border[4:16, 4:16] = BORDER
    with_border[6:14, 6:14] = SUBJECT
    np.testing.assert_array_equal(classic(image, kinds), classic(image, with_border))


# ---- a lens's ----


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(8, 90),
    width=st.integers(8, 90),
    radius=st.floats(0, 60),
    edge=st.floats(1, 9),
    sure=st.floats(0.1, 30),
)
def test_the_matte_is_a_share_that_is_sure_away_from_the_outline(
    height: int, width: int, radius: float, edge: float, sure: float
) -> None:
    share = disc(height, width, radius, sure)
    found = matte(noise(height, width), share, edge)
    assert found.shape == share.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found[outline(share) >= edge] == 1).all()
    assert (found[outline(share) <= -edge] == 0).all()


def test_the_matte_follows_the_image_where_the_outline_is_off() -> None:
    """A subject whose edge lies three pixels from where the network has it."""
    image = np.zeros((60, 60, 3), dtype=np.uint8)
    image[:, :33] = 230
    share = np.zeros((60, 60), dtype=np.float32)
    share[:, :30] = 1
    found = matte(image, share, 8)[30]
    assert found[31] > found[34] + 0.2, "the step in the image is the step of the matte"
    assert abs(found[34] - found[36]) < 0.2


def test_the_guided_filter_of_an_even_guide_is_a_mean_of_means_and_keeps_what_the_guide_shows() -> None:
    random = np.random.default_rng(0).random((30, 40)).astype(np.float32)
    even = guided(np.full_like(random, 0.3), random, 3)
    np.testing.assert_allclose(even, cv2.blur(cv2.blur(random, (7, 7)), (7, 7)), atol=1e-4)
    np.testing.assert_allclose(guided(random, 0.5 * random + 0.2, 3), 0.5 * random + 0.2, atol=2e-3)


@pytest.mark.parametrize("kernel", ["disc", "gaussian"])
def test_the_subject_is_untouched_and_the_blur_grows_with_the_distance(kernel: str) -> None:
    image, share = noise(240, 320), disc(240, 320, 50)
    drawn = soft(image, share, options(kernel=kernel, edge=0.01, blur=0.02))
    alpha = matte(image, share, 0.01 * 400)
    assert (alpha == 1).sum() > 5000
    np.testing.assert_array_equal(drawn[alpha == 1], image[alpha == 1])
    away = cv2.distanceTransform((alpha == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    rings = [(away > low) & (away <= low + 20) for low in (5, 30, 60, 90)]
    spreads = [drawn[ring].std() for ring in rings]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 1.5 * spreads[-1]
    assert spreads[0] < 0.5 * image.std(), "and is there from the subject on"


def test_nothing_of_the_subject_bleeds_into_what_lies_behind() -> None:
    share = disc(200, 200, 40)
    image = np.zeros((200, 200, 3), dtype=np.uint8)
    image[share > 0.02] = 255  # eight pixels farther than the network has it
    edge = 10 / np.hypot(200, 200)
    alpha = matte(image, share, 10)
    far = outline(share) <= -10
    for kernel in ("disc", "gaussian"):
        drawn = soft(image, share, options(blur=0.1, edge=edge, kernel=kernel))
        assert (drawn[far] == 0).all(), kernel
        assert (drawn[alpha == 1] == 255).all(), kernel
    plain = cv2.GaussianBlur(image, (0, 0), 10)
    assert (plain[far] > 20).sum() > 1000, "a plain blur has a halo there"


def test_an_even_background_stays_as_it_is_behind_and_about_the_subject() -> None:
    """The sum of a normalized convolution's weights is one, at the image's rim and where no background is in reach."""
    light = np.full((90, 120, 3), 0.25, dtype=np.float32)
    share = disc(90, 120, 30)
    light[share > 0.05] = 1
    behind = background(light, outline(share) <= -8, "disc", (2.0, 7.0), 40)
    np.testing.assert_allclose(behind, 0.25, rtol=1e-4)


def test_sharpening_changes_the_subject_alone() -> None:
    image, share = noise(100, 100), disc(100, 100, 30)
    plain, sharp = (soft(image, share, options(sharpen=amount)) for amount in (0, 1))
    alpha = matte(image, share, options().edge * np.hypot(100, 100))
    np.testing.assert_array_equal(plain[alpha == 0], sharp[alpha == 0])
    assert sharp[alpha == 1].std() > plain[alpha == 1].std()


def test_a_subject_that_fills_the_image_is_the_image() -> None:
    image = noise(20, 30)
    np.testing.assert_array_equal(soft(image, np.ones((20, 30), dtype=np.float32), options()), image)


# ---- the command ----


class Bright(nn.Module):
    """Class 1 where it is bright, class 2 where it is grey."""

    class_names = ("dark", "bright", "grey")
    image_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.encoder = SimpleNamespace(multiple=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        red = image[:, 0]
        return 20 * torch.stack([0.4 - red, red - 0.6, 0.1 - (red - 0.5).abs()], dim=1)


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bright square with a grey rim on black, of a model that tells them apart."""
    monkeypatch.setattr(module, "load_model", lambda _: (Bright().eval(), None))
    monkeypatch.setattr(module, "read_model_info", lambda _: {})
    image = np.zeros((50, 61, 3), dtype=np.uint8)
    image[12:38, 12:38] = 128
    image[15:35, 15:35] = 255
    images.write_image(tmp_path / "a.png", image)
    images.write_image(tmp_path / "dark.png", image // 4)
    return tmp_path / "a.png"


def run(*words: object) -> int:
    command = ["portrait", *map(str, words)]
    return cli.run(lambda: cli.app(args=command, standalone_mode=False))


def test_the_command_draws_files_and_folders(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = ["--subject", "bright", "device=cpu"]
    assert run("m", photo, *about, "--style", "classic", "--border", "grey", "--out", tmp_path / "theirs.png") == 0
    assert capsys.readouterr().out == f"portrait: {tmp_path}/theirs.png\n"
    image = images.read_image(photo)
    kinds = np.where(image[..., 0] == 255, SUBJECT, np.where(image[..., 0] == 128, BORDER, BEHIND))
    np.testing.assert_array_equal(images.read_image(tmp_path / "theirs.png"), classic(image, kinds))
    assert run("m", photo, tmp_path / "dark.png", *about, "blur=0.05", "--out", tmp_path / "several") == 2
    assert "1 of 2 images show no bright" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "several").iterdir()] == ["a.png"]
    drawn = images.read_image(tmp_path / "several" / "a.png")
    np.testing.assert_array_equal(drawn[20:30, 20:30], 255)
    np.testing.assert_array_equal(drawn[:8], 0)


@pytest.mark.parametrize(
    ("keys", "out", "said"),
    [
        ({"subject": "brigth"}, "x.png", "subject: the model knows no class 'brigth'; did you mean 'bright'?"),
        ({"border": "bright"}, "x.png", "border: beside bright the model needs a subject and a background"),
        ({"images": ["a.png", "b/a.png"]}, "x", "x/a.png: exists already, or would be of two images"),
        ({"images": ["a.png", "b.png"]}, "x.png", "x.png: is one file for 2 images; name a folder"),
        ({"images": []}, "x.png", "portrait: names no image"),
        ({}, "a.png", "a.png: exists already"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    keys: dict[str, object], out: str, said: str, photo: Path, tmp_path: Path
) -> None:
    config = load(PortraitConfig, {"model": "m", "images": [str(photo)], "subject": "bright", **keys})
    assert said in message_of(lambda: module.portrait(config, tmp_path / out))
