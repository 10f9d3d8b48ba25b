"""Which images show the same picture: unchanged, mirrored, cropped, resized or saved anew.

Two things are kept of each image: a digest of its pixels and a small grey fingerprint. Equal digests are the same
picture. Fingerprints are compared in two steps. A wide search by low frequencies (matrix products) finds the best few;
these are aligned and judged by their fine structure, which two different scenes never share.

Ours is the search and the judgement; OpenCV aligns (Evangelidis and Psarakis, "Parametric image alignment using
enhanced correlation coefficient maximization", TPAMI 30, 2008). Perceptual hashes (imagehash, pHash) give one number
for a whole picture and lose it in a crop; a nearest-neighbour index (faiss) is not needed where one side is small.
What was measured stands in experiments/leaks. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import cv2
import numpy as np

from ssl_seg.config import UserError
from ssl_seg.images import resize_image

if TYPE_CHECKING:
    from ssl_seg.data.workers import Workers
    from ssl_seg.datasets import Example

# Pixels of a fingerprint, 4 kB an image. In a trial, before strong edges were evened out, the best clean pair shared
# 0.54 of its fine structure at 64, 0.62 at 48 and 0.86 at 32; the worst of 500 altered copies 0.78, 0.86 and 0.93.
SIDE = 64
COARSE = 32  # pixels of the picture whose low frequencies are searched
FREQUENCIES = 8  # cosines a side; fewer left more pairs to align, more lost crops between two windows
# Sides and steps of the windows that are tried, in shares of a picture's side: crops down to LEAST_AREA. Of 200 crops
# to 60 to 80 % of the area all came among the best three of 251 pictures; with steps of 0.13 three did not. The last is
# for strips: without it the lower 60 % of 183 street frames was found 45 times, with it always.
SIDES = (1.0, 0.88, 0.775, 0.68, 0.6)
STEP = 0.1
LEAST_AREA = 0.55
BEST = 3  # pictures aligned with each
NEAR = 0.75  # correlation of low frequencies from which a pair is aligned: crops had 0.78 and more, 99 % of them 0.80
ALIGNMENT_STEPS = 25
BLUR = 3  # pixels, odd: what the alignment sees
FINE = (0.7, 2.5)  # the Gaussians between which fine structure lies, in pixels of a fingerprint
# It is divided by its own strength nearby (pixels, and grey levels below which it is noise), so that a few strong edges
# do not decide.
NEARBY, NOISE = 4.0, 2.0
SCALES = (0.55, 1.15)  # a true crop's, beyond which an alignment has wandered off
MOST_SHEAR = 0.1
LEAST_COVER = 0.85  # of the smaller picture that lies inside the other
# Pixels that carry the fine structure (sum of squares squared over sum of fourth powers). Boxes on flat ground fit each
# other by scaling and have at most 222; drawn shapes and streets have 680 and more, 300 photographs 520.
LEAST_STRUCTURE = 280.0
LEAST_STRENGTH = (
    0.05  # mean square of evened fine structure: half a grey level, the steps of a slow ramp; photographs 0.3
)
LEAST_UNLINED = 0.3  # of its fine structure is left without what whole rows or columns share: stripes fit other stripes
LEAST_SPREAD = 2.0  # grey levels; what varies by less shows nothing but its noise
MOST_DIFFERENCE = 0.15  # of a plain picture's own spread: pictures without structure match as they are or not at all
# Of what it differs by from the mean of the others: slides under one lamp all differ by little. Coded anew one came to
# 0.19, two of them to 1.2 and more.
MOST_OF_OTHERS = 0.4
BLOCK = 1000  # pictures of either side at a time: 46 MB of windows
# A margin, a round mask or a logo is fine structure that every picture of a set has at one place: there its mean over
# the set is this large a share of its strength (root mean square); of unrelated pictures chance gives 1 / sqrt(count).
SHARED = 0.5
CHANCE = 3.0  # times that, so that a handful of pictures share nothing
SAMPLED = 1000  # pictures of a side from which it is measured


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of N images."""

    names: tuple[str, ...]
    digests: tuple[str, ...]  # sha256 of size and RGB pixels: equal files have equal ones, and so has a PNG saved anew
    thumbs: np.ndarray | None  # (N, SIDE, SIDE) uint8; None where the run had too many to store
    doubts: tuple[str, ...] = ()  # what `Dataset.doubt` says of each; () where another run has read them

    def __len__(self) -> int:
        return len(self.names)

    @property
    def pictures(self) -> np.ndarray:
        """`thumbs` of images that were read just now: only those that another run has stored may be without."""
        assert self.thumbs is not None
        return self.thumbs

    def some(self, indices: Sequence[int]) -> Fingerprints:
        """Those of these images that were read just now."""
        names, digests = (tuple(own[index] for index in indices) for own in (self.names, self.digests))
        return Fingerprints(names, digests, self.pictures[list(indices)])


