"""`ssl-seg study`: does pretraining help, with which tasks, by how much, and how sure is that?

`plan` says which runs there are, `executor` executes them, `folds` pools the runs of a cell that is cross-validated,
`evidence.results` reads what came out. This file ties them: it keeps the order of the runs, and study.json, which is
true at every instant. So a study can be killed and taken up.

    runs/<study>/ study.json  cells.csv  gains.csv  labels.csv  ledger.csv  report.html
                  pretrained/<id>/  searched/<id>/  cells/<id>/  folds/<id>/
                  each run with its <id>.yaml (config) and <id>.log beside its folder
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ssl_seg import files
from ssl_seg.config import Interrupted, UserError, user_path
from ssl_seg.datasets import Dataset
from ssl_seg.evidence import results
from ssl_seg.evidence.results import CELLS, FOLDS, PRETRAINED, SEARCHED, STUDY_FILE, Study
from ssl_seg.leaks import guard
from ssl_seg.reports import study as study_page
from ssl_seg.reports.changed import draw_changed_of_study
from ssl_seg.runs.cost import cost_of
from ssl_seg.runs.folder import Records, RunFolder
from ssl_seg.runs.lock import LOCK, hold, holder_of, is_held
from ssl_seg.runs.writer import provenance, timestamp
from ssl_seg.stages.finetune import FinetuneConfig, candidates
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.studies import folds
from ssl_seg.studies.config import StudyConfig
from ssl_seg.studies.executor import Call, Cluster, End, Executor, Forked, Here, Limits, Watch, execute
from ssl_seg.studies.plan import Cell, Plan, Start, check_images_of, choose, make_plan
from ssl_seg.terminal import clock, say, watch_signals
from ssl_seg.tracking import Mirror

MIOU = "miou"
DAMAGED = f"{STUDY_FILE}.damaged"  # what was in its place when it had to be made anew
SEED_IN_ID = re.compile(r"-seed(-?\d+)-[0-9a-f]+(-fold\d+)?$")  # as `plan` names a run
DOUBLE = ("state", "encoder", "decoders")  # of a finished cell: what to resume from, and its model/ in parts
LOOK = 2.0  # seconds between two looks at a run that another process makes


@dataclass(frozen=True)
class StudyOptions:
    """How a study is carried out; the command line's flags."""

    out: str | Path
    jobs: int = 1  # runs at a time
    executor: Literal["local", "submitit"] = "local"
    plugins: tuple[str, ...] = ()  # handed on to every run
    quiet: bool = False


def study(config: StudyConfig, options: StudyOptions) -> Study:
    """Make what is missing of a study, and write its tables and its page.

    Raises UserError before anything runs for a config that is wrong, and at the end where cells have failed, after the
    others are done and the tables written; LeakError before anything is trained; `config.Interrupted` after a signal,
    the running cells having been saved.
    """
    out = user_path(options.out).resolve()  # what cells start from is named by it: another spelling is no other place
    _check_place(out)
    plan = _plan(config, out)
    executor = _executor(config, options, out)
    with hold(out), watch_signals():
        progress = _Progress(config, options, plan, executor, out)
        try:
            progress.check_leaks()
            progress.make("pretrainings", plan.pretrainings)
            progress.make("runs of the search", [trial.cell for trial in plan.trials])
            progress.choose()
            progress.make_cells()
        except Interrupted:
            progress.write("killed")
            raise
        except UserError:
            progress.write("failed")
            raise
        return progress.close()


def outline(config: StudyConfig, out: Path) -> list[str]:
    """What a study would do, in lines, for `--dry-run`; every config is checked, nothing is written."""
    plan = _plan(config, out.resolve())
    runs = {"pretrainings": plan.pretrainings, "runs of the search": [trial.cell for trial in plan.trials]}
    lines = [f"baseline: {plan.baseline}", f"arms: {', '.join(arm.name for arm in plan.arms)}"]
    lines += [f"{key}: {', '.join(map(str, values))}" for key, values in plan.axes.items()]
    lines += [f"seeds: {', '.join(map(str, config.seeds))}"]
    for words, cells in (*runs.items(), ("runs of folds", plan.folds), ("cells", plan.cells)):
        done = sum(_is_finished(_folder(out, cell)) for cell in cells)
        pooled = ", each pooled of its folds" if words == "cells" and plan.folds else ""
        lines += [f"{len(cells)} {words}, {done} of them finished{pooled}"] if cells else []
    return [*lines, "leaks are looked for at the start, which reads every image"]


