"""Training under a real SLURM on this machine: the same curve as under torchrun, whatever happens on the way."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import REPOSITORY, losses
from slurm_cluster import Cluster, Job, cluster  # noqa: F401  the fixture

from megavlm.config import load_recipe
from megavlm.recipe import Recipe

SCRIPT = REPOSITORY / "slurm" / "nvlm_d.sh"
NUM_STEPS = 60  # long enough to be interrupted twice
Curve = list[tuple[int, float, float]]
# A machine with nothing else to do needs about a quarter of these.
ATTEMPT_SECONDS = 240.0
# From the death of a rank to the end of all others: SLURM ends them at once, and after KillWait (5 s here) by force.
DEATH_SECONDS = 60.0

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def long_recipe(recipe: Path) -> Path:
    """The recipe with more steps."""
    content = yaml.safe_load(recipe.read_text())
    content["training"]["train_iters"] = NUM_STEPS
    content["checkpoint"]["save_interval"] = 20
    recipe.write_text(yaml.safe_dump(content))
    return recipe


@pytest.fixture(scope="module")
def known_curve() -> list[Curve]:
    """The curve under torchrun, once found."""
    return []


@pytest.fixture
def torchrun_curve(long_recipe: Path, megavlm: Callable, tmp_path: Path, known_curve: list[Curve]) -> Curve:
    """Losses of two ranks that nothing interrupted, under torchrun."""
    if not known_curve:
        folder = tmp_path / "torchrun"
        done = megavlm("train", long_recipe, "--nproc-per-node", 2, f"checkpoint.save={folder}", timeout=300)
        assert done.returncode == 0, done.stdout
        known_curve.append(losses(folder))
    return known_curve[0]


def attempts(run: Path, job: str) -> list[str]:
    """What became of each attempt: ``["started", "stopped", "started", "done"]``."""
    path = run / "jobs" / job / "attempts.txt"
    return [line.split()[2] for line in path.read_text().splitlines()] if path.exists() else []


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("lm loss") if path.exists() else 0


def pause_after(step: int, attempt: int, run: Path, job: Job) -> int:
    """Stop rank 1 after this step, so that the run waits for whatever slow command comes next. Returns its number."""
    output = run / "jobs" / job.number / f"attempt_{attempt}" / "train" / "rank_00001.txt"
    job.wait_until(output.exists, ATTEMPT_SECONDS, f"training of attempt {attempt}")
    rank = None
    deadline = time.monotonic() + ATTEMPT_SECONDS
    while rank is None or steps_done(run) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached\n{job.output}"
        rank = rank or job.find_rank(1, "train")
        time.sleep(0.01)
    os.kill(rank, signal.SIGSTOP)
    return rank


def test_two_nodes_train_as_two_ranks_under_torchrun(
    cluster: Cluster,  # noqa: F811
    long_recipe: Path,
    torchrun_curve: Curve,
    tmp_path: Path,
) -> None:
    job = cluster.sbatch(tmp_path, SCRIPT, "logging.log_interval=20", RECIPE=str(long_recipe), RANKS_PER_NODE="1")
    assert job.wait(ATTEMPT_SECONDS) == "COMPLETED", job.output
    run = tmp_path / "run"
    assert losses(run) == torchrun_curve
    assert len(torchrun_curve) == NUM_STEPS
    assert "preflight: all 2 rank(s) on 2 node(s) are ready" in job.output
    assert f"iteration       20/{NUM_STEPS:8d} | consumed samples:          160 |" in job.output
    assert f"done: all {NUM_STEPS} steps" in job.output
    assert attempts(run, job.number) == ["started", "done"]
    record = run / "jobs" / job.number / "attempt_0"
    assert load_recipe(record / "recipe.yaml", [], Recipe) == load_recipe(run / "recipe.yaml", [], Recipe)
    for name in ("code.txt", "packages.txt", "environment.txt", "command.txt", "job.txt", "job.sh"):
        assert (record / name).stat().st_size > 0, name
    assert f"SLURM_JOB_ID={job.number}" in (record / "environment.txt").read_text()
    assert f"iteration {NUM_STEPS:8d}/" in (record / "train/rank_00000.txt").read_text()
    assert (record / "train/rank_00001.txt").exists()


def test_stopped_and_killed_it_goes_on_with_the_same_curve(
    cluster: Cluster,  # noqa: F811
    long_recipe: Path,
    torchrun_curve: Curve,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    job = cluster.sbatch(tmp_path, SCRIPT, RECIPE=str(long_recipe), RANKS_PER_NODE="1", MAX_RESTARTS="1")
    rank = pause_after(3, 0, run, job)
    cluster.run("scancel", "--signal=USR1", job.number)
    os.kill(rank, signal.SIGCONT)
    job.wait_until(lambda: "stopped" in attempts(run, job.number), ATTEMPT_SECONDS, "stopped")
    saved = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < NUM_STEPS, "the run was over before it could be stopped"
    assert saved == steps_done(run)

    rank = pause_after(saved + 3, 1, run, job)
    assert steps_done(run) < NUM_STEPS, "the run was over before a rank could be killed"
    os.kill(rank, signal.SIGKILL)
    seconds = job.wait_until(lambda: "crashed" in attempts(run, job.number), ATTEMPT_SECONDS, "crashed")
    assert seconds < DEATH_SECONDS

    assert job.wait(ATTEMPT_SECONDS) == "COMPLETED", job.output
    assert attempts(run, job.number) == ["started", "stopped", "started", "crashed", "started", "done"]
    assert job.about("Restarts") == "2"
    assert f"stopped after step {saved} of {NUM_STEPS}: requeued" in job.output
    assert "crash 1, of which MAX_RESTARTS=1 are forgiven" in job.output
    assert losses(run) == torchrun_curve
    assert {path.name for path in (run / "jobs" / job.number).glob("attempt_*")} == {
        "attempt_0",
        "attempt_1",
        "attempt_2",
    }


def test_preflight_names_the_node_and_what_is_wrong_there(
    cluster: Cluster,  # noqa: F811
    long_recipe: Path,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other" / "transformers-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
        if [ "$SLURMD_NODENAME" = n2 ] && [ "$3" = preflight ]; then
            export PYTHONPATH={other.parent}:$PYTHONPATH
            set -- "$@" checkpoint.save=/proc/run
        fi
        exec {sys.executable} "$@"
        """
    )
    python.chmod(0o755)
    job = cluster.sbatch(tmp_path, SCRIPT, RECIPE=str(long_recipe), RANKS_PER_NODE="1", PYTHON=str(python))
    assert job.wait(ATTEMPT_SECONDS) == "FAILED"
    output = job.output
    assert "FAILED: n2 (rank 1): run folder: checkpoint.save=/proc/run: cannot be written to" in output
    assert "FAILED: n2 (rank 1): versions: transformers is 9.9.9 here and" in output
    assert "n1 (rank" not in output
    assert "sbatch --exclude=NODE" in output
    run = tmp_path / "run"
    assert attempts(run, job.number) == ["started", "failed"]
    assert not (run / "metrics.jsonl").exists()
    assert not list(run.glob(".preflight*"))


