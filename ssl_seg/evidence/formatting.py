"""Numbers, units, names and states as people read them. Pages, tables and sentences share these words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ssl_seg.evidence.pairs import Spread
from ssl_seg.evidence.statistics import Interval
from ssl_seg.figures.svg import with_minus
from ssl_seg.runs.folder import RunFolder

PARTS = {"test": "test images", "val": "validation images"}
NOTHING = "\N{EN DASH}"
STREAMS = {"train": "training: ", "val": "held out: "}
WORDS = {
    "psnr": "PSNR",
    "mae": "mean absolute error",
    "miou": "mIoU",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "ece": "expected calibration error",
    "aurc": "area under the risk-coverage curve",
    "hd95": "Hausdorff 95",
}
UNITS = {  # factor to it, its name
    "psnr": (1, "dB"),
    "miou": (100, "%"),
    "accuracy": (100, "%"),
    "solved": (100, "%"),
    "ece": (100, "%"),
    "overconfidence": (100, "points"),
    "hd95": (1, "pixels"),
}
LEAST_P = 0.001  # told as a number


def range_of(values: Sequence[float]) -> str:
    """`2.1 to 3.4`, or one number where both ends are written alike."""
    ends = dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values)))
    return " to ".join(ends)


def level_text(level: float) -> str:
    """A confidence level: `95 %`."""
    return f"{100 * level:g} %"


def span(interval: Interval) -> str:
    """Of differences of shares, in hundredths: `95 % interval +0.4 to +2.8`."""
    return f"{level_text(interval.level)} interval {between(interval)}"


def between(interval: Interval | None) -> str:
    """The same without its level: `+0.4 to +2.8`."""
    return NOTHING if interval is None else f"{points(interval.low)} to {points(interval.high)}"


def p_in_words(p: float) -> str:
    """`p = 0.016`."""
    return f"p = {p_as_number(p)}" if p >= LEAST_P else f"p {p_as_number(p)}"


def p_as_number(p: float) -> str:
    """`0.016`, or `< 0.001`."""
    return f"{p:.3f}" if p >= LEAST_P else f"< {LEAST_P}"


def points(difference: float) -> str:
    """A difference of shares in hundredths: `+1.3`."""
    return with_minus(f"{100 * difference:+.1f}")


def percent(spread: Spread | None) -> str:
    """Shares in hundredths: `25.4 ± 2.6`."""
    return NOTHING if spread is None else Spread(tuple(100 * value for value in spread.values)).text(1)


def begun(sentence: str) -> str:
    """With a capital, and the rest as it is: it may hold a name."""
    return sentence[:1].upper() + sentence[1:]


def all_of(total: int) -> str:
    return "both" if total == 2 else f"all {total}"


def foremost(names: Iterable[str]) -> list[str]:
    """Of held-out figures `val/<task>/<figure>` the one of each task to look at: the first that is not its loss."""
    tasks: dict[str, list[str]] = {}
    for name in names:
        tasks.setdefault(name.rpartition("/")[0], []).append(name)
    return [next((name for name in own if not name.endswith("/loss")), own[0]) for own in tasks.values()]


def spoken(name: str) -> str:
    """`held out: denoise PSNR` for `val/denoise/psnr`."""
    part, _, rest = name.partition("/")
    words = [WORDS.get(word, word.replace("_", " ")) for word in (rest if part in STREAMS else name).split("/")]
    return f"{STREAMS.get(part, '')}{' '.join(words)}"


def unit_of(name: str) -> tuple[float, str]:
    """By what a figure is multiplied to be in the unit that everybody reads it in, and that unit; (1, '') without."""
    return UNITS.get(name.rpartition("/")[2], (1, ""))


def with_unit(name: str) -> str:
    """A figure by its spoken name, with its unit: `PSNR, dB`."""
    unit = unit_of(name)[1]
    return f"{spoken(name)}, {unit}" if unit else spoken(name)


def count_of(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def in_unit(name: str, value: float) -> str:
    factor, unit = unit_of(name)
    return f"{factor * value:.1f} {unit}" if unit else f"{value:.3g}"


def state(run: RunFolder) -> str:
    """`running, at step 20 of 400`."""
    if run.is_done:
        return "finished"
    lines = run.metrics()
    steps = run.config.get("train", {}).get("steps")
    at = f"at step {lines[-1]['step']:,}" if lines else "at its start"
    status = "finished without a result" if run.status == "finished" else run.status
    return f"{status}, {at}" + (f" of {steps:,}" if isinstance(steps, int) else "")


def images_of(run: RunFolder) -> dict[str, int]:
    """How many images each part of a run had; `labels used` are those of the labelled ones whose masks were seen."""
    parts = run.read("data.json") or {}
    counts = {part: own["images"] for part, own in parts.items() if isinstance(own, Mapping) and "images" in own}
    split = run.read("split.json") or {}
    if "val" in split:
        counts["val"] = len(split["val"])
    if "labelled" in split:
        counts["labels used"] = len(split["labelled"])
    return counts


def average(values: Iterable[float | None], shown: Callable[[float], str]) -> str:
    """The mean of those that are known, as `shown` writes it."""
    known = [value for value in values if value is not None]
    return shown(sum(known) / len(known)) if known else NOTHING


def duration(seconds: float) -> str:
    """`45 s`, `1 min 55 s`, `2 h 3 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
