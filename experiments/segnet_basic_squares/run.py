"""Which statistics does SegNet-basic need to find squares at test time? One row of scores.csv for each way of scoring.

    python -m experiments.segnet_basic_squares.run --out runs/squares --size 512 --norms batch --seeds 0 1 2

A network is trained once by train.yaml, for each norm and seed, and scored on fresh squares: by its running statistics,
by those of the image at hand, and by running ones that are estimated anew (`recalibrate`). Rows that are there are not
made again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from experiments.five_sets import Table
from ssl_seg import EvaluateConfig, FinetuneConfig, ModelConfig, Options, evaluate, finetune, load, merge, read_words
from ssl_seg.datasets.synthetic import Synthetic

HERE = Path(__file__).parent
NORMS = {"batch": "keep", "instance": "instance", "switch": "switch"}  # by the words of `model.norm`
WAYS = ["image", "running", "recalibrated"]
TEST_SEED = 12  # train.yaml has 10 and 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512, help="side of a picture in pixels; its box grows with it")
    parser.add_argument("--norms", nargs="+", default=["batch"], choices=NORMS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=20, help="fresh pictures that are scored")
    parser.add_argument("--recalibrate", type=int, default=32, help="training pictures for statistics anew")
    parser.add_argument("--precision", default="bf16", help="of training; scores are float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(options.out / "scores.csv", words=4)
    side = receptive_field()
    print(f"a pixel's answer is made of {side} x {side} pixels")
    print(f"levels to the most similar training picture: {' '.join(map(str, colour_distances(options.count)))}")
    for norm in options.norms:
        for seed in options.seeds:
            measure(table, options, norm, seed)
    print("\n".join(lines(table)))


def measure(table: Table, options: argparse.Namespace, norm: str, seed: int) -> None:
    """Train, and score in each way that there is for this norm."""
    run = options.out / f"{norm}_{options.size}_{seed}"
    values = trained_by(options.size, norm, seed, options.precision)
    if not (run / "result.json").exists():
        finetune(load(FinetuneConfig, values), Options(run, quiet=True))
    for way in ["running"] if norm == "instance" else options.ways:  # instance norm keeps no statistics
        if table.has(options.size, norm, seed, way):
            continue
        model = run
        if way == "recalibrated":  # the same weights: the run is over, and goes on with the statistics alone
            model = options.out / f"{run.name}_recalibrated"
            shutil.copytree(run, model, dirs_exist_ok=True)
            anew = load(FinetuneConfig, {**values, "recalibrate": options.recalibrate})
            finetune(anew, Options(model, allow_changed=("recalibrate",), quiet=True))
        side = [options.size, options.size]
        test = {"type": "synthetic", "kind": "squares", "count": options.count, "size": side, "seed": TEST_SEED}
        asked = {"model": str(model), "data": {"test": test}, "workers": 0, "device": "cpu"}
        asked["statistics"] = "image" if way == "image" else "running"
        out = options.out / f"{run.name}_by_{way}" if seed == options.seeds[0] else None  # pictures
        scores = evaluate(load(EvaluateConfig, asked), out).scores
        table.add(options.size, norm, seed, way, scores.miou, *scores.iou)


def trained_by(size: int, norm: str, seed: int, precision: str) -> dict[str, Any]:
    """The values of train.yaml, with pictures of another size, another norm and another seed."""
    side = [size, size]
    own = {
        "data": {"labelled": {"size": side}, "val": {"size": side}},
        "model": {"norm": NORMS[norm]},
        "augment": {"crop": side},
        "train": {"precision": precision},
        "seed": seed,
    }
    return merge(read_words([str(HERE / "train.yaml")]), own)


def receptive_field() -> int:
    """Pixels in a row of which one pixel's answer is made.

    Pooling hands on one value of four, so that of one picture a part alone is seen: of many all of it. The values that
    it compares with these are not among them: they reach four pixels further for some places.
    """
    torch.manual_seed(0)
    config = load(ModelConfig, trained_by(512, "batch", 0, "fp32")["model"])
    encoder = config.build_encoder().eval()
    head = config.spec(encoder).dense(2).eval()
    sides = []
    for place in range(32, 36):  # another one within the windows of both poolings
        reached = torch.zeros(64, dtype=torch.bool)
        for _ in range(40):
            picture = torch.rand(1, 3, 64, 64, requires_grad=True)
            head(encoder(picture), (64, 64))[0, 0, 32, place].backward()
            assert picture.grad is not None
            reached |= picture.grad[0].abs().sum(dim=(0, 1)) > 0
        columns = reached.nonzero()
        sides.append(int(columns.max() - columns.min()) + 1)
    return max(sides)


def colour_distances(count: int) -> list[int]:
    """For each fresh picture: the largest difference of a channel, of ground or box, to the nearest of training."""
    test, labelled = colours_of(count, TEST_SEED), colours_of(100, 10)
    differences = (test[:, None] - labelled[None]).abs().amax(dim=2)  # (tested, trained)
    return sorted(differences.amin(dim=1).tolist())


def colours_of(count: int, seed: int) -> torch.Tensor:
    """Ground and box of each picture, `(count, 6)`; they do not depend on its size."""
    drawn = Synthetic(count=count, size=(64, 64), seed=seed)
    rows = []
    for index in range(count):
        example = drawn.read(index)
        ground, box = (example.image[example.label == own][0] for own in (0, 1))
        rows.append([*map(int, ground), *map(int, box)])
    return torch.tensor(rows)


def lines(table: Table) -> Iterator[str]:
    """Mean and spread over the seeds of each way."""
    found: dict[tuple[str, ...], list[float]] = {}
    for size, norm, _, way, miou, *_ in table:
        found.setdefault((size, norm, way), []).append(100 * float(miou))
    for (size, norm, way), own in found.items():
        spread = f" (sd {stdev(own):.1f})" if len(own) > 1 else ""
        yield f"{size} px, {norm} norm, {way}: mIoU {mean(own):.1f}{spread}, n = {len(own)}"


if __name__ == "__main__":
    main()
