"""Make the embedded model: a 0.2 M-parameter Qwen3 taught Countdown from noisy demonstrations.

python scripts/warmstart.py                      # the model that ships, about 5 minutes on one CPU core
python scripts/warmstart.py --steps 500 --out /tmp/quick
python scripts/warmstart.py --beta -0.25 --out models/precision    # the prior of "Diversity or Precision?"
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from data import countdown
from rl.warmstart import Progress, warm_start

SHIPPED = Path(__file__).parents[1] / "rl" / "assets" / "countdown"


def build_model(seed: int) -> Qwen3ForCausalLM:
    """The untrained model: 4 layers of width 64, tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(countdown.WORDS),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=192,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=countdown.WORDS.index("<pad>"),
        bos_token_id=countdown.WORDS.index("<bos>"),
        eos_token_id=countdown.WORDS.index("<eos>"),
    )
    return Qwen3ForCausalLM(config)


def demonstrations(levels: list[int], count: int, noise: float, seed: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids + <eos>) of ``count`` training problems."""
    tokenizer, rng = countdown.tokenizer(), random.Random(seed)
    eos = [tokenizer.eos_token_id]
    examples = []
    for problem, _ in zip(countdown.problems("train", levels, seed), range(count), strict=False):
        completion = countdown.demonstration(rng, problem, noise)
        examples.append((tokenizer(problem.prompt)["input_ids"], tokenizer(completion)["input_ids"] + eos))
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--levels", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--noise", type=float, default=0.2, help="probability of a random step in a demonstration")
    parser.add_argument("--demonstrations", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--lam-head", type=float, default=0.0)
    parser.add_argument("--lam-tail", type=float, default=0.0)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()

    torch.set_num_threads(1)  # faster than several at this size
    start = time.process_time()
    examples = demonstrations(args.levels, args.demonstrations, args.noise, args.seed)
    print(f"{len(examples)} demonstrations in {time.process_time() - start:.0f} CPU s", flush=True)
    model = build_model(args.seed)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(countdown.WORDS)} words", flush=True)

    def report(at: Progress) -> None:
        print(f"step {at.step}/{at.steps}  loss {at.loss:.4f}  {time.process_time() - start:.0f} CPU s", flush=True)

    warm_start(
        model,
        examples,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        beta=args.beta,
        lam_head=args.lam_head,
        lam_tail=args.lam_tail,
        k=args.k,
        report=report,
        report_every=500,
    )
    model.save_pretrained(args.out)
    countdown.tokenizer().save_pretrained(args.out)
    print(f"saved to {args.out} after {time.process_time() - start:.0f} CPU s; measure it with: entrl eval {args.out}")


if __name__ == "__main__":
    main()
