"""The contracts of the network: what an encoder gives, what a decoder takes, and how the two become a model.

One architecture a file beside this one. An encoder gives `Features`: maps, fine to coarse, and further outputs by name.
A decoder says what it needs of them, so that any two fit each other or are refused in one line.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg.config import Config, Plugin, UserError, known_to_0_1
from ssl_seg.images import MAX_CHANNELS, ChannelsField
from ssl_seg.norm.convert import Kind, convert_norm, follow_once, has_batch_norm

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB in [0, 1], as every torchvision and timm model assumes
IMAGENET_STD = (0.229, 0.224, 0.225)
# What makes a map of the encoder's maps. full: the segmentation decoder. deep: the same, which gets zeros in place of
# all maps but the coarsest. light: a `LightNet`.
DecoderKind = Literal["full", "deep", "light"]
RGB = 3  # channels of the images that published weights have seen
ANY_CHANNELS = range(1, MAX_CHANNELS + 1)
LIGHT_WIDTH = 64  # channels of a light decoder; on resnet18 it has a twentieth of the weights of a U-Net
LIGHT_STRIDE = 4  # of its map, the finest that many decoders have
RECONSTRUCTION = "reconstruction"  # the extra of an encoder that draws the image anew: (B, C, H, W) in [0, 1], padded


@dataclass(eq=False)
class Features:
    """What an encoder gives for a batch. It reads as the sequence of its maps: `features[-1]` is the coarsest."""

    maps: list[Tensor]  # fine to coarse: (B, C_i, H / stride_i, W / stride_i); C_i = 0 where there is no such map
    strides: tuple[int, ...]  # of the maps: 1 is the image's own resolution
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # each (B, ...): pool indices, a reconstruction ...

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.maps)

    def __getitem__(self, level: int) -> Tensor:
        return self.maps[level]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images as the backbone saw them: padded."""
        height, width = self.maps[-1].shape[-2:]
        return height * self.strides[-1], width * self.strides[-1]

    @property
    def tensors(self) -> list[Tensor]:
        """Maps and extras."""
        return [*self.maps, *self.extras.values()]

    def cut_off(self) -> Features:
        """The same values, at which the way back to the encoder ends: gradients are kept there."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        extras = {name: cut(extra) for name, extra in self.extras.items()}
        return Features([cut(level) for level in self.maps], self.strides, extras)

    def split(self, counts: Sequence[int]) -> list[Features]:
        """Those of the first `counts[0]` images, of the next `counts[1]` and so on; the counts add up to the batch."""
        maps = zip(*(level.split(counts) for level in self.maps), strict=True)
        extras = {name: extra.split(counts) for name, extra in self.extras.items()}
        return [
            Features(list(own), self.strides, {name: parts[index] for name, parts in extras.items()})
            for index, own in enumerate(maps)
        ]


class EncoderNet(nn.Module):
    """RGB in [0, 1] of any size in, `Features` out; it normalizes and pads inside.

    Where `model.channels` says so, images have another number of channels: as many as `mean` and `std` have values.

    `backbone(x)` takes normalized images whose sides `multiple` divides. It returns its maps as a list, with `channels`
    and `strides`; where it gives more, `Features` with the `extras` of these names. Every stride divides `multiple`,
    and so does 4, the stride at which some heads answer.
    """

    mean: Tensor  # (1, C, 1, 1), as is std
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int] = (2, 4, 8, 16, 32),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        multiple: int = 32,
        extras: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self.multiple = multiple
        self.extras = tuple(extras)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    @property
    def image_channels(self) -> int:
        """Of the images that it takes."""
        return self.mean.shape[1]

    @property
    def own_strides(self) -> tuple[int, ...]:
        """Those of the maps that the backbone's published weights make.

        Of a plain transformer they make one; the layers that make the rest of its pyramid start from random weights.
        """
        return getattr(self.backbone, "own_strides", self.strides)

    def checkpoint(self) -> None:
        """Compute parts of the backbone again for the gradient, in place of keeping what they gave.

        Gradients and running statistics are the same. A backbone that can has a method `checkpoint` that turns it on.
        Raises UserError for one that has not, or that would keep as much.
        """
        turn_on = getattr(self.backbone, "checkpoint", None)
        if turn_on is None:
            raise UserError(
                "train.checkpointing: this encoder keeps all that its gradient needs; take one of timm (model.encoder: "
                "{type: timm}), or train.encode=in_turn or train.accumulate=auto for less memory"
            )
        turn_on()
        follow_once(self)

    def forward(self, image: Tensor) -> Features:
        if image.shape[1] != self.image_channels:  # those of one channel would be spread over all
            raise UserError(
                f"images of {image.shape[1]} channels, and the network takes {self.image_channels} (model.channels)"
            )
        normal = (image - self.mean) / self.std
        height, width = normal.shape[-2:]
        # Zero is the mean colour here, so the padding adds no edge brighter or darker than the images are.
        padded = F.pad(normal, (0, -width % self.multiple, 0, -height % self.multiple))
        alone = self.training and len(image) == 1 and max(padded.shape[-2:]) == self.strides[-1]
        if alone and has_batch_norm(self.backbone):
            raise UserError(
                f"one image of {height} x {width} leaves batch norm one value, without a variance; raise augment.crop, "
                "or train.batch_size for 2 images or more a pass, or use norm: group"
            )
        given = self.backbone(padded)
        return given if isinstance(given, Features) else Features(list(given), self.strides)


class Stages(nn.ModuleList):
    """Layers in a row; the output of each is a map."""

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = []
        for stage in self:
            image = stage(image)
            maps.append(image)
        return maps


class DecoderNet(nn.Module, ABC):
    """`Features` in, one map `(B, out_channels, h, w)` out, at a resolution that is a whole fraction of the input's."""

    last_kernel: ClassVar[int] = 3  # side of the convolution that a head puts on top, odd; 3 as smp's SegmentationHead
    out_channels: int

    @abstractmethod
    def forward(self, features: Features) -> Tensor: ...

    def last_layer(self, out_channels: int) -> nn.Module:
        """A fresh last layer, from this decoder's map to one prediction a pixel; each head has its own.

        It may enlarge the map, as a published network's transposed convolution does. Start it by `near_zero`.
        """
        padding = self.last_kernel // 2
        return near_zero(nn.Conv2d(self.out_channels, out_channels, kernel_size=self.last_kernel, padding=padding))


