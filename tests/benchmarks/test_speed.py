"""Speed and memory as ratios against an honest baseline in the same run. Printed, never asserted: `make bench`."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics
from PIL import Image
from torch.nn import functional as F

from pretext import colorize
from pretext.denoise import Denoise
from pretext.inpaint import Inpaint
from pretext.jigsaw import Jigsaw
from ssl_seg import images, keep_freed_memory, rng
from ssl_seg.config import load
from ssl_seg.data.augment import Augment
from ssl_seg.data.loading import Kept, Samples, Whole, pack
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.figures import panels
from ssl_seg.metrics import ConfusionMatrix, near_boundaries
from ssl_seg.models import ModelConfig, SegmentationModel
from ssl_seg.norm.layers import SwitchNorm2d
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.pretrain import PretrainConfig
from ssl_seg.stages.scoring import count_image, masks_of
from ssl_seg.stages.start import build_module
from ssl_seg.tasks import PretextTask
from ssl_seg.training.depthwise import DepthwiseGradients
from ssl_seg.training.learner import Learner, build_optimizer
from ssl_seg.training.loop import backward, finish_gradients, train
from ssl_seg.training.memory import bytes_of
from ssl_seg.training.multitask import MultiTask
from ssl_seg.training.processes import Processes
from tests.tracking.test_mirror import silent_server

pytestmark = pytest.mark.slow
STEPS = 12
VALUES = {
    "data": {"pool": {"type": "synthetic", "kind": "squares", "count": 32}, "resize": [128, 128]},
    "tasks": {"denoise": {}, "inpaint": {}},
    "train": {"steps": STEPS, "batch_size": 8, "workers": 0, "warmup": 0, "device": "cpu"},
}


def seconds(action: Callable[[], object], times: int = 5) -> float:
    """The median of some runs after a warm-up."""
    action()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return median(taken)


def ratios_by_turns(ways: Mapping[str, Callable[[], object]], to: str, times: int = 7) -> dict[str, float]:
    """By turns, after a warm-up: the median of each way's CPU time as a multiple of that of `to` in the same turn."""
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(times):
        taken = {}
        for name, way in ways.items():
            started = time.process_time()
            way()
            taken[name] = time.process_time() - started
        for name, own in taken.items():
            ratios[name].append(own / taken[to])
    return {name: median(own) for name, own in ratios.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def begun(values: Mapping[str, object]) -> tuple[Learner, dict]:
    """A pretraining before its first step, and its batches."""
    config = load(PretrainConfig, values)
    learner = Learner(build_module(config.model, config.tasks, 0), config.train, Processes(config.train))
    samples = {"pool": Samples(config.data.pool, config.augment, 0, config.data.resize)}
    return learner, open_streams(samples, config.train, learner.processes, learner.module.tasks, 0)


def test_a_step_against_a_bare_loop() -> None:
    """The same network on ready-made tensors, by ten lines of plain PyTorch: what data, keys and checks cost on top."""
    learner, streams = begun(VALUES)
    image = torch.rand(8, 3, 128, 128)
    optimizer = torch.optim.AdamW(learner.module.parameters())

    def bare() -> None:
        optimizer.zero_grad()
        features = learner.module.encoder(torch.cat([image, image])).split([8, 8])
        loss = 0.0
        for head, own in zip(learner.module.heads.values(), features, strict=True):
            loss = loss + F.mse_loss(head(own, (128, 128)), image)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.module.parameters(), 1.0)
        optimizer.step()

    steps = train(learner, streams, 0, seed=0)
    ours = seconds(lambda: next(steps), STEPS - 2)
    plain = seconds(bare, STEPS - 2)
    print(f"\na step: {ours:.3f} s, bare loop {plain:.3f} s, ratio {ours / plain:.2f} (workers: 0, all in one process)")


