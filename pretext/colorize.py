"""Colorize: the network sees how light each pixel is, and says which colour it has.

Zhang, Isola and Efros, "Colorful image colorization", ECCV 2016; its equations are named where they are used. Torch
has no colour spaces, and OpenCV's are on the CPU alone: hence the conversions here, in CIELAB under D65.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import losses
from ssl_seg.models import EncoderSpec
from ssl_seg.tasks import DenseTask, View

STRIDE = 4  # of the predicted colours, as in the paper: the eye sees less detail in colour than in lightness
GREYEST = 2 / 255  # of a channel; what rounding makes of grey
LEAST_SHARE = 1e-6  # of a guess, of colours that the pool does not have
GRID = 10.0  # ab units between two bins, as in the paper (section 2.1)
NEIGHBOURS = 5  # bins that share a colour, as in the paper (section 2.1)
SIGMA = 5.0  # ab units: of the kernel that shares a colour out, and of the one that smooths the pool's colours
# Six bits a channel: a table of 2^18 colours. Over photographs its ab is 1.0 unit from a pixel's own on average, 3.4 at
# most, to all sides alike, where bins lie 10 apart: the shares differ by 0.08 on average (half the sum over the bins).
LEVELS = 64
# The root mean square of a and b around their means, over 200 images of BSDS500. Regression's errors are measured in
# it: a squared error of 1 is that of the mean colour.
AB_SCALE = 14.5

# Linear RGB of IEC 61966-2-1 to CIE XYZ; the rows add up to the white of D65. Each is divided by its sum, for Lab
# wants XYZ relative to white: then grey is (Y, Y, Y).
_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
RGB_TO_RELATIVE_XYZ = (_RGB_TO_XYZ / _RGB_TO_XYZ.sum(axis=1, keepdims=True)).tolist()
RELATIVE_XYZ_TO_RGB = np.linalg.inv(np.array(RGB_TO_RELATIVE_XYZ)).tolist()
# Where the straight foot of a curve meets its power: of sRGB (encoded and linear), of CIE's lightness (f(t) and t).
SRGB_FOOT, LINEAR_FOOT, SRGB_SLOPE = 0.04045, 0.0031308, 12.92
LAB_FOOT, XYZ_FOOT, LAB_SLOPE = 6 / 29, (6 / 29) ** 3, (29 / 6) ** 2 / 3


class Colorize(DenseTask):
    """Predict the colours at stride 4 from the lightness at full resolution.

    As classes, the paper's way: which of the bins that tile the colours of sRGB, so that the answer can be "blue or
    red" where a mean would be grey. Or as numbers (`target: ab`), by regression.
    """

    in_place: ClassVar[bool] = True
    # The norm of the weighted loss's gradient on the encoder, while four tasks are trained together on CamVid
    # (experiments/camvid_tasks), is 0.14, 0.60 and 0.33 after 50, 150 and 400 steps: of one order with the others.
    weight: NonNegativeFloat = 1.0
    # bins: a choice of colours for each pixel, as the paper; ab: two numbers, by regression
    target: Literal["bins", "ab"] = "bins"
    distance: losses.Distance = "mse"  # of `target: ab`, as the paper's equation 1
    # Equation 4's lambda, the paper's: how far the bins' weights are from 1 / frequency; at 1 every bin weighs 1.
    uniform: Annotated[float, Field(gt=0, le=1)] = 0.5
    # Equation 5's T, the paper's: between the mode, at 0, whose picture is spotty, and the mean, at 1, which is pale.
    temperature: PositiveFloat = 0.38
    # How frequent each bin is, smoothed: `prepare` measures it. Without it every bin weighs 1.
    frequencies: tuple[NonNegativeFloat, ...] | None = None

    @model_validator(mode="after")
    def _check_frequencies(self) -> Self:
        given = self.frequencies
        if given is not None and (len(given) != len(bins()) or abs(sum(given) - 1.0) > 1e-6):
            raise ValueError(
                f"frequencies are {len(bins())} shares, one a bin, that add up to 1; "
                f"not {len(given)} that add up to {sum(given):.3g}; leave them out to have them measured"
            )
        return self

    def prepare(self, images: Tensor) -> Self:
        """With the pool's colours as `frequencies`, unless they are given."""
        if self.target == "ab" or self.frequencies is not None:
            return self
        nearest = colour_table(images.device).ids[colour_code(images), 0]
        counts = torch.bincount(nearest.flatten().long(), minlength=len(bins())).cpu().double()
        frequencies = smoothed(counts / counts.sum())
        return self.model_copy(update={"frequencies": tuple(frequencies.tolist())})

    def doubt(self, images: Tensor) -> str:
        grey = (images.amax(dim=1) - images.amin(dim=1)).flatten(1).amax(dim=1) <= GREYEST
        count = int(grey.sum())
        if count <= len(images) / 2:
            return ""
        return f"{count} of {len(images)} images that were looked at are grey, and there is no colour to learn in them"

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        grey = lightness(image).div_(100.0).expand(-1, 3, -1, -1)
        if self.target == "ab":
            return View(grey, rgb_to_lab(at_stride(image))[:, 1:] / AB_SCALE)
        return View(grey, colour_code(image))

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return self.dense(encoder, 2 if self.target == "ab" else len(bins()), stride=STRIDE)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        """Equation 2, or equation 1 for `target: ab`; means over the pixels in place of sums."""
        if self.target == "ab":
            return losses.regression(self.distance, prediction, view.target)
        ids, shares = soft_bins(view.target)
        # Bins last: so the softmax runs along the memory of channels-last predictions, five times as fast on a CPU.
        logits = prediction.movedim(1, -1)  # (B, Q, h, w) -> (B, h, w, Q)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        surprise = -(logits.log_softmax(dim=-1).gather(-1, ids) * shares).sum(dim=-1)
        if self.frequencies is not None:
            weights = bin_weights(self.frequencies, self.uniform).to(surprise)
            surprise = surprise * weights[ids[..., 0]]
        return losses.masked_mean(surprise.unsqueeze(1))

    def guess(self, view: View) -> Tensor:
        """The colours of the pool, whatever the image; of `target: ab` grey."""
        if self.target == "ab":
            return torch.zeros_like(view.target)
        logits = view.input.new_zeros(len(bins()))
        if self.frequencies is not None:
            frequencies = logits.new_tensor(self.frequencies)
            # Of a weighted cross-entropy the best constant answer is each share by its weight.
            weights = bin_weights(self.frequencies, self.uniform).to(logits)
            logits = (frequencies * weights).clamp(min=LEAST_SHARE).log()
        return logits.view(1, -1, 1, 1).expand(len(view.target), -1, *view.target.shape[-2:])

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """How far the colours are from the true ones, in ab units (2.3 is just noticeable), and how far grey is.

        Weighted by rarity, the network says rare colours more often than they are, and a vivid picture of grey streets
        is farther from the truth than a grey one. `ab_error_unweighted` is that of the colours as frequent as in the
        pool: the weighted loss is least for shares times their weights, so they are divided by these again.
        """
        truth = self._true_ab(view)
        said = {"ab_error": self._predicted_ab(prediction), "ab_error_of_grey": torch.zeros_like(truth)}
        if self.target == "bins" and self.frequencies is not None:
            weights = bin_weights(self.frequencies, self.uniform).to(prediction).view(1, -1, 1, 1)
            said["ab_error_unweighted"] = annealed_mean(prediction - weights.log(), self.temperature)
        return {name: (colours - truth).norm(dim=1).mean(dim=(1, 2)) for name, colours in said.items()}

    def render(self, prediction: Tensor, view: View) -> Tensor:
        return _painted(view.input, self._predicted_ab(prediction))

    def render_target(self, view: View) -> Tensor:
        """The true colours at the prediction's resolution: the best picture that a prediction could give."""
        return _painted(view.input, self._true_ab(view))

    def _predicted_ab(self, prediction: Tensor) -> Tensor:
        return prediction * AB_SCALE if self.target == "ab" else annealed_mean(prediction, self.temperature)

    def _true_ab(self, view: View) -> Tensor:
        if self.target == "ab":
            return view.target * AB_SCALE
        return colour_table(view.target.device).ab[view.target].movedim(-1, 1)


