#!/usr/bin/env python3
"""Fine-tune a SigLIP vision backbone on chest CT volumes as a multilabel classifier."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
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

# ── 11 Keep ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Files that are whole or absent: checkpoints, the top k, the state of a run.

# ── 12 Papers ───────────────────────────────────────────────────────────────────────────────────────────────────────
# What a person reads: results, predictions, plots, report.

# ── 13 Main ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# A run as a table of contents.
