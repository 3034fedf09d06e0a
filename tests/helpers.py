"""Small towers and tables that several tests share."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune_siglip import Backbone, SiglipClassifier, build_backbone

ROOT = Path(__file__).parents[1]
TINY_SIGLIP = ROOT / "tests" / "assets" / "tiny-siglip"
CHEST = ((-1100.0, -100.0), (-160.0, 240.0), (-50.0, 1450.0))
SMALL_TOWER = {
    "family": "siglip", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "num_channels": 3, "patch_size": 8, "image_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0, "vision_use_head": True,
}  # fmt: skip


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