# ---- what is kept of an image ----


class Images(Protocol):
    """What is looked at of a data set."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Example: ...
    def doubt(self, index: int) -> str: ...
    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class _Seen:
    """A map from indices to digest, fingerprint and doubt, as a loader's workers run it."""

    examples: Images

    @property
    def nbytes(self) -> int:
        return 0  # what is handed over is small, and goes by pipe

    def name(self, index: int) -> str:
        return self.examples.name(index)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray, str]:
        from ssl_seg.data.splits import digest_of

        example = self.examples.image(index)
        return digest_of(example), thumb(example.image), self.examples.doubt(index)


def fingerprint(examples: Images, workers: Workers | None = None) -> Generator[None, None, Fingerprints]:
    """Read every image once, by this process or by workers, pausing after each; returns `Fingerprints`.

    Raises UserError for an image that cannot be read, and WorkersError as `collected` does.
    """
    from ssl_seg.data.workers import ALONE, collected

    count = len(examples)
    thumbs = np.empty((count, SIDE, SIDE), dtype=np.uint8)
    digests, doubts = [], []
    one_by_one = [[index] for index in range(count)]
    for index, read in enumerate(collected(_Seen(examples), one_by_one, workers or ALONE, itemgetter(0))):
        if isinstance(read, UserError):
            raise read
        digests.append(read[0])
        thumbs[index] = read[1]
        doubts.append(read[2])
        yield
    names = tuple(examples.name(index) for index in range(count))
    return Fingerprints(names, tuple(digests), thumbs, tuple(doubts))


def thumb(image: np.ndarray) -> np.ndarray:
    """`(H, W, C)` uint8 as a grey square `(SIDE, SIDE)` uint8; each pixel the mean of what it covers.

    Of RGB the lightness, else the mean of the channels.
    """
    small = resize_image(image, (SIDE, SIDE))
    if small.shape[-1] == 3:
        return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    return np.rint(small.mean(axis=-1)).astype(np.uint8)


def coarse(thumbs: np.ndarray) -> np.ndarray:
    """(N, SIDE, SIDE) -> (N, COARSE, COARSE) float32 by means."""
    step = SIDE // COARSE
    return thumbs.reshape(len(thumbs), COARSE, step, COARSE, step).mean(axis=(2, 4), dtype=np.float32)


def between(picture: np.ndarray, sigmas: tuple[float, float]) -> np.ndarray:
    """What lies between two Gaussian blurs."""
    return cv2.GaussianBlur(picture, (0, 0), sigmas[0]) - cv2.GaussianBlur(picture, (0, 0), sigmas[1])


# ---- equal pixels ----


def equal(trained: Fingerprints, scored: Fingerprints) -> Iterator[tuple[int, int]]:
    """Pairs of equal pixels. Pictures of one grey are left out: they show nothing, and tiles without data are many."""
    first: dict[str, int] = {}
    for index, value in enumerate(scored.digests):
        if np.ptp(scored.pictures[index]) > 0:
            first.setdefault(value, index)
    for index, value in enumerate(trained.digests):
        if value in first:
            yield index, first[value]


# ---- altered copies ----


class Window(NamedTuple):
    """A part of a picture, in shares of its sides."""

    top: float
    left: float
    height: float
    width: float


class Match(NamedTuple):
    """An altered copy: which pictures, how much of their fine structure they share, and how one became the other."""

    index: int
    other: int
    alike: float
    detail: str


class _Hypothesis(NamedTuple):
    cropped: Literal["trained", "scored"]  # which of the two is a part of the other
    turn: int  # of the scored picture
    window: Window


