"""Scores: segmentation from the confusion matrix of every image, pretext tasks from fixed views of held-out images.

Each process takes the images `rank::world`, without padding, so no image counts twice; what they have counted is shared
once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import BeforeValidator
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_seg import images, rng
from ssl_seg.calibration import TEMPERATURES, TEMPERED, Confidences, Pixels
from ssl_seg.config import PathText, UserError, load
from ssl_seg.contours import Contour, Contours, contours_of
from ssl_seg.data.augment import Augment
from ssl_seg.data.loading import CenterCrops, Packed, Whole, loader
from ssl_seg.data.splits import Examples, Subset
from ssl_seg.data.workers import ALONE, Workers
from ssl_seg.datasets import Example
from ssl_seg.images import Size
from ssl_seg.losses import IGNORE_INDEX
from ssl_seg.metrics import ConfusionMatrix, near_boundaries
from ssl_seg.models import SegmentationModel, evaluating, image_channels_of
from ssl_seg.norm.convert import OneByOne, layers_with_statistics
from ssl_seg.scores import Average, ImageConfusions, Row
from ssl_seg.stages.tiles import InTiles, Tiles
from ssl_seg.tasks import PretextTask
from ssl_seg.terminal import say
from ssl_seg.training.memory import GIB, available, bytes_of, enough_memory
from ssl_seg.training.multitask import MultiTask, dealing, make_views
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import read_model_info, temperature_of

SMALLER_IMAGES = "give smaller images, train with data.resize=[H,W], or choose a device with more memory (device=cpu)"
PREDICTION = "a prediction of {} x {} pixels at once"
CROPS = 16  # scored at a time
ROWS = 64  # of an image whose shares are made at a time
SAMPLED = 100_000  # pixels of a whole data set by which a temperature is fitted: for one number enough
GUESS = "guess"  # the figure of a loss that takes no learning
# Bytes of a pixel, without gradients, that no network is known to exceed: a resnet18 U-Net takes 0.4 kB, swin_base with
# UPerNet 0.9. A prediction that fits even so is not counted.
MOST_OF_A_WHOLE_PIXEL = 2**14
PROBED = 128  # pixels of a side of the square by which the memory of whole images is counted
TAKEN = 1.5  # times the bytes counted, that a prediction may take: five networks took 1.09 to 1.40 times as much
SMALLER_CROPS = "give a smaller augment.crop"
WITHOUT_MASK = "{}: has no mask, so it cannot be scored; name a labelled data set"


class Scored(Subset):
    """Examples that will be scored: whoever looks at their images has the masks read and looked at too.

    So the leak guard, which reads every image once before the first step, names a wrong mask, and not the evaluation
    after the last one. A mask of 480 x 360 costs it a millisecond.
    """

    @classmethod
    def all_of(cls, examples: Examples) -> Scored:
        return cls(examples, tuple(range(len(examples))))

    def image(self, index: int) -> Example:
        example = self.read(index)
        if example.label is None:
            raise UserError(WITHOUT_MASK.format(example.name))
        ids = example.label[example.label != IGNORE_INDEX]
        count = len(self.class_names)
        if ids.max(initial=0) >= count:
            raise UserError(f"{example.name}: its mask holds class id {ids.max()}, and there are {count} classes")
        return replace(example, label=None)


Statistics = Literal["running", "image"]


class Mirrored(nn.Module):
    """A model that also looks at each image's mirror image: its shares are the mean of both looks.

    It answers by the logarithm of the softmax shares, so that where both looks agree they are the model's own logits,
    but for a number that all classes of a pixel have in common.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        plain = self.model(image).log_softmax(dim=1)
        mirrored = self.model(image.flip(-1)).flip(-1).log_softmax(dim=1)
        return torch.logaddexp(plain, mirrored) - math.log(2)


@dataclass(frozen=True)
class Looks:
    """How a model is asked where it is not simply asked: what a score's passport tells of it, and nothing else does."""

    flips: bool = False  # each image is looked at mirrored too
    statistics: Statistics = "running"  # image: those of the image at hand
    tiles: Tiles | None = None  # how images larger than a tile are cut

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Self:
        """What `passport.looks_of` has read."""
        tiles = written["tiles"]
        return cls(written["flips"], written["statistics"], None if tiles is None else load(Tiles, tiles))

    def dump(self) -> dict[str, Any]:
        """As a passport has it."""
        tiles = None if self.tiles is None else self.tiles.dump()
        return {"flips": self.flips, "statistics": self.statistics, "tiles": tiles}

    def of(self, model: nn.Module) -> nn.Module:
        """The model as it is to be asked."""
        asked = OneByOne(model) if self.statistics == "image" else model
        asked = Mirrored(asked) if self.flips else asked
        if self.tiles is None:
            return asked
        multiple = model.encoder.multiple if isinstance(model, SegmentationModel) else 1
        return InTiles(asked, self.tiles, multiple)


