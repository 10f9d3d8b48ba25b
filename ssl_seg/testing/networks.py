"""`check_encoder` and `check_decoder`: the conformance tests of the parts of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssl_seg.config import UserError, load
from ssl_seg.models import (
    Decoder,
    DecoderNet,
    DenseHead,
    Encoder,
    EncoderNet,
    Features,
    ModelConfig,
    evaluating,
)
from ssl_seg.testing.common import HALVING, check_config, check_gradients, pictures

HEAD_STRIDE = 4  # the coarsest at which a dense head of a built-in task answers


def check_encoder(config: Encoder, *, sizes: Sequence[tuple[int, int]] = ((33, 47), (64, 64), (97, 50))) -> None:
    """Raise AssertionError, with what is wrong in a sentence, for an encoder that breaks the contract of `Encoder`.

    It is built a few times and run on small images of `sizes` (H, W): check the smallest variant of a family. So it is
    for images of 1 and of 5 channels, where its `channel_counts` promise them.
    """
    with torch.random.fork_rng(devices=[]):
        check_config(config, Encoder)
        torch.manual_seed(0)
        encoder = config.build()
        _check_declared(encoder)
        for height, width in sizes:
            _check_features(encoder, pictures(2, height, width))
        _check_encoder_gradients(encoder, pictures(2, 64, 96))
        _check_fresh_weights(config, pictures(2, 64, 96))
        for channels in (1, 5):
            _check_channels(config, channels)
        for output_stride in (16, 8):
            try:
                dilated = config.build(output_stride)
            except UserError as error:
                _check_one_line("build", error)
            else:
                _check_declared(dilated)
                coarsest = dilated.strides[-1]
                assert coarsest <= output_stride, f"build({output_stride}) declares a map of stride {coarsest}"
                _check_features(dilated, pictures(2, 33, 70))


def _check_channels(config: Encoder, channels: int) -> None:
    """What is promised of another number of image channels is had, and what is not is refused in one line."""
    if channels not in config.channel_counts:
        try:
            load(ModelConfig, {"encoder": config, "channels": channels})
        except UserError as error:
            _check_one_line("model.channels", error)
            return
        raise AssertionError(f"channel_counts lack {channels}, and a model takes the encoder for as many")
    build: Callable[..., EncoderNet] = config.build
    encoder = build(32, channels)
    assert encoder.image_channels == channels, f"build(32, {channels}) normalizes {encoder.image_channels} channels"
    _check_declared(encoder)
    images = pictures(2, 64, 64, channels)
    _check_features(encoder, images)
    with evaluating(encoder):
        maps = encoder(images)
        for channel in range(channels):
            changed = images.clone()
            changed[:, channel] = 1 - changed[:, channel]
            others = [*encoder(changed)]
            assert not all(map(torch.equal, maps, others)), f"of {channels} channels the maps ignore number {channel}"


def check_decoder(config: Decoder, *, encoder: Encoder | None = None) -> None:
    """Raise AssertionError, with what is wrong in a sentence, for a decoder that breaks the contract of `Decoder`.

    It meets the maps of a few encoders: with and without stride 2, with stride 1, of fewer levels. It may refuse some
    of them by a UserError, but not all. With `encoder` it meets that one alone: for a decoder that needs extras.
    """
    with torch.random.fork_rng(devices=[]):
        check_config(config, Decoder)
        if encoder is not None:
            _check_pair(ModelConfig(encoder=encoder, decoder=config))
            return
        assert not config.required_extras, (
            f"it reads {', '.join(config.required_extras)}; give check_decoder an encoder"
        )
        strides = tuple(min(stride, config.output_stride) for stride in HALVING)
        layouts = (
            ((16, 24, 32, 48, 64), strides),
            ((0, 24, 32, 48, 64), strides),
            ((32, 32, 64, 64, 32), strides),
            ((16, 24, 32, 48, 64), (1, 2, 4, 8, 16)),
            ((16, 24, 32, 48), (2, 4, 8, 16)),
            ((16, 24, 32), (1, 2, 4)),
        )
        taken = 0
        for channels, at in layouts:
            torch.manual_seed(0)
            try:
                decoder = config.build(channels, at)
            except UserError as error:
                _check_one_line("build", error)
            else:
                taken += 1
                for height, width in ((64, 96), (96, 64)):
                    _check_decoding(decoder, _random_features(2, channels, at, height, width))
        assert taken, f"the decoder refuses every encoder, also one at strides {strides}"


def _check_pair(model: ModelConfig) -> None:
    """The decoder on what its own encoder gives."""
    torch.manual_seed(0)
    encoder = model.build_encoder()
    head = model.spec(encoder).dense(1)
    for height, width in ((64, 96), (96, 64)):
        with evaluating(encoder):
            features = encoder(pictures(2, height, width))
        _check_decoding(head.decoder, features)


def _check_one_line(what: str, error: UserError) -> None:
    assert len(str(error).splitlines()) == 1, f"{what} refuses in other than one line: {str(error)!r}"


def _check_declared(encoder: EncoderNet) -> None:
    """What it says of its maps makes sense; whether it is true, `_check_features` sees."""
    channels, strides, multiple = encoder.channels, encoder.strides, encoder.multiple
    assert len(channels) == len(strides), f"build declares channels {channels} for maps at strides {strides}"
    assert list(strides) == sorted(strides), f"build declares strides {strides}, not fine to coarse"
    assert channels[-1] > 0, "the coarsest map has no channels"
    for stride in (*strides, HEAD_STRIDE):
        assert multiple % stride == 0, f"multiple {multiple} is no multiple of stride {stride}"


def _check_features(encoder: EncoderNet, images: Tensor) -> None:
    """Maps and extras as declared; the same again, for each image alone, and without a trace on the input."""
    before = images.clone()
    with evaluating(encoder):
        features = encoder(images)
        again = encoder(images)
        alone = encoder(images[1:])
    assert torch.equal(images, before), "the encoder changes the images it is given"
    assert len(features) == len(encoder.strides), f"the encoder gives {len(features)} maps, not {len(encoder.strides)}"
    size = tuple(images.shape[-2:])
    padded = [-(-side // encoder.multiple) * encoder.multiple for side in size]
    given = tuple(padded[0] // level.shape[-2] for level in features)
    assert given == encoder.strides, f"build declares strides {encoder.strides}, and gives maps at {given}"
    assert features.strides == encoder.strides, f"its features name strides {features.strides}, not {encoder.strides}"
    for level, channels, stride in zip(features, encoder.channels, encoder.strides, strict=True):
        wanted = (len(images), channels, *(side // stride for side in padded))
        assert tuple(level.shape) == wanted, f"at {size} the stride {stride} map is {tuple(level.shape)}, not {wanted}"
        assert level.isfinite().all(), f"the map of stride {stride} is not finite"
    extras = sorted(features.extras)
    assert extras == sorted(encoder.extras), f"build declares extras {sorted(encoder.extras)}, and gives {extras}"
    for name, extra in features.extras.items():
        assert len(extra) == len(images), f"extra '{name}' is {tuple(extra.shape)}, without a row for each image"
        assert extra.isfinite().all(), f"extra '{name}' is not finite"
    assert all(map(torch.equal, _tensors(features), _tensors(again))), (
        "in eval mode the same images give other maps at the second call"
    )
    _, rows = features.split([1, len(images) - 1])
    assert all(map(_near, _tensors(rows), _tensors(alone))), (
        "in eval mode an image's maps depend on the images beside it"
    )


def _tensors(features: Features) -> list[Tensor]:
    """Maps, and extras in the order of their names."""
    return [*features, *(features.extras[name] for name in sorted(features.extras))]


def _check_encoder_gradients(encoder: EncoderNet, images: Tensor) -> None:
    encoder.train()
    outputs = [output for output in _tensors(encoder(images)) if output.is_floating_point()]
    used = [output.square().mean() for output in outputs if output.numel()]
    torch.stack(used).sum().backward()
    check_gradients("encoder", encoder, every=True)
    encoder.zero_grad(set_to_none=True)


def _check_fresh_weights(config: Encoder, images: Tensor) -> None:
    torch.manual_seed(1)
    first = config.build()
    torch.manual_seed(1)
    second = config.build()
    state = first.state_dict()
    same = all(torch.equal(value, state[name]) for name, value in second.state_dict().items())
    assert same, "two builds from one seed differ; draw weights from torch's own generator alone"
    with torch.no_grad():
        for weight in second.parameters():
            weight.add_(1.0)
    shared = any(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert not shared, "two builds share weights"
    second.load_state_dict(state)
    with evaluating(first), evaluating(second):
        equal = all(map(torch.equal, _tensors(first(images)), _tensors(second(images))))
    assert equal, "state_dict does not hold all that the maps depend on"


def _check_decoding(decoder: DecoderNet, features: Features) -> None:
    height, width = features.size
    kept = [output.clone() for output in _tensors(features)]
    decoder.train()
    decoded = decoder(features)
    assert decoded.shape[:2] == (2, decoder.out_channels), (
        f"the decoder gives {tuple(decoded.shape)}, not (B, {decoder.out_channels}, h, w) as out_channels says"
    )
    stride = height // decoded.shape[2]
    sides = tuple(side * stride for side in decoded.shape[-2:])
    assert sides == (height, width), f"a {height} x {width} input is decoded to {tuple(decoded.shape[-2:])}"
    same = all(map(torch.equal, _tensors(features), kept))
    assert same, "the decoder changes the features it is given; heads share them"

    features[-1].requires_grad_()
    decoder(features).square().mean().backward()
    check_gradients("decoder", decoder, every=True)
    assert features[-1].grad is not None, "the coarsest map is not used"
    decoder.zero_grad(set_to_none=True)
    _check_decoded(decoder, features)
    head = DenseHead(decoder, 5)
    with evaluating(head):
        answer = head(features, (height - 13, width - 5))
    assert answer.shape[1] == 5, f"last_layer(5) gives {answer.shape[1]} channels"
    assert answer.shape[-2:] == (height - 13, width - 5), f"the head gives {tuple(answer.shape[-2:])}"


def _check_decoded(decoder: DecoderNet, features: Features) -> None:
    with evaluating(decoder):
        decoded = decoder(features)
        again = decoder(features)
        alone = decoder(features.split([1, 1])[1])
        moved = (decoder(_laid_at_origin(features)) - decoded).abs().mean(dim=(0, 1))  # (h, w)
    assert decoded.isfinite().all(), "the decoded map is not finite"
    assert torch.equal(decoded, again), "in eval mode the same features are decoded otherwise at the second call"
    assert _near(decoded[1:], alone), "in eval mode an image's map depends on the images beside it"
    rows, columns = (max(1, side // 4) for side in moved.shape)  # a map of stride 32 has 2 x 3 pixels here
    here, there = moved[:rows, :columns].mean(), moved[-rows:, -columns:].mean()
    assert here > there, "a change of the features in one corner moves the opposite corner more: the map is misplaced"


def _laid_at_origin(features: Features) -> Features:
    """The features with other maps in the first 32 x 32 pixels of the image."""
    changed = [level.clone() for level in features]
    for level, stride in zip(changed, features.strides, strict=True):
        side = 32 // stride
        level[:, :, :side, :side] = level[:, :, :side, :side].neg() + 1.0
    return replace(features, maps=changed)


def _random_features(count: int, channels: Sequence[int], strides: Sequence[int], height: int, width: int) -> Features:
    sizes = [(height // stride, width // stride) for stride in strides]
    maps = [torch.randn(count, width_, *size) for width_, size in zip(channels, sizes, strict=True)]
    return Features(maps, tuple(strides))


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, relative to the largest value: maps have no fixed range."""
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())
