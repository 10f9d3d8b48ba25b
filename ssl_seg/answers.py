"""What runs have shown, in one sentence: whether pretraining helped, or what was reached where nothing can be told.

The rules are few and stand in RULES, to be shown with the sentence. A null result is told as plainly as a gain, and of
several comparisons none is picked out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ssl_seg.compare import Comparison, Group, Spread
from ssl_seg.plots import with_minus
from ssl_seg.runs import RunFolder

MIN_PAIRS = 3  # two differences have one sign every second time, where there is nothing to find
NAMED = 2  # comparisons that the headline tells one by one; more are counted
PARTS = {"test": "test images", "val": "validation images"}
NOTHING = "\N{EN DASH}"
STREAMS = {"train": "training: ", "val": "held out: "}
WORDS = {
    "psnr": "PSNR",
    "mae": "mean absolute error",
    "miou": "mIoU",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}
UNITS = {"psnr": (1, "dB"), "miou": (100, "%"), "accuracy": (100, "%"), "solved": (100, "%")}  # factor to it, its name
RULES = (
    f"A gain (or a loss) is told where there are at least {MIN_PAIRS} pairs, all paired differences have one sign, and "
    "their mean is further from 0 than twice their standard deviation divided by the root of their number. A pair is "
    "two runs with the same seeds: the same labelled images in the same order. Several runs with the same seeds, as "
    "those of several pretrainings, count as one, by their mean.",
    "This is a rule for reading and no test of significance. Where pretraining does nothing at all, a gain or a loss "
    "is told by chance in 18 of 100 comparisons for 3 pairs, 11 for 4, 3 for 6 and 1 for 8 (normal differences, "
    "simulated).",
)

Verdict = Literal["gain", "loss", "none", "few"]


@dataclass(frozen=True)
class Answer:
    """The sentence on top, what it was measured on, and where there are several comparisons a sentence for each."""

    headline: str
    below: tuple[str, ...] = ()
    single: tuple[tuple[str, str], ...] = ()  # label of the group, sentence
    has_gains: bool = False


def answer(comparison: Comparison, runs: Sequence[RunFolder]) -> Answer:
    """What the runs say: the gain over scratch where there are pairs, else what they reach."""
    score = comparison.main_score
    if not comparison.groups:
        return Answer(f"No answer yet: {_unfinished_in_words(runs)}.")
    if score is None:
        return _of_pretrainings(comparison, runs)
    scored = [group for group in comparison.groups if group.spread(score) is not None]
    gains = [(group, comparison.gain(group, score)) for group in scored]
    paired = [(group, gain) for group, gain in gains if gain is not None]
    if not paired:
        return _of_scores(scored, score, runs)
    below = [_measured_on(score, scored, runs)]
    bases = {id(base): base for group, _ in paired if (base := comparison.baseline(group)) is not None}
    if len(bases) == 1:
        below.append(f"From scratch: {percent(next(iter(bases.values())).spread(score))} % mIoU.")
    if any(len({run.start for run in group.outcomes}) < len(group.outcomes) for group, _ in paired):
        below.append("Runs that start from one pretraining do not show how much pretrainings differ among themselves.")
    single = [(group.label, sentence(gain, group.label)) for group, gain in paired]
    alone = [own.label for own, gain in gains if gain is None and own.stage == "finetune" and not own.from_scratch]
    missing = "no run from scratch has the same settings and seeds, so no gain can be told."
    single += [(label, f"{label}: {missing}") for label in alone]
    headline = single[0][1] if len(paired) == 1 else _of_many(paired)
    return Answer(headline, tuple(below), tuple(single) if len(single) > 1 else (), has_gains=True)


def verdict(gain: Spread) -> Verdict:
    """By the rules in RULES; `gain` holds paired differences."""
    if gain.n < MIN_PAIRS:
        return "few"
    clear = abs(gain.mean) > 2 * gain.sd / math.sqrt(gain.n) and round(100 * gain.mean, 1) != 0
    if clear and min(gain.values) > 0:
        return "gain"
    if clear and max(gain.values) < 0:
        return "loss"
    return "none"


def sentence(gain: Spread, label: str) -> str:
    """What the paired differences of one group to its runs from scratch say."""
    over = f"pretraining ({label}) differs from scratch by {points(gain.mean)} points of mIoU"
    spread = f"from {points(min(gain.values))} to {points(max(gain.values))}"
    if gain.n < MIN_PAIRS:
        return f"Too few runs to tell (n = {gain.n}): {over}{f', {spread}' if gain.n > 1 else ''}."
    figures = f"mean of {gain.n} paired runs, sd {100 * gain.sd:.1f}, {spread}"
    size = f"{100 * abs(gain.mean):.1f} points of mIoU"
    return {
        "gain": f"Pretraining ({label}) gave +{size} over scratch: {figures}.",
        "loss": f"Pretraining ({label}) lost {size} against scratch: {figures}.",
        "none": f"No gain can be told: {over}, {figures}.",
    }[verdict(gain)]


def points(difference: float) -> str:
    """A difference of shares in hundredths: `+1.3`."""
    return with_minus(f"{100 * difference:+.1f}")


def percent(spread: Spread | None) -> str:
    """Shares in hundredths: `25.4 ± 2.6`."""
    return NOTHING if spread is None else Spread(tuple(100 * value for value in spread.values)).text(1)


def _of_many(paired: Sequence[tuple[Group, Spread]]) -> str:
    """Of several comparisons none is picked out: the best of many would look good by chance alone."""
    counts = {kind: sum(verdict(gain) == kind for _, gain in paired) for kind in ("gain", "loss", "none", "few")}
    means = [gain.mean for _, gain in paired]
    sizes = sorted({gain.n for _, gain in paired})
    pairs = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    if len(paired) <= NAMED:
        each = " and ".join(f"{points(gain.mean)} ({group.label})" for group, gain in paired)
        means_of = f"{each} points of mIoU, each the mean of {pairs} paired runs"
    else:
        span = f"from {points(min(means))} to {points(max(means))}"
        means_of = f"mean differences {span} points of mIoU, {pairs} paired runs each"
    total = len(paired)
    if counts["few"] == total:
        return f"Too few runs to tell in any of {total} comparisons with scratch: {means_of}."
    if counts["gain"] + counts["loss"] == 0:
        return f"No gain can be told in any of {total} comparisons with scratch: {means_of}."
    if counts["gain"] == total:
        return f"Pretraining gave a gain over scratch in {_all_of(total)} comparisons: {means_of}."
    if counts["loss"] == total:
        return f"Pretraining lost against scratch in {_all_of(total)} comparisons: {means_of}."
    words = [f"gave a gain in {counts['gain']} of {total} comparisons" if counts["gain"] else ""]
    words += [f"lost in {counts['loss']}" if counts["loss"] else ""]
    open_ones = counts["none"] + counts["few"]
    words += [f"and in {open_ones} nothing can be told" if open_ones else ""]
    return f"Against scratch, pretraining {', '.join(word for word in words if word)}: {means_of}."


def _all_of(total: int) -> str:
    return "both" if total == 2 else f"all {total}"


def _of_scores(scored: Sequence[Group], score: str, runs: Sequence[RunFolder]) -> Answer:
    """Without pairs: what one group reaches, or that several cannot be told apart by a baseline."""
    below = _measured_on(score, scored, runs)
    if len(scored) == 1:
        group = scored[0]
        spread = group.spread(score)
        over = f", mean of {spread.n} runs" if spread.n > 1 else ""
        return Answer(f"mIoU {percent(spread)} %{over}{_best_and_worst(group, score)}.", (below,))
    best = max(scored, key=lambda group: group.spread(score).mean)
    headline = (
        "No gain can be told: there are no runs from scratch with the same settings and seeds. "
        f"The highest mean mIoU is {percent(best.spread(score))} % ({best.label}, n = {best.spread(score).n})."
    )
    return Answer(headline, (below,))


def _best_and_worst(group: Group, score: str) -> str:
    part = score.partition("/")[0]
    names = [name for outcome in group.outcomes for name in outcome.scores if name.startswith(f"{part}/iou/")]
    means = {name.removeprefix(f"{part}/iou/"): group.spread(name).mean for name in dict.fromkeys(names)}
    if len(means) < 2:
        return ""
    best, worst = max(means, key=means.get), min(means, key=means.get)
    at_zero = sum(value == 0 for value in means.values())
    others = f" (like {count_of(at_zero - 1, 'other')})" if at_zero > 1 else ""
    return f": best class {best} with {100 * means[best]:.1f}, worst {worst} with {100 * means[worst]:.1f}{others}"


def _measured_on(score: str, scored: Sequence[Group], runs: Sequence[RunFolder]) -> str:
    part = score.partition("/")[0]
    names = {outcome.name for group in scored for outcome in group.outcomes}
    own = [run for run in runs if str(run.folder) in names]
    counts = sorted({count for run in own if (count := images_of(run).get(part)) is not None})
    number = "" if not counts else f"{counts[0]:,} " if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} "
    chosen = part == "val" and any(run.config.get("select") == "best" for run in own)
    caution = " They also chose the step whose weights are scored, so the scores are on the bright side."
    return f"Measured on {number}{PARTS.get(part, part)}.{caution if chosen else ''}"


def _of_pretrainings(comparison: Comparison, runs: Sequence[RunFolder]) -> Answer:
    """What each task reaches on held-out images."""
    told = [(group.label, _reached(group)) for group in comparison.groups]
    if not any(words for _, words in told):
        return Answer("Nothing was scored: the runs had no labelled or held-out images (data.val).")
    counts = sorted({images_of(run)["val"] for run in runs if "val" in images_of(run)})
    steps = sorted({run.result.get("steps") for run in runs if run.result and run.result.get("steps")})
    after = f" after {steps[0]:,} steps" if len(steps) == 1 else ""
    held_out = f"{counts[0]:,} held-out images" if len(counts) == 1 else "held-out images"
    if len(told) == 1:
        return Answer(f"On {held_out}{after}: {told[0][1]}.")
    single = tuple((label, f"{label}: {words or 'nothing was held out'}.") for label, words in told)
    return Answer(f"{len(told)} kinds of pretraining on {held_out}{after}; what each task reaches:", (), single)


def _reached(group: Group) -> str:
    """`denoise PSNR 23.7 dB, ...`: of each task the foremost figure."""
    names = dict.fromkeys(name for outcome in group.outcomes for name in outcome.scores)
    values = {name: group.spread(name) for name in foremost(names)}
    words = [f"{spoken(name.removeprefix('val/'))} {_in_unit(name, value.mean)}" for name, value in values.items()]
    number = f" (means of {len(group.outcomes)} runs)" if len(group.outcomes) > 1 and words else ""
    return ", ".join(words) + number


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


def count_of(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _in_unit(name: str, value: float) -> str:
    factor, unit = unit_of(name)
    return f"{factor * value:.1f} {unit}" if unit else f"{value:.3g}"


def _unfinished_in_words(runs: Sequence[RunFolder]) -> str:
    if len(runs) == 1:
        return f"the run is {state(runs[0])}"
    counts = {
        status: sum(run.status == status for run in runs) for status in ("running", "killed", "failed", "finished")
    }
    return f"of {len(runs)} runs " + ", ".join(f"{count} {status}" for status, count in counts.items() if count)


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
