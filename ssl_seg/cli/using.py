"""The commands that use a fine-tuned model: masks for images, scores on labelled ones, a file for other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ssl_seg.cli.shell import command
from ssl_seg.cli.words import Classes, Option, Out, Plugins, both_in, is_run, labelled_options, needed, read
from ssl_seg.config import UserError, load, names_file, user_path
from ssl_seg.reports.console import confidence_lines, score_lines
from ssl_seg.terminal import print_lines, say

commands = typer.Typer()


@command(
    commands,
    "predict",
    "ssl-seg predict runs/encoder photos --out predicted",
    "ssl-seg predict runs/encoder photos/a.jpg photos/b.jpg probabilities=true --out two",
)
def predict_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN IMAGES ...", help="A fine-tuned run; a folder of images, or images. Then keys."),
    ] = None,
    out: Out = None,
    plugin: Plugins = None,
) -> None:
    """Write a mask for every image."""
    folder = needed(out)
    values = predict_values(words, plugin)
    from ssl_seg.stages import predict
    from ssl_seg.stages.predict import PredictConfig

    result = predict.predict(load(PredictConfig, values), folder)
    print_lines([f"{len(result.names)} masks: {result.out / 'masks'}"])
    if result.made:
        rate = result.made / result.seconds
        each = 1000 * result.looking / result.made
        print_lines(
            [f"{result.made} images: {each:.1f} ms each by the network, {rate:.1f} images/s with reading and writing"]
        )
    if result.objects is not None:
        counts = ", ".join(f"{count} {name}" for name, count in result.objects.items())
        print_lines([f"objects ({counts}): {result.out / 'objects.csv'}"])


@command(
    commands,
    "evaluate",
    "ssl-seg evaluate runs/encoder test/images test/masks --out scores",
    "ssl-seg evaluate runs/encoder test --classes ground,leaf averages=[macro] contours=true --out scores",
)
def evaluate_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN IMAGES MASKS", help="A fine-tuned run; the images and their masks. Then keys."),
    ] = None,
    classes: Classes = None,
    out: Out = None,
    plugin: Plugins = None,
) -> None:
    """Score a fine-tuned model on a labelled data set."""
    values = evaluate_values(words, classes, plugin)
    from ssl_seg.stages import evaluate
    from ssl_seg.stages.evaluate import EvaluateConfig

    config = load(EvaluateConfig, _as_the_model(values))
    result = evaluate.evaluate(config, out)
    print_lines(score_lines("test", result.scores, result.class_names, config.averages))
    print_lines(confidence_lines("test", result.measured, result.temperature, result.is_in_sample))


@command(
    commands,
    "portrait",
    "ssl-seg portrait runs/pets pets/cat.jpg --subject body --border border --out cat.png",
    "ssl-seg portrait runs/pets a.jpg b.jpg blur=0.03 sharpen=0.5 --subject body --out portraits",
)
def portrait_command(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A fine-tuned run or its model/.")],
    words: Annotated[list[str], typer.Argument(metavar="IMAGE ...", help="Files; or keys, such as blur=0.03.")],
    subject: Annotated[str, typer.Option("--subject", metavar="CLASS", help="The class that stays in focus.")],
    border: Annotated[
        str | None, typer.Option("--border", metavar="CLASS", help="A class that is its outline.")
    ] = None,
    style: Annotated[str | None, typer.Option("--style", help="soft, a lens's; or classic, two small kernels.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", parser=user_path, metavar="PATH", help="A .png, or a folder for them.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Draw an image with what lies behind its subject out of focus."""
    place = needed(out)
    values = portrait_values(model, words, subject, border, style, plugin)
    from ssl_seg.stages import portrait
    from ssl_seg.stages.portrait import PortraitConfig

    for path in portrait.portrait(load(PortraitConfig, values), place):
        print_lines([f"portrait: {path}"])


@command(
    commands,
    "export",
    "ssl-seg export runs/encoder --to onnx --out leaf.onnx",
    "ssl-seg export runs/pretrained --to timm --out leaf.safetensors",
)
def export_command(
    model: Annotated[Path, typer.Argument(parser=user_path, metavar="RUN", help="A run, its model/ or encoder/.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FORM", help="onnx, torch, timm, smp or hub; left out, by the suffix of --out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", parser=user_path, metavar="PATH", help="The file, or the folder, to write.")
    ] = None,
) -> None:
    """Write a model for other programs: compared with the run's own before a word is said of it."""
    if out is None:
        raise UserError("--out: missing; name what to write, such as --out leaf.onnx")
    from ssl_seg.weights import forms

    print_lines([forms.export(model, out, to).told])


