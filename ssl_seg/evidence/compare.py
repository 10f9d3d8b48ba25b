"""Runs side by side: arms whose runs differ in seeds alone, their scores with spread, and only the keys that differ.

Fine-tunings are paired with those from scratch that had the same seeds and labelled images. Scores of different
passports (another definition, other images) are never ranked together: they stand in tables of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_seg.config import UserError
from ssl_seg.evidence.comparison import SCRATCH, Arm, Comparison, Outcome, labels_of
from ssl_seg.evidence.passport import definition_of, differing, passports_in
from ssl_seg.runs.folder import (
    RunFolder,
    description_of,
    find_runs,
    labelled_digest,
    leak_word,
    scores_of,
    transfer_in_words,
)

SEEDS = ("seed", "labels.seed")  # keys that only draw random numbers: runs that differ in them are one arm
# By which no weight and no score comes out differently: runs on different machines may be one arm.
IDLE = (
    "train.workers",
    "train.worker_timeout",
    "train.process_timeout",
    "train.log_every",
    "train.save_every",
    "workers",
    "worker_timeout",
    "averages",
)
TIMM = "model.encoder.pretrained"
# What a fine-tuning from scratch has otherwise than its pretrained twin.
STARTS = ("init", "init_allow", "transfer", TIMM)
KEYS_TOLD = 4  # of those in which an arm differs from the runs from scratch
SEED_IN_NAME = re.compile(r"[_\-. ]*(?:p|s|seed)?[_\-. ]*[0-9]+$")  # of pretrained_0, four_p1, run-seed2
# Of images, for an interval at a glance: its ends then move by 3 % of its width from seed to seed, and 500 runs take
# seconds. A study's own tables take more.
RESAMPLES = 2_000


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Compare the runs in `folders`; a folder without a run.json stands for the runs in it. None counts twice.

    Raises UserError for one that neither is nor holds a run, and where no run has a result yet.
    """
    found = find_runs(folders)
    unfinished = [str(run.folder) for run in found if not run.is_done]
    return group([_outcome_of(run) for run in found if run.is_done], unfinished)


def group(outcomes: Sequence[Outcome], unfinished: Sequence[str] = ()) -> Comparison:
    """Those that differ in their seeds alone as one arm: pretrainings first, then what is from scratch, then the rest.

    Raises UserError where there is nothing to compare.
    """
    if not outcomes:
        first = unfinished[0] if unfinished else "compare"
        raise UserError(f"{first}: has no result yet; finish it by the command that started it")
    members: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        members.setdefault(_kind(outcome), []).append(outcome)
    kinds = sorted(members.values(), key=lambda own: (_is_finetuned(own[0]), not _is_scratch(own)))
    differing = _differing([(own[0].stage, own[0].settings) for own in kinds])
    starts = tuple(", ".join(dict.fromkeys(run.start for run in own if run.start)) or None for own in kinds)
    if len(set(starts)) > 1:
        differing = {"init": starts, **{key: values for key, values in differing.items() if key != "init"}}
    labels = _labels(kinds, differing)
    arms = tuple(Arm(label, tuple(own), _is_scratch(own)) for label, own in zip(labels, kinds, strict=True))
    tables, baselines = _tables(arms), _baselines(arms)
    return Comparison(
        arms=arms,
        baselines=baselines,
        tables=tables,
        bases=tuple(arm for arm in arms if arm.from_scratch),
        resamples=RESAMPLES,
        differing=differing,
        apart=(*_apart(arms, tables), *_without_baseline(arms, baselines)),
        unfinished=tuple(unfinished),
    )


def ungrouped(runs: Sequence[RunFolder]) -> Comparison:
    """Runs of which none has a result yet, each an arm of its own without a score."""
    outcomes = [Outcome(str(run.folder), run.stage, None, {}, status=run.status, run=run) for run in runs]
    arms = tuple(Arm(run.name, (outcome,)) for run, outcome in zip(runs, outcomes, strict=True))
    return Comparison(arms, {}, (arms,), unfinished=tuple(outcome.name for outcome in outcomes))


def _outcome_of(run: RunFolder) -> Outcome:
    result = run.result or {}
    return outcome(
        str(run.folder),
        run.stage,
        description_of(run.record),
        scores_of(result),
        passports=passports_in(result),
        labelled=labelled_digest(run.read("split.json")),
        leaks=leak_word(run.read("leaks.json")),
        held_out=(run.read("data.json") or {}).get("val", {}).get("sha256_of_names", ""),
        run=run,
    )


