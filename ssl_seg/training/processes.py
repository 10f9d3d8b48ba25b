"""The processes of a run, and what they agree on. The only user of accelerate."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import takewhile
from typing import Any, Literal, TypeVar, cast

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from ssl_seg import files
from ssl_seg.config import UserError, diff, first_line
from ssl_seg.training.config import Precision, Settled, TrainConfig
from ssl_seg.training.depthwise import DepthwiseGradients

DeviceName = Literal["auto", "cpu"]
T = TypeVar("T")
# Of accelerate's variables those that change no result: `accelerate launch --cpu` sets the first.
HEEDED = frozenset({"ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"})
NO_WISH = frozenset({"", "0", "1", "false", "no", "none", "default"})  # values that `accelerate launch` sets unasked
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
TIMED_OUT = ("Timed out waiting", "Timed out after", "wait timeout after")  # of gloo and of the store, torch 2.14
ENDED = ("Connection closed by peer", "Connection reset by peer")  # of gloo, which has no class for it
ROLL_CALL = 3.0  # seconds for the others to say that they are there, once one has waited too long
TELLING = 1.0  # seconds for the others to come to the same error
BF16_OF_CPUS = ("avx512_bf16", "amx_bf16", "bf16")  # by the names of torch; the last is ARM's
SHOWN = 60  # characters of a value in a message


def settle_precision(wish: Precision, device: torch.device) -> Settled:
    """What `auto` comes to on a device: bf16 where it has instructions for it, else fp32."""
    if wish != "auto":
        return wish
    return "bf16" if computes_in_bf16(device) else "fp32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16. Without them a CPU emulates it: right, and many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_OF_CPUS)


def refusal_of_bf16() -> str:
    """What torch says on a CPU that cannot go back through a convolution in bf16, as some with AVX2 cannot; else ''."""
    image, weight = (torch.ones(1, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    try:
        torch.nn.functional.conv2d(image, weight).sum().backward()
    except RuntimeError as error:
        return first_line(error)
    return ""


def choose_device(name: DeviceName) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


class Processes:
    """The processes of a run and this one's device, behind the few words that the rest of the project needs.

    What is trained is in the config alone: `unheeded` are the wishes that accelerate's own environment variables have.
    `settled` is the precision that a run began with which goes on, where its config leaves that to the device.

    Raises UserError for fp16 without a GPU, which torch would silently ignore, and for processes that do not come.
    """

    def __init__(self, config: TrainConfig, settled: Settled | None = None) -> None:
        device = choose_device(config.device)
        cpu = device.type == "cpu"
        if config.precision == "fp16" and cpu:
            raise UserError("train.precision: fp16 needs a GPU; use auto, fp32 or bf16 on the CPU")
        is_open = config.precision == "auto"
        self.precision: Settled = settled if is_open and settled else settle_precision(config.precision, device)
        self.emulates = self.precision == "bf16" and cpu and not computes_in_bf16(device)
        refusal = refusal_of_bf16() if self.emulates else ""
        if refusal:
            raise UserError(f"train.precision: bf16: this CPU cannot train in it ({refusal}); give auto or fp32")
        # Else a second run in one process keeps the first one's precision and device.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        # Buffers are averaged by the loop in both ways of encoding; DDP's own broadcast would only see one of them.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        precision = "no" if self.precision == "fp32" else self.precision
        self.timeout = config.process_timeout
        self.recomputes = config.checkpointing
        # A millisecond more: accelerate 1.15 drops what is NCCL's default, and gloo would wait for half an hour.
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=self.timeout, milliseconds=1))
        with _unheeded() as unheeded, _all_coming(self.timeout):
            self.accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp, group])
        wishes = {name: value for name, value in unheeded.items() if value.lower() not in NO_WISH}
        self.unheeded: list[str] = [f"{name}={value}" for name, value in wishes.items()]
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main = self.rank == 0
        self.wanted = launched_for(_starting_command()) if self.world == 1 else self.world  # by who started it
        if self.world > 1:
            atexit.register(leave_group)
            _get_default_store().set(f"place/{self.rank}", f"process {os.getpid()} on {socket.gethostname()}")

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """What is computed within is in the run's precision."""
        # A pass that is computed again runs outside of this, and has to be the same.
        is_same = not self.recomputes
        slow = self.device.type == "cpu" and self.precision == "bf16" and is_same
        with self.accelerator.autocast(), DepthwiseGradients() if slow else nullcontext():
            yield

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

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by rank 0's."""
        if self.world == 1:
            return
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            torch.distributed.broadcast(whole, 0)
            tensor.detach().copy_(whole)

    def check_same(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Raise UserError, on all processes, where one has other facts than the first: then they would train apart.

        Facts are what JSON can say, by (nested) name.
        """
        with self.ending_together():
            first, *others = self.gather([facts])
            for rank, own in enumerate(others, start=1):
                for key, (here, there) in diff(first, own).items():
                    place = f"rank {rank}{self._place(rank)}"
                    raise UserError(f"{key}: {_shown(here)} for rank 0 and {_shown(there)} for {place}; {remedy}")

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this process; a UserError of some is raised on all. It must not wait for the others."""
        if self.world == 1:
            return work()
        made: list[T] = []
        refusal = None
        try:
            made.append(work())
        except UserError as error:
            refusal = error
        with self.ending_together():
            for rank, text in enumerate(self.gather([None if refusal is None else str(refusal)])):
                if text is not None:
                    raise UserError(f"rank {rank}{self._place(rank)}: {text}" if rank else text) from refusal
        return made[0]

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Inside, what ends one process ends all of them, each with one line where it is not their own mistake.

        An error that several meet is told by the first of them. A process that does not answer for
        `train.process_timeout` is named by the first that has waited so long: with gloo. NCCL waits on the device, and
        torch itself ends a process that it keeps waiting, with a message of its own.
        """
        try:
            yield
        except UserError as error:
            if self.world > 1 and error.of_one_process is None:
                error.of_one_process = self._is_first_to_tell(str(error))
            raise
        except RuntimeError as error:
            if self.world == 1 or not has_lost_another(error):
                raise
            lost = self._lost(is_late=_speaks(error, TIMED_OUT))
            lost.of_one_process = self._is_first_to_tell(str(lost))
            raise lost from error

    def _lost(self, is_late: bool) -> UserError:
        """About another process, of which this one has heard nothing more."""
        absent = self._absent(ROLL_CALL if is_late else 0.0)
        if not is_late or not absent:
            return UserError(
                "another process of this run has ended (it says why, unless it was killed); the same command continues"
            )
        named = " and ".join(f"rank {rank} of {self.world}{self._place(rank)}" for rank in absent)
        return UserError(
            f"{named}: no answer within {self.timeout:g} s, while others waited; if it stands still, end it, and the "
            "same command goes on from the newest checkpoint; if it was at work, give a larger train.process_timeout"
        )

    def _absent(self, seconds: float) -> list[int]:
        """A roll call of those whose waiting has come to an end: the ranks that do not answer in so many seconds."""
        others = [rank for rank in range(self.world) if rank != self.rank]

        def call() -> list[int]:
            store, until = _get_default_store(), time.monotonic() + seconds
            store.set(f"present/{self.rank}", "")
            while absent := [rank for rank in others if not store.check([f"present/{rank}"])]:
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
            return absent

        return _asked(call, if_silent=[0] if self.rank else others)

    def _place(self, rank: int) -> str:
        """Where a rank is, in brackets; nothing where nobody can say."""
        key = f"place/{rank}"

        def call() -> str:
            store = _get_default_store()
            return f" ({store.get(key).decode()})" if store.check([key]) else ""

        return _asked(call, if_silent="")

    def _is_first_to_tell(self, text: str) -> bool:
        """Whether no other process has said so yet: rather twice than never."""
        key = f"told/{files.sha256(text.encode())}"

        def call() -> bool:
            store = _get_default_store()
            is_first = store.add(key, 1) == 1
            until = time.monotonic() + TELLING
            while self.rank == 0 and store.add(key, 0) < self.world and time.monotonic() < until:
                time.sleep(0.02)  # it may keep the store, which the others still have to ask
            return is_first

        return _asked(call, if_silent=True)


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


def launched_for(command: Sequence[str]) -> int:
    """How many processes a command line `accelerate launch ...` asks for; 1 for any other, and where it does not say.

    On a CPU it starts one whatever it is asked for (accelerate 1.15), and tells the process nothing of the wish.
    """
    words = iter(command)
    if not any("accelerate" in word for word in takewhile(lambda word: word != "launch", words)):
        return 1
    for word in words:
        name, is_joined, value = word.replace("-", "_").partition("=")
        if name == "_m" or word.endswith(".py"):  # what follows is the program's own
            break
        if name == "__num_processes":
            number = value if is_joined else next(words, "")
            return int(number) if re.fullmatch(r"[0-9]{1,6}", number) else 1
    return 1


def _settings_of_accelerate() -> set[str]:
    return {name for name in os.environ if name.startswith("ACCELERATE_")} - HEEDED


def _starting_command() -> list[str]:
    """The command line of the process that started this one."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        return parent.cmdline() if parent else []
    return []


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


@contextmanager
def _all_coming(timeout: float) -> Iterator[None]:
    """Where others do not come to the meeting of all processes, that is one line."""
    try:
        yield
    except RuntimeError as error:
        if not has_lost_another(error):
            raise
        missing = UserError(
            f"not all processes of the run have come within {timeout:g} s ({str(error).splitlines()[0]}); "
            "see what keeps the others, or give a larger train.process_timeout"
        )
        missing.of_one_process = True
        raise missing from error


def has_lost_another(error: BaseException) -> bool:
    """Whether a message between the processes failed because one of them has ended or does not answer."""
    return isinstance(error, torch.distributed.DistError) or _speaks(error, (*ENDED, *TIMED_OUT))


def _speaks(error: BaseException, of: tuple[str, ...]) -> bool:
    return any(words in str(error) for words in of)


def _asked(call: Callable[[], T], if_silent: T) -> T:
    """What the store of the processes answers; it may be gone, or kept by the very process that stands still."""
    answers: list[T] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(call())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ROLL_CALL + 1.0)
    return answers[0] if answers else if_silent


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


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
