"""Is a chosen handful of images worth more than most draws by chance? A linear classifier answers in milliseconds.

    python -m experiments.selection.draws DATA --out runs/draws

DATA is as `experiments.five_sets` makes it. Ridge regression tells the classes apart by the maps of an ImageNet
encoder, which stays as it is, in cells of 8 x 8 pixels. Its equations are sums over images, so any labelled images give
a classifier at once: those that `ssl-seg select` chooses are scored beside 200 draws of as many, from the whole set and
from three parts of it, three quarters each. A line of draws.csv for each set and number of labels.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch.nn import functional as F

from experiments.five_sets import IMAGENET, MASKS, parser_of, part_of, table_of
from experiments.selection.run import COUNTS, choose
from ssl_seg import Dataset, Example, ModelConfig, load

DRAWS, PARTS = 200, 3
SIDE, CELL = 160, 8  # pixels: of the square to which images are squeezed, and of a cell
COMPONENTS = 96  # of the maps' 512 channels, those that vary most over the set
RIDGE = 1e-2  # of the mean square of a component
POWER = -0.5  # of a class's frequency, by which its cells weigh: else few small things are ever predicted
IGNORED = 255


class Classifier:
    """Ridge regression on a set's frozen features, ready to be fitted to any of its images."""

    def __init__(self, data: Path, name: str) -> None:
        encoder = load(ModelConfig, {"encoder": IMAGENET}).build_encoder().eval()
        labelled, scored = (load(Dataset, part_of(data, name, part)) for part in ("labelled", "val"))
        self.classes = len(labelled.class_names)
        self.names = [Path(labelled.name(index)).name for index in range(len(labelled))]
        own, self.counts = _cells(encoder, [labelled.read(index) for index in range(len(labelled))], self.classes)
        other, self.truth = _cells(encoder, [scored.read(index) for index in range(len(scored))], self.classes)
        middle, spread = own.mean(dim=(0, 1)), own.std(dim=(0, 1)) + 1e-6
        own, other = (own - middle) / spread, (other - middle) / spread
        flat = own.flatten(0, 1)
        axes = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -COMPONENTS:]
        own, other = own @ axes, other @ axes
        scale = own.std(dim=(0, 1))
        own, self.scored = (F.pad(cells / scale, (0, 1), value=1.0) for cells in (own, other))
        # Of each image and class the sums that the equations are made of.
        self.squares = torch.einsum("nkc,nkd,nke->ncde", self.counts, own, own)
        self.sums = torch.einsum("nkc,nkd->ncd", self.counts, own)

    def miou(self, images: Sequence[int]) -> float:
        """In points on the scored images, of what these labelled images teach."""
        pixels = self.counts[[*images]].sum(dim=(0, 1))
        seen = pixels > 0
        weight = torch.where(seen, (pixels / pixels.sum()).clamp(min=1e-9) ** POWER, 0.0)
        squares = torch.einsum("c,ncde->de", weight, self.squares[[*images]])
        wanted = weight * self.sums[[*images]].sum(dim=0).T
        ridge = RIDGE * (weight * pixels).sum() * torch.eye(len(squares))
        said = (self.scored @ torch.linalg.solve(squares + ridge, wanted)).masked_fill(~seen, -torch.inf).argmax(dim=2)
        confusion = torch.einsum("nkc,nkp->cp", self.truth, F.one_hot(said, self.classes).float())
        hits = confusion.diag()
        shown = confusion.sum(dim=1) > 0
        return 100 * float((hits / (confusion.sum(dim=0) + confusion.sum(dim=1) - hits))[shown].mean())


def _cells(encoder: torch.nn.Module, examples: Sequence[Example], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `(N, cells, C)` of the images, and how many pixels of each class their cells have, `(N, cells, K)`."""
    features, counts = [], []
    for example in examples:
        image = torch.from_numpy(example.image).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            maps = encoder(F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True))
        cells = [F.interpolate(level, (SIDE // CELL,) * 2, mode="bilinear", antialias=True) for level in maps]
        features.append(torch.cat(cells, dim=1)[0].flatten(1).T)
        label = torch.from_numpy(np.array(example.label))[None, None].float()
        ids = F.interpolate(label, (SIDE, SIDE), mode="nearest-exact")[0, 0].long()
        hot = F.one_hot(ids.where(ids != IGNORED, classes), classes + 1)[..., :classes].permute(2, 0, 1).float()
        counts.append(F.avg_pool2d(hot[None], CELL, divisor_override=1)[0].flatten(1).T)
    return torch.stack(features), torch.stack(counts)


def main() -> None:
    options = parser_of(__doc__, [*MASKS]).parse_args()
    table = table_of(options, words=2, file="draws.csv")
    for name in options.sets:
        drawn_from, chosen = choose(options.data, name, options.out / f"chosen_{name}")
        counts = [count for count in COUNTS if count <= len(drawn_from) / 2 and not table.has(name, count)]
        if not counts:
            continue
        parts = [choose(options.data, name, options.out / f"part_{name}", part)[1] for part in range(PARTS)]
        classifier = Classifier(options.data, name)
        place = {name: index for index, name in enumerate(classifier.names)}
        for count in counts:
            lots = random.Random(0)
            draws = [classifier.miou([place[own] for own in lots.sample(drawn_from, count)]) for _ in range(DRAWS)]
            whole, *of_parts = (classifier.miou([place[own] for own in order[:count]]) for order in (chosen, *parts))
            below = [mean(draw < own for draw in draws) for own in (whole, *of_parts)]
            table.add(name, count, mean(draws), stdev(draws), whole, below[0], mean(of_parts), mean(below[1:]))
            print(
                f"{name} {count}: drawn {mean(draws):.1f} ({stdev(draws):.1f}), chosen {whole:.1f}, better than ",
                end="",
            )
            print(f"{below[0]:.0%} of draws; of parts {mean(of_parts):.1f}, {mean(below[1:]):.0%}", flush=True)
        for folder in options.out.glob(f"*_{name}*"):
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
