"""Room 10: metrics, intervals and thresholds against scikit-learn, plain loops and hand-worked examples."""

import logging
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

import finetune_siglip as fs
from helpers import CHEST

LABELS = ["Lung nodule", "Emphysema", "Cardiomegaly", "Never", "Always", "Unseen"]


def scans(n: int = 400, seed: int = 0, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Targets with unknown entries and labels without positives, negatives or any known entry; tied scores."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, len(LABELS))) < [0.1, 0.3, 0.6, 0, 1, 0.5]).astype(np.float32)
    targets[rng.random(targets.shape) < 0.15] = np.nan
    targets[:, -1] = np.nan
    probabilities = 1 / (1 + np.exp(-(rng.normal(size=targets.shape) + np.nan_to_num(targets) - 0.5)))
    return targets, probabilities.round(2) if ties else probabilities


def sklearn_figures(y: np.ndarray, p: np.ndarray, threshold: float) -> dict:
    """The same figures by scikit-learn; those it leaves undefined are None."""
    y = y.astype(np.float64)
    called, (tn, fp, fn, tp) = p >= threshold, sk.confusion_matrix(y, p >= threshold, labels=[0, 1]).ravel()
    both = 0 < y.sum() < len(y)
    return {
        "accuracy": sk.accuracy_score(y, called),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called) if both else None,
        "precision": sk.precision_score(y, called) if tp + fp else None,
        "recall": sk.recall_score(y, called) if tp + fn else None,
        "specificity": sk.recall_score(y, called, pos_label=0) if tn + fp else None,
        "f1": sk.f1_score(y, called) if tp + fp + fn else None,
        "auc": sk.roc_auc_score(y, p) if both else None,
        "average_precision": sk.average_precision_score(y, p) if y.any() else None,
        "brier": sk.brier_score_loss(y, p),
        "prevalence": y.mean(),
    }


def assert_same(ours: float | None, reference: float | None, what: str) -> None:
    assert (ours is None) == (reference is None), f"{what}: {ours} against {reference}"
    assert ours is None or abs(ours - reference) <= 1e-12, f"{what}: {ours} against {reference}"


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("threshold", [0.5, 0.83])
def test_every_figure_equals_scikit_learn(ties: bool, threshold: float) -> None:
    targets, probabilities = scans(ties=ties)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fs.compute_metrics(targets, probabilities, LABELS, threshold)
    reference = {}
    for i, label in enumerate(LABELS[:-1]):
        known = np.isfinite(targets[:, i])
        reference[label] = sklearn_figures(targets[known, i], probabilities[known, i], threshold)
        assert ours["per_label"][label]["n_known"] == known.sum()
        assert ours["per_label"][label]["n_positive"] == targets[known, i].sum()
        for name, value in reference[label].items():
            assert_same(ours["per_label"][label][name], value, f"{label} {name}")
    known = np.isfinite(targets)
    for name, value in sklearn_figures(targets[known], probabilities[known], threshold).items():
        assert_same(ours[f"micro_{name}"], value, f"micro {name}")
        defined = [row[name] for row in reference.values() if row[name] is not None]
        assert_same(ours[f"macro_{name}"], np.mean(defined), f"macro {name}")
        assert ours["labels_averaged"][name] == len(defined)
    assert ours["accuracy"] == ours["micro_accuracy"]


def test_a_label_or_a_table_without_known_entries_is_undefined_not_zero() -> None:
    targets, probabilities = scans()
    unseen = fs.compute_metrics(targets, probabilities, LABELS, 0.5)["per_label"]["Unseen"]
    assert unseen.pop("n_known") == unseen.pop("n_positive") == 0
    assert set(unseen.values()) == {None}
    empty = fs.compute_metrics(np.empty((0, 2)), np.empty((0, 2)), ["a", "b"], 0.5)
    assert empty["macro_f1"] is None
    assert empty["labels_averaged"]["f1"] == 0


def test_thresholds_can_differ_by_label_and_by_scan_and_equality_is_positive() -> None:
    targets, probabilities = np.array([[1, 0], [0, 1]]), np.array([[0.3, 0.7], [0.3, 0.7]])
    per_label = fs.compute_metrics(targets, probabilities, ["a", "b"], np.array([0.3, 0.71]))["per_label"]
    assert (per_label["a"]["recall"], per_label["a"]["specificity"]) == (1, 0)
    assert (per_label["b"]["recall"], per_label["b"]["specificity"]) == (0, 1)
    per_scan = fs.compute_metrics(targets, probabilities, ["a", "b"], np.array([[0.2, 0.8], [0.4, 0.6]]))
    assert per_scan["accuracy"] == 1


