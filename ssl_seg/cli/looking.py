"""The commands before a training: what lies in folders, which images to label, how near a pool is."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ssl_seg.cli.shell import command
from ssl_seg.cli.words import Classes, Images, Masks, Out, Plugins, Quiet, Words, both_in, names_of, needed, read
from ssl_seg.config import Config, UserError, load, merge, use_plugin, user_path
from ssl_seg.reports.console import check_lines, gap_lines, probe_lines
from ssl_seg.terminal import print_lines

commands = typer.Typer()
CONFIGS = {  # of the stages whose keys are listed: where the class is
    "pretrain": "pretrain:PretrainConfig",
    "finetune": "finetune:FinetuneConfig",
    "evaluate": "evaluate:EvaluateConfig",
    "predict": "predict:PredictConfig",
    "portrait": "portrait:PortraitConfig",
    "select": "select:SelectConfig",
    "probe": "probe:ProbeConfig",
    "gap": "gap:GapConfig",
    "study": "config:StudyConfig",
}
WIDTH = 100  # of the lines of a meaning


def config_of(stage: str) -> type[Config]:
    """The config class of a stage whose keys are listed."""
    file, _, name = CONFIGS[stage].partition(":")
    package = "studies" if stage == "study" else "stages"
    return getattr(import_module(f"ssl_seg.{package}.{file}"), name)


@command(
    commands,
    "select",
    "ssl-seg select photos --count 20 --out to_label",
    "ssl-seg select photos --with runs/encoder --out to_label",
)
def select_command(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="A folder of images, or a YAML file with data.pool.")],
    words: Words = None,
    count: Annotated[int | None, typer.Option(min=1, help="How many images; 20 by default.")] = None,
    init: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="RUN", help="Whose encoder compares them; seeds of a fine-tuning, one by one."),
    ] = None,
    out: Out = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Choose which images to label next: those that together look like the whole pool."""
    folder = needed(out)
    given = [] if user_path(pool).is_dir() else [pool]
    values = read("select", [*given, *(words or [])], plugin)
    if not given:
        values = merge({"data": {"pool": {"type": "folder", "images": pool}}}, values)
    values |= {key: value for key, value in (("count", count), ("init", init)) if value}
    from ssl_seg.stages import select
    from ssl_seg.stages.select import SelectConfig

    chosen = select.select(load(SelectConfig, values), folder, quiet)
    unsure = [f"  uncertain: {own:.2f}" for own in chosen.uncertain] or [""] * len(chosen.names)
    shown = zip(chosen.shares, chosen.names, unsure, strict=True)
    print_lines([f"{share * 100:4.0f} %  {name}{more}" for share, name, more in shown])
    if chosen.unlabelled:
        print_lines([f"no labelled mask shows {', '.join(chosen.unlabelled)}"])
    before = f", {chosen.covered_before * 100:.0f} % before" if chosen.covered_before else ""
    cover = f"they cover {chosen.covered * 100:.0f} % of what the pool shows{before}"
    print_lines([f"{len(chosen.names)} images: {chosen.out} (look at {chosen.out / 'sheet.png'}); {cover}"])
    where = f"{{type: folder, images: {chosen.folder}, masks: {chosen.out / 'masks'}, classes: [...]}}"
    print_lines([f"next: draw masks of the same names into {chosen.out / 'masks'}; data.labelled is then {where}"])


@command(
    commands,
    "probe",
    "ssl-seg probe runs/pretrained data.labelled='{type: folder, images: a, masks: b, classes: 2}'",
    "ssl-seg probe resnet18 runs/pretrained squares_labelled",
)
def probe_command(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN ...", help="Runs, files of weights or names of timm; data.labelled.* and others."),
    ],
    out: Out = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Tell in seconds how much frozen encoders know of the classes of a few labelled images."""
    named = [word for word in words if "=" not in word and not word.endswith((".yaml", ".yml"))]
    values = read("probe", [word for word in words if word not in named], plugin)
    values |= {"init": named} if named else {}
    from ssl_seg.stages import probe
    from ssl_seg.stages.probe import ProbeConfig

    print_lines(probe_lines(probe.probe(load(ProbeConfig, values), out, quiet)))
    if out is not None:
        print_lines([f"pictures: {out} (look at {out / 'sheet.png'})"])


@command(
    commands,
    "gap",
    "ssl-seg gap photos drawn/images",
    "ssl-seg gap photos drawn/images others --with runs/pretrained --out gap",
)
def gap_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET POOL ...", help="Folders of images, what the model is for first; or data.* and other keys."
        ),
    ],
    init: Annotated[str | None, typer.Option("--with", metavar="RUN", help="Whose encoder compares them.")] = None,
    out: Out = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Tell how far pools of images, drawn ones say, lie from the images that a model is for; the nearest first."""
    folders = [word for word in words if "=" not in word and user_path(word).is_dir()]
    values = read("gap", [word for word in words if word not in folders], plugin)
    data = values["data"] if isinstance(values.get("data"), dict) else {}
    named: dict[str, Any] = {}
    if folders and "target" not in data:
        named = {"target": {"type": "folder", "images": folders.pop(0)}}
    if not folders and "pools" not in data:
        raise UserError("gap: name the folder of the target images, then those of pools")
    named |= {"pools": {folder: {"type": "folder", "images": folder} for folder in folders}}
    values = merge({"data": named}, values) | ({} if init is None else {"init": init})
    from ssl_seg.stages import gap
    from ssl_seg.stages.gap import GapConfig

    found = gap.gap(load(GapConfig, values), out, quiet)
    print_lines(gap_lines(found))
    if out is not None:
        print_lines([f"pictures: {out} (look at {out / 'sheet.png'})"])


