#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.10", "torchvision>=0.25", "monai>=1.5", "transformers>=5.0", "timm>=1.0.20",
#   "dynamic-network-architectures>=0.4.3", "accelerate>=1.0", "hi-ml-multimodal>=0.2.2", "scikit-learn>=1.5",
#   "pandas>=2.2", "numpy>=1.26", "peft>=0.17", "wandb>=0.28", "tqdm>=4.66", "deflate>=0.8", "blosc2>=3.0",
#   "pydicom>=3.0", "python-gdcm>=3.0.24", "nibabel>=5.3", "pynrrd>=1.1", "matplotlib>=3.9", "jinja2>=3.1",
# ]
# ///
r"""Fine-tune a SigLIP vision backbone on chest CT volumes as a multilabel classifier.

    python finetune_siglip.py --csv scans.csv --pretrained google/siglip-base-patch16-224 \
        --label-columns "Lung nodule" "Pleural effusion" --output-dir outputs/first --amp --use-ema
    python finetune_siglip.py --csv scans.csv --test-only outputs/first/best_model.pth --output-dir outputs/test
    python finetune_siglip.py --help

The file is read from top to bottom, the way the data flows; a room calls only rooms above it:

    0 Door      errors and constants           7 Loss    multilabel losses over known labels
    1 Knobs     every argument                 8 Optim   optimiser, schedule, averaged weights
    2 Machine   device, ranks, signals, log    9 Step    an epoch of training; prediction
    3 Table     the CSV                       10 Scores  metrics, thresholds, intervals
    4 Volume    from a file to int16 voxels   11 Keep    checkpoints, the state of a run
    5 Backbone  pretrained image encoders     12 Papers  predictions, plots, report
    6 Model     windows, slices, pooling      13 Main    a run as a table of contents

Axis letters: N batch, C stored channels, K windows, D H W voxel axes, S slices given to the backbone, P patches,
E feature width, L labels; n is any number of scans.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import copy
import csv
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import gzip
import hashlib
import importlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

__version__ = "2.0.0"
__all__ = [  # for other code; whatever else is here may change
    "BadEnvironment", "BadInput", "BadVolume", "BalancedBCELoss", "Classifier", "Diverged", "FocalLoss",
    "SiglipClassifier", "UserError", "backbone_layers", "build_backbone", "compute_metrics", "load_classifier",
    "load_volume", "main", "parse_args", "read_pretrained", "tune_thresholds",
]  # fmt: skip

if TYPE_CHECKING:
    import pandas

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


class Interrupted(BaseException):
    """A signal asked for a stop. Not an Exception, so that code which survives any error does not swallow it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


log = logging.getLogger("finetune_siglip")
DETAIL = 15  # level of what training.log holds and the console doesn't show

# ── 1 Knobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Every setting, its unit, default and why; ranges and conflicts end in parser.error and nothing changes args later.

WINDOW_PRESETS = {
    "chest": ((-1100.0, -100.0), (-160.0, 240.0), (-50.0, 1450.0)),  # centre/width: -600/1000 lung, 40/400 soft tissue,
    "medsiglip": ((-1024.0, 1024.0), (-135.0, 215.0), (0.0, 80.0)),  # 700/1500 bone
    "merlin": ((-1000.0, 1000.0),) * 3,
}

DEFAULT_HU_RANGE = (-1000.0, 1500.0)
PATIENT_AXIS = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


def numeric(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """Argument type: a finite int or float from `low`, or only above it, to `high`."""
    limits = f"{'above' if above else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high) or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # for argparse's own message
    return parse


whole_number, count, amount, fraction = numeric(int, 0), numeric(int, 1), numeric(float, 0), numeric(float, 0, 1)
multiple, millimetres = numeric(float, 0, above=True), numeric(float, 0.1, 20)


def threshold_source(text: str) -> float | str | Path:
    """Argument type: a number from 0 to 1, `auto`, or a file."""
    try:
        return fraction(text)
    except ValueError:
        return text if text == "auto" else Path(text)


def steps_or_share(text: str) -> int | str:
    """Argument type: an integer of at least 0, or a share of all optimiser steps such as 5%."""
    if not text.endswith("%"):
        return whole_number(text)
    numeric(float, 0, 100)(text[:-1])
    return text


def layer_count(text: str) -> int | str:
    """Argument type: an integer of at least 0, or `all`."""
    return text if text == "all" else whole_number(text)


def window_list(text: str) -> tuple[tuple[float, float], ...]:
    """Argument type: the name of a preset, or three HU intervals as `lo:hi,lo:hi,lo:hi`."""
    try:
        parts = (part.split(":") for part in text.split(","))
        windows = WINDOW_PRESETS.get(text) or tuple((float(lo), float(hi)) for lo, hi in parts)
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


class Parser(argparse.ArgumentParser):
    """Gathers what is wrong with a command line, to tell it all at once, in a line each and without the usage."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.wrong: list[str] = []
        self._negative_number_matcher = re.compile(r"-\.?\d")  # as of Python 3.14: -1000:200 is a value and no flag

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self.wrong.append(str(error))
            return action.default

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """A line of an @FILE is one argument, empty lines are none."""
        return [text] if (text := arg_line.strip("\ufeff \t")) else []

    def unknown_flags(self, argv: Sequence[str]) -> list[str]:
        """What to say of each flag that is none of ours: the nearest one by its name, or by what it does."""
        found, ours = [], self._option_string_actions
        for flag in [word.partition("=")[0] for word in argv if re.match(r"--\w", word)]:
            near = [name for name in ours if name.startswith(flag)]
            near += [name for name, action in ours.items() if flag[2:].replace("-", " ") in (action.help or "")]
            near += difflib.get_close_matches(flag, ours, n=1)
            if flag not in ours:
                found.append(f"there is no {flag}: {f'the nearest is {near[0]}' if near else '--help lists all'}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, "".join(f"{self.prog}: error: {line}\n" for line in (*self.wrong, message)))


# fmt: off
def build_parser() -> Parser:
    """The flat table of arguments, grouped as in the README."""
    parser = Parser(
        prog="finetune_siglip.py", allow_abbrev=False, fromfile_prefix_chars="@",
        description="Fine-tune a SigLIP vision backbone on chest CT volumes as a multilabel classifier.",
        epilog="Exit codes: 0 done, 2 bad input, 3 environment (disk, memory), 4 diverged, 128 + signal: stopped.",
    )
    parser.add_argument("--version", action="version", version=f"finetune_siglip.py {__version__}")
    add = parser.add_argument_group("data").add_argument
    add("--config", type=Path, metavar="RUN.JSON", help="start from the settings of this run.json; arguments win")
    add("--csv", type=Path, help="table with series_id, split, img_path and one 0/1 column per finding")
    add("--label-columns", nargs="+", metavar="NAME",
        help="finding columns, names with spaces in quotes, or @FILE with one a line; only training needs them")
    add("--orientation", type=orientation_code, help="towards which side of the patient each stored axis rises [SPL]")
    add("--intensity", choices=("auto", "hu", "unit", "windowed"), default="auto", help="what voxels hold [auto]")
    add("--hu-range", nargs=2, type=float, default=DEFAULT_HU_RANGE, metavar=("LO", "HI"),
        help="HU that 0 and 1 stand for with --intensity unit [-1000 1500]")
    add("--windows", type=window_list,
        help="chest, medsiglip, merlin, or lo:hi,lo:hi,lo:hi in HU [what the weights say, else chest]")
    add("--use-3channel", action="store_true", help="accepted for older scripts: three windows are the default anyway")
    add("--num-slices", type=count, help="slices (depth) after resampling [64; 160 for a 3D backbone]")
    add("--image-size", type=count, help="rows and columns after resampling [the tower's own; 224 for a 3D backbone]")
    add("--spacing", nargs=3, type=millimetres, default=(1.5, 1.5, 3.0), metavar=("X", "Y", "Z"),
        help="mm between columns, rows and slices that raw scans are brought to [1.5 1.5 3.0]")
    add("--augment", choices=("none", "light", "strong"), default="light",
        help="small turns, shifts, scalings, noise and changes of HU in training; never mirrored [light]")
    add("--allow-patient-overlap", action="store_true", help="warn, rather than stop, when a patient is in two splits")
    add("--on-bad-volume", choices=("stop", "skip"), default="stop",
        help="a scan that three tries can't read: stop with the state saved, or leave it out and list it [stop]")
    add("--num-workers", type=whole_number, default=4,
        help="processes that read volumes, at most one a core; 0 reads in the main one [4]")
    add("--cache-dir", type=Path, metavar="DIR",
        help="keep resampled volumes there, on a local disk: from the second epoch on reading takes milliseconds")
    add("--check-data", action="store_true", help="report on table and volumes, draw data_check.png and stop")
    add("--prepare", type=Path, metavar="DIR",
        help="convert the raw scans of --csv to files and a CSV in this folder and stop; repeat to go on")
    add("--format", choices=("npz", "b2nd"), default="npz", help="what --prepare writes; b2nd is read faster [npz]")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained", help="SigLIP checkpoint: a hub name, a folder, .bin, .pt, .pth or .safetensors")
    add("--backbone-heads", type=count, metavar="N",
        help="attention heads of a SigLIP tower without a config.json [width / 64; 16 for 1152 and 1536]")
    add("--freeze-up-to", type=layer_count, default=0, metavar="N", help="freeze N backbone layers, or all of them [0]")
    add("--dropout-rate", type=fraction, default=0.1, help="dropout before and inside the head [0.1]")
    add("--slice-pooling", choices=("attention", "mean", "max", "label"), default="attention",
        help="how slices become a scan; label: attention and maximum of each finding's own, for small ones [attention]")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=("bce", "focal", "balanced", "asl"), default="bce",
        help="multilabel loss over known labels; asl: asymmetric, for many easy negatives [bce]")
    add("--label-smoothing", type=fraction, default=0.0, metavar="E", help="targets 1 - E/2 and E/2; 0: off [0]")
    add("--focal-gamma", type=amount, default=2.0, help="focusing exponent; 0 makes focal equal to bce [2.0]")
    add("--focal-alpha", type=amount, default=1.0, help="plain multiplier of the focal loss [1.0]")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=100, help="passes over split train at most [100]")
    add("--batch-size", type=count, default=16, help="scans per process and forward pass [16]")
    add("--lr", type=multiple, default=1e-4, help="peak learning rate [1e-4]")
    add("--weight-decay", type=amount, default=1e-4, help="decoupled; biases, norms, embeddings have none [1e-4]")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="sgd has Nesterov momentum 0.9 [adamw]")
    add("--scheduler", choices=("plateau", "cosine", "warmup"), default="plateau",
        help="plateau halves the rate when no epoch is better (--select); warmup: cosine with --warmup 5%% [plateau]")
    add("--warmup", type=steps_or_share, default=0, metavar="STEPS",
        help="optimiser steps of linear warm-up from 0, or a share of all steps such as 5%% [0]")
    add("--gradient-accumulation-steps", type=count, default=1, help="forward passes per optimiser step [1]")
    add("--max-grad-norm", type=amount, default=1.0, help="gradients are clipped to this norm; 0 switches it off [1.0]")
    add("--early-stopping-patience", type=whole_number, default=10, help="epochs without a better one; 0: never [10]")
    add("--select", choices=("macro_f1", "macro_auc", "macro_average_precision", "val_loss"), default="macro_f1",
        help="figure on val that epochs are compared by; then macro average precision, then lower loss [macro_f1]")
    add("--use-ema", action="store_true", help="validate, save and predict with averaged weights")
    add("--soup", action="store_true", help="keep the mean of the three best epochs' weights where better on val")
    add("--amp", action="store_true", help="mixed precision: bf16 where the device has it, else fp16 with loss scaling")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="compile the blocks; auto: on a GPU [auto]")
    add("--deterministic", choices=("on", "off"), default="on",
        help="on a GPU the same seed gives the same bits; off: its fastest kernels, equal to rounding [on]")
    add("--slice-chunk", type=count, metavar="N", help="slices through the backbone at once [from free memory]")
    add("--grad-checkpointing", choices=("auto", "on", "off"), default="auto",
        help="compute activations again in the backward pass; auto: where they would not fit in memory [auto]")
    add("--layer-decay", type=multiple, default=1.0, help="each block's rate as a multiple of the next one's [1.0]")
    add("--backbone-lr-scale", type=multiple, default=1.0, help="multiple of --lr for the backbone [1.0]")
    add("--lora-rank", type=whole_number, default=0, metavar="R", help="train adapters, merged on saving; 0: none [0]")
    add("--skip-air", action="store_true", help="leave patches outside the body out of the ViT (SigLIP family)")
    add("--cache-features", type=Path, metavar="DIR", help="keep a frozen backbone's features there; no augmentation")
    add("--seed", type=whole_number, default=42, help="the same seed on the same machine gives the same run [42]")

    add = parser.add_argument_group("output").add_argument
    add("--resume", metavar="auto|FOLDER",
        help="auto: go on with the run in --output-dir, or start one where there is none; or the folder of a run [off]")
    add("--overwrite", action="store_true", help="replace the run that --output-dir holds")
    add("--save-every-minutes", type=amount, default=15.0, help="save within an epoch too; 0: only after it [15]")
    add("--output-dir", type=Path, default=Path("./outputs"), help="folder for everything a run writes [./outputs]")
    add("--log-interval", type=count, default=50, help="forward passes between updates of the running loss [50]")
    add("--wandb-project", default="siglip-ct-classification", help="Weights & Biases [siglip-ct-classification]")
    add("--wandb-log-model", action="store_true", help="upload best_model.pth there when training ends [it stays here]")
    add("--wandb-mode", choices=("auto", "online", "offline", "disabled"), default="auto",
        help="auto: online with a key and a network, else offline [auto]")

    add = parser.add_argument_group("prediction").add_argument
    add("--test-only", type=Path, nargs="+", metavar="CHECKPOINT",
        help="predict with this checkpoint of ours, or with the mean logits of several or a folder of them, and stop")
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="with --test-only, in place of --csv: scans, DICOM folders, folders that hold any of them; ids are names")
    add("--test-output", type=Path, default=Path("test_predictions.csv"),
        help="a bare name goes to --output-dir [test_predictions.csv]")
    add("--test-split", help="split to predict [test if the CSV has it, else val]")
    add("--threshold", type=threshold_source, default=0.5, metavar="T|auto|FILE",
        help="positive at or above it; auto: tuned per label on val, or the checkpoint's own; or a JSON file [0.5]")
    add("--threshold-objective", choices=("f1", "youden", "crg"), default="f1", help="what auto maximises [f1]")
    add("--aggregate", choices=("none", "series", "patient"), default="none",
        help="average the logits of a scan's reconstructions, or of all scans of a patient [none]")
    add("--explain", type=whole_number, default=0, metavar="N",
        help="draw where a finding was seen, for each label in the N most probable scans called positive; 0: off [0]")
    add("--score", type=Path, metavar="PREDICTIONS",
        help="metrics, intervals and report of a table of id and {label}_prob against the labels in --csv, and stop")
    add("--bootstrap", type=whole_number, default=1000, help="resamples for 95 %% intervals; 0: none [1000]")
    add("--report", type=Path, metavar="DIR", help="write DIR/report.html anew from the files there and stop")
    return parser
# fmt: on


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """Settings by their names as arguments."""
    argv = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if name == "windows" and not isinstance(value, str):
            value = ",".join(f"{lo}:{hi}" for lo, hi in value)
        if isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        elif value is not None and value is not False:
            argv.append(flag if value is True else f"{flag}={value}")
    return argv


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, checked for conflicts; all that is wrong is told at once (exit 2). `command` is what was typed."""
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["finetune_siglip.py", *argv])
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    if config := first.parse_known_args(argv)[0].config:
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            stored = content.get("Settings, training") or content["Settings, prediction"]
            argv = as_arguments(stored | dict.fromkeys(("resume", "overwrite", "config"))) + argv  # of one start
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            parser.error(f"--config {config}: not the run.json of a run of this script ({error})")
    parser.wrong += parser.unknown_flags(argv)
    foreign = bool(parser.wrong)
    args, rest = parser.parse_known_args(argv, argparse.Namespace(command=command))
    if rest and not foreign:  # else these are the values of the unknown flags
        parser.wrong.append(f"there is no flag before {' '.join(rest)}")
    parser.wrong += [] if args.report else conflicts(args)
    if parser.wrong:
        parser.error(parser.wrong.pop())
    if args.scheduler == "warmup":
        args.scheduler, args.warmup = "cosine", args.warmup or "5%"
    return args


def conflicts(args: argparse.Namespace) -> list[str]:
    """What is lacking, and what can't go together."""
    training = not (args.test_only or args.check_data or args.prepare or args.score)
    named = args.label_columns or []
    (lo, hi), repeated = args.hu_range, sorted({name for name in named if named.count(name) > 1})
    frozen = args.freeze_up_to != 0 and not args.lora_rank
    return [message for wrong, message in (
        (not args.csv and not args.images, "--csv is required"),
        (args.images and not args.test_only, "--images needs --test-only"),
        (args.images and args.csv, "--images takes the place of --csv: leave out one"),
        (training and not named, "--label-columns is required"),
        (training and not args.pretrained, "--pretrained is required unless --test-only names a checkpoint"),
        (not -math.inf < lo < hi < math.inf, f"--hu-range needs LO < HI, not {lo:g} {hi:g}"),
        (args.resume and args.overwrite, "--resume continues a run and --overwrite replaces it: leave out one of them"),
        (args.dropout_rate == 1, "--dropout-rate must be below 1"),
        (args.cache_features and not frozen, "--cache-features needs a frozen backbone: no LoRA, --freeze-up-to all"),
        (repeated, f"--label-columns names {', '.join(repeated)} twice"),
    ) if wrong]  # fmt: skip


# ── 2 Machine ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Device, precision, ranks, signals, random numbers, logging, files: the one place that reads the environment.


def own_rank() -> int:
    """The number of this process among those of the run, known before they have met; one alone is 0, whatever RANK."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in those seconds is no traceback either
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere if own_rank() else sys.stderr):  # 0 says the same
        parse_args()  # --help and a wrong flag are answered here, before the seconds that importing torch takes
        if not own_rank():
            with suppress(OSError):  # nobody may be listening
                print("loading PyTorch …", flush=True)
        if lacking := [name for name in ("deflate", "numpy", "torch") if not find_spec(name)]:
            build_parser().exit(3, f"error: needs {', '.join(lacking)}: pip install -r requirements.txt\n")

import deflate
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Runtime:
    """Where a run takes place; `amp_dtype` is None in full precision."""

    device: torch.device
    amp_dtype: torch.dtype | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)


# Several processes. A rank that dies closes its connections: whoever exchanges something with it through gloo finds out
# at once, leaves, and so takes along those that wait for it. One that hangs is found out when the timeout is over. What
# rank 0 does alone (save, publish) may take longer than any timeout that is of use: for that the others wait in a group
# of their own, `unhurried`. Nobody leaves before rank 0 has committed and published, since whoever launched the ranks
# ends all of them as soon as the first has ended.


def init_runtime(amp: bool, deterministic: bool = True) -> Runtime:
    """Device and precision of this process, and its place among those that `torchrun` started, which it meets."""
    rank, world_size, device = own_rank(), int(os.environ.get("WORLD_SIZE", 1)), torch.device("cpu")
    with warnings.catch_warnings(record=True) as said:  # such as a driver that is too old
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable and (said or (torch.version.cuda is None and Path("/proc/driver/nvidia/version").exists())):
        why = str(said[0].message).split(". ")[0] if said else "this PyTorch was built without CUDA"
        log.warning("running on the CPU, for PyTorch can't use the GPU's driver: %s", why)
    if usable:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # see add_in_fixed_order; read by the first product
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    amp_dtype = (torch.bfloat16 if has_bf16 else torch.float16) if amp else None
    if world_size > 1 and not torch.distributed.is_initialized():
        backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30), device_id=gpu)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a torchrun that dies stops its ranks, which would else train on
            torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
    return Runtime(device, amp_dtype, rank, world_size)


@contextmanager
def together(runtime: Runtime, stop: StopRequest) -> Iterator[None]:
    """End when all ranks are here, however long that takes: the work is done, or they have agreed on a stop."""
    several, agreed = runtime.world_size > 1, True
    if several:
        unhurried: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    try:
        yield
    except BaseException as error:
        agreed = isinstance(error, Interrupted) and stop.patient
        raise
    finally:
        if agreed and several:
            torch.distributed.barrier(unhurried)
            torch.distributed.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an exchange with other ranks has failed: gloo raises plain RuntimeErrors that name its source files."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def may_speak(error: BaseException) -> bool:
    """Whether this rank is to say why the run ends, so that each reason is read once: rank 0 where it knows.

    A lost connection is a reason only where no rank has given another.
    """
    rank = own_rank()
    if not torch.distributed.is_initialized():
        return rank == 0 or not isinstance(error, UserError)  # all have the same arguments
    time.sleep(1 if rank else 0)
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        speakers, same = (store.add(f"said/{what}", 1) for what in ("anything", str(error)))
    except RuntimeError:  # the store is gone with rank 0 or torchrun
        return True
    return (speakers if is_lost(error) else same) == 1


def leave(code: int) -> None:
    """End a rank that has not parted from the others: neither PyTorch nor NCCL may wait for them on the way."""
    if torch.distributed.is_initialized():
        time.sleep(0 if own_rank() else 3)  # the store in which the others look up what has been said may be here
        os._exit(code)


def usable_cores() -> int:
    """Cores that this process may use, shared with the other ranks on its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BadInput."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as a JSON object ({error}): get it again, or remove it") from None
    return content


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from (seed, epoch, row, …): equal parts give equal numbers on every machine."""
    digest = hashlib.blake2b(np.asarray(parts, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*parts: int) -> None:
    """Seed every generator in use, so that what follows is a function of `parts` and not of what ran before."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002, other packages draw from it
    torch.manual_seed(seed)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop; a second one leaves at once.

    While `patient`, a stop waits for the next point where the state can be saved, and whoever works polls
    `signal_number`. Before and after that, and while data is waited for, Interrupted is raised on the spot.
    """

    ECHO = 2.0  # seconds: torchrun and srun pass on a signal that has already come, and that is no second request

    def __init__(self, patient: bool = True):
        self.signal_number, self.asked_at, self.patient = 0, 0.0, patient

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def reason(self, error: BaseException) -> BaseException:
        """`error`, or the stop that needn't wait and is behind it: C code can turn Interrupted into its own errors."""
        return Interrupted(self.signal_number) if self.signal_number and not self.patient else error

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Nothing is half done while data is waited for, and that may take long: a stop doesn't wait for it."""
        was_patient, self.patient = self.patient, False
        try:
            if self.signal_number:
                raise Interrupted(self.signal_number)
            yield
        finally:
            self.patient = was_patient

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.signal_number:
            self.signal_number, self.asked_at = number, now
            if not self.patient:
                raise Interrupted(number)
        elif now - self.asked_at > self.ECHO:
            os._exit(128 + number)  # files are written aside and renamed, so nothing is torn by leaving here


def end_readers() -> None:
    """Kill the processes that read: nothing gentler reaches them, and a slow read would be waited for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises for each of them
    for child in torch.multiprocessing.active_children():
        child.kill()


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals back; a process started here never gets them: a stop is sent to every process of a job, but the main
    one saves and needs its data. At the latest it ends with this one."""
    atexit.unregister(end_readers)
    atexit.register(end_readers)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def first_line(error: BaseException) -> str:
    """An exception for a one-line message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def optional(what: str) -> Iterator[None]:
    """For logs, pictures and reports: one that fails is left out, which is said, and stops nothing."""
    try:
        yield
    except Exception as error:
        log.warning("%s is left out: %s", what, first_line(error))


class ConsoleHandler(logging.Handler):
    """Prints above a progress bar rather than through it; a full disk, or nobody, behind it is no reason to stop."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        urgent = record.levelno >= logging.WARNING
        text = f"{record.levelname.lower()}: {record.getMessage()}" if urgent else record.getMessage()
        stream = sys.stderr if urgent else sys.stdout
        try:
            tqdm.write(text, file=stream)
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with suppress(OSError, ValueError, AttributeError):  # lest the interpreter fails on the rest at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LineFormatter(logging.Formatter):
    """Puts the time before each line of a message."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname:7} "
        return "\n".join(head + line for line in record.getMessage().splitlines())


def setup_logging(output_dir: Path | None, is_main: bool) -> None:
    """Log to the console and, on the main process, to `training.log` in `output_dir`."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    logging.raiseExceptions = False  # a full disk under training.log is no reason to stop, nor for a traceback per line
    logging.addLevelName(DETAIL, "DETAIL")
    log.setLevel(DETAIL if is_main else logging.ERROR)
    log.propagate = False
    log.addHandler(ConsoleHandler(logging.INFO))
    if output_dir and is_main:
        with optional("training.log"):
            to_file = logging.FileHandler(output_dir / "training.log", encoding="utf-8")
            to_file.setFormatter(LineFormatter())
            log.addHandler(to_file)


