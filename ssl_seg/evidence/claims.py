"""What runs have shown, in one sentence: whether pretraining helped, or what was reached where nothing can be told.

The rules are few and stand in RULES, to be shown with the sentence. A null result is told as plainly as a gain, and of
several comparisons none is picked out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from ssl_seg.evidence.compare import SCRATCH, Comparison, Group
from ssl_seg.evidence.formatting import (
    PARTS,
    _all_of,
    _begun,
    _in_unit,
    _range,
    count_of,
    foremost,
    images_of,
    p_in_words,
    percent,
    points,
    span,
    spoken,
    state,
)
from ssl_seg.evidence.pairs import MIN_STARTS, Shared, Spread, independent, of_starts, over_starts, software_in_words
from ssl_seg.evidence.passport import differing, passports_in
from ssl_seg.evidence.results import CellFound, Findings
from ssl_seg.evidence.statistics import MAX_NEEDED, detectable, holm, pairs_needed, sign_flip_p, t_interval, t_test_p
from ssl_seg.runs.folder import RunFolder

MIN_PAIRS = 3  # two pairs would have an interval of 12.7 standard errors to each side
NAMED = 2  # comparisons that the headline tells one by one; more are counted
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
OF_CONDITIONS = (
    "Of a study with several conditions the first sentence tells the mean gain over all of them, seed by seed: one "
    "comparison an arm, whatever the number of conditions. Seeds that lack a pair under some condition are left out of "
    "it. It speaks of the conditions of this study alone."
)
VERDICTS = {"gain": "a gain in", "loss": "a loss in", "none": "nothing to tell in", "few": "too few pairs in"}


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


def _unfinished_in_words(runs: Sequence[RunFolder]) -> str:
    if len(runs) == 1:
        return f"the run is {state(runs[0])}"
    counts = {
        status: sum(run.status == status for run in runs) for status in ("running", "killed", "failed", "finished")
    }
    return f"of {len(runs)} runs " + ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def answer_of_study(found: Findings) -> Answer:
    """The sentence on top, and one for each arm where there are several.

    Under several conditions an arm's gain is its mean over them: so each arm is one comparison, and no condition is
    picked out.
    """
    told = [(arm, *own) for arm in found.arms if (own := over_conditions(found, arm)) is not None]
    if not told:
        return Answer(_no_answer(found), _below(found))
    base = found.baseline
    single = [
        (arm, f"{sentence(gain, arm, base, _shows_pretraining(found, arm))[:-1]}{_in_each(found, arm, number)}.")
        for arm, gain, number in told
    ]
    names = [arm for arm, *_ in told]
    alone = [arm for arm in found.arms if arm not in (base, *names)]
    single += [(arm, f"{arm}: no seed has a pair with {base} under all of its conditions.") for arm in alone]
    headline = single[0][1]
    if len(told) > 1:
        subject = "pretraining" if all(_shows_pretraining(found, arm) for arm in names) else "the other arms"
        numbers = {number for *_, number in told}
        over = _averaged(found, numbers.pop() if len(numbers) == 1 else None)
        headline = of_many([(arm, gain) for arm, gain, _ in told], base, subject, f"points of mIoU{over}")
    below = (*_below(found), *left_open(gain for _, gain, _ in told))
    return Answer(headline, below, tuple(single) if len(single) > 1 else (), has_gains=True)


def over_conditions(found: Findings, arm: str) -> tuple[Spread, int] | None:
    """An arm's gain as its mean over the conditions, a value a seed, and how many conditions have pairs.

    None without a seed that has a pair under all of these.
    """
    gains = [gain for gain in found.gains if gain.arm == arm]
    by_seed = [dict(zip(gain.seeds, gain.gains.values, strict=True)) for gain in gains]
    common = [seed for seed in (by_seed[0] if by_seed else ()) if all(seed in own for own in by_seed)]
    if not common:
        return None
    values = [mean(own[seed] for own in by_seed) for seed in common]
    starts = [dict(zip(gain.seeds, gain.starts, strict=True)) for gain in gains]
    return of_starts(values, [" ".join(own[seed] for own in starts) for seed in common]), len(gains)


def _averaged(found: Findings, number: int | None) -> str:
    """` on average over 4 conditions`; nothing where the study has but one. None: the arms have different ones."""
    every = len(found.conditions)
    if every == 1:
        return ""
    if number is None:
        return " on average over the conditions of each"
    return f" on average over {number if number == every else f'{number} of {every}'} conditions"


def _in_each(found: Findings, arm: str, number: int) -> str:
    """`, on average over 4 conditions: a gain in 3, nothing to tell in 1`; nothing where the study has but one."""
    averaged = _averaged(found, number)
    if not averaged:
        return ""
    counts = Counter(verdict(gain.gains) for gain in found.gains if gain.arm == arm)
    words = ", ".join(f"{word} {counts[kind]}" for kind, word in VERDICTS.items() if counts[kind])
    return f",{averaged}: {words}"


def _no_answer(found: Findings) -> str:
    if found.gains:
        return f"No answer yet: no seed has a pair with {found.baseline} under all conditions ({states(found)})."
    if found.apart:
        return f"No answer: no cell is a pair with one of {found.baseline}; {found.apart[0]}."
    if any(cell.scores for cell in found.cells):
        return f"No answer yet: no seed has finished both an arm and {found.baseline} ({states(found)})."
    return f"No answer yet: no cell has a score ({states(found)})."


def states(found: Findings) -> str:
    """`of 12 cells 3 finished, 9 waiting`."""
    counts = Counter(state_of(cell) for cell in found.cells)
    return f"of {count_of(len(found.cells), 'cell')} {', '.join(f'{count} {state}' for state, count in counts.items())}"


def state_of(cell: CellFound) -> str:
    return "finished without a score" if cell.status == "finished" and not cell.scores else cell.status


def _below(found: Findings) -> tuple[str, ...]:
    """What the first sentence is to be read with."""
    done = [cell for cell in found.cells if cell.scores]
    told = [measured_on(found.part, [cell.run for cell in done])] if done else []
    if len(found.conditions) == 1 and found.spread(found.baseline, found.conditions[0]) is not None:
        told.append(f"{found.baseline}: {percent(found.spread(found.baseline, found.conditions[0]))} % mIoU.")
    told += _corrected_in_each(found)
    told += of_shared_starts(found)
    told += _other_seeds(found)
    told += _of_pools(done)
    told += _of_passports(done)
    told += _of_software(found)
    told += _of_apart(found)
    return tuple(told)


def _corrected_in_each(found: Findings) -> list[str]:
    """What of all single comparisons stands, where the conditions make more of them than there are arms."""
    gains = [gain.gains for gain in found.gains]
    compared = sum(gain.n >= MIN_PAIRS for gain in gains)
    told = sum(verdict(gain) in TOLD for gain in gains)
    if len(found.conditions) == 1 or not told or compared < 2:
        return []
    left = sum(stand(gains))
    return [
        f"Arm by arm and condition by condition, corrected for all {compared} comparisons, {left} of the {told} told "
        f"{'stands' if left == 1 else 'stand'}."
    ]


def of_shared_starts(found: Findings) -> list[str]:
    """The word on arms whose pairs share pretrainings, a sentence for each number of these."""
    fewest: dict[str, int] = {}
    for gain in found.gains:
        own = gain.gains
        if isinstance(own, Shared):
            fewest[gain.arm] = min(own.num_starts, fewest.get(gain.arm, own.num_starts))
    arms: dict[int, list[str]] = {}
    for arm, number in fewest.items():
        arms.setdefault(number, []).append(arm)
    return [_of_starts(number, " and of ".join(arms[number])) for number in sorted(arms)]


def _of_starts(number: int, arms: str) -> str:
    if number == 1:
        return (
            f"All pairs of {arms} start from one pretraining: what another pretraining would give lies outside of the "
            "intervals."
        )
    shared = f"The pairs of {arms} start from {number} pretrainings, and pairs that share one are not independent: "
    if number < MIN_STARTS:
        return f"{shared}intervals and p are about these pretrainings only."
    return (
        f"{shared}a gain or a loss is told by the interval over the means of each pretraining, and p is made of these "
        "means; the other intervals are about these pretrainings only."
    )


def _other_seeds(found: Findings) -> list[str]:
    """A word where seeds came, or went, after results with others had been there to look at."""
    now = found.record["seeds"]
    resumed = [own for own in found.record.get("resumed", ()) if isinstance(own, Mapping)]
    before = [own.get("seeds") for own in resumed]
    lists = [own for own in before if isinstance(own, list)]
    least = min([own for own in before if isinstance(own, int)] + [len(own) for own in lists], default=len(now))
    told = []
    if least < len(now):
        told.append(
            f"Seeds were added after an earlier end (there had been {least}): where that is done until something can "
            "be told, something false is told more often than 5 times in 100."
        )
    gone = [seed for seed in dict.fromkeys(seed for own in lists for seed in own) if seed not in now]
    if gone:
        named = ", ".join(map(str, gone))
        told.append(
            f"CAUTION: seeds of an earlier start were left out ({named}); what is told without them holds only if that "
            "was not done for their results."
        )
    return told


def _of_passports(done: Sequence[CellFound]) -> list[str]:
    """A word where the cells' scores do not mean the same."""
    passports = [passports_in(cell.run.result or {}) for cell in done]
    told = dict.fromkeys(field for own in passports for field in differing(passports[0], own))
    if not told:
        return []
    return [f"CAUTION: the scores of these cells do not mean the same ({'; '.join(told)}); make the study anew."]


