"""Reading raw scans: SimpleITK, and ours; one thread, CPU time.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_raw.py [--rounds 5] [--slices 300]

A phantom of 300 slices of 512 x 512 as an int16 .nii.gz that SimpleITK wrote and as a folder of uncompressed DICOM
slices. Each side reads the same file to an array in HU, slices feet to head, rows front to back, columns right to left:
SimpleITK as its examples do (ReadImage; GetGDCMSeriesFileNames and ImageSeriesReader), then DICOMOrient to LPS and
GetArrayFromImage. Both arrays must be equal. The last line holds the ratios of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import finetune_siglip as fs
import phantoms
from test_raw import write_dicom, write_image

SPACING = (1.0, 0.7, 0.7)


def itk_array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))


def itk_series(folder: Path) -> np.ndarray:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return itk_array(reader.Execute())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slices", type=int, default=300)
    args = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    small = phantoms.make_phantom(np.random.default_rng(0), [], (args.slices, 128, 128))[0]
    volume = small.astype(np.int16).repeat(4, 1).repeat(4, 2)
    volume += np.random.default_rng(1).normal(0, 8, volume.shape).astype(np.int16)  # noise, as in a real scan
    volume = volume.clip(-1024, 3000) // 2 * 2
    with tempfile.TemporaryDirectory() as name:
        nifti = write_image(Path(name) / "scan.nii.gz", volume, SPACING)
        write_dicom(Path(name) / "series", volume, SPACING)
        sides = {
            "itk_nifti": lambda: itk_array(sitk.ReadImage(str(nifti))),
            "nifti": lambda: np.ascontiguousarray(fs.load_volume(nifti)[0]),
            "itk_dicom": lambda: itk_series(Path(name) / "series"),
            "dicom": lambda: np.ascontiguousarray(fs.load_volume(Path(name) / "series")[0]),
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, read in sides.items():
                started = time.process_time()
                found = read()
                times[side].append(time.process_time() - started)
                assert np.array_equal(found, volume), side
    for side, values in times.items():
        print(f"{side:10} median {statistics.median(values):6.2f} s, min {min(values):6.2f}, max {max(values):6.2f}")
    medians = {side: statistics.median(values) for side, values in times.items()}
    print(
        f"nifti_ratio={medians['itk_nifti'] / medians['nifti']:.2f} "
        f"dicom_ratio={medians['itk_dicom'] / medians['dicom']:.2f}"
    )


if __name__ == "__main__":
    main()
