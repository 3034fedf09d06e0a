#!/usr/bin/env python3
"""Fine-tune a SigLIP vision backbone on chest CT volumes as a multilabel classifier."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# ── 0 Door ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# What every room may use: the errors that end a run with one line, and the constants of the field.


class UserError(Exception):
    """A condition that the user can mend: `main` prints each message as one line and exits with `code`."""

    code = 2

    def __init__(self, *messages: str):
        super().__init__("\n".join(messages))
        self.messages = messages


class BadInput(UserError):
    """Wrong arguments, table, volume or checkpoint (exit 2)."""


class BadEnvironment(UserError):
    """Disk, memory, permissions, another run in the folder (exit 3)."""

    code = 3


class Diverged(UserError):
    """Training produced non-finite numbers (exit 4)."""

    code = 4


log = logging.getLogger("finetune_siglip")

# ── 1 Knobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Every setting, its unit, default and why; ranges and conflicts end in parser.error and nothing changes args later.

WINDOW_PRESETS = {
    "chest": ((-1100.0, -100.0), (-160.0, 240.0), (-50.0, 1450.0)),  # centre/width: -600/1000 lung, 40/400 soft tissue,
    "medsiglip": ((-1024.0, 1024.0), (-135.0, 215.0), (0.0, 80.0)),  # 700/1500 bone
    "merlin": ((-1000.0, 1000.0),) * 3,
}

PATIENT_AXIS = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


def whole_number(text: str) -> int:
    """Argument type: an integer of at least 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def count(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def amount(text: str) -> float:
    """Argument type: a finite number of at least 0."""
    if not (math.isfinite(value := float(text)) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def fraction(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def layer_count(text: str) -> int | str:
    """Argument type: an integer of at least 0, or `all`."""
    return text if text == "all" else whole_number(text)


def window_list(text: str) -> tuple[tuple[float, float], ...]:
    """Argument type: the name of a preset, or three HU intervals as `lo:hi,lo:hi,lo:hi`."""
    if text in WINDOW_PRESETS:
        return WINDOW_PRESETS[text]
    try:
        windows = tuple((float(lo), float(hi)) for lo, hi in (part.split(":") for part in text.split(",")))
    except ValueError:
        windows = ()
    if len(windows) != 3 or not all(lo < hi and math.isfinite(hi - lo) for lo, hi in windows):
        names = ", ".join(WINDOW_PRESETS)
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {names} nor lo:hi,lo:hi,lo:hi in HU with lo < hi")
    return windows


def orientation_code(text: str) -> str:
    """Argument type: three letters, one of each pair R/L, A/P and S/I."""
    code = text.upper()
    if {PATIENT_AXIS.get(letter) for letter in code} != {0, 1, 2} or len(code) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not an orientation code such as SPL or RAS")
    return code


def build_parser() -> argparse.ArgumentParser:
    """The flat table of arguments, grouped as in the README."""
    parser = argparse.ArgumentParser(
        prog="finetune_siglip.py",
        description="Fine-tune a SigLIP vision backbone on chest CT volumes as a multilabel classifier.",
        epilog="Exit codes: 0 done, 2 bad input, 3 environment (disk, memory, permissions), 4 diverged, 130/143 stopped.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data").add_argument
    add("--csv", required=True, type=Path, help="table with series_id, split, img_path and one 0/1 column per finding")
    add("--label-columns", required=True, nargs="+", metavar="NAME", help="finding columns; quote names with spaces")
    add("--orientation", type=orientation_code, help="towards which side of the patient each stored axis rises [SPL]")
    add(
        "--intensity",
        choices=("auto", "hu", "unit", "windowed"),
        default="auto",
        help="what a stored value means [auto]",
    )
    add("--hu-range", nargs=2, type=float, default=(-1000.0, 1500.0), metavar=("LO", "HI"), help="HU that 0 and 1 stand for with --intensity unit [-1000 1500]")  # fmt: skip
    add(
        "--windows",
        type=window_list,
        default="chest",
        help="chest, medsiglip, merlin, or lo:hi,lo:hi,lo:hi in HU [chest]",
    )
    add("--num-slices", type=count, help="slices (depth) after resampling [64; 160 for a 3D backbone]")
    add(
        "--image-size",
        type=count,
        help="rows and columns after resampling [the checkpoint's own; 224 for a 3D backbone]",
    )
    add("--allow-patient-overlap", action="store_true", help="warn, rather than stop, when a patient is in two splits")
    add("--num-workers", type=whole_number, default=4, help="processes that read volumes; 0 reads in the main one [4]")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained", help="SigLIP checkpoint: a hub name, a folder, .bin, .pt, .pth or .safetensors")
    add(
        "--freeze-up-to",
        type=layer_count,
        default=0,
        metavar="N",
        help="freeze the first N backbone layers, or all [0]",
    )
    add("--dropout-rate", type=fraction, default=0.1, help="dropout before and inside the head [0.1]")
    add(
        "--slice-pooling",
        choices=("attention", "mean", "max"),
        default="attention",
        help="how slices become a scan [attention]",
    )

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=("bce", "focal", "balanced"), default="bce", help="multilabel loss over known labels [bce]")
    add("--focal-gamma", type=amount, default=2.0, help="focusing exponent; 0 makes focal equal to bce [2.0]")
    add("--focal-alpha", type=amount, default=1.0, help="plain multiplier of the focal loss [1.0]")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=100, help="passes over split train at most [100]")
    add("--batch-size", type=count, default=16, help="scans per process and forward pass [16]")
    add("--lr", type=amount, default=1e-4, help="peak learning rate [1e-4]")
    add(
        "--weight-decay",
        type=amount,
        default=1e-4,
        help="decoupled decay; biases, norms and embeddings have none [1e-4]",
    )
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="sgd has Nesterov momentum 0.9 [adamw]")
    add(
        "--scheduler",
        choices=("plateau", "cosine"),
        default="plateau",
        help="plateau halves the rate when macro F1 rests [plateau]",
    )
    add("--warmup", type=whole_number, default=0, metavar="STEPS", help="optimiser steps of linear warm-up from 0 [0]")
    add("--gradient-accumulation-steps", type=count, default=1, help="forward passes per optimiser step [1]")
    add("--max-grad-norm", type=amount, default=1.0, help="gradients are clipped to this norm; 0 switches it off [1.0]")
    add(
        "--early-stopping-patience",
        type=whole_number,
        default=10,
        help="epochs without a better macro F1; 0 never stops [10]",
    )
    add("--use-ema", action="store_true", help="validate, save and predict with averaged weights")
    add("--ema-decay", type=fraction, default=0.999, help="decay of the averaged weights after their warm-up [0.999]")
    add("--amp", action="store_true", help="mixed precision: bf16 where the device has it, else fp16 with loss scaling")
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile of the repeated block; auto: on a GPU [auto]",
    )
    add("--seed", type=whole_number, default=42, help="the same seed on the same machine gives the same run [42]")

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, default=Path("./outputs"), help="folder for everything a run writes [./outputs]")
    add("--log-interval", type=count, default=50, help="forward passes between updates of the running loss [50]")
    add(
        "--wandb-project",
        default="siglip-ct-classification",
        help="Weights & Biases project [siglip-ct-classification]",
    )
    add("--wandb-mode", choices=("auto", "online", "offline", "disabled"), default="auto", help="auto: online with a key and a network, else offline [auto]")  # fmt: skip

    add = parser.add_argument_group("prediction").add_argument
    add("--test-only", type=Path, metavar="CHECKPOINT", help="predict with this checkpoint of ours and stop")
    add(
        "--test-output",
        type=Path,
        default=Path("test_predictions.csv"),
        help="a bare name goes to --output-dir [test_predictions.csv]",
    )
    add("--test-split", help="split to predict [test if the CSV has it, else val]")
    add("--threshold", type=fraction, default=0.5, help="a probability at or above it is positive [0.5]")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, checked for conflicts; a wrong one ends in `parser.error` (exit 2)."""
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    for i in range(len(argv) - 1, 0, -1):  # argparse takes a value such as -1000:200 for a flag unless joined by "="
        if argv[i - 1] == "--windows":
            argv[i - 1 : i + 1] = [f"--windows={argv[i]}"]
    args = parser.parse_args(argv)
    if not args.test_only and not args.pretrained:
        parser.error("--pretrained is required unless --test-only names a checkpoint")
    if args.hu_range[0] >= args.hu_range[1] or not all(map(math.isfinite, args.hu_range)):
        parser.error(f"--hu-range needs LO < HI, not {args.hu_range[0]:g} {args.hu_range[1]:g}")
    if args.lr == 0:
        parser.error("--lr must be above 0")
    if not 0 <= args.dropout_rate < 1:
        parser.error("--dropout-rate must be below 1")
    repeated = sorted({name for name in args.label_columns if args.label_columns.count(name) > 1})
    if repeated:
        parser.error(f"--label-columns names {', '.join(repeated)} twice")
    return args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered here, before the seconds that importing torch takes

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ── 2 Machine ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Device, precision, ranks, random numbers, logging: the one place that reads the environment.

# ── 3 Table ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# The CSV: every data error found and reported at once, with its row.

# ── 4 Volume ────────────────────────────────────────────────────────────────────────────────────────────────────────
# From a file to the int16 tensor that travels to the device.

# ── 5 Backbone ──────────────────────────────────────────────────────────────────────────────────────────────────────
# From a file of pretrained tensors to an image encoder that certainly holds them.

# ── 6 Model ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# HU windows, slice features, pooling over slices, head.

# ── 7 Loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Multilabel losses over known labels.

# ── 8 Optim ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Optimiser, learning-rate schedule and averaged weights.

# ── 9 Step ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# One epoch of training, and one way to predict.

# ── 10 Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Metrics, thresholds and intervals: NumPy in, plain dict out.


CALIBRATION_BINS = 10  # equal widths over [0, 1]; the report's reliability diagrams use the same ones


def compute_metrics(
    targets: np.ndarray, probabilities: np.ndarray, label_columns: Sequence[str], thresholds: float | np.ndarray
) -> dict:
    """Every figure per label, its macro average over the labels where it is defined, and micro (all entries pooled).

    targets (n, L) 0/1, NaN = unknown and left out; probabilities (n, L) in [0, 1]; thresholds a number, (L,), or (n, L)
    for cross-fitted ones: a probability at or above is positive. Undefined figures are None; `labels_averaged` says over
    how many labels each macro average runs. CRG: the VLM3D challenge's score over all labels x scans; per label too.
    """
    targets, probabilities = np.asarray(targets, np.float64), np.asarray(probabilities, np.float64)
    if not np.isfinite(probabilities).all():
        row, column = np.argwhere(~np.isfinite(probabilities))[0]
        raise Diverged(
            f"row {row} has no finite probability for {label_columns[column]}: the model's output overflowed"
        )
    once = np.ones((len(targets), 1))
    figures = {k: v[0] for k, v in _weighted_figures(targets, probabilities, thresholds, once).items()}
    metrics = _arrange({k: [None if np.isnan(x) else float(x) for x in v] for k, v in figures.items()}, label_columns)
    metrics["n_scans"] = len(targets)
    metrics["labels_averaged"] = {k: int(np.isfinite(v[:-2]).sum()) for k, v in figures.items()}
    for i, row in enumerate(metrics["per_label"].values()):
        row |= {"n_known": int(np.isfinite(targets[:, i]).sum()), "n_positive": int((targets[:, i] == 1).sum())}
    return metrics


def _arrange(figures: dict[str, list], label_columns: Sequence[str]) -> dict:
    """The nested result, from name -> one value per label, then micro, then macro."""
    out = {f"{kind}_{k}": v[i] for kind, i in (("macro", -1), ("micro", -2)) for k, v in figures.items()}
    out |= {"accuracy": figures["accuracy"][-2], "crg": figures["crg"][-2]}
    return out | {"per_label": {c: {k: v[i] for k, v in figures.items()} for i, c in enumerate(label_columns)}}


def _weighted_figures(
    targets: np.ndarray, probabilities: np.ndarray, thresholds: float | np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Figures under B weightings of the scans: name -> (B, L + 2), NaN where undefined; last two columns: micro, macro.

    weights (n, B) are whole numbers, how often a resample draws each scan, so every count below is exact.
    """
    known, truth, decided = ~np.isnan(targets), targets == 1, probabilities >= thresholds
    error = np.where(known, probabilities - truth, 0.0)
    bins = np.minimum((probabilities * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)

    def total(entries: np.ndarray) -> np.ndarray:  # (n, L) -> (B, L + 1), the last column summed over labels
        sums = weights.T @ entries.astype(np.float64)
        return np.column_stack([sums, sums.sum(axis=1)])

    x, a, tp, called = total(known), total(truth), total(truth & decided), total(known & decided)
    fn, fp = a - tp, called - tp
    tn = x - a - fp
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is NaN, which is how "undefined" travels here
        recall, specificity, r, u = tp / a, tn / (x - a), (x - a) / (2 * a), (x - a) / 2
        out = {
            "accuracy": (tp + tn) / x,
            "balanced_accuracy": (recall + specificity) / 2,
            "precision": tp / called,
            "recall": recall,
            "specificity": specificity,
            "f1": 2 * tp / (a + called),
            "brier": total(error**2) / x,
            "ece": sum(np.abs(total(error * (bins == b))) for b in range(CALIBRATION_BINS)) / x,
            "crg": u / (2 * u - (r * tp - r * fn - fp)),
            "prevalence": a / x,
        }
    # The scans of each label's known entries, then of all known entries pooled.
    flat = [np.nonzero(k)[0] for k in known.T] + [np.nonzero(known)[0]]
    pairs = [(truth[k, i], probabilities[k, i]) for i, k in enumerate(known.T)] + [(truth[known], probabilities[known])]
    ranked = np.array([_ranking(*pair, rows, weights) for pair, rows in zip(pairs, flat, strict=True)])  # (L + 1, 2, B)
    out |= {"auc": ranked[:, 0].T, "average_precision": ranked[:, 1].T}
    for name, values in out.items():
        defined = np.isfinite(values[:, :-1])
        sums = np.where(defined, values[:, :-1], 0.0).sum(axis=1)
        with np.errstate(invalid="ignore"):
            out[name] = np.column_stack([values, sums / defined.sum(axis=1)])
    return out


def _ranking(truth: np.ndarray, scores: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> tuple:
    """(AUROC, average precision), each (B,), of entries that belong to the given rows of weights (n, B); ties exact.

    Only the distinct scores of positives matter: at each, the negatives strictly above and those at or above it.
    """
    positive, negative = np.flatnonzero(truth), np.flatnonzero(~truth)
    positive, negative = positive[np.argsort(-scores[positive])], negative[np.argsort(-scores[negative])]
    if not len(positive):
        return np.full((2, weights.shape[1]), np.nan)
    cuts, starts = np.unique(-scores[positive], return_index=True)  # ascending in -score: the highest score first
    hits = np.add.reduceat(weights[rows[positive]], starts, axis=0)  # (cuts, B) positives at each score
    false = np.zeros((len(negative) + 1, weights.shape[1]))
    np.cumsum(weights[rows[negative]], axis=0, out=false[1:])
    above, upto = (false[np.searchsorted(-scores[negative], cuts, side)] for side in ("left", "right"))
    found = np.cumsum(hits, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = 1 - np.einsum("kb,kb->b", hits, (above + upto) / 2) / (found[-1] * false[-1])
        precision = found / np.maximum(found + upto, 1.0)  # nothing drawn so far: hits is 0 there as well
        return auc, np.einsum("kb,kb->b", hits, precision) / found[-1]


def format_metrics_table(metrics: dict) -> str:
    """The log's table: one line per label, then macro and micro; figures that are undefined show as a dash."""
    shown = {"precision": "prec", "recall": "recall", "specificity": "spec", "f1": "F1", "auc": "AUROC"}
    shown = {"accuracy": "acc"} | shown | {"average_precision": "AP", "brier": "Brier"}
    rows = [(c, f"{m['n_positive']}/{m['n_known']}", m) for c, m in metrics["per_label"].items()]
    for kind in ("macro", "micro"):
        rows.append((kind, "", {k: metrics[f"{kind}_{k}"] for k in shown}))
    width, counts = (max(len(row[i]) for row in [*rows, ("label", "pos/known")]) for i in (0, 1))
    lines = [f"{'label':{width}}  {'pos/known':>{counts}}" + "".join(f"{name:>8}" for name in shown.values())]
    for name, count_text, figures in rows:
        cells = ("       –" if figures[k] is None else f"{figures[k]:8.3f}" for k in shown)
        lines.append(f"{name:{width}}  {count_text:>{counts}}" + "".join(cells))
    return "\n".join([*lines[:1], "─" * len(lines[0]), *lines[1:-2], "─" * len(lines[0]), *lines[-2:]])


# ── 11 Keep ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Files that are whole or absent: checkpoints, the top k, the state of a run.

# ── 12 Papers ───────────────────────────────────────────────────────────────────────────────────────────────────────
# What a person reads: results, predictions, plots, report.


def append_result(path: Path, epoch: dict) -> None:
    """Adds one JSON line; lines of this epoch or later, left by a run that was resumed further back, are replaced."""
    line = json.dumps(epoch, allow_nan=False, default=float)
    kept = [old for old in read_results(path) if old["epoch"] < epoch["epoch"]]
    text = "".join(f"{entry}\n" for entry in [*(json.dumps(old) for old in kept), line])
    save_atomic(path, lambda file: file.write(text.encode()))


def read_results(path: Path) -> list[dict]:
    """The epochs in results.jsonl, in order; none where the file is not there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_predictions(
    path: Path,
    series_ids: Sequence[str],
    probabilities: np.ndarray,
    thresholds: float | np.ndarray,
    labels: Sequence[str],
) -> None:
    """CSV `id,{label}_prob,{label}_pred`, rows in the given order; a number read back is the very same number."""
    probabilities = np.asarray(probabilities, np.float64)
    decided = (probabilities >= thresholds).astype(int)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", *(f"{label}_{kind}" for label in labels for kind in ("prob", "pred"))])
    for series_id, row, calls in zip(series_ids, probabilities.tolist(), decided.tolist(), strict=True):
        writer.writerow([series_id, *(cell for pair in zip(row, calls, strict=True) for cell in pair)])
    save_atomic(path, lambda file: file.write(buffer.getvalue().encode("utf-8", "surrogateescape")))


def plot_progress(folder: Path, results: list[dict]) -> None:
    """progress.png: losses, macro F1 and AUROC with the best epoch marked, learning rate; redrawn after each epoch."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {"loss": ["train_loss", "val_loss"], "validation": ["macro_f1", "macro_auc"], "learning rate": ["lr"]}
    epochs = [r["epoch"] for r in results]
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            values = [math.nan if r.get(key) is None else r[key] for r in results]
            axis.plot(epochs, values, marker="o", markersize=3, label=key.replace("_", " "))
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    best = max(results, key=lambda r: -1.0 if r.get("macro_f1") is None else r["macro_f1"], default=None)
    if best and best.get("macro_f1") is not None:
        axes[1].axvline(best["epoch"], color="gray", linestyle=":", label=f"best: epoch {best['epoch']}")
    for axis in axes[:2]:
        axis.legend()
    save_atomic(folder / "progress.png", lambda file: figure.savefig(file, format="png", dpi=110))


# ── 13 Main ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# A run as a table of contents.
