"""The learner: the module, its teacher, its optimizer and its loss scaler, and what of them a checkpoint holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssl_seg import rng
from ssl_seg.config import UserError
from ssl_seg.models import in_evaluation_mode
from ssl_seg.norm.convert import running_statistics
from ssl_seg.norm.layers import LOGITS
from ssl_seg.tasks import Stream, streams_of
from ssl_seg.training.balance import Balancer, Uncertainty
from ssl_seg.training.config import TrainConfig, frozen_at
from ssl_seg.training.multitask import MultiTask
from ssl_seg.training.processes import Processes
from ssl_seg.training.teacher import Teacher

OF_ADAM = ("step", "exp_avg", "exp_avg_sq")
MOMENTS = {"adamw": OF_ADAM, "adam": OF_ADAM, "sgd": ("momentum_buffer",)}  # what each keeps of a weight


class Learner:
    """The module, its teacher, its optimizer and the processes: what a step changes, and what a checkpoint holds.

    `size` (H, W) is that of the images to come.
    """

    def __init__(
        self, module: MultiTask, config: TrainConfig, processes: Processes, size: tuple[int, int] = (64, 64)
    ) -> None:
        self.config = config
        if config.checkpointing:
            module.encoder.checkpoint()
        self.auto = config.accumulate == "auto"  # `cut` then settles it
        self.processes = processes
        self.accelerator = processes.accelerator
        self.module = module.to(processes.device)
        if config.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
        self.size = size
        self.bad_in_a_row = 0
        self.buffers = list(self.module.buffers())
        self.teacher = None if config.ema is None else Teacher(self.module, config.ema)
        weights = {name: task.weight for name, task in module.tasks.items()}
        self.balancer = Balancer(config.balance, weights, self.module.encoder, processes.device)
        self._inner = build_optimizer(self.module, config)
        if isinstance(config.balance, Uncertainty):
            learnt = list(self.balancer.log_variances.values())
            self._inner.add_param_group({"params": learnt, "factor": config.balance.lr, "weight_decay": 0.0})
        self.optimizer = self.accelerator.prepare_optimizer(self._inner)
        self.module.freeze(frozen_at(config, 0))
        self.wrapped = self.module
        self._wrap()

    @property
    def evaluated(self) -> MultiTask:
        """The module that is evaluated and exported: the teacher's, where there is one."""
        return self.module if self.teacher is None else self.teacher.module

    @property
    def crops(self) -> dict[Stream, int]:
        """Images of each stream that a process has in memory at a time."""
        return self.crops_if(self.config.micro_batches)

    def crops_if(self, accumulate: int) -> dict[Stream, int]:
        """The same, were a step cut into so many micro-batches."""
        parts = accumulate * self.processes.world
        return {stream: self.config.batch_of(stream) // parts for stream in streams_of(self.module.tasks)}

    @property
    def crops_at_once(self) -> str:
        """The same in words."""
        height, width = self.size
        counts = self.crops
        most = max(counts.values())
        each = f"{most}" if len(set(counts.values())) == 1 else " and ".join(f"{n} {of}" for of, n in counts.items())
        return f"{each} crop{'s' if most > 1 else ''} of {height} x {width} at a time"

    @property
    def encodes_together(self) -> bool:
        """Whether the encoder sees all tasks' views in one pass: not where each task's gradient is wanted."""
        return self.config.encode == "together" and not self.balancer.reads_gradients

    def cut(self, accumulate: int) -> None:
        """Settle into how many micro-batches a step is cut, where the config leaves it open."""
        self.config = self.config.model_copy(update={"accumulate": accumulate})

    def teach(self, head: str, image: Tensor) -> Tensor:
        """What the teacher's head named so makes of images, in the run's precision; float32."""
        assert self.teacher is not None, "check_tasks refuses a task that asks for one which is not there"
        with self.processes.autocast():
            return self.teacher.predict(head, image)

    def freeze(self, frozen: bool) -> None:
        """Let the encoder stay as it is, or learn (again): from there on DDP waits for other gradients."""
        if frozen != self.module.frozen:
            self.module.freeze(frozen)
            self._wrap()

    def forget_gradients(self) -> None:
        """Those of the weights, and those that are kept apart by task."""
        self.optimizer.zero_grad()
        self.balancer.forget()

    def _wrap(self) -> None:
        """What follows from which weights learn: whose statistics are shared, and what DDP is to wait for."""
        self.statistics = running_statistics(self.module.heads if self.module.frozen else self.module)
        if self.wrapped is not self.module:
            # A former DDP hears of every gradient until it is gone.
            self.wrapped = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
        # DDP's reducer expects one backward a step that reaches every weight. in_turn has one a task, and some heads
        # leave maps of the encoder unused: there the loop averages by itself.
        together = self.processes.world > 1 and self.encodes_together
        self.uses_ddp = together and uses_every_weight(self.module, self.size)
        if self.uses_ddp:
            with warnings.catch_warnings():
                # torch 2.14 would rather hear `forward_sync_buffers`, which torch 2.10 does not know (2026-11).
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self.wrapped = self.accelerator.prepare_model(self.module)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name: weights, buffers, the teacher's, and the optimizer's moments."""
        named = {f"model/{name}": value for name, value in self.module.state_dict().items()}
        if self.teacher is not None:
            named |= {f"teacher/{name}": value for name, value in self.teacher.module.state_dict().items()}
        named |= {name: value.detach() for name, value in self._of_balance().items()}
        for name, parameter in self._learnt().items():
            for kind, value in self._moments(parameter).items():
                named[f"optimizer/{name}/{kind}"] = value
        return named

    def not_finite(self) -> list[str]:
        """Names of the tensors of the state that hold NaN or infinity: a step with finite gradients can leave some.

        The device is waited for once. A twentieth of the time that the tensors take to be saved.
        """
        floats = {name: value for name, value in self.tensors().items() if value.is_floating_point() and value.numel()}
        # A tensor's least and largest numbers are NaN where it holds one.
        ends = torch.stack([torch.stack(value.aminmax()).to(self.processes.device) for value in floats.values()])
        return [name for name, finite in zip(floats, ends.isfinite().all(dim=1).tolist(), strict=True) if not finite]

    def data(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        scaler = self.accelerator.scaler
        return {
            "bad_in_a_row": self.bad_in_a_row,
            "scaler": scaler.state_dict() if scaler else None,
            "accumulate": self.config.accumulate,
            "balance": self.balancer.state(),
        }

    def restore(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Put back what `tensors()` and `data()` gave.

        Another optimizer than theirs begins with fresh moments (Adam's and AdamW's are the same), another balancer
        anew, a teacher that they have not with the weights. Raises UserError, with nothing changed, for the weights of
        another module.
        """
        weights = _part(tensors, "model/")
        own = self.module.state_dict()
        others = sorted(set(weights) ^ set(own)) or [name for name in own if weights[name].shape != own[name].shape]
        if others:
            raise UserError(
                f"the checkpoint is of other tasks or another model ({others[0]}); start anew with --overwrite"
            )
        self.module.load_state_dict(weights)
        if self.teacher is not None:
            self.teacher.module.load_state_dict(_part(tensors, "teacher/") or weights)
        for name, value in self._of_balance().items():
            if name in tensors:
                value.detach().copy_(tensors[name])
        parameters = self._learnt()
        for key, value in tensors.items():
            part, _, rest = key.partition("/")
            name, _, kind = rest.rpartition("/")
            if part == "optimizer" and kind in MOMENTS[self.config.optimizer] and name in parameters:
                self._inner.state[parameters[name]][kind] = _like(value, parameters[name], kind)
        self.bad_in_a_row = data["bad_in_a_row"]
        if "balance" in data:  # version 0.1 knew none
            self.balancer.restore(data["balance"])
        if self.auto:
            self.cut(data.get("accumulate", 1))  # version 0.1 knew no other
        if self.accelerator.scaler and data["scaler"]:
            self.accelerator.scaler.load_state_dict(data["scaler"])

    def share(self) -> None:
        """Give all processes the first one's state: they may have read other files, or drawn on another kind of CPU."""
        self.processes.share(self.tensors().values())

    def _of_balance(self) -> dict[str, nn.Parameter]:
        return {f"balance/{name}": value for name, value in self.balancer.log_variances.items()}

    def _learnt(self) -> dict[str, nn.Parameter]:
        """All that the optimizer may have moments of, by name."""
        return dict(self.module.named_parameters()) | self._of_balance()

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self._inner.state.get(parameter, {})
        return {kind: value for kind, value in state.items() if isinstance(value, Tensor)}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def uses_every_weight(module: MultiTask, size: tuple[int, int] = (64, 64)) -> bool:
    """Whether the heads together reach every weight that is trained: tried on two images.

    Of the run's own `size` (H, W), for a task may refuse others: a jigsaw wants room for its tiles.
    """
    image = rng.uniform(rng.as_key("probe"), (2, module.encoder.image_channels, *size)).to(
        next(module.parameters()).device
    )
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with in_evaluation_mode(module):
        features = module.encoder(image)
        totals = [module.heads[name](features, size).sum() for name in sorted(module.learning)]
        gradients = torch.autograd.grad(torch.stack(totals).sum(), trained, allow_unused=True)
    return all(gradient is not None for gradient in gradients)


def build_optimizer(module: MultiTask, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD, whose groups know their factor on the rate and their decay.

    The factors are those of the encoder's layers and of switch norm. An encoder that stays as it is for the whole run
    is in no group; one that begins frozen is, and gets its moments with its first gradient.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for part, part_factor in ((module.encoder, config.encoder_lr), (module.heads, 1.0)):
        spared = not_decayed(part)
        above = layers_above(part) if part is module.encoder and config.layer_decay < 1 else {}
        for name, parameter in part.named_parameters():
            factor = part_factor * (config.switch_lr if name.endswith(LOGITS) else 1.0)
            factor *= config.layer_decay ** above.get(name, 0)
            decay = 0.0 if name in spared else config.weight_decay
            if parameter.requires_grad and factor > 0:
                members.setdefault((factor, decay), []).append(parameter)
    groups = [{"params": own, "factor": factor, "weight_decay": decay} for (factor, decay), own in members.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    # Fused: a fifth of a small network's step on the CPU is this update otherwise.
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def not_decayed(part: nn.Module) -> set[str]:
    """Names of biases, norms' weights and what a module's own `no_weight_decay()` lists, as position embeddings."""
    names = {name for name, parameter in part.named_parameters() if parameter.ndim <= 1}
    for prefix, module in part.named_modules():
        listed = getattr(module, "no_weight_decay", set)()
        names |= {f"{prefix}.{name}".removeprefix(".") for name in listed}
    return names


def layers_above(encoder: nn.Module) -> dict[str, int]:
    """By the name of each weight, how many layers lie between it and the encoder's last one, for which it is 0.

    A part that says how deep its weights lie (`depths()`: by their names, 0 beside the image), as those of timm do, is
    believed. Else every child that holds weights is a layer, in their order, and containers are the layers in them.
    """
    known: dict[str, int] = {}
    for prefix, part in encoder.named_modules():
        depths = getattr(part, "depths", None)
        if callable(depths):
            told = cast("Mapping[str, int]", depths())
            known = {f"{prefix}.{name}".removeprefix("."): depth for name, depth in told.items()}
            break
    if not known:
        for depth, (prefix, layer) in enumerate(_layers("", encoder)):
            known |= {f"{prefix}.{name}": depth for name, _ in layer.named_parameters()}
    held = {name: known[name] for name, _ in encoder.named_parameters() if name in known}
    # What lies beside the layers, such as one weight of the encoder itself, is as the last.
    ranks = {depth: place for place, depth in enumerate(sorted(set(held.values()), reverse=True))}
    return {name: ranks[depth] for name, depth in held.items()}


def _layers(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children that hold weights, in order; of a container, or of an only child, those in it."""
    children = [(f"{name}.{own}".removeprefix("."), child) for own, child in part.named_children()]
    children = [(own, child) for own, child in children if any(True for _ in child.parameters())]
    for own, child in children:
        inner = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict) or len(children) == 1
        deeper = list(_layers(own, child)) if inner else []
        yield from deeper or [(own, child)]


def _like(value: Tensor, parameter: nn.Parameter, kind: str) -> Tensor:
    """A copy of a moment as the optimizer keeps it: where its parameter is, and in the same memory format."""
    if kind == "step":
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
