"""The series of a run that alarms and the forecast look at, as a small file: python scripts/alarm_series.py RUN tests/recorded/NAME.json"""

import json
import shlex
import sys
from pathlib import Path

NAMES = (
    "entropy/mean",
    "reward/mean",
    "reward/std",
    "reward/correct",
    "rollout/len",
    "rollout/truncated",
    "rollout/zero_std_groups",
    "rollout/distinct_answers",
)
_OTHER = ("logger", "run.", "eval.", "record.", "checkpoint.", "alarm.")  # changes none of them


def main(run: Path, out: Path) -> None:
    """Five digits a value, and the command that made the run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in lines[0] if name in NAMES or name.endswith("/touched")]
    words = [word for word in shlex.split((run / "command.sh").read_text()) if not word.startswith(_OTHER)]
    series = {
        name: [None if line.get(name) is None else float(f"{line[name]:.5g}") for line in lines] for name in names
    }
    text = json.dumps({"command": shlex.join(words), "series": series}, separators=(",", ":"))
    out.write_text(text.replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