def _of_pools(done: Sequence[CellFound]) -> list[str]:
    """A word where the pretrainings of an arm did not read the same images."""
    pools: dict[str, set[str]] = {}
    for cell in done:
        pools.setdefault(cell.arm, set()).add((cell.run.record.get("origin") or {}).get("pool", ""))
    arms = " and ".join(arm for arm, own in pools.items() if len(own - {""}) > 1)
    return [f"CAUTION: the pretrainings of {arms} did not read the same images; make the study anew."] * bool(arms)


def _of_apart(found: Findings) -> list[str]:
    """A word on the cells that are no pair."""
    if not found.apart:
        return []
    more = f", and {len(found.apart) - 1} more" if len(found.apart) > 1 else ""
    return [f"CAUTION: cells that are no pair are left out of every gain: {found.apart[0]}{more}."]


def _of_software(found: Findings) -> list[str]:
    """A word where the two cells of a pair were not made with the same."""
    pairs = [found.pairs(gain.arm, gain.condition).other_software(gain.score) for gain in found.gains]
    told = software_in_words(pairs)
    if not told:
        return []
    return [f"CAUTION: paired cells were not all made with the same ({told}); a gain may come from that."]


def _shows_pretraining(found: Findings, arm: str) -> bool:
    """Whether its gain is one of pretraining; over a baseline that is pretrained too it is one of something else."""
    return found.is_pretrained(arm) and not found.is_pretrained(found.baseline)
