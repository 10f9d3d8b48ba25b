"""Masks for images: class ids as PNG files, and the same in colour over the image for a person."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, SerializeAsAny

from ssl_seg import images, pictures
from ssl_seg.config import Config, UserError
from ssl_seg.data import Whole, loader
from ssl_seg.datasets import Dataset
from ssl_seg.evaluate import choose_device, load_model, predict_ids
from ssl_seg.pretrain import check_images
from ssl_seg.tasks import evaluating


class PredictData(Config):
    images: SerializeAsAny[Dataset]  # masks, if it has any, are not looked at


class PredictConfig(Config):
    """`ssl-seg predict model=runs/a data.images.type=folder data.images.images=photos --out masks`"""

    model: str  # a run folder or its model/
    data: PredictData
    overlays: bool = True  # also write overlays/, colours laid over each image
    workers: int = Field(default=2, ge=0)
    device: str = "auto"


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
    check_images("data.images", config.data.images)
    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    colours = pictures.palette(len(model.class_names))
    count = len(config.data.images)
    names = []
    with evaluating(model):
        for index, packed in enumerate(loader(Whole(config.data.images, resize), one_by_one(count), config.workers)):
            original = config.data.images.read(index).image
            ids = predict_ids(model, packed.to(device).image, original.shape[:2])[0].byte().cpu().numpy()
            name = str(Path(packed.names[0]).with_suffix(".png"))
            images.write_mask(out / "masks" / name, ids, colours)
            if config.overlays:
                images.write_image(out / "overlays" / name, pictures.overlay(original, ids, colours))
            names.append(name)
    return Predicted(out, tuple(names), model.class_names)


def one_by_one(count: int) -> list[list[int]]:
    """Batches of one: images may differ in size."""
    return [[index] for index in range(count)]
