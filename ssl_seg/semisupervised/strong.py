"""Strong variation of images on the device, without a change of place: colour, grey, blur.

The recipe is that of UniMatch's code (Yang et al., CVPR 2023), which has it from ST++ and SimCLR. Ours, because every
draw is a function of the sample's key; torchvision's transforms draw once for a whole batch, and from one generator in
the order of calls. They draw the order of the four changes of colour too, which is fixed here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_seg import rng
from ssl_seg.models import RGB

COLOUR, GREY, BLUR = 0.8, 0.2, 0.5  # how often each is applied
FACTOR = (0.5, 1.5)  # of brightness, contrast and saturation
HUE = 0.25  # turns of the circle at most, either way
SIGMA = (0.1, 2.0)  # pixels, of crops of 321 to 801: on smaller ones the same blur takes more
RADIUS = 6  # pixels: three of the largest sigma
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision


def strong(image: Tensor, key: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` in [0, 1] in other colours, some of them grey or blurred, by keys `(B,)`.

    Of another number of channels, which have no colours, brightness, contrast and blur alone vary.
    """
    chosen = rng.uniform(rng.fold_in(key, "strong"), (3, 1, 1, 1))  # (B, 3, 1, 1, 1)
    image = torch.where(chosen[:, 0] < COLOUR, colour(image, rng.fold_in(key, "colour")), image)
    if image.shape[1] == RGB:
        image = torch.where(chosen[:, 1] < GREY, grey(image).expand_as(image), image)
    return torch.where(chosen[:, 2] < BLUR, blur(image, rng.uniform(rng.fold_in(key, "sigma"), (), *SIGMA)), image)


def colour(image: Tensor, key: Tensor) -> Tensor:
    """Other brightness, contrast, saturation and hue."""
    factors = rng.uniform(key, (3, 1, 1, 1), *FACTOR)  # (B, 3, 1, 1, 1)
    image = (image * factors[:, 0]).clamp(0, 1)
    mean = grey(image).mean(dim=(1, 2, 3), keepdim=True)
    image = (mean + (image - mean) * factors[:, 1]).clamp(0, 1)
    if image.shape[1] != RGB:
        return image
    own = grey(image)
    image = (own + (image - own) * factors[:, 2]).clamp(0, 1)
    return turn_hue(image, rng.uniform(rng.fold_in(key, "hue"), (1, 1), -HUE, HUE))


def grey(image: Tensor) -> Tensor:
    """The brightness, `(B, 1, H, W)`; of what is no RGB the mean of the channels."""
    if image.shape[1] != RGB:
        return image.mean(dim=1, keepdim=True)
    return (image * image.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def turn_hue(image: Tensor, turns: Tensor) -> Tensor:
    """Hues moved by `turns` `(B, 1, 1)` of the circle; saturation and value of HSV stay."""
    value, least = image.amax(dim=1), image.amin(dim=1)  # (B, H, W)
    spread = value - least
    red, green, blue = image.unbind(dim=1)
    divisor = torch.where(spread > 0, spread, 1.0)
    # In sixths of a turn from red on, by the channel that is largest.
    of_blue = torch.where(value == blue, (red - green) / divisor + 4, 0.0)
    of_green = torch.where(value == green, (blue - red) / divisor + 2, of_blue)
    sixths = torch.where(value == red, (green - blue) / divisor, of_green) + 6 * turns
    channels = []
    for offset in (5, 3, 1):
        place = (sixths + offset) % 6
        channels.append(value - spread * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian blur of `sigma` `(B,)` pixels, of each image its own."""
    count, channels = image.shape[:2]
    offset = torch.arange(-RADIUS, RADIUS + 1, device=image.device)
    kernel = torch.exp(-((offset / sigma.unsqueeze(1)) ** 2) / 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # (B * 3, 2 R + 1)
    rows = F.pad(image, (RADIUS,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)  # (1, B * 3, H + 2 R, W + 2 R)
    blurred = F.conv2d(rows, kernel[:, None, :, None], groups=count * channels)
    return F.conv2d(blurred, kernel[:, None, None, :], groups=count * channels).view_as(image)