# Bins and their encoding


class ColourTable(NamedTuple):
    """What belongs to each of the `LEVELS`^3 colours, by its code."""

    ids: Tensor  # (C, 5) int16: the nearest bins, the nearest first
    shares: Tensor  # (C, 5) float32, of each in the colour; they add up to 1
    ab: Tensor  # (C, 2) float32


@lru_cache
def bins() -> Tensor:
    """The bins' colours, `(309, 2)` float64 of ab: the corners of all squares of the grid that hold a colour of sRGB.

    So each colour lies between bins. The paper has 313 and does not say how they were found; of the readings tried
    none gives 313, and this comes nearest (points of the grid that are a colour: 229; that are the nearest to one: 261;
    that are among the five nearest: 322).
    """
    level = torch.linspace(0.0, 1.0, 256, dtype=torch.float64)
    # Faces of the cube are enough: whatever ab has a colour inside, the darkest and the lightest of that ab are there.
    faces = [torch.cartesian_prod(level, level, end).roll(turn, 1) for end in level[[0, -1], None] for turn in range(3)]
    ab = rgb_to_lab(torch.cat(faces)[..., None, None])[:, 1:, 0, 0]  # (N, 2)
    squares = torch.floor(ab / GRID).unique(dim=0)
    offsets = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    return (squares[:, None] + offsets).flatten(0, 1).unique(dim=0) * GRID


