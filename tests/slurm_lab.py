"""A Slurm of one's own for a test session: munge, a controller and two nodes, all on this machine and in a temporary folder.

Two partitions: ``low``, whose jobs are preempted and requeued, and ``high``, whose jobs do that. No root, no /etc, no accounting.
"""

import ctypes
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from rl import slurm

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONF = """ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5   # the least; a requeued job waits a second longer
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides             # more CPUs than there are
SlurmctldParameters=preempt_send_user_signal  # before preemption a job gets its --signal, and GraceTime
FirstJobId={job}                              # the ranks' port follows from it, and there may be several labs
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MailProg=/bin/true
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0,defer_batch=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing():
    """Why there can be no Slurm here, or None. ENTRL_TEST_SLURM=1 installs it (Debian, Ubuntu; as root)."""
    os.environ["PATH"] += ":/usr/sbin"
    absent = [p for p in PROGRAMS if shutil.which(p) is None]
    if absent and os.environ.get("ENTRL_TEST_SLURM") == "1":
        _install()
        absent = [p for p in PROGRAMS if shutil.which(p) is None]
    return f"no {absent[0]} here; ENTRL_TEST_SLURM=1 installs Slurm by apt" if absent else None


def _install():
    policy = Path("/usr/sbin/policy-rc.d")  # 101 keeps the packages from starting daemons of their own
    mine = not policy.exists()
    if mine:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
            subprocess.run(["apt-get", "-qq", *command], env=env, stdout=subprocess.DEVNULL, timeout=300)
    finally:
        if mine:
            policy.unlink()


class Lab:
    """Daemons in the foreground, so that they end with this process, however it ends."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        self.folder.chmod(0o755)
        self.daemons = []

    def start(self):
        munge = self.folder / "munge"
        for name in ("munge", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        munge.chmod(0o711)
        key = munge / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        conf = self.folder / "slurm.conf"
        user, host = getpass.getuser(), socket.gethostname().partition(".")[0]
        conf.write_text(
            CONF.format(
                folder=self.folder, user=user, host=host, ports=free_ports(3), job=10 * random.randrange(1, 1200)
            )
        )
        os.environ["SLURM_CONF"] = str(conf)
        files = {name: munge / name for name in ("socket", "pid-file", "log-file", "seed-file")}
        self._daemon("munged", "-F", f"--key-file={key}", *(f"--{k}={v}" for k, v in files.items()))
        wait_for(lambda: ok("munge", "-n", "-S", munge / "socket"))
        self._daemon("slurmctld", "-D", "-f", conf)
        wait_for(lambda: ok("scontrol", "ping"))
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node, "-f", conf)
        wait_for(lambda: output("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2)

    def stop(self):
        end = time.monotonic() + 20
        while output("squeue", "-h") and time.monotonic() < end:  # jobs first: slurmd would leave them running
            for how in ([], ["--signal=KILL", "--full"]):
                subprocess.run(["scancel", "--user", getpass.getuser(), *how], capture_output=True, timeout=30)
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(self.folder)

    def _daemon(self, *command):
        with open(self.folder / f"{command[0]}.out", "a") as log:
            words = [str(c) for c in command]
            self.daemons.append(subprocess.Popen(words, stdout=log, stderr=log, preexec_fn=_end_with_parent))


def _end_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def output(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60).stdout


def ok(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, timeout=60).returncode == 0


def wait_for(condition, seconds=60):
    """Poll until ``condition`` gives something true, and give that."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.2)
    return found


def ended(job, seconds=60):
    """Wait for the end of a job, and give how it ended."""
    return wait_for(
        lambda: (s := slurm.states([job]).get(job)) not in ("PENDING", "RUNNING", "COMPLETING") and s, seconds
    )


@pytest.fixture(scope="session")
def cluster():
    """A running Slurm; its commands find it through SLURM_CONF."""
    if why := missing():
        pytest.skip(why)
    lab = Lab()
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
