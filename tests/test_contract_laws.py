"""The laws every plug-in obeys, run over every file in configs/plugin/ in its default and its other modes."""

import importlib
import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ranks import two_ranks
from rl.contract import NEEDS, Signal
from rl.errors import ConfigError
from rl.pipeline import Pipeline
from rl.reduce import Reduce
from rl.testing import batch_from_logits, loss_from_signal

PLUGINS = Path(__file__).parents[1] / "configs" / "plugin"

# The variants beside the defaults; a new plug-in is tested with its defaults without an entry here.
VARIANTS = {
    "fork_mask": [
        {"selector": "topk"},
        {"denominator": "kept", "scope": "micro"},
        {"scope": "response"},
        {"keep": "low"},
        {"scope": "rollout"},
        {"policy": "rollout"},
        {"policy": "rollout", "scope": "response"},
    ],
    "steer": [{"mapping": "linear", "w_max": 1.2}, {"mapping": "asymmetric", "w_max": 1.3}, {"form": "theorem"}],
    "entropy_band": [{"version": "v1", "selector": "quantile"}, {"selector": "otsu_hist100"}],
    "clip_cov": [{"fraction": 0.3, "low": 0.1}, {"fraction": 0.1, "low": 0.1, "scope": "world"}],
    "kl_cov": [{"fraction": 0.3}, {"scope": "world"}],
    "era": [{"scale_advantages": False}, {"high": 1.5, "low": 1.0, "fraction": 0.5}],
    "entropy_bonus": [{"coef": -0.1}],  # with a target it does nothing before its second update: its own test
    "rank_shaping": [{"beta": 0.5}, {"beta": 0.0, "lam_head": 0.1, "lam_tail": -0.1, "k": 3}],
}


def load(name):
    node = yaml.safe_load((PLUGINS / f"{name}.yaml").read_text())[name]
    module, _, cls = node.pop("_target_").rpartition(".")
    node = {k: v for k, v in node.items() if not (isinstance(v, str) and "${" in v)}  # interpolations have defaults
    return getattr(importlib.import_module(module), cls), node


def cases():
    for path in sorted(PLUGINS.glob("*.yaml")):
        for variant in [{}, *VARIANTS.get(path.stem, [])]:
            label = "-".join(map(str, variant.values())) or "default"
            yield pytest.param((path.stem, variant), id=f"{path.stem}-{label}")


@pytest.fixture(params=cases())
def plugin(request):
    name, variant = request.param
    cls, defaults = load(name)
    return cls(**{**defaults, **variant})


def batch(dtype=torch.float64, rows=6, columns=9, vocab=11, seed=0, requires_grad=False):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, vocab, generator=g, dtype=torch.float64)
    old = logits + 0.3 * torch.randn(logits.shape, generator=g, dtype=torch.float64)
    ids = torch.randint(0, vocab, (rows, columns), generator=g)
    lengths = torch.randint(1, columns + 1, (rows,), generator=g)
    lengths[1] = 1  # a single token
    mask = torch.arange(columns) < lengths[:, None]
    mask[2] = False  # a completion that is masked altogether
    certain = 12 * torch.nn.functional.one_hot(ids[5], vocab)  # a completion whose words were to be expected
    logits[5], old[5] = logits[5] + certain, old[5] + certain
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    logits = logits.to(dtype).requires_grad_(requires_grad)
    return logits, batch_from_logits(
        logits, ids, mask, advantages.to(dtype), old_logits=old.to(dtype), ref_logits=(logits.detach() * 0.9)
    )


def scale_of(signal):
    return torch.ones_like(signal.weight) if signal.logit_scale is None else signal.logit_scale


def rows_of(tokens, index):
    fields = {f: getattr(tokens, f) for f in tokens.__dataclass_fields__}
    rowwise = {f: v[index] for f, v in fields.items() if isinstance(v, torch.Tensor) and f != "rollout_entropy"}
    return type(tokens)(**{**fields, **rowwise})


def test_every_plugin_file_is_covered():
    assert {"fork_mask", "steer", "entropy_band", "rank_shaping"} <= {p.stem for p in PLUGINS.glob("*.yaml")}
    for path in PLUGINS.glob("*.yaml"):
        assert list(yaml.safe_load(path.read_text())) == [path.stem], f"{path.name} must define the key {path.stem}"


def test_needs_are_known(plugin):
    assert plugin.needs <= NEEDS


@pytest.mark.parametrize("name", sorted(p.stem for p in PLUGINS.glob("*.yaml")))
def test_identity_at_neutral(name):
    cls, defaults = load(name)
    logits, tokens = batch(requires_grad=True)
    plain = Signal.start(tokens)
    signal = cls(**{**defaults, **cls.neutral})(tokens, plain)
    assert torch.equal(signal.effective[tokens.mask], plain.effective[tokens.mask])
    assert (scale_of(signal) == 1).all()
    assert all(p.coef == 0 or p.mean(tokens.mask).item() == 0 for p in signal.penalties)


