"""A GPU at work: scans a second, share of its peak and time waited for data, against the plain loop of a user.

    PYTHONPATH=.:tests python tests/benchmarks/bench_gpu.py [NAME ...] [--repeats 3] [--device cpu --small]

NAME: vit (ViT-B/16, 8 scans of 64 x 224 x 224 a step, all of it trained), frozen (the same tower, only the head
learns), lora (adapters of rank 8), resnet3d (the 3D ResNet-152 on 160 x 224 x 224); all of them by default. Weights and
voxels are random. Ours is `train_one_epoch` as `main` sets it up with --amp --deterministic off --augment light, from
volumes that --cache-dir holds, compiled, with the memory plan of this device. The plain loop passes one slice (or
volume) after the other through the same tower in float32 and has its volumes in memory already. Both sides run in this
process, interleaved; the medians stand on the last line:

    NAME_scans_per_s, NAME_plain_scans_per_s, NAME_ratio
    NAME_peak_share   operations of the model (not those done again) of the device's bfloat16 peak, as its maker states
                      it or, for one not listed here, as a large matrix product reaches it
    NAME_waited_s, NAME_waited_share   seconds of an epoch, and their share, in which the device had nothing to do but
                      wait for data

`--small` takes towers and volumes of a few pixels, to see the benchmark itself work.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_training import config_of
from torch.utils.flop_counter import FlopCounterMode

import finetune_siglip as fs
from helpers import CHEST, random_hu

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12}
CASES = ("vit", "frozen", "lora", "resnet3d")
LABELS = tuple(f"label {i}" for i in range(18))


def case_of(name: str, small: bool) -> tuple[dict, tuple[int, int, int], int]:
    """Configuration of the backbone, the grid (S, H, W) of a volume, scans in a step."""
    if name == "resnet3d":
        layers, planes, grid = ([1] * 4, [8] * 4, (32, 64, 64)) if small else ([3, 8, 36, 3], [64, 128, 256, 512], None)
        config = {"family": "resnet3d", "layers": layers, "block_inplanes": planes, "num_channels": 3,
                  "conv1_t_size": (3, 7, 7), "bias_downsample": False, "image_size": 64 if small else 224}  # fmt: skip
        return config, grid or (160, 224, 224), 2 if small else 4
    config = config_of("Ti" if small else "B")
    if small:
        config |= {"image_size": 32, "num_hidden_layers": 2}
    return config, (4, 32, 32) if small else (64, 224, 224), 2 if small else 8


class PlainLoop(torch.nn.Module):
    """One slice, or volume, after the other; a scan's logits are a linear layer on the mean of their features."""

    def __init__(self, name: str, config: dict):
        super().__init__()
        self.backbone, self.windows = fs.build_backbone(config), fs.CTWindows(CHEST)
        if name == "frozen":
            self.backbone.requires_grad_(False)
        if name == "lora":
            fs.add_lora(self.backbone, 8)
        self.head = torch.nn.Linear(self.backbone.width, len(LABELS))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        images = self.windows(volume)
        parts = [images] if self.backbone.volumetric else images.transpose(1, 2)[0].split(1)
        return self.head(torch.cat([self.backbone(part) for part in parts]).mean(0, keepdim=True))


def scans_in(folder: Path, grid: tuple[int, int, int], n: int) -> fs.Table:
    """n scans of this grid as NPZ files."""
    paths = [folder / f"{i}.npz" for i in range(n)]
    for i, path in enumerate(paths):
        np.savez(path, image=random_hu(1, *grid, seed=i).numpy())
    ids = [path.stem for path in paths]
    targets = np.random.default_rng(0).integers(0, 2, (n, len(LABELS))).astype(np.float32)
    return fs.Table(LABELS, ids, ids, ["train"] * n, paths, targets, list(range(2, n + 2)))


def operations_of(model: fs.SiglipClassifier, grid: tuple[int, int, int], runtime: fs.Runtime) -> int:
    """Floating-point operations of one scan's forward and backward pass, each done once."""
    slices = grid[0] if model.backbone.volumetric else 2
    volume = random_hu(1, 1, slices, *grid[1:]).to(runtime.device)
    with FlopCounterMode(display=False) as counter, runtime.autocast():
        model.train()(volume).float().sum().backward()
    model.zero_grad()
    return counter.get_total_flops() * grid[0] // slices


