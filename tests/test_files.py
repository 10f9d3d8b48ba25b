from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_seg import files
from ssl_seg.config import UserError
from tests.faults import FullDisk, crash_everywhere, leftovers, message_of, run_in_child
from tests.processes import PROCESSES

FORMER = {"a.txt": b"former a", "b.txt": b"former b"}
LATER = {"a.txt": b"later a", "c.txt": b"later c"}


# ---- parts ----


def content_of(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def commit_former(folder: Path) -> None:
    files.commit_folder(folder / "x", FORMER)


def commit_later(folder: Path) -> None:
    files.commit_folder(folder / "x", LATER)


def between_two_renames(folder: Path) -> None:
    """What a kill leaves that comes when the former folder is out of the way and the later one not yet there."""
    commit_former(folder)
    (folder / "x").rename(folder / ".ssl_seg-old-x")
    (folder / ".ssl_seg-new-x").mkdir()


# ---- folders ----


def test_a_committed_folder_holds_just_the_files_given(tmp_path):
    target = tmp_path / "deep/x"
    files.commit_folder(target, FORMER)
    assert content_of(target) == FORMER
    files.commit_folder(target, LATER)
    assert content_of(target) == LATER
    assert files.committed(target) == target
    assert leftovers(tmp_path) == []


def check_one_of_both(folder: Path) -> None:
    assert content_of(files.committed(folder / "x")) in (FORMER, LATER)
    assert "x" in files.committed_names(folder)
    files.settle(folder)
    assert content_of(folder / "x") in (FORMER, LATER)
    assert leftovers(folder) == []
    commit_later(folder)
    assert content_of(folder / "x") == LATER
    assert leftovers(folder) == []


def test_a_kill_at_each_system_call_of_a_commit_leaves_the_old_or_the_new(tmp_path):
    assert crash_everywhere(tmp_path, commit_former, commit_later, check_one_of_both) >= 8


@pytest.mark.parametrize("failing", range(2, 8))  # the first makes a folder that is there
def test_a_commit_that_finds_no_room_leaves_the_old(tmp_path, monkeypatch, failing):
    commit_former(tmp_path)
    disk = FullDisk(failing)
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "mkdir"):
            patch.setattr(os, name, disk.wrap(getattr(os, name)))
        text = message_of(lambda: commit_later(tmp_path))
    assert disk.calls >= failing
    assert "No space left on device" in text
    assert str(tmp_path / "x") in text
    assert content_of(tmp_path / "x") == FORMER
    assert leftovers(tmp_path) == []


def commit_with_little_room(folder: Path, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        files.commit_folder(folder / "x", {"small": b"1" * 23, "large": b"2" * 4100})
    except UserError as error:
        answer.send(str(error))


def test_a_commit_that_fails_is_named_with_its_size(tmp_path):
    commit_former(tmp_path)
    reader, writer = PROCESSES.Pipe(duplex=False)
    assert run_in_child(commit_with_little_room, tmp_path, writer) == 0
    text = reader.recv()
    assert str(tmp_path / "x") in text
    assert "4123 bytes" in text
    assert content_of(tmp_path / "x") == FORMER
    assert leftovers(tmp_path) == []


def test_a_folder_between_two_names_is_found_and_put_back(tmp_path):
    between_two_renames(tmp_path)
    assert content_of(files.committed(tmp_path / "x")) == FORMER
    assert files.committed_names(tmp_path) == {"x"}
    files.settle(tmp_path)
    assert content_of(tmp_path / "x") == FORMER
    assert leftovers(tmp_path) == []


def test_settling_leaves_strangers_alone(tmp_path):
    names = [".ssl_seg", "new-x", ".hidden", "x.ssl_seg-new-"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    files.settle(tmp_path)
    assert content_of(tmp_path) == dict.fromkeys(names, b"mine")
    files.settle(tmp_path / "absent")
    assert files.committed_names(tmp_path / "absent") == set()


def discard_x(folder: Path) -> None:
    files.discard(folder / "x")


def check_whole_or_gone(folder: Path) -> None:
    names = files.committed_names(folder)
    assert names <= {"x"}
    assert all(content_of(folder / name) == FORMER for name in names)
    files.settle(folder)
    assert leftovers(folder) == []
    assert files.committed_names(folder) == names


def test_a_kill_at_each_system_call_of_a_deletion_leaves_all_or_nothing(tmp_path):
    assert crash_everywhere(tmp_path, commit_former, discard_x, check_whole_or_gone) >= 4


def test_a_link_is_deleted_and_not_what_it_points_to(tmp_path):
    commit_former(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    files.discard(tmp_path / "link")
    assert content_of(tmp_path / "x") == FORMER
    assert not (tmp_path / "link").is_symlink()


def test_the_files_can_be_read_by_others(tmp_path):
    former = os.umask(0o022)
    try:
        commit_former(tmp_path)
        files.write_atomic(tmp_path / "x/d.txt", b"d")
    finally:
        os.umask(former)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "x").iterdir()} == {"0o644"}


# ---- files ----


def write_former(folder: Path) -> None:
    folder.mkdir()
    files.write_atomic(folder / "x", b"former")


def write_later(folder: Path) -> None:
    files.write_atomic(folder / "x", b"later")


def check_file(folder: Path) -> None:
    assert (folder / "x").read_bytes() in (b"former", b"later")
    write_later(folder)
    assert content_of(folder) == {"x": b"later"}


def test_a_kill_at_each_system_call_of_a_write_leaves_the_old_or_the_new(tmp_path):
    assert crash_everywhere(tmp_path, write_former, write_later, check_file) >= 3


@pytest.mark.parametrize("failing", [1, 2])
def test_a_file_that_finds_no_room_is_named_and_stays_as_it_was(tmp_path, monkeypatch, failing):
    (tmp_path / "x").write_bytes(b"former")
    disk = FullDisk(failing)
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, disk.wrap(getattr(os, name)))
    text = message_of(lambda: files.write_atomic(tmp_path / "x", b"later"))
    assert f"{tmp_path / 'x'}: cannot be written (No space left on device)" in text
    assert (tmp_path / "x").read_bytes() == b"former"


