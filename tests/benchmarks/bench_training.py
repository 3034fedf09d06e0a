"""Our training engine against the plain loop of a user of `SiglipForImageClassification`.

    PYTHONPATH=.:tests python tests/benchmarks/bench_training.py [NAME ...] [--tower B] [--repeats 3] [--scans FOLDER]

NAME: step, memory, depth, cache, air, inference (all). Towers (ViT-Ti, S or B/16 at 224) have random weights: figures
of speed and memory do not depend on them. `memory` with ViT-B needs 14 GB free. Both sides run in
this process, interleaved, and the medians' ratios stand on the last line. Memory is what a step adds to the process:
the kernel's peak of the resident set (/proc/self/clear_refs, VmHWM) less what was resident before, gradients already
there, with an allocator told to give every freed block back; on a GPU, the caching allocator's peak.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import finetune_siglip as fs
from helpers import CHEST, random_hu, small_state

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


def our_model(size: str, **options: object) -> fs.SiglipClassifier:
    torch.manual_seed(0)
    model = fs.SiglipClassifier(fs.build_backbone(config_of(size)), CHEST, "hu", 18, "mean", 0.0, **options).to(DEVICE)
    model.slice_chunk = fs.usual_chunk(RUNTIME)
    return model


class PlainLoop(torch.nn.Module):
    """Slice by slice through `SiglipForImageClassification`; the scan's logits are the mean of its slices'."""

    def __init__(self, ours: fs.SiglipClassifier):
        super().__init__()
        from transformers import SiglipConfig, SiglipForImageClassification

        settings = {k: v for k, v in ours.backbone.config.items() if k not in ("family", "vision_use_head")}
        config = SiglipConfig(vision_config=settings | {"vision_use_head": False}, num_labels=18)
        self.net = SiglipForImageClassification(config).to(DEVICE)
        self.windows = fs.CTWindows(CHEST).to(DEVICE)

    def forward(self, volume: Tensor) -> Tensor:
        images = self.windows(volume[0].transpose(0, 1)) * 2 - 1
        return torch.stack([self.net(pixel_values=image[None]).logits[0] for image in images]).mean(0, keepdim=True)


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
    ours, volume = our_model(args.tower), volume_of(8)
    plain, amp = PlainLoop(ours), torch.bfloat16 if has_bf16() else None
    print(f"step: 8 slices, ours in {'bfloat16' if amp else 'float32, for want of bfloat16 hardware'}")
    naive, mine = interleaved(
        lambda: train_step(plain, volume), lambda: train_step(ours, volume, amp), repeats=args.repeats
    )
    print(f"step: plain loop {naive:.2f} s, ours {mine:.2f} s")
    return {"step_ratio" if amp else "step_ratio_float32": naive / mine}


def bench_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak of a step at 64 slices: everything kept in float32, against chunks that are computed again."""
    ours, volume = our_model(args.tower), volume_of(64)
    ours.slice_chunk, ours.recompute = 8, True
    train_step(ours, volume_of(2))  # gradients are there from here on
    mine = peak_of(lambda: train_step(ours, volume))
    plain = PlainLoop(ours)
    ours.to("meta")  # one model at a time
    train_step(plain, volume_of(2))
    naive = peak_of(lambda: train_step(plain, volume))
    print(f"memory: plain loop {naive / 2**30:.2f} GiB, ours {mine / 2**30:.2f} GiB")
    return {"memory_ratio": naive / mine}


def bench_depth(args: argparse.Namespace) -> dict[str, float]:
    ours = our_model(args.tower)
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
    ours = our_model(args.tower)
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
    """Forward and backward on the real scans, 16 slices each, with and without what lies outside the body."""
    prep = fs.Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, (16, 224, 224))
    volumes = [fs.load_sample(path, prep)[None].to(DEVICE) for path in sorted(args.scans.glob("*.npz"))]
    if not volumes:
        print(f"air: no scans in {args.scans}")
        return {}
    whole, body = our_model(args.tower), our_model(args.tower, skip_air=True)
    kept = np.mean([fs.patches_in_body(volume[0, 0], 16).float().mean().item() for volume in volumes])

    def step(model: fs.SiglipClassifier) -> None:
        for volume in volumes:
            train_step(model, volume)

    all_patches, some = interleaved(lambda: step(whole), lambda: step(body), repeats=args.repeats)
    print(f"air: {kept:.1%} of patches kept; {all_patches:.2f} s with all, {some:.2f} s with those")
    return {"skip_air_ratio": all_patches / some}


@torch.no_grad()
def bench_inference(args: argparse.Namespace) -> dict[str, float]:
    ours, volume = our_model(args.tower).eval(), volume_of(64)
    plain, amp = PlainLoop(ours).eval(), torch.bfloat16 if has_bf16() else None

    def mine() -> None:
        with torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            ours(volume)

    naive, own = interleaved(lambda: plain(volume), mine, repeats=args.repeats)
    print(f"inference: 64 slices, plain loop {naive:.2f} s, ours {own:.2f} s in {amp or 'float32'}")
    return {"inference_ratio" if amp else "inference_ratio_float32": naive / own}


BENCHES = {
    "step": bench_step, "memory": bench_memory, "depth": bench_depth, "cache": bench_cache, "air": bench_air,
    "inference": bench_inference,
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
        print(" ".join(f"{key}={value:.2f}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
