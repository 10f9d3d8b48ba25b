"""The training loop: a generator of steps that knows no logger, no files and no metrics but its own.

Ours, because exact resume asks that everything which can be a function of the step is one (batch, keys, learning
rate, dropout), and because the multi-task step must be the same on 1 and N processes in both ways of encoding. What is
left over is the state: weights, optimizer moments, loss scaler, count of bad steps. The only user of accelerate.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ssl_seg import rng
from ssl_seg.config import Config, UserError
from ssl_seg.data.loading import Packed
from ssl_seg.norm.convert import running_statistics
from ssl_seg.norm.layers import LOGITS
from ssl_seg.tasks import MultiTask, Stream, in_evaluation_mode, make_views, weighted_total

T = TypeVar("T")
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
SGD_DECAY = 1e-4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MOMENTS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}  # what each keeps of a weight
PATIENCE_FOR_NAN = 10  # bad steps in a row before the run stops; a scaler of fp16 settles in fewer


class TrainConfig(Config):
    """How the weights are fitted. The unit of time is the step: one update of the optimizer."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 16  # global, of each stream; divided among processes, tasks (views: split), micro-batches
    accumulate: PositiveInt = 1  # micro-batches a step
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3  # AdamW's own default, right for encoders that start from scratch
    encoder_lr: PositiveFloat = 1.0  # factor on lr for the encoder; below 1 keeps a pretrained one closer to its start
    # Factor on lr for the shares of switch norm: Adam moves a weight by lr a step at most, and logits have units to go.
    switch_lr: PositiveFloat = 10.0
    # Not of biases, norms and what timm lists beside them. ConvNeXt's value; of sgd 1e-4 (He et al. 2016), whose decay
    # is added to the gradient: 0.05 with momentum would take a weight to 0 within 100 steps at a rate of 0.1.
    weight_decay: NonNegativeFloat = 0.05
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)  # of sgd
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # of adamw
    schedule: Literal["cosine", "poly", "multistep", "constant"] = "cosine"
    warmup: NonNegativeInt | None = None  # steps of linear warm-up; None: 50, or a tenth of a short run
    power: PositiveFloat = 0.9  # of poly; DeepLab's (Chen et al. 2017)
    milestones: tuple[Share, ...] = (0.6, 0.9)  # of multistep, as shares of the run
    gamma: PositiveFloat = 0.1  # of multistep: the factor at each milestone
    clip: PositiveFloat | None = 1.0  # largest norm of the whole gradient
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    device: Literal["auto", "cpu"] = "auto"
    # all shows every image to every task; split deals each step's images out to the tasks.
    views: Literal["all", "split"] = "all"
    # together is one encoder pass over all tasks (fastest); in_turn keeps one task's graph in memory (leanest).
    encode: Literal["together", "in_turn"] = "together"
    workers: NonNegativeInt = 2
    eval_every: PositiveInt | None = None  # steps; None: at the end only
    save_every: PositiveInt | None = None  # steps; None: ten times a run, but not more often than every 200
    log_every: PositiveInt = 10

    @model_validator(mode="before")
    @classmethod
    def _decay_of_sgd(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("optimizer") == "sgd":
            return {"weight_decay": SGD_DECAY, **values}
        return values


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


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something done `every` steps, and at the last one, is done after step `step`."""
    return step == last or (every is not None and step % every == 0)


@dataclass(frozen=True)
class Step:
    """What a step tells: its number (updates so far), its figures, and whether some process asked to stop."""

    number: int
    metrics: dict[str, float]
    stop: bool = False


class NonFiniteError(UserError):
    """Too many steps in a row gave no finite loss or gradient; `names` are the images of the last one."""

    def __init__(self, step: int, names: list[str]) -> None:
        super().__init__(
            f"step {step}: loss or gradient not finite {PATIENCE_FOR_NAN} times in a row; "
            f"lower train.lr, set train.precision=fp32, or look at the images named in nonfinite.json"
        )
        self.names = names


class Processes:
    """The processes of a run and this one's device, behind the few words that the rest of the project needs.

    Raises UserError for fp16 without a GPU, which torch would silently ignore.
    """

    def __init__(self, config: TrainConfig) -> None:
        cpu = config.device == "cpu" or not torch.cuda.is_available()
        if cpu:
            keep_freed_memory()
        if config.precision == "fp16" and cpu:
            raise UserError("train.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
        # Else a second run in one process keeps the first one's precision and device.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        # Buffers are averaged by the loop in both ways of encoding; DDP's own broadcast would only see one of them.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        precision = "no" if config.precision == "fp32" else config.precision
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main = self.rank == 0
        if self.world > 1:
            atexit.register(leave_group)

    def sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum") if self.world > 1 else tensor

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one message."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        flat = self.sum(flat) / self.world
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(piece.view_as(tensor))

    def from_first(self, value: T) -> T:
        """Rank 0's value (a small picklable object), on every process."""
        holder = [value]
        if self.world > 1:
            broadcast_object_list(holder)
        return holder[0]

    def gather(self, values: list[T]) -> list[T]:
        """The lists of all processes, one after the other."""
        return gather_object(values) if self.world > 1 else values

    def any(self, value: bool) -> bool:
        """Whether it is so on some process."""
        return self.sum(torch.tensor(float(value), device=self.device)).item() > 0

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


def leave_group() -> None:
    """Close what connects this process with the others, before Python takes it apart.

    Else the threads of gloo are ended in any order, and one exit in 25 of a busy machine is an abort (torch 2.14). Not
    with NCCL: closing that waits for the others, which a process that ends by an error must not.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


class Learner:
    """The module, its optimizer and the processes: what a step changes, and what a checkpoint holds.

    `size` (H, W) is that of the images to come.
    """

    def __init__(
        self, module: MultiTask, config: TrainConfig, processes: Processes, size: tuple[int, int] = (64, 64)
    ) -> None:
        self.config = config
        self.processes = processes
        self.accelerator = processes.accelerator
        self.module = module.to(processes.device)
        if config.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
        self.bad_in_a_row = 0
        self.buffers = list(self.module.buffers())
        self.statistics = running_statistics(self.module)
        # DDP's reducer expects one backward a step that reaches every weight. in_turn has one a task, and some heads
        # leave maps of the encoder unused: there the loop averages by itself.
        together = processes.world > 1 and config.encode == "together"
        self.uses_ddp = together and uses_every_weight(self.module, size)
        optimizer = build_optimizer(self.module, config)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.wrapped = self.module
        if self.uses_ddp:
            with warnings.catch_warnings():
                # torch 2.14 would rather hear `forward_sync_buffers`, which torch 2.10 does not know (2026-11).
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self.wrapped = self.accelerator.prepare_model(self.module)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name: weights, buffers and the optimizer's moments."""
        named = {f"model/{name}": value for name, value in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            for kind, value in self._moments(parameter).items():
                named[f"optimizer/{name}/{kind}"] = value
        return named

    def data(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        scaler = self.accelerator.scaler
        return {"bad_in_a_row": self.bad_in_a_row, "scaler": scaler.state_dict() if scaler else None}

    def restore(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Put back what `tensors()` and `data()` gave; another optimizer than theirs begins with fresh moments.

        Raises UserError, with nothing changed, for the weights of another module.
        """
        weights = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
        own = self.module.state_dict()
        others = sorted(set(weights) ^ set(own)) or [name for name in own if weights[name].shape != own[name].shape]
        if others:
            raise UserError(
                f"the checkpoint is of other tasks or another model ({others[0]}); start anew with --overwrite"
            )
        self.module.load_state_dict(weights)
        parameters = dict(self.module.named_parameters())
        for key, value in tensors.items():
            part, _, rest = key.partition("/")
            name, _, kind = rest.rpartition("/")
            if part == "optimizer" and kind in MOMENTS[self.config.optimizer]:
                self._inner.state[parameters[name]][kind] = _like(value, parameters[name], kind)
        self.bad_in_a_row = data["bad_in_a_row"]
        if self.accelerator.scaler and data["scaler"]:
            self.accelerator.scaler.load_state_dict(data["scaler"])

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self._inner.state.get(parameter, {})
        return {kind: value for kind, value in state.items() if isinstance(value, Tensor)}


def uses_every_weight(module: MultiTask, size: tuple[int, int] = (64, 64)) -> bool:
    """Whether the heads together reach every weight that is trained: tried on two images.

    Of the run's own `size` (H, W), for a task may refuse others: a jigsaw wants room for its tiles.
    """
    image = rng.uniform(rng.as_key("probe"), (2, 3, *size)).to(next(module.parameters()).device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with in_evaluation_mode(module):
        features = module.encoder(image)
        total = sum(head(features, size).sum() for head in module.heads.values())
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
    return all(gradient is not None for gradient in gradients)


def build_optimizer(module: MultiTask, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD, whose groups know their factor on the rate (the encoder's, switch norm's) and their decay."""
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for part, part_factor in ((module.encoder, config.encoder_lr), (module.heads, 1.0)):
        spared = not_decayed(part)
        for name, parameter in part.named_parameters():
            factor = part_factor * (config.switch_lr if name.endswith(LOGITS) else 1.0)
            decay = 0.0 if name in spared else config.weight_decay
            if parameter.requires_grad:
                members.setdefault((factor, decay), []).append(parameter)
    groups = [{"params": own, "factor": factor, "weight_decay": decay} for (factor, decay), own in members.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    # Fused: a fifth of a small network's step on the CPU is this update otherwise.
    return AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class AdamW(torch.optim.AdamW):
    """torch's, to the bit, for weights in channels_last too without copies.

    Ours because torch's fused update on a CPU (2.14) copies each weight, gradient and moment that is not contiguous,
    and copies them back, which takes longer than the update. The same memory with its channels seen last is contiguous.
    """

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *rest: list[Tensor]
    ) -> bool:
        has_complex = super()._init_group(group, params, grads, *rest)
        is_last = [_format_of(parameter) is torch.channels_last for parameter in params]
        averages, squares = rest[:2]
        for tensors in (params, grads, averages, squares):
            seen = zip(tensors, is_last, strict=True)
            tensors[:] = [tensor.permute(0, 2, 3, 1) if last else tensor for tensor, last in seen]
        return has_complex


def not_decayed(part: nn.Module) -> set[str]:
    """Names of biases, norms' weights and what a module's own `no_weight_decay()` lists, as position embeddings."""
    names = {name for name, parameter in part.named_parameters() if parameter.ndim <= 1}
    for prefix, module in part.named_modules():
        listed = getattr(module, "no_weight_decay", set)()
        names |= {f"{prefix}.{name}".removeprefix(".") for name in listed}
    return names


def train(
    learner: Learner,
    streams: Mapping[Stream, Iterator[Packed]],
    start: int,
    seed: int,
    wants_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Make the steps from `start` to the end, yielding each one's figures.

    `streams` give this process's micro-batches in order. Each step, all processes learn whether any of them
    `wants_stop`. A step whose loss or gradient is not finite changes nothing, on any process; ten in a row raise
    NonFiniteError.
    """
    config = learner.config
    key = rng.fold_in(rng.as_key(seed), "dropout")
    for step in range(start, config.steps):
        learner.module.train()
        rate = lr_at(config, step)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        learner.optimizer.zero_grad()
        before = [buffer.clone() for buffer in learner.buffers]
        totals: dict[str, Tensor] = {}
        names: list[str] = []
        for micro in range(config.accumulate):
            packed = {stream: next(batches) for stream, batches in streams.items()}
            names += [name for batch in packed.values() for name in batch.names]
            seed_torch(rng.fold_in(rng.fold_in(rng.fold_in(key, step), micro), learner.processes.rank))
            for name, loss in backward(learner, packed, last=micro == config.accumulate - 1).items():
                totals[name] = totals.get(name, 0.0) + loss / config.accumulate
        losses, stop = agree(learner.processes, totals, wants_stop())
        norm = finish_gradients(learner)
        finite = math.isfinite(norm) and all(math.isfinite(loss) for loss in losses.values())
        if finite:
            learner.optimizer.step()
            learner.bad_in_a_row = 0
            learner.processes.average(learner.statistics)
        else:
            learner.bad_in_a_row += 1
            for buffer, old in zip(learner.buffers, before, strict=True):
                buffer.copy_(old)  # the statistics of a norm layer have seen the bad batch too
            if learner.accelerator.scaler:
                learner.accelerator.scaler.update()  # without a step: it shrinks after an infinite gradient
        if learner.bad_in_a_row == PATIENCE_FOR_NAN:
            raise NonFiniteError(step + 1, learner.processes.gather(names))
        figures = {f"train/{name}/loss": loss for name, loss in losses.items()}
        figures["train/loss"] = sum(learner.module.tasks[name].weight * loss for name, loss in losses.items())
        yield Step(step + 1, {**figures, "lr": rate, "grad_norm": norm}, stop)


def backward(learner: Learner, packed: Mapping[Stream, Packed], last: bool) -> dict[str, Tensor]:
    """Add one micro-batch's gradients; gives each task's mean loss over this process's samples, detached."""
    config, accelerator = learner.config, learner.accelerator
    batches = {stream: batch.to(learner.processes.device, config.channels_last) for stream, batch in packed.items()}
    views = make_views(learner.module.tasks, batches, split=config.views == "split")
    passes = [views] if config.encode == "together" else [{name: view} for name, view in views.items()]
    waits = learner.uses_ddp and not last  # DDP averages at the last micro-batch only
    means: dict[str, Tensor] = {}
    for chosen in passes:
        with accelerator.no_sync(learner.wrapped) if waits else nullcontext():
            with accelerator.autocast():
                sample_losses = learner.wrapped(chosen)
            accelerator.backward(weighted_total(learner.module.tasks, sample_losses) / config.accumulate)
        means.update({name: values.detach().mean() for name, values in sample_losses.items()})
    return means


def finish_gradients(learner: Learner) -> float:
    """Average over the processes where DDP has not, clip; gives the norm before clipping, equal on all processes."""
    gradients = [parameter.grad for parameter in learner.module.parameters() if parameter.grad is not None]
    if not learner.uses_ddp:
        learner.processes.average(gradients)
    learner.accelerator.unscale_gradients(learner.optimizer)
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).tolist()
    # fsum is exact, so the norm does not depend on how many gradients of zero stand beside the others: a joint run
    # whose unlabelled losses weigh nothing then clips as the supervised run does, to the bit.
    norm = math.sqrt(math.fsum(value * value for value in norms))
    if learner.config.clip is not None:
        total = torch.tensor(norm, device=learner.processes.device)
        nn.utils.clip_grads_with_norm_(learner.module.parameters(), learner.config.clip, total)
    return norm


def agree(processes: Processes, losses: Mapping[str, Tensor], stop: bool) -> tuple[dict[str, float], bool]:
    """The mean loss of each task over the processes, and whether any of them wants to stop: one reduction, one sync."""
    mine = torch.stack([*losses.values(), torch.tensor(float(stop), device=processes.device)])
    shared = (processes.sum(mine) / processes.world).tolist()
    return dict(zip(losses, shared, strict=False)), shared[-1] > 0


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to a GiB, for the next step; other C libraries are left as they are.

    By default it hands large pieces back to the kernel at once, which gives them again page by page and wiped, step
    after step: 6,000 to 11,000 page faults a step of a small network, a tenth of the time of two such runs side by side
    (tests/benchmarks/test_speed.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**30)
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older ones take


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seed_torch(key: Tensor) -> None:
    """Dropout and drop path draw from torch's own generators: start them from the step's key."""
    torch.manual_seed(int(key) & (2**63 - 1))


def _like(value: Tensor, parameter: nn.Parameter, kind: str) -> Tensor:
    # A fused AdamW wants its step count where the parameter is, as every other moment.
    if kind == "step":
        return value.to(parameter.device, copy=True)
    return value.to(parameter.device, copy=True).contiguous(memory_format=_format_of(parameter))


def _format_of(parameter: nn.Parameter) -> torch.memory_format:
    channels_last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not parameter.is_contiguous() else torch.contiguous_format