def test_a_probability_that_is_not_finite_stops_with_its_label() -> None:
    with pytest.raises(fs.Diverged, match=r"row 1 .* b:"):
        fs.compute_metrics(np.zeros((2, 2)), np.array([[0.1, 0.1], [0.1, math.nan]]), ["a", "b"], 0.5)


@pytest.mark.parametrize(
    ("called", "crg"),
    [  # X = 4 x 2 = 8 entries, A = 2 positives: r = 6/4 = 1.5, U = 3, CRG = 3 / (6 - s)
        ([[0, 0]] * 4, 1 / 3),  # s = -1.5 * 2 = -3
        ([[1, 1]] * 4, 1 / 3),  # s = 1.5 * 2 - 6 = -3
        ([[1, 0], [0, 1], [0, 0], [0, 0]], 1.0),  # s = 1.5 * 2 = 3
        ([[1, 0], [0, 0], [1, 0], [0, 0]], 3 / 7),  # TP 1, FN 1, FP 1: s = 1.5 - 1.5 - 1 = -1
        ([[1, 0], [0, 1], [1, 1], [0, 0]], 3 / 5),  # TP 2, FP 2: s = 3 - 2 = 1
    ],
)
def test_crg_equals_examples_worked_by_hand(called: list, crg: float) -> None:
    targets = np.array([[1, 0], [0, 1], [0, 0], [0, 0]])
    metrics = fs.compute_metrics(targets, np.array(called) * 0.8 + 0.1, ["a", "b"], 0.5)
    assert metrics["crg"] == metrics["micro_crg"] == pytest.approx(crg, abs=1e-15)


def test_calibration_error_equals_a_plain_loop() -> None:
    targets, probabilities = scans(ties=False)
    y, p = (a[np.isfinite(targets[:, 0]), 0] for a in (targets, probabilities))
    error = 0.0
    for b in range(10):
        inside = (p >= b / 10) & (p < (b + 1) / 10)
        if inside.any():
            error += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    assert fs.compute_metrics(targets, probabilities, LABELS, 0.5)["per_label"][LABELS[0]]["ece"] == pytest.approx(
        error
    )


def test_the_log_table_shows_every_label_and_dashes_for_undefined_figures(caplog) -> None:
    metrics = fs.compute_metrics(*scans(), LABELS, 0.5)
    with caplog.at_level(logging.INFO, "finetune_siglip"):
        fs.log_metrics_table(metrics, logging.INFO)
    lines = caplog.messages
    assert [line.split("  ")[0] for line in lines if "─" not in line] == ["label", *LABELS, "macro", "micro"][:9]
    assert f"{metrics['per_label']['Emphysema']['auc']:.3f}" in next(s for s in lines if s.startswith("Emphysema"))
    assert "–" in next(s for s in lines if s.startswith("Never"))
    assert len({len(line) for line in lines}) == 1


def test_a_resample_equals_scikit_learn_on_the_repeated_scans() -> None:
    targets, probabilities = scans(120, seed=3)
    weights = np.random.default_rng(0).integers(0, 4, size=(120, 3))
    figures = fs.weighted_figures(targets.astype(np.float64), probabilities, 0.5, weights.astype(np.float64))
    for b in range(3):
        y, p = (np.repeat(a, weights[:, b], axis=0) for a in (targets, probabilities))
        for i in range(len(LABELS) - 1):
            known = np.isfinite(y[:, i])
            for name, value in sklearn_figures(y[known, i], p[known, i], 0.5).items():
                ours = figures[name][b, i]
                assert_same(None if np.isnan(ours) else ours, value, f"{LABELS[i]} {name}")


