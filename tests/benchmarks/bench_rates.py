"""Which learning rates of head and tower the presets should have: AUROC on phantoms that were not trained on.

    python tests/benchmarks/bench_rates.py [--seeds 0 1 2] [--epochs 15]

140 phantoms with each finding in 15 %, 8 slices, batch 16, all else default; the best epoch's model on 100 others.
About 3 minutes a run on one free core. The last line has the mean over seeds of each pair of rates.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import finetune_siglip
import phantoms

RATES = {"one": ("1e-4", "1"), "tenth": ("1e-3", "0.1"), "thirtieth": ("1e-3", "0.03")}


def auroc(folder: Path, table: Path, seed: int, epochs: int, lr: str, scale: str) -> dict[str, float]:
    """Macro AUROC of the best epoch on val and test, and the highest of any epoch on val."""
    argv = [
        "--csv", table, "--pretrained", ROOT / "tests/assets/tiny-siglip", "--label-columns", *phantoms.FINDINGS,
        "--num-slices", 8, "--lr", lr, "--backbone-lr-scale", scale, "--epochs", epochs, "--seed", seed,
        "--output-dir", folder, "--num-workers", 0, "--bootstrap", 0, "--wandb-mode", "disabled",
    ]  # fmt: skip
    assert finetune_siglip.main([str(word) for word in argv]) == 0
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    best = finetune_siglip.best_epoch(lines)
    test = json.loads((folder / "evaluation_test.json").read_text())["metrics"]["macro_auc"]
    return {"val": lines[best - 1]["macro_auc"], "highest": max(x["macro_auc"] for x in lines), "test": test}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RATES}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as made:
            table = phantoms.write_dataset(Path(made), 140, 60, 100, seed=seed, prevalence=0.15)
            for name, rates in RATES.items():
                found[name].append(auroc(Path(made) / name, table, seed, args.epochs, *rates))
                print(f"seed {seed}, --lr {rates[0]} --backbone-lr-scale {rates[1]}: {found[name][-1]}", flush=True)
    means = {f"{name}_{k}": sum(x[k] for x in runs) / len(runs) for name, runs in found.items() for k in runs[0]}
    print(" ".join(f"{name}={value:.3f}" for name, value in means.items()))


if __name__ == "__main__":
    main()
