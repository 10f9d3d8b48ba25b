"""The tests, in folders that mirror the packages of `ssl_seg`."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"  # figures and digests that must not change