@command(
    commands,
    "new",
    "ssl-seg new microscopy --images labelled/images --masks labelled/masks --out cells.yaml",
    "ssl-seg new streets",
)
def new_command(
    kind: Annotated[
        str, typer.Argument(metavar="[photos|microscopy|streets|aerial]", help="What the images are like.")
    ] = "photos",
    images: Images = None,
    masks: Masks = None,
    classes: Classes = None,
    out: Annotated[
        Path | None, typer.Option("--out", parser=user_path, metavar="FILE.yaml", help="The file; else it is printed.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write the config of a fine-tuning to begin with, the reason beside each key, fitted to the images if named."""
    if out is not None and out.exists():
        raise UserError(f"--out {out}: exists already; name a new file")
    if images is not None and masks is None:
        images, masks = both_in(images) or (images, None)
    if (images is None) != (masks is None):
        raise UserError(
            "new: --images and --masks go together; without masks write ssl-seg pretrain --images FOLDER --out RUN"
        )
    given = {"type": "folder", "images": images, "masks": masks} if images is not None else {}
    given |= {} if classes is None else {"classes": names_of(classes)}
    from ssl_seg.files import naming, write_atomic
    from ssl_seg.stages import check
    from ssl_seg.stages.draft import draft
    from ssl_seg.stages.finetune import FinetuneConfig

    found = None
    if images is not None:
        found = check.check(load(FinetuneConfig, {"data": {"labelled": given}}), None, quiet, propose=True)
    usual = {"type": "folder", "images": "labelled/images", "masks": "labelled/masks", "classes": ["ground", "object"]}
    text = draft(kind, str(out or "FILE.yaml"), given if found is not None else {**usual, **given}, found)
    if out is None:
        print_lines(text.splitlines())
        return
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text.encode())
    print_lines([f"{out}: ssl-seg finetune {shlex.quote(str(out))} --out runs/first"])


@command(
    commands,
    "keys",
    "ssl-seg keys finetune train",
    "ssl-seg keys pretrain tasks.denoise",
)
def keys_command(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help=f"Of which command: {', '.join(CONFIGS)}.")],
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="[PATTERN]",
            help="A key, a part of a word or a glob; a plug-in by its type: tasks.denoise, data.labelled.folder.",
        ),
    ] = "",
    plugin: Plugins = None,
) -> None:
    """List the keys that a config may have: type, default, and what each means."""
    if stage not in CONFIGS:
        raise UserError(f"{stage}: has no keys to list; name one of: {', '.join(CONFIGS)}")
    for module in plugin or ():
        use_plugin(module)
    from ssl_seg.keys import BELOW, REQUIRED, keys_of

    for key in keys_of(config_of(stage), pattern):
        given = "" if key.default == BELOW else f", {REQUIRED}" if key.default == REQUIRED else f" = {key.default}"
        print_lines([f"{key.name} ({key.type}){given}"])
        print_lines(textwrap.wrap(key.meaning, WIDTH, initial_indent="    ", subsequent_indent="    "))


