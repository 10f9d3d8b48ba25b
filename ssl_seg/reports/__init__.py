"""Pages and terminal tables about runs and studies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssl_seg.reports.blocks import Report


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """One HTML page about runs, folders of runs, or a study's folder; the answer comes first.

    `out` is the file, by default report.html in the folder, or beside several. Raises UserError for what is neither.
    """
    from ssl_seg.reports import runs, study

    page = study if any(map(study.is_study, folders)) else runs
    return page.report(folders, out)
