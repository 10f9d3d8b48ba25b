"""What benchmarks print is shown as it comes, and kept in benchmarks.json with the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import pytest
import torch

from ssl_seg.runs.writer import versions

FILE = "benchmarks.json"  # where pytest is started
KEPT: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        lines = [line.strip(" ,") for line in report.capstdout.splitlines() if line.strip()]
        KEPT[report.nodeid.rpartition("/")[2]] = lines
        print("", *lines, sep="\n")


def pytest_sessionfinish() -> None:
    if not KEPT:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    about = {"device": device, "cores": os.cpu_count(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    Path(FILE).write_text(json.dumps({**about, "figures": KEPT}, indent=1) + "\n")


def _processor() -> str:
    """By the kernel's name where there is one: `platform` often knows the architecture alone."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
