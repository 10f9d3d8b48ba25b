"""What a comparison has shown, in one sentence: whether pretraining helped, or what was reached if nothing can be told.

The rules are few. `rules` has them in words, to be shown with the sentence. A null result is told as plainly as a gain,
and of several comparisons none is picked out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Literal

from ssl_seg.evidence.cautions import cautions
from ssl_seg.evidence.comparison import SCRATCH, Arm, Comparison, Gain, Outcome, condition_text
from ssl_seg.evidence.formatting import (
    PARTS,
    all_of,
    begun,
    count_of,
    foremost,
    images_of,
    in_unit,
    level_text,
    p_in_words,
    percent,
    points,
    range_of,
    span,
    spoken,
    state,
)
from ssl_seg.evidence.pairs import MIN_PAIRS, MIN_STARTS, Shared, Spread
from ssl_seg.evidence.results import Contrast, Study
from ssl_seg.evidence.statistics import LEVEL, MAX_NEEDED, detectable, holm_where_known, pairs_needed, t_test_p
from ssl_seg.runs.folder import RunFolder

NAMED = 2  # comparisons that the headline tells one by one; more are counted
LEAST_TOLD = 0.1  # points; a mean that is written as 0.0 is none
Verdict = Literal["gain", "loss", "none", "few"]
TOLD = ("gain", "loss")
VERDICTS = {"gain": "a gain in", "loss": "a loss in", "none": "nothing to tell in", "few": "too few pairs in"}
OF_CONDITIONS = (
    "Of a study with several conditions the first sentence tells the mean gain over all of them, seed by seed: one "
    "comparison an arm, whatever the number of conditions. Seeds that lack a pair under some condition are left out of "
    "it. It speaks of the conditions of this study alone."
)


EXPLORATORY = (
    "These were named before there was a score. All else on this page is exploratory: its intervals are not corrected "
    "for their number."
)


def rules(level: float = LEVEL) -> tuple[str, ...]:
    """By which gains and losses are told at a confidence level."""
    by_chance = f"{100 * (1 - level):g}"
    return (
        f"A gain (or a loss) is told where there are at least {MIN_PAIRS} pairs and the {level_text(level)} interval "
        "of their mean difference (Student's t) lies above 0 (or below). A mean that is written as 0.0 is none. A pair "
        "is two runs with the same seeds: the same labelled images in the same order. Several runs with the same "
        "seeds, as those of several pretrainings, count as one, by their mean.",
        f"Where pretraining does nothing at all, a gain or a loss is told by chance in {by_chance} of 100 comparisons, "
        f"whatever the number of pairs. Every comparison on a page has its own {by_chance}. So the first sentence of a "
        "page with several also says what stands when they are corrected for their number (Holm 1979, by the exact p "
        "where all have one that can be small enough, else by Student's): something false does on "
        f"{by_chance} of 100 pages at most.",
        "The interval is about other seeds: another choice among the labelled images, other orders, other first "
        "weights. The scored images stay the same, and so does whatever pairs share. It supposes differences that are "
        "roughly normal. The exact p, told from 8 independent pairs on, does not: it is the share of all ways to swap "
        "the two runs within pairs whose mean is at least as far from 0.",
        f"The {by_chance} of 100 hold where every pair has a pretraining of its own; else the interval is about these "
        f"pretrainings only. Where pairs share pretrainings, {MIN_STARTS} or more, mean, interval and p are those of "
        "the means of each pretraining; where every seed has several of them, those of the pairs if their interval is "
        "the wider.",
    )


@dataclass(frozen=True)
class Answer:
    """The sentence on top, what it was measured on, and where there are several comparisons a sentence for each."""

    headline: str
    below: tuple[str, ...] = ()
    single: tuple[tuple[str, str], ...] = ()  # label of the arm, sentence
    has_gains: bool = False


def answer(found: Comparison) -> Answer:
    """What arms gain over their baseline where there are pairs, else what they reach.

    Under several conditions an arm's gain is its mean over them: so each arm is one comparison, and no condition is
    picked out.
    """
    gains = [gain for arm in found.arms if (gain := found.over_conditions(arm)) is not None]
    if not gains:
        return _of_study_without_gains(found) if isinstance(found, Study) else _of_runs_without_gains(found)
    contrasts = found.contrasts if isinstance(found, Study) else ()
    # Beside comparisons that were named beforehand the others are exploratory, and have their interval alone.
    single = [(gain.arm.label, _sentence_of(found, gain, exact=not contrasts)) for gain in gains]
    single += [(arm.label, words) for arm in found.arms if (words := _why_alone(found, arm, gains))]
    headline = single[0][1] if len(gains) == 1 else _of_many(found, gains)
    below = (*_below(found), *left_open(gains))
    if contrasts:
        headline = _of_contrasts(contrasts)
        below = (EXPLORATORY, *_below(found), *left_open(own.gain for own in contrasts if own.gain))
    return Answer(headline, below, tuple(single) if len(single) > 1 else (), has_gains=True)


def _of_contrasts(contrasts: Sequence[Contrast]) -> str:
    """What was asked beforehand, one after the other, and what stands when corrected for their number."""
    told = [
        f"{own.arm.label}: no seed has a pair with {own.found.over} yet."
        if own.gain is None
        else _sentence_of(own.found, own.gain)
        for own in contrasts
    ]
    at = contrasts[0].found.conditions
    under = f"Under {condition_text(at[0])}: " if len(at) == 1 and at[0] else ""
    return f"{under}{' '.join(told)}{_corrected([own.gain for own in contrasts if own.gain])}"


# ---- one gain ----


def verdict(gain: Gain) -> Verdict:
    """By `rules` at the gain's own level."""
    interval = gain.interval
    if gain.n < MIN_PAIRS or interval is None:
        return "few"
    written = round(100 * gain.mean, 1)
    if written > 0 and interval.low > 0:
        return "gain"
    if written < 0 and interval.high < 0:
        return "loss"
    return "none"