@command(
    commands,
    "check",
    "ssl-seg check labelled/images labelled/masks --classes ground,leaf --out look",
    "ssl-seg check photos",
)
def check_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES [MASKS] | CONFIG ...",
            help="Folders; or the config of a pretraining or fine-tuning. Then keys.",
        ),
    ],
    classes: Classes = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was found as one JSON object.")] = False,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> int:
    """Look at images and masks before anything is trained: what is wrong, and the command that trains on them.

    Exits with 0 where nothing is wrong, with 1 where something is to be mended first.
    """
    folders = [word for word in words if "=" not in word and (user_path(word).is_dir() or "{name}" in word)]
    rest = [word for word in words if word not in folders]
    values = read("check", rest, plugin)
    if len(folders) == 1:
        folders = both_in(folders[0]) or folders
    if len(folders) > 2 or (classes is not None and len(folders) < 2):
        raise UserError("check: name the folder of the images, then that of the masks; --classes goes with these")
    from ssl_seg.stages import check
    from ssl_seg.stages.finetune import FinetuneConfig
    from ssl_seg.stages.pretrain import TASKS, PretrainConfig

    if folders:
        named: dict[str, Any] = dict(zip(("images", "masks"), folders, strict=False))
        named |= {} if classes is None else {"classes": names_of(classes)}
        part = "labelled" if len(folders) == 2 else "pool"
        base: dict[str, Any] = {"data": {part: {"type": "folder", **named}}}
        values = merge(base if part == "labelled" else {**base, "tasks": TASKS}, values)
    data = values.get("data")
    kind = FinetuneConfig if isinstance(data, dict) and "labelled" in data else PretrainConfig
    typed = [*rest, *(word for module in plugin or [] for word in ("--plugin", module))]
    found = check.check(load(kind, values), out, quiet, typed, propose=bool(folders))
    if as_json:
        print_lines([json.dumps(found.plain(), indent=2)])
        return int(bool(found.faults))
    print_lines(check_lines(found))
    print_lines([f"pictures: {out / 'sheet.png'}" if out is not None else "pictures: add --out FOLDER"])
    return int(bool(found.faults))


@command(
    commands,
    "synth",
    "ssl-seg synth street --count 8 --size 480x360 --out street",
    "ssl-seg synth shapes cue=[texture] noise=0.1 --count 8 --with depth,edges --out shapes",
)
def synth_command(
    kind: Annotated[
        str, typer.Argument(metavar="WORLD", help="What to draw: street, nuclei, aerial, shapes or squares.")
    ],
    words: Words = None,
    out: Out = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 500,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Their size in pixels.")] = "480x360",
    seed: Annotated[int, typer.Option(help="The same seed gives the same pixels.")] = 0,
    clip: Annotated[int, typer.Option(min=1, metavar="N", help="Frames of one scene, where the world moves.")] = 1,
    beside: Annotated[
        list[str] | None, typer.Option("--with", metavar="WHAT", help="depth, instances, edges: more than masks.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that draw; one a core by default.")] = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
) -> None:
    """Draw synthetic images with exact masks; the world's options are key=value words, such as noise=0.1."""
    sides = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", size)
    if sides is None:
        raise UserError(f"--size {size}: not WIDTHxHEIGHT; write it as 480x360")
    width, height = sides.groups()
    folder = needed(out)
    options = read("synth", words, plugin)
    if "type" in options:
        raise UserError(f"type={options['type']}: the world is the first word; write ssl-seg synth {options['type']}")
    from ssl_seg.data import synth
    from ssl_seg.datasets.synthetic import Synthetic

    values = {"kind": {**options, "type": kind}, "count": count, "size": (int(height), int(width)), "seed": seed}
    dataset = load(Synthetic, {**values, "clip": clip})
    extras = [extra for words in beside or [] for extra in words.split(",")]
    drawn = synth.synth(dataset, folder, extras, jobs, quiet)
    print_lines([f"{drawn.count} images and masks: {drawn.out} (look at {drawn.out / 'sheet.png'})"])


@command(commands, "models", "ssl-seg models", "ssl-seg models 'convnext*'")
def models_command(
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="PATTERN", help="A name of timm, a part of one, or 'maxvit*'; all of docs/support.md."),
    ] = None,
    check_each: Annotated[
        bool, typer.Option("--check", help="Build and run each, with every decoder: minutes.")
    ] = False,
) -> int:
    """Tell which networks of timm are encoders, how they are adapted, and what goes with them.

    Exits with 1 where --check finds one that does not do what its row says.
    """
    from ssl_seg.models import support
    from ssl_seg.reports.console import print_support

    rows = support.shipped() if pattern is None else [support.support_of(name) for name in support.matching(pattern)]
    print_support(rows)
    if not check_each:
        return 0
    from ssl_seg.testing.support import faults_of

    found = {row.encoder: list(faults_of(row)) for row in rows}
    print_lines([f"{name}: {'; '.join(faults) or 'does what its row says'}" for name, faults in found.items()])
    return int(any(found.values()))
