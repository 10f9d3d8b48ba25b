"""The pages say what the code does: links lead somewhere, examples run, commands, configs and tables are of today."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import typer
import yaml

from pretext.colorize import Colorize
from pretext.denoise import Denoise
from pretext.inpaint import Inpaint
from pretext.jigsaw import Jigsaw
from ssl_seg.cli import app
from ssl_seg.cli.training import finetune_values, pretrain_values
from ssl_seg.cli.using import evaluate_values, portrait_values, predict_values
from ssl_seg.config import Config, Plugin, UserError, load, merge, names_file, read_words, use_plugin
from ssl_seg.data.synth import EXTRAS
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.images import write_image
from ssl_seg.keys import keys_of
from ssl_seg.models import Decoder, ModelConfig
from ssl_seg.norm.convert import Kind
from ssl_seg.semisupervised.mean_teacher import MeanTeacher
from ssl_seg.semisupervised.unimatch import UniMatch
from ssl_seg.stages import finetune
from ssl_seg.stages.draft import KINDS
from ssl_seg.stages.evaluate import EvaluateConfig
from ssl_seg.stages.finetune import FinetuneConfig
from ssl_seg.stages.gap import GapConfig
from ssl_seg.stages.portrait import PortraitConfig
from ssl_seg.stages.predict import PredictConfig
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.stages.pseudo_label import PseudoLabelConfig
from ssl_seg.stages.select import SelectConfig
from ssl_seg.studies.config import StudyConfig
from ssl_seg.studies.plan import make_plan
from ssl_seg.tracking import Tracking
from ssl_seg.weights.export import build_model, export_encoder, export_model
from ssl_seg.weights.forms import BY_SUFFIX, FORMS
from tests import ROOT
from tests.small import joining

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted((ROOT / "experiments").rglob("README.md"))]
STAGES = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "portrait": PortraitConfig,
    "gap": GapConfig,
    "select": SelectConfig,
    "study": StudyConfig,
}
TYPED = {
    "pretrain": lambda given: pretrain_values(given["words"], given["images"]),
    "finetune": lambda given: finetune_values(*(given[key] for key in ("words", "images", "masks", "classes", "init"))),
    "predict": lambda given: predict_values(given["words"]),
    "evaluate": lambda given: evaluate_values(given["words"], given["classes"]),
    "portrait": lambda given: portrait_values(
        *(given[key] for key in ("model", "words", "subject", "border", "style"))
    ),
}
POOL = {"data": {"pool": {"type": "folder", "images": "photos"}}, "tasks": {"denoise": {}}}
# A config key, and no file such as data.json.
DOTTED = re.compile(r"(?:data|train|model|labels|augment|segment|tracking|stop)(?:\.(?!json)\w+)+")
# What bash hands to our commands, each call as its number of words and the words; anything else is not found.
SHELL = r"""
set -eu
PATH=
ssl-seg() { printf '%s\0' "$#" "$@" >> "$CALLS"; }
torchrun() { while [ "$1 $2" != "-m ssl_seg" ]; do shift; done; shift 2; ssl-seg "$@"; }
accelerate() { torchrun "$@"; }
mlflow() { [ "$1" = ui ]; }
"""


class Block(NamedTuple):
    page: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name that a whole file has in its first line."""
        match = re.match(r"# (\w+\.py)\n", self.text)
        return match[1] if match else None


def blocks(language: str) -> list[Block]:
    """All of a language, page by page."""
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [Block(page.name, *match) for page in DOCS for match in pattern.findall(page.read_text())]
    return [block for block in found if block.language == language]


STUDY = next(block.text for block in blocks("yaml") if block.text.startswith("# ssl-seg study\n"))
FILES = {block.file: block for block in blocks("python") if block.file}


# ---- links ----


