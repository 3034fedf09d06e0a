"""Reading one scan: the usual pipeline, in float32 too, ours, and ours from the cache; one thread, CPU time.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_loading.py [--rounds 7] [--ct FOLDER]

The scan is a chest CT of 192 x 256 x 256 voxels, stored as float16 in a deflated NPZ: `covid_p001.npz` of FOLDER
resampled to that size, or a phantom where there is no such file. The usual pipeline loads it with NumPy, makes three
windows in float16 and resizes the three channels to 160 x 224 x 224 with MONAI. Each side ends where the training
process has the sample: a worker leaves it in shared memory, except for a volume of the cache, of which it sends the
name. As in an epoch, each side reads scan after scan, no two the same, for about a second before the next side's turn.
Memory is managed as in the workers of each side: ours keep what they free, the usual ones are what glibc arrives at by
itself with large arrays. Then the growth of the first read with depth, and with one and two workers, and how many
headers a second the check reads. The last line holds the ratios of the medians.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
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

COPIES = 24  # 385 MB in the cache
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


def manage_memory(kept: bool) -> None:
    """As our workers do, or as glibc at its most generous does by itself."""
    fs.one_thread_per_worker(0)
    settings = () if kept else ((-4, 65536), (-3, 32 << 20), (-1, 64 << 20))  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_…
    for setting, value in settings:
        ctypes.CDLL(None).mallopt(setting, value)


def interleaved(sides: dict[str, tuple[int, Callable[[int], object]]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds a scan, of each round of each side: (how many scans, what reads the i-th)."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, (n, read) in sides.items():
            manage_memory(kept=name not in ("usual", "float32"))
            started = time.process_time()
            for i in range(n):
                read(i)
            if round_:  # the first one warms up
                times[name].append(1e3 * (time.process_time() - started) / n)
    return times


def table_of(paths: list[Path]) -> fs.Table:
    """A row with one label for each path."""
    n, ids = len(paths), [str(i) for i in range(len(paths))]
    return fs.Table(("A",), ids, ids, ["train"] * n, paths, np.ones((n, 1), np.float32), list(range(n)))


def dataset_of(paths: list[Path], prep: fs.Preprocessing, cache: Path | None = None) -> fs.CTVolumeDataset:
    """The scans, each with a target."""
    return fs.CTVolumeDataset(table_of(paths), prep, fs.VolumeCache(cache, prep) if cache else None)


def print_growth(ct_folder: Path, folder: Path, prep: fs.Preprocessing) -> None:
    """Medians of the first read by depth, and scans per second by number of workers."""
    for depth in (96, 192, 384):
        path = write_scan(ct_folder, folder, depth)
        median = statistics.median(interleaved({"": (1, lambda _, path=path: fs.load_sample(path, prep))}, 5)[""])
        print(f"depth {depth:4d}  {median:7.1f} ms, {median / depth:.2f} ms per slice")
    dataset = dataset_of([folder / f"scan_{SHAPE[0]}.npz"] * 24, prep)
    for workers in (1, 2):
        started = time.perf_counter()
        for _ in fs.build_loader(dataset, [[i] for i in range(len(dataset))], workers, torch.device("cpu")):
            pass
        print(f"{workers} worker{'s' * (workers > 1)}  {len(dataset) / (time.perf_counter() - started):.1f} scans/s")


def headers_per_second(folder: Path, n: int = 2000) -> float:
    """The median of five rounds over n files that the system has in memory, with the threads that the check uses."""
    rng = np.random.default_rng(0)
    paths = [folder / f"header_{i}.npz" for i in range(n)]
    np.savez_compressed(paths[0], image=rng.integers(-1000, 1000, (1, 20, 40, 40), np.int16), orientation="SPL")
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())
    table, seconds = table_of(paths), []
    for _ in range(5):
        started = time.perf_counter()
        fs.read_headers(table)
        seconds.append(time.perf_counter() - started)
    return n / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ct", type=Path, default=Path(os.environ.get("CT_DATA", ROOT.parent / "shared/data/ct")))
    args = parser.parse_args()
    torch.set_num_threads(1)
    prep = fs.Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, GRID)
    with tempfile.TemporaryDirectory() as folder:
        path = write_scan(args.ct, Path(folder))
        print(f"{path.stat().st_size / 1e6:.1f} MB packed, {2 * np.prod(SHAPE) / 1e6:.1f} MB inflated")
        paths = [Path(folder) / f"copy_{i}.npz" for i in range(COPIES)]
        for copy in paths:
            shutil.copy(path, copy)
        cached = dataset_of(paths, prep, Path(folder) / "cache")
        for i in range(COPIES):
            cached[i]
        sides: dict[str, tuple[int, Callable[[int], object]]] = {
            "usual": (1, lambda i: shared(usual(paths[i], np.float16))),
            "float32": (2, lambda i: shared(usual(paths[i], np.float32))),
            "first": (10, lambda i: shared(fs.load_sample(paths[i], prep))),
            "cached": (COPIES * 10, lambda i: cached.__getitems__([i % COPIES])["volume"].assemble()),
        }
        times = interleaved(sides, args.rounds)
        print_growth(args.ct, Path(folder), prep)
        headers = headers_per_second(Path(folder))
    for name, values in times.items():
        print(f"{name:8} median {statistics.median(values):7.1f} ms, min {min(values):7.1f}, max {max(values):7.1f}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"first_read_ratio={medians['usual'] / medians['first']:.2f} "
        f"first_read_vs_float32_ratio={medians['float32'] / medians['first']:.2f} "
        f"cached_ratio={medians['usual'] / medians['cached']:.0f} headers_per_second={headers:.0f}"
    )


if __name__ == "__main__":
    main()
