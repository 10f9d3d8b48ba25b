"""What people mean by words that other programs have: `--epochs`, `lr=`, `train.batch=`. Each is answered with our key.

A typing error is answered where keys are known (`config`); here are the words that no likeness leads from to ours. They
are looked at before a heavy library is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssl_seg.config import UserError

TRAINING = frozenset({"pretrain", "finetune", "pseudo_label", "check"})
USING = frozenset({"predict", "evaluate"})
SECTIONS = ("train", "training", "optim", "data", "augment", "model")  # where people look for a key, beside the top
STEPS = (
    "write train.steps=STEPS: steps are updates of the weights, and one epoch of N images at batch_size B is N/B steps"
)
GPUS = (
    "a GPU is used if there is one, and CUDA_VISIBLE_DEVICES chooses it; for N of them write torchrun "
    "--nproc-per-node N -m ssl_seg ..."
)
OUT = "write --out FOLDER"
BY_IMAGE = "images are looked at one by one, whatever their size; drop it"


def _each(words: str, meaning: str) -> dict[str, str]:
    return dict.fromkeys(words.split(), meaning)


# A word to the key that is meant, or to a sentence. Where the key is the word itself, other places for it are meant.
OF_TRAINING = {
    **_each("epochs epoch num_epochs n_epochs max_epochs total_epochs", STEPS),
    **_each("gpus gpu gpu_ids num_gpus n_gpus devices", GPUS),
    **_each("out output output_dir out_dir outdir save_dir logdir log_dir o", OUT),
    **_each("steps max_steps num_steps iterations iters max_iter max_iters", "train.steps"),
    **_each("lr learning_rate base_lr init_lr", "train.lr"),
    **_each("batch_size batch bs batchsize train_batch_size", "train.batch_size"),
    **_each("optimizer optim opt", "train.optimizer"),
    **_each("schedule scheduler lr_scheduler lr_schedule", "train.schedule"),
    **_each("weight_decay wd", "train.weight_decay"),
    **_each("workers num_workers n_workers", "train.workers"),
    **_each("accumulate grad_accum accumulate_grad_batches", "train.accumulate"),
    **_each("clip clip_grad grad_clip gradient_clip_val", "train.clip"),
    **_each("precision amp fp16 bf16 mixed_precision", "train.precision"),
    **{word: f"train.{word}" for word in ("device", "ema", "momentum", "warmup", "eval_every", "save_every")},
    **_each("crop crop_size patch_size", "augment.crop"),
    **_each("resize img_size image_size imgsz input_size", "data.resize"),
    **_each("encoder backbone arch", "model.encoder"),
    **_each("pretrained", "model.encoder.pretrained"),
    **{word: f"model.{word}" for word in ("decoder", "norm")},
    **{word: f"data.{word}" for word in ("pool", "val", "test")},
    **_each("init weights checkpoint ckpt", "init"),
    **_each("seed random_seed random_state", "seed"),
    **_each("tasks task pretext", "tasks"),
    **_each("num_labels n_labels", "labels.count"),
    **_each("folds num_folds k_folds n_folds kfold n_splits cv", "labels.folds"),
    **_each("fold", "labels.fold"),
    **_each("num_classes n_classes class_names", "data.labelled.classes"),
    **_each("class_weights", "segment.class_weights"),
    **_each("loss losses criterion", "segment"),
    **_each("patience early_stopping", "stop.patience"),
}
OF_USING = {
    **_each("epochs batch_size batch bs steps", BY_IMAGE),
    **_each("gpus gpu gpu_ids num_gpus n_gpus devices", "a GPU is used if there is one; device=cpu leaves it alone"),
    **_each("out output output_dir out_dir outdir save_dir o", OUT),
    **_each("workers num_workers n_workers", "workers"),
    **_each("weights checkpoint ckpt init run model", "model"),
    **{word: word for word in ("device", "tiles", "overlays", "probabilities", "flips", "averages")},
}


def of_option(error: Any) -> str | None:
    """What is meant by a flag that a command does not have; None for other errors of the command line."""
    if type(error).__name__ != "NoSuchOption":
        return None
    flag, stage = error.option_name, error.ctx.info_name
    meaning = _meaning(stage, flag)
    if meaning is not None:
        return f"{flag}: no such option; {_advice(meaning)}"
    if stage in TRAINING | USING:
        return f"{error.format_message()}; keys of the config are words without dashes, see ssl-seg keys {stage}"
    return None


def check_words(stage: str, words: Sequence[str]) -> None:
    """Raise UserError for a key that stands alone among the words, as in `epochs 5`."""
    for word in words:
        meaning = _meaning(stage, word) if word.isidentifier() else None
        if meaning is not None:
            raise UserError(f"{word}: no such file or recipe; {_advice(meaning)}")


def check_keys(stage: str, values: Mapping[str, Any]) -> None:
    """Raise UserError for a key that other programs have in place of ours, or that is in another place here."""
    for place, key, value in _keys(values):
        meaning = _meaning(stage, key)
        if meaning not in (None, place):
            raise UserError(f"{place}: unknown key '{key}'; {_advice(meaning, value)}")


def _keys(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The keys at the top and in a section: as they are written, the last word of each, and the value."""
    for key, value in values.items():
        yield str(key), str(key), value
    for section in SECTIONS:
        part = values.get(section)
        if isinstance(part, Mapping):
            for key, value in part.items():
                yield f"{section}.{key}", str(key), value


def _meaning(stage: str, word: str) -> str | None:
    known = OF_TRAINING if stage in TRAINING else OF_USING if stage in USING else {}
    return known.get(word.lstrip("-").replace("-", "_").lower())


def _advice(meaning: str, value: Any = None) -> str:
    if " " in meaning:
        return meaning
    shown = json.dumps(value) if isinstance(value, int | float) and not isinstance(value, bool) else "VALUE"
    return f"write {meaning}={shown}"
