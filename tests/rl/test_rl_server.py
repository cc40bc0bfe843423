"""vLLM's server beside a training, with a stub in vLLM's place: it starts, is waited for, and never stays behind."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from rl import server as module
from rl.config import compose
from rl.errors import ConfigError, ServerError
from rl.server import server_of, serving, split_gpus

# Answers /health as STUB says: 503 for so many seconds, or dies, or does not listen to TERM.
STUB = """\
#!{python} -SE
import os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
option = dict(zip(sys.argv[2::2], sys.argv[3::2]))
print("devices", os.environ["CUDA_VISIBLE_DEVICES"], "rank", os.environ.get("RANK"), " ".join(sys.argv[1:]), flush=True)
if os.environ["STUB"] == "dies":
    sys.exit("no such model")
if os.environ["STUB"] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready = time.time() + float(os.environ["STUB"]) if os.environ["STUB"][0].isdigit() else 0
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.time() > ready and self.path == "/health" else 503)
        self.end_headers()
    def log_message(self, *args):
        pass
worker = os.fork()  # as vLLM's workers, which outlive a server that is killed
if worker == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)
print("worker", worker, flush=True)
HTTPServer((option["--host"], int(option["--port"])), Health).serve_forever()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    path = tmp_path / "trl"
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(module, "_trl", lambda: str(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("STUB", "0")
    return lambda value: monkeypatch.setenv("STUB", value)


def ours(*overrides, port=None):
    address = [f"trainer.vllm_server_port={port or free_port()}", "trainer.vllm_server_host=127.0.0.1"]
    return server_of(compose(["rollout=vllm_server", *address, *overrides]))


def alive(pid):
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def worker_of(log):
    return int(next(line for line in log.read_text().splitlines() if line.startswith("worker")).split()[1])


def gone(pid, seconds=60):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_no_server_no_work(tmp_path):
    assert server_of(compose()) is None and server_of(compose(["rollout=vllm_colocate"])) is None
    with serving(None, tmp_path / "log") as env:
        assert env == {} and not (tmp_path / "log").exists()


def test_the_server_gets_the_last_gpus_and_the_training_the_others(stub, tmp_path, capsys):
    log, server = tmp_path / "logs" / "vllm.log", ours("rollout.server.extra=[--max_model_len,64]")
    with serving(server, log) as env:
        assert env == {"CUDA_VISIBLE_DEVICES": "4,5"}
        assert module._health(server.url) is None
        assert alive(worker_of(log))
    assert gone(worker_of(log)) and module._health(server.url) is not None
    first = log.read_text().splitlines()[0]
    assert first.startswith("devices 7 rank None vllm-serve --model ") and first.endswith("--max_model_len 64")
    assert f"--port {server.port} --tensor_parallel_size 1 --dtype bfloat16" in first
    assert "answers at" in capsys.readouterr().out


def test_a_server_that_is_slow_is_waited_for(stub, tmp_path, monkeypatch, capsys):
    stub("1.2")
    monkeypatch.setattr(module, "_TOLD", 0.3)
    with serving(ours(), tmp_path / "log"):
        pass
    assert "does not answer yet after 1 s (HTTP 503)" in capsys.readouterr().out


def test_a_server_that_is_too_slow_is_ended(stub, tmp_path):
    stub("100")
    with pytest.raises(ServerError, match=r"did not answer within 1 s \(HTTP 503\)") as error:
        with serving(ours("rollout.server.start_timeout=1"), tmp_path / "log"):
            pytest.fail("it never answered")
    assert "worker" in str(error.value)  # the log's last lines
    assert gone(worker_of(tmp_path / "log"))


def test_a_server_that_dies_is_told_with_its_last_lines(stub, tmp_path):
    stub("dies")
    with pytest.raises(ServerError, match="ended by itself with exit code 1") as error:
        with serving(ours(), tmp_path / "log"):
            pytest.fail("it never answered")
    assert "no such model" in str(error.value)


def test_a_training_that_fails_ends_the_server_and_keeps_its_own_error(stub, tmp_path):
    with pytest.raises(ZeroDivisionError):
        with serving(ours(), tmp_path / "log"):
            1 / 0  # noqa: B018
    assert gone(worker_of(tmp_path / "log"))


def test_a_training_that_fails_because_the_server_died_says_so(stub, tmp_path):
    with pytest.raises(ServerError, match="ended by itself with exit code -9"):
        with serving(ours(), tmp_path / "log"):
            os.kill(os.getpgid(worker_of(tmp_path / "log")), signal.SIGKILL)  # the server leads their group
            time.sleep(0.3)
            raise ConnectionError("refused")
    assert gone(worker_of(tmp_path / "log"))


def test_a_server_that_does_not_listen_is_killed(stub, tmp_path, monkeypatch):
    stub("deaf")
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    with serving(ours(), tmp_path / "log"):
        pass
    assert gone(worker_of(tmp_path / "log"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_does_not_outlive_a_killed_launcher(stub, tmp_path, number):
    """Neither signal lets a ``finally`` run."""
    code = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from rl import server
        server._trl = lambda: {str(tmp_path / "trl")!r}
        made = server.Server(url="http://127.0.0.1:{(port := free_port())}", host="127.0.0.1", port={port}, launch=True, gpus=1,
            tensor_parallel=1, start_timeout=60, extra=(), model="m", revision=None, dtype="auto", trust_remote_code=False)
        with server.serving(made, Path({str(tmp_path / "log")!r})):
            os.kill(os.getpid(), {int(number)})
    """)
    subprocess.run([sys.executable, "-c", code], timeout=300)
    leader = os.getpgid(worker_of(tmp_path / "log")) if alive(worker_of(tmp_path / "log")) else None
    assert leader is None or gone(leader)
    if leader is not None:  # the stub's worker does not listen to TERM, vLLM's do
        os.kill(worker_of(tmp_path / "log"), signal.SIGKILL)


def test_a_server_that_runs_elsewhere_is_only_waited_for(stub, tmp_path):
    port = free_port()
    words = [str(tmp_path / "trl"), "vllm-serve", "--host", "127.0.0.1", "--port", str(port)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        other.stdout.readline()
        worker = int(other.stdout.readline().split()[1])
        with serving(ours("rollout.server.launch=false", port=port), tmp_path / "log") as env:
            assert env == {}
        assert alive(other.pid) and not (tmp_path / "log").exists()
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.communicate(timeout=60)
    assert gone(worker)
    with pytest.raises(ServerError, match="did not answer within 0.1 s .*Is the server running"):
        with serving(ours("rollout.server.launch=false", "rollout.server.start_timeout=0.1", port=port), tmp_path):
            pytest.fail("nobody is there")


def test_a_port_that_is_taken_is_not_talked_to(stub, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="no server can be started there: Address already in use"):
            with serving(ours(port=other.getsockname()[1]), tmp_path / "log"):
                pytest.fail("somebody else is there")
    assert not (tmp_path / "log").exists()


def test_splitting_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,GPU-c")
    assert split_gpus(2) == (["GPU-a"], ["GPU-b", "GPU-c"])
    with pytest.raises(ConfigError, match="rollout.server.gpus=3 leaves no GPU for the training: 3 can be seen"):
        split_gpus(3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert split_gpus(1) == (["0", "1", "2"], ["3"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("rollout.server.gpus=0", "rollout.server.gpus=0 does not work"),
        ("rollout.server.tensor_parallel=two", "rollout.server.tensor_parallel=two does not work"),
        ("rollout.server.tensor_parallel=2", "rollout.server.gpus=1 is not a multiple of"),
        ("rollout.server.start_timeout=0", "rollout.server.start_timeout=0 does not work"),
        ("rollout.server.launch=maybe", "rollout.server.launch=maybe is neither"),
        ("rollout.server.extra=[--port,1]", "gives --port a second time"),
        ("trainer.vllm_server_host=http://x", "trainer.vllm_server_host=http://x is no host"),
        ("trainer.vllm_server_port=70000", "trainer.vllm_server_port=70000 is no port"),
        ("trainer.vllm_server_base_url=x:1", "trainer.vllm_server_base_url=x:1 is no address"),
        ("trainer.vllm_server_base_url=http://x:1", "is for a server that runs already"),
        ("trainer.vllm_mode=colocate", "rollout.server is set with trainer.vllm_mode=colocate"),
    ],
)
def test_values_that_cannot_work(override, message):
    with pytest.raises(ConfigError, match=message):
        server_of(compose(["rollout=vllm_server", override]))