def soft_encode(ab: Tensor) -> tuple[Tensor, Tensor]:
    """The ids `(N, 5)` of the bins nearest to colours `(N, 2)`, nearest first, and their shares (section 2.1)."""
    distance, ids = torch.cdist(ab, bins().to(ab)).topk(NEIGHBOURS, largest=False)
    return ids, torch.softmax(-(distance**2) / (2.0 * SIGMA**2), dim=1)


@lru_cache
def colour_table(device: torch.device) -> ColourTable:
    """Made once a process and copied once to each device."""
    if device.type != "cpu":
        return ColourTable(*(part.to(device) for part in colour_table(torch.device("cpu"))))
    level = torch.arange(LEVELS, dtype=torch.float64) / (LEVELS - 1)
    colours = torch.cartesian_prod(level, level, level)  # (C, 3), in the order of their codes
    ab = rgb_to_lab(colours[..., None, None])[:, 1:, 0, 0].float()
    encoded = [soft_encode(part) for part in ab.split(LEVELS**2)]
    ids, shares = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return ColourTable(ids.to(torch.int16), shares, ab)


def colour_code(image: Tensor) -> Tensor:
    """The target: each stride-4 pixel's place in the colour table, int64 `(B, h, w)`."""
    level = (at_stride(image) * (LEVELS - 1)).round()
    code = level[:, 0] * LEVELS**2 + level[:, 1] * LEVELS + level[:, 2]  # below 2^24: exact in float32
    return code.long()


def soft_bins(code: Tensor) -> tuple[Tensor, Tensor]:
    """Ids int64 and shares float32 of the five bins of each colour, both `(*code.shape, 5)`, the nearest first."""
    table = colour_table(code.device)
    shape = (*code.shape, NEIGHBOURS)
    # `index_select` takes half the time of an index in brackets, on a CPU.
    ids, shares = (part.index_select(0, code.flatten()).view(shape) for part in (table.ids, table.shares))
    return ids.long(), shares


def at_stride(image: Tensor) -> Tensor:
    """`(B, 3, H, W)` to `(B, 3, ceil(H / 4), ceil(W / 4))`: the mean of two pixels astride each block's centre.

    The mean of all sixteen takes thirty times as long on a CPU.
    """
    beyond = -image.shape[3] % STRIDE, -image.shape[2] % STRIDE
    if any(beyond):
        image = F.pad(image, (0, beyond[0], 0, beyond[1]), mode="replicate")
    low, high = STRIDE // 2 - 1, STRIDE // 2
    return (image[..., low::STRIDE, low::STRIDE] + image[..., high::STRIDE, high::STRIDE]) / 2.0


def annealed_mean(logits: Tensor, temperature: float) -> Tensor:
    """The colour `(B, 2, h, w)` that logits `(B, Q, h, w)` mean (equation 5): their mode at 0, their mean at 1."""
    shares = (logits / temperature).softmax(dim=1)
    return torch.einsum("bqhw,qc->bchw", shares, bins().to(shares))


# Rebalancing