def test_a_step_of_four_tasks_against_a_naive_loop() -> None:
    """resnet18 U-Net, eight images of 128 x 128, ready-made views, one thread: CPU time, and what tensors hold at most.

    The naive loop encodes for every task, keeps all graphs to one backward pass, and knows no channels_last.
    """
    tasks = {"denoise": {}, "inpaint": {}, "colorize": {}, "jigsaw": {}}
    ours = {
        "together": {},
        "together, channels_last": {"channels_last": True},
        "in_turn": {"encode": "in_turn"},
        "together, colorize light": {},
    }
    steps: dict[str, Callable[[], object]] = {}
    for name, changed in ours.items():
        light = {"colorize": {"decoder": "light"}} if name.endswith("light") else {}
        values = {**VALUES, "tasks": {**tasks, **light}, "train": {**VALUES["train"], **changed}}
        learner, streams = begun(values)
        packed = {"pool": next(streams["pool"])}

        def step(learner: Learner = learner, packed: dict = packed) -> None:
            learner.forget_gradients()
            backward(learner, packed, last=True)
            finish_gradients(learner)
            learner.optimizer.step()

        steps[name] = step
    config = load(PretrainConfig, {**VALUES, "tasks": tasks})
    module = build_module(config.model, config.tasks, 0)
    optimizer = torch.optim.AdamW(module.parameters())
    image, key = packed["pool"].to(torch.device("cpu")).image, rng.fold_in(rng.as_key(0), torch.arange(8))

    def naive() -> None:
        optimizer.zero_grad()
        loss = 0.0
        for name, task in module.tasks.items():
            view = task.corrupt(image, key)
            prediction = module.heads[name](module.encoder(view.input), (128, 128))
            loss = loss + task.loss(prediction, view).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    steps["naive"] = naive
    with one_thread():
        ratios = ratios_by_turns(steps, to="naive", times=5)
        held = {name: bytes_of(step) for name, step in steps.items()}
    for name in ours:
        told = f"{1 / ratios[name]:.2f}x as fast as the naive loop, and holds {held[name] / held['naive']:.2f} of"
        print(f"\na step, {name}: {told} its {held['naive'] / 2**20:.0f} MiB", end="")


STEP_TIMES = """
import sys, time
from statistics import median
from ssl_seg import keep_freed_memory, load, PretrainConfig
from ssl_seg.data.loading import Samples
from ssl_seg.stages.fit import open_streams
from ssl_seg.stages.start import build_module
from ssl_seg.training.learner import Learner
from ssl_seg.training.loop import train
from ssl_seg.training.processes import Processes
if sys.argv[1] == "kept":
    keep_freed_memory()
pool = {"type": "synthetic", "kind": "squares", "count": 32, "size": [96, 96]}
model = {"encoder": {"name": "resnet18"}, "decoder": {"channels": [128, 64, 48, 32, 24]}}
fit = {"steps": 60, "batch_size": 8, "workers": 0, "precision": "bf16", "channels_last": True, "device": "cpu"}
values = {"data": {"pool": pool}, "model": model, "augment": {"crop": [96, 96]}, "tasks": {"denoise": {}}, "train": fit}
config = load(PretrainConfig, values)
learner = Learner(build_module(config.model, config.tasks, 0), config.train, Processes(config.train))
samples = {"pool": Samples(config.data.pool, config.augment, 0)}
steps = train(learner, open_streams(samples, config.train, learner.processes, learner.module.tasks, 0), 0, seed=0)
taken = []
for _ in range(60):
    started = time.perf_counter()
    next(steps)
    taken.append(time.perf_counter() - started)
print(median(taken[10:]))
"""