def _plan(config: StudyConfig, out: Path) -> Plan:
    """Every run, checked with its images, and with what the search has chosen if that is over."""
    plan = make_plan(config, out)
    check_images_of(plan)
    cells = [trial.cell for trial in plan.trials]
    if not cells or not all(_is_finished(_folder(out, cell)) for cell in cells):
        return plan
    return make_plan(config, out, _scores(out, cells))


def _scores(out: Path, cells: Iterable[Cell]) -> dict[str, float]:
    """The mIoU of those that have finished, by id."""
    found = {cell.id: _score(out, cell) for cell in cells if _is_finished(_folder(out, cell))}
    return {name: score for name, score in found.items() if score is not None}


def _score(out: Path, cell: Cell) -> float | None:
    """The mIoU to look at, of a finished fine-tuning."""
    result = RunFolder(_folder(out, cell)).result or {}
    part = result.get("test") or result.get("val") or {}
    return part.get(MIOU)


def _check_place(out: Path) -> None:
    if "=" in str(out):
        raise UserError(f"--out {out}: '=' would read as key=value in the commands of its cells; choose another name")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _is_study(out)):
        raise UserError(f"--out {out}: is there and is no study (no {STUDY_FILE} in it); choose another folder")


def _is_study(out: Path) -> bool:
    # A kill right after the start leaves a lock alone.
    names = {entry.name for entry in out.iterdir()}
    return STUDY_FILE in names or names <= {LOCK} or _holds_runs(out)


def _holds_runs(out: Path) -> bool:
    """Whether there are runs where a study keeps its own: its file may have been lost."""
    return any(next((out / place).glob("*/run.json"), None) for place in (PRETRAINED, SEARCHED, FOLDS, CELLS))


def _executor(config: StudyConfig, options: StudyOptions, out: Path) -> Executor:
    if options.executor == "submitit":
        return Cluster(out / "submitit", config.submitit, config.timeout)
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    return Here(options.jobs, devices) if devices else Forked(options.jobs)


