"""vLLM's server for ``rollout=vllm_server``: started beside the training on GPUs of its own, waited for, and always ended."""

from __future__ import annotations

import ctypes
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rl.errors import ConfigError, ServerError
from rl.paths import find_model

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PATIENCE = 20  # seconds from TERM to KILL
_TOLD = 30  # seconds between two lines about a server that is still starting
_SHOWN = 20  # last lines of the log in an error
# What a launcher of ranks sets, and vLLM would take for its own.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_GIVEN = ("--model", "--revision", "--host", "--port", "--tensor-parallel-size", "--dtype", "--trust-remote-code")


@dataclass(frozen=True)
class Server:
    """Where the server is and, if ``launch``, how it is started.

    Args:
        url: base address. host, port: the same, for the server to listen on; gpus: of this machine; tensor_parallel: GPUs a copy
            of the model; start_timeout: seconds. extra: further words for ``trl vllm-serve``.

    Raises:
        ConfigError: a value that cannot work.
    """

    url: str
    host: str
    port: int
    launch: bool
    gpus: int
    tensor_parallel: int
    start_timeout: float
    extra: tuple[str, ...]
    model: str
    revision: str | None
    dtype: str
    trust_remote_code: bool

    def __post_init__(self):
        if not isinstance(self.launch, bool):
            raise ConfigError(f"rollout.server.launch={self.launch} is neither true nor false.")
        for name in ("gpus", "tensor_parallel"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"rollout.server.{name}={value} does not work. Expected a whole number of GPUs of at least 1."
                )
        if self.gpus % self.tensor_parallel:
            raise ConfigError(
                f"rollout.server.gpus={self.gpus} is not a multiple of rollout.server.tensor_parallel={self.tensor_parallel}. "
                "Make them equal; more GPUs than that are for data parallelism of a mixture of experts."
            )
        seconds = self.start_timeout
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < float("inf"):
            raise ConfigError(f"rollout.server.start_timeout={seconds} does not work. Expected seconds above 0.")
        if not self.host.strip() or "/" in self.host:
            raise ConfigError(
                f"trainer.vllm_server_host={self.host} is no host. Expected a name or an address, as localhost; "
                "a whole address goes into trainer.vllm_server_base_url with rollout.server.launch=false."
            )
        if not isinstance(self.port, int) or isinstance(self.port, bool) or not 0 < self.port < 65536:
            raise ConfigError(f"trainer.vllm_server_port={self.port} is no port. Expected a number from 1 to 65535.")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"trainer.vllm_server_base_url={self.url} is no address. Expected http://HOST:PORT.")
        if self.launch and self.url != f"http://{self.host}:{self.port}":
            raise ConfigError(
                "trainer.vllm_server_base_url is for a server that runs already. Set rollout.server.launch=false, or give the "
                "address to start one at as trainer.vllm_server_host and trainer.vllm_server_port."
            )

        named = [word for word in self.extra if word.partition("=")[0].replace("_", "-") in _GIVEN]
        if named:
            raise ConfigError(
                f"rollout.server.extra={list(self.extra)} gives {named[0]} a second time. It is set by model., trainer.vllm_server_host "
                "and vllm_server_port, or rollout.server.tensor_parallel."
            )

    def command(self) -> list[str]:
        """The command line that starts it."""
        words = [_trl(), "vllm-serve", "--model", self.model, "--host", self.host, "--port", str(self.port)]
        words += ["--tensor_parallel_size", str(self.tensor_parallel), "--dtype", self.dtype]
        if self.revision is not None:
            words += ["--revision", self.revision]
        if self.trust_remote_code:
            words += ["--trust_remote_code", "true"]
        return [*words, *self.extra]


def server_of(cfg: DictConfig) -> Server | None:
    """The server that ``cfg`` asks for, None where nothing samples from one.

    Raises:
        ConfigError: a value that cannot work, or ``vllm_mode`` and ``rollout.server`` contradict each other.
    """
    trainer, server = cfg.trainer, cfg.rollout.get("server")
    served = bool(trainer.get("use_vllm")) and trainer.get("vllm_mode") == "server"
    if served != (server is not None):
        raise ConfigError(
            f"rollout.server is {'missing' if served else 'set'} with trainer.vllm_mode={trainer.get('vllm_mode')}. "
            "Choose with rollout=vllm_server or vllm_colocate."
        )
    if not served:
        return None
    host, port = str(trainer.vllm_server_host), trainer.vllm_server_port
    return Server(
        url=trainer.get("vllm_server_base_url") or f"http://{host}:{port}",
        host=host,
        port=port,
        launch=server.launch,
        gpus=server.gpus,
        tensor_parallel=server.tensor_parallel,
        start_timeout=server.start_timeout,
        extra=tuple(map(str, server.extra)),
        model=find_model(cfg.model.path),
        revision=cfg.model.revision,
        dtype="bfloat16"
        if cfg.model.dtype == "float32"
        else cfg.model.dtype,  # it samples; the training corrects for it
        trust_remote_code=cfg.model.trust_remote_code,
    )


