"""Noisy copies of a folder of images, under the same names: what a network for noisy images is scored on.

python -m experiments.stacked_nuclei.noise data/nuclei/second/images --out data/nuclei/second/noisy
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ssl_seg import images

SIGMA = 25.0  # of 255; usual in the literature on denoising


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sigma", type=float, default=SIGMA)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(given.folder.iterdir())):
        image = images.read_image(path)
        noise = np.random.default_rng(number).normal(0.0, given.sigma, image.shape)
        images.write_image(given.out / f"{path.stem}.png", np.clip(np.rint(image + noise), 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