def test_intervals_hold_the_figure_and_do_not_depend_on_row_order() -> None:
    targets, probabilities = scans(300)
    patients = np.array([f"patient {i // 2}" for i in range(300)])
    metrics = fs.compute_metrics(targets, probabilities, LABELS, 0.5)
    intervals = fs.bootstrap_metrics(targets, probabilities, LABELS, 0.5, patients, 200)
    assert intervals["per_label"]["Never"]["auc"] is None
    assert set(intervals) == set(metrics) - {"n_scans", "labels_averaged"}
    for name in ("macro_f1", "macro_auc", "micro_average_precision", "crg", "accuracy", "macro_brier"):
        low, high = intervals[name]
        assert low < metrics[name] < high, name
    order = np.random.default_rng(1).permutation(300)
    again = fs.bootstrap_metrics(targets[order], probabilities[order], LABELS, 0.5, patients[order], 200)
    assert again["macro_auc"] == pytest.approx(intervals["macro_auc"], abs=1e-12)
    assert fs.bootstrap_metrics(targets, probabilities, LABELS, 0.5, patients, 0) == {}


def test_a_finding_in_a_single_patient_has_no_interval() -> None:
    targets, probabilities = np.zeros((50, 1)), np.linspace(0, 1, 50)[:, None]
    targets[:10] = 1
    patients = ["one"] * 10 + [str(i) for i in range(40)]
    assert fs.bootstrap_metrics(targets, probabilities, ["a"], 0.5, patients, 200)["per_label"]["a"]["auc"] is None
    assert fs.bootstrap_metrics(targets, probabilities, ["a"], 0.5, patients, 200)["accuracy"] is not None