def outcome(
    name: str, stage: str, description: Mapping[str, str], scores: Mapping[str, float], labelled: str = "", **known: Any
) -> Outcome:
    """A finished run from what `folder.description_of` says of it, with what else is `known` of it.

    Its settings are the keys that tell arms apart: dotted, with their values as text. Those of the run that it started
    from are under `init.`.
    """
    seeds = sorted((key, description[key]) for key in SEEDS if key in description)
    init = Path(os.path.expanduser(description.get("init", "null"))).resolve()  # `~`, and a stranger's `~name`
    home = init.parent if init.name == "encoder" else init  # one pretraining, however it was named
    from_scratch = init.name == "null"
    return Outcome(
        name,
        stage,
        pair=(*seeds, labelled),
        scores=scores,
        settings={key: value for key, value in description.items() if _tells_apart(key, description)},
        start=None if from_scratch else home.name,
        weights=None if from_scratch else str(home),
        labelled=labelled,
        **known,
    )


def _tells_apart(key: str, description: Mapping[str, str]) -> bool:
    """Not seeds and what changes nothing, of whichever stage; nor the folder of a start that is described itself."""
    bare = key
    while bare.startswith("init."):
        bare = bare.removeprefix("init.")
    return bare not in (*SEEDS, *IDLE) and f"{key}.stage" not in description


def _kind(outcome: Outcome) -> tuple[str, ...]:
    """What all runs of an arm have in common."""
    settings = (f"{key}={value}" for key, value in sorted(outcome.settings.items()))
    return outcome.stage, *settings, *definition_of(outcome.passports)


# ---- what is compared with what ----


def _baselines(arms: Sequence[Arm]) -> dict[Arm, Arm]:
    """For fine-tuned arms that have one: the arm from scratch with the same settings otherwise and the same images."""
    scratch: dict[tuple[str, ...], list[Arm]] = {}
    for arm in arms:
        if arm.from_scratch:
            scratch.setdefault(_but_start(arm), []).append(arm)
    found = {}
    for arm in arms:
        if not arm.from_scratch and _is_finetuned(arm.outcomes[0]):
            like = (
                other for other in scratch.get(_but_start(arm), ()) if not differing(other.passports, arm.passports)
            )
            baseline = next(like, None)
            found |= {} if baseline is None else {arm: baseline}
    return found


def _but_start(arm: Arm) -> tuple[str, ...]:
    """Stage and settings, but for those by which a fine-tuning from scratch differs from its pretrained twin."""
    return arm.stage, *sorted(f"{key}={value}" for key, value in arm.settings.items() if not _is_start(key))


def _is_start(key: str) -> bool:
    return key in STARTS or key.startswith("init.")


def _tables(arms: Sequence[Arm]) -> tuple[tuple[Arm, ...], ...]:
    """The arms whose scores may be ranked together: within a table no two passports of a part differ."""
    found: list[list[Arm]] = []
    for arm in arms:
        table = next((table for table in found if not _differing_passports(table, arm)), None)
        if table is None:
            found.append([arm])
        else:
            table.append(arm)
    return tuple(map(tuple, found))


def _differing_passports(table: Sequence[Arm], arm: Arm) -> list[str]:
    found = (differing(other.passports, arm.passports) for other in table)
    return next((fields for fields in found if fields), [])


def _apart(arms: Sequence[Arm], tables: Sequence[Sequence[Arm]]) -> tuple[str, ...]:
    """A line for each table but the first: by what its scores are others; and one for scores without a passport."""
    lines = []
    for table in tables[1:]:
        fields = _differing_passports(tables[0], table[0])
        lines.append(f"not ranked with the first table: {labels_of(table)}; it differs in {'; '.join(fields)}")
    unknown = [arm for arm in arms if None in arm.passports.values()]
    if unknown:
        lines.append(f"no passport, so nothing says whether the images are the same: {labels_of(unknown)}")
    return tuple(lines)


