"""Reading one scan: the usual pipeline, in float32 too, ours, and ours from the cache; one thread, CPU time.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_loading.py [--rounds 7] [--ct FOLDER]

The scan is a chest CT of 192 x 256 x 256 voxels, stored as float16 in a deflated NPZ: `covid_p001.npz` of FOLDER
resampled to that size, or a phantom where there is no such file. The usual pipeline loads it with NumPy, makes three
windows in float16 and resizes the three channels to 160 x 224 x 224 with MONAI. Each side ends where the training
process has the sample: a worker leaves it in shared memory, except for a volume of the cache, of which it sends the
name. Then the growth of the first read with depth, and with one and two workers. The last line holds the ratios of the
medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import finetune_siglip as fs
import phantoms
from helpers import CHEST

SHAPE, GRID = (192, 256, 256), (160, 224, 224)


def write_scan(ct_folder: Path, folder: Path, depth: int = SHAPE[0]) -> Path:
    """The scan of the docstring with `depth` slices."""
    real = ct_folder / "covid_p001.npz"
    hu = (
        fs.load_volume(real)[0]
        if real.is_file()
        else phantoms.make_phantom(np.random.default_rng(0), [], (96, 256, 256))[0]
    )
    size = (depth, *SHAPE[1:])
    resized = F.interpolate(torch.from_numpy(hu.astype(np.float32))[None, None], size=size, mode="trilinear")
    path = folder / f"scan_{depth}.npz"
    np.savez_compressed(path, image=resized[0].half().numpy())
    return path


def usual(path: Path, dtype: type) -> torch.Tensor:
    """NumPy, three windows in `dtype`, MONAI: what the loaders of published code do."""
    from monai.transforms import Resize

    volume = np.load(path)["image"][0].astype(dtype)
    windows = [np.clip((volume - dtype(lo)) / dtype(hi - lo), 0, 1) for lo, hi in CHEST]
    return Resize(GRID, mode="trilinear")(torch.from_numpy(np.stack(windows).astype(np.float32)))


def shared(sample: torch.Tensor) -> torch.Tensor:
    """What the default collate function of a worker does with a batch of one."""
    storage = sample._typed_storage()._new_shared(sample.numel(), device=sample.device)
    return torch.stack([sample], out=sample.new(storage).resize_(1, *sample.shape))


def interleaved(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each round of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, side in sides.items():
            started = time.process_time()
            side()
            if round_:  # the first one warms up
                times[name].append(1e3 * (time.process_time() - started))
    return times


def dataset_of(path: Path, prep: fs.Preprocessing, cache: Path | None = None, n: int = 1) -> fs.CTVolumeDataset:
    """The scan n times, each with a target."""
    ids = [str(i) for i in range(n)]
    table = fs.Table(("A",), ids, ids, ["train"] * n, [path] * n, np.ones((n, 1), np.float32), list(range(n)))
    return fs.CTVolumeDataset(table, prep, fs.VolumeCache(cache, prep, table.paths) if cache else None)


def print_growth(ct_folder: Path, folder: Path, prep: fs.Preprocessing) -> None:
    """Medians of the first read by depth, and scans per second by number of workers."""
    for depth in (96, 192, 384):
        path = write_scan(ct_folder, folder, depth)
        median = statistics.median(interleaved({"": lambda path=path: fs.load_sample(path, prep)}, 5)[""])
        print(f"depth {depth:4d}  {median:7.1f} ms, {median / depth:.2f} ms per slice")
    dataset = dataset_of(folder / f"scan_{SHAPE[0]}.npz", prep, n=24)
    for workers in (1, 2):
        started = time.perf_counter()
        for _ in fs.build_loader(dataset, [[i] for i in range(len(dataset))], workers, torch.device("cpu")):
            pass
        print(f"{workers} worker{'s' * (workers > 1)}  {len(dataset) / (time.perf_counter() - started):.1f} scans/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ct", type=Path, default=Path(os.environ.get("CT_DATA", ROOT.parent / "shared/data/ct")))
    args = parser.parse_args()
    torch.set_num_threads(1)
    fs.one_thread_per_worker(0)
    prep = fs.Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, GRID)
    with tempfile.TemporaryDirectory() as folder:
        path = write_scan(args.ct, Path(folder))
        print(f"{path.stat().st_size / 1e6:.1f} MB packed, {2 * np.prod(SHAPE) / 1e6:.1f} MB inflated")
        cached = dataset_of(path, prep, Path(folder) / "cache")
        sides: dict[str, Callable[[], object]] = {
            "usual": lambda: shared(usual(path, np.float16)),
            "float32": lambda: shared(usual(path, np.float32)),
            "first": lambda: shared(fs.load_sample(path, prep)),
            "cached": lambda: cached.collate([cached[0]])["volume"].assemble(),
        }
        times = interleaved(sides, args.rounds)
        print_growth(args.ct, Path(folder), prep)
    for name, values in times.items():
        print(f"{name:8} median {statistics.median(values):7.1f} ms, min {min(values):7.1f}, max {max(values):7.1f}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"first_read_ratio={medians['usual'] / medians['first']:.2f} "
        f"first_read_vs_float32_ratio={medians['float32'] / medians['first']:.2f} "
        f"cached_ratio={medians['usual'] / medians['cached']:.0f}"
    )


if __name__ == "__main__":
    main()
