"""`check_pretext_task`: the conformance test of a pretext task, on a tiny network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import rng
from ssl_seg.models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DecoderKind,
    DecoderNet,
    DenseHead,
    Encoder,
    EncoderNet,
    EncoderSpec,
    Features,
    LightNet,
    constants_of,
    evaluating,
)
from ssl_seg.tasks import PAIR, PretextTask, View
from ssl_seg.testing.common import HALVING, check_config, check_gradients, pictures

TOLERANCE = 1e-5  # sums over a batch of another size may round differently


def check_pretext_task(
    task: PretextTask,
    *,
    size: tuple[int, int] = (64, 64),
    keyed: bool = True,
    steps: int = 40,
    drop: float = 0.7,
    encoder: Encoder | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Raise AssertionError, with what is wrong in a sentence, for a task that breaks the contract of `PretextTask`.

    Takes about a second on a CPU: the network is a tiny one inside. It has five maps at strides 2 to 32, and once four
    at strides 1 to 8. `size` is the images' (H, W); a second, oblong and odd size is made from it. `keyed=False` is for
    a task that draws nothing at random. Of a task that `mixes` a sample may depend on its partner. The task has to
    bring its loss on four images under `drop` times the first one in `steps` steps. A task that needs extras is given
    the `encoder` that has them, in place of the tiny one. A task that asks a network for its answer is given a larger
    `tolerance`: convolutions round differently in batches of another size. Of 1 and of 5 image channels, where its
    `channel_counts` promise them, head, loss and pictures are looked at too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = _check_prepare(task, pictures(4, *size))
        check_config(task, PretextTask)
        odd = (size[0] - 11, size[1] + 13)
        for count, (height, width), strides in ((4, size, HALVING), (1, size, (1, 2, 4, 8)), (3, odd, HALVING)):
            images, keys = pictures(count, height, width), rng.fold_in(rng.as_key("check"), torch.arange(count))
            _check_view(task, images, keys, keyed, tolerance)
            _check_answer(task, images, keys, strides, encoder)
        for channels in (1, 5):
            if channels in task.channel_counts and encoder is None:
                images, keys = pictures(2, *size, channels), rng.fold_in(rng.as_key("check"), torch.arange(2))
                _check_answer(task.prepare(images), images, keys, HALVING, encoder)
        _check_learning(task, pictures(4, *size), steps, drop, encoder)


def _check_prepare(task: PretextTask, images: Tensor) -> PretextTask:
    before = images.clone()
    prepared = task.prepare(images)
    assert type(prepared) is type(task), f"prepare gives a {type(prepared).__name__}; it should give a copy of the task"
    assert torch.equal(images, before), "prepare changes the images it measures"
    return prepared


def _check_view(task: PretextTask, images: Tensor, keys: Tensor, keyed: bool, tolerance: float) -> None:
    count = len(images)
    before, keys_before = images.clone(), keys.clone()
    view = task.corrupt(images, keys)
    assert torch.equal(images, before), "corrupt changes the images it is given; work on a copy"
    assert torch.equal(keys, keys_before), "corrupt changes the keys it is given; work on a copy"

    given = view.input
    assert tuple(given.shape[1:2]) == (3,), f"the view's input is {tuple(given.shape)}, not (k*B, 3, H, W)"
    copies = len(given) / count
    assert copies >= 1, f"the view's input has {len(given)} images for a batch of {count}"
    assert copies == int(copies), f"the view's input has {len(given)} images for a batch of {count}, no multiple of it"
    assert given.shape == images.shape or not task.in_place, (
        f"the view's input is {tuple(given.shape)} for images {tuple(images.shape)}: no mask fits; it is not in_place"
    )
    assert given.dtype == torch.float32, f"the view's input is {given.dtype}, not float32"
    assert given.isfinite().all(), "the view's input is not finite"
    low, high = given.min().item(), given.max().item()
    assert 0.0 <= low <= high <= 1.0, f"the view's input lies in [{low:.3g}, {high:.3g}], not in [0, 1]"
    assert len(view.target) == count, f"the view's target has {len(view.target)} samples for a batch of {count}"
    if view.loss_mask is not None:
        expected = (count, 1, *view.loss_mask.shape[2:])
        assert view.loss_mask.shape == expected, f"loss_mask is {tuple(view.loss_mask.shape)}, not (B, 1, H, W)"
        assert view.loss_mask.dim() == 4, f"loss_mask is {tuple(view.loss_mask.shape)}, not (B, 1, H, W)"
        assert view.loss_mask.dtype == torch.float32, f"loss_mask is {view.loss_mask.dtype}, not float32"
        assert (view.loss_mask >= 0).all(), "loss_mask holds a negative weight"

    torch.manual_seed(1)  # a view that draws from torch's own generator is another one now
    again = task.corrupt(images.clone(), keys.clone())
    assert _same(_rows(view, count), _rows(again, count), tolerance), (
        "corrupt is not pure: the same images and keys give another view; draw with ssl_seg.rng alone"
    )
    other = task.corrupt(images, rng.fold_in(keys, "other"))
    differs = not _same(_rows(view, count), _rows(other, count), tolerance)
    assert differs or not keyed, "another key gives the same view; say keyed=False if the task draws nothing at random"
    _check_asynchronous(task, images, keys)
    at_once = PAIR if task.mixes else 1
    those = "other images or keys than its partner's" if task.mixes else "the images or keys beside it"
    hint = "" if task.mixes else "; a task that mixes partners has to say mixes = True"
    for start in range(0, count, at_once):
        some = slice(start, start + at_once)
        alone = task.corrupt(images[some], keys[some])
        assert _same(_rows(view, count)[some], _rows(alone, len(keys[some])), tolerance), (
            f"corrupt is not per sample: an image's view depends on {those}{hint}"
        )
    if count % at_once:
        return  # turned round, others would be partners
    turned = task.corrupt(images.flip(0), keys.flip(0))
    assert _same(_rows(view, count)[::-1], _rows(turned, count), tolerance), (
        "corrupt is not per sample: an image's view depends on its place in the batch"
    )


def _check_asynchronous(task: PretextTask, images: Tensor, keys: Tensor) -> None:
    # Tensors without data, on any machine, refuse just what makes the host wait for a GPU.
    try:
        task.corrupt(images.to("meta"), keys.to("meta"))
    except (RuntimeError, TypeError) as error:
        first_line = str(error).partition("\n")[0]
        raise AssertionError(
            f"corrupt waits for the device or leaves it; no .item(), no boolean indexing, no numpy ({first_line})"
        ) from error


def _check_answer(task: PretextTask, images: Tensor, keys: Tensor, strides: Sequence[int], own: Encoder | None) -> None:
    """Head, loss, metrics and pictures fit each other, and gradients arrive."""
    count, size = len(images), tuple(images.shape[-2:])
    view = task.corrupt(images, keys)
    encoder, head = _network(task, strides, own, images.shape[1])
    prediction = head(encoder(view.input), tuple(view.input.shape[-2:])).float()
    loss = task.loss(prediction, view)
    assert loss.shape == (count,), f"the loss is {tuple(loss.shape)}, not one number a sample, ({count},)"
    assert loss.dtype == torch.float32, f"the loss is {loss.dtype}, not float32"
    assert loss.isfinite().all(), f"the loss of a fresh network is not finite: {loss.tolist()}"
    assert loss.requires_grad, "the loss does not depend on the network"

    loss.mean().backward()
    check_gradients("encoder", encoder, every=False)
    check_gradients("head", head, every=True)
    if view.loss_mask is not None:
        leaf = prediction.detach().requires_grad_()
        empty = task.loss(leaf, replace(view, loss_mask=torch.zeros_like(view.loss_mask)))
        assert (empty == 0).all(), f"the loss where no pixel counts is {empty.tolist()}, not 0"
        (gradient,) = torch.autograd.grad(empty.sum(), leaf, allow_unused=True)
        assert gradient is None or gradient.isfinite().all(), "the gradient where no pixel counts is not finite"

    with evaluating(encoder), evaluating(head):
        answer = head(encoder(view.input), tuple(view.input.shape[-2:])).float()
        for name, values in task.metrics(answer, view).items():
            assert values.shape == (count,), f"metric '{name}' is {tuple(values.shape)}, not ({count},)"
            assert values.isfinite().all(), f"metric '{name}' is not finite: {values.tolist()}"
        guess = task.guess(view)
        if guess is not None:
            assert guess.shape == answer.shape, f"guess gives {tuple(guess.shape)}, the head {tuple(answer.shape)}"
            assert task.loss(guess, view).isfinite().all(), "the loss of the guess is not finite"
        for name, picture in {"render": task.render(answer, view), "render_target": task.render_target(view)}.items():
            if picture is not None:
                shown = {(count, channels, *size) for channels in (3, images.shape[1])}
                assert tuple(picture.shape) in shown, f"{name} gives {tuple(picture.shape)}, not (B, 3, H, W)"
                assert 0 <= picture.min() <= picture.max() <= 1, f"{name} leaves [0, 1]; clamp the picture"


def _check_learning(task: PretextTask, images: Tensor, steps: int, drop: float, own: Encoder | None) -> None:
    view = task.corrupt(images, rng.fold_in(rng.as_key("learn"), torch.arange(len(images))))
    torch.manual_seed(0)
    encoder, head = _network(task, HALVING, own)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        prediction = head(encoder(view.input), tuple(view.input.shape[-2:])).float()
        loss = task.loss(prediction, view).mean()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    first, last = history[0], history[-1]
    assert last < drop * first, (
        f"the task does not learn: {steps} steps on four images took the loss {first:.4g} to {last:.4g}"
    )


def _rows(view: View, count: int) -> list[list[Tensor]]:
    """What belongs to each sample; the k inputs of a sample may lie k apart or B apart."""
    copies = len(view.input) // count
    grouped = view.input.unflatten(0, (count, copies))
    strided = view.input.unflatten(0, (copies, count)).transpose(0, 1)
    rest = [view.target] if view.loss_mask is None else [view.target, view.loss_mask]
    return [[part[index] for part in (grouped, strided, *rest)] for index in range(count)]


def _same(rows: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]], tolerance: float) -> bool:
    return all(_same_sample(row, other, tolerance) for row, other in zip(rows, others, strict=True))


def _same_sample(row: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> bool:
    (grouped, strided, *rest), (other_grouped, other_strided, *other_rest) = row, other
    inputs = _close(grouped, other_grouped, tolerance) or _close(strided, other_strided, tolerance)
    pairs = zip(rest, other_rest, strict=False)
    return inputs and len(rest) == len(other_rest) and all(_close(*pair, tolerance) for pair in pairs)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def _network(
    task: PretextTask, strides: Sequence[int], own: Encoder | None, image_channels: int = 3
) -> tuple[EncoderNet, nn.Module]:
    """`own` encoder, or else a tiny one with maps at `strides`, and the task's head on it."""
    channels = (*[16] * (len(strides) - 1), 32)
    if own:
        encoder = own.build()
    else:
        mean, std = (constants_of(values, image_channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
        encoder = EncoderNet(_TinyBackbone(channels, strides, image_channels), channels, strides, mean, std)

    def dense(out_channels: int, stride: int = 1, decoder: DecoderKind = "full") -> DenseHead:
        if decoder == "light":
            return DenseHead(LightNet(encoder.channels[-1], encoder.strides[-1]), out_channels, stride)
        own = _TinyDecoder(encoder.channels, encoder.strides[0])
        return DenseHead(own, out_channels, stride, deep=decoder == "deep")

    return encoder, task.head(
        EncoderSpec(encoder.channels, encoder.strides, dense, encoder.extras, encoder.image_channels)
    )


class _TinyBackbone(nn.Module):
    """A convolution for each map, without norm: nothing here depends on the rest of the batch."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], image_channels: int) -> None:
        super().__init__()
        widths, at = (image_channels, *channels), (1, *strides)
        self.levels = nn.ModuleList(
            nn.Conv2d(widths[level], widths[level + 1], 3, stride=at[level + 1] // at[level], padding=1)
            for level in range(len(channels))
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            image = F.gelu(level(image))
            maps.append(image)
        return maps


class _TinyDecoder(DecoderNet):
    """Every level laid on the finest, then the pixels under each: the answer has the input's resolution."""

    def __init__(self, channels: Sequence[int], finest_stride: int) -> None:
        super().__init__()
        self.out_channels = 8
        self.finest_stride = finest_stride
        self.mix = nn.Conv2d(sum(channels), finest_stride**2 * self.out_channels, 3, padding=1)

    def forward(self, features: Features) -> Tensor:
        size = features[0].shape[-2:]
        laid = torch.cat([F.interpolate(level, size=size) for level in features], dim=1)
        return F.gelu(F.pixel_shuffle(self.mix(laid), self.finest_stride))
