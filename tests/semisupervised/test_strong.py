"""Strong variation against torchvision's: the same colours, hues and blur, each image by its own key."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import functional as V

from ssl_seg import rng
from ssl_seg.semisupervised import strong
from ssl_seg.testing.common import pictures


def keys(count: int) -> torch.Tensor:
    return rng.fold_in(rng.as_key("views"), torch.arange(count))


@pytest.mark.parametrize("turns", [-0.25, -0.1, 0.0, 0.2])
def test_hue_is_turned_as_torchvision_does(turns: float) -> None:
    image = pictures(3, 20, 24)
    turned = strong.turn_hue(image, torch.full((3, 1, 1), turns))
    torch.testing.assert_close(turned, V.adjust_hue(image, turns), rtol=0, atol=1e-5)
    grey = image.mean(dim=1, keepdim=True).expand_as(image)
    torch.testing.assert_close(strong.turn_hue(grey, torch.full((3, 1, 1), turns)), grey)


def test_blur_is_torchvisions_inside_and_of_each_image_its_own() -> None:
    image, sigma = pictures(3, 40, 40), torch.tensor([0.3, 1.0, 2.0])
    blurred = strong.blur(image, sigma)
    inside = slice(strong.RADIUS, -strong.RADIUS)
    for own, wanted, of in zip(blurred, image, sigma.tolist(), strict=True):
        oracle = V.gaussian_blur(wanted, [2 * strong.RADIUS + 1] * 2, [of, of])
        torch.testing.assert_close(own[:, inside, inside], oracle[:, inside, inside], rtol=0, atol=1e-5)
    assert strong.blur(image[:, :, :3, :2], sigma).shape == (3, 3, 3, 2), "however small the image is"


def test_the_changes_of_colour_are_torchvisions() -> None:
    image, key = pictures(4, 16, 16), keys(4)
    factors = rng.uniform(key, (3,), *strong.FACTOR).tolist()
    turns = rng.uniform(rng.fold_in(key, "hue"), (), -strong.HUE, strong.HUE).tolist()
    for own, given, (light, contrast, saturation), hue in zip(
        strong.colour(image, key), image, factors, turns, strict=True
    ):
        oracle = V.adjust_contrast(V.adjust_brightness(given, light), contrast)
        oracle = V.adjust_hue(V.adjust_saturation(oracle, saturation), hue)
        # torchvision's weights have four digits.
        torch.testing.assert_close(own, oracle, rtol=0, atol=2e-3)


def test_an_image_is_varied_by_its_own_key_as_often_as_it_is_meant() -> None:
    image = pictures(1, 12, 12).expand(400, -1, -1, -1)
    varied = strong.strong(image, keys(400))
    torch.testing.assert_close(varied[5:7], strong.strong(image[5:7], keys(7)[5:]))
    assert 0 <= varied.min() <= varied.max() <= 1 + 1e-6
    grey = (varied.amax(dim=1) - varied.amin(dim=1)).amax(dim=(1, 2)) < 1e-5
    assert 0.13 < grey.float().mean() < 0.27
    untouched = (varied - image).abs().amax(dim=(1, 2, 3)) < 1e-6
    # Neither coloured nor grey nor blurred, or blurred by next to nothing.
    assert 0.04 < untouched.float().mean() < 0.16
