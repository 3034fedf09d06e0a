"""A run that is killed, stopped, moved, damaged or short of disk: nothing is lost, and nothing passed over."""

import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

import phantoms
from benchmarks.crash_test import LABELS, Bench, one_save, outcome, random_moments, torn_files
from finetune_siglip import RUN_KIND, load_checked, save_checked
from forkserver import ForkServer

PLAIN = ("plateau", False, 1, 0)
RICH = ("plateau", True, 3, 2)  # averaged weights, short last window, workers


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tower):
    folder = tmp_path_factory.mktemp("crash")
    scans = phantoms.write_dataset(folder / "scans", 15, 8, 5, seed=4, shape=(8, 32, 32))
    with ForkServer() as server:
        yield Bench(server, scans, tower, folder)


@pytest.fixture(scope="module")
def done(bench):
    """The folder of a finished run; copy it before changing it."""
    bench.reference(PLAIN)
    return bench.folder / "-".join(("reference", *map(str, PLAIN)))


def run(bench, out, *more, config=PLAIN, **shim):
    return bench.server.run(bench.arguments(config, out, *more), out.with_suffix(".log"), **shim)


def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


def fell(bench, out, moment=None):
    """Stop a fresh run in its second epoch; its folder can be resumed."""
    operations = bench.reference(PLAIN)[2]
    commits = [i for i, line in enumerate(operations) if line == "replace last.ckpt"]
    ended = run(bench, out, folder=str(out), at=moment or commits[len(commits) // 2] + 5)
    assert ended.code == -signal.SIGKILL
    return out


# kills


@pytest.mark.parametrize(("config", "kills"), [(PLAIN, 4), (RICH, 2)])
def test_killed_and_resumed_a_run_gives_the_very_same(bench, config, kills):
    rng = random.Random(1)
    assert bench.chain(config, random_moments(bench, config, rng, kills) * kills), bench.problems


@pytest.mark.parametrize("kind", ["fsync", "replace", "link", "unlink"])
def test_killed_at_one_file_operation_of_a_save(bench, kind):
    operations = bench.reference(PLAIN)[2]
    numbers = [n for n in one_save(operations) if operations[n - 1].startswith(kind)]
    assert numbers
    assert bench.chain(PLAIN, [random.Random(kind).choice(numbers)]), bench.problems


def test_what_a_save_does_comes_in_an_order_that_a_power_cut_respects(bench):
    """Content reaches the disk before its name does, the name before anything that relies on it."""
    operations = bench.reference(PLAIN)[2]
    for number, line in enumerate(operations):
        kind, name = line.split(" ", 1)
        if kind == "replace" and name not in ("last.ckpt", "last.previous.ckpt", "best_model.pth"):
            assert operations[number - 1].startswith(f"fsync .{name}."), operations[number - 3 : number + 1]
        if kind == "replace":
            assert operations[number + 1] == "fsync ", operations[number : number + 3]
    save = [operations[n - 1] for n in one_save(operations)]
    order = [
        next(i for i, line in enumerate(save) if line.startswith(start))
        for start in ("replace checkpoint_epoch", "replace last.previous", "replace last.ckpt", "replace results.jsonl")
    ]
    assert order == sorted(order)
    assert operations.index("replace last.ckpt") < next(i for i, o in enumerate(operations) if "checkpoint_epoch" in o)
    removed = [i for i, line in enumerate(save) if line.startswith("unlink checkpoint_epoch")]
    assert all(i > order[-1] for i in removed)


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer", "sgd", "--amp", "--loss", "balanced"],
        pytest.param(["--lora-rank", "2", "--layer-decay", "0.7", "--threshold", "auto"], marks=pytest.mark.slow),
        pytest.param(["--freeze-up-to", "all", "--cache-features", "features"], marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_other_ways_to_train_give_the_very_same(bench, tmp_path, more):
    more = ["--epochs", "2", *(str(tmp_path / word) if word == "features" else word for word in more)]
    config = ("plateau", True, 3, 0)
    whole = run(bench, tmp_path / "whole", *more, config=config, folder=str(tmp_path / "whole"))
    assert whole.code == 0, whole.text
    out, half = tmp_path / "run", len(whole.operations) // 2
    number = random.Random(len(more)).randrange(half, 2 * half)
    assert run(bench, out, *more, config=config, folder=str(out), at=number).code == -signal.SIGKILL
    if "features" in "".join(more):  # where they lie is no part of the run
        more[-1] = str((tmp_path / "features").rename(tmp_path / "features moved"))
    ended = run(bench, out, *more, "--resume", "auto", config=config)
    assert ended.code == 0, ended.text
    assert outcome(bench, out) == outcome(bench, tmp_path / "whole")


# signals


def seconds_until_stopped(bench, out, number, config, when, **shim):
    pid = bench.server.start(bench.arguments(config, out), out.with_suffix(".log"), **shim)
    deadline = time.monotonic() + 60
    while not when(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    started = time.monotonic()
    for target in (*children, pid):  # as a scheduler does: to every process of the job
        os.kill(target, number)
    ended = bench.server.wait(pid, timeout=60)
    return ended, time.monotonic() - started


@pytest.mark.parametrize(
    ("number", "config"), [(signal.SIGTERM, RICH), (signal.SIGINT, PLAIN), (signal.SIGUSR1, PLAIN)]
)
def test_a_signal_saves_the_state_and_the_resumed_run_gives_the_very_same(bench, tmp_path, number, config):
    wanted = bench.reference(config)[0]
    out = tmp_path / "run"
    ended, seconds = seconds_until_stopped(bench, out, number, config, lambda out: (out / "last.ckpt").exists())
    assert ended.code == 128 + number, ended.text
    assert "Traceback" not in ended.text
    assert "the state is saved" in ended.text
    assert seconds < 20
    assert (out / "stopped").read_text() == signal.Signals(number).name + "\n"
    log = (out / "training.log").read_text()
    assert load_checked(out / "last.ckpt", RUN_KIND)["progress"]["epoch"] < 4
    ended = run(bench, out, "--resume", "auto", config=config)
    assert ended.code == 0, ended.text
    assert outcome(bench, out) == wanted
    assert not (out / "stopped").exists()
    assert (out / "training.log").read_text().startswith(log)


@pytest.mark.parametrize("config", [PLAIN, RICH])
def test_a_signal_does_not_wait_for_scans_that_do_not_come(bench, tmp_path, config):
    wanted = bench.reference(config)[0]
    out, hangs = tmp_path / "run", tmp_path / "hangs"

    def stuck(out):
        if (out / "results.jsonl").exists() and not hangs.exists():
            hangs.touch()
            time.sleep(1)
        return hangs.exists()

    ended, seconds = seconds_until_stopped(bench, out, signal.SIGTERM, config, stuck, hangs=str(hangs))
    assert ended.code == 143, ended.text
    assert "Traceback" not in ended.text
    assert seconds < 20
    ended = run(bench, out, "--resume", "auto", config=config)
    assert ended.code == 0, ended.text
    assert outcome(bench, out) == wanted


def test_a_signal_while_results_are_written_leaves_a_run_to_be_finished(bench, tmp_path):
    wanted, _, operations = bench.reference(PLAIN)
    out, at = tmp_path / "run", next(i for i, line in enumerate(operations) if "test_predictions.csv" in line) + 1
    ended = run(bench, out, folder=str(out), at=at, how="signal")
    assert ended.code == 143, ended.text
    assert "Traceback" not in ended.text
    assert not [file for file in out.iterdir() if "test_predictions" in file.name]
    assert run(bench, out, "--resume", "auto").code == 0
    assert (out / "test_predictions.csv").exists()
    assert outcome(bench, out) == wanted


@pytest.mark.parametrize("what", ["prediction", "features"])
def test_a_signal_ends_what_comes_before_or_without_training_at_once(bench, done, tmp_path, what):
    out, features = tmp_path / "out", tmp_path / "features"
    more = {"prediction": ["--test-only", str(done / "best_model.pth")],
            "features": ["--freeze-up-to", "all", "--cache-features", str(features)]}[what]  # fmt: skip
    hangs = {"prediction": out / ".lock", "features": features}[what]  # from when this is there, no scan can be read
    pid = bench.server.start(bench.arguments(RICH, out, *more), tmp_path / "log", hangs=str(hangs))
    while not hangs.exists():
        time.sleep(0.01)
    time.sleep(1)
    started = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    ended = bench.server.wait(pid)
    assert (ended.code, "Traceback" in ended.text) == (143, False), ended.text
    assert time.monotonic() - started < 20
    assert {file.name for file in out.iterdir()} <= {".lock", "training.log", "data_check.png", "stopped"}
    assert (out / "stopped").exists() == (what == "features")
    assert not features.exists() or not list(features.iterdir())


def test_a_signal_before_training_ends_at_once_and_leaves_no_run(bench, tmp_path):
    out = tmp_path / "run"
    ended = run(bench, out, signal_at="read_table")
    assert ended.code == 143, ended.text
    assert "Traceback" not in ended.text
    assert (out / "stopped").read_text() == "SIGTERM\n"
    assert run(bench, out, "--resume", "auto", "--epochs", "1").code == 0


def test_a_signal_in_validation_loses_nothing(bench, tmp_path):
    """The last window of the epoch is short, and must not be trained on twice."""
    config = ("plateau", True, 3, 0)
    wanted = bench.reference(config)[0]
    out = tmp_path / "run"
    ended = run(bench, out, config=config, signal_in="validate")
    assert ended.code == 143, ended.text
    progress = load_checked(out / "last.ckpt", RUN_KIND)["progress"]
    assert (progress["epoch"], progress["micro"]) == (0, 8)
    ended = run(bench, out, "--resume", "auto", config=config)
    assert ended.code == 0, ended.text
    assert outcome(bench, out) == wanted


# disk


@pytest.mark.parametrize(("kind", "how"), [("write", "ENOSPC"), ("fsync", "EIO"), ("replace", "ENOSPC")])
def test_a_failed_write_leaves_the_old_files_whole_and_says_so(bench, tmp_path, kind, how):
    operations = bench.reference(PLAIN)[2]
    numbers = [n for n in one_save(operations) if operations[n - 1].startswith(kind) and "png" not in operations[n - 1]]
    out = tmp_path / "run"
    ended = run(bench, out, folder=str(out), at=random.Random(kind + how).choice(numbers), how=how)
    errors = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    assert ended.code == 3, ended.text
    assert "Traceback" not in ended.text
    assert len(errors) == 1
    assert str(out) in errors[0]
    assert os.strerror(getattr(__import__("errno"), how)) in errors[0]
    assert kind != "write" or re.search(r"[\d,]+ bytes are needed and [\d,]+ bytes are free", errors[0])
    assert not torn_files(out)
    assert not [file.name for file in out.iterdir() if ".tmp" in file.name]
    assert run(bench, out, "--resume", "auto").code == 0
    assert outcome(bench, out) == bench.reference(PLAIN)[0]


def test_a_file_size_limit_met_by_the_system_itself_is_one_line(bench, tmp_path):
    ended = run(bench, tmp_path / "run", largest_file=50_000)
    assert ended.code == 3, ended.text
    assert "Traceback" not in ended.text
    assert "File too large" in ended.text
    assert [f.name for f in (tmp_path / "run").iterdir() if "tmp" in f.name or "ckpt" in f.name] == []


def test_the_room_for_the_largest_moment_is_looked_for_before_training(bench, tmp_path):
    ended = run(bench, tmp_path / "run", free_bytes=1000)
    assert ended.code == 3, ended.text
    assert "bytes are needed" in ended.text
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_logs_and_pictures_that_fail_stop_nothing(bench, tmp_path):
    out = tmp_path / "run"
    names = ("training.log", "data_check.png", "progress.png", "report.html")
    for name in names:
        (out / name / "in the way").mkdir(parents=True)
    (out / "pictures").touch()
    ended = run(bench, out, "--epochs", "1", pictures=True)
    assert ended.code == 0, ended.text
    assert all(f"warning: {name} is left out: " in ended.text for name in (*names, "the report's pictures"))
    assert (out / "test_predictions.csv").exists()


# damage


def flip(path):
    """Change a bit in the middle of the largest tensor in a file of torch.save; elsewhere many a bit means nothing."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if "/data/" in member.filename]
    member = max(members, key=lambda member: member.file_size)
    lengths = struct.unpack_from("<HH", data, member.header_offset + 26)  # of its name and of what follows that
    data[member.header_offset + 30 + sum(lengths) + member.file_size // 2] ^= 16
    path.write_bytes(data)


def test_a_damaged_last_state_falls_back_to_the_one_before_and_ends_the_same(bench, tmp_path):
    out = fell(bench, tmp_path / "run")
    flip(out / "last.ckpt")
    ended = run(bench, out, "--resume", "auto")
    assert ended.code == 0, ended.text
    assert "damaged" in ended.text
    assert "going back to" in ended.text
    assert outcome(bench, out) == bench.reference(PLAIN)[0]


def test_after_falling_back_a_kill_at_any_operation_of_the_first_commit_finds_a_whole_state(bench, tmp_path):
    base = fell(bench, tmp_path / "base")
    flip(base / "last.ckpt")
    whole = run(bench, shutil.copytree(base, tmp_path / "probe"), "--resume", "auto", folder=str(tmp_path / "probe"))
    end = next(i for i, line in enumerate(whole.operations) if line == "replace last.ckpt" and i > 40)
    numbers = [i + 1 for i in range(end) if not whole.operations[i].startswith("write")]
    for number in (random.Random(0).choice(numbers), end + 1):  # there the previous state has been replaced already
        out = shutil.copytree(base, tmp_path / f"at-{number}")
        assert run(bench, out, "--resume", "auto", folder=str(out), at=number).code == -signal.SIGKILL
        assert run(bench, out, "--resume", "auto").code == 0
        assert outcome(bench, out) == bench.reference(PLAIN)[0]


def test_falling_back_in_another_folder_leaves_that_one_as_it_is(bench, tmp_path):
    there, here = fell(bench, tmp_path / "there"), tmp_path / "here"
    flip(there / "last.ckpt")
    before = {file.name: file.read_bytes() for file in there.iterdir()}
    ended = run(bench, here, "--resume", str(there))
    assert ended.code == 0, ended.text
    assert outcome(bench, here) == bench.reference(PLAIN)[0]
    assert {file.name: file.read_bytes() for file in there.iterdir()} == before


def test_both_states_damaged_is_refused(bench, done, tmp_path):
    out = copy(done, tmp_path)
    for name in ("last.ckpt", "last.previous.ckpt"):
        flip(out / name)
    ended = run(bench, out, "--resume", "auto")
    assert ended.code == 2
    assert "last.previous.ckpt" in ended.text


def test_a_damaged_checkpoint_of_the_top_3_leaves_the_ranking_with_a_warning(bench, done, tmp_path):
    out = copy(done, tmp_path)
    entries = load_checked(out / "last.ckpt", RUN_KIND)["history"]["entries"]
    (out / "best_model.pth").unlink()
    flip(out / f"checkpoint_epoch_{entries[0][1]:03d}.pth")
    ended = run(bench, out, "--resume", "auto")
    assert ended.code == 0, ended.text
    assert f"epoch {entries[0][1]} leaves the ranking" in ended.text
    assert not torn_files(out)
    assert (out / "best_model.pth").exists()


def test_a_damaged_model_is_no_model_to_predict_with(bench, done, tmp_path):
    model = shutil.copy(done / "best_model.pth", tmp_path)
    flip(Path(model))
    ended = run(bench, tmp_path / "out", "--test-only", model)
    assert ended.code == 2, ended.text
    assert f"{model}: damaged" in ended.text
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_ends_with_4_naming_the_scans_and_saves_no_such_number(bench, tmp_path):
    out = tmp_path / "run"
    ended = run(bench, out, "--lr", "1e30")
    assert ended.code == 4, ended.text
    assert "Traceback" not in ended.text
    (error,) = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    assert "phantom_" in error
    assert not torn_files(out)
    assert all(t.isfinite().all() for t in load_checked(out / "last.ckpt", RUN_KIND)["model"].values())


def edit(path, change):
    content = load_checked(path, RUN_KIND)
    change(content)
    save_checked(path, content)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].popitem(),
        lambda c: c["parameters"].reverse(),
        lambda c: c["history"].pop("entries"),
        lambda c: c["identity"].pop("compared"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_naming_the_file(bench, done, tmp_path, change):
    out = copy(done, tmp_path)
    for name in ("last.ckpt", "last.previous.ckpt"):
        edit(out / name, change)
    ended = run(bench, out, "--resume", "auto", "--epochs", "6")
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    assert str(out / "last") in ended.text


# which run


def test_changed_arguments_that_affect_numbers_stop_the_resume(bench, done, tmp_path):
    """All of them are shown at once, with what they were and are."""
    out = copy(done, tmp_path)
    more = ["--lr", "0.01", "--seed", "4", "--batch-size", "3", "--gradient-accumulation-steps", "2", "--use-ema",
            "--windows", "merlin", "--threshold", "0.5", "--epochs", "2", "--amp", "--num-slices", "5"]  # fmt: skip
    ended = run(bench, out, "--resume", "auto", *more)
    assert ended.code == 2, ended.text
    expected = [
        "--lr was 0.02, now 0.01", "--seed was 3, now 4", "--batch-size was 2, now 3", "--gradient-accumulation-steps",
        "--use-ema", "--windows", "--threshold", "it can only grow", "precision was float32", "preprocessing was",
    ]  # fmt: skip
    errors = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    assert [sum(name in error for error in errors) for name in expected] == [1] * len(expected), ended.text
    assert all(str(out) in error for error in errors)
    assert run(bench, out, "--resume", "auto", "--freeze-up-to", "2").code == 2
    ended = run(bench, out, "--resume", "auto", "--compile", "off")  # a compiler that fails must not be in the way
    assert ended.code == 0, ended.text
    assert "compile was auto, now off: bits may differ" in ended.text


def test_changed_values_in_a_file_of_thresholds_stop_the_resume(bench, tmp_path):
    out, file = tmp_path / "run", tmp_path / "thresholds.json"
    file.write_text(json.dumps(dict.fromkeys(LABELS, 0.41)))
    assert run(bench, out, "--epochs", "1", "--threshold", str(file)).code == 0
    moved = file.rename(tmp_path / "moved.json")
    assert run(bench, out, "--epochs", "2", "--threshold", str(moved), "--resume", "auto").code == 0
    moved.write_text(json.dumps(dict.fromkeys(LABELS, 0.5)))
    ended = run(bench, out, "--epochs", "3", "--threshold", str(moved), "--resume", "auto")
    assert ended.code == 2, ended.text
    assert "thresholds (--threshold) was [0.41" in ended.text


def test_changed_data_or_pretrained_weights_stop_the_resume(bench, done, tmp_path):
    out = copy(done, tmp_path)
    folder = shutil.copytree(bench.scans.parent, tmp_path / "scans")
    table = folder / bench.scans.name
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace(",1,", ",0,") if ",1," in lines[1] else lines[1].replace(",0,", ",1,")
    table.write_text("\n".join(lines))
    ended = run(bench, out, "--resume", "auto", "--csv", str(table))
    assert ended.code == 2, ended.text
    assert "training and validation rows was" in ended.text
    from safetensors.torch import load_file, save_file

    tower = shutil.copytree(bench.tower, tmp_path / "tower")
    tensors = load_file(tower / "model.safetensors")
    next(iter(tensors.values())).add_(1e-3)
    save_file(tensors, tower / "model.safetensors")
    ended = run(bench, out, "--resume", "auto", "--pretrained", str(tower))
    assert ended.code == 2, ended.text
    assert "pretrained weights was" in ended.text


def test_moved_data_weights_and_folder_make_no_difference(bench, tmp_path):
    out = fell(bench, tmp_path / "run").rename(tmp_path / "moved")
    scans = shutil.copytree(bench.scans.parent, tmp_path / "scans") / bench.scans.name
    tower = shutil.copytree(bench.tower, tmp_path / "tower")
    ended = run(bench, out, "--resume", "auto", "--csv", str(scans), "--pretrained", str(tower))
    assert ended.code == 0, ended.text
    assert outcome(bench, out) == bench.reference(PLAIN)[0]


@pytest.mark.parametrize("name", ["", "last.ckpt"])
def test_a_run_in_another_folder_is_continued_here_and_left_as_it_is(bench, tmp_path, name):
    there, here = fell(bench, tmp_path / "there"), tmp_path / "here"
    before = {file.name: file.read_bytes() for file in there.iterdir()}
    ended = run(bench, here, "--resume", str(there / name))
    assert ended.code == 0, ended.text
    assert outcome(bench, here) == bench.reference(PLAIN)[0]
    assert {file.name: file.read_bytes() for file in there.iterdir()} == before


def test_a_finished_run_is_finished_again_or_extended(bench, done, tmp_path):
    out = copy(done, tmp_path)
    assert run(bench, out, "--resume", "auto").code == 0
    assert outcome(bench, out) == bench.reference(PLAIN)[0]
    assert run(bench, out, "--resume", "auto", "--epochs", "6").code == 0
    longer = tmp_path / "longer"
    assert run(bench, longer, "--epochs", "6").code == 0
    assert (out / "results.jsonl").read_bytes() == (longer / "results.jsonl").read_bytes()


def test_a_longer_cosine_schedule_is_announced(bench, tmp_path):
    config = ("cosine", False, 1, 0)
    assert run(bench, tmp_path / "run", "--epochs", "1", config=config).code == 0
    ended = run(bench, tmp_path / "run", "--resume", "auto", config=config)
    assert ended.code == 0
    assert "warning: --epochs has grown: the cosine schedule" in ended.text


def test_a_run_that_stopped_early_says_so_again_and_goes_on_with_more_patience(bench, tmp_path):
    out = tmp_path / "run"
    args = ["--lr", "1e-9", "--epochs", "5", "--early-stopping-patience"]
    ended = run(bench, out, *args, "2")
    assert "stopping early" in ended.text
    epochs = len((out / "results.jsonl").read_text().splitlines())
    assert epochs == 3
    ended = run(bench, out, "--resume", "auto", *args, "2")
    assert (ended.code, "stopping early" in ended.text) == (0, True)
    assert run(bench, out, "--resume", "auto", *args, "0").code == 0
    assert [json.loads(line)["epoch"] for line in (out / "results.jsonl").open()] == [1, 2, 3, 4, 5]


def test_resume_auto_starts_where_there_is_no_run_and_goes_on_where_there_is_one_saying_which(bench, tmp_path):
    """One command for the first job and for all that follow it."""
    out = tmp_path / "run"
    for epochs, said in (("1", f"{out} holds no run yet, so a new one starts"), ("2", f"resumed {out} after epoch 1,")):
        ended = run(bench, out, "--resume", "auto", "--epochs", epochs)
        assert ended.code == 0, ended.text
        assert [line for line in ended.text.splitlines() if "holds no run" in line or "resumed" in line] == [
            next(line for line in ended.text.splitlines() if said in line)
        ]
    assert [json.loads(line)["epoch"] for line in (out / "results.jsonl").open()] == [1, 2]


def test_resuming_a_folder_without_a_run_and_a_start_into_a_run_are_refused(bench, done, tmp_path):
    ended = run(bench, tmp_path / "none", "--resume", str(tmp_path / "nothing"))
    assert (ended.code, "no run to resume" in ended.text, (tmp_path / "none").exists()) == (2, True, False)
    out = copy(done, tmp_path)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for more in ([], ["--resume", "auto", "--overwrite"], ["--resume", str(done)]):
        ended = run(bench, out, *more)
        assert ended.code == 2, ended.text
        assert "--overwrite" in ended.text
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize("name", ["best_model.pth", "checkpoint_epoch_001.pth", "test_predictions.csv"])
def test_what_somebody_kept_of_a_run_is_not_removed_by_a_start(bench, done, tmp_path, name):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(done / name, out)
    before = (out / name).read_bytes()
    for more in ([], ["--resume", "auto"]):  # nothing to go on with is there either
        ended = run(bench, out, *more)
        assert ended.code == 2, ended.text
        assert "--overwrite" in ended.text
        assert (out / name).read_bytes() == before


def test_overwrite_replaces_the_run_and_spares_what_is_not_its_own(bench, done, tmp_path):
    out = copy(done, tmp_path)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoint_epoch_best.pth").write_text("mine too")
    assert run(bench, out, "--overwrite", "--csv", str(tmp_path / "no.csv")).code == 2  # a slip costs nothing
    assert (out / "last.ckpt").read_bytes() == (done / "last.ckpt").read_bytes()
    assert run(bench, out, "--overwrite", "--epochs", "1").code == 0
    assert len((out / "results.jsonl").read_text().splitlines()) == 1
    assert {f.name for f in out.glob("checkpoint*")} == {"checkpoint_epoch_001.pth", "checkpoint_epoch_best.pth"}
    assert (out / "notes.txt").exists()


def test_a_second_run_and_a_prediction_are_refused_naming_pid_and_host(bench, done, tmp_path):
    out = tmp_path / "run"
    pid = bench.server.start(bench.arguments(PLAIN, out), tmp_path / "first.log")
    while not (out / "last.ckpt").exists():
        time.sleep(0.01)
    with ForkServer() as other:
        os.kill(pid, signal.SIGSTOP)
        second = other.run(bench.arguments(PLAIN, out, "--resume", "auto"), tmp_path / "second.log")
        model = ["--overwrite", "--test-only", str(done / "best_model.pth")]
        predicted = other.run(bench.arguments(PLAIN, out, *model), tmp_path / "third.log")
        os.kill(pid, signal.SIGCONT)
    for ended in (second, predicted):
        assert ended.code == 3, ended.text
        assert f"pid {pid} on {socket.gethostname()}" in ended.text
    bench.server.log = tmp_path / "first.log"
    assert bench.server.wait(pid).code == 0


# ranks


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(bench, out, tmp_path, *more, ranks=2, config=PLAIN, store=None, **shim):
    port = store.port if store else free_port()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    if store:  # as under torchrun, it outlives the ranks
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    logs = [tmp_path / f"rank{rank}.log" for rank in range(ranks)]
    argv = bench.arguments(config, out, "--epochs", "50", "--early-stopping-patience", "0", *more)
    return logs, [
        bench.server.start(argv, log, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **shim)
        for rank, log in enumerate(logs)
    ]


def codes(bench, pids):
    return [bench.server.wait(pid).code for pid in pids]


def wait_until(there, seconds=240):
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert there()


RANKS_AND_SECONDS = [(2, 3), *(pytest.param(ranks, 60, marks=pytest.mark.slow) for ranks in (2, 3))]


@pytest.mark.parametrize(("ranks", "seconds"), RANKS_AND_SECONDS)
def test_all_ranks_stay_until_rank_0_has_saved_a_stop(bench, tmp_path, ranks, seconds):
    out = tmp_path / "run"
    logs, pids = start_ranks(bench, out, tmp_path, ranks=ranks, commit_seconds=seconds)
    wait_until((out / "results.jsonl").exists)
    (out / "slow").touch()
    before = load_checked(out / "last.ckpt", RUN_KIND)["progress"]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert codes(bench, pids[1:]) == [143] * (ranks - 1), [log.read_text() for log in logs]
    assert load_checked(out / "last.ckpt", RUN_KIND)["progress"] != before  # rank 0 may go on a little
    assert (out / "stopped").read_text() == "SIGTERM\n"
    assert codes(bench, pids[:1]) == [143]
    assert "Traceback" not in "".join(log.read_text() for log in logs)


@pytest.mark.parametrize(("ranks", "seconds"), RANKS_AND_SECONDS)
def test_all_ranks_stay_until_rank_0_has_published(bench, tmp_path, ranks, seconds):
    out = tmp_path / "run"
    logs, pids = start_ranks(
        bench, out, tmp_path, "--epochs", "1", ranks=ranks, publish_seconds=seconds / 2
    )  # 2 splits
    assert codes(bench, pids[1:]) == [0] * (ranks - 1), [log.read_text() for log in logs]
    assert (out / "test_predictions.csv").exists()
    assert codes(bench, pids[:1]) == [0]
    assert not (out / "stopped").exists()


def test_two_ranks_stop_together_and_go_on_together(bench, tmp_path):
    out = tmp_path / "run"
    logs, pids = start_ranks(bench, out, tmp_path)
    wait_until((out / "last.ckpt").exists)
    os.kill(pids[1], signal.SIGTERM)  # to one of them only
    assert codes(bench, pids) == [143, 143], [log.read_text() for log in logs]
    epoch = load_checked(out / "last.ckpt", RUN_KIND)["progress"]["epoch"]
    logs, pids = start_ranks(bench, out, tmp_path, "--resume", "auto")
    while load_checked(out / "last.ckpt", RUN_KIND)["progress"]["epoch"] <= epoch:
        time.sleep(0.05)
    os.kill(pids[0], signal.SIGTERM)
    assert codes(bench, pids) == [143, 143], [log.read_text() for log in logs]


@pytest.mark.parametrize(
    ("victim", "when", "config"),
    [(0, "trains", PLAIN), (1, "trains", RICH), (0, "saves", PLAIN), (0, "publishes", PLAIN), (2, "trains", PLAIN)],
)
def test_a_killed_rank_ends_the_others_at_once_in_one_line(bench, tmp_path, victim, when, config):
    """Its readers, who share its connections, go with it; nothing is torn, and the run can be resumed."""
    out, ranks = tmp_path / "run", max(2, victim + 1)
    more = ["--epochs", "1"] * (when == "publishes")
    slow = {"saves": {"commit_seconds": 60}, "publishes": {"publish_seconds": 60}}.get(when, {})
    logs, pids = start_ranks(bench, out, tmp_path, *more, ranks=ranks, config=config, **slow)
    wait_until((logs[0].with_suffix(".publishing") if when == "publishes" else out / "results.jsonl").exists)
    if when == "saves":
        (out / "slow").touch()
        time.sleep(3)
    started = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    ended = codes(bench, pids)
    assert time.monotonic() - started < 30
    assert [code for rank, code in enumerate(ended) if rank != victim] == [3] * (ranks - 1)
    text = "".join(log.read_text() for log in logs)
    assert victim == 0 or text.count("another process of this run has ended or hangs") == 1, text
    assert "Traceback" not in text
    assert not torn_files(out)


@pytest.mark.parametrize("who", ["all", "rank 0", "rank 1"])
def test_an_error_is_said_once_whichever_ranks_find_it(bench, tmp_path, who):
    """By rank 0 where it knows; what follows from it on the other ranks is no further message."""
    out, more = tmp_path / "run", []
    if who == "all":
        more, said = ["--csv", str(tmp_path / "none.csv")], "none.csv"
    elif who == "rank 0":
        out.write_text("in the way")
        said = f"{out}: File exists: mend that, or name another path"
    else:  # each epoch deals the scans out anew, so this one is met by either rank sooner or later
        scans = shutil.copytree(bench.scans.parent, tmp_path / "scans") / bench.scans.name
        row = next(line.split(",") for line in scans.read_text().splitlines() if ",train," in line)
        more, said = ["--csv", str(scans), "--save-every-minutes", "0"], row[0]
    store = torch.distributed.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    logs, pids = start_ranks(bench, out, tmp_path, *more, store=store)
    if who == "rank 1":
        wait_until((out / "results.jsonl").exists)
        (scans.parent / row[2]).write_bytes(b"no volume any more")
    ended = codes(bench, pids)
    errors = [line for log in logs for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert said in errors[0]
    assert "Traceback" not in "".join(log.read_text() for log in logs)
    assert ended[0] == {"all": 2, "rank 0": 3}.get(who, ended[0])
    assert set(ended) <= {2, 3}


# long runs


@pytest.mark.slow
def test_fifty_epochs_take_no_more_memory_files_or_threads_than_ten(bench, tmp_path):
    """Less than 1 MB an epoch; the real picture and both loaders take part."""
    out, epochs = tmp_path / "run", 50
    config = ("cosine", True, 1, 2)
    argv = bench.arguments(config, out, "--epochs", str(epochs), "--early-stopping-patience", "0")
    pid = bench.server.start(argv, tmp_path / "run.log", pictures=True)
    seen = {}
    while len(seen) < epochs - 1:
        done = (out / "results.jsonl").read_bytes().count(b"\n") if (out / "results.jsonl").exists() else 0
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            if "VmRSS" not in status:
                break
            seen[done] = (
                int(status["VmRSS"].split()[0]) / 1024,
                len(os.listdir(f"/proc/{pid}/fd")),
                int(status["Threads"]),
            )
        except FileNotFoundError:
            break
        time.sleep(0.05)
    assert bench.server.wait(pid, timeout=600).code == 0
    late = [seen[epoch] for epoch in sorted(seen) if epoch >= 10]
    slope = (late[-1][0] - late[0][0]) / len(late)
    print(f"epochs={len(late)} slope_mb={slope:.3f} files={late[-1][1]} threads={late[-1][2]}")
    assert slope < 1
    quiet = [min(part[i] for part in half) for half in (late[:20], late[20:]) for i in (1, 2)]
    assert quiet[:2] == quiet[2:]
