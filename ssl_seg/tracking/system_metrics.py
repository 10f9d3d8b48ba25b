"""The load of the machine while a run lives."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from ssl_seg import files
from ssl_seg.runs.folder import TIME, epoch_ms
from ssl_seg.tracking import SYSTEM
from ssl_seg.tracking.record import FOLDER

SAMPLE_EVERY = 10.0  # seconds; as MLflow's own


class Load:
    """The load of machine and run, measured by MLflow's own monitors and kept in the folder until it can be sent."""

    def __init__(self, folder: Path, owner: psutil.Process | None) -> None:
        self.path = folder / FOLDER / SYSTEM
        self.owner = owner
        self.monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self.monitors.append(GPUMonitor())
        self.step = files.read_bytes(self.path).count(b"\n") if self.path.is_file() else 0
        self.due = 0.0

    def sample(self, moment: float) -> None:
        """Once every SAMPLE_EVERY seconds."""
        if moment < self.due:
            return
        self.due = moment + SAMPLE_EVERY
        figures: dict[str, float] = {"run_memory_megabytes": self._memory()}
        for monitor in self.monitors:
            monitor.collect_metrics()
            figures |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        line = {"step": self.step, TIME: epoch_ms()}
        line |= {f"system/{name}": value for name, value in figures.items()}
        with suppress(OSError):  # a full disk, or a folder that is gone
            files.append(self.path, json.dumps(line) + "\n")
            self.step += 1

    def _memory(self) -> float:
        """Of the training process and its loaders; shared pages count in each."""
        total = 0
        with suppress(psutil.Error):
            processes = [] if self.owner is None else [self.owner, *self.owner.children(recursive=True)]
            for process in processes:
                total += process.memory_info().rss
        return total / 1e6
