"""What runs have shown, in one sentence: whether pretraining helped, or what was reached where nothing can be told.

The rules are few and stand in RULES, to be shown with the sentence. A null result is told as plainly as a gain, and of
several comparisons none is picked out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Literal

from ssl_seg.evidence.compare import SCRATCH, Comparison, Group
from ssl_seg.evidence.pairs import MIN_STARTS, Shared, Spread, independent, over_starts
from ssl_seg.evidence.statistics import (
    MAX_NEEDED,
    Interval,
    detectable,
    holm,
    pairs_needed,
    sign_flip_p,
    t_interval,
    t_test_p,
)
from ssl_seg.figures.svg import with_minus
from ssl_seg.runs.folder import RunFolder

MIN_PAIRS = 3  # two pairs would have an interval of 12.7 standard errors to each side
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
LEAST_P = 0.001  # told as a number
LEAST_TOLD = 0.1  # points; a mean that is written as 0.0 is none
ALPHA = 0.05  # of comparisons where pretraining does nothing this share is told as a gain or a loss
RULES = (
    f"A gain (or a loss) is told where there are at least {MIN_PAIRS} pairs and the 95 % interval of their mean "
    "difference (Student's t) lies above 0 (or below). A mean that is written as 0.0 is none. A pair is two runs with "
    "the same seeds: the same labelled images in the same order. Several runs with the same seeds, as those of several "
    "pretrainings, count as one, by their mean.",
    "Where pretraining does nothing at all, a gain or a loss is told by chance in 5 of 100 comparisons, whatever the "
    "number of pairs. Every comparison on a page has its own 5. So the first sentence of a page with several also says "
    "what stands when they are corrected for their number (Holm 1979): something false does on 5 of 100 pages at most.",
    "The interval is about other seeds: another choice among the labelled images, other orders, other first weights. "
    "The scored images stay the same, and so does whatever pairs share. It supposes differences that are roughly "
    "normal. The exact p, told from 8 independent pairs on, does not: it is the share of all ways to swap the two runs "
    "within pairs whose mean is at least as far from 0.",
    "The 5 of 100 hold where every pair has a pretraining of its own; else the interval is about these pretrainings "
    f"only. Where pairs share pretrainings, {MIN_STARTS} or more, mean, interval and p are those of the means of each "
    "pretraining; where every seed has several of them, those of the pairs if their interval is the wider.",
)

Verdict = Literal["gain", "loss", "none", "few"]
TOLD = ("gain", "loss")


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
        return _of_scores(scored, score, runs, comparable=len(comparison.tables) == 1)
    below = [_measured_on(score, scored, runs)]
    bases = {id(base): base for group, _ in paired if (base := comparison.baseline(group)) is not None}
    if len(bases) == 1:
        below.append(f"From scratch: {percent(next(iter(bases.values())).spread(score))} % mIoU.")
    below += left_open(gain for _, gain in paired)
    single = [(group.label, sentence(gain, group.label)) for group, gain in paired]
    alone = [own.label for own, gain in gains if gain is None and own.stage == "finetune" and not own.from_scratch]
    missing = "no run from scratch has the same settings and seeds, so no gain can be told."
    single += [(label, f"{label}: {missing}") for label in alone]
    headline = single[0][1] if len(paired) == 1 else of_many([(group.label, gain) for group, gain in paired])
    return Answer(headline, tuple(below), tuple(single) if len(single) > 1 else (), has_gains=True)


def verdict(gain: Spread) -> Verdict:
    """By the rules in RULES; `gain` holds paired differences."""
    if gain.n < MIN_PAIRS:
        return "few"
    interval = t_interval(independent(gain), 1 - ALPHA)
    written = round(100 * gain.mean, 1)
    if written > 0 and interval.low > 0:
        return "gain"
    if written < 0 and interval.high < 0:
        return "loss"
    return "none"


def left_open(gains: Iterable[Spread]) -> tuple[str, ...]:
    """Where nothing can be told, what would have been, and how many pairs one point takes; empty where all is told."""
    untold = [gain for gain in gains if verdict(gain) == "none" and len(set(independent(gain))) > 1]
    if not untold:
        return ()
    nulls = [independent(gain) for gain in untold]
    # Nothing is ever told of fewer pairs, or of a mean that is written as 0.0.
    seen = [max(LEAST_TOLD, 100 * detectable(values, 1 - ALPHA)) for values in nulls]
    needed = [max(MIN_PAIRS, pairs_needed(stdev(values), 0.01, 1 - ALPHA) or MAX_NEEDED) for values in nulls]
    shares = [over_starts(gain) is not None for gain in untold]
    words = ["pretrainings with as many pairs each"] * any(shares) + ["independent pairs"] * (not all(shares))
    unit = " or ".join(words)
    most = f"{MAX_NEEDED:,} or more" if max(needed) == MAX_NEEDED else f"{max(needed)}"
    number = most if min(needed) == max(needed) else f"{min(needed)} to {most}"
    begun = "A" if len(nulls) == 1 else "Where nothing can be told, a"
    return (
        f"{begun} true gain of {_range(seen)} points would have been told 8 times in 10 by as many {unit} "
        f"of this spread; to tell one of 1 point takes about {number} of them.",
    )


def _range(values: Sequence[float]) -> str:
    """`2.1 to 3.4`, or one number where both ends are written alike."""
    ends = dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values)))
    return " to ".join(ends)


def sentence(gain: Spread, label: str, base: str = SCRATCH, pretrained: bool = True) -> str:
    """What the paired differences of one group to its `base` say; a group may also differ in something else."""
    subject = f"pretraining ({label})" if pretrained else label
    begun = _begun(subject) if pretrained else label  # a name stays as it is
    over = f"{subject} differs from {base} by {points(gain.mean)} points of mIoU"
    if gain.n < MIN_PAIRS:
        spread = f", from {points(min(gain.values))} to {points(max(gain.values))}" if gain.n > 1 else ""
        return f"Too few runs to tell (n = {gain.n}): {over}{spread}."
    size = f"{100 * abs(gain.mean):.1f} points of mIoU"
    told = {
        "gain": f"{begun} gave +{size} over {base}",
        "loss": f"{begun} lost {size} against {base}",
        "none": f"No gain can be told: {over}",
    }[verdict(gain)]
    return f"{told} ({certainty(gain)})."


def certainty(gain: Spread) -> str:
    """`95 % interval +0.4 to +2.8, 8 pairs, exact p = 0.016`; of at least 2 pairs."""
    p = sign_flip_p(independent(gain))
    exact = "" if p is None else f", exact {p_in_words(p)}"
    return f"{_told_by(gain)}, {gain.n} pairs{_from_these(gain)}{exact}"


def _told_by(gain: Spread) -> str:
    """The interval of the verdict: `95 % interval +0.4 to +2.8 over 4 pretrainings`."""
    over = ""
    if isinstance(gain, Shared) and not gain.is_of_few:
        number = f"{gain.num_starts} pretrainings"
        over = f" over {number}" if gain.by_start else f" over pairs, wider than over their {number}"
    return f"{span(t_interval(independent(gain), 1 - ALPHA))}{over}"


def _from_these(gain: Spread) -> str:
    """` from these 2 pretrainings`, of which alone the interval then is."""
    if not isinstance(gain, Shared) or not gain.is_of_few:
        return ""
    return " from this one pretraining" if gain.num_starts == 1 else f" from these {gain.num_starts} pretrainings"


def span(interval: Interval) -> str:
    """Of differences of shares, in hundredths: `95 % interval +0.4 to +2.8`."""
    return f"{100 * interval.level:g} % interval {between(interval)}"


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


def of_many(
    paired: Sequence[tuple[str, Spread]],
    base: str = SCRATCH,
    subject: str = "pretraining",
    unit: str = "points of mIoU",
) -> str:
    """Of several comparisons, (label, gain), none is picked out: the best of many would look good by chance alone."""
    counts = {kind: sum(verdict(gain) == kind for _, gain in paired) for kind in ("gain", "loss", "none", "few")}
    means_of = _means_of(paired, unit)
    total = len(paired)
    if counts["few"] == total:
        return f"Too few runs to tell in any of {total} comparisons with {base}: {means_of}."
    if counts["gain"] + counts["loss"] == 0:
        return f"No gain can be told in any of {total} comparisons with {base}: {means_of}."
    return f"{_counted(counts, base, subject)}: {means_of}.{_corrected([gain for _, gain in paired])}"


def _means_of(paired: Sequence[tuple[str, Spread]], unit: str) -> str:
    means = [gain.mean for _, gain in paired]
    sizes = sorted({gain.n for _, gain in paired})
    number = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    pairs = f"{number} pairs each{_from_only([gain for _, gain in paired])}"
    if len(paired) > NAMED:
        return f"mean differences from {points(min(means))} to {points(max(means))} {unit}, {pairs}"
    each = [
        f"{points(gain.mean)} ({label}; {_told_by(gain)})" if gain.n >= MIN_PAIRS else f"{points(gain.mean)} ({label})"
        for label, gain in paired
    ]
    return f"{' and '.join(each)} {unit}, {pairs}"


def _from_only(gains: Sequence[Spread]) -> str:
    """`, some from only 1 or 2 pretrainings`; nothing where no comparison is about so few."""
    numbers = [gain.num_starts for gain in gains if isinstance(gain, Shared) and gain.is_of_few]
    if not numbers:
        return ""
    some = "" if len(numbers) == len(gains) else "some "
    listed = " or ".join(map(str, sorted(set(numbers))))
    return f", {some}from only {listed} pretraining{'s' * (max(numbers) > 1)}"


def _counted(counts: Mapping[str, int], base: str, subject: str) -> str:
    """How many comparisons told a gain or a loss; some did."""
    total = sum(counts.values())
    if counts["gain"] == total:
        return f"{_begun(subject)} gave a gain over {base} in {_all_of(total)} comparisons"
    if counts["loss"] == total:
        return f"{_begun(subject)} lost against {base} in {_all_of(total)} comparisons"
    words = [
        f"{verb} {counts[kind]}" for kind, verb in (("gain", "gave a gain in"), ("loss", "lost in")) if counts[kind]
    ]
    words[0] += f" of {total} comparisons"
    open_ones = counts["none"] + counts["few"]
    words += [f"and in {open_ones} nothing can be told"] * (open_ones > 0)
    return f"Against {base}, {subject} {', '.join(words)}"


def stand(gains: Sequence[Spread]) -> list[bool]:
    """Which of several comparisons tell a gain or a loss that stands when they are corrected for their number."""
    compared = [index for index, gain in enumerate(gains) if gain.n >= MIN_PAIRS]
    adjusted = holm([t_test_p(independent(gains[index])) for index in compared])
    small = {index for index, p in zip(compared, adjusted, strict=True) if p <= ALPHA}
    return [index in small and verdict(gain) in TOLD for index, gain in enumerate(gains)]


def _corrected(gains: Sequence[Spread]) -> str:
    """What of the gains and losses stands when all comparisons are corrected for their number."""
    compared = [gain for gain in gains if gain.n >= MIN_PAIRS]
    if len(compared) == 1:
        return ""
    told = sum(verdict(gain) in TOLD for gain in compared)
    left = sum(stand(gains))
    if told == 1:
        stands = "it stands" if left else "it does not stand"
    elif left == told:
        stands = f"{_all_of(left)} stand"
    else:
        stands = {0: "none stands", 1: "1 of these stands"}.get(left, f"{left} of these stand")
    return f" Corrected for {len(compared)} comparisons, {stands}."


def _begun(sentence: str) -> str:
    """With a capital, and the rest as it is: it may hold a name."""
    return sentence[:1].upper() + sentence[1:]


def _all_of(total: int) -> str:
    return "both" if total == 2 else f"all {total}"


def _of_scores(scored: Sequence[Group], score: str, runs: Sequence[RunFolder], comparable: bool) -> Answer:
    """Without pairs: what one group reaches, or that several cannot be told apart by a baseline."""
    below = _measured_on(score, scored, runs)
    if len(scored) == 1:
        group = scored[0]
        spread = group.spread(score)
        over = f", mean of {spread.n} runs" if spread.n > 1 else ""
        return Answer(f"mIoU {percent(spread)} %{over}{_best_and_worst(group, score)}.", (below,))
    if not comparable:
        apart = "and the scores do not all mean the same (see below), so none is the highest."
        return Answer(f"No gain can be told: there are no runs from scratch to pair with, {apart}", (below,))
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
    names = {outcome.name for group in scored for outcome in group.outcomes}
    return measured_on(score.partition("/")[0], [run for run in runs if str(run.folder) in names])


def measured_on(part: str, own: Sequence[RunFolder]) -> str:
    """On how many images the `part` of these runs was scored, and what is to be known of them."""
    counts = sorted({count for run in own if (count := images_of(run).get(part)) is not None})
    number = "" if not counts else f"{counts[0]:,} " if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} "
    chosen = part == "val" and any(_chose_its_step(run) for run in own)
    caution = " They also chose the step whose weights are scored, so the scores are on the bright side."
    return f"Measured on {number}{PARTS.get(part, part)}.{caution if chosen else ''}"


def _chose_its_step(run: RunFolder) -> bool:
    """Whether the weights are those of the best of several evaluations."""
    return run.config.get("select") == "best" and bool(run.config.get("train", {}).get("eval_every"))


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


def with_unit(name: str) -> str:
    """A figure by its spoken name, with its unit: `PSNR, dB`."""
    unit = unit_of(name)[1]
    return f"{spoken(name)}, {unit}" if unit else spoken(name)


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
