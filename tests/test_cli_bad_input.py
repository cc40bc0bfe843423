"""Bad input on the command line: one sentence, exit code 2, nothing half-written."""

import pytest

from command_line import SMALL, fails

BAD_REWARD = "def reward(prompts, completions, **columns):\n    return {}\n"


def rewards_of(tmp_path, monkeypatch, body, name):
    (tmp_path / f"{name}.py").write_text(BAD_REWARD.format(body))
    monkeypatch.syspath_prepend(tmp_path)
    return f"reward.correct.fn={{_target_: {name}.reward, _partial_: true}}"


@pytest.mark.parametrize(
    "name, body, message",
    [
        ("r_nan", "[float('nan')] * len(prompts)", "reward.correct returned nan for sample 0 (prompt"),
        ("r_none", "[None] * len(prompts)", "reward.correct returned None for sample 0"),
        ("r_count", "[1.0]", "reward.correct returned 1 values for 8 completions"),
        (
            "r_raises",
            "[1 / 0 for _ in prompts]",
            "reward.correct raised ZeroDivisionError: division by zero on sample 0",
        ),
    ],
)
def test_a_broken_reward_is_found_before_anything_is_written(tmp_path, monkeypatch, capsys, name, body, message):
    override = rewards_of(tmp_path, monkeypatch, body, name)
    assert message in fails(capsys, "train", *SMALL, f"run.dir={tmp_path}/runs", override)
    assert not (tmp_path / "runs").exists()


def test_a_reward_that_hangs_is_found_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rl.preflight.probe._PROBE", 0.2)
    override = rewards_of(tmp_path, monkeypatch, "__import__('time').sleep(300)", "r_hangs")
    sentence = fails(capsys, "train", *SMALL, f"run.dir={tmp_path}/runs", override)
    assert "reward.correct has not answered within 0.2 s for 8 empty completions" in sentence
    assert not (tmp_path / "runs").exists()


