"""The import map: who may import whom, read from the code. A new arrow that points down the list fails here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Every file may import those of the rows above it, and its neighbours to the left.
ROWS = [
    ["config", "rng", "switch_norm", "norm", "losses", "confusion", "metrics"],
    ["models", "models.timm", "models.smp"],
    ["images", "pictures", "svg", "plots", "files", "runs", "passport", "terminal"],
    ["worlds", "worlds.drawing", "worlds.squares", "worlds.shapes"],
    [
        "worlds.street.perspective",
        "worlds.street.hiding",
        "worlds.street.materials",
        "worlds.street.facades",
        "worlds.street.plants",
        "worlds.street.vehicles",
        "worlds.street.figures",
        "worlds.street.plan",
        "worlds.street.things",
        "worlds.street.layout",
        "worlds.street.surface",
        "worlds.street",
    ],
    ["datasets", "datasets.folder", "datasets.camvid", "datasets.synthetic"],
    ["tasks", "data", "train", "store", "fingerprint", "weights"],
    ["tracking.record", "tracking", "tracking.load", "tracking.client", "tracking.server", "tracking.mirror"],
    ["likeness", "sequences", "leaks", "evaluate", "stage", "dryrun", "pretrain", "finetune", "predict", "synth"],
    ["evidence", "pairs", "compare", "findings", "norms", "answers", "cost", "page", "report_charts", "report"],
    ["study_answers", "study_page", "study_charts", "study_report"],
    ["questions", "plan", "schedule", "study"],
    ["testing"],
    ["cli", "__main__"],
]
ORDER = [name for row in ROWS for name in row]
PRETEXT_MAY_IMPORT = {"config", "tasks", "rng", "losses", "metrics", "models"}
HOMES = {  # the only files that may import a heavy library
    "accelerate": {"train"},
    "mlflow": {"tracking.load", "tracking.client", "tracking.server"},
    "matplotlib": {"svg", "plots"},
    "jinja2": {"page"},
    "timm": {"models.timm"},
    "segmentation_models_pytorch": {"models.smp"},
    "omegaconf": {"config"},
    "PIL": {"images"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "ssl_seg").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(names: set[str]) -> set[str]:
    """The modules of ssl_seg among imported names: `ssl_seg.data.loader` is `data`."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != "ssl_seg":
            continue
        dotted = [".".join(parts[1:length]) for length in range(len(parts), 1, -1)]
        found |= {next((known for known in dotted if known in ORDER), parts[-1])}
    return found


FILES = {module_name(path): path for path in sorted((ROOT / "ssl_seg").rglob("*.py"))}


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_point_up_the_list(name: str) -> None:
    assert name in ORDER, f"{name}: new file; give it a place in ORDER"
    below = set(ORDER[ORDER.index(name) + 1 :])
    down = own_modules(imported(FILES[name])) & below
    assert not down, f"{name} imports {sorted(down)}, which stand below it"


def test_the_order_names_no_file_that_is_gone() -> None:
    assert set(ORDER) <= set(FILES)


@pytest.mark.parametrize(("library", "homes"), HOMES.items())
def test_each_heavy_library_has_one_home(library: str, homes: set[str]) -> None:
    users = {name for name, path in FILES.items() if any(used.split(".")[0] == library for used in imported(path))}
    assert users <= homes, f"{sorted(users - homes)} import {library}; its home is {sorted(homes)}"


@pytest.mark.parametrize("path", sorted((ROOT / "pretext").glob("*.py")), ids=lambda path: path.stem)
def test_tasks_know_little_of_the_framework(path: Path) -> None:
    assert own_modules(imported(path)) <= PRETEXT_MAY_IMPORT


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_the_framework_reaches_tasks_by_name_only(name: str) -> None:
    assert not [used for used in imported(FILES[name]) if used.split(".")[0] in ("pretext", "experiments", "tests")]


def test_help_imports_no_heavy_library() -> None:
    script = (
        "import sys\n"
        "from ssl_seg import cli\n"
        "assert cli.run(lambda: cli.app(args=['pretrain', '--help'], standalone_mode=False)) == 0\n"
        "heavy = {'torch', 'timm', 'mlflow', 'accelerate', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