def left_open(gains: Iterable[Gain]) -> tuple[str, ...]:
    """Where nothing can be told, what would have been, and how many pairs one point takes; empty where all is told."""
    untold = [gain for gain in gains if verdict(gain) == "none" and len(set(gain.independent)) > 1]
    if not untold:
        return ()
    # Nothing is ever told of fewer pairs, or of a mean that is written as 0.0.
    found = [detectable(gain.independent, gain.level) for gain in untold]
    seen = [max(LEAST_TOLD, 100 * difference) for difference in found if difference is not None]
    needed = [max(MIN_PAIRS, pairs_needed(stdev(gain.independent), 0.01, gain.level) or MAX_NEEDED) for gain in untold]
    shares = [gain.over_starts is not None for gain in untold]
    words = ["pretrainings with as many pairs each"] * any(shares) + ["independent pairs"] * (not all(shares))
    unit = " or ".join(words)
    most = f"{MAX_NEEDED:,} or more" if max(needed) == MAX_NEEDED else f"{max(needed)}"
    number = most if min(needed) == max(needed) else f"{min(needed)} to {most}"
    beginning = "A" if len(untold) == 1 else "Where nothing can be told, a"
    return (
        f"{beginning} true gain of {range_of(seen)} points would have been told 8 times in 10 by as many {unit} "
        f"of this spread; to tell one of 1 point takes about {number} of them.",
    )


def sentence(gain: Gain, label: str, base: str = SCRATCH, pretrained: bool = True, exact: bool = True) -> str:
    """What the paired differences of an arm to its `base` say; an arm may also differ in something else.

    `exact`: with the exact p, where there is one.
    """
    subject = f"pretraining ({label})" if pretrained else label
    beginning = begun(subject) if pretrained else label  # a name stays as it is
    over = f"{subject} differs from {base} by {points(gain.mean)} points of mIoU"
    if gain.n < MIN_PAIRS:
        spread = f", from {points(min(gain.values))} to {points(max(gain.values))}" if gain.n > 1 else ""
        return f"Too few runs to tell (n = {gain.n}): {over}{spread}."
    size = f"{100 * abs(gain.mean):.1f} points of mIoU"
    told = {
        "gain": f"{beginning} gave +{size} over {base}",
        "loss": f"{beginning} lost {size} against {base}",
        "none": f"No gain can be told: {over}",
    }[verdict(gain)]
    return f"{told} ({certainty(gain, exact)})."


def certainty(gain: Gain, exact: bool = True) -> str:
    """`95 % interval +0.4 to +2.8, 8 pairs, exact p = 0.016`; of at least 2 pairs."""
    p = f", exact {p_in_words(gain.p)}" if exact and gain.p is not None else ""
    return f"{_told_by(gain)}, {gain.n} pairs{_from_these(gain)}{p}"


def _told_by(gain: Gain) -> str:
    """The interval of the verdict: `95 % interval +0.4 to +2.8 over 4 pretrainings`."""
    shared, interval = gain.differences, gain.interval
    assert interval is not None  # of 2 pairs there is one
    over = ""
    if isinstance(shared, Shared) and not shared.is_of_few:
        number = f"{shared.num_starts} pretrainings"
        over = f" over {number}" if shared.by_start else f" over pairs, wider than over their {number}"
    return f"{span(interval)}{over}"


