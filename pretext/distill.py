"""Distill: the network's maps predict those of a teacher that has been trained elsewhere and stays as it is.

Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, by maps in place of answers: Romero et
al., "FitNets: hints for thin deep nets", ICLR 2015, on several maps at once. No labels are asked for, and images of any
kind will do: what the teacher knows of them is what there is to learn.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import losses, rng
from ssl_seg.config import PathText, UserError
from ssl_seg.models import RGB, Encoder, EncoderNet, EncoderSpec, Features
from ssl_seg.tasks import PretextTask, View
from ssl_seg.weights.export import exported_config, load_encoder, read_encoder_info
from ssl_seg.weights.fingerprint import digest_of

FINEST = 4  # stride that is taught by default: at 2 there are edges, and as many numbers as in all other maps
AT_ONCE = 8  # images that the teacher sees at a time while it is measured
LEAST_SPREAD = 0.01  # of a channel, as a share of the mean over the channels: one that hardly changes is rounding


def _published(value: Any) -> Any:
    """`{name: resnet50}` is a network of timm with its default weights, and so is the name alone."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping) and value.get("type", "timm") == "timm":
        return {"type": "timm", "pretrained": True, **value}
    return value


class Distill(PretextTask):
    """Predict the maps of a teacher that sees the same crop.

    Each of the teacher's channels is measured in its own spread over the pool, around its own mean: a squared error of
    1 is that of a map that is the same for all images, and no channel outweighs another. The teacher is in evaluation
    mode, in float32, and no gradient reaches it; state dicts, DDP and the moving average do not know it.
    """

    in_place: ClassVar[bool] = True

    @property
    def channel_counts(self) -> Collection[int]:
        """What the teacher takes: as many as its run, and a published network RGB."""
        info = {} if self.run is None else read_encoder_info(self.run)
        return (exported_config(str(self.run), info).channels if info else RGB,)

    # The norm of its gradient on the encoder, while seven tasks are trained together on CamVid in batches of 4, is 0.45
    # and 0.35 after 50 and 150 steps; those of denoise, inpaint, colorize and jigsaw are 0.45 to 1.09 and 0.57 to 0.76.
    weight: NonNegativeFloat = 1.0
    # One of the two. As `model.encoder`, with its published weights unless `pretrained` says otherwise.
    teacher: Annotated[SerializeAsAny[Encoder] | None, BeforeValidator(_published)] = None
    run: PathText | None = None  # the encoder that a run has exported
    # Of the maps that are predicted. None: all from stride 4 on that the teacher's weights make; of a plain transformer
    # (ViT, DINOv2, DINOv3) that is one, at stride 16.
    strides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    distance: losses.Distance = "mse"  # as in FitNets
    # What `prepare` finds: sha256 of the teacher's weights, and the mean and spread of each channel of each map. Others
    # than these weights are refused; without means and spreads maps are taken as they are.
    digest: str | None = None
    means: tuple[tuple[float, ...], ...] | None = None
    spreads: tuple[tuple[PositiveFloat, ...], ...] | None = None

    @model_validator(mode="after")
    def _check_one_teacher(self) -> Self:
        if (self.teacher is None) == (self.run is None):
            raise ValueError(
                "wants one teacher: a network of timm as teacher={name: resnet50}, or the run of an encoder as run=PATH"
            )
        if (self.means is None) != (self.spreads is None):
            raise ValueError("means and spreads belong together; leave both out to have them measured")
        return self

    @property
    def origin(self) -> str | None:
        return self.run or getattr(self.teacher, "weights_file", None)

    @cached_property
    def frozen(self) -> Frozen:
        """The teacher. Raises UserError where its weights are not there, or are not those of `digest`."""
        found = Frozen(self._built())
        if self.digest is not None and found.digest != self.digest:
            raise UserError(
                f"distill: the teacher's weights are not those that the run began with (sha256 {found.digest[:12]}, "
                f"not {self.digest[:12]}); put {self.origin or 'them'} back, or start anew with --overwrite"
            )
        return found

    @cached_property
    def taught(self) -> tuple[int, ...]:
        """The strides of the maps that are predicted. Raises UserError for one that the teacher has not."""
        net = self.frozen.net
        own = net.strides if self.run is not None else net.own_strides
        have = tuple(dict.fromkeys(s for s, channels in zip(net.strides, net.channels, strict=True) if channels))
        have = tuple(stride for stride in have if stride in own)
        if self.strides is None:
            return tuple(stride for stride in have if stride >= FINEST) or have[-1:]
        missing = [stride for stride in self.strides if stride not in have]
        if missing:
            raise UserError(
                f"distill: strides: the teacher's weights make no map of stride {missing[0]}; choose among "
                f"{', '.join(map(str, have))}"
            )
        return self.strides

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the maps that are predicted."""
        net = self.frozen.net
        return tuple(net.channels[_last(net.strides, stride)] for stride in self.taught)

    def prepare(self, images: Tensor) -> Self:
        """With the teacher's `digest`, and with the pool's `means` and `spreads` unless they are given."""
        found: dict[str, Any] = {"digest": self.frozen.digest}
        if self.means is None:
            parts = [self._maps(some) for some in images.split(AT_ONCE)]
            levels = [torch.cat(level).double() for level in zip(*parts, strict=True)]
            spreads = [level.std(dim=(0, 2, 3), correction=0) for level in levels]
            found["means"] = tuple(tuple(level.mean(dim=(0, 2, 3)).tolist()) for level in levels)
            found["spreads"] = tuple(tuple(own.clamp(min=_least(own)).tolist()) for own in spreads)
        prepared = self.model_copy(update=found)
        vars(prepared)["frozen"] = self.frozen  # its weights are read once
        return prepared

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        levels = self._maps(image)
        if self.means is not None and self.spreads is not None:
            scales = zip(self.means, self.spreads, strict=True)
            scales = [[_on(image.device, numbers) for numbers in pair] for pair in scales]
            levels = [(level - mean) / spread for level, (mean, spread) in zip(levels, scales, strict=True)]
        return View(image, torch.cat([level.flatten(1) for level in levels], dim=1))

    def head(self, encoder: EncoderSpec) -> nn.Module:
        for name, given in (("means", self.means), ("spreads", self.spreads)):
            if given is not None and tuple(map(len, given)) != self.channels:
                raise UserError(
                    f"distill: {name}: has {', '.join(str(len(own)) for own in given)} numbers for maps of "
                    f"{', '.join(map(str, self.channels))} channels; leave means and spreads out to have them measured"
                )
        return Projections(encoder, self.taught, self.channels)

    def guess(self, view: View) -> Tensor:
        """The pool's means."""
        return torch.zeros_like(view.target)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        """The mean over the maps, each of which counts alike."""
        return torch.stack([losses.regression(self.distance, *pair) for pair in self._pairs(prediction, view)]).mean(0)

    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        """Per map the share of the teacher's variance over the pool that is predicted: 0 for the mean, 1 for all."""
        errors = [losses.regression("mse", *pair) for pair in self._pairs(prediction, view)]
        return {f"explained_{stride}": 1.0 - error for stride, error in zip(self.taught, errors, strict=True)}

    def render(self, prediction: Tensor, view: View) -> Tensor:
        """The finest map: what the teacher's three main directions in this image are, as red, green and blue."""
        (predicted, taught), *_ = self._pairs(prediction, view)
        return _in_colours(predicted, taught, view.input.shape[-2:])

    def render_target(self, view: View) -> Tensor:
        (_, taught), *_ = self._pairs(view.target, view)
        return _in_colours(taught, taught, view.input.shape[-2:])

    def _built(self) -> EncoderNet:
        if self.run is None:
            assert self.teacher is not None, "the validator has seen to one of the two"
            with rng.seeded(rng.as_key("teacher")):  # of `pretrained: false`, and of layers that are not used
                return self.teacher.build()
        info = read_encoder_info(self.run)
        if not info:
            raise UserError(f"distill: run: {self.run} has no encoder.json beside it; name the run or its encoder/")
        with rng.seeded(rng.as_key("teacher")):
            net = exported_config(self.run, info).without_pretrained().build_encoder()
        load_encoder(net, self.run)
        return net

    def _maps(self, image: Tensor) -> list[Tensor]:
        """The teacher's maps `(B, C, ceil(H / stride), ceil(W / stride))` of images `(B, 3, H, W)`."""
        features = self.frozen(image)
        levels = [features[_last(features.strides, stride)] for stride in self.taught]
        return [_of_image(level, image.shape[-2:], stride) for level, stride in zip(levels, self.taught, strict=True)]

    def _pairs(self, prediction: Tensor, view: View) -> list[tuple[Tensor, Tensor]]:
        """Map by map `(B, C, h, w)` what is predicted and what is wanted, from rows of all numbers of an image."""
        shapes = [
            (channels, *_cells(view.input.shape[-2:], stride))
            for channels, stride in zip(self.channels, self.taught, strict=True)
        ]
        counts = [channels * height * width for channels, height, width in shapes]
        split = [
            [part.unflatten(1, shape) for part, shape in zip(rows.split(counts, dim=1), shapes, strict=True)]
            for rows in (prediction, view.target)
        ]
        return list(zip(*split, strict=True))


