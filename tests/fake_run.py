"""Stands in for ``python -m rl.launch RUN`` where a test is about the sweep around it: does what the test says, in no time."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def fake(folder, *behaviours):
    """The command of a launcher whose points 1, 2, ... behave so: ok (also any further one), crash, die, long, stubborn, or a pass@1."""
    (folder / "behaviours.json").write_text(json.dumps(dict(enumerate(behaviours, 1))))
    return [sys.executable, "-S", __file__, str(folder / "behaviours.json")]


def main(behaviours, run):
    behave = json.loads(behaviours.read_text()).get(str(int(run.name.split("_")[0])), "ok")
    (run / "env").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
    for marker in ("DONE", "FAILED", "STOPPED"):
        (run / marker).unlink(missing_ok=True)
    told = []
    signal.signal(signal.SIGINT, lambda number, frame: told.append(number) if not told else os._exit(130))
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    with (run / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.25, "entropy/mean": 0.5}) + "\n")
    if behave == "crash":  # an error in the run
        (run / "FAILED").write_text("ValueError: no such luck\n")
        return 1
    if behave == "die":  # killed, out of memory
        os.kill(os.getpid(), signal.SIGKILL)
    while behave in ("long", "stubborn") and (behave == "stubborn" or not told):
        time.sleep(0.02)
    if told:
        (run / "STOPPED").write_text("SIGINT at step 1\n")
        return 85
    (run / "summary.json").write_text(
        json.dumps({"eval": {"after": {"pass@1": behave if isinstance(behave, float) else 0.75}}})
    )
    (run / "DONE").write_text("")
    return 0


if __name__ == "__main__":
    os._exit(main(*map(Path, sys.argv[1:])))  # not through the interpreter's end, where a late signal kills
