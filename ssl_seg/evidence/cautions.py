"""What else is to be known of scores and gains: leaks, other images, other software, pretrainings that pairs share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ssl_seg.evidence.comparison import Arm, Comparison, Outcome, labels_of, main_score_of
from ssl_seg.evidence.pairs import MIN_STARTS, Shared, software_in_words
from ssl_seg.evidence.passport import differing
from ssl_seg.evidence.results import Study
from ssl_seg.images import show_path

NAMED = 3  # images of a kind, or classes, in a sentence
# A class is hardly predicted where its prediction is smaller than this part of what masks show of it: its IoU is then
# below it too, wherever the prediction lies.
HARDLY = 0.05
LARGE = 0.05  # of all scored pixels: a class of this share that a network does not know makes its score say little
REMEDY = (
    "train longer, label more of it, or try segment.class_weights={balance: median, power: 0.5} or augment.rare=0.3"
)
LEAKS = {  # what is to be said of scores by the word for their run's leaks.json
    "allowed": "trained on some of the scored images, which leaks.allow let pass",
    "cut": "trained on frames beside scored ones, at the cut that the run made itself",
    "found": "trained on some of the scored images",
    "unchecked": "not checked for training images among the scored ones (leaks.check=false)",
    "unknown": "started from weights whose training images are not known, so these were not checked",
}


# ---- of runs ----


def notes(found: Comparison) -> tuple[str, ...]:
    """A line for each: scores that are not ranked, leaks, other held-out images, other software, shared starts."""
    lines = [f"{said}: {_leaking(found.arms, word)}" for word, said in LEAKS.items() if _leaking(found.arms, word)]
    pretrained = [arm for arm in found.arms if arm.stage == "pretrain"]
    held_out = {outcome.held_out for arm in pretrained for outcome in arm.outcomes if outcome.held_out}
    if len(held_out) > 1:
        lines.append(f"scored on different held-out images (data.val), so not to be ranked: {labels_of(pretrained)}")
    scores = {arm: score for arm in found.baselines if (score := main_score_of([arm])) is not None}
    software = {arm: found.pairs(arm).other_software(score) for arm, score in scores.items()}
    told = software_in_words(software.values())
    if told:
        names = labels_of(arm for arm, other in software.items() if other)
        lines.append(f"not made with the same as what is from scratch ({told}): {names}")
    gains = {arm: gain.differences for arm, score in scores.items() if (gain := found.gain(arm, score)) is not None}
    shared = {arm: gain for arm, gain in gains.items() if isinstance(gain, Shared)}
    if shared:
        counts = [f"{arm.label} ({gain.n} pairs, pretrainings: {gain.num_starts})" for arm, gain in shared.items()]
        lines.append(f"pairs that start from one pretraining are not independent: {', '.join(counts)}")
    return (*found.apart, *lines, *_unpredicted(found.arms), *_uncovered(found.arms))


def _unpredicted(arms: Iterable[Arm]) -> Iterator[str]:
    """A line for each arm of which runs hardly predict some class."""
    for arm in arms:
        told = [hardly_predicted(outcome.run.read("confusion.json")) for outcome in arm.outcomes if outcome.run]
        found = [own for own in told if own]
        if found:
            yield f"{arm.label} ({len(found)} of {len(arm.outcomes)} runs) hardly predicts {_classes_in_words(found)}"


def hardly_predicted(record: Mapping[str, Any] | None) -> dict[str, float]:
    """Classes that a run hardly predicts where it is scored, by its confusion.json, with their share of the pixels.

    Of the test images, else of those it was validated on. Empty without a record.
    """
    if record is None:
        return {}
    matrix = record.get("test") or record.get("val") or []
    truth = [sum(row) for row in matrix]
    predicted = [sum(column) for column in zip(*matrix, strict=True)]
    pixels = sum(truth)
    counted = zip(record["classes"], truth, predicted, strict=False)
    return {name: own / pixels for name, own, found in counted if own and found < HARDLY * own}


def unpredicted_in_words(record: Mapping[str, Any] | None) -> str:
    """The word on a single run that hardly predicts some class; '' where there is none."""
    found = hardly_predicted(record)
    if not found:
        return ""
    return f"hardly predicts {_classes_in_words([found])}: {REMEDY}"


def _classes_in_words(found: Sequence[Mapping[str, float]]) -> str:
    """`'membrane' (22 % of the scored pixels), 'pole', 'fence' (below 5 %)`: large ones first, with their shares."""
    shares = {name: share for own in found for name, share in own.items()}
    large = sorted((name for name, share in shares.items() if share >= LARGE), key=shares.__getitem__, reverse=True)
    small = [name for name in shares if name not in large]
    words = [f"'{name}' ({100 * shares[name]:.0f} % of the scored pixels)" for name in large]
    more = f" and {len(small) - NAMED} more" if len(small) > NAMED else ""
    few = ", ".join(f"'{name}'" for name in small[:NAMED]) + more
    rare = [f"{few} (below {100 * LARGE:.0f} %)"] if small else []
    return ", ".join([*words, *rare])


def _uncovered(arms: Iterable[Arm]) -> Iterator[str]:
    """A line for each arm that was scored on a kind of image that no labelled image of its run shows."""
    for arm in arms:
        told = [kinds_in_words(outcome.run.read("kinds.json")) for outcome in arm.outcomes if outcome.run is not None]
        own = [sentences[0] for sentences in told if sentences]
        if own:
            yield f"{arm.label} ({len(own)} of {len(arm.outcomes)} runs): {own[0]}"


def kinds_in_words(record: Mapping[str, Any] | None) -> list[str]:
    """What a kinds.json says: a sentence for each part with a kind of image that no labelled image shows."""
    told = []
    for part, kind in ({} if record is None else record["uncovered"]).items():
        names = [show_path(name) for name in kind["names"][:NAMED]] + ["..."] * (len(kind["names"]) > NAMED)
        told.append(
            f"{part}: {len(kind['names'])} of {kind['scored']} images are of a kind that none of the "
            f"{kind['labelled']} labelled images shows ({', '.join(names)}): their mIoU is {kind['miou']:.2f}, that of "
            f"the others {kind['miou_of_others']:.2f}; ssl-seg select names images to label"
        )
    return told


def _leaking(arms: Iterable[Arm], word: str) -> str:
    counts = [(arm, sum(outcome.leaks == word for outcome in arm.outcomes)) for arm in arms]
    return ", ".join(f"{arm.label} ({count} of {len(arm.outcomes)} runs)" for arm, count in counts if count)


# ---- of a study ----


def cautions(study: Study) -> list[str]:
    """A sentence for each: shared starts, other seeds, pools, passports or software, and cells that are no pair."""
    return [
        *of_shared_starts(study),
        *_of_seeds(study),
        *_of_pools(study),
        *_of_passports([cell for cell in study.cells if cell.scores]),
        *_of_software(study),
        *_of_apart(study),
        *_of_unpredicted(study),
        *_of_kinds(study),
    ]


def of_shared_starts(study: Study) -> list[str]:
    """The word on arms whose pairs share pretrainings, a sentence for each number of these."""
    fewest: dict[str, int] = {}
    for gain in study.gains:
        label, shared = gain.arm.label, gain.differences
        if isinstance(shared, Shared):
            fewest[label] = min(shared.num_starts, fewest.get(label, shared.num_starts))
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


def _of_seeds(study: Study) -> list[str]:
    """A word where seeds came, or went, after results with others had been there to look at."""
    now = study.record["seeds"]
    resumed = [own for own in study.record.get("resumed", ()) if isinstance(own, Mapping)]
    before = [own.get("seeds") for own in resumed]
    lists = [own for own in before if isinstance(own, list)]
    least = min([own for own in before if isinstance(own, int)] + [len(own) for own in lists], default=len(now))
    told = []
    if least < len(now):
        told.append(
            f"Seeds were added after an earlier end (there had been {least}): where that is done until something can "
            f"be told, something false is told more often than {100 * (1 - study.level):g} times in 100."
        )
    gone = [seed for seed in dict.fromkeys(seed for own in lists for seed in own) if seed not in now]
    if gone:
        named = ", ".join(map(str, gone))
        told.append(
            f"CAUTION: seeds of an earlier start were left out ({named}); what is told without them holds only if that "
            "was not done for their results."
        )
    return told


def _of_pools(study: Study) -> list[str]:
    """A word where the pretrainings of an arm did not read the same images."""
    pools = {
        arm.label: {
            (cell.run.record.get("origin") or {}).get("pool", "")
            for cell in arm.outcomes
            if cell.run is not None and cell.scores
        }
        for arm in study.arms
    }
    arms = " and ".join(arm for arm, own in pools.items() if len(own - {""}) > 1)
    return [f"CAUTION: the pretrainings of {arms} did not read the same images; make the study anew."] * bool(arms)


def _of_passports(done: list[Outcome]) -> list[str]:
    """A word where the cells' scores do not mean the same."""
    told = dict.fromkeys(field for cell in done for field in differing(done[0].passports, cell.passports))
    if not told:
        return []
    return [f"CAUTION: the scores of these cells do not mean the same ({'; '.join(told)}); make the study anew."]


