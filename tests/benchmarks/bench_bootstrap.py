"""Intervals for every figure: the vectorised bootstrap against a loop over scikit-learn, interleaved in one process.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_bootstrap.py

Both sides resample the patients of 3,000 scans x 18 labels. The loop does a few of the 1,000 resamples and is scaled
up; it leaves out the expected calibration error and CRG, which scikit-learn does not have. CPU seconds, one thread.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
from sklearn import metrics as sk

sys.path.insert(0, str(Path(__file__).parents[2]))
import finetune_siglip as fs

SCANS, LABELS, RESAMPLES, LOOPED, ROUNDS = 3000, 18, 1000, 3, 5


def sklearn_figures(y: np.ndarray, p: np.ndarray) -> tuple:
    called = p >= 0.5
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, called, average="binary", zero_division=0)
    return (
        *(precision, recall, f1, sk.recall_score(y, called, pos_label=0), sk.accuracy_score(y, called)),
        *(sk.balanced_accuracy_score(y, called), sk.brier_score_loss(y, p), y.mean()),
        *(sk.roc_auc_score(y, p), sk.average_precision_score(y, p)),
    )


def sklearn_loop(targets: np.ndarray, probabilities: np.ndarray, scans_of: list, resamples: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        rows = np.concatenate([scans_of[i] for i in rng.integers(len(scans_of), size=len(scans_of))])
        y, p = targets[rows], probabilities[rows]
        np.mean([sklearn_figures(y[:, i], p[:, i]) for i in range(LABELS)], axis=0)
        sklearn_figures(y.ravel(), p.ravel())  # micro


def main() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((SCANS, LABELS)) < rng.uniform(0.05, 0.6, LABELS)).astype(np.float64)
    probabilities = 1 / (1 + np.exp(1 - rng.normal(size=targets.shape) - 1.5 * targets))
    scans_of = [np.array([2 * i, 2 * i + 1]) for i in range(SCANS // 2)]
    patients, labels = [f"patient {i // 2}" for i in range(SCANS)], [f"label {i}" for i in range(LABELS)]
    ours, loop = [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        fs.bootstrap_metrics(targets, probabilities, labels, 0.5, patients, RESAMPLES)
        middle = time.process_time()
        sklearn_loop(targets, probabilities, scans_of, LOOPED)
        ours.append(middle - start)
        loop.append((time.process_time() - middle) * RESAMPLES / LOOPED)
    print(f"scikit-learn loop, {RESAMPLES} resamples, scaled from {LOOPED}: {statistics.median(loop):.1f} s")
    print(f"bootstrap_metrics, {RESAMPLES} resamples: {statistics.median(ours):.2f} s")
    print(f"bootstrap_ratio={statistics.median(loop) / statistics.median(ours):.1f}")


if __name__ == "__main__":
    main()