def _without_baseline(arms: Sequence[Arm], baselines: Mapping[Arm, Arm]) -> Iterator[str]:
    """A line for each arm that has no gain though there are runs from scratch: in what the most alike of them differs.

    One that has the same settings differs in its passport, which `_apart` tells.
    """
    for arm in arms:
        if arm in baselines or arm.from_scratch or not _is_finetuned(arm.outcomes[0]):
            continue
        scratch = [other for other in arms if other.from_scratch and other.stage == arm.stage]
        keys = min((_differing_keys(arm, other) for other in scratch), key=len, default=[])
        if keys:
            more = f" and {len(keys) - KEYS_TOLD} more" if len(keys) > KEYS_TOLD else ""
            yield (
                f"no gain of {arm.label}: the runs from scratch differ in {', '.join(keys[:KEYS_TOLD])}{more}; "
                "make some with its settings, all but init"
            )


def _differing_keys(arm: Arm, other: Arm) -> list[str]:
    """Settings in which two arms differ beside what they start from."""
    keys = arm.settings.keys() | other.settings.keys()
    return sorted(key for key in keys if not _is_start(key) and arm.settings.get(key) != other.settings.get(key))


# ---- what differs ----


def _differing(kinds: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, tuple[str | None, ...]]:
    """Only keys that tell arms of the same stage apart: those of another stage are other keys."""
    found: dict[str, tuple[str | None, ...]] = {}
    for stage in dict.fromkeys(stage for stage, _ in kinds):
        trees = [_tree(settings) if own == stage else None for own, settings in kinds]
        for key, values in _differing_below("", trees).items():
            former = found.get(key, (None,) * len(kinds))
            found[key] = tuple(one if one is not None else other for one, other in zip(former, values, strict=True))
    return found


def _differing_below(prefix: str, trees: Sequence[Any]) -> dict[str, tuple[str | None, ...]]:
    """Where some have a whole mapping and others have not, that is one line, not forty."""
    mappings = [tree for tree in trees if isinstance(tree, Mapping)]
    found: dict[str, tuple[str | None, ...]] = {}
    for key in dict.fromkeys(key for tree in mappings for key in tree):
        values = [tree.get(key) if isinstance(tree, Mapping) else None for tree in trees]
        shown = tuple("given" if isinstance(value, Mapping) else value for value in values)
        among = {value for value, tree in zip(shown, trees, strict=True) if isinstance(tree, Mapping)}
        if len(among) > 1:
            found[f"{prefix}{key}"] = shown
        if any(isinstance(value, Mapping) for value in values):
            found |= _differing_below(f"{prefix}{key}.", values)
    return found


def _tree(flat: Mapping[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        place = tree
        *parents, last = key.split(".")
        for parent in parents:
            below = place.get(parent)
            place[parent] = below if isinstance(below, dict) else {}
            place = place[parent]
        place[last] = value
    return tree


# ---- names ----


def _labels(kinds: Sequence[Sequence[Outcome]], differing: Mapping[str, Sequence[str | None]]) -> list[str]:
    """What an arm starts from, then the keys in which it differs from the others."""
    labels = []
    told = [key for key in differing if not _is_start(key)]
    several = len({own[0].stage for own in kinds}) > 1
    for index, own in enumerate(kinds):
        first = own[0]
        words = [_start_label(own)] if _is_finetuned(first) else [first.stage]
        words += ["evaluated"] if words != ["evaluate"] and first.stage == "evaluate" and several else []
        words += transfer_in_words(first.settings.get("transfer", ""))
        rest = [f"{key}={differing[key][index]}" for key in told if differing[key][index] is not None]
        labels.append(" ".join([*words, f"({', '.join(rest)})"] if rest else words))
    return [label if labels.count(label) == 1 else f"{label} #{number}" for number, label in enumerate(labels, start=1)]


def _is_scratch(own: Iterable[Outcome]) -> bool:
    return all(_is_finetuned(outcome) and outcome.start is None and not _of_timm(outcome) for outcome in own)


def _is_finetuned(outcome: Outcome) -> bool:
    """A fine-tuning, or an evaluation that says of which one."""
    return outcome.stage == "finetune" or (outcome.stage == "evaluate" and any(map(_is_start, outcome.settings)))


def _of_timm(outcome: Outcome) -> bool:
    """`pretrained` is true, a tag or a file."""
    return outcome.settings.get(TIMM, "false") not in ("false", "null")


def _start_label(own: Iterable[Outcome]) -> str:
    outcomes = list(own)
    names = list(dict.fromkeys(outcome.start for outcome in outcomes if outcome.start is not None))
    if not names:
        return "weights of timm" if _of_timm(outcomes[0]) else SCRATCH
    if len(names) > 1:
        names = list(dict.fromkeys(SEED_IN_NAME.sub("", name) or name for name in names))
    return ", ".join(names)
