"""Room 2: seeds, signals, precision."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from finetune_siglip import Runtime, StopRequest, derive_seed, gather_rows, init_runtime, seed_everything


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


def test_precision_of_this_machine():
    assert init_runtime(amp=False).amp_dtype is None
    runtime = init_runtime(amp=True)
    assert runtime.amp_dtype == torch.bfloat16 or runtime.device.type == "cuda"


def test_one_process_gathers_its_rows_in_order():
    rows, values = gather_rows(Runtime(torch.device("cpu")), np.array([2, 0, 1]), np.array([[2.0], [0.0], [1.0]]))
    assert rows.tolist() == [0, 1, 2]
    assert values.ravel().tolist() == [0, 1, 2]
