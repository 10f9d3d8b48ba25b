"""Balancing: how much each task counts in a step, by its loss or by its gradient of the shared encoder.

A method is a config (`train.balance`): arithmetic on a few numbers, with no state of its own. All that reads gradients
reads their Gram matrix `(T, T)` alone, the inner products of the tasks' gradients, and gives a coefficient a task: so
whatever is combined lies in their span, and a method is a dozen lines. `Balancer` keeps what a run has learnt by them.

Ours, because the packages that have these methods (torchjd, LibMTL) bring a backward pass or a trainer of their own: in
ours the gradients of a task are summed over micro-batches and averaged over all processes before they are combined, so
that an update does not depend on how a batch is cut.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, dropwhile, groupby
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_serializer
from torch import Tensor, nn

from ssl_seg import rng
from ssl_seg.config import Config

WRAPPERS = frozenset({"backbone", "network", "model"})  # what an encoder's network is held as
LEAST = 1e-2  # a weight of GradNorm never falls below: by a step it would become negative, and never come back from 0
TINY = 1e-12  # what a loss, or a share of the largest squared norm, has at least where it is divided by


class Balance(Config, ABC):
    """A way to weigh tasks against each other. Beside it a task's own `weight` stays what the user finds it worth."""

    name: ClassVar[str]
    reads_gradients: ClassVar[bool] = False  # of each task, so the encoder sees task after task, whatever train.encode

    def factors(self, memory: Mapping[str, np.ndarray], count: int, key: Tensor) -> np.ndarray:
        """On the loss of each of `count` tasks in this step, `(T,)`; `key` is the step's."""
        return np.ones(count)

    def coefficients(self, gram: np.ndarray, key: Tensor) -> np.ndarray:
        """On each task's gradient of the encoder, `(T,)`, by their inner products `(T, T)`; none of them is zero."""
        return np.ones(len(gram))

    def learn(
        self, memory: Mapping[str, np.ndarray], losses: np.ndarray, norms: np.ndarray
    ) -> Mapping[str, np.ndarray]:
        """What is remembered after a step, by its losses and norms of gradients without the tasks' weights, `(T,)`.

        A norm is nan where nothing was measured: the encoder is frozen, or the method does not ask for it.
        """
        return memory

    @model_serializer
    def _as_a_word(self) -> str | dict[str, Any]:
        options = {name: getattr(self, name) for name in type(self).model_fields}
        return {"type": self.name, **options} if options else self.name


class Fixed(Balance):
    """The sum of the losses, each times its task's `weight`."""

    name: ClassVar[str] = "fixed"


class Uncertainty(Balance):
    """Kendall, Gal and Cipolla 2018, with a classification's form for all: exp(-s) * loss + s / 2, and s is learnt.

    So a task whose loss stays high counts less. The whole is times the task's weight, which s could undo otherwise.
    """

    name: ClassVar[str] = "uncertainty"
    lr: PositiveFloat = 10.0  # factor on train.lr for s: as of switch_lr, Adam moves it by lr a step, and it has units


class DynamicWeightAverage(Balance):
    """Liu, Johns and Davison 2019: tasks whose loss falls slowly count more.

    In place of the paper's epochs, which a stream of draws has not, means over `every` steps.
    """

    name: ClassVar[str] = "dwa"
    every: PositiveInt = 50  # steps; below that a small batch's noise is taken for progress
    temperature: PositiveFloat = 2.0  # the paper's: the larger, the more even

    def factors(self, memory: Mapping[str, np.ndarray], count: int, key: Tensor) -> np.ndarray:
        if "earlier" not in memory:
            return np.ones(count)
        rates = memory["before"] / np.maximum(memory["earlier"], TINY)
        return count * _softmax(rates / self.temperature)

    def learn(
        self, memory: Mapping[str, np.ndarray], losses: np.ndarray, norms: np.ndarray
    ) -> Mapping[str, np.ndarray]:
        total = memory.get("total", 0.0) + losses
        steps = memory.get("steps", np.zeros(1)) + 1
        if steps[0] < self.every:
            return {**memory, "total": total, "steps": steps}
        earlier = {"earlier": memory["before"]} if "before" in memory else {}
        return {**earlier, "before": total / steps}


class Random(Balance):
    """Lin et al. 2022: a softmax of normal numbers, drawn anew each step: the baseline that any balancer must beat."""

    name: ClassVar[str] = "random"

    def factors(self, memory: Mapping[str, np.ndarray], count: int, key: Tensor) -> np.ndarray:
        # Times T, so that a mean of 1 keeps the learning rate's meaning.
        return count * _softmax(rng.normal(key, (count,)).double().numpy())


