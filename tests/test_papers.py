"""Room 12: the files a person reads, read back independently."""

import csv
import json
import math

import numpy as np
import pytest

import finetune_siglip as fs


def test_results_lines_are_strict_json_and_a_resumed_epoch_replaces_what_followed(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    for epoch in (1, 2, 3, 2):
        fs.append_result(path, {"epoch": epoch, "val_loss": np.float32(0.5) / epoch, "macro_auc": None})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1] == {"epoch": 2, "val_loss": 0.25, "macro_auc": None}
    before = path.read_bytes()
    with pytest.raises(ValueError):
        fs.append_result(path, {"epoch": 3, "val_loss": math.nan})
    assert path.read_bytes() == before


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
