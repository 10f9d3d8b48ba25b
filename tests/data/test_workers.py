"""Workers that are killed, crash or stand still, and machines without room for them: one line, with the image."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssl_seg import images
from ssl_seg.data.augment import Augment
from ssl_seg.data.loading import CenterCrops, Draws, Packed, Samples, Whole, loader
from ssl_seg.data.workers import Workers, WorkersError, check_room
from ssl_seg.datasets import Dataset, Example
from ssl_seg.leaks.near_duplicates import fingerprint
from ssl_seg.training.config import TrainConfig
from tests import ROOT
from tests.faults import message_of

HURT = 5  # the image at which it happens
QUICK = Workers(2, timeout=1.0)


class Hurting(Dataset):
    """Images of which one does something to the worker that reads it."""

    what: str = ""
    side: int = 20

    def __len__(self) -> int:
        return 12

    def name(self, index: int) -> str:
        return f"photo_{index}.png"

    def read(self, index: int) -> Example:
        if index == HURT:
            hurt(self.what)
        return Example(np.full((self.side, self.side, 3), index, dtype=np.uint8), None, self.name(index))


def hurt(what: str) -> None:
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # of a file in shared memory, too
    elif what == "handles":
        opened = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 4, opened + 4))  # a few are left, for the batches before
    elif what == "exit":
        os._exit(7)
    elif what == "sleep":
        time.sleep(100)
    elif what:
        os.kill(os.getpid(), getattr(signal, what))


def one_by_one(dataset: Dataset) -> list[list[int]]:
    return [[index] for index in range(len(dataset))]


def read_all(what: str, **more: int) -> Iterator[Packed]:
    dataset = Hurting(what=what, **more)
    return loader(Whole(dataset, with_labels=False), one_by_one(dataset), QUICK)


ENDS = {
    "SIGKILL": "ended by SIGKILL; Linux does so where memory runs out",
    "SIGSEGV": "ended by SIGSEGV; whatever reads it has crashed",
    "SIGBUS": "ended by SIGBUS; shared memory is full perhaps",
    "exit": "ended with exit code 7",
}
STANDS_STILL = "not handed over by its loader worker within 1 s"


@pytest.mark.parametrize(("what", "said"), [*ENDS.items(), ("SIGSTOP", STANDS_STILL), ("sleep", STANDS_STILL)])
def test_what_happens_to_a_worker_is_one_line_with_its_image(
    what: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    others = multiprocessing.active_children()
    seen = []
    with pytest.raises(WorkersError, match=rf"\Aphoto_{HURT}\.png: .*{said}") as raised:
        seen += [packed.names for packed in read_all(what)]
    assert "\n" not in str(raised.value)
    assert raised.value.of_one_process
    assert raised.value.exit_code == 2
    assert capfd.readouterr().err == "", "no traceback or line of torch's beside it"
    assert multiprocessing.active_children() == others, "none is left, which the end of this process would wait for"


@pytest.mark.parametrize("samples", [Samples, CenterCrops], ids=["draws", "centre crops"])
def test_the_image_of_a_draw_is_named(samples: type) -> None:
    augment = Augment(crop=(8, 8))
    if samples is CenterCrops:
        loading = loader(CenterCrops(Hurting(what="exit"), augment), [[4, HURT]], QUICK)
    else:
        loading = loader(Samples(Hurting(what="exit"), augment, seed=3), Draws(4, 1, 4), QUICK)  # a whole epoch later
    assert message_of(lambda: list(loading)).startswith(f"photo_{HURT}.png: ")


def test_the_leak_guard_s_pass_is_watched_too() -> None:
    assert message_of(lambda: list(fingerprint(Hurting(what="exit"), QUICK))).startswith(f"photo_{HURT}.png: ")


def test_a_worker_that_dies_while_this_process_is_at_work_interrupts_nothing() -> None:
    """torch raises from a signal's handler, in the middle of a step or of a checkpoint."""
    loading = read_all("SIGKILL")
    names = [next(loading).names[0] for _ in range(2)]  # by which the image that hurts is asked for
    until = time.monotonic() + 10
    while len(multiprocessing.active_children()) > 1 and time.monotonic() < until:
        time.sleep(0.01)  # until one of the two is gone
    assert f"photo_{HURT}.png" in message_of(lambda: names.extend(packed.names[0] for packed in loading))
    assert names == [f"photo_{index}.png" for index in range(len(names))]