class GradNorm(Balance):
    """Chen et al. 2018: weights by which all tasks' gradients become alike, those that learn slowly somewhat larger.

    Of the whole encoder, where the paper takes the last shared layer. Its weights take Adam's steps; ours divide the
    gradient by the mean norm instead, so that `lr` has no unit.
    """

    name: ClassVar[str] = "gradnorm"
    reads_gradients: ClassVar[bool] = True
    alpha: float = Field(default=1.5, ge=0.0)  # the paper's: how much a slow task gains; 0 makes all norms equal
    lr: PositiveFloat = 0.025  # the paper's

    def factors(self, memory: Mapping[str, np.ndarray], count: int, key: Tensor) -> np.ndarray:
        return memory.get("weights", np.ones(count))

    def learn(
        self, memory: Mapping[str, np.ndarray], losses: np.ndarray, norms: np.ndarray
    ) -> Mapping[str, np.ndarray]:
        first = memory.get("first", losses)
        weights = memory.get("weights", np.ones(len(losses)))
        live = np.flatnonzero(norms > 0)  # not where it is nan
        if len(live) < 2:
            return {"first": first, "weights": weights}
        slowness = np.maximum(losses[live], TINY) / np.maximum(first[live], TINY)
        mean = norms[live].mean()
        target = mean * (slowness / slowness.mean()) ** self.alpha  # norms have the weights in them already
        # The gradient of sum |weight * own - target| by each weight, with the target held, over the mean norm.
        slope = np.sign(norms[live] - target) * norms[live] / weights[live] / mean
        moved = weights.copy()
        moved[live] = np.maximum(weights[live] - self.lr * slope, LEAST)
        moved[live] *= len(live) / moved[live].sum()
        return {"first": first, "weights": moved}


class PCGrad(Balance):
    """Yu et al. 2020: from each task's gradient goes what points against another's; without conflict the plain sum."""

    name: ClassVar[str] = "pcgrad"
    reads_gradients: ClassVar[bool] = True

    def coefficients(self, gram: np.ndarray, key: Tensor) -> np.ndarray:
        count = len(gram)
        total = np.zeros(count)
        for task in range(count):
            own = np.zeros(count)  # in terms of all gradients
            own[task] = 1.0
            order = rng.permutation(rng.fold_in(key, task), count)
            for other in (int(index) for index in order if index != task):
                along = own @ gram[:, other]
                if along < 0:
                    own[other] -= along / gram[other, other]
            total += own
        return total


class CAGrad(Balance):
    """Liu et al. 2021: the direction, within `c` of the mean gradient, in which the worst task improves most.

    Divided by 1 + c^2, as the authors do, and times T, for ours is a sum. So it is the plain sum for c = 0 only.
    """

    name: ClassVar[str] = "cagrad"
    reads_gradients: ClassVar[bool] = True
    c: float = Field(default=0.4, ge=0.0, lt=1.0)  # the authors' for NYUv2; from 1 on it need not converge

    def coefficients(self, gram: np.ndarray, key: Tensor) -> np.ndarray:
        # Here, since every command would wait for it.
        from scipy.optimize import minimize

        count = len(gram)
        mean = np.full(count, 1 / count)
        gram = gram / np.trace(gram)
        radius = self.c * np.sqrt(max(mean @ gram @ mean, 0.0))
        if radius == 0 or count == 1:
            return np.ones(count)

        def worst(share: np.ndarray) -> tuple[float, np.ndarray]:
            norm = np.sqrt(share @ gram @ share + TINY)
            return float(mean @ gram @ share + radius * norm), gram @ mean + radius * gram @ share / norm

        simplex = {"type": "eq", "fun": lambda share: share.sum() - 1, "jac": lambda share: np.ones(count)}
        options = {"ftol": 1e-14, "maxiter": 200}
        bounds = [(0.0, 1.0)] * count
        share = minimize(worst, mean, jac=True, method="SLSQP", bounds=bounds, constraints=simplex, options=options).x
        pull = radius / np.sqrt(share @ gram @ share + TINY)
        return count * (mean + pull * share) / (1 + self.c**2)