# In place of Python: a run of 3 steps whose training is a line of the test. What the job script does with it is real.
STAND_IN = """#!/usr/bin/env bash
mkdir -p run
latest=run/latest_checkpointed_iteration.txt
attempt=${SLURM_RESTART_COUNT:-0}
case $3 in
    record)
        record=$PWD/run/jobs/$SLURM_JOB_ID/attempt_$attempt
        mkdir -p "$record"
        printf 'RUN_FOLDER=%q\\nTRAIN_ITERS=3\\nRECORD=%q\\n' "$PWD/run" "$record" ;;
    preflight) ;;
    train) touch "run/training_$attempt"; eval "$TRAINING" ;;
    *)
        who="rank $RANK of $WORLD_SIZE, $LOCAL_RANK on $SLURMD_NODENAME"
        echo "$who, meets $MASTER_ADDR:$MASTER_PORT, does ${*:3}, in $PLACE" ;;
esac
"""
SAVES_WHEN_ASKED = 'trap "echo 2 >$latest; exit 0" USR1; for i in {1..600}; do sleep 0.1; done; exit 9'
ENDS_AT_SECOND_ATTEMPT = '[ "$attempt" = 1 ] && echo 3 >$latest && exit 0;'


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    path = tmp_path / "stand_in"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("how", [("--batch", "--signal=USR1"), ("--full", "--signal=TERM")])
def test_asked_as_slurm_asks_it_saves_and_comes_back(
    cluster: Cluster,  # noqa: F811
    stand_in: str,
    tmp_path: Path,
    how: tuple[str, ...],
) -> None:
    """``--signal=B:USR1@120`` asks the job script, pre-emption asks everybody with SIGTERM."""
    training = ENDS_AT_SECOND_ATTEMPT + 'trap "" TERM;' + SAVES_WHEN_ASKED
    job = cluster.sbatch(tmp_path, SCRIPT, PYTHON=stand_in, TRAINING=training, MAX_RESTARTS="0")
    job.wait_until((tmp_path / "run/training_0").exists, 60, "training")
    time.sleep(0.5)
    cluster.run("scancel", *how, job.number)
    assert job.wait(120) == "COMPLETED", job.output
    assert attempts(tmp_path / "run", job.number) == ["started", "stopped", "started", "done"]
    assert "stopped after step 2 of 3: requeued" in job.output