PLAINLY = Looks()


def looks_at(model: nn.Module, statistics: Statistics, flips: bool = False, tiles: Tiles | None = None) -> Looks:
    """How `model` is asked by these options; told where it keeps no running statistics that others could replace."""
    if statistics == "image" and not layers_with_statistics(model):
        say("statistics: image has nothing to do, for no norm layer of the model keeps running statistics")
        return Looks(flips, tiles=tiles)
    return Looks(flips, statistics, tiles)


def read_once(parts: Iterable[Examples], workers: Workers, processes: Processes) -> None:
    """Read every image, each by one process: what cannot be read, or scored, raises its UserError here."""
    for examples in parts:
        mine = [[index] for index in range(processes.rank, len(examples), processes.world)]
        for _ in loader(Whole(examples, with_labels=False), mine, workers):
            pass


def _val_or_number(value: Any) -> Any:
    """Raises ValueError in one line, where each kind that it might be would have one of its own."""
    least, most = TEMPERATURES
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or value == "val" or (is_number and least <= value <= most):
        return value
    raise ValueError(f"write val, or a number from {least:g} to {most:g}")


# What a config says of a temperature: `val` is the one that validation images gave.
TemperatureField = Annotated[Literal["val"] | float | None, BeforeValidator(_val_or_number)]


def temperature_at(asked: TemperatureField, model: PathText, is_plain: bool) -> float | None:
    """The temperature that a config asks for, of an exported model; `is_plain` where it is asked once, and alone.

    Raises UserError where `val` has no answer.
    """
    if asked != "val":
        return asked
    if not is_plain:
        raise UserError(
            "temperature: val was fitted to one model that looks once, by its running statistics; give a number, or "
            "drop what else is asked"
        )
    fitted = temperature_of(read_model_info(model))
    if fitted is None:
        raise UserError(
            f"temperature: {model} has none (its run is of an earlier version, or no validation pixel was wrong); give "
            "a number"
        )
    return fitted.value


@dataclass(frozen=True)
class Also:
    """What else is measured of a scored data set."""

    temperature: float | None = None  # at which confidences are counted too
    pixels: bool = False  # whether some are kept, to fit a temperature by
    contours: bool = False


