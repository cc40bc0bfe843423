"""Run folders as a training leaves them, of made-up numbers, for tests of what reads them."""

import json

import numpy as np

EDGES = [0.0, *np.geomspace(1e-4, 20, 65).round(6).tolist()]


def line(step, steps, rng, extra=0):
    """A step of a run whose reward rises as its entropy falls."""
    h = 0.6 - 0.4 * step / steps + 0.01 * rng.standard_normal()
    reward = 1.4 - 0.6 * float(np.exp(h)) + 0.02 * rng.standard_normal()
    tokens = rng.lognormal(np.log(h) - 1, 1.5, 2000).clip(0, 19)
    return {
        "step": step,
        "reward/mean": reward,
        "reward/correct": reward - 0.1,
        "reward/format": 0.1,
        "reward/unparsed": 0.02,
        "reward/std": 0.4,
        "rollout/zero_std_groups": 0.25,
        "rollout/len": 18.0,
        "rollout/truncated": 0.0,
        "entropy/mean": h,
        "entropy/predicted_change": -1e-7,
        "entropy/measured_change": -0.4 / steps,
        "plugin/fork_mask/touched": 0.8,
        "plugin/fork_mask/adv_mass": 0.2,
        "plugin/fork_mask/kept": 0.2,
        "policy/lr": 6e-4,
        "time/step": 0.2,
        "time/rollout": 0.05,
        "time/at": 1.8e9 + step,
        **{f"my/series_{i}": float(rng.standard_normal()) for i in range(extra)},
        "entropy/hist": {"counts": np.histogram(tokens, EDGES)[0].tolist(), "edges": EDGES},
    }


CONFIG = """\
seed: 1
plugin:
  fork_mask: {_target_: rl.plugins.fork_mask.ForkMask, rho: 0.3}
reward:
  correct: {weight: 1.0}
  format: {weight: 1.0}
model: {name: tiny, path: builtin:countdown}
data: {name: countdown}
run: {name: a, dir: runs}
trainer: {max_steps: 40, beta: 0.0}
"""


def write_run(folder, steps=40, extra=0, config=CONFIG, marker="DONE", reason="", summary=True, version=2):
    """The folder, which must not exist yet. Args: extra: further series; marker: how it ended, None: it did not."""
    rng = np.random.default_rng(0)
    (folder / "logs" / "attempt_1").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "command.sh").write_text("entrl train plugin=[fork_mask]\n")
    manifest = {
        "started": "2026-01-01T00:00:00+00:00",
        "versions": {"torch": "2.13"},
        "hardware": {"cpus": 2, "gpus": []},
    }
    (folder / "manifest.json").write_text(json.dumps({"format": version, **manifest} if version > 1 else manifest))
    with open(folder / "metrics.jsonl", "w") as metrics:
        metrics.writelines(json.dumps(line(step, steps, rng, extra)) + "\n" for step in range(1, steps + 1))
    if marker:
        (folder / marker).write_text(f"{reason}\n")
    if summary:
        measured = {"pass@1": 0.25, "pass@1/low": 0.2, "pass@1/high": 0.3, "pass@16": 0.9, "greedy": 0.5}
        seconds = {"train": 9.0, "eval": 5.0, "total": 20.0}
        (folder / "summary.json").write_text(
            json.dumps(
                {"eval": {"before": measured, "after": {**measured, "pass@1": 0.5}}, "seconds": seconds, "steps": steps}
            )
        )
    return folder
