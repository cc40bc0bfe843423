"""The tables of docs/scaling.md are what the script prints, obey the laws they must, and its command lines are accepted."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rl.config import compose
from rl.engine import engine
from rl.options import batch_algebra
from rl.sizes import sizes
from rl.timing import H100

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "scaling.md").read_text()
sys.path.insert(0, str(ROOT / "scripts"))
import scaling  # noqa: E402

SEVEN, GIB = "7b", scaling.GIB


def gib(model, gpus, kind, rollout="vllm_colocate", lora=False, micro_batch=1):
    return scaling.Plan(model, gpus, kind, lora, rollout, micro_batch).memory().total / GIB


def test_models_have_the_published_numbers_of_parameters():
    published = [494_032_768, 1_543_714_304, 7_615_616_512, 8_190_735_360, 14_770_033_664, 32_763_876_352]
    assert [sizes(scaling.config(name)).parameters for name in scaling.SHAPES] == published


def test_every_table_of_the_document_is_the_one_the_script_prints():
    tables = scaling.tables()
    assert len(tables) == 8
    for table in tables:
        assert table in TEXT, f"python scripts/scaling.py prints another table:\n{table}"


@pytest.mark.parametrize("model", ["7b", "32b"])
def test_more_is_sharded_the_less_a_gpu_holds(model):
    assert gib(model, 8, "zero3") < gib(model, 8, "zero2") < gib(model, 8, "ddp")
    assert gib(model, 8, "zero3_offload") < gib(model, 8, "zero3")
    for kind in ("zero2", "zero3"):
        assert gib(model, 64, kind) < gib(model, 8, kind) and gib(model, 8, kind, lora=True) < gib(model, 8, kind)
    assert gib(model, 8, "zero2", micro_batch=1) <= gib(model, 8, "zero2", micro_batch=8)


def test_a_small_model_gains_nothing_from_stage_3():
    assert gib("0.5b", 8, "zero3", "hf") > gib("0.5b", 8, "zero2", "hf")  # it is gathered as a whole


def seconds(model, gpus, kind, completions, hardware=H100, micro_batch=8):
    return (
        scaling.Plan(model, gpus, kind, False, "vllm_colocate", micro_batch, completions // gpus).step(hardware).total
    )


def test_more_gpus_take_less_time_until_the_network_is_too_slow():
    found = [seconds(SEVEN, gpus, "zero2", 1024) for gpus in (8, 16, 32, 64)]
    assert found == sorted(found, reverse=True) and found[0] / found[-1] < 8
    slow = replace(H100, network=0.8 * scaling.CARDS["100 Gbit/s a node"])
    one, two, apart = (seconds("14b", n, "zero3", 1024, h, 1) for n, h in ((8, H100), (16, H100), (16, slow)))
    assert two < one < apart


def test_what_is_best_fits_and_starts_as_it_says():
    found = scaling.best("14b", 8)
    assert found.memory().fits() and not found.lora and not found.fp32
    assert scaling.best("32b", 1) is None and scaling.best("8b", 8, "native").lora
    cfg = compose(shlex.split(found.line().removeprefix("entrl train")))
    algebra = batch_algebra(cfg.trainer, engine(cfg, here=False).world)
    assert (algebra.completions_per_update, algebra.on_policy) == (8 * scaling.ROWS, True)
    split, share = found.vllm
    assert (cfg.trainer.vllm_tensor_parallel_size, cfg.trainer.vllm_gpu_memory_utilization) == (split, share)


def test_the_command_line_prints_what_was_asked_for(capsys, monkeypatch):
    words = ["--gpus", "8", "--model", "7b", "--rollout", "vllm_colocate", "--memory", "1e12"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    scaling.main()
    out = capsys.readouterr().out
    assert "| zero2 | vllm_colocate |" in out and "    entrl train model=qwen2.5_math_7b engine=zero2" in out
    assert "32B" not in out and out.count("| 7B | zero2 |") == 1


@pytest.mark.parametrize("line", re.findall(r"^    entrl (?:train|prepare|slurm submit) (.*)$", TEXT, re.MULTILINE))
def test_command_lines_of_the_document_are_accepted(line):
    cfg = compose(shlex.split(line))
    batch_algebra(cfg.trainer, engine(cfg, here=False).world)
