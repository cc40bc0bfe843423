"""The forecast in the metrics of each step, before anybody else sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rl.alarms import value_of
from rl.dynamics import Histogram
from rl.forecast import Online

if TYPE_CHECKING:
    from rl.trainer import Sink


class WithForecast:
    """A sink that adds ``forecast/*`` to a step's metrics and hands them on to ``sinks``."""

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks, self.online = list(sinks), Online()

    def __call__(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        metrics = {**metrics, **self._forecast(step, metrics)}
        for sink in self.sinks:
            sink(step, metrics, histograms)

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take the lines that ``metrics.jsonl`` has already, so that a run that goes on is as if it had never been stopped.

        The sinks that have something to remember get them too, as ``sink.replay(step, metrics)``.
        """
        listeners = [sink for sink in self.sinks if hasattr(sink, "replay")]
        for line in lines:
            self._forecast(line["step"], line)
            for sink in listeners:
                sink.replay(line["step"], line)

    def _forecast(self, step: int, metrics: Mapping[str, float | None]) -> dict[str, float]:
        online = self.online
        found = online.update(step, value_of(metrics, "entropy/mean"), value_of(metrics, "reward/mean"))
        if found is None:
            return {}
        series = {"forecast/ceiling": found.ceiling, "forecast/low": found.low, "forecast/high": found.high}
        if online.residual is not None:
            series |= {"forecast/residual": online.residual, "forecast/departed": float(online.departed)}
        return series
