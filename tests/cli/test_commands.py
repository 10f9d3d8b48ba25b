"""The command line as a user meets it: what works, and forty ways to get it wrong, each answered in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from omegaconf import OmegaConf

from ssl_seg import PretrainConfig, cli, images, load
from ssl_seg.config import UserError, flatten, read_words
from ssl_seg.stages.pretrain import try_out
from ssl_seg.training import processes
from tests import ROOT
from tests.processes import command
from tests.small import Textured, finetuning, pretraining

SMALL = str(ROOT / "tests" / "small.py")
FOLDER = "data.test.type=folder"


def run(*words: str) -> int:
    """A command in this process; its exit code."""
    return cli.run(lambda: cli.app(args=[str(word) for word in words], prog_name="ssl-seg", standalone_mode=False))


def as_words(values: dict[str, Any]) -> list[str]:
    """Config values as `dotted.key=value` words."""
    return [f"{key}={json.dumps(value)}" for key, value in flatten(values).items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained and a fine-tuned run, made by commands."""
    folder = tmp_path_factory.mktemp("runs")
    assert run("pretrain", *as_words(pretraining(steps=3)), "--out", folder / "pre", "--quiet") == 0
    started = ["init=" + str(folder / "pre"), "transfer=encoder+denoise"]
    assert run("finetune", *as_words(finetuning(steps=3)), *started, "--out", folder / "fine", "--quiet") == 0
    return folder