def split_gpus(count: int) -> tuple[list[str], list[str]]:
    """The visible GPUs as CUDA_VISIBLE_DEVICES names them: those of the training, and the last ``count`` for the server.

    Raises:
        ConfigError: none is left for the training.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch  # counts without initialising CUDA, so that the variable may still be set for this process

        names = [str(i) for i in range(torch.cuda.device_count())]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    if len(names) <= count:
        raise ConfigError(
            f"rollout.server.gpus={count} leaves no GPU for the training: {len(names)} can be seen. Take fewer, use "
            "rollout=vllm_colocate, or start the server elsewhere and set rollout.server.launch=false."
        )
    return names[:-count], names[-count:]


def check_port(server: Server) -> None:
    """Raise ConfigError where the server could not listen; else training would talk to whoever does."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # a port that is only waiting to be free is free
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"trainer.vllm_server_host={server.host}, vllm_server_port={server.port}: no server can be started there: "
            f"{error.strerror or error}. Choose another port, or set rollout.server.launch=false to use the server that runs there."
        ) from error


@contextmanager
def serving(server: Server | None, log: Path) -> Iterator[dict[str, str]]:
    """Within the context the server answers; what the training processes need in their environment is yielded.

    A server that was launched is ended with the context, however that ends, and with this process, even if it is killed. None
    does nothing. Call it in the process that launches the training, before any of its processes has initialised CUDA.

    Args:
        log: file for what a launched server prints; it is appended to.

    Raises:
        ServerError: it ended, or did not answer in time. ConfigError: no GPU is left for the training, or the port is taken.
    """
    if server is None:
        yield {}
        return
    if not server.launch:
        _wait(server, None, None)
        yield {}
        return
    training, own = split_gpus(server.gpus)
    check_port(server)
    env = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES} | {"CUDA_VISIBLE_DEVICES": ",".join(own)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            server.command(),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes to the training, which ends first
            preexec_fn=_end_with_parent,
        )
    try:
        print(f"server    vLLM on GPU {','.join(own)}, starting at {server.url}; it writes to {log}", flush=True)
        _wait(server, process, log)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(training)}
        if process.poll() is not None:
            print(f"server    {_ended(process, log)}", file=sys.stderr, flush=True)
    except Exception as error:
        if process.poll() is not None and not isinstance(error, ServerError):
            raise ServerError(_ended(process, log)) from error
        raise
    finally:
        _end(process)


def _trl() -> str:
    """The command of the TRL that is installed with this Python, whatever else is on the PATH."""
    own = Path(sys.executable).with_name("trl")
    return str(own) if own.exists() else shutil.which("trl") or "trl"


def _wait(server: Server, process: subprocess.Popen | None, log: Path | None) -> None:
    """Until it answers; ``process`` and ``log`` where it was launched here."""
    start, told = time.monotonic(), 0.0
    while (state := _health(server.url)) is not None:
        waited = time.monotonic() - start
        if process is not None and process.poll() is not None:
            raise ServerError(_ended(process, log))
        if waited > server.start_timeout:
            raise ServerError(
                f"{server.url}/health did not answer within {server.start_timeout:g} s ({state}). "
                + ("Is the server running?" if log is None else f"{_last_lines(log)}")
                + " rollout.server.start_timeout=SECONDS waits longer."
            )
        if waited - told > _TOLD:
            told = waited
            print(f"server    {server.url} does not answer yet after {waited:.0f} s ({state})", flush=True)
        time.sleep(0.5)
    print(f"server    answers at {server.url} after {time.monotonic() - start:.0f} s", flush=True)


def _health(url: str) -> str | None:
    """None when it is well, else why not."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=10) as answer:
            return None if answer.status == 200 else f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def _ended(process: subprocess.Popen, log: Path) -> str:
    return f"vLLM's server ended by itself with exit code {process.returncode}. {_last_lines(log)}"


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN:]
    return f"The end of {log}:\n" + "\n".join(f"    {line}" for line in lines) + "\n"


def _end(process: subprocess.Popen) -> None:
    """TERM, some patience, KILL: the server and the workers it started."""
    try:
        _signal(process, signal.SIGTERM)
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also after a second Ctrl-C
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Runs in the new process: Linux sends it TERM when this one is gone, also when it was killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
