"""Keyed random numbers: every draw is a pure function of an int64 key, so nothing here has a state.

Ours, because exact resume and "the same global batch on 1 or 8 processes" need random numbers that belong to a
*sample*, not to a process or to the order of calls; `torch.Generator` is a sequence and gives neither. The idea (a
counter-based generator) is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the mixer is the
finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

Integers and uniforms are equal bit for bit on every device; normals to about 1e-6, because `log` and `cos` differ.

>>> keys = fold_in(as_key(7), torch.arange(2))
>>> uniform(keys, (3,)).shape
torch.Size([2, 3])
>>> bool((uniform(keys, (3,))[1] == uniform(keys[1:], (3,))[0]).all())
True
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the odd step of SplitMix64
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
DRAWING = 0x6472617773  # sets the numbers drawn from a key apart from the keys folded out of it
UNIT = 2.0**-24  # a float32 holds 24 bits exactly
WORDS = 2**64  # how many there are of 64 bits
IN_CACHE = 2**15  # words that are mixed at a time: 256 KB, and as much for what is shifted


def as_key(seed: int | str) -> Tensor:
    """A scalar int64 key from a number of any size or from a name."""
    if isinstance(seed, str):
        digest = hashlib.sha256(seed.encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
    wrapped = (seed + 2**63) % 2**64 - 2**63
    return torch.tensor(wrapped, dtype=torch.int64)


def fold_in(key: Tensor, data: Tensor | int | str) -> Tensor:
    """Another key from `key` and `data`; the shapes broadcast: `fold_in(seed, draws)` gives one key a draw."""
    if not isinstance(data, Tensor):
        data = as_key(data)
    if data.dim():
        data = data.to(key.device)
    # A scalar stays on the CPU, where torch lets it meet a GPU's tensor: copied there, it would stop the host.
    return _mix(_mix(key) + data * GOLDEN)


def bits(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """64 random bits as int64, `(B, *shape)` for keys `(B,)`; row i depends on `key[i]` alone."""
    count = math.prod(shape)
    key = _mix(key ^ DRAWING)
    if key.device.type == "cpu":
        mixed = _bits_on_cpu(key.flatten(), count)
    else:
        mixed = _mix(key.unsqueeze(-1) + torch.arange(1, count + 1, device=key.device) * GOLDEN)  # (B, count)
    return mixed.reshape((*key.shape, *shape))


def uniform(key: Tensor, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
    """float32 in [low, high), `(B, *shape)`, in steps of 2^-24 of the range."""
    unit = _shift(bits(key, shape), 40).to(torch.float32)
    return unit.mul_(UNIT).mul_(high - low).add_(low)


def normal(key: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normals, float32 `(B, *shape)`, by Box and Muller (1958): two from each 64 bits."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    word = bits(key, (pairs,))
    # 1 is added so that log never sees 0: the radius stops at sqrt(48 ln 2) = 5.8 standard deviations.
    radius = _shift(word, 40).to(torch.float32).add_(1.0).mul_(UNIT).log_().mul_(-2.0).sqrt_()
    angle = (word >> 16).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0 * math.pi * UNIT)
    both = torch.cat([torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)], dim=-1)
    return both[..., :count].reshape((*key.shape, *shape))


def randint(key: Tensor, shape: tuple[int, ...], low: int | Tensor, high: int | Tensor) -> Tensor:
    """int64 in [low, high), `(B, *shape)`; `low` and `high` may be tensors that broadcast against it.

    The range must be under 2^31; its bias is then at most range / 2^32.
    """
    word = _shift(bits(key, shape), 32)
    return low + _shift(word * (high - low), 32)


def permutation(key: Tensor, size: int) -> Tensor:
    """A random order of `range(size)`: `(size,)` for a scalar key, `(B, size)` for keys `(B,)`."""
    return torch.argsort(bits(key, (size,)), dim=-1, stable=True)


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `size` images; cached, since every batch of the epoch asks again."""
    order = permutation(fold_in(fold_in(as_key(seed), "epoch"), epoch), size).numpy()
    order.setflags(write=False)
    return order


def _mix(word: Tensor) -> Tensor:
    """SplitMix64's finaliser: every input bit changes every output bit with probability one half."""
    if word.device.type == "cpu":
        mixed = _unsigned(word).flatten()  # a copy, and an array: of a scalar numpy would tell that it wraps around
        _mix_in_place(mixed)
        return _signed(mixed).view(word.shape)
    word = word + GOLDEN  # a new tensor, which is changed in place
    word ^= _shift(word, 30)
    word *= MIX_1
    word ^= _shift(word, 27)
    word *= MIX_2
    word ^= _shift(word, 31)
    return word


def _shift(word: Tensor, count: int) -> Tensor:
    """Logical right shift: torch's `>>` on int64 copies the sign bit, so the copies are masked away."""
    if word.device.type == "cpu":
        return _signed(np.right_shift(_unsigned(word).reshape(-1), count)).view(word.shape)
    return (word >> count).bitwise_and_((1 << (64 - count)) - 1)


# ---- the same on a CPU, where numpy has the unsigned words that torch lacks: a third of the time ----


def _bits_on_cpu(key: Tensor, count: int) -> Tensor:
    """`(B, count)` for mixed keys `(B,)`, as many rows at a time as stay in a core's cache."""
    keys = _unsigned(key)[:, None]
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN % WORDS)
    words = np.empty((len(keys), count), dtype=np.uint64)
    rows = max(1, IN_CACHE // max(1, count))
    for first in range(0, len(keys), rows):
        part = words[first : first + rows]
        np.add(keys[first : first + rows], counter, out=part)
        _mix_in_place(part)
    return _signed(words)


def _mix_in_place(words: np.ndarray) -> None:
    shifted = np.empty_like(words)
    words += np.uint64(GOLDEN % WORDS)
    words ^= np.right_shift(words, 30, out=shifted)
    words *= np.uint64(MIX_1 % WORDS)
    words ^= np.right_shift(words, 27, out=shifted)
    words *= np.uint64(MIX_2 % WORDS)
    words ^= np.right_shift(words, 31, out=shifted)


def _unsigned(word: Tensor) -> np.ndarray:
    return word.numpy().view(np.uint64)


def _signed(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.view(np.int64))


@contextmanager
def seeded(key: Tensor, device: torch.device | None = None) -> Iterator[None]:
    """What torch draws inside (first weights) depends on the key alone; its generator goes on as before after.

    On the CPU, and on `device` too where it is a GPU.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(int(key) & (2**63 - 1))
        yield