def test_cancelled_it_does_not_come_back(cluster: Cluster, stand_in: str, tmp_path: Path) -> None:  # noqa: F811
    training = 'trap "echo 2 >$latest; exit 0" USR1 TERM; for i in {1..600}; do sleep 0.1; done'
    job = cluster.sbatch(tmp_path, SCRIPT, PYTHON=stand_in, TRAINING=training)
    job.wait_until((tmp_path / "run/training_0").exists, 60, "training")
    time.sleep(0.5)
    cluster.run("scancel", job.number)
    assert job.wait(60) == "CANCELLED", job.output
    time.sleep(1.0)
    assert job.about("Restarts") == "0"
    assert attempts(tmp_path / "run", job.number)[:1] == ["started"]
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "2\n"


@pytest.mark.parametrize(
    ("training", "status", "forgiven"),
    [
        ("exit 7", 7, 1),
        ("true", 0, 0),  # no error, and no step either: that would go on for ever
    ],
)
def test_crashes_are_forgiven_up_to_a_limit(
    cluster: Cluster,  # noqa: F811
    stand_in: str,
    tmp_path: Path,
    training: str,
    status: int,
    forgiven: int,
) -> None:
    job = cluster.sbatch(tmp_path, SCRIPT, PYTHON=stand_in, TRAINING=training, MAX_RESTARTS=str(forgiven))
    assert job.wait(120) == "FAILED", job.output
    assert attempts(tmp_path / "run", job.number) == ["started", "crashed"] * (forgiven + 1)
    assert job.output.count(f"training ended with exit status {status}") == forgiven + 1
    assert f"{forgiven + 1} crashes, and MAX_RESTARTS={forgiven}: giving up after step 0 of 3" in job.output


def test_a_job_on_a_full_disk_says_so_and_does_not_go_round(cluster: Cluster, stand_in: str, tmp_path: Path) -> None:  # noqa: F811
    """An attempt that cannot be counted could be begun for ever."""
    run = tmp_path / "run"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        filling = tmp_path / "filling"
        filling.write_text(f'{stand_in} "$@"; [ "$3" != record ] || cat /dev/zero >run/filler 2>/dev/null; exit 0\n')
        job = cluster.sbatch(tmp_path, SCRIPT, PYTHON=f"{filling}", CONTAINER_COMMAND="bash")
        assert job.wait(60) == "FAILED", job.output
        assert f"{run}/jobs/{job.number}/attempts.txt: cannot be " in job.output
        assert "Is the disk full? Make room, then submit again: it resumes." in job.output
        assert job.about("Restarts") == "0"
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)


def test_a_rank_that_slurm_has_lost_is_not_waited_for(cluster: Cluster, stand_in: str, tmp_path: Path) -> None:  # noqa: F811
    """Its node is gone and back before SLURM notices: nobody will ever say that it has ended."""
    training = ENDS_AT_SECOND_ATTEMPT + '[ "$RANK" = 0 ] && sleep 2 && exit 75; kill -9 $PPID; kill -9 $$'
    job = cluster.sbatch(
        tmp_path, SCRIPT, PYTHON=stand_in, TRAINING=training, RANKS_PER_NODE="1", END_SECONDS="3", MAX_RESTARTS="1"
    )
    assert job.wait(120) == "COMPLETED", job.output
    assert attempts(tmp_path / "run", job.number) == ["started", "crashed", "started", "done"]
    assert "Timed out waiting for job step to complete" in job.output


LAYOUTS = [
    ((), {}, 2, 2),  # two pretended GPUs on each node
    (("--nodes=1",), {}, 1, 2),
    (("--gpus-per-node=2",), {}, 2, 2),
    (("--ntasks-per-node=3",), {}, 2, 3),
    ((), {"RANKS_PER_NODE": "1", "CONTAINER_COMMAND": "env PLACE=container"}, 2, 1),
]


