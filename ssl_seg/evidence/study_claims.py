"""What a study has found, in one sentence: the gain of each arm over the baseline, by the rules of `answers`.

Ours is what several conditions ask for: one comparison an arm, its mean over all of them, so that no condition is
picked out; and how many of them show the same by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean

from ssl_seg.evidence.claims import (
    MIN_PAIRS,
    TOLD,
    Answer,
    count_of,
    left_open,
    measured_on,
    of_many,
    percent,
    sentence,
    stand,
    verdict,
)
from ssl_seg.evidence.pairs import MIN_STARTS, Shared, Spread, of_starts, software_in_words
from ssl_seg.evidence.passport import differing, passports_in
from ssl_seg.evidence.results import CellFound, Findings

OF_CONDITIONS = (
    "Of a study with several conditions the first sentence tells the mean gain over all of them, seed by seed: one "
    "comparison an arm, whatever the number of conditions. Seeds that lack a pair under some condition are left out of "
    "it. It speaks of the conditions of this study alone."
)
VERDICTS = {"gain": "a gain in", "loss": "a loss in", "none": "nothing to tell in", "few": "too few pairs in"}


def answer(found: Findings) -> Answer:
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
    told += _corrected(found)
    told += of_shared_starts(found)
    told += _other_seeds(found)
    told += _of_pools(done)
    told += _of_passports(done)
    told += _of_software(found)
    told += _of_apart(found)
    return tuple(told)


def _corrected(found: Findings) -> list[str]:
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
