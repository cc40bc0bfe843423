"""What the scripts say, and what is refused before sbatch sees it. No Slurm needed."""

import subprocess

import pytest

from command_line import SMALL, entrl, fails
from rl import slurm
from rl.build import grpo_config
from rl.config import compose
from rl.errors import ConfigError
from rl.slurm_site import check

NODES = ["engine=ddp", "engine.processes=4", "engine.nodes=2"]
SITE = [
    "slurm.partition=gpu",
    "slurm.account=me",
    "slurm.time='12:00:00'",
    "slurm.cpus_per_task=8",
    "slurm.mem=200G",
    "slurm.gpus_per_node=a100:4",
    "slurm.modules=[cuda/12.4,gcc]",
    "slurm.setup=['export NCCL_SOCKET_IFNAME=ib0']",
    "slurm.container='apptainer exec --nv /images/entrl.sif'",
    "slurm.extra=['--constraint=h100']",
]


def directives(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def bash_reads(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "@{" not in script
    return script


def test_a_script_asks_for_what_the_site_and_the_engine_say(tmp_path):
    script = bash_reads(slurm.render(compose([*NODES, *SITE]), tmp_path / "run"))
    assert directives(script) == [
        "--job-name=run",
        f"--output={tmp_path}/run/logs/slurm_%j.out",
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--requeue",
        "--signal=B:USR1@120",
        "--partition=gpu",
        "--account=me",
        "--time=12:00:00",
        "--cpus-per-task=8",
        "--mem=200G",
        "--gpus-per-node=a100:4",
        "--constraint=h100",
    ]
    lines = script.splitlines()
    assert lines.index("module load cuda/12.4 gcc") < lines.index("export NCCL_SOCKET_IFNAME=ib0")
    assert 'apptainer exec --nv /images/entrl.sif python -m rl.rank "$RUN" &' in script
    assert "srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=8 --kill-on-bad-exit=1" in script


def test_an_array_is_the_points_and_how_many_at_once(tmp_path):
    cfg = compose([*NODES, "launcher=slurm"])
    assert "--array=1,2,7" in directives(bash_reads(slurm.render_array(cfg, tmp_path, [1, 2, 7])))
    cfg.launcher.at_once = 2
    assert "--array=1,2,7%2" in directives(slurm.render_array(cfg, tmp_path, [1, 2, 7]))


@pytest.mark.parametrize("name", ["it's $(touch x)", 'a "b" `c`', "%j 50%", "ü; exit"])
def test_names_that_shells_read_stay_names(tmp_path, name):
    script = bash_reads(slurm.render(compose(NODES), tmp_path / name))
    run = next(line for line in script.splitlines() if line.startswith("RUN="))
    said = subprocess.run(["bash", "-c", f'{run}; printf %s "$RUN"'], capture_output=True, text=True, cwd=tmp_path)
    assert said.stdout == str(tmp_path / name) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\tb"])
def test_names_that_sbatch_cannot_be_told_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="holds a backslash or a line break"):
        slurm.render(compose(NODES), tmp_path / name)


@pytest.mark.parametrize(
    "override, message",
    [
        ("slurm.time=90", "slurm.time=90 is a number: without quotes, yaml reads 1:30 as 90"),
        ("slurm.time=12h", "slurm.time=12h does not work. Expected '90' minutes, '12:00:00' or '2-00:00:00'"),
        ("slurm.time='3:00'", "leaves no time to train: the run stops up to 180 s before"),
        ("slurm.mem=lots", "slurm.mem=lots does not work. Expected 200G"),
        ("slurm.cpus_per_task=0", "slurm.cpus_per_task=0 does not work. Expected a whole number"),
        ("slurm.cpus_per_task=1.5", "Expected a whole number"),
        ("slurm.gpus_per_node=many", "slurm.gpus_per_node=many does not work. Expected 8 or 'a100:8'"),
        ("slurm.gpus_per_node=2", "engine.processes=4 is more than slurm.gpus_per_node=2"),
        ("slurm.partition='a b'", "slurm.partition=a b does not work. Expected a name without spaces"),
        ("slurm.signal_seconds=null", "slurm.signal_seconds is not set"),
        ("slurm.signal_seconds=70000", "Expected 1 to 65535 seconds"),
        ("slurm.extra=['rm -rf x']", "slurm.extra holds 'rm -rf x'. Expected options of sbatch"),
        ("slurm.extra=['--nodes=4']", "slurm.extra holds --nodes, which the script has itself: set engine.nodes"),
        ("slurm.modules=3", "slurm.modules=3 does not work. Expected a list"),
        ("slurm.setup=[{a: 1}]", "Expected a list"),
        ("slurm.container=[a]", "slurm.container=.* does not work. Expected one line of text"),
        ("slurm.python=3", "slurm.python=3 does not work. Expected one line of text"),
    ],
)
def test_what_sbatch_would_not_take_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        check(compose([*NODES, override]))


@pytest.mark.parametrize("time", ["90", "90:00", "12:00:00", "2-0", "2-00:00", "1-00:00:00", None])
def test_times_that_slurm_reads(time):
    check(compose([*NODES, f"slurm.time={'null' if time is None else repr(time)}"]))


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path, capsys):
    where = [f"run.dir={tmp_path}/runs", "run.name=it"]
    for dry in (["--dry-run"], ["dry_run=true"]):
        assert entrl("slurm", "submit", *SMALL, *NODES, *SITE, *where, *dry) == 0
        script = bash_reads(capsys.readouterr().out)
        assert "--nodes=2" in directives(script) and f"RUN={tmp_path}/runs/it" in script
    assert not list(tmp_path.iterdir())


def test_ranks_find_the_server_of_their_job(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTRL_VLLM_HOST", "node7")
    cfg = compose(["rollout=vllm_server", "data=gsm8k", "model=qwen2.5_0.5b"])
    assert grpo_config(cfg, str(tmp_path), [1.0]).vllm_server_host == "node7"


def test_processes_are_as_many_as_gpus(tmp_path, capsys):
    words = ["engine=zero2", "slurm.gpus_per_node='h100:8'", f"run.dir={tmp_path}", "--dry-run"]
    assert entrl("slurm", "submit", *SMALL, *words) == 0
    assert "--ntasks-per-node=8" in directives(capsys.readouterr().out)


def test_a_wrong_command_line_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    assert "Expected entrl slurm submit" in fails(capsys, "slurm")
    assert "Expected entrl slurm submit" in fails(capsys, "slurm", "sumbit")
    assert "--dry-run is no option of entrl train" in fails(capsys, "train", "--dry-run")
    where = [f"run.dir={tmp_path}/runs", "run.name=it"]
    assert "slurm.mem=lots" in fails(capsys, "slurm", "submit", *SMALL, *NODES, *where, "slurm.mem=lots")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch is not found" in fails(capsys, "slurm", "submit", *SMALL, *NODES, *where)
    assert not list(tmp_path.iterdir())
