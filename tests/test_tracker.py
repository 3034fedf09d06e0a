"""Weights & Biases: what the real package writes and sends, and that its troubles never become a run's."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import finetune_siglip as fs
from test_main import LABELS, arguments, read_rows
from wandb_server import FakeWandb

LINES = [json.dumps({"epoch": e, "lr": 0.1, "per_label": {"Hernia": {"f1": None, "auc": e / 8}}}) for e in (1, 2, 3)]


@pytest.fixture(autouse=True)
def nobody_at_home(monkeypatch, tmp_path):
    """No key, no network, and none of this machine's own settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fs.setup_logging(None, is_main=True)


@pytest.fixture
def house(monkeypatch):
    house = FakeWandb()
    monkeypatch.setenv("WANDB_BASE_URL", house.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield house
    house.close()


def start(folder: Path, mode: str = "auto", run_id: str = "abc") -> fs.Tracker:
    return fs.start_wandb("project", mode, {"lr": 0.25}, folder, is_main=True, run_id=run_id)


def offline_records(folder: Path) -> list:
    """Protobuf records of the newest offline run: a LevelDB log (7 bytes of header, blocks of 32 KiB, fragments)."""
    from wandb.proto import wandb_internal_pb2

    *_, file = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def items(updates) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def rows_of(records: list) -> list[dict]:
    return [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]


def summary_of(records: list) -> dict:
    summary: dict = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    return summary


def tracker_id(run: Path) -> str:
    return fs.load_checked(run / "last.ckpt", fs.RUN_KIND)["identity"]["tracker"]


def epochs(rows: list[dict]) -> list[int]:
    """Those that came with figures."""
    return [row["epoch"] for row in rows if "lr" in row]


def test_figures_are_named_by_label_and_figure_and_undefined_ones_left_out() -> None:
    figures = {"epoch": 1, "macro_f1": None, "per_label": {"Lung nodule": {"f1": 0.5, "auc": None}}, "n": {"f1": 3}}
    assert fs.flat_figures(figures) == {"epoch": 1, "Lung nodule/f1": 0.5, "n/f1": 3}


# a whole run


@pytest.fixture(scope="module")
def offline_run(scans, tower, tmp_path_factory):
    """A run of two epochs, tracked without key and network."""
    out = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        more = ("--epochs", "2", "--bootstrap", "20", "--wandb-mode", "auto", "--lr", "3e-3")
        assert fs.main(arguments(scans, tower, out, *more)) == 0
    return out


def test_an_offline_run_holds_every_epoch_the_tables_and_the_pictures(offline_run) -> None:
    records = offline_records(offline_run)
    rows, summary = rows_of(records), summary_of(records)
    lines = [json.loads(line) for line in (offline_run / "results.jsonl").read_text().splitlines()]
    assert epochs(rows) == [1, 2]
    for row, line in zip(rows, lines, strict=False):
        assert fs.flat_figures(line).items() <= row.items()
    files = next(offline_run.glob("wandb/offline-run-*/files"))
    picture = next(row["progress/path"] for row in rows if "progress/path" in row)
    assert (files / picture).read_bytes() == (offline_run / "progress.png").read_bytes()
    for split in ("val", "test"):
        evaluation = json.loads((offline_run / f"evaluation_{split}.json").read_text())
        media = next(row for row in rows if f"{split}/labels/path" in row)
        table = json.loads((files / media[f"{split}/labels/path"]).read_text())
        cells = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
        assert list(cells) == [*LABELS, "macro", "micro"]
        for label in LABELS:
            m, interval = (evaluation[k]["per_label"][label] for k in ("metrics", "intervals"))
            assert {k: cells[label][k] for k in fs.REPORT_COLUMNS} == {k: m[k] for k in fs.REPORT_COLUMNS}
            ends = [cells[label]["auc_low"], cells[label]["auc_high"]]
            assert ends == (interval["auc"] or [None, None])
        assert cells["macro"]["f1"] == evaluation["metrics"]["macro_f1"]
        for key in fs.REPORT_HEADLINES:
            ends = evaluation["intervals"][key] or [None, None]
            wanted = dict(zip((key, f"{key}_low", f"{key}_high"), [evaluation["metrics"][key], *ends], strict=True))
            assert {k: summary.get(f"{split}/{k}") for k in wanted} == wanted
        assert {f"{split}/roc_table/path", f"{split}/precision_recall_table/path"} <= set(media)
    assert summary["best_epoch"] == fs.best_epoch(lines)


def test_no_scan_leaves_the_house(offline_run, scans) -> None:
    sent = b"".join(path.read_bytes() for path in offline_run.glob("wandb/offline-run-*/**/*") if path.is_file())
    assert b"Cardiomegaly" in sent
    assert not [row["series_id"] for row in read_rows(scans) if row["series_id"].encode() in sent]
    assert sent.count(b"\x89PNG\r\n") == 1  # the curves
    kept = [r.artifact.type for r in offline_records(offline_run) if r.WhichOneof("record_type") == "artifact"]
    assert set(kept) == {"run_table"}  # no model: it would have to lie there until the run is synced
    assert "Weights & Biases stopped" not in (offline_run / "training.log").read_text()


def test_an_offline_run_is_synced_later_under_its_id(offline_run, house, tmp_path) -> None:
    (folder,) = offline_run.glob("wandb/offline-run-*")
    run_id = tracker_id(offline_run)
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": "/nowhere"})
    assert done.returncode == 0, done.stderr
    assert list(house.runs) == [run_id]
    assert epochs(house.history(run_id)) == [1, 2]
    assert house.summary(run_id)["test/macro_f1"] == summary_of(offline_records(offline_run))["test/macro_f1"]


def test_an_online_run_keeps_its_id_when_resumed_and_ends_with_its_best_model(
    house, scans, tower, tmp_path, offline_run
) -> None:
    more = ("--wandb-mode", "online", "--bootstrap", "20", "--wandb-project", "lungs")
    assert fs.main(arguments(scans, tower, tmp_path, "--epochs", "1", *more)) == 0
    (run_id,) = house.runs
    assert {a["artifactTypeName"] for a in house.artifacts} == {"run_table"}  # the model only where it is asked for
    assert run_id == tracker_id(tmp_path) != tracker_id(offline_run)
    assert epochs(house.history(run_id)) == [1]
    house.runs[run_id].update({"wandb-history.jsonl": [], "wandb-summary.json": []})  # as if killed before it was sent
    assert (
        fs.main(arguments(scans, tower, tmp_path, "--epochs", "3", "--resume", "auto", "--wandb-log-model", *more)) == 0
    )
    assert list(house.runs) == [run_id]
    rows = house.history(run_id)
    assert epochs(rows) == [1, 2, 3]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    models = [(i, a) for i, a in enumerate(house.artifacts, 1) if a["artifactTypeName"] == "model"]
    number, model = models[-1]
    assert model["artifactCollectionName"] == f"model-{run_id}"
    assert house.files[f"a{number}/best_model.pth"] == (tmp_path / "best_model.pth").read_bytes()
    best = fs.load_checked(tmp_path / "best_model.pth", fs.MODEL_KIND)
    assert json.loads(model["metadata"]) == {"epoch": best["epoch"], "macro_f1": best["metrics"]["macro_f1"]}
    assert {alias["alias"] for alias in model["aliases"]} == {"best", f"epoch-{best['epoch']}", "latest"}
    assert f"{run_id}/{house.summary(run_id)['progress']['path']}" in house.files
    config = json.loads(house.RunResumeStatus({"name": run_id})["model"]["bucket"]["config"])
    assert config["epochs"]["value"] == 3
    assert "Weights & Biases stopped" not in (tmp_path / "training.log").read_text()


# resuming


def test_after_a_kill_the_server_gets_each_epoch_once_whether_it_had_it_or_not(house, tmp_path) -> None:
    for lines in (LINES[:1], LINES[:3], LINES[:2]):  # the second time two are missing, the third time one too many
        with start(tmp_path) as tracker:
            tracker.record(lines)
    assert epochs(house.history("abc")) == [1, 2, 3]
    assert house.history("abc")[-1]["Hernia/auc"] == 3 / 8


def test_every_offline_part_of_a_resumed_run_is_complete_by_itself_and_has_the_same_id(tmp_path) -> None:
    for lines in (LINES[:1], LINES):
        with start(tmp_path) as tracker:
            tracker.record(lines[:1])
            tracker.record(lines)
        records = offline_records(tmp_path)
        assert [row["Hernia/auc"] for row in rows_of(records)] == [e / 8 for e in range(1, len(lines) + 1)]
        assert {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"} == {"abc"}


# troubles


def test_without_the_package_the_tracker_is_off_and_says_so(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with start(tmp_path) as tracker:
        assert tracker.run is None
        tracker.record(LINES)
        tracker.show(lambda wandb: {}, {})
        tracker.keep_model(tmp_path / "nowhere.pth", {})
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_key_it_is_offline_and_nobody_is_asked(mode, tmp_path, capsys) -> None:
    with start(tmp_path, mode) as tracker:
        assert tracker.run.offline
    assert "wandb sync" in capsys.readouterr().out


def test_the_mode_follows_the_environment_and_the_key(monkeypatch, tmp_path) -> None:
    assert fs.wandb_mode("auto") == fs.wandb_mode("online") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1 login user password {'a' * 40}\n")
    assert fs.wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    assert fs.wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert fs.wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert fs.wandb_mode("auto") == "disabled"
    assert fs.wandb_mode("online") == "online"
    assert start(tmp_path).run is None


def test_a_key_without_a_network_leaves_the_run_offline_within_seconds(monkeypatch, tmp_path, capsys) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    monkeypatch.setattr(fs.Tracker, "PATIENCE", 8.0)
    opened, real = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **how: opened.append(how) or real(**how))
    with start(tmp_path) as tracker:
        assert tracker.run.offline
        tracker.record(LINES)
    assert [how["mode"] for how in opened] == ["offline"]
    assert epochs(rows_of(offline_records(tmp_path))) == [1, 2, 3]
    assert "Weights & Biases is not online" in capsys.readouterr().err


def test_a_server_that_accepts_and_never_answers_leaves_the_run_offline(house, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(fs.Tracker, "PATIENCE", 1.0)
    house.hangs.set()
    with start(tmp_path) as tracker:
        assert tracker.run.offline
        tracker.record(LINES)
    assert epochs(rows_of(offline_records(tmp_path))) == [1, 2, 3]
    assert "Weights & Biases is not online" in capsys.readouterr().err


def test_a_server_that_stops_answering_holds_up_neither_epochs_nor_the_end(house, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(fs.Tracker, "PATIENCE", 4.0)
    (tmp_path / "model.pth").write_bytes(b"weights")
    with start(tmp_path) as tracker:
        house.hangs.set()
        monkeypatch.setattr(fs.Tracker, "PATIENCE", 2.5)
        tracker.record(LINES)
        assert tracker.works
        tracker.keep_model(tmp_path / "model.pth", {"epoch": 1})
        assert not tracker.works
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
    assert not tracker.works
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


def test_an_action_has_its_time_and_no_more() -> None:
    never = __import__("threading").Event()
    assert fs.within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        fs.within(5, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
        fs.within(0.01, never.wait)
    never.set()


def test_only_the_main_process_tracks(tmp_path) -> None:
    assert fs.start_wandb("p", "offline", {}, tmp_path, is_main=False).run is None
    assert start(tmp_path, "disabled").run is None
    assert not list(tmp_path.iterdir())


def test_curves_are_thinned_but_keep_their_ends() -> None:
    rng = np.random.default_rng(0)
    targets, probabilities = (rng.random((3000, 1)) < 0.3).astype(float), rng.random((3000, 1))
    scored = fs.evaluate(targets, probabilities, ["a"], 0.5, np.arange(3000), resamples=0)
    e = {**scored, "split": "val", "labels": ["a"], "cuts": [0.5], "targets": targets, "probabilities": probabilities}

    class Recorder:
        class plot:
            @staticmethod
            def line_series(xs, ys, keys, title, xname):
                return xs, ys, keys

        Table = dict

    media = fs.split_media(e, Recorder, points=100)
    (xs,), (ys,), keys = media["val/roc"]
    assert keys == ["a"]
    assert len(xs) == len(ys) == 100
    assert (xs[0], ys[0], xs[-1], ys[-1]) == (0, 0, 1, 1)
    assert len(media["val/labels"]["columns"]) == len(media["val/labels"]["data"][0])
