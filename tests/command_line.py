"""Whole command lines in this process, small enough for a test."""

import json

from rl.cli import main

SMALL = [
    "debug=two_steps",
    "trainer.per_device_train_batch_size=16",
    "data.train.count=32",
    "data.heldout.count=6",
]


def entrl(*argv):
    return main(list(argv))


def train(tmp_path, *overrides, name="it"):
    return entrl("train", *SMALL, f"run.dir={tmp_path}", f"run.name={name}", *overrides)


def fails(capsys, *argv):
    """Run something that must end with exit code 2 and one sentence; give the sentence."""
    assert entrl(*argv) == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("entrl: ") and "\n" not in sentence and "Traceback" not in sentence
    return sentence


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