def _from_these(gain: Gain) -> str:
    """` from these 2 pretrainings`, of which alone the interval then is."""
    shared = gain.differences
    if not isinstance(shared, Shared) or not shared.is_of_few:
        return ""
    return " from this one pretraining" if shared.num_starts == 1 else f" from these {shared.num_starts} pretrainings"


def _sentence_of(found: Comparison, gain: Gain, exact: bool = True) -> str:
    """`sentence`, and where there are several conditions how many tell a gain, a loss or nothing."""
    told = sentence(gain, gain.arm.label, found.over, found.shows_pretraining(gain.arm), exact)
    averaged = _averaged(found, len(gain.conditions))
    if not averaged:
        return told
    counts = Counter(verdict(own) for own in found.gains if own.arm is gain.arm)
    words = ", ".join(f"{word} {counts[kind]}" for kind, word in VERDICTS.items() if counts[kind])
    return f"{told[:-1]},{averaged}: {words}."


def _averaged(found: Comparison, number: int | None) -> str:
    """` on average over 4 conditions`; nothing where there is but one. None: the arms have different ones."""
    every = len(found.conditions)
    if every == 1:
        return ""
    if number is None:
        return " on average over the conditions of each"
    return f" on average over {number if number == every else f'{number} of {every}'} conditions"


def _why_alone(found: Comparison, arm: Arm, gains: Sequence[Gain]) -> str:
    """Why an arm has no gain; nothing where it has one, or is none that should."""
    if any(gain.arm is arm for gain in gains) or arm in found.bases:
        return ""
    if isinstance(found, Study):
        return f"{arm.label}: no seed has a pair with {found.over} under all of its conditions."
    if arm.stage != "finetune" or arm.spread(found.main_score) is None:
        return ""
    return f"{arm.label}: no run from scratch has the same settings and seeds, so no gain can be told."


# ---- several gains ----


def _of_many(found: Comparison, gains: Sequence[Gain]) -> str:
    """Of several comparisons none is picked out: the best of many would look good by chance alone."""
    counts = Counter(map(verdict, gains))
    means = _means_of(found, gains)
    if counts["few"] == len(gains):
        return f"Too few runs to tell in any of {len(gains)} comparisons with {found.over}: {means}."
    if counts["gain"] + counts["loss"] == 0:
        return f"No gain can be told in any of {len(gains)} comparisons with {found.over}: {means}."
    subject = "pretraining" if all(found.shows_pretraining(gain.arm) for gain in gains) else "the other arms"
    return f"{_counted(counts, found.over, subject)}: {means}.{_corrected(gains)}"


def _means_of(found: Comparison, gains: Sequence[Gain]) -> str:
    numbers = {len(gain.conditions) for gain in gains}
    unit = f"points of mIoU{_averaged(found, numbers.pop() if len(numbers) == 1 else None)}"
    sizes = sorted({gain.n for gain in gains})
    number = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    pairs = f"{number} pairs each{_from_only(gains)}"
    if len(gains) > NAMED:
        means = [gain.mean for gain in gains]
        return f"mean differences from {points(min(means))} to {points(max(means))} {unit}, {pairs}"
    told = [f"; {_told_by(gain)}" if gain.n >= MIN_PAIRS else "" for gain in gains]
    each = [f"{points(gain.mean)} ({gain.arm.label}{by})" for gain, by in zip(gains, told, strict=True)]
    return f"{' and '.join(each)} {unit}, {pairs}"


def _from_only(gains: Sequence[Gain]) -> str:
    """`, some from only 1 or 2 pretrainings`; nothing where no comparison is about so few."""
    shared = [gain.differences for gain in gains if isinstance(gain.differences, Shared)]
    numbers = [own.num_starts for own in shared if own.is_of_few]
    if not numbers:
        return ""
    some = "" if len(numbers) == len(gains) else "some "
    listed = " or ".join(map(str, sorted(set(numbers))))
    return f", {some}from only {listed} pretraining{'s' * (max(numbers) > 1)}"


def _counted(counts: Mapping[str, int], base: str, subject: str) -> str:
    """How many comparisons told a gain or a loss; some did."""
    total = sum(counts.values())
    if counts["gain"] == total:
        return f"{begun(subject)} gave a gain over {base} in {all_of(total)} comparisons"
    if counts["loss"] == total:
        return f"{begun(subject)} lost against {base} in {all_of(total)} comparisons"
    words = [
        f"{verb} {counts[kind]}" for kind, verb in (("gain", "gave a gain in"), ("loss", "lost in")) if counts[kind]
    ]
    words[0] += f" of {total} comparisons"
    open_ones = counts["none"] + counts["few"]
    words += [f"and in {open_ones} nothing can be told"] * (open_ones > 0)
    return f"Against {base}, {subject} {', '.join(words)}"


