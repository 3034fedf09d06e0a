"""Our training engine against the plain loop of a user of `SiglipForImageClassification`.

    PYTHONPATH=.:tests python tests/benchmarks/bench_training.py [NAME ...] [--tower B] [--repeats 3] [--scans FOLDER]

NAME: step, memory, depth, cache, air, auroc, inference, layout, pooling (all). Towers (ViT-Ti, S or B/16 at 224) have
random weights: figures of speed and memory do not depend on them. `memory` with ViT-B needs 14 GB free. Both sides run
in this process, interleaved, and the medians' ratios stand on the last line. For `step`, `memory` and `inference` both
sides compute the same function of the same weights, and `step` compares their gradients. Memory is what a step adds to
the process: the kernel's peak of the resident set (/proc/self/clear_refs, VmHWM) less what was resident before,
gradients already there, with an allocator told to give every freed block back; on a GPU, the caching allocator's peak.
`auroc` trains the demo's toy tower on the demo's phantoms, with and without --skip-air.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import finetune_siglip as fs
import phantoms
from helpers import CHEST, TINY_SIGLIP, random_hu, small_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNTIME = fs.Runtime(DEVICE)
CLOCK = [time.perf_counter]  # or the processor time of this process, with --cpu-time
TOWERS = {"B": (768, 12, 12, 3072), "S": (384, 12, 6, 1536), "Ti": (192, 12, 3, 768)}


def config_of(size: str) -> dict:
    width, layers, heads, mlp = TOWERS[size]
    return {
        "family": "siglip", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": mlp, "num_channels": 3, "patch_size": 16, "image_size": 224, "vision_use_head": True,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
    }  # fmt: skip


def our_model(config: dict, pooling: str = "mean", **options: object) -> fs.SiglipClassifier:
    torch.manual_seed(0)
    model = fs.SiglipClassifier(fs.build_backbone(config), CHEST, "hu", 18, pooling, 0.0, **options).to(DEVICE)
    model.slice_chunk = fs.usual_chunk(RUNTIME.device)
    return model


class PlainLoop(torch.nn.Module):
    """Slice by slice through `SiglipForImageClassification`; the scan's logits are the mean of its slices'."""

    def __init__(self, config: dict):
        super().__init__()
        from transformers import SiglipConfig, SiglipForImageClassification

        settings = {k: v for k, v in config.items() if k != "family"}
        self.net = SiglipForImageClassification(SiglipConfig(vision_config=settings, num_labels=18)).to(DEVICE)
        self.windows = fs.CTWindows(CHEST).to(DEVICE)

    def forward(self, volume: Tensor) -> Tensor:
        images = self.windows(volume[0].transpose(0, 1)) * 2 - 1
        return torch.stack([self.net(pixel_values=image[None]).logits[0] for image in images]).mean(0, keepdim=True)


def both_models(size: str) -> tuple[fs.SiglipClassifier, PlainLoop]:
    """Ours and the plain loop as one function of equal weights: the mean of patches and slices, then a linear layer."""
    config = config_of(size) | {"vision_use_head": False}
    ours, plain = our_model(config), PlainLoop(config)
    plain.net.vision_model.load_state_dict(ours.backbone.net.state_dict())
    ours.head = copy.deepcopy(plain.net.classifier)
    return ours, plain


def gradient_error(ours: fs.SiglipClassifier, plain: PlainLoop) -> float:
    """Norm of the difference of the towers' gradients, as a part of the plain one's norm."""
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(ours.backbone.net.parameters(), plain.net.vision_model.parameters(), strict=True)
    ]
    apart, norm = (torch.nn.utils.get_total_norm(x) for x in ([p - q for p, q in pairs], [q for _, q in pairs]))
    return (apart / norm).item()


def volume_of(slices: int) -> Tensor:
    return random_hu(1, 1, slices, 224, 224).to(DEVICE)


def train_step(model: torch.nn.Module, volume: Tensor, amp: torch.dtype | None = None) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    with torch.autocast(DEVICE.type, amp, enabled=amp is not None):
        logits = model(volume)
    torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), torch.ones_like(logits.float())).backward()


def seconds_of(action: Callable[[], object]) -> float:
    started = CLOCK[0]()
    action()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return CLOCK[0]() - started


def interleaved(*actions: Callable[[], object], repeats: int) -> list[float]:
    """The median seconds of each action, after one round to warm up where there are several."""
    rounds = [[seconds_of(action) for action in actions] for _ in range(repeats + (repeats > 1))]
    return [statistics.median(times) for times in zip(*rounds[repeats > 1 :], strict=True)]


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_of(action: Callable[[], object]) -> int:
    """Bytes that an action takes at most beside what is there before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is larger goes back to the system when it is freed
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def has_bf16() -> bool:
    """Whether this machine multiplies in bfloat16: elsewhere it is emulated, and slower than float32."""
    if DEVICE.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def bench_step(args: argparse.Namespace) -> dict[str, float]:
    (ours, plain), volume = both_models(args.tower), volume_of(8)
    amp = torch.bfloat16 if has_bf16() else None
    print(f"step: 8 slices, ours in {'bfloat16' if amp else 'float32, for want of bfloat16 hardware'}")
    errors = []
    for precision, tolerance in ((None, 1e-4), (amp, 0.05)):
        train_step(plain, volume)
        train_step(ours, volume, precision)
        errors.append(gradient_error(ours, plain))
        assert errors[-1] < tolerance, f"the gradients are not the same: {errors[-1]:.1e} of their norm apart"
    print(f"step: gradients apart by {errors[0]:.1e} of their norm in float32, {errors[1]:.1e} as timed")
    naive, mine = interleaved(
        lambda: train_step(plain, volume), lambda: train_step(ours, volume, amp), repeats=args.repeats
    )
    print(f"step: plain loop {naive:.2f} s, ours {mine:.2f} s")
    return {"step_ratio" if amp else "step_ratio_float32": naive / mine}


