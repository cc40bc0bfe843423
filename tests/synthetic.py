"""Run folders as entrl train writes them, made of numbers that a test chooses: no model, no torch."""

import json

import numpy as np
import pandas as pd
import yaml

EDGES = np.round(np.geomspace(1e-4, 20, 65), 6).tolist()


def write_run(
    folder,
    *,
    plugin=None,
    seed=1,
    rates=(0.5,) * 8,
    samples=4,
    steps=20,
    reward=lambda t: 0.3 + 0.3 * t,
    entropy=lambda t: 0.4 - 0.3 * t,
    state="DONE",
    kept=True,
    config=None,
    prompt="problem {}",
):
    """A run on ``len(rates)`` held-out problems, of whose ``samples`` samples the share ``rates`` is right, rounded.

    ``reward`` and ``entropy`` are functions of the share of the steps done. ``kept``: eval/*.parquet are written.
    """
    folder.mkdir(parents=True)
    whole = {
        "seed": seed,
        "plugin": plugin or {},
        "reward": {"correct": {"weight": 1.0}},
        "run": {"name": folder.name, "dir": str(folder.parent)},
        "trainer": {"learning_rate": 1e-3, "max_steps": 500, "seed": seed},
        "data": {"name": "countdown", "heldout": {"seed": 0}},
        "model": {"name": "tiny"},
    }
    for key, value in (config or {}).items():
        inner = whole
        for name in key.split(".")[:-1]:
            inner = inner.setdefault(name, {})
        inner[key.split(".")[-1]] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "seed": seed}))
    _metrics(folder, steps, seed, reward, entropy)
    if state != "DONE":
        if state:
            (folder / state).write_text("\n")
        return folder
    (folder / "DONE").write_text("\n")
    right = [round(rate * samples) for rate in rates]
    pass_1 = float(np.mean(right) / samples)
    after = {"pass@1": pass_1, "pass@1/low": pass_1 - 0.1, "pass@1/high": pass_1 + 0.1, "entropy/mean": 0.1}
    evaluations = {"before": {"pass@1": 0.25}, "after": after}
    (folder / "summary.json").write_text(json.dumps({"eval": evaluations, "seconds": {"total": 36.0}}))
    if kept:
        (folder / "eval").mkdir()
        _samples(folder / "eval" / "before.parquet", [samples // 4] * len(rates), samples, prompt)
        _samples(folder / "eval" / "after.parquet", right, samples, prompt)
    return folder


def _metrics(folder, steps, seed, reward, entropy):
    rng = np.random.default_rng(seed)
    with open(folder / "metrics.jsonl", "w") as out:
        for step in range(1, steps + 1):
            done = (step - 1) / max(steps - 1, 1)
            line = {
                "step": step,
                "reward/mean": reward(done),
                "entropy/mean": entropy(done),
                "entropy/top20_mean": 3 * entropy(done),
                "rollout/len": 18.0,
                "rollout/truncated": 0.0,
                "time/step": 1.8,
                "time/tokens_per_second": 1000.0 + step,
                "entropy/hist": {"counts": rng.integers(0, 500, 64).tolist(), "edges": EDGES},
            }
            out.write(json.dumps(line) + "\n")


def _samples(path, right, n, prompt):
    rows = [
        {
            "problem": i,
            "sample": j,
            "prompt": prompt.format(i),
            "completion": "1 + 2 = 3",
            "correct": j < r,
            "token_entropy": np.zeros(18, dtype=np.float32),
        }
        for i, r in enumerate(right)
        for j in range(n)
    ]
    pd.DataFrame(rows).to_parquet(path)
