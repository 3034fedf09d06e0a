"""Several processes train and score as one: launched through torchrun, with gloo on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune_siglip import main
from rank_worker import ALONE, SCENARIOS, counted, results

ROOT = Path(__file__).parents[1]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def torchrun(ranks, script, *argv):
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script),
        *map(str, argv),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield results(tmp_path_factory.mktemp("alone"), ALONE)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory):
    """What each of 2 or 3 ranks ends with."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    command = torchrun(request.param, ROOT / "tests" / "rank_worker.py", folder, folder / "out")
    done = subprocess.run(command, env=QUIET, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_global_batch_gives_the_same_losses_and_scores(alone, together, name):
    one = alone[name]
    for rank in (ranks[name] for ranks in together):
        assert rank["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-4)
        np.testing.assert_allclose(rank["logits"], one["logits"], rtol=0, atol=1e-4)
        assert rank["weights"] == together[0][name]["weights"]  # to the bit: ranks never drift apart
        assert rank["logits"] == together[0][name]["logits"]
        assert rank["metrics"] == one["metrics"]
        assert rank["untrained"] == one["untrained"]  # equal weights score equally, to the bit
    rows = sorted(row for ranks in together for row in ranks[name]["rows"])
    assert rows == sorted(one["rows"])
    assert rows == list(range(SCENARIOS[name][0]))


def test_ranks_score_with_the_statistics_that_are_saved(together):
    """BatchNorm has seen other scans on each rank; the checkpoint holds the first one's."""
    first = together[0]["batchnorm"]
    for rank in (ranks["batchnorm"] for ranks in together[1:]):
        assert rank["own"] != first["own"]
        assert rank["together"] == rank["alone"] == first["together"] == first["alone"]


def run_arguments(scans, tower, out, *more):
    return [
        "--csv", scans, "--pretrained", tower, "--label-columns", "Cardiomegaly", "Pleural effusion", "--num-slices", 4,
        "--num-workers", 0, "--wandb-mode", "disabled", "--dropout-rate", 0, "--output-dir", out, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_whole_runs_of_one_and_two_processes_agree_and_predict_the_table_in_order(scans, tower, tmp_path):
    lines, tables = [], []
    for ranks in (1, 2):
        out, predicted = tmp_path / str(ranks), tmp_path / f"predicted_{ranks}"
        training = run_arguments(scans, tower, out, "--epochs", 2, "--batch-size", 6 // ranks)
        model = ["--test-only", out / "best_model.pth", "--csv", scans, "--label-columns", "Cardiomegaly",
                 "Pleural effusion", "--output-dir", predicted, "--num-workers", 0]  # fmt: skip
        for argv in (training, model):
            if ranks == 1:
                assert main([str(word) for word in argv]) == 0
                continue
            command = torchrun(ranks, ROOT / "finetune_siglip.py", *argv)
            done = subprocess.run(command, env=QUIET, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        lines.append([json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()])
        tables.append((predicted / "test_predictions.csv").read_text().splitlines())
    assert [row.split(",")[0] for row in tables[0]] == [row.split(",")[0] for row in tables[1]]
    for one, two in zip(*lines, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
        assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
        assert counted(two) == counted(one)


def children_of(pid):
    """The processes that a process has started, from /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_process_that_dies_ends_all_within_30_seconds(scans, tower, tmp_path):
    argv = run_arguments(scans, tower, tmp_path / "out", "--epochs", 100000, "--batch-size", 2)
    log = open(tmp_path / "log", "w+")  # noqa: SIM115
    run = subprocess.Popen(torchrun(2, ROOT / "finetune_siglip.py", *argv), env=QUIET, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 240
        while not (tmp_path / "out" / "results.jsonl").exists() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
        ranks = children_of(run.pid)
        assert len(ranks) == 2, (tmp_path / "log").read_text()[-3000:]
        os.kill(ranks[1], signal.SIGKILL)
        assert run.wait(timeout=30) != 0
        assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    finally:
        run.kill()
        for rank in children_of(run.pid):
            os.kill(rank, signal.SIGKILL)