def bench_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak of a step at 64 slices: everything kept in float32, against chunks that are computed again."""
    (ours, plain), volume = both_models(args.tower), volume_of(64)
    ours.slice_chunk, ours.recompute = 8, True
    train_step(ours, volume_of(2))  # gradients are there from here on
    mine = peak_of(lambda: train_step(ours, volume))
    ours.to("meta")  # its gradients go as well
    train_step(plain, volume_of(2))
    naive = peak_of(lambda: train_step(plain, volume))
    print(f"memory: plain loop {naive / 2**30:.2f} GiB, ours {mine / 2**30:.2f} GiB")
    return {"memory_ratio": naive / mine}


def bench_depth(args: argparse.Namespace) -> dict[str, float]:
    """Time at 128 slices against 16, and the peak of a step at 160 against 16."""
    ours = our_model(config_of(args.tower))
    ours.slice_chunk, ours.recompute = 8, True
    train_step(ours, volume_of(16))
    low, high = (peak_of(lambda n=n: train_step(ours, volume_of(n))) for n in (16, 160))
    few, many = interleaved(
        lambda: train_step(ours, volume_of(16)), lambda: train_step(ours, volume_of(128)), repeats=args.repeats
    )
    print(f"depth: peak {low / 2**20:.0f} MiB at 16 slices, {high / 2**20:.0f} at 160; "
          f"{few:.2f} s at 16 slices, {many:.2f} s at 128")  # fmt: skip
    return {"depth_growth": many / few, "depth_memory": high / low}


def bench_cache(args: argparse.Namespace) -> dict[str, float]:
    """An epoch over four scans of 16 slices: features computed each time, against features read."""
    ours = our_model(config_of(args.tower))
    fs.freeze_up_to(ours.backbone, "all")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{i}.npz" for i in range(4)]
        for i, path in enumerate(paths):
            np.savez(path, image=random_hu(1, 16, 224, 224, seed=i).numpy())
        ids, labels = [p.stem for p in paths], tuple(f"label {i}" for i in range(18))
        table = fs.Table(labels, ids, ids, ["train"] * 4, paths, np.ones((4, 18), np.float32), [2, 3, 4, 5])
        dataset = fs.CTVolumeDataset(table, fs.Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, (16, 224, 224)))
        state, recipe, loss = small_state(ours), fs.Recipe(2), fs.MultilabelBCELoss()
        cached = fs.cache_features(folder / "features", ours, dataset, recipe, RUNTIME)

        def epoch(source: fs.CTVolumeDataset) -> None:
            fs.train_one_epoch(state, source, loss, recipe, RUNTIME)
            state.next_epoch()

        computing, reading = interleaved(lambda: epoch(dataset), lambda: epoch(cached), repeats=args.repeats)
    print(f"cache: an epoch of 4 scans {computing:.2f} s computed, {reading * 1e3:.1f} ms read")
    return {"feature_cache_ratio": computing / reading}


def bench_air(args: argparse.Namespace) -> dict[str, float]:
    """Forward and backward on the real scans, 32 slices each, with and without what lies outside the body.

    In float32, and under autocast where the machine multiplies in bfloat16.
    """
    prep = fs.Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, (32, 224, 224))
    volumes = [fs.load_sample(path, prep)[None].to(DEVICE) for path in sorted(args.scans.glob("*.npz"))]
    if not volumes:
        print(f"air: no scans in {args.scans}")
        return {}
    whole, body = our_model(config_of(args.tower)), our_model(config_of(args.tower), skip_air=True)
    kept = np.mean([fs.patches_in_body(volume[0, 0], 16).float().mean().item() for volume in volumes])

    def step(model: fs.SiglipClassifier, amp: torch.dtype | None) -> None:
        for volume in volumes:
            train_step(model, volume, amp)

    figures = {}
    for suffix, amp in (("", None), ("_bfloat16", torch.bfloat16))[: 1 + has_bf16()]:
        sides = [partial(step, model, amp) for model in (whole, body)]
        all_patches, some = interleaved(*sides, repeats=args.repeats)
        print(f"air: {kept:.1%} of patches kept, {amp or 'float32'}: all {all_patches:.2f} s, those {some:.2f} s")
        figures[f"skip_air_ratio{suffix}"] = all_patches / some
    return figures


def bench_auroc(args: argparse.Namespace) -> dict[str, float]:
    """Macro AUROC on phantoms not trained on, with air less without, and its 95 % interval (bootstrap of the phantoms).

    As `run_finetune.sh demo` does: the shipped toy tower, frozen, 160 phantoms, 30 epochs, averaged weights.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = phantoms.write_dataset(folder / "data", 160, 48, 64, seed=0)
        labels = table.read_text().splitlines()[0].split(",")[3:]
        argv = [
            "--csv", table, "--pretrained", TINY_SIGLIP, "--label-columns", *labels, "--num-workers", 2, "--epochs", 30,
            "--batch-size", 8, "--lr", 3e-3, "--scheduler", "cosine", "--warmup", 20, "--num-slices", 24, "--use-ema",
            "--freeze-up-to", "all", "--cache-features", folder / "features", "--wandb-mode", "disabled",
        ]  # fmt: skip
        found = []
        for side, more in (("all", []), ("body", ["--skip-air"])):
            assert fs.main([*map(str, argv), "--output-dir", str(folder / side), *more]) == 0
            found.append(json.loads((folder / side / "evaluation_test.json").read_text()))
    n, rng = len(found[0]["targets"]), np.random.default_rng(0)
    draws = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), 2000)])  # the first is the sample itself
    both = [macro_auroc(np.array(e["targets"], float), np.array(e["probabilities"]), draws) for e in found]
    low, high = np.percentile((both[1] - both[0])[1:], [2.5, 97.5])
    print(f"auroc: {both[0][0]:.4f} with all patches, {both[1][0]:.4f} with those in the body, on {n} phantoms")
    return {"skip_air_auroc_gain": both[1][0] - both[0][0], "gain_low": low, "gain_high": high}


