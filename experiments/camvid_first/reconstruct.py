"""How good are the reconstructions on frames of a drive that was never trained on, beside trivial ones?

    python experiments/camvid_first/reconstruct.py --run runs/camvid_first/pretrained/two-seed0-... --out pictures

Noise: the noisy frame itself, and a Gaussian blur whose width is the best for these very frames. Holes: the mean colour
of what is visible (what the network is given), linear interpolation from the rim, and OpenCV's Telea. Figures are PSNR
in dB over all 101 frames, inside the holes for inpainting; the network's are those that `ssl-seg pretrain` reports.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy.interpolate import griddata

from ssl_seg import (
    CenterCrops,
    MultiTask,
    PretrainConfig,
    Processes,
    View,
    assemble,
    find_start,
    images,
    load,
    load_state,
    loader,
    make_views,
)
from ssl_seg.metrics import mae, psnr
from ssl_seg.models import evaluating

Fill = Callable[[np.ndarray, np.ndarray], np.ndarray]
WIDTHS = (0.6, 0.8, 1.0, 1.2, 1.5, 2.0)  # standard deviations of the blur, pixels
SHOWN = 4


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--run", type=Path, required=True)
    words.add_argument("--out", type=Path, required=True)
    given = words.parse_args()
    config = load(PretrainConfig, [str(given.run / "config.yaml"), "train.device=cpu"])
    module = trained(config, given.run)
    views, predictions = reconstruct(config, module)
    noise, hole = views["denoise"], views["inpaint"]
    missing = (hole.loss_mask == 1).float()
    blurred = {width: blur(noise.input, width) for width in WIDTHS}
    best = max(WIDTHS, key=lambda width: psnr(blurred[width], noise.target).mean())
    denoised = {
        "noisy frame": noise.input,
        f"blur, sigma {best}": blurred[best],
        "network": predictions["denoise"].clamp(0, 1),
    }
    filled = {
        "mean colour": hole.input,
        "linear": fill(hole, missing, linear),
        "Telea": fill(hole, missing, telea),
        "network": torch.where(missing > 0, predictions["inpaint"].clamp(0, 1), hole.input),
    }
    for name, pictures_ in denoised.items():
        report("denoise", name, psnr(pictures_, noise.target), mae(pictures_, noise.target))
    for name, pictures_ in filled.items():
        report("inpaint", name, psnr(pictures_, hole.target, missing), mae(pictures_, hole.target, missing))
    save_sheet(given.out / "denoise.png", [*denoised.values(), noise.target])
    save_sheet(given.out / "inpaint.png", [*filled.values(), hole.target])


def trained(config: PretrainConfig, run: Path) -> MultiTask:
    """The pretraining network with all its heads, as the run's last checkpoint has it."""
    learner, _ = assemble(config, find_start(config), Processes(config.train))
    state = load_state(run)
    learner.restore(state.tensors, state.data["learner"])
    return learner.module


def reconstruct(config: PretrainConfig, module: MultiTask) -> tuple[dict[str, View], dict[str, torch.Tensor]]:
    """The fixed views of all held-out frames, and the network's answers."""
    samples = CenterCrops(config.data.val, config.augment, config.data.resize)
    batch = next(loader(samples, [list(range(len(config.data.val)))])).to(torch.device("cpu"))
    views = make_views(config.tasks, {"pool": batch})
    with evaluating(module):
        return views, module.predict(views)


def blur(image: torch.Tensor, width: float) -> torch.Tensor:
    frames = image.permute(0, 2, 3, 1).numpy()
    return to_tensor([cv2.GaussianBlur(frame, (0, 0), width) for frame in frames])


def fill(view: View, missing: torch.Tensor, method: Fill) -> torch.Tensor:
    frames = view.input.permute(0, 2, 3, 1).numpy()
    holes = missing[:, 0].numpy() > 0
    return to_tensor([method(frame, hole) for frame, hole in zip(frames, holes, strict=True)])


def linear(frame: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Between the visible pixels next to the hole; the nearest of them where the hole touches the border."""
    rim = (cv2.dilate(hole.astype(np.uint8), np.ones((3, 3))) > 0) & ~hole
    points, wanted = np.argwhere(rim), np.argwhere(hole)
    filled = frame.copy()
    inside = griddata(points, frame[rim], wanted, method="linear")
    nearest = griddata(points, frame[rim], wanted, method="nearest")
    filled[hole] = np.where(np.isnan(inside), nearest, inside)
    return filled


def telea(frame: np.ndarray, hole: np.ndarray) -> np.ndarray:
    bytes_ = (frame * 255).round().astype(np.uint8)
    return cv2.inpaint(bytes_, hole.astype(np.uint8), 3, cv2.INPAINT_TELEA).astype(np.float32) / 255


def to_tensor(frames: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def report(task: str, name: str, decibels: torch.Tensor, error: torch.Tensor) -> None:
    known = decibels[decibels.isfinite()]
    figures = f"PSNR {known.mean():5.2f} dB (sd {known.std():4.2f}), MAE {error.nanmean():.4f}, n = {len(known)}"
    print(f"{task} {name:18} {figures}")


def save_sheet(path: Path, columns: list[torch.Tensor]) -> None:
    chosen = np.linspace(0, len(columns[0]) - 1, SHOWN).round().astype(int)
    panels = [(255 * column[chosen]).round().byte().permute(0, 2, 3, 1).numpy() for column in columns]
    images.write_image(path, np.vstack([np.hstack(row) for row in zip(*panels, strict=True)]))


if __name__ == "__main__":
    main()
