"""Rounds of pseudo-labels: train, label what the model is sure of, train anew on both, until no image is left.

Self-training for segmentation with the confident part only: Lee, "Pseudo-label", ICML workshops 2013; Zou et al.,
"Unsupervised domain adaptation for semantic segmentation via class-balanced self-training", ECCV 2018. Every round is a
fine-tuning of its own in the folder, from the same start, and has the pseudo-labelled images as `data.beside`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt, SerializeAsAny

from ssl_seg import files, images
from ssl_seg.config import Config, UserError, load
from ssl_seg.data.loading import Samples
from ssl_seg.data.splits import subset_of
from ssl_seg.datasets import Dataset
from ssl_seg.datasets.relabelled import RECORD as MASKS
from ssl_seg.datasets.relabelled import Relabelled
from ssl_seg.figures import panels
from ssl_seg.losses import IGNORE_INDEX
from ssl_seg.models import evaluating
from ssl_seg.runs.folder import Records
from ssl_seg.runs.lock import hold
from ssl_seg.stages.finetune import FinetuneConfig, Finetuned, finetune
from ssl_seg.stages.scoring import check_memory, logits_at
from ssl_seg.stages.setup import Options, check_images, in_channels
from ssl_seg.stages.start import find_start
from ssl_seg.terminal import say
from ssl_seg.training.config import Share
from ssl_seg.training.processes import Processes
from ssl_seg.weights.export import load_model

RECORD = "rounds.json"


class Rounds(Config):
    """When a pixel and an image are labelled, and how often."""

    confidence: Share = 0.95  # least softmax share of a pixel that is labelled; the others are ignored
    sure: Share = 0.9  # least share of such pixels in an image that is labelled
    most: PositiveInt = 5  # rounds after the first training; each costs a fine-tuning


class PseudoLabelConfig(Config):
    """`ssl-seg pseudo_label`: a fine-tuning with `data.pool`, and `rounds`."""

    pool: SerializeAsAny[Dataset]
    finetune: FinetuneConfig
    rounds: Rounds = Rounds()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> PseudoLabelConfig:
        """From the keys of a fine-tuning, with `rounds` beside them. Raises UserError as `load`."""
        data = values.get("data")
        if not isinstance(data, Mapping) or "pool" not in data:
            raise UserError("data.pool: missing; pseudo-labels are given to its images")
        if data.get("beside") is not None:
            raise UserError("data.beside: the pseudo-labelled images take its place; drop it")
        given = {key: value for key, value in values.items() if key != "rounds"}
        if not values.get("tasks"):
            given["data"] = {key: value for key, value in data.items() if key != "pool"}
        # Each by itself, so that a message names the key as it was written.
        return cls(
            pool=load(Dataset, data["pool"]),
            finetune=load(FinetuneConfig, given),
            rounds=load(Rounds, values.get("rounds") or {}),
        )


@dataclass(frozen=True)
class PseudoLabelled:
    """What `pseudo_label` gives back; the same is in the folder's rounds.json."""

    folder: Path
    trained: tuple[Finetuned, ...]  # first without pseudo-labels, then round by round
    labelled: tuple[int, ...]  # images of the pool that each of them had
    used: dict[str, int]  # how often each image of the pool was drawn, in all rounds together


def pseudo_label(config: PseudoLabelConfig, options: Options) -> PseudoLabelled:
    """Train, label and train anew into a folder: `round_0` is a plain fine-tuning, `labels_1` what it labels ...

    The same command goes on where it was stopped. It ends when all images are labelled, when a round labels none that
    had no label before, or after `rounds.most`. Raises UserError as `finetune`, and for several processes.
    """
    if Processes(config.finetune.train).world > 1:
        raise UserError("pseudo_label: works with one process; start it without torchrun")
    model = find_start(config.finetune).model
    pool = in_channels("data.pool", config.pool, model.channels)
    config = config if pool == config.pool else config.model_copy(update={"pool": pool})
    check_images("data.pool", config.pool)
    place = Records(options.folder)
    _check_folder(place, config)
    with hold(place.folder):
        place.write_json(RECORD, _record(config))
        return _rounds(place, config, options)


