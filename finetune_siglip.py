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
import pickle
import re
import sys
import zipfile
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


@dataclass(frozen=True)
class Pretrained:
    """What a file holds: tensors keyed as the built backbone's `state_dict()`, and the `config` to build it."""

    family: str
    config: dict
    tensors: dict[str, Tensor]
    source: str
    notes: list[str]
    unused: list[str]  # names in the file that belong to no part of the image encoder


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
WEIGHT_FILES = (  # of a folder or hub model, in order of trust; BioViL's stand beside a text-only pytorch_model.bin
    *("biovil_t_image_model_proj_size_128.pt", "biovil_image_resnet50_proj_size_128.pt"),
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "best_model.pth"),
)
FOREIGN_FILES = (  # first bytes, what the file then is
    (b"version https://git-lfs", "a Git LFS pointer, not the weights: run `git lfs pull` there, or download it again"),
    (b"<", "a web page, not weights: the download met a login or error page; download it again"),
    (b"{", "JSON text, not weights"),
    (b"\x89HDF", "an HDF5 file (TensorFlow, Keras): export it as safetensors"),
    (b"GGUF", "a quantised GGUF file: use the original weights"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
)
LOOKS = (  # pattern of a tensor's name, what the file then seems to be
    (r"(^|\.)(rpn|roi_heads|bbox_embed|box_head|class_head|box_predictor|retina\w*)\.", "a detection model"),
    (r"lora_[AB]\.", "a LoRA adapter: merge it into its base model first"),
    (r"class_embedding$|\.resblocks\.", "a CLIP model, not SigLIP"),
    (r"(^|\.)cls_token$", "a plain ViT (ImageNet, MAE, DINO), not SigLIP"),
    (r"patch_embed(dings)?\.|patch_embedding\.", "a vision transformer without SigLIP's attention pooling"),
    (r"word_embeddings|token_embedding|embed_tokens|(^|\.)wte\.|text_model", "a text model without an image tower"),
    (r"decode_head|up_?blocks?\.|upconv|decoder\d*\.|swinViT", "a segmentation or generation model"),
    (r"(^|\.)layer[1-4]\.\d+\.conv1\.weight$", "a ResNet other than the 3D ResNet-152 and BioViL's"),
    (r"exp_avg", "the state of an optimiser"),
)
SUPPORTED = "--pretrained takes SigLIP towers (Hugging Face, open_clip, timm), the 3D ResNet-152 and BioViL(-T)"


def _locate(source: str) -> Path:
    """The weights file that a path or hub name stands for."""
    path = Path(source).expanduser()
    if path.is_dir():
        named = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        found = named[:1] or [file for file in sorted(path.iterdir()) if file.suffix in WEIGHT_SUFFIXES]
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:5]) or "none"
            raise BadInput(f"{path}: a folder should hold one weights file, found {names}: name the file")
        return found[0]
    if path.exists():
        if not path.is_file():
            raise BadInput(f"{path}: not a regular file")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.endswith(WEIGHT_SUFFIXES):
        raise BadInput(f"{source}: no such file or folder (--pretrained)")
    return _download(source)


def _download(name: str) -> Path:
    """The weights file of a hub model, its config and shards beside it: from the local cache, else from the network."""
    from huggingface_hub import errors, hf_hub_download, logging

    logging.set_verbosity_error()  # it retries a dead network for 20 s in ten lines of its own

    def fetch(filename: str, cached: bool) -> Path | None:
        try:
            return Path(hf_hub_download(name, filename, local_files_only=cached))
        except errors.LocalEntryNotFoundError:
            if cached:
                return None
            raise BadEnvironment(f"{name}: neither here nor in the hub's cache, and the hub is out of reach") from None
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError:
            raise BadInput(f"{name}: accept its terms on huggingface.co/{name}, then run `hf auth login`") from None
        except errors.RepositoryNotFoundError:
            raise BadInput(f"{name}: neither a file or folder here nor a model on the Hugging Face hub") from None
        except errors.HfHubHTTPError as error:
            raise BadEnvironment(f"{name}: the Hugging Face hub answered: {error}".splitlines()[0]) from None

    for cached in (True, False):
        config = fetch("config.json", cached)
        path = next((path for filename in WEIGHT_FILES if (path := fetch(filename, cached))), None)
        shards = _shards(path) if path and path.suffix == ".json" else []
        if path and all([fetch(shard, cached) for shard in shards]) and (config or not cached):
            return path
    raise BadInput(f"{name}: this hub model has no weights file of a known name; download it and name the file")


