"""Pretrain the toy SigLIP that stands beside this file: phantom slices against short captions, sigmoid loss.

    python tests/assets/tiny-siglip/pretrain.py --out FOLDER [--start FOLDER]

Runs as two processes, one core each, always with the same seed. Needs torch, transformers and tests/phantoms.py.

Texts of a step: the caption of every slice (all findings visible on it, in random order and wording) and one short
sentence per finding. Slices with the same findings share one caption, so a batch holds no text twice. A slice and a
text are a positive pair when the text is the slice's caption or one of its sentences; the sigmoid loss (Zhai et al.,
"Sigmoid Loss for Language Image Pre-Training", 2023) judges each pair by itself, so several positives are no trouble.

The same loss also pairs single patches (sent through the pooling head alone) with the findings' sentences, positive
where the finding's mask meets the patch. Captions alone teach a tower this small too slowly for a run of half an hour.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from phantoms import FINDINGS, PREVALENCE, SHAPE, make_phantom  # noqa: E402

WINDOWS = ((-600, 1000), (40, 400), (700, 1500))  # HU centre, width: one channel each
TEXT_LENGTH = 40
WORDINGS = {
    "Medical material": ("medical material", "metal wire or device"),
    "Arterial wall calcification": ("arterial wall calcification", "calcified plaque of the aorta"),
    "Cardiomegaly": ("cardiomegaly", "enlarged heart"),
    "Pericardial effusion": ("pericardial effusion", "fluid around the heart"),
    "Coronary artery wall calcification": ("coronary artery wall calcification", "calcified coronary artery"),
    "Hiatal hernia": ("hiatal hernia", "stomach above the diaphragm"),
    "Emphysema": ("emphysema", "holes of low density in the lung"),
    "Atelectasis": ("atelectasis", "plate of collapsed lung"),
    "Lung nodule": ("lung nodule", "small round nodule in the lung"),
    "Lung opacity": ("lung opacity", "ground glass in the lung"),
    "Pleural effusion": ("pleural effusion", "fluid behind the lung"),
    "Consolidation": ("consolidation", "dense lung with air bronchograms"),
}
NO_FINDING = ("no finding", "normal slice")
WORDS = sorted({word for phrases in (*WORDINGS.values(), NO_FINDING) for phrase in phrases for word in phrase.split()})
WORDS = ["<pad>", "<unk>", ",", *WORDS]
CONFIG = {
    "vision_config": {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2,
        "image_size": 96, "patch_size": 12,
    },
    "text_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1,
        "vocab_size": len(WORDS), "max_position_embeddings": TEXT_LENGTH, "projection_size": 128,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip


def encode(text: str) -> list[int]:
    """Word numbers, padded on the right to TEXT_LENGTH (SigLIP's text tower reads its answer off the last place)."""
    ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()][:TEXT_LENGTH]
    return ids + [0] * (TEXT_LENGTH - len(ids))


