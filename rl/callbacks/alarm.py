"""Alarms that go off: a line that nobody overlooks, a record, and what the run does about it on all ranks at once."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import TrainerCallback

from rl.alarms import Metrics, Reading, Watch
from rl.dynamics import Histogram
from rl.reduce import any_rank


class Alarms:
    """The sink that watches a run, on the main process.

    An alarm goes off once an episode: when its condition has held for ``patience`` logged steps in a row, and again only after it has
    not held for ``window`` of them. Each time there is one line on the terminal and one in ``alarms.jsonl``, with
    ``{"step", "alarm", "text", "value", "threshold", "action"}``.

    Args:
        folder: the run folder. watches: by the name of the alarm. alert: called as ``alert(title, text)`` for the action ``wandb.alert``.

    Attributes:
        asked: the actions "checkpoint" and "stop" that somebody has yet to take. stopped_by: the alarm that ended the training, None.
    """

    def __init__(self, folder: Path, watches: Mapping[str, Watch], alert: Callable[[str, str], None] | None = None):
        self.path, self.watches, self.alert = Path(folder) / "alarms.jsonl", dict(watches), alert
        self.asked: set[str] = set()
        self.stopped_by: str | None = None
        self._episodes: dict[tuple[str, str], _Episode] = {}

    def __call__(self, step: int, metrics: Metrics, histograms: Mapping[str, Histogram]) -> None:
        for name, watch, reading in self._gone_off(step, metrics):
            self._say(step, name, watch, reading)
            self.asked |= {"checkpoint", "stop"} & set(watch.actions)

    def replay(self, step: int, metrics: Metrics) -> None:
        """Take a step that an earlier start has logged: what went off then is known, and does not go off again."""
        for _ in self._gone_off(step, metrics):
            pass

    def _gone_off(self, step: int, metrics: Metrics) -> list[tuple[str, Watch, Reading]]:
        found = []
        for name, watch in self.watches.items():
            for reading in watch.read(step, metrics):
                episode = self._episodes.setdefault((name, reading.about), _Episode(watch.patience, watch.window))
                if episode.begins(reading.holds):
                    found.append((name, watch, reading))
                    if "stop" in watch.actions and self.stopped_by is None:
                        self.stopped_by = name
        return found

    def _say(self, step: int, name: str, watch: Watch, reading: Reading) -> None:
        terminal = sys.stdout.isatty()
        start, bold, plain = ("\r\x1b[K", "\x1b[1;31m", "\x1b[0m") if terminal else ("", "", "")
        does = [_DOES[action] for action in watch.actions if action in _DOES]
        text = f"{reading.text} {'The run ' + ' and '.join(does) + '.' if does else ''}".rstrip()
        print(f"{start}{bold}ALARM {name}{plain} at step {step}: {text}", flush=True)
        line = {
            "step": step,
            "alarm": name,
            "text": reading.text,
            "value": reading.value if math.isfinite(reading.value) else None,
            "threshold": reading.threshold,
            "action": list(watch.actions),
        }
        with open(self.path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        if "wandb.alert" in watch.actions and self.alert is not None:
            self.alert(f"{name} at step {step}", text)


_DOES = {"checkpoint": "writes a checkpoint", "stop": "ends here, with its evaluation"}


class _Episode:
    """Begins once the condition has held ``patience`` times in a row, ends once it has not held ``rest`` times in a row."""

    def __init__(self, patience: int, rest: int):
        self.patience, self.rest, self.on, self.row = patience, rest, False, 0

    def begins(self, holds: bool) -> bool:
        self.row = self.row + 1 if holds is not self.on else 0
        if self.row < (self.rest if self.on else self.patience):
            return False
        self.on, self.row = not self.on, 0
        return self.on


class TakeAction(TrainerCallback):
    """Saves or ends the training in the step whose log set off an alarm, on all ranks.

    Args:
        alarms: on the main process; None on the others. device: where the ranks' collectives work.

    Attributes:
        stopped: an alarm has ended the training.
    """

    def __init__(self, alarms: Alarms | None, device: torch.device):
        self.alarms, self.device, self.stopped = alarms, device, False

    def on_log(self, args, state, control, **kwargs):
        asked = self.alarms.asked if self.alarms is not None else set()
        stop = any_rank("stop" in asked, self.device)
        # also at a stop, so that the run can go on if one wants it to
        control.should_save |= any_rank(bool(asked), self.device)
        control.should_training_stop |= stop
        self.stopped |= stop
        asked.clear()