class _Progress:
    """study.json, kept true while the runs are made: every run with how far it is."""

    def __init__(self, config: StudyConfig, options: StudyOptions, plan: Plan, executor: Executor, out: Path) -> None:
        self.config = config
        self.options = options
        self.out = out
        self.plan = plan
        self.executor = executor
        self.states: dict[str, dict[str, Any]] = {}  # by id: what is known beside the plan
        self.search: dict[str, Any] = {}
        self.cell_of: dict[str, Cell[FinetuneConfig]] = {}  # by the id of a run of a fold
        self.digests: dict[str, Mapping[str, str]] = {}  # of labelled images, by the words of their data set
        self.about = {**provenance(), "resumed": []}
        self.records = Records(out)
        if (out / STUDY_FILE).exists() or _holds_runs(out):
            self._go_on(out / STUDY_FILE)
        self.write("running")

    def _go_on(self, path: Path) -> None:
        """Take up what study.json says, or what the cells say where it is lost or damaged."""
        try:
            former = results.read_record(path)
        except UserError:
            if path.exists():
                os.replace(path, path.with_name(DAMAGED))
            self._rebuild()
            self._say(f"{path}: was lost or damaged, and is made anew; {len(self.states)} runs have finished already")
            return
        self._refuse_another_question(former)
        self._take_up(former)

    def _rebuild(self) -> None:
        """The state of every run that has finished, and which seeds there were: each run has left its config."""
        trials = [trial.cell for trial in self.plan.trials]
        for cell in (*self.plan.pretrainings, *trials, *self.plan.folds, *self.plan.cells):
            folder = _folder(self.out, cell)
            if _is_finished(folder):
                self.note(cell, "finished", seconds=cost_of(RunFolder(folder)).seconds)
        ids = [SEED_IN_ID.search(path.stem) for path in self.out.glob("*/*.yaml") if path.parent.name in (CELLS, FOLDS)]
        seeds = sorted({int(found[1]) for found in ids if found})
        self.about["resumed"] = [{**provenance(), "seeds": seeds or None}]

    def _take_up(self, former: Mapping[str, Any]) -> None:
        """What runs of an earlier start have said; the plan may be another one since."""
        kept = [own for key in ("pretrained", "folds", "cells") for own in former.get(key, [])]
        kept += former.get("search", {}).get("trials", [])
        self.states = {own["id"]: own for own in kept if "id" in own}
        if self.plan.trials:
            self.search = former.get("search", {})
        start = {**provenance(), "seeds": former.get("seeds", [])}  # those that there were before it
        kept = {key: former[key] for key in start if key in former and key != "seeds"}
        self.about |= {**kept, "resumed": [*former.get("resumed", []), start]}

    def _refuse_another_question(self, former: Mapping[str, Any]) -> None:
        """Raise UserError where other comparisons are named than were before there was a score."""
        asked = None if self.config.primary is None else self.config.primary.dump()
        before = former.get("config", {}).get("primary")
        if asked != before and any(own["status"] == "finished" for own in former["cells"]):
            were = "none were named" if before is None else f"they were {json.dumps(before)}"
            raise UserError(
                f"primary: {were} before this study had a score, and now it has; leave it so, or give another --out"
            )

    def check_leaks(self) -> None:
        """All that is trained on against all that is scored, before anything is: a run alone sees its own part only.

        Raises LeakError as a run does.
        """
        question = leak_question(self.plan)
        if question is None:
            return
        workers = self.plan.cells[0].config.train.reading
        try:
            guard.check(self.records, question, workers, self.options.quiet)
        finally:
            self.about["leaks"] = self.records.read_json("leaks.json")  # also of one that stops the study

    def make(self, words: str, cells: Iterable[Cell]) -> None:
        """Those that are not finished yet, and whose pretraining is."""
        every = list(cells)
        left = []
        for cell in every:
            if _is_finished(_folder(self.out, cell)):
                self._tidy(cell)
                self.note(cell, "finished")
            elif cell.start is not None and not self._has_finished(cell.start):
                self.note(cell, "waiting", f"its pretraining {cell.start} has not finished")
            else:
                self.note(cell, "waiting")
                left.append(cell)
        self.write("running")
        done = sum(self.states[cell.id]["status"] == "finished" for cell in every)
        self._say(f"{len(every)} {words}, {done} of them finished", bool(left))
        elsewhere = [cell for cell in left if is_held(_folder(self.out, cell))]
        self._execute([cell for cell in left if cell not in elsewhere])
        self._await(elsewhere)

    def make_cells(self) -> None:
        """The cells; of those with folds the runs of these, and then what they have come to together."""
        pooled = {cell.id for cell in self.plan.cells if cell.folds and self._is_pooled(cell)}
        for cell in self.plan.cells:
            for fold in cell.folds:
                self.cell_of[fold.id] = cell
                if cell.id in pooled and not _is_finished(_folder(self.out, fold)):
                    self.note(fold, "finished", "its folder is gone, and its score is in that of its cell")
            if cell.folds:
                self.note(cell, "finished" if cell.id in pooled else "waiting")
        left = [run for cell in self.plan.cells for run in cell.runs if not self._is_gone(run, pooled)]
        self.make("runs of folds" if self.plan.folds else "cells", left)
        for cell in self.plan.cells:
            self._pool(cell)
        self.write("running")

    def _is_gone(self, run: Cell, pooled: Collection[str]) -> bool:
        """Whether it is the run of a fold that is not there any more, and is not needed."""
        cell = self.cell_of.get(run.id)
        return cell is not None and cell.id in pooled and not _is_finished(_folder(self.out, run))

    def _is_pooled(self, cell: Cell) -> bool:
        return folds.is_pooled(_folder(self.out, cell), [_folder(self.out, fold) for fold in cell.folds])

    def _pool(self, cell: Cell[FinetuneConfig]) -> None:
        """What the folds of a cell have come to, once all of them have finished; before that what keeps it waiting."""
        states = [self.states[fold.id] for fold in cell.folds if fold.id in self.states]
        missing = [own for own in states if own["status"] != "finished"]
        known = [own["seconds"] for own in states]
        seconds = None if None in known else sum(known)
        if missing:
            first = missing[0]
            told = f"{first['id']}: {first['message']}" if first["message"] else f"{first['id']} has not finished"
            self.note(cell, first["status"], told)
        elif cell.folds and self._is_pooled(cell):
            self.note(cell, "finished", seconds=seconds)
        elif cell.folds:
            runs = [_folder(self.out, fold) for fold in cell.folds]
            try:
                unscored = folds.pool(_folder(self.out, cell), runs, cell.config, self._digests(cell.config))
            except UserError as error:
                self.note(cell, "failed", str(error), seconds)
                return
            self.note(cell, "finished", seconds=seconds)
            Mirror(cell.config.tracking, _folder(self.out, cell), quiet=self.options.quiet).leave_alone()
            score = _score(self.out, cell)
            reached = "" if score is None else f": mIoU {100 * score:.1f}"
            self._say(f"{cell.id}: its {len(runs)} folds are pooled{reached}")
            if unscored:
                self._say(f"{cell.id}: {len(unscored)} images have no pixel that counts, first {unscored[0]}")

    def _digests(self, config: FinetuneConfig) -> Mapping[str, str]:
        """Of the labelled images, read once for all cells that share them."""
        words = json.dumps(config.data.labelled.dump(), sort_keys=True)
        if words not in self.digests:
            self.digests[words] = folds.digests_in(config.data.labelled)
        return self.digests[words]

    def _execute(self, cells: Sequence[Cell]) -> None:
        by_name = {cell.id: cell for cell in cells}
        limits = Limits(self.config.timeout, self.config.stall)
        began = time.monotonic()
        calls = [self._call(cell) for cell in cells]
        for number, end in enumerate(execute(calls, self.executor, self.options.jobs, limits), start=1):
            cell = by_name[end.call.name]
            said = self._ended(cell, end)
            left = (time.monotonic() - began) / number * (len(cells) - number)
            self._say(f"{number} of {len(cells)}: {cell.id}: {said}{f', {clock(left)} left' if left else ''}")

    def _await(self, cells: Sequence[Cell]) -> None:
        """Runs of a study that was killed alone, or of a cluster that goes on: their folders are held."""
        hung = []
        for cell in cells:
            self._say(f"{cell.id}: another process is making it; waiting for that one")
            if not self._outlasts(self._call_of(cell)):
                hung.append(cell)
        self._execute([cell for cell in cells if cell not in hung and not _is_finished(_folder(self.out, cell))])
        for cell in cells:
            if _is_finished(_folder(self.out, cell)):
                self._tidy(cell)
                self.note(cell, "finished")
        for cell in hung:
            holder = holder_of(_folder(self.out, cell))
            self.note(cell, "stalled", f"process {holder} holds it and shows no sign of life; end that one")
        self.write("running")

    def _outlasts(self, call: Call) -> bool:
        """Wait for a run that another process makes; False where that one hangs."""
        limits, watch = Limits(stall=self.config.stall), Watch(call, has_stepped=call.num_bytes() > 0)
        while is_held(call.folder):
            if limits.has_stalled(watch):
                return False
            time.sleep(LOOK)
        return True

    def _call(self, cell: Cell) -> Call:
        """The command of a run, with its config written."""
        call = self._call_of(cell)
        path = call.folder.with_name(f"{cell.id}.yaml")
        with files.naming(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, cell.config.to_yaml().encode())
        return call

    def _call_of(self, cell: Cell) -> Call:
        folder = _folder(self.out, cell)
        path = folder.with_name(f"{cell.id}.yaml")
        plugins = [word for plugin in self.options.plugins for word in ("--plugin", plugin)]
        # The id vouches for the weights; the study may have been moved since the run began.
        words = (cell.stage, str(path), "--out", str(folder), "--quiet", "--allow-changed", "init", *plugins)
        return Call(cell.id, words, folder.with_name(f"{cell.id}.log"), folder)

    def _ended(self, cell: Cell, end: End) -> str:
        """Note how a run has ended; gives it in words."""
        seconds = round(end.seconds, 1)
        if _is_finished(_folder(self.out, cell)):  # perhaps by another process, while this one could not have it
            self._tidy(cell)
            self.note(cell, "finished", seconds=seconds)
            score = _score(self.out, cell)
            said = f"mIoU {100 * score:.1f}, {clock(seconds)}" if score is not None else clock(seconds)
        else:
            said = _why(end, self.config)
            self.note(cell, "failed" if end.how == "finished" else end.how, said, seconds)
        if cell.id in self.cell_of:
            self._pool(self.cell_of[cell.id])
        self.write("running")
        return said

    def _tidy(self, cell: Cell) -> None:
        """A study of a hundred cells would hold some ten gigabytes of what nobody looks at."""
        if cell.place != PRETRAINED:
            for name in DOUBLE:
                shutil.rmtree(_folder(self.out, cell) / name, ignore_errors=True)

    def _has_finished(self, run: str) -> bool:
        return self.states.get(run, {}).get("status") == "finished"

    def note(self, cell: Cell, status: str, message: str = "", seconds: float | None = None) -> None:
        former = self.states.get(cell.id, {})
        self.states[cell.id] = {
            "id": cell.id,
            "arm": cell.arm,
            "condition": dict(cell.condition),
            "seed": cell.seed,
            "start": cell.start,
            "status": status,
            "message": message,
            "seconds": former.get("seconds") if seconds is None else seconds,
        }

    def choose(self) -> None:
        """Let each arm's cells take what its search has found. Raises UserError where nothing was."""
        trials = self.plan.trials
        if not trials:
            return
        scores = _scores(self.out, [trial.cell for trial in trials])
        chosen = choose(trials, scores)
        tried = [{**self.states[own.cell.id], "tried": own.found, "miou": scores.get(own.cell.id)} for own in trials]
        asked = {trial.key: trial.cell for trial in trials}
        made = [
            {"arm": cell.arm, "condition": cell.condition, "chosen": chosen.get(key)} for key, cell in asked.items()
        ]
        self.search = {"trials": tried, "chosen": made}
        missing = [own["arm"] for own in made if own["chosen"] is None]
        if missing:
            where = self.out / SEARCHED
            raise UserError(f"search: the arm {missing[0]} has no value whose runs have all finished; see {where}")
        self.plan = make_plan(self.config, self.out, scores)

    def write(self, status: str) -> None:
        """study.json, atomically."""
        plan = self.plan
        arms = [
            {
                "name": arm.name,
                "changes": arm.changes,
                "pretraining": arm.pretraining,
                "from_scratch": plan.from_scratch(arm.name),
                **({} if arm.tasks is None else {"tasks": arm.tasks}),
            }
            for arm in plan.arms
        ]
        record = {
            "status": status,
            **self.about,
            "config": self.config.dump(),
            "arms": arms,
            "baseline": plan.baseline,
            "axes": plan.axes,
            "seeds": self.config.seeds,
            "level": self.config.level,
            "pretrained": [self.states[cell.id] for cell in plan.pretrainings if cell.id in self.states],
            "search": self.search,
            "folds": [self.states[cell.id] for cell in plan.folds if cell.id in self.states],
            "cells": [self.states[cell.id] for cell in plan.cells if cell.id in self.states],
        }
        self.records.write_json(STUDY_FILE, record)

    def close(self) -> Study:
        states = [self.states[cell.id] for cell in self.plan.cells]
        failed = [own for own in states if own["status"] != "finished"]
        self.about["ended"] = timestamp()
        self.write("failed" if failed else "finished")
        found = results.read(self.out)
        results.write_tables(found)
        for line in found.apart:
            self._say(line)
        try:
            draw_changed_of_study(found)
        except UserError as error:  # a picture less is no reason to go without the page
            self._say(f"no pictures of what changed: {error}")
        study_page.write_page(found)
        if failed:
            raise UserError(
                f"{self.out}: {len(failed)} of {len(states)} cells have not finished, first {failed[0]['id']} "
                f"({failed[0]['message']}); the tables hold the others, and the same command makes the missing ones"
            )
        return found

    def _say(self, text: str, wanted: bool = True) -> None:
        say(text, self.options.quiet or not wanted)


