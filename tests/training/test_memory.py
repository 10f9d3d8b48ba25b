"""Memory: the limits of containers, what a pass takes, and one line where there is not enough."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from ssl_seg.config import UserError
from ssl_seg.training import memory
from ssl_seg.training.memory import GIB, available, bytes_of, enough_memory

CPU = torch.device("cpu")
WITHIN = {  # what a container's kernel shows: 3 GiB of 8 are used, of which it would give back 1
    "of version 2": ("0::/job", "job", ("memory.max", "memory.current", "inactive_file")),
    "of version 2, its own root": ("0::/", "", ("memory.max", "memory.current", "inactive_file")),
    "of version 1": (
        "9:cpu:/\n4:memory:/a/b",
        "memory/a",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
}


@pytest.mark.parametrize("kind", WITHIN)
def test_the_limit_of_a_container_counts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    membership, place, (limit, usage, idle) = WITHIN[kind]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    assert available() == 64 * GIB, "no control groups"
    (tmp_path / "own").write_text(membership + "\n")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / limit).write_text(f"{8 * GIB}\n")
    (tmp_path / place / usage).write_text(f"{3 * GIB}\n")
    (tmp_path / place / "memory.stat").write_text(f"cache 7\n{idle} {GIB}\n")
    assert available() == 6 * GIB
    (tmp_path / place / limit).write_text("max\n")
    assert available() == 64 * GIB


def test_the_bytes_of_a_call_are_those_that_are_held_at_once() -> None:
    image = torch.ones(1000)

    def call() -> torch.Tensor:
        double = image * 2
        view = double.view(10, 100).t()  # no memory of its own
        del double
        more = view + 1
        del view
        return more.relu_() + more[0, 0]

    assert bytes_of(call) == 3 * 4000 - 4000  # `double` is gone before the last sum


def test_bytes_of_a_backward_pass_grow_with_the_images() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(8, 1, 1))

    def backward(count: int) -> int:
        return bytes_of(lambda: network(torch.ones(count, 3, 32, 32)).mean().backward())

    small, large = backward(4), backward(8)
    kept = 4 * 32 * 32 * 4 * (3 + 8 + 8 + 1)  # four images, float32: the input and what each layer makes of it
    assert kept <= large - small <= 2 * kept


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you t"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_one_line(error: Exception) -> None:
    said = r"8 crops: out of memory on the CPU \(\d+\.\d GiB .* free\); give fewer"
    with pytest.raises(UserError, match=said) as caught, enough_memory("8 crops", "give fewer", CPU):
        raise error
    assert caught.value.of_one_process, "the other processes may have room"
    assert "\n" not in str(caught.value)


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("8 crops", "give fewer", CPU):
        raise RuntimeError("shapes do not fit")