def test_naming_is_for_errors_of_the_system_alone(tmp_path):
    def fail(error: Exception) -> None:
        with files.naming(tmp_path, "cannot be used"):
            raise error

    assert f"{tmp_path}: cannot be used (x)" in message_of(lambda: fail(OSError(errno.EIO, "x")))
    with pytest.raises(ValueError, match="y"):
        fail(ValueError("y"))


# ---- what is in them ----


@given(st.binary(min_size=1, max_size=40), st.data())
def test_a_changed_bit_changes_the_digest(tmp_path_factory, payload, data):
    path = tmp_path_factory.getbasetemp() / "digest"
    digest = files.sha256(payload)
    assert digest == hashlib.new("sha256", payload).hexdigest()
    path.write_bytes(payload)
    assert files.is_intact(path, digest)
    bit = data.draw(st.integers(0, 8 * len(payload) - 1))
    changed = bytearray(payload)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    assert not files.is_intact(path, digest)
    path.write_bytes(payload[:-1])
    assert not files.is_intact(path, digest)


def test_what_cannot_be_read_is_not_intact(tmp_path):
    assert not files.is_intact(tmp_path / "absent", files.sha256(b""))
    assert not files.is_intact(tmp_path, files.sha256(b""))


def turned() -> dict[str, torch.Tensor]:
    shared = torch.arange(6.0).view(2, 3)
    return {"whole": shared, "row": shared[1], "turned": shared.t(), "wide": torch.ones(1).expand(4)}


def test_tensors_that_share_memory_or_are_strided_can_be_written():
    tensors = turned()
    loaded = safetensors.torch.load(files.tensor_bytes(tensors))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_null_stands_for_what_json_has_no_number_for():
    values = {"a": math.nan, "b": [1.5, math.inf], "c": {"d": (-math.inf, 2)}, "e": "nan", "f": True, "g": None}
    clean = files.finite(values)
    assert clean == {"a": None, "b": [1.5, None], "c": {"d": [None, 2]}, "e": "nan", "f": True, "g": None}
    assert json.dumps(clean, allow_nan=False)


def test_json_comes_back_with_what_python_alone_can_read(tmp_path):
    values = {"a": -math.inf, "names": ["é", "\u2028"], "deep": {"x": [1, 2.5, None]}}
    (tmp_path / "x.json").write_bytes(files.json_bytes(values))
    assert files.read_json(tmp_path / "x.json") == values


def absent(path: Path) -> None:
    path.unlink()


def no_object(path: Path) -> None:
    path.write_text("[1]")


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("damage", [absent, no_object, torn, no_text])
def test_json_that_cannot_be_used_is_one_line(tmp_path, damage: Callable[[Path], None]):
    path = tmp_path / "x.json"
    path.write_bytes(files.json_bytes({"a": 1}))
    damage(path)
    assert str(path) in message_of(lambda: files.read_json(path))
