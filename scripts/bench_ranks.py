"""Peak memory and CPU seconds of whole runs under every engine, over gloo on a CPU, against rl.memory and rl.timing.

    python scripts/bench_ranks.py                    # 19 M, 41 M and 115 M parameters; --repeat 1: 25 CPU minutes
    python scripts/bench_ranks.py --quick            # 19 M under ddp and zero3
    python scripts/bench_ranks.py --offload          # zero3_offload too: DeepSpeed compiles its Adam first, for minutes

Each case is a run folder of its own with as many ranks as it says, through ``rl.rank``. peak_mb: the largest resident memory of a rank;
whole_mb: the same where glibc returns every freed tensor to the system; MB are 1e6 bytes; off: estimate / measured - 1. step_s and
rollout_s: CPU seconds of the slowest rank, without what it waits for others, medians of the steps after the first; step and rollout:
those of rl.timing, calibrated on the 19 M model in one process.
"""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_common import arguments, report, rounds
from bench_memory import GLIBC, LARGE, MIDDLE, SMALL, config, environment, peak

RUN = {"micro_batch": 8, "prompt_tokens": 32, "completion_tokens": 64, "accumulation": 2, "group": 4}
ENGINES = {"single": (1, 0), "ddp": (2, 0), "zero2": (2, 2), "zero3": (2, 3), "zero3_offload": (2, 3)}  # ranks, stage
SHAPES = {"19 M": SMALL, "41 M": MIDDLE, "115 M": LARGE}
STEPS = 3


def uneven(completions, **columns) -> list[float]:
    """A reward that leaves no group without spread."""
    return [random.random() for _ in completions]


def case(shape: dict, engine: str, changes: dict, rollout: str) -> dict[str, float]:
    """One run: peak memory of the fullest rank (MB), CPU seconds of a step and of its rollout."""
    run = {**RUN, **changes}
    with tempfile.TemporaryDirectory() as name:
        folder = prepared(shape, engine, run, rollout, Path(name))
        _start_ranks(folder, ENGINES[engine][0])
        ranks = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row.get("step", 0) > 1 and "time/step" in row]
    found = {key: statistics.median(row[f"time/{key}"] for row in steps) for key in ("step", "rollout")}
    return {"peak_mb": max(r["peak_mb"] for r in ranks), "step_s": found["step"], "rollout_s": found["rollout"]}


def prepared(shape: dict, engine: str, run: dict, rollout: str, folder: Path) -> Path:
    """A run folder for a model of this shape with random weights."""
    from transformers import Qwen2ForCausalLM

    from data import countdown
    from rl.config import compose
    from rl.prepare import prepare

    torch.manual_seed(0)
    Qwen2ForCausalLM(config(shape)).save_pretrained(folder / "model")
    countdown.tokenizer().save_pretrained(folder / "model")
    n = run["prompt_tokens"]
    lines = [{"prompt": " ".join([str(1 + i % 9)] * (n // (1 + i % 2))), "answer": "1"} for i in range(256)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [
        "model=local",
        f"model.path={folder}/model",
        "model.dtype=float32",
        "model.attn_implementation=sdpa",
        f"rollout={rollout}",
        "data=jsonl",
        f"data.path={folder}/rows.jsonl",
        "plugin=[]",
        "reward.correct.fn={_target_: bench_ranks.uneven, _partial_: true}",
        f"engine={engine}",
        f"engine.processes={ENGINES[engine][0]}",
        "engine.threads=1",
        f"trainer.per_device_train_batch_size={run['micro_batch']}",
        f"trainer.gradient_accumulation_steps={run['accumulation']}",
        f"trainer.num_generations={run['group']}",
        f"trainer.max_completion_length={run['completion_tokens']}",
        f"trainer.activation_checkpointing={run.get('checkpointing', False)}",
        f"trainer.max_steps={STEPS}",
        f"peft={'lora' if run.get('lora_rank') else 'none'}",
        "checkpoint.every=null",
        "eval.before=false",
        "eval.after=false",
        "record.every=0",
        "logger=none",
        f"run.dir={folder}/runs",
        "run.name=bench",
    ]
    if run.get("lora_rank"):
        overrides.append(f"peft.r={run['lora_rank']}")
    return prepare(compose(overrides), overrides, ["prepare", *overrides], here=False)


def _start_ranks(folder: Path, processes: int) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(processes):
        places = {"OMP_NUM_THREADS": 1}
        if processes > 1:  # alone with a rank it would be wrapped by DDP
            places |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])}
        environ = {**os.environ, **{name: str(value) for name, value in places.items()}}
        with open(folder / f"rank_{rank}.out", "w") as out:
            command = [sys.executable, __file__, "--rank", str(folder)]
            ranks.append(subprocess.Popen(command, env=environ, stdout=out, stderr=subprocess.STDOUT))
    for process in ranks:
        process.wait()
    if any(process.returncode for process in ranks):
        raise RuntimeError("".join(path.read_text() for path in sorted(folder.glob("rank_*.out")))[-4000:])


def work(folder: Path) -> None:
    """This process is a rank. Its clock counts CPU seconds, since others may want the machine too."""
    import rl.meter
    import rl.rank
    import rl.trainer

    rl.meter.time = rl.trainer.time = SimpleNamespace(perf_counter=time.process_time)
    rl.rank.main([str(folder)])
    (folder / f"rank_{os.environ.get('RANK', 0)}.json").write_text(json.dumps({"peak_mb": peak()}))


