"""Draw reward and entropy of some runs side by side, from their metrics.jsonl and summary.json.

python scripts/plot_runs.py runs/plain runs/fork --labels "plain GRPO" "forking-token mask" --out docs/quickstart.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

SERIES = {
    "reward/mean": "training reward",
    "entropy/mean": "mean token entropy (nats)",
    "entropy/top20_mean": "entropy of the top 20 % tokens (nats)",
}
COLOURS = ("#4c566a", "#d1495b", "#00798c", "#edae49", "#7b4b94")
STYLES = ("-", "-", "--", "-.", ":")


def curves(run: Path) -> pd.DataFrame:
    """The scalar series of a run, one row a step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return pd.DataFrame([{k: v for k, v in line.items() if not isinstance(v, dict)} for line in lines]).set_index(
        "step"
    )


def draw(runs: list[Path], labels: list[str], smooth: int, out: Path) -> None:
    """Three panels of curves, and pass@k on held-out problems before and after."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(13.5, 3.2), constrained_layout=True)
    for run, label, colour, style in zip(runs, labels, COLOURS, STYLES, strict=False):
        frame = curves(run)
        for axis, name in zip(axes, SERIES, strict=False):
            axis.plot(frame.index, frame[name], color=colour, alpha=0.18, linewidth=0.8)
            axis.plot(frame.index, frame[name].rolling(smooth, min_periods=1).mean(), style, color=colour, label=label)
    for axis, title in zip(axes, SERIES.values(), strict=False):
        axis.set(title=title, xlabel="step", ylim=(0, None))
    axes[1].legend(frameon=False)
    held_out(axes[3], runs, labels)
    figure.savefig(out, dpi=130)


def held_out(axis, runs: list[Path], labels: list[str]) -> None:
    """pass@k against k, the warm start once and each run after training."""
    summaries = [json.loads((run / "summary.json").read_text())["eval"] for run in runs]
    curves_of = [(summaries[0]["before"], "before", "#b0b7c3", ":")]
    curves_of += [(s["after"], lb, c, st) for s, lb, c, st in zip(summaries, labels, COLOURS, STYLES, strict=False)]
    for metrics, label, colour, style in curves_of:
        ks = sorted(int(n.removeprefix("pass@")) for n in metrics if n.startswith("pass@") and "/" not in n)
        axis.plot(ks, [metrics[f"pass@{k}"] for k in ks], style, marker="o", markersize=4, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.set(title="pass@k on held-out problems", xlabel="k", ylim=(0, 1))
    axis.legend(frameon=False, loc="lower right", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--labels", nargs="+", help="one a run; default: the folders' names")
    parser.add_argument("--smooth", type=int, default=10, help="steps of the moving average")
    parser.add_argument("--out", type=Path, default=Path("runs.png"))
    args = parser.parse_args()
    draw(args.runs, args.labels or [run.name for run in args.runs], args.smooth, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
