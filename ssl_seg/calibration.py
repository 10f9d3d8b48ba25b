"""How sure a segmentation is of its pixels and how often it is right there: calibration, and what leaving out buys.

Needs no torch, so that whoever reads many runs starts at once. What is kept are counts: those of several images add up,
and every figure follows from their sum.

The figures are ours because libraries want all pixels at once: torchmetrics keeps every confidence of a set, 4 GB of a
thousand photographs. Its calibration error is the oracle in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

FILE = "calibration.json"  # in a run folder, and in what `evaluate --out` writes
NEAR_END = 0.01  # of its logarithm: the search itself comes no nearer than a thousandth
TEMPERED = "tempered"  # before the figures of shares that a temperature has changed
BINS = 15  # of equal width, as in Guo et al. 2017
# Of doubt, which is 1 - confidence: by the exponent of its float32 and this many bits behind it. So each halving of the
# doubt, from 1 to 2^-24, the least that a float32 share can have, is cut into 32, and neighbours differ by 3 % at most.
FINE_BITS = 5
HALVINGS = 24
DOUBTS = HALVINGS * 2**FINE_BITS + 1  # the first: no doubt at all
COLUMNS = ("pixels", "right", "confidence", "doubted", "doubted_right")
TEMPERATURES = (0.05, 20.0)  # within which one is sought: what lies beyond makes all shares 0 and 1, or all alike
LEFT_OUT = 0.1  # of the pixels, in the sentence about leaving out
FEWEST = 100  # pixels of a bin that a sentence speaks of


@dataclass(frozen=True, eq=False)
class Confidences:
    """Pixels by confidence, which is the largest of their shares, that of the class they are taken for; right or not.

    A share at an edge belongs to the bin above. Counts are int64; float64 where pixels are weighted.

    >>> found = Confidences.of(np.array([0.9, 0.9, 0.9, 0.9, 0.5]), np.array([True, True, True, False, False]))
    >>> round(found.ece, 2), round(found.overconfidence, 2)  # (4 * |0.9 - 3/4| + 1 * |0.5 - 0|) / 5
    (0.22, 0.22)
    >>> found.error, found.error_of_surest(0.8)
    (0.4, 0.25)
    """

    pixels: np.ndarray  # (BINS,)
    right: np.ndarray  # (BINS,) how many of them are
    confidence: np.ndarray  # (BINS,) float64, summed
    doubted: np.ndarray  # (DOUBTS,) the same pixels, from no doubt to the most
    doubted_right: np.ndarray  # (DOUBTS,)

    @classmethod
    def of(cls, confidence: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> Self:
        """Of N pixels: shares `(N,)` in [0, 1], and whether each is right, bool `(N,)`.

        What is no number, as a network says whose answers overflow, is no confidence: 0.
        """
        shares = np.nan_to_num(np.asarray(confidence, dtype=np.float32), nan=0.0)
        equal = np.minimum((shares * BINS).astype(np.int64), BINS - 1)
        doubt = _doubt_bin(shares)
        of_right = None if weights is None else weights[right]
        return cls(
            pixels=np.bincount(equal, weights, BINS),
            right=np.bincount(equal[right], of_right, BINS),
            confidence=np.bincount(equal, shares if weights is None else shares * weights, BINS).astype(np.float64),
            doubted=np.bincount(doubt, weights, DOUBTS),
            doubted_right=np.bincount(doubt[right], of_right, DOUBTS),
        )

    @classmethod
    def none(cls) -> Self:
        """Of no pixel at all."""
        return cls.of(np.zeros(0), np.zeros(0, dtype=bool))

    def __add__(self, other: Self) -> Self:
        """Of both together. Counts are exact; a sum of confidences is, to 1e-15 of it, whatever the order."""
        return type(self)(*(getattr(self, own) + getattr(other, own) for own in COLUMNS))

    @property
    def total(self) -> float:
        """Pixels, or their weight."""
        return self.pixels.sum().item()

    @property
    def error(self) -> float:
        """The share of pixels that are wrong; nan without any."""
        return _share(self.total - self.right.sum().item(), self.total)

    @property
    def mean_confidence(self) -> float:
        return _share(self.confidence.sum().item(), self.total)

    @property
    def ece(self) -> float:
        """The expected calibration error, sum over bins of n_b / n * |accuracy_b - confidence_b|, in [0, 1].

        With 15 bins of equal width and the means of each bin: Guo et al., "On calibration of modern neural networks",
        ICML 2017, equation 5, over the pixels that count. nan without any.
        """
        return _share(np.abs(self.right - self.confidence).sum().item(), self.total)

    @property
    def overconfidence(self) -> float:
        """Mean confidence less accuracy, in [-1, 1]: above 0 the network says more than it holds. At most the ECE."""
        return self.mean_confidence - (1 - self.error)

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each bin that holds pixels: mean confidence, share that is right, and its share of all pixels."""
        held = self.pixels > 0
        pixels = self.pixels[held]
        return self.confidence[held] / pixels, self.right[held] / pixels, pixels / self.total

    def error_of_surest(self, coverage: float) -> float:
        """The share of wrong pixels among the surest `coverage` (0 to 1) of all: selective risk (El-Yaniv and Wiener,
        "On the foundations of noise-free selective classification", JMLR 2010).

        Pixels of one bin of doubt come in no order, so within it errors lie evenly. nan without pixels; of a coverage
        of 0 that of the surest bin.
        """
        if not self.total:
            return math.nan
        kept, wrong = self._kept()
        wanted = coverage * self.total
        if wanted <= kept[0]:
            return _share(wrong[0].item(), kept[0].item())
        return float(np.interp(wanted, kept, wrong)) / wanted

    @property
    def aurc(self) -> float:
        """The area under the risk-coverage curve, the mean of `error_of_surest` over all coverages: in [0, 1], the less
        the better (Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation", ICLR 2019).

        The integral is exact for errors that lie evenly within a bin of doubt; nan without pixels.
        """
        if not self.total:
            return math.nan
        kept, wrong = self._kept()
        before, wrong_before = np.r_[0.0, kept[:-1]], np.r_[0.0, wrong[:-1]]
        pixels = kept - before
        rate = (wrong - wrong_before) / pixels
        # With n pixels and e errors before it, the integral of (e + rate x) / (n + x) over a bin.
        grown = np.log(np.divide(kept, before, out=np.ones_like(kept), where=before > 0))
        area = rate * pixels + (wrong_before - rate * before) * grown
        return area.sum().item() / self.total

    def _kept(self) -> tuple[np.ndarray, np.ndarray]:
        """At the end of each bin that holds any: pixels that are no more doubtful, and how many of them are wrong."""
        held = self.doubted > 0
        doubted = self.doubted[held].astype(np.float64)
        return doubted.cumsum(), (doubted - self.doubted_right[held]).cumsum()

    def named(self, prefix: str = "") -> dict[str, float | None]:
        """The figures of a result.json; None where no pixel counts."""
        figures = {"ece": self.ece, "overconfidence": self.overconfidence, "aurc": self.aurc}
        return {f"{prefix}{name}": None if math.isnan(value) else value for name, value in figures.items()}

    def dump(self) -> dict[str, list[float]]:
        """Plain JSON types; `load` reads them."""
        return {own: getattr(self, own).tolist() for own in COLUMNS}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Self:
        return cls(*(np.array(dumped[own]) for own in COLUMNS))