def test_a_reward_that_breaks_later_leaves_a_failed_run_that_says_why(tmp_path, monkeypatch, capsys):
    override = rewards_of(tmp_path, monkeypatch, "[float('nan') if c else 0.0 for c in completions]", "r_late")
    sentence = fails(capsys, "train", *SMALL, "eval.before=false", f"run.dir={tmp_path}/runs", "run.name=x", override)
    assert "reward.correct returned nan for sample" in sentence and "completion '" in sentence
    assert "RewardError" in (tmp_path / "runs" / "x" / "FAILED").read_text()
    assert not (tmp_path / "runs" / "x" / "DONE").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["plugin=[nothing]"], "plugin=nothing does not exist"),
        (["trainer.learnin_rate=1"], "Did you mean learning_rate?"),
        (
            ["plugin.fork_mask.rho=20"],
            "plugin.fork_mask.rho=20 is not a fraction. Expected 0 < rho <= 1; 0.2 keeps the top 20 %.",
        ),
        (["plugin.steer.w_min=0.5"], "plug-in steer is not selected"),
        (["trainer.per_device_train_batch_size=12"], "12 is not a multiple of 8"),
        (["trainer.loss_type=dpo"], "trainer.loss_type=dpo is not known. Expected one of: grpo, dapo"),
        (["trainer.epsilon=wide"], "trainer.epsilon=wide is a str"),
        (["data.levels=[9]"], "counts of numbers from 2 to 6"),
        (["data.train.count=0"], "at least 1"),
        (["model.path=/no/such/folder"], "/no/such/folder is no folder with a model"),
        (["model.path={tmp}"], "holds no model"),
        (["model.path=no-such-org/no-such-model"], "could not be loaded"),
        (["reward=[]"], "nothing to learn"),
        (["data=jsonl", "data.path=/no/such.jsonl"], "does not exist"),
        (["data.grader._target_=rewards.nothing.fn"], "rewards.nothing.fn cannot be made"),
        (["plugin.fork_mask._target_=rl.plugins.fork_mask.Nope"], "plugin.fork_mask"),
        (["eval.ks=[1,64]"], "eval.samples"),
        (["eval.top_p=1.5"], "eval.top_p=1.5 does not work. Expected 0 < top_p <= 1"),
        (["eval.temperature=0"], "would be the same completion 2 times"),
        (["eval.limit=0"], "eval.limit=0 does not work"),
        (["data.train.count=31"], "data.train has 31 problems, a rollout takes 32 (256 completions"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 does not work. Expected a number above 0."),
        (["trainer.temperature=0"], "trainer.temperature=0"),
        (["trainer.learning_rate=null"], "trainer.learning_rate=None"),
        (["plugin.fork_mask.rho=abc"], "plugin.fork_mask.rho=abc is not a fraction"),
        (["model.dtype=float99"], "model.dtype=float99 is not known"),
        (["run.name=a/b"], "run.name=a/b is no name of a folder"),
        (["run.dir=/proc/x"], "run.dir=/proc/x cannot be written"),
        (["data.answers=null"], "data.answers is not set"),
        (["logger.mode=foo"], "logger.mode=foo is not known"),
        (["logger.init_timeout=-1"], "logger.init_timeout=-1 does not work. Expected seconds above 0"),
        (["logger.finish_timeout=x"], "logger.finish_timeout=x does not work"),
        (["rollout=foo"], "rollout=foo does not exist"),
        (["trainer.repetition_penalty=1.1"], "rollout=native does not know trainer.repetition_penalty"),
        (["trainer.use_vllm=true"], "contradict each other"),
        (["seed=-1"], "seed=-1 is no seed"),
        (["trainer.seed=-1"], "trainer.seed=-1 is no seed"),
        (["eval.seed=-1"], "eval.seed=-1 is no seed"),
        (["run.name=1234"], "run.name=1234 is no text"),
        (["run.name=.."], "run.name=.. is no name of a folder"),
        (["eval.ks=3"], "eval.ks=3 is no list of whole numbers"),
        (["eval.samples=two"], "eval.samples=two does not work"),
        (["eval.before=maybe"], "eval.before=maybe is neither true nor false"),
        (["trainer.max_steps=1.5"], "trainer.max_steps=1.5 does not work. Expected a whole number."),
        (["trainer.top_p=2"], "trainer.top_p=2 does not work"),
        (["engine.threads=-1"], "engine.threads=-1 does not work"),
        (["data=jsonl", "data.path="], "is no path"),
        (["trainer.learning_rate=1e400"], "trainer.learning_rate=inf does not work"),
        (["trainer.adam_beta1=0"], "trainer.optim=adamw_torch_fused cannot be made"),
        (["trainer.generation_kwargs={num_beam: 1}"], "trainer.generation_kwargs.num_beam is no option"),
        (["trainer.accelerator_config={split_batch: true}"], "trainer: TRL refuses these options"),
        (["peft=lora", "peft.r=0"], "peft.r=0 does not work"),
        (["peft=lora", "peft.target_modules=[nothing]"], "not found in the base model"),
        (["model.attn_implementation=flash"], "model.attn_implementation=flash is not known"),
    ],
    ids=str,
)
def test_bad_input_gets_one_sentence_and_writes_nothing(tmp_path, capsys, overrides, message):
    overrides = [o.format(tmp=tmp_path) if "{tmp}" in o else o for o in overrides]
    assert message in fails(capsys, "train", *SMALL[:1], f"run.dir={tmp_path}/runs", *overrides)
    assert not (tmp_path / "runs").exists()


def test_missing_columns_and_empty_files(tmp_path, capsys):
    rows = tmp_path / "set.jsonl"
    rows.write_text('{"question": "1+1", "gold": "2"}\n')
    where = ["data=jsonl", f"data.path={rows}", f"run.dir={tmp_path}/runs"]
    sentence = fails(capsys, "train", *where)
    assert "none 'answer' for 'answer'. Present: question, gold." in sentence
    rows.write_text("")
    assert "is empty" in fails(capsys, "train", *where)
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_touched(tmp_path, capsys):
    (tmp_path / "it").mkdir()
    sentence = fails(capsys, "train", *SMALL, f"run.dir={tmp_path}", "run.name=it")
    assert "exists already" in sentence and "run.overwrite=true" in sentence and not list((tmp_path / "it").iterdir())


def test_eval_of_what_is_no_model(tmp_path, capsys):
    assert "holds no model" in fails(capsys, "eval", str(tmp_path))
    assert "is no folder with a model" in fails(capsys, "eval", str(tmp_path / "x"))


@pytest.mark.parametrize("rollout", ["vllm_colocate", "vllm_server"])
def test_without_vllm_its_rollouts_are_refused_before_anything_is_written(tmp_path, capsys, monkeypatch, rollout):
    monkeypatch.setattr("rl.build.find_spec", lambda name: None)
    assert "vLLM is not installed" in fails(capsys, "train", f"run.dir={tmp_path}/runs", f"rollout={rollout}")
