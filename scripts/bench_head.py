"""The LM head, forward and backward: entrl against TRL's head, full logits and the floor, on the same tensors.

    python scripts/bench_head.py                  # the shape of Qwen2.5-0.5B, about ten minutes on two cores
    python scripts/bench_head.py --quick --json head.json
    python scripts/bench_head.py --scaling        # cost against tokens and against the vocabulary

full: every token has a gradient. mask20: every fifth has one. known: the same, and the mask is known before the forward.
hint, full_hint: the gradient itself is known up to a factor as well, so that it is formed in the forward (one product less).
floor: matrix products of the same shapes, as many as the case cannot do without: 4 for full, 1 + 3/5 for mask20, 4/5 for known,
3 and 3/5 with the hint. work_mb: peak memory beyond the gradients of hidden and weight themselves. Ratios are the peer's over
entrl's, except those over the floor: entrl's CPU seconds over the floor's.
"""

from __future__ import annotations

import torch
from bench_common import arguments, measured, report, rounds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"tokens": 2048, "width": 896, "vocab": 151_936}  # Qwen2.5-0.5B
QUICK = {"tokens": 256, "width": 256, "vocab": 32_003}
SLAB = 4096  # of the vocabulary, in the floor
KEEP = 5  # every fifth token is kept


def tensors(dtype: str, tokens: int, width: int, vocab: int):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g).to(DTYPES[dtype])
    weight = (torch.randn(vocab, width, generator=g) * 0.05).to(DTYPES[dtype])
    upstream = torch.randn(tokens, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    kept = torch.randperm(tokens, generator=g) < max(1, tokens // KEEP)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, upstream, kept


def products(hidden, weight, count: dict[str, float]) -> None:
    """Matrix products of these shapes into memory that is there: logits, and the gradients of hidden and weight from logits'."""
    hidden, weight = hidden.detach(), weight.detach()
    dz = torch.randn(len(hidden), SLAB, dtype=hidden.dtype)
    out = {
        "logits": torch.empty_like(dz),
        "hidden": torch.empty_like(hidden),
        "weight": torch.empty_like(weight[:SLAB]),
    }
    for name, share in count.items():
        for part in [1.0] * int(share) + [share % 1] * (share % 1 > 0):
            n = max(1, round(part * len(hidden)))
            for slab in weight.split(SLAB):
                width = len(slab)
                if name == "logits":
                    torch.mm(hidden[:n], slab.t(), out=out[name].flatten()[: n * width].view(n, width))
                elif name == "hidden":
                    torch.mm(dz[:n, :width], slab, out=out[name][:n])
                else:
                    torch.mm(dz[:n, :width].t(), hidden[:n], out=out[name][:width])


def case(peer: str, dtype: str, which: str, sizes: dict, threads: int) -> dict:
    """One forward and backward in this process."""
    torch.set_num_threads(threads)
    hidden, weight, targets, upstream, kept = tensors(dtype, **sizes)
    if which in ("mask20", "known", "hint"):
        upstream = upstream * kept
    if which in ("known", "hint"):
        hidden, targets, upstream = hidden.detach()[kept].requires_grad_(), targets[kept], upstream[kept]
    if peer == "floor":
        logits = {"full": 2.0, "mask20": 1 + 1 / KEEP, "known": 2.0, "hint": 1.0, "full_hint": 1.0}[which]
        gradient = 1 / KEEP if which == "mask20" else 1.0
        products(hidden[:9].detach(), weight[:9], {"logits": 1.0})
        out: dict = {}
        with measured(out):
            products(hidden, weight, {"logits": logits, "hidden": gradient, "weight": gradient})
        return out
    function = PEERS[peer]()
    function(hidden[:2].detach(), weight[:9].detach(), targets[:2] % 9, upstream[:2])  # whatever happens once only
    hint = upstream if "hint" in which else None
    out = {}
    with measured(out):
        (function(hidden, weight, targets, hint) * upstream).sum().backward()
    out["work_mb"] = out["peak_mb"] - sum(x.numel() * x.element_size() for x in (hidden, weight)) / 1e6
    return out


def entrl():
    from rl.head import head_stats

    return lambda hidden, weight, targets, hint: head_stats(hidden, weight, targets, gradient=hint).logp


def trl():
    from trl.kernels import ChunkedLogProbFunction

    def logp(hidden, weight, targets, hint):
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ("entropy",))[0]

    return logp


def naive():
    def logp(hidden, weight, targets, hint):
        found = (hidden @ weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            torch.special.entr(found.exp()).sum(-1)
        return found.gather(-1, targets[:, None]).squeeze(-1)

    return logp


def verl():
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets, hint: linear_cross_entropy(hidden, weight, targets, 1.0, "none")[0]


def liger():  # without the entropy
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, targets, hint: (
        -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")
    )


PEERS = {"entrl": entrl, "trl": trl, "naive": naive, "verl": verl, "liger": liger}


def importable(peer: str) -> bool:
    """verl's and Liger's kernels are Triton: they need the package and a GPU."""
    if peer in ("verl", "liger"):
        try:
            __import__({"verl": "verl", "liger": "liger_kernel"}[peer])
        except ImportError:
            return False
        return torch.cuda.is_available()
    return True


def compare(sizes: dict, quick: bool, repeat: int, threads: int):
    cases = {}
    for dtype in DTYPES:
        for which in ("full", "mask20"):
            for peer in [p for p in PEERS if importable(p)]:
                if peer != "naive" or (which == "full" and not quick):
                    cases[f"{dtype} {which} {peer}"] = (case, (peer, dtype, which, sizes, threads))
        for which in ("known", "hint"):
            cases[f"{dtype} {which} entrl"] = (case, ("entrl", dtype, which, sizes, threads))
        cases[f"{dtype} full_hint entrl"] = (case, ("entrl", dtype, "full_hint", sizes, threads))
    for which in ("full",) if quick else ("full", "full_hint", "mask20", "known", "hint"):
        cases[f"fp32 {which} floor"] = (case, ("floor", "fp32", which, sizes, threads))
    rows = rounds(cases, repeat)

    def over(a: str, b: str, key: str = "cpu_s") -> float:
        return rows[a][key] / rows[b][key]

    ratios = {}
    for d in DTYPES:
        ratios[f"{d}_full_time"] = over(f"{d} full trl", f"{d} full entrl")
        ratios[f"{d}_full_hint_time"] = over(f"{d} full trl", f"{d} full_hint entrl")
        ratios[f"{d}_mask20_time"] = over(f"{d} mask20 trl", f"{d} mask20 entrl")
        known = min(("known", "hint"), key=lambda w, d=d: rows[f"{d} {w} entrl"]["cpu_s"])
        ratios[f"{d}_mask20_known_time"] = over(f"{d} mask20 trl", f"{d} {known} entrl")
        ratios[f"{d}_full_memory"] = over(f"{d} full trl", f"{d} full entrl", "peak_mb")
        ratios[f"{d}_mask20_memory"] = over(f"{d} mask20 trl", f"{d} mask20 entrl", "peak_mb")
    ratios["fp32_over_floor"] = over("fp32 full entrl", "fp32 full floor")
    if not quick:
        ratios["fp32_hint_over_floor"] = over("fp32 full_hint entrl", "fp32 full_hint floor")
    return rows, ratios


def scaling(quick: bool, repeat: int, threads: int):
    """fp32, every fifth token kept: against tokens at one vocabulary, and against the vocabulary at 2,048 tokens."""
    width = 256 if quick else 896
    tokens = [1024, 4096] if quick else [1024, 4096, 16_384, 65_536]
    vocabs = [1024, 32_768] if quick else [1024, 8192, 32_768, 151_936]
    cases = {}
    for sizes in [{"tokens": n, "vocab": 16_384} for n in tokens] + [{"tokens": 2048, "vocab": v} for v in vocabs]:
        for peer in ("entrl", "trl"):
            name = f"{sizes['tokens']:6,} tokens {sizes['vocab']:7,} vocabulary {peer}"
            cases[name] = (case, (peer, "fp32", "mask20", {"width": width, **sizes}, threads))
    rows = rounds(cases, repeat)
    ratios = {}
    for name in cases:
        if name.endswith(" entrl"):
            other = rows[name.replace(" entrl", " trl")]
            ratios[name.removesuffix(" entrl")] = other["cpu_s"] / rows[name]["cpu_s"]
    return rows, ratios


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scaling", action="store_true", help="cost against tokens and vocabulary instead")
    args = parser.parse_args()
    sizes = QUICK if args.quick else SIZES
    repeat = 1 if args.quick else args.repeat
    if args.scaling:
        report("LM head, fp32, every fifth token kept", *scaling(args.quick, repeat, args.threads), args.json)
        return
    missing = [p for p in ("verl", "liger") if not importable(p)]
    rows, ratios = compare(sizes, args.quick, repeat, args.threads)
    title = "LM head: " + ", ".join(f"{v:,} {k}" for k, v in sizes.items()) + f", {args.threads} threads"
    report(title, rows, ratios, args.json)
    if missing:
        print(f"left out, no package or no GPU: {', '.join(missing)}")


if __name__ == "__main__":
    main()
