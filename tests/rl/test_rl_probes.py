import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from transformers import Qwen3Config, Qwen3ForCausalLM

from command_line import entrl, train
from data import countdown
from rewards.checked import Checked
from rl.probes import Probes, first_completions
from rl.recorder import write_rows
from rl.report.reading import read_run
from rl.rollout import NativeSampler
from tiny import EntropyTrainer, grpo_config, make_trainer, save_model

T = 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


def grade(prompts, completions, answer, **columns):
    """Half of the problems have a grade."""
    assert len(answer) == len(prompts) == len(completions)
    return [float(len(text)) if i % 2 else None for i, text in enumerate(completions)]


def probed(model, folder, every=2, grader=grade, **changes):
    trainer = make_trainer(EntropyTrainer, model, folder, temperature=T, **{"max_steps": 3, **changes})
    problems = countdown.dataset("heldout", [3], 4, seed=0).to_list()
    trainer.add_callback(Probes(trainer, folder / "probes", problems, grader, every=every, seed=5))
    trainer.train()
    return trainer


def probe(folder, step):
    return pd.read_parquet(folder / "probes" / f"step_{step:06d}.parquet")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return probed(model, folder), folder


def test_there_is_one_before_training_every_so_many_steps_and_after_the_last(run):
    assert sorted(p.name for p in (run[1] / "probes").iterdir()) == [
        f"step_{step:06d}.parquet" for step in (0, 2, 3)
    ]  # and nothing half written


def test_fixed_completions_stay_and_fresh_ones_are_drawn_anew_from_the_same_numbers(run):
    first, last = probe(run[1], 0), probe(run[1], 3)
    for frame in (first, last):
        assert frame["kind"].tolist() == ["fixed"] * 4 + ["fresh"] * 4 and frame["problem"].tolist() == [*range(4)] * 2
    assert first["completion"][:4].tolist() == first["completion"][4:].tolist()  # of one policy they are the same
    assert last["completion"][:4].tolist() == first["completion"][:4].tolist() and (last["step"] == 3).all()
    assert last["completion"][4:].tolist() != first["completion"][4:].tolist()
    assert all(a.tolist() == b.tolist() for a, b in zip(first["token_ids"][:4], last["token_ids"][:4], strict=True))


@pytest.mark.parametrize("step", [0, 3])
def test_tokens_are_scored_by_the_policy_of_the_step(run, model, step):
    policy = Qwen3ForCausalLM.from_pretrained(model) if step == 0 else run[0].model
    for row in probe(run[1], step).itertuples():
        prompt, ids = countdown.tokenizer()(row.prompt)["input_ids"], row.token_ids.tolist()
        with torch.no_grad():
            logits = policy.eval()(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / T).log_softmax(-1)
        own = logp.gather(-1, torch.tensor(ids)[:, None])
        assert row.logp == pytest.approx(own.squeeze(-1).numpy(), abs=2e-5)
        assert row.entropy == pytest.approx(-(logp.exp() * logp).sum(-1).numpy(), abs=2e-5)
        assert row.rank.tolist() == ((logp > own).sum(-1) + 1).tolist()
        assert np.stack(row.top_ids).tolist() == logp.topk(5).indices.tolist()
        assert np.stack(row.top_probs) == pytest.approx(logp.topk(5).values.exp().numpy(), abs=1e-5)
        assert len(row.tokens) == len(ids) <= 8


def test_rewards_are_the_graders_and_nan_where_it_has_none(run):
    frame = probe(run[1], 2)
    expected = [float(len(text)) if i % 2 else math.nan for i, text in enumerate(frame["completion"])]
    assert frame["reward"].tolist() == pytest.approx(expected, nan_ok=True)


def test_where_the_grader_has_nothing_to_go_by_it_is_said_once_and_the_training_goes_on(model, tmp_path):
    def labels(prompts, completions, label):
        return [1.0] * len(label)

    with pytest.warns(UserWarning, match="probes are recorded without rewards: reward.grader raised TypeError") as said:
        probed(model, tmp_path, every=1, max_steps=1, grader=Checked("grader", labels))
    assert sum("without rewards" in str(each.message) for each in said) == 1
    assert probe(tmp_path, 0)["reward"].isna().all() and probe(tmp_path, 1)["reward"].isna().all()


def test_a_problem_keeps_the_first_completion_that_any_probe_has_of_it(tmp_path):
    def rows(**completions):
        return [{"problem": int(p[1:]), "kind": "fixed", "token_ids": ids} for p, ids in completions.items()]

    assert first_completions(tmp_path, 2) == {}
    write_rows(tmp_path / "step_000000.parquet", rows(p0=[1]) + [{"problem": 0, "kind": "fresh", "token_ids": [9]}])
    write_rows(tmp_path / "step_000020.parquet", rows(p0=[2], p1=[3]))
    write_rows(tmp_path / "step_000040.parquet", rows(p1=[4], p2=[5]))
    assert first_completions(tmp_path, 2) == {0: [1], 1: [3]}
    assert first_completions(tmp_path, 9) == {0: [1], 1: [3], 2: [5]}


def test_probing_changes_nothing(model, tmp_path):
    """Activation checkpointing is off while it draws, and on again; tests/rl/test_rl_resume.py has many more trainings."""
    how = {"use_reentrant": False, "preserve_rng_state": False}
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": how}
    options["extra"] = {"sampler": NativeSampler(Qwen3Config(), grpo_config(tmp_path, temperature=T))}
    plain = make_trainer(EntropyTrainer, model, tmp_path, temperature=T, max_steps=3, **options)
    plain.train()
    seen = probed(model, tmp_path, every=1, **options)
    for layer in seen.model.model.layers:
        assert layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords == how
    for a, b in zip(plain.model.parameters(), seen.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_of_an_earlier_entrl_goes_on_with_what_is_recorded_now(tmp_path, capsys):
    asked = ["eval.before=false", "eval.after=false", "checkpoint.every=2", "record.probes=1000"]
    assert train(tmp_path, *asked) == 0
    assert "probes    6 instead of record.probes=1000: countdown has no more" in capsys.readouterr().out
    folder = tmp_path / "it"
    assert read_run(folder).probed == [0, 1, 2] and len(read_run(folder).probes(2)) == 12
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.record, cfg.trainer.max_steps = {k: cfg.record[k] for k in ("every", "max_rows", "show")}, 3
    OmegaConf.save(cfg, folder / "config.yaml")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["format"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    new = ["rank", "old_logp", "logp_after", "top_ids", "top_tokens", "top_probs"]
    for path in (folder / "rollouts").iterdir():
        pd.read_parquet(path).drop(columns=new).to_parquet(path)
    for path in (folder / "probes").iterdir():
        path.unlink()
    assert entrl("resume", str(folder)) == 0
    run = read_run(folder)
    assert run.format == 1 and run.recorded == [1, 2, 3] and run.probed == [3]
    assert not set(new) & set(run.rollouts(2)) and set(new) <= set(run.rollouts(3))
    probes = run.probes(3)  # the first of this run, so that its own completions are the fixed ones
    assert probes["kind"].tolist() == ["fixed"] * 4 + ["fresh"] * 4
    assert probes["completion"][:4].tolist() == probes["completion"][4:].tolist()
