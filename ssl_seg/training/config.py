"""`train`: its keys, and what follows from the step alone (the rate, and when something is due)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from ssl_seg.config import Config, explain, known_to_0_1
from ssl_seg.data.workers import TIMEOUT, Workers
from ssl_seg.tasks import Stream
from ssl_seg.training.balance import Balancing

BatchSize = Annotated[int, Field(gt=0, le=1_000_000)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
# Of those whose decay is added to the gradient. sgd: He et al. 2016. adam: torch's own, since Adam divides what is
# added by the size of the gradient, and so decays each weight otherwise (Loshchilov and Hutter, "AdamW", ICLR 2019).
DECAY = {"sgd": 1e-4, "adam": 0.0}
# Keys that version 0.1 did not know.
SINCE_0_1 = (
    "layer_decay",
    "freeze_encoder",
    "ema",
    "worker_timeout",
    "process_timeout",
    "balance",
    "affinity",
    "eps",
    "keep_state",
    "checkpointing",
)


Precision = Literal["auto", "fp32", "bf16", "fp16"]
Settled = Literal["fp32", "bf16", "fp16"]  # what `auto` comes to


class BatchSizes(Config):
    """How many images of each stream a step takes."""

    labelled: BatchSize  # images with masks
    pool: BatchSize  # unlabelled images


def _of_streams(value: Any) -> Any:
    """A mapping as `BatchSizes`; here, for a union of types would add a word of its own to the key of a message."""
    if not isinstance(value, Mapping):
        return value
    try:
        return BatchSizes.model_validate(value)
    except ValidationError as error:
        raise ValueError(explain(error).removeprefix("config: ")) from error


class TrainConfig(Config):
    """How the weights are fitted. The unit of time is the step: one update of the optimizer."""

    steps: PositiveInt = 1000  # updates of the weights: an epoch of N images at batch_size B is N / B of them
    # Global, of each stream; divided among processes, tasks (views: split), micro-batches. {labelled: 3, pool: 6} gives
    # each stream of joint training its own.
    batch_size: Annotated[
        Annotated[BatchSize, Tag("int")] | Annotated[BatchSizes, Tag("streams")],
        Discriminator(lambda value: "streams" if isinstance(value, BatchSizes) else "int"),
        BeforeValidator(_of_streams),
    ] = 16
    # Micro-batches a step; auto: as few as fit into memory, found by a trial before the first step and kept to the end.
    accumulate: PositiveInt | Literal["auto"] = 1
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"  # the rule of an update; see weight_decay
    lr: PositiveFloat = 1e-3  # AdamW's own default, right for encoders that start from scratch
    # Factor on lr for the encoder: below 1 keeps a pretrained one closer to its start, 0 freezes it.
    encoder_lr: NonNegativeFloat = 1.0
    # Factor on the encoder's rate from each of its layers to the one before it: `encoder_lr` is that of the last layer,
    # and what lies nearest to the image moves least. 1: all alike. 0.65 to 0.9 is usual for transformers (Bao et al.,
    # "BEiT", ICLR 2022), whose blocks are layers, as those of a resnet are.
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    freeze_encoder: NonNegativeInt = 0  # steps at the beginning in which the encoder stays as it is
    # Factor on lr for the shares of switch norm: Adam moves a weight by lr a step at most, and logits have units to go.
    switch_lr: PositiveFloat = 10.0
    # Not of biases, norms and what timm lists beside them. ConvNeXt's value; of sgd 1e-4 and of adam 0, whose decay is
    # added to the gradient: 0.05 with momentum would take a weight to 0 within 100 steps of sgd at a rate of 0.1.
    weight_decay: NonNegativeFloat = 0.05
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)  # of sgd
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # of adamw and adam
    eps: PositiveFloat = 1e-8  # of adamw and adam: Kingma and Ba's (2015); added to the root of the second moment
    schedule: Literal["cosine", "poly", "multistep", "constant"] = "cosine"  # how lr falls towards the last step
    warmup: NonNegativeInt | None = None  # steps of linear warm-up; None: 50, or a tenth of a short run
    power: PositiveFloat = 0.9  # of poly; DeepLab's (Chen et al. 2017)
    milestones: tuple[Share, ...] = (0.6, 0.9)  # of multistep, as shares of the run
    gamma: PositiveFloat = 0.1  # of multistep: the factor at each milestone
    clip: PositiveFloat | None = 1.0  # largest norm of the whole gradient
    # Decay of the weights' moving average, which is then what is evaluated and exported; None: there is none. 0.999 is
    # Tarvainen and Valpola's (2017) after their ramp-up, and FixMatch's (Sohn et al. 2020).
    ema: Share | None = None
    # Of the arithmetic. auto: bf16 where the device computes in it, else fp32; settled at the start, kept to the end. A
    # CPU that only emulates it takes ten times as long as in fp32. fp16 is for GPUs.
    precision: Precision = "fp32"
    channels_last: bool = False  # colours of a pixel beside each other in memory: often faster, the same figures
    device: Literal["auto", "cpu"] = "auto"  # auto: a GPU if there is one
    # all shows every image to every task; split deals each step's images out to the tasks.
    views: Literal["all", "split"] = "all"
    # together is one encoder pass over all tasks (fastest); in_turn keeps one task's graph in memory (leanest).
    encode: Literal["together", "in_turn"] = "together"
    # Compute parts of the encoder again for the gradient in place of keeping what they gave: the same gradients, less
    # memory, some more time. For networks of timm that can.
    checkpointing: bool = False
    # How tasks are weighed against each other, beside their own `weight`: a word, or a mapping with `type` and options.
    # fixed, since what pays depends on the tasks, and each other one costs time or tuning.
    balance: Balancing = Field(default="fixed", validate_default=True)
    # Steps between two looks at how far the tasks agree; None: never. Each costs a step's passes over one micro-batch
    # (nothing where the balancer has the tasks' gradients anyway): 100 is 1 % of the time, and enough for a picture.
    affinity: PositiveInt | None = None
    workers: NonNegativeInt = 2  # processes that read images; 0: the run itself reads them
    worker_timeout: PositiveFloat = TIMEOUT  # seconds; a worker that has not handed over its batch by then ends the run
    # Seconds that a process waits for the others; one that has not answered by then ends the run. torch's own figure
    # for NCCL, a third of that for gloo. What one does while the others wait takes seconds: to save, draw and export
    # (the leak check tells them every two seconds that it is at work); a batch may take `worker_timeout`.
    process_timeout: PositiveFloat = 600.0
    eval_every: PositiveInt | None = None  # steps; None: at the end only
    save_every: PositiveInt | None = None  # steps; None: ten times a run, but not more often than every 200
    # Checkpoints of a finished run, each about three times its weights. last: the one to go on from, and that of the
    # best step where one is selected. none: the same command then says that it has finished, whatever has changed.
    # While a run trains it has two, whatever is said here.
    keep_state: Literal["none", "last", "all"] = "last"
    log_every: PositiveInt = 10  # steps between two lines of metrics.jsonl

    @property
    def reading(self) -> Workers:
        """How the images are read."""
        return Workers(self.workers, self.worker_timeout)

    def batch_of(self, stream: Stream) -> int:
        """Images of a stream in a step."""
        return self.batch_size if isinstance(self.batch_size, int) else getattr(self.batch_size, stream)

    def images_of(self, streams: Iterable[Stream]) -> int:
        """Images in a step, of several streams together."""
        return sum(self.batch_of(stream) for stream in streams)

    @property
    def micro_batches(self) -> int:
        """How many a step has: 1 where `accumulate: auto` has not been settled yet."""
        return 1 if self.accumulate == "auto" else self.accumulate

    @model_validator(mode="before")
    @classmethod
    def _decay_of_the_optimizer(cls, values: Any) -> Any:
        optimizer = values.get("optimizer") if isinstance(values, Mapping) else None
        if isinstance(optimizer, str) and optimizer in DECAY:
            return {"weight_decay": DECAY[optimizer], **values}
        return values

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=SINCE_0_1)


def frozen_at(config: TrainConfig, step: int) -> bool:
    """Whether the encoder stays as it is in the update that makes step `step` (counted from 0)."""
    return config.encoder_lr == 0 or step < config.freeze_encoder


def lr_at(config: TrainConfig, step: int) -> float:
    """The learning rate of the update that makes step `step` (counted from 0) out of the weights before it."""
    warmup = min(50, config.steps // 10) if config.warmup is None else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, config.steps - warmup)
    if config.schedule == "cosine":  # Loshchilov and Hutter 2017, without restarts
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "poly":
        return config.lr * (1 - progress) ** config.power
    if config.schedule == "multistep":
        passed = sum(step >= milestone * config.steps for milestone in config.milestones)
        return config.lr * config.gamma**passed
    return config.lr


def measures_affinity(config: TrainConfig, step: int) -> bool:
    """Whether the update that makes step `step` (counted from 0) looks at how far the tasks agree.

    At the first step that is logged after every `affinity` steps, since no other would be seen.
    """
    if config.affinity is None or not due(step + 1, config.log_every, config.steps):
        return False
    before = step // config.log_every * config.log_every  # the last one that was logged
    return (step + 1) // config.affinity > before // config.affinity


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something done `every` steps, and at the last one, is done after step `step`."""
    return step == last or (every is not None and step % every == 0)