NOTHING_ELSE = Also()


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of a model on a labelled data set: every figure follows from it."""

    confusions: ImageConfusions
    confidences: Confidences
    tempered: Confidences | None  # the same at a temperature
    pixels: Pixels | None
    contours: Contours | None

    def named(self, averages: Sequence[Average] = ()) -> dict[str, float | None]:
        """The figures of a result.json."""
        named = {**self.confusions.named(averages), **self.confidences.named()}
        named |= {} if self.tempered is None else self.tempered.named(f"{TEMPERED}/")
        return named | ({} if self.contours is None else self.contours.named())


class _OfImage(NamedTuple):
    """What processes share of one image."""

    row: Row
    pixels: Pixels | None
    contours: Sequence[Contour]


def measure(
    model: nn.Module,
    examples: Examples,
    resize: Size | None = None,
    workers: Workers = ALONE,
    processes: Processes | None = None,
    also: Also = NOTHING_ELSE,
) -> Measured:
    """What `model` (RGB in [0, 1] to logits) takes each labelled example for, at the label's own resolution.

    Images are brought to `resize` (H, W) first, where given, and logits brought back bilinearly. One image at a time:
    a data set may hold images of many sizes. Every process gets all images, in the data set's order.
    """
    class_names = examples.class_names
    rank, world, device = _place(model, processes)
    mine = [[index] for index in range(rank, len(examples), world)]
    most = max(1, SAMPLED // max(1, len(examples)))
    seen: list[_OfImage] = []
    sums = {temperature: Confidences.none() for temperature in (1.0, also.temperature) if temperature is not None}
    with evaluating(model):
        for (index,), packed in zip(mine, loader(Whole(examples, resize), mine, workers), strict=True):
            truth = masks_of(packed)[0].numpy()
            check_memory(model, packed.image.shape[-2:], images.show_path(packed.names[0]), truth.shape)
            logits = predict_logits(model, packed.to(device).image, truth.shape)
            ids = classes_of(logits).byte().cpu()  # as masks are
            counted = truth != IGNORE_INDEX
            right = (ids[0].numpy() == truth)[counted]
            for temperature in sums:
                shares = _largest_shares(logits, temperature)
                sums[temperature] += Confidences.of(shares.cpu().numpy()[counted], right)
            row = count_image(index, packed, ids, len(class_names))
            pixels = _sampled(logits, truth, packed.digests[0], most) if also.pixels else None
            outlines = contours_of(truth, ids[0].numpy(), class_names, packed.names[0]) if also.contours else ()
            seen.append(_OfImage(row, pixels, outlines))
    if processes is not None:
        seen = processes.gather(seen)
        of_all = processes.gather([sums])
        sums = {temperature: sum((own[temperature] for own in of_all), Confidences.none()) for temperature in sums}
    seen.sort(key=lambda own: own.row.index)
    drawn = [own.pixels for own in seen if own.pixels is not None]
    outlines = tuple(contour for own in seen for contour in own.contours)
    return Measured(
        confusions=ImageConfusions.from_rows(class_names, [own.row for own in seen]),
        confidences=sums[1.0],
        tempered=None if also.temperature is None else sums[also.temperature],
        pixels=Pixels.of_all(drawn, len(class_names)) if also.pixels else None,
        contours=Contours(tuple(class_names), outlines) if also.contours else None,
    )


def _largest_shares(logits: Tensor, temperature: float) -> Tensor:
    """`(H, W)` float32: of the softmax over `(1, K, H, W)` at a temperature the largest share of each pixel."""
    # Rows by rows, so that no second map of all classes is in memory.
    return torch.cat([(rows.float() / temperature).softmax(dim=0).amax(dim=0) for rows in logits[0].split(ROWS, dim=1)])


def _sampled(logits: Tensor, truth: np.ndarray, digest: str, most: int) -> Pixels | None:
    """`most` of the pixels that count of logits `(1, K, H, W)`, drawn by the image's digest alone; None without any.

    With replacement, so each stands for the same number of pixels.
    """
    places = torch.from_numpy(np.flatnonzero(truth != IGNORE_INDEX))
    if not len(places):
        return None
    key = rng.fold_in(rng.as_key("temperature"), digest)
    chosen = places[rng.randint(key, (min(most, len(places)),), 0, len(places))]
    own = logits[0].flatten(1)[:, chosen.to(logits.device)].T.float().cpu().numpy()
    weights = np.full(len(chosen), len(places) / len(chosen))
    return Pixels(own, truth.ravel()[chosen.numpy()].astype(np.int64), weights, images=1)


def masks_of(packed: Packed) -> Tensor:
    """The masks `(B, H, W)` uint8 of a batch. Raises UserError for images without."""
    if packed.label is None:
        raise UserError(WITHOUT_MASK.format(packed.names[0]))
    return packed.label


def count_image(index: int, packed: Packed, ids: Tensor, num_classes: int) -> Row:
    """The confusion matrix of one example's class ids `(1, H, W)`, with how much of it lies near class boundaries."""
    whole, near = ConfusionMatrix(num_classes), ConfusionMatrix(num_classes)
    masks = masks_of(packed)
    whole.update(masks, ids)
    # What lies far is counted as ignored: to pick the pixels that lie near takes longer.
    near.update(np.where(near_boundaries(masks[0].numpy()), masks[0].numpy(), np.uint8(IGNORE_INDEX)), ids[0])
    pixels = whole.counts.flatten().numpy()
    cells = pixels.nonzero()[0]
    return Row(index, packed.names[0], cells, pixels[cells], near.counts.flatten().numpy()[cells], packed.digests[0])


def predict_ids(model: nn.Module, image: Tensor, size: Sequence[int]) -> Tensor:
    """Class ids `(B, *size)` int64, of `size` (H, W), for images `(B, 3, H, W)` in [0, 1]."""
    return classes_of(predict_logits(model, image, size))


def predict_logits(model: nn.Module, image: Tensor, size: Sequence[int]) -> Tensor:
    """As `logits_at`. Raises UserError where the memory does not suffice."""
    height, width = image.shape[-2:]
    with enough_memory(PREDICTION.format(height, width), SMALLER_IMAGES, image.device):
        return logits_at(model, image, size)


def classes_of(logits: Tensor) -> Tensor:
    """Class ids `(B, H, W)` int64 of logits `(B, K, H, W)`: the largest, of equal ones the first."""
    return logits.max(dim=1).indices  # on a CPU a fifth of the time of argmax, and the same