def test_a_step_with_freed_memory_kept() -> None:
    """Two runs at a time with a thread each, as a study makes them: against glibc's own ways."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    taken: dict[str, list[float]] = {"kept": [], "given back": []}
    for _ in range(2):
        for word, own in taken.items():
            command = [sys.executable, "-c", STEP_TIMES, word]
            both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
            own += [float(process.communicate()[0]) for process in both]
    kept, given_back = (median(own) for own in taken.values())
    print(f"\na step: {kept:.3f} s; freed memory given back {given_back:.3f} s, ratio {given_back / kept:.2f}")


def test_a_depthwise_network_in_half_precision_against_onednn_s_own_gradients() -> None:
    values = {
        "encoder": {"name": "tf_efficientnet_lite0"},
        "decoder": {"type": "unet", "channels": [128, 64, 48, 32, 24]},
    }
    model = load(ModelConfig, values)
    encoder = model.build_encoder()
    net = SegmentationModel(encoder, model.spec(encoder).dense(11), tuple("abcdefghijk"))
    net = net.to(memory_format=torch.channels_last)
    image = torch.rand(8, 3, 96, 96).to(memory_format=torch.channels_last)

    def step(gradients: AbstractContextManager) -> None:
        with torch.autocast("cpu", torch.bfloat16), gradients:
            loss = net(image).float().square().mean()
        loss.backward()

    ours = seconds(lambda: step(DepthwiseGradients()))
    plain = seconds(lambda: step(nullcontext()))
    print(f"\na step of an EfficientNet in bf16: {ours:.3f} s, oneDNN's own {plain:.3f} s, ratio {ours / plain:.2f}")


def test_keyed_normals_against_torchs() -> None:
    keys = rng.fold_in(rng.as_key(0), torch.arange(8))
    ours = seconds(lambda: rng.normal(keys, (3, 128, 128)))
    plain = seconds(lambda: torch.randn(8, 3, 128, 128))
    print(
        f"\nnormals for 8 images of 128x128: {1e3 * ours:.1f} ms, torch.randn {1e3 * plain:.1f} ms, {ours / plain:.1f}x"
    )


def test_the_memory_of_both_ways_of_encoding() -> None:
    """Peak of a process that makes two steps of four tasks."""
    words = ["augment.crop=[256,256]", "train.batch_size=8", "tasks.rotate={}", "tasks.more.type=denoise", "--dry-run"]
    peaks = {}
    for encode in ("together", "in_turn"):
        command = [sys.executable, "-m", "ssl_seg", "pretrain", "squares", *words, f"train.encode={encode}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak = re.search(r"peak (\d+) MiB", said)
        assert peak, said
        peaks[encode] = float(peak[1])
    print(f"\npeak memory: together {peaks['together']:.0f} MiB, in turn {peaks['in_turn']:.0f} MiB (imports included)")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_with_switch_norm_against_batch_norm(channels_last: bool, precision: str) -> None:
    """The same resnet18 U-Net and images, by turns in CPU time; the formulas as they stand are the third."""
    laid = torch.channels_last if channels_last else torch.contiguous_format
    image = torch.rand(8, 3, 128, 128).contiguous(memory_format=laid)
    steps: dict[str, Callable[[], None]] = {}
    for name, kind in (("batch", "batch"), ("switch", "switch"), ("plain", "switch")):
        config = load(PretrainConfig, {**VALUES, "model": {"norm": kind}})
        module = build_module(config.model, config.tasks, 0).to(memory_format=laid)
        optimizer = build_optimizer(module, config.train)
        if name == "plain":
            for layer in filter(lambda layer: isinstance(layer, SwitchNorm2d), module.modules()):
                layer.forward = lambda x, layer=layer: layer.act(layer.drop(layer.plainly(x)))

        def step(module: MultiTask = module, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                drawn = module.heads["denoise"](module.encoder(image), (128, 128))
            drawn.float().square().mean().backward()
            optimizer.step()

        steps[name] = step
    ratios = ratios_by_turns(steps, to="batch")
    told = ", ".join(f"{name} norm {own:.3f}" for name, own in ratios.items() if name != "batch")
    print(f"\nsteps of a U-Net in {precision}, {laid}, as times of batch norm's: {told}")


def test_the_colour_target_against_all_distances() -> None:
    """The colour code and its five bins from the table, against Lab and the distance to every bin."""
    coarse = rng.uniform(rng.fold_in(rng.as_key(0), torch.arange(32)), (3, 9, 9))
    images = F.interpolate(coarse, size=(128, 128), mode="bilinear")

    def by_distance(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ab = colorize.rgb_to_lab(seen)[:, 1:]  # (B, 2, h, w) -> (B*h*w, 2)
        return colorize.soft_encode(ab.movedim(1, -1).flatten(0, 2))

    code = colorize.colour_code(images)
    target = seconds(lambda: colorize.colour_code(images)) / 32
    bins = seconds(lambda: colorize.soft_bins(code)) / 32
    grey = seconds(lambda: colorize.lightness(images)) / 32
    at_stride = seconds(lambda: by_distance(colorize.at_stride(images))) / 32
    full = seconds(lambda: by_distance(images[:2])) / 2
    print(
        f"\ncolours of a 128x128 image: target {1e6 * target:.0f} us, its bins {1e6 * bins:.0f} us, the lightness "
        f"{1e6 * grey:.0f} us; by distance {1e6 * at_stride:.0f} us at stride 4, {1e6 * full:.0f} us at full "
        f"resolution: {at_stride / (target + bins):.0f} and {full / (target + bins):.0f} times as long"
    )


@pytest.mark.timeout(1200)  # nine runs
def test_a_run_with_its_mirror_against_one_without(tmp_path: Path) -> None:
    """What training and evaluating take on all cores while a process sends it to a file, or to a silent server."""
    run = [sys.executable, "-m", "ssl_seg", "pretrain", "squares", "train.steps=150", "train.eval_every=50"]
    taken: dict[str, list[float]] = {"none": [], "a file": [], "a silent server": []}
    with silent_server() as silent:
        words = {"none": "tracking=none", "a file": "tracking.every=1", "a silent server": f"tracking.uri={silent}"}
        for turn in range(3):
            for name, word in words.items():
                out = tmp_path / f"{name}_{turn}"
                subprocess.run([*run, word, "--out", str(out)], capture_output=True, check=True)
                taken[name].append(json.loads((out / "run.json").read_text())["cost"]["seconds"])
    bare = median(taken["none"])
    ratios = ", ".join(f"{name} {median(own):.1f} s = {median(own) / bare:.3f}" for name, own in taken.items())
    print(f"\n150 steps beside a mirror (medians of 3): {ratios}")


def test_a_step_s_images_with_and_without_keeping_them(tmp_path: Path) -> None:
    """Ten labelled photographs of 1600 x 1200, resized to 512 x 384: decoded once, or at every draw."""
    for index in range(10):
        blocks = rng.uniform(rng.as_key(index), (75, 100, 3)).mul(255).byte().numpy()
        image = Image.fromarray(images.resize_image(blocks, (1200, 1600)))
        image.save(tmp_path / f"{index}.jpg", quality=95)
    pool = Folder(images=str(tmp_path))
    taken = {}
    for name, kept in (("kept", Kept()), ("decoded", Kept(most=0))):
        samples = Samples(pool, Augment(crop=(256, 256)), 0, (384, 512), kept=kept)
        draws = itertools.count()
        taken[name] = seconds(lambda samples=samples, draws=draws: [samples[next(draws)] for _ in range(8)], STEPS)
    ratio = taken["decoded"] / taken["kept"]
    print(f"\n8 crops: {1e3 * taken['kept']:.0f} ms; decoded anew {1e3 * taken['decoded']:.0f} ms, ratio {ratio:.1f}")


def test_drawing_streets_against_reading_them_back(tmp_path: Path) -> None:
    """One process, images and masks as PNG of 480 x 360; the aim is 30 a second and core."""
    count = 300
    streets = load(Synthetic, {"kind": "street", "count": count, "size": [360, 480]})
    colours = panels.palette(len(streets.class_names))

    def draw() -> None:
        for index in range(count):
            scene = streets.scene(index)
            images.write_image(tmp_path / "images" / f"{index:03d}.png", scene.image, noisy=True)
            images.write_mask(tmp_path / "masks" / f"{index:03d}.png", scene.label, colours)

    drawing = seconds(draw, 2) / count
    folders = {part: str(tmp_path / part) for part in ("images", "masks")}
    written = load(Folder, {**folders, "classes": list(streets.class_names)})
    reading = seconds(lambda: [written.read(index) for index in range(count)], 2) / count
    print(f"\na street drawn and written: {1e3 * drawing:.1f} ms ({1 / drawing:.1f} a second)", end="")
    print(f", read back {1e3 * reading:.1f} ms, ratio {drawing / reading:.1f}")


@pytest.mark.parametrize("classes", [19, 150])
def test_counting_pixels(classes: int) -> None:
    """A mask of 512 x 1024 as patches of classes, a fifth of it wrong: against torchmetrics and scikit-learn."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (32, 64), generator=draw).repeat_interleave(16, 0).repeat_interleave(16, 1)
    prediction = truth.clone()
    wrong = torch.rand(truth.shape, generator=draw) < 0.2
    prediction[wrong] = torch.randint(0, classes, (int(wrong.sum()),), generator=draw)
    truth[torch.rand(truth.shape, generator=draw) < 0.05] = 255
    theirs = torchmetrics.classification.MulticlassConfusionMatrix(classes, ignore_index=255, validate_args=False)
    ours = ConfusionMatrix(classes)
    numbers = list(range(classes))
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.update(truth, prediction),
        "ours, bytes": lambda: ours.update(truth.byte(), prediction.byte()),
        "torchmetrics": lambda: theirs.update(prediction, truth),
        "scikit-learn": lambda: sk.confusion_matrix(truth.flatten(), prediction.flatten(), labels=numbers),
    }
    taken = {name: seconds(way, 7) for name, way in ways.items()}
    ratios = ", ".join(f"{name} {own / taken['ours']:.1f}" for name, own in taken.items())
    print(f"\n{classes} classes: {1000 * taken['ours']:.2f} ms; times of ours: {ratios}")


