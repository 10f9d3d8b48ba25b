"""Runs read back from an MLflow experiment, and compared as run folders are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from ssl_seg.config import UserError
from ssl_seg.evidence.compare import group, outcome
from ssl_seg.evidence.comparison import Comparison
from ssl_seg.tracking import prepare
from ssl_seg.tracking.client import STATUSES, connect, database, explained, is_open, resolved
from ssl_seg.tracking.server import HOST, LABELLED, LEAKS, RESULT, from_tags, score_name, shown_settings


def compare_experiment(experiment: str, uri: str | None = None) -> Comparison:
    """The same for the runs of an MLflow experiment, which need no folders here."""
    prepare()
    from ssl_seg.tracking.experiments import fetch  # mlflow is wanted here alone

    fetched = fetch(experiment, uri)
    done = [run for run in fetched if run.scores]
    outcomes = [
        outcome(
            run.name, run.stage, run.description, run.scores, run.labelled, passports=run.passports, leaks=run.leaks
        )
        for run in done
    ]
    return group(outcomes, [run.name for run in fetched if not run.scores])


# ---- experiments that others have filled ----


@dataclass(frozen=True)
class Fetched:
    """A run as MLflow knows it, in the words of the folder that it mirrors."""

    name: str
    stage: str
    description: dict[str, str]
    scores: dict[str, float]  # empty until it has finished
    passports: dict[str, Mapping[str, Any] | None]
    labelled: str  # digest of the labelled images
    leaks: str  # `folder.leak_word`


def fetch(experiment: str, uri: str | None = None) -> list[Fetched]:
    """The runs of ours in an MLflow experiment, oldest first. Raises UserError where there are none."""
    uri = resolved(uri, Path("runs", "run"))
    if uri.startswith("sqlite:///") and not database(uri).exists():
        raise UserError(f"{uri}: no such database; name another with --uri")
    found: list[Run] = []
    with explained(uri):
        client = connect(uri)
        known = client.get_experiment_by_name(experiment)
        if known is None:
            names = ", ".join(other.name for other in client.search_experiments())
            raise UserError(f"--experiment {experiment}: MLflow at {uri} has none of that name, only: {names}")
        token: str | None = None
        while token != "":
            page = client.search_runs(
                [known.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000, page_token=token
            )
            found += page
            token = page.token or ""
    ours = [run for run in found if run.data.tags.get("stage") and run.data.params and is_open(run)]
    if not ours:
        raise UserError(f"--experiment {experiment}: holds no run of ssl-seg; name another")
    return [_fetched(run) for run in _newest(ours)]


def _fetched(run: Run) -> Fetched:
    done = run.info.status == STATUSES["finished"]  # one that goes on holds the result of what it was before
    scores = {score_name(name): value for name, value in run.data.metrics.items() if name.startswith(RESULT) and done}
    tags = run.data.tags
    passports = from_tags(tags, scores)
    settings, name = shown_settings(run), run.info.run_name or run.info.run_id
    return Fetched(name, tags["stage"], settings, scores, passports, tags.get(LABELLED, ""), tags.get(LEAKS, "none"))


def _newest(runs: Sequence[Run]) -> list[Run]:
    """Without those that a later run of the same folder on the same machine has overwritten; `runs` is oldest first."""
    newest = {_of_folder(run): run for run in runs}
    return [run for run in runs if newest[_of_folder(run)] is run]


def _of_folder(run: Run) -> tuple[str, str]:
    tags = run.data.tags
    return tags.get(HOST, ""), tags.get("folder", run.info.run_id)
