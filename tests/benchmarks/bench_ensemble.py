"""What a mean of three models is worth on phantoms: `python tests/benchmarks/bench_ensemble.py [--seeds 0 1 2]`.

For each seed new phantoms, and three heads on the demo's frozen tower that differ in slices, pooling, loss and seed.
Each one's macro AUROC and F1 on test phantoms are held against those of their mean logits, thresholds tuned on val in
both cases. The mean is taken over the probabilities that the runs have written; that `--test-only A B C` gives these
very numbers is a test. The last lines give `name=value`, medians over the seeds.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np

import phantoms
from finetune_siglip import compute_metrics, main, read_evaluation, sigmoid, tune_thresholds

MEMBERS = (
    ("--windows", "chest", "--num-slices", "24", "--loss", "bce"),
    ("--windows", "chest", "--num-slices", "16", "--loss", "focal", "--slice-pooling", "label"),
    ("--windows", "chest", "--num-slices", "24", "--loss", "balanced", "--slice-pooling", "label"),
)


def run(*argv: object) -> None:
    """The script with these arguments, in silence."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        code = main([str(word) for word in argv])
    assert code == 0, told.getvalue()


def logits_of(evaluation: dict) -> np.ndarray:
    """(n, L), from the probabilities."""
    return np.log(evaluation["probabilities"]) - np.log1p(-evaluation["probabilities"])


def figures(val: dict, test: dict, logits: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Macro AUROC and macro F1 on split test of logits of split val and test."""
    on_val, on_test = map(sigmoid, logits)
    thresholds = tune_thresholds(val["targets"], on_val)
    metrics = compute_metrics(test["targets"], on_test, test["labels"], thresholds)
    return metrics["macro_auc"], metrics["macro_f1"]


def one_seed(seed: int, folder: Path, scans: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Figures of each member and of their mean."""
    table = phantoms.write_dataset(folder, scans, scans // 3, scans, seed=seed, prevalence=0.25)
    labels = table.read_text().splitlines()[0].split(",")[3:]
    logits, alone = [], []
    for number, member in enumerate(MEMBERS):
        out = folder / str(number)
        run(
            "--csv", table, "--pretrained", ROOT / "tests" / "assets" / "tiny-siglip", "--label-columns", *labels,
            "--output-dir", out, "--num-workers", 0, "--bootstrap", 0, "--wandb-mode", "disabled", "--epochs", 20,
            "--batch-size", 8, "--lr", "3e-3", "--scheduler", "warmup", "--use-ema", "--freeze-up-to", "all",
            "--cache-features", folder / "features", "--seed", 100 * seed + number, *member,
        )  # fmt: skip
        val, test = (read_evaluation(out / f"evaluation_{split}.json") for split in ("val", "test"))
        logits.append((logits_of(val), logits_of(test)))
        alone.append(figures(val, test, logits[-1]))
    return alone, figures(val, test, tuple(np.mean(each, axis=0) for each in zip(*logits, strict=True)))


def compare(seeds: list[int], scans: int) -> None:
    results = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            members, mean = one_seed(seed, Path(folder), scans)
        results.append((members, mean))
        alone = ", ".join(f"{auc:.4f}/{f1:.4f}" for auc, f1 in members)
        print(f"seed {seed}: macro AUROC/F1 of each {alone}; of the mean {mean[0]:.4f}/{mean[1]:.4f}", flush=True)
    for i, name in enumerate(("auroc", "f1")):
        best = statistics.median(max(m[i] for m in members) for members, _ in results)
        typical = statistics.median(statistics.mean(m[i] for m in members) for members, _ in results)
        print(f"{name}_best_member={best:.4f} {name}_average_member={typical:.4f}", end=" ")
        print(f"{name}_of_the_mean={statistics.median(mean[i] for _, mean in results):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scans", type=int, default=90, help="training phantoms, and test phantoms [90]")
    arguments = parser.parse_args()
    compare(arguments.seeds, arguments.scans)
