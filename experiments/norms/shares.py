"""What the switch norm layers of a study's runs have learnt to take, by batch size and depth: shares.csv.

python -m experiments.norms.shares runs/norms --out experiments/norms/shares.csv
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import yaml

from ssl_seg import load_model, norm_shares

THIRDS = ("first", "middle", "last")  # of an encoder's layers, and of a decoder's
COLUMNS = (
    "batch_size",
    "seed",
    "part",
    "third",
    *(f"{of}_{kind}" for of in ("mean", "var") for kind in ("instance", "layer", "batch")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = sorted(row for run in sorted(options.study.glob("*/*/run.json")) for row in rows_of(run.parent))
    with options.out.open("w", newline="") as file:
        written = csv.writer(file)
        written.writerow(COLUMNS)
        written.writerows(rows)


def rows_of(run: Path) -> Iterator[tuple[object, ...]]:
    """The mean shares of a run's thirds; none of a run with another norm."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    if config["model"]["norm"] != "switch":
        return
    model, _ = load_model(run)
    layers = norm_shares(model)
    for part in ("encoder", "decoder"):
        own = [layer for layer in layers if layer.name.startswith("encoder") == (part == "encoder")]
        for number, third in enumerate(THIRDS):
            begin, end = (round(len(own) * edge / len(THIRDS)) for edge in (number, number + 1))
            shares = zip(*((*layer.mean, *layer.var) for layer in own[begin:end]), strict=True)
            figures = (f"{mean(values):.3f}" for values in shares)
            yield (config["train"]["batch_size"], config["seed"], part, third, *figures)


if __name__ == "__main__":
    main()