def flat_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Nested figures under one name each, `Lung nodule/auc`; undefined ones are left out."""
    import pandas as pd

    (flat,) = pd.json_normalize(figures, sep="/").to_dict("records")
    return {str(name).replace("per_label/", ""): value for name, value in flat.items() if value is not None}


class Tracker:
    """Weights & Biases, or nothing: its first trouble is its last, a warning, and training goes on without it."""

    def __init__(self, run: Any = None, seen: int = 0):
        self.run, self.seen = run, seen  # so many epochs have been logged

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.attempt(lambda run: run.finish(exit_code=int(kind is not None)))

    def attempt(self, action: Callable[[Any], object]) -> None:
        try:
            if self.run is not None:
                action(self.run)
        except Exception as error:
            log.warning("Weights & Biases stopped: %s", first_line(error))
            self.run = None

    def record(self, lines: Sequence[str]) -> None:
        """Log those lines of results.jsonl that have not been logged yet: line i belongs to epoch i + 1."""
        new, self.seen = lines[self.seen :], max(self.seen, len(lines))
        self.attempt(lambda run: [run.log(flat_figures(json.loads(line))) for line in new])

    def summarise(self, figures: dict[str, Any]) -> None:
        self.attempt(lambda run: run.summary.update(flat_figures(figures)))

    def keep_model(self, path: Path, epoch: int) -> None:
        """Upload a checkpoint, waiting for it as long as 2 MB a second would take. An offline run leaves it here."""

        def upload(run: Any) -> None:
            if not run.offline:
                import wandb

                model = wandb.Artifact(f"model-{run.id}", type="model")
                model.add_file(str(path), policy="immutable", skip_cache=True)  # no further copy on this disk
                sent = run.log_artifact(model, aliases=["best", f"epoch-{epoch}"])
                sent.wait(timeout=20 + path.stat().st_size // 2_000_000)

        self.attempt(upload)


def start_wandb(project: str, mode: str, config: dict[str, Any], folder: Path, run_id: str) -> Tracker:
    """A tracker of this run, which goes on in the run `run_id` where the server has it; offline where it can't be
    reached, and none without the package. `auto` is WANDB_MODE, else online."""
    mode = os.environ.get("WANDB_MODE", "online") if mode == "auto" else mode
    if mode == "disabled" or own_rank():
        return Tracker()
    try:
        import wandb
        from requests.utils import get_netrc_auth

        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or get_netrc_auth(host)):
            mode = "offline"  # else wandb asks for a key, and waits
        how: dict[str, Any] = {"mode": mode, "resume": "allow" if mode == "online" else None}
        settings = wandb.Settings(silent=True, console="off", init_timeout=20, finish_timeout=10)
        run = wandb.init(project=project, config=config, dir=folder, id=run_id, settings=settings, **how)
        run.define_metric("*", step_metric="epoch")
    except Exception as error:  # a refused key, a server that hangs: never a reason to lose a run
        log.warning("Weights & Biases is not %s: %s", mode, first_line(error))
        if mode != "online" or isinstance(error, ImportError):
            return Tracker()
        with suppress(Exception):
            wandb.teardown()  # it would go on trying, and keep the id
        return start_wandb(project, "offline", config, folder, run_id)
    if run.offline:
        log.info("Weights & Biases: offline, `wandb sync %s` uploads later", Path(run.dir).parent)
    return Tracker(run, seen=int(run.summary.get("epoch") or 0))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: the GPU's, or its share of the machine's and of its control group's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier passes have left with PyTorch is free as well
        return torch.cuda.mem_get_info(device)[0]
    free = 4 * 2**30  # where neither is told
    with suppress(OSError, KeyError):
        told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(told["MemAvailable"].split()[0]) * 1024
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free = min(free, int(limit) - int(used)) if limit != "max" else free
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def agree(runtime: Runtime, *wishes: int) -> list[int]:
    """The largest of each wish over all ranks, so that they do the same thing at the same step."""
    if runtime.world_size == 1:
        return list(wishes)
    largest = torch.tensor(wishes, dtype=torch.int64)  # on the CPU, through gloo: the GPU is not waited for
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest.tolist()


def of_all_ranks(runtime: Runtime, value: Any) -> list[Any]:
    """What each rank gives, in their order."""
    values = [value] * runtime.world_size
    if runtime.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def gather_rows(runtime: Runtime, rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n,) and values (n, …) of all ranks, in rising order of row."""
    rows, values = (np.concatenate(parts) for parts in zip(*of_all_ranks(runtime, (rows, values)), strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], values[order]


def sync(path: Path) -> None:
    """Bring what has been written to a file, or what a folder lists, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Files are whole or not there: what is written goes to a file beside the one it becomes, to the disk, and only then
# gets its name; the folder follows it to the disk, since without that a power cut can undo the renaming.

TEMPORARY = r"\..+\.\w+\.siglip\.tmp"  # what its first name looks like


@contextmanager
def put_in_place(path: Path, size: int = 0, lasting: bool = True) -> Iterator[Path]:
    """Give the file that the body makes, under the TEMPORARY name that it gets here, the name `path`: `path` is the old
    or the new file, after a loss of power too if it is to be `lasting`.

    Raises BadEnvironment, telling the `size` in bytes where it is known; whatever happens, nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.siglip.tmp")  # nobody else's, on any machine
    try:
        yield temporary
        if lasting:
            sync(temporary)
        os.replace(temporary, path)
        if lasting:
            sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        why = getattr(error.__cause__ or error.__context__ or error, "strerror", None) or first_line(error)
        needed = f"{size:,} bytes are needed and " if size else ""
        raise BadEnvironment(f"{path} can't be written ({why}); {needed}{free:,} bytes are free there") from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # renaming one name of a file to another of its names leaves both


def save_atomic(path: Path, write: Callable[[BinaryIO], object], size: int = 0) -> None:
    """Let `write` fill a file that becomes `path` as `put_in_place` has it."""
    with put_in_place(path, size) as temporary, open(temporary, "xb") as file:
        write(file)


def save_bytes(path: Path, data: bytes) -> None:
    save_atomic(path, lambda file: file.write(data), len(data))


def write_rows(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """A CSV file, whole or not at all."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    save_bytes(path, buffer.getvalue().encode())


# ── 3 Table ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# The CSV: every data error found and reported at once, with its row.

TABLE_COLUMNS = ("series_id", "split", "img_path", "patient_id")
SPLITS = ("train", "val", "test")
LABEL_CELLS = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}  # as pandas and Excel write them
LABEL_CELLS.update(dict.fromkeys(("", "-1", "-1.0"), math.nan))


@dataclass(frozen=True)
class Table:
    """Rows of the CSV; every list is in CSV order."""

    labels: tuple[str, ...]
    series_ids: list[str]  # byte for byte as in the file
    patient_ids: list[str]
    splits: list[str]
    paths: list[Path]  # relative ones are resolved against the CSV's folder
    targets: np.ndarray  # (n, L) float32: 0, 1, NaN = unknown
    line_numbers: list[int]  # in the CSV file, the header being line 1

    def __len__(self) -> int:
        return len(self.series_ids)

    def name(self, row: int) -> str:
        """How messages name a row."""
        return f"series {self.series_ids[row]!r} (line {self.line_numbers[row]})"

    def subset(self, rows: Sequence[int]) -> Table:
        """The given rows, in the given order."""
        names = ("series_ids", "patient_ids", "splits", "paths", "line_numbers")
        lists = {name: [getattr(self, name)[row] for row in rows] for name in names}
        return Table(labels=self.labels, targets=self.targets[list(rows)], **lists)

    def split(self, name: str) -> Table:
        """The rows of one split."""
        return self.subset([row for row, split in enumerate(self.splits) if split == name])


class Complaints:
    """Data errors gathered by kind: all are told at once, thousands of one kind in a few lines."""

    shown = 20  # of one kind in full

    def __init__(self, where: Path | str):
        self.where = where
        self.found: dict[str, list[tuple[int, str]]] = {}

    def add(self, kind: str, line: int, message: str) -> None:
        self.found.setdefault(kind, []).append((line, message))

    def raise_if_any(self) -> None:
        """BadInput with one message per error, in the order of lines within each kind."""
        messages = []
        for kind, items in self.found.items():
            items.sort()
            messages += [f"{self.where}, line {line}: {message}" for line, message in items[: self.shown]]
            if rest := [line for line, _ in items[self.shown :]]:
                messages.append(f"{self.where}: {len(rest)} more of this kind ({kind}), lines {rest[0]} to {rest[-1]}")
        if messages:
            raise BadInput(*messages)


def unsafe_text(text: str) -> str | None:
    """Why a name cannot be written to a CSV that people open in a spreadsheet, or None."""
    if text.startswith(("=", "+", "-", "@")):
        return "would be run as a formula by spreadsheet programs: let it start with a letter or a digit"
    return "holds a control character: remove it" if re.search(r"[\0-\x1f\x7f]", text) else None


def read_rows(csv_path: Path, wrong: Complaints) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line number, cells) of each row that is not blank; what is no row becomes a complaint.

    Neither pandas nor a type guess: `007`, `NA` and `1e5` are names, and a trailing comma must not shift the columns.
    """
    try:
        if not csv_path.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        text = csv_path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise BadInput(f"{csv_path}: cannot be read ({error.strerror})") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # lines may end as on any system
    rows: list[tuple[int, list[str]]] = []
    cells: list[str] | None = []
    while cells is not None:
        line = reader.line_num + 1
        try:
            if (cells := next(reader, None)) and any(map(str.strip, cells)):
                "".join(cells).encode()
                rows.append((line, cells))
        except UnicodeEncodeError:
            wrong.add("encoding", line, "is not UTF-8 text (UTF-16 or Latin-1?): save the table as CSV UTF-8")
        except csv.Error as error:
            wrong.add("format", line, f"is not a CSV row ({error}): look for a quotation mark too many")
    if not rows or rows[0][0] != 1:
        wrong.raise_if_any()
        raise BadInput(f"{csv_path}, line 1: holds no header: the first line names the columns")
    return rows[0][1], rows[1:]


def find_columns(header: list[str], wanted: list[str], optional: Sequence[str], wrong: Complaints) -> dict[str, int]:
    """Where each wanted column stands; one that is missing or twice there becomes a complaint."""
    for name in wanted:
        if header.count(name) > 1:
            wrong.add("columns", 1, f"column {name!r} appears {header.count(name)} times: rename or remove the others")
        elif name not in header and name not in optional:
            near = difflib.get_close_matches(name, header, n=1, cutoff=0.75)
            hint = f"the nearest one is {near[0]!r}" if near else f"it has {', '.join(map(repr, header))}"
            if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
                hint = "the cells seem to be separated by something else than commas"
            wrong.add("columns", 1, f"the header has no column {name!r}: {hint}")
    return {name: header.index(name) for name in wanted if name in header}


def patient_of(series_id: str, patient_cell: str) -> str:
    """The patient: the cell if filled; `train_12` for `train_12_a_1`; else the series is its own patient."""
    return patient_cell or re.sub(r"\A([a-z]+_\d+)_[a-z]+_\d+(\.\w+)*\Z", r"\1", series_id, flags=re.ASCII)


def path_of(folder: Path, cell: str) -> Path:
    """The path that a cell names, relative ones from the CSV's folder; written on Windows where it only so exists."""
    if "\\" in cell and not os.path.lexists(folder / cell):
        cell = cell.replace("\\", "/")
    return folder / cell if cell else Path()


def scan_source(path: Path) -> tuple[Path, str]:
    """(a scan's path, ""), or of FOLDER#SERIES_UID the folder and the UID of a DICOM series in it."""
    folder, mark, series = str(path).rpartition("#")
    named = mark and re.fullmatch(r"[0-9.]+", series) and not path.exists()
    return (Path(folder), series) if named else (path, "")


def path_complaint(path: Path) -> str | None:
    """Why there is no scan at `path`, by its entry in the file system alone."""
    try:
        entry = scan_source(path)[0].stat()
    except (OSError, ValueError) as error:
        return f"{path}: {getattr(error, 'strerror', None) or error}: check img_path and that the disk is mounted"
    regular = stat.S_ISREG(entry.st_mode)
    if stat.S_ISDIR(entry.st_mode) or (regular and entry.st_size):  # a folder is one of DICOM slices
        return None
    return f"{path}: is {'an empty' if regular else 'not a regular'} file"  # opening a pipe would wait for ever


def check_row(line: int, row: dict[str, str], labels: Sequence[str], first: dict[str, int], wrong: Complaints) -> None:
    """Complaints on what is wrong with one row in itself, and on an id that is on an earlier line (`first`) too."""
    series, patient, split = row.get("series_id", f"row {line}"), row.get("patient_id", ""), row.get("split", "test")
    if reason := unsafe_text(series) if series else "is empty: give every scan an id":
        wrong.add("series_id", line, f"series_id {series!r} {reason}")
    elif first.setdefault(series, line) != line:
        wrong.add("series_id", line, f"series_id {series!r} is on line {first[series]} too: each scan has its own")
    if reason := unsafe_text(patient):
        wrong.add("patient_id", line, f"patient_id {patient!r} {reason}")
    if split not in SPLITS:
        wrong.add("split", line, f"split {split!r} is unknown: it must be one of {', '.join(SPLITS)}")
    if not row.get("img_path", "there"):
        wrong.add("img_path", line, "img_path is empty: it names the file of the scan")
    for name in labels:
        if row.get(name, "").strip().lower() not in LABEL_CELLS:
            must = "it must be 0 or 1 (or False, True), or empty or -1 for unknown"
            wrong.add("labels", line, f"label {name!r} is {row[name]!r}: {must}")


def check_table(table: Table, wrong: Complaints, volumes: bool, allow_patient_overlap: bool) -> None:
    """BadInput with everything that `wrong` holds and that the rows contradict together or on the disk."""
    if not len(table) and not wrong.found:
        wrong.add("rows", 1, "no row follows the header")
    with ThreadPoolExecutor(16) as pool:  # a network disk answers many questions at once
        problems = list(pool.map(path_complaint, table.paths if volumes else ()))
    for line, problem in zip(table.line_numbers, problems, strict=volumes):
        if problem:
            wrong.add("img_path", line, problem)
    overlaps = []
    for what, keys in (("patient", table.patient_ids), ("file", [os.path.normpath(path) for path in table.paths])):
        seen: dict[str, dict[str, int]] = {}
        for line, key, split in zip(table.line_numbers, keys, table.splits, strict=True):
            if split in SPLITS and key not in ("", "."):
                seen.setdefault(key, {}).setdefault(split, line)
        for key, places in seen.items():
            if len(places) > 1:
                where = ", ".join(f"{split} (line {line})" for split, line in places.items())
                overlaps.append((max(places.values()), f"{what} {key!r} is in {where}"))
    if overlaps and allow_patient_overlap:
        what = f"{len(overlaps)} patients or files are in two splits, such as line {overlaps[0][0]}: {overlaps[0][1]}"
        log.warning("%s: scores will look better than they are", what)
    for line, message in () if allow_patient_overlap else overlaps:
        wrong.add("overlap", line, f"{message}: one split only, or --allow-patient-overlap")
    wrong.raise_if_any()


def read_table(
    csv_path: Path | str, label_columns: Sequence[str], *, labels_required: bool = True,
    allow_patient_overlap: bool = False, volumes: bool = True,
) -> Table:  # fmt: skip
    """The checked rows of the CSV.

    Raises BadInput with every error of the table, each with its line. `labels_required=False` (prediction) accepts a
    table without some or all label columns, whose targets are then NaN, and only warns of patients in two splits.
    `volumes=False` (scoring) needs neither paths nor splits and looks at no file.
    """
    csv_path, labels = Path(csv_path), tuple(label_columns)
    odd = [x for x in labels if labels.count(x) > 1 or x in TABLE_COLUMNS or not x.strip() or unsafe_text(x)]
    if odd or (labels_required and not labels):
        rule = "each finding once, by its column, which is no formula of a spreadsheet and holds no control character"
        raise BadInput(f"--label-columns {shlex.join(odd)}: name {rule}")
    wrong = Complaints(csv_path)
    header, lines = read_rows(csv_path, wrong)
    optional = ("patient_id", *(() if labels_required else labels), *(() if volumes else ("split",)))
    wanted = [name for name in (*TABLE_COLUMNS, *labels) if volumes or name != "img_path"]
    at = find_columns(header, wanted, optional, wrong)
    rows: dict[int, dict[str, str]] = {}
    first: dict[str, int] = {}
    for line, cells in lines:
        if len(cells) == len(header):
            rows[line] = {name: cells[place] for name, place in at.items()}
            check_row(line, rows[line], labels, first, wrong)
        else:
            hint = "look for a comma at its end, or inside a name without quotes"
            wrong.add("cells", line, f"has {len(cells)} cells where the header has {len(header)}: {hint}")
    ids, splits, cells, patients = ([row.get(name, "") for row in rows.values()] for name in TABLE_COLUMNS)
    known = [[LABEL_CELLS.get(row.get(name, "").strip().lower(), math.nan) for name in labels] for row in rows.values()]
    table = Table(
        labels, ids, list(map(patient_of, ids, patients)), splits, [path_of(csv_path.parent, cell) for cell in cells],
        np.array(known, np.float32).reshape(len(rows), len(labels)), list(rows),
    )  # fmt: skip
    check_table(table, wrong, "img_path" in at, allow_patient_overlap or not labels_required)
    return table


# ── 4 Volume ────────────────────────────────────────────────────────────────────────────────────────────────────────
# From a file to the int16 tensor that travels to the device: stored files, resampling, raw scans, what the values mean,
# the cache, the loader, augmentation, the check, preparation.

AIR = -1024  # HU of what lies outside the scan
HU_LIMIT = 8192  # no tissue, metal or padding in use lies beyond
WINDOWED_SCALE = 32767  # int16 steps of a stored window value of 1
READ_DELAYS = (0.5, 2.0)  # seconds before the second and third try at a volume: network disks come back


class BadVolume(BadInput):
    """One scan that cannot be read as what it should be."""


@dataclass(frozen=True)
class Preprocessing:
    """Everything that decides a voxel's value on its way to the model; stored in every checkpoint."""

    orientation: str  # towards which side of the patient each stored axis rises, e.g. "SPL", "RAS"
    intensity: str  # "hu" | "unit" | "windowed"
    hu_range: tuple[float, ...]  # (lo, hi), what 0 and 1 stand for with "unit"
    windows: tuple[tuple[float, float], ...]  # K (lo, hi) pairs in HU
    grid: tuple[int, ...]  # (S, H, W)
    channels: int = 1  # channels that leave the loader: 1, or C with "windowed"
    spacing: tuple[float, ...] | None = None  # mm per voxel (D, H, W) that raw scans are brought to
    trusted: bool = False  # the intensity was named on purpose: a file's range is not held against it

    def to_dict(self) -> dict[str, object]:
        """Plain lists, numbers and strings."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, stored: dict) -> Preprocessing:
        """The inverse of `to_dict`; fields that a newer version added are ignored."""
        known = {f.name: stored[f.name] for f in dataclasses.fields(cls) if f.name in stored}
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        return cls(**known | {"windows": tuple(map(tuple, stored["windows"]))})


@dataclass(frozen=True)
class Header:
    """What a file says of its volume before any voxel is read."""

    shape: tuple[int, ...]  # (C, then the three stored axes)
    dtype: np.dtype
    orientation: str | None = None  # named by the file itself
    spacing: tuple[float, ...] | None = None  # mm along the stored axes
    raw: bool = False  # knows its own geometry
    crc: int | None = None  # of the whole array: equal ones hold the same scan
    source: str | None = None  # digest of what `--prepare` made it from


# What reads a format is a generator: of what the file says of its volume, and then of the voxels, for all headers are
# read before any voxel. None names the file in its errors: that is done by `reading_scan` alone, which also turns
# whatever error a library makes of a damaged file into BadVolume.


@contextmanager
def reading_scan(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a scan ends in BadVolume, or BadEnvironment, that begins with its path."""
    try:
        with np.errstate(all="ignore"):
            yield
    except (BadVolume, BadEnvironment) as error:
        text = str(error)
        raise type(error)(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except (UserError, MemoryError):
        raise
    except ImportError as error:
        raise BadEnvironment(f"{path}: needs {error.name}: pip install -r requirements.txt") from None
    except Exception as error:
        if strerror := getattr(error, "strerror", None):
            raise BadVolume(f"{path}: cannot be read ({strerror})") from None
        text = " ".join(str(error).split())[-200:]
        raise BadVolume(f"{path}: is damaged or not what it is named ({type(error).__name__}: {text})") from None


@cache
def raw_library(name: str) -> Any:
    """A package that reads scans, told to be quiet: what it warns of is checked here."""
    library = importlib.import_module(name)
    warnings.filterwarnings("ignore", module=name)
    logging.getLogger("nibabel.global" if name == "nibabel" else name).setLevel(logging.CRITICAL)
    if name == "pydicom":
        library.config.settings.reading_validation_mode = library.config.IGNORE
    return library


# Stored volumes: NPZ, NPY, and blosc2's B2ND as nnU-Net has it. An NPZ is not given to numpy.load, which believes what
# the archive says of itself (sizes, pickles) and inflates it at half the speed of libdeflate.

ONE_PARSER = threading.Lock()  # Python up to 3.11 fails at random where two threads parse literals (gh-106905)


def parse_npy(head: bytes, size: int) -> tuple[tuple[int, ...], np.dtype, Callable[[Any], np.ndarray]]:
    """Shape and type of an array of `size` bytes in NumPy's format, and what makes the array of all of them."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with ONE_PARSER:
        shape, fortran, dtype = parse(stream)
    start = stream.tell()
    order: Any = "F" if fortran else "C"
    if dtype.hasobject or start + math.prod(shape) * dtype.itemsize != size or min(shape, default=1) < 1:
        raise ValueError(f"its header does not match its data: {dtype} {shape} in {size} bytes")
    return shape, dtype, lambda data: np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)


def read_npy(path: Path) -> Iterator[Any]:
    """Shape, type and no more facts of an array; then it."""
    with path.open("rb") as file:
        shape, dtype, as_array = parse_npy(file.read(4096), path.stat().st_size)
    yield shape, dtype, {}
    yield as_array(path.read_bytes())


def read_npz(path: Path) -> Iterator[Any]:
    """Shape and type of the member `image`, and what others say of it; then the array."""
    told: dict[str, Any] = {}
    with path.open("rb", buffering=0) as file, zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if (image := members.get("image.npy")) is None:
            raise BadVolume(f"has no member 'image' (but {', '.join(sorted(members)[:9])}): savez_compressed(image=…)")
        if not len(members) == len(archive.infolist()) <= 64:
            raise ValueError("its members are double, or too many")
        with archive.open(image) as stream:
            shape, dtype, as_array = parse_npy(stream.read(4096), image.file_size)
        for name in ("orientation", "spacing", "source"):
            if (member := members.get(f"{name}.npy")) and member.file_size <= 4096:
                content = archive.read(member)
                told[name] = parse_npy(content, len(content))[-1](content).ravel().tolist()
    yield shape, dtype, told | {"crc32": image.CRC}
    with path.open("rb") as packed:
        packed.seek(image.header_offset)
        packed.seek(sum(struct.unpack("<26xHH", packed.read(30))), os.SEEK_CUR)
        data: Any = packed.read(image.compress_size)
    if image.compress_type == zipfile.ZIP_DEFLATED:
        data = deflate.deflate_decompress(data, image.file_size)
    if len(data) != image.file_size or deflate.crc32(data) != image.CRC:
        raise ValueError("its bytes do not match their checksum")
    yield as_array(data)


def facts_check(array: Any, facts: dict[str, Any]) -> int:
    """A checksum of all that a B2ND file says of its voxels."""
    return zlib.crc32(json.dumps([list(array.shape), str(array.dtype), facts], sort_keys=True).encode())


def read_b2nd(path: Path) -> Iterator[Any]:
    """Shape, type and what a blosc2 array says of itself; then it. Only those of `--prepare` have checksums."""
    array = raw_library("blosc2").open(str(path), mode="r", dparams={"nthreads": 1})
    told = array.schunk.vlmeta.getall().get("scan", {})
    if told.pop("check", None) != (facts_check(array, told) if told else None):
        raise ValueError("its facts do not match their checksum")
    yield tuple(array.shape), array.dtype, told
    voxels = array[...]
    if told and told["crc32"] != deflate.crc32(voxels.data):
        raise ValueError("its voxels do not match their checksum")
    yield voxels


def read_stored(path: Path) -> Iterator[Any]:
    """Header of an NPZ, NPY or B2ND file, by its first bytes; then voxels (C, three stored axes), C = 1 if left out."""
    with path.open("rb") as file:
        head = file.read(9)
    formats = {b"PK\3\4": read_npz, b"\x93NUMPY": read_npy, b"(?s)..b2frame": read_b2nd}
    if not (found := [read for start, read in formats.items() if re.match(start, head)]):
        raise BadVolume("is no NPZ, NPY, B2ND, NIfTI, MHA or NRRD file, nor a folder with a series of DICOM slices")
    shape, dtype, told = next(scan := found[0](path))
    shape = (1, *shape) if len(shape) == 3 else shape
    if (size := math.prod(shape) * dtype.itemsize) > max(1 << 25, 200 * path.stat().st_size):
        raise BadVolume(f"would inflate to {size} bytes: noise alone keeps a CT below 20 times its packed size")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise BadVolume(f"holds {dtype}, not int16, float16, float32 or the like: convert it")
    if len(shape) != 4:
        raise BadVolume(f"has shape {shape}, not (C, D, H, W): drop axes of length 1 with np.squeeze(image)")
    if shape[-1] <= 4 < shape[0]:
        raise BadVolume(f"has shape {shape}, channels last: store np.moveaxis(image, -1, 0)")
    code = "".join(np.ravel(told.get("orientation", "")).astype(str)) or None
    if code and sorted(PATIENT_AXIS.get(letter, 9) for letter in code) != [0, 1, 2]:
        raise BadVolume(f"its member 'orientation' is {code!r}, not a code such as SPL")
    spacing = tuple(map(float, told.get("spacing", ()))) or None
    if spacing and not (len(spacing) == 3 and all(0.05 < mm < 50 for mm in spacing)):
        raise BadVolume(f"its member 'spacing' is {spacing}, not mm along the three stored axes")
    yield Header(shape, dtype, code, spacing, crc=told.get("crc32"), source=bytes(told.get("source", ())).hex() or None)
    yield next(scan).reshape(shape)


def spl_axes(orientation: str) -> tuple[list[int], list[bool]]:
    """For each of the axes S, P, L: which stored axis it is, and whether that one runs the other way."""
    stored = [PATIENT_AXIS[letter] for letter in orientation]
    axes = [stored.index(PATIENT_AXIS[letter]) for letter in "SPL"]
    return axes, [orientation[axis] != letter for axis, letter in zip(axes, "SPL", strict=True)]


def to_spl(volume: np.ndarray, orientation: str) -> np.ndarray:
    """(C, three stored axes) as a view (C, D, H, W): slices feet to head, rows front to back, columns right to left."""
    axes, flips = spl_axes(orientation)
    view = volume.transpose(0, *(1 + axis for axis in axes))
    return view[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flips))]


# Resampling has the meaning of torch's interpolate(antialias=True, align_corners=False), one axis after the other: a
# triangle as wide as the output's spacing where the axis shrinks, linear interpolation where it grows. Its matrix is a
# narrow band, so a few outputs at a time are one small dense product. Below a million multiplications, and with nothing
# transposed, OpenBLAS works on the operands as they lie; larger ones it copies first, which takes longer than these do.
# The outputs of the first axis come in blocks whose buffers stay in the processor's cache.


@lru_cache(maxsize=64)
def resample_bands(n_in: int, n_out: int, rows: int) -> list[tuple[slice, slice, np.ndarray]]:
    """The (n_out, n_in) matrix of resampling as blocks of `rows` outputs: (outputs, inputs, float32 weights)."""
    scale = n_in / n_out
    centres = (np.arange(n_out)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(np.arange(n_in) + 0.5 - centres) / max(1.0, scale), 0, None)
    weights /= weights.sum(1, keepdims=True)
    blocks = []
    for start in range(0, n_out, rows):
        block = weights[start : start + rows]
        used = np.flatnonzero(block.any(0))
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((slice(start, start + rows), inputs, np.ascontiguousarray(block[:, inputs], np.float32)))
    return blocks


def resample_channel(channel: np.ndarray, out: np.ndarray, scale: float = 1, offset: float = 0) -> tuple[float, float]:
    """Resample a channel (three axes, any number type) into int16 `out`, as scale * value + offset, rounded. Returns
    the range of the results; BadVolume where int16 can't hold them."""
    (_, rows_in, columns_in), (_, n_rows, n_columns) = channel.shape, out.shape
    sizes = (rows_in, columns_in), (n_rows, columns_in), (n_rows, n_columns)
    block, rows, final = (np.zeros((8, *size), np.float32) for size in sizes)
    products = [(matrix, block[:, take], rows[:, to]) for to, take, matrix in resample_bands(rows_in, n_rows, 8)]
    for to, take, matrix in resample_bands(columns_in, n_columns, 16):
        products.append((rows[:, :, take], np.ascontiguousarray(matrix.T), final[:, :, to]))
    low, high = math.inf, -math.inf
    for outputs, inputs, weights in resample_bands(len(channel), len(out), 8):
        some, n = channel[inputs], len(weights)
        half = some.dtype == np.float16  # torch is 20 times as fast at these as NumPy
        planes = torch.from_numpy(some).float().numpy() if half else some.astype(np.float32)
        np.matmul(weights, planes.transpose(1, 0, 2), out=block[:n].transpose(1, 0, 2))  # a product for each row
        for one, other, product in products:
            np.matmul(one, other, out=product)
        result = final[:n]
        if (scale, offset) != (1.0, 0.0):
            result[:] = result * np.float32(scale) + np.float32(offset)
        if not (result.min() >= -32768 and result.max() <= 32767):  # NaN too
            remedy = "convert it again, or name another --intensity or --hu-range"
            raise BadVolume(f"holds voxels that are not finite, or beyond ±32767: {remedy}")
        low, high = min(low, float(result.min())), max(high, float(result.max()))
        np.copyto(out[outputs], np.rint(result, out=result), casting="unsafe")
    return low, high


# What the values of a scan stand for is told by what every chest shows. Their range does not tell: padding hides a
# missing intercept, and z-scores look like faint HU.

KNOWN_SCALES = (  # the HU that 0 and 1 stand for in what files hold instead of HU, so that `unit` undoes it
    (-1024.0, -1023.0, "its rescale intercept is missing (-1024 in most files)"),
    (1024.0, 1025.0, "its rescale intercept was applied twice"),
    (0.0, 1000.0, "it holds HU / 1000"),
    (250.0, 1500.0, "it holds [-1, 1], of which -1 and 1 stand for -1000 and 1500 HU"),
    (-1000.0, -990.196, "it is an 8-bit picture, of which 0 and 255 stand for -1000 and 1500 HU"),
)


def thinned(volume: np.ndarray) -> np.ndarray:
    """float32 of every n-th voxel along each of three axes, enough of them to judge by."""
    return volume[tuple(slice(None, None, max(1, n // 48)) for n in volume.shape)].astype(np.float32)


def shows_chest(hu: np.ndarray) -> float:
    """Part of the voxels that are muscle, blood or organs (-50 to 150 HU); 0, which says no, where 2 % of the voxels
    are not that, or not lungs. The lowest value and NaN, which may be padding, are left out."""
    body = hu[hu > np.nanmin(hu, initial=math.inf)]
    count = max(1, body.size)
    lungs, muscle = (float(((body > lo) & (body < hi)).sum()) / count for lo, hi in ((-990, -400), (-50, 150)))
    return muscle if min(lungs, muscle) > 0.02 else 0.0


def judge_voxels(header: Header, stored: np.ndarray, hu_range: Sequence[float] = DEFAULT_HU_RANGE) -> str:
    """ "hu", "unit" or "windowed"; BadVolume says why voxels (C, three axes) are none of these and what settles it. NaN
    of a raw scan is a voxel without a value."""
    low, high = (float(f(stored)) for f in ((np.nanmin, np.nanmax) if header.raw else (np.min, np.max)))
    values, some = f"has values from {low:g} to {high:g}", thinned(stored[0])
    advice = "convert it again, or, if all are scaled alike, name the HU of 0 and 1: --intensity unit --hu-range LO HI"
    if not math.isfinite(low + high):
        raise BadVolume("holds voxels that are not finite: leave it out or convert it again")
    if low == high:
        raise BadVolume(f"has the value {low:g} in every voxel: it holds no scan")
    if max(-low, high) > HU_LIMIT:
        raise BadVolume(f"{values}: beyond ±{HU_LIMIT} HU: convert it again, or name --intensity hu if that is meant")
    small = stored.dtype.kind == "f" and max(-low, high) <= 1.001
    if small and len(stored) > 1:
        if low < -1e-3:
            raise BadVolume(f"{values}: windows are 0-1: store (v + 1) / 2")
        return "windowed"
    if small and low >= -1e-3:
        lo, hi = hu_range
        if not header.raw and shows_chest(lo + some * (hi - lo)):
            return "unit"
        doubt = "a raw scan says not of what" if header.raw else f"no lungs and muscle if of {lo:g} to {hi:g} HU"
        raise BadVolume(f"{values}: 0-1, and {doubt}: {advice}")
    if shows_chest(some):
        return "hu"
    share, lo, hi, likely = max((shows_chest(lo + some * (hi - lo)), lo, hi, what) for lo, hi, what in KNOWN_SCALES)
    if share:
        raise BadVolume(f"{values}, not HU: {likely}: --intensity unit --hu-range {lo:g} {hi:g} undoes that")
    scores = " (of z-scores the MEAN and MEAN+DEVIATION)" if high - low < 100 else ""
    raise BadVolume(f"{values}, but no lungs and muscle in HU: {advice}{scores}; --intensity hu if it is right so")


# Raw scans know their own geometry. Each format gives a shape and the steps of its axes, then its HU; `oriented` alone
# checks and turns these. DICOM is read frame by frame with pydicom, for one series may lie in files of one frame,
# of many, or both (highdicom refuses series without FrameOfReferenceUID and is slower than ITK). MHA is parsed here:
# ITK takes damaged voxels for whole ones.

FIELD_OF_VIEW = (480.0, 336.0, 336.0)  # mm (D, H, W) kept around the body: 160 x 224 x 224 voxels at the usual spacing
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # DICOM and ITK count towards left and back, NIfTI towards right and front
NOT_HU = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")  # terms of RescaleType for other quantities
REMEDY = "let dcm2niix straighten it (its file named Tilt), or nibabel.processing.resample_to_output(image, cval=-1024)"
PLACE_TAGS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}  # how many numbers each has
FRAME_GROUPS = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation")
VALUE_TAGS = ("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence")
MHA_TYPES = {"CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4", "FLOAT": "f4",
             "DOUBLE": "f8", "LONG_LONG": "i8", "ULONG_LONG": "u8"}  # fmt: skip
MHA_ALIASES = {"Orientation": "TransformMatrix", "Rotation": "TransformMatrix",
               "ElementByteOrderMSB": "BinaryDataByteOrderMSB"}  # fmt: skip
say_once = cache(log.info)  # a scan is read in every epoch


def oriented(scan: Iterator[Any]) -> Iterator[Any]:
    """Header, then voxels, in SPL (1, D, H, W), of a raw scan: of its shape and steps (3, 3), a column for each stored
    axis, in mm towards right, front and head, then of its HU in int16 or float32, NaN where a voxel has no value."""
    shape, steps = next(scan)
    shape = (*shape[:3], *(n for n in shape[3:] if n != 1))
    if len(shape) != 3 or min(shape) < 2:
        raise BadVolume(f"has shape {shape}: save the one volume of three axes that is meant")
    mm = np.linalg.norm(steps, axis=0)
    if not (np.isfinite(steps).all() and ((mm > 0.05) & (mm < 50) & (mm * shape < 3000)).all()):
        raise BadVolume(f"says its voxels are {mm.tolist()} mm apart: its header is wrong: convert it again")
    u, _, v = np.linalg.svd(steps / mm)
    turn = u @ v  # the nearest directions at right angles; then how far that moves the outermost voxels
    moved = (np.abs(turn.T @ steps - np.diag(mm)) @ (np.array(shape) - 1) / 2 / mm).max()
    if moved > 0.1:
        raise BadVolume(f"its axes are not at right angles, by {moved:.1f} voxels (a tilted gantry?): {REMEDY}")
    if np.abs(np.abs(turn) - np.rint(np.abs(turn))).max() > 0.17:
        raise BadVolume(f"is turned by more than 10 degrees against the patient's axes: {REMEDY}")
    sides = np.abs(turn).argmax(0)
    code = "".join(("LPI", "RAS")[int(turn[side, axis] > 0)][side] for axis, side in enumerate(sides))
    axes = spl_axes(code)[0]
    yield Header((1, *np.array(shape)[axes].tolist()), np.dtype(np.int16), "SPL", tuple(mm[axes].tolist()), raw=True)
    stored = next(scan).reshape(shape, order="F")
    if stored.dtype.kind == "f" and np.isinf(stored).any():
        raise BadVolume("holds infinite voxels: convert it again, without dividing by zero")
    yield to_spl(stored[None], code)


def to_hu(stored: np.ndarray, slope: float = 1, intercept: float = 0) -> np.ndarray:
    """slope * stored + intercept: int16 where that holds every value exactly, else float32."""
    if stored.dtype.kind not in "iuf":
        raise TypeError(f"its voxels are {stored.dtype}, not numbers")
    if stored.dtype == np.int16 and (slope, intercept) == (1, 0):
        return stored
    if stored.dtype.kind != "f" and slope % 1 == intercept % 1 == 0:
        ends = [int(end) * int(slope) + int(intercept) for end in (stored.min(), stored.max())]
        if max(map(abs, (*ends, slope, intercept))) <= 32767:  # what overflows on the way is right again at the end
            return stored.astype(np.int16) * np.int16(slope) + np.int16(intercept)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def what_is(path: Path) -> tuple[str, Any]:
    """("", the header) of a CT slice, its pixels still on the disk, or (what else an entry of a folder is, None)."""
    if path.is_dir():
        return "sub-folder", None
    if path.exists() and not path.is_file():
        raise BadVolume("is not a regular file")
    with path.open("rb") as file:
        head = file.read(132)
    hidden = path.name.startswith(".") or path.name.upper() == "DICOMDIR"
    dicom = head[128:] == b"DICM" or head[:2] in (b"\2\0", b"\10\0")  # the preamble may be missing
    named = re.fullmatch(r"(?i)\.(dcm|ima|\d+)", path.suffix) or (not path.suffix and b"\0" in head)
    if named and not (dicom or hidden):
        raise BadVolume("is no DICOM file but is named as one: copy it again, or remove it")
    if hidden or not dicom:
        return "other file", None
    data = raw_library("pydicom").dcmread(path, defer_size=1024, force=True)
    if data.file_meta.get("TransferSyntaxUID") == "1.2.840.10008.1.2.1.99":  # packed as a whole
        data = raw_library("pydicom").dcmread(path)
    secondary = str(data.get("SOPClassUID")).startswith("1.2.840.10008.5.1.4.1.1.7")  # capture
    kinds = {
        "other file": "Rows" not in data,
        "localizer": "LOCALIZER" in (data.get("ImageType") or ()),
        "screen picture": (secondary and "ImagePositionPatient" not in data) or data.get("SamplesPerPixel", 1) != 1,
        f"{data.get('Modality')} image": (data.get("Modality") or "CT") != "CT",
    }
    return next((kind for kind, found in kinds.items() if found), ""), data


def look_into(folder: Path) -> tuple[dict[str, list[Any]], str]:
    """The headers of the CT slices in a folder (or file) by series UID, and what else is there, counted."""
    series: dict[str, list[Any]] = {}
    others: Counter = Counter()
    for item in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        with reading_scan(item):
            kind, data = what_is(item)
        if kind:
            others[kind] += 1
        else:
            series.setdefault(str(data.get("SeriesInstanceUID") or ""), []).append(data)
    return series, ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in others.items())


def pick_series(folder: Path, wanted: str) -> list[Any]:
    """The slices of the only series in a folder, or of the one with the UID `wanted`; the rest is passed over."""
    series, others = look_into(folder)
    if not series:
        inside = next((f": img_path names a folder such as {item.parent}" for item in folder.glob("*/**/*.dcm")), "")
        raise BadVolume(f"holds no CT slices ({others or 'it is empty'}){inside}")
    slices = series.get(wanted or next(iter(series)))
    if not slices or (len(series) > 1 and not wanted):
        names = [f"{data.get('SeriesDescription', '')!r}: {folder}#{uid}" for uid, (data, *_) in series.items()]
        raise BadVolume(f"holds {len(series)} series: img_path names one of them: {'; '.join(names)}")
    if others:
        say_once(f"{folder}: passed over beside the slices: {others}")
    total = max(int(data.get("InConcatenationTotalNumber") or 0) for data in slices)
    if total > len(slices):
        raise BadVolume(f"holds {len(slices)} of the {total} files of a concatenation: copy the others too")
    return slices


def frame_numbers(data: Any) -> list[list[float]]:
    """Of each frame of a DICOM file: position (3), orientation (6), spacing (2), size (2), slope and intercept."""
    count = int(data.get("NumberOfFrames") or 1)
    shared, each = (list(data.get(f"{kind}FunctionalGroupsSequence") or ()) for kind in ("Shared", "PerFrame"))
    if len(each) != count and (each or count > 1):
        raise BadVolume(f"has {count} frames, but says where {len(each)} of them lie: export it again")
    frames = []
    for own in each or [{}]:
        sequences = [item.get(f"{name}Sequence") for item in (*shared, own) for name in FRAME_GROUPS]
        told: dict[str, Any] = {}
        for place in (data, *(found[0] for found in sequences if found)):  # what a frame says of itself comes last
            told |= {tag: got for tag in (*PLACE_TAGS, *VALUE_TAGS) if (got := place.get(tag)) not in (None, "")}
        if (kind := told.get("RescaleType")) in NOT_HU or told.get("ModalityLUTSequence"):
            raise BadVolume(f"its values are {kind or 'those of a look-up table'}, not HU: export it in HU")
        for tag, length in PLACE_TAGS.items():
            if len(told.get(tag, ())) != length:
                raise BadVolume(f"does not say its {tag}: without it a slice has no place or size")
        numbers = [number for tag in PLACE_TAGS for number in told[tag]]
        numbers += (data.Rows, data.Columns, *(told.get(tag, math.nan) for tag in VALUE_TAGS[:2]))
        frames.append(list(map(float, numbers)))
    return frames


def place_frames(places: np.ndarray, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the order of frames by their places (n, 3), the step between them (3,)) across the directions of row and column.
    Positions are often rounded to 0.1 mm, and no two steps equal: the line runs from the first frame to the last."""
    normal = np.cross(row, column)
    if not np.abs([row @ row - 1, column @ column - 1, row @ column]).max() < 0.01:
        raise BadVolume(f"its ImageOrientationPatient is no pair of directions, but {[*row, *column]}")
    order = np.argsort(places @ normal, kind="stable")
    place = places[order]
    step = (place[-1] - place[0]) / (len(place) - 1)
    between, spacing = np.diff(place @ normal), float(step @ normal)
    off = np.abs(place - place[0] - np.arange(len(place))[:, None] * step).max(1)
    off[1:] = np.maximum(off[1:], np.abs(between - spacing))
    if not off.max() < 0.1 + 0.1 * spacing or between.min() < 0.01:
        at = place[off.argmax() if between.min() >= 0.01 else between.argmin()].round(1).tolist()
        text = f"{len(place)} slices {spacing:.2f} mm apart, but not at {at} mm: slices are missing or double"
        raise BadVolume(f"{text}, or of several acquisitions: copy the series again, into a folder of its own")
    if np.linalg.norm(step - spacing * normal) < 1e-3 * spacing:  # orientations of three decimals say no more
        step = spacing * normal
    return order, step


def decode(data: Any, frames: list[list[float]]) -> Iterator[np.ndarray]:
    """The frames of a DICOM file in HU. Presentation is left alone: MONOCHROME1 is only shown inverted."""
    path, pydicom = Path(data.filename), raw_library("pydicom")
    with reading_scan(path):
        if "PixelData" not in data:
            raise BadVolume("holds no whole-numbered PixelData: export it as a CT in HU")
        syntax = data.file_meta.get("TransferSyntaxUID", None if data.preamble else pydicom.uid.ExplicitVRLittleEndian)
        decoder = pydicom.pixels.get_decoder(syntax)
        if not decoder.is_available:
            raise BadEnvironment(f"its compression needs a decoder: {syntax.name}: {decoder.missing_dependencies}")
        stored = decoder.as_array(data, raw=True)[0].reshape(len(frames), data.Rows, data.Columns)
        if not syntax.is_compressed and len(data.PixelData) - stored.nbytes not in (0, 1):
            raise BadVolume("is damaged: it does not hold the pixels it promises: copy it again")
        del data.PixelData  # the volume holds it now
        padding = data.get("PixelPaddingValue")  # writers give it unsigned where voxels are signed
        ends = np.array([padding or 0, data.get("PixelPaddingRangeLimit", padding or 0)], np.int64).astype(stored.dtype)
        for plane, (*_, slope, intercept) in zip(stored, frames, strict=True):
            hu = to_hu(plane, 1 if math.isnan(slope) else slope, 0 if math.isnan(intercept) else intercept)
            if padding is not None and (empty := (plane >= ends.min()) & (plane <= ends.max())).any():
                hu = np.where(empty, np.float32(math.nan), hu)
            yield hu


def read_dicom(folder: Path, wanted: str) -> Iterator[Any]:
    """The frames of one series, whichever files they lie in, as voxels (slice, row, column)."""
    files = []
    for data in pick_series(folder, wanted):
        with reading_scan(Path(data.filename)):
            files.append((data, frame_numbers(data)))
    owners = [data.filename for data, rows in files for _ in rows]
    if len(owners) < 2:
        raise BadVolume("has one slice: img_path names the folder of a series, or a file of many frames")
    frames = np.concatenate([rows for _, rows in files])
    places, directions, spacing, size, rescale = np.split(frames, (3, 9, 11, 13), axis=1)
    for what, told in {"orientation": directions, "pixel spacing": spacing, "size": size}.items():
        off = np.abs(told - np.median(told, 0)).max(1)
        if not off.max() < 1.01e-3:  # writers round
            raise BadVolume(f"holds slices of different {what}, such as {owners[off.argmax()]}: remove them")
    if (np.isnan(rescale) != np.isnan(rescale[0])).any():
        raise BadVolume("only some of its slices have a RescaleSlope and RescaleIntercept: export it again")
    (row, column), (height, width) = directions.mean(0).reshape(2, 3), spacing.mean(0)
    order, step = place_frames(places, row, column)
    shape = (len(frames), *map(int, size[0]))
    yield shape, LPS_TO_RAS @ np.stack([step, column * height, row * width], 1)
    volume = np.empty(shape, np.int16)
    planes = (plane for data, rows in files for plane in decode(data, rows))
    for at, plane in zip(np.argsort(order), planes, strict=True):
        volume = volume.astype(np.result_type(volume, plane), copy=False)
        volume[at] = plane
    yield volume


def read_nifti(path: Path) -> Iterator[Any]:
    """A NIfTI-1 or NIfTI-2 file, by its first bytes packed or not, whatever its name says; voxels (x, y, z)."""
    nibabel = raw_library("nibabel")
    with path.open("rb") as file:
        head, size = file.read(4096), path.stat().st_size
    if packed := head[:2] == b"\x1f\x8b":
        head, size = zlib.decompressobj(31).decompress(head, 540), 1032 * size  # deflate packs no tighter
    kind = nibabel.Nifti1Header if nibabel.Nifti1Header.may_contain_header(head) else nibabel.Nifti2Header
    header = kind(head[: kind.sizeof_hdr])
    if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise BadVolume("refers to another file for its voxels: save it with nibabel as one .nii.gz")
    if not (header["sform_code"] or header["qform_code"]):
        raise BadVolume("does not say how it lies in the patient (qform and sform code 0): set its sform")
    start, dtype, shape = header.get_data_offset(), header.get_data_dtype(), header.get_data_shape()
    end = start + math.prod(shape) * dtype.itemsize
    if not kind.sizeof_hdr + 4 <= start < end <= size:
        raise BadVolume("is cut short, or its vox_offset is wrong: copy it again")
    slope, intercept = header.get_slope_inter()
    unit = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
    yield shape, unit * header.get_best_affine()[:3, :3]
    data: Any = path.read_bytes()
    claimed = int.from_bytes(data[-4:], "little")
    if packed and end <= claimed <= 1032 * len(data):
        with suppress(deflate.DeflateError):  # twice as fast as zlib, but it reads one part only
            inflated = deflate.gzip_decompress(data, claimed)
            data = inflated if len(inflated) >= end else data
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    yield to_hu(np.frombuffer(data, dtype, math.prod(shape), start), slope or 1, intercept or 0)


def read_mha(path: Path) -> Iterator[Any]:
    """A MetaImage with its voxels inside; voxels (x, y, z)."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    end = re.search(rb"(?m)^ElementDataFile *= *LOCAL *\r?\n", head)
    pairs = re.findall(r"(?m)^ *(\w+) *= *(.*?) *\r?$", head[: end.end() if end else 0].decode("latin-1"))
    fields = {MHA_ALIASES.get(key, key): value for key, value in pairs}
    plain = len(fields) == len(pairs) and fields.get("BinaryData", "True") == "True"  # a field twice is damage
    if not end or not plain or fields.get("HeaderSize", "0") != "0":
        raise BadVolume("has its voxels in another file, or no field or two of a name: save it with SimpleITK")
    if not {"ElementSpacing", "TransformMatrix"} <= {*fields}:
        raise BadVolume("does not say how it lies (ElementSpacing, TransformMatrix): convert it again")
    turn, spacing = (np.array(fields[name].split(), float) for name in ("TransformMatrix", "ElementSpacing"))
    turn = turn.reshape(len(spacing), -1)
    if not np.allclose(np.linalg.norm(turn, axis=1), 1, atol=0.01):
        raise BadVolume("its TransformMatrix holds no directions: convert the original again")
    packed, big = (fields.get(name, "")[:1] in ("T", "t", "1") for name in ("CompressedData", "BinaryDataByteOrderMSB"))
    dtype = np.dtype(MHA_TYPES[fields["ElementType"][4:]]).newbyteorder(">" if big else "<")
    shape = (*map(int, fields["DimSize"].split()), int(fields.get("ElementNumberOfChannels", 1)))
    slope, shift = (float(fields.get(f"ElementToIntensityFunction{k}", k == "Slope")) for k in ("Slope", "Offset"))
    yield shape, LPS_TO_RAS @ (turn * spacing[:, None])[:3, :3].T
    data: Any = memoryview(path.read_bytes())[end.end() :]
    data = zlib.decompress(data) if packed else data
    yield to_hu(np.frombuffer(data, dtype), slope, shift)


def read_nrrd(path: Path) -> Iterator[Any]:
    """An NRRD file with its voxels inside; voxels (x, y, z)."""
    nrrd = raw_library("nrrd")
    with path.open("rb") as stream:
        header = nrrd.read_header(stream)
        if "data file" in header or "datafile" in header:
            raise BadVolume("refers to another file for its voxels: write it as one file")
        space = str(header.get("space")).lower()
        space = re.sub(r"(\w)\w+(-|$)", r"\1", space) if "-" in space else space
        steps = np.array(header.get("space directions", ()), float).reshape(-1, 3)
        known = np.isfinite(steps).all(1)  # of axes in space
        if space not in ("lps", "ras", "las") or known.sum() != 3:
            raise BadVolume("does not say how it lies (space LPS, RAS or LAS, space directions): convert it again")
        steps = steps[known] * {"m": 1000.0, "cm": 10.0, "um": 0.001}.get(header.get("space units", [""])[0], 1.0)
        sizes, to_ras = np.array(header["sizes"]), np.diag([1 if side in "ras" else -1 for side in space])
        yield (*sizes[known].tolist(), *sizes[~known].tolist()), to_ras @ steps.T
        yield to_hu(nrrd.read_data(header, stream))


# One scan of whatever format, on its way to the grid of the model.

RAW_FORMATS = {".nii": read_nifti, ".nii.gz": read_nifti, ".mha": read_mha, ".nrrd": read_nrrd}
SCAN_FILE = r"(?i)\.(npz|npy|b2nd|nii|nii\.gz|mha|nrrd)$"  # what may be a scan by itself


def is_raw(path: Path) -> bool:
    """Whether a scan is a folder of DICOM, FOLDER#SERIES_UID, or a file with its own geometry."""
    source = scan_source(path)[0]
    return source.name.lower().endswith((*RAW_FORMATS, ".dcm")) or source.is_dir()


def find_scans(path: Path) -> list[tuple[str, str]]:
    """(id, img_path) of the scan in a file, or of every scan below a folder; of several series as FOLDER#SERIES_UID."""
    if not path.is_dir():
        return [(re.sub(SCAN_FILE, "", path.name), str(path))]
    found = []
    for folder in (path, *sorted(item for item in path.rglob("*") if item.is_dir())):
        name = str(folder.relative_to(path)) if folder != path else path.resolve().name
        files = [item for item in sorted(folder.iterdir()) if item.is_file() and re.search(SCAN_FILE, item.name)]
        found += [(re.sub(SCAN_FILE, "", str(file.relative_to(path))), str(file)) for file in files]
        series = look_into(folder)[0]
        found += [(f"{name}#{uid}", f"{folder}#{uid}") if len(series) > 1 else (name, str(folder)) for uid in series]
    return found


def read_volume(
    path: Path, voxels: bool = True, orientation: str | None = None, spacing: Sequence[float] | None = None
) -> tuple[Header, Any]:
    """Header and, if asked for, voxels of a scan in any format: (C, three stored axes) in the stored dtype; of a raw
    scan (1, D, H, W) in SPL and HU at its own spacing, int16, or float32 with NaN where there is no value. BadVolume
    where a stored file says that its orientation, or spacing (D, H, W), is another than the one expected."""
    source, series = scan_source(path)
    with reading_scan(path):
        mode, name = source.stat().st_mode, source.name.lower()  # asked for once: a network disk takes its time
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BadVolume("is not a regular file")
        read = next((read for ending, read in RAW_FORMATS.items() if name.endswith(ending)), None)
        if stat.S_ISDIR(mode) or name.endswith(".dcm"):
            scan = oriented(read_dicom(source, series))
        else:
            scan = oriented(read(source)) if read else read_stored(source)
        header = next(scan)
        if orientation and not header.raw:
            if header.orientation not in (None, orientation):
                raise BadVolume(f"says it is stored {header.orientation}, not {orientation}: see --orientation")
            own = [header.spacing[axis] for axis in spl_axes(orientation)[0]] if header.spacing else []
            if own and spacing and not np.allclose(own, spacing, rtol=0.02):
                raise BadVolume(f"says its spacing is {own} mm, not {list(spacing)} (D, H, W): prepare all scans alike")
        return header, next(scan) if voxels else None


def load_volume(path: Path | str, orientation: str = "SPL") -> np.ndarray:
    """The voxels (C, D, H, W) in SPL, in the stored dtype, without copying; a raw scan in HU at its own spacing.

    `orientation` names towards which side of the patient each stored axis rises; a file that says otherwise of itself,
    and one that cannot be read whole, raises BadVolume. Raw scans know their orientation."""
    header, stored = read_volume(Path(path), orientation=orientation)
    if header.raw:
        return np.nan_to_num(stored, nan=AIR) if stored.dtype.kind == "f" else stored
    return to_spl(stored, orientation)


def body_centre(volume: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Voxel (D, H, W) in the middle of the body, and along it in the middle of the lungs; the couch is no body."""
    from scipy import ndimage

    steps = [max(1, round(6 / mm)) for mm in spacing]
    coarse = volume[tuple(slice(None, None, step) for step in steps)]
    parts, count = ndimage.label(ndimage.binary_opening(coarse > -500, np.ones((1, 3, 3))))
    if not count:
        return (np.array(volume.shape) - 1) / 2
    body = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    lungs = np.stack([ndimage.binary_fill_holes(plane) for plane in body]) & (coarse < -500)
    along = np.flatnonzero((lungs if lungs.mean() > 0.01 else body).any((1, 2)))
    rows, columns = (np.flatnonzero(body.any(axes)) for axes in ((0, 2), (0, 1)))
    return np.array(steps) * [(found[0] + found[-1]) / 2 for found in (along, rows, columns)]


def prepare_volume(
    path: Path, spacing: Sequence[float] | None, intensity: str = "auto", hu_range: Sequence[float] = DEFAULT_HU_RANGE
) -> np.ndarray:
    """int16 HU (1, D, H, W) of a raw scan: SPL, at `spacing` mm (D, H, W), FIELD_OF_VIEW around the body. The values
    are judged as they were stored, before air fills what has none, unless `intensity` says "hu" or "unit"."""
    with reading_scan(path):
        if intensity == "windowed":
            raise BadVolume("is a raw scan where windows are needed: make its windows as the others' were made")
        if spacing is None:
            raise BadVolume("is a raw scan among prepared volumes: convert it with --prepare")
        header, volume = read_volume(path)
        if intensity == "auto":
            judge_voxels(header, volume)
        scale, offset = (hu_range[1] - hu_range[0], hu_range[0]) if intensity == "unit" else (1.0, 0.0)
        floor = (AIR - offset) / scale
        floor = floor if volume.dtype.kind == "f" else max(-32768, math.ceil(floor))
        size = np.rint(np.multiply(volume.shape[1:], header.spacing or ()) / spacing).astype(int).clip(1)
        resampled = np.empty(size, np.int16)
        resample_channel(np.fmax(volume[0], floor), resampled, scale, offset)
    kept = np.rint(np.divide(FIELD_OF_VIEW, spacing)).astype(int)
    start = np.rint(body_centre(resampled, spacing) + 0.5 - kept / 2).astype(int).clip(0, np.maximum(0, size - kept))
    inside = tuple(map(slice, start, start + kept))  # what fits is kept whole
    missing = np.maximum(0, kept - size)
    return np.pad(resampled[inside], np.stack([(missing + 1) // 2, missing // 2], 1), constant_values=AIR)[None]


def load_sample(path: Path | str, prep: Preprocessing) -> Tensor:
    """int16 (C, S, H, W), SPL: HU, or 32767 times the value of a stored window. Raises BadVolume."""
    with reading_scan(path := Path(path)):
        if is_raw(path):
            how = prep.intensity if prep.trusted or prep.intensity == "windowed" else "auto"
            stored = prepare_volume(path, prep.spacing, how, prep.hu_range)
            prep = dataclasses.replace(prep, orientation="SPL", intensity="hu", trusted=True)  # it has been judged
        else:
            header, stored = read_volume(path, True, prep.orientation, prep.spacing)
        if prep.intensity == "windowed" and len(stored) != prep.channels:
            raise BadVolume(f"has {len(stored)} channels where the others have {prep.channels}")
        lo, hi = prep.hu_range
        scale, offset = {"hu": (1.0, 0.0), "unit": (hi - lo, lo), "windowed": (WINDOWED_SCALE, 0.0)}[prep.intensity]
        doubtful = prep.intensity == "windowed" or not shows_chest(thinned(stored[0]) * scale + offset)
        if doubtful and not prep.trusted and (kind := judge_voxels(header, stored, prep.hu_range)) != prep.intensity:
            text = f"looks like {kind!r}, not {prep.intensity!r} as the others"
            raise BadVolume(f"{text}: convert it, or name --intensity for all")
        size = np.array(prep.grid)[np.argsort(spl_axes(prep.orientation)[0])]  # of the stored axes
        voxels = np.empty((prep.channels, *size), np.int16)
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")  # torch's: the file's bytes, only read
        ranges = [resample_channel(*pair, scale, offset) for pair in zip(stored, voxels, strict=False)]
        if np.min(ranges) == np.max(ranges):
            raise BadVolume("has the same value in every voxel: it holds no scan")
        return torch.from_numpy(np.ascontiguousarray(to_spl(voxels, prep.orientation)))


# What all scans of a table have to agree on.


def read_headers(table: Table) -> list[Header]:
    """The header of every scan; BadInput names each one that is not as it should be."""
    wrong = Complaints("the table")

    def header_of(line: int, path: Path) -> Any:
        try:
            return read_volume(path, voxels=False)[0]
        except BadVolume as error:
            return wrong.add("volume", line, str(error))

    with ThreadPoolExecutor(8) as pool:  # a network disk takes its time
        headers = list(pool.map(header_of, table.line_numbers, table.paths))
    wrong.raise_if_any()
    return headers


def spread(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced."""
    return [items[i * len(items) // min(n, len(items))] for i in range(min(n, len(items)))]


def read_sample(table: Table, prep: Preprocessing, n: int, skip: bool) -> tuple[dict[int, Tensor], list[str]]:
    """At most n volumes by row, from everywhere in the table, and what is wrong with others looked at; that is BadInput
    unless it may be skipped and there are volumes."""
    samples, problems = {}, []
    for row in spread(range(len(table)), n):
        try:
            samples[row] = load_sample(table.paths[row], prep)
        except BadVolume as problem:
            problems.append(f"{table.name(row)}: {problem}")
    if problems and not (skip and samples):
        raise BadInput(*problems)
    return samples, problems


def decide_orientation(table: Table, headers: Sequence[Header], asked: str | None, usual: str = "SPL") -> str:
    """`asked`, else what the files say of themselves, else `usual` where their shapes do not speak against it."""
    told = {header.orientation for header in headers if header.orientation and not header.raw}
    if len(told) > 1:
        raise BadInput(f"the volumes name several orientations ({', '.join(sorted(told))}): prepare them alike")
    orientation = asked or (told.pop() if told else usual)
    depth = spl_axes(orientation)[0][0]
    for path, header in zip(table.paths, headers, strict=True):
        first, second = (size for axis, size in enumerate(header.shape[1:]) if axis != depth)
        if not (asked or header.orientation) and first != second and len(set(header.shape[1:])) == 2:
            meant = "--orientation RAS for (C, X, Y, Z)" if depth == 0 else "--orientation SPL"
            what = f"its two equal axes are not rows and columns under --orientation {orientation}"
            raise BadInput(f"{path} has shape {header.shape}: {what}: store all alike and name their order, {meant}")
    return orientation


def decide_intensity(table: Table, headers: Sequence[Header], hu_range: Sequence[float], skip: bool) -> str:
    """ "hu", "unit" or "windowed", from a sample that holds every kind of file in the table; BadInput where in doubt.
    With `skip`, files that are damaged or of no known kind are passed over while there are others."""
    groups: dict[tuple, list[Path]] = {}
    for path, header in zip(table.paths, headers, strict=True):
        groups.setdefault((header.raw, header.dtype.kind, header.shape[0]), []).append(path)
    paths = [path for group in groups.values() for path in spread(group, max(2, 12 // len(groups)))]
    kinds: dict[str, list[str]] = {}
    problems: dict[str, list[str]] = {}  # the same but for numbers
    for path in paths:
        try:
            header, stored = read_volume(path)
            with reading_scan(path):
                kind = judge_voxels(header, stored, hu_range)
            kinds.setdefault(kind, []).append(f"{path} ({stored.dtype}, {stored.min():g} to {stored.max():g})")
        except BadVolume as problem:
            text = str(problem)
            problems.setdefault(re.sub(r"[\d.e+-]+", "", text.removeprefix(str(path))), []).append(text)
    if problems and not (skip and kinds):
        raise BadInput(*(f"{told[0]} ({len(told)} of {len(paths)} files looked at)" for told in problems.values()))
    if len(kinds) > 1:
        examples = "; ".join(f"{kind}: {files[0]}" for kind, files in kinds.items())
        raise BadInput(f"the volumes are of different kinds ({examples}): convert them alike, or name --intensity")
    kind, files = kinds.popitem()
    log.info("intensity: %s, decided from %d files such as %s", kind, len(files), files[0])
    return kind


def decide_preprocessing(table: Table, grid: Sequence[int], windows: tuple, args: argparse.Namespace) -> Preprocessing:
    """Read every header and a sample of voxels, and decide how volumes are read; BadInput where that is in doubt.
    `grid` (S, H, W) and `windows`, K pairs of HU, are the backbone's, which arguments overrule."""
    headers, trusted = read_headers(table), args.intensity != "auto"
    kind = args.intensity if trusted else decide_intensity(table, headers, args.hu_range, args.on_bad_volume == "skip")
    channels = headers[0].shape[0] if kind == "windowed" else 1
    odd = [path for path, header in zip(table.paths, headers, strict=True) if header.shape[0] != channels]
    if kind == "windowed" and odd:
        raise BadInput(f"{odd[0]} and {len(odd) - 1} others have not {channels} channels as {table.paths[0]} has")
    code = decide_orientation(table, headers, args.orientation)
    told = {header.spacing for header in headers}  # by the files
    spacing = tuple(map(float, args.spacing[::-1])) if any(header.raw for header in headers) else None
    if spacing is None and len(told) == 1 and (stored := told.pop()):
        spacing = tuple(stored[axis] for axis in spl_axes(code)[0])
    slices, rows, columns = grid
    grid = (args.num_slices or slices, args.image_size or rows, args.image_size or columns)
    return Preprocessing(code, kind, tuple(args.hu_range), args.windows or windows, grid, channels, spacing, trusted)


def decide_preprocessing_like(stored: dict, table: Table, args: argparse.Namespace) -> Preprocessing:
    """A checkpoint's preprocessing for other files: only how these are stored may differ, where a flag says so. Values
    are taken on trust only where a flag of this run names them, whatever the training run was told."""
    prep = dataclasses.replace(Preprocessing.from_dict(stored), trusted=args.intensity != "auto")
    if prep.trusted and (args.intensity == "windowed") != (prep.intensity == "windowed"):
        raise BadInput(f"--intensity {args.intensity}: the checkpoint was trained on {prep.intensity!r} volumes")
    if prep.trusted and (args.intensity != prep.intensity or tuple(args.hu_range) != DEFAULT_HU_RANGE):
        prep = dataclasses.replace(prep, intensity=args.intensity, hu_range=tuple(args.hu_range))
    headers = read_headers(table)
    prep = dataclasses.replace(prep, orientation=decide_orientation(table, headers, args.orientation, prep.orientation))
    if prep.spacing is None and any(header.raw for header in headers):
        prep = dataclasses.replace(prep, spacing=tuple(map(float, args.spacing[::-1])))
        what = "the checkpoint was trained on files of unknown spacing: raw scans are assumed to fit when brought to"
        log.warning("%s %g x %g x %g mm (columns, rows, slices; see --spacing)", what, *args.spacing)
    read_sample(table, prep, 4, args.on_bad_volume == "skip")  # raises where the values are of another kind
    return prep


# A cache holds what is costly to make, an array a file, on a local disk: resampled volumes under `--cache-dir`, slice
# features under `--cache-features`. The name of an entry is a digest of every setting that changes a number in it and
# of what its source is known by, so it is the right one or not found; its end is a checksum of content and name, so
# what a crash tore is not believed, and nothing is flushed. A worker only names a cached volume to the training
# process, which reads it straight into the batch: 16 MB take several times as long through new shared memory, and three
# times as long when they are to be unpacked (by blosc2, from 60 % of the size).

CACHE_SPARE = 2 << 30  # bytes left free on the disk: checkpoints need room too


def made_of(path: Path, *settings: Any) -> bytes:
    """A digest of `settings` and of what changes when a scan's file, or one in its folder, is replaced: sizes, times.
    Raises BadVolume."""
    with reading_scan(path):
        source = scan_source(path)[0]
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        found = [(file.name, file.stat()) for file in files]
    identity = os.path.abspath(path), [(name, entry.st_size, entry.st_mtime_ns) for name, entry in found]
    return hashlib.sha256(json.dumps([identity, *settings], sort_keys=True).encode()).digest()


def entry_for(folder: Path, settings: Any, source: Path) -> Path:
    """Where what `settings` make of this source, as its file is now, belongs. Raises BadVolume."""
    return folder / f"{made_of(source, settings).hex()}.ct"


def sealed(entry: Path, content: np.ndarray) -> bytes:
    """The checksum at the end of an entry."""
    return deflate.crc32(content.data, zlib.crc32(entry.name.encode())).to_bytes(4, "little")


def write_entry(entry: Path, array: np.ndarray) -> None:
    """Make an entry, visible when whole. Raises BadEnvironment."""
    content = array.reshape(-1).view(np.uint8)
    with put_in_place(entry, content.nbytes, lasting=False) as part:
        part.write_bytes(content.tobytes() + sealed(entry, content))


def fill_from(entry: Path, out: Tensor) -> bool:
    """Copy an entry to `out`; False where there is none that is whole."""
    content = out.numpy().reshape(-1).view(np.uint8)
    try:
        with open(entry, "rb", buffering=0) as stream:
            return stream.readinto(content) == len(content) and stream.read(5) == sealed(entry, content)
    except OSError:
        return False


class VolumeCache:
    """Resampled volumes, in a folder that any number of processes may share. A full disk ends the writing."""

    def __init__(self, folder: Path, prep: Preprocessing):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.prep, self.shape = folder, prep, (prep.channels, *prep.grid)
        settings = {name: value for name, value in prep.to_dict().items() if name != "windows"}  # these are made later
        self.entry = partial(entry_for, folder, settings)
        self.full = torch.zeros(1, dtype=torch.uint8).share_memory_()  # set by the first worker to meet a full disk
        each, free = 2 * math.prod(self.shape), shutil.disk_usage(folder).free - CACHE_SPARE
        log.info("cache %s: %.1f MB a volume, room for %d more", folder, each / 1e6, max(0, free // each))

    def find(self, source: Path) -> tuple[Path, Path] | None:
        """(entry, source) where there is one; the system is asked to read it ahead."""
        with suppress(BadVolume, OSError), open(entry := self.entry(source), "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            return entry, source
        return None

    def load(self, source: Path) -> Tensor:
        """The volume, from its entry or else from its source, then with an entry from now on. Raises BadVolume."""
        entry, volume = self.entry(source), torch.empty(self.shape, dtype=torch.int16)
        if fill_from(entry, volume):
            return volume
        volume = load_sample(source, self.prep)
        if self.full or self.entry(source) != entry:  # the file was replaced while it was read
            return volume
        try:
            if shutil.disk_usage(self.folder).free < CACHE_SPARE:
                raise BadEnvironment(f"{self.folder}: less than {CACHE_SPARE:,} bytes are free")
            write_entry(entry, volume.numpy())
        except (BadEnvironment, OSError) as problem:
            if not self.full:
                log.warning("%s; training goes on, with what --cache-dir holds", problem)
            self.full.fill_(1)
        return volume


# The loader: items are read in workers and come as batches in shared memory, or by name where the cache has them.


@dataclass
class CachedBatch:
    """A batch on its way to the training process: volumes, or (entry of the cache, source)."""

    prep: Preprocessing
    parts: list[Tensor | tuple[Path, Path]]

    def assemble(self, pin: bool = False) -> Tensor:
        """(N, C, S, H, W) int16."""
        shape = (len(self.parts), self.prep.channels, *self.prep.grid)
        batch = (  # NumPy's memory has large pages, which are filled twice as fast
            torch.empty(shape, dtype=torch.int16, pin_memory=True) if pin else torch.from_numpy(np.empty(shape, "i2"))
        )
        for part, out in zip(self.parts, batch, strict=True):
            if isinstance(part, Tensor):
                out.copy_(part)
            elif not fill_from(part[0], out):
                with suppress(OSError):
                    part[0].unlink(missing_ok=True)  # torn: the next epoch makes it again
                out.copy_(load_sample(part[1], self.prep))
        return batch

    def pin_memory(self) -> Tensor:
        """Called by the loader's pinning thread, beside the training step."""
        return self.assemble(pin=True)


class CTVolumeDataset(torch.utils.data.Dataset):
    """Item i: `volume` int16 (C, S, H, W), `targets` float32 (L,), `row` i, `bad`, `error`.

    Item ~i is the same scan with unknown targets: a row that fills up a distributed epoch without counting.
    A scan that three tries cannot read is `bad`: its targets are NaN, its volume is air, `error` says what happened.
    """

    loader: torch.utils.data.DataLoader | None = None  # the one that persists

    def __init__(
        self, table: Table, prep: Preprocessing, cache: VolumeCache | None = None, on_bad_volume: str = "stop"
    ):
        self.table, self.prep, self.cache, self.on_bad_volume = table, prep, cache, on_bad_volume
        self.skipped: dict[int, str] = {}  # row -> why; filled by the loader, in the process that iterates over it
        empty = torch.tensor(0 if prep.intensity == "windowed" else AIR, dtype=torch.int16)
        self.blank = empty.expand(prep.channels, *prep.grid)  # in the place of a scan that cannot be read

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"loader": None}  # for the loader: in a cycle, its processes would outlive it

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, items: list[int]) -> dict[str, Any]:
        """A batch, for the loader; the voxels of what the cache holds are not touched, only named."""
        batch, stack = [self.__getitem__(item, True) for item in items], torch.utils.data.default_collate
        volumes = [item.pop("volume") for item in batch]
        named = any(isinstance(volume, tuple) for volume in volumes)
        return stack(batch) | {"volume": CachedBatch(self.prep, volumes) if named else stack(volumes)}

    def __getitem__(self, item: int, named: bool = False) -> dict[str, Any]:
        row, error = max(item, ~item), ""
        path, targets = self.table.paths[row], torch.from_numpy(self.table.targets[row].copy())
        try:
            found = self.cache.find(path) if named and self.cache else None
            volume = found or self.read(path, () if row in self.skipped else READ_DELAYS)
        except BadVolume as problem:
            error, volume = f"{self.table.name(row)}: {problem}", self.blank
        if error or item < 0:
            targets.fill_(math.nan)
        return {"volume": volume, "targets": targets, "row": row, "bad": bool(error), "error": error}

    def read(self, path: Path, delays: Sequence[float]) -> Tensor:
        """The volume; BadVolume after one try more than there are delays, in seconds."""
        for delay in delays:
            with suppress(BadVolume):
                return self.load(path)
            time.sleep(delay)
        return self.load(path)

    def load(self, path: Path) -> Tensor:
        return self.cache.load(path) if self.cache else load_sample(path, self.prep)

    @property
    def targets(self) -> np.ndarray:
        """(n, L) as in the table, but unknown for the scans skipped so far: what metrics may be computed from."""
        targets = self.table.targets.copy()
        targets[list(self.skipped)] = math.nan
        return targets


def build_loader(
    dataset: CTVolumeDataset, batches: Sequence[list[int]], num_workers: int, device: torch.device,
    waiting: Callable[[], AbstractContextManager] = nullcontext, persist: bool = False,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Exactly these batches of items, in this order, for a model on `device`; each is waited for in context `waiting`.

    A bad scan raises BadVolume, or is added to the dataset's `skipped`. With `persist` the processes that read stay,
    and the next call for this dataset goes on with them. Nothing starts before the first batch is asked for.
    """
    loader = dataset.loader if persist else None
    if loader is None:
        workers, longest = min(num_workers, usable_cores()), max(map(len, batches), default=1)
        if workers and os.path.isdir("/dev/shm"):  # a full one kills workers, and containers often have 64 MB of it
            room = int(0.8 * shutil.disk_usage("/dev/shm").free / (longest * dataset.blank.nbytes))
            if room < 2 * workers + 1:  # one batch is in use, two wait at each worker
                workers, why = max(0, room - 1) // 2, "start the container with --shm-size or --ipc=host"
                log.warning("/dev/shm is too small for %d workers, so %d read: %s", num_workers, workers, why)
        loader = torch.utils.data.DataLoader(
            copy.copy(dataset), batch_sampler=[], num_workers=workers, persistent_workers=persist and workers > 0,
            pin_memory=device.type == "cuda", worker_init_fn=one_thread_per_worker,
            collate_fn=torch.utils.data.default_convert,  # leaves a batch of __getitems__ as it is
        )  # fmt: skip
        dataset.loader = loader if persist else dataset.loader
    loader.batch_sampler[:] = batches  # type: ignore[index]  # a list, of which workers are sent items
    with signals_held():
        coming = iter(loader)
    for _ in batches:
        with waiting():
            batch = next(coming)
        bad = {row: error for row, error in zip(batch["row"].tolist(), batch["error"], strict=True) if error}
        if bad and dataset.on_bad_volume == "stop":
            raise BadVolume(*bad.values())
        for row in bad.keys() - dataset.skipped.keys():
            log.warning("skipped: %s", bad[row])
            dataset.skipped[row] = bad[row]
        if isinstance(batch["volume"], CachedBatch):
            batch["volume"] = batch["volume"].assemble()
        yield batch


def one_thread_per_worker(_: int) -> None:
    """BLAS would start as many threads as there are cores in each of the workers."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    # Lest a killed rank's connections stay open in its workers.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc: M_MMAP_MAX and M_TRIM_THRESHOLD. What one scan
        mallopt(-4, 0), mallopt(-1, 1 << 30)  # frees serves the next: new pages take a tenth of the time of reading it


def write_skipped(path: Path, *left_out: tuple[Table, dict[int, str]]) -> None:
    """List the scans left out of tables, row -> why, where there are any: id, split, line in the CSV and reason."""
    rows = [[t.series_ids[r], t.splits[r], t.line_numbers[r], why[r]] for t, why in left_out for r in sorted(why)]
    if rows:
        write_rows(path, [["series_id", "split", "line", "reason"], *rows])
        log.warning("%d scans could not be read and were left out: %s", len(rows), path)


# Augmentation, on whichever device the batch is. These are the largest changes; draws are uniform around none. turn:
# degrees about the body's long axis; zoom: log of the scale, in-plane and along the body; move: of the field of view,
# along each axis; of the 2000 HU from air to bone the shift, standard deviation of the noise, and log of an exponent.

AUGMENTATIONS = {  # turn, zoom in-plane and along the body, move along columns, rows and slices, shift, gamma, noise
    "light": (5, 0.05, 0.05, 0.03, 0.03, 0.03, 0.0075, 0.03, 0.006),  # shift by 15 HU, noise of 12 HU
    "strong": (12, 0.12, 0.12, 0.08, 0.08, 0.08, 0.02, 0.1, 0.02),  # 40 HU, 40 HU
}


@torch.no_grad()
def augment(volumes: Tensor, rows: Sequence[int], strength: str, seed: int, epoch: int, intensity: str) -> Tensor:
    """(N, C, S, H, W) int16 from the loader -> float32 of the same units, each scan a little moved and altered.

    A pure function of (seed, epoch, row), on whichever device the volumes are. Never mirrored: organs have sides. Scans
    are turned in-plane only, so that no voxel spacing is needed; what comes in from outside is air.
    """
    if strength == "none":
        return volumes
    low, span = (0.0, float(WINDOWED_SCALE)) if intensity == "windowed" else (-1000.0, 2000.0)
    result = torch.empty(volumes.shape, device=volumes.device)
    for volume, row, out in zip(volumes, rows, result, strict=True):
        draws = np.random.default_rng(derive_seed(seed, epoch, row)).uniform(-1, 1, 9) * AUGMENTATIONS[strength]
        turn, zoom, zoom_z, *move, shift, gamma, noise = draws.tolist()
        moved = move_volume(volume, math.radians(turn), math.exp(zoom), math.exp(zoom_z), move, air=low)
        unit = ((moved - low) / span).clamp_(0, 1)
        moved += span * (unit ** math.exp(gamma) - unit + shift)
        generator = torch.Generator(volumes.device).manual_seed(derive_seed(seed, epoch, row, 1))
        out.normal_(0, span * abs(noise), generator=generator).add_(moved)
    return result


def move_volume(volume: Tensor, angle: float, zoom: float, zoom_z: float, move: Sequence[float], air: float) -> Tensor:
    """One (C, S, H, W) volume, float32: linear along the body, then one affine bilinear pass over all slices at once.

    `move` is in parts of the field of view (columns, rows, slices); past the first and last slice these repeat. All of
    these reach the kernels as plain numbers: a tensor of them would be copied to a GPU, and each copy waited for.
    """
    c, s, h, w = volume.shape
    z = (torch.arange(s, device=volume.device) + 0.5 - s / 2) / zoom_z + s / 2 - 0.5 + move[2] * s
    z = z.clamp(0, s - 1)
    below = z.floor().long()
    above = (below + 1).clamp(max=s - 1)
    stack = torch.lerp(volume[:, below].float(), volume[:, above].float(), (z - below)[:, None, None]) - air
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    row, column = (((torch.arange(n, device=volume.device) + 0.5) * 2 / n - 1) for n in (h, w))  # pixel centres
    x = column * cos - row[:, None] * (sin * h / w) + 2 * move[0]
    y = column * (sin * w / h) + row[:, None] * cos + 2 * move[1]
    moved = F.grid_sample(stack.view(1, c * s, h, w), torch.stack((x, y), -1)[None], align_corners=False)
    return moved.view(c, s, h, w) + air


# The check: what a person should know of the data before a long run, and a picture that shows a wrong axis at once.


def check_data(table: Table, prep: Preprocessing, picture: Path | None = None, skip: bool = False) -> list[str]:
    """Log, and return, lines on the table, the headers of all files and the voxels of a sample, worst news last.

    Writes the contact sheet of the sample to `picture`. Raises BadInput with all files that are not as they should be;
    with `skip`, a damaged one of the sample is a warning while there are others.
    """
    import pandas

    headers, (samples, damaged) = read_headers(table), read_sample(table, prep, 12, skip)
    lines, known = [], {}
    for name in [name for name in SPLITS if name in table.splits]:
        part = table.split(name)
        lines.append(f"{name}: {len(part)} scans of {len(set(part.patient_ids))} patients")
        counts = np.stack([part.targets == 1, part.targets == 0, np.isnan(part.targets)]).sum(1)  # (3, L)
        known[f"{name} positive/negative/unknown"] = ["/".join(map(str, of_label)) for of_label in counts.T]
    lines += pandas.DataFrame(known, table.labels).to_string().splitlines() if table.labels else []
    kinds = Counter(f"{h.shape} {'raw scan' if h.raw else h.dtype}" for h in headers).most_common()
    lines += [f"{n} x {kind}" for kind, n in kinds[:8]] + [f"and {len(kinds) - 8} other shapes"] * (len(kinds) > 8)
    lines.append(f"read as --orientation {prep.orientation} --intensity {prep.intensity}, resampled to {prep.grid}")
    lines += slice_distance(table, headers, prep)
    lines += [f"warning: {text}" for text in (*damaged, *find_doubts(table, headers, samples, prep))]
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True)  # where nothing can be written is no fault of a picture
        with optional(picture.name):
            sheet = {table.series_ids[row]: samples[row] for row in spread(list(samples), 6)}
            save_figure(picture, draw_contact_sheet(sheet, prep))
            lines.append(f"axial, coronal and sagittal slices as the model will see them: {picture}")
    for line in lines:
        log.log(logging.WARNING if line.startswith("warning: ") else logging.INFO, "%s", line.removeprefix("warning: "))
    return lines


def slice_distance(table: Table, headers: Sequence[Header], prep: Preprocessing) -> Iterator[str]:
    """How far apart the slices lie that the model is given, where files say it; a warning where that is too far: a
    nodule of 6 mm, from which on CT guidelines ask for follow-up, can fall between slices more than 3 mm apart."""
    axis = spl_axes(prep.orientation)[0][0]
    if depths := [FIELD_OF_VIEW[0] if h.raw else h.shape[1 + axis] * h.spacing[axis] for h in headers if h.spacing]:
        depth = float(np.median(depths))
        mm = depth / prep.grid[0]
        yield f"slices lie {mm:.1f} mm apart after resampling (median of {len(depths)} scans that tell their spacing)"
        if mm > 3 and (small := [label for label in ("Lung nodule", "Bronchiectasis") if label in table.labels]):
            advice = f"--num-slices {math.ceil(depth / 3)} avoids it"
            yield f"warning: more than 3 mm hide small findings ({', '.join(small)}): {advice}"


def find_doubts(table: Table, headers: list[Header], samples: dict[int, Tensor], prep: Preprocessing) -> Iterator[str]:
    """Scans with the same file or voxels, and those of a sample that show no chest, or one that is turned."""
    seen: dict[Any, int] = {}
    for row, (path, header) in enumerate(zip(table.paths, headers, strict=True)):
        keys = (os.path.realpath(path), (header.crc, header.shape) if header.crc else row)
        if (first := min([seen.setdefault(key, row) for key in keys])) != row:
            yield f"{table.name(first)} and {table.name(row)} have the same voxels: leave one out"
    tells = prep.intensity != "windowed" and min(prep.grid[1:]) >= 48  # pixels: coarser ones close the lungs
    for row, sample in samples.items() if tells else ():
        volume = thinned(sample[0].numpy())
        tissue, bone = ((volume > limit).sum((0, 2)) for limit in (-400, 200))  # (H,): how much of each row of voxels
        middle, spine = (np.average(np.arange(len(part)), weights=part) if part.any() else 0 for part in (tissue, bone))
        if not shows_chest(volume):
            reason = "another body part, or see --intensity and --hu-range, and the picture"
            yield f"{table.name(row)} shows no lungs and muscle in HU: {reason}"
        elif bone.any() and middle - spine > 0.05 * np.ptp(np.flatnonzero(tissue)):  # of the body's height
            code = prep.orientation.translate(str.maketrans("AP", "PA"))
            both = code.translate(str.maketrans("LR", "RL"))
            yield f"{table.name(row)} has its spine in front: is it --orientation {code}, {both} or depth last?"


def window_names(prep: Preprocessing) -> list[str]:
    """What each of the K images of a slice shows."""
    if prep.intensity == "windowed":
        return [f"channel {c}" for c in range(prep.channels)]
    return [f"{lo:g} to {hi:g} HU" for lo, hi in prep.windows]


def save_figure(path: Path, figure: Any) -> None:
    """A matplotlib figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "Glyph .* missing")  # of ids in scripts that matplotlib's font lacks
    save_atomic(path, partial(figure.savefig, format="png", dpi=110))


def draw_contact_sheet(samples: dict[str, Tensor], prep: Preprocessing) -> Any:
    """A row for each scan; for each window an axial, a coronal and a sagittal slice through the middle, as squares."""
    from matplotlib.figure import Figure

    windows = [(0, WINDOWED_SCALE)] * prep.channels if prep.intensity == "windowed" else prep.windows
    figure = Figure((15, 1.8 * len(samples) + 1), layout="constrained")
    figure.suptitle(
        f"Axial, coronal and sagittal slices in {' | '.join(window_names(prep)[:3])}, read as --orientation "
        f"{prep.orientation} --intensity {prep.intensity}.\nRight where the spine is below in the first, to the right "
        "in the third, the liver to the left, the head above; see --orientation.", fontsize=9,
    )  # fmt: skip
    axes = figure.subplots(len(samples), squeeze=False)[:, 0]
    for axis, (series, sample) in zip(axes, samples.items(), strict=True):
        tiles, (_, s, h, w) = [], sample.shape
        for voxels, (lo, hi) in zip(sample.expand(len(windows), s, h, w)[:3], windows, strict=False):
            volume = (voxels.float() - lo) / (hi - lo)
            views = volume[s // 2], volume.flip(0)[:, h // 2], volume.flip(0)[:, :, w // 2]
            tiles += [F.interpolate(view[None, None], (256, 256))[0, 0] for view in views]
        axis.imshow(torch.cat(tiles, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set(ylabel=series[:24].replace("$", r"\$"), xticks=[], yticks=[])
    return figure


# Preparation: raw scans become files of their own once, rather than being read anew in each epoch.


def prepare_scan(scan: tuple[Path, Path], args: argparse.Namespace) -> UserError | None:
    """Convert a scan (its path, the new one), if it is raw and no earlier run did; returns what is wrong with it."""
    path, target = scan
    how = tuple(args.spacing[::-1]), args.intensity, args.hu_range  # as prepare_volume takes them
    try:
        if not is_raw(path):
            read_volume(path, voxels=False)
            return None
        source = made_of(path, how, FIELD_OF_VIEW)
        with suppress(BadVolume):
            if read_volume(target, voxels=False)[0].source == source.hex():
                return None
        image = prepare_volume(path, *how)
        facts = {"orientation": "SPL", "spacing": list(how[0]), "source": list(source)}
        write = write_npz if target.suffix == ".npz" else write_b2nd
        save_atomic(target, partial(write, image=image, facts=facts))
    except UserError as problem:
        return problem
    return None


def write_npz(file: BinaryIO, image: np.ndarray, facts: dict[str, Any]) -> None:
    """As savez_compressed does, at the level that is 2.7 times as fast and makes files 1.5 % larger."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, value in {"image": image, **facts}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)


def write_b2nd(file: BinaryIO, image: np.ndarray, facts: dict[str, Any]) -> None:
    """A blosc2 array, as nnU-Net reads it: LZ4 over shuffled bits, with a checksum, of which blosc2 keeps none."""
    blosc2, image = raw_library("blosc2"), np.ascontiguousarray(image)
    cparams = {"codec": blosc2.Codec.LZ4, "filters": [blosc2.Filter.BITSHUFFLE], "clevel": 5, "nthreads": 1}
    array, facts = blosc2.asarray(image, cparams=cparams), facts | {"crc32": deflate.crc32(image.data)}
    array.schunk.vlmeta["scan"] = facts | {"check": facts_check(array, facts)}
    file.write(array.to_cframe())


def prepare_table(args: argparse.Namespace) -> Path:
    """Convert the raw scans of --csv to NPZ or B2ND files in the folder --prepare and return the CSV that names these,
    its other cells as they were. What an earlier run converted is kept. Scans that can't be converted raise BadInput at
    the end, or may be skipped and are then listed in skipped.csv."""
    from tqdm import tqdm

    folder, out = args.prepare, args.prepare / args.csv.name
    table = read_table(args.csv, args.label_columns or (), labels_required=False)
    if out.resolve() == args.csv.resolve():
        raise BadInput(f"--prepare {folder}: would overwrite {args.csv}: name another folder")
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    targets = []
    for path, series in zip(table.paths, table.series_ids, strict=True):
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", series).lstrip(".")[:100]  # what a file name may hold
        name = plain if plain == series else f"{plain}-{hashlib.sha256(series.encode()).hexdigest()[:12]}"
        targets.append(folder / "volumes" / f"{name}.{args.format}" if is_raw(path) else path.absolute())
    with signals_held():
        done: Any = iter(torch.utils.data.DataLoader(
            list(zip(table.paths, targets, strict=True)), batch_size=None,  # type: ignore[arg-type]  # a list will do
            num_workers=min(args.num_workers, usable_cores()), worker_init_fn=one_thread_per_worker,
            collate_fn=partial(prepare_scan, args=args),
        ))  # fmt: skip
    bad: dict[int, str] = {}
    for row, problem in enumerate(tqdm(done, desc="prepare", unit="scan", total=len(table), disable=None)):
        if isinstance(problem, BadVolume):
            bad[row] = f"{table.name(row)}: {problem}"
        elif problem:
            raise problem
    if bad and (args.on_bad_volume == "stop" or len(bad) == len(table)):
        others = "the other scans are converted: mend these and repeat, or --on-bad-volume skip"
        raise BadInput(*bad.values(), *[others] * (len(bad) < len(table)))
    header, rows = read_rows(args.csv, Complaints(args.csv))
    for target, (_, cells) in zip(targets, rows, strict=True):
        cells[header.index("img_path")] = str(target.relative_to(folder) if folder in target.parents else target)
    write_rows(out, [header, *(cells for row, (_, cells) in enumerate(rows) if row not in bad)])
    write_skipped(folder / "skipped.csv", (table, bad))
    log.info("%d scans prepared; train with --csv %s", len(table) - len(bad), out)
    return out


# ── 5 Backbone ──────────────────────────────────────────────────────────────────────────────────────────────────────
# From a file of pretrained tensors to an image encoder that certainly holds them: opening, naming, building, loading,
# and what is then trained of it.

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
WEIGHT_FILES = (  # of a folder or hub model, in order of trust; BioViL's stand beside a text-only pytorch_model.bin
    *("biovil_t_image_model_proj_size_128.pt", "biovil_image_resnet50_proj_size_128.pt"),
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "best_model.pth"),
)
WRAPPER = re.compile(r"((?<=\.)|^)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
HUB_NAME = re.compile(
    r"(?:hf[-_]hub:|hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?(?P<name>[\w.-]+/[\w.-]+?)"
    r"(?:(?:@|/(?:tree|blob|resolve|raw)/)(?P<revision>[^/?]+)(?:/(?P<file>[^?]+?))?)?/?(?:\?.*)?"
)
UNZERO = "of DeepSpeed ZeRO-3: run `python zero_to_fp32.py . FOLDER` in the checkpoint's folder, and name that folder"
FOREIGN = (  # pattern of a file's name or first bytes, of an archive's member or of a tensor; what it is that shows it
    (r"^name .*\.distcp$", "a sharded checkpoint of torch.distributed: run `python -m torch.distributed.checkpoint."
     "format_utils dcp_to_torch {} model.pt`, and name that file"),
    (r"^name (zero_to_fp32\.py|.*_optim_states\.pt)$", f"a checkpoint {UNZERO}"),
    (r"^name (models--.*|snapshots)/$", "the hub's cache, of several snapshots or models: name one with weights"),
    (r"^bytes (\Z|\s*[<{]|version https://git-lfs)", "empty, or text instead of weights (a Git LFS pointer, a web "
     "page, JSON): download it again, or run `git lfs pull` there"),
    (r"^bytes (\x89HDF|GGUF|\x81\xa6params|\x08)", "an HDF5, GGUF, Flax or ONNX file: use the model's PyTorch weights"),
    (r"^bytes (\x1f\x8b|.{257}ustar)|^member .*\.safetensors$", "an archive (gzip, tar or zip): unpack it first"),
    (r"^member .*/constants\.pkl$", "a TorchScript program: save its state_dict() instead"),
    (r"^member .*\.npy$", "a NumPy archive (a CT volume, or JAX weights): use the model's Hugging Face copy"),
    (r"^tensor .*\.(zero_point|SCB|absmax|quant_map|qweight|qzeros|weight_scale\w*) |^tensor \S+ "
     r"torch\.(q?u?int8|qint32|(float8|complex|sparse)\w*) ", "a quantised model, or sparse: use the original weights"),
    (r"^tensor (.*\.)?(lora_\w+|base_layer|modules_to_save)\.", "a model with LoRA adapters: merge it into its base "
     "model, model.merge_and_unload().save_pretrained(FOLDER) in peft, and name that folder"),
    (r"^tensor .* \(0,\)$", f"empty placeholders {UNZERO}"),
    (r"^tensor .*conv1\.weight .* 7, 7, 7\)$", "a 3D ResNet of MedicalNet's kind: other strides than Merlin's"),
    (r"^tensor .*(embeddings\.class_embedding |\.resblocks\.)", "a CLIP model, not SigLIP"),
    (r"^tensor (visual_transformer|.*enc_(spatial|temporal)_transformer)\.", "CT-CLIP, which no library here builds"),
)  # fmt: skip
SUPPORTED = (
    "--pretrained takes SigLIP towers (Hugging Face, open_clip, timm), such as google/siglip-base-patch16-224, DINOv2 "
    "and other ViTs, COLIPRI, the 3D ResNet-152 of Merlin and BioViL(-T)"
)


def refuse_foreign(source: Path | str, facts: list[str]) -> None:
    """Raise BadInput that says what `source` is, where one of the facts shows it."""
    for (pattern, what), fact in itertools.product(FOREIGN, facts):
        if re.search(pattern, fact, re.DOTALL):
            others = f". {SUPPORTED}" if fact.startswith("tensor") else ""
            raise BadInput(f"{source}: seems to be {what.format(source)}{others}")


def locate_weights(source: str) -> list[Path]:
    """The weights file, or all its shards, that a path, a folder, a hub name or a hub address stands for."""
    path, hub = Path(source.removeprefix("local-dir:")).expanduser(), HUB_NAME.fullmatch(source)
    if os.path.exists(path):
        return shards_of(weights_in(path) if path.is_dir() else path)
    if not hub or (path.suffix in WEIGHT_SUFFIXES and not hub["file"]):
        raise BadInput(f"{source}: no such file or folder, and no name of a model on the Hugging Face hub")
    return download_weights(**hub.groupdict())


def weights_in(folder: Path) -> Path:
    """The weights file, index or first shard in a folder, which may be of a hub's cache."""
    current = [folder / "snapshots" / ref.read_text().strip() for ref in folder.glob("refs/main")]
    if len(snapshots := current or sorted(folder.glob("snapshots/*"))) == 1 and snapshots[0].is_dir():
        folder = snapshots[0]
    named = [folder / name for name in WEIGHT_FILES if os.path.isfile(folder / name)]
    others = [file for file in sorted(folder.iterdir()) if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
    if named or (others and set(others) <= set(shards_of(others[0]))):
        return (named or others)[0]
    refuse_foreign(folder, [f"name {file.name}{'/' * file.is_dir()}" for file in folder.iterdir()])
    names = ", ".join(file.name for file in others[:5]) or "none"
    raise BadInput(f"{folder}: a folder should hold one weights file, found {names}: name the file")


def shards_of(path: Path) -> list[Path]:
    """All files of the model that `path` is a shard or the index of, or itself; BadInput where one is missing."""
    refuse_foreign(path.parent, [f"name {path.name}"])
    names = [path.name]
    if path.name.endswith(".index.json"):
        files = read_json(path).get("weight_map")
        names = sorted({Path(str(name)).name for name in files.values()} if isinstance(files, dict) else ())
    elif shard := SHARD.fullmatch(path.name):
        names = [f"{shard[1]}-{n:05}-of-{shard[3]}{shard[4]}" for n in range(1, int(shard[3]) + 1)]
    missing = [name for name in names if not os.path.isfile(path.with_name(name))]
    if not names or missing == [path.name]:
        raise BadInput(f"{path}: not a regular file, or an index of none")
    if missing:
        get = f"`hf download NAME {' '.join(missing[:1])} --local-dir {path.parent}` if it came from the hub"
        raise BadInput(f"{path}: of {len(names)} shards {', '.join(missing[:3])} is not beside it: get it there, {get}")
    return [path.with_name(name) for name in names]


def download_weights(name: str, revision: str | None, file: str | None) -> list[Path]:
    """The weights files of a hub model, its configuration beside them: from the local cache, else from the network."""
    from huggingface_hub import HfApi, errors, logging, snapshot_download

    logging.set_verbosity_error()  # it retries a dead network for 20 s, in ten lines of its own
    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError, BadInput):  # the last: weights are missing
        return locate_weights(f"{snapshot_download(name, revision=revision, local_files_only=True)}/{file or ''}")
    try:
        files = HfApi().list_repo_files(name, revision=revision)
        chosen = file or next((known for known in WEIGHT_FILES if known in files), "*.safetensors")
        shards = re.sub(r"(-\d{5}-of-\d{5})?(\.\w+)(\.index\.json)?$", r"-*\2", chosen)
        folder = snapshot_download(name, revision=revision, allow_patterns=[chosen, shards, "*.json"])
    except (errors.RepositoryNotFoundError, errors.HFValidationError):  # the first may be one that is gated
        terms = f"if it has terms, accept them on huggingface.co/{name}, then run `hf auth login`"
        raise BadInput(f"{name}: neither here nor a model that you may read on the Hugging Face hub: {terms}") from None
    except Exception as error:  # of whichever library makes the connection
        why = f"neither here nor in the hub's cache, and the hub is out of reach ({first_line(error)})"
        raise BadEnvironment(f"{name}: {why}") from None
    return locate_weights(f"{folder}/{file or ''}")


def harmless_types() -> list[Any]:
    """What trainers keep beside the weights, for PyTorch's allow-list: plain data, built without a file's code."""
    array, dtypes = np.zeros(1), {type(np.dtype(kind)) for kind in "?bhilqBHILQefdUSOMm"}
    kinds: list[Any] = [argparse.Namespace, datetime, date, timedelta, timezone, np.ndarray, np.dtype, *dtypes]
    # The rest is named as files name it, so that another NumPy, Python or system than the writer's reads it too.
    for core in ("numpy.core", "numpy._core"):
        kinds += [(array.__reduce__()[0], f"{core}.multiarray._reconstruct")]
        kinds += [(array[0].__reduce__()[0], f"{core}.multiarray.scalar")]
    for module, pure in itertools.product(("pathlib", "pathlib._local"), ("", "Pure")):
        kinds += [(PurePosixPath, f"{module}.{pure}PosixPath"), (PureWindowsPath, f"{module}.{pure}WindowsPath")]
    for module in ("pytorch_lightning.utilities.parsing", "lightning.fabric.utilities.data"):
        kinds += [(dict, f"{module}.AttributeDict"), (dict, f"{module.replace('.fabric', '_fabric')}.AttributeDict")]
    return kinds


def open_weights(path: Path) -> dict[str, Any]:
    """The content of a weights file: names and tensors, perhaps nested; memory-mapped, and nothing in it is run."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            from safetensors.torch import load_file

            return load_file(path)
        zipped = head.startswith(b"PK")
        members = zipfile.ZipFile(path).namelist() if zipped else []
        refuse_foreign(path, [f"bytes {head.decode('latin-1')}", *(f"member {name}" for name in members)])
        with torch.serialization.safe_globals(harmless_types()):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # the bytes can lead the readers anywhere
        if needs := re.search(r"(?:GLOBAL|class|global:?) ([A-Za-z_][\w.]*\.\w+)", str(error)):
            safe = "where it was written, save the plain tensors, torch.save(model.state_dict(), FILE)"
            raise BadInput(f"{path}: reading it would run code that it names ({needs[1]}): {safe}") from None
        reason = f"{type(error).__name__}: {first_line(error)[:120]}"
        raise BadInput(f"{path}: not readable as weights, damaged or incomplete ({reason}): get it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: holds a {type(found).__name__}, not named tensors. {SUPPORTED}")
    return found


def flatten(root: dict[Any, Any]) -> dict[str, Tensor]:
    """Tensors of nested containers (`state_dict`, `model`, `ema` …) by dotted name, without what wrappers inserted."""
    tensors: dict[str, Tensor] = {}
    queue, seen = [("", root)], {id(root)}  # a container may hold itself
    for prefix, node in queue:  # which grows as it is read
        for key, value in node.items():
            if isinstance(value, Tensor):
                tensors.setdefault(WRAPPER.sub("", f"{prefix}{key}"), value)
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                queue.append((f"{prefix}{key}.", value))
    return tensors


@dataclass
class Found:
    """An image encoder's tensors, named as in the file without `prefix`, and what bears on its configuration."""

    source: str
    beside: dict[str, Any] = field(default_factory=dict)  # config, open_clip_config, preprocessor_config: JSON files
    asked_heads: int | None = None
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # names in the file that belong to no part of the image encoder

    def take(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """Of a file's tensors, those under this prefix are the encoder's; in float32, whatever they are stored in."""
        self.prefix, self.unused = prefix, [name for name in tensors if not name.startswith(prefix)]
        mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self.tensors = {name: t.float() if t.is_floating_point() else t for name, t in mine.items()}

    def blocks(self, pattern: str) -> int:
        """How many blocks there are, `pattern` finding the number of one in a tensor's name."""
        return 1 + max((int(match[1]) for name in self.tensors if (match := re.match(pattern, name))), default=-1)

    def library_config(self) -> Any:
        """config.json as `transformers` understands it, gaps filled with the library's defaults; None if it can't."""
        from transformers import AutoConfig, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with suppress(Exception):
            return AutoConfig.for_model(**self.beside.get("config", {}))
        return None

    def timm_model(self) -> tuple[str, dict[str, Any], int | None]:
        """Name, arguments and image size, as far as the configuration of timm or open_clip states them."""
        timm = self.beside.get("config", {})
        clip = self.beside.get("open_clip_config", {}).get("model_cfg", {}).get("vision_cfg", {})
        pixels = clip.get("image_size") or timm.get("pretrained_cfg", {}).get("input_size", [None])[-1]
        return timm.get("architecture") or clip.get("timm_model_name") or "", timm.get("model_args") or {}, pixels

    def heads(self, width: int, act: str, stated: int | None = None, wide: Sequence[int] = ()) -> int:
        """Attention heads as asked for or stated, else assumed aloud: 16 of `wide` widths, else one for each 64."""
        usual = 16 if width in wide else 0 if width % 64 else width // 64
        heads = self.asked_heads or stated or usual
        if not heads or width % heads:
            raise BadInput(f"{self.source}: {heads or '?'} heads do not divide its width {width}: see --backbone-heads")
        if not (self.asked_heads or stated):
            self.notes.append(f"assumed, without a config.json: {heads} heads (--backbone-heads), {act}")
        return heads

    def normalisation(self, channels: int) -> dict[str, Any]:
        """Windows in HU, and mean and deviation of what they show in [0, 1], None being those of each slice.

        As the JSON files beside the weights say; else what such towers were trained with, aloud.
        """
        said = self.beside.get("preprocessor_config") or self.beside.get("config", {}).get("pretrained_cfg", {})
        if said.get("image_processor_type") == "CuriaImageProcessor":  # HU as they are, air at the least
            return {"mean": None, "std": None, "windows": [[-1000.0, 3071.0]] * 3}
        mean, std = (said.get(f"image_{key}", said.get(key)) for key in ("mean", "std"))
        whose, windows = "ImageNet", WINDOW_PRESETS["merlin" if channels == 1 else "chest"]
        if not (mean and std):
            mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
            if channels == 1:  # Damron et al., 2026: HU in -997..888, less -142.39, over 360.97
                whose, mean, std, windows = "DALE-CT", [854.61 / 1885], [360.97 / 1885], ((-997.0, 888.0),) * 3
            self.notes.append(f"assumed, nothing beside it saying otherwise: the normalisation of {whose}")
        if channels == 1:  # a tower of one channel is often said to have the means of three
            mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
        return {"mean": mean, "std": std, "windows": windows}


# The encoders: their modules are the libraries', so that files fit; what is done with them is one interface. `read`
# makes the configuration of what was found, the constructor the module of the configuration, with random weights, and
# `adopt` names the file's tensors as that module does.


def recomputed(run: Callable[..., Tensor], module: nn.Module) -> Callable[..., Tensor]:
    """`run`, but what it keeps for the backward pass is thrown away and computed again there."""

    @contextmanager
    def again() -> Iterator[None]:  # BatchNorm must not count the same input twice
        norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        before = [(buffer, buffer.clone()) for norm in norms if norm.training for buffer in norm.buffers()]
        try:
            yield
        finally:
            for buffer, value in before:
                buffer.copy_(value)

    return partial(checkpoint, run, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


class Backbone(nn.Module):
    """Image encoder of one family: images in [0, 1] to one feature vector each, and to the tokens it is made of.

    Slice families take (n, K, H, W) images; a `volumetric` one takes (N, K, D, H, W) with its axes in `orientation`.
    `config` is plain data from which `build_backbone` makes the same architecture again without any file.
    """

    family = ""
    orientation = "SPL"
    volumetric = False
    recompute = False  # each block of a volumetric one is computed again in the backward pass
    leading = 0  # class and register tokens, which come before those of patches
    repeated: Sequence[str]  # names in `net` of the lists of its blocks, in forward order
    net: Any  # the family's own module
    # Images, and of SigLIP the patches kept, to all last features, (n, *grid, E) or (n, leading + P, E), and which of
    # these are no padding, (n, M), None being all.
    encode: Callable[..., tuple[Tensor, Tensor | None]]

    def __init__(self, config: dict[str, Any], net: nn.Module, width: int, slices: int = 64):
        super().__init__()
        self.config, self.net, self.width = dict(config), net, width
        self.default_grid = (slices, config["image_size"], config["image_size"])  # (S, H, W) this family is best given
        self.windows = tuple(map(tuple, config.get("windows", WINDOW_PRESETS["chest"])))  # HU it is best given
        for module in net.modules():  # of pretraining only: a parameter that never gets a gradient would stall DDP
            if hasattr(module, "mask_token"):
                setattr(module, "mask_token", None)  # noqa: B010

    def adopt(self, found: Found) -> dict[str, Tensor]:
        """A file's tensors as `net` names and sizes them."""
        return found.tensors

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in forward order: units to compile or to recompute."""
        return [block for name in self.repeated for block in self.net.get_submodule(name)]

    def run_blocks(self, x: Tensor, **options: Any) -> Tensor:
        """One block after the other, computed again one by one where memory is short."""
        for block in self.blocks():  # a compiled block can be computed again, but not compiled with that inside
            x = (recomputed(block, block) if self.recompute else block)(x, **options)
        return x

    def pool(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """All last features (n, M, E) to the image's (n, E): their mean, unless the family has something else."""
        return x.mean(1) if real is None else (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def summary(self, x: Tensor, maxima: bool = False, real: Tensor | None = None) -> Tensor:
        """What `encode` gave to (n, E), or with `maxima` to (n, 2E): then the largest of each token feature as well."""
        x = x.flatten(1, -2)
        feature = self.pool(x, real)
        if not maxima:
            return feature
        tokens = x if real is None else x.masked_fill(~real[..., None], -math.inf)
        return torch.cat([feature, tokens[:, self.leading :].amax(1)], dim=1)

    def forward(self, images: Tensor, *kept: Any, maxima: bool = False) -> Tensor:
        """(n, K, H, W) or (N, K, D, H, W) in [0, 1], of SigLIP what is `kept`, to (n, E), or with `maxima` (n, 2E)."""
        x, real = self.encode(images, *kept)
        return self.summary(x, maxima, real)

    def tokens(self, images: Tensor) -> Tensor:
        """Last spatial features, (n, *grid, E)."""
        x, _ = self.encode(images)
        rows = images.shape[2] // self.config.get("patch_size", 1)
        return x if x.ndim > 3 else x[:, self.leading :].unflatten(1, (rows, -1))

    def evidence(self, images: Tensor, *kept: Any, maxima: bool = False) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Ones (n, *grid), the shares in which tokens decide on what `forward` gives, and what makes that of shares.

        Patches that are left out have one as well, on which nothing depends.
        """
        x, real = self.encode(images, *kept)
        grid = x.shape[1:-1] if x.ndim > 3 else [n // self.config["patch_size"] for n in images.shape[2:]]

        def feature(shares: Tensor) -> Tensor:
            return self.summary(x.flatten(1, -2) * pack_kept(shares.flatten(1)[..., None], *kept)[0], maxima, real)

        return x.new_ones(len(x), *grid), feature

    def turn(self, volume: Tensor) -> Tensor:
        """(N, K, D, H, W) in SPL, as a view with the axes in this family's orientation."""
        axes, flips = spl_axes(self.orientation)
        volume = volume.flip([2 + i for i, flip in enumerate(flips) if flip])
        return volume.permute(0, 1, *(2 + axes.index(i) for i in range(3)))

    def turn_back(self, grid: Tensor) -> Tensor:
        """Tokens (N, x, y, z, E) over this family's axes, turned to SPL."""
        axes, flips = spl_axes(self.orientation)
        return grid.permute(0, *(1 + axis for axis in axes), 4).flip([1 + i for i, flip in enumerate(flips) if flip])

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, except that frozen modules stay in eval mode: dropout off, BatchNorm statistics kept."""
        super().train(mode)
        for module in self.modules() if mode else []:
            if {p.requires_grad for p in module.parameters()} == {False}:
                module.eval()
        return self


HF_PATCHES, HF_POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
TIMM_NAMES = (  # of SigLIP in timm and open_clip, and what they are in transformers
    (r"^(patch_embed|embeds)\.proj", "embeddings.patch_embedding"),
    (r"^(embeds\.)?pos_embed", HF_POSITIONS),
    (r"^blocks\.(\d+)\.norm([12])", r"encoder.layers.\1.layer_norm\2"),
    (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.out_proj"),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"^attn_pool\.latent", "head.probe"),
    (r"^attn_pool\.proj", "head.attention.out_proj"),
    (r"^attn_pool\.norm", "head.layernorm"),
    (r"^attn_pool\.", "head."),
)


def rename_timm_siglip(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's and open_clip's names as Hugging Face's: qkv is fused in theirs, the pool's q and kv are in ours."""
    kept: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        for pattern, ours in TIMM_NAMES:
            name = re.sub(pattern, ours, name)
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                kept[name.replace("attn.qkv", f"self_attn.{part}_proj")] = rows
        else:
            kept[name] = tensor.flatten(0, -2) if name == HF_POSITIONS else tensor  # (1, P, E) to (P, E)
    for kind in ("weight", "bias"):
        if f"head.q.{kind}" in kept:
            pool = [kept.pop(f"head.{part}.{kind}") for part in ("q", "kv")]
            kept[f"head.attention.in_proj_{kind}"] = torch.cat(pool)
    return kept


class SiglipBackbone(Backbone):
    """SigLIP vision tower on the modules of `transformers`; patches can be left out of its sequence.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023.
    """

    family, repeated = "siglip", ("encoder.layers",)

    @staticmethod
    def read(found: Found) -> dict[str, Any]:
        """Shapes tell the configuration; what they cannot comes from a fitting config.json, or is assumed and noted."""
        timm = HF_PATCHES not in found.tensors
        kept = found.tensors = rename_timm_siglip(found.tensors) if timm else found.tensors
        kept.pop("embeddings.position_ids", None)  # a counter that old files store
        patch, positions = kept[HF_PATCHES], len(kept[HF_POSITIONS])
        naflex = patch.ndim == 2  # a linear layer over flattened (p, p, C) patches is a convolution written otherwise
        if naflex:
            side = math.isqrt(patch.shape[1] // 3)
            patch = kept[HF_PATCHES] = patch.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()
            found.notes.append("SigLIP 2 NaFlex: its tower is used at a fixed square size")
        width, channels, size, _ = patch.shape
        library = found.library_config()
        stated = getattr(library, "vision_config", library).to_dict() if library else {}
        if stated and stated.get("hidden_size") != width:
            found.notes.append(f"config.json ignored: its tower is {stated.get('hidden_size')} wide, this one {width}")
            stated = {}
        grid, pixels = math.isqrt(positions), stated.get("image_size") or found.timm_model()[2] or 0
        if pixels // size != grid:
            pixels = grid * size
            if (size, grid) == (14, 27):  # published for 384 pixels, though that is 27 * 14 + 6
                pixels = 384
                found.notes.append("assumed to be for 384 pixels; one of timm's ..._378 wants --image-size 378")
        pooled = any(name.startswith("head.") for name in kept)
        if not pooled:
            found.notes.append("no pooling head in the file: its feature is the mean of its tokens")
        # timm computes its first SigLIP towers with the exact GELU, later ones with the tanh form; shapes tell which.
        later = not timm or naflex or size == 32 or width == 1536 or (width, size) == (1152, 16)
        act = "gelu_pytorch_tanh" if later or (width, positions) == (1024, 1024) else "gelu"
        return {
            "family": "siglip", "hidden_size": width, "num_channels": channels, "patch_size": size,
            "image_size": pixels, "intermediate_size": len(kept["encoder.layers.0.mlp.fc1.weight"]),
            "num_hidden_layers": stated.get("num_hidden_layers") or found.blocks(r"encoder\.layers\.(\d+)\."),
            "num_attention_heads": found.heads(width, act, stated.get("num_attention_heads"), (1152, 1536)),
            "hidden_act": stated.get("hidden_act", act), "layer_norm_eps": stated.get("layer_norm_eps", 1e-6),
            "vision_use_head": pooled, "naflex": naflex,
        }  # fmt: skip

    def __init__(self, config: dict[str, Any]):
        from transformers import SiglipVisionConfig, SiglipVisionModel

        settings = {k: v for k, v in config.items() if k not in ("family", "naflex")} | {"attn_implementation": "sdpa"}
        super().__init__(config, SiglipVisionModel(SiglipVisionConfig(**settings)), config["hidden_size"])
        self.side = config["image_size"] // config["patch_size"]

    def adopt(self, found: Found) -> dict[str, Tensor]:
        """Position embeddings (P, E) interpolated to this size: for NaFlex bilinear, as in `transformers`."""
        old, new = math.isqrt(len(found.tensors[HF_POSITIONS])), self.side
        if old == new:
            return found.tensors
        found.notes.append(f"position embeddings interpolated from {old} x {old} to {new} x {new}")
        grid = found.tensors[HF_POSITIONS].T.reshape(1, -1, old, old)
        mode = "bilinear" if self.config.get("naflex") else "bicubic"
        grid = F.interpolate(grid, size=(new, new), mode=mode, antialias=True)
        return found.tensors | {HF_POSITIONS: grid.flatten(2)[0].T.contiguous()}

    def encode(self, images: Tensor, *kept: Any) -> tuple[Tensor, Tensor | None]:
        embeddings = self.net.embeddings
        x = embeddings.patch_embedding(images * 2 - 1).flatten(2).transpose(1, 2)  # (n, P, E); SigLIP sees [-1, 1]
        x, real = pack_kept(x + embeddings.position_embedding.weight, *kept)
        for block in self.net.encoder.layers:
            x = block(x, None if real is None else real[:, None, None, :])
        return self.net.post_layernorm(x), real

    def pool(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """The attention-pooling head, as in `transformers` but deaf to padding; the mean where a tower has none."""
        if not self.config["vision_use_head"]:
            return super().pool(x, real)
        head, probe = self.net.head, self.net.head.probe.expand(len(x), -1, -1)
        padding = None if real is None else ~real
        x = head.attention(probe, x, x, key_padding_mask=padding, need_weights=False)[0][:, 0]
        return x + head.mlp(head.layernorm(x))


def pack_kept(
    x: Tensor, keep: Tensor | None = None, counts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Of tokens (n, P, E) those to `keep` (n, P), in order: (n, M, E), and which are no padding (None: all).

    Of an image that keeps none it is the first. M is the longest row, rounded up to a multiple of 8, which attention
    kernels like. Without the `counts` that each row keeps the host waits for the device here.
    """
    if keep is None:
        return x, None
    first = torch.arange(keep.shape[1], device=keep.device) == 0
    keep = keep | (first & ~keep.any(1, keepdim=True))
    lengths = keep.sum(1)
    counts = lengths.tolist() if counts is None else counts
    longest = min(-(-max(counts) // 8) * 8, keep.shape[1])
    order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    real = torch.arange(longest, device=x.device) < lengths[:, None]
    return x, None if min(counts) == longest else real


class ViTBackbone(Backbone):
    """A ViT whose feature may be a class token."""

    def __init__(self, config: dict[str, Any], net: nn.Module, width: int):
        super().__init__(config, net, width)
        for name in ("mean", "std"):  # where the images are: numbers that are sent there would be waited for
            values = None if config[name] is None else torch.tensor(config[name]).view(-1, 1, 1)
            self.register_buffer(f"image_{name}", values, persistent=False)  # the configuration holds them

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [0, 1] less the mean and over the deviation that the tower was trained with, or their own."""
        mean, std = (getattr(self, f"image_{name}") for name in ("mean", "std"))
        if mean is None:
            std, mean = torch.std_mean(images, (2, 3), keepdim=True)
            std = std.clamp(min=1e-6)
        elif len(mean) != images.shape[1]:  # other channels than it was trained with have the same in common
            mean, std = mean.mean(), std.mean()
        return (images - mean) / std

    def evidence(self, images: Tensor, *kept: Any, maxima: bool = False) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Of what the last block is given: a class token no longer depends on the patches that come out of it. And of
        what its norm makes of that: on how long a vector is that a norm is given nothing depends."""
        last, given = self.blocks()[-1], []
        norm = next(m for m in last.modules() if "Norm" in type(m).__name__)  # the one before attention
        with last.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
            shares = torch.ones_like(self.tokens(images)[..., 0])

        def feature(shares: Tensor) -> Tensor:
            weights = F.pad(shares.flatten(1), (self.leading, 0), value=1.0)[..., None]
            with (
                torch.compiler.set_stance("force_eager"),  # compiled code passes over the second of these hooks
                last.register_forward_pre_hook(lambda _, inputs: (given[0] * weights, *inputs[1:])),
                norm.register_forward_hook(lambda _, inputs, output: output * weights),
            ):
                return self(images, maxima=maxima)

        return shares, feature


class TimmBackbone(ViTBackbone):
    """A ViT of `timm`: plain, DINOv2, DINOv3, DALE-CT, …"""

    family, repeated = "timm", ("blocks",)

    @staticmethod
    def read(found: Found) -> dict[str, Any]:
        """By the name that its configuration states, else by what its tensors show."""
        tensors, (name, arguments, pixels) = found.tensors, found.timm_model()
        registers = sum(tensors[key].shape[1] for key in ("reg_token", "register_tokens") if key in tensors)
        if "siglip" in name or not (name or "cls_token" in tensors or registers):
            return SiglipBackbone.read(found)
        width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        if not name:  # DINOv2, of Meta's names or timm's, and plain ViTs differ by these alone
            gated, positions = "blocks.0.mlp.w12.weight" in tensors, tensors["pos_embed"].shape[1]
            hidden = len(tensors["blocks.0.mlp.w12.weight" if gated else "blocks.0.mlp.fc1.weight"])
            gated = gated or hidden == 2 * tensors["blocks.0.mlp.fc2.weight"].shape[1]
            dinov2 = "vit_giant_patch14_dinov2" if gated else "vit_large_patch14_dinov2"
            name = dinov2 if "blocks.0.ls1.gamma" in tensors else "vit_base_patch16_224"
            arguments = {
                "patch_size": patch, "img_size": math.isqrt(positions) * patch, "embed_dim": width,
                "depth": found.blocks(r"blocks\.(\d+)\."), "mlp_ratio": hidden / width, "reg_tokens": registers,
                "no_embed_class": bool(registers) or math.isqrt(positions) ** 2 == positions,
                "pre_norm": "norm_pre.weight" in tensors, "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
                "num_heads": found.heads(width, "the exact GELU"),
            }  # fmt: skip
        config = {"family": "timm", "architecture": name, "arguments": arguments, "patch_size": patch}
        config |= {"image_size": arguments.get("img_size") or pixels, "num_channels": channels}
        return config | found.normalisation(channels)

    def __init__(self, config: dict[str, Any]):
        import timm

        size = {"img_size": config["image_size"]} if config["image_size"] else {}
        arguments = config["arguments"] | size | {"in_chans": config["num_channels"], "num_classes": 0}
        net: Any = timm.create_model(config["architecture"], **arguments)
        sizes = {"image_size": net.patch_embed.img_size[0], "patch_size": net.patch_embed.feat_ratio()}
        super().__init__(config | sizes, net, net.num_features)
        self.leading = net.num_prefix_tokens

    def adopt(self, found: Found) -> dict[str, Tensor]:
        """Renamed and resized by the function that timm itself has for published files."""
        return vars(sys.modules[type(self.net).__module__])["checkpoint_filter_fn"](found.tensors, self.net)

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.net.forward_features(self.normalised(images)), None

    def pool(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return self.net.forward_head(x, pre_logits=True)


class TransformersBackbone(ViTBackbone):
    """DINOv2 (RAD-DINO, Curia), DINOv3 and other ViTs of `transformers`; its feature is the class token."""

    family = "transformers"

    @staticmethod
    def read(found: Found) -> dict[str, Any]:
        """As config.json describes it."""
        library, known = found.library_config(), ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
        if getattr(library, "model_type", None) not in known:
            raise BadInput(f"{found.source}: needs beside it the config.json that says which it is of {known}")
        config = {"family": "transformers", "architecture": json.loads(library.to_json_string(use_diff=False))}
        config |= {key: getattr(library, key) for key in ("image_size", "patch_size", "num_channels")}
        return config | found.normalisation(library.num_channels)

    def __init__(self, config: dict[str, Any]):
        from transformers import AutoConfig, AutoModel

        ours = {"num_channels": config["num_channels"], "dtype": "float32"}  # whatever the file is stored in
        self.library = AutoConfig.for_model(**config["architecture"] | ours)
        options = {"add_pooling_layer": False} if self.library.model_type == "vit" else {}
        net = AutoModel.from_config(self.library, attn_implementation="sdpa", **options)
        super().__init__(config, net, self.library.hidden_size)
        lists = {name: len(m) for name, m in net.named_modules() if isinstance(m, nn.ModuleList)}
        self.repeated = [max(lists, key=lambda name: lists[name])]  # its name differs from release to release
        self.leading = 1 + getattr(self.library, "num_register_tokens", 0)

    def adopt(self, found: Found) -> dict[str, Tensor]:
        """Renamed by the library itself: names in published files and in memory differ from release to release."""
        how = {"config": self.library, "state_dict": found.tensors, "output_loading_info": True}
        net, told = type(self.net).from_pretrained(None, **how)
        missing = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
        found.unused += [found.prefix + name for name in told["unexpected_keys"]]
        return {name: tensor for name, tensor in net.state_dict().items() if name not in missing}

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        options = {"interpolate_pos_encoding": True} if self.library.model_type == "vit" else {}
        return self.net(self.normalised(images), **options).last_hidden_state, None

    def pool(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return x[:, 0]


class ColipriBackbone(Backbone):
    """The image encoder of COLIPRI: a Primus, a projection of its tokens, attention pooling.

    Wald et al., "Comprehensive language-image pre-training for 3D medical image understanding", 2025. Voxels of 2 mm,
    HU in -1000..1000, and axes as in the package `colipri` from 0.1.2 on (before, and in its model card still: SAR).
    """

    family, volumetric, orientation, repeated = "colipri", True, "RAS", ("backbone.eva.blocks",)

    @staticmethod
    def read(found: Found) -> dict[str, Any]:
        width, channels, patch, *_ = found.tensors["backbone.down_projection.proj.weight"].shape
        found.notes.append("trained on voxels of 2 mm: prepare scans with --spacing 2 2 2")
        return {
            "family": "colipri", "embed_dim": width, "patch_size": patch, "num_channels": channels, "image_size": 192,
            "eva_depth": found.blocks(r"backbone\.eva\.blocks\.(\d+)\."),
            "projection_dim": len(found.tensors["projector.weight"]),
        }  # fmt: skip

    def __init__(self, config: dict[str, Any]):
        from dynamic_network_architectures.architectures.primus import Primus

        width, patch = config["projection_dim"], config["patch_size"]
        self.cube = [config["image_size"] // patch] * 3
        net: Any = nn.Module()
        net.backbone = Primus(
            config["num_channels"], config["embed_dim"], [patch] * 3, 1, config["eva_depth"], 12,
            [n * patch for n in self.cube], use_abs_pos_embed=False, init_values=0.1, scale_attn_inner=True,
        )  # fmt: skip
        net.backbone.up_projection = nn.Identity()
        net.projector, net.pooler = nn.Conv3d(config["embed_dim"], width, 1), nn.Module()
        net.pooler.attn = nn.MultiheadAttention(width, 12, batch_first=True)
        super().__init__(config | {"windows": WINDOW_PRESETS["merlin"]}, net, width, 192)

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        eva, x = self.net.backbone.eva, self.net.backbone.down_projection(images * 2 - 1)
        grid = x.shape[2:]
        if list(grid) != self.cube:  # a patch is as far from the next in a volume of any size
            self.cube = list(grid)
            shapes = {"feat_shape": self.cube, "ref_feat_shape": self.cube}
            eva.rope = type(eva.rope)(eva.rope.dim, in_pixels=False, device=x.device, **shapes)
        x = eva.norm(self.run_blocks(x.flatten(2).transpose(1, 2), rope=eva.rope.get_embed()))
        return self.net.projector(x.transpose(1, 2).unflatten(2, grid)).movedim(1, -1), None

    def pool(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return self.net.pooler.attn(x.mean(1, keepdim=True), x, x, need_weights=False)[0][:, 0]


def channels_last(images: Tensor) -> Tensor:
    """Images in the layout that convolutions are fastest in: a GPU's tensor cores, and a CPU's bfloat16 kernels for
    volumes (measured; its float32 ones are not). Weights stay as they are stored."""
    if images.device.type == "cuda" or (images.ndim == 5 and torch.is_autocast_enabled("cpu")):
        layout = torch.channels_last_3d if images.ndim == 5 else torch.channels_last
        return images.contiguous(memory_format=layout)
    return images


class ResNet3DBackbone(Backbone):
    """MONAI's ResNet as in Merlin: whole volumes, whose axes rise towards S, R and A; names are Merlin's as well.

    Blankemeier et al., "Merlin: A Vision Language Foundation Model for 3D Computed Tomography", 2024.
    """

    family, volumetric, orientation = "resnet3d", True, "SRA"
    repeated = "layer1", "layer2", "layer3", "layer4"

    @staticmethod
    def read(found: Found) -> dict[str, Any]:
        stem, channels, *kernel = found.tensors["conv1.weight"].shape
        return {
            "family": "resnet3d", "layers": [found.blocks(rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
            "block_inplanes": [stem, stem * 2, stem * 4, stem * 8], "num_channels": channels, "conv1_t_size": kernel,
            "bias_downsample": "layer1.0.downsample.0.bias" in found.tensors, "image_size": 224,
        }  # fmt: skip

    def __init__(self, config: dict[str, Any]):
        from monai.networks.nets import ResNet

        names = ("layers", "block_inplanes", "conv1_t_size", "bias_downsample")
        settings = {name: config[name] for name in names} | {"n_input_channels": config["num_channels"]}
        settings |= {"block": "bottleneck", "conv1_t_stride": (1, 2, 2), "feed_forward": False}
        super().__init__(config, ResNet(**settings), config["block_inplanes"][3] * 4, 160)

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        x = self.net.maxpool(self.net.act(self.net.bn1(self.net.conv1(channels_last(images)))))
        return self.run_blocks(x).movedim(1, -1), None


class BiovilBackbone(Backbone):
    """Image encoder of BioViL or BioViL-T from `health_multimodal`, one image at a time.

    Boecking et al., 2022; Bannur et al., "Learning to Exploit Temporal Structure for Biomedical VLP", 2023.
    """

    family, repeated = "biovil", ("encoder.layer1", "encoder.layer2", "encoder.layer3", "encoder.layer4")

    @staticmethod
    def read(found: Found) -> dict[str, Any]:
        if "projector.model.0.weight" not in found.tensors:
            raise KeyError("projector.model.0.weight")  # a ResNet of somebody else's, normalised otherwise
        wanted = re.compile(r"encoder\.(?!encoder\.fc\.|vit_pooler\.)")  # what a single image uses
        found.tensors = {wanted.sub("", k, 1): t for k, t in found.tensors.items() if wanted.match(k)}
        encoder, size = "resnet50" if "encoder.layer4.0.conv3.weight" in found.tensors else "resnet18", 480
        if "backbone_to_vit.weight" in found.tensors:
            encoder, size = f"{encoder}_multi_image", 448
            found.notes.append("BioViL-T without its temporal pooler: there is no prior image")
        channels = found.tensors["encoder.conv1.weight"].shape[1]
        return {"family": "biovil", "encoder": encoder, "num_channels": channels, "image_size": size}

    def __init__(self, config: dict[str, Any]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the package imports timm by an old name
            from health_multimodal.image.model.encoder import get_encoder_from_type

        net = get_encoder_from_type(config["encoder"])
        del net.encoder.fc  # parameters that never get a gradient would stall DDP
        if config["encoder"].endswith("_multi_image"):
            del net.vit_pooler  # compares with a prior image
        if config["num_channels"] != 3:
            net.encoder.conv1 = nn.Conv2d(config["num_channels"], 64, 7, stride=2, padding=3, bias=False)
        super().__init__(config, net, 2048 if config["encoder"] == "resnet50" else 512)

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.net(channels_last(images), return_patch_embeddings=True)[0].movedim(1, -1), None


ANCHORS: tuple[tuple[str, Any], ...] = (  # pattern of a tensor that ends any prefix, and whose it is
    (r"embeddings\.patch_embedding\.weight ", SiglipBackbone),
    (r"embeds\.proj\.weight ", SiglipBackbone),  # timm's NaFlex
    (r"patch_embed\.proj\.weight ", TimmBackbone),
    (r"embeddings\.patch_embeddings\.(projection\.)?weight ", TransformersBackbone),
    (r"backbone\.down_projection\.proj\.weight ", ColipriBackbone),
    (r"layer3\.35\.conv3\.weight \S+ \(\d+, \d+, 1, 1, 1\)", ResNet3DBackbone),
    (r"encoder\.encoder\.layer4\.1\.conv2\.weight ", BiovilBackbone),
)


def read_tensors(tensors: dict[str, Tensor], found: Found) -> Found:
    """Find the image encoder among named tensors (`meta` ones too), and what builds it.

    Of several the fullest that is not CLIP's is taken, averaged weights first.
    """
    ends: dict[str, Any] = {}
    facts = [f"{k} {t.dtype if t.layout == torch.strided else t.layout} {(*t.shape,)}" for k, t in tensors.items()]
    for (anchor, kind), fact in itertools.product(ANCHORS, facts):
        if match := re.search(rf"(?<![^.]){anchor}", fact):
            ends[fact[: match.start()]] = kind
    size = {e: (f"{e}embeddings.class_embedding" not in tensors) * sum(k.startswith(e) for k in tensors) for e in ends}
    prefix = max(ends, key=lambda end: (size[end], "ema" in re.split(r"[._]", end.lower())), default="")
    refuse_foreign(found.source, [f"tensor {fact}" for fact in facts if fact.startswith(prefix)])
    if not ends:
        held = ", ".join(list(tensors)[:5]) or "no tensor at all"
        raise BadInput(f"{found.source}: seems to be an unknown model ({held}). {SUPPORTED}")
    found.take(tensors, prefix)
    if others := ", ".join(repr(other) for other in ends if other != prefix):
        found.notes.append(f"taken from {prefix!r}; also there: {others}")
    try:
        found.config = ends[prefix].read(found)
    except KeyError as error:
        missing = f"{found.source}: {prefix}{error.args[0]} is missing"
        raise BadInput(f"{missing}: incomplete, or without the config.json that names it") from None
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"{found.source}: tensors of unexpected shape under {prefix!r}: {error}") from None
    return found


def read_pretrained(source: str | Path, heads: int | None = None) -> Found:
    """Read a local file or folder, or a model of the Hugging Face hub; its tensors, not its name, tell the family.

    Tensors stay memory-mapped where the file has them so. `heads` overrides the number of attention heads. Raises
    BadInput with what the file seems to be where no known image encoder is in it.
    """
    path, *_ = shards = locate_weights(str(source))
    raw = {name: value for shard in shards for name, value in open_weights(shard).items()}
    if str(raw.get("kind")).startswith("finetune_siglip"):
        if raw["kind"] != "finetune_siglip" or raw.get("format") != 1 or not isinstance(raw.get("backbone"), dict):
            raise BadInput(f"{path}: of this script, but no model that this version reads; name its best_model.pth")
        found = Found(str(path), notes=["a checkpoint of this script"], config=raw["backbone"])
        found.take(flatten(raw), "model.backbone.net.")
        return found
    files = {name: path.with_name(f"{name}.json") for name in ("config", "open_clip_config", "preprocessor_config")}
    beside = {name: read_json(file) for name, file in files.items() if file.is_file()}
    return read_tensors(flatten(raw), Found(str(path), beside, heads))


def build_backbone(config: dict[str, Any]) -> Backbone:
    """The architecture that `config` describes, with random weights."""
    return {kind.family: kind for _, kind in ANCHORS}[config["family"]](config)


@torch.no_grad()
def adapt_channels(backbone: Backbone, channels: int) -> None:
    """Give the first convolution another number of input channels, in place: its weights in turn, their sum kept."""
    conv = next(m for m in backbone.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    weight, stored = conv.weight, conv.in_channels
    if channels == stored:
        return
    if channels < stored:
        weight = weight.sum(1, keepdim=True)
    turn = torch.arange(channels) % weight.shape[1]
    weight = weight[:, turn] / torch.bincount(turn)[turn].view(-1, *[1] * (weight.ndim - 2))
    conv.weight, conv.in_channels = nn.Parameter(weight, conv.weight.requires_grad), channels
    for module in backbone.modules():  # a module of `transformers` checks what it is given
        if hasattr(module, "num_channels"):
            setattr(module, "num_channels", channels)  # noqa: B010
    backbone.config["num_channels"] = channels
    log.info("backbone: first convolution adapted from %d to %d input channels", stored, channels)


def load_backbone(source: str | Path, image_size: int | None = None, heads: int | None = None) -> Backbone:
    """Read, adapt to `image_size` and three channels, build and fill a backbone, and log what was matched.

    Raises BadInput unless every tensor of the backbone comes from the file, fits, is finite, and none is left over.
    """
    found = read_pretrained(source, heads)
    family, config = str(found.config.get("family")), dict(found.config)
    if image_size and image_size != config.get("image_size"):
        found.notes.append(f"image size {image_size} instead of the checkpoint's {config.get('image_size')}")
        config["image_size"] = image_size
        if rest := image_size % config.get("patch_size", 1):
            found.notes.append(f"the last {rest} rows and columns fall outside its patches of {config['patch_size']}")
    try:
        from accelerate import init_empty_weights

        # No memory and no random numbers, for all values come from the file; BioViL's constructor computes with them.
        with nullcontext() if family == "biovil" else init_empty_weights(include_buffers=False):
            backbone = build_backbone(config)
        adopted = backbone.adopt(found)
    except ImportError as error:
        raise BadEnvironment(f"{found.source}: needs {error.name}: pip install -r requirements.txt") from None
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        why = f"no {family} backbone can be built as it and --image-size say ({first_line(error)})"
        raise BadInput(f"{found.source}: {why}") from None
    fill_backbone(backbone, adopted, found)
    parts = ", ".join(list(dict.fromkeys(name.split(".")[0] for name in found.unused))[:5])
    others = f": not part of the image tower, so not used ({parts})" if parts else ""
    millions, matched = sum(p.numel() for p in backbone.parameters()) / 1e6, len(backbone.net.state_dict())
    log.info("backbone: %s, %.1f M parameters, %d features", family, millions, backbone.width)
    log.info("  from %s", "; ".join([found.source, *found.notes]))
    log.info("  %d tensors matched, 0 missing, %d unexpected%s", matched, len(found.unused), others)
    adapt_channels(backbone, 3)
    return backbone


def fill_backbone(backbone: Backbone, adopted: dict[str, Tensor], found: Found) -> None:
    """Have the tensors of a file as the backbone's; those of no part of it join `found.unused`. Raises BadInput."""
    parts = {name.split(".")[0] for name in backbone.net.state_dict()}
    tensors = {k: t for k, t in adopted.items() if k.split(".")[0] in parts and not k.endswith("mask_token")}
    found.unused += [found.prefix + name for name in adopted if name not in tensors]
    try:
        backbone.net.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        said = " ".join(str(error).partition("\n")[2].split())[:400]
        raise BadInput(f"{found.source}: is incomplete, or a {backbone.family} unknown here: {said}") from None
    if broken := [name for name, tensor in tensors.items() if tensor.is_meta or not torch.isfinite(tensor.sum())]:
        raise BadInput(f"{found.source}: empty or not finite: {', '.join(broken[:10])}")


# What of a backbone is trained: all, what lies above a layer, or adapters of low rank; and how it leaves again.


def backbone_layers(backbone: Backbone) -> list[tuple[str, nn.Module]]:
    """Modules that own parameters directly, in forward order: what `--freeze-up-to N` counts."""
    owners = [(k, m) for k, m in backbone.named_modules() if next(m.parameters(recurse=False), None) is not None]
    # BioViL-T's own parameter comes after its convolutions
    return sorted(owners, key=lambda owner: backbone.family == "biovil" and owner[1] is backbone.net)


def freeze_up_to(backbone: Backbone, n: int | str) -> int:
    """Freeze the first `n` layers, or "all", train the others, and return how many are frozen."""
    layers = backbone_layers(backbone)
    frozen = len(layers) if n == "all" else min(int(n), len(layers))
    for index, (_, layer) in enumerate(layers):
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(index >= frozen)
    backbone.train(backbone.training)
    if n != "all" and frozen == len(layers):
        log.warning("--freeze-up-to %s freezes the whole backbone of %d layers; `all` says so on purpose", n, frozen)
    names = ["none", *(name for name, _ in layers), "none"]
    counted = f"{frozen} of {len(layers)} layers frozen (--freeze-up-to counts layers, not tensors)"
    log.info("backbone: %s, last frozen %s, first trained %s", counted, names[frozen], names[frozen + 1])
    return frozen


def add_lora(backbone: Backbone, rank: int) -> None:
    """Freeze a ViT and add low-rank updates to those of its attention projections and patches that were trainable.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; scaled by 2, starting at no change.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if isinstance(backbone, (ResNet3DBackbone, BiovilBackbone)):
        raise BadInput(f"--lora-rank is for ViTs; this backbone is {backbone.family}: leave it out")
    inside = {m for block in backbone.blocks() for m in block.modules() if isinstance(m, nn.Linear)}
    patches = next(m for m in backbone.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    named = [(name, m) for name, m in backbone_layers(backbone) if m is patches or (m in inside and "att" in name)]
    chosen = [name for name, m in named if m.weight.requires_grad]
    if not chosen:
        raise BadInput("--lora-rank finds nothing to adapt, all is frozen: lower --freeze-up-to")
    for attention in (m for m in backbone.modules() if hasattr(m, "qkv_bias_separate")):
        setattr(attention, "qkv_bias_separate", True)  # noqa: B010, or timm's BEiT and EVA compute past their adapters
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=chosen), backbone)
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    log.info("backbone: adapters of rank %d in %d projections, %d numbers to train", rank, len(chosen), trained)


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict()` with low-rank updates added to what they update and their own tensors left out."""
    state = {k.replace(".base_layer.", "."): v for k, v in model.state_dict().items() if ".lora_" not in k}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.get_delta_weight("default")
    return state


def drop_lora(model: nn.Module) -> None:
    """Put the adapted layers back as they were, for merged weights to be loaded."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_delta_weight"):
            model.set_submodule(name, module.get_base_layer())


# ── 6 Model ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# HU windows, slice features, pooling over slices, head.


class CTWindows(nn.Module):
    """HU to K window channels in [0, 1], on the device: (N, C, …) int16 or float -> (N, K, …) float32.

    Windowed volumes arrive as round(32767 * value) in C channels and are only scaled back.
    """

    low: Tensor
    width: Tensor

    def __init__(self, windows: Sequence[tuple[float, float]], intensity: str = "hu"):
        super().__init__()
        self.intensity = intensity
        bounds = torch.tensor(windows, dtype=torch.float32)
        self.register_buffer("low", bounds[:, 0], persistent=False)  # the checkpoint's preprocessing holds them
        self.register_buffer("width", bounds[:, 1] - bounds[:, 0], persistent=False)

    def forward(self, volume: Tensor) -> Tensor:
        if self.intensity == "windowed":
            return volume.float() / 32767.0
        shape = (1, -1) + (1,) * (volume.ndim - 2)
        return ((volume.float() - self.low.view(shape)) / self.width.view(shape)).clamp_(0.0, 1.0)


class SlicePool(nn.Module):
    """How slices (N, S, E) become a scan: mean, max, attention for all findings, or attention and maximum for each.

    `attention` is the gated attention of Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning"
    (ICML 2018): softmax over slices of w · (tanh(V h) * sigmoid(U h)). `label` has a w for each finding and pools
    logits rather than features: a finding's attention and its largest slice share each scan's logit by a learned gate.
    """

    def __init__(self, width: int, mode: str = "attention", hidden: int = 128, labels: int = 1):
        super().__init__()
        self.mode = mode
        if mode in ("attention", "label"):
            self.content, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
            self.score = nn.Linear(hidden, labels if mode == "label" else 1)
        if mode == "label":
            self.balance = nn.Parameter(torch.zeros(labels))  # half attention, half maximum to begin with

    def attention(self, features: Tensor) -> Tensor:
        """(N, S, E) to weights (N, S, 1 or L) whose sum over slices is 1."""
        return self.score(torch.tanh(self.content(features)) * torch.sigmoid(self.gate(features))).softmax(dim=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scan features (N, E) and the weight of each slice (N, S, 1)."""
        if self.mode == "attention":
            weights = self.attention(features)
            return (weights * features).sum(dim=1), weights
        uniform = features.new_full((*features.shape[:2], 1), 1 / features.shape[1])
        return (features.mean(dim=1) if self.mode == "mean" else features.amax(dim=1)), uniform

    def shares(self, features: Tensor, logits: Tensor) -> Tensor:
        """Of `label`: the share (N, S, L) of each slice in a scan's logit, given the logits of all slices (N, S, L)."""
        largest = torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
        return largest.lerp(self.attention(features), self.balance.sigmoid())


def patches_in_body(hu: Tensor, patch: int) -> Tensor:
    """Which patches a ViT has to see: (n, H, W) HU -> (n, P) bool, P in row order.

    The body is what is connected, cell by cell (a quarter of a patch), with soft tissue of 3 cm and more: neither the
    table's shells nor a mattress, which is as dense as a lung. What it encloses along a row or a column is inside, the
    lungs above all, and so is a cell around that. Where the field of view cuts the body, its edge encloses as well.
    """
    cell = max(d for d in range(1, max(1, patch // 4) + 1) if patch % d == 0)
    mean = F.avg_pool2d(hu.float()[:, None], cell)
    soft, n = (mean > -500).float(), mean.shape[-1]

    def grow(x: Tensor, size: int = 3) -> Tensor:
        return F.max_pool2d(x, size, 1, size // 2)

    def enclosed(x: Tensor) -> Tensor:
        column, row = (x.cummax(d).values * x.flip(d).cummax(d).values.flip(d) for d in (2, 3))
        return torch.maximum(column, row)

    core = 1 - grow((mean <= -300).float(), max(3, n // 11 | 1))  # a field of view is 30 to 50 cm wide
    body = torch.where(core.amax((2, 3), keepdim=True) > 0, core, soft)
    for _ in range(n):  # on to all that is connected
        body = grow(body) * soft
    for y, x in itertools.product((0, -1), (0, -1)):  # lung in a corner, the body's wall being cut off on both sides
        cut = (mean[..., y, x] > -950) * body[..., y, :].amax(-1) * body[..., :, x].amax(-1)
        body[..., y, x] = torch.maximum(body[..., y, x], cut)
    inside = grow(enclosed(enclosed(body)))  # twice: cells at a cut edge, once inside, enclose their row
    return F.max_pool2d(inside, patch // cell).flatten(1) > 0


@contextmanager
def frozen_in_amp(backbone: Any, device_type: str) -> Iterator[None]:
    """Within autocast, have copies of frozen weights in its precision stand in their places, made once and kept.

    Autocast itself keeps copies of weights that learn only: it would cast the others again in every chunk and, with
    LoRA, keep each of these copies for the backward pass. The weights themselves stay as they are, for all who read
    or save them. Only layers whose operations autocast computes in its precision are concerned.
    """
    dtype, layers = torch.get_autocast_dtype(device_type), (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    kept, places = backbone.__dict__.setdefault("frozen_copies", {}), []
    for module in backbone.modules() if torch.is_autocast_enabled(device_type) else ():
        own = module._parameters.items() if isinstance(module, layers) else ()
        places += [(module, name, p) for name, p in own if p is not None and not p.requires_grad and p.dtype != dtype]
    try:
        for module, name, p in places:
            made_of = p._version, p.device, dtype  # changes when other weights are loaded
            if kept.get(p, (None,))[0] != made_of:
                kept[p] = made_of, nn.Parameter(p.detach().to(dtype), requires_grad=False)
            module._parameters[name] = kept[p][1]
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p


class SiglipClassifier(nn.Module):
    """A CT volume (N, C, S, H, W) in SPL, or its slice features (N, S, E), -> logits (N, L).

    `slice_chunk` slices at a time go through the backbone and, with `recompute`, are computed again in the backward
    pass, so that memory does not grow with S. With `skip_air` the backbone is given the patches in the body only, and
    as many slices at a time as have no more of these than `slice_chunk` whole ones.
    """

    def __init__(
        self, backbone: Backbone, windows: Sequence[tuple[float, float]], intensity: str, num_labels: int,
        pooling: str = "attention", dropout: float = 0.1, skip_air: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.windows = backbone, CTWindows(windows, intensity)
        if skip_air and (backbone.family != "siglip" or intensity == "windowed"):
            raise BadInput("--skip-air works with SigLIP backbones and volumes in HU only; leave it out")
        self.slice_chunk, self.recompute, self.skip_air = 8, False, skip_air
        self.predict_chunk, self.slice_bytes = 8, 0  # the latter is what a slice keeps for the backward pass
        if backbone.volumetric and pooling != "label":
            pooling = "mean"  # of the one feature that a volume has
        self.width = width = backbone.width * (2 if pooling == "label" else 1)  # of a slice's features
        self.pool = SlicePool(width, pooling, labels=num_labels)
        hidden = min(512, backbone.width)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, hidden), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(hidden, num_labels),
        )  # fmt: skip

    @torch.no_grad()
    def set_prevalence(self, prevalence: Tensor) -> None:
        """Start each label (L,) at its share of positives, so that training doesn't spend its first steps on that."""
        last: Any = self.head[-1]
        last.weight.mul_(0.1)
        last.bias.copy_(torch.logit(prevalence.clamp(1e-3, 1 - 1e-3)))

    def encode(self, voxels: Tensor, *kept: Any) -> Tensor:
        """Slices (n, C, H, W), or volumes (N, C, D, H, W) for a 3D backbone, to features (n, E).

        `kept` names the patches that a ViT sees, (n, P), and how many that are of each slice.
        """
        with frozen_in_amp(self.backbone, voxels.device.type):
            if self.backbone.volumetric and self.pool.mode == "label":
                return self.backbone.summary(self.layers(voxels).flatten(0, 1), maxima=True)
            return self.backbone(self.images(voxels), *kept, maxima=self.pool.mode == "label")

    def images(self, voxels: Tensor) -> Tensor:
        """What the backbone is given: the windows, a volume's axes turned from SPL to its own."""
        images = self.windows(voxels)
        return self.backbone.turn(images) if self.backbone.volumetric else images

    def layers(self, volume: Tensor) -> Tensor:
        """(N, C, D, H, W) to the last map of a 3D backbone, its axes turned back to SPL: (N, D', h, w, E)."""
        return self.backbone.turn_back(self.backbone.tokens(self.images(volume)))

    def slice_features(self, volume: Tensor) -> Tensor:
        """(N, C, S, H, W) -> (N, S, E), with `label` pooling (N, S, 2E). S of a 3D one: 1, or its layers."""
        if self.backbone.volumetric:
            return self.encode(volume).unflatten(0, (len(volume), -1))
        slices = volume.transpose(1, 2).flatten(0, 1)  # (N * S, C, H, W)
        size = self.slice_chunk if torch.is_grad_enabled() else self.predict_chunk
        run = recomputed(self.encode, self.backbone) if self.recompute else self.encode
        if not self.skip_air:
            return torch.cat([run(chunk) for chunk in slices.split(size)]).unflatten(0, (len(volume), -1))
        patch = self.backbone.config["patch_size"]
        keep = torch.cat([patches_in_body(chunk, patch) for chunk in slices[:, 0].split(64)])
        counts, order = keep.sum(1).clamp(min=1).sort(stable=True)  # a chunk is padded to its longest: like with like
        sizes, room = counts.tolist(), size * keep.shape[1]  # the host waits here, once for all chunks
        ends = [0]  # of chunks: as many slices as have together no more patches than a chunk of whole ones
        for i, kept in enumerate(sizes):
            if (i + 1 - ends[-1]) * kept > room:
                ends.append(i)
        chunks = [(order[a:b], sizes[a:b]) for a, b in itertools.pairwise([*ends, len(sizes)])]
        features = torch.cat([run(slices[rows], keep[rows], counted) for rows, counted in chunks])
        return features[order.argsort()].unflatten(0, (len(volume), -1))

    def feature_shape(self, channels: int, grid: Sequence[int]) -> tuple[int, ...]:
        """(S, E) of the slice features of a volume on this grid."""
        if self.backbone.volumetric and self.pool.mode == "label":  # as many layers as its map turns out to have
            blank = torch.zeros((1, channels, *grid), dtype=torch.int16, device=self.windows.low.device)
            return tuple(self.slice_features(blank).shape[1:])
        return 1 if self.backbone.volumetric else grid[0], self.width

    def weigh(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, L) and the share of each slice in them, (N, S, 1) or with `label` pooling (N, S, L).

        In float32: it costs nothing, and softmax and loss stay exact.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.pool.mode != "label":
                pooled, shares = self.pool(features)
                return self.head(pooled), shares
            logits = self.head(features)  # (N, S, L)
            shares = self.pool.shares(features, logits)
            return (shares * logits).sum(dim=1), shares

    def forward(self, x: Tensor) -> Tensor:
        return self.weigh(x if x.ndim == 3 else self.slice_features(x))[0]


# Why memory is planned. For the backward pass autograd keeps what every layer of the backbone was given, in proportion
# to the slices of a batch: 71 MiB for each 224 x 224 slice of a ViT-B/16 in bfloat16, so 35 GiB for 8 scans of 64.
# Throwing it away and computing it again, chunk by chunk, costs a third more time, so that is done only where it has to
# be. How much a slice keeps depends on tower, image size, precision and what is frozen, so it is measured; and not by
# one pass, which keeps other things as well, such as autocast's copies of all weights: two passes of different lengths
# differ by their slices alone. What is decided is a matter of speed and rounding, never of results. A run that is
# resumed keeps it, to give the same bits, unless it no longer fits.


def saved_bytes(model: SiglipClassifier, volume: Tensor, runtime: Runtime) -> int:
    """Bytes that the slices of `volume` (N, C, S, H, W) take until the backward pass: what twice as many keep more."""

    def kept(volume: Tensor) -> int:
        packed: list[Tensor] = []  # which keeps all of them until the end, so that no address comes twice
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda none: none), runtime.autocast():
            model.slice_features(volume)
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}.values())

    buffers = {name: b.clone() for name, b in model.named_buffers()}
    model.backbone.train()
    difference = kept(torch.cat([volume, volume], dim=2)) - kept(volume)
    for name, buffer in model.named_buffers():  # the statistics of BatchNorm have seen nothing
        buffer.copy_(buffers[name])
    return difference


def sample_volume(model: SiglipClassifier, shape: Sequence[int], runtime: Runtime) -> Tensor:
    """A part of a volume of `shape` (C, S, H, W) that is enough to measure by: (1, C, s, H, W)."""
    slices = max(16, shape[1] // 8) if model.backbone.volumetric else 2
    sample = torch.full((1, shape[0], slices, *shape[2:]), -1000, dtype=torch.int16, device=runtime.device)
    sample[..., 1:-1, 1:-1] = 0  # a body, or --skip-air would leave nothing to measure
    return sample


def usual_chunk(device: torch.device) -> int:
    """Slices at once that keep the device busy; more would only take more memory."""
    return 64 if device.type == "cuda" else 8


def fits(model: SiglipClassifier, slices: int, chunk: int, recompute: int, runtime: Runtime, share: float) -> bool:
    """Whether a batch of `slices` and what trained weights need take no more than this share of the free memory."""
    at_once = 2 * min(chunk, slices) if recompute else slices  # with the gradients of what is computed again
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = 16 + 2 * (runtime.amp_dtype is not None)  # gradient, two moments, average; autocast's copy
    return at_once * model.slice_bytes + each * trained <= share * free_memory(runtime.device)


def plan_memory(args: argparse.Namespace, model: SiglipClassifier, shape: Sequence[int], runtime: Runtime) -> list[int]:
    """[slice_chunk, recompute]: what goes through the backbone at once, and whether it is computed again.

    `shape` is (C, S, H, W). A chunk is a power of two, so that two starts on one machine agree; no larger than helps,
    for memory grows with it.
    """
    recompute, chunk, slices = args.grad_checkpointing == "on", usual_chunk(runtime.device), args.batch_size * shape[1]
    if any(p.requires_grad for p in model.backbone.parameters()):
        sample = sample_volume(model, shape, runtime)
        model.slice_bytes = max(1, saved_bytes(model, sample, runtime) // sample.shape[2])
        if args.grad_checkpointing == "auto":
            recompute = not fits(model, slices, chunk, False, runtime, share=0.7)
        while recompute and chunk > 1 and not fits(model, slices, chunk, recompute, runtime, share=0.7):
            chunk //= 2
    few, recompute = agree(runtime, -(args.slice_chunk or chunk), recompute)
    return [-few, int(recompute)]


def keep_plan(
    args: argparse.Namespace, model: SiglipClassifier, slices: int, runtime: Runtime, before: list[int], now: list[int]
) -> list[int]:
    """Of a resumed run's plan and the one made now the first, for the same bits, where it fits `slices`, those of a
    batch, and flags don't overrule it."""
    chunk, recompute = before
    scarce = not fits(model, slices, chunk, recompute, runtime, share=0.9)  # more than a new plan takes: none wavers
    named = args.slice_chunk not in (None, chunk) or args.grad_checkpointing == ("off" if recompute else "on")
    (changed,) = agree(runtime, (scarce or named) and now != before)
    if changed:
        why = "this machine has less memory than the run began with" if scarce else "other flags"
        log.warning("%s: chunks are planned anew; figures agree to rounding, not to the bit", why)
    return now if changed else before


def apply_memory_plan(model: SiglipClassifier, chunk: int, recompute: int) -> None:
    """Set what was planned. A prediction holds no more than two blocks' tensors at a time, so its chunks are larger."""
    usual, blocks = usual_chunk(model.windows.low.device), len(model.backbone.blocks())
    model.slice_chunk, model.predict_chunk = chunk, max(chunk, min(usual, chunk * blocks // 2))
    model.recompute = model.backbone.recompute = bool(recompute)
    unit = "volumes whole" if model.backbone.volumetric else f"{chunk} slices at a time"
    what = "computed again in the backward pass" if recompute else "kept"
    log.info("backbone: %s, activations %s", unit, what)


def add_in_fixed_order(model: SiglipClassifier, sample: Tensor, runtime: Runtime) -> None:
    """Have a GPU's kernels add their terms in one order, so that the same seed gives the same bits.

    One pass over `sample` tells whether all kernels can; if one cannot, none has to, which is said. Any other error of
    that pass, such as no memory, is raised.
    """
    torch.use_deterministic_algorithms(True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010, only of use in a hunt for bugs
    try:
        with runtime.autocast():
            logits = model.eval()(sample)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(logits.float().sum(), trained, allow_unused=True)
    except RuntimeError as error:
        torch.use_deterministic_algorithms(False)
        if "does not have a deterministic implementation" not in str(error):
            raise
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True  # no use in half of it
        log.warning("runs agree to rounding only, not to the bit: %s", first_line(error))


class CompilerWarnings(logging.Handler):
    """Passes on once, in one line, why something runs uncompiled: a limit that is met, code that can't be compiled."""

    said: set[str] = set()  # noqa: RUF012, of the process, as the compiler's state is

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage().strip().splitlines()[0]
        if line not in self.said:
            self.said.add(line)
            log.warning("torch.compile: %s; that runs uncompiled, slower and with the same results", line)


# All blocks of a backbone are one piece of code, compiled anew for each way in which one of them is run: learning or
# frozen or adapted, training or not, with padding or without, for each stage of a ResNet. The usual limit of 8 is soon
# reached, and what comes after runs as it is. Numbers of slices and patches become variables by themselves.


def maybe_compile(model: SiglipClassifier, mode: str, runtime: Runtime) -> None:
    """Compile the repeated block of the backbone in place, where that works; `auto`: on a GPU that Triton supports."""
    capable = runtime.device.type == "cuda" and torch.cuda.get_device_capability(runtime.device) >= (7, 0)
    if mode == "off" or (mode == "auto" and not (capable and find_spec("triton"))):
        return
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=runtime.device))
    except Exception as error:  # each layer of a compiler has its own
        return log.warning("nothing is compiled, torch.compile fails here: %s", first_line(error))
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    torch._dynamo.config.suppress_errors = True  # a block that can't be compiled runs as it is
    logging.getLogger("torch._dynamo").addHandler(CompilerWarnings(logging.WARNING))
    for block in model.backbone.blocks():
        block.compile()


# ── 7 Loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Multilabel losses over known labels.


class MultilabelBCELoss(nn.Module):
    """Binary cross-entropy of logits (N, L) and targets (N, L) in {0, 1, NaN}; NaN is unknown and has weight 0.

    `reduction="mean"` divides by the number of known entries, `"sum"` leaves that to the training loop; without a known
    entry the loss is 0. With `smoothing` e it is 1 - e / 2 of the target's loss and e / 2 of its opposite's.
    """

    smoothing = 0.0

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")

    def forward(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        if logits.shape != targets.shape:
            raise ValueError(f"logits are {tuple(logits.shape)} but targets {tuple(targets.shape)}")
        known = ~targets.isnan()
        logits, targets = logits.float(), targets.float().nan_to_num(0.0)
        losses = self.elementwise(logits, targets)
        if self.smoothing:
            losses = losses.lerp(self.elementwise(logits, 1 - targets), self.smoothing / 2)
        total = torch.where(known, losses, 0.0).sum()
        return total / known.sum().clamp(min=1) if reduction == "mean" else total


class FocalLoss(MultilabelBCELoss):
    """alpha * (1 - p_t)^gamma * BCE, p_t being the probability of the true class; gamma = 0, alpha = 1 is BCE (Lin et
    al., "Focal Loss for Dense Object Detection", ICCV 2017; here alpha multiplies both classes alike)."""

    def __init__(self, alpha: float = 1.0, gamma: float = 2.0):
        super().__init__()
        self.alpha, self.gamma = alpha, gamma

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = super().elementwise(logits, targets)
        log_miss = F.logsigmoid(logits * (1 - 2 * targets))  # log(1 - p_t), whose gradient is finite at p_t = 1
        return self.alpha * torch.exp(self.gamma * log_miss) * losses


class BalancedBCELoss(MultilabelBCELoss):
    """BCE whose positives are weighted by `pos_weight` (L,)."""

    pos_weight: Tensor

    def __init__(self, pos_weight: Tensor):
        super().__init__()
        self.register_buffer("pos_weight", torch.as_tensor(pos_weight, dtype=torch.float32))

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=self.pos_weight)


class AsymmetricLoss(MultilabelBCELoss):
    """-(1 - p)^1 log p for positives and -q^4 log(1 - q) for negatives, q = max(p - 0.05, 0): easy ones count nothing
    (Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, with its gammas and its clip)."""

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        shifted = (logits.sigmoid() - 0.05).clamp(min=0)  # q, at most 0.95, so that its logarithm stays finite
        positive = -torch.sigmoid(-logits) * F.logsigmoid(logits)
        return torch.where(targets > 0.5, positive, -(shifted**4) * torch.log1p(-shifted))


def balancing_weights(targets: np.ndarray) -> np.ndarray:
    """negatives / positives of each label over known targets (n, L), at most 100, and 1 where there is no positive."""
    positives, negatives = (targets == 1).sum(0), (targets == 0).sum(0)
    return np.where(positives > 0, np.minimum(negatives / np.maximum(positives, 1), 100.0), 1.0).astype(np.float32)


def build_loss(args: argparse.Namespace, train_targets: np.ndarray) -> MultilabelBCELoss:
    """The loss that `--loss` names; `balanced` takes its weights from the known training targets (n, L)."""
    if args.loss == "balanced":
        loss: MultilabelBCELoss = BalancedBCELoss(torch.from_numpy(balancing_weights(train_targets)))
    elif args.loss == "focal":
        loss = FocalLoss(args.focal_alpha, args.focal_gamma)
    else:
        loss = AsymmetricLoss() if args.loss == "asl" else MultilabelBCELoss()
    loss.smoothing = args.label_smoothing
    return loss


# ── 8 Optim ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Optimiser, learning-rate schedule and averaged weights.


def unwrap(model: Any) -> Any:
    """The module itself, without DistributedDataParallel or torch.compile around it."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def distribute(model: SiglipClassifier, runtime: Runtime) -> nn.Module:
    """The model as several processes train it; only what is trainable at this moment is kept in step by them."""
    if runtime.world_size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def rate_scales(model: SiglipClassifier, layer_decay: float, backbone_scale: float) -> dict[nn.Parameter, float]:
    """Multiple of the learning rate for each backbone parameter: `layer_decay` once for every block above it.

    What comes before the first block lies below all of them, what comes after the last above (Clark et al., "ELECTRA",
    2020; Bao et al., "BEiT", 2021).
    """
    blocks = model.backbone.blocks()
    level = {p: i for i, block in enumerate(blocks, 1) for p in block.parameters()}
    scales, reached, above = {}, 0, len(blocks) + 1
    for _, layer in backbone_layers(model.backbone):
        for parameter in layer.parameters(recurse=False):
            mine = level.get(parameter, above if reached == len(blocks) else reached)
            scales[parameter] = backbone_scale * layer_decay ** (above - mine)
            reached = max(reached, level.get(parameter, 0))
    return scales


def build_optimizer(args: argparse.Namespace, model: SiglipClassifier) -> torch.optim.Optimizer:
    """AdamW or SGD over what is trained, the head's in the first group; biases, norms and embeddings don't decay."""
    undecayed = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    scales = rate_scales(model, args.layer_decay, args.backbone_lr_scale) if hasattr(model, "backbone") else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda entry: entry[0].startswith("backbone.")):
        if parameter.requires_grad:
            bare = parameter.ndim <= 1 or name.endswith(".bias") or parameter in undecayed
            groups.setdefault((scales.get(parameter, 1.0), 0.0 if bare else args.weight_decay), []).append(parameter)
    listed = [{"params": p, "lr": args.lr * scale, "weight_decay": decay} for (scale, decay), p in groups.items()]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(listed, lr=args.lr, fused=True)
    optimizer = torch.optim.SGD(listed, lr=args.lr, momentum=0.9, nesterov=True, fused=True)
    for parameter in (p for group in listed for p in group["params"]):
        # Zeros give the same first step; without them one that is skipped leaves memory as it was found.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Schedule:
    """Learning rate as a multiple of `--lr`, over optimiser steps taken.

    Linear from 0 during `warmup` steps; then `cosine` falls to 0 at `total_steps` (the formula of
    `transformers.get_cosine_schedule_with_warmup`), and `plateau` halves each time that no epoch has been better for
    more than `PATIENCE` epochs.
    """

    PATIENCE, FACTOR = 3, 0.5

    def __init__(self, kind: str, warmup: int, total_steps: int):
        self.kind, self.warmup, self.total_steps = kind, warmup, total_steps
        self.steps, self.scale, self.bad_epochs = 0, 1.0, 0
        self.best: tuple[float, ...] = ()

    def factor(self) -> float:
        """The multiple for the step that comes after the `steps` already taken."""
        if self.steps < self.warmup:
            return self.steps / self.warmup
        if self.kind == "plateau":
            return self.scale
        progress = (self.steps - self.warmup) / max(1, self.total_steps - self.warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * self.factor()

    def end_epoch(self, key: tuple[float, ...]) -> None:
        """`key` is the epoch's `comparison_key`."""
        self.bad_epochs = 0 if key > self.best else self.bad_epochs + 1
        self.best = max(self.best, key)
        if self.kind == "plateau" and self.bad_epochs > self.PATIENCE:
            self.scale, self.bad_epochs = self.scale * self.FACTOR, 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def build_scheduler(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """The schedule that `--scheduler` and `--warmup` name; a warm-up of 5% is that share of all steps, rounded up."""
    total, share = steps_per_epoch * args.epochs, str(args.warmup).removesuffix("%")
    warmup = math.ceil(total * float(share) / 100) if share != str(args.warmup) else args.warmup
    return Schedule(args.scheduler, warmup, total)


class Ema:
    """Exponential moving average of the trainable weights: decay_t = min(decay, (1 + t) / (10 + t)) at step t = 1, 2, …

    The early steps have a smaller decay, or the random weights of the head would linger for thousands of steps.
    Buffers are taken over as they are.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the model's place for the length of a `with` block; raw weights come back to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            raw = weight.detach().clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(raw)


# ── 9 Step ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# One epoch of training, and one way to predict.


@dataclass(frozen=True)
class Recipe:
    """What the loop needs to know of the arguments."""

    batch_size: int
    accumulation: int = 1
    max_grad_norm: float = 1.0
    num_workers: int = 0
    augment: str = "none"
    intensity: str = "hu"
    seed: int = 42
    log_interval: int = 50


@dataclass
class TrainState:
    """Everything that changes while training; `micro` is the next forward pass of the epoch in progress."""

    model: Any  # the classifier, or DistributedDataParallel around it
    optimizer: Any
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: Ema | None = None
    epoch: int = 0
    micro: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    tally: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("known", "norm", "steps"), 0.0))

    def next_epoch(self) -> None:
        self.epoch, self.micro = self.epoch + 1, 0
        self.loss_sum.zero_()
        self.tally = dict.fromkeys(self.tally, 0.0)

    @property
    def weights(self) -> AbstractContextManager:
        """A context in which the model holds the weights that count: the averaged ones, if there are any."""
        return self.ema.applied() if self.ema else nullcontext()


# Why losses are normalised over the whole window. One optimiser step may be made of several forward passes
# (`--gradient-accumulation-steps`) on several processes, over scans of which some labels are unknown. The mean of the
# passes' means would weigh a label by how many others happen to be known in its pass, and an epoch's last, short window
# would count as a full one. So each pass adds the sum of its losses, divided by the known labels of the whole window on
# all ranks, which the plan of the epoch tells beforehand. The gradient is then that of one large batch, whatever it is
# made of. Scans that can't be read are taken out of that number before the step.


@dataclass(frozen=True)
class Window:
    """One optimiser step: the rows of each of this rank's forward passes, and the known labels on all ranks."""

    batches: list[list[int]]
    known: int


def plan_epoch(targets: np.ndarray, recipe: Recipe, runtime: Runtime, epoch: int) -> list[Window]:
    """The steps of an epoch over training targets (n, L), a function of (seed, epoch) alone.

    Each forward pass takes `batch_size * world_size` rows of one shuffled order and deals them out to the ranks; a rank
    that gets fewer than the others gets row `~r` to make up, the same scan without labels, which counts for nothing.
    """
    known_per_row = (~np.isnan(targets)).sum(axis=1)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(targets))
    per_pass = recipe.batch_size * runtime.world_size
    windows = []
    for start in range(0, len(order), per_pass * recipe.accumulation):
        rows = order[start : start + per_pass * recipe.accumulation]
        batches = []
        for first in range(0, len(rows), per_pass):
            together = rows[first : first + per_pass].tolist()
            mine = together[runtime.rank :: runtime.world_size]
            missing = math.ceil(len(together) / runtime.world_size) - len(mine)
            batches.append(mine + [~together[0]] * missing)
        windows.append(Window(batches, int(known_per_row[rows].sum())))
    return windows


def forward_backward(
    state: TrainState, batch: dict[str, Any], loss_fn: MultilabelBCELoss, recipe: Recipe, runtime: Runtime,
    known: int, last: bool,
) -> Tensor:  # fmt: skip
    """Add the gradient of one forward pass; `known` is the label count of the whole step on all ranks.

    Returns the sum of its losses. One that is not finite makes the gradient NaN, on all ranks.
    """
    volume = batch["volume"].to(runtime.device, non_blocking=True)
    targets = batch["targets"].to(runtime.device, non_blocking=True)
    seed_everything(recipe.seed, state.epoch, state.micro, runtime.rank)  # dropout, the same after any interruption
    volume = augment(volume, batch["row"].tolist(), recipe.augment, recipe.seed, state.epoch, recipe.intensity)
    waiting = nullcontext() if last or runtime.world_size == 1 else state.model.no_sync()
    with waiting:
        with runtime.autocast():
            logits = state.model(volume)
        loss = loss_fn(logits, targets, reduction="sum")
        share = runtime.world_size / max(1, known)  # DistributedDataParallel averages over ranks: undo that
        state.scaler.scale(loss * (share + 0 * loss.detach())).backward()  # an infinite loss can have a finite gradient
    state.micro += 1
    return loss.detach()


def optimizer_step(state: TrainState, max_grad_norm: float, loss: Tensor | float = 0.0) -> float:
    """Clip and step, unless a gradient is not finite: that is decided on the device. Returns the norm, which is waited
    for when all of the step is on its way.

    `loss`, the sum over the step's labels, counts if the step is taken.
    """
    state.scaler.unscale_(state.optimizer)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    finite = norm.isfinite()  # not so of finite gradients that are large enough: then, too, no step is taken
    state.loss_sum += torch.where(finite, loss, 0.0)
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    state.schedule.apply(state.optimizer)
    if state.scaler.is_enabled():
        for found in state.scaler._found_inf_per_device(state.optimizer).values():
            found.copy_(~finite)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        state.optimizer.found_inf = (~finite).float()  # the fused kernels change nothing where this is 1
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return norm.item()


def settle_step(state: TrainState, norm: float, ids: Sequence[str], may_skip: bool, known: int = 0) -> None:
    """Count a step taken and its known labels, or one skipped, of which in full precision one, else ten in a row, end
    the run. `ids` are those of the scans that this rank put into it."""
    if math.isfinite(norm):
        state.schedule.steps += 1
        state.skipped_in_row = 0
        for name, value in (("norm", norm), ("steps", 1), ("known", known)):
            state.tally[name] += value
        if state.ema:
            state.ema.update()
        return
    state.skipped += 1
    state.skipped_in_row += 1
    where = f"epoch {state.epoch + 1}, after {state.schedule.steps} steps"
    if not may_skip or state.skipped_in_row >= 10:
        advice = "lower --lr, add --warmup or leave out --amp"
        raise Diverged(f"the gradient is {norm} in {where}, scans {', '.join(ids)}: {advice}")
    log.warning("the gradient is %s in %s: a step is skipped, the %d. of this run", norm, where, state.skipped)


@contextmanager
def taken_back(state: TrainState, passes: int) -> Iterator[None]:
    """A step whose data don't come is taken back to its beginning, where the state can be saved."""
    micro = state.micro
    before = [(buffer, buffer.clone()) for buffer in state.model.buffers()] if passes > 1 else []
    try:
        yield
    except (BadVolume, Interrupted):
        state.micro = micro
        for buffer, value in before:  # running statistics have seen a part of it
            buffer.copy_(value)
        state.optimizer.zero_grad(set_to_none=True)
        raise


def forget_lost(state: TrainState, dataset: CTVolumeDataset, known: int, mine: int, runtime: Runtime) -> int:
    """Have a step's mean go over the labels of the scans that could be read, `mine` on this rank, instead of all that
    are `known`; returns how many these are on all ranks."""
    if dataset.on_bad_volume != "skip":
        return known
    seen = sum(of_all_ranks(runtime, mine))
    if seen != known:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, max(1, known) / max(1, seen))
    return seen


def progress_bar(title: str, total: int, runtime: Runtime) -> Any:
    """A bar that counts this process's scans, on the main process and a terminal only."""
    from tqdm import tqdm

    hidden = True if not runtime.is_main else None  # None: hidden where the output is not a terminal
    return tqdm(total=total, desc=title, unit="scan", leave=False, disable=hidden, dynamic_ncols=True)


def train_one_epoch(
    state: TrainState, dataset: CTVolumeDataset, loss_fn: MultilabelBCELoss, recipe: Recipe, runtime: Runtime,
    after_step: Callable[[], None] = lambda: None, waiting: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Any]:  # fmt: skip
    """Train from `state.micro` to the end of the epoch.

    Returns `lr`, `train_loss` (mean over known labels), `grad_norm` (mean over steps), and `seconds` waited for data
    and spent on the rest. `after_step` is called between optimiser steps, where the state can be saved; in the context
    `waiting` the next batch is waited for. Raises Diverged.
    """
    done = math.ceil(state.micro / recipe.accumulation)  # the last window of an epoch may be a short one
    windows = plan_epoch(dataset.table.targets, recipe, runtime, state.epoch)[done:]
    plan = [rows for window in windows for rows in window.batches]
    batches = iter(build_loader(dataset, plan, recipe.num_workers, runtime.device, waiting, persist=True))
    bar = progress_bar(f"epoch {state.epoch + 1}", sum(map(len, plan)), runtime)
    waited, started = 0.0, time.perf_counter()
    state.model.train()
    for window in windows:
        loss, seen = torch.zeros_like(state.loss_sum), 0
        with taken_back(state, len(window.batches)):
            for number, rows in enumerate(window.batches, 1):
                asked = time.perf_counter()
                batch = next(batches)
                if number == 1 or runtime.device.type == "cpu":  # later in a step a GPU has work, and loses no time
                    waited += time.perf_counter() - asked
                seen += int(np.isfinite(batch["targets"].numpy()).sum())
                last = number == len(window.batches)
                loss += forward_backward(state, batch, loss_fn, recipe, runtime, window.known, last)
                bar.update(len(rows))
        known = forget_lost(state, dataset, window.known, seen, runtime)
        # The step's only wait for the device: a GPU idles for the milliseconds in which the next batch reaches it.
        norm = optimizer_step(state, recipe.max_grad_norm, loss)
        ids = [dataset.table.series_ids[row] for rows in window.batches for row in rows if row >= 0]
        settle_step(state, norm, ids, runtime.amp_dtype is not None, known)
        if not bar.disable and state.micro % recipe.log_interval < recipe.accumulation:
            mean = state.loss_sum.item() * runtime.world_size / max(1.0, state.tally["known"])
            bar.set_postfix(loss=f"{mean:.4f}", lr=f"{state.optimizer.param_groups[0]['lr']:.1e}")
        after_step()
    bar.close()
    labels, steps = state.tally["known"], state.tally["steps"]  # these stay, for validation may be interrupted
    losses = sum(of_all_ranks(runtime, state.loss_sum.item()))
    return {
        "lr": state.optimizer.param_groups[0]["lr"],
        "train_loss": losses / labels if labels else None,  # no step taken, no label known
        "grad_norm": state.tally["norm"] / steps if steps else None,
        "seconds": {"data": waited, "train": time.perf_counter() - started - waited},
    }


def share_statistics(model: nn.Module, runtime: Runtime) -> None:
    """Give all ranks the BatchNorm statistics of the first, which are the ones that are saved: each has its own."""
    if runtime.world_size > 1:
        for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            for buffer in norm.buffers():
                torch.distributed.broadcast(buffer, 0)


def share_skipped(dataset: CTVolumeDataset, runtime: Runtime) -> None:
    """Let every rank know of the scans that others could not read."""
    if dataset.on_bad_volume == "skip":
        for skipped in of_all_ranks(runtime, dataset.skipped):
            dataset.skipped |= skipped


@torch.no_grad()
def predict(
    model: nn.Module, dataset: CTVolumeDataset, recipe: Recipe, runtime: Runtime, title: str = "predict",
    after_batch: Callable[[], None] = lambda: None, waiting: Callable[[], AbstractContextManager] = nullcontext,
    persist: bool = False,
) -> np.ndarray:  # fmt: skip
    """Logits (n, L) float32 of all rows of the dataset, on every rank; each row is computed by one of them.

    `after_batch` is called as often on every rank; in the context `waiting` the next batch is waited for. With
    `persist` the processes that read stay for the next prediction of this dataset.
    """
    model = unwrap(model).eval()
    share_statistics(model, runtime)
    mine = list(range(len(dataset)))[runtime.rank :: runtime.world_size]
    plan = [mine[i : i + recipe.batch_size] for i in range(0, len(mine), recipe.batch_size)]
    in_common = len(dataset) // runtime.world_size // recipe.batch_size
    rows: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    logits: list[Tensor] = [torch.zeros(0, dataset.table.targets.shape[1], device=runtime.device)]
    bar = progress_bar(title, len(mine), runtime)
    loader = build_loader(dataset, plan, recipe.num_workers, runtime.device, waiting, persist)
    for number, batch in enumerate(loader):
        volumes = batch["volume"].to(runtime.device, non_blocking=True)
        with runtime.autocast():  # one by one: what a scan scores is then the same whatever it is batched with
            logits.append(torch.cat([model(volume[None]) for volume in volumes]).float())
        rows.append(batch["row"])
        bar.update(len(volumes))
        if number < in_common:
            after_batch()
    bar.close()
    share_skipped(dataset, runtime)
    return gather_rows(runtime, torch.cat(rows).numpy(), torch.cat(logits).cpu().numpy())[1]


# Why a finding was called: the slices, and the places in them, that its logit came from.


@dataclass(frozen=True)
class Evidence:
    """The slices that raised a label's logit most in one scan, the strongest first, and where in them that came from.

    `gains` is gradient x feature of each slice: to first order what it adds to the logit, its attention weight
    included. Attention itself is shared by all labels and does not say why this one was called.
    """

    slices: list[int]  # of the grid, feet to head
    gains: list[float]
    attention: list[float] | None  # weights of these slices, where the pooling has any
    maps: np.ndarray  # (n, H, W) at least 0, in SPL: gradient x activation of the last tokens


@torch.no_grad()
def find_evidence(model: SiglipClassifier, volume: Tensor, labels: Sequence[int]) -> list[Evidence]:
    """Why each of these labels has the logit it has in a scan (1, C, S, H, W), in full precision.

    The gradient goes through head and pooling only, by the chain rule: first to the features of all slices, then, for
    the slices chosen, to their tokens. So no graph of the backbone is ever built. Where tokens are averaged (the
    convolutional families) this is Grad-CAM: Selvaraju et al., ICCV 2017.
    """
    model.eval()
    maxima = model.pool.mode == "label"
    source = (model.layers if model.backbone.volumetric else model.slice_features)(volume).float().requires_grad_()
    with torch.enable_grad():
        features = source  # (1, S, E)
        if model.backbone.volumetric:  # of the last map (1, D', h, w, E), whose layers are slices to a head per finding
            features = model.backbone.summary(source[0] if maxima else source, maxima)[None]
        logits, shares = model.weigh(features)
        of_label = logits[0].unbind()
    found = []
    for label in labels:
        gradient = torch.autograd.grad(of_label[label], source, retain_graph=True)[0][0]  # (S, E) or (D', h, w, E)
        relevance = (gradient * source[0]).sum(-1)
        gains = relevance.sum((1, 2)) if model.backbone.volumetric else relevance
        if maxima:  # there the logit is a sum over slices
            gains = shares[0, :, label] * model.head(features)[0, :, label]
        best = gains.argsort(descending=True, stable=True)[:3]  # shown of each finding
        worth = gains[best] > 0.01 * gains[best[0]].clamp(min=0)  # what adds nothing, or less, is no reason
        best = best[: max(1, int(worth.sum()))]
        chosen = volume[0, :, best].transpose(0, 1)
        maps = relevance[best] if model.backbone.volumetric else slice_relevance(model, chosen, gradient[best])
        depth = volume.shape[2] / len(gains)  # slices of the grid in each of a 3D map's layers, else 1
        slices = [int((s + 0.5) * depth) for s in best.tolist()]
        attention = shares[0, best, label if maxima else 0].tolist() if hasattr(model.pool, "score") else None
        maps = fit_to_image(maps, volume.shape[-2:], model.backbone.config.get("patch_size", 1))
        found.append(Evidence(slices, gains[best].tolist(), attention, maps.cpu().numpy()))
    return found


def slice_relevance(model: SiglipClassifier, slices: Tensor, gradients: Tensor) -> Tensor:
    """Gradient x activation (n, h, w) of the tokens of slices (n, C, H, W) whose features have these gradients (n, E):
    the derivative by how much of a token there is. Patches that `skip_air` leaves out have no say: theirs is 0."""
    kept = [patches_in_body(slices[:, 0], model.backbone.config["patch_size"])] if model.skip_air else []
    shares, feature = model.backbone.evidence(model.images(slices), *kept, maxima=model.pool.mode == "label")
    with torch.enable_grad():
        gain = (feature(shares.requires_grad_()) * gradients).sum()
    return torch.autograd.grad(gain, shares)[0]


def fit_to_image(maps: Tensor, size: Sequence[int], patch: int) -> Tensor:
    """The positive part of maps (n, h, w) over the pixels that patches cover; the last rows and columns may be left."""
    covered = [n - n % patch for n in size]
    maps = F.interpolate(maps.clamp(min=0)[:, None], covered, mode="bilinear", align_corners=False)[:, 0]
    return F.pad(maps, (0, size[1] - covered[1], 0, size[0] - covered[0]))


def findings_to_explain(probabilities: np.ndarray, thresholds: np.ndarray, n: int) -> dict[int, list[int]]:
    """Row -> labels: the n most probable scans that each label is called in, ties to the earlier row."""
    called = probabilities >= thresholds
    order = np.argsort(-np.where(called, probabilities, -1.0), axis=0, kind="stable")
    chosen = called & (np.argsort(order, axis=0) < n)
    return {row: np.flatnonzero(chosen[row]).tolist() for row in np.flatnonzero(chosen.any(axis=1)).tolist()}


# ── 10 Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Metrics, thresholds and intervals: NumPy in, plain dict out.


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


OBJECTIVES = {"f1": "F1", "youden": "Youden's J", "crg": "CRG"}  # what thresholds can be tuned for
CALIBRATION_BINS = 10  # equal widths over [0, 1]; the report's reliability diagrams use the same ones


def compute_metrics(
    targets: np.ndarray, probabilities: np.ndarray, label_columns: Sequence[str], thresholds: float | np.ndarray
) -> dict:
    """Every figure per label, its macro average over the labels where it is defined, and micro (all entries pooled).

    targets (n, L) 0/1, NaN = unknown and left out; probabilities (n, L) in [0, 1]; thresholds a number, (L,), or (n, L)
    for cross-fitted ones: a probability at or above is positive. Undefined figures are None; `labels_averaged`
    says over how many labels each macro average runs. `crg`: the VLM3D challenge's score, over all labels x scans.
    """
    targets, probabilities = np.asarray(targets, np.float64), np.asarray(probabilities, np.float64)
    if not np.isfinite(probabilities).all():
        row, i = np.argwhere(~np.isfinite(probabilities))[0]
        raise Diverged(f"row {row} has no finite probability for {label_columns[i]}: the model's output overflowed")
    once = np.ones((len(targets), 1))
    figures = {k: v[0] for k, v in weighted_figures(targets, probabilities, thresholds, once).items()}
    plain = {k: [None if np.isnan(x) else float(x) for x in v] for k, v in figures.items()}
    metrics = arrange_figures(plain, label_columns) | {"n_scans": len(targets)}
    metrics["labels_averaged"] = {k: int(np.isfinite(v[:-2]).sum()) for k, v in figures.items()}
    for i, row in enumerate(metrics["per_label"].values()):
        row |= {"n_known": int(np.isfinite(targets[:, i]).sum()), "n_positive": int((targets[:, i] == 1).sum())}
    return metrics


def arrange_figures(figures: dict[str, list], label_columns: Sequence[str]) -> dict:
    """The nested result, from name -> one value per label, then micro, then macro."""
    out = {f"{kind}_{k}": v[i] for kind, i in (("macro", -1), ("micro", -2)) for k, v in figures.items()}
    out |= {"accuracy": figures["accuracy"][-2], "crg": figures["crg"][-2]}
    return out | {"per_label": {c: {k: v[i] for k, v in figures.items()} for i, c in enumerate(label_columns)}}


def weighted_figures(
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
    # Each label's known entries, then all known entries pooled: (truth, score, scan) of each.
    pools = [(truth[k, i], probabilities[k, i], np.flatnonzero(k)) for i, k in enumerate(known.T)]
    pools.append((truth[known], probabilities[known], np.nonzero(known)[0]))
    ranked = np.array([ranking_figures(*pool, weights) for pool in pools])  # (L + 1, 2, B)
    out |= dict(zip(("auc", "average_precision"), ranked.transpose(1, 2, 0), strict=True))
    for name, values in out.items():
        defined = np.isfinite(values[:, :-1])
        with np.errstate(invalid="ignore"):
            macro = np.where(defined, values[:, :-1], 0.0).sum(axis=1) / defined.sum(axis=1)
        out[name] = np.column_stack([values, macro])
    return out


def ranking_figures(
    truth: np.ndarray, scores: np.ndarray, rows: np.ndarray, weights: np.ndarray
) -> Sequence[np.ndarray]:
    """(AUROC, average precision), each (B,), of entries that belong to the given rows of weights (n, B); ties exact.

    Only the distinct scores of positives matter: at each, the negatives strictly above and those at or above it.
    """
    positive, negative = np.flatnonzero(truth), np.flatnonzero(~truth)
    positive, negative = positive[np.argsort(-scores[positive])], negative[np.argsort(-scores[negative])]
    if not len(positive):
        return [np.full(weights.shape[1], np.nan)] * 2
    cuts, starts = np.unique(-scores[positive], return_index=True)  # ascending in -score: the highest score first
    hits = np.add.reduceat(weights[rows[positive]], starts, axis=0)  # ties: (positives, B) -> (cuts, B)
    false = np.zeros((len(negative) + 1, weights.shape[1]))
    np.cumsum(weights[rows[negative]], axis=0, out=false[1:])
    above, upto = (false[np.searchsorted(-scores[negative], cuts, side)] for side in ("left", "right"))
    found = np.cumsum(hits, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = (np.einsum("kb,kb->b", hits, above) + np.einsum("kb,kb->b", hits, upto)) / 2  # pairs in the wrong order
        precision = np.divide(found, np.maximum(np.add(found, upto, out=upto), 1.0, out=upto), out=upto)
        return 1 - lost / (found[-1] * false[-1]), np.einsum("kb,kb->b", hits, precision) / found[-1]


def bootstrap_metrics(
    targets: np.ndarray, probabilities: np.ndarray, label_columns: Sequence[str], thresholds: float | np.ndarray,
    patients: Sequence[str], resamples: int = 1000, seed: int = 42,
) -> dict:  # fmt: skip
    """95 % percentile intervals [low, high] of every figure, nested as in `compute_metrics`; None where undefined.

    Patients are drawn with replacement, each with all of their scans: scans of one patient are not independent. A
    figure that is undefined in more than one resample of ten (a finding in a patient or two) has no interval.
    """
    members, patient = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
    if not (resamples and len(members)):
        return {}
    drawn = np.random.default_rng(seed).integers(len(members), size=(resamples, len(members)))
    weights = np.ones((len(targets), 1 + resamples))  # column 0: the scans as they are
    for b, row in enumerate(drawn):
        weights[:, 1 + b] = np.bincount(row, minlength=len(members))[patient]
    step = max(1, 2**22 // targets.size)  # a block's largest array holds 32 MB: large ones leave the cache
    parts = [weights[:, i : i + step] for i in range(0, 1 + resamples, step)]
    blocks = [weighted_figures(targets, probabilities, thresholds, part) for part in parts]
    figures = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    once, ece = figures["ece"][0], figures["ece"][1:]  # a mean of absolute values: noise from resampling biases it
    figures["ece"][1:] = np.maximum(0, ece - (ece.mean(axis=0) - once))

    def interval(values: np.ndarray) -> list[float] | None:
        return np.nanquantile(values, (0.025, 0.975)).tolist() if np.isfinite(values).mean() >= 0.9 else None

    return arrange_figures({name: [*map(interval, values[1:].T)] for name, values in figures.items()}, label_columns)


def tune_thresholds(targets: np.ndarray, probabilities: np.ndarray, objective: str = "f1") -> np.ndarray:
    """One threshold per label, (L,), that maximises F1 ("f1"), sensitivity + specificity - 1 ("youden") or CRG ("crg").

    CRG pools all labels, yet separates: with A positives among X known entries it grows with the sum over labels of
    TP/A - FP/(X - A). A cut lies half way between neighbouring scores; of equal ones the one nearest 0.5 is taken.
    A label without known positives or negatives keeps 0.5: there is nothing to tune on.
    """
    targets, probabilities = np.asarray(targets, np.float64), np.asarray(probabilities, np.float64)
    positives, negatives = (targets == 1).sum(axis=0), (targets == 0).sum(axis=0)
    out = np.full(targets.shape[1], 0.5)
    for i in np.flatnonzero((positives > 0) & (negatives > 0)):
        known = np.isfinite(targets[:, i])
        scores, place = np.unique(probabilities[known, i], return_inverse=True)
        called = np.append(np.bincount(place)[::-1].cumsum()[::-1], 0)  # with the cut below scores[0], [1], …, none
        tp = np.append(np.bincount(place, targets[known, i])[::-1].cumsum()[::-1], 0)
        a, b = (positives.sum(), negatives.sum()) if objective == "crg" else (positives[i], negatives[i])
        value = 2 * tp / (called + positives[i]) if objective == "f1" else tp / a - (called - tp) / b
        below, above = np.append(0.0, scores), np.append(scores, 1.0)
        cuts = (below + above) / 2
        cuts = np.where(cuts <= below, above, cuts)  # neighbouring floating-point numbers have no middle
        value[-1] = value[-1] if scores[-1] < 1 else -np.inf  # no threshold up to 1 excludes a probability of 1
        best = np.flatnonzero(value >= value.max() - 1e-12)
        out[i] = cuts[best[np.abs(cuts[best] - 0.5).argmin()]]
    return out


def crossfit_thresholds(
    targets: np.ndarray, probabilities: np.ndarray, patients: Sequence[str], objective: str = "f1", folds: int = 5,
    seed: int = 42,
) -> np.ndarray:  # fmt: skip
    """(n, L): each scan's thresholds were tuned on the patients of the other folds, so its own labels had no say."""
    members, patient = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(len(members)) % folds)[patient]
    out = np.full(np.shape(targets), 0.5)
    for k in range(folds):
        out[fold == k] = tune_thresholds(targets[fold != k], probabilities[fold != k], objective)
    return out


def evaluate(
    targets: np.ndarray, probabilities: np.ndarray, label_columns: Sequence[str], thresholds: float | np.ndarray,
    patients: Sequence[str], tuned_here: str | None = None, resamples: int = 1000, seed: int = 42,
) -> dict:  # fmt: skip
    """`metrics` and their `intervals`, and `f1`: macro F1 at fixed and at cross-fitted thresholds.

    With thresholds tuned for an objective on these very scans (`tuned_here`) the metrics are the cross-fitted ones,
    `apparent` holds what the thresholds seem to reach where they were chosen, and fixed is 0.5.
    """
    crossfitted = crossfit_thresholds(targets, probabilities, patients, tuned_here or "f1", seed=seed)
    used, fixed = (thresholds, thresholds) if tuned_here is None else (crossfitted, 0.5)
    score = partial(compute_metrics, targets, probabilities, label_columns)
    out = {
        "metrics": score(used),
        "intervals": bootstrap_metrics(targets, probabilities, label_columns, used, patients, resamples, seed),
        "f1": {"fixed": score(fixed)["macro_f1"], "cross-fitted": score(crossfitted)["macro_f1"]},
        "resamples": resamples,
        "tuned_here": tuned_here,
    }
    return out if tuned_here is None else out | {"apparent": score(thresholds)}


def format_summary(split: str, scored: dict) -> str:
    """What `evaluate` found, in a line."""
    figures, intervals, parts = scored["metrics"], scored["intervals"], []
    for key, title in (("macro_auc", "macro AUROC"), ("macro_average_precision", "AP")):
        ends = intervals.get(key)
        parts.append(f"{title} {shown(figures[key])}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""))
    f1 = " and ".join(f"{shown(value)} at {kind}" for kind, value in scored["f1"].items())
    return f"{split}, {figures['n_scans']} scans: {', '.join(parts)}, F1 {f1} thresholds"


def comparison_key(figures: dict, select: str = "macro_f1") -> tuple[float, ...]:
    """What epochs are compared by, the greater the better: `select`, macro average precision, a lower `val_loss`.

    F1 alone can't tell the first epochs apart: it is 0 for all of them while no probability reaches the threshold.
    Undefined figures come last.
    """
    values = {name: figures.get(name) for name in (select, "macro_average_precision", "val_loss")}
    return tuple(-math.inf if x is None else -x if name == "val_loss" else x for name, x in values.items())


def best_epoch(results: list[dict], select: str = "macro_f1") -> int | None:
    """The best epoch of results.jsonl, the first of equal ones; None where there is none."""
    return max(results, key=lambda r: (comparison_key(r, select), -r["epoch"]))["epoch"] if results else None


def aggregate_logits(
    logits: np.ndarray, series_ids: Sequence[str], patient_ids: Sequence[str], over: str
) -> np.ndarray:
    """Each row of (n, L) replaced by the mean over its group, so that every scan keeps its row and its id.

    over: "none"; "series", the reconstructions of one scan, known by CT-RATE style ids (train_12_a_1 and train_12_a_2);
    "patient", all of a patient's scans.
    """
    if over == "none":
        return logits
    scans = [re.sub(r"(_\d+_[a-z]+)_\d+(\.\w+)*$", r"\1", name) for name in series_ids]
    _, group = np.unique(np.array(scans if over == "series" else patient_ids, dtype=object), return_inverse=True)
    sums = np.zeros((group.max(initial=-1) + 1, logits.shape[1]))
    np.add.at(sums, group, logits)
    return (sums / np.bincount(group)[:, None])[group]


def shown(value: float | None) -> str:
    """Three decimals, or a dash for what is undefined."""
    return "–" if value is None else f"{value:.3f}"


def log_metrics_table(metrics: dict, level: int) -> None:
    """Log a line per label, then macro and micro; figures that are undefined show as a dash."""
    titles = {"accuracy": "acc", "precision": "prec", "recall": "recall", "specificity": "spec", "f1": "F1"}
    titles |= {"auc": "AUROC", "average_precision": "AP", "brier": "Brier"}
    rows = [("label", "pos/known", [*titles.values()])]
    for label, m in metrics["per_label"].items():
        rows.append((label, f"{m['n_positive']}/{m['n_known']}", [shown(m[k]) for k in titles]))
    for kind in ("macro", "micro"):
        rows.append((kind, "", [shown(metrics[f"{kind}_{k}"]) for k in titles]))
    width, counts = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{label:{width}}  {n:>{counts}}" + "".join(f"{cell:>8}" for cell in cells) for label, n, cells in rows]
    rule = "─" * len(lines[0])
    for line in (lines[0], rule, *lines[1:-2], rule, *lines[-2:]):
        log.log(level, "%s", line)


# ── 11 Keep ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Files that are whole or absent: checkpoints, the top k, the state of a run.

MODEL_KIND, RUN_KIND, FORMAT = "finetune_siglip", "finetune_siglip.run", 1


def link_atomic(source: Path, path: Path) -> None:
    """Make `path` the same file as `source`: a second name, or a copy where the file system has no links."""
    with put_in_place(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def digest_of(content: Any) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values: `torch.load` itself checks no sums."""
    sha, ahead = hashlib.sha256(), [content]
    while ahead:
        value = ahead.pop()
        if isinstance(value, Tensor):
            sha.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            sha.update(f"{'dict' if isinstance(value, dict) else 'list'} {len(value)}".encode())
            ahead += reversed([*itertools.chain(*value.items())] if isinstance(value, dict) else value)
        else:
            sha.update(f"{type(value).__name__} {value!r};".encode())
    return sha.hexdigest()


def tensors_in(content: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, each with its place."""
    if isinstance(content, Tensor):
        yield where, content
    elif isinstance(content, (dict, list, tuple)):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors_in(value, f"{where}/{name}")


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested containers."""
    return sum(tensor.nbytes for _, tensor in tensors_in(content))


def require_space(folder: Path, needed: int) -> None:
    """Raises BadEnvironment unless `needed` bytes and a little more are free in a folder."""
    needed, free = needed + 2**20, shutil.disk_usage(folder).free
    if free < needed:
        raise BadEnvironment(f"{folder}: {needed:,} bytes are needed there, {free:,} are free; make room")


def save_checked(path: Path, content: dict[str, Any]) -> str:
    """Save plain types and tensors together with their digest, which is returned. Raises Diverged for a NaN."""
    for name, tensor in tensors_in(content, path.name):
        numbers = tensor.is_floating_point() and tensor.numel()
        if numbers and not torch.stack(tensor.aminmax()).isfinite().all():  # NaN comes through; one pass, no copy
            raise Diverged(f"{name} is not finite and is not saved; the last save stands: lower --lr or add --warmup")
    require_space(path.parent, tensor_bytes(content))
    digest = digest_of(content)
    save_atomic(path, lambda file: torch.save({**content, "digest": digest}, file), tensor_bytes(content))
    return digest


def load_checked(path: Path, kind: str, digest: str | None = None) -> dict[str, Any]:
    """Read what `save_checked` wrote. Raises BadInput for another kind of file and for a damaged one.

    With `digest` the file must also be the very one that had it when it was saved.
    """
    what = "a checkpoint of this script" if kind == MODEL_KIND else "the state of a run of this script"
    if not path.is_file():  # opening a pipe would wait for ever
        raise BadInput(f"{path}: not readable as {what} (there is no such file)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        why = f"{type(error).__name__}: it is damaged or another file"
        raise BadInput(f"{path}: not readable as {what} ({why})") from error
    if not isinstance(content, dict) or (content.get("kind"), content.get("format")) != (kind, FORMAT):
        raise BadInput(f"{path}: not {what} in format {FORMAT}; --pretrained takes other people's weights")
    stored, whole = content.pop("digest", None), False
    with suppress(Exception):  # a crafted tensor can claim any shape over few bytes: its size is looked at first
        whole = tensor_bytes(content) <= path.stat().st_size and stored == digest_of(content)
    if not whole or digest not in (None, stored):
        raise BadInput(f"{path}: damaged, its content doesn't match its digest; use another copy")
    return content


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong while the content of a whole file is put to use is due to the file: BadInput naming it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # libraries check a configuration with errors of their own
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BadInput(f"{path}: can't be used ({why}); use the script that wrote it") from error


def cpu_weights(model: nn.Module, read: Callable = nn.Module.state_dict) -> dict[str, Tensor]:
    """A copy of all parameters and buffers of the unwrapped model, in main memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in read(unwrap(model)).items()}


def pack_model(model: nn.Module, setup: dict[str, Any], epoch: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """All that prediction needs, in plain types: see `classifier_from` for the way back.

    `setup`: labels, preprocessing, backbone, head, thresholds, and where they come from.
    """
    weights = cpu_weights(model, merged_weights)
    return {"kind": MODEL_KIND, "format": FORMAT, "model": weights, **setup, "metrics": metrics, "epoch": epoch}


def mean_weights(models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several epochs' weights; what is no floating-point tensor is the first one's.

    Wortsman et al., "Model soups", ICML 2022.
    """
    mean = dict(models[0])
    for name, first in models[0].items():
        if first.is_floating_point():
            mean[name] = torch.stack([model[name].double() for model in models]).mean(0).to(first.dtype)
    return mean


def classifier_from(content: dict[str, Any], path: Path = Path("checkpoint")) -> SiglipClassifier:
    """The model in a checkpoint, its weights loaded; every tensor must fit. Raises BadInput naming `path`."""
    with reading(path):
        backbone, prep = build_backbone(content["backbone"]), Preprocessing.from_dict(content["preprocessing"])
        model = SiglipClassifier(backbone, prep.windows, prep.intensity, len(content["labels"]), **content["head"])
        model.load_state_dict(content["model"], strict=True)
    return model


TOP_K = 3


def checkpoint_name(epoch: int) -> str:
    return f"checkpoint_epoch_{epoch:03d}.pth"


@dataclass
class History:
    """What has come of the epochs so far: their lines, the best of them, and for how long none has been better."""

    lines: list[str] = field(default_factory=list)
    entries: list[tuple[tuple[float, ...], int]] = field(default_factory=list)  # (comparison_key, epoch) of the top k
    best: dict[str, Any] | None = None  # what the first one's file holds
    digests: dict[str, str] = field(default_factory=dict)  # of the top k's files; one without is to be written anew
    epochs_without_gain: int = 0
    skipped: dict[str, dict[int, str]] = field(default_factory=dict)  # split -> row -> why it could not be read

    @property
    def names(self) -> list[str]:
        return [checkpoint_name(epoch) for _, epoch in self.entries]

    def offer(self, key: tuple[float, ...], epoch: int) -> bool:
        """Rank an epoch, ties to the earlier one; True if it is among the best."""
        ranked = sorted([*self.entries, (key, epoch)], key=lambda entry: (entry[0], -entry[1]), reverse=True)
        self.entries = ranked[:TOP_K]
        self.epochs_without_gain = 0 if self.is_best(epoch) else self.epochs_without_gain + 1
        return (key, epoch) in self.entries

    def is_best(self, epoch: int) -> bool:
        return bool(self.entries) and self.entries[0][1] == epoch


def optimized(state: TrainState) -> dict[str, Tensor]:
    """The parameters by name, in the order in which the optimiser numbers them."""
    names = {id(parameter): name for name, parameter in unwrap(state.model).named_parameters()}
    return {names[id(p)]: p for group in state.optimizer.param_groups for p in group["params"]}


# What a state keeps of a TrainState and a History besides their larger parts.
OF_PROGRESS = ("epoch", "micro", "skipped", "skipped_in_row", "tally")
OF_HISTORY = ("lines", "entries", "digests", "epochs_without_gain")


def pack_state(state: TrainState, losses: list[float], history: History, identity: dict[str, Any]) -> dict[str, Any]:
    """Everything that a resumed run needs to go on as if nothing had happened.

    There are no random states in it: every draw is a function of (seed, epoch, forward pass, rank). `losses` holds each
    rank's sum so far. `parameters` names what the optimiser knows by number only.
    """
    return {
        "kind": RUN_KIND,
        "format": FORMAT,
        "identity": identity,
        "model": cpu_weights(state.model),
        "ema": {"steps": state.ema.steps, "average": state.ema.average} if state.ema else None,
        "optimizer": state.optimizer.state_dict(),
        "parameters": list(optimized(state)),
        "schedule": state.schedule.state_dict(),
        "scaler": state.scaler.state_dict(),
        "progress": {name: getattr(state, name) for name in OF_PROGRESS},
        "losses": losses,
        "history": {name: getattr(history, name) for name in (*OF_HISTORY, "skipped")},
    }


def restore_state(content: dict[str, Any], state: TrainState, history: History, rank: int) -> None:
    """The inverse of `pack_state`. Raises what PyTorch does, or ValueError, for the state of another model."""
    unwrap(state.model).load_state_dict(content["model"], strict=True)
    if content["parameters"] != list(optimized(state)):
        raise ValueError("the optimiser steps other parameters than this run's")
    state.optimizer.load_state_dict(content["optimizer"])
    if state.ema:
        state.ema.steps = content["ema"]["steps"]
        for name, average in content["ema"]["average"].items():
            state.ema.average[name].copy_(average)
    state.schedule.load_state_dict({**content["schedule"], "total_steps": state.schedule.total_steps})
    state.scaler.load_state_dict(content["scaler"])
    for name in OF_PROGRESS:
        setattr(state, name, content["progress"][name])
    state.loss_sum.fill_(content["losses"][rank])
    for name in OF_HISTORY:
        setattr(history, name, content["history"][name])
    for split, rows in content["history"]["skipped"].items():
        history.skipped.setdefault(split, {}).update(rows)


# Order of writes. A run is what its last.ckpt says, and is whole whenever the power goes: the checkpoints of the top k
# are on the disk before last.ckpt counts them, the state before it keeps a name of its own until the new one has its,
# and all else (results.jsonl, best_model.pth, the removal of what has left the ranking) only follows from it and is
# made again by a resume. Each file is written under a temporary name, synced and renamed. Damage that comes later is
# found by the digest inside, and the state before goes on.

# Names, as patterns, of the files that a run makes in its folder and in those below it.
FOLDERS = ("", "pictures", "explanations")
STATE, CHECKPOINT, BEST = r"last(\.previous)?\.ckpt", r"checkpoint_epoch_\d{3,}\.pth", r"best_model\.pth"
RUN_FILES = (
    STATE, CHECKPOINT, BEST, r"results\.jsonl", r"progress\.png", r"report\.html", r"run\.json", r"skipped\.csv",
    r"test_predictions\.csv", r"(evaluation|explanations)_\w+\.json", r"[0-9a-f]{16}\.png",
)  # fmt: skip


class RunFolder:
    """`--output-dir` of one run: `last.ckpt` is the single point of commit, all other files follow from it."""

    def __init__(self, path: Path):
        self.path, self.last, self.previous = path, path / "last.ckpt", path / "last.previous.ckpt"
        self.stopped = path / "stopped"  # names the signal that ended the run, all saved; gone once it goes on

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the folder for this process. Raises BadEnvironment naming the holder.

        A record lock, for it ends with this very process: a data-loading worker that outlives a killed run inherits any
        other kind, and the run could not be resumed at once.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+") as handle:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                handle.seek(0)
                used = f"{self.path} is in use by {handle.read().strip() or 'another run'}"
                raise BadEnvironment(f"{used}; wait for it, stop it or choose another --output-dir") from None
            except OSError as error:
                log.warning("%s: this disk has no locks (%s); start no second run there", self.path, error.strerror)
            handle.truncate(0)
            print(f"pid {os.getpid()} on {socket.gethostname()}", file=handle, flush=True)
            self.stopped.unlink(missing_ok=True)
            yield

    def ours(self, *patterns: str) -> list[Path]:
        """Files here, and no folders, whose whole names match: what a run makes and not what only looks like it."""
        wanted, folders = re.compile("|".join(patterns)), (self.path / name for name in FOLDERS)
        found = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
        return [file for file in found if wanted.fullmatch(file.name) and not file.is_dir()]

    def clear(self) -> None:
        """Forget an earlier run (`--overwrite`): it is whole until last.ckpt goes, and from then on there is none."""
        for file in [self.previous, self.last, *self.ours(*RUN_FILES, TEMPORARY)]:
            file.unlink(missing_ok=True)

    def clear_prediction(self) -> None:
        """Forget an earlier prediction; where a model lies, the other files are that run's and stay."""
        if not self.ours(STATE, CHECKPOINT, BEST):
            self.clear()

    def commit(self, content: dict[str, Any]) -> None:
        """Make `content` the state of the run; the one before it stays, in case this one is damaged some day."""
        if self.last.exists():
            link_atomic(self.last, self.previous)
        save_checked(self.last, content)

    def derive(self, history: History) -> None:
        """Bring every other file in line with what was committed; what no longer counts goes last."""
        save_bytes(self.path / "results.jsonl", "".join(line + "\n" for line in history.lines).encode())
        if history.entries:
            best = self.path / history.names[0]
            if history.best and not (best.name in history.digests and best.exists()):
                history.digests[best.name] = save_checked(best, history.best)
            link_atomic(best, self.path / "best_model.pth")
        for file in self.ours(CHECKPOINT, TEMPORARY):
            if file.name not in history.names:
                with suppress(OSError):  # a file too many harms nothing
                    file.unlink()

    def load(self) -> tuple[Path, dict[str, Any]]:
        """The file with the last state that is whole, and its content. Raises BadInput where there is none."""
        try:
            return self.last, load_checked(self.last, RUN_KIND)
        except BadInput as error:
            if not self.previous.exists():
                raise
            log.warning("%s; going back to the state before it, %s", error, self.previous)
        return self.previous, load_checked(self.previous, RUN_KIND)

    def load_top(self, history: History, thresholds: list[float]) -> None:
        """Check the files of the top k against their digests; the best one's content goes to memory.

        A file that is damaged or gone leaves the ranking, with a warning: the run itself does not need it. The best
        one's content may still stand in best_model.pth, which a finished run gave other `thresholds`.
        """
        for key, epoch in reversed(list(history.entries)):
            name = checkpoint_name(epoch)
            wanted = history.digests.get(name)
            try:
                history.best = load_checked(self.path / name, MODEL_KIND, wanted)
            except BadInput as error:
                with suppress(BadInput):
                    content = load_checked(self.path / "best_model.pth", MODEL_KIND) | {"thresholds": thresholds}
                    content.pop("tuned_for", None)
                    if digest_of(content) == wanted:
                        log.warning("%s; best_model.pth is the same", error)
                        history.best = content
                        del history.digests[name]
                        continue
                log.warning("%s; epoch %d leaves the ranking", error, epoch)
                history.entries.remove((key, epoch))


# The slice features of a frozen backbone, in a cache as volumes are: later epochs train the head from them.


class FeatureDataset(CTVolumeDataset):
    """Scans whose `volume` is what a frozen backbone makes of them: (S, E) float16."""

    def __init__(self, source: CTVolumeDataset, folder: Path, settings: str, shape: tuple[int, ...]):
        super().__init__(source.table, source.prep, on_bad_volume=source.on_bad_volume)
        self.skipped, self.blank = source.skipped, torch.zeros(shape, dtype=torch.float16)
        self.files = {path: entry_for(folder, settings, path) for path in source.table.paths}

    def load(self, path: Path) -> Tensor:
        if fill_from(self.files[path], features := torch.empty_like(self.blank)):
            return features
        raise BadVolume(f"{path}: its features, {self.files[path]}, are gone or damaged; a new start computes them")


@torch.no_grad()
def cache_features(
    folder: Path, model: SiglipClassifier, dataset: CTVolumeDataset, recipe: Recipe, runtime: Runtime
) -> FeatureDataset:
    """Compute the slice features that `folder` does not hold yet, one file a scan, and read them from there.

    They are known by the backbone's weights, preprocessing, precision and what the scan's file is known by.
    Raises BadInput where the backbone is not frozen or its features do not fit float16, BadEnvironment without room.
    """
    if any(p.requires_grad for p in model.backbone.parameters()):
        raise BadInput("--cache-features needs a backbone that stays as it is: --freeze-up-to all")
    how = [dataset.prep.to_dict(), model.backbone.config, model.skip_air, str(runtime.amp_dtype), model.width]
    settings, paths = digest_of([how, model.backbone.state_dict()]), dataset.table.paths
    folder.mkdir(parents=True, exist_ok=True)
    cached = FeatureDataset(dataset, folder, settings, model.feature_shape(dataset.prep.channels, dataset.prep.grid))
    missing = [row for row, path in enumerate(paths) if not fill_from(cached.files[path], cached.blank.clone())]
    log.info("features: %d of %d scans are in %s; no augmentation", len(paths) - len(missing), len(paths), folder)
    require_space(folder, len(missing) * (cached.blank.nbytes + 4))
    agree(runtime, 0)  # all ranks have looked before any writes
    model.eval()
    mine = [row for row in missing if row % runtime.world_size == runtime.rank]  # whatever the others have found
    bar = progress_bar("features", len(mine), runtime)
    for batch in build_loader(dataset, [[row] for row in mine], recipe.num_workers, runtime.device):
        bar.update()
        if batch["bad"].item():  # skipped: nothing stands in for it
            continue
        with runtime.autocast():
            features = model.slice_features(batch["volume"].to(runtime.device))[0].half().cpu().numpy()
        path = paths[int(batch["row"])]
        if not np.isfinite(features).all():
            raise BadInput(f"{path}: its features do not fit float16; leave out --cache-features")
        write_entry(cached.files[path], features)
    bar.close()
    share_skipped(dataset, runtime)
    agree(runtime, 0)  # and all files are there before any rank reads
    lacking = [path for row, path in enumerate(paths) if row not in dataset.skipped and not cached.files[path].exists()]
    if lacking:
        raise BadEnvironment(f"{folder} lacks {lacking[0]}: all processes must see the same --cache-features folder")
    return cached


# ── 12 Papers ───────────────────────────────────────────────────────────────────────────────────────────────────────
# What a person reads: predictions, pictures, curves, the report.

REPORT_COLUMNS = {
    "auc": "AUROC", "average_precision": "average precision", "f1": "F1", "precision": "precision",
    "recall": "sensitivity", "specificity": "specificity", "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy", "brier": "Brier", "ece": "calibration error", "crg": "CRG", "prevalence": "prevalence",
}  # fmt: skip
REPORT_HEADLINES = {
    **{f"macro_{key}": f"macro {REPORT_COLUMNS[key]}" for key in ("auc", "average_precision", "f1", "brier", "ece")},
    "micro_f1": "micro F1", "crg": "CRG", "accuracy": "accuracy",
}  # fmt: skip
FEWEST_IN_BIN = 5  # scans that a point of the calibration curve stands for at least


def prediction_rows(
    series_ids: Sequence[str], probabilities: np.ndarray, thresholds: float | np.ndarray, labels: Sequence[str]
) -> list[list]:
    """The rows of test_predictions.csv: a header `id,{label}_prob,{label}_pred`, then scans in the given order."""
    probabilities = np.asarray(probabilities, np.float64)  # written so that the very same number is read back
    cells = np.stack([probabilities.astype(object), (probabilities >= thresholds).astype(int)], 2)  # (n, L, 2)
    header = ["id", *(f"{label}_{kind}" for label in labels for kind in ("prob", "pred"))]
    return [header, *([name, *row.ravel()] for name, row in zip(series_ids, cells, strict=True))]


def resolve_thresholds(source: float | str | Path, labels: Sequence[str], auto: np.ndarray) -> np.ndarray:
    """(L,) thresholds from --threshold: a number for all labels, `auto` as given, or a JSON file. Raises BadInput.

    The file is {label: threshold}, or an evaluation_*.json of ours.
    """
    if not isinstance(source, Path):
        return np.asarray(auto, np.float64) if source == "auto" else np.full(len(labels), source, np.float64)
    content = read_json(source)
    found = {label: content.get("thresholds", content).get(label) for label in labels}
    wrong = {k: v for k, v in found.items() if not (type(v) in (int, float) and 0 <= v <= 1)}
    if wrong:
        raise BadInput(*(f"--threshold {source} holds {v!r} for {k}: it must be 0 to 1" for k, v in wrong.items()))
    return np.array([*found.values()], np.float64)


def draw_progress(results: list[dict], select: str) -> Any:
    """Losses, macro F1 and AUROC, learning rate by epoch, with the best epoch marked."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure, best = Figure(figsize=(9, 3.1), layout="constrained"), best_epoch(results, select)
    panels = {"loss": ("train_loss", "val_loss"), "validation": ("macro_f1", "macro_auc"), "learning rate": ("lr",)}
    for axis, (title, keys) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for key in keys:
            values = np.array([result.get(key) for result in results], np.float64)  # None, undefined, is NaN
            axis.plot([r["epoch"] for r in results], values, marker="o", markersize=3, label=key.replace("_", " "))
        if best is not None:
            axis.axvline(best, color="gray", linestyle=":", label=f"best: epoch {best}")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def picture_path(folder: Path, series_id: str, *label: str) -> Path:
    """Where a scan's picture lies, or the one of a finding in it: ids may hold characters that no file name can."""
    name = hashlib.sha256("\0".join([series_id, *label]).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return folder / ("explanations" if label else "pictures") / f"{name}.png"


def legible_windows(windows: np.ndarray) -> dict[int, np.ndarray]:
    """Of windows (K, S, H, W) in [0, 1] the first of equal ones (Merlin's checkpoints see one three times), by number.

    A window that is mostly dark, like that of bone, is shown as its square root. Models see it as it is.
    """
    different = [k for k, w in enumerate(windows) if not any(np.array_equal(w, before) for before in windows[:k])]
    dark = [k for k in different if windows[k].sum() < 0.25 * np.count_nonzero(windows[k])]
    return {k: np.sqrt(windows[k]) if k in dark else windows[k] for k in different}


def draw_slices(
    windows: np.ndarray, names: Sequence[str], title: str, slices: Sequence[int], notes: Sequence[str] | None = None,
    maps: np.ndarray | None = None,
) -> Any:  # fmt: skip
    """A column for each slice of windows (K, S, H, W) in [0, 1], a row for each different window.

    With relevance `maps` (slices, H, W) there is a last row, in which they lie over the mean of the windows.
    """
    from matplotlib.figure import Figure

    rows = {names[k]: window[slices] for k, window in legible_windows(windows).items()}
    if maps is not None:
        rows["relevance"] = np.mean([*rows.values()], axis=0)
        shares = maps / (maps.max() or 1.0)
    figure = Figure((1.6 * len(slices) + 0.5, 1.6 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), len(slices), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for k, axis in enumerate(line):
            axis.imshow(images[k], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if name == "relevance":
                axis.imshow(shares[k], cmap="inferno", vmin=0, vmax=1, alpha=0.75 * np.sqrt(shares[k]))
    for axis, s, note in zip(axes[0], slices, notes or [""] * len(slices), strict=True):
        axis.set_title(f"slice {s + 1} of {windows.shape[1]}\n{note}".strip(), fontsize=8)
    figure.suptitle(title, fontsize=8, parse_math=False)
    figure.supxlabel("front up, patient's right on the left · not for diagnosis", fontsize=8)
    return figure


def explain_split(
    folder: Path, split: str, dataset: CTVolumeDataset, model: SiglipClassifier, probabilities: np.ndarray,
    thresholds: np.ndarray, n: int, num_workers: int,
) -> None:  # fmt: skip
    """explanations/*.png of the findings chosen by `findings_to_explain`, and explanations_{split}.json on them."""
    table, names, device = dataset.table, window_names(dataset.prep), next(model.parameters()).device
    chosen = findings_to_explain(probabilities, thresholds, n)
    findings = []
    for batch in build_loader(dataset, [[row] for row in chosen], num_workers, device):
        row, volume = int(batch["row"]), batch["volume"].to(device)
        if row in dataset.skipped:
            continue
        series, windows = table.series_ids[row], model.windows(volume)[0].cpu().numpy()
        for i, found in zip(chosen[row], find_evidence(model, volume, chosen[row]), strict=True):
            label, p, truth = table.labels[i], float(probabilities[row, i]), table.targets[row, i]
            shares = [f", attention {share:.0%}" for share in found.attention or ()] or [""] * len(found.gains)
            notes = [f"logit {gain:+.2f}{share}" for gain, share in zip(found.gains, shares, strict=True)]
            title = f"{label[:60]}: probability {p:.3f}, scan {series[:60]}"
            figure = draw_slices(windows, names, title, found.slices, notes, found.maps)
            save_figure(picture_path(folder, series, label), figure)
            facts = {"id": series, "label": label, "probability": p, "target": None if np.isnan(truth) else int(truth)}
            findings.append(facts | {name: getattr(found, name) for name in ("slices", "gains", "attention")})
    content = {"split": split, "depth": dataset.prep.grid[0], "labels": list(table.labels), "findings": findings}
    save_bytes(folder / f"explanations_{split}.json", json.dumps(content, allow_nan=False).encode())
    log.info("%s: %d explanations in %s", split, len(findings), folder / "explanations")


def most_wrong(
    targets: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray, n: int = 12
) -> list[tuple[int, list[int]]]:
    """The n scans with the most confidently wrong decision: (row, its wrong labels, the worst first)."""
    wrong = ~np.isnan(targets) & ((probabilities >= thresholds) != (targets == 1))
    error = np.where(wrong, np.abs(probabilities - np.nan_to_num(targets)), 0.0)
    rows = np.argsort(-error.max(axis=1, initial=0.0), kind="stable")[:n]
    ranked = np.argsort(-error, axis=1, kind="stable").tolist()
    return [(r, [c for c in ranked[r] if wrong[r, c]]) for r in rows.tolist() if wrong[r].any()]


def save_evaluation(
    folder: Path, split: str, table: Table, probabilities: np.ndarray, thresholds: np.ndarray, scored: dict
) -> None:
    """evaluation_{split}.json: all that the report says of a split; `scored` is what `evaluate` returned.

    Its `thresholds` can be given to --threshold. Unknown targets are null.
    """
    cuts = dict(zip(table.labels, thresholds.tolist(), strict=True))
    content = {
        "split": split, "labels": list(table.labels), "thresholds": cuts, **scored,
        "ids": table.series_ids, "patients": table.patient_ids,
        "targets": [[None if t != t else int(t) for t in row] for row in table.targets.tolist()],
        "probabilities": np.asarray(probabilities, np.float64).tolist(),
    }  # fmt: skip
    save_bytes(folder / f"evaluation_{split}.json", json.dumps(content, allow_nan=False).encode())


def read_evaluation(path: Path) -> dict:
    """What `save_evaluation` wrote, with arrays: targets (n, L) NaN unknown, probabilities (n, L), cuts (L,)."""
    content = read_json(path)
    with reading(path):
        shape = (len(content["ids"]), len(content["labels"]))
        content |= {k: np.array(content[k], np.float64).reshape(shape) for k in ("targets", "probabilities")}
        return content | {"cuts": np.array([content["thresholds"][label] for label in content["labels"]], np.float64)}


def publish(
    folder: Path, split: str, table: Table, probabilities: np.ndarray, thresholds: np.ndarray, tuned_here: str | None,
    resamples: int, seed: int, level: int = logging.INFO,
) -> dict:  # fmt: skip
    """Score a split, log it (the table at `level`), write what the report says of it; returns what `evaluate` does."""
    how = thresholds, table.patient_ids, tuned_here, resamples, seed
    scored = evaluate(table.targets, probabilities, table.labels, *how)
    save_evaluation(folder, split, table, probabilities, thresholds, scored)
    log_metrics_table(scored["metrics"], level)
    log.info("%s", format_summary(split, scored))
    return scored


def draw_most_wrong(folder: Path, dataset: CTVolumeDataset, probabilities: np.ndarray, thresholds: np.ndarray) -> None:
    """Pictures, as models see them, of the scans with the most confidently wrong decisions."""
    to_windows = CTWindows(dataset.prep.windows, dataset.prep.intensity)
    with optional("the report's pictures"):
        for row, _ in most_wrong(dataset.table.targets, probabilities, thresholds):
            windows = to_windows(dataset[row]["volume"][None])[0].numpy()
            slices, series = [int((k + 0.5) / 4 * windows.shape[1]) for k in range(4)], dataset.table.series_ids[row]
            figure = draw_slices(windows, window_names(dataset.prep), series[:60], slices)
            save_figure(picture_path(folder, series), figure)


def save_run(folder: Path, title: str, facts: dict, args: argparse.Namespace, table: Table) -> None:
    """Add what the report says of this run, its settings and its data under this title to run.json; or only warn."""
    path, settings = folder / "run.json", {k: v for k, v in vars(args).items() if v is not None and k != "command"}
    parts = {name: table.split(name) for name in dict.fromkeys(table.splits)}
    data = {name: f"{len(part)} scans of {len(set(part.patient_ids))} patients" for name, part in parts.items()}
    sections = {f"Run, {title}": facts, f"Settings, {title}": settings, f"Data, {title}": data}
    with optional(path.name):
        before = read_json(path) if path.exists() else {}
        save_bytes(path, json.dumps(before | sections, default=str, indent=1).encode())


# The report: one page, made from the files of a folder alone, that needs no network. All its text stands in this
# template, which escapes whatever a table holds and calls what is in this file by its name; the only script that may
# run says where a box scrolls sideways.

REPORT_SCRIPT = """
const mark = () => document.querySelectorAll('.wide').forEach(
  box => box.classList.toggle('more', box.scrollWidth > box.clientWidth + 1));
addEventListener('resize', mark);
mark();
"""
REPORT_TEMPLATE = """
{% macro figure(value, interval=none, tag='td') %}
<{{ tag }} data-v="{{ '' if value is none else value }}">{{ shown(value) }}
{%- if interval %}<small>{{ '%.3f–%.3f' % (interval[0], interval[1]) }}</small>{% endif %}</{{ tag }}>{% endmacro %}
{% macro wide(name) %}<div class="wide" tabindex="0" role="region" aria-label="{{ name }}">{{ caller() }}</div>
{% endmacro %}
{% macro image(name, address, text) %}{% call wide(name) %}{% if address %}<img src="{{ address }}" alt="{{ text }}">
{%- endif %}{% endcall %}{% endmacro %}
{% macro facts(content) %}<dl>{% for name, value in content.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>{% endmacro %}
{% macro evaluation(e, at) %}{% set spread = e.intervals.get('per_label', {}) %}
<p>{{ e.ids | length }} scans of {{ e.patients | unique(true) | list | length }} patients, {{ e.labels | length }}
labels. {% if e.intervals %}In small print: 95 % intervals from {{ e.resamples }} resamples of the patients.{% endif %}
{% for kind, value in e.get('f1', {}).items() %} Macro F1 at {{ kind }} thresholds: {{ shown(value) }}.{% endfor %}
{% if e.tuned_here is not none %}The thresholds were tuned for {{ OBJECTIVES[e.tuned_here] }} on this split. So that
they do not flatter, the figures that depend on them are cross-fitted: each scan is decided by thresholds tuned on other
patients. Taken at face value, macro F1 would seem to be {{ shown(e.apparent.macro_f1) }}.{% endif %}</p>
<div class="grid" style="--w: max(10rem, 20%)">{% for key, title in REPORT_HEADLINES.items() %}
<div class="card" data-figure="{{ key }}">{{ title }}{{ figure(e.metrics[key], e.intervals.get(key), 'b') }}</div>
{% endfor %}</div><h3>Per label</h3>{% call wide('Figures per label') %}<table><thead><tr>
{% for title in ['label', 'positive / known'] + REPORT_COLUMNS.values() | list + ['threshold'] %}
<th scope="col">{{ title }}</th>{% endfor %}</tr></thead><tbody>{% for label, row in e.metrics.per_label.items() %}
<tr><th scope="row" data-v="{{ label }}"><a href="#{{ at }}-{{ loop.index0 }}">{{ label }}</a></th>
<td data-v="{{ row.n_positive }}">{{ row.n_positive }} / {{ row.n_known }}</td>
{% for key in REPORT_COLUMNS %}{{ figure(row[key], spread.get(label, {}).get(key)) }}{% endfor %}
{{ figure(e.thresholds[label]) }}</tr>{% endfor %}</tbody><tfoot>
{% for kind in ('macro', 'micro') %}<tr><th scope="row">{{ kind }}</th><td></td>{% for key in REPORT_COLUMNS %}
{{ figure(e.metrics[kind ~ '_' ~ key], e.intervals.get(kind ~ '_' ~ key)) }}{% endfor %}<td></td></tr>{% endfor %}
<tr><th scope="row">labels in the macro average</th><td></td>
{% for key in REPORT_COLUMNS %}<td>{{ e.metrics.labels_averaged[key] }}</td>{% endfor %}<td></td></tr></tfoot></table>
{% endcall %}<h3>Curves</h3><p>Dots: the stored threshold. Calibration: bins of {{ FEWEST_IN_BIN }} scans or more.</p>
{% for label, row in e.metrics.per_label.items() %}
<section id="{{ at }}-{{ loop.index0 }}"><h4>{{ label }}</h4>
{% if 0 < row.n_positive < row.n_known %}{% set name = 'Curves of ' ~ label %}
{{ image(name, chart(draw_curves(e, loop.index0)), name ~ ', ' ~ e.split ~ ' split') }}
{% else %}<p>{{ row.n_positive }} positive of {{ row.n_known }} known: no curves without both.</p>{% endif %}
</section>{% endfor %}<h3>Most confidently wrong</h3><ul class="grid" style="--w: 36rem">
{% for row, labels in most_wrong(e.targets, e.probabilities, e.cuts) %}<li class="card"><h4>{{ e.ids[row] }}</h4>
{% set text = 'Axial slices of scan ' ~ e.ids[row] ~ ', feet to head, a line for each window' %}
{{ image(e.ids[row], picture(e.ids[row]), text) }}<ul>{% for i in labels %}
<li>{{ e.labels[i] }}: {{ 'missed' if e.targets[row, i] == 1 else 'called, not there' }},
probability {{ '%.3f' % e.probabilities[row, i] }}</li>{% endfor %}</ul></li>
{% else %}<li>No decision was wrong.</li>{% endfor %}</ul>{% endmacro %}
{% macro explanations(e, at) %}<p><b>Not for diagnosis.</b> For each finding the slices that raised its logit most, the
strongest first, in every window that the model sees, and the relevance map over their mean. Above a slice: what it
adds to the logit, to first order (gradient × feature, attention weight included). The map is gradient × activation of
the last tokens where that is positive, as a share of its highest value. It shows what this model's answer depended on,
in the coarse grid of its tokens; it outlines no finding and proves none.</p>
{% for label, found in e.findings | groupby('label', case_sensitive=true) %}
<h3>{{ label }}</h3><div class="grid" style="--w: 36rem">
{% for f in found | sort(attribute='probability', reverse=true) %}
{% set truth = 'label unknown' if f.target is none else 'labelled as present' if f.target else 'labelled as absent' %}
{% set note %}Scan {{ f.id }}: probability {{ '%.3f' % f.probability }}, {{ truth }}; slices
{% for s in f.slices %}{{ s + 1 }}{{ ', ' if not loop.last }}{% endfor %} of {{ e.depth }}{% endset %}
<figure class="card">{{ image(f.id, picture(f.id, label), label ~ '. ' ~ note ~ ', with the relevance in each') }}
<figcaption>{{ note }}</figcaption></figure>{% endfor %}</div>
{% else %}<p>No finding was called.</p>{% endfor %}{% endmacro %}
{% macro training(results, select) %}
{{ image('Training', chart(draw_progress(results, select)), 'Losses, figures and learning rate by epoch') }}
{% endmacro %}
{% macro page(name, runs, chapters, script, digest) %}<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{{ digest }}'">
<title>{{ name }}: SigLIP on chest CT</title><style>
:root { color-scheme: light dark; --soft: light-dark(#566070, #a7b1be); --paper: light-dark(#fff, #11151b);
  --card: light-dark(#f5f6f8, #1a2028); --line: light-dark(#ccd2da, #38424f); --link: light-dark(#1a63d8, #71b2ff) }
body { margin: auto; max-width: 84rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; background: var(--paper);
  overflow-wrap: anywhere } * { box-sizing: border-box } a { color: var(--link) } nav a, p span { margin-right: 1rem }
h2 { margin: 2rem 0 1rem; border-bottom: 2px solid var(--line) } h4, figure { margin: .5rem 0 } p, dd { margin: 0 }
small, figcaption { display: block; color: var(--soft); font-size: .8rem; font-weight: 400 }
p, dd { max-width: 75ch } .skip:not(:focus) { position: absolute; left: -99rem } dt, b { font-weight: 600 }
dl { display: grid; grid-template-columns: fit-content(30%) minmax(0, 1fr); gap: .3rem 1rem }
.grid { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--w)), 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.card > b { display: block; font-size: 1.7rem; line-height: 1.2 } ul { list-style: none; padding: 0 }
img { display: block; width: 100% } .wide { overflow-x: auto } .wide img { min-width: 34rem; max-width: 60rem }
.wide.more::before { content: "↔ scrolls sideways"; display: block; color: var(--link); font-size: .8rem }
table { border-spacing: 0; font-size: .8rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .25rem .2rem; text-align: right; border-top: 1px solid var(--line); vertical-align: top }
td { white-space: nowrap } td small { font-size: .87em }
th:first-child { position: sticky; left: 0; background: var(--paper); text-align: left; font-weight: inherit;
  min-width: min(8.5rem, 36vw); max-width: 40vw; overflow-wrap: anywhere }
@media screen and (prefers-color-scheme: dark) { img[src*=svg] { filter: invert(1) hue-rotate(180deg) } }
@media print { :root { color-scheme: light } @page { size: A4 landscape; margin: 10mm } table { font-size: 6.5pt }
  th, td { padding: 1pt } nav, .wide.more::before { display: none } tr, .card, section section { break-inside: avoid }
  .wide img { min-width: 0; max-height: 150mm; object-fit: contain } }
</style></head><body><a class="skip" href="#main">Skip to the results</a><h1>{{ name }}</h1>
<p>SigLIP on chest CT: research, not for diagnosis.</p>{% for title, run in runs.items() %}<p><span>{{ title }}:</span>
{% for key, value in run.items() %}{% set sum = run.get(key ~ ' digest') or run.get(key ~ ' SHA-256') %}
{% if sum or key in ('date', 'version', 'device') %}<span>{{ key }} <b>{{ value }}</b>
{{ '(' ~ sum[:12] ~ ')' if sum }}</span>{% endif %}{% endfor %}</p>
<details><summary>All facts</summary>{{ facts(run) }}</details>{% endfor %}<nav aria-label="Sections">
{% for title in chapters %}<a href="#part{{ loop.index0 }}">{{ title }}</a> {% endfor %}</nav><main id="main">
{% for title, body in chapters.items() %}<section><h2 id="part{{ loop.index0 }}">{{ title }}</h2>{{ body }}</section>
{% endfor %}<h2>How it was computed</h2><dl>
<dt>Scans and labels</dt><dd>What is unknown is left out of every figure. One that is undefined (0 / 0) shows as a dash
and enters no macro average. A probability at or above the label's threshold counts as positive.</dd>
<dt>Intervals</dt><dd>95 % percentile bootstrap over patients, each drawn with all scans, model and thresholds fixed:
how a figure would vary with other patients, not with another training run. Those of the calibration error are
centred on the figure, since resampling adds to it.</dd>
<dt>Macro, micro</dt><dd>The mean over labels; all known pairs of scan and label pooled (accuracy and CRG on top).</dd>
<dt>Average precision</dt><dd>The sum over distinct scores of the gain in recall times the precision there.</dd>
<dt>Calibration error</dt><dd>The mean over {{ CALIBRATION_BINS }} bins of equal width, weighted by their scans, of
|mean probability − share of positives|.</dd>
<dt>CRG</dt><dd>With X pairs, A positive, r = (X − A) / 2A, U = (X − A) / 2, s = r·TP − r·FN − FP: U / (2U − s), as in
the VLM3D challenge. 1/3 for a model that calls nothing.</dd></dl></main><script>{{ script }}</script></body></html>
{% endmacro %}
"""


def data_address(content: bytes, kind: str) -> str:
    """An image inside the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def chart(figure: Any) -> str:
    """A matplotlib figure as SVG, whose text stays text; the same data gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}), io.BytesIO() as buffer:
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return data_address(buffer.getvalue(), "svg+xml")


def draw_curves(e: dict, i: int) -> Any:
    """ROC, precision by recall and calibration of a label that has both classes, with dots at its threshold."""
    from matplotlib.figure import Figure
    from sklearn.metrics import precision_recall_curve, roc_curve

    known, row = np.isfinite(e["targets"][:, i]), e["metrics"]["per_label"][e["labels"][i]]
    y, p = e["targets"][known, i] == 1, e["probabilities"][known, i]
    called, bins = p >= e["cuts"][i], np.minimum((p * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    n, sums, found = (np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, p, y))
    enough = n >= FEWEST_IN_BIN
    figure = Figure((9, 3.1))
    figure.subplots_adjust(0.06, 0.16, 0.99, 0.9, 0.25)
    roc, pr, calibration = axes = figure.subplots(1, 3)
    roc.plot([0, 1], [0, 1], "C7:", *roc_curve(y, p)[:2], "C0-", called[~y].mean(), called[y].mean(), "C0o")
    pr.plot([0, 1], [y.mean()] * 2, "C7:", called[y].mean(), y[called].mean() if called.any() else math.nan, "C0o")
    pr.plot(*precision_recall_curve(y, p)[1::-1], "C0-", drawstyle="steps-post")
    calibration.plot([0, 1], [0, 1], "C7:", sums[enough] / n[enough], found[enough] / n[enough], "C0o-")
    names = (("1 − specificity", "sensitivity"), ("recall", "precision"), ("mean probability", "share positive"))
    for axis, key, (x, name) in zip(axes, ("auc", "average_precision", "ece"), names, strict=True):
        axis.set(title=f"{REPORT_COLUMNS[key]} {shown(row[key])}", xlabel=x, ylabel=name)
        axis.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, 0.5, 1])
    return figure


def write_report(folder: Path) -> Path:
    """report.html from the files in a run's folder alone: evaluation_*.json, explanations_*.json, run.json,
    results.jsonl and the pictures. Raises BadInput."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def picture(*whose: str) -> str:
        path = picture_path(folder, *whose)
        return data_address(path.read_bytes(), "png") if path.is_file() else ""

    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    parts: Any = environment.from_string(REPORT_TEMPLATE).make_module(globals() | {"picture": picture})
    chapters: dict[str, str] = {}
    titles = {"evaluation": "{} split", "explanations": "Why the model said so, {} split"}
    for kind, title in titles.items():
        for path in sorted(folder.glob(f"{kind}_*.json"), key=lambda path: ("_test" not in path.stem, path.stem)):
            content = read_evaluation(path) if kind == "evaluation" else read_json(path)
            with reading(path):
                chapters[title.format(content["split"])] = getattr(parts, kind)(content, f"part{len(chapters)}")
    if not chapters:
        raise BadInput(f"{folder} holds no evaluation_*.json: train, or use --test-only on scans with labels, first")
    run = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    runs = {title: run.pop(title) for title in list(run) if title.startswith("Run")}
    if (history := folder / "results.jsonl").is_file():
        with reading(history):
            results = [json.loads(line) for line in history.read_text().splitlines()]
            select = run.get("Settings, training", {}).get("select", "macro_f1")
            chapters["Training"] = parts.training(results, select)
    chapters |= {title: parts.facts(content) for title, content in run.items()}
    name = " ".join([folder.resolve().name, *sorted(facts["date"] for facts in runs.values() if "date" in facts)[-1:]])
    digest = base64.b64encode(hashlib.sha256(REPORT_SCRIPT.encode()).digest()).decode()
    page = parts.page(name, runs, chapters, Markup(REPORT_SCRIPT), digest)
    save_bytes(folder / "report.html", page.encode("utf-8", "replace"))
    return folder / "report.html"


# ── 13 Main ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# A run as a table of contents: training, then prediction, then what needs no model.


def provenance(args: argparse.Namespace, runtime: Runtime, weights: dict[str, str]) -> dict[str, Any]:
    """The facts in log, run.json and report that tell two runs apart; `weights` holds names and digests."""
    facts = {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": args.command, **weights, "version": __version__}
    for name, path in (("table", args.csv), ("script", Path(__file__))):
        if path:
            facts |= {name: path.name, f"{name} SHA-256": hashlib.sha256(path.read_bytes()).hexdigest()}
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "CPU"
    precision = str(runtime.amp_dtype or torch.float32).removeprefix("torch.")
    facts |= {"device": device, "precision": precision, "processes": runtime.world_size}
    facts |= {"threads": torch.get_num_threads(), "Python": platform.python_version()}
    packages = ("torch", "transformers", "monai", "numpy", "scikit-learn")
    facts |= {name: importlib.metadata.version(name) for name in packages}
    for name, value in facts.items():
        log.log(DETAIL, "%s: %s", name, value)
    return facts


def build_datasets(args: argparse.Namespace, tables: Sequence[Table], prep: Preprocessing) -> list[CTVolumeDataset]:
    """A dataset for each table, all of them behind one cache if `--cache-dir` asks for it."""
    cache = VolumeCache(args.cache_dir, prep) if args.cache_dir else None
    return [CTVolumeDataset(table, prep, cache, args.on_bad_volume) for table in tables]


def build_model(args: argparse.Namespace, table: Table, runtime: Runtime) -> tuple[SiglipClassifier, Preprocessing]:
    """The classifier on its pretrained backbone, partly frozen as asked, and the way from file to input."""
    backbone = load_backbone(args.pretrained, image_size=args.image_size, heads=args.backbone_heads)
    prep = decide_preprocessing(table, backbone.default_grid, backbone.windows, args)
    if prep.intensity == "windowed":
        adapt_channels(backbone, prep.channels)
    freeze_up_to(backbone, args.freeze_up_to)
    seed_everything(args.seed)  # whatever the backbone's construction drew, what is new starts the same
    if args.lora_rank:
        add_lora(backbone, args.lora_rank)
    head = len(table.labels), args.slice_pooling, args.dropout_rate, args.skip_air
    model = SiglipClassifier(backbone, prep.windows, prep.intensity, *head)
    targets = table.split("train").targets
    known, positive = (~np.isnan(targets)).sum(0), (targets == 1).sum(0)
    for label in np.array(table.labels)[known == 0]:
        log.warning("%s: no training scan has a known value, so this output will not learn", label)
    model.set_prevalence(torch.from_numpy(np.where(known > 0, positive / np.maximum(known, 1), 0.5)).float())
    return model.to(runtime.device), prep


def announce_steps(schedule: Schedule, steps_per_epoch: int, patience: int) -> None:
    """Log how many optimiser steps there are and where warm-up ends; warn where warm-up takes too much of them."""
    warmup, total, epochs = schedule.warmup, schedule.total_steps, schedule.warmup / steps_per_epoch
    ends = f"warm-up ends after {warmup} (epoch {epochs:.1f})" if warmup else "no warm-up"
    log.info("%d optimiser steps at most, %d an epoch; %s", total, steps_per_epoch, ends)
    if warmup > 0.2 * total or 0 < patience < epochs:
        log.warning("--warmup takes more than a fifth of all steps, or outlasts --early-stopping-patience: 5% is usual")


# Resuming. A run goes on only where nothing that affects numbers has changed, so that what it ends with is what it
# would have ended with unstopped. All arguments count but these, which change no more than rounding, only lengthen the
# run, or are compared by what they lead to: the weights read, say, and not the path they lie at.
RESUME_MAY_CHANGE = {
    "early_stopping_patience", "num_workers", "log_interval", "wandb_project", "wandb_mode", "resume", "overwrite",
    "output_dir", "save_every_minutes", "test_output", "test_split", "aggregate", "bootstrap", "epochs", "explain",
    "threshold_objective", "allow_patient_overlap", "cache_dir", "on_bad_volume", "check_data", "format", "config",
    "command", "soup", "use_3channel", "wandb_log_model", "csv", "pretrained", "amp", "orientation", "intensity",
    "num_slices", "threshold", "cache_features", "slice_chunk", "grad_checkpointing", "compile", "deterministic",
}  # fmt: skip


class Run:
    """A training run with all its parts. Once they are read, checked and built, only time can go wrong."""

    def __init__(self, args: argparse.Namespace, runtime: Runtime, stop: StopRequest, folder: RunFolder):
        self.args, self.runtime, self.stop, self.folder, self.tracker = args, runtime, stop, folder, Tracker()
        self.table = read_table(args.csv, args.label_columns, allow_patient_overlap=args.allow_patient_overlap)
        for name in ("train", "val"):
            if not (self.table.split(name).targets == 1).any():
                raise BadInput(f"{args.csv}: no row of split {name} has a positive label; training needs train and val")
        model, prep = build_model(args, self.table, runtime)
        shape = (prep.channels, *prep.grid)
        if runtime.device.type == "cuda" and args.deterministic == "on":
            add_in_fixed_order(model, sample_volume(model, shape, runtime), runtime)
        plan = plan_memory(args, model, shape, runtime)
        maybe_compile(model, args.compile, runtime)
        if runtime.is_main:
            check_data(self.table, prep, folder.path / "data_check.png", skip=args.on_bad_volume == "skip")
        parts: Sequence[CTVolumeDataset] = build_datasets(args, [self.table.split(name) for name in SPLITS], prep)
        self.recipe = Recipe(
            args.batch_size, args.gradient_accumulation_steps, args.max_grad_norm, args.num_workers,
            augment=args.augment, intensity=prep.intensity, seed=args.seed, log_interval=args.log_interval,
        )  # fmt: skip
        if args.cache_features:
            apply_memory_plan(model, *plan)
            parts = [cache_features(args.cache_features, model, part, self.recipe, runtime) for part in parts]
            self.recipe = dataclasses.replace(self.recipe, num_workers=0, augment="none")
        self.train, self.val, self.test = parts
        self.history = History(skipped={name: part.skipped for name, part in zip(SPLITS, parts, strict=True)})
        self.loss_fn = build_loss(args, self.train.table.targets).to(runtime.device)
        steps_per_epoch = len(plan_epoch(self.train.table.targets, self.recipe, runtime, 0))
        self.state = TrainState(
            distribute(model, runtime), build_optimizer(args, model), build_scheduler(args, steps_per_epoch),
            torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype == torch.float16),
            Ema(model) if args.use_ema else None,
            loss_sum=torch.zeros((), dtype=torch.float64, device=runtime.device),
        )  # fmt: skip
        batch = args.batch_size, runtime.world_size, args.gradient_accumulation_steps
        scans = f"{len(self.train)} training, {len(self.val)} validation scans"
        log.info("%s; effective batch %d = %d x %d processes x %d accumulated", scans, math.prod(batch), *batch)
        announce_steps(self.state.schedule, steps_per_epoch, args.early_stopping_patience)
        self.describe(model, prep, plan)
        # A stop need not wait for data; with several ranks it does, for the others go on to the next step.
        self.waiting: Callable[[], AbstractContextManager] = stop.waiting if runtime.world_size == 1 else nullcontext
        self.saved_at = time.monotonic()
        self.saved: tuple[int, ...] = ()  # the position that the last commit holds

    def describe(self, model: SiglipClassifier, prep: Preprocessing, plan: list[int]) -> None:
        """Put down, in plain types, what checkpoints tell besides weights and what a resumed run is compared with."""
        args, labels, weights = self.args, list(self.table.labels), digest_of(cpu_weights(model.backbone))
        rows = []
        for table in (self.train.table, self.val.table):
            sizes = [path.stat().st_size if path.is_file() else 0 for path in table.paths]
            rows.append([table.series_ids, table.targets.tolist(), sizes])
        self.setup = {
            "labels": labels,
            "preprocessing": prep.to_dict(),
            "backbone": model.backbone.config,
            "head": {"pooling": args.slice_pooling, "dropout": args.dropout_rate, "skip_air": args.skip_air},
            "thresholds": resolve_thresholds(args.threshold, labels, np.full(len(labels), 0.5)).tolist(),
            "select": args.select,
            "origin": {"pretrained": args.pretrained, "pretrained digest": weights},
        }
        self.settings = settings = json.loads(json.dumps(vars(args), default=str))
        how = {"compile": args.compile, "deterministic": args.deterministic}
        self.facts = provenance(args, self.runtime, self.setup["origin"]) | how
        compared = {
            **{f"--{name.replace('_', '-')}": x for name, x in settings.items() if name not in RESUME_MAY_CHANGE},
            "digest of the training and validation rows": digest_of(rows),
            "digest of the pretrained weights": weights,
            "preprocessing": self.setup["preprocessing"],
            "use of cached features": bool(args.cache_features),
            "thresholds (--threshold)": self.setup["thresholds"],
            "precision": self.facts["precision"],
            "number of processes": self.runtime.world_size,
        }
        kept = {"epochs": args.epochs, "plan": plan, "tracker": secrets.token_hex(4)}  # the run's id there
        self.identity: dict[str, Any] = {"compared": compared, "facts": self.facts, **kept}

    @property
    def position(self) -> tuple[int, ...]:
        return self.state.epoch, self.state.micro, self.state.schedule.steps, self.state.skipped

    def save(self) -> None:
        """Commit the state as it is now, between two steps, unless the last commit is of this very step."""
        if self.position != self.saved:
            losses = of_all_ranks(self.runtime, self.state.loss_sum.item())
            if self.runtime.is_main:
                self.folder.commit(pack_state(self.state, losses, self.history, self.identity))
            self.saved = self.position
        self.saved_at = time.monotonic()

    def poll(self, may_save: bool = False) -> None:
        """Leave by Interrupted if a signal has come to one of the ranks; save where it is time to. All ranks alike."""
        due = may_save and time.monotonic() - self.saved_at > 60 * self.args.save_every_minutes > 0
        signal_number, due = agree(self.runtime, self.stop.signal_number, due)
        if signal_number:
            raise Interrupted(signal_number)
        if due:
            self.save()

    def predict(self, dataset: CTVolumeDataset, title: str) -> np.ndarray:
        """Logits (n, L) of the model as it is now; may end in Interrupted."""
        how = self.recipe, self.runtime, title, self.poll, self.waiting, dataset is self.val  # which is read each epoch
        logits = predict(self.state.model, dataset, *how)
        self.poll()
        return logits

    def redo_files(self) -> None:
        """Bring what follows from the last commit in line with it; a picture is no reason to stop."""
        self.folder.derive(self.history)
        with optional("progress.png"):
            results = [json.loads(line) for line in self.history.lines]
            save_figure(self.folder.path / "progress.png", draw_progress(results, self.args.select))


def check_folder(args: argparse.Namespace, folder: RunFolder) -> RunFolder | None:
    """The run to resume, None for a new one: `--resume auto` is --output-dir, else a folder or the last.ckpt in it.

    Raises BadInput where --output-dir holds a run that was not asked for; touches nothing.
    """
    elsewhere = args.resume not in (None, "auto")
    path = Path(args.resume) if elsewhere else folder.path
    source = RunFolder(path.parent if path.name == folder.last.name else path)
    found = bool(args.resume and source.ours(STATE))
    if elsewhere and not found:
        raise BadInput(f"{args.resume} holds no run to resume: name its folder, or its {folder.last.name}")
    mine = found and source.path.resolve() == folder.path.resolve()
    in_the_way = set(RUN_FILES) - ({CHECKPOINT} if found else set())  # these a resume that was cut short has left here
    if not mine and not args.overwrite and folder.ours(*in_the_way):
        what = "a run: --resume auto continues it," if folder.ours(STATE) else "files of a run that is gone:"
        raise BadInput(f"{folder.path} holds {what} --overwrite replaces it, or choose another --output-dir")
    return source if found else None


def resume_run(run: Run, source: RunFolder) -> None:
    """Go on from the last commit, once it is certain that nothing which affects numbers has changed."""
    (file, content), history, now = source.load(), run.history, run.identity
    with reading(file):
        then = content["identity"]
        pairs = {name: (then["compared"].get(name), value) for name, value in now["compared"].items()}
        changed = [f"{name} was {old!s:.200}, now {new!s:.200}" for name, (old, new) in pairs.items() if old != new]
        if now["epochs"] < then["epochs"]:
            changed.append(f"--epochs was {then['epochs']}, now {now['epochs']}: it can only grow")
        if changed:
            raise BadInput(*(f"{source.path} can't be resumed: {difference}" for difference in changed))
        free = "date", "command", "pretrained", "table", "table SHA-256", "script"
        for name, value in now["facts"].items():
            if name not in free and (before := then["facts"].get(name)) != value:
                log.warning("%s was %s, now %s: bits may differ", name, before, value)
        slices = run.args.batch_size * now["compared"]["preprocessing"]["grid"][0]
        now["plan"] = keep_plan(run.args, unwrap(run.state.model), slices, run.runtime, then["plan"], now["plan"])
        now["tracker"] = then["tracker"]
        run.setup["origin"]["pretrained"] = then["facts"]["pretrained"]  # not where the same weights lie now
        restore_state(content, run.state, history, run.runtime.rank)
    source.load_top(history, run.setup["thresholds"])
    mark = derive_seed(*run.position)
    if agree(run.runtime, mark, -mark) != [mark, -mark]:  # and nobody removes what another still reads
        raise BadEnvironment(f"{source.path}: the processes of this run don't find the same state there")
    if run.runtime.is_main:
        if source.path.resolve() != run.folder.path.resolve():
            for name in history.digests.keys() & history.names:
                link_atomic(source.path / name, run.folder.path / name)
            run.folder.commit(content)
        elif file != source.last:  # or the next commit would keep the damaged one as the previous state
            link_atomic(file, source.last)
        run.redo_files()
    run.saved = run.position
    log.info("resumed %s after epoch %d, forward pass %d", source.path, run.state.epoch, run.state.micro)
    if now["epochs"] != then["epochs"] and run.args.scheduler == "cosine":
        log.warning("--epochs has grown: the cosine schedule goes on along the curve of the new length, so it jumps up")


def start_or_resume(run: Run, source: RunFolder | None) -> None:
    """Begin with an empty folder, or where another run has left off."""
    folder = run.folder
    if any(agree(run.runtime, bool(source))):  # a disk may show ranks on other machines different things
        resume_run(run, source or folder)
    elif run.runtime.is_main:
        if run.args.resume:
            log.info("--resume auto: %s holds no run yet, so a new one starts", folder.path)
        folder.clear()
    if run.runtime.is_main:  # at its largest moment there are three states, the top k, one more and the best
        weights, moments = tensor_bytes(unwrap(run.state.model).state_dict()), 2 if run.args.optimizer == "adamw" else 1
        state = weights + tensor_bytes(optimized(run.state)) * (moments + bool(run.state.ema))
        present = sum(file.stat().st_size for file in folder.ours(*RUN_FILES))
        require_space(folder.path, max(0, 3 * state + weights * (TOP_K + 2) - present))


def validate(run: Run, title: str = "validate") -> dict[str, Any]:
    """Loss and metrics of the model as it is now over the known labels of split val."""
    dataset, device = run.val, run.runtime.device
    logits = run.predict(dataset, title)
    loss = run.loss_fn(torch.from_numpy(logits).to(device), torch.from_numpy(dataset.targets).to(device)).item()
    if not math.isfinite(loss):
        raise Diverged(f"the validation loss is {loss} after epoch {run.state.epoch + 1}: lower --lr or add --warmup")
    metrics = compute_metrics(dataset.targets, sigmoid(logits), dataset.table.labels, np.array(run.setup["thresholds"]))
    if metrics["macro_average_precision"] is None:
        raise BadInput("split val: no scan with a positive label could be read, so nothing tells which epoch is better")
    return {"val_loss": loss, **metrics}


def report_epoch(run: Run, seconds: float, saved: str) -> None:
    """What a person sees of the last epoch: a line on the console, the table in the log, figures in the tracker."""
    *before, line = map(json.loads, run.history.lines)
    losses = "loss {}, val {}".format(*(shown(line[name]) for name in ("train_loss", "val_loss")))
    scores = "AUROC {}  AP {}  F1 {}".format(*(shown(line[f"macro_{x}"]) for x in ("auc", "average_precision", "f1")))
    cost = f"rate {line['lr']:.1e}  {seconds:.0f} s"
    mark = "  * best" if run.history.is_best(line["epoch"]) else ""
    log.info("epoch %3d/%d  %s  %s  %s%s%s", line["epoch"], run.args.epochs, losses, scores, cost, saved, mark)
    log_metrics_table(line, DETAIL)
    if line["micro_precision"] is None and all(earlier["micro_precision"] is not None for earlier in before):
        found = f"no validation scan is called positive so far (macro AUROC {shown(line['macro_auc'])}): F1 is 0"
        advice = "--threshold auto tunes thresholds on val at the end, a lower one lets F1 count now"
        log.warning("%s, so macro average precision tells which epoch is better; %s", found, advice)
    run.tracker.record(run.history.lines)


def run_epoch(run: Run) -> None:
    """Train, validate, rank, commit, and only then let the other files follow."""
    state, history, started = run.state, run.history, time.perf_counter()
    epoch, between_steps = state.epoch + 1, partial(run.poll, may_save=True)
    figures = train_one_epoch(state, run.train, run.loss_fn, run.recipe, run.runtime, between_steps, run.waiting)
    seconds = figures.pop("seconds")
    with state.weights:
        metrics = validate(run)
        key = comparison_key(metrics, run.args.select)
        gained = history.offer(key, epoch)
        content = pack_model(state.model, run.setup, epoch, metrics) if gained else {}
    history.lines.append(json.dumps({"epoch": epoch, **figures, **metrics}, allow_nan=False))
    state.schedule.end_epoch(key)
    state.next_epoch()
    if history.is_best(epoch):
        history.best = content
    name = checkpoint_name(epoch)
    if gained and run.runtime.is_main:
        history.digests[name] = save_checked(run.folder.path / name, content)
    run.save()
    if run.runtime.is_main:
        run.redo_files()
        report_epoch(run, time.perf_counter() - started, f"  {name}" if gained else "")
        if epoch == 2 and seconds["data"] > seconds["train"] and not run.args.cache_features:
            log.warning("most of training waits for data: raise --num-workers, or keep volumes with --cache-dir")


def readable(dataset: CTVolumeDataset, logits: np.ndarray, over: str) -> tuple[CTVolumeDataset, np.ndarray]:
    """The scans that could be read and their probabilities, of logits averaged as `--aggregate` says."""
    rows = [row for row in range(len(dataset)) if row not in dataset.skipped]
    table, logits = dataset.table.subset(rows), logits[rows].astype(np.float64)
    if wrong := [name for name, row in zip(table.series_ids, logits, strict=True) if not np.isfinite(row).all()]:
        raise Diverged(f"the logits of {', '.join(wrong[:20])} are not finite; leave out --amp")
    logits = aggregate_logits(logits, table.series_ids, table.patient_ids, over)
    return CTVolumeDataset(table, dataset.prep, None, dataset.on_bad_volume), sigmoid(logits)


def prediction_path(args: argparse.Namespace) -> Path:
    """Where `--test-output` lies."""
    return args.test_output if args.test_output.parent != Path() else args.output_dir / args.test_output


def write_facts(args: argparse.Namespace, title: str, facts: dict[str, Any], table: Table) -> None:
    """The run's facts, and the report where there is something to report; neither is a reason to stop."""
    save_run(args.output_dir, title, facts, args, table)
    if any(list(args.output_dir.glob(f"{kind}_*.json")) for kind in ("evaluation", "explanations")):
        with optional("report.html"):
            log.info("report: %s", write_report(args.output_dir))


def publish_all(
    args: argparse.Namespace, title: str, facts: dict[str, Any], table: Table, model: SiglipClassifier,
    parts: dict[str, tuple[CTVolumeDataset, np.ndarray]], thresholds: np.ndarray, tuned_for: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Write what people read of some splits' probabilities (n, L): scores, pictures, report, predictions of the last.

    `tuned_for`: the objective that thresholds were tuned for on split val, if they were. Returns the metrics of each
    split that has labels.
    """
    figures = {}
    labelled = [split for split, (dataset, _) in parts.items() if not np.isnan(dataset.targets).all()]
    for split, (dataset, probabilities) in parts.items():
        if split in labelled:
            level = logging.INFO if split == labelled[-1] else DETAIL  # one table is enough for the console
            how = thresholds, tuned_for if split == "val" else None, args.bootstrap, args.seed, level
            figures[split] = publish(args.output_dir, split, dataset.table, probabilities, *how)["metrics"]
            draw_most_wrong(args.output_dir, dataset, probabilities, thresholds)
        if args.explain:
            which = thresholds, args.explain, args.num_workers
            explain_split(args.output_dir, split, dataset, model, probabilities, *which)
        else:  # those of an earlier model must not stand beside these figures
            (args.output_dir / f"explanations_{split}.json").unlink(missing_ok=True)
    *_, (dataset, probabilities) = parts.values()
    output = prediction_path(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_rows(output, prediction_rows(dataset.table.series_ids, probabilities, thresholds, table.labels))
    log.info("predictions of %d scans: %s", len(dataset), output)
    write_facts(args, title, facts, table)
    return figures


def finish_run(run: Run) -> None:
    """Evaluate the best weights, which are still in memory, and write what people read."""
    args, best, path = run.args, run.history.best, run.folder.path / "best_model.pth"
    if best is None:
        raise BadInput(f"{path.parent}: no checkpoint of a finished epoch is left; start anew with --overwrite")
    model = unwrap(run.state.model)
    drop_lora(model)  # what was saved is merged
    log.info("best of %d epochs by %s: epoch %d", run.state.epoch, args.select, best["epoch"])
    if args.soup and len(run.history.names) > 1:  # the mean of the best epochs, where it compares better
        mean = mean_weights([load_checked(run.folder.path / x, MODEL_KIND)["model"] for x in run.history.names])
        model.load_state_dict(mean)
        metrics, epochs = validate(run, "soup"), [epoch for _, epoch in run.history.entries]
        better = comparison_key(metrics, args.select) > run.history.entries[0][0]
        verdict = "kept as best_model.pth" if better else f"not better, epoch {best['epoch']} stays"
        log.info("mean of epochs %s: val %s %s: %s", epochs, args.select, shown(metrics[args.select]), verdict)
        best = best | {"model": mean, "metrics": metrics, "averaged_epochs": epochs} if better else best
    model.load_state_dict(best["model"])
    datasets = {"val": run.val, **({"test": run.test} if len(run.test) else {})}
    parts = {split: readable(part, run.predict(part, split), args.aggregate) for split, part in datasets.items()}
    run.stop.patient = not run.runtime.is_main  # all is saved: a stop need not wait, and the others wait for rank 0
    if not run.runtime.is_main:
        return
    val, probabilities = parts["val"]
    auto = tune_thresholds(val.targets, probabilities, args.threshold_objective)
    thresholds = resolve_thresholds(args.threshold, run.table.labels, auto)
    objective = args.threshold_objective if args.threshold == "auto" else None
    if "averaged_epochs" in best or thresholds.tolist() != best["thresholds"]:
        best |= {"thresholds": thresholds.tolist(), "tuned_for": objective}
        save_checked(path, best)
    write_skipped(path.with_name("skipped.csv"), *[(x.table, x.skipped) for x in (run.train, run.val, run.test)])
    run.facts |= {"checkpoint": str(path), "checkpoint digest": digest_of(best)}
    figures = publish_all(args, "training", run.facts, run.table, model, parts, thresholds, objective)
    run.tracker.summarise({"best_epoch": best["epoch"], **figures})
    if args.wandb_log_model:
        run.tracker.keep_model(path, best["epoch"])


def train_to_the_end(run: Run) -> None:
    """Epoch after epoch until all are done, patience is over or a signal comes."""
    args, patience = run.args, run.args.early_stopping_patience
    try:
        run.save()  # a new run: no file that counts is ever without a last.ckpt beside it
        if run.runtime.is_main:
            save_run(args.output_dir, "training", run.facts, args, run.table)
        while run.state.epoch < args.epochs:
            if 0 < patience <= run.history.epochs_without_gain:
                log.info("no better %s for %d epochs: stopping early", args.select, run.history.epochs_without_gain)
                break
            run.poll(may_save=True)
            run_epoch(run)
        finish_run(run)
    except (Interrupted, BadVolume) as reason:
        if isinstance(reason, Interrupted) or run.runtime.world_size == 1:  # else the others don't know of it
            run.save()
            log.info("the state is saved: --resume auto goes on from epoch %d", run.state.epoch + 1)
        raise
    finally:  # libraries keep frames that hold the run, and the collector waits half a minute for readers, which stay
        run.train.loader = run.val.loader = None


def run_training(args: argparse.Namespace, runtime: Runtime, stop: StopRequest) -> int:
    """Fine-tune, keep the best, predict."""
    folder = RunFolder(args.output_dir)
    source = check_folder(args, folder)
    with folder.locked() if runtime.is_main else nullcontext():
        setup_logging(args.output_dir, runtime.is_main)
        try:
            run = Run(args, runtime, stop, folder)
            start_or_resume(run, source)
            apply_memory_plan(unwrap(run.state.model), *run.identity["plan"])
            known = run.settings, folder.path, run.identity["tracker"]
            with start_wandb(args.wandb_project, args.wandb_mode, *known) as run.tracker:
                run.tracker.record(run.history.lines)
                stop.patient = True
                train_to_the_end(run)
        except (Exception, Interrupted) as error:
            if runtime.is_main and isinstance(stop.reason(error), Interrupted):
                save_bytes(folder.stopped, f"{stop.reason(error)}\n".encode())
            raise
    return 0


def table_of_scans(named: Sequence[Path], labels: Sequence[str]) -> Table:
    """A table without labels of the scans named, and of all below the folders named; their ids are their names.

    A name goes without the file's ending; of equal names, whole paths tell the scans apart. Raises BadInput.
    """
    if wrong := [problem for path in named if (problem := path_complaint(path))]:
        raise BadInput(*wrong)
    found = {text: os.path.basename(name) for path in named for name, text in find_scans(path)}
    if not found:
        raise BadInput(f"--images {' '.join(map(str, named))}: no scan (NPZ, b2nd, NIfTI, MHA, NRRD, DICOM) lies there")
    alike, n = Counter(found.values()), len(found)
    ids = [text if alike[name] > 1 else name for text, name in found.items()]
    if wrong := [f"the name {name!r} {reason}" for name in ids if (reason := unsafe_text(name))]:
        raise BadInput(*wrong)
    unknown = np.full((n, len(labels)), math.nan, np.float32)
    patients, paths = [patient_of(name, "") for name in ids], [Path(text) for text in found]
    return Table(tuple(labels), ids, patients, ["images"] * n, paths, unknown, list(range(1, n + 1)))


class Classifier:
    """Checkpoints of ours, ready to predict; the logits of several are averaged, each with its own preprocessing.

    `labels` (L), `thresholds` (L,), at or above which a probability is positive; with --threshold auto the checkpoint's
    own, and 0.5 for a mean; `modules`: the PyTorch models in eval mode, `module` the first of them. Raises BadInput.
    """

    def __init__(self, args: argparse.Namespace, runtime: Runtime):
        self.args, self.runtime = args, runtime
        found: dict[str, tuple[Path, dict[str, Any]]] = {}  # by digest: the same weights count once
        for path in args.test_only:
            files = (sorted(path.glob("*.pth")) or sorted(path.glob("*/best_model.pth"))) if path.is_dir() else [path]
            if not files:
                raise BadInput(f"{path}: holds no checkpoint (*.pth, or best_model.pth in the folders there)")
            for file in files:
                content = load_checked(file, MODEL_KIND)
                found.setdefault(digest_of([content["model"], content["preprocessing"]]), (file, content))
        self.contents = dict(found.values())
        (first, content), *others = self.contents.items()
        self.labels, self.several = content["labels"], bool(others)
        asked = {"--label-columns": args.label_columns or self.labels, **{str(path): c["labels"] for path, c in others}}
        for source, labels in asked.items():
            if labels != self.labels:
                foreign = ", ".join(label for label in labels if label not in self.labels) or "none"
                needed = " ".join(map(repr, self.labels))
                raise BadInput(f"{source}: {first} needs the labels {needed} in this order; unknown to it: {foreign}")
        own: dict[str, Any] = {"thresholds": [0.5] * len(self.labels)} if others else content
        self.thresholds = resolve_thresholds(args.threshold, self.labels, own["thresholds"])
        self.tuned_for = own.get("tuned_for") if args.threshold == "auto" else None
        self.origin = own.get("origin", {})
        self.modules = [classifier_from(each, path).to(runtime.device).eval() for path, each in self.contents.items()]
        self.module = self.modules[0]
        for module in self.modules:
            module.predict_chunk = args.slice_chunk or usual_chunk(runtime.device)

    def logits(self, table: Table) -> tuple[CTVolumeDataset, np.ndarray]:
        """A table's scans as the first model reads them, and their mean logits (n, L) float64."""
        args, sets, total = self.args, [], np.zeros((len(table), len(self.labels)))
        for content in self.contents.values():
            sets += build_datasets(args, [table], decide_preprocessing_like(content["preprocessing"], table, args))
        recipe = Recipe(args.batch_size, num_workers=args.num_workers)
        for module, dataset in zip(self.modules, sets, strict=True):
            total += predict(module, dataset, recipe, self.runtime).astype(np.float64) / len(sets)
            sets[0].skipped |= dataset.skipped
        return sets[0], total

    def predict(self, paths: Path | str | Sequence[Path | str]) -> pandas.DataFrame:
        """The columns of test_predictions.csv for these files, folders of DICOM, and all scans below other folders."""
        import pandas as pd

        named = [paths] if isinstance(paths, (str, Path)) else paths
        table = table_of_scans([Path(path) for path in named], self.labels)
        dataset, probabilities = readable(*self.logits(table), self.args.aggregate)
        header, *rows = prediction_rows(dataset.table.series_ids, probabilities, self.thresholds, self.labels)
        return pd.DataFrame(rows, columns=header)

    def tune(self, table: Table) -> None:
        """Set `thresholds` to those that are best for these logits on scans whose labels are known."""
        if np.isnan(table.targets).all():
            why = "thresholds of several checkpoints are tuned for their mean on split val, and no label is known there"
            raise BadInput(f"--threshold auto: {why}: give a number or a JSON file")
        dataset, probabilities = readable(*self.logits(table), self.args.aggregate)
        self.tuned_for = self.args.threshold_objective
        self.thresholds = tune_thresholds(dataset.targets, probabilities, self.tuned_for)


def load_classifier(*paths: str | Path, **settings: Any) -> Classifier:
    """A checkpoint of ours, or several whose logits are averaged, for use from Python.

    `settings` are arguments of the command line: `batch_size=4, orientation="RAS", amp=True`. Unless they say otherwise
    volumes are read in this process (`num_workers`), and thresholds are the checkpoint's own. Raises BadInput.
    """
    parser, argv = build_parser(), as_arguments(settings)
    args, _ = parser.parse_known_args(argv, argparse.Namespace(num_workers=0, threshold="auto"))
    if wrong := parser.unknown_flags(argv) + parser.wrong:
        raise BadInput(*wrong)
    args.test_only = [Path(path) for path in paths]
    return Classifier(args, init_runtime(args.amp))


@contextmanager
def results_folder(args: argparse.Namespace, is_main: bool = True) -> Iterator[RunFolder]:
    """--output-dir, locked. An earlier prediction's files are to go once there are new ones, not to stand beside them.

    Raises BadInput where it, or --test-output, holds another run's results and --overwrite does not say so.
    """
    folder, output = RunFolder(args.output_dir), prediction_path(args)
    taken = output if output.exists() else folder.path if folder.ours(*RUN_FILES) else None
    if taken and not args.overwrite:
        raise BadInput(f"{taken} holds results of another run: name another --output-dir, or --overwrite replaces them")
    with folder.locked() if is_main else nullcontext():
        yield folder


def run_test(args: argparse.Namespace, runtime: Runtime) -> int:
    """Predict with checkpoints of ours; where labels are known, score as well."""
    classifier = Classifier(args, runtime)
    labels = classifier.labels
    if classifier.several and args.explain:
        raise BadInput("--explain is about one model: name one checkpoint")
    table = table_of_scans(args.images, labels) if args.images else read_table(args.csv, labels, labels_required=False)
    split = "images" if args.images else args.test_split or ("test" if "test" in table.splits else "val")
    rows, names = table.split(split), ", ".join(map(str, classifier.contents))
    if not len(rows):
        raise BadInput(f"{args.csv}: no row has split {split}; --test-split names another")
    with results_folder(args, runtime.is_main) as folder:
        if classifier.several and args.threshold == "auto":
            classifier.tune(table.split("val"))
        log.info("predicting %d scans of split %s with %s", len(rows), split, names)
        dataset, logits = classifier.logits(rows)
        if runtime.is_main:
            parts = {split: readable(dataset, logits, args.aggregate)}
            folder.clear_prediction()  # nothing of it is lost to a prediction that fails
            write_skipped(args.output_dir / "skipped.csv", (rows, dataset.skipped))
            digests = ", ".join(map(digest_of, classifier.contents.values()))
            facts = provenance(args, runtime, classifier.origin | {"checkpoint": names, "checkpoint digest": digests})
            how = classifier.thresholds, classifier.tuned_for
            publish_all(args, "prediction", facts, rows, classifier.module, parts, *how)
    return 0


def read_predictions(path: Path, labels: Sequence[str] | None) -> tuple[list[str], dict[str, list[float]]]:
    """Labels (all, unless some are named) and each id's probabilities, of a table with `id` and `{label}_prob`.

    Raises BadInput with every error of it, each with its line.
    """
    wrong, found = Complaints(path), dict[str, list[float]]()
    header, rows = read_rows(path, wrong)
    labels = list(labels or [name.removesuffix("_prob") for name in header if name.endswith("_prob")])
    at = find_columns(header, ["id", *(f"{label}_prob" for label in labels or ["{label}"])], (), wrong).values()
    wrong.raise_if_any()
    for line, cells in rows:
        name, *texts = [cells[place] if len(cells) == len(header) else "" for place in at]
        try:
            values = [fraction(text) for text in texts]
            if found.setdefault(name, values) is not values:
                wrong.add("id", line, f"id {name!r} is there twice")
        except (ValueError, argparse.ArgumentTypeError):
            wrong.add("cells", line, "needs a probability from 0 to 1 in each column {label}_prob")
    wrong.raise_if_any()
    return labels, found


def run_score(args: argparse.Namespace) -> None:
    """Figures, intervals and report of predictions from anywhere, against the labels of a table."""
    labels, found = read_predictions(args.score, args.label_columns)
    table = read_table(args.csv, labels, allow_patient_overlap=True, volumes=False)
    split = args.test_split or next(name for name in ("test", "val", "train", "") if name in table.splits)
    table, title = table.split(split), split or "all"
    if (ids := set(table.series_ids)) != found.keys():
        odd = {args.score: found.keys() - ids, args.csv: ids - found.keys()}
        sides = [f"{len(some)} only in {file}: {', '.join(sorted(some)[:20])}" for file, some in odd.items() if some]
        what = f"{args.score} and {args.csv} ({title}) are not about the same scans"
        raise BadInput(f"{what}; --test-split names another split", *sides)
    probabilities = np.array([found[name] for name in table.series_ids])
    tuned = args.threshold_objective if args.threshold == "auto" else None
    auto = tune_thresholds(table.targets, probabilities, args.threshold_objective)
    thresholds = resolve_thresholds(args.threshold, table.labels, auto)
    with results_folder(args) as folder:
        folder.clear_prediction()
        publish(args.output_dir, title, table, probabilities, thresholds, tuned, args.bootstrap, args.seed)
        facts = provenance(args, Runtime(torch.device("cpu")), {"predictions": str(args.score)})
        write_facts(args, "scoring", facts, table)


def run_alone(args: argparse.Namespace) -> int:
    """What needs no model: a report made again, raw scans converted, a table checked, predictions scored."""
    if args.report:
        log.info("report: %s", write_report(args.report))
    elif args.prepare:
        prepare_table(args)
    elif args.check_data:
        table = read_table(args.csv, args.label_columns or (), labels_required=False)
        prep = decide_preprocessing(table, (64, 224, 224), WINDOW_PRESETS["chest"], args)
        check_data(table, prep, args.output_dir / "data_check.png", skip=args.on_bad_volume == "skip")
    else:
        run_score(args)
    return 0


def say_why(error: BaseException) -> int:
    """Say in one line why the run has ended; returns the exit code. What only a bug can raise is raised again."""
    text = " ".join(str(error).split())[:300]
    if not may_speak(error):
        log.setLevel(logging.CRITICAL)
    if isinstance(error, Interrupted):
        log.info("stopped by %s", error)
        end_readers()
        return 128 + error.number
    if isinstance(error, UserError):
        messages = list(error.messages)
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        advice = "lower --batch-size, --image-size or --num-slices, or add --amp"
        messages = [f"out of memory ({text.split('. ')[0] or 'in main memory'}); {advice}"]
    elif "DataLoader worker" in text and ("Caught" not in text or "shared memory" in str(error)):
        text = text if "Caught" not in text else "no space left in it"
        messages = [f"a process that reads has died ({text}); lower --num-workers or --batch-size, see /dev/shm"]
    elif is_lost(error):
        messages = [f"another process of this run has ended or hangs ({text}); --resume auto goes on from last.ckpt"]
    elif isinstance(error, OSError):
        messages = [f"{error.filename or 'the system'}: {error.strerror or text}: mend that, or name another path"]
    else:
        raise error
    for message in messages:
        log.error("%s", message)
    return error.code if isinstance(error, UserError) else BadEnvironment.code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with these arguments; returns the exit code."""
    args = parse_args(argv)
    setup_logging(None, is_main=own_rank() == 0)
    if args.use_3channel:
        log.info("--use-3channel: three windows (--windows) are what every model sees, so nothing changes")
    with StopRequest(patient=False) as stop:
        try:
            if args.report or args.prepare or args.check_data or args.score:
                return run_alone(args) if own_rank() == 0 else 0  # one process's work
            runtime = init_runtime(args.amp, args.deterministic == "on")
            log.info("finetune_siglip.py %s on %s", __version__, runtime.device)
            with together(runtime, stop):
                return run_test(args, runtime) if args.test_only else run_training(args, runtime, stop)
        except (Exception, Interrupted) as error:
            reason = stop.reason(error)
            stop.patient = True  # a launcher ends the other ranks with a signal: no reason to raise on the way out
            code = say_why(reason)
            leave(code)
            return code


if __name__ == "__main__":
    sys.exit(main())
