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