def macro_auroc(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over labels of the share of pairs ranked right, for targets and scores (n, L) and weights (B, n) -> (B,)."""
    figures = []
    for y, p in zip(targets.T, scores.T, strict=True):
        right = (p[:, None] > p) + 0.5 * (p[:, None] == p)
        pairs = (weights * y).sum(1) * (weights * (1 - y)).sum(1)
        figures.append(((weights * y) @ right * weights * (1 - y)).sum(1) / np.where(pairs > 0, pairs, np.nan))
    return np.nanmean(figures, axis=0)


def bench_layout(args: argparse.Namespace) -> dict[str, float]:
    """A step of the 3D ResNet-152 under autocast on a CPU: maps laid out channels-last, against contiguous ones."""
    if DEVICE.type != "cpu" or not has_bf16():
        print("layout: only for a CPU that multiplies in bfloat16")
        return {}
    config = {
        "family": "resnet3d", "layers": [3, 8, 36, 3], "block_inplanes": [64, 128, 256, 512], "num_channels": 3,
        "conv1_t_size": (3, 7, 7), "bias_downsample": False, "image_size": 160,
    }  # fmt: skip
    model, volume = our_model(config), random_hu(1, 1, 32, 160, 160)

    def contiguous() -> None:
        with mock.patch.object(torch, "is_autocast_enabled", return_value=False):
            train_step(model, volume, torch.bfloat16)

    plain, ours = interleaved(contiguous, lambda: train_step(model, volume, torch.bfloat16), repeats=args.repeats)
    print(f"layout: 32 x 160 x 160 voxels, contiguous {plain:.2f} s, channels-last {ours:.2f} s")
    return {"channels_last_ratio": plain / ours}


def bench_pooling(args: argparse.Namespace) -> dict[str, float]:
    """What a head per finding costs: a step with `label` pooling over one with `attention`, the tower trained too."""
    models = [our_model(config_of(args.tower), pooling) for pooling in ("attention", "label")]
    volume, amp = volume_of(8), torch.bfloat16 if has_bf16() else None
    one, each = interleaved(*(partial(train_step, model, volume, amp) for model in models), repeats=args.repeats)
    print(f"pooling: 8 slices, attention {one:.3f} s, label {each:.3f} s")
    return {"label_pooling_ratio": each / one}


@torch.no_grad()
def bench_inference(args: argparse.Namespace) -> dict[str, float]:
    (ours, plain), volume = both_models(args.tower), volume_of(64)
    amp = torch.bfloat16 if has_bf16() else None

    def mine() -> None:
        with torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            ours(volume)

    naive, own = interleaved(lambda: plain(volume), mine, repeats=args.repeats)
    print(f"inference: 64 slices, plain loop {naive:.2f} s, ours {own:.2f} s in {amp or 'float32'}")
    return {"inference_ratio" if amp else "inference_ratio_float32": naive / own}


BENCHES = {
    "step": bench_step, "memory": bench_memory, "depth": bench_depth, "cache": bench_cache, "air": bench_air,
    "auroc": bench_auroc, "inference": bench_inference, "layout": bench_layout, "pooling": bench_pooling,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)} [all]")
    parser.add_argument("--tower", choices=TOWERS, default="B", help="size of the ViT [B]")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side [3]")
    parser.add_argument("--scans", type=Path, default=Path("../shared/data/ct"), help="folder of NPZ scans for `air`")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time: for a CPU shared with others")
    args = parser.parse_args()
    CLOCK[0] = time.process_time if args.cpu_time else time.perf_counter
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"
    what = f"ViT-{args.tower}/16, {platform.machine()}, {where}, torch {torch.__version__}"
    print(f"{what}, bfloat16 {'yes' if has_bf16() else 'no'}", flush=True)
    figures: dict[str, float] = {}
    for name in args.names or BENCHES:
        figures |= BENCHES[name](args)
        print(" ".join(f"{key}={value:.4g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
