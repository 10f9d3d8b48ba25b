"""The import map: who may import whom, read from the code. A new arrow that points down the list fails here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ssl_seg
from tests import ROOT
from tests.house import DRAWING, FILES, FLOOR_OF, arrows, drawing, imported, own_modules, room_of

PRETEXT_MAY_IMPORT = {"config", "tasks", "rng", "losses", "metrics", "models"}
TEACHERS = {"weights.export", "weights.fingerprint"}  # of a task that has weights from elsewhere
PUBLIC_MODULES = {"datasets", "images", "losses", "metrics", "models", "rng", "tasks", "testing", "worlds"}
HOMES = {  # the only files that may import a heavy library
    "accelerate": {"training.processes"},
    "mlflow": {
        "tracking.system_metrics",
        "tracking.client",
        "tracking.server",
        "tracking.experiments",
        "tracking.model",
    },
    "matplotlib": {"figures.svg", "figures.charts"},
    "jinja2": {"reports.blocks"},
    "timm": {"models.timm", "models.timm_maps", "models.timm_plain"},
    "segmentation_models_pytorch": {"models.smp", "models.smp_whole"},
    "omegaconf": {"config"},
    "PIL": {f"images.{file}" for file in ("bands", "masks", "opening", "pictures", "tiff", "writing")},
    "tifffile": {"datasets.stack", "images.pages"},
    "fsspec": {"datasets.shards"},
    "braceexpand": {"datasets.shards"},
}


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_point_up(name: str) -> None:
    room = room_of(name)
    assert room in FLOOR_OF, f"{name}: {room} is a new room; give it a floor"
    down = {used for used in arrows()[name] if FLOOR_OF[room_of(used)] > FLOOR_OF[room]}
    assert not down, f"{name} imports {sorted(down)}, which stand below it"


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_private_names_stay_in_their_file(name: str) -> None:
    own = [used for used in imported(FILES[name]) if used.startswith("ssl_seg.")]
    assert not [used for used in own if used.rpartition(".")[2].startswith("_")]


def test_no_imports_go_in_a_circle() -> None:
    left = {name: set(used) for name, used in arrows().items()}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in circles, or behind one: {sorted(left)}"


def test_every_floor_names_rooms_that_are_there() -> None:
    assert FLOOR_OF.keys() <= {room_of(name) for name in FILES}


def test_the_drawing_is_of_today() -> None:
    assert DRAWING.read_text() == drawing(), "draw the house anew: python -m tests.house"


@pytest.mark.parametrize(("library", "homes"), HOMES.items())
def test_each_heavy_library_has_one_home(library: str, homes: set[str]) -> None:
    users = {name for name, path in FILES.items() if any(used.split(".")[0] == library for used in imported(path))}
    assert users <= homes, f"{sorted(users - homes)} import {library}; its home is {sorted(homes)}"


@pytest.mark.parametrize("path", sorted((ROOT / "pretext").glob("*.py")), ids=lambda path: path.stem)
def test_tasks_know_little_of_the_framework(path: Path) -> None:
    assert own_modules(imported(path)) <= PRETEXT_MAY_IMPORT | TEACHERS


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_the_framework_reaches_tasks_by_name_only(name: str) -> None:
    assert not [used for used in imported(FILES[name]) if used.split(".")[0] in ("pretext", "experiments", "tests")]


# leaks/measure.py looks into the leak guard itself.
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.py") if path.parent.name != "leaks")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_experiments_use_public_names(path: Path) -> None:
    """Those of `ssl_seg` itself, and of the modules that plug-ins are written with."""
    used = [name.split(".")[1:] for name in imported(path) if name.split(".")[0] == "ssl_seg"]
    private = [name for name in used if name[0] not in ssl_seg.__all__ and name[0] not in PUBLIC_MODULES]
    assert not private


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
