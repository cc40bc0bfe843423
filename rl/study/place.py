"""What a model is called, and where its pages go."""

from __future__ import annotations

from pathlib import Path

from rl.errors import ReportError
from rl.paths import plain_name
from rl.report.page import check_place


def name_of(target: str) -> str:
    """A run folder or a saved model by its last name, a hub model by its whole one."""
    return Path(target).resolve().name if Path(target).exists() else target


def page_of(target: str, kind: str, out: Path | None) -> Path:
    """The page of one target: ``out``, else ``<kind>.html`` in a run folder, else ``<kind>_<target>.html`` here.

    Raises:
        ReportError: it could not be written, or its numbers would be written over it.
    """
    is_run = (Path(target) / "config.yaml").is_file()
    page = out or (Path(target) / f"{kind}.html" if is_run else Path(f"{kind}_{plain_name(target)}.html"))
    if page.suffix in (".json", ".md"):
        raise ReportError(
            f"--out {page} is no place for a page: its numbers go beside it as {page.suffix}. Give a file as {kind}.html."
        )
    check_place(page)
    return page
