"""Memory: how much there is, how much a pass takes, and one line where there is not enough.

Ours is the reading of a container's limit, which psutil leaves to its users: it tells the machine's memory alone.
"""

from __future__ import annotations

import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_seg.config import UserError
from ssl_seg.training.processes import is_out_of_memory

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# Of each version of cgroups: the limit, what is used, and in memory.stat what of that the kernel gives back when asked.
FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@contextmanager
def enough_memory(doing: str, remedy: str, device: torch.device) -> Iterator[None]:
    """What runs out of memory inside becomes one line: what was being done, how much the device has, what to set."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        refusal = UserError(f"{doing}: out of memory on {in_words(device)}; {remedy}")
        refusal.of_one_process = True
        raise refusal from error


def in_words(device: torch.device) -> str:
    """How much memory a device has, and how much of it is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)} ({total / GIB:.1f} GiB, {free / GIB:.1f} of them free)"
    return f"the CPU ({available() / GIB:.1f} GiB of memory are free)"


def available() -> float:
    """Bytes that this process may still take: what the machine has free, or less by a limit (cgroups, `ulimit -v`)."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    own = [] if limit == resource.RLIM_INFINITY else [max(0, limit - psutil.Process().memory_info().vms)]
    return min([psutil.virtual_memory().available, *own, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[float]:
    """Bytes left in each control group that holds this process and has a limit.

    A container sees its own group at the top; a job of systemd or Slurm lies in a group below.
    """
    for line in _lines(OWN_GROUPS):
        _, controllers, group = line.split(":", 2)
        for controller, limit_file, usage_file, idle in FILES:
            if controller in controllers.split(","):
                own = CGROUPS / controller / group.lstrip("/")
                for place in (own, *own.parents):
                    limit, usage = _number(place / limit_file), _number(place / usage_file)
                    if limit is not None and usage is not None:
                        yield max(0, limit - usage + _stat(place, idle))
                    if place == CGROUPS / controller:
                        break


def _stat(place: Path, name: str) -> int:
    stat = dict(line.split() for line in _lines(place / "memory.stat"))
    return int(stat.get(name, 0))


def _number(path: Path) -> int | None:
    """None where there is no such file, and for `max`."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def bytes_of(call: Callable[[], object]) -> int:
    """The most that the tensors made by a call take at once: less than it needs, for kernels have room of their own."""
    with _Tally() as tally:
        call()
    return tally.most


class _Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, each as long as its memory is held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage not in given and storage not in self.seen:
                    self._note(storage)
        return made

    def _note(self, storage: Any) -> None:
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size