def _read_json(path: Path) -> dict:
    """A JSON object, or BadInput."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error}): download it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: a JSON object was expected")
    return found


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of sharded weights lists; they must lie beside it."""
    names = sorted({str(name) for name in dict(_read_json(index).get("weight_map", {})).values()})
    if not names or any(Path(name).name != name for name in names):
        raise BadInput(f"{index}: not an index of weight files lying beside it")
    return names


def _open_weights(path: Path) -> dict:
    """The content of a weights file: names and tensors, perhaps nested; memory-mapped, and nothing in it is run."""
    if path.suffix == ".json":
        return {k: v for name in _shards(path) for k, v in _flatten(_open_weights(path.parent / name))}
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    for start, what in () if safetensors else FOREIGN_FILES:  # a safetensors header may start with any byte
        if head.lstrip().startswith(start):
            raise BadInput(f"{path}: {what}")
    if head[257:262] == b"ustar":
        raise BadInput(f"{path}: a tar archive: unpack it first")
    try:
        if safetensors:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        if head.startswith(b"PK"):
            _refuse_other_archives(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        needs = re.search(r"(?:GLOBAL|class|global:?) ([A-Za-z_][\w.]*\.\w+)", str(error))
        held = f" ({needs[1]})" if needs else ""
        raise BadInput(
            f"{path}: reading it would run code that it names{held}, which this script does not do: "
            "where it was written, save the plain tensors, torch.save(model.state_dict(), FILE)"
        ) from None
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise BadInput(f"{path}: not readable as weights, damaged or incomplete ({reason}): get it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: holds a {type(found).__name__}, not named tensors. {SUPPORTED}")
    return found


def _refuse_other_archives(path: Path) -> None:
    """Zip archives that PyTorch did not write as plain tensors, by what is in them."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise BadInput(f"{path}: a TorchScript program: save its state_dict() instead")
    if any(name.endswith(".npy") for name in names):
        raise BadInput(f"{path}: a NumPy archive (a CT volume, or JAX weights): use the Hugging Face copy of the model")


def _flatten(node: dict, prefix: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested containers (`state_dict`, `model`, `ema` …) by dotted name, without what wrappers inserted."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield (
                re.sub(r"(?:(?<=\.)|^)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name),
                value,
            )
        elif isinstance(value, dict) and id(value) not in seen:
            yield from _flatten(value, name + ".", seen | {id(value)})


def _config_beside(path: Path) -> dict | None:
    """SigLIP's vision settings from the `config.json` beside a file, with the library's own defaults filled in."""
    file = path.parent / "config.json"
    if not file.is_file():
        return None
    found = _read_json(file)
    vision = found["vision_config"] if isinstance(found.get("vision_config"), dict) else found
    if "siglip" not in str(vision.get("model_type") or found.get("model_type")):
        return None
    defaults = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
    defaults |= {
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": True,
    }
    return {key: vision.get(key, default) for key, default in defaults.items()}


def read_pretrained(source: str | Path, heads: int | None = None) -> Pretrained:
    """Read a local file or folder, or a model of the Hugging Face hub; its tensors, not its name, tell the family.

    Tensors come as float32 and stay memory-mapped where the file has them so. `heads` overrides the number of
    attention heads. Raises BadInput with what the file seems to be where no known image encoder is in it.
    """
    path = _locate(str(source))
    raw = _open_weights(path)
    if raw.get("kind") == "finetune_siglip":
        return _own_checkpoint(raw, str(path))
    return read_tensors(dict(_flatten(raw)), str(path), _config_beside(path), heads)


def _own_checkpoint(raw: dict, source: str) -> Pretrained:
    """The backbone inside one of this script's own checkpoints."""
    state, config = raw.get("model"), raw.get("backbone")
    if raw.get("format") != 1 or not isinstance(state, dict) or not isinstance(config, dict):
        raise BadInput(f"{source}: a checkpoint of this script in a format that this version does not read")
    mine = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    unused = [k for k in state if not k.startswith("backbone.")]
    return Pretrained(config["family"], config, mine, source, ["a checkpoint of this script"], unused)


def read_tensors(
    tensors: dict[str, Tensor], source: str, sidecar: dict | None = None, heads: int | None = None
) -> Pretrained:
    """Find the image encoder among named tensors (`meta` ones too) and name them as this script's modules do."""
    anchor, prefix, notes = _find_encoder(tensors, source)
    inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        config, kept = READERS[anchor](inside, sidecar, heads, notes)
    except KeyError as error:
        raise BadInput(f"{source}: incomplete: {prefix}{error.args[0]} is missing") from None
    except (ValueError, IndexError, RuntimeError) as error:
        raise BadInput(f"{source}: tensors of unexpected shape under {prefix!r}: {error}") from None
    for name, tensor in kept.items():
        if tensor.is_quantized or tensor.layout != torch.strided or (tensor.itemsize < 2 and tensor.ndim):
            raise BadInput(
                f"{source}: {prefix}{name} is quantised or sparse ({tensor.dtype}): use the original weights"
            )
    kept = {f"net.{name}": t.float() if t.is_floating_point() else t for name, t in kept.items()}
    unused = [k for k in tensors if not k.startswith(prefix)] + [prefix + k for k in inside]
    return Pretrained(config["family"], config, kept, source, notes, unused)


def _find_encoder(tensors: dict[str, Tensor], source: str) -> tuple[str, str, list[str]]:
    """The anchor found in a file, what stands before it, and notes; the fullest candidate, averaged weights first."""
    found = [(a, name[: -len(a)]) for name in tensors for a in READERS if f".{name}".endswith(f".{a}")]
    found = [(a, prefix) for a, prefix in found if _is_encoder(a, prefix, tensors)]
    if not found:
        looks = (what for pattern, what in LOOKS if any(re.search(pattern, name) for name in tensors))
        first = ", ".join(list(tensors)[:5]) or "no tensor at all"
        seems = next(looks, f"an unknown model ({first})")
        raise BadInput(f"{source}: seems to be {seems}. {SUPPORTED}")
    size = {prefix: sum(name.startswith(prefix) for name in tensors) for _, prefix in found}
    anchor, prefix = max(found, key=lambda pair: (size[pair[1]], "ema" in re.split(r"[._]", pair[1].lower())))
    others = [repr(other) for _, other in found if other != prefix]
    return anchor, prefix, [f"taken from {prefix!r}; also there: {', '.join(others)}"] if others else []


def _is_encoder(anchor: str, prefix: str, tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors around an anchor are of its family: lookalikes (CLIP, plain ViTs, 2D ResNets) are not."""
    return prefix + "embeddings.class_embedding" not in tensors


def _read_hf_siglip(inside: dict, sidecar: dict | None, heads: int | None, notes: list[str]) -> tuple[dict, dict]:
    """Hugging Face names; `inside` keeps what does not belong to the tower."""
    parts = ("embeddings.", "encoder.", "post_layernorm.", "head.")
    kept = {name: inside.pop(name) for name in list(inside) if name.startswith(parts)}
    return _siglip_config(kept, sidecar, heads, "gelu_pytorch_tanh", notes), kept


def _siglip_config(kept: dict, sidecar: dict | None, heads: int | None, act: str, notes: list[str]) -> dict:
    """Configuration from shapes; what shapes cannot tell comes from a fitting `sidecar`, or is assumed and noted."""
    width, channels, patch, _ = kept["embeddings.patch_embedding.weight"].shape
    grid = math.isqrt(len(kept["embeddings.position_embedding.weight"]))
    blocks = [int(match[1]) for name in kept if (match := re.match(r"encoder\.layers\.(\d+)\.", name))]
    config = {
        "family": "siglip",
        "hidden_size": width,
        "num_hidden_layers": max(blocks, default=-1) + 1,
        "intermediate_size": len(kept["encoder.layers.0.mlp.fc1.weight"]),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": 384 if (patch, grid) == (14, 27) else grid * patch,  # published: 384 is not a multiple of 14
    }
    if sidecar and sidecar["hidden_size"] == width:
        fits = sidecar["image_size"] // patch == grid
        return (
            config
            | sidecar
            | ({} if fits else {"image_size": config["image_size"]})
            | ({"num_attention_heads": heads} if heads else {})
        )
    if sidecar:
        notes.append(f"the config.json beside it is of a tower of width {sidecar['hidden_size']}, not {width}: ignored")
    if not heads:
        if width % 64:
            raise BadInput(
                f"a tower of width {width} without a config.json: give its number of heads, --backbone-heads"
            )
        heads = 16 if width in (1152, 1536) else width // 64
        notes.append(f"assumed without a config.json: {heads} attention heads (--backbone-heads), {act}")
    config |= {"num_attention_heads": heads, "hidden_act": act, "layer_norm_eps": 1e-6}
    return config | {"attention_dropout": 0.0, "vision_use_head": True}


READERS: dict[str, Callable] = {  # a tensor that only this family has, whatever stands before its name
    "embeddings.patch_embedding.weight": _read_hf_siglip,
}


class Backbone(nn.Module):
    """Image encoder of one family: images in [0, 1] to one feature vector each.

    Slice families take (n, 3, H, W) images; a `volumetric` one takes (N, 3, D, H, W) with its axes in `orientation`.
    `config` is plain data from which `build_backbone` makes the same architecture again without any file.
    """

    family = ""
    orientation = "SPL"
    volumetric = False

    def __init__(self, config: dict, net: nn.Module, width: int, grid: tuple[int, int, int]):
        super().__init__()
        self.config, self.net, self.width = dict(config), net, width
        self.default_grid = grid  # (S, H, W) this family is best given

    def tokens(self, images: Tensor) -> Tensor:
        """Last spatial features, (n, *grid, E)."""
        raise NotImplementedError

    def pool(self, tokens: Tensor) -> Tensor:
        """(n, *grid, E) to (n, E); `pool(tokens(x))` equals `forward(x)`."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, in forward order: units to compile or to recompute."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) or (N, 3, D, H, W) in [0, 1] to (n, E)."""
        return self.pool(self.tokens(images))

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, except that frozen modules stay in eval mode: dropout off, BatchNorm statistics kept."""
        super().train(mode)
        if mode:
            for module in self.modules():
                params = list(module.parameters())
                if params and not any(p.requires_grad for p in params):
                    module.eval()
        return self


class SiglipBackbone(Backbone):
    """SigLIP vision tower from `transformers`, with attention over kept patches only where asked for.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023.
    """

    family = "siglip"

    def __init__(self, config: dict):
        from transformers import SiglipVisionConfig, SiglipVisionModel

        settings = {key: value for key, value in config.items() if key != "family"}
        net = SiglipVisionModel(SiglipVisionConfig(**settings, attn_implementation="sdpa"))
        size = config["image_size"]
        super().__init__(config, net, config["hidden_size"], (64, size, size))
        self.side = size // config["patch_size"]
        # Not in any file; made again on the CPU, or a tower built on the meta device would never get its values.
        net.embeddings.position_ids = torch.arange(self.side**2, device="cpu")[None]

    def blocks(self) -> list[nn.Module]:
        return list(self.net.encoder.layers)

    def tokens(self, images: Tensor) -> Tensor:
        return self._encode(images, None)[0].unflatten(1, (self.side, self.side))

    def pool(self, tokens: Tensor) -> Tensor:
        return self._pool(tokens.flatten(1, -2), None)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(n, 3, H, W) in [0, 1] to (n, E).

        `keep` (n, P) bool names the patches, in row order, that take part; an image without any keeps its first.
        """
        return self._pool(*self._encode(images, keep))

    def _encode(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens after the last norm (n, M, E), and which of them are real (n, M) where `keep` left fewer than P."""
        embeddings = self.net.embeddings
        x = embeddings.patch_embedding(images * 2 - 1).flatten(2).transpose(1, 2)  # (n, P, E); SigLIP sees [-1, 1]
        if x.shape[1] != self.side**2:
            raise ValueError(f"images {tuple(images.shape)} make {x.shape[1]} patches, the tower has {self.side**2}")
        x = x + embeddings.position_embedding.weight
        real = None
        if keep is not None:
            x, real = _keep_tokens(x, keep)
        mask = None if real is None else real[:, None, None, :]
        for block in self.net.encoder.layers:
            x = block(x, mask)
        return self.net.post_layernorm(x), real

    def _pool(self, x: Tensor, real: Tensor | None) -> Tensor:
        """The attention-pooling head, as in `transformers`, but deaf to padding; the mean where a tower has none."""
        if not self.config["vision_use_head"]:
            return x.mean(1) if real is None else (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        head = self.net.head
        padding = None if real is None else ~real
        probe = head.probe.expand(len(x), -1, -1)
        x = head.attention(probe, x, x, key_padding_mask=padding, need_weights=False)[0][:, 0]
        return x + head.mlp(head.layernorm(x))


def _keep_tokens(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pack kept tokens to the front, padded to the longest row: (n, P, E) to (n, M, E) and which are real (n, M).

    M is rounded up to a multiple of 16, so that few different shapes occur and attention kernels stay aligned.
    """
    keep = keep.clone()
    keep[:, 0] |= ~keep.any(1)
    lengths = keep.sum(1)
    longest = min(-(-int(lengths.max()) // 16) * 16, keep.shape[1])
    order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    real = torch.arange(longest, device=x.device) < lengths[:, None]
    return x, None if bool(real.all()) else real


def build_backbone(config: dict) -> Backbone:
    """The architecture that `config` describes, with random weights."""
    return _FAMILIES[config["family"]](config)


_FAMILIES: dict[str, Callable[[dict], Backbone]] = {"siglip": SiglipBackbone}

FIRST_CONV = {"siglip": "net.embeddings.patch_embedding.weight"}


def _adapt(config: dict, tensors: dict, size: int | None, channels: int, notes: list[str]) -> tuple[dict, dict]:
    """Configuration and tensors for another image size or number of input channels; unchanged where equal."""
    config, tensors = dict(config), dict(tensors)
    positions = "net.embeddings.position_embedding.weight"
    if size and size != config["image_size"]:
        notes.append(f"image size {size} instead of the checkpoint's {config['image_size']}")
        config["image_size"] = size
    if config["family"] == "siglip" and positions in tensors:
        old, new = math.isqrt(len(tensors[positions])), config["image_size"] // config["patch_size"]
        if old != new:
            notes.append(f"position embeddings interpolated from {old} x {old} to {new} x {new}")
            tensors[positions] = _resize_positions(tensors[positions], new)
    first = FIRST_CONV[config["family"]]
    if channels != config["num_channels"] and first in tensors:
        notes.append(f"first convolution adapted from {config['num_channels']} to {channels} channels")
        tensors[first] = _spread_channels(tensors[first], channels)
    return config | {"num_channels": channels}, tensors


def _resize_positions(table: Tensor, side: int) -> Tensor:
    """(g * g, E) to (side * side, E), bicubic and antialiased."""
    old = math.isqrt(len(table))
    grid = table.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return grid.flatten(2)[0].T.contiguous()


def _spread_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution (E, C, ...) for another number of channels: repeated in turn, each channel's sum kept.

    Equal values in all channels then give the same output as before. Fewer channels than C each get the mean share.
    """
    stored = weight.shape[1]
    if channels < stored:
        return weight.sum(1, keepdim=True).expand(-1, channels, *weight.shape[2:]) / channels
    source = torch.arange(channels) % stored
    shares = torch.bincount(source)[source].reshape(1, -1, *[1] * (weight.ndim - 2))
    return weight[:, source] / shares


def load_backbone(
    source: str | Path, image_size: int | None = None, channels: int = 3, heads: int | None = None
) -> Backbone:
    """Read, adapt to `image_size` and `channels`, build and fill a backbone, and log what was matched.

    Raises BadInput where any tensor of the backbone is missing, of another shape or not finite.
    """
    found = read_pretrained(source, heads)
    config, tensors = _adapt(found.config, found.tensors, image_size, channels, found.notes)
    with torch.device("meta"):  # no memory and no random numbers: every value comes from the file or the load fails
        backbone = build_backbone(config)
    expected = backbone.state_dict()
    missing = [k for k in expected if k not in tensors]
    misfits = [
        f"{k} {tuple(tensors[k].shape)}, not {tuple(v.shape)}"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    broken = [k for k, v in tensors.items() if not torch.isfinite(v.sum())]
    for names, what in ((missing, "missing"), (misfits, "of another shape"), (broken, "not finite")):
        if names:
            hint = "; merge the LoRA adapter first" if any("lora_" in name for name in found.unused) else ""
            raise BadInput(
                f"{found.source}: {len(names)} of {len(expected)} tensors of the {found.family} encoder are {what}: "
                f"{', '.join(names[:10])}{hint}"
            )
    backbone.load_state_dict({k: tensors[k] for k in expected}, assign=True)
    unexpected = found.unused + [k for k in tensors if k not in expected]
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    log.info(
        "backbone: %s, %.1f M parameters, %d features, from %s", found.family, millions, backbone.width, found.source
    )
    log.info(
        "  tensors: %d matched, 0 missing, %d unexpected%s",
        len(expected),
        len(unexpected),
        ": " * bool(unexpected) + ", ".join(unexpected[:10]),
    )
    for note in found.notes:
        log.info("  %s", note)
    return backbone


def backbone_layers(backbone: Backbone) -> list[tuple[str, nn.Module]]:
    """Modules that own parameters directly, in forward order: what `--freeze-up-to N` counts."""
    owners = [(k, m) for k, m in backbone.named_modules() if next(m.parameters(recurse=False), None) is not None]
    return sorted(owners, key=lambda owner: owner[1] is backbone.net)  # BioViL-T's own parameter comes after its convs


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
    last = layers[frozen - 1][0] if frozen else "none"
    first = layers[frozen][0] if frozen < len(layers) else "none"
    log.info("backbone layers: %d of %d frozen, last frozen %s, first trained %s", frozen, len(layers), last, first)
    return frozen


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