def logits_at(model: nn.Module, image: Tensor, size: Sequence[int]) -> Tensor:
    """Logits `(B, K, *size)` at `size` (H, W), for images `(B, 3, H, W)` in [0, 1]."""
    logits = model(image)
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def check_memory(model: nn.Module, size: Sequence[int], what: str, out: Sequence[int] | None = None) -> None:
    """Foretell a prediction of an image of `size` (H, W), whose logits are brought to `out`, on a CPU.

    There it is a kill, with nothing said, if it takes more than is free. Raises UserError that begins with `what`
    where it surely does; where it may, a line tells it.
    """
    needed = memory_at_risk(model, size, out)
    if needed is None:
        return
    free = available()
    height, width = size
    takes = (
        f"{what}: {height} x {width} pixels at once take more than {needed / GIB:.1f} GiB to predict, and "
        f"{free / GIB:.1f} GiB are free"
    )
    if needed > free:
        raise UserError(f"{takes}; give smaller images, or train with data.resize=[H,W]")
    say(f"{takes}: the system may kill this; smaller images, or a model trained with data.resize=[H,W], would be safe")


def memory_at_risk(model: nn.Module, size: Sequence[int], out: Sequence[int] | None = None) -> float | None:
    """Bytes that such a prediction takes at least, where it may take more than a CPU has free; else None."""
    free = available()
    if isinstance(model, InTiles):
        size = model.largest(size)
    pixels, of_logits = math.prod(size), 0 if out is None or tuple(out) == tuple(size) else math.prod(out)
    if device_of(model).type != "cpu" or max(pixels, of_logits) * MOST_OF_A_WHOLE_PIXEL < free:
        return None
    with evaluating(model):
        probe = torch.full((1, image_channels_of(model), PROBED, PROBED), 0.5)
        of_a_pixel = bytes_of(lambda: predict_ids(model, probe, probe.shape[-2:])) / PROBED**2
        channels = model(probe).shape[1]
    needed = of_a_pixel * pixels + of_logits * channels * torch.float32.itemsize
    return None if TAKEN * needed < free else needed


def score_tasks(
    module: MultiTask,
    examples: Examples,
    augment: Augment,
    resize: Size | None = None,
    batch_size: int = CROPS,
    workers: Workers = ALONE,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Each pretext task's loss and metrics on held-out images, `<task>/<figure>`: centre crops and fixed noise."""
    tasks = pretext_tasks(module)
    if not tasks:
        return {}
    rank, world, device = _place(module, processes)
    _, at_once = dealing(tasks, "pool", split=False)
    indices = [index for index in range(len(examples)) if index // at_once % world == rank]
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    sums: dict[str, Tensor] = {}
    with evaluating(module):
        for packed in loader(CenterCrops(examples, augment, resize, module.encoder.image_channels), batches, workers):
            with enough_memory(f"scoring {len(packed.names)} crops at once", SMALLER_CROPS, device):
                views = make_views(tasks, {"pool": packed.to(device)})
                predictions = module.predict(views)
            for name, view in views.items():
                prediction = predictions[name].float()
                task = tasks[name]
                figures = {"loss": task.loss(prediction, view), **task.metrics(prediction, view)}
                guess = task.guess(view)
                figures |= {} if guess is None else {GUESS: task.loss(guess, view)}
                for figure, values in figures.items():
                    key = f"{name}/{figure}"
                    sums[key] = sums.get(key, torch.zeros(2, device=device)) + _sum_and_count(
                        values, figure not in ("loss", GUESS)
                    )
    if processes is not None:
        # A process without an image knows no figures; the names come from rank 0, which has the first image.
        keys = processes.from_first(list(sums))
        mine = torch.stack([sums.get(key, torch.zeros(2, device=device)) for key in keys])
        sums = dict(zip(keys, processes.sum(mine), strict=True))
    means = {key: (total / count).item() for key, (total, count) in sums.items()}
    return dict(_with_learnt(means))


def _with_learnt(means: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """In place of the guess's loss how much better than that a task is."""
    for key, value in means.items():
        name, _, figure = key.rpartition("/")
        if figure != GUESS:
            yield key, value
        elif value > 0:
            yield f"{name}/learnt", 1 - means[f"{name}/loss"] / value


def pretext_tasks(module: MultiTask) -> Mapping[str, PretextTask]:
    """The tasks by which held-out images are scored and drawn."""
    return {name: task for name, task in module.tasks.items() if isinstance(task, PretextTask)}


def device_of(module: nn.Module) -> torch.device:
    """Where its weights are."""
    return next(module.parameters()).device


def _place(module: nn.Module, processes: Processes | None) -> tuple[int, int, torch.device]:
    if processes is None:
        return 0, 1, device_of(module)
    return processes.rank, processes.world, processes.device


def _sum_and_count(values: Tensor, leave_out: bool) -> Tensor:
    """A figure may be nan where nothing counts, as the PSNR of an empty hole; a loss that is nan has to be seen."""
    counted = values.isfinite() if leave_out else torch.ones_like(values, dtype=torch.bool)
    return torch.stack([torch.where(counted, values, 0.0).sum(), counted.sum().float()])
