"""Room 13, end to end: train, resume, predict and read back what was written."""

import csv
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

import finetune_siglip
import phantoms
from finetune_siglip import (
    MODEL_KIND,
    RUN_KIND,
    classifier_from,
    compute_metrics,
    crossfit_thresholds,
    load_checked,
    main,
    read_evaluation,
    tune_thresholds,
)
from helpers import TINY_SIGLIP

REAL = Path(__file__).parents[2] / "shared" / "data" / "ct"
LABELS = ["Cardiomegaly", "Pleural effusion", "Lung nodule"]


def arguments(scans, tower, out, *more, labels=LABELS):
    return [
        "--csv", str(scans), "--pretrained", str(tower), "--label-columns", *labels, "--output-dir", str(out),
        "--num-slices", "4", "--batch-size", "4", "--num-workers", "0", "--wandb-mode", "disabled", "--lr", "1e-3",
        *more,
    ]  # fmt: skip


def prediction_arguments(scans, model, out, *more, labels=LABELS):
    return [
        "--csv", str(scans), "--test-only", str(model), "--label-columns", *labels, "--output-dir", str(out),
        "--num-workers", "0", "--batch-size", "4", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("better", [True, False])
def test_a_soup_is_the_mean_of_the_best_epochs_and_kept_only_where_it_is_better(
    finished, scans, tower, tmp_path, monkeypatch, better
):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = load_checked(out / "best_model.pth", MODEL_KIND)
    monkeypatch.setattr(finetune_siglip, "comparison_key", lambda *_: (float("inf") if better else -float("inf"),))
    assert main(arguments(scans, tower, out, "--epochs", "3", *FINISHED, "--resume", "auto", "--soup")) == 0
    after = load_checked(out / "best_model.pth", MODEL_KIND)
    epochs = [load_checked(path, MODEL_KIND)["model"] for path in sorted(out.glob("checkpoint_epoch_*.pth"))]
    assert len(epochs) == 3
    assert ("averaged_epochs" in after) == better
    for name, kept in after["model"].items():
        mean = np.mean([epoch[name].double().numpy() for epoch in epochs], axis=0)
        np.testing.assert_allclose(kept.numpy(), mean if better else before["model"][name], rtol=1e-6, atol=1e-8)
    assert (better and after["metrics"] != before["metrics"]) or (not better and after["metrics"] == before["metrics"])


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


FINISHED = ["--use-ema", "--gradient-accumulation-steps", "2", "--scheduler", "cosine", "--warmup", "2"]


@pytest.fixture(scope="module")
def finished(scans, tower, tmp_path_factory):
    """A finished run of three epochs with averaged weights, accumulation and a short last window."""
    out = tmp_path_factory.mktemp("run")
    assert main(arguments(scans, tower, out, "--epochs", "3", *FINISHED)) == 0
    return out


def test_a_run_leaves_what_it_promises(finished):
    names = {file.name for file in finished.iterdir()}
    assert {"best_model.pth", "last.ckpt", "results.jsonl", "training.log", "progress.png"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    lines = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {"lr", "train_loss", "val_loss", "grad_norm", "macro_f1", "micro_f1", "macro_auc"} <= set(line)
        assert set(line["per_label"]) == set(LABELS)
        assert {"accuracy", "precision", "recall", "f1", "auc"} <= set(line["per_label"]["Lung nodule"])
    best = max(lines, key=lambda line: (line["macro_f1"], -line["epoch"]))
    content = load_checked(finished / "best_model.pth", MODEL_KIND)
    assert content["epoch"] == best["epoch"]
    assert content["labels"] == LABELS
    assert content["metrics"]["macro_f1"] == best["macro_f1"]


def test_a_run_says_what_it_was_made_from(finished, scans, tower, tmp_path):
    """Facts in run.json that anybody can check, at the head of the log, and again with a prediction."""
    facts = json.loads((finished / "run.json").read_text())["Run, training"]
    for name, path in (("table SHA-256", scans), ("script SHA-256", Path(finetune_siglip.__file__))):
        assert facts[name] == hashlib.sha256(path.read_bytes()).hexdigest()
    content = torch.load(finished / "best_model.pth", weights_only=True)
    assert facts["checkpoint digest"] == content["digest"]
    assert (facts["pretrained"], facts["pretrained digest"]) == tuple(content["origin"].values())
    assert facts["command"] == "finetune_siglip.py " + shlex.join(
        arguments(scans, tower, finished, "--epochs", "3", *FINISHED)
    )
    assert (facts["version"], facts["torch"]) == (finetune_siglip.__version__, torch.__version__.split("+")[0])
    assert {"date", "device", "precision", "threads", "Python", "transformers"} <= set(facts)
    lines = (finished / "training.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ +\S", line) for line in lines)
    first_epoch = next(i for i, line in enumerate(lines) if "epoch   1/3" in line)
    for name in ("date", "command", "table SHA-256", "pretrained digest", "version", "script SHA-256", "precision"):
        assert any(line.endswith(f"{name}: {facts[name]}") for line in lines[:first_epoch])
    assert main(prediction_arguments(scans, finished / "best_model.pth", tmp_path)) == 0
    predicted = json.loads((tmp_path / "run.json").read_text())["Run, prediction"]
    for name in ("checkpoint digest", "pretrained digest", "table SHA-256", "script SHA-256"):
        assert predicted[name] == facts[name]


def test_the_console_has_a_line_an_epoch_one_table_and_nothing_twice(scans, tower, tmp_path, capsys):
    assert main(arguments(scans, tower, tmp_path, "--epochs", "2", "--lr", "1e-6")) == 0
    said, warned = capsys.readouterr()
    lines, results = said.splitlines(), (tmp_path / "results.jsonl").read_text().splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    for number, (line, figures) in enumerate(zip(epochs, map(json.loads, results), strict=True), start=1):
        auc, ap, f1 = (figures[f"macro_{name}"] for name in ("auc", "average_precision", "f1"))
        assert f"AUROC {auc:.3f}  AP {ap:.3f}  F1 {f1:.3f}  rate 1.0e-06" in line
        assert f"loss {figures['train_loss']:.3f}, val {figures['val_loss']:.3f}" in line
        assert f"checkpoint_epoch_{number:03d}.pth" in line
    best = torch.load(tmp_path / "best_model.pth", weights_only=True)["epoch"]
    assert [line.endswith("* best") for line in epochs][best - 1]
    assert len([line for line in lines if line.startswith("label ")]) == 1
    assert "best of 2 epochs by macro_f1: epoch" in said
    told = [line for line in lines if "─" not in line]
    assert len(told) == len(set(told))
    log = (tmp_path / "training.log").read_text()
    assert len(re.findall("label +pos/known", log)) == 2 + 2  # every epoch, and both splits at the end
    assert warned.count("no validation scan is called positive") <= 1


def test_validation_figures_are_those_of_scikit_learn_on_the_saved_model(finished, scans, tmp_path):
    """The saved model, run through prediction, gives the very scores that ranked it: averaged weights included."""
    assert main(prediction_arguments(scans, finished / "best_model.pth", tmp_path, "--test-split", "val")) == 0
    assert "val split" in (tmp_path / "report.html").read_text()
    predicted = read_rows(tmp_path / "test_predictions.csv")
    truth = [row for row in read_rows(scans) if row["split"] == "val"]
    assert [row["id"] for row in predicted] == [row["series_id"] for row in truth]
    targets = np.array([[int(row[label]) for label in LABELS] for row in truth])
    probabilities = np.array([[float(row[f"{label}_prob"]) for label in LABELS] for row in predicted])
    calls = np.array([[int(row[f"{label}_pred"]) for label in LABELS] for row in predicted])
    assert (calls == (probabilities >= 0.5)).all()
    metrics = load_checked(finished / "best_model.pth", MODEL_KIND)["metrics"]
    for i, label in enumerate(LABELS):
        if 0 < targets[:, i].sum() < len(targets):
            assert metrics["per_label"][label]["auc"] == pytest.approx(
                roc_auc_score(targets[:, i], probabilities[:, i])
            )
        if targets[:, i].any() or calls[:, i].any():
            expected = f1_score(targets[:, i], calls[:, i], zero_division=0)
            assert metrics["per_label"][label]["f1"] == pytest.approx(expected)


def test_predicting_needs_neither_pretrained_weights_nor_filled_labels(finished, scans, tmp_path):
    rows = read_rows(scans)
    table = scans.parent / "unlabelled.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["series_id", "split", "img_path"])
        writer.writerows([row["series_id"], row["split"], row["img_path"]] for row in rows)
    for name, source in (("with", scans), ("without", table)):
        assert main(prediction_arguments(source, finished / "best_model.pth", tmp_path / name)) == 0
    with_labels, without = ((tmp_path / n / "test_predictions.csv").read_bytes() for n in ("with", "without"))
    assert with_labels == without
    assert len(read_rows(tmp_path / "with" / "test_predictions.csv")) == 5  # split test


def test_a_checkpoint_alone_makes_the_model(finished):
    model = classifier_from(load_checked(finished / "best_model.pth", MODEL_KIND)).eval()
    with torch.no_grad():
        assert model(torch.full((1, 1, 4, 16, 16), -800, dtype=torch.int16)).shape == (1, 3)


def test_two_runs_are_identical_whatever_the_number_of_workers(scans, tower, tmp_path):
    others = torch.multiprocessing.active_children()
    for name, workers in (("a", "0"), ("b", "2")):
        assert main(arguments(scans, tower, tmp_path / name, "--epochs", "2", "--num-workers", workers)) == 0
        assert not {*torch.multiprocessing.active_children()} - {*others}  # in a notebook they would stay
    first, second = ((tmp_path / name / "results.jsonl").read_bytes() for name in ("a", "b"))
    assert first == second
    states = [load_checked(tmp_path / name / "last.ckpt", RUN_KIND) for name in ("a", "b")]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name


def test_another_seed_gives_another_run(scans, tower, tmp_path):
    for seed in ("1", "2"):
        assert main(arguments(scans, tower, tmp_path / seed, "--epochs", "1", "--seed", seed)) == 0
    assert (tmp_path / "1" / "results.jsonl").read_bytes() != (tmp_path / "2" / "results.jsonl").read_bytes()


@pytest.mark.parametrize("loss", ["focal", "balanced"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_loss_and_optimiser_trains(scans, tower, tmp_path, loss, optimizer):
    more = (
        "--epochs",
        "1",
        "--loss",
        loss,
        "--optimizer",
        optimizer,
        "--slice-pooling",
        "max",
        "--freeze-up-to",
        "all",
    )
    assert main(arguments(scans, tower, tmp_path, *more)) == 0
    assert np.isfinite(json.loads((tmp_path / "results.jsonl").read_text())["train_loss"])


def test_mixed_precision_trains_on_the_cpu(scans, tower, tmp_path):
    assert main(arguments(scans, tower, tmp_path, "--epochs", "1", "--amp")) == 0


def test_early_stopping_ends_the_run(scans, tower, tmp_path):
    more = ("--epochs", "50", "--early-stopping-patience", "1", "--freeze-up-to", "all", "--lr", "1e-9")
    assert main(arguments(scans, tower, tmp_path, *more)) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_epoch_of_a_basic_run_is_one_that_has_learned(tmp_path, seed, capsys):
    """140 phantoms, each finding in 15 %: no probability reaches 0.5 for long, so F1 is 0 while AUROC rises."""
    table = phantoms.write_dataset(tmp_path, 140, 60, 0, seed=seed, prevalence=0.15)
    argv = ["--csv", table, "--pretrained", TINY_SIGLIP, "--label-columns", *phantoms.FINDINGS, "--num-slices", "8",
            "--batch-size", "16", "--lr", "1e-4", "--epochs", "30", "--output-dir", tmp_path / "run", "--seed", seed,
            "--wandb-mode", "disabled", "--num-workers", "0"]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    best = lines[torch.load(tmp_path / "run" / "best_model.pth", weights_only=True)["epoch"] - 1]
    assert best["macro_auc"] >= max(line["macro_auc"] for line in lines) - 0.01
    assert best["macro_auc"] > lines[0]["macro_auc"] + 0.05
    if any(line["micro_precision"] is None for line in lines):
        assert capsys.readouterr().err.count("no validation scan is called positive so far") == 1


def test_a_run_is_not_overwritten_by_accident(finished, scans, tower, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "copy")
    before = (out / "last.ckpt").read_bytes()
    assert main(arguments(scans, tower, out, "--epochs", "1")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "last.ckpt").read_bytes() == before
    assert main(arguments(scans, tower, out, "--epochs", "1", "--overwrite")) == 0
    assert len((out / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--label-columns", *LABELS[::-1]], "order"),
        (["--label-columns", *LABELS[:2]], "Lung nodule"),
        (["--label-columns", *LABELS, "Emphysema"], "Emphysema"),
        (["--test-split", "unheard"], "unheard"),
        (["--csv", "nowhere.csv"], "nowhere.csv"),
        (["--test-only", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_a_wrong_prediction_is_refused_in_one_line(finished, scans, tmp_path, capsys, change, named):
    argv = prediction_arguments(scans, finished / "best_model.pth", tmp_path / "out")
    assert main([*argv, *change]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert named in error
    assert not (tmp_path / "out").exists()


def test_every_data_error_is_told_at_once_with_its_line(scans, tower, tmp_path, capsys):
    lines = scans.read_text().splitlines()
    lines[3] = lines[3].replace("volumes/", "elsewhere/")
    lines[5] = lines[5].rsplit(",", 1)[0] + ",2"
    lines[8] = lines[7]
    table = scans.parent / "wrong.csv"
    table.write_text("\n".join(lines) + "\n")
    last = lines[0].split(",")[-1]
    assert main(arguments(table, tower, tmp_path / "out", labels=[*LABELS, last])) == 2
    told = capsys.readouterr().err
    for line in (4, 6, 9):
        assert f"line {line}:" in told
    assert all(line.startswith("error: ") for line in told.strip().splitlines())


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans at {REAL}")
def test_real_scans_train_two_epochs_and_predict(tower, tmp_path):
    table = tmp_path / "real.csv"
    rows = [
        ("covid_p001", "train", 1, 0),
        ("cap001", "train", 0, 1),
        ("normal001", "val", 1, 0),
        ("again", "test", 0, ""),
    ]
    paths = {"again": "cap001"}
    text = "series_id,split,img_path,Consolidation,Lung opacity\n"
    for name, split, *labels in rows:
        target = tmp_path / f"{name}.npz"
        shutil.copyfile(REAL / f"{paths.get(name, name)}.npz", target)
        text += ",".join([name, split, str(target), *map(str, labels)]) + "\n"
    table.write_text(text)
    labels = ["Consolidation", "Lung opacity"]
    assert main(arguments(table, tower, tmp_path / "out", "--epochs", "2", labels=labels)) == 0
    assert main(prediction_arguments(table, tmp_path / "out" / "best_model.pth", tmp_path / "new", labels=labels)) == 0
    (row,) = read_rows(tmp_path / "new" / "test_predictions.csv")
    assert row["id"] == "again"
    assert 0 < float(row["Consolidation_prob"]) < 1


def test_phantom_labels_are_among_the_18_findings(scans):
    header = scans.read_text().splitlines()[0].split(",")
    assert set(header[3:]) <= set(phantoms.CT_RATE_LABELS)
    assert len(header[3:]) >= 8


def test_a_cache_changes_no_figure(scans, tower, tmp_path):
    for name, more in (("plain", ()), ("cached", ("--cache-dir", str(tmp_path / "cache")))):
        assert main(arguments(scans, tower, tmp_path / name, "--epochs", "2", *more)) == 0
    assert any((tmp_path / "cache").iterdir())
    plain, cached = ((tmp_path / name / "results.jsonl").read_bytes() for name in ("plain", "cached"))
    assert plain == cached


def test_augmentation_is_on_by_default_and_changes_training_only(scans, tower, tmp_path):
    for name, more in (("light", ()), ("none", ("--augment", "none"))):
        assert main(arguments(scans, tower, tmp_path / name, "--epochs", "1", "--lr", "1e-12", *more)) == 0
    light, none = (json.loads((tmp_path / name / "results.jsonl").read_text()) for name in ("light", "none"))
    assert light["train_loss"] != none["train_loss"]
    assert light["val_loss"] == pytest.approx(none["val_loss"], rel=1e-6)


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.fixture
def going_bad(scans, tmp_path, monkeypatch):
    """The table, and the ids of a training and a validation scan that are damaged once the check has passed them."""
    folder = shutil.copytree(scans.parent, tmp_path / "broken")
    rows = read_rows(folder / scans.name)
    broken = [[row for row in rows if row["split"] == split][2] for split in ("train", "val")]
    check = finetune_siglip.check_data

    def check_then_damage(*arguments, **more):
        check(*arguments, **more)
        for row in broken:
            damage(folder / row["img_path"])

    monkeypatch.setattr("finetune_siglip.check_data", check_then_damage)
    monkeypatch.setattr("finetune_siglip.READ_DELAYS", (0.0, 0.0))
    return folder / scans.name, {row["split"]: row["series_id"] for row in broken}


def test_a_scan_that_goes_bad_stops_the_run_by_name_with_its_state_saved(going_bad, tower, tmp_path, capsys):
    table, broken = going_bad
    assert main(arguments(table, tower, tmp_path / "out", "--epochs", "1")) == 2
    assert any(name in capsys.readouterr().err for name in broken.values())
    assert (tmp_path / "out" / "last.ckpt").exists()


def test_a_scan_that_is_bad_from_the_start_is_found_by_the_check(scans, tower, tmp_path, capsys):
    folder = shutil.copytree(scans.parent, tmp_path / "broken")
    row = read_rows(scans)[2]
    damage(folder / row["img_path"])
    more = ("--epochs", "1", "--intensity", "hu")
    assert main(arguments(folder / scans.name, tower, tmp_path / "out", *more)) == 2
    assert row["series_id"] in capsys.readouterr().err
    assert not (tmp_path / "out" / "last.ckpt").exists()


def test_scans_that_go_bad_are_left_out_and_listed_when_asked(going_bad, tower, tmp_path):
    table, broken = going_bad
    assert main(arguments(table, tower, tmp_path / "out", "--epochs", "1", "--on-bad-volume", "skip")) == 0
    assert {row["series_id"] for row in read_rows(tmp_path / "out" / "skipped.csv")} == set(broken.values())
    (line,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert line["per_label"]["Lung nodule"]["n_known"] == 5
    evaluation = json.loads((tmp_path / "out" / "evaluation_val.json").read_text())
    assert broken["val"] not in json.dumps(evaluation)


def test_tuned_thresholds_are_stored_and_used(scans, tower, tmp_path):
    assert main(arguments(scans, tower, tmp_path, "--epochs", "1", "--threshold", "auto")) == 0
    content = load_checked(tmp_path / "best_model.pth", MODEL_KIND)
    assert len(set(content["thresholds"])) > 1
    trained = read_evaluation(tmp_path / "evaluation_val.json")
    for out in (None, tmp_path / "val"):  # after training, and predicted anew
        if out:
            more = ("--threshold", "auto", "--test-split", "val")
            assert main(prediction_arguments(scans, tmp_path / "best_model.pth", out, *more)) == 0
        e = read_evaluation((out or tmp_path) / "evaluation_val.json")
        known = e["targets"], e["probabilities"]
        assert e["cuts"].tolist() == tune_thresholds(*known).tolist() == content["thresholds"]
        honest = crossfit_thresholds(*known, e["patients"])
        assert e["metrics"] == compute_metrics(*known, LABELS, honest) == trained["metrics"]
        assert e["apparent"] == compute_metrics(*known, LABELS, e["cuts"])
    assert read_evaluation(tmp_path / "evaluation_test.json")["tuned_here"] is None
    more = ("--threshold", "auto", "--test-output", "again.csv")
    assert main(prediction_arguments(scans, tmp_path / "best_model.pth", tmp_path / "test", *more)) == 0
    for row in read_rows(tmp_path / "test" / "again.csv"):
        for label, threshold in zip(LABELS, content["thresholds"], strict=True):
            assert int(row[f"{label}_pred"]) == (float(row[f"{label}_prob"]) >= threshold)


def test_the_scans_of_a_patient_are_averaged_after_training_as_in_prediction(scans, tower, tmp_path):
    table = scans.parent / "pairs.csv"
    lines = scans.read_text().splitlines()
    pairs = [f"{line},pair {i // 2 if ',val,' in line else f'of {i}'}" for i, line in enumerate(lines[1:])]
    table.write_text("\n".join([f"{lines[0]},patient_id", *pairs]) + "\n")
    more = ("--epochs", "1", "--aggregate", "patient", "--threshold", "auto", "--threshold-objective", "youden")
    assert main(arguments(table, tower, tmp_path, *more)) == 0
    e = read_evaluation(tmp_path / "evaluation_val.json")
    by_patient = {}
    for patient, row in zip(e["patients"], e["probabilities"].tolist(), strict=True):
        by_patient.setdefault(patient, []).append(row)
    assert max(map(len, by_patient.values())) == 2
    assert all(rows[0] == row for rows in by_patient.values() for row in rows)
    assert e["tuned_here"] == "youden"
    assert e["cuts"].tolist() == tune_thresholds(e["targets"], e["probabilities"], "youden").tolist()


@pytest.mark.pictures
def test_the_check_reports_and_draws_without_training(scans, tmp_path, capsys):
    argv = ["--csv", str(scans), "--label-columns", *LABELS, "--output-dir", str(tmp_path), "--check-data"]
    assert main([*argv, "--num-slices", "8", "--image-size", "32"]) == 0
    assert (tmp_path / "data_check.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "train: 17 scans" in said
    assert "--orientation SPL --intensity hu" in said


@pytest.mark.pictures
def test_a_report_is_made_again_from_the_files_alone(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "report.html").unlink()
    assert main(["--report", str(folder)]) == 0
    assert "macro AUROC" in (folder / "report.html").read_text()
