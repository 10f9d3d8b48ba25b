"""The processes of a run, and what they agree on. The only user of accelerate."""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ssl_seg.config import UserError
from ssl_seg.training.config import TrainConfig

DeviceName = Literal["auto", "cpu"]
T = TypeVar("T")
# Of accelerate's variables those that change no result: `accelerate launch --cpu` sets the first.
HEEDED = frozenset({"ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"})
NO_WISH = frozenset({"", "0", "1", "false", "no", "none", "default"})  # values that `accelerate launch` sets unasked
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_device(name: DeviceName) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


class Processes:
    """The processes of a run and this one's device, behind the few words that the rest of the project needs.

    What is trained is in the config alone: `unheeded` are the wishes that accelerate's own environment variables have.
    Raises UserError for fp16 without a GPU, which torch would silently ignore.
    """

    def __init__(self, config: TrainConfig) -> None:
        cpu = config.device == "cpu" or not torch.cuda.is_available()
        if config.precision == "fp16" and cpu:
            raise UserError("train.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
        # Else a second run in one process keeps the first one's precision and device.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        # Buffers are averaged by the loop in both ways of encoding; DDP's own broadcast would only see one of them.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        precision = "no" if config.precision == "fp32" else config.precision
        with _unheeded() as unheeded:
            self.accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])
        wishes = {name: value for name, value in unheeded.items() if value.lower() not in NO_WISH}
        self.unheeded: list[str] = [f"{name}={value}" for name, value in wishes.items()]
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main = self.rank == 0
        if self.world > 1:
            atexit.register(leave_group)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world == 1:
            return tensor
        return cast(Tensor, self.accelerator.reduce(tensor, "sum"))  # of a nest of tensors it gives a nest

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


@contextmanager
def _unheeded() -> Iterator[dict[str, str]]:
    """Hide the variables by which accelerate takes other settings than it is given; gives those that were set.

    One of them divides gradients (accelerate 1.15 puts it before its own argument), others compile, shard or move the
    module: no record of a run would know.
    """
    hidden = {name: os.environ.pop(name) for name in sorted(_settings_of_accelerate())}
    try:
        yield hidden
    finally:
        os.environ.update(hidden)


def _settings_of_accelerate() -> set[str]:
    return {name for name in os.environ if name.startswith("ACCELERATE_")} - HEEDED


def leave_group() -> None:
    """Close what connects this process with the others, before Python takes it apart.

    Else the threads of gloo are ended in any order, and one exit in 25 of a busy machine is an abort (torch 2.14). Not
    with NCCL: closing that waits for the others, which a process that ends by an error must not.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, up to a GiB, for the next step; other C libraries are left as they are.

    By default it hands large pieces back to the kernel at once, which gives them again page by page and wiped, step
    after step: 6,000 to 11,000 page faults a step of a small network, a tenth of the time of two such runs side by side
    (tests/benchmarks/test_speed.py). The commands call it on a CPU; whoever trains from Python may. It cannot be taken
    back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**30)
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older ones take


def has_lost_another(error: BaseException) -> bool:
    """Whether a message between the processes failed because one of them has ended, which has said why itself."""
    told = ("Connection closed by peer", "Connection reset by peer")  # of gloo, torch 2.14, which has no class for it
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in told)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room, or the process was given none."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # What oneDNN says where `ulimit -v` gives it no room, and elsewhere for other reasons.
    is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if is_limited and "could not create a primitive" in str(error):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
