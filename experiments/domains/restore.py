"""Make a study's folder out of its table of cells, so that it goes on where another machine left it.

    python -m experiments.domains.restore experiments/domains/nuclei.yaml experiments/domains/nuclei/cells.csv \
        --out runs/domains_nuclei

The study's own command then makes new arms and seeds, and none of the cells in the table again. Scores are there, and
by passports.json beside the table what they mean: the `passport` of any cell's result.json, without which new cells are
not paired with them. Weights, pictures and intervals over images are not, so an arm that starts from a pretraining of
the table needs that made anew: remove its folder.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from ssl_seg import StudyConfig, load, make_plan, read_words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    plan = make_plan(load(StudyConfig, read_words([str(options.study)])), options.out.resolve())
    with options.cells.open(newline="") as file:
        rows = {row["cell"]: row for row in csv.DictReader(file) if row["status"] == "finished"}
    cells = [cell for cell in plan.cells if cell.id in rows]
    passports = options.cells.with_name("passports.json")
    meant = {"passport": json.loads(passports.read_text())} if passports.exists() else {}
    for cell in cells:
        write(options.out / cell.place / cell.id, cell.stage, {**scores_of(rows[cell.id]), **meant})
    starts = [start for start in plan.pretrainings if start.id in {cell.start for cell in cells}]
    for start in starts:
        write(options.out / start.place / start.id, start.stage, {"val": {}})
    print(f"{len(cells)} cells of {len(rows)} in the table are of this study, and {len(starts)} pretrainings")


def scores_of(row: dict[str, str]) -> dict[str, Any]:
    """By part, as in a run's result.json."""
    parts: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        part, _, figure = name.partition("/")
        if figure and value:
            parts.setdefault(part, {})[figure] = float(value)
    return parts


def write(folder: Path, stage: str, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stage": stage, "status": "finished", "config": {}}))
    (folder / "result.json").write_text(json.dumps({"steps": 0, **result}))


if __name__ == "__main__":
    main()