def leak_question(plan: Plan) -> guard.Question | None:
    """What the whole study trains on and is scored on; None where its cells say that leaks are not looked for."""
    allowed = [glob for cell in (*plan.pretrainings, *plan.cells) for glob in cell.config.leaks.allow]
    settings = plan.cells[0].config.leaks.model_copy(update={"allow": tuple(dict.fromkeys(allowed))})
    trained: dict[str, Any] = {}
    scored: dict[str, Any] = {}
    own_cuts: set[tuple[str, str]] = set()
    for cell in plan.pretrainings:
        trained |= {f"{cell.arm}.{part}": own for part, own in learnt_by(cell).items()}
    folds_of: dict[tuple[str, str], list[Mapping[str, int]]] = {}
    for number, cell in enumerate(_of_different_data(plan.cells), start=1):
        suffix = "" if number == 1 else f"#{number}"
        if cell.folds:
            available = val = cell.config.data.labelled
            folds_of[f"labelled{suffix}", f"val{suffix}"] = _cuts(plan, cell)
        else:
            available, val = candidates(cell.config)
        trained |= {f"labelled{suffix}": available, f"pool{suffix}": cell.config.data.pool}
        scored |= {f"val{suffix}": val, f"test{suffix}": cell.config.data.test}
        own_cuts |= {(f"labelled{suffix}", f"val{suffix}")} if cell.config.data.val is None else set()
    paths = dict.fromkeys(cell.config.init for cell in plan.cells if cell.config.init and cell.start is None)
    inits = {f"init.{number}" if len(paths) > 1 else "init": path for number, path in enumerate(paths, start=1)}
    return guard.Question(trained, scored, settings, inits, frozenset(own_cuts), folds_of) if settings.check else None