def altered(
    trained: np.ndarray, indices: Sequence[int], scored: np.ndarray, alike: float, turns: bool
) -> Iterator[Match | None]:
    """The best match above the bar for each of `indices` that has one; None where it pauses. `index` counts those."""
    if not len(indices):
        return
    tried = _hypotheses(turns)
    nearest = yield from _nearest(trained, indices, scored, turns)
    common = shared_structure(trained, scored)
    usual = scored.sum(axis=0, dtype=np.float32)
    for row, candidates in enumerate(nearest):
        matches = []
        for candidate in candidates:
            theirs = scored[candidate.other]
            others = (usual - theirs) / max(1, len(scored) - 1)
            match = _align(trained[indices[row]], theirs, tried[candidate.hypothesis], _Set(common, others))
            if match is not None and match[0] >= alike:
                matches.append(Match(row, candidate.other, *match))
            yield None
        if matches:
            yield max(matches, key=lambda match: match.alike)


class _Candidate(NamedTuple):
    """A scored picture that looks the same from afar."""

    likeness: float  # correlation of low frequencies
    other: int
    hypothesis: int


def _nearest(
    trained: np.ndarray, indices: Sequence[int], scored: np.ndarray, turns: bool
) -> Generator[None, None, list[list[_Candidate]]]:
    """The `BEST` scored pictures for each of `indices`, block by block, pausing after each."""
    nearest: list[list[_Candidate]] = [[] for _ in indices]
    for start in range(0, len(scored), BLOCK):
        others = scored[start : start + BLOCK]
        described = _describe_scored(others, turns)
        for first in range(0, len(indices), BLOCK):
            block = trained[list(indices[first : first + BLOCK])]
            for row, found in _near(block, described, len(others)):
                one = found._replace(other=start + found.other)
                nearest[first + row] = sorted([*nearest[first + row], one], reverse=True)[:BEST]
            yield
    return nearest


class _Set(NamedTuple):
    """What pictures of one set share, each (SIDE, SIDE)."""

    common: np.ndarray  # bool: where their fine structure is the same
    others: np.ndarray  # float32: the mean of the other scored pictures