def _rounds(place: Records, config: PseudoLabelConfig, options: Options) -> PseudoLabelled:
    trained = [finetune(config.finetune, _in(options, "round_0"))]
    had: list[set[str]] = [set()]
    used: Counter[str] = Counter()
    for number in range(1, config.rounds.most + 1):
        masks = options.folder / f"labels_{number}"
        names = label(config, trained[-1].folder, masks)
        new = names - had[-1]
        say(f"round {number}: {len(names)} of {len(config.pool)} images are labelled, {len(new)} anew", options.quiet)
        if not new:
            break
        beside = Relabelled(images=config.pool, masks=str(masks))
        data = config.finetune.data.model_copy(update={"beside": beside})
        own = config.finetune.model_copy(update={"data": data})
        trained.append(finetune(own, _in(options, f"round_{number}")))
        had.append(names)
        used += draws_of(own, trained[-1])
        if len(names) == len(config.pool):
            break
    all_used = {config.pool.name(index): used[config.pool.name(index)] for index in range(len(config.pool))}
    rounds = [
        {"folder": done.folder.name, "pseudo_labelled": len(names), "miou": done.val.miou, "steps": done.steps}
        for done, names in zip(trained, had, strict=True)
    ]
    place.write_json(RECORD, {**_record(config), "rounds": rounds, "used": all_used})
    return PseudoLabelled(options.folder, tuple(trained), tuple(map(len, had)), all_used)


def label(config: PseudoLabelConfig, model_of: Path, folder: Path) -> set[str]:
    """Write masks of the images that a run's model is sure of, unless all are there; gives the images' names."""
    record = Records(folder)
    former = record.read_json(MASKS) if files.is_there(folder / MASKS) else None
    if former is not None:
        return set(former["masks"])
    with files.naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    model, resize = load_model(model_of)
    device = Processes(config.finetune.train).device
    model = model.to(device)
    colours = panels.palette(len(model.class_names))
    masks: dict[str, str] = {}
    with evaluating(model):
        for index in range(len(config.pool)):
            example = config.pool.image(index)
            size = (example.image.shape[0], example.image.shape[1])
            seen = example.image if resize is None else images.resize_image(example.image, resize)
            check_memory(model, seen.shape[:2], "predicting", size)
            batch = torch.from_numpy(seen.copy()).permute(2, 0, 1)[None].to(device).float() / 255
            share, ids = logits_at(model, batch, size)[0].softmax(dim=0).max(dim=0)
            is_sure = share >= config.rounds.confidence
            if is_sure.float().mean().item() >= config.rounds.sure:
                masks[example.name] = f"{index:06d}.png"
                ids = ids.masked_fill(~is_sure, IGNORE_INDEX).byte().cpu().numpy()
                images.write_mask(folder / masks[example.name], ids, colours)
    record.write_json(MASKS, {"classes": model.class_names, "masks": masks})
    return set(masks)


def draws_of(config: FinetuneConfig, done: Finetuned) -> Counter[str]:
    """How often each image beside was drawn: a function of the config alone."""
    labelled = subset_of(config.data.labelled, done.labelled)
    samples = Samples(labelled, config.augment, config.seed, beside=config.data.beside, share=config.data.beside_share)
    count = done.steps * config.train.batch_of("labelled")
    drawn = Counter(samples.name(draw) for draw in range(count) if samples.is_beside(draw))
    return drawn


def _check_folder(place: Records, config: PseudoLabelConfig) -> None:
    """Raise UserError for a folder of something else, or of rounds with other settings."""
    former = place.read_json(RECORD) if files.is_there(place.folder / RECORD) else None
    if former is None:
        if place.folder.exists() and not place.is_new():
            raise UserError(f"--out {place.folder}: exists already and holds no rounds; name a new folder")
        return
    for key, value in _record(config).items():
        if former.get(key) != value:
            raise UserError(f"--out {place.folder}: its rounds have another {key}; name a new folder")


def _record(config: PseudoLabelConfig) -> dict[str, Any]:
    return {"settings": config.rounds.dump(), "finetune": config.finetune.dump(), "pool": config.pool.dump()}


def _in(options: Options, name: str) -> Options:
    return Options(options.folder / name, allow_changed=options.allow_changed, quiet=options.quiet)