def stand(gains: Sequence[Gain]) -> list[bool]:
    """Which of several comparisons tell a gain or a loss that stands when they are corrected for their number."""
    compared = [gain for gain in gains if gain.n >= MIN_PAIRS]
    exact = all(_exact_can_stand(gain, len(compared)) for gain in compared)
    p_values = {gain: gain.p if exact else t_test_p(gain.independent) for gain in compared}
    adjusted = holm_where_known([p_values.get(gain) for gain in gains])
    small = [p is not None and p <= 1 - gain.level for gain, p in zip(gains, adjusted, strict=True)]
    return [is_small and verdict(gain) in TOLD for gain, is_small in zip(gains, small, strict=True)]


def _exact_can_stand(gain: Gain, comparisons: int) -> bool:
    """Whether the least p that its pairs can have is small enough for so many comparisons."""
    return gain.p is not None and 2 / 2 ** len(gain.independent) * comparisons <= 1 - gain.level


def _corrected(gains: Sequence[Gain]) -> str:
    """What of the gains and losses stands when all comparisons are corrected for their number."""
    compared = sum(gain.n >= MIN_PAIRS for gain in gains)
    told = sum(verdict(gain) in TOLD for gain in gains)
    if compared == 1 or told == 0:
        return ""
    left = sum(stand(gains))
    if told == 1:
        stands = "it stands" if left else "it does not stand"
    elif left == told:
        stands = f"{all_of(left)} stand"
    else:
        stands = {0: "none stands", 1: "1 of these stands"}.get(left, f"{left} of these stand")
    return f" Corrected for {compared} comparisons, {stands}."


# ---- what the first sentence is to be read with ----


def _below(found: Comparison) -> tuple[str, ...]:
    """On which images it was measured, what the baseline reaches, and in a study what is to be known of its gains."""
    scored = [outcome for outcome in found.outcomes if found.main_score in outcome.scores]
    told = [_measured_on(found.part, scored)] if scored else []
    bases = {found.baselines[gain.arm] for gain in found.gains} or set(found.bases)
    if len(bases) == len(found.conditions) == 1:
        reached = bases.pop().spread(found.main_score, *found.conditions)
        name = found.over if isinstance(found, Study) else f"From {found.over}"
        told += [f"{name}: {percent(reached)} % mIoU."] if reached is not None else []
    told += [] if isinstance(found, Study) and found.contrasts else _corrected_in_each(found)
    told += cautions(found) if isinstance(found, Study) else ()
    return tuple(told)


def _measured_on(part: str, scored: Sequence[Outcome]) -> str:
    """On how many images the `part` of these runs was scored, and what is to be known of them."""
    runs = [outcome.run for outcome in scored if outcome.run is not None]
    counts = sorted({count for run in runs if (count := images_of(run).get(part)) is not None})
    number = "" if not counts else f"{counts[0]:,} " if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} "
    chosen = part == "val" and any(map(_chose_its_step, runs))
    caution = " They also chose the step whose weights are scored, so the scores are on the bright side."
    return f"Measured on {number}{PARTS.get(part, part)}.{caution if chosen else ''}"


def _chose_its_step(run: RunFolder) -> bool:
    """Whether the weights are those of the best of several evaluations."""
    return run.config.get("select") == "best" and bool(run.config.get("train", {}).get("eval_every"))


def _corrected_in_each(found: Comparison) -> list[str]:
    """What of all single comparisons stands, where the conditions make more of them than there are arms."""
    compared = sum(gain.n >= MIN_PAIRS for gain in found.gains)
    told = sum(verdict(gain) in TOLD for gain in found.gains)
    if len(found.conditions) == 1 or not told or compared < 2:
        return []
    left = sum(stand(found.gains))
    return [
        f"Arm by arm and condition by condition, corrected for all {compared} comparisons, {left} of the {told} told "
        f"{'stands' if left == 1 else 'stand'}."
    ]


# ---- without a gain ----


def _of_study_without_gains(study: Study) -> Answer:
    if study.gains:
        headline = f"No answer yet: no seed has a pair with {study.over} under all conditions ({states(study)})."
    elif study.apart:
        headline = f"No answer: no cell is a pair with one of {study.over}; {study.apart[0]}."
    elif any(cell.scores for cell in study.cells):
        headline = f"No answer yet: no seed has finished both an arm and {study.over} ({states(study)})."
    else:
        headline = f"No answer yet: no cell has a score ({states(study)})."
    return Answer(headline, _below(study))


