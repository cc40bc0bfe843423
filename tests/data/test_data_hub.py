"""Loading from the hub, by the real client against a hub on this machine."""

import json
import os
import subprocess
import sys

from hub import hub

SCRIPT = """
import json
from data.errors import DataError
from data.load import Source, table
from data.prompts import PromptFormat

def rows(part, **options):
    source = Source(path="lab/set", columns={"prompt": "question", "answer": "answer"}, prompt=PromptFormat("as_is"), **options)
    try:
        return list(table(source, part))
    except DataError as error:
        return str(error)

print(json.dumps({
    "train": rows("train"),
    "heldout": rows("heldout"),
    "pinned": rows("train", revision="v1"),
    "stream": rows("train", streaming=True),
    "no revision": rows("train", revision="v9"),
    "no split": rows("train", splits={"train": "validation", "heldout": "test"}),
    "no configuration": rows("train", name="large"),
}))
"""


def files(tag):
    train = [{"question": f"{tag} {i}", "answer": str(i)} for i in range(3)]
    return {
        "train.jsonl": "\n".join(map(json.dumps, train)).encode(),
        "test.jsonl": json.dumps({"question": f"{tag} test", "answer": "9"}).encode(),
    }


def test_splits_revisions_streams_and_what_is_not_there(tmp_path):
    with hub("lab/set", {"main": files("new"), "v1": files("old")}) as address:
        env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
        env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    new = [{"prompt": f"new {i}", "answer": str(i)} for i in range(3)]
    assert found["train"] == found["stream"] == new
    assert found["heldout"] == [{"prompt": "new test", "answer": "9"}]
    assert found["pinned"][0] == {"prompt": "old 0", "answer": "0"}
    for what, said in {"no revision": "v9", "no split": "validation", "no configuration": "large"}.items():
        assert found[what].startswith("data path=lab/set (split ") and said in found[what] and "\n" not in found[what]