def test_finetune_says_its_scores(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = ["init=" + str(runs / "pre"), "transfer=encoder+denoise"]
    assert run("finetune", *as_words(finetuning(steps=3)), *started, "--out", runs / "fine") == 0
    said = capsys.readouterr().out
    result = json.loads((runs / "fine" / "result.json").read_text())
    assert f"test mIoU {result['test']['miou']:.4f}" in said
    assert "disc" in said
    receipts = json.loads((runs / "fine" / "receipts.json").read_text())
    assert receipts["encoder"]["share"] == receipts["decoder"]["share"] == 1.0


def test_pretrain_says_what_comes_next(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*as_words(pretraining(steps=3)), "--out", runs / "pre"]
    for quiet, told in (([], 1), (["--quiet"], 0)):
        assert run("pretrain", *words, *quiet) == 0
        said = capsys.readouterr()
        assert said.err.count(f"next: ssl-seg finetune CONFIG.yaml init={runs / 'pre'} --out FOLDER") == told
        assert f"encoder: {runs / 'pre' / 'encoder'}" in said.out


def test_evaluate_gives_the_score_of_the_run(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    test = as_words({"data": {"test": finetuning()["data"]["test"]}})
    assert run("evaluate", f"model={runs / 'fine'}", *test, "workers=0", "device=cpu", "--out", out) == 0
    result = json.loads((runs / "fine" / "result.json").read_text())
    assert json.loads((out / "result.json").read_text())["test"]["miou"] == pytest.approx(result["test"]["miou"])
    matrix = np.array(json.loads((out / "confusion.json").read_text())["test"])
    kept = json.loads((runs / "fine" / "confusion.json").read_text())["test"]
    np.testing.assert_array_equal(matrix, kept)
    assert images.read_image(out / "predictions.png").shape[2] == 3
    assert run("compare", runs / "fine", out) == 0, "a score on other images can be laid beside the run's"


def test_report_says_where_the_page_is(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", runs / "fine", "--out", tmp_path / "page.html") == 0
    assert f"report: {tmp_path / 'page.html'}" in capsys.readouterr().out


def test_predict_writes_a_mask_for_every_image_at_its_own_size(runs: Path, tmp_path: Path) -> None:
    for name, size in (("a", (50, 70)), ("deep/b", (33, 20))):
        images.write_image(tmp_path / "photos" / f"{name}.png", np.full((*size, 3), 90, dtype=np.uint8))
    words = ["workers=0", "device=cpu", "--out", tmp_path / "out"]
    assert run("predict", runs / "fine", tmp_path / "photos", *words) == 0
    assert images.read_mask(tmp_path / "out" / "masks" / "a.png").shape == (50, 70)
    assert images.read_mask(tmp_path / "out" / "masks" / "deep" / "b.png").max() < 2
    assert images.read_image(tmp_path / "out" / "overlays" / "a.png").shape == (50, 70, 3)


def test_predict_takes_single_images(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one/a", "one/b", "two/a"):
        images.write_image(tmp_path / f"{name}.png", np.full((40, 40, 3), 90, dtype=np.uint8))
    assert run("predict", runs / "fine", "one/a.png", "two", "workers=0", "device=cpu", "--out", "out") == 0
    masks = sorted(path.relative_to("out/masks").as_posix() for path in Path("out/masks").rglob("*.png"))
    assert masks == ["one/a.png", "two/a.png"]


def test_evaluate_takes_folders_and_the_classes_of_the_model(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(2):
        shown = Textured(seed=7).read(index)
        images.write_image(tmp_path / "images" / f"{index}.png", shown.image)
        images.write_mask(tmp_path / "masks" / f"{index}.png", shown.label)
    said = []
    folders = [tmp_path / "images", tmp_path / "masks"]
    typed = [f"data.test.images={folders[0]}", f"data.test.masks={folders[1]}", "data.test.classes=[ground,disc]"]
    for words in ([runs / "fine", *folders], [runs / "fine", tmp_path], [f"model={runs / 'fine'}", FOLDER, *typed]):
        assert run("evaluate", *words, "workers=0", "device=cpu") == 0
        said.append(capsys.readouterr().out)
    assert "disc" in said[0]
    assert said[0] == said[1] == said[2]


def test_predict_refuses_two_images_that_would_share_a_mask(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("png", "bmp"):
        images.write_image(tmp_path / "photos" / "a.png", np.full((8, 8, 3), 90, dtype=np.uint8))
        (tmp_path / "photos" / "a.png").rename(tmp_path / "photos" / f"a.{suffix}")
    images.write_image(tmp_path / "photos" / "a.png", np.full((8, 8, 3), 90, dtype=np.uint8))
    words = [f"model={runs / 'fine'}", "data.images.type=folder", f"data.images.images={tmp_path / 'photos'}"]
    assert run("predict", *words, "workers=0", "device=cpu", "--out", tmp_path / "out") == 2
    assert "a.bmp would be given the same mask as a.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_command_on_a_cpu_keeps_freed_memory_and_python_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(processes, "keep_freed_memory", lambda: told.append("kept"))
    try_out(load(PretrainConfig, pretraining()))
    assert told == []
    for stage, values in (("pretrain", pretraining()), ("finetune", finetuning())):
        assert run(stage, *as_words(values), "--dry-run") == 0
    assert told == ["kept", "kept"]


def test_a_part_of_the_model_can_be_named_without_its_type() -> None:
    words = ["model.encoder.name=resnet34", "model.decoder.channels=[64,32,16,16,16]"]
    config = load(PretrainConfig, read_words([*PRETRAIN_WITHOUT_MODEL, *words]))
    assert config.model.encoder.name == "resnet34"
    assert config.model.decoder.dump() == {
        **config.model.decoder.dump(),
        "type": "unet",
        "channels": [64, 32, 16, 16, 16],
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.encoder=resnet34", "model.decoder=fpn", "tasks=denoise"], ("resnet34", "fpn", {"denoise"})),
        (["tasks=[denoise,rotate]"], ("resnet18", "unet", {"denoise", "rotate"})),
    ],
)
def test_a_word_alone_means_the_type_or_the_name(words: list[str], expected: tuple[str, str, set[str]]) -> None:
    config = load(PretrainConfig, read_words(["data.pool=textured", *words]))
    assert (config.model.encoder.name, config.model.decoder.type, set(config.tasks)) == expected


@pytest.mark.parametrize("words", [[], ["-h"], ["--version"]])
def test_help_and_version_are_printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(words)
    assert not done.value.code
    assert ("0.2.0" if "--version" in words else "pretrain") in capsys.readouterr().out


def test_compare_shows_scores_and_only_what_differs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("finetune", *as_words(finetuning(steps=3)), "seed=7", "--out", runs / "other", "--quiet") == 0
    capsys.readouterr()
    assert run("compare", runs / "fine", runs / "other") == 0
    said = capsys.readouterr().out
    assert "test/miou" in said
    assert "transfer" in said
    assert "no pair: other seeds" in said
    assert "batch_size" not in said


def test_synth_draws_images_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("synth", "squares", "--count", "3", "--size", "64x48", "--out", out, "--seed", "4", "--jobs", "1") == 0
    said = capsys.readouterr()
    assert f"3 images and masks: {out}" in said.out
    assert "image 3/3: " in said.err
    image = images.read_image(out / "images" / "squares_000002.png")
    mask = images.read_mask(out / "masks" / "squares_000002.png")
    assert image.shape == (48, 64, 3)
    assert sorted(np.unique(mask)) == [0, 1]
    assert (out / "sheet.png").is_file()


def test_synth_takes_the_options_of_the_world_as_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dim.yaml").write_text("light: 0.9\nnoise: 0.2\n")
    words = [tmp_path / "dim.yaml", "cue=[colour,texture]", "noise=0"]
    extras = ["--with", "depth,edges", "--with", "instances"]
    command = ["synth", "shapes", *words, *extras, "--count", "1", "--quiet", "--out", tmp_path / "out"]
    assert run(*command) == 0
    assert capsys.readouterr().err == ""
    kept = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert kept["kind"]["type"] == "shapes"
    assert (kept["kind"]["light"], kept["kind"]["noise"], kept["kind"]["cue"]) == (0.9, 0.0, ["colour", "texture"])
    assert kept["size"] == [360, 480]
    parts = ("images", "masks", "depth", "instances", "edges")
    assert all((tmp_path / "out" / part / "shapes_000000.png").is_file() for part in parts)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_dry_run_prints_shapes_and_costs_and_writes_nothing(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = pretraining() if stage == "pretrain" else finetuning()
    assert run(stage, *as_words(values), "--dry-run") == 0
    said = capsys.readouterr().out
    head = "denoise: 4x3x64x64" if stage == "pretrain" else "segment: 4x2x64x64"
    assert head.split(": ")[0] in said
    assert f"-> {head.split(': ')[1]}" in said
    assert "M parameters" in said
    assert "s per step, peak" in said
    assert re.search(r"\d+ steps \(train.steps\): \d+:\d\d, without reading", said)
    assert not list(tmp_path.iterdir())


def without(values: dict[str, Any], *path: str) -> dict[str, Any]:
    """A copy of nested values with one key dropped."""
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    place = copied
    for key in path[:-1]:
        place[key] = dict(place[key])
        place = place[key]
    del place[path[-1]]
    return copied


DRAWN = str(ROOT / "experiments" / "segnet_basic_squares")  # PNGs alone
PRETRAIN = as_words(pretraining())
PRETRAIN_WITHOUT_MODEL = as_words(without(pretraining(), "model"))
FINETUNE = as_words(finetuning())
WRONG = [
    # (words, what the line must name)
    (["pretrain", "nothing.yaml", "--out", "x"], "nothing.yaml: no such file or recipe"),
    (["pretrain", *PRETRAIN], "--out: missing"),
    (["pretrain", *PRETRAIN, "train.lr", "--out", "x"], "train.lr: no such file"),
    (["pretrain", *PRETRAIN, "train.learning_rate=1", "--out", "x"], "unknown key 'learning_rate'"),
    (["pretrain", *PRETRAIN, "tasks.denoise.sigmma=[0.1,0.2]", "--out", "x"], "did you mean 'sigma'"),
    (["pretrain", *PRETRAIN, "tasks.denose={}", "--out", "x"], "did you mean 'denoise'"),
    (["pretrain", *PRETRAIN, "train.steps=many", "--out", "x"], "train.steps"),
    (["pretrain", *PRETRAIN, "train.steps=0", "--out", "x"], "train.steps"),
    (["pretrain", *PRETRAIN, "train.precision=fp8", "--out", "x"], "train.precision"),
    (["pretrain", *PRETRAIN, "train.precision=fp16", "--out", "x"], "fp16 needs a GPU"),
    (["pretrain", *PRETRAIN, "train.lr=-1", "--out", "x"], "train.lr"),
    (["pretrain", *PRETRAIN, "train.accumulate=3", "--out", "x"], "use 3 or 6"),
    (["pretrain", *PRETRAIN, "tasks.denoise=null", "tasks.rotate=null", "--out", "x"], "no task is left"),
    (["pretrain", *PRETRAIN, "tasks.denoise.weight=-2", "--out", "x"], "tasks.denoise.weight"),
    (["pretrain", *PRETRAIN, "model.encoder.name=resnet81", "--out", "x"], "resnet"),
    (["pretrain", *PRETRAIN, "model.encoder.type=tinn", "--out", "x"], "unknown type 'tinn'"),
    (["pretrain", *PRETRAIN, "model.decoder.type=unett", "--out", "x"], "did you mean 'unet'"),
    (["pretrain", *PRETRAIN, "model.norm=bacth", "--out", "x"], "model.norm"),
    (["pretrain", *PRETRAIN, "augment.crop=[0,32]", "--out", "x"], "augment.crop"),
    (["pretrain", *PRETRAIN, "augment.zoom=[2,1]", "--out", "x"], "augment"),
    (["pretrain", *PRETRAIN, "data.pool={type: folder, images: no/such}", "--out", "x"], "no/such"),
    (["pretrain", *PRETRAIN, "data.pool={type: folder, images: 5.5}", "--out", "x"], "data.pool"),
    (["pretrain", *PRETRAIN, "init=no/such/run", "--out", "x"], "no/such/run"),
    (["pretrain", *PRETRAIN, "seed=[", "--out", "x"], "seed=["),
    (["pretrain", *PRETRAIN, "seed=${oc.env:HOME}", "--out", "x"], "oc.env"),
    (["pretrain", *PRETRAIN, "--no-such-flag", "--out", "x"], "--no-such-flag"),
    (["pretrain", *PRETRAIN, "--plugin", "no_such_module", "--out", "x"], "no_such_module"),
    (["pretrain", *as_words(without(pretraining(), "data", "pool")), "--out", "x"], "data.pool: missing"),
    (["pretrain", *as_words(without(pretraining(), "tasks")), "--out", "x"], "tasks: missing"),
    (["finetune", *FINETUNE, "labels.count=5", "--out", "x"], "labels.count: 5 is more than"),
    (["finetune", *FINETUNE, "labels={count: 2, fraction: 0.5}", "--out", "x"], "count and fraction"),
    (["finetune", *FINETUNE, "transfer=encoder+denoise", "--out", "x"], "needs init=RUN"),
    (["finetune", *FINETUNE, "transfer=decoder", "--out", "x"], "'decoder' is not known"),
    (["finetune", *FINETUNE, "tasks.denoise={}", "--out", "x"], "data.pool: missing"),
    (["finetune", *FINETUNE, "segment.num_classes=3", "--out", "x"], "segment.num_classes: 3"),
    (["finetune", *FINETUNE, "data.pool=textured", "--out", "x"], "name a task that reads it"),
    (["pretrain", *PRETRAIN, "data.pool=photos", "--out", "x"], "unknown type 'photos'"),
    (["finetune", *FINETUNE, "data.val={type: synthetic, count: 2}", "--out", "x"], "data.val: its classes"),
    (["finetune", *FINETUNE, "stop.target=2", "--out", "x"], "stop.target"),
    (["finetune", *FINETUNE, "stop.patience=3", "--out", "x"], "give train.eval_every=STEPS too"),
    (["finetune", *FINETUNE, "segment.class_weights=[1,2,3]", "--out", "x"], "3 numbers for 2 classes"),
    (["finetune", *FINETUNE, "segment.cross_entropy=0", "--out", "x"], "nothing is learnt"),
    (["pretrain", *PRETRAIN, "train.betas=[2,3]", "--out", "x"], "train.betas.0"),
    (["pretrain", *PRETRAIN, "train.milestones=[60,90]", "--out", "x"], "train.milestones.0"),
    (["pretrain", *PRETRAIN, "tasks.half.type=denoise", "--out", "x"], "'half' cannot name a task"),
    (["evaluate", "model=no/such/run", "data.test.type=textured"], "no/such/run"),
    (["predict", "model=x", "data.images.type=textured"], "--out: missing"),
    (["compare", "no/such/run"], "no/such/run: is no run folder"),
    (["synth", "circles", "--out", "x"], "kind"),
    (["synth", "squares", "--size", "big", "--out", "x"], "--size big"),
    (["synth", "squares", "--size", "9" * 5000 + "x9", "--out", "x"], "not WIDTHxHEIGHT"),
    (["synth", "squares", "--size", "1x9", "--out", "x"], "size.1: "),
    (["synth", "squares", "--size", "90000x90000", "--out", "x"], "size: 90000 x 90000 are more than"),
    (["synth", "squares"], "--out: missing"),
    (["pretrain", *PRETRAIN, "--out", "~nobody_of_that_name/x"], "no such user"),
    (["pretrain", *PRETRAIN, "--out", "x" * 256], "File name too long"),
    (["pretrain", *PRETRAIN, "--out", ""], "a path is empty"),
    (["pretrain", *PRETRAIN, "init=", "--out", "x"], "init: is empty"),
    (["pretrain", *PRETRAIN, "init=" + "x" * 256, "--out", "x"], "File name too long"),
    (["pretrain", *PRETRAIN, "train.lr=.inf", "--out", "x"], "train.lr: "),
    (["pretrain", *PRETRAIN, "augment.crop=[100000,100000]", "--out", "x"], "augment.crop: "),
    (["pretrain", *PRETRAIN, "data.resize=[100000,100000]", "--out", "x"], "data.resize: "),
    (["pretrain", *PRETRAIN, "train.batch_size=1e12", "--out", "x"], "train.batch_size: "),
    (["pretrain", *PRETRAIN, "recalibrate=1e18", "--out", "x"], "recalibrate: "),
    (["pretrain", *PRETRAIN, "tasks.inpaint.number=1000000000", "--out", "x"], "tasks.inpaint.number: "),
    (["study", "finetune={}", "seeds=1000000000", "--out", "x"], "seeds: 1000000000: 10000 pairs at most"),
    (["synth", "squares", "--count", "1" + "0" * 18, "--out", "x"], "count: "),
    (["compare", "~nobody_of_that_name"], "no such user"),
    (["report", "x" * 256], "File name too long"),
    (["synth", "shapes", "noise=7", "--out", "x"], "kind.noise: "),
    (["synth", "shapes", "nose=0.1", "--out", "x"], "did you mean 'noise'"),
    (["synth", "squares", "nose=0.1", "--out", "x"], "unknown key 'nose'; known: none"),
    (["synth", "shapes", "type=street", "--out", "x"], "write ssl-seg synth street"),
    (["synth", "shapes", "--out", "x" * 300], "File name too long"),
    (["synth", "shapes", "cue=[smell]", "--out", "x"], "kind.cue.0: "),
    (["synth", "shapes", "noise", "--out", "x"], "noise: no such file"),
    (["synth", "shapes", "--clip", "3", "--out", "x"], "clip: shapes does not move"),
    (["synth", "squares", "--with", "depth", "--out", "x"], "--with depth: squares does not draw it"),
    (["synth", "squares", "--with", "edges,deph", "--out", "x"], "--with deph: not known"),
    (["synth", "squares", "--jobs", "0", "--out", "x"], "--jobs"),
    (["pretrian"], "pretrian"),
    (
        ["pretrain", "--epochs", "5", "--out", "x"],
        "--epochs: no such option; write train.steps=STEPS: steps are updates",
    ),
    (["pretrain", *PRETRAIN, "train.epochs=5", "--out", "x"], "one epoch of N images at batch_size B is N/B steps"),
    (["pretrain", *PRETRAIN, "epochs", "5", "--out", "x"], "epochs: no such file or recipe; write train.steps=STEPS"),
    (["finetune", *FINETUNE, "--lr=0.1", "--out", "x"], "--lr: no such option; write train.lr=VALUE"),
    (["finetune", "--batch-size", "4", "--out", "x"], "--batch-size: no such option; write train.batch_size=VALUE"),
    (["finetune", "--batch_size", "4", "--out", "x"], "write train.batch_size=VALUE"),
    (["finetune", "--gpus", "2", "--out", "x"], "write torchrun --nproc-per-node N -m ssl_seg"),
    (["finetune", *FINETUNE, "lr=0.1", "--out", "x"], "lr: unknown key 'lr'; write train.lr=0.1"),
    (["finetune", *FINETUNE, "batch_size=4", "--out", "x"], "write train.batch_size=4"),
    (["finetune", *FINETUNE, "zoom=[1,2]", "--out", "x"], "did you mean 'augment.zoom'"),
    (["predict", "--device", "cpu", "--out", "x"], "--device: no such option; write device=VALUE"),
    (["predict", "a_run", "--batch-size", "4", "--out", "x"], "images are looked at one by one"),
    (["predict", ".", "--out", "x"], ".: is no run, for it has neither run.json nor model.json"),
    (["predict", "no/run", "no/photos", "--out", "x"], "no/run: no such run, folder or image"),
    (["evaluate", "model=a", ".", "--out", "x"], "name the folder of the images, then that of the masks"),
    (["pretrain", ".", "--out", "x"], ".: is a folder, not a config; write --images ."),
    (["finetune", "--images", "a", "data.labelled.images=b", "--out", "x"], "say different things; keep one"),
    (
        ["finetune", *FINETUNE, "data.val=null", "labels.count=10", "--out", "x"],
        "1 is held out to validate on; write 3",
    ),
    (["finetune", "--images", DRAWN, "--masks", DRAWN, "--classes", "a,b", "--out", "x"], "for images and for masks"),
    (["finetune", "--images", DRAWN, "--masks", DRAWN + "/{stem}.png", "--classes", "a,b", "--out", "x"], "no pattern"),
    (["keys", "nothing"], "nothing: has no keys to list; name one of: pretrain"),
    (["keys", "finetune", "train.lrr"], "did you mean train.lr?"),
    (["new", "cats"], "cats: no kind of image that is known; write one of: photos"),
    (["new", "photos", "--images", DRAWN], "--images and --masks go together"),
]


@pytest.mark.parametrize(("words", "named"), WRONG, ids=[named for _, named in WRONG])
def test_what_is_wrong_is_one_line_that_names_it(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert named in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing may be written before the config is known to be right"


@pytest.mark.parametrize(
    "content",
    ["train: {steps: 5, steps: 6}", "train: [", "- a list", "tasks: !!python/object/apply:os.system ['touch canary']"],
)
def test_bad_yaml_is_one_line_with_the_file(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(content)
    assert run("pretrain", "bad.yaml", "--out", "x") == 2
    said = capsys.readouterr().err
    assert said.startswith("ssl-seg: bad.yaml: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_folders_of_others_are_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    for flags in ([], ["--overwrite"]):
        assert run("pretrain", *PRETRAIN, "--out", tmp_path / "thesis", *flags) == 2
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"
    (tmp_path / "file").write_text("also precious")
    assert run("pretrain", *PRETRAIN, "--out", tmp_path / "file") == 2
    assert run("pretrain", *PRETRAIN, "--out", tmp_path / "file" / "below") == 2
    assert capsys.readouterr().err.count("\n") == 4


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(pretraining(steps=500))))
    words = ["pretrain", config, "--plugin", SMALL, "--out", tmp_path / "run"]
    first = command(*words)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        second = command(*words)
        _, said = second.communicate()
        assert second.returncode == 2
        assert str(first.pid) in said
        assert said.count("\n") == 1
        assert first.poll() is None, "the first goes on"
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["pretrain", "no.yaml"], ["pretrain", "--nope"]])
def test_help_and_wrong_words_answer_without_the_heavy_imports(words: list[str]) -> None:
    script = (
        "import sys, time\n"
        "from ssl_seg import cli\n"
        f"code = cli.run(lambda: cli.app(args={words!r}, prog_name='ssl-seg', standalone_mode=False))\n"
        "print(code, 'torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    expected = "0 False" if "--help" in words else "2 False"
    assert done.stdout.strip().splitlines()[-1] == expected, done.stderr


def test_a_bug_of_ours_keeps_its_traceback() -> None:
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(bug)


def test_an_end_of_a_file_is_no_abort_of_a_person() -> None:
    """Click takes an EOFError for the end of what is typed, and would exit silently."""

    app = typer.Typer()

    @app.command()
    def end() -> None:
        raise EOFError

    with pytest.raises(EOFError):
        cli.run(lambda: app(args=[], standalone_mode=False))


def test_errors_become_one_line_whatever_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("a file\nnamed with a line break: gone; rename it")

    assert cli.run(fail) == 2
    assert capsys.readouterr().err == "ssl-seg: a file named with a line break: gone; rename it\n"


def test_accelerate_launch_starts_the_same_command(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "ssl_seg"]
    words = ["pretrain", "squares", "train.batch_size=2", "--dry-run"]
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "denoise: 2x64x32x32" in done.stdout