class AlignedMTL(Balance):
    """Senushkin et al. 2023: the nearest gradients that are orthogonal and all as long as the least certain direction.

    The scale is the least singular value that is not zero. Orthogonal gradients of one length give the plain sum.
    """

    name: ClassVar[str] = "aligned_mtl"
    reads_gradients: ClassVar[bool] = True

    def coefficients(self, gram: np.ndarray, key: Tensor) -> np.ndarray:
        squares, directions = np.linalg.eigh(gram)
        # The authors' bound for what counts as zero, of a float32 matrix: gradients are no more exact than that.
        live = squares > squares.max() * len(gram) * np.finfo(np.float32).eps
        squares, directions = squares[live], directions[:, live]
        balanced = np.sqrt(squares.min()) * (directions / np.sqrt(squares)) @ directions.T
        return balanced @ np.ones(len(gram))


METHODS: dict[str, type[Balance]] = {
    method.name: method
    for method in (Fixed, Uncertainty, DynamicWeightAverage, Random, GradNorm, PCGrad, CAGrad, AlignedMTL)
}


def _by_name(value: Any) -> Any:
    """The method that a word, or a mapping with its `type`, means."""
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        return value
    options = dict(value)
    name = options.pop("type", None)
    if name not in METHODS:
        raise ValueError(f"unknown type {name!r}; choose one of: {', '.join(METHODS)}")
    return METHODS[name].model_validate(options)


Balancing = Annotated[Balance, BeforeValidator(_by_name)]