def test_counting_a_scored_image() -> None:
    """Whole and near class boundaries, 480 x 360, by turns in CPU time: against picking the pixels that lie near."""
    streets = load(Synthetic, {"kind": "street", "count": 1, "size": [360, 480]})
    classes = len(streets.class_names)
    packed = pack([Whole(streets)[0]])
    masks = masks_of(packed)
    wrong = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    ids = torch.where(wrong, 0, masks)

    def picked() -> np.ndarray:
        whole, near = ConfusionMatrix(classes), ConfusionMatrix(classes)
        whole.update(masks, ids.long())
        where = torch.from_numpy(near_boundaries(masks[0].numpy()))
        near.update(masks[0, where], ids[0, where].long())
        return near.counts.numpy()

    row = count_image(0, packed, ids, classes)
    np.testing.assert_array_equal(picked().ravel()[row.cell], row.band)
    ratios = ratios_by_turns(
        {"ours": lambda: count_image(0, packed, ids, classes), "picked": picked}, to="ours", times=41
    )
    print(f"\na scored image counted: picking pixels takes {ratios['picked']:.2f} times ours")


def test_the_four_corruptions() -> None:
    """Eight images of 128 x 128, one thread, CPU time, beside one blur of 5 x 5.

    The last row here: freed memory is kept, as in a run, and stays so in this process.
    """
    keep_freed_memory()
    batch, keys = torch.rand(8, 3, 128, 128), rng.fold_in(rng.as_key(0), torch.arange(8))
    tasks: list[PretextTask] = [Denoise(), Inpaint(), colorize.Colorize(), Jigsaw()]
    ways = {task.type: partial(task.corrupt, batch, keys) for task in tasks}
    kernel = torch.full((3, 1, 5, 5), 1 / 25)
    ways["blur"] = lambda: F.conv2d(batch, kernel, padding=2, groups=3)
    with one_thread():
        ratios = ratios_by_turns(ways, to="blur", times=25)
        unit = 1e6 * seconds(ways["blur"], times=25) / len(batch)
    for task in tasks:
        print(f"\n{task.type}: {ratios[task.type]:.1f} blurs an image, of {unit:.0f} us", end="")
