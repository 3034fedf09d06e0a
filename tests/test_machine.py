"""Room 2: seeds, signals, precision."""

import argparse
import os
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import finetune_siglip as fs
from finetune_siglip import (
    Interrupted,
    Runtime,
    StopRequest,
    build_loader,
    derive_seed,
    gather_rows,
    init_runtime,
    seed_everything,
)
from helpers import small_scans


def test_seeds_are_functions_of_all_their_parts():
    seeds = {derive_seed(*parts) for parts in ((42,), (42, 0), (0, 42), (42, 0, 0), (43,), (1, 2, 3), (1, 3, 2))}
    assert len(seeds) == 7
    assert derive_seed(42, 3, 7) == derive_seed(42, 3, 7)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeding_repeats_every_generator():
    import random

    draws = []
    for _ in range(2):
        seed_everything(5, 1)
        draws.append((random.random(), np.random.random(), torch.rand(3).tolist()))  # noqa: NPY002
    assert draws[0] == draws[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_for_a_stop_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_number == 0
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert signal.getsignal(number) == before


def test_a_stop_that_foreign_code_turns_into_another_error_is_still_a_stop(monkeypatch, tmp_path):
    """As PyTorch's C++ does when the signal comes while it converts an argument."""

    def work(args):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise fs.BadInput("could not determine the shape") from None

    monkeypatch.setattr(fs, "write_report", work)
    assert fs.main(["--report", str(tmp_path)]) == 128 + signal.SIGTERM


def test_a_second_signal_leaves_at_once(tmp_path):
    program = (
        "import os, signal, time, finetune_siglip\n"
        "with finetune_siglip.StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"  # the echo of a launcher
        "    time.sleep(finetune_siglip.StopRequest.ECHO + 0.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=60, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 143


def test_a_signal_does_not_wait_for_data():
    with StopRequest() as stop:
        with pytest.raises(Interrupted), stop.waiting():
            signal.raise_signal(signal.SIGTERM)
        assert stop.patient
        with pytest.raises(Interrupted), stop.waiting():
            pytest.fail("one that has come already is found at once")


def test_signals_never_reach_the_processes_that_read_not_even_while_they_start(tmp_path):
    loader = build_loader(small_scans(tmp_path, 2), [[0], [1]], 1, torch.device("cpu"))
    batches = iter(loader)
    next(batches)
    (child,) = torch.multiprocessing.active_children()
    with open(f"/proc/{child.pid}/status") as file:
        blocked = int(next(line for line in file if line.startswith("SigBlk")).split()[1], 16)
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_process_ends_though_somebody_still_holds_its_readers(tmp_path):
    program = (
        "import pathlib, sys, torch, finetune_siglip as fs\n"
        "from helpers import small_scans\n"
        "scans = small_scans(pathlib.Path(sys.argv[1]), 8)\n"
        "batches = iter(fs.build_loader(scans, [[row] for row in range(8)], 2, torch.device('cpu')))\n"
        "next(batches)\n"
        "sys.last_exc = batches\n"  # as a traceback holds what its frames hold
        "raise SystemExit(5)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, timeout=60, cwd=tmp_path)
    assert done.returncode == 5


def test_a_full_disk_or_nobody_behind_the_console_stops_nothing(tmp_path):
    program = (
        "import finetune_siglip as fs\n"
        "fs.setup_logging(None, True)\n"
        "for _ in range(3): fs.log.info('x' * 9999); fs.log.error('x' * 9999)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        options = {"env": {**os.environ, "PYTHONPATH": ":".join(sys.path)}, "cwd": tmp_path, "timeout": 60}
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=writer, **options)
    os.close(writer)
    assert done.returncode == 0


def test_precision_of_this_machine():
    assert init_runtime(amp=False).amp_dtype is None
    runtime = init_runtime(amp=True)
    assert runtime.amp_dtype == torch.bfloat16 or runtime.device.type == "cuda"


@pytest.mark.parametrize("size", [None, "1"])
def test_a_process_alone_is_the_first_though_its_environment_has_a_rank(monkeypatch, size):
    monkeypatch.setenv("RANK", "3")  # as some job scripts export it
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert fs.own_rank() == 0
    assert init_runtime(amp=False).is_main


def test_one_process_gathers_its_rows_in_order():
    rows, values = gather_rows(Runtime(torch.device("cpu")), np.array([2, 0, 1]), np.array([[2.0], [0.0], [1.0]]))
    assert rows.tolist() == [0, 1, 2]
    assert values.ravel().tolist() == [0, 1, 2]


@pytest.mark.parametrize("trouble", ["too old", "built without CUDA", None])
def test_a_gpu_that_pytorch_cannot_use_is_a_warning(monkeypatch, caplog, tmp_path, trouble):
    def available():
        if trouble == "too old":
            warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old. Please update")
        return False

    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.version, "cuda", None if trouble == "built without CUDA" else "13.0")
    monkeypatch.setattr(fs.Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version")
    assert fs.init_runtime(amp=False).device.type == "cpu"
    assert [trouble in m and "running on the CPU" in m for m in caplog.messages] == [True] * bool(trouble)


def test_every_line_of_the_log_has_its_time_and_details_stay_off_the_console(tmp_path, capsys):
    fs.setup_logging(tmp_path, True)
    fs.log.info("two\nlines")
    fs.log.log(fs.DETAIL, "a table\nwith rows")
    fs.setup_logging(None, True)
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in lines] == [
        "INFO    two", "INFO    lines", "DETAIL  a table", "DETAIL  with rows",
    ]  # fmt: skip
    assert capsys.readouterr().out == "two\nlines\n"


def test_commands_and_reasons_of_several_lines_have_their_time_on_each(tmp_path):
    fs.setup_logging(tmp_path, True)
    fs.provenance(argparse.Namespace(command="finetune_siglip.py 'a\nb'", csv=None), Runtime(torch.device("cpu")), {})
    assert fs.say_why(fs.BadInput("a layer doesn't fit:\nsize mismatch")) == 2
    fs.setup_logging(None, True)
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ +\S", line) for line in lines)
    assert lines[-1].endswith("ERROR   size mismatch")