def peak_of(runtime: fs.Runtime) -> float:
    """Operations a second in bfloat16: as stated, or as measured."""
    name = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else ""
    stated = [peak for part, peak in PEAKS.items() if part in name.replace("-", " ").split()]
    if stated:
        return stated[0]
    x, best = torch.randn(2048, 2048, device=runtime.device, dtype=torch.bfloat16), 0.0
    for _ in range(5):
        started = time.perf_counter()
        (x @ x).sum().item()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def bench(name: str, runtime: fs.Runtime, repeats: int, small: bool, folder: Path) -> dict[str, float]:
    """Epochs of ours, interleaved with single scans of the plain loop."""
    config, grid, batch = case_of(name, small)
    torch.manual_seed(0)
    plain = PlainLoop(name, config).to(runtime.device).train()
    model = fs.SiglipClassifier(fs.build_backbone(config), CHEST, "hu", len(LABELS))
    if name == "frozen":
        fs.freeze_up_to(model.backbone, "all")
    if name == "lora":
        fs.add_lora(model.backbone, 8)
    model.to(runtime.device)
    flops = operations_of(model, grid, runtime)
    argv = [
        "--csv", "-", "--pretrained", "-", "--label-columns", *LABELS, "--batch-size", batch, "--amp",
        "--num-workers", 2 if small else 8, "--cache-dir", folder / "cache",
    ]  # fmt: skip
    args = fs.parse_args([str(word) for word in argv])
    table = scans_in(folder, grid, 4 * batch)
    prep = fs.Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, grid)
    (dataset,) = fs.build_datasets(args, [table], prep)
    plan = fs.plan_memory(args, model, (1, *grid), runtime)
    fs.maybe_compile(model, "auto", runtime)
    fs.apply_memory_plan(model, *plan)
    state = fs.TrainState(
        model, fs.build_optimizer(args, model), fs.Schedule("plateau", 0, 100),
        torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype == torch.float16),
        loss_sum=torch.zeros((), dtype=torch.float64, device=runtime.device),
    )  # fmt: skip
    recipe = fs.Recipe(batch, num_workers=args.num_workers, augment="light")
    volume, loss = random_hu(1, 1, *grid).to(runtime.device), fs.MultilabelBCELoss()

    def epoch() -> dict[str, float]:
        seconds = fs.train_one_epoch(state, dataset, loss, recipe, runtime)["seconds"]
        state.next_epoch()
        return seconds

    def naive() -> float:
        started = time.perf_counter()
        plain.zero_grad()
        loss(plain(volume), torch.ones(1, len(LABELS), device=runtime.device)).backward()
        next(p.grad for p in plain.parameters() if p.grad is not None).sum().item()  # all is done now
        return time.perf_counter() - started

    epoch(), naive()  # fills the cache, compiles
    rounds = [(epoch(), naive()) for _ in range(repeats)]
    waited = statistics.median(seconds["data"] for seconds, _ in rounds)
    total = statistics.median(sum(seconds.values()) for seconds, _ in rounds)
    speed, slow = len(dataset) / total, 1 / statistics.median(seconds for _, seconds in rounds)
    print(f"{name}: {'recomputed' if plan[1] else 'kept'}, {plan[0]} slices at once; {speed:.3g} scans/s, plain loop "
          f"{slow:.3g}; waited {waited:.2f} of {total:.2f} s", flush=True)  # fmt: skip
    return {
        f"{name}_scans_per_s": speed, f"{name}_plain_scans_per_s": slow, f"{name}_ratio": speed / slow,
        f"{name}_peak_share": speed * flops / peak_of(runtime), f"{name}_waited_s": waited,
        f"{name}_waited_share": waited / total,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)} [all]")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side [3]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--small", action="store_true", help="towers and volumes of a few pixels")
    args = parser.parse_args()
    if args.device == "cuda":
        runtime = fs.init_runtime(amp=True, deterministic=False)
        if runtime.device.type != "cuda":
            parser.error("there is no GPU; --device cpu --small shows that the benchmark works")
    else:
        runtime = fs.Runtime(torch.device("cpu"), torch.bfloat16)
    what = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{what}, torch {torch.__version__}", flush=True)
    figures: dict[str, float] = {}
    for name in args.names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            figures |= bench(name, runtime, args.repeats, args.small, Path(folder))
        gc.collect()  # loaders that are still there would be taken along by the processes of the next case
        print(" ".join(f"{key}={value:.4g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
