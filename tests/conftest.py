"""Shared by all tests: one thread a process (tests run side by side), no hub, and small networks and data."""

from __future__ import annotations

import os

# Before torch is imported, which is left to the tests: the process that deals them out to others has no use for it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis

hypothesis.settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.load_profile("quick")