def test_padding_is_never_touched(plugin):
    _, tokens = batch()
    signal = plugin(tokens, Signal.start(tokens))
    outside = ~tokens.mask
    assert not signal.keep[outside].any()
    assert torch.equal(signal.advantages[outside], tokens.advantages[outside])
    assert (signal.weight[outside] == 1).all() and (scale_of(signal)[outside] == 1).all()
    assert all(not (p.where & outside).any() for p in signal.penalties)


def test_what_stands_in_padding_changes_nothing(plugin):
    _, tokens = batch()
    noise = {"entropy": 7.0, "logp": -3.0, "old_logp": -0.1, "old_entropy": 9.0, "full_kl": 5.0}
    changed = replace(tokens, **{f: getattr(tokens, f).masked_fill(~tokens.mask, v) for f, v in noise.items()})
    a, b = (plugin(t, Signal.start(t)) for t in (tokens, changed))
    assert torch.equal(a.effective[tokens.mask], b.effective[tokens.mask])
    assert torch.equal(scale_of(a), scale_of(b))
    for p, q in zip(a.penalties, b.penalties, strict=True):
        assert torch.equal(p.mean(tokens.mask), q.mean(tokens.mask))


def test_weights_are_finite_and_not_negative(plugin):
    _, tokens = batch()
    signal = plugin(tokens, Signal.start(tokens))
    assert signal.weight.isfinite().all() and (signal.weight >= 0).all()
    assert signal.rescale.isfinite().all() and (signal.rescale > 0).all()
    assert signal.advantages.isfinite().all()
    assert scale_of(signal).isfinite().all() and (scale_of(signal) > 0).all()


def test_no_gradient_flows_through_weights_masks_or_advantages(plugin):
    _, tokens = batch(requires_grad=True)
    signal = plugin(tokens, Signal.start(tokens))
    assert not signal.effective.requires_grad and not scale_of(signal).requires_grad
    assert all(not p.where.requires_grad for p in signal.penalties)


def test_permuting_rows_permutes_the_result(plugin):
    _, tokens = batch()
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    a, b = (plugin(t, Signal.start(t)) for t in (tokens, rows_of(tokens, order)))
    torch.testing.assert_close(a.effective[order], b.effective, rtol=0, atol=1e-12)
    assert torch.equal(scale_of(a)[order], scale_of(b))
    for p, q in zip(a.penalties, b.penalties, strict=True):
        torch.testing.assert_close(p.mean(tokens.mask), q.mean(tokens.mask[order]), rtol=0, atol=1e-12)


def test_the_batch_is_not_changed(plugin):
    _, tokens = batch()
    before = {f: v.clone() for f in tokens.__dataclass_fields__ if isinstance(v := getattr(tokens, f), torch.Tensor)}
    plugin(tokens, Signal.start(tokens))
    assert all(torch.equal(value, getattr(tokens, field)) for field, value in before.items())


def test_bf16_is_close_to_fp32(plugin):
    """The loss of a bf16 batch is close to that of the same numbers in fp32; a few tokens may change sides."""
    losses = []
    logits, tokens = batch(torch.bfloat16, rows=200)
    for dtype in (torch.bfloat16, torch.float32):
        fields = {f: getattr(tokens, f) for f in tokens.__dataclass_fields__}
        cast = {f: v.to(dtype) for f, v in fields.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        typed = type(tokens)(**{**fields, **cast})
        losses.append(loss_from_signal(typed, plugin(typed, Signal.start(typed)), logits=logits.to(dtype)).item())
    assert math.isclose(losses[0], losses[1], rel_tol=0.1, abs_tol=0.1)


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (2, 0), (0, 3)])
def test_empty_and_single_token_batches(plugin, shape):
    logits = torch.zeros(*shape, 5, dtype=torch.float64)
    for mask in (torch.zeros(shape), torch.ones(shape)):
        tokens = batch_from_logits(logits, torch.zeros(shape), mask, torch.ones(shape[0]).double(), ref_logits=logits)
        signal = plugin(tokens, Signal.start(tokens))
        assert loss_from_signal(tokens, signal, logits=logits).isfinite()


def promises(plugin):
    return getattr(plugin, "promises", ())


def test_who_promises_to_read_the_record_does_not_look_at_the_current_policy(plugin):
    if "recorded" not in promises(plugin):
        pytest.skip("does not promise it")
    _, tokens = batch()
    moved = replace(tokens, logp=tokens.logp - 0.5, entropy=tokens.entropy + 1.0, rank=tokens.rank + 1)
    a, b = (plugin(t, Signal.start(t)) for t in (tokens, moved))
    assert torch.equal(a.effective, b.effective)


