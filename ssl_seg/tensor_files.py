"""Files of tensors, of ours and of anybody: read without running what else they hold.

safetensors and torch read them. Ours is one line for whatever a damaged or hostile file makes the two raise, a refusal
of tensors that are not plain numbers in memory, and the way to the tensors of a checkpoint that holds more than them.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ssl_seg.config import UserError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# What torch raises for a file that is none of its own; EOFError for an empty one.
TORCH_ERRORS = (
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
    EOFError,
    OSError,
    AttributeError,
    TypeError,
    AssertionError,
    MemoryError,
    SyntaxError,
    ImportError,
    struct.error,
    tarfile.TarError,
    pickle.PickleError,
)
# Under which of its keys a checkpoint keeps the network, best first: a moving average before what it is the mean of, as
# timm takes them, and of DINO's two networks the teacher, as its authors evaluate it.
KEYS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "student")
# Of the numbers that torch turns into a layer's own.
REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def is_torch_file(path: Path) -> bool:
    return path.suffix.lower() in TORCH_SUFFIXES


def names_tensor_file(text: str) -> bool:
    """Whether a text is the path of such a file, and no mere word."""
    return "/" in text or text.startswith("~") or text.lower().endswith(SUFFIXES)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a .safetensors file or torch checkpoint by name, and the key they lay under ('' at the top).

    Raises UserError with one line for a file that is absent, empty, damaged or of another kind.
    """
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: no such file; name a file of weights")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: not readable, since it is empty (0 bytes); copy or export it again")
    tensors, key = _read_torch(path) if is_torch_file(path) else (_read_safetensors(path), "")
    for name, tensor in tensors.items():
        _check_plain(path, name, tensor)
    return tensors, key


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError, MemoryError) as error:
        raise UserError(
            f"{path}: not readable as safetensors ({error}); it is cut off, damaged or of another kind: export it "
            f"again, or give a .safetensors file or a state_dict saved by torch ({', '.join(TORCH_SUFFIXES)})"
        ) from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        # DINO's, MAE's and many others' hold the options of their command: a bag of values, which runs nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of the pickle protocol, before the error that says it all
            content = torch.load(path, map_location="cpu", weights_only=True)
    except TORCH_ERRORS as error:
        raise UserError(f"{path}: holds more than tensors, or is damaged; save its state_dict alone") from error
    keys = []
    while isinstance(content, Mapping) and not _is_flat(content):
        inner = next((key for key in KEYS if isinstance(content.get(key), Mapping) and content[key]), None)
        if inner is None:
            break
        keys.append(inner)
        content = content[inner]
    if not isinstance(content, Mapping) or not _is_flat(content):
        names = list(content) if isinstance(content, Mapping) else [f"a {type(content).__name__}"]
        held = ", ".join(str(name) for name in names[:8]) or "nothing"
        raise UserError(
            f"{path}: holds no flat mapping of names to tensors (but {held}); save its state_dict alone, or under one "
            f"of: {', '.join(KEYS)}"
        )
    return dict(content), ".".join(keys)


def _is_flat(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Raise UserError for a tensor without values (of the device `meta`), or whose values are none that a layer has."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.dtype not in REAL | WHOLE:
        kind = tensor.dtype if plain else f"{tensor.device.type}, {tensor.layout}"
        raise UserError(f"{path}: {name} is no plain tensor ({kind}); save it as float32 on the CPU")