def prose(text: str) -> str:
    """Without fenced blocks, whose brackets are no links."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The headings as GitHub names them in links."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    body = re.sub(r"`[^`]*`", "", prose(text))
    targets = re.findall(r"\]\(\s*([^)\s]+)\s*\)", body) + re.findall(r'(?:src|href)="([^"]+)"', body)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name
        leads = not name or path.exists()
        if leads and anchor:
            leads = anchor in anchors(path.read_text() if name else text)
        if not leads:
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in DOCS if page.name != "README.md" and f"({page.name})" not in index] == []


def test_every_row_of_reliability_ends_in_a_test_that_is_there() -> None:
    rows = [line for line in (ROOT / "docs/RELIABILITY.md").read_text().splitlines() if line.startswith("| ")]
    tests = [row.split(" | ")[-1] for row in rows if not row.endswith("| test |")]
    assert len(tests) > 40
    for words in tests:
        named = re.findall(r"`([^`]+)`", words)
        assert named or words == "*by hand* |", words
        assert not [name for name in named if not (ROOT / "tests" / name).exists()], words


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](nowhere.md)", ["nowhere.md"]),
        ("[a](faq.md#no-such-heading)", ["faq.md#no-such-heading"]),
        ("# Here\n[a](#here) [b](#there)", ["#there"]),
        ("# Is `it` real?\n[a](#is-it-real)", []),
        ('<img src="none.svg">', ["none.svg"]),
        ("```text\n[a](nowhere.md)\n```\n", []),
        ("[a](https://example.org/none)", []),
    ],
)
def test_a_broken_link_is_found(text: str, broken: list[str]) -> None:
    assert broken_links(ROOT / "docs" / "index.md", text) == broken


# ---- Python ----


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the pages' files and the README's mine.yaml; what is imported there is forgotten."""
    for name, block in FILES.items():
        (tmp_path / name).write_text(block.text)
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "mine.yaml").write_text(re.search(r"^```yaml\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[1])
    (tmp_path / "study.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Plugin, "extra_modules", [])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_python_block_compiles() -> None:
    found = blocks("python")
    assert found
    for block in found:
        compile(block.text, block.page, "exec")


def test_the_examples_of_plugins_pass_their_checks(reader: Path) -> None:
    tests = [name for name in FILES if name.startswith("test_")]
    called = set(re.findall(r"\bcheck_\w+(?=\()", "".join(FILES[name].text for name in tests)))
    assert called == {"check_pretext_task", "check_encoder", "check_decoder", "check_dataset"}
    assert len(tests) == 5
    for name in tests:
        module = importlib.import_module(Path(name).stem)
        functions = [value for key, value in vars(module).items() if key.startswith("test_")]
        assert functions, f"{name} holds no test"
        for function in functions:
            function(**({"tmp_path": reader} if inspect.signature(function).parameters else {}))


def test_the_example_of_a_semi_supervised_task_trains(reader: Path) -> None:
    use_plugin("consistency.py")
    use_plugin("tests.small")
    tried = finetune.try_out(load(FinetuneConfig, {**joining(), "tasks": {"consistency": {}}}))
    assert set(tried.parameters) == {"encoder", finetune.SEGMENT}


def test_a_wrong_example_does_not_pass(reader: Path) -> None:
    wrong = FILES["exposure.py"].text.replace("rng.uniform(rng.fold_in(key, ", "rng.uniform(rng.fold_in(key[:1], ")
    assert wrong != FILES["exposure.py"].text
    (reader / "exposure.py").write_text(wrong)
    with pytest.raises(AssertionError, match="corrupt"):
        importlib.import_module("test_exposure").test_exposure()


def test_the_functions_for_your_own_code_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in blocks("python") if block.page == "models.md"]
    config = ModelConfig(encoder="resnet18", decoder={"channels": [16, 16, 16, 16, 8]})
    model = build_model(config, ("ground", "leaf")).eval()
    export_encoder(tmp_path, model.encoder, config.dump())
    export_model(tmp_path, model, config.dump(), {"resize": (32, 64)})
    scope: dict[str, Any] = {}
    exec(compile(block.text, block.page, "exec"), scope)
    image = torch.rand(1, 3, 40, 70)
    assert scope["segment"](str(tmp_path), image).shape == (1, 40, 70)
    write_image(tmp_path / "photo.png", np.zeros((40, 70, 3), dtype=np.uint8))
    assert scope["mask"](str(tmp_path), str(tmp_path / "photo.png")).shape == (40, 70)
    assert [level.shape[-1] for level in scope["features"](str(tmp_path), image)] == [48, 24, 12, 6, 3]
    assert "100.0% of the parameters" in capsys.readouterr().out


# ---- commands ----


def calls(script: str, folder: Path) -> list[list[str]]:
    """The words of each call of ssl-seg, as bash expands them."""
    log = folder / "calls"
    log.write_bytes(b"")
    bash = [shutil.which("bash"), "--noprofile", "--norc", "-c", SHELL + script]
    done = subprocess.run(bash, env={"CALLS": str(log)}, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{done.stderr}in\n{script}"
    words = iter(log.read_bytes().decode().split("\0")[:-1])
    return [[next(words) for _ in range(int(count))] for count in words]


def check_call(words: list[str]) -> None:
    """Raise for a command, a flag, a key or a value that does not exist."""
    name, *rest = words
    command = typer.main.get_command(app).commands[name]
    given = command.make_context(name, rest).params
    for plugin in given.get("plugin") or []:
        use_plugin(plugin)
    if name == "select":
        load(SelectConfig, {"data": {"pool": {"type": "folder", "images": given["pool"]}}, "init": given["init"]})
    elif name == "gap":
        target, *pools = [{"type": "folder", "images": word} for word in given["words"]]
        load(
            GapConfig,
            {"data": {"target": target, "pools": {own["images"]: own for own in pools}}, "init": given["init"]},
        )
    elif name == "check":
        if not any(word.endswith("_labelled") for word in given["words"]):
            assert 1 <= len(given["words"]) <= 2
        else:
            load(FinetuneConfig, given["words"])
    elif name == "pseudo_label":
        PseudoLabelConfig.of(read_words(given["words"] or []))
    elif name in TYPED:
        load(STAGES[name], TYPED[name](given))
    elif name == "probe":
        read_words([word for word in given["words"] if "=" in word or (names_file(word) and word.endswith(".yaml"))])
    elif name == "keys":
        assert keys_of(STAGES[given["stage"]], given["pattern"])
    elif name == "new":
        assert given["kind"] in KINDS
    elif name == "export":
        form = FORMS[given["to"] or BY_SUFFIX[given["out"].suffix]]
        assert given["out"].suffix == form.suffix
    elif name in STAGES:
        load(STAGES[name], given["words"] or [])
    if name == "synth":
        width, height = map(int, given["size"].split("x"))
        kind = {**read_words(given["words"] or []), "type": given["kind"]}
        load(Synthetic, {"kind": kind, "count": given["count"], "size": (height, width), "clip": given["clip"]})
        assert {extra for word in given["beside"] or [] for extra in word.split(",")} <= set(EXTRAS)


def test_every_command_exists(reader: Path) -> None:
    scripts = [block for block in blocks("bash") if "#SBATCH" not in block.text]
    found = [words for block in scripts for words in calls(block.text, reader)]
    assert {words[0] for words in found} >= {"pretrain", "finetune", "compare", "report", "track", "synth"}
    for words in found:
        try:
            check_call(words)
        except UserError as error:
            pytest.fail(f"ssl-seg {' '.join(words)}: {error}")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("ssl-seg pretrain squares train.step=5 --out a", "step"),
        ("ssl-seg pretrain squares model.norm=grup --out a", "model.norm"),
        ("ssl-seg pretrain nothing --out a", "nothing"),
        ("ssl-seg pretrain squares --ou a", "--ou"),
        ("ssl-seg synth shapes noise=loud --out a", "noise"),
        ("ssl-seg pretrian squares", "pretrian"),
    ],
)
def test_a_wrong_command_is_found(script: str, message: str, reader: Path) -> None:
    (words,) = calls(script, reader)
    with pytest.raises(Exception, match=message):
        check_call(words)


@pytest.mark.parametrize("script", ["rm -rf photos", "torchrun train.py", "ssl-seg pretrain $UNKNOWN"])
def test_a_block_holds_our_commands_alone(script: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        calls(script, tmp_path)


def test_the_job_script_passes_the_signal_on_and_asks_for_its_requeue(reader: Path) -> None:
    (block,) = [block for block in blocks("bash") if "#SBATCH" in block.text]
    (line,) = [line for line in block.text.splitlines() if line.startswith("torchrun")]
    check_call(calls(line.removesuffix("&"), reader)[0])
    log = reader / "log"
    stubs = {
        "torchrun": "trap 'sleep 0.2; echo saved >> log; exit 1' TERM; echo begun >> log; while :; do sleep 0.05; done",
        "scontrol": 'echo "$@" >> log',
    }
    for name, body in stubs.items():
        (reader / name).write_text(f"#!/bin/bash\n{body}\n")
        (reader / name).chmod(0o755)
    environment = {"PATH": f"{reader}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "-c", block.text], cwd=reader, env=environment, start_new_session=True)
    try:
        while not (log.exists() and "begun" in log.read_text()):
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=20) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert log.read_text().split("\n") == ["begun", "saved", "requeue 7", ""]


# ---- keys, configs, tables ----


def classes_of(annotation: Any) -> list[type[Config]]:
    """The config classes that a field may hold; of a family of plug-ins all there are."""
    if not inspect.isclass(annotation) or get_args(annotation):
        return [found for part in get_args(annotation) for found in classes_of(part)]
    if issubclass(annotation, Plugin) and inspect.isabstract(annotation):
        return [annotation.choose(name) for name in annotation.names()]
    return [annotation] if issubclass(annotation, Config) else []


def has_key(owners: list[type[Config]], dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    fields = [owner.model_fields[first] for owner in owners if first in owner.model_fields]
    if not rest:
        return bool(fields) or first == "type"
    return has_key([found for field in fields for found in classes_of(field.annotation)], rest)


def unknown_keys(text: str) -> list[str]:
    """Dotted keys in the inline code of a text that no stage has."""
    words = [word for code in re.findall(r"`([^`\n]+)`", prose(text)) for word in code.split()]
    keys = [DOTTED.match(word)[0] for word in words if DOTTED.match(word)]
    return [key for key in keys if not has_key(list(STAGES.values()), key)]


@pytest.mark.parametrize("page", [*DOCS, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_every_key_in_the_text_exists(page: Path) -> None:
    assert unknown_keys(page.read_text()) == []


def test_an_unknown_key_is_found() -> None:
    text = "`train.save_evry=5`, `train.steps`, `model.encoder.name`, `data.pool.root=x`, `stop.never` and `init`"
    assert unknown_keys(text) == ["train.save_evry", "stop.never"]


def load_yaml(text: str) -> Config:
    """The object of a YAML block, which says in its first line what it is."""
    kind, _, _ = text.partition("\n")
    values = yaml.safe_load(text)
    if kind == "# dataset":
        return load(Dataset, values)
    if kind == "# part of a config":
        return load(PretrainConfig, merge(POOL, values))
    if kind == "# part of a study":
        replaced = ("arms", "seeds") if "grid" in values else ()  # a grid with axes of its own for both
        return checked_study({key: own for key, own in yaml.safe_load(STUDY).items() if key not in replaced} | values)
    if kind == "# ssl-seg study":
        return checked_study(values)
    return load(STAGES[kind.removeprefix("# ssl-seg ")], values)


def checked_study(values: dict[str, Any]) -> StudyConfig:
    """With the config of every run in it."""
    study = load(StudyConfig, values)
    make_plan(study, Path("runs/study"))
    return study


def test_every_yaml_block_loads() -> None:
    found = blocks("yaml")
    assert len(found) >= 5
    for block in found:
        load_yaml(block.text)


@pytest.mark.parametrize(
    "text",
    [
        "# dataset\ntype: folder\nimage: a",
        "# part of a config\ntracking: {ever: 1}",
        "# ssl-seg pretrain\na: 1",
        "# part of a study\narms: {a: {trian.lr: 1}, b: {}}",
    ],
)
def test_a_wrong_yaml_block_is_found(text: str) -> None:
    with pytest.raises(UserError):
        load_yaml(text)


def test_the_tracking_keys_are_all_there_with_their_defaults() -> None:
    (block,) = [block for block in blocks("yaml") if "tracking:" in block.text]
    assert yaml.safe_load(block.text)["tracking"] == {name: getattr(Tracking(), name) for name in Tracking.model_fields}


def section(page: str, title: str) -> str:
    text = (ROOT / "docs" / page).read_text()
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def rows(text: str) -> list[tuple[list[str], list[str]]]:
    """The words in backticks in the first column of tables, and the other columns."""
    lines = [re.findall(r"[^|]+", line) for line in text.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", first), [cell.strip() for cell in others]) for first, *others in lines]


@pytest.mark.parametrize(
    "task", [Denoise(), Inpaint(), Colorize(), Jigsaw(), UniMatch(), MeanTeacher()], ids=lambda task: task.type
)
def test_the_options_of_a_task_are_all_there_with_their_defaults(task: Plugin) -> None:
    told: dict[str, Any] = {}
    page = "semisupervised.md" if "semisupervised" in type(task).__module__ else "tasks.md"
    for names, (default, *_) in rows(section(page, task.type)):
        cells = [default] if len(names) == 1 else default.split(", ")
        told |= {name: yaml.safe_load(cell) for name, cell in zip(names, cells, strict=True)}
    wanted = {name: value for name, value in task.dump().items() if name != "type"}
    assert told == {name: "measured" if value is None else value for name, value in wanted.items()}


def test_the_norms_and_decoders_are_all_there() -> None:
    assert {name for names, _ in rows(section("models.md", "Norms")) for name in names} == set(get_args(Kind))
    decoders = {name for names, _ in rows(section("models.md", "Decoders")) for name in names}
    # Those of other tests in this process are named too.
    assert decoders == {name for name in Decoder.names() if Decoder.choose(name).__module__.startswith("ssl_seg.")}


def test_the_data_sets_are_all_there() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    built_in = [name for name in Dataset.names() if Dataset.choose(name).__module__ == f"ssl_seg.datasets.{name}"]
    assert built_in
    assert [name for name in built_in if f"## {name}" not in text] == []


# ---- the drawing ----


def faults_of_svg(text: str) -> list[str]:
    """What a drawing may not hold: anything from elsewhere, and anything that runs."""
    faults = []
    for element in ElementTree.fromstring(text).iter():
        tag = element.tag.rpartition("}")[2]
        if tag in ("script", "image", "foreignObject", "use", "a"):
            faults.append(tag)
        values = [*element.attrib.values(), (element.text or "") if tag == "style" else ""]
        faults += [value for value in values if re.search(r"://|@import|url\((?!#)|^data:", value)]
        faults += [name for name in element.attrib if name.startswith("on")]
    return faults


@pytest.mark.parametrize("drawing", sorted((ROOT / "docs").glob("*.svg")), ids=lambda drawing: drawing.name)
def test_a_drawing_is_well_formed_and_stands_alone(drawing: Path) -> None:
    text = drawing.read_text()
    assert faults_of_svg(text) == []
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    "inside",
    ['<image href="a.png"/>', '<rect fill="url(http://x/y)"/>', "<style>@import 'x'</style>", '<g onload="a()"/>'],
)
def test_what_a_drawing_may_not_hold_is_found(inside: str) -> None:
    assert faults_of_svg(f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>')