class Balancer:
    """A run's method and what it has learnt: factors, memory, log-variances, and the gradients of the step in progress.

    `weights` are the tasks' own, by name; `encoder` is what they share.
    """

    def __init__(self, config: Balance, weights: Mapping[str, float], encoder: nn.Module, device: torch.device) -> None:
        self.config = config
        self.weights = dict(weights)
        self.memory: Mapping[str, np.ndarray] = {}
        self.log_variances: dict[str, nn.Parameter] = {}
        if isinstance(config, Uncertainty):
            self.log_variances = {name: nn.Parameter(torch.zeros((), device=device)) for name in self.weights}
        named = dict(encoder.named_parameters())
        self.shared = list(named.values())
        self.stages = stages_of(list(named))
        self.gradients: dict[str, list[Tensor | None]] = {}  # of the encoder, by task: empty where no method asks
        self.start(rng.as_key(0))

    @property
    def reads_gradients(self) -> bool:
        return self.config.reads_gradients

    def start(self, key: Tensor) -> None:
        """Begin a step, whose `key` this is: forget the gradients of the one before, and weigh the losses."""
        self.key = rng.fold_in(key, "balance")
        self.forget()
        self.coefficients = np.ones(len(self.weights))
        self.gram: np.ndarray | None = None  # (S, T, T), by stage
        if self.log_variances:
            logs = torch.stack([value.detach() for value in self.log_variances.values()])
            found = np.exp(-logs.double().cpu().numpy())
        else:
            found = self.config.factors(self.memory, len(self.weights), self.key)
        self.factors = dict(zip(self.weights, found.tolist(), strict=True))

    def forget(self) -> None:
        """Let go of the gradients."""
        self.gradients = {}

    @contextmanager
    def keeping(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, what a backward pass adds to the encoder is kept apart, as that of the one task named."""
        if not self.reads_gradients:
            yield
            return
        (name,) = names
        own = self.gradients.get(name, [None] * len(self.shared))
        for parameter, gradient in zip(self.shared, own, strict=True):
            parameter.grad = gradient
        yield
        self.gradients[name] = [parameter.grad for parameter in self.shared]
        for parameter in self.shared:
            parameter.grad = None

    def kept(self) -> list[Tensor]:
        """All that is kept apart, in the same order on every process."""
        own = (self.gradients[name] for name in self.weights if name in self.gradients)
        return [gradient for gradients in own for gradient in gradients if gradient is not None]

    def combine(self, from_first: Callable[[np.ndarray], np.ndarray]) -> None:
        """Give the encoder one gradient of all tasks', which the processes have averaged before.

        The plain sum where one of them is not finite: then no step is made. `from_first` gives the first process's
        numbers on all: on another kind of CPU they could differ in the last bit, and the weights ever after.
        """
        if not any(gradient is not None for own in self.gradients.values() for gradient in own):
            return
        names = [name for name in self.weights if name in self.gradients]
        self.gram = self.gram_of(self.gradients)
        whole = self.gram.sum(axis=0)
        live = np.flatnonzero(np.diag(whole) > 0)  # a task without a gradient neither pulls nor is in the way
        if np.isfinite(whole).all() and len(live):
            self.coefficients[live] = from_first(self.config.coefficients(whole[np.ix_(live, live)], self.key))
        pairs = dict(zip(self.weights, self.coefficients.tolist(), strict=True))
        for index, parameter in enumerate(self.shared):
            parts = [(pairs[name], self.gradients[name][index]) for name in names]
            parameter.grad = _weighted_sum([(factor, gradient) for factor, gradient in parts if gradient is not None])
        self.forget()

    def gram_of(self, gradients: Mapping[str, Sequence[Tensor | None]]) -> np.ndarray:
        """Inner products `(S, T, T)` of the tasks' gradients of the encoder, stage by stage."""
        grams = []
        for indices in self.stages.values():
            total = torch.zeros(len(self.weights), len(self.weights), dtype=torch.float64, device=self.shared[0].device)
            for index in indices:
                like = self.shared[index]
                own = [gradients[name][index] if name in gradients else None for name in self.weights]
                if all(gradient is None for gradient in own):
                    continue
                rows = [torch.zeros_like(like) if gradient is None else gradient for gradient in own]
                matrix = torch.stack([row.reshape(-1).double() for row in rows])  # (T, P)
                total += matrix @ matrix.T
            grams.append(total)
        return torch.stack(grams).cpu().numpy()

    def learn(self, losses: Mapping[str, float]) -> None:
        """Take in a step's losses, means over all processes: before the optimizer makes it, and only if it makes it.

        The gradient of a log-variance follows from them, so that it needs no message and is not clipped.
        """
        for name, value in self.log_variances.items():
            slope = self.weights[name] * (0.5 - self.factors[name] * losses[name])
            value.grad = torch.full_like(value, slope)
        weights = np.array(list(self.weights.values()))
        norms = np.full(len(weights), np.nan)
        if self.gram is not None:
            lengths = np.sqrt(np.diag(self.gram.sum(axis=0)))
            norms = np.divide(lengths, weights, out=norms, where=weights > 0)
        self.memory = self.config.learn(self.memory, np.array([losses[name] for name in self.weights]), norms)

    def figures(self) -> dict[str, float]:
        """How much each task counted in the step, beside its own weight: nothing where that never moves."""
        if isinstance(self.config, Fixed):
            return {}
        coefficients = zip(self.weights, self.coefficients.tolist(), strict=True)
        return {f"train/{name}/factor": self.factors[name] * coefficient for name, coefficient in coefficients}

    def affinities(self, gram: np.ndarray) -> dict[str, float]:
        """The cosine of each two tasks' gradients, of the whole encoder and of each stage; none where one is zero."""
        found = {}
        for place, products in (("", gram.sum(axis=0)), *zip(self.stages, gram, strict=True)):
            for (first, one), (second, other) in combinations(enumerate(self.weights), 2):
                lengths = np.sqrt(products[first, first] * products[second, second])
                if lengths > 0 and np.isfinite(lengths):
                    name = "/".join(part for part in ("train/affinity", one, other, place) if part)
                    found[name] = float(products[first, second] / lengths)
        return found

    def state(self) -> dict[str, Any]:
        """What is remembered, as JSON, and of what; the log-variances are tensors of the learner's state."""
        memory = {name: value.tolist() for name, value in self.memory.items()}
        return {"type": self.config.name, "tasks": list(self.weights), "memory": memory}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state()` gave; another method, or one of other tasks, begins anew."""
        same = state["type"] == self.config.name and state["tasks"] == list(self.weights)
        self.memory = {name: np.array(value) for name, value in state["memory"].items()} if same else {}


def stages_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of an encoder's parameters by stage, first to last: its children with layers, or numbered ones of these.

    >>> names = ["backbone.conv1.weight", "backbone.bn1.bias", "backbone.layer1.0.conv1.weight", "blocks.3.conv.bias"]
    >>> stages_of(names)
    {'stem': [0, 1], 'layer1': [2], 'blocks_3': [3]}
    """
    places: list[str] = []
    for name in names:
        first, *rest = dropwhile(WRAPPERS.__contains__, name.split("."))
        if len(rest) <= 1:  # a layer by itself: of the stem, or between two stages
            places.append(places[-1] if places else "stem")
        else:
            # A stage of resnet18 is `layer1`, whose numbers are blocks; one of EfficientNet is `blocks.0`.
            places.append(f"{first}_{rest[0]}" if rest[0].isdigit() and not first[-1].isdigit() else first)
    indices = sorted(range(len(names)), key=lambda index: places.index(places[index]))
    return {place: list(own) for place, own in groupby(indices, key=lambda index: places[index])}


def _weighted_sum(parts: Sequence[tuple[float, Tensor]]) -> Tensor | None:
    """In the order of a plain sum, so that factors of 1 give its bits."""
    total: Tensor | None = None
    for factor, gradient in parts:
        total = gradient * factor if total is None else total.add_(gradient, alpha=factor)
    return total


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()
