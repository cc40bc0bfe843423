import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rl.dynamics import Histogram
from rl.errors import ConfigError
from rl.tracking import Tracker, resolve_mode, without_secrets

HIST = {"entropy/hist": Histogram([3, 1], [0.0, 0.5, 2.0])}


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))


def tracker(folder, mode, **kwargs):
    return Tracker(folder, project="p", entity=None, mode=mode, name="n", **kwargs)


def test_every_step_is_one_line_that_strict_json_reads(tmp_path):
    t = tracker(tmp_path, "disabled")
    t.log(1, {"a": 1.5, "b": math.nan}, HIST)
    t.log(2, {"a": math.inf}, {})
    lines = [
        json.loads(line, parse_constant=lambda c: pytest.fail(c))
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[0] == {"step": 1, "a": 1.5, "b": None, "entropy/hist": {"counts": [3, 1], "edges": [0.0, 0.5, 2.0]}}
    assert lines[1] == {"step": 2, "a": None}
    t.finish({})
    assert t.id is None and t.where is None


def test_without_a_key_it_is_offline_and_says_how_to_sync(tmp_path):
    t = tracker(tmp_path, "auto", tags=["fork_mask"], config={"lr": 0.1, "hub_token": "hf_secret"})
    t.log(1, {"entropy/mean": 0.5}, HIST)
    t.log(2, {"entropy/mean": 0.4}, HIST)
    t.table(2, "rollouts", [{"prompt": "p", "reward": 1.0, "tokens": ["a"]}])
    where = t.where
    t.finish({"eval/after/pass@1": 0.6})
    folder = where.removeprefix("wandb sync ")
    assert folder.startswith(str(tmp_path / "wandb" / "offline-run-"))
    read = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if read.returncode:
        pytest.skip(f"this wandb cannot read offline runs back: {read.stderr[-200:]}")
    assert "entropy/mean" in read.stdout and "rollouts/step_000002" in read.stdout
    assert "hf_secret" not in read.stdout and "fork_mask" in read.stdout


def test_mode(monkeypatch, tmp_path):
    assert resolve_mode("auto") == "offline" and resolve_mode("online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled" and resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(ConfigError, match="WANDB_MODE=on is not known. Expected online"):
        resolve_mode("auto")


def test_a_key_in_netrc_counts(tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "x" * 40 + "\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert resolve_mode("auto") == "online"


def test_an_unreachable_server_falls_back_to_offline(tmp_path, monkeypatch, capsys):
    import wandb

    calls, start = [], wandb.init

    def init(mode, **kwargs):
        calls.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route")
        return start(mode=mode, **kwargs)

    monkeypatch.setattr(wandb, "init", init)
    t = tracker(tmp_path, "online")
    assert calls == ["online", "offline"] and t.where.startswith("wandb sync")
    assert "recorded offline" in capsys.readouterr().out
    t.finish({})


def test_secrets_are_left_out_at_any_depth_and_token_counts_are_not():
    config = {"a": {"api_key": "x", "max_new_tokens": 3, "hub_token": "y"}, "password": "z", "tokenizer": "t"}
    assert without_secrets(config) == {"a": {"max_new_tokens": 3}, "tokenizer": "t"}


@pytest.mark.parametrize(
    "key", ["token_secret", "tokenizer_password", "access_key", "PRIVATE_KEY", "passwd", "credentials", "authtoken"]
)
def test_a_secret_is_left_out_whatever_else_its_name_says(key):
    assert without_secrets({key: "x", "a": [{key: "x", "b": 1}]}) == {"a": [{"b": 1}]}


@pytest.mark.parametrize("key", ["answer_key", "max_tokens", "token_level", "tokenizer_name"])
def test_what_is_no_secret_stays(key):
    """The run folder's config.yaml goes the same way and is read back."""
    assert without_secrets({key: 1}) == {key: 1}


def test_the_sync_command_can_be_pasted(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    t = tracker(folder, "offline")
    words = shlex.split(t.where)
    t.finish({})
    assert words[:2] == ["wandb", "sync"] and len(words) == 3 and Path(words[2]).is_dir()