def _doubt_bin(shares: np.ndarray) -> np.ndarray:
    """Of shares `(N,)` float32 in [0, 1] the bins of their doubt, in [0, DOUBTS)."""
    bits = (np.float32(1) - shares).view(np.int32) >> (23 - FINE_BITS)
    least = np.array([2.0**-HALVINGS], dtype=np.float32).view(np.int32) >> (23 - FINE_BITS)
    return (bits - least + 1).clip(0, DOUBTS - 1)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


# ---- one number that mends shares ----


@dataclass(frozen=True)
class Temperature:
    """A number by which logits are divided before the softmax, and on what it was fitted.

    Guo et al. 2017, section 4.2: above 1 it makes shares less sure, and it changes no class. `ece` and `nll` are those
    of the pixels that it was fitted on, without it and with it: in-sample.
    """

    value: float
    images: int
    pixels: int
    split: str  # the digest of these images and their masks, as in a passport
    nll: tuple[float, float]  # mean negative log-likelihood of a pixel, in nats
    ece: tuple[float, float]

    def dump(self) -> dict[str, Any]:
        return {name: list(own) if isinstance(own, tuple) else own for name, own in vars(self).items()}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Self:
        nll, ece = tuple(dumped["nll"]), tuple(dumped["ece"])
        return cls(dumped["value"], dumped["images"], dumped["pixels"], dumped["split"], nll, ece)


