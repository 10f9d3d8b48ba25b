from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_seg.config import UserError
from ssl_seg.tensor_files import KEYS, SUFFIXES, names_tensor_file, read_tensors
from tests.faults import message_of

TENSORS = {"a.weight": torch.arange(3.0), "a.steps": torch.tensor(3)}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def header(path: Path, text: bytes, size: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + b"\0" * 8)
    return path


def one_tensor(path: Path, **about: Any) -> Path:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **about}
    return header(path, json.dumps({"a": entry}).encode())


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, payload in files.items():
            archive.writestr(name, payload)
    return path


def tarred(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, arcname="x")
    return path


def written(path: Path, payload: bytes) -> Path:
    path.write_bytes(payload)
    return path


def piped(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def quantized() -> torch.Tensor:
    return torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.quint8)


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "absent": lambda at: at / "x.pth",
    "empty": lambda at: written(at / "x.pth", b""),
    "empty safetensors": lambda at: written(at / "x.safetensors", b""),
    "a folder": lambda at: folder(at / "x.pth"),
    "a pipe": lambda at: piped(at / "x.pth"),
    "text": lambda at: written(at / "x.pth", b"hello world"),
    "zeros": lambda at: written(at / "x.bin", b"\0" * 1000),
    "noise": lambda at: written(at / "x.ckpt", np.random.default_rng(0).bytes(5000)),
    "one byte": lambda at: written(at / "x.pth", b"\x80"),
    "cut": lambda at: written(at / "x.pth", saved(at / "whole.pth", TENSORS).read_bytes()[:-300]),
    "a pickle": lambda at: written(at / "x.pth", pickle.dumps({"a": 1})),
    "an old pickle": lambda at: written(at / "x.pth", pickle.dumps([1, 2], protocol=0)),
    "a zip": lambda at: zipped(at / "x.pth", {"a.txt": b"x"}),
    "a zip like torch's": lambda at: zipped(at / "x.pth", {"archive/data.pkl": b"x"}),
    "a zip of no tensors": lambda at: zipped(
        at / "x.pth", {"archive/data.pkl": pickle.dumps({"a": 1}, protocol=2), "archive/version": b"3"}
    ),
    "a tar": lambda at: tarred(at / "x.pth.tar"),
    "a list": lambda at: saved(at / "x.pth", [torch.ones(1)]),
    "a tensor": lambda at: saved(at / "x.pth", torch.ones(1)),
    "nothing": lambda at: saved(at / "x.pth", None),
    "a module": lambda at: saved(at / "x.pth", nn.Linear(1, 1)),
    "numbers for names": lambda at: saved(at / "x.pth", {0: torch.ones(2)}),
    "mappings of tensors": lambda at: saved(at / "x.pth", {"a": {"b": torch.ones(1)}}),
    "no state_dict": lambda at: saved(at / "x.pth", {"state_dict": None}),
    "without values": lambda at: saved(at / "x.pth", {"a": torch.empty(2, device="meta")}),
    "sparse": lambda at: saved(at / "x.pth", {"a": torch.eye(2).to_sparse()}),
    "quantized": lambda at: saved(at / "x.pth", {"a": quantized()}),
    "complex": lambda at: saved(at / "x.pth", {"a": torch.ones(2, dtype=torch.complex64)}),
    "a header too long": lambda at: header(at / "x.safetensors", b"{}", size=2**62),
    "a header that is no text": lambda at: header(at / "x.safetensors", b"\xff\xfe"),
    "a header that is no JSON": lambda at: header(at / "x.safetensors", b"{a}"),
    "a header that is no mapping": lambda at: header(at / "x.safetensors", b"[]"),
    "a tensor too large": lambda at: one_tensor(at / "x.safetensors", shape=[10**18, 10**18]),
    "a tensor past the end": lambda at: one_tensor(at / "x.safetensors", data_offsets=[0, 800]),
    "another dtype": lambda at: one_tensor(at / "x.safetensors", dtype="F31"),
    "two numbers a byte": lambda at: one_tensor(at / "x.safetensors", dtype="F4", shape=[16]),
}


@pytest.mark.filterwarnings("ignore::UserWarning:tests")  # of quantized tensors, which are about to go
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_one_line_that_names_it(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    message = message_of(lambda: read_tensors(path))
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@settings(max_examples=60)
@given(data=st.data(), old=st.booleans())
def test_a_damaged_checkpoint_is_read_or_one_line(
    data: st.DataObject, old: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    payload = bytearray(saved(path, TENSORS, _use_new_zipfile_serialization=not old).read_bytes())
    place = data.draw(st.integers(0, len(payload) - 1))
    if data.draw(st.booleans()):
        del payload[place:]
    else:
        payload[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(payload)
    with suppress(UserError):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".safetensors"])
@pytest.mark.parametrize("upper", [False, True])
def test_a_suffix_may_be_in_capitals(tmp_path: Path, suffix: str, upper: bool) -> None:
    path = saved(tmp_path / f"x{suffix.upper() if upper else suffix}", TENSORS)
    tensors, key = read_tensors(path)
    assert tensors.keys() == TENSORS.keys()
    assert key == ""
    assert names_tensor_file(path.name)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        *(({key: TENSORS, "epoch": 3}, key) for key in KEYS),
        ({"student": {"b": torch.ones(1)}, "teacher": TENSORS, "args": argparse.Namespace(lr=1)}, "teacher"),
        ({"state_dict": {"b": torch.ones(1)}, "state_dict_ema": TENSORS}, "state_dict_ema"),
        ({"state_dict": {"model": TENSORS, "step": 3}}, "state_dict.model"),
        ({"state_dict": TENSORS, "state_dict_ema": None}, "state_dict"),
    ],
)
def test_the_network_of_a_checkpoint_is_found_and_its_key_told(tmp_path: Path, content: Any, key: str) -> None:
    tensors, found = read_tensors(saved(tmp_path / "x.pth", content))
    assert found == key
    assert tensors.keys() == TENSORS.keys()


def test_a_word_is_no_file() -> None:
    assert not any(map(names_tensor_file, ("a1_in1k", "fb_in22k_ft_in1k_384", "foo")))
    assert all(map(names_tensor_file, ("moco.pth.tar", "moco.PTH", "~/moco", "w/moco", "x.ckpt")))
