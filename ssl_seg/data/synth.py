"""Draw a synthetic world to files, so that it can be looked at and used by other tools."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ssl_seg import files, images
from ssl_seg.config import Interrupted, UserError
from ssl_seg.data.workers import GLANCE
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.figures.panels import grid, legend, palette
from ssl_seg.terminal import reporter, watch_signals
from ssl_seg.worlds import Scene, edges

EXTRAS = ("depth", "instances", "edges")  # what can be written beside the masks
SHEET_SCENES = 12
SHEET_WIDTH = 1800  # about; the width of a screen, where a legend can be read
CHUNK = 4  # scenes a worker is given at once: few, so that the last ones end together
# Seconds for the scenes that are due, beside some for their pixels: a street of 480 x 360 takes a core 0.05 s, and one
# of 100 megapixels half a minute. A world that draws for longer has --jobs 1.
PATIENCE = 120.0
PATIENCE_FOR_A_MEGAPIXEL = 10.0


@dataclass(frozen=True)
class Drawn:
    """The folder: `images/*.png`, `masks/*.png` with class ids, `sheet.png` to look at, `dataset.json`.

    On request `depth/*.png` and `instances/*.png`, 16-bit grey, and `edges/*.png`, 0 or 255. Frames of a clip lie in a
    subfolder each clip, so that `folder` keeps them together.
    """

    out: Path
    count: int
    class_names: tuple[str, ...]

    @property
    def dataset(self) -> dict[str, object]:
        """The config of a data set that reads the files."""
        folder = {"type": "folder", "images": str(self.out / "images"), "masks": str(self.out / "masks")}
        return {**folder, "classes": list(self.class_names)}


def synth(
    dataset: Synthetic, out: str | Path, extras: Sequence[str] = (), jobs: int | None = None, quiet: bool = True
) -> Drawn:
    """Write the data set's images and exact masks into a new folder; the same bytes for any number of `jobs`.

    `extras` are some of EXTRAS; `jobs` processes draw (None: as many as there are cores). The folder appears when all
    is in it. Raises UserError, with nothing written, for a folder that exists, for extras the world does not draw, and
    where the disk does not take the files.
    """
    out = Path(out)
    with files.naming(out):
        if out.exists() or out.is_symlink():
            raise UserError(f"--out {out}: exists already; name a new folder")
    wanted = tuple(extra for extra in EXTRAS if extra in extras)
    _check_extras(dataset, extras)
    drawn = Drawn(out, len(dataset), dataset.class_names)
    with _new_folder(out) as folder:
        # Its processes come before the reporter: they are forked, and a fork copies no thread but its own.
        with (
            _written(dataset, folder, wanted, jobs or _cores()) as scenes,
            reporter(len(dataset), 0, 1, quiet, unit="image") as report,
        ):
            for number, _ in enumerate(scenes, start=1):
                report.step(number, {})
        images.write_image(folder / "sheet.png", sheet(dataset, wanted))
        about = {**dataset.dump(), "class_names": dataset.class_names, "with": wanted}
        files.write_atomic(folder / "dataset.json", files.json_bytes(about))
    return drawn


def sheet(dataset: Synthetic, extras: Sequence[str] = ()) -> np.ndarray:
    """Scenes beside their masks and extras, RGB `(H, W, 3)` uint8, with the names of the classes below."""
    colours = palette(len(dataset.class_names))
    chosen = range(min(SHEET_SCENES, len(dataset)))
    scenes = [_panels(dataset.scene(index), colours, extras) for index in chosen]
    beside = 1 if extras or len(scenes) == 1 else 2  # scenes in a row
    width = SHEET_WIDTH // (beside * len(scenes[0]))
    rows = [
        [panel for scene in scenes[start : start + beside] for panel in scene]
        for start in range(0, len(scenes), beside)
    ]
    panels = grid([[_fitted(panel, width) for panel in row] for row in rows])
    names = legend(dataset.class_names, colours, panels.shape[1])
    return np.concatenate([panels, names])


def _panels(scene: Scene, colours: np.ndarray, extras: Sequence[str]) -> list[np.ndarray]:
    shown = [scene.image, colours[scene.label]]
    if "depth" in extras:
        depth = _map(scene, "depth")
        near, far = int(depth.min()), int(depth.max())
        grey = (depth.astype(np.int32) - near) * 255 // max(1, far - near)
        shown.append(_as_rgb(255 - grey))  # near is bright
    if "instances" in extras:
        table = palette(256)
        table[0] = 0  # where no object stands
        ids = _map(scene, "instances")
        shown.append(table[np.minimum(ids, ids % 255 + 1)])
    if "edges" in extras:
        shown.append(_as_rgb(_map(scene, "edges")))
    return shown


def _map(scene: Scene, extra: str) -> np.ndarray:
    """One of EXTRAS as it is written: the world draws it, else `synth` would have refused."""
    return edges(scene).astype(np.uint8) * 255 if extra == "edges" else getattr(scene, extra)


def _as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)  # (H, W) -> (H, W, 3)


def _fitted(panel: np.ndarray, width: int) -> np.ndarray:
    """A panel `width` wide; small ones grow by whole pixels, so that one sees them."""
    height = max(1, panel.shape[0] * width // panel.shape[1])
    if panel.shape[1] >= width:
        return images.resize_image(panel, (height, width))
    times = width // panel.shape[1]
    return np.repeat(np.repeat(panel, times, axis=0), times, axis=1)


def _check_extras(dataset: Synthetic, extras: Sequence[str]) -> None:
    for extra in extras:
        if extra not in EXTRAS:
            raise UserError(f"--with {extra}: not known; choose of {', '.join(EXTRAS)}")
    if {"depth", "instances"} & set(extras):
        scene = dataset.scene(0)
        missing = [extra for extra in extras if extra != "edges" and getattr(scene, extra) is None]
        if missing:
            raise UserError(f"--with {missing[0]}: {dataset.kind.type} does not draw it; leave it out")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end, and is gone where something fails or a signal comes."""
    part = out.with_name(files.NEW + out.name)
    with files.naming(out):
        if part.exists():
            shutil.rmtree(part)  # a kill has left it
        part.mkdir(parents=True)
    try:
        with watch_signals():
            yield part
        with files.naming(out):
            os.rename(part, out)
    except Interrupted as error:
        raise Interrupted(error.signum, f"stopped; {out} was not written") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _written(dataset: Synthetic, folder: Path, extras: Sequence[str], jobs: int) -> Iterator[Iterator[None]]:
    """Writes every scene; an item comes for each that is on the disk, in their order."""
    write = partial(_write, dataset, folder, extras)
    count = len(dataset)
    if jobs == 1:
        yield map(write, range(count))
        return
    # Forked where that is possible: a fresh process would import torch for seconds, and know no --plugin.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    begun = context.RawArray("b", count)  # a 1 for each scene that a process has begun
    others = multiprocessing.active_children()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # before the fork: it ends OpenCV's threads, and a child that ends them waits for ever (seen)
    try:
        pool = ProcessPoolExecutor(min(jobs, count), context, _prepare_worker, (os.getpid(), begun))
    except OSError as error:  # no semaphores: shared memory is full or cannot be written
        cv2.setNumThreads(threads)
        raise UserError(
            f"--jobs {jobs}: processes that draw cannot be started ({error.strerror}); give --jobs 1"
        ) from error
    try:
        chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        futures = [pool.submit(_write_some, write, chunk) for chunk in chunks]
        yield _in_time(dataset, chunks, futures, begun)
    except BaseException as error:
        for process in multiprocessing.active_children():
            if process not in others:  # one that stands still would be waited for
                process.kill()
        if isinstance(error, BrokenProcessPool):
            raise UserError(f"--jobs {jobs}: a process was killed, by want of memory perhaps; give fewer") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(threads)


