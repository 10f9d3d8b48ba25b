"""Denoise: noise is added to the image, and the network gives back the clean picture, or the noise.

Vincent et al., "Extracting and composing robust features with denoising autoencoders", ICML 2008; as pretraining for
segmentation, decoder included: Brempong et al., "Denoising pretraining for semantic segmentation", CVPR workshops 2022.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor
from torch.nn import functional as F

from ssl_seg import losses, metrics, rng
from ssl_seg.models import ANY_CHANNELS
from ssl_seg.tasks import PictureTask, View

Noise = Literal["gaussian", "poisson", "speckle", "salt_and_pepper"]
MID_GREY = 0.5
EXACT_RATE = 4.0  # mean counts up to here are drawn by the inverse CDF, from here on by a corrected normal
EXACT_COUNTS = 18  # a mean of 4 gives more than 18 five times in 10^8 draws


class Denoise(PictureTask):
    """Predict the clean image, or the noise, of a noisy one.

    The noisy image is clipped to [0, 1] as a camera's is: what the network sees is then a picture, and "the noise" is
    what was really added, noisy - clean. So both targets hold the same knowledge, and a figure of the
    reconstruction means the same under both.
    """

    in_place: ClassVar[bool] = True
    channel_counts: ClassVar[Collection[int]] = ANY_CHANNELS
    # The norm of the weighted loss's gradient on the encoder, while four tasks are trained together on CamVid
    # (experiments/camvid_tasks), is 0.37, 0.50 and 0.21 after 50, 150 and 400 steps: of one order with the others.
    weight: NonNegativeFloat = 3.0
    # The standard deviation of the noise on a mid-grey pixel, for every kind of noise, in units of the range; drawn
    # evenly per sample, at most 0.5. Brempong et al. settle on a fixed 0.22, near this range's quadratic mean, 0.24; a
    # range makes the strength one more thing to see in the image.
    sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 0.35)
    # Gaussian as in both sources. Several names: one is drawn per sample.
    noise: Noise | Annotated[tuple[Noise, ...], Field(min_length=1)] = "gaussian"
    # Brempong et al. prefer the noise, with a U-Net that sees full resolution to the end. White noise cannot be told
    # from a map at stride 4, the finest that many decoders have, and the clean image can: hence the other default.
    target: Literal["clean", "noise"] = "clean"
    distance: losses.Distance = "mse"  # as in both sources

    @model_validator(mode="after")
    def _check_sigma(self) -> Self:
        if not self.sigma[0] <= self.sigma[1] <= MID_GREY:
            raise ValueError(f"sigma is [low, high] with 0 < low <= high <= 0.5, not {list(self.sigma)}")
        if self.relative and self.target == "noise":
            raise ValueError("relative: is for target: clean; what is left of the noise does not tell the contrast")
        if self.decoder == "reconstruction" and self.target == "noise":
            raise ValueError("decoder: reconstruction: is the picture; use target: clean, or decoder: full")
        return self

    @property
    def kinds(self) -> tuple[Noise, ...]:
        return (self.noise,) if isinstance(self.noise, str) else self.noise

    @property
    def scale(self) -> float:
        """The quadratic mean of sigma. Errors are measured in it: 1 is the squared error of noise, unclipped."""
        low, high = self.sigma
        return math.sqrt((low * low + low * high + high * high) / 3.0)

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        sigma = rng.uniform(rng.fold_in(key, "sigma"), (1, 1, 1), *self.sigma) * self.contrast(image)
        noisy, *others = (add_noise(name, image, sigma, rng.fold_in(key, name)) for name in self.kinds)
        if others:
            kind = rng.randint(rng.fold_in(key, "kind"), (1, 1, 1), 0, len(self.kinds))
            for number, other in enumerate(others, start=1):
                noisy = torch.where(kind == number, other, noisy)
        noisy = noisy.clamp_(0.0, 1.0)
        if self.target == "noise":
            return View(noisy, (noisy - image) / self.scale)
        return View(noisy, image)

    def plain(self, view: View) -> Tensor:
        """A blur by the mean of 3 x 3 pixels."""
        blurred = F.avg_pool2d(F.pad(view.input, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return blurred if self.target == "clean" else (view.input - blurred) / self.scale

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        # The noise is in that unit already.
        unit = self.scale * self.contrast(view.target) if self.target == "clean" else 1.0
        answer = self.answer(prediction, view)
        return losses.regression(self.distance, answer / unit, view.target / unit, view.loss_mask)

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """Of the reconstruction, whatever the target."""
        picture, clean = self.render(prediction, view), self.render_target(view)
        counted = view.loss_mask
        return {"psnr": metrics.psnr(picture, clean, counted), "mae": metrics.mae(picture, clean, counted)}

    def render(self, prediction: Tensor, view: View) -> Tensor:
        return self._clean(self.answer(prediction, view), view).clamp(0.0, 1.0)

    def render_target(self, view: View) -> Tensor:
        return self._clean(view.target, view).clamp(0.0, 1.0)

    def _clean(self, answer: Tensor, view: View) -> Tensor:
        return view.input - answer * self.scale if self.target == "noise" else answer


def add_noise(kind: Noise, image: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    """A new `(B, 3, H, W)` with noise of standard deviation `sigma` `(B, 1, 1, 1)` at mid-grey; not clipped."""
    shape = tuple(image.shape[1:])
    if kind == "gaussian":
        return rng.normal(key, shape).mul_(sigma).add_(image)
    if kind == "speckle":  # multiplied, so its strength grows with the brightness
        return image * (1.0 + sigma / MID_GREY * rng.normal(key, shape))
    if kind == "poisson":  # photon counts: the variance grows with the brightness
        photons_at_white = MID_GREY / sigma**2
        return poisson(key, image * photons_at_white) / photons_at_white
    if kind == "salt_and_pepper":  # a pixel turned black or white is MID_GREY away: variance is share * MID_GREY^2
        share = (sigma / MID_GREY) ** 2
        drawn = rng.uniform(key, (1, *shape[1:]))  # all three channels of a pixel fail together
        return torch.where(drawn < share, (drawn < share / 2).to(image.dtype), image)
    raise ValueError(f"unknown noise {kind!r}; one of: {', '.join(get_args(Noise))}")


def poisson(key: Tensor, rate: Tensor) -> Tensor:
    """Poisson counts as float32, `(B, ...)` for means `rate` `(B, ...)` and keys `(B,)`.

    Ours because `torch.poisson` takes no key. Small means: the inverse CDF of a keyed uniform. Others: a keyed normal,
    bent to the distribution's skewness and kurtosis (Cornish and Fisher 1938) and rounded. At the mean where the second
    takes over, 4, it is worst: 0.3 thousandths off in the mean, 2 in the variance, 0.24 % of the draws are another
    count. A count may differ between devices where the two sides of a comparison are equal to 1e-7.
    """
    shape = tuple(rate.shape[1:])
    return torch.where(
        rate < EXACT_RATE,
        _poisson_by_inverse(rng.uniform(rng.fold_in(key, "small"), shape), rate.clamp(max=EXACT_RATE)),
        _poisson_by_normal(rng.normal(rng.fold_in(key, "large"), shape), rate.clamp(min=EXACT_RATE)),
    )


def _poisson_by_inverse(uniform: Tensor, rate: Tensor) -> Tensor:
    """How many k have P(count <= k) <= u."""
    probability = torch.exp(-rate)
    cumulative = probability.clone()
    count = torch.zeros_like(rate)
    for k in range(1, EXACT_COUNTS + 1):
        count += uniform >= cumulative
        probability *= rate / k
        cumulative += probability
    return count


def _poisson_by_normal(normal: Tensor, rate: Tensor) -> Tensor:
    spread = torch.sqrt(rate - 1.0 / 12.0)  # rounding adds the twelfth again
    bent = rate + spread * normal + (normal**2 - 1.0) / 6.0 + (normal - normal**3) / (72.0 * spread)
    return torch.round(bent).clamp(min=0.0)