class Frozen:
    """A network that is asked and never trained.

    No module, and shared by copies: so no state dict, no DDP and no moving average holds it.
    """

    def __init__(self, net: EncoderNet) -> None:
        self.net = net.eval().requires_grad_(False)
        self.digest = digest_of(net)
        self._on = {torch.device("cpu"): self.net}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __call__(self, image: Tensor) -> Features:
        """Its features of images `(B, 3, H, W)` in [0, 1], on their device, in float32."""
        if image.device not in self._on:
            self._on[image.device] = copy.deepcopy(self.net).to(image.device)
        with torch.no_grad():
            return self._on[image.device](image)


class Projections(nn.Module):
    """A linear layer for each of the teacher's maps, on a map of the student: rows `(B, N)` of all their numbers.

    It is the student's deepest map that is no coarser, averaged where it is finer; else its finest, interpolated.
    """

    def __init__(self, encoder: EncoderSpec, strides: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        have = [level for level, width in enumerate(encoder.channels) if width]
        self.levels = [
            max((level for level in have if encoder.strides[level] <= stride), default=have[0]) for stride in strides
        ]
        self.layers = nn.ModuleList(
            nn.Conv2d(encoder.channels[level], width, kernel_size=1)
            for level, width in zip(self.levels, channels, strict=True)
        )

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        rows = []
        for stride, level, layer in zip(self.strides, self.levels, self.layers, strict=True):
            predicted = layer(_of_image(features[level], size, features.strides[level]))
            cells = _cells(size, stride)
            if features.strides[level] < stride:
                predicted = F.adaptive_avg_pool2d(predicted, cells)
            elif features.strides[level] > stride:
                predicted = F.interpolate(predicted, size=cells, mode="bilinear", align_corners=False)
            rows.append(predicted.flatten(1))
        return torch.cat(rows, dim=1)


@lru_cache
def _on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    """`(C, 1, 1)`, copied to a device once: a copy at every step would stop the host."""
    return torch.tensor(numbers, device=device).view(-1, 1, 1)


def _cells(size: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of a map that covers an image of `size` (H, W)."""
    height, width = (-(-side // stride) for side in size)
    return height, width


def _of_image(level: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """A map without what lies beyond the image: encoders pad."""
    height, width = _cells(size, stride)
    return level[..., :height, :width]


def _last(strides: Sequence[int], stride: int) -> int:
    """The last of the maps of one stride: the deepest."""
    return max(level for level, own in enumerate(strides) if own == stride)


def _least(spreads: Tensor) -> float:
    mean = spreads.mean().item()
    return LEAST_SPREAD * mean if mean > 0 else 1.0


def _in_colours(level: Tensor, basis: Tensor, size: Sequence[int]) -> Tensor:
    """`(B, 3, *size)` in [0, 1] from maps `(B, C, h, w)`, by the main directions in which `basis` varies."""
    centred = basis.flatten(2) - basis.mean(dim=(2, 3), keepdim=True).flatten(2)  # (B, C, N)
    spread, directions = torch.linalg.eigh(centred.double() @ centred.double().transpose(1, 2) / centred.shape[2])
    spread, directions = spread[:, -3:].flip(1), directions[:, :, -3:].flip(2).to(level)  # the largest come last
    moved = level.flatten(2) - basis.mean(dim=(2, 3), keepdim=True).flatten(2)
    colours = directions.transpose(1, 2) @ moved / (4.0 * spread.clamp(min=1e-12).sqrt().unsqueeze(2).to(level))
    colours = (0.5 + colours).clamp(0.0, 1.0).unflatten(2, level.shape[-2:])
    return F.interpolate(colours, size=tuple(size), mode="nearest")