def test_who_promises_it_treats_each_completion_alone(plugin):
    if "alone" not in promises(plugin):
        pytest.skip("does not promise it")
    _, tokens = batch()
    together = plugin(tokens, Signal.start(tokens)).effective
    for i in range(len(tokens.mask)):
        own = rows_of(tokens, slice(i, i + 1))
        torch.testing.assert_close(plugin(own, Signal.start(own)).effective, together[i : i + 1], rtol=0, atol=1e-12)


def test_who_needs_no_zero_advantage_leaves_those_completions_alone(plugin):
    if "zero_advantage" in plugin.needs:
        pytest.skip("says that it does not")
    _, tokens = batch()
    still = replace(tokens, advantages=tokens.advantages * torch.tensor([0, 1, 1, 0, 1, 0])[:, None])
    assert not plugin(still, Signal.start(still)).effective[[0, 3, 5]].any()


def test_who_penalises_says_whose_gradient(plugin):
    _, tokens = batch(requires_grad=True)
    for penalty in plugin(tokens, Signal.start(tokens)).penalties:
        assert plugin.needs & {"logp.grad", "entropy.grad", "full_kl"} and penalty.per_token.requires_grad


def test_audit_reports_what_was_touched(plugin):
    _, tokens = batch()
    signal = Pipeline({"it": plugin})(tokens)
    touched, mass = signal.metrics["plugin/it/touched"], signal.metrics["plugin/it/adv_mass"]
    assert touched.count == tokens.mask.sum() and 0 < touched.total / touched.count <= 1
    assert mass.count > 0 and mass.total.isfinite()


def test_as_a_shadow_it_changes_nothing(plugin):
    _, tokens = batch(requires_grad=True)
    acting = {"acts": load("rank_shaping")[0]()}
    alone, random = Pipeline(acting)(tokens), torch.get_rng_state()
    beside = Pipeline(acting, {"it": plugin})(tokens)
    assert torch.equal(alone.effective, beside.effective) and not beside.penalties
    assert all(
        torch.equal(*pair)
        for name in alone.metrics
        for pair in zip(alone.metrics[name], beside.metrics[name], strict=True)
    )
    assert {"plugin/it/touched", "shadow/it/cosine", "shadow/it/jaccard"} <= beside.metrics.keys()
    assert torch.equal(torch.get_rng_state(), random)


# ---- what it says of itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.stem for p in PLUGINS.glob("*.yaml")))
def test_every_shipped_method_explains_itself_with_its_numbers(name):
    cls, defaults = load(name)
    number = dict.fromkeys(("rho", "w_min", "beta", "coef_low", "alpha", "fraction", "coef"), 0.37)
    setting = next(key for key in number if key in defaults)
    said = cls(**{**defaults, setting: 0.37}).explain()
    told = [*said.formula, str(dict(said.penalties))]
    assert any(word in line for line in told for word in ("0.37", "0.63"))  # 0.63: the quantile of the top 0.37


def explained(plugin):
    if not hasattr(plugin, "explain"):
        pytest.skip("does not explain itself")
    return plugin.explain()


def test_the_scopes_it_names_are_those_it_uses(plugin, monkeypatch):
    said, used = set(explained(plugin).statistics.values()), set()
    for name in ("sum", "max", "quantile", "topk"):
        original = getattr(Reduce, name)

        def recorded(*args, _original=original, **kwargs):
            used.add(inspect.signature(_original).bind(*args, **kwargs).arguments["scope"])
            return _original(*args, **kwargs)

        monkeypatch.setattr(Reduce, name, recorded)
    _, tokens = batch()
    plugin(tokens, Signal.start(tokens))
    assert used == said


def test_the_denominator_and_the_penalties_are_as_it_says(plugin):
    said = explained(plugin)
    _, tokens = batch(requires_grad=True)
    signal = plugin(tokens, Signal.start(tokens))
    kept = (signal.keep & tokens.mask).sum()
    factor = tokens.mask.sum() / kept if said.denominator == "kept" else torch.tensor(1.0)
    torch.testing.assert_close(signal.rescale.double(), factor.double(), rtol=1e-6, atol=0)
    assert {p.name: (p.coef, p.denominator) for p in signal.penalties} == dict(said.penalties)


def test_it_changes_what_it_says_and_nothing_else(plugin):
    said = set(explained(plugin).changes)
    _, tokens = batch()
    start = Signal.start(tokens)
    after = plugin(tokens, start)
    assert said == {
        f for f in ("keep", "weight", "advantages") if not torch.equal(getattr(start, f), getattr(after, f))
    } | ({"logit_scale"} if (scale_of(after) != 1).any() else set())


FIELDS = ("advantages", "logp", "old_logp", "entropy", "old_entropy", "rank", "ref_logp", "full_kl", "rollout_entropy")