def shared_structure(*sides: np.ndarray) -> np.ndarray:
    """Where (SIDE, SIDE) most pictures (N, SIDE, SIDE) of the last side or of all have the same fine structure."""
    some = [side[:: -(-len(side) // SAMPLED)] for side in sides if len(side)]
    return _shared(some[-1]) | _shared(np.concatenate(some))


def _shared(thumbs: np.ndarray) -> np.ndarray:
    fine = np.stack([_fine(picture) for picture in thumbs.astype(np.float32)])
    strength = np.sqrt((fine**2).mean(axis=0))
    bar = max(SHARED, CHANCE / math.sqrt(len(thumbs)))
    same = np.abs(fine.mean(axis=0)) > bar * np.maximum(strength, 1e-6)
    return cv2.dilate(same.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0


@cache
def windows() -> tuple[Window, ...]:
    """The whole and every part that is tried, of at least `LEAST_AREA`."""
    spans = []
    for side in SIDES:
        count = math.ceil((1 - side) / STEP - 1e-9) + 1
        spans += [(place, side) for place in np.linspace(0, 1 - side, count).tolist()]
    pairs = [(down, across) for down in spans for across in spans if down[1] * across[1] >= LEAST_AREA]
    return tuple(Window(down[0], across[0], down[1], across[1]) for down, across in pairs)


def _turns(all_of_them: bool) -> range:
    """Turns by number: mirrored where odd, after `number // 2` quarter turns."""
    return range(8) if all_of_them else range(2)


def _turn(thumbs: np.ndarray, number: int) -> np.ndarray:
    """(..., SIDE, SIDE) turned."""
    turned = np.rot90(thumbs, number // 2, axes=(-2, -1))
    return np.flip(turned, axis=-1) if number % 2 else turned


def _hypotheses(turns: bool) -> list[_Hypothesis]:
    """In the order in which `_near` tries them."""
    numbers = _turns(turns)
    trained = [_Hypothesis("trained", turn, window) for turn in numbers for window in windows()]
    scored = [_Hypothesis("scored", turn, window) for window in windows() for turn in numbers]
    return trained + scored


class _Described(NamedTuple):
    parts: list[np.ndarray]  # (V, D) for every turn and window, D frequencies
    wholes: list[np.ndarray]  # (V, D) for every turn


def _describe_scored(thumbs: np.ndarray, turns: bool) -> _Described:
    turned = [coarse(_turn(thumbs, number)) for number in _turns(turns)]
    parts = [described for pictures in turned for described in _spectra(pictures, windows())]
    wholes = [next(_spectra(pictures, (Window(0, 0, 1, 1),))) for pictures in turned]
    return _Described(parts, wholes)


def _near(trained: np.ndarray, scored: _Described, count: int) -> Iterator[tuple[int, _Candidate]]:
    """For each row the `BEST` scored pictures by low frequencies, with the number of the best hypothesis."""
    pictures = coarse(trained)
    score = np.full((len(trained), count), NEAR, dtype=np.float32)
    how = np.full(score.shape, -1, dtype=np.int16)
    whole = next(_spectra(pictures, (Window(0, 0, 1, 1),)))
    number = 0
    for described in scored.parts:
        _keep_better(score, how, whole @ described.T, number)
        number += 1
    for part in _spectra(pictures, windows()):
        for described in scored.wholes:
            _keep_better(score, how, part @ described.T, number)
            number += 1
    kept = min(BEST, count)
    best = np.argpartition(-score, kept - 1, axis=1)[:, :kept]
    for row, columns in enumerate(best):
        for column in columns:
            if how[row, column] >= 0:
                yield row, _Candidate(float(score[row, column]), int(column), int(how[row, column]))


def _keep_better(score: np.ndarray, how: np.ndarray, tried: np.ndarray, number: int) -> None:
    better = tried > score
    np.copyto(score, tried, where=better)
    how[better] = number


def _spectra(pictures: np.ndarray, parts: Sequence[Window]) -> Iterator[np.ndarray]:
    """Unit vectors (N, D) of the low frequencies in each window of N pictures (N, COARSE, COARSE), without their mean.

    Weighted by frequency, which evens out photographs' spectra (amplitude about 1 / frequency): without, 99 % of clean
    images stayed below 0.91 and not 0.85.
    """
    count = len(pictures)
    frequency = np.hypot(*np.mgrid[:FREQUENCIES, :FREQUENCIES])
    kept = (frequency > 0) & (frequency < FREQUENCIES)
    weight = frequency[kept].astype(np.float32)
    rows = {}
    for part in parts:
        span = (part.left, part.width)
        if span not in rows:
            across = pictures.reshape(-1, COARSE) @ _cosines(*span).T  # (N * COARSE, F)
            rows[span] = across.reshape(count, COARSE, FREQUENCIES).transpose(0, 2, 1).reshape(-1, COARSE)
        down = (rows[span] @ _cosines(part.top, part.height).T).reshape(count, FREQUENCIES, FREQUENCIES)
        spectrum = down.transpose(0, 2, 1)[:, kept] * weight
        yield spectrum / np.maximum(1e-6, np.linalg.norm(spectrum, axis=1, keepdims=True))


@cache
def _cosines(start: float, length: float) -> np.ndarray:
    """The first cosines (FREQUENCIES, COARSE) of a span, pixels on its border by their share."""
    left, right = np.arange(COARSE) / COARSE, np.arange(1, COARSE + 1) / COARSE
    inside = np.clip(np.minimum(right, start + length) - np.maximum(left, start), 0, None)
    place = ((left + right) / 2 - start) / length
    waves = np.cos(np.pi * np.outer(np.arange(FREQUENCIES), place)) * inside / inside.sum()
    return waves.astype(np.float32)


def _align(trained: np.ndarray, scored: np.ndarray, hypothesis: _Hypothesis, of_set: _Set) -> tuple[float, str] | None:
    """How much fine structure two fingerprints share once they are laid on each other, and how; None for no fit."""
    ours = _Picture(trained.astype(np.float32), ~of_set.common)
    turned = [np.ascontiguousarray(_turn(part, hypothesis.turn)) for part in (scored, ~of_set.common)]
    theirs = _Picture(turned[0].astype(np.float32), turned[1])
    words = ["mirrored"] if hypothesis.turn % 2 else []
    words += [f"turned by {hypothesis.turn // 2 * 90} degrees"] if hypothesis.turn > 1 else []
    if min(_structure(ours), _structure(theirs)) < LEAST_STRUCTURE:
        others = _turn(of_set.others, hypothesis.turn)
        difference = _difference(ours.grey, theirs.grey)
        own = _difference(ours.grey, theirs.grey, others)
        is_same = difference <= MOST_DIFFERENCE and own <= MOST_OF_OTHERS
        return (1 - difference, ", ".join([*words, "plain"])) if is_same else None
    small, large = (ours, theirs) if hypothesis.cropped == "trained" else (theirs, ours)
    aligned = _aligned(small, large, hypothesis.window)
    if aligned is None:
        return None
    alike, area = aligned
    words += [f"{area:.0%} of the area"] if area < 0.98 else []
    return alike, ", ".join(words) or "the same view"


class _Picture(NamedTuple):
    """A fingerprint as it is compared, each (SIDE, SIDE)."""

    grey: np.ndarray  # float32
    own: np.ndarray  # bool: where its fine structure is not that of the whole set


def _difference(ours: np.ndarray, theirs: np.ndarray, base: np.ndarray | float = 0.0) -> float:
    """Of two pictures, in shares of what they vary by once `base` is taken off; 1 for those that hardly vary."""
    spread = min(float(np.std(picture - base)) for picture in (ours, theirs))
    return float(np.sqrt(((ours - theirs) ** 2).mean())) / spread if spread >= LEAST_SPREAD else 1.0


def _aligned(small: _Picture, large: _Picture, window: Window) -> tuple[float, float] | None:
    """The fine structure in common of `small` and the part of `large` that it fits best, and that part's area."""
    across, down = window.width, window.height
    warp = np.array(  # from centres of pixels of `small` to those of `large`
        [
            [across, 0, window.left * SIDE + (across - 1) / 2],
            [0, down, window.top * SIDE + (down - 1) / 2],
        ],
        dtype=np.float32,
    )
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, ALIGNMENT_STEPS, 1e-3)
    no_mask: Any = None  # OpenCV takes it, its annotation does not
    try:
        _, warp = cv2.findTransformECC(small.grey, large.grey, warp, cv2.MOTION_AFFINE, stop, no_mask, BLUR)
    except cv2.error:  # it did not converge
        return None
    scales, shear = warp[[0, 1], [0, 1]], np.abs(warp[[0, 1], [1, 0]]).max()
    if scales.min() < SCALES[0] or scales.max() > SCALES[1] or shear > MOST_SHEAR:
        return None
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fitted = cv2.warpAffine(large.grey, warp, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.ones_like(large.grey), warp, (SIDE, SIDE), flags=flags) > 0.99
    if inside.mean() < LEAST_COVER:
        return None
    both = inside & small.own & (cv2.warpAffine(large.own.astype(np.float32), warp, (SIDE, SIDE), flags=flags) > 0.99)
    a, b = _fine(small.grey)[both], _fine(fitted)[both]
    if min(_carrying(a), _carrying(b)) < LEAST_COVER * LEAST_STRUCTURE:
        return None
    return float(np.corrcoef(a, b)[0, 1]), float(scales.prod())


def _fine(picture: np.ndarray) -> np.ndarray:
    """Fine structure, as strong everywhere as anywhere."""
    passed = between(picture, FINE)
    return passed / np.sqrt(cv2.GaussianBlur(passed**2, (0, 0), NEARBY) + NOISE**2)


def _structure(picture: _Picture) -> float:
    """How many pixels carry the fine structure of a fingerprint; 0 where there is hardly any but rows or columns."""
    fine = np.where(picture.own, _fine(picture.grey), 0.0).astype(np.float64)
    energy = fine**2
    unlined = (fine - fine.mean(axis=0) - fine.mean(axis=1, keepdims=True) + fine.mean()) ** 2
    if energy.mean() < LEAST_STRENGTH or unlined.mean() < LEAST_UNLINED * energy.mean():
        return 0.0
    return _carrying(fine)


def _carrying(fine: np.ndarray) -> float:
    """How many pixels carry it: all where they are as strong, one where one is."""
    energy = fine.astype(np.float64) ** 2
    return float(energy.sum() ** 2 / max(1e-12, (energy**2).sum()))
