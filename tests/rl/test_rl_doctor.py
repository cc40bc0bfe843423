"""The preflight: twenty mistakes in one configuration, all found in one run, and silence on a good one."""

import json

import pytest

from rl.preflight.doctor import examine
from rl.preflight.report import Report

ROWS = [
    {"prompt": "2 3 5 > 10 :", "answer": "10", "level": 1},
    {"prompt": "2 3 5 > 10 :", "answer": None},
    {"prompt": "", "answer": "1"},
    {"prompt": "word " * 1500, "answer": "7"},
]


def wrong(prompts, completions, answer, **columns):
    """A reward that pays for nothing at all."""
    return [1.0 for _ in completions]


def asks(prompts, completions, difficulty, **columns):
    """A reward with a column that no data set here has."""
    return [0.0 for _ in completions]


def curious(prompts, completions, answer, trainer_state, log_metric, completion_ids, mean_logp, **columns):
    """A sound reward that wants everything a trainer gives."""
    log_metric("mine", trainer_state.global_step + len(completion_ids) + len(mean_logp))
    return [float(isinstance(c, str) and c == f"\\boxed{{{a}}}") for c, a in zip(completions, answer, strict=True)]


# override -> a part of the sentence that must come of it
PLANTED = {
    "plugin.fork_mask.rhoo=0.3": "plugin.fork_mask.rhoo is not a key of the configuration. Did you mean",
    "modle=tiny": "modle",
    "data.train.cuont=3": "data.train.cuont is not a key",
    "plugin.steer.w_min=-1": "plugin.steer.w_min=-1",
    "plugin.entropy_band._target_=rl.plugins.entropy_band.EntropyBnad": "plugin.entropy_band: rl.plugins.entropy_band.EntropyBnad cannot be made",
    "trainer.learnin_rate=1e-6": "trainer.learnin_rate is no option of trl.GRPOConfig. Did you mean learning_rate?",
    "trainer.loss_type=dpo": "trainer.loss_type=dpo is not known",
    "trainer.epsilon=wide": "trainer.epsilon=wide is a str",
    "trainer.max_steps=0": "trainer.max_steps=0 does not work",
    "trainer.report_to=wandb": "trainer.report_to is set by entrl itself",
    "trainer.bf16=true": "trainer.bf16=true needs a GPU",
    "reward.format_tags.gate=corect": "reward.format_tags.gate=corect is not selected",
    "reward.format_tags.fn.tagz=[a]": "reward.format_tags.fn.tagz",
    "+reward.mine={weight: 1.0, fn: {_target_: my_lab.rewards.mine, _partial_: true}}": "reward.mine.fn: my_lab.rewards.mine cannot be made",
    "eval.ks=[1,64]": "eval.ks=[1, 64] does not fit eval.samples=16",
    "model.dtype=fp16": "model.dtype=fp16 is not known",
    "record.every=-1": "record.every=-1 does not work",
    "record.alternatives=-1": "record.alternatives=-1 does not work. Expected a whole number of at least 0",
    "record.probes=4.5": "record.probes=4.5 does not work. Expected a whole number of at least 0",
    "engine.threads=0": "engine.threads=0 does not work",
    "logger.mode=onlin": "logger.mode=onlin is not known",
    "run.name=taken": "exists already",
    "data=jsonl": "2 bad of 4 rows (counted from 1): row 2: answer is null; row 3: prompt is empty",
    "data.filter.max_prompt_tokens=null": "exceed the model's context of 1024 tokens",
}