def _in_time(
    dataset: Synthetic, chunks: Sequence[range], futures: Sequence[Future[None]], begun: Sequence[int]
) -> Iterator[None]:
    """An item for each scene once its chunk is written. Raises UserError for one that is due and does not come.

    Seconds are counted by looks, and no clock is read: Ctrl-Z holds all processes.
    """
    patience = PATIENCE + PATIENCE_FOR_A_MEGAPIXEL * CHUNK * math.prod(dataset.size) / 1e6
    for chunk, future in zip(chunks, futures, strict=True):
        waited = 0.0
        while not wait([future], GLANCE).done:
            waited += GLANCE
            if waited > patience:
                # The last that was begun; those before it are written.
                index = next((index for index in reversed(chunk) if begun[index]), chunk[0])
                raise UserError(
                    f"--jobs: image {index} ({dataset.name(index)}) was not drawn within {patience:.0f} s, so its "
                    "process stands still; nothing was written, and the same command draws anew; --jobs 1 waits longer"
                )
        future.result()
        for _ in chunk:
            yield


def _prepare_worker(parent: int, begun: Any) -> None:
    global _begun
    _begun = begun
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach all; the first process ends the others
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    gc.freeze()  # what torch has brought lives on: looking through it again and again took 3 % of the time
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose first process was killed would wait for its next scenes for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _write_some(write: Callable[[int], None], chunk: range) -> None:
    for index in chunk:
        _begun[index] = 1
        write(index)


_begun: Any = ()  # of a worker: shared with the first process, a 1 for each scene that was begun


def _write(dataset: Synthetic, folder: Path, extras: Sequence[str], index: int) -> None:
    scene = dataset.scene(index)
    name = Path(dataset.sequence(index)) / f"{dataset.name(index)}.png"
    images.write_image(folder / "images" / name, scene.image, noisy=True)
    images.write_mask(folder / "masks" / name, scene.label, palette(len(dataset.class_names)))
    for extra in extras:
        images.write_mask(folder / extra / name, _map(scene, extra))


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