@dataclass(frozen=True, eq=False)
class Pixels:
    """Some pixels of scored images: what a network says of each, and what it is."""

    logits: np.ndarray  # (N, K) float32
    truth: np.ndarray  # (N,) int64
    weights: np.ndarray  # (N,) float64: of how many pixels each was drawn
    images: int  # that they are of

    @classmethod
    def of_all(cls, drawn: Sequence[Self], num_classes: int) -> Self:
        """Those of several sets of images together."""
        return cls(
            logits=np.concatenate([np.zeros((0, num_classes), np.float32), *(own.logits for own in drawn)]),
            truth=np.concatenate([np.zeros(0, np.int64), *(own.truth for own in drawn)]),
            weights=np.concatenate([np.zeros(0), *(own.weights for own in drawn)]),
            images=sum(own.images for own in drawn),
        )

    def confidences(self, temperature: float = 1.0) -> Confidences:
        shares = 1 / np.exp((self.logits - self.logits.max(axis=1, keepdims=True)) / temperature).sum(axis=1)
        return Confidences.of(shares, self.logits.argmax(axis=1) == self.truth, self.weights)

    def nll(self, temperature: float = 1.0) -> float:
        """The weighted mean of -log of the share of the true class, in nats."""
        below = self.logits - self.logits.max(axis=1, keepdims=True)
        of_truth = np.take_along_axis(below, self.truth[:, None], axis=1)[:, 0]
        each = np.log(np.exp(below / temperature).sum(axis=1)) - of_truth / temperature
        return float(np.average(each, weights=self.weights))


def fit_temperature(pixels: Pixels, split: str) -> Temperature | None:
    """The temperature at which `pixels` of the images of digest `split` are the likeliest, within TEMPERATURES.

    None where nothing says which: without a pixel, and where each is right, for then the surest is the likeliest; and
    where logits are no numbers. The likelihood has one peak, for its logarithm is concave in 1 / temperature.
    """
    if not np.isfinite(pixels.logits).all():
        return None
    if not (pixels.logits.argmax(axis=1) != pixels.truth).any():
        return None
    from scipy.optimize import minimize_scalar  # not for those who only read runs

    least, most = (math.log(own) for own in TEMPERATURES)
    found: Any = minimize_scalar(lambda own: pixels.nll(math.exp(own)), bounds=(least, most), method="bounded")
    value = math.exp(found.x)
    return Temperature(
        value=value,
        images=pixels.images,
        pixels=len(pixels.truth),
        split=split,
        nll=(pixels.nll(), pixels.nll(value)),
        ece=(pixels.confidences().ece, pixels.confidences(value).ece),
    )


# ---- in words ----


def in_words(found: Confidences) -> str:
    """`ECE 3.14 %, over-confident by 2.92 points: on average it says 93.5 % and is right 90.6 % of the time; ...`."""
    if not found.total:
        return "no pixel counts"
    gap = 100 * found.overconfidence
    leaning = "over-confident" if gap > 0 else "under-confident"
    told = f"ECE {100 * found.ece:.2f} %, {leaning} by {abs(gap):.2f} points"
    told += f": on average it says {100 * found.mean_confidence:.1f} % and is right {100 * (1 - found.error):.1f} %"
    bin_of_90 = min(BINS - 1, int(0.9 * BINS))
    if found.pixels[bin_of_90] < FEWEST:
        return f"{told} of the time"
    said = 100 * found.confidence[bin_of_90] / found.pixels[bin_of_90]
    held = 100 * found.right[bin_of_90] / found.pixels[bin_of_90]
    return f"{told} of the time; when it says {said:.0f} % it is right {held:.0f} %"


def left_out_in_words(found: Confidences, left_out: float = LEFT_OUT) -> str:
    """`leave out the least sure 10 % of the pixels and the error falls from 12.0 % to 8.1 %`."""
    if not found.total:
        return "no pixel counts"
    before, after = 100 * found.error, 100 * found.error_of_surest(1 - left_out)
    change = "falls" if after < before else "goes"
    most = f"leave out the least sure {100 * left_out:g} % of the pixels"
    return f"{most} and the error {change} from {before:.1f} % to {after:.1f} %"


def temperature_in_words(fitted: Temperature) -> str:
    """`temperature 1.62, fitted on 98,304 pixels of ...; there (in-sample) the ECE falls from 7.30 % to 1.94 %`."""
    before, after = (100 * own for own in fitted.ece)
    change = "falls" if after < before else "goes"
    told = (
        f"temperature {fitted.value:.2f}, fitted on {fitted.pixels:,} pixels of {fitted.images} validation images; "
        f"there (in-sample) the ECE {change} from {before:.2f} % to {after:.2f} %"
    )
    if min(abs(math.log(fitted.value / end)) for end in TEMPERATURES) < NEAR_END:
        told += "; it is at the end of what is sought, so one number does not mend these shares"
    return told