def test_a_batch_that_finds_no_shared_memory_says_how_much_is_needed() -> None:
    said = message_of(lambda: list(read_all("full", side=200)))
    assert "2 loader workers need 0.698 (5 batches of 0.12 MB); set train.workers=0" in said
    assert "--shm-size" in said


def test_a_batch_that_finds_no_file_handle_says_what_to_set() -> None:
    assert "too few file handles" in message_of(lambda: list(read_all("handles")))


def test_a_stop_in_the_middle_leaves_no_worker() -> None:
    others = multiprocessing.active_children()
    loading = read_all("sleep")
    next(loading)
    loading.close()
    assert multiprocessing.active_children() == others


def test_too_little_shared_memory_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    samples = Samples(Hurting(what="exit"), Augment(crop=(1000, 1000)), seed=3, with_labels=True)
    said = message_of(lambda: next(loader(samples, Draws(4, 0, 9), Workers(2, section=""))))
    assert said == (
        "/dev/shm: 67.1 MB of shared memory are free, and 2 loader workers need 80.1 (5 batches of 16 MB); "
        "set workers=0, or give it more (docker run --shm-size=1g)"
    )
    check_room(Workers(1), 4_000_000 * 4)
    check_room(Workers(0), 10**12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "in each of 2 processes" in message_of(lambda: check_room(Workers(1), 4_000_000 * 4))


def test_shared_memory_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = message_of(lambda: check_room(Workers(2), 0))
    assert said == (
        "/dev/shm: cannot be written, and loader workers need it; set train.workers=0, or mount it for writing"
    )


def test_too_few_file_handles_are_told_before_anything_is_read() -> None:
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/dev/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, former[1]))
    try:
        said = message_of(lambda: next(read_all("exit")))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)
    assert said.startswith("train.workers: too few file handles for loader workers (")
    assert said.endswith(f" {few} allowed); raise ulimit -n, or set it to 0")


def test_the_key_is_written_where_it_is_set_alone() -> None:
    """Else runs and cells of before would count as others."""
    assert "worker_timeout" not in TrainConfig(worker_timeout=120).dump()
    assert TrainConfig(worker_timeout=7).dump()["worker_timeout"] == 7
    assert TrainConfig(workers=3, worker_timeout=7).reading == Workers(3, 7)


def test_workers_draw_no_random_number_of_the_training() -> None:
    torch.manual_seed(0)
    list(read_all(""))
    one = torch.rand(1)
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # the seed of the workers, as in every torch loader
    assert one == torch.rand(1)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts need root in a namespace")
@pytest.mark.parametrize("mount", ["size=64m", "size=256k", "size=16k", "ro,size=64m"])
def test_a_small_or_read_only_shared_memory_ends_predict_in_one_line(mount: str, tmp_path: Path) -> None:
    """64 MB are what Docker gives; six photographs of 12 megapixels, as a command of its own."""
    (tmp_path / "big.py").write_text(BIG)
    for index in range(6):
        images.write_image(tmp_path / "photos" / f"{index}.png", np.zeros((3024, 4032, 3), dtype=np.uint8))
    inside = f"mount -t tmpfs -o {mount} tmpfs /dev/shm && exec timeout -k 1 100 {sys.executable} big.py"
    command = ["unshare", "-m", "bash", "-c", inside]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("ssl-seg: /dev/shm: ")
    assert done.stderr.count("\n") == 1
    assert "workers=0" in done.stderr


BIG = """
from ssl_seg.cli import run
from ssl_seg.data.loading import Whole, loader
from ssl_seg.data.workers import Workers
from ssl_seg.datasets.folder import Folder
import sys
whole = Whole(Folder(images="photos"), with_labels=False)
sys.exit(run(lambda: list(loader(whole, [[index] for index in range(6)], Workers(2, section="")))))
"""