def near_zero(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """The layer with weights near 0, as in RetinaNet (Lin et al. 2017).

    The first loss is then that of a flat answer, not of a random one.
    """
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class LightNet(DecoderNet):
    """The coarsest map upsampled to stride 4, a convolution at each doubling: no skips, few channels, no norm.

    Whatever it draws has passed the whole encoder.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        doublings = max(0, (stride // LIGHT_STRIDE).bit_length() - 1)
        self.out_channels = LIGHT_WIDTH
        self.first = nn.Conv2d(channels, LIGHT_WIDTH, kernel_size=1)
        self.steps = nn.ModuleList(
            nn.Conv2d(LIGHT_WIDTH, LIGHT_WIDTH, kernel_size=3, padding=1) for _ in range(doublings)
        )

    def forward(self, features: Features) -> Tensor:
        level = F.gelu(self.first(features[-1]))
        for step in self.steps:
            level = F.interpolate(level, scale_factor=2, mode="nearest")
            level = F.gelu(step(level))
        return level


class DenseHead(nn.Module):
    """A decoder with a last layer: one prediction a pixel. Carrying `decoder` to another task keeps all but `last`.

    `deep` cuts the decoder's skips: it gets zeros in place of all maps but the coarsest. Its weights stay those of the
    whole decoder, so they can be carried on.
    """

    def __init__(self, decoder: DecoderNet, out_channels: int, stride: int = 1, deep: bool = False) -> None:
        super().__init__()
        self.decoder = decoder
        self.deep = deep
        self.last = decoder.last_layer(out_channels)
        self.stride = stride

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """`(B, out_channels, ceil(H / stride), ceil(W / stride))` for an input of `size` (H, W)."""
        height, width = features.size
        if self.deep:
            features = replace(features, maps=[*map(torch.zeros_like, features.maps[:-1]), features[-1]])
        decoded = self.decoder(features)  # (B, C, h, w) of the padded input
        at_stride = (height // self.stride, width // self.stride)
        if decoded.shape[-1] > at_stride[-1]:
            # Before the last layer: with hundreds of channels it would be most of the step at the full resolution.
            decoded = F.adaptive_avg_pool2d(decoded, at_stride)
        decoded = self.last(decoded)
        if tuple(decoded.shape[-2:]) != at_stride:
            decoded = F.interpolate(decoded, size=at_stride, mode="bilinear", align_corners=False)
        height, width = (-(-side // self.stride) for side in size)
        return decoded[..., :height, :width]


@dataclass(frozen=True)
class EncoderSpec:
    """What a task may know of the encoder when it builds its head."""

    channels: tuple[int, ...]  # of the maps, fine to coarse; 0 where there is no such map
    strides: tuple[int, ...]
    # dense(out_channels, stride=1, decoder="full"): the segmentation model's decoder, or what else a `DecoderKind` is;
    # fresh weights.
    dense: Callable[..., DenseHead]
    extras: tuple[str, ...] = ()  # names of the outputs beside the maps
    image_channels: int = RGB  # of the images


class ReconstructionHead(nn.Module):
    """The encoder's own drawing of the image as a task's answer: no decoder, no weights."""

    def __init__(self, encoder: EncoderSpec, out_channels: int, stride: int = 1) -> None:
        """Raises UserError for an encoder that draws none, and for an answer that is no picture."""
        super().__init__()
        if RECONSTRUCTION not in encoder.extras:
            raise UserError(
                f"decoder: {RECONSTRUCTION}: model.encoder draws none; choose encoder stacked with halves: 2, or "
                "decoder: full"
            )
        if (out_channels, stride) != (encoder.image_channels, 1):
            raise UserError(
                f"decoder: {RECONSTRUCTION}: is a picture, and the task asks for {out_channels} channels at stride "
                f"{stride}; use decoder: full"
            )

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """`(B, C, H, W)` for an input of `size` (H, W)."""
        height, width = size
        return features.extras[RECONSTRUCTION][..., :height, :width]


class Encoder(Plugin, ABC):
    """A family of backbones; its fields are the options of `model.encoder`."""

    package: ClassVar[str] = "ssl_seg.models"
    group: ClassVar[str] = "ssl_seg.models"
    # Numbers of image channels that it can be built for. One that takes others than 3 has a second argument of `build`.
    channel_counts: ClassVar[Collection[int]] = (RGB,)

    @abstractmethod
    def build(self, output_stride: int = 32) -> EncoderNet:
        """A fresh network with random or (where `pretrained` says so) published weights.

        Of one with other `channel_counts` it is `build(output_stride=32, channels=3)`.

        `output_stride` 16 or 8 asks for no coarser map than that, by dilation in place of the last strides; an encoder
        that cannot raises UserError. 32 leaves the architecture as it is.
        """

    def published_tensors(self) -> tuple[Path, Mapping[str, Tensor]] | None:
        """The file of published weights that `build` reads, and its tensors by name: for a receipt. None: without."""
        return None


class Decoder(Plugin, ABC):
    """A family of decoders; its fields are the options of `model.decoder`."""

    package: ClassVar[str] = "ssl_seg.models"
    group: ClassVar[str] = "ssl_seg.models"

    @property
    def output_stride(self) -> int:
        """The coarsest stride this decoder wants from the encoder."""
        return 32

    @property
    def required_extras(self) -> tuple[str, ...]:
        """Names of the extras that this decoder reads; `ModelConfig` refuses an encoder without one of them."""
        return ()

    @abstractmethod
    def build(self, channels: Sequence[int], strides: Sequence[int]) -> DecoderNet:
        """A fresh decoder for an encoder's maps. Raises UserError with one line for maps that do not fit."""


def _of_type(default: str, word: str = "type") -> BeforeValidator:
    """`{name: resnet50}` alone means the default type, and a word alone is the value of `word`."""

    def with_type(value: Any) -> Any:
        if isinstance(value, str):
            value = {word: value}
        return {"type": default, **value} if isinstance(value, Mapping) else value

    return BeforeValidator(with_type)


class ModelConfig(Config):
    """The network that pretraining and fine-tuning share."""

    # A word alone is a name of timm: `encoder: resnet50`. `validate_default`, which every Config has, is said again for
    # the type checker.
    encoder: Annotated[SerializeAsAny[Encoder], _of_type("timm", word="name")] = Field(
        default={}, validate_default=True
    )
    decoder: Annotated[SerializeAsAny[Decoder], _of_type("unet")] = Field(default={}, validate_default=True)
    # keep: the layers as the architecture has them. Any other word converts every batch norm layer of encoder and
    # decoders (swin + unet: the decoder's; swin has layer norm only). With group, instance and layer a result does not
    # depend on the batch; switch learns which statistics each layer takes. frozen is for an encoder that comes with
    # statistics (pretrained, init) and leaves the decoders, which start without, their batch norm.
    norm: Kind = "keep"
    # Of the images: 3 are RGB, 1 is grey, others are bands. Data sets are read so, and exports keep it. Of published
    # weights the first convolution is adapted as timm does: summed for one channel, else repeated and scaled.
    channels: ChannelsField = RGB

    @model_validator(mode="after")
    def _fits_encoder(self) -> ModelConfig:
        if self.channels not in self.encoder.channel_counts:
            raise ValueError(f"channels: {self._say_counts()}")
        return self

    def _say_counts(self) -> str:
        counts = ", ".join(map(str, self.encoder.channel_counts))
        return (
            f"{self.channels}: encoder {self.encoder.type} takes images of {counts} channels alone; choose another "
            "encoder"
        )

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=("channels",))

    def without_pretrained(self) -> ModelConfig:
        """The same network, starting from random weights: for one whose weights come from elsewhere."""
        if "pretrained" not in type(self.encoder).model_fields:
            return self
        return self.model_copy(update={"encoder": self.encoder.model_copy(update={"pretrained": False})})

    def build_encoder(self) -> EncoderNet:
        """Raises UserError where `norm` asks for a conversion and neither encoder nor decoder has batch norm."""
        stride = self.decoder.output_stride
        # Plug-ins that know RGB alone have no argument for it.
        encoder = self.encoder.build(stride) if self.channels == RGB else self._with_channels(stride)
        assert encoder.image_channels == self.channels, "an encoder builds what its channel_counts promise"
        if has_batch_norm(encoder) or self.norm == "frozen":
            convert_norm(encoder, self.norm)
        elif self.norm != "keep":
            # The whole network is asked before it is refused; the random numbers of this decoder are given back.
            with torch.random.fork_rng(devices=[]):
                convert_norm(self._build_decoder(encoder), self.norm)
        return encoder

    def _with_channels(self, stride: int) -> EncoderNet:
        if self.channels not in self.encoder.channel_counts:  # one that was laid on the model of another run
            raise UserError(f"model.channels: {self._say_counts()}")
        build: Callable[..., EncoderNet] = self.encoder.build
        return build(stride, self.channels)

    def spec(self, encoder: EncoderNet) -> EncoderSpec:
        """What heads may know of `encoder`; `dense` builds this config's decoder with fresh weights."""

        def dense(out_channels: int, stride: int = 1, decoder: DecoderKind = "full") -> DenseHead:
            if decoder == "light":
                return DenseHead(LightNet(encoder.channels[-1], encoder.strides[-1]), out_channels, stride)
            own = self._build_decoder(encoder)
            if has_batch_norm(own) and self.norm != "frozen":  # fpn has none, whatever the encoder has
                convert_norm(own, self.norm)
            return DenseHead(own, out_channels, stride, deep=decoder == "deep")

        return EncoderSpec(encoder.channels, encoder.strides, dense, encoder.extras, encoder.image_channels)

    def _build_decoder(self, encoder: EncoderNet) -> DecoderNet:
        missing = [name for name in self.decoder.required_extras if name not in encoder.extras]
        if missing:
            raise UserError(
                f"model.decoder: {self.decoder.type} reads {', '.join(missing)}, which encoder {self.encoder.type} "
                "does not give; choose an encoder that does, or a decoder that reads maps alone, as unet"
            )
        return self.decoder.build(encoder.channels, encoder.strides)


