"""How fast maths answers are graded: 10,000 realistic completions, two endless expressions among them, and a worker killed on the way.

    python scripts/bench_rewards.py [--count 10000] [--workers 2]
    python scripts/bench_rewards.py --golds math500.parquet ...      # how many gold answers of sets in verl's layout are read

Golds and completions are made here from a seed. Prints samples per second, seconds of one sample alone, and whether every score
is the expected one, in order.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import threading
import time

from rewards.math_answer import final_answers, math_answer
from rewards.math_grading import is_read

ENDLESS = r"\boxed{9^{9^{9^{9^{9}}}}}"
STEP = r"Since ${a}x + {b} = {c}$, we have $x = \frac{{{c} - {b}}}{{{a}}}$, which we put into $\sqrt{{x^2 + {b}}}$. "


def gold(rng: random.Random) -> tuple[str, str]:
    """A gold answer and another spelling of it."""
    n, d = rng.randint(2, 9999), rng.choice([3, 7, 11, 13])
    return rng.choice(
        [
            (str(n), str(n)),
            (str(n), f"{n:,}"),
            (str(n), f"{n}.0"),
            (rf"\frac{{{n * d + 1}}}{{{d}}}", f"{n * d + 1}/{d}"),
            (rf"{n}\sqrt{{{d}}}", rf"\sqrt{{{d}}} \cdot {n}"),
            (f"({n},{d})", rf"\left({n}, {d}\right)"),
            (f"{n}x+{d}", f"{d} + {n}x"),
            (rf"{n}\%", str(n)),
        ]
    )


def sample(rng: random.Random) -> tuple[str, str, float]:
    """Gold, completion and the expected score."""
    answer, spelt = gold(rng)
    right = rng.random() < 0.5
    numbers = [dict(a=rng.randint(2, 99), b=rng.randint(1, 99), c=rng.randint(1, 999)) for _ in range(6)]
    working = "".join(STEP.format(**n) for n in numbers)
    final = spelt if right else f"{rng.randint(10_000, 99_999)}"
    form = rng.choice([r"Therefore the answer is $\boxed{{{}}}$.", r"\boxed{{{}}}", "so we are done.\nAnswer: ${}$"])
    return answer, working + form.format(final), float(right)


def kill_a_worker() -> None:
    """As the kernel does when memory runs out."""
    for worker in multiprocessing.active_children()[:1]:
        print(f"killed worker {worker.pid}")
        os.kill(worker.pid, signal.SIGKILL)


def golds_of(path: str) -> None:
    """Print what is read of a set's distinct gold answers, and what they score in a box."""
    import pandas as pd

    found = list(dict.fromkeys(row["ground_truth"] for row in pd.read_parquet(path)["reward_model"]))
    unread = sum(not is_read(gold) for gold in found)
    boxes = [rf"\boxed{{{gold}}}" for gold in found]
    own = math_answer([""] * len(found), boxes, found, timeout=20)
    other = math_answer([""] * len(found), boxes[1:] + boxes[:1], found, timeout=20)
    print(
        f"{path.rsplit('/', 1)[-1]:<24}{len(found):>7} distinct golds, math-verify does not read {unread / len(found):.2%}, "
        f"{sum(own) / len(found):.2%} right against themselves, {sum(other) / len(found):.2%} against the next"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--golds", nargs="+", metavar="FILE")
    args = parser.parse_args()
    if args.golds:
        for path in args.golds:
            golds_of(path)
        return 0
    rng = random.Random(0)
    golds, texts, expected = map(list, zip(*(sample(rng) for _ in range(args.count)), strict=True))
    for position in (args.count // 3, args.count // 2):
        texts[position], expected[position] = ENDLESS, 0.0
    math_answer([""], ["1"], ["1"], workers=args.workers)  # workers start once a run
    threading.Timer(3.0, kill_a_worker).start()
    start = time.perf_counter()
    scores = math_answer([""] * args.count, texts, golds, workers=args.workers)
    seconds = time.perf_counter() - start
    wrong = [i for i, (got, want) in enumerate(zip(scores, expected, strict=True)) if got != want]
    print(
        f"{args.count:,} completions graded in {seconds:.1f} s: {args.count / seconds:,.0f} a second, {len(wrong)} not as expected"
    )
    start = time.perf_counter()
    final_answers(texts[: args.count // 10], workers=args.workers)
    print(f"answers of {args.count // 10:,} found in {time.perf_counter() - start:.1f} s")
    alone = []
    for text, answer in list(zip(texts, golds, strict=True))[:200]:
        start = time.perf_counter()
        math_answer([""], [text], [answer], workers=args.workers)
        alone.append(time.perf_counter() - start)
    alone.sort()
    print(f"one completion alone: {alone[100] * 1000:.1f} ms p50, {alone[198] * 1000:.1f} ms p99")
    for i in wrong[:5]:
        print(f"sample {i}: gold {golds[i]}, got {scores[i]}, expected {expected[i]}: ...{texts[i][-60:]!r}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