@pytest.mark.parametrize(("options", "variables", "num_nodes", "ranks_per_node"), LAYOUTS)
def test_ranks_know_each_other(
    cluster: Cluster,  # noqa: F811
    stand_in: str,
    tmp_path: Path,
    options: tuple[str, ...],
    variables: dict[str, str],
    num_nodes: int,
    ranks_per_node: int,
) -> None:
    script = REPOSITORY / "slurm" / "bench.sh"
    job = cluster.sbatch(tmp_path, *options, script, "--steps", "2", PYTHON=stand_in, **variables)
    assert job.wait(60) == "COMPLETED", job.output
    lines = sorted(
        (line for line in job.output.splitlines() if line.startswith("rank ")), key=lambda x: int(x.split()[1])
    )
    meeting = lines[0].split("meets ")[1].split(",")[0]
    port = int(meeting.removeprefix("127.0.0.1:"))
    assert 10000 <= port < 32768  # below the ports that Linux gives out by itself
    world_size = num_nodes * ranks_per_node
    assert [line.split(", does")[0] for line in lines] == [
        f"rank {rank} of {world_size}, {rank % ranks_per_node} on n{rank // ranks_per_node + 1}, meets {meeting}"
        for rank in range(world_size)
    ]
    assert "does bench speed" in lines[0]
    place = "container" if "CONTAINER_COMMAND" in variables else ""
    assert all(line.endswith(f"--steps 2, in {place}") for line in lines)


def test_convert_is_one_rank_and_its_failure_the_jobs(
    cluster: Cluster,  # noqa: F811
    stand_in: str,
    tmp_path: Path,
) -> None:
    script = REPOSITORY / "slurm" / "convert.sh"
    job = cluster.sbatch(tmp_path, script, "from", "to", PYTHON=stand_in)
    assert job.wait(60) == "COMPLETED", job.output
    assert "rank 0 of 1, 0 on n1" in job.output
    assert "does convert from to" in job.output
    failing = cluster.sbatch(tmp_path, script, "from", "to", PYTHON="/bin/false")
    assert failing.wait(60) == "FAILED"
    assert "megavlm convert ended with exit status 1" in failing.output


def test_a_recorded_job_is_replayed_with_its_code(cluster: Cluster, stand_in: str, tmp_path: Path) -> None:  # noqa: F811
    def git(*arguments: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        return cluster.run("git", *names, *arguments, cwd=checkout).rstrip("\n")

    checkout, record, work = tmp_path / "checkout", tmp_path / "record", tmp_path / "my work"
    shutil.copytree(REPOSITORY / "slurm", checkout / "slurm")
    record.mkdir()
    work.mkdir()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    with (checkout / "slurm/launch.sh").open("a") as file:
        file.write("echo changed since the commit\n")
    files = {
        "code.txt": f"commit: {git('rev-parse', 'HEAD')}\n",
        "code.patch": git("diff", "--binary", "HEAD") + "\n",
        "command.txt": f"cd '{work}'\nmegavlm train\n",
        "environment.txt": "RANKS_PER_NODE=3\nSLURM_JOB_NUM_NODES=1\n",
        "job.sh": SCRIPT.read_text(),
        "recipe.yaml": "",
    }
    for name, text in files.items():
        (record / name).write_text(text)
    git("checkout", "--quiet", ".")
    replay = [checkout / "slurm/replay.sh", record, tmp_path / "new run", "--parsable"]
    training = 'echo "$LOCAL_WORLD_SIZE ranks: ${*:3} from $MEGAVLM_HOME"; echo 3 >$latest'
    said = cluster.run(*replay, PYTHON=stand_in, TRAINING=training)
    job = Job(cluster, said.split()[-1], work)
    assert job.wait(60) == "COMPLETED", job.output
    assert "changed since the commit" in job.output
    expected = f"3 ranks: train {record}/recipe.yaml checkpoint.save={tmp_path}/new run from {record}/code"
    assert job.output.count(expected) == 3


@pytest.mark.parametrize("script", sorted((REPOSITORY / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_every_job_script_is_accepted(cluster: Cluster, script: Path, tmp_path: Path) -> None:  # noqa: F811
    cluster.run("bash", "-n", script)
    if script.name not in ("launch.sh", "rank.sh"):
        cluster.run("sbatch", "--test-only", script, cwd=tmp_path)


def test_a_script_outside_a_job_says_what_to_do(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(AssertionError, match=r"not in a SLURM job\. Start it with: sbatch .*nvlm_d\.sh"):
        cluster.run("bash", SCRIPT, cwd=tmp_path)
