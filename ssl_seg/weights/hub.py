"""A fine-tuned model as a folder for the Hugging Face hub: weights, what must be known of them, and a model card.

`model.safetensors`, `config.json` and `README.md` are the names that the hub knows. `ssl_seg.load_model` reads such a
folder as it reads a run, with no network; `config.json` is the run's model.json, without what only this machine knows.
The card is written from what the run has noted and from nothing else. The licence is left to whoever publishes it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ssl_seg import files
from ssl_seg.config import user_path
from ssl_seg.models import RGB, ModelConfig, SegmentationModel, evaluating
from ssl_seg.runs.folder import leak_word
from ssl_seg.runs.schema import read_checked
from ssl_seg.weights import forms
from ssl_seg.weights.export import HUB_CONFIG, exported_config, in_words, load_model, read_model_info
from ssl_seg.weights.forms import COMPARED, Exported, difference, words_of

WEIGHTS, CARD = "model.safetensors", "README.md"
TASK = "image-segmentation"  # the hub's word
SCORES = {"val": "validation", "test": "test"}  # parts of result.json, and what the hub calls them

LEAKS = {  # by `folder.leak_word`
    "clean": "Scored images were compared with those trained on: none is alike.",
    "cut": "Scored images were compared with those trained on: some are frames beside these, at the cut alone.",
    "unknown": "Scored images were compared with those trained on, as far as these are known: none is alike.",
    "found": "Scored images were compared with those trained on: **some are alike**, so the scores may be too high.",
    "allowed": "Some scored images are like those trained on, which was allowed, so the scores may be too high.",
}
UNCHECKED = "Whether scored images are like those trained on was not checked."


def export_hub(model: str | Path, out: str | Path) -> Exported:
    """Write the model of a run folder as a folder for the hub, and a receipt beside it (`out` with .json after it).

    Raises UserError for an `out` that is there and, with nothing left, for a folder that answers otherwise than the
    model. Read it by `ssl_seg.load_model("leaf")`.
    """
    out = forms.new_place(out, "")
    network, _ = load_model(model)
    info = read_model_info(model)
    config = exported_config(model, info)
    weights = files.tensor_bytes(network.state_dict())
    # A path of weights is nobody's business. The digest is that of this file: another release may write another one.
    own = {"config": config.without_pretrained().dump(), "sha256": files.sha256(weights)}
    about = files.finite({**info, **own})
    held = {
        WEIGHTS: weights,
        HUB_CONFIG: files.json_bytes(about),
        CARD: _card(out.name, network, config, info, _run_of(model)).encode(),
    }
    differences = _differences(network, held)
    largest = forms.check_equal(differences, "the folder")
    receipt = {
        "read": f'ssl_seg.load_model("{out.name}")',
        "input": forms.input_words(network),
        "compared": differences,  # the largest difference of a logit, as a part of the largest logit
        **forms.facts(info, ("huggingface_hub",)),
    }
    forms.write(out, held, receipt)
    told = (
        f'{out}: ssl_seg.load_model("{out}") answers as the model at {len(COMPARED)} sizes, to {largest:.0e} of the '
        f"largest logit; before you publish it, read {out / CARD} and give it a licence: hf upload YOU/{out.name} {out}"
    )
    return Exported(out, largest, told)


def _differences(network: SegmentationModel, held: Mapping[str, bytes]) -> dict[str, float]:
    """What is read from such a folder, against the model: by the shape of the images."""
    with tempfile.TemporaryDirectory() as folder:
        for name, payload in held.items():
            (Path(folder) / name).write_bytes(payload)
        reread, _ = load_model(folder)
    with evaluating(network):
        return {words_of(shape): difference(network, reread, shape) for shape in COMPARED}


def _run_of(path: str | Path) -> Path | None:
    """The run folder that a model lies in; None for one that was taken out of it."""
    folder = user_path(path)
    return next((own for own in (folder, folder.parent) if (own / "run.json").is_file()), None)


def _card(name: str, network: SegmentationModel, config: ModelConfig, info: Mapping[str, Any], run: Path | None) -> str:
    """The model card: what the run has noted."""
    result = {part: own for part, own in _noted(run, "result.json").items() if isinstance(own, dict)}
    data = ModelCardData(
        library_name="ssl_seg",
        pipeline_tag=TASK,
        tags=["semantic-segmentation", "ssl_seg", "pytorch"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type="unknown",
                dataset_name="the run's own",
                dataset_split=said,
                metric_type="mean_iou",
                metric_name="mIoU",
                metric_value=result[part]["miou"],
            )
            for part, said in SCORES.items()
            if result.get(part, {}).get("miou") is not None
        ]
        or None,
    )
    text = [
        "---",
        "# license: give one of https://huggingface.co/docs/hub/repositories-licenses",
        data.to_yaml(),
        "---",
        f"# {name}",
        "",
        f"Semantic segmentation of {_kind(network)} into {len(network.class_names)} classes: "
        f"{', '.join(map(_plain, network.class_names))}.",
        "",
        *_how_to_use(name),
        *_about_network(network, config, info),
        *_about_data(run),
        *_about_scores(result),
    ]
    return "\n".join(text)


def _kind(network: SegmentationModel) -> str:
    """What the images are."""
    return "RGB images" if network.image_channels == RGB else f"images of {in_words(network.image_channels)}"


def _how_to_use(name: str) -> list[str]:
    return [
        "## Use",
        "",
        "```python",
        "from ssl_seg import load_model",
        "",
        f'mask = load_model("{name}").predict("photo.jpg")  # class ids (H, W), uint8',
        "```",
        "",
        "The name is that of a folder: this one, or what `huggingface_hub.snapshot_download` gives.",
        "",
    ]


def _about_network(network: SegmentationModel, config: ModelConfig, info: Mapping[str, Any]) -> list[str]:
    encoder, decoder = config.encoder.dump(), config.decoder.dump()
    count = sum(weight.numel() for weight in network.parameters())
    called = encoder.get("name", encoder["type"])
    resize = info.get("resize")
    lines = [
        "## Network",
        "",
        f"- encoder `{called}`, decoder `{decoder['type']}`, norm `{config.norm}`: {count / 1e6:.1f} million weights",
        f"- images are {'taken at any size' if resize is None else f'resized to {resize[0]} x {resize[1]} (H x W)'}",
    ]
    if encoder.get("pretrained"):
        lines.append("- the encoder began with published weights, whose licence counts too")
    if info.get("range"):
        black, white = info["range"]
        lines.append(f"- in images of more than 8 bits {black:g} is black and {white:g} white")
    return [*lines, ""]


def _about_data(run: Path | None) -> list[str]:
    """How many images of which part, where the run has noted it."""
    if run is None:
        return []
    noted = _noted(run, "run.json")
    leaks = _noted(run, "leaks.json")
    trained, scored = leaks.get("trained", {}), leaks.get("scored", {})
    labels = _noted(run, "split.json").get("labelled")
    lines = ["## Data", ""]
    if labels is not None:
        lines.append(f"- trained on {len(labels)} labelled images")
    for part, count in trained.items():
        if part != "labelled":
            kind = "images without labels" if part.rpartition(".")[2] == "pool" else "images"
            lines.append(f"- trained on {count} {kind} ({part})")
    lines += [f"- scored on {count} images ({SCORES.get(part, part)})" for part, count in scored.items()]
    lines += [f"- {LEAKS.get(leak_word(leaks or None), UNCHECKED)}", ""]
    made = noted.get("versions", {}).get("ssl_seg")
    origin = noted.get("origin") or {}
    if origin:
        began = f"weights of another run ({origin.get('stage', 'of unknown kind')})"
    elif noted.get("config", {}).get("init"):
        began = "weights of a file, whose licence counts too"
    else:
        began = "no weights of another run"
    lines += [f"Fine-tuned with ssl_seg {made}, from {began}, seed {noted.get('seed')}.", ""]
    return lines


def _about_scores(result: Mapping[str, Any]) -> list[str]:
    parts = [part for part in SCORES if part in result]
    if not parts:
        return ["## Scores", "", "None are known of this model.", ""]
    rows = [key for key in result[parts[0]] if key == "miou" or key == "accuracy" or key.startswith("iou/")]
    lines = ["## Scores", "", f"| | {' | '.join(SCORES[part] for part in parts)} |", f"|---|{'---|' * len(parts)}"]
    for key in rows:
        values = [_figure(result[part].get(key)) for part in parts]
        lines.append(f"| {_plain(key)} | {' | '.join(values)} |")
    passport = result.get("passport", {}).get(parts[-1], {})
    if passport:
        lines += ["", f"mIoU: {passport.get('averaging')}; a class {passport.get('absent')}."]
    return [*lines, ""]


def _noted(run: Path | None, name: str) -> dict[str, Any]:
    """A file of the run; {} where it has none."""
    return read_checked(run / name) if run is not None and (run / name).is_file() else {}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _plain(text: str) -> str:
    """A class's name in Markdown: no line of its own, no cell of a table, no markup."""
    return "".join(f"\\{letter}" if letter in "|*_`<[\\" else letter for letter in " ".join(text.split()))
