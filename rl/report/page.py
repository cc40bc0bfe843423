"""One self-contained HTML file: its data, styles and scripts inside, nothing loaded from anywhere.

Data and Plotly travel compressed and are unpacked by the browser. A content security policy forbids every request.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rl.errors import ReportError
from rl.rundir import write_text

MAX_BYTES = 5_000_000  # what a mail or a chat still takes


def write_page(
    out: Path, template: str, context: Mapping[str, Any], data: Mapping[str, Any], charts: bool = False
) -> Path:
    """Render ``templates/<template>`` into the file ``out``; text in the context is escaped.

    Args:
        data: by name, what the page's script gets from ``await entrl.data(name)``; must be JSON, see :func:`numbers`.
        charts: put Plotly into the page.

    Raises:
        ReportError: the file cannot be written, or would be larger than MAX_BYTES.
    """
    packed = {name: pack(json.dumps(value, allow_nan=False, separators=(",", ":"))) for name, value in data.items()}
    page = _environment().get_template(template).render({**context, "packed": packed, "charts": charts})
    if len(page.encode()) > MAX_BYTES:
        raise ReportError(
            f"{out} would have {len(page.encode()) / 1e6:.1f} MB, and pages stay below {MAX_BYTES / 1e6:.0f}. Show less in it."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise ReportError(f"{out} cannot be written: {error.strerror}. Give another file with --out.") from error
    return out


def check_place(out: Path, option: str = "--out") -> None:
    """Whether a file can be written, before an hour is spent on what goes into it. Args: option: what named the file.

    Raises:
        ReportError: it cannot.
    """
    if out.is_dir():
        raise ReportError(f"{option} {out} is a folder. Give a file in it.")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ReportError(f"{option} {out} cannot be written: {place} is not writable. Give another file.")


def without_nan(value: Any) -> Any:
    """For JSON, which has neither: NaN becomes null, infinity the word "never"."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "never" if value == math.inf else None
    return value


def pack(text: str) -> str:
    """Text as base64 of gzip, for ``entrl.unpack`` in the page."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def numbers(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """Numbers for a page: so many significant digits, None where there is no finite value."""
    return [float(f"{v:.{digits}g}") if v is not None and math.isfinite(v) else None for v in values]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"asset": _asset, "plotly": _plotly}
    return environment


def _asset(name: str) -> Markup:
    """A style sheet or script of ours, as it is."""
    return Markup((resources.files("rl.report") / "assets" / name).read_text(encoding="utf-8"))


@cache
def _plotly() -> str:
    spec = find_spec("plotly")  # of which only the script is wanted; importing it takes long
    return pack(
        (Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    )
