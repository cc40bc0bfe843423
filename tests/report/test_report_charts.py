"""What charts show is what was logged: thinned by means, histograms by adding counts, quantiles as of the values themselves."""

import numpy as np
import pandas as pd
import pytest

from rl.report import charts, ledger
from rl.report.reading import HistogramSeries

EDGES = np.array([0.0, *np.geomspace(1e-4, 20, 65)])


def test_a_thinned_line_has_the_means_of_equally_many_steps():
    series = pd.Series(range(10), index=range(1, 11), dtype=float)
    thin = charts.thin(series, at_most=4)
    assert list(thin.index) == [3, 6, 9, 10] and list(thin) == [1.0, 4.0, 7.0, 9.0]
    assert charts.thin(series, at_most=10) is series


def test_adding_histograms_up_loses_no_token():
    rng = np.random.default_rng(0)
    whole = HistogramSeries(np.arange(1, 1002), rng.integers(0, 9, (1001, 65)), EDGES)
    short = charts.add_up(whole)
    assert len(short.steps) <= 400 and short.steps[-1] == 1001
    assert (short.counts.sum(0) == whole.counts.sum(0)).all()
    assert (short.counts[0] == whole.counts[:3].sum(0)).all()


def test_quantiles_of_a_histogram_are_those_of_its_values():
    values = np.random.default_rng(0).lognormal(-1, 0.8, 100_000)
    counts = np.histogram(values, EDGES)[0]
    empty = np.zeros_like(counts)
    found = charts.quantiles(HistogramSeries(np.array([3, 4]), np.array([counts, empty]), EDGES))
    assert list(found.index) == [3]
    assert found.loc[3].to_numpy() == pytest.approx(np.quantile(values, charts.QUANTILES), rel=0.02)


def test_a_heat_map_has_the_share_of_each_bin_up_to_the_highest_used():
    counts = np.zeros((2, 65), dtype=int)
    counts[:, 0], counts[0, 10], counts[1, 20] = 75, 25, 25
    trace = charts.heat_map(HistogramSeries(np.array([1, 2]), counts, EDGES))["data"][0]
    assert len(trace["z"]) == 21 and len(trace["y"]) == 22
    assert trace["z"][0] == [75.0, 75.0] and trace["z"][10] == [25.0, 0.0] and trace["z"][20] == [0.0, 25.0]
    assert 0 < trace["y"][0] < trace["y"][1] == 1e-4  # a log axis has no 0
    assert charts.heat_map(HistogramSeries(np.array([1]), np.zeros((1, 65), dtype=int), EDGES)) is None


def test_a_prediction_is_compared_with_what_the_next_step_measures():
    rng = np.random.default_rng(0)
    change = rng.standard_normal(50) - 0.2
    entropy = 10 + np.concatenate([[0.0], np.cumsum(change)])
    frame = pd.DataFrame({"entropy/predicted_change": np.append(change / 100, 1.0)}, index=range(1, 52))
    frame["entropy/measured_change"] = pd.Series(entropy, index=frame.index).diff()
    found = ledger.judge(frame)
    assert found.steps == 50 and found.same_sign == 1.0 and found.correlation == pytest.approx(1.0)
    assert "more often than by chance" in ledger.in_words(found)


def test_a_prediction_without_any_skill_is_as_good_as_chance():
    rng = np.random.default_rng(0)
    names = ("entropy/predicted_change", "entropy/measured_change")
    frame = pd.DataFrame(rng.standard_normal((400, 2)) - 1, columns=names)  # both mostly negative: often of one sign
    found = ledger.judge(frame)
    assert found.same_sign > 0.65 and abs(found.same_sign - found.by_chance) < 0.05
    assert "as often as by chance" in ledger.in_words(found)
    assert ledger.judge(frame[:5]) is None