def _cuts(plan: Plan, cell: Cell[FinetuneConfig]) -> list[Mapping[str, int]]:
    """The fold of each labelled image by its name, for each different cut of the cells that share a cell's data."""
    found: dict[str, Mapping[str, int]] = {}
    labelled = cell.config.data.labelled
    for other in plan.cells:
        labels = other.config.labels
        asked = json.dumps([labels.folds, labels.seed, labels.blind])
        if _words_of_data(other) == _words_of_data(cell) and asked not in found:
            cut = labels.cut(labelled)
            found[asked] = {labelled.name(index): fold for fold, own in enumerate(cut) for index in own}
    return list(found.values())


def learnt_by(start: Start) -> dict[str, Dataset | None]:
    """The images that the weights of a pretraining rest on, by their part.

    Of one by masks also those that it was validated on, where they chose its weights or its end.
    """
    config = start.config
    if isinstance(config, PretrainConfig):
        return {"pool": config.data.pool}
    given = config.parts()
    chosen = config.select == "best" or config.stop.may_end
    return {part: given[part] for part in ("labelled", "beside", "pool", *["val"] * chosen)}


def _of_different_data(cells: Iterable[Cell[FinetuneConfig]]) -> list[Cell[FinetuneConfig]]:
    """A cell for each choice of data sets: nearly always one for all."""
    return list({_words_of_data(cell): cell for cell in cells}.values())


def _words_of_data(cell: Cell[FinetuneConfig]) -> str:
    """What tells its data sets from others, and images that are cut into folds from those that are not."""
    return json.dumps([cell.config.data.dump(), bool(cell.folds)], sort_keys=True)


def _folder(out: Path, cell: Cell) -> Path:
    return out / cell.place / cell.id


def _is_finished(folder: Path) -> bool:
    with suppress(UserError):
        return RunFolder.open(folder).is_done
    return False


def _why(end: End, config: StudyConfig) -> str:
    """One line about a run that has not finished."""
    if end.how == "timeout":
        return f"given up after {clock(end.seconds)} (timeout: {config.timeout:g} s)"
    if end.how == "stalled":
        return f"given up: no sign of life for {config.stall:g} s (stall)"
    if end.how == "finished":
        return f"ended without a result, see {end.call.log}"
    died = f"killed by signal {-end.code}" if end.code and end.code < 0 else f"exit {end.code}"
    said = end.call.last_words().removeprefix("ssl-seg: ")
    return f"{died}: {said or 'it said nothing'}"