def estimated(shape: dict, engine: str, changes: dict, rollout: str) -> dict[str, float]:
    """Of one rank, in MB: the peak, the peak without the allocator's share, and its largest parts."""
    from rl.memory import estimate

    world, stage = ENGINES[engine]
    run = {**RUN, **changes, "rollout": rollout, "world": world, "zero_stage": stage}
    found = estimate(config(shape), **run, offload=engine == "zero3_offload")
    held = found._held(found.peak_phase)
    allocator = found.items[f"allocator, {found.peak_phase}"]
    parts = {name: found.items[name] for name in held if found.items[name] and not name.startswith("allocator")}
    total = {"estimate": found.total, "without allocator": found.total - allocator}
    return {name: n / 1e6 for name, n in (total | parts).items()}


def predicted(shape: dict, engine: str, changes: dict, rollout: str, hardware) -> tuple[float, float]:
    """CPU seconds of a step and of its rollout; what is sent between the ranks costs none."""
    from rl.timing import step_time

    world, stage = ENGINES[engine]
    found = step_time(config(shape), _work(changes, rollout), hardware, processes=world, zero_stage=stage)
    return found.total - found.communication, found.prefill + found.decode


def _work(changes: dict, rollout: str):
    from rl.timing import Work

    run = {**RUN, **changes}
    numbers = {key: run[key] for key in ("micro_batch", "accumulation", "group")}
    numbers |= {
        "prompt": run["prompt_tokens"],
        "completion": run["completion_tokens"],
        "longest": run["completion_tokens"],
    }
    more = {"checkpointing": run.get("checkpointing", False), "lora_rank": run.get("lora_rank", 0)}
    return Work(**numbers, **more, rollout=rollout, width=4)


def calibrated(step_s: float, rollout_s: float):
    """What this machine achieves, from one run of the 19 M model in one process: FLOP/s of its training, bytes/s of its rollout."""
    from rl.timing import Hardware, step_time

    hardware = Hardware(flops=1e30, memory=1.0, link=1.0, network=1.0, host=1.0, layer={"hf": 0.0})
    work, shape = _work({}, "hf"), config(SMALL)
    memory = step_time(shape, work, hardware).decode / rollout_s
    hardware = replace(hardware, memory=memory)
    operations = step_time(shape, work, replace(hardware, flops=1.0)).backward
    flops = operations / (step_s - rollout_s - step_time(shape, work, hardware).optimizer)
    # the prefill takes operations too
    for _ in range(20):
        hardware = replace(hardware, flops=flops, memory=memory)
        counted = step_time(shape, work, hardware)
        memory *= counted.decode / (rollout_s - counted.prefill)
        flops *= counted.backward / (step_s - rollout_s - counted.optimizer)
    return replace(hardware, flops=flops, memory=memory)


def cases(quick: bool, offload: bool) -> dict[str, tuple[dict, str, dict, str]]:
    """name -> (shape, engine, changes, rollout)."""
    engines = [engine for engine in ENGINES if offload or engine != "zero3_offload"]
    if quick:
        return {f"19 M, {engine}": (SMALL, engine, {}, "hf") for engine in ("ddp", "zero3")}
    found = {f"{size}, {e}": (SHAPES[size], e, {}, "hf") for size in ("19 M", "41 M") for e in engines}
    found |= {f"115 M, {e}": (LARGE, e, {"micro_batch": 4}, "hf") for e in engines}
    found["19 M, 192 tokens, single"] = (SMALL, "single", {"completion_tokens": 192}, "hf")
    lora = {"lora_rank": 8, "checkpointing": True}
    return found | {f"19 M, LoRA, checkpointing, {e}": (SMALL, e, lora, "hf") for e in ("zero2", "zero3")}


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        return work(Path(sys.argv[2]))
    parser = arguments(__doc__)
    parser.add_argument("--offload", action="store_true", help="zero3_offload too")
    args = parser.parse_args()
    chosen = cases(args.quick, args.offload)
    jobs = {name: (case, one) for name, one in chosen.items()}
    repeat = 1 if args.quick else args.repeat
    found = rounds(jobs, repeat)
    with environment(GLIBC):
        whole = rounds(jobs, 1)
    rows, parts = {}, {}
    first = found.get("19 M, single")
    hardware = calibrated(first["step_s"], first["rollout_s"]) if first else None
    for name, one in chosen.items():
        parts[name] = estimated(*one)
        total, bare = parts[name]["estimate"], parts[name]["without allocator"]
        rows[name] = {"peak_mb": found[name]["peak_mb"], "estimate": total, "off": total / found[name]["peak_mb"] - 1}
        rows[name] |= {"whole_mb": whole[name]["peak_mb"], "bare": bare, "off_whole": bare / whole[name]["peak_mb"] - 1}
        rows[name] |= {"step_s": found[name]["step_s"], "rollout_s": found[name]["rollout_s"]}
        if hardware:
            step, rollout = predicted(*one, hardware)
            rows[name] |= {"step": step, "rollout": rollout, "off_step": step / rows[name]["step_s"] - 1}
            rows[name]["off_rollout"] = rollout / rows[name]["rollout_s"] - 1
    ratios = {key: max(abs(row[key]) for row in rows.values()) for key in ("off", "off_whole")}
    report("Parts of the estimate of a rank, MB", parts, {}, None)
    if hardware:
        ratios |= {"GFLOP/s": hardware.flops / 1e9, "GB/s": hardware.memory / 1e9}
    report("A rank over gloo, one thread", rows, ratios, args.json)


if __name__ == "__main__":
    main()