def _of_software(study: Study) -> list[str]:
    """A word where the two cells of a pair were not made with the same."""
    pairs = [study.pairs(gain.arm, gain.condition).other_software(gain.score) for gain in study.gains]
    told = software_in_words(pairs)
    if not told:
        return []
    return [f"CAUTION: paired cells were not all made with the same ({told}); a gain may come from that."]


def _of_apart(study: Study) -> list[str]:
    """A word on the cells that are no pair."""
    if not study.apart:
        return []
    first, *others = study.apart
    more = f", and {len(others)} more" if others else ""
    return [f"CAUTION: cells that are no pair are left out of every gain: {first}{more}."]


def _of_unpredicted(study: Study) -> list[str]:
    """A word where runs hardly predict a class that is much of what is scored, and one where it is little of it."""
    done = [cell.run for cell in study.cells if cell.scores and cell.run is not None]
    told = [hardly_predicted(run.read("confusion.json")) for run in done]
    large = [{name: share for name, share in own.items() if share >= LARGE} for own in told]
    small = [{name: share for name, share in own.items() if share < LARGE} for own in told]
    lines = []
    if any(large):
        lines.append(
            f"CAUTION: {sum(map(bool, large))} of {len(done)} runs hardly predict {_classes_in_words(large)}: the "
            f"comparison says little; {REMEDY}."
        )
    if any(small):
        lines.append(
            f"{sum(map(bool, small))} of {len(done)} runs hardly predict {_classes_in_words(small)}, whose IoU is "
            "about 0 there and counts in the mIoU as any other."
        )
    return lines


def _of_kinds(study: Study) -> list[str]:
    """A word where cells were scored on a kind of image that none of their labelled images shows."""
    done = [cell for cell in study.cells if cell.scores and cell.run is not None]
    told = {cell.name: kinds_in_words(cell.run.read("kinds.json")) for cell in done if cell.run is not None}
    found = {name: sentences[0] for name, sentences in told.items() if sentences}
    if not found:
        return []
    name, sentence = next(iter(found.items()))
    return [f"CAUTION: {len(found)} of {len(done)} cells lack labels of a kind of image, as {name}: {sentence}."]