def predict_values(words: Sequence[str] | None, plugins: Sequence[str] | None = None) -> dict[str, Any]:
    """What the words of `ssl-seg predict` say."""
    run, paths, rest = _sorted("predict", words)
    return read("predict", rest, plugins, [*_model(run), *_images(paths)])


def evaluate_values(
    words: Sequence[str] | None, classes: str | None = None, plugins: Sequence[str] | None = None
) -> dict[str, Any]:
    """What the words of `ssl-seg evaluate` say."""
    run, paths, rest = _sorted("evaluate", words)
    if len(paths) == 1:
        paths = both_in(paths[0]) or paths
    if len(paths) not in (0, 2):
        raise UserError("evaluate: name the folder of the images, then that of the masks, after the run")
    images, masks = paths or (None, None)
    return read("evaluate", rest, plugins, [*_model(run), *labelled_options("test", images, masks, classes)])


def portrait_values(
    model: str,
    words: Sequence[str],
    subject: str,
    border: str | None = None,
    style: str | None = None,
    plugins: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What the words of `ssl-seg portrait` say."""
    named = [word for word in words if "=" not in word or user_path(word).is_file()]
    rest = [word for word in words if word not in named]
    said = {"model": model, "images": named, "subject": subject, "border": border, "style": style}
    options = [Option(f"--{key}", key, value) for key, value in said.items() if value is not None]
    return read("portrait", rest, plugins, options)


def _sorted(stage: str, words: Sequence[str] | None) -> tuple[str | None, list[str], list[str]]:
    """The run that comes first, if one does; then the paths of images; then files and keys of the config."""
    run: str | None = None
    paths, rest = list[str](), list[str]()
    for word in words or ():
        is_config = "=" in word or word.lower().endswith((".yaml", ".yml"))
        if not is_config and run is None and not paths and is_run(word):
            run = word
        elif not is_config and (user_path(word).exists() or "{name}" in word):
            paths.append(word)
        elif is_config:
            rest.append(word)
        else:
            raise UserError(f"{word}: no such run, folder or image; check the path")
    if paths and run is None and not any(word.startswith("model=") or names_file(word) for word in rest):
        raise UserError(
            f"{paths[0]}: is no run, for it has neither run.json nor model.json; write ssl-seg {stage} RUN, then IMAGES"
        )
    return run, paths, rest


def _model(run: str | None) -> list[Option]:
    return [] if run is None else [Option("the run", "model", run)]


def _images(paths: Sequence[str]) -> list[Option]:
    """A folder, or single images and folders by what they have in common."""
    if not paths:
        return []
    if len(paths) == 1 and user_path(paths[0]).is_dir():
        return [Option("the images", "data.images", {"images": paths[0]})]
    found = [os.path.abspath(user_path(path)) for path in paths]
    together = os.path.commonpath([path if os.path.isdir(path) else os.path.dirname(path) for path in found])
    shown = os.path.relpath(together)
    only = [Path(os.path.relpath(path, together)).as_posix() for path in found]
    return [Option("the images", "data.images", {"images": shown, "only": only})]


def _as_the_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """With what values in masks mean, where that is not said, as for those that the model has learnt from."""
    data = values.get("data")
    test = data.get("test") if isinstance(data, Mapping) else None
    if not isinstance(test, Mapping) or test.get("type") != "folder" or "masks" not in test:
        return dict(values)
    if "classes" in test or "model" not in values:
        return dict(values)
    from ssl_seg import files
    from ssl_seg.weights.export import read_model_info

    known = {"classes": read_model_info(values["model"])["class_names"]}
    record = user_path(values["model"]) / "run.json"
    config = files.read_json(record).get("config", {}) if record.is_file() else {}
    learnt = config.get("data", {}).get("labelled", {})
    if learnt.get("type") == test["type"]:
        taken = {key: learnt[key] for key in ("ignore", "mapping") if learnt.get(key) and key not in test}
        for key, value in taken.items():
            say(f"data.test.{key}: {value}, as for the images of the run")
        known |= taken
    return {**values, "data": {"test": {**known, **test}}}
