"""Rollouts of the embedded model: entrl's sampler, recording as it goes, against transformers' generate, which records nothing.

    python scripts/bench_rollout.py               # a minute
    python scripts/bench_rollout.py --quick --json rollout.json

The ratio tokens_per_second is entrl's at 256 sequences over the faster of generate's two attention implementations. Both draw at
temperature 1 from the whole distribution; both are warmed up, and take turns in one process.
"""

from __future__ import annotations

import os
import statistics
import time

import torch
from bench_common import arguments, report
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data import countdown
from rl.paths import find_model
from rl.quiet import quiet
from rl.rollout import draw

GROUP, LONGEST = 8, 20


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet()
    path = find_model("builtin:countdown")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    rows, ratios = {}, {}
    for sequences in (256,) if args.quick else (64, 256, 1024):
        found = compare(model, tokenizer, sequences, turns=5 if args.quick else 5 * args.repeat)
        rows |= {f"{sequences} sequences, {name}": {"tokens_per_second": rate} for name, rate in found.items()}
        ratio = found["entrl, recording"] / max(found["generate, eager"], found["generate, sdpa"])
        ratios["tokens_per_second" if sequences == 256 else f"tokens_per_second_{sequences}"] = ratio
    report(f"Rollouts of the embedded model, {args.threads} threads", rows, ratios, args.json)


def compare(model, tokenizer, sequences: int, turns: int) -> dict[str, float]:
    """Median completion tokens per second of each way."""
    problems = countdown.dataset("train", [3], sequences // GROUP, seed=0)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in problems for _ in range(GROUP)]
    width, pad, end = max(map(len, prompts)), tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    attention = (ids != pad).long()
    config = GenerationConfig(
        max_new_tokens=LONGEST, do_sample=True, top_k=0, temperature=1.0, pad_token_id=pad, eos_token_id=end
    )

    def generate(attn: str) -> int:
        model.set_attn_implementation(attn)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=attention, generation_config=config)[:, width:]
        return int((out != pad).sum())

    def native() -> int:
        drawn = draw(model, prompts, max_new_tokens=LONGEST, ends=[end], pad=pad, rank=True)
        return int(drawn.mask.sum())

    ways = {
        "generate, eager": lambda: generate("eager"),
        "generate, sdpa": lambda: generate("sdpa"),
        "entrl, recording": native,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens = way()
            if turn:  # the first one warms up
                rates[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


if __name__ == "__main__":
    main()
