"""The README's SLURM script, run with stand-ins for srun and scontrol and with torchrun itself, on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_crash import torn_files, wait_until

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "assets" / "train.sbatch"
STAND_INS = {
    "srun": """#!/bin/bash
# One task on each node of the allocation, in a session of its own as under slurmstepd; the worst exit code.
[[ $1 == --cpus-per-task=8 ]] || exit 99
shift
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node setsid "$@" &
  tasks+=($!)
done
printf '%s\\n' "${tasks[@]}" >step
worst=0
for task in "${tasks[@]}"; do wait "$task" || { code=$?; ((code > worst)) && worst=$code; }; done
exit $worst
""",
    "scontrol": """#!/bin/bash
case $1 in
  show) printf 'localhost\\nnode2\\n' ;;
  requeue) echo "$2" >requeued ;;
esac
""",
    # the script itself, but for commits that take longer than torchrun waits for a process that it has told to stop
    "finetune_siglip.py": f"""
import pathlib, sys, time
sys.path.insert(0, {str(os.environ.get("FINETUNE_SIGLIP_SOURCE", ROOT))!r})
import finetune_siglip as fs
commit = fs.RunFolder.commit
def slowly(folder, content):
    slow = folder.path / "slow"
    time.sleep(float(slow.read_text()) if slow.exists() else 0)
    commit(folder, content)
fs.RunFolder.commit = slowly
sys.exit(fs.main())
""",
}


class Cluster:
    """A batch system of stand-ins: the folder of a job, its allocation, and the signals that SLURM would send."""

    def __init__(self, folder, nodes, gpus):
        self.folder = folder
        binaries = folder / "bin"
        binaries.mkdir()
        for name, text in STAND_INS.items():
            path = (folder if name.endswith(".py") else binaries) / name
            path.write_text(text)
            path.chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_GPUS_ON_NODE": str(gpus), "SLURM_CPUS_PER_TASK": "8", "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def submit(self, *argv):
        log = open(self.folder / "slurm.log", "a")  # noqa: SIM115, --open-mode=append
        command = ["bash", str(RECIPE), *map(str, argv)]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)

    def signal_steps(self):
        """What `--signal` asks for: without B: every process of the steps gets it, and the batch shell does not."""
        before_kill = re.search(r"^#SBATCH.* --signal=(\S+)@\d+", RECIPE.read_text(), re.MULTILINE)[1]
        for process in descendants(*map(int, (self.folder / "step").read_text().split())):
            os.kill(process, signal.Signals[f"SIG{before_kill}"])

    @property
    def text(self):
        return (self.folder / "slurm.log").read_text()


def descendants(*processes):
    for process in processes:
        yield process
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            yield from descendants(*map(int, task.read_text().split()))


def arguments(scans, tower, *more):
    return [
        "run", "--csv", scans, "--pretrained", tower, "--num-slices", 4, "--num-workers", 0, "--wandb-mode", "disabled",
        "--bootstrap", 0, "--early-stopping-patience", 0, "--batch-size", 1, *more, "--label-columns", "Cardiomegaly",
        "Pleural effusion",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(("nodes", "gpus", "save_seconds"), [(1, 1, 0), (1, 8, 0), (2, 1, 40)])
def test_out_of_time_the_job_is_saved_queued_again_and_finished_by_the_same_script(
    scans, tower, tmp_path, nodes, gpus, save_seconds
):
    cluster, out = Cluster(tmp_path, nodes, gpus), tmp_path / "run"
    job = cluster.submit(*arguments(scans, tower, "--epochs", 200))
    wait_until(lambda: (out / "results.jsonl").exists() or job.poll() is not None, 600)
    assert job.poll() is None, cluster.text
    (out / "slow").write_text(str(save_seconds))
    cluster.signal_steps()
    code = job.wait(timeout=300)
    assert (out / "stopped").read_text() == "SIGUSR1\n", cluster.text
    assert code != 0  # a chain of jobs must not take it for finished
    assert (tmp_path / "requeued").read_text().strip() == cluster.environment["SLURM_JOB_ID"], cluster.text
    assert not torn_files(out)
    done = len((out / "results.jsonl").read_text().splitlines())
    (out / "slow").unlink()
    (tmp_path / "requeued").unlink()
    again = cluster.submit(*arguments(scans, tower, "--epochs", 200, "--early-stopping-patience", 1))
    assert again.wait(timeout=600) == 0, cluster.text
    assert f"resumed run after epoch {done}" in cluster.text
    epochs = [json.loads(line)["epoch"] for line in (out / "results.jsonl").open()]
    assert epochs == list(range(1, len(epochs) + 1))
    assert (out / "test_predictions.csv").exists()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_a_job_that_fails_is_not_queued_again(scans, tower, tmp_path):
    cluster, out = Cluster(tmp_path, 1, 2), tmp_path / "run"
    out.mkdir()
    (out / "stopped").write_text("SIGUSR1\n")  # of the job before
    assert cluster.submit(*arguments(tmp_path / "no.csv", tower)).wait(timeout=300) != 0
    assert not (tmp_path / "requeued").exists()
    assert cluster.text.count("no.csv: ") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_a_launcher_that_dies_stops_its_processes_in_good_order(scans, tower, tmp_path, number):
    """They would train on for nobody, or until the job is taken away from under them."""
    cluster, out = Cluster(tmp_path, 1, 2), tmp_path / "run"
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "finetune_siglip.py", "--output-dir"]
    with (tmp_path / "log").open("w") as log:
        argv = [str(word) for word in (*command, *arguments(scans, tower, "--epochs", 1000))]
        launcher = subprocess.Popen(argv, cwd=tmp_path, env=cluster.environment, stdout=log, stderr=log)
    wait_until((out / "results.jsonl").exists, 300)
    ranks = [process for process in descendants(launcher.pid) if process != launcher.pid]
    launcher.send_signal(number)
    launcher.wait(timeout=60)
    wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 60)
    assert (out / "stopped").exists(), (tmp_path / "log").read_text()[-3000:]
    assert time.time() - (out / "last.ckpt").stat().st_mtime < 60
