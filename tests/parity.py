"""The table of docs/models.md that says in which forms a model of each family leaves a run, and how exactly.

`python -m tests.parity` makes every form of every family, some half an hour of one core, and writes the table anew;
`python -m tests.parity unet segnet` does so for two families and keeps the other lines.
`tests/weights/test_forms.py` holds its lines against the families that are tested.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from ssl_seg.config import UserError
from ssl_seg.weights.forms import FORMS, export
from tests import ROOT
from tests.weights.test_onnx import FAMILIES, exported

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- by python -m tests.parity -->", "<!-- end -->"
FORMS_SHOWN = ("onnx", "torch", "timm", "smp")
HEAD = ["| model | " + " | ".join(f"`{form}`" for form in FORMS_SHOWN) + " |", "|---" * (len(FORMS_SHOWN) + 1) + "|"]


def lines_of(text: str) -> dict[str, str]:
    """The lines of the table by family."""
    table = text.partition(BEGIN)[2].partition(END)[0]
    rows = [line for line in table.strip().splitlines() if line.startswith("| ") and "`onnx`" not in line]
    return {line.split("|")[1].strip(): line for line in rows}


def figure(family: str, form: str, folder: Path) -> str:
    """The largest difference at three sizes, as a part of the largest logit; a dash where the form is refused."""
    out = folder / f"made_{form}{FORMS[form].suffix}"
    try:
        export(folder / "run", out, form)
    except UserError as error:
        print(f"{family}: {form}: {error}", flush=True)
        return "-"
    receipt = json.loads(out.with_name(f"{out.name}.json").read_text())
    largest = max(receipt.get("compared_all", receipt["compared"]).values())
    words = f"{largest:.0e}" if largest else "0"
    return f"{words} (one)" if form == "torch" and ": one of" in receipt["input"] else words


def line(family: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        exported(Path(folder) / "run", FAMILIES[family])
        figures = [figure(family, form, Path(folder)) for form in FORMS_SHOWN]
    return f"| {family} | {' | '.join(figures)} |"


def write(families: list[str]) -> None:
    for family in families or FAMILIES:
        made = line(family)
        text = PAGE.read_text()
        rows = {**lines_of(text), family: made}
        ordered = [rows[name] for name in FAMILIES if name in rows]
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text("\n".join([before + BEGIN, *HEAD, *ordered, END]) + after)
        print(made, flush=True)


if __name__ == "__main__":
    write(sys.argv[1:])