def make_slices(numbers: Iterable[int], seed: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Slices of new phantoms, int16 HU (n, H, W), and which findings are on each slice and on each of its patches.

    Slices: int8 (n, findings), 1 where at least a third of the finding's fullest slice is seen, 0 where none of it is,
    -1 between. Patches: int8 (n, patches, findings), 1 from 3 voxels on (or the most that any patch of the slice
    holds), 0 without one, -1 between. What lies between counts neither as shown nor as absent.
    """
    slices, visible, located = [], [], []
    side, patch = SHAPE[1] // CONFIG["vision_config"]["patch_size"], CONFIG["vision_config"]["patch_size"]
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        volume, masks = make_phantom(rng, [label for label in FINDINGS if rng.random() < PREVALENCE], SHAPE)
        seen = np.zeros((SHAPE[0], len(FINDINGS)), np.int8)
        where = np.zeros((SHAPE[0], side**2, len(FINDINGS)), np.int8)
        for label, mask in masks.items():
            area = mask.sum((1, 2))
            seen[:, FINDINGS.index(label)] = np.where(area >= area.max() / 3, 1, -1) * (area > 0)
            voxels = mask.reshape(-1, side, patch, side, patch).sum((2, 4)).reshape(-1, side**2)  # (D, patches)
            enough = voxels >= np.clip(voxels.max(1, keepdims=True), 1, 3)
            where[:, :, FINDINGS.index(label)] = np.where(enough, 1, -1) * (voxels > 0)
        slices.append(volume)
        visible.append(seen)
        located.append(where)
    return torch.from_numpy(np.concatenate(slices)), np.concatenate(visible), np.concatenate(located)


def to_pixels(hu: torch.Tensor) -> torch.Tensor:
    """int16 HU (n, H, W) -> float (n, 3, H, W) in [-1, 1], one chest window per channel."""
    channels = [((hu.float() - centre) / width + 0.5).clamp(0, 1) for centre, width in WINDOWS]
    return (torch.stack(channels, 1) - 0.5) / 0.5


def batch_texts(visible: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct captions and sentences for a batch -> token ids (texts, TEXT_LENGTH), pairs (n, texts): 1, 0, -1."""
    phrases = [WORDINGS[label][rng.integers(2)] for label in FINDINGS] + [NO_FINDING[rng.integers(2)]]
    normal = np.where((visible == 0).all(1), 1, np.where((visible == 1).any(1), 0, -1))
    parts = np.column_stack([visible, normal])  # (n, findings + 1)
    kinds, which = np.unique(parts == 1, axis=0, return_inverse=True)
    several = kinds.sum(1) > 1  # a caption of one sentence is that sentence
    captions = [" , ".join(phrases[i] for i in rng.permutation(np.flatnonzero(kind))) for kind in kinds[several]]
    same = which.reshape(-1, 1) == np.flatnonzero(several)  # (n, captions)
    tokens = torch.tensor([encode(text) for text in phrases + captions])
    return tokens, torch.from_numpy(np.concatenate([parts, same], axis=1))


def sigmoid_loss(
    model: SiglipModel, pixels: torch.Tensor, tokens: torch.Tensor, pairs: torch.Tensor, patch_pairs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SigLIP's loss, -sum(log sigmoid(+-logit)), with + for pairs that are 1, - for 0; pairs of -1 are left out.

    First over slices and texts, per slice; then over patches (n, P) and the first texts, those of the findings: the
    mean of the negative pairs, plus the positive pairs' mean of each finding, averaged, so that a nodule's one patch
    weighs as much as all those of a large effusion.
    """
    tower = model.vision_model(pixel_values=pixels)
    patches = model.vision_model.head(tower.last_hidden_state.flatten(0, 1)[:, None])  # (n * P, width)
    texts = F.normalize(model.text_model(input_ids=tokens).pooler_output, dim=-1)  # (texts, width)

    def terms(features: torch.Tensor, texts: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        logits = (F.normalize(features, dim=-1) @ texts.T).float() * model.logit_scale.exp() + model.logit_bias
        return -F.logsigmoid(torch.where(pairs == 1, logits, -logits)) * (pairs >= 0)

    flat = patch_pairs.flatten(0, 1)  # (n * P, findings)
    shown = flat == 1
    local = terms(patches, texts[: flat.shape[1]], flat)
    whole = terms(tower.pooler_output, texts, pairs).sum() / len(pixels)
    positive = (local * shown).sum(0) / shown.sum(0).clamp(min=1)  # (findings,)
    return whole, positive[shown.any(0)].mean() + local[flat == 0].mean()


def area_under_roc(truth: np.ndarray, score: np.ndarray) -> float:
    """AUROC by ranks (scores are continuous, ties do not matter)."""
    ranks = score.argsort().argsort() + 1
    positives = truth.sum()
    return (ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (len(truth) - positives))


@torch.inference_mode()
def evaluate(model: SiglipModel, slices: torch.Tensor, visible: np.ndarray) -> dict[str, float]:
    """Zero-shot AUROC of each finding over slices: similarity of the slice with the finding's plain name."""
    tokens = torch.tensor([encode(WORDINGS[label][0]) for label in FINDINGS])
    scores = torch.cat([model(tokens, to_pixels(part)).logits_per_image for part in slices.split(256)]).numpy()
    found = ((visible[:, i], scores[:, i]) for i in range(len(FINDINGS)))
    aurocs = (area_under_roc(truth[truth >= 0] == 1, score[truth >= 0]) for truth, score in found)
    return {label: round(float(auroc), 4) for label, auroc in zip(FINDINGS, aurocs, strict=True)}


@torch.no_grad()
def balance_channels(model: SiglipModel, slices: torch.Tensor) -> None:
    """Start the patch embedding as if every channel had mean 0 and deviation 1 over these slices.

    Otherwise the bone window, nearly constant except for a few voxels of calcium or metal, is hardly heard at first.
    """
    pixels = to_pixels(slices)
    mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    conv = model.vision_model.embeddings.patch_embedding
    conv.weight /= deviation[None, :, None, None]
    conv.bias -= (conv.weight * mean[None, :, None, None]).sum((1, 2, 3))


def start_model(args: argparse.Namespace, slices: torch.Tensor) -> SiglipModel:
    if args.start:
        return SiglipModel.from_pretrained(args.start, attn_implementation="eager").float()
    model = SiglipModel(SiglipConfig(**CONFIG))
    model.set_attn_implementation("eager")  # at this size faster under bfloat16 on a CPU than the fused kernel
    balance_channels(model, slices[:: max(1, len(slices) // 2000)])
    model.logit_scale.data.fill_(math.log(10))
    model.logit_bias.data.fill_(-4.0)
    return model


def average_over_processes(model: SiglipModel) -> None:
    """Every process leaves with the mean gradient."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient) / dist.get_world_size())


def build_optimizers(model: SiglipModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and MLPs, AdamW for the rest.

    From random weights 180 steps of it got further than 240 of AdamW alone (patch loss 0.50 against 0.52), for 15 %
    more CPU time a step.
    """
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embedding" not in name]
    rest = [p for name, p in named.items() if p.ndim != 2 or "embedding" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.02),
    ]


def train(args: argparse.Namespace, rank: int) -> tuple[SiglipModel, dict]:
    """Each process draws its share of the phantoms and of every batch, and judges its slices by its own texts."""
    rng = np.random.default_rng([args.seed, rank])
    slices, visible, located = make_slices(range(rank, args.phantoms, args.processes), args.seed + 1000)
    held_out, held_visible, _ = make_slices(range(args.held_out if rank == 0 else 1), args.seed + 2000)
    shown = visible == 1
    print(f"{len(slices)} slices made, {shown.mean(0).round(3)} show each finding", flush=True)
    weights = 0.5 + (shown / shown.mean(0) / len(FINDINGS)).sum(1) * 2  # rare findings are drawn more often
    weights[shown[:, [FINDINGS.index(label) for label in args.favour]].any(1)] *= 3
    weights /= weights.sum()
    torch.manual_seed(args.seed)
    model = start_model(args, slices)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    optimizers = build_optimizers(model, args.lr)
    running, start, log = np.zeros(2), time.monotonic(), []
    for step in range(1, args.steps + 1):
        pick = rng.choice(len(slices), args.batch // args.processes, p=weights)
        tokens, pairs = batch_texts(visible[pick], rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            loss, local = sigmoid_loss(model, to_pixels(slices[pick]), tokens, pairs, torch.from_numpy(located[pick]))
        model.zero_grad()
        (loss + args.patch_weight * local).backward()
        average_over_processes(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1, step / args.warmup) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr * share
            optimizer.step()
        running += np.array([loss.item(), local.item()])
        if step % args.report == 0 and rank == 0:
            whole, patches = (running / args.report).round(4).tolist()
            log.append({"step": step, "loss": whole, "patch_loss": patches})
            scores = evaluate(model.eval(), held_out[: 24 * 20], held_visible[: 24 * 20])
            print(f"{time.monotonic() - start:.0f} s", log[-1], [f"{v:.2f}" for v in scores.values()], flush=True)
            running = np.zeros(2)
            save(model, {"log": log}, args.out)
            model.train()
    scores = evaluate(model.eval(), held_out, held_visible) if rank == 0 else {}
    return model, {"zero_shot_auroc": scores, "macro": round(float(np.mean(list(scores.values()))), 4), "log": log}


def save(model: SiglipModel, figures: dict, out: Path) -> None:
    """Hugging Face folder; weights in float16 to stay small (the config says float32, so they load as float32)."""
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["vision_config"], config["text_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    processor = {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 96, "width": 96},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def run(rank: int, args: argparse.Namespace, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    model, figures = train(args, rank)
    if rank == 0:
        save(model, figures, args.out)
        print(json.dumps(figures["zero_shot_auroc"], indent=1), figures["macro"])
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the toy SigLIP on phantom slices.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write [the shipped tower's]")
    parser.add_argument("--start", type=Path, help="go on from the tower in this folder instead of random weights")
    parser.add_argument("--favour", nargs="*", default=["Lung nodule", "Atelectasis"], choices=FINDINGS,
                        help="draw their slices 3 times as often [the two that are learnt last]")  # fmt: skip
    parser.add_argument("--phantoms", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=48, help="slices of a step, over all processes")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--patch-weight", type=float, default=4.0, help="weight of the loss over patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="each on one core")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 where it is safe")
    parser.add_argument("--report", type=int, default=250, help="steps between two lines of figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(run, (args, f"file://{meeting}/store"), args.processes)


if __name__ == "__main__":
    main()
