"""Self-training on two moons: where the gap between the classes is empty it carries the labels along, else across.

python experiments/two_moons/run.py writes moons.png beside this file, and prints what it shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from sklearn.datasets import make_moons
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.semi_supervised import SelfTrainingClassifier

POINTS = 300
LABELS = 2  # of each class
THRESHOLD = 0.65  # how sure the model must be of a point that it labels for the next round
WORLDS = {"a gap between the classes": 0.08, "no gap": 0.3}  # the noise of the moons
COLOURS = np.array([[181, 84, 28], [42, 111, 176]]) / 255


def main() -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    for row, (name, noise) in zip(axes, WORLDS.items(), strict=True):
        points, truth = map(np.asarray, make_moons(POINTS, noise=noise, random_state=0))
        given = labelled(truth)
        # Sure near what it has seen, and at a half far from it: so the labels grow outwards, round by round.
        model = GaussianProcessClassifier(ConstantKernel(10, "fixed") * RBF(0.3, "fixed"))
        alone = model.fit(points[given >= 0], given[given >= 0])
        taught = SelfTrainingClassifier(alone, threshold=THRESHOLD, max_iter=POINTS).fit(points, given)
        scores = [np.mean(own.predict(points) == truth) for own in (alone, taught)]
        draw(row[0], alone, points, given, np.zeros(POINTS), f"{name}: {2 * LABELS} labels, {scores[0]:.0%} right")
        rounds = f"after {taught.n_iter_} rounds"
        draw(row[1], taught, points, taught.transduction_, taught.labeled_iter_, f"{rounds}, {scores[1]:.0%} right")
        print(f"{name} (noise {noise}): {scores[0]:.1%} right by the labels alone, {scores[1]:.1%} {rounds}")
        for number in range(1, taught.n_iter_ + 1):
            of_round = taught.labeled_iter_ == number
            wrong = int((taught.transduction_ != truth)[of_round].sum())
            print(f"  round {number}: {of_round.sum()} points labelled, {wrong} of them wrong")
        print(f"  never labelled: {(taught.labeled_iter_ == -1).sum()}")
    figure.savefig(Path(__file__).with_name("moons.png"), dpi=72, pil_kwargs={"optimize": True})


def labelled(truth: np.ndarray) -> np.ndarray:
    """The class of a few points, -1 of all others."""
    random = np.random.default_rng(0)
    given = np.full(len(truth), -1)
    for label in (0, 1):
        chosen = random.choice(np.flatnonzero(truth == label), LABELS, replace=False)
        given[chosen] = label
    return given


def draw(axes: Axes, model: Any, points: np.ndarray, given: np.ndarray, since: np.ndarray, title: str) -> None:
    """What the model says of the plane, and the labels it learnt from: the later the round, the paler."""
    across, up = np.meshgrid(np.linspace(-1.8, 2.8, 120), np.linspace(-1.4, 1.9, 90))
    sure = model.predict_proba(np.column_stack([across.ravel(), up.ravel()]))[:, 1].reshape(across.shape)
    axes.contourf(across, up, sure, levels=8, cmap="PuOr", alpha=0.35, antialiased=True, vmin=0, vmax=1)
    axes.contour(across, up, sure, levels=[0.5], colors="black", linewidths=1)
    axes.scatter(*points[given < 0].T, s=7, color="#9a9a9a")
    has = given >= 0
    colours = to_rgba_array(COLOURS[given[has]])
    colours[:, 3] = 1 - 0.7 * since[has] / max(1, since.max())
    axes.scatter(*points[has].T, s=9, c=colours)
    first = has & (since == 0)
    axes.scatter(*points[first].T, s=60, c=COLOURS[given[first]], edgecolors="black")
    axes.set(title=title, xticks=[], yticks=[])


main()
