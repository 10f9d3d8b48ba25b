"""Which pretext task earned what: the gain of all of them shared out, from a study of every choice of them (`subsets`).

The value of a choice of tasks is the mIoU of the encoder that was pretrained with it; that of none is the mIoU from
scratch. A task's share is its Shapley value (1953): what it adds to the tasks before it, as a mean over all orders in
which they may come. The shares add up to all less none.

What a pair adds is its Shapley-Taylor index of order 2 (Sundararajan, Dhamdhere and Agarwal 2020): how much more the
two give beside each other than each without the other, as a mean over the tasks before the first of them. Of the known
indices we take this one since it explains the shares: a task's share is what it gives alone and half of what each of
its pairs adds, and all that is given alone and added by pairs is all less none. With Grabisch and Roubens' (1999)
neither holds.

All of them are sums of differences, so each seed has a share of its own, and intervals and p go over these as over any
paired gain. Sums are made of fractions: nothing is lost to rounding before a figure is written. Ours, since of a few
tasks they are two sums over a table; the packages that have them (shapiq, shap) approximate them for many.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, combinations
from math import comb
from typing import Any

from ssl_seg.evidence.comparison import Arm, Comparison, Condition, Gain, Outcome, condition_text
from ssl_seg.evidence.pairs import of_starts
from ssl_seg.evidence.statistics import holm_where_known

Choice = frozenset[str]  # of tasks
Values = Mapping[Choice, Fraction]  # of every choice


def shares(values: Values) -> dict[Choice, Fraction]:
    """The Shapley value of each task."""
    tasks = _all_of(values)
    found = {}
    for task in tasks:
        own, others = frozenset({task}), tasks - {task}
        # As often do just these come before it, over all orders.
        terms = [_gain(values, before, own) / (len(tasks) * comb(len(others), len(before))) for before in _any(others)]
        found[own] = sum(terms, Fraction(0))
    return found


def extras(values: Values) -> dict[Choice, Fraction]:
    """What each pair of tasks adds: the Shapley-Taylor index of order 2."""
    tasks = _all_of(values)
    found = {}
    for one, other in combinations(sorted(tasks), 2):
        first, second = frozenset({one}), frozenset({other})
        terms = []
        for before in _any(tasks - first - second):
            more = _gain(values, before | second, first) - _gain(values, before, first)
            terms.append(more * Fraction(2, len(tasks) * comb(len(tasks) - 1, len(before))))
        found[first | second] = sum(terms, Fraction(0))
    return found


def _gain(values: Values, before: Choice, own: Choice) -> Fraction:
    return values[before | own] - values[before]


def _all_of(values: Iterable[Choice]) -> Choice:
    return frozenset(chain.from_iterable(values))


def _any(tasks: Choice) -> Iterator[Choice]:
    """Every choice of tasks, few first."""
    for size in range(len(tasks) + 1):
        yield from map(frozenset, combinations(sorted(tasks), size))


# ---- of a study ----


@dataclass(frozen=True, eq=False, kw_only=True)
class Entry(Gain):
    """What some tasks earned under one condition, a value a seed; `arm` is that with these tasks and no others."""

    tasks: tuple[str, ...]
    num_weights: int  # different pretrainings of an arm, behind the seeds
    p_holm: float | None = None  # `p` adjusted for all shares and pairs that have one

    @property
    def name(self) -> str:
        return " + ".join(self.tasks)


@dataclass(frozen=True, eq=False)
class Ledger:
    """Who earned what under one condition. Without a complete seed it has no entries."""

    condition: Condition
    num_choices: int
    missing: Mapping[Hashable, tuple[str, ...]]  # the seeds left out, each with the arms that it has no score of
    shares: tuple[Entry, ...] = ()  # Shapley values; they add up to `whole`
    alone: tuple[Entry, ...] = ()  # what each task gives without the others
    extras: tuple[Entry, ...] = ()  # what each pair adds
    whole: Entry | None = None  # all less none


def ledgers(found: Comparison) -> tuple[Ledger, ...]:
    """One for each condition; none for a study without `subsets`."""
    arms = {frozenset(arm.tasks): arm for arm in found.arms if arm.tasks is not None}
    tasks = tuple(dict.fromkeys(task for arm in arms.values() for task in arm.tasks or ()))
    if not tasks:
        return ()
    listed = [_ledger(found, tasks, arms, condition) for condition in found.conditions]
    entries = [entry for own in listed for entry in (*own.shares, *own.extras)]
    adjusted = iter(holm_where_known([entry.p for entry in entries]))

    def corrected(entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return tuple(replace(entry, p_holm=next(adjusted)) for entry in entries)

    return tuple(replace(own, shares=corrected(own.shares), extras=corrected(own.extras)) for own in listed)


def _ledger(found: Comparison, tasks: tuple[str, ...], arms: Mapping[Choice, Arm], condition: Condition) -> Ledger:
    score = found.main_score
    choices = list(_any(frozenset(tasks)))
    cells = {choice: _scored(arms.get(choice), score, condition) for choice in choices}
    seeds = list(dict.fromkeys(cell.pair for arm in arms.values() for cell in arm.at(condition)))
    lacking = {seed: [choice for choice in choices if seed not in cells[choice]] for seed in seeds}
    missing = {seed: tuple(_named(choice, arms) for choice in own) for seed, own in lacking.items() if own}
    complete = [seed for seed in seeds if seed not in missing]
    ledger = Ledger(condition, len(choices), missing)
    if not complete or score is None:
        return ledger
    values = [{choice: Fraction(cells[choice][seed].scores[score]) for choice in choices} for seed in complete]
    starts = [" ".join(str(cells[choice][seed].weights) for choice in choices) for seed in complete]
    whole = frozenset(tasks)

    def entry(choice: Choice, earned: Sequence[Fraction]) -> Entry:
        return Entry(
            arms[choice],
            score,
            of_starts([float(value) for value in earned], starts, found.level),
            (condition,),
            found.level,
            tasks=tuple(task for task in tasks if task in choice),
            num_weights=len(set(starts)),
        )

    def entries(of_seeds: Sequence[Mapping[Choice, Fraction]]) -> tuple[Entry, ...]:
        listed = sorted(of_seeds[0], key=lambda choice: sorted(map(tasks.index, choice)))
        return tuple(entry(choice, [own[choice] for own in of_seeds]) for choice in listed)

    none = frozenset()
    alone = [{frozenset({task}): _gain(own, none, frozenset({task})) for task in tasks} for own in values]
    return replace(
        ledger,
        shares=entries([shares(own) for own in values]),
        alone=entries(alone),
        extras=entries([extras(own) for own in values]),
        whole=entry(whole, [_gain(own, none, whole) for own in values]),
    )


def _scored(arm: Arm | None, score: str | None, condition: Condition) -> dict[Hashable, Outcome]:
    """The cells of an arm that have the score, by their seeds."""
    cells = () if arm is None else arm.at(condition)
    return {cell.pair: cell for cell in cells if score in cell.scores and not cell.apart}


def _named(choice: Choice, arms: Mapping[Choice, Arm]) -> str:
    return arms[choice].label if choice in arms else "+".join(sorted(choice))


def notes(ledger: Ledger) -> Iterator[str]:
    """A line for what it lacks."""
    under = f"under {condition_text(ledger.condition)}: " if ledger.condition else ""
    if ledger.whole is None:
        seed, lacking = min(ledger.missing.items(), key=lambda own: len(own[1]))
        yield (
            f"no ledger of tasks: {under}no seed has all {ledger.num_choices} arms; seed {seed}, the most complete, "
            f"lacks {', '.join(lacking)}: give the study's command again"
        )
        return
    for seed, lacking in ledger.missing.items():
        yield f"{under}seed {seed} is left out of the ledger of tasks: it lacks {', '.join(lacking)}"


# ---- as a table ----


def rows(found: Comparison) -> list[dict[str, Any]]:
    """Of ledger.csv, in shares of 1: `share` and `alone` a row for each task, `pair` for each pair, `all`."""
    return [
        _row(what, entry)
        for ledger in ledgers(found)
        if ledger.whole is not None
        for what, listed in (
            ("share", ledger.shares),
            ("alone", ledger.alone),
            ("pair", ledger.extras),
            ("all", (ledger.whole,)),
        )
        for entry in listed
    ]


def _row(what: str, entry: Entry) -> dict[str, Any]:
    interval = entry.interval
    row: dict[str, Any] = {"what": what, "tasks": "+".join(entry.tasks), **dict(entry.conditions[0]), "n": entry.n}
    row |= {"gain": entry.mean, "gain_sd": entry.differences.sd}
    row |= {"low": interval and interval.low, "high": interval and interval.high}
    row |= {"independent": len(entry.independent), "pretrainings": entry.num_weights}
    return {**row, "p": entry.p, "p_holm": entry.p_holm}