@pytest.fixture
def site(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    return [f"data.path={path}", f"run.dir={tmp_path / 'runs'}"]


def test_twenty_planted_mistakes_are_found_in_one_run(site, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    overrides = ["plugin=[fork_mask,steer,entropy_band]", "reward=[correct,format_tags]", "data=jsonl", *site]
    overrides += ["data.holdout=null", *(o for o in PLANTED if o != "data=jsonl")]
    report = examine(overrides, None, rollouts=0)
    found = "\n".join(report.errors)
    missed = [override for override, sentence in PLANTED.items() if sentence not in found]
    assert not missed, found
    assert len(PLANTED) >= 20 and len(report.errors) >= 20 and "mistake of entrl" not in found


# these stop what comes after them, so each has a run of its own
ALONE = {
    ("trainer.num_generations=7",): "256 is not a multiple of 7",
    ("trainer.steps_per_generation=3", "trainer.gradient_accumulation_steps=2"): "do not divide each other",
    ("model.path=/no/such/model",): "is no folder with a model",
    ("data=jsonl", "data.path=/no/such.jsonl"): "does not exist",
    ("data=jsonl", "data.path={set}", "data.columns.prompt=question"): "no column 'question' for 'prompt'",
    ("data.train.count=8",): "data.train has 8 problems, a rollout takes 32",
    ("rollout=vllm_colocate",): "vLLM is not installed",
    ("rollout.train_share=0.3",): "rollout.train_share=0.3 of trainer.num_generations=8 is 2.4 completions",
    (
        "trainer.per_device_train_batch_size=65536",
        "trainer.max_completion_length=1000",
        "model.attn_implementation=eager",
    ): "The run would take",
    ("reward.correct.weight=0",): "Every reward has weight 0",
    ("reward=[format_tags]", "+reward.format_tags.fn.tagz=[a]"): "reward.format_tags.fn.tagz is no parameter of",
    ("run.dir=/proc/nowhere",): "run.dir=/proc/nowhere cannot be written to",
    ("logger.mode=online",): "no W&B key was found",
    (
        "+reward.mine={{weight: 1.0, fn: {{_target_: test_rl_doctor.asks, _partial_: true}}}}",
    ): "asks for the column 'difficulty'",
}


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case[0])
def test_mistakes_that_stop_the_rest(case, site, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("netrc.netrc", lambda: (_ for _ in ()).throw(OSError))
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    monkeypatch.setattr("rl.build.find_spec", lambda name: None)
    path = site[0].removeprefix("data.path=")
    report = examine([o.format(set=path) for o in case], None, rollouts=0)
    assert any(ALONE[case] in error for error in report.errors), report.errors
    assert not any("mistake of entrl" in error for error in report.errors), report.errors


def test_a_reward_that_pays_for_everything_is_found(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    grader = "data.grader={_target_: test_rl_doctor.wrong, _partial_: true}"
    errors = examine([grader], None, rollouts=0).errors
    assert errors and all(error.startswith("data.grader: ") for error in errors)


@pytest.mark.parametrize(
    "plugins", ["[]", "[fork_mask]", "[steer]", "[entropy_band]", "[rank_shaping]", "[fork_mask,steer]"]
)
def test_silence_on_a_good_configuration(plugins, tmp_path):
    report = examine([f"plugin={plugins}", f"run.dir={tmp_path}"], None, rollouts=8)
    assert not report.errors and not report.advice
    text = "\n".join(report.lines())
    assert text.endswith("\nnothing to mend") and "groups without spread" in text and "plugin.fork_mask.rho=" in text


def test_advice_is_no_error(tmp_path):
    report = examine([f"run.dir={tmp_path}", "plugin.fork_mask.rho=1.0"], None, rollouts=0)
    assert not report.errors and "touches no token" in report.advice[0]
    assert list(report.lines())[-1] == "nothing to mend, 1 piece of advice"


def test_a_check_that_fails_itself_is_told_and_the_others_go_on():
    report = Report()
    with report.section("first"):
        raise KeyError("x")
    with report.section("second") as section:
        section.fact("fine")
    assert "mistake of entrl: KeyError" in report.errors[0] and len(report.sections) == 2
    assert list(report.lines())[-1] == "1 thing to mend"


def test_a_reward_gets_what_a_trainer_would_give_it(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    mine = "+reward.mine={weight: 1.0, fn: {_target_: test_rl_doctor.curious, _partial_: true}}"
    report = examine([mine, f"run.dir={tmp_path}", "~reward.correct"], None, rollouts=0)
    assert all("raised" not in error and "mistake of entrl" not in error for error in report.errors), report.errors
    assert any("reward.mine" in error for error in report.errors)  # Countdown's solutions are no boxed answers
    seen = {}
    monkeypatch.setattr("rl.preflight.tasks.check_rewards", lambda *a, **k: seen.update(called=True))
    report = examine([mine, f"run.dir={tmp_path}"], None, rollouts=4)
    assert seen and not report.errors, report.errors
