"""Weights & Biases: what the real package writes and sends, and that its troubles never become a run's."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import finetune_siglip as fs
from test_main import arguments, read_rows
from wandb_server import FakeWandb

LINES = [json.dumps({"epoch": e, "lr": 0.1, "per_label": {"Hernia": {"f1": None, "auc": e / 8}}}) for e in (1, 2, 3)]


@pytest.fixture(autouse=True)
def nobody_at_home(monkeypatch, tmp_path):
    """No key, no network, and none of this machine's own settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fs.setup_logging(None, True)
    yield
    with suppress(Exception):  # there may be none, or its service is gone
        sys.modules["wandb"].teardown()  # it keeps the environment that it found


@pytest.fixture
def house(monkeypatch):
    house = FakeWandb()
    monkeypatch.setenv("WANDB_BASE_URL", house.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield house
    house.close()


def start(folder: Path, mode: str = "auto", run_id: str = "abc") -> fs.Tracker:
    return fs.start_wandb("project", mode, {"lr": 0.25}, folder, run_id)


def sync(folder: Path) -> None:
    """Upload the offline run below this folder, as the log advises."""
    (run,) = folder.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "sync", str(run)]
    environment = {**os.environ, "HOME": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr


def tracker_id(run: Path) -> str:
    return fs.load_checked(run / "last.ckpt", fs.RUN_KIND)["identity"]["tracker"]


def epochs(rows: list[dict]) -> list[int]:
    """Those that came with figures."""
    return [row["epoch"] for row in rows if "lr" in row]


def test_figures_are_named_by_label_and_figure_and_undefined_ones_left_out() -> None:
    figures = {"epoch": 1, "macro_f1": None, "per_label": {"Lung nodule": {"f1": 0.5, "auc": None}}, "n": {"f1": 3}}
    assert fs.flat_figures(figures) == {"epoch": 1, "Lung nodule/f1": 0.5, "n/f1": 3}


# a whole run


def test_an_offline_run_holds_figures_and_no_scan_and_is_synced_later_under_its_id(
    scans, tower, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    more = ("--epochs", "2", "--bootstrap", "20", "--wandb-mode", "auto", "--lr", "3e-3", "--wandb-log-model")
    assert fs.main(arguments(scans, tower, tmp_path, *more)) == 0
    sent = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/**/*") if path.is_file())
    assert b"Cardiomegaly" in sent
    assert not [row["series_id"] for row in read_rows(scans) if row["series_id"].encode() in sent]
    assert b"\x89PNG\r\n" not in sent
    assert len(sent) < (tmp_path / "best_model.pth").stat().st_size  # it would have to lie there until it is synced
    assert "Weights & Biases stopped" not in (tmp_path / "training.log").read_text()
    house = FakeWandb()
    monkeypatch.setenv("WANDB_BASE_URL", house.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    sync(tmp_path)
    house.close()
    (run_id,) = house.runs
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows, summary = house.history(run_id), house.summary(run_id)
    assert run_id == tracker_id(tmp_path)
    assert epochs(rows) == [1, 2]
    for row, line in zip(rows, lines, strict=True):
        assert fs.flat_figures(line).items() <= row.items()
    assert summary["best_epoch"] == fs.best_epoch(lines)
    for split in ("val", "test"):
        figures = json.loads((tmp_path / f"evaluation_{split}.json").read_text())["metrics"]
        assert fs.flat_figures({split: figures}).items() <= summary.items()


def test_an_online_run_keeps_its_id_when_resumed_and_sends_its_best_model_where_that_is_asked_for(
    house, scans, tower, tmp_path
) -> None:
    more = ("--wandb-mode", "online", "--bootstrap", "20", "--wandb-project", "lungs")
    assert fs.main(arguments(scans, tower, tmp_path, "--epochs", "1", *more)) == 0
    (run_id,) = house.runs
    assert not house.artifacts
    assert run_id == tracker_id(tmp_path)
    assert epochs(house.history(run_id)) == [1]
    house.runs[run_id].update({"wandb-history.jsonl": [], "wandb-summary.json": []})  # as if killed before it was sent
    more = (*more, "--epochs", "3", "--resume", "auto", "--wandb-log-model")
    assert fs.main(arguments(scans, tower, tmp_path, *more)) == 0
    assert list(house.runs) == [run_id]
    rows = house.history(run_id)
    assert epochs(rows) == [1, 2, 3]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    (model,) = house.artifacts
    assert model["artifactCollectionName"] == f"model-{run_id}"
    assert house.files["a1/best_model.pth"] == (tmp_path / "best_model.pth").read_bytes()
    best = fs.load_checked(tmp_path / "best_model.pth", fs.MODEL_KIND)
    assert {alias["alias"] for alias in model["aliases"]} == {"best", f"epoch-{best['epoch']}", "latest"}
    config = json.loads(house.RunResumeStatus({"name": run_id})["model"]["bucket"]["config"])
    assert config["epochs"]["value"] == 3
    assert "Weights & Biases stopped" not in (tmp_path / "training.log").read_text()


def test_after_a_kill_the_server_gets_each_epoch_once_whether_it_had_it_or_not(house, tmp_path) -> None:
    for lines in (LINES[:1], LINES[:3], LINES[:2]):  # the second time two are missing, the third time one too many
        with start(tmp_path) as tracker:
            tracker.record(lines)
    assert epochs(house.history("abc")) == [1, 2, 3]
    assert house.history("abc")[-1]["Hernia/auc"] == 3 / 8


# troubles


def test_without_the_package_the_tracker_is_off_and_training_goes_on(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with start(tmp_path) as tracker:
        assert tracker.run is None
        tracker.record(LINES)
        tracker.summarise({})
        tracker.keep_model(tmp_path / "nowhere.pth", 1)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_key_it_is_offline_and_nobody_is_asked(mode, tmp_path, capsys) -> None:
    with start(tmp_path, mode) as tracker:
        assert tracker.run.offline
    assert "wandb sync" in capsys.readouterr().out


def test_the_mode_follows_the_flag_the_environment_and_the_key(monkeypatch, tmp_path) -> None:
    import wandb

    opened = []

    def init(mode, **_):
        opened.append(mode)
        raise ConnectionError

    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1 login user password {'a' * 40}\n")
    for url, environment, asked, expected in (
        ("https://wandb.invalid", "online", "auto", ["offline"]),
        ("http://127.0.0.1:9", "online", "auto", ["online", "offline"]),
        ("http://127.0.0.1:9", "disabled", "auto", []),
        ("http://127.0.0.1:9", "disabled", "online", ["online", "offline"]),
        ("http://127.0.0.1:9", "online", "disabled", []),
    ):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_MODE", environment)
        opened.clear()
        assert start(tmp_path, asked).run is None
        assert opened == expected
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start(tmp_path, "offline").run is None
    assert opened == expected


@pytest.mark.parametrize("trouble", ["no network", "a server that never answers"])
def test_a_run_that_cannot_be_opened_is_an_offline_one(house, monkeypatch, tmp_path, capsys, trouble) -> None:
    import wandb

    real = wandb.Settings
    monkeypatch.setattr(wandb, "Settings", lambda **how: real(**how | {"init_timeout": 4}))
    if trouble == "no network":
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    else:
        house.hangs.set()
    with start(tmp_path) as tracker:
        assert tracker.run.offline
        tracker.record(LINES)
        assert tracker.run
    assert "Weights & Biases is not online" in capsys.readouterr().err
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_server_that_stops_answering_holds_up_neither_epochs_nor_the_end(house, tmp_path) -> None:
    (tmp_path / "model.pth").write_bytes(b"weights")
    started = time.monotonic()
    with start(tmp_path) as tracker:
        house.hangs.set()
        tracker.record(LINES)
        assert time.monotonic() - started < 15
    assert time.monotonic() - started < 45
    assert list(tmp_path.glob("wandb/run-*/*.wandb"))  # what was not sent can be synced later


def test_a_service_that_dies_is_dropped_with_one_warning(tmp_path, capfd) -> None:
    with start(tmp_path) as tracker:
        tracker.record(LINES[:1])
        tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        children = [int(pid) for path in tasks for pid in path.read_text().split()]
        for service in [pid for pid in children if "wandb" in Path(f"/proc/{pid}/comm").read_text()]:
            os.kill(service, signal.SIGKILL)
            os.waitpid(service, 0)
        for _ in range(3):
            tracker.record(LINES)
            tracker.seen = 0
    assert tracker.run is None
    error = capfd.readouterr().err
    assert error.count("Weights & Biases stopped") == 1
    assert "Traceback" not in error


def test_a_tracker_that_breaks_is_dropped_and_training_goes_on(capsys) -> None:
    class Broken:
        def log(self, figures):
            raise ConnectionError("the network is gone\nand more lines")

    tracker = fs.Tracker(Broken())
    tracker.record(LINES[:1])
    tracker.record(LINES)
    assert capsys.readouterr().err.splitlines() == ["warning: Weights & Biases stopped: the network is gone"]