class SegmentationModel(nn.Module):
    """Encoder and segmentation head: RGB in [0, 1], `(B, 3, H, W)`, to logits `(B, K, H, W)` at any size.

    With another number of channels, `image_channels` of them.
    """

    def __init__(self, encoder: EncoderNet, head: nn.Module, class_names: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.class_names = tuple(class_names)

    @property
    def image_channels(self) -> int:
        """Of the images that it takes."""
        return self.encoder.image_channels

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[-2:]
        with telling_small_maps(size):
            return self.head(self.encoder(image), size)


def image_channels_of(net: nn.Module) -> int:
    """Of the images that a network takes, whatever is wrapped around its encoder; RGB where there is none."""
    encoders = (part.image_channels for part in net.modules() if isinstance(part, EncoderNet))
    return next(encoders, RGB)


def constants_of(values: Sequence[float], channels: int) -> list[float]:
    """The mean or std of RGB for another number of channels, as the weights behind them are adapted: of one the mean.

    >>> constants_of((0.5, 0.4, 0.3), 5), round(constants_of((0.5, 0.4, 0.3), 1)[0], 3)
    ([0.5, 0.4, 0.3, 0.5, 0.4], 0.4)
    """
    if channels == 1:
        return [sum(values) / len(values)]
    return [values[channel % len(values)] for channel in range(channels)]


@contextmanager
def telling_small_maps(size: Sequence[int]) -> Iterator[None]:
    """A norm layer that has one value a channel, without a variance, becomes one line about images of `size` (H, W)."""
    try:
        yield
    except ValueError as error:
        if not re.match("Expected more than 1 (value per channel|spatial element)", str(error)):
            raise
        height, width = size
        raise UserError(
            f"an image of {height} x {width} leaves a norm layer one value a channel, without a variance; give larger "
            "ones (augment.crop, data.resize), or another model.norm or model.decoder"
        ) from error


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it each part has its own former mode, frozen parts too."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with in_evaluation_mode(module), torch.no_grad():
        yield
