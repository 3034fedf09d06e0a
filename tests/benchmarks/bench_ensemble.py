"""What a mean of three models is worth on phantoms: `python tests/benchmarks/bench_ensemble.py [--seeds 3]`.

For each seed new phantoms, and three heads on the demo's frozen tower that differ in windows, slices, loss and seed.
Each one's macro AUROC and F1 on 150 test phantoms are held against those of their mean logits (`--test-only A B C`),
thresholds tuned on val in both cases. The last lines give `name=value`; medians over the seeds.
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

import phantoms
from finetune_siglip import main, read_evaluation

MEMBERS = (
    ("--windows", "chest", "--num-slices", "24", "--loss", "bce"),
    ("--windows", "medsiglip", "--num-slices", "24", "--loss", "focal"),
    ("--windows", "chest", "--num-slices", "16", "--loss", "balanced"),
)


def run(*argv: object) -> None:
    """The script with these arguments, in silence."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        code = main([str(word) for word in argv])
    assert code == 0, told.getvalue()


def figures(folder: Path) -> tuple[float, float]:
    """Macro AUROC and macro F1 on split test."""
    metrics = read_evaluation(folder / "evaluation_test.json")["metrics"]
    return metrics["macro_auc"], metrics["macro_f1"]


def one_seed(seed: int, folder: Path, scans: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Figures of each member and of their mean."""
    table = phantoms.write_dataset(folder, scans, 60, 150, seed=seed, prevalence=0.25)
    labels = table.read_text().splitlines()[0].split(",")[3:]
    common = ("--csv", table, "--num-workers", 0, "--bootstrap", 0, "--threshold", "auto", "--output-dir")
    models = []
    for number, member in enumerate(MEMBERS):
        run(
            *common, folder / str(number), "--pretrained", ROOT / "tests" / "assets" / "tiny-siglip", "--label-columns",
            *labels, "--wandb-mode", "disabled", "--epochs", 30, "--batch-size", 8, "--lr", "3e-3", "--scheduler",
            "warmup", "--use-ema", "--freeze-up-to", "all", "--cache-features", folder / "features", "--seed",
            100 * seed + number, *member,
        )  # fmt: skip
        models.append(folder / str(number) / "best_model.pth")
    run(*common, folder / "mean", "--test-only", *models)
    return [figures(folder / str(number)) for number in range(len(MEMBERS))], figures(folder / "mean")


def compare(seeds: int, scans: int) -> None:
    results = []
    for seed in range(seeds):
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scans", type=int, default=200, help="training phantoms [200]")
    arguments = parser.parse_args()
    compare(arguments.seeds, arguments.scans)