def patients_with_four_scans(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities (4 n, 1) of n patients, whose scans share the label and most of the score."""
    label, shared = (rng.random(n) < 0.4).repeat(4), rng.normal(size=n).repeat(4)
    score = math.sqrt(0.8) * shared + math.sqrt(0.2) * rng.normal(size=4 * n) + 1.2 * label - 0.6
    return label[:, None].astype(np.float64), 1 / (1 + np.exp(-score[:, None]))


def test_intervals_over_patients_cover_the_truth_as_often_as_they_say() -> None:
    """Resampling scans instead, as if they were independent, would cover far less often."""
    rng = np.random.default_rng(7)
    truth = fs.compute_metrics(*patients_with_four_scans(50_000, rng), ["a"], 0.5)
    apart = 0.5 * (1 + math.erf(1.2 / 2))  # AUROC of two normals 1.2 standard deviations apart
    assert truth["macro_auc"] == pytest.approx(apart, abs=0.005)
    names = [f"macro_{k}" for k in fs.REPORT_COLUMNS if k != "ece"]  # that one is biased itself
    covered, runs = {unit: dict.fromkeys(names, 0) for unit in ("patients", "scans")}, 120
    for run in range(runs):
        drawn = patients_with_four_scans(80, rng)
        for unit, group in (("patients", np.arange(80).repeat(4)), ("scans", np.arange(320))):
            intervals = fs.bootstrap_metrics(*drawn, ["a"], 0.5, group, 120, seed=run)
            for name in names:
                covered[unit][name] += intervals[name][0] <= truth[name] <= intervals[name][1]
    assert all(0.88 <= n / runs <= 0.995 for n in covered["patients"].values()), covered
    assert all(n / runs < 0.86 for n in covered["scans"].values()), covered


def objective_value(y: np.ndarray, called: np.ndarray, objective: str) -> float:
    if objective == "f1":
        return sk.f1_score(y, called)
    return sk.recall_score(y, called) + sk.recall_score(y, called, pos_label=0) - 1


@pytest.mark.parametrize("objective", ["f1", "youden"])
@pytest.mark.parametrize("ties", [True, False])
def test_tuned_thresholds_reach_the_best_value_any_threshold_reaches(objective: str, ties: bool) -> None:
    targets, probabilities = scans(80, ties=ties)
    thresholds = fs.tune_thresholds(targets, probabilities, objective)
    assert thresholds.shape == (len(LABELS),)
    assert list(thresholds[3:]) == [0.5] * 3  # no positives, no negatives, nothing known
    for i in range(3):
        known = np.isfinite(targets[:, i])
        y, p = targets[known, i], probabilities[known, i]
        best = max(objective_value(y, p >= t, objective) for t in [*np.unique(p), 1.1])
        assert objective_value(y, p >= thresholds[i], objective) == pytest.approx(best, abs=1e-12)


def test_thresholds_for_crg_reach_the_best_crg_of_any_combination() -> None:
    rng = np.random.default_rng(5)
    targets = (rng.random((12, 3)) < [0.3, 0.5, 0.1]).astype(float)
    targets[0] = 1, 1, 1
    probabilities = (rng.random((12, 3)) / 2 + targets / 4).round(1)
    thresholds = fs.tune_thresholds(targets, probabilities, "crg")
    grid = np.linspace(0.05, 0.85, 9)
    best = max(
        fs.compute_metrics(targets, probabilities, "abc", np.array([a, b, c]))["crg"]
        for a in grid
        for b in grid
        for c in grid
    )
    assert fs.compute_metrics(targets, probabilities, "abc", thresholds)["crg"] == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("scores", [[1.0, 1.0, 0.0, 0.0], [0.5, np.nextafter(0.5, 1), 0.0, 1.0], [0.0] * 4, [1.0] * 4])
@pytest.mark.parametrize("objective", ["f1", "youden", "crg"])
def test_thresholds_stay_between_0_and_1_at_extreme_and_neighbouring_scores(scores: list, objective: str) -> None:
    targets, probabilities = np.array([[0.0], [1.0], [0.0], [1.0]]), np.array(scores)[:, None]
    (threshold,) = fs.tune_thresholds(targets, probabilities, objective)
    assert 0 <= threshold <= 1
    if objective == "f1":
        best = max(sk.f1_score(targets[:, 0], probabilities[:, 0] >= t) for t in scores)
        assert sk.f1_score(targets[:, 0], probabilities[:, 0] >= threshold) == best


def test_cross_fitted_thresholds_never_saw_the_scans_they_decide() -> None:
    targets, probabilities = scans(60, seed=2)
    patients = np.array([f"p{i // 3}" for i in range(60)])
    before = fs.crossfit_thresholds(targets, probabilities, patients)
    rows = patients == "p7"
    targets[rows], probabilities[rows] = 1 - targets[rows], 0.5
    after = fs.crossfit_thresholds(targets, probabilities, patients)
    assert np.array_equal(before[rows], after[rows])
    assert not np.array_equal(before, after)


def test_thresholds_tuned_where_they_are_reported_are_reported_cross_fitted() -> None:
    """On pure noise tuned thresholds seem to help; cross-fitted, they do not."""
    rng = np.random.default_rng(0)
    targets, probabilities = (rng.random((60, 40)) < 0.15).astype(float), rng.random((60, 40))
    labels, patients = [str(i) for i in range(40)], np.arange(60)
    for objective in ("f1", "youden", "crg"):
        thresholds = fs.tune_thresholds(targets, probabilities, objective)
        out = fs.evaluate(targets, probabilities, labels, thresholds, patients, tuned_here=objective, resamples=20)
        assert out["apparent"] == fs.compute_metrics(targets, probabilities, labels, thresholds)
        assert out["metrics"]["macro_f1"] < out["apparent"]["macro_f1"] - 0.05
        assert abs(out["metrics"]["macro_balanced_accuracy"] - 0.5) < 0.05
        assert out["metrics"]["macro_auc"] == out["apparent"]["macro_auc"]
    fixed = fs.evaluate(targets, probabilities, labels, 0.5, patients, resamples=20)
    assert fixed["metrics"] == fs.compute_metrics(targets, probabilities, labels, 0.5)
    assert "apparent" not in fixed


def epoch(number: int, f1: float | None, ap: float | None = 0.2, loss: float = 0.5, auc: float | None = 0.6) -> dict:
    figures = {"macro_f1": f1, "macro_average_precision": ap, "macro_auc": auc}
    return {"epoch": number, "val_loss": loss, **figures}


def test_while_nothing_is_called_positive_the_best_epoch_is_the_one_that_ranks_findings_best() -> None:
    """F1 stays 0 over 15 epochs that learn: none of them uses up patience, lowers the rate or leaves epoch 1 best."""
    results = [epoch(n, 0.0, 0.15 + n / 100, 0.5 - n / 100) for n in range(1, 16)]
    schedule, top = fs.Schedule("plateau", 0, 100), fs.History()
    for line in results:
        key = fs.comparison_key(line)
        assert top.offer(key, line["epoch"])
        assert top.is_best(line["epoch"])
        schedule.end_epoch(key)
    assert (schedule.scale, schedule.bad_epochs, fs.best_epoch(results)) == (1.0, 0, 15)
    assert [number for _, number in top.entries] == [15, 14, 13]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (epoch(2, 0.1, 0.2), epoch(1, 0.0, 0.9)),
        (epoch(2, 0.1, 0.3, 0.9), epoch(1, 0.1, 0.2, 0.1)),
        (epoch(2, 0.1, 0.2, 0.4), epoch(1, 0.1, 0.2, 0.5)),
        (epoch(2, 0.0, 0.1, 0.9), epoch(1, None, 0.2, 0.1)),
        (epoch(2, 0.1, 0.0, 0.9), epoch(1, 0.1, None, 0.1)),
        (epoch(1, 0.1), epoch(2, 0.1)),
    ],
)
def test_epochs_compare_by_f1_then_average_precision_then_loss_with_undefined_last(better: dict, worse: dict) -> None:
    assert fs.best_epoch([worse, better]) == fs.best_epoch([better, worse]) == better["epoch"]


@pytest.mark.parametrize(
    ("select", "best"), [("macro_f1", 1), ("macro_auc", 2), ("macro_average_precision", 3), ("val_loss", 4)]
)
def test_select_names_what_epochs_are_compared_by_first(select: str, best: int) -> None:
    results = [epoch(1, 0.9), epoch(2, 0.5, auc=0.9), epoch(3, 0.5, 0.9), epoch(4, 0.5, loss=0.1), epoch(5, 0.5)]
    assert fs.best_epoch(results, select) == best


def test_the_summary_names_auroc_and_f1_at_fixed_and_at_cross_fitted_thresholds() -> None:
    """Scores that rank well but stay under 0.5: F1 is 0 at the fixed threshold and high at tuned ones."""
    rng = np.random.default_rng(1)
    targets = (rng.random((200, 2)) < 0.15).astype(float)
    probabilities = 0.1 + 0.2 * targets + 0.1 * rng.random((200, 2))
    for thresholds, tuned in ((0.5, None), (fs.tune_thresholds(targets, probabilities), "f1")):
        scored = fs.evaluate(targets, probabilities, ["a", "b"], thresholds, np.arange(200), tuned, resamples=20)
        assert scored["f1"] == {"fixed": 0.0, "cross-fitted": pytest.approx(1.0, abs=0.05)}
        assert "macro AUROC 1.000 (1.000 to 1.000)" in (line := fs.format_summary("val", scored))
        assert "F1 0.000 at fixed and 1.000 at cross-fitted thresholds" in line


def test_aggregation_averages_logits_and_keeps_every_row() -> None:
    ids = ["valid_1_a_1", "other", "valid_1_a_2", "valid_1_b_1", "valid_11_a_1"]
    patients = ["valid_1", "other", "valid_1", "valid_1", "valid_11"]
    logits = np.array([[0.0], [7.0], [2.0], [10.0], [5.0]], np.float32)
    assert fs.aggregate_logits(logits, ids, patients, "none") is logits
    assert fs.aggregate_logits(logits, ids, patients, "series")[:, 0].tolist() == [1, 7, 1, 10, 5]
    assert fs.aggregate_logits(logits, ids, patients, "patient")[:, 0].tolist() == [4, 7, 4, 4, 5]
    assert fs.aggregate_logits(logits[:0], [], [], "patient").shape == (0, 1)
    files = ["valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz", "valid_1_b_1.nii.gz"]
    assert fs.aggregate_logits(logits[:3], files, patients[:3], "series")[:, 0].tolist() == [3.5, 3.5, 2]


def test_what_was_predicted_for_an_unreadable_scan_enters_no_average() -> None:
    ids, targets = ["a", "b", "c"], np.ones((3, 1), np.float32)
    table = fs.Table(("A",), ids, ["p"] * 3, ["val"] * 3, [Path(name) for name in ids], targets, [2, 3, 4])
    dataset = fs.CTVolumeDataset(table, fs.Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, (4, 16, 16)))
    dataset.skipped[1] = "gone"
    read, probabilities = fs.readable(dataset, np.array([[1.0], [-50.0], [3.0]], np.float32), "patient")
    assert read.table.series_ids == ["a", "c"]
    assert probabilities[:, 0].tolist() == fs.sigmoid(np.array([2.0, 2.0])).tolist()
