"""Room 10: metrics, intervals and thresholds against scikit-learn, plain loops and hand-worked examples."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

import finetune_siglip as fs

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


def test_the_log_table_shows_every_label_and_dashes_for_undefined_figures() -> None:
    metrics = fs.compute_metrics(*scans(), LABELS, 0.5)
    lines = fs.format_metrics_table(metrics).splitlines()
    assert [line.split("  ")[0] for line in lines if "─" not in line] == ["label", *LABELS, "macro", "micro"][:9]
    assert f"{metrics['per_label']['Emphysema']['auc']:.3f}" in next(s for s in lines if s.startswith("Emphysema"))
    assert "–" in next(s for s in lines if s.startswith("Never"))
    assert len({len(line) for line in lines}) == 1
