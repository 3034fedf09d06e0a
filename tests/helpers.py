"""Small towers and tables that several tests share."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from finetune_siglip import (
    Backbone,
    CTVolumeDataset,
    Ema,
    Preprocessing,
    Schedule,
    SiglipClassifier,
    Table,
    TrainState,
    build_backbone,
    build_optimizer,
)
from finetune_siglip import decide_preprocessing as decide
from finetune_siglip import prepare_table as prepare

ROOT = Path(__file__).parents[1]
TINY_SIGLIP = ROOT / "tests" / "assets" / "tiny-siglip"
CHEST = ((-1100.0, -100.0), (-160.0, 240.0), (-50.0, 1450.0))
SMALL_TOWER = {
    "family": "siglip", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "num_channels": 3, "patch_size": 8, "image_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0, "vision_use_head": True,
}  # fmt: skip


SMALL_RESNET3D = {
    "family": "resnet3d", "layers": [2, 1, 1, 1], "block_inplanes": [4, 8, 8, 16], "conv1_t_size": (3, 7, 7),
    "bias_downsample": False, "num_channels": 3, "image_size": 32,
}  # fmt: skip


def decide_preprocessing(table: Table, grid: tuple, windows: tuple, **flags: object) -> Preprocessing:
    """What is decided where only these flags are given."""
    usual = {"orientation": None, "intensity": "auto", "hu_range": (-1000.0, 1500.0), "spacing": (1.5, 1.5, 3.0)}
    usual |= {"on_bad_volume": "stop", "num_slices": None, "image_size": None, "windows": None}
    return decide(table, grid, windows, Namespace(**usual | flags))


def prepare_table(
    csv: Path, labels: tuple, folder: Path, spacing: tuple, num_workers: int, skip: bool, intensity: str = "auto",
    hu_range: tuple = (-1000.0, 1500.0), format: str = "npz",
) -> Path:  # fmt: skip
    """What --prepare makes; `spacing` in mm (D, H, W)."""
    how = {"spacing": spacing[::-1], "num_workers": num_workers, "on_bad_volume": "skip" if skip else "stop"}
    how |= {"intensity": intensity, "hu_range": hu_range, "format": format}
    return prepare(Namespace(csv=csv, label_columns=labels, prepare=folder, **how))


def small_resnet3d_classifier(labels: int = 2, **options: object) -> SiglipClassifier:
    """A 3D ResNet of five blocks with a head; HU in, chest windows."""
    torch.manual_seed(0)
    return SiglipClassifier(build_backbone(SMALL_RESNET3D), CHEST, "hu", labels, **{"dropout": 0.0, **options})


def small_backbone(seed: int = 0) -> Backbone:
    """A two-layer SigLIP tower for 16 x 16 images with random weights."""
    torch.manual_seed(seed)
    return build_backbone(SMALL_TOWER)


def small_classifier(labels: int = 3, seed: int = 0, **options: object) -> SiglipClassifier:
    """The tower above with a head; HU in, chest windows."""
    backbone = small_backbone(seed)
    return SiglipClassifier(backbone, CHEST, "hu", labels, **options)


def random_hu(*shape: int, seed: int = 0) -> torch.Tensor:
    """int16 Hounsfield units of a chest's range."""
    return torch.randint(-1024, 1500, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(seed))


def small_scans(folder: Path, n: int, slices: int = 3, labels: int = 3, unknown: float = 0.2) -> CTVolumeDataset:
    """n scans of 16 x 16 pixels, files in `folder` unless there; some targets are unknown, never all of a label."""
    rng = np.random.default_rng(n)
    targets = rng.integers(0, 2, (n, labels)).astype(np.float32)
    targets[rng.random((n, labels)) < unknown] = np.nan
    targets[:2] = [[0.0], [1.0]][:n]
    paths = [folder / f"scan_{row:03d}.npz" for row in range(n)]
    for row, path in enumerate(paths):
        if not path.exists():
            np.savez(path, image=random_hu(1, slices, 16, 16, seed=row).numpy())
    names, ids = tuple(f"label {i}" for i in range(labels)), [path.stem for path in paths]
    table = Table(names, ids, ids, ["train"] * n, paths, targets, list(range(2, n + 2)))
    return CTVolumeDataset(table, Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, (slices, 16, 16)))


def small_state(model: SiglipClassifier, *, amp: bool = False, ema: bool = False, **options: object) -> TrainState:
    """A model ready to be trained on the CPU; with `amp` a scaler for float16 goes along."""
    args = Namespace(
        **{
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.01,
            "layer_decay": 1.0,
            "backbone_lr_scale": 1.0,
            **options,
        }
    )
    return TrainState(
        model, build_optimizer(args, model), Schedule("plateau", 0, 100),
        torch.amp.GradScaler("cpu", enabled=amp), Ema(model, 0.9) if ema else None,
    )  # fmt: skip


def save_tower(folder: Path) -> Path:
    """The tower above with random weights, as a folder that transformers wrote."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(**{key: value for key, value in SMALL_TOWER.items() if key != "family"})
    SiglipVisionModel(config).save_pretrained(folder)
    return folder
