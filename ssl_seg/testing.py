"""Conformance tests for plug-ins: one line in a third party's test file checks a task, a network part or a data set."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import rng
from ssl_seg.config import Plugin, UserError
from ssl_seg.datasets import Dataset, Example
from ssl_seg.models import (
    Decoder,
    DecoderNet,
    DenseHead,
    Encoder,
    EncoderNet,
    EncoderSpec,
    Features,
    ModelConfig,
    evaluating,
)
from ssl_seg.tasks import PAIR, PretextTask, View

TOLERANCE = 1e-5  # sums over a batch of another size may round differently
HALVING = (2, 4, 8, 16, 32)  # the strides of most encoders
HEAD_STRIDE = 4  # the coarsest at which a dense head of a built-in task answers


def check_pretext_task(
    task: PretextTask,
    *,
    size: tuple[int, int] = (64, 64),
    keyed: bool = True,
    steps: int = 40,
    drop: float = 0.7,
    encoder: Encoder | None = None,
) -> None:
    """Raise AssertionError, with what is wrong in a sentence, for a task that breaks the contract of `PretextTask`.

    Takes about a second on a CPU: the network is a tiny one inside. It has five maps at strides 2 to 32, and once four
    at strides 1 to 8. `size` is the images' (H, W); a second, oblong and odd size is made from it. `keyed=False` is for
    a task that draws nothing at random. Of a task that `mixes` a sample may depend on its partner. The task has to
    bring its loss on four images under `drop` times the first one in `steps` steps. A task that needs extras is given
    the `encoder` that has them, in place of the tiny one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = _check_prepare(task, _pictures(4, *size))
        _check_config(task, PretextTask)
        odd = (size[0] - 11, size[1] + 13)
        for count, (height, width), strides in ((4, size, HALVING), (1, size, (1, 2, 4, 8)), (3, odd, HALVING)):
            images, keys = _pictures(count, height, width), rng.fold_in(rng.as_key("check"), torch.arange(count))
            _check_view(task, images, keys, keyed)
            _check_answer(task, images, keys, strides, encoder)
        _check_learning(task, _pictures(4, *size), steps, drop, encoder)


def _check_prepare(task: PretextTask, images: Tensor) -> PretextTask:
    before = images.clone()
    prepared = task.prepare(images)
    assert type(prepared) is type(task), f"prepare gives a {type(prepared).__name__}; it should give a copy of the task"
    assert torch.equal(images, before), "prepare changes the images it measures"
    return prepared


def _check_config(config: Plugin, root: type[Plugin]) -> None:
    """Frozen, and the same again after a run folder has kept it; `root` is the family's abstract class."""
    assert config.model_config.get("frozen"), f"the config is not frozen; leave model_config as {root.__name__} has it"
    dumped = json.loads(json.dumps(config.dump()))
    families = [type(config)]
    if dumped["type"] in root.names():  # a class in a test file is found by no `type`
        families.append(root)
    for family in families:
        loaded = family.model_validate(dumped)
        assert type(loaded) is type(config), f"type '{dumped['type']}' loads {type(loaded).__name__}, not this class"
        assert loaded == config, f"dump and load give another config: {loaded!r}, not {config!r}"