def states(study: Study) -> str:
    """`of 12 cells 3 finished, 9 waiting`."""
    counts = Counter(map(state_of, study.cells))
    return f"of {count_of(len(study.cells), 'cell')} {', '.join(f'{count} {state}' for state, count in counts.items())}"


def state_of(cell: Outcome) -> str:
    return "finished without a score" if cell.status == "finished" and not cell.scores else cell.status


def _of_runs_without_gains(found: Comparison) -> Answer:
    """What one arm reaches, or that several cannot be told apart by a baseline."""
    score = found.main_score
    if all(outcome.name in found.unfinished for outcome in found.outcomes):
        return Answer(f"No answer yet: {_unfinished_in_words(found)}.")
    if score is None:
        return _of_pretrainings(found)
    scored = {arm: spread for arm in found.arms if (spread := arm.spread(score)) is not None}
    below = (_measured_on(found.part, [outcome for arm in scored for outcome in arm.outcomes]),)
    if len(scored) == 1:
        ((arm, spread),) = scored.items()
        over = f", mean of {spread.n} runs" if spread.n > 1 else ""
        return Answer(f"mIoU {percent(spread)} %{over}{_best_and_worst(arm, found.part)}.", below)
    if len(found.tables) > 1:
        apart = "and the scores do not all mean the same (see below), so none is the highest."
        return Answer(f"No gain can be told: there are no runs from scratch to pair with, {apart}", below)
    best = max(scored, key=lambda arm: scored[arm].mean)
    headline = (
        "No gain can be told: there are no runs from scratch with the same settings and seeds. "
        f"The highest mean mIoU is {percent(scored[best])} % ({best.label}, n = {scored[best].n})."
    )
    return Answer(headline, below)


def _unfinished_in_words(found: Comparison) -> str:
    runs = [run for arm in found.arms for run in arm.runs]
    if len(runs) == 1:
        return f"the run is {state(runs[0])}"
    counts = Counter(run.status for run in runs)
    known = ("running", "killed", "failed", "finished")
    return f"of {len(runs)} runs " + ", ".join(f"{counts[status]} {status}" for status in known if counts[status])


def _best_and_worst(arm: Arm, part: str) -> str:
    prefix = f"{part}/iou/"
    names = dict.fromkeys(name for outcome in arm.outcomes for name in outcome.scores if name.startswith(prefix))
    means = {name.removeprefix(prefix): spread.mean for name, spread in _spreads(arm, names)}
    if len(means) < 2:
        return ""
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    at_zero = sum(value == 0 for value in means.values())
    others = f" (like {count_of(at_zero - 1, 'other')})" if at_zero > 1 else ""
    return f": best class {best} with {100 * means[best]:.1f}, worst {worst} with {100 * means[worst]:.1f}{others}"


def _spreads(arm: Arm, names: Iterable[str]) -> Iterator[tuple[str, Spread]]:
    for name in names:
        spread = arm.spread(name)
        if spread is not None:
            yield name, spread


def _of_pretrainings(found: Comparison) -> Answer:
    """What each task reaches on held-out images."""
    told = [(arm.label, _reached(arm)) for arm in found.arms]
    if not any(words for _, words in told):
        return Answer("Nothing was scored: the runs had no labelled or held-out images (data.val).")
    runs = [run for arm in found.arms for run in arm.runs]
    counts = sorted({images_of(run)["val"] for run in runs if "val" in images_of(run)})
    steps = sorted({number for run in runs if (number := (run.result or {}).get("steps"))})
    after = f" after {steps[0]:,} steps" if len(steps) == 1 else ""
    held_out = f"{counts[0]:,} held-out images" if len(counts) == 1 else "held-out images"
    if len(told) == 1:
        return Answer(f"On {held_out}{after}: {told[0][1]}.")
    single = tuple((label, f"{label}: {words or 'nothing was held out'}.") for label, words in told)
    return Answer(f"{len(told)} kinds of pretraining on {held_out}{after}; what each task reaches:", (), single)


def _reached(arm: Arm) -> str:
    """`denoise PSNR 23.7 dB, ...`: of each task the foremost figure."""
    names = dict.fromkeys(name for outcome in arm.outcomes for name in outcome.scores)
    means = {name: spread.mean for name, spread in _spreads(arm, foremost(names))}
    words = [f"{spoken(name.removeprefix('val/'))} {in_unit(name, value)}" for name, value in means.items()]
    number = f" (means of {len(arm.outcomes)} runs)" if len(arm.outcomes) > 1 and words else ""
    return ", ".join(words) + number
