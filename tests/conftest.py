"""Shared by all tests: one thread a process (tests run side by side), no hub, and small networks and data."""

from __future__ import annotations

import os
import signal

# Before torch is imported, which is left to the tests: the process that deals them out to others has no use for it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis

# A shell makes the jobs of its background ignore Ctrl-C, which they hand on to every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.load_profile("quick")
