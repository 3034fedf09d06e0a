"""Room 2: seeds, signals, and a tracker that never stops a run."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from finetune_siglip import (
    Interrupted,
    Runtime,
    StopRequest,
    build_loader,
    derive_seed,
    gather_rows,
    init_runtime,
    seed_everything,
    start_wandb,
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


def test_a_second_signal_leaves_at_once():
    program = (
        "import os, signal, time, finetune_siglip\n"
        "with finetune_siglip.StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"  # the echo of a launcher
        "    time.sleep(finetune_siglip.StopRequest.ECHO + 0.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=60, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
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
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, timeout=60)
    assert done.returncode == 5


def test_a_full_disk_or_nobody_behind_the_console_stops_nothing():
    program = (
        "import finetune_siglip as fs\n"
        "fs.setup_logging(None, True)\n"
        "for _ in range(3): fs.log.info('x' * 9999); fs.log.error('x' * 9999)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=writer, env=environment, timeout=60)
    os.close(writer)
    assert done.returncode == 0


def test_precision_of_this_machine():
    assert init_runtime(amp=False).amp_dtype is None
    runtime = init_runtime(amp=True)
    assert runtime.amp_dtype == torch.bfloat16 or runtime.device.type == "cuda"


def test_one_process_gathers_its_rows_in_order():
    rows, values = gather_rows(Runtime(torch.device("cpu")), np.array([2, 0, 1]), np.array([[2.0], [0.0], [1.0]]))
    assert rows.tolist() == [0, 1, 2]
    assert values.ravel().tolist() == [0, 1, 2]


def no_network(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")


def test_without_the_package_the_tracker_is_off_and_says_so(monkeypatch, tmp_path, capsys):
    from finetune_siglip import setup_logging

    setup_logging(None, is_main=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = start_wandb("p", "auto", {}, tmp_path, is_main=True)
    assert tracker.run is None
    tracker.record({"loss": 1.0}, step=1)
    tracker.finish()
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_key_a_run_is_offline_and_holds_what_was_recorded(monkeypatch, tmp_path):
    """Read back from the file that the real package wrote."""
    no_network(monkeypatch)
    tracker = start_wandb("project", "auto", {"lr": 0.25}, tmp_path, is_main=True)
    for step in (1, 2):
        tracker.record({"train_loss": step / 10, "per_label": {"Lung nodule": {"f1": None, "auc": 0.5}}}, step=step)
    assert tracker.run is not None
    tracker.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history = []
    for _ in range(100):  # the tracker's own process may still be writing
        history = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in wandb_records(file)
            if record.WhichOneof("record_type") == "history"
        ]
        if len(history) == 2:
            break
        time.sleep(0.1)
    assert [items["train_loss"] for items in history] == [0.1, 0.2]
    assert any("0.5" in json.dumps(items) for items in history)


def wandb_records(file):
    """Protobuf records of an offline run: a LevelDB log (7 bytes of header, blocks of 32 KiB, fragments)."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_a_tracker_that_breaks_is_dropped_and_training_goes_on(capsys):
    from finetune_siglip import Tracker, setup_logging

    class Broken:
        def log(self, figures, step):
            raise ConnectionError("the network is gone\nand more lines")

    setup_logging(None, is_main=True)
    tracker = Tracker(Broken())
    tracker.record({}, 1)
    tracker.record({}, 2)
    assert capsys.readouterr().err.splitlines() == ["warning: Weights & Biases stopped: the network is gone"]


def test_only_the_main_process_tracks(tmp_path):
    assert start_wandb("p", "offline", {}, tmp_path, is_main=False).run is None
    assert start_wandb("p", "disabled", {}, tmp_path, is_main=True).run is None
    assert not list(tmp_path.iterdir())