@pytest.mark.parametrize("field", [*FIELDS, "reward", "group", "ids"])
def test_it_reads_what_it_says_and_nothing_else(plugin, field):
    said = explained(plugin)
    _, tokens = batch()
    g = torch.Generator().manual_seed(1)
    value = getattr(tokens, field)
    other = torch.rand(value.shape, generator=g, dtype=torch.float64)
    other = {"logp": -3 * other, "old_logp": -3 * other, "advantages": 6 * (other - 0.5)}.get(field, 3 * other)
    other = (11 * other).long() if not value.is_floating_point() else other
    changed = replace(tokens, **{field: other.to(value.dtype)})

    def does(tokens, start):
        signal = plugin(tokens, start)
        advantages = [signal.advantages] if field != "advantages" or "advantages" in said.changes else []
        return [
            signal.keep,
            signal.weight,
            signal.rescale,
            scale_of(signal),
            *advantages,
            *(p.mean(tokens.mask) for p in signal.penalties),
        ]

    same = all(map(torch.equal, does(tokens, Signal.start(tokens)), does(changed, Signal.start(changed))))
    assert same == (field not in said.reads)


# ---- two ranks -----------------------------------------------------------------------------------------------------------


def world_cases():
    """Every plug-in in every mode, each in all scopes that do not mean one rank alone."""
    seen = []  # variants that differ in their scope only are the same here
    for param in cases():
        name, variant = param.values[0]
        cls, defaults = load(name)
        settings = {**defaults, **variant}
        for scope in ("response", "world", "rollout") if "scope" in settings else (None,):
            if scope == "response" and settings.get("denominator") == "kept":
                continue  # the kept tokens of this rank's micro-batch, by definition
            chosen = settings if scope is None else {**settings, "scope": scope}
            try:
                cls(**chosen)
            except ConfigError:  # a scope that this plug-in does not have
                continue
            if (name, chosen) not in seen:
                seen.append((name, chosen))
                yield pytest.param(name, chosen, id=f"{param.id}-{scope or 'no scope'}")


WORLD_CASES = list(world_cases())
EMPTY = {"no rank empty": None, "first rank empty": 0, "second rank empty": 1}


def world_batch(empty):
    _, tokens = batch()
    if empty is None:
        return tokens
    mask = tokens.mask.clone()
    mask[3 * empty : 3 * empty + 3] = False
    return replace(tokens, mask=mask, rollout_entropy=tokens.old_entropy[mask])


def outcome(name, settings, tokens):
    signal = Pipeline({"it": load(name)[0](**settings)})(tokens)
    metrics = {key: torch.stack([m.total.double(), m.count.double()]) for key, m in signal.metrics.items()}
    both = torch.stack([signal.effective, scale_of(signal)], -1)
    return both, [p.mean(tokens.mask).detach() for p in signal.penalties], metrics


def on_rank(rank):
    """What each plug-in does to this rank's half of the batch, which is only as wide as its own longest completion."""
    found = {}
    for case, empty in EMPTY.items():
        tokens = rows_of(world_batch(empty), slice(3 * rank, 3 * rank + 3))
        columns = max(1, int(tokens.mask.sum(-1).max()))
        fields = {f: getattr(tokens, f) for f in tokens.__dataclass_fields__}
        narrow = {f: v[:, :columns] for f, v in fields.items() if isinstance(v, torch.Tensor) and v.dim() == 2}
        tokens = replace(tokens, **narrow, rollout_entropy=narrow["old_entropy"][narrow["mask"]])
        for i, param in enumerate(WORLD_CASES):
            found[f"{i} {case}"] = outcome(*param.values, tokens)
    return found


@pytest.fixture(scope="module")
def both_ranks():
    return two_ranks(on_rank)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("name, settings", WORLD_CASES)
def test_two_ranks_are_one_process(both_ranks, name, settings, empty):
    tokens = world_batch(EMPTY[empty])
    effective, penalties, metrics = outcome(name, settings, tokens)
    key = f"{[p.values for p in WORLD_CASES].index((name, settings))} {empty}"
    ranks = [found[key] for found in both_ranks]
    for rank, (own, _, _) in enumerate(ranks):
        rows = slice(3 * rank, 3 * rank + 3)
        expected, inside = effective[rows, : own.shape[1]], tokens.mask[rows, : own.shape[1]]
        torch.testing.assert_close(own[inside], expected[inside], rtol=0, atol=1e-12)
    for mean, *own in zip(penalties, *(found[1] for found in ranks), strict=True):
        torch.testing.assert_close(sum(own) / 2, mean, rtol=0, atol=1e-12)  # as gradients are averaged
    for series, value in metrics.items():
        torch.testing.assert_close(sum(found[2][series] for found in ranks), value, rtol=1e-6, atol=1e-6)
