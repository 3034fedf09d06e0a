"""Room 12: the files a person reads, read back independently."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import finetune_siglip as fs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_round_trip_ids_numbers_and_decisions(tmp_path, dtype) -> None:
    ids = ["007", "NA", "1e5", 'quote " and, comma', "línea", " spaces "]
    rng = np.random.default_rng(0)
    probabilities = rng.random((6, 2)).astype(dtype)
    probabilities[0] = 0.7, 0.3
    thresholds = np.array([0.7, 0.3])
    fs.write_predictions(tmp_path / "p.csv", ids, probabilities, thresholds, ["Lung nodule", "Emphysema"])
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "Lung nodule_prob", "Lung nodule_pred", "Emphysema_prob", "Emphysema_pred"]
    assert [row[0] for row in rows] == ids
    read = np.array([[float(row[1]), float(row[3])] for row in rows])
    assert np.array_equal(read, probabilities.astype(np.float64))
    assert [[row[2], row[4]] for row in rows] == [[str(int(c)) for c in row] for row in read >= thresholds]


def test_progress_picture_is_drawn_from_any_number_of_epochs(tmp_path) -> None:
    for n in (0, 1, 4):
        results = [
            {"epoch": i, "train_loss": 1 / (i + 1), "val_loss": 1.0, "macro_f1": i / 9, "macro_auc": None, "lr": 1e-4}
            for i in range(n)
        ]
        fs.plot_progress(tmp_path, results)
        assert (tmp_path / "progress.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def independent_reader(path) -> dict:
    """Grades as the challenge does: by name, probabilities cut at 0.5."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(content) == {"name", "type", "version", "predictions"}
    names = [entry["input_image_name"] for entry in content["predictions"]]
    assert len(set(names)) == len(names)
    return {entry["input_image_name"]: entry["probabilities"] for entry in content["predictions"]}


def test_challenge_json_carries_tuned_thresholds_to_a_grader_that_cuts_at_one_half(tmp_path) -> None:
    labels = ["Lung nodule", "Emphysema", "Cardiomegaly", "Effusion"]
    rng = np.random.default_rng(0)
    probabilities, targets = rng.random((200, 4)).astype(np.float32), rng.random((200, 4)) < 0.3
    thresholds = np.array([0.03, 0.5, float(probabilities[7, 2]), 0.97])
    probabilities[0], probabilities[1], probabilities[2] = 0, 1, np.nextafter(np.float32(0.03), np.float32(0))
    ids = ["a.nii.gz", "b.mha", "c.npz", "007", "d.nii.gz.npz"] + [f"scan_{i}" for i in range(195)]
    fs.write_predictions(tmp_path / "x.json", ids, probabilities, thresholds, labels)
    read = independent_reader(tmp_path / "x.json")
    assert list(read)[:5] == ["a", "b", "c", "007", "d.nii.gz"]
    assert all(list(row) == labels for row in read.values())
    graded = np.array([list(row.values()) for row in read.values()])
    assert ((graded >= 0) & (graded <= 1)).all()
    assert np.array_equal(graded >= 0.5, probabilities.astype(np.float64) >= thresholds)
    for i in range(4):
        assert roc_auc_score(targets[:, i], graded[:, i]) == roc_auc_score(targets[:, i], probabilities[:, i])
        order = np.argsort(probabilities[:, i])
        assert ((np.diff(graded[order, i]) > 0) == (np.diff(probabilities[order, i]) > 0)).all()


@pytest.mark.parametrize("threshold", [0.0, 1.0, 0.5])
def test_extreme_thresholds_move_to_one_half_too(threshold: float) -> None:
    probabilities = np.array([[0.0], [1e-12], [0.5], [np.nextafter(1, 0)], [1.0]])
    moved = fs.move_thresholds_to_half(probabilities, threshold)
    assert np.array_equal(moved >= 0.5, probabilities >= threshold)
    assert ((moved >= 0) & (moved <= 1)).all()


def test_thresholds_are_read_by_label_and_every_wrong_one_is_named(tmp_path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"b": 0.25, "a": 1, "other": 7}))
    assert fs.read_thresholds(path, ["a", "b"]).tolist() == [1, 0.25]
    path.write_text(json.dumps({"thresholds": {"b": 0.25, "a": 1}}))
    assert fs.read_thresholds(path, ["a", "b"]).tolist() == [1, 0.25]
    for content in ('{"a": 1.5, "b": "x"}', "[1, 2]", '{"a": NaN, "b": true}'):
        path.write_text(content)
        with pytest.raises(fs.BadInput) as caught:
            fs.read_thresholds(path, ["a", "b"])
        assert [message.split(" for ")[1][0] for message in caught.value.messages] == ["a", "b"]
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(fs.BadInput, match="can't be read"):
            fs.read_thresholds(missing, ["a"])
