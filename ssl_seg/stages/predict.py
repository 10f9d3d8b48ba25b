"""Masks for images: class ids as PNG files, and the same in colour over the image for a person."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from pydantic import Field, SerializeAsAny

from ssl_seg import files, images
from ssl_seg.config import Config, UserError
from ssl_seg.data.loading import Whole, loader
from ssl_seg.datasets import Dataset
from ssl_seg.figures import panels
from ssl_seg.models import evaluating
from ssl_seg.stages.scoring import predict_ids
from ssl_seg.stages.setup import check_images, tell_notes
from ssl_seg.training.processes import DeviceName, choose_device
from ssl_seg.weights.export import load_model


class PredictData(Config):
    images: SerializeAsAny[Dataset]  # masks, if it has any, are not looked at


class PredictConfig(Config):
    """`ssl-seg predict model=runs/a data.images.type=folder data.images.images=photos --out masks`"""

    model: str  # a run folder or its model/
    data: PredictData
    overlays: bool = True  # also write overlays/, colours laid over each image
    workers: int = Field(default=2, ge=0)
    device: DeviceName = "auto"


@dataclass(frozen=True)
class Predicted:
    """Where the masks are: `out/masks/<name>.png`, one for each image."""

    out: Path
    names: tuple[str, ...]
    class_names: tuple[str, ...]


def predict(config: PredictConfig, out: str | Path) -> Predicted:
    """Predict every image into a new folder, at the image's own size."""
    model, resize = load_model(config.model)
    device = choose_device(config.device)
    model = model.to(device)
    dataset = config.data.images
    check_images("data.images", dataset)
    tell_notes({"images": dataset})
    names = mask_names(dataset)
    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    out.mkdir(parents=True)
    files.write_atomic(out / "classes.json", files.json_bytes({"classes": model.class_names, "model": config.model}))
    colours = panels.palette(len(model.class_names))
    whole = Whole(dataset, with_labels=False)
    one_by_one = [[index] for index in range(len(dataset))]  # images may differ in size
    with evaluating(model):
        for name, packed in zip(names, loader(whole, one_by_one, config.workers), strict=True):
            original = packed.image[0].permute(1, 2, 0).numpy()  # (1, 3, H, W) -> (H, W, 3)
            seen = original if resize is None else images.resize_image(original, resize)
            batch = torch.from_numpy(seen).permute(2, 0, 1)[None].to(device).float() / 255
            ids = predict_ids(model, batch, original.shape[:2])[0].byte().cpu().numpy()
            images.write_mask(out / "masks" / name, ids, colours)
            if config.overlays:
                images.write_image(out / "overlays" / name, panels.overlay(original, ids, colours))
    return Predicted(out, names, model.class_names)


def mask_names(dataset: Dataset) -> tuple[str, ...]:
    """The masks' relative paths: the images' with .png. Raises UserError where two images would share one."""
    names = [PurePosixPath(dataset.name(index)) for index in range(len(dataset))]
    stems = [name.with_suffix("") if name.suffix.lower() in images.IMAGE_SUFFIXES else name for name in names]
    masks = [f"{stem}.png" for stem in stems]
    twice = [mask for mask, count in Counter(masks).items() if count > 1]
    if twice:
        raise UserError(f"data.images: two images would be given the mask {twice[0]}; rename one of them")
    return tuple(masks)