def smoothed(frequencies: Tensor) -> Tensor:
    """Shares of the bins `(Q,)` float64, blurred over the ab plane by a Gaussian; they add up to 1 (section 2.2)."""
    distance = torch.cdist(bins(), bins())
    blurred = torch.exp(-(distance**2) / (2.0 * SIGMA**2)) @ frequencies
    return blurred / blurred.sum()


@lru_cache
def bin_weights(frequencies: tuple[float, ...], uniform: float) -> Tensor:
    """How much a pixel weighs by its nearest bin, `(Q,)` float64 on the CPU; 1 on average (equation 4)."""
    share = torch.tensor(frequencies, dtype=torch.float64)
    weights = 1.0 / ((1.0 - uniform) * share + uniform / len(share))
    return weights / (share * weights).sum()


# Colour spaces


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] to CIELAB, both `(B, 3, H, W)`: L in [0, 100], a and b about -110 to 100."""
    x, y, z = (_lab_curve(relative) for relative in _mixed(RGB_TO_RELATIVE_XYZ, _linear(rgb)))
    return torch.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], dim=1)


def lightness(rgb: Tensor) -> Tensor:
    """L alone, `(B, 1, H, W)` in [0, 100]."""
    (y,) = _mixed(RGB_TO_RELATIVE_XYZ[1:2], _linear(rgb))
    # White may come out a millionth above 100, by how a device rounds.
    return (116.0 * _lab_curve(y) - 16.0).clamp(0.0, 100.0).unsqueeze(1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """CIELAB to sRGB, both `(B, 3, H, W)`; colours that sRGB has not are clamped to [0, 1] channel by channel."""
    y = (lab[:, 0] + 16.0) / 116.0
    curved = torch.stack([y + lab[:, 1] / 500.0, y, y - lab[:, 2] / 200.0], dim=1)
    relative = curved.clamp(min=LAB_FOOT) ** 3 + (curved.clamp(max=LAB_FOOT) - LAB_FOOT) / LAB_SLOPE
    linear = torch.stack(_mixed(RELATIVE_XYZ_TO_RGB, relative), dim=1).clamp(0.0, 1.0)
    power = 1.055 * _power(linear.clamp(min=LINEAR_FOOT), 1 / 2.4) - 0.055
    return (power + (linear.clamp(max=LINEAR_FOOT) - LINEAR_FOOT) * SRGB_SLOPE).clamp(0.0, 1.0)


def _painted(grey: Tensor, ab: Tensor) -> Tensor:
    """RGB from the lightness of a view's input `(B, 3, H, W)` and colours `(B, 2, h, w)` at stride 4."""
    height, width = grey.shape[-2:]
    smooth = F.interpolate(ab, scale_factor=STRIDE, mode="bilinear", align_corners=False)[..., :height, :width]
    return lab_to_rgb(torch.cat([100.0 * grey[:, :1], smooth], dim=1))


def _linear(srgb: Tensor) -> Tensor:
    # A curve with a straight foot is the power from the foot on plus the foot's part below: `torch.where` would be
    # many times slower on a CPU than two clamps.
    power = _power(srgb.clamp(min=SRGB_FOOT).add_(0.055).div_(1.055), 2.4)
    return power.add_(srgb.clamp(max=SRGB_FOOT).sub_(SRGB_FOOT).div_(SRGB_SLOPE))


def _lab_curve(relative: Tensor) -> Tensor:
    power = _power(relative.clamp(min=XYZ_FOOT), 1 / 3)
    return power.add_(relative.clamp(max=XYZ_FOOT).sub_(XYZ_FOOT).mul_(LAB_SLOPE))


def _power(values: Tensor, exponent: float) -> Tensor:
    """Of positive values; four times as fast as `torch.pow` on a CPU, and right to some 1e-6 in float32."""
    return torch.log2(values).mul_(exponent).exp2_()


def _mixed(matrix: list[list[float]], channels: Tensor) -> list[Tensor]:
    """Rows of a 3 x 3 matrix times `(B, 3, H, W)`: a `(B, H, W)` each. No matmul: a GPU may do those in TF32."""
    first, second, third = channels.unbind(1)
    return [(row[0] * first).add_(row[1] * second).add_(row[2] * third) for row in matrix]