def _check_view(task: PretextTask, images: Tensor, keys: Tensor, keyed: bool) -> None:
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
    assert _same(_rows(view, count), _rows(again, count)), (
        "corrupt is not pure: the same images and keys give another view; draw with ssl_seg.rng alone"
    )
    other = task.corrupt(images, rng.fold_in(keys, "other"))
    differs = not _same(_rows(view, count), _rows(other, count))
    assert differs or not keyed, "another key gives the same view; say keyed=False if the task draws nothing at random"
    _check_asynchronous(task, images, keys)
    at_once = PAIR if task.mixes else 1
    those = "other images or keys than its partner's" if task.mixes else "the images or keys beside it"
    hint = "" if task.mixes else "; a task that mixes partners has to say mixes = True"
    for start in range(0, count, at_once):
        some = slice(start, start + at_once)
        alone = task.corrupt(images[some], keys[some])
        assert _same(_rows(view, count)[some], _rows(alone, len(keys[some]))), (
            f"corrupt is not per sample: an image's view depends on {those}{hint}"
        )
    if count % at_once:
        return  # turned round, others would be partners
    turned = task.corrupt(images.flip(0), keys.flip(0))
    assert _same(_rows(view, count)[::-1], _rows(turned, count)), (
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
    encoder, head = _network(task, strides, own)
    prediction = head(encoder(view.input), tuple(view.input.shape[-2:])).float()
    loss = task.loss(prediction, view)
    assert loss.shape == (count,), f"the loss is {tuple(loss.shape)}, not one number a sample, ({count},)"
    assert loss.dtype == torch.float32, f"the loss is {loss.dtype}, not float32"
    assert loss.isfinite().all(), f"the loss of a fresh network is not finite: {loss.tolist()}"
    assert loss.requires_grad, "the loss does not depend on the network"

    loss.mean().backward()
    _check_gradients("encoder", encoder, every=False)
    _check_gradients("head", head, every=True)
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
        for name, picture in {"render": task.render(answer, view), "render_target": task.render_target(view)}.items():
            if picture is not None:
                assert picture.shape == (count, 3, *size), f"{name} gives {tuple(picture.shape)}, not (B, 3, H, W)"
                assert 0 <= picture.min() <= picture.max() <= 1, f"{name} leaves [0, 1]; clamp the picture"


def _check_gradients(part: str, module: nn.Module, every: bool) -> None:
    gradients = {name: weight.grad for name, weight in module.named_parameters() if weight.requires_grad}
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert not (every and without), f"{part} weights get no gradient: {', '.join(without)}; DDP would stop at step 2"
    arrived = [gradient for gradient in gradients.values() if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in arrived), f"gradients of the {part} are not finite"
    assert not gradients or any(gradient.any() for gradient in arrived), f"no gradient reaches the {part}"


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


def _same(rows: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> bool:
    return all(_same_sample(row, other) for row, other in zip(rows, others, strict=True))


def _same_sample(row: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    (grouped, strided, *rest), (other_grouped, other_strided, *other_rest) = row, other
    inputs = _close(grouped, other_grouped) or _close(strided, other_strided)
    return inputs and len(rest) == len(other_rest) and all(map(_close, rest, other_rest))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0.0, atol=TOLERANCE, equal_nan=True)


def _pictures(count: int, height: int, width: int) -> Tensor:
    """Smooth colours with a bright disc on them, `(B, 3, H, W)`; every picture is another."""
    keys = rng.fold_in(rng.as_key("pictures"), torch.arange(count))
    coarse = rng.uniform(keys, (3, 4, 4), 0.1, 0.9)
    image = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    row = torch.linspace(0.0, 1.0, height).view(-1, 1)
    column = torch.linspace(0.0, 1.0, width).view(1, -1)
    y, x = rng.uniform(rng.fold_in(keys, "disc"), (2, 1, 1, 1), 0.2, 0.8).unbind(1)
    disc = (row - y) ** 2 + (column - x) ** 2 < 0.02
    colour = rng.uniform(rng.fold_in(keys, "colour"), (3, 1, 1))
    return torch.where(disc, colour, image)


def _network(task: PretextTask, strides: Sequence[int], own: Encoder | None) -> tuple[EncoderNet, nn.Module]:
    """`own` encoder, or else a tiny one with maps at `strides`, and the task's head on it."""
    channels = (*[16] * (len(strides) - 1), 32)
    encoder = own.build() if own else EncoderNet(_TinyBackbone(channels, strides), channels, strides)

    def dense(out_channels: int, stride: int = 1) -> DenseHead:
        return DenseHead(_TinyDecoder(encoder.channels, encoder.strides[0]), out_channels, stride)

    return encoder, task.head(EncoderSpec(encoder.channels, encoder.strides, dense, encoder.extras))


class _TinyBackbone(nn.Module):
    """A convolution for each map, without norm: nothing here depends on the rest of the batch."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        widths, at = (3, *channels), (1, *strides)
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


def check_dataset(dataset: Dataset, *, reads: int = 8) -> None:
    """Raise AssertionError, with what is wrong in a sentence, for a data set that breaks the contract of `Dataset`.

    Give it a small one: all names are asked for, and `reads` examples, spread from the first to the last, are read
    four times each.
    """
    count = len(dataset)
    assert count > 0, "the data set is empty; check it with at least one image"
    _check_class_names(dataset.class_names)
    _check_config(dataset, Dataset)
    names = [dataset.name(index) for index in range(count)]
    (common, times), *_ = Counter(names).most_common(1)
    assert times == 1, f"{times} images are named {common!r}; names have to be unique"

    travelled = pickle.loads(pickle.dumps(dataset))
    assert len(travelled) == count, f"{len(travelled)} images after pickling, not {count}: loader workers get a copy"
    for index in sorted({step * (count - 1) // max(1, reads - 1) for step in range(reads)}):
        example = dataset.read(index)
        where = f"read({index})"
        _check_example(where, example, len(dataset.class_names))
        assert example.name == names[index], f"{where} is named {example.name!r}, but name({index}) is {names[index]!r}"
        assert isinstance(dataset.sequence(index), str), f"sequence({index}) is not a str; give '' where there is none"
        kept = pickle.loads(pickle.dumps(example))
        _check_same_example(f"{where} is not pure: a second read", dataset.read(index), kept)
        _check_same_example(f"{where} after pickling the data set", travelled.read(index), kept)
        example.image.fill(7)  # as a loader may, which crops in place
        if example.label is not None:
            example.label.fill(7)
        _check_same_example(f"{where}, after its arrays were written to,", dataset.read(index), kept)


def _check_class_names(names: tuple[str, ...]) -> None:
    assert isinstance(names, tuple), f"class_names is a {type(names).__name__}, not a tuple"
    assert all(isinstance(name, str) and name for name in names), f"class_names holds something but words: {names!r}"
    assert len(set(names)) == len(names), f"class_names holds a name twice: {names!r}"
    assert len(names) <= 255, f"{len(names)} classes; ids are 8 bits and 255 is ignored"


def _check_example(where: str, example: Example, num_classes: int) -> None:
    assert isinstance(example, Example), f"{where} gives a {type(example).__name__}, not an Example"
    assert isinstance(example.name, str), f"the name of {where} is {example.name!r}, not a word"
    assert example.name, f"{where} has no name"
    image = example.image
    assert isinstance(image, np.ndarray), f"the image of {where} is a {type(image).__name__}, not a numpy array"
    assert image.dtype == np.uint8, f"the image of {where} is {image.dtype}, not uint8"
    assert image.shape == (*image.shape[:2], 3), f"the image of {where} is {image.shape}, not (H, W, 3)"
    assert image.size, f"the image of {where} has no pixel: {image.shape}"
    assert image.flags.writeable, f"the image of {where} is read-only, which torch warns of; copy it"
    label = example.label
    if num_classes == 0:
        assert label is None, f"{where} has a label, but class_names is empty"
        return
    assert label is not None, f"{where} has no label, but class_names names {num_classes} classes"
    assert isinstance(label, np.ndarray), f"the label of {where} is a {type(label).__name__}, not a numpy array"
    assert label.dtype == np.uint8, f"the label of {where} is {label.dtype}, not uint8"
    assert label.shape == image.shape[:2], f"the label of {where} is {label.shape} for an image {image.shape}"
    assert label.flags.writeable, f"the label of {where} is read-only, which torch warns of; copy it"
    wrong = [int(value) for value in np.unique(label) if num_classes <= value != 255]
    assert not wrong, f"the label of {where} holds {wrong}; ids are 0 to {num_classes - 1}, and 255 to be ignored"


def _check_same_example(what: str, example: Example, kept: Example) -> None:
    assert example.name == kept.name, f"{what} is named {example.name!r}, not {kept.name!r}"
    assert np.array_equal(example.image, kept.image), f"{what} gives another image"
    if kept.label is None:
        assert example.label is None, f"{what} gives a label where there was none"
    else:
        assert example.label is not None, f"{what} gives no label where there was one"
        assert np.array_equal(example.label, kept.label), f"{what} gives another label"


def check_encoder(config: Encoder, *, sizes: Sequence[tuple[int, int]] = ((33, 47), (64, 64), (97, 50))) -> None:
    """Raise AssertionError, with what is wrong in a sentence, for an encoder that breaks the contract of `Encoder`.

    It is built a few times and run on small images of `sizes` (H, W): check the smallest variant of a family.
    """
    with torch.random.fork_rng(devices=[]):
        _check_config(config, Encoder)
        torch.manual_seed(0)
        encoder = config.build()
        _check_declared(encoder)
        for height, width in sizes:
            _check_features(encoder, _pictures(2, height, width))
        _check_encoder_gradients(encoder, _pictures(2, 64, 96))
        _check_fresh_weights(config, _pictures(2, 64, 96))
        for output_stride in (16, 8):
            try:
                dilated = config.build(output_stride)
            except UserError as error:
                _check_one_line("build", error)
            else:
                _check_declared(dilated)
                coarsest = dilated.strides[-1]
                assert coarsest <= output_stride, f"build({output_stride}) declares a map of stride {coarsest}"
                _check_features(dilated, _pictures(2, 33, 70))


def check_decoder(config: Decoder, *, encoder: Encoder | None = None) -> None:
    """Raise AssertionError, with what is wrong in a sentence, for a decoder that breaks the contract of `Decoder`.

    It meets the maps of a few encoders: with and without stride 2, with stride 1, of fewer levels. It may refuse some
    of them by a UserError, but not all. With `encoder` it meets that one alone: for a decoder that needs extras.
    """
    with torch.random.fork_rng(devices=[]):
        _check_config(config, Decoder)
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
            features = encoder(_pictures(2, height, width))
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
    _check_gradients("encoder", encoder, every=True)
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
    _check_gradients("decoder", decoder, every=True)
    assert features[-1].grad is not None, "the coarsest map is not used"
    decoder.zero_grad(set_to_none=True)
    _check_decoded(decoder, features)
    head = DenseHead(decoder, 5)
    with evaluating(head):
        answer = head(features, (height - 13, width - 5))
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
    rows, columns = (side // 4 for side in moved.shape)
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
