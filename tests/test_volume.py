"""Room 4: a voxel keeps its place and value on the way from the file to the int16 tensor, or the file is refused."""

from __future__ import annotations

import gc
import itertools
import math
import os
import re
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune_siglip
from finetune_siglip import (
    AIR,
    BadEnvironment,
    BadInput,
    BadVolume,
    CTVolumeDataset,
    Header,
    Preprocessing,
    Table,
    augment,
    build_loader,
    decide_preprocessing_like,
    judge_voxels,
    load_sample,
    load_volume,
    move_volume,
    read_headers,
    read_volume,
    resample_channel,
    write_b2nd,
    write_npz,
    write_skipped,
)
from helpers import CHEST, ROOT, decide_preprocessing

CPU = torch.device("cpu")
CODES = [
    "".join(code)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for code in itertools.product(*order)
]  # fmt: skip


def chest(*shape: int, seed: int = 0) -> np.ndarray:
    """int16 HU (1, D, H, W) with air, lung, soft tissue and bone in it."""
    rng = np.random.default_rng(seed)
    return rng.choice([-1000, -850, 40, 60, 700], size=(1, *shape)).astype(np.int16) + rng.integers(
        -20, 20, (1, *shape), dtype=np.int16
    )


def save(path: Path, **members: object) -> Path:
    np.savez_compressed(path, **members)
    return path


def prep(grid: tuple[int, int, int], **changes: object) -> Preprocessing:
    settings = {"orientation": "SPL", "intensity": "hu", "hu_range": (-1000.0, 1500.0), "windows": CHEST, "grid": grid}
    return Preprocessing(**(settings | changes))


def table_of(*paths: Path) -> Table:
    n = len(paths)
    targets = np.tile(np.array([[1, 0]], np.float32), (n, 1))
    ids = [f"s{i}" for i in range(n)]
    return Table(("A", "B"), ids, ids, ["train"] * n, list(paths), targets, list(range(2, n + 2)))


# Orientation


@pytest.mark.parametrize("code", CODES)
def test_all_48_orientation_codes_agree_with_nibabel(tmp_path: Path, code: str) -> None:
    stored = chest(3, 4, 5)
    path = save(tmp_path / "v.npz", image=stored)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(tuple(code)), nibabel.orientations.axcodes2ornt(tuple("SPL"))
    )
    expected = nibabel.orientations.apply_orientation(stored[0], turn)
    np.testing.assert_array_equal(load_volume(path, code)[0], expected)


def test_load_volume_makes_no_copy_and_keeps_the_dtype(tmp_path: Path) -> None:
    stored = chest(3, 4, 5).astype(np.float16)
    volume = load_volume(save(tmp_path / "v.npz", image=stored), "RAS")
    assert volume.dtype == np.float16
    assert volume.base is not None
    assert volume.shape == (1, 5, 4, 3)


@pytest.mark.parametrize("code", ["SPL", "RAS", "LPI", "ASR"])
def test_a_sample_is_the_same_however_its_file_is_stored(tmp_path: Path, code: str) -> None:
    volume = chest(12, 14, 16)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(tuple("SPL")), nibabel.orientations.axcodes2ornt(tuple(code))
    )
    turned = nibabel.orientations.apply_orientation(volume[0], turn)[None]
    plain = load_sample(save(tmp_path / "a.npz", image=volume), prep((8, 10, 12)))
    other = load_sample(save(tmp_path / "b.npz", image=turned), prep((8, 10, 12), orientation=code))
    assert other.is_contiguous()
    assert (plain.int() - other.int()).abs().max() <= 1  # flips change the order of float32 sums


def test_fortran_order_and_foreign_byte_order_are_read(tmp_path: Path) -> None:
    volume = chest(5, 6, 7)
    expected = load_sample(save(tmp_path / "a.npz", image=volume), prep((4, 4, 4)))
    for name, stored in (("f", np.asfortranarray(volume)), ("b", volume.astype(">i2")), ("d", volume.astype("f8"))):
        assert torch.equal(load_sample(save(tmp_path / f"{name}.npz", image=stored), prep((4, 4, 4))), expected)


def test_depth_last_arrays_stop_with_the_flag_that_settles_it(tmp_path: Path) -> None:
    table = table_of(save(tmp_path / "v.npz", image=chest(12, 12, 9)))
    with pytest.raises(BadInput, match="--orientation RAS"):
        decide_preprocessing(table, (8, 8, 8), CHEST)
    assert decide_preprocessing(table, (8, 8, 8), CHEST, orientation="RAS").orientation == "RAS"
    assert decide_preprocessing(table, (8, 8, 8), CHEST, orientation="SPL").orientation == "SPL"


def test_a_file_that_names_its_orientation_is_believed_and_held_to_it(tmp_path: Path) -> None:
    path = save(tmp_path / "v.npz", image=chest(12, 12, 9), orientation="RAS", spacing=[1.5, 1.5, 3.0])
    assert decide_preprocessing(table_of(path), (8, 8, 8), CHEST).orientation == "RAS"
    with pytest.raises(BadVolume, match="stored RAS, not SPL"):
        load_volume(path)
    both = table_of(path, save(tmp_path / "w.npz", image=chest(9, 12, 12), orientation="SPL"))
    with pytest.raises(BadInput, match="RAS, SPL"):
        decide_preprocessing(both, (8, 8, 8), CHEST)


@pytest.mark.parametrize("members", [{"orientation": "XYZ"}, {"spacing": [1.0, 0.0, 1.0]}, {"spacing": [1.0, 2.0]}])
def test_senseless_members_are_refused(tmp_path: Path, members: dict) -> None:
    with pytest.raises(BadVolume, match="member"):
        load_volume(save(tmp_path / "v.npz", image=chest(3, 3, 3), **members))


@pytest.mark.parametrize("shape", [(40, 56, 64, 1), (40, 64, 64, 1), (64, 64, 40, 1), (40, 64, 64, 3)])
@pytest.mark.parametrize("code", [None, "SPL", "RAS"])
def test_channels_last_are_refused_with_a_remedy_that_works(tmp_path: Path, shape: tuple, code: str | None) -> None:
    image = np.repeat(chest(*shape[:3])[0][..., None], shape[3], -1)
    path = save(tmp_path / "v.npz", image=image)
    with pytest.raises(BadInput, match=r"channels last: store np.moveaxis\(image, -1, 0\)"):
        decide_preprocessing(table_of(path), (8, 8, 8), CHEST, orientation=code)
    save(path, image=np.moveaxis(image, -1, 0))
    right = "RAS" if shape[0] == shape[1] else "SPL"
    decided = decide_preprocessing(table_of(path), (8, 8, 8), CHEST, orientation=right)
    assert load_sample(path, decided).shape == (1, 8, 8, 8)


# Resampling


def reference_axis(line: np.ndarray, n_out: int) -> np.ndarray:
    """Triangle filter along axis 0 in float64, one output at a time, as in Pillow and torch's antialias=True."""
    scale = len(line) / n_out
    width = max(1.0, scale)
    out = []
    for i in range(n_out):
        centre = (i + 0.5) * scale
        weights = [max(0.0, 1 - abs(j + 0.5 - centre) / width) for j in range(len(line))]
        out.append(sum(w * value for w, value in zip(weights, line, strict=True)) / sum(weights))
    return np.array(out)


def reference(volume: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    result = volume.astype(np.float64)
    for axis, n in enumerate(size):
        result = np.moveaxis(reference_axis(np.moveaxis(result, axis, 0), n), 0, axis)
    return result


def resampled(volume: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    out = np.empty((1, *size), np.int16)
    low, high = resample_channel(volume[0], out[0])
    assert (round(low), round(high)) == (out.min(), out.max())
    return out


@pytest.mark.parametrize("dtype", ["int16", "float16", "float32", "int32", "float64"])
@pytest.mark.parametrize("size", [(7, 9, 8), (12, 20, 20), (30, 25, 40), (5, 40, 11), (12, 5, 64)])
def test_voxels_are_within_one_hu_of_a_float64_reference(size: tuple[int, int, int], dtype: str) -> None:
    volume = chest(12, 20, 20).astype(dtype)
    found = resampled(volume, size)
    assert np.abs(found[0] - reference(volume[0], size)).max() <= 0.51


def test_resampling_is_torchs_antialias_per_axis() -> None:
    volume = chest(1, 48, 40)
    expected = F.interpolate(
        torch.from_numpy(volume).double(), size=(20, 64), mode="bilinear", antialias=True, align_corners=False
    )
    assert np.abs(resampled(volume, (1, 20, 64)) - expected.numpy()).max() <= 0.51


def test_an_unchanged_grid_changes_no_voxel() -> None:
    volume = chest(9, 17, 33)
    np.testing.assert_array_equal(resampled(volume, (9, 17, 33)), volume)


def test_unit_values_become_the_hu_they_stand_for(tmp_path: Path) -> None:
    hu = chest(6, 8, 8).astype(np.float32)
    unit = (np.clip(hu, -1000, 1500) + 1000) / 2500
    found = load_sample(save(tmp_path / "v.npz", image=unit), prep((6, 8, 8), intensity="unit"))
    assert np.abs(found.numpy() - np.clip(hu, -1000, 1500)).max() <= 1


def test_windowed_channels_keep_their_values(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).random((4, 6, 8, 8), np.float32)
    sample = load_sample(save(tmp_path / "v.npz", image=stored), prep((6, 8, 8), intensity="windowed", channels=4))
    assert np.abs(sample.numpy() / 32767 - stored).max() < 2e-5


def test_with_several_hu_channels_the_first_one_counts(tmp_path: Path) -> None:
    volume = np.concatenate([chest(5, 6, 6), chest(5, 6, 6, seed=1)])
    sample = load_sample(save(tmp_path / "v.npz", image=volume), prep((5, 6, 6)))
    np.testing.assert_array_equal(sample.numpy(), volume[:1])


def test_preprocessing_survives_plain_types() -> None:
    settings = prep((8, 9, 10), spacing=(3.0, 1.5, 1.5), channels=2)
    stored = settings.to_dict()
    assert all(isinstance(value, (str, int, float, list, bool, type(None))) for value in stored.values())
    assert Preprocessing.from_dict(stored | {"later": 1}) == settings


# Intensity


def body(*shape: int, seed: int = 0) -> np.ndarray:
    """float32 HU (D, H, W): lungs, muscle, fat and bone in proportions of a chest, with their noise."""
    rng = np.random.default_rng(seed)
    tissue = rng.choice([-1000.0, -860.0, -100.0, 40.0, 500.0], size=shape, p=[0.3, 0.2, 0.15, 0.3, 0.05])
    return (tissue + rng.normal(0, 15, shape)).clip(-1024, 1400).astype(np.float32)


def padded(volume: np.ndarray, value: float) -> np.ndarray:
    """The volume with a frame of one value, as padding leaves it."""
    return np.pad(volume, 5, constant_values=value)


HU = body(40, 40, 40)
KINDS = {  # name: (voxels, channels, kind or part of the reason)
    "hu": (HU.astype(np.int16), "hu"),
    "float hu": (HU.astype(np.float16), "hu"),
    "hu, padded": (padded(HU, -3024).astype(np.int16), "hu"),
    "hu, lungs cut out of a window": (HU.clip(-1000, 400), "hu"),
    "hu, a window that shows no lung": (HU.clip(-160, 240), "--intensity hu"),
    "unit": ((HU.clip(-1000, 1500) + 1000) / 2500, "unit"),
    "unit of another range": ((HU.clip(-1000, 400) + 1000) / 1400, "--hu-range LO HI"),
    "unit of each scan's own range": ((HU + 1024) / 4095, "--hu-range LO HI"),
    "z-scores": ((HU - HU.mean()) / HU.std(), "MEAN+DEVIATION"),
    "z-scores as other noise has them": ((HU + 400) / 600, "MEAN+DEVIATION"),
    "z-scores, padded": (padded((HU - HU.mean()) / HU.std(), -5.0), "MEAN+DEVIATION"),
    "HU / 1000": (HU / 1000, "--hu-range 0 1000"),
    "HU / 1000, clipped": (HU.clip(-1000, 1000) / 1000, "--hu-range 0 1000"),
    "HU / 1000, padded": (padded(HU / 1000, -3.024), "--hu-range 0 1000"),
    "[-1, 1]": ((HU.clip(-1000, 1500) - 250) / 1250, "--hu-range 250 1500"),
    "HU + 1024": ((HU + 1024).astype(np.int16), "--hu-range -1024 -1023"),
    "HU + 1024, unsigned": ((HU + 1024).astype(np.uint16), "--hu-range -1024 -1023"),
    "HU + 1024, padded": (padded(HU + 1024, -1024).astype(np.int16), "--hu-range -1024 -1023"),
    "HU + 1024, padded lower": (padded(HU + 1024, -2000).astype(np.int16), "--hu-range -1024 -1023"),
    "HU + 1024 with streaks": (np.where(HU > 450, -700, HU + 1024).astype(np.int16)[:, :8], "--hu-range -1024 -1023"),
    "HU - 1024": ((HU - 1024).astype(np.int16), "--hu-range 1024 1025"),
    "0-255": (((HU.clip(-1000, 1500) + 1000) / 2500 * 255).round().astype(np.uint8), "--hu-range -1000 -990.196"),
    "0-255, float": ((HU.clip(-1000, 1500) + 1000) / 2500 * 255, "--hu-range -1000 -990.196"),
    "beyond": (np.where(HU > 450, 20000, HU).astype(np.int16), "beyond"),
    "blank": (np.zeros_like(HU), "every voxel"),
    "mask": ((HU > 0).astype(np.int16), "--hu-range LO HI"),
    "infinite": (np.where(HU > 450, -np.inf, HU), "not finite"),
    "NaN": (np.where(HU > 450, np.nan, HU), "not finite"),
}


def judged(stored: np.ndarray, channels: int = 1, raw: bool = False) -> tuple[str, str]:
    stored = np.repeat(stored[None], channels, 0)
    try:
        return judge_voxels(Header(stored.shape, stored.dtype, raw=raw), stored), ""
    except BadVolume as problem:
        return "", str(problem)


@pytest.mark.parametrize("name", KINDS)
def test_what_values_stand_for_is_told_by_what_a_chest_shows(name: str) -> None:
    stored, expected = KINDS[name]
    kind, reason = judged(stored)
    assert bool(reason) != bool(kind)
    assert expected == kind if expected in ("hu", "unit") else expected in reason


def test_several_channels_within_0_and_1_are_windows() -> None:
    windows = (HU.clip(-160, 240) + 160) / 400
    assert judged(windows, 3) == ("windowed", "")
    assert "store (v + 1) / 2" in judged(windows * 2 - 1, 3)[1]
    assert judged(HU, 2) == ("hu", "")


def test_of_a_raw_scan_only_hu_are_taken_and_voxels_without_a_value_do_no_harm() -> None:
    assert judged(np.where(HU > 450, np.nan, HU), raw=True) == ("hu", "")
    for name in ("unit", "HU + 1024, padded", "z-scores", "0-255", "[-1, 1]", "HU / 1000"):
        kind, reason = judged(KINDS[name][0], raw=True)
        assert not kind
        assert "--intensity unit --hu-range" in reason


def unit(*shape: int) -> np.ndarray:
    return (chest(*shape).astype(np.float32) + 1100) / 2600


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (unit(8, 9, 9) * 2 - 1, r"\[-1, 1\]"),
        ((unit(8, 9, 9) * 255).astype(np.uint8), "8-bit"),
        (chest(8, 9, 9) + np.int16(1100), "intercept is missing"),
        (chest(8, 9, 9) - np.int16(1024), "applied twice"),
        (np.where(chest(8, 9, 9) > 600, 20000, -1000).astype(np.int16), "beyond"),
    ],
)
def test_ranges_that_are_none_of_these_stop_the_run_naming_file_and_flag(
    tmp_path: Path, stored: np.ndarray, words: str
) -> None:
    table = table_of(save(tmp_path / "odd.npz", image=stored))
    with pytest.raises(BadInput, match=words) as caught:
        decide_preprocessing(table, (8, 8, 8), CHEST)
    assert "odd.npz" in str(caught.value)
    assert "--intensity" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda hu: (np.clip(hu, -1000, 1500) + 1000) / 1250 - 1, 1),
        (lambda hu: ((np.clip(hu, -1000, 1500) + 1000) * (255 / 2500)).round().astype(np.uint8), 6),
        (lambda hu: (hu + 1024).astype(np.int16), 0),
        (lambda hu: (hu - 1024).astype(np.int16), 0),
    ],
)
def test_the_flag_that_a_refusal_names_gives_the_right_hu(tmp_path: Path, change: Callable, tolerance: float) -> None:
    hu = chest(8, 9, 9).astype(np.float32)
    table = table_of(save(tmp_path / "odd.npz", image=change(hu)))
    with pytest.raises(BadInput) as caught:
        decide_preprocessing(table, (8, 9, 9), CHEST)
    lo, hi = map(float, re.search(r"--intensity unit --hu-range (\S+) ([-\d.]+\d)", str(caught.value)).groups())
    decided = decide_preprocessing(table, (8, 9, 9), CHEST, intensity="unit", hu_range=(lo, hi))
    found = load_sample(table.paths[0], decided).numpy()
    assert np.abs(found - np.clip(hu, -1100 if tolerance == 0 else -1000, 1500)).max() <= tolerance


@pytest.mark.parametrize("name", ["z-scores", "HU / 1000", "HU + 1024, padded", "0-255", "[-1, 1]"])
def test_a_model_predicts_only_on_values_of_its_kind(tmp_path: Path, name: str) -> None:
    table = table_of(save(tmp_path / "odd.npz", image=KINDS[name][0][None]))
    flags = {"orientation": None, "intensity": "auto", "hu_range": (-1000.0, 1500.0), "on_bad_volume": "stop"}
    for trusted in (False, True):  # whatever its training run took on trust
        with pytest.raises(BadInput, match="--intensity unit --hu-range") as caught:
            decide_preprocessing_like(prep((8, 9, 9), trusted=trusted).to_dict(), table, Namespace(**flags))
    if name == "z-scores":
        lo, hi = float(HU.mean()), float(HU.mean() + HU.std())
    else:
        lo, hi = map(float, re.search(r"--hu-range (\S+) (-?[\d.]+\d)", str(caught.value)).groups())
    named = Namespace(**flags | {"intensity": "unit", "hu_range": (lo, hi)})
    for trained in (prep((40, 40, 40)), prep((40, 40, 40), intensity="unit")):
        decided = decide_preprocessing_like(trained.to_dict(), table, named)
        found = load_sample(table.paths[0], decided).numpy()[0, -40:, -40:, -40:]
        if "padded" not in name:
            assert np.abs(found.clip(-1000) - HU.clip(-1000, 1400)).max() <= (6 if name == "0-255" else 1)
    other = prep((8, 9, 9), intensity="unit", hu_range=(lo, hi), trusted=True)
    good = table_of(save(tmp_path / "good.npz", image=HU.astype(np.int16)[None]))
    with pytest.raises(BadInput, match="looks like 'hu'"):
        decide_preprocessing_like(other.to_dict(), good, Namespace(**flags))
    assert decide_preprocessing_like(other.to_dict(), table, Namespace(**flags)).intensity == "unit"


def test_files_with_one_fault_are_told_in_one_line(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"odd{i}.npz", image=chest(8, 9, 9) + np.int16(1100)) for i in range(3)]
    with pytest.raises(BadInput, match=r"odd0\.npz: has.*\(3 of 4 files") as caught:
        decide_preprocessing(table_of(*paths, save(tmp_path / "good.npz", image=chest(8, 9, 9))), (8, 8, 8), CHEST)
    assert len(caught.value.messages) == 1


def test_a_mixture_stops_the_run_with_an_example_of_each(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"hu{i}.npz", image=chest(8, 9, 9).astype(np.float32)) for i in range(3)]
    paths.append(save(tmp_path / "unit.npz", image=unit(8, 9, 9).astype(np.float32)))
    with pytest.raises(BadInput, match=r"hu: .*hu0.npz.*unit: .*unit.npz"):
        decide_preprocessing(table_of(*paths), (8, 8, 8), CHEST)


def test_one_odd_file_among_hundreds_is_found_when_it_is_read(tmp_path: Path) -> None:
    odd = save(tmp_path / "odd.npz", image=unit(8, 9, 9))
    with pytest.raises(BadVolume, match=r"odd\.npz: looks like 'unit', not 'hu'"):
        load_sample(odd, prep((8, 8, 8)))
    assert load_sample(odd, prep((8, 8, 8), trusted=True)).max() <= 1  # --intensity hu, on purpose


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_voxel_that_is_not_finite_refuses_the_scan(tmp_path: Path, value: float) -> None:
    stored = chest(20, 24, 24).astype(np.float32)
    stored[0, 7, 11, 13] = value
    with pytest.raises(BadVolume, match="not finite"):
        load_sample(save(tmp_path / "v.npz", image=stored), prep((8, 8, 8), trusted=True))


def test_a_blank_scan_is_refused_even_on_purpose(tmp_path: Path) -> None:
    path = save(tmp_path / "v.npz", image=np.zeros((1, 8, 8, 8), np.int16))
    with pytest.raises(BadVolume, match="same value"):
        load_sample(path, prep((8, 8, 8), trusted=True))


def test_windowed_files_must_have_the_same_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    three, four = (save(tmp_path / f"{n}.npz", image=rng.random((n, 6, 8, 8), np.float32)) for n in (3, 4))
    decided = decide_preprocessing(table_of(three), (6, 8, 8), CHEST)
    assert (decided.intensity, decided.channels) == ("windowed", 3)
    with pytest.raises(BadInput, match="channels"):
        decide_preprocessing(table_of(three, four), (6, 8, 8), CHEST)
    with pytest.raises(BadVolume, match="4 channels"):
        load_sample(four, decided)


# Damaged and hostile files


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def zipped(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


PLAIN = "{'descr': '<i2', 'fortran_order': False, 'shape': (1, 2, 2, 2), }"
OBJECT = "{'descr': '|O', 'fortran_order': False, 'shape': (), }"
HOSTILE = {
    "object array": [("image.npy", npy(PLAIN.replace("<i2", "|O"), b"cos\nsystem\n(S'true'\ntR."))],
    "header larger than data": [("image.npy", npy(PLAIN.replace("1, 2, 2, 2", "1, 99999, 99999, 99"), b"\0" * 16))],
    "data larger than header": [("image.npy", npy(PLAIN, b"\0" * 17))],
    "negative shape": [("image.npy", npy(PLAIN.replace("1, 2, 2, 2", "1, -2, -2, 4"), b"\0" * 32))],
    "two dimensions": [("image.npy", npy(PLAIN.replace("1, 2, 2, 2", "8, 1"), b"\0" * 16))],
    "text": [("image.npy", npy(PLAIN.replace("<i2", "<U4"), b"\0" * 128))],
    "records": [("image.npy", npy(PLAIN.replace("'<i2'", "[('a', '<i2')]"), b"\0" * 16))],
    "code in the header": [("image.npy", npy("__import__('os').system('true')"))],
    "deep header": [("image.npy", npy("(" * 9000))],
    "no array": [("image.npy", b"hello")],
    "no image": [("volume.npy", npy(PLAIN, b"\0" * 16))],
    "no member": [],
    "object orientation": [("image.npy", npy(PLAIN, b"\0" * 16)), ("orientation.npy", npy(OBJECT, b"cos\n."))],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadVolume, match=r"v\.npz"):
        load_volume(zipped(tmp_path / "v.npz", HOSTILE[name]))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_and_linked_members_are_refused(tmp_path: Path) -> None:
    whole = npy(PLAIN, bytes(range(16)))
    twice = zipped(tmp_path / "twice.npz", [("image.npy", whole), ("image.npy", whole)])
    link = zipfile.ZipInfo("image.npy")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.npz", "w") as archive:
        archive.writestr(link, "/etc/hostname")
    for path in (twice, tmp_path / "link.npz"):
        with pytest.raises(BadVolume, match=r"double|damaged"):
            load_volume(path)


def test_pipes_folders_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "null.npz").symlink_to("/dev/zero")
    for name in ("pipe.npz", "null.npz"):
        with pytest.raises(BadVolume, match="not a regular file"):
            load_volume(tmp_path / name)
    with pytest.raises(BadVolume, match="cannot be read"):
        load_volume(tmp_path / "gone.npz")


def test_a_file_cut_short_or_changed_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "v.npz", image=chest(6, 20, 20)).read_bytes()
    broken = tmp_path / "broken.npz"
    for length in (0, 3, 20, 100, len(whole) // 2, len(whole) - 60, len(whole) - 1):
        broken.write_bytes(whole[:length])
        with pytest.raises(BadVolume):
            load_volume(broken)
    for place in range(60, len(whole) - 120, 97):  # inside the deflated array
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(BadVolume, match=r"damaged|header"):
            load_volume(broken)


def test_bombs_are_refused_within_100_mb(tmp_path: Path) -> None:
    shape, packed = (1, 128, 1024, 1024), zlib.compressobj(6, wbits=-15)
    header = npy(PLAIN.replace("1, 2, 2, 2", ", ".join(map(str, shape))))
    data = packed.compress(header)
    zeros = bytes(1 << 24)
    crc = zlib.crc32(header)
    for _ in range(16):  # 256 MiB of zeros
        data += packed.compress(zeros)
        crc = zlib.crc32(zeros, crc)
    data += packed.flush()
    size = len(header) + (1 << 28)
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(data), size, 9, 0) + b"image.npy"
    central = struct.pack(
        "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(data), size, 9, 0, 0, 0, 0, 0, 0
    )
    central += b"image.npy"
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    bomb = tmp_path / "bomb.npz"
    bomb.write_bytes(local + data + central + end)
    lie = bytearray(bomb.read_bytes())  # the same, but the archive admits to 4 KiB only
    at = len(local) + len(data)
    lie[at + 24 : at + 28] = struct.pack("<I", 4096)
    small = npy(PLAIN.replace("1, 2, 2, 2", "1, 2, 2, 1"))
    (tmp_path / "lie.npz").write_bytes(lie)
    zipped(tmp_path / "deep.npz", [("image.npy", small + b"\0" * 8), *((f"m{i}.npy", b"") for i in range(3000))])
    code = (
        "import resource, sys, finetune_siglip as f\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: f.load_volume(path)\n"
        "    except f.BadVolume as error: print('refused')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    paths = [str(tmp_path / f"{name}.npz") for name in ("bomb", "lie", "deep")]
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    *refused, megabytes = done.stdout.split()
    assert refused == ["refused"] * 3
    assert int(megabytes) < 100


def test_headers_are_read_without_inflating_and_every_bad_file_is_named(tmp_path: Path) -> None:
    good = save(tmp_path / "good.npz", image=chest(6, 20, 20), orientation="SPL", spacing=np.array([3.0, 1.5, 1.5]))
    whole = good.read_bytes()
    torn = tmp_path / "torn.npz"
    torn.write_bytes(whole[: len(whole) // 3])
    other = zipped(tmp_path / "other.npz", HOSTILE["object array"])
    (header,) = read_headers(table_of(good))
    assert (header.shape, header.dtype) == ((1, 6, 20, 20), np.int16)
    assert (header.orientation, header.spacing) == ("SPL", (3.0, 1.5, 1.5))
    with pytest.raises(BadInput) as caught:
        read_headers(table_of(torn, good, other))
    assert len(caught.value.messages) == 2
    assert "line 2" in caught.value.messages[0]
    assert "line 4" in caught.value.messages[1]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes read")
def test_a_header_costs_the_same_few_bytes_whatever_the_size(tmp_path: Path) -> None:
    def read_so_far() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    own = -read_so_far() + read_so_far()  # of asking
    for suffix, limit in (("npz", 12_000), ("b2nd", 40_000)):
        costs = []
        for size in (8, 96):
            path = save_as(tmp_path / f"{size}.{suffix}", chest(size, size, size))
            read_volume(path, voxels=False)  # imports
            before = read_so_far()
            read_volume(path, voxels=False)
            costs.append(read_so_far() - before - own)
        assert max(costs) < limit < path.stat().st_size


# Volumes of blosc2


def save_as(path: Path, image: np.ndarray) -> Path:
    """As `--prepare` writes it."""
    write = {".npz": write_npz, ".b2nd": write_b2nd}[path.suffix]
    with open(path, "wb") as file:
        write(file, image, {"orientation": "SPL", "spacing": [3.0, 1.5, 1.5], "source": [1, 2, 255]})
    return path


def test_prepared_files_of_both_formats_say_and_hold_the_same(tmp_path: Path) -> None:
    volume = chest(9, 20, 24)
    one, other = (read_volume(save_as(tmp_path / f"v.{suffix}", volume)) for suffix in ("npz", "b2nd"))
    for header, voxels in (one, other):
        np.testing.assert_array_equal(voxels, volume)
        assert (header.shape, header.dtype, header.orientation) == ((1, 9, 20, 24), np.int16, "SPL")
        assert (header.spacing, header.source) == ((3.0, 1.5, 1.5), "0102ff")
        assert header.crc
    import blosc2

    np.testing.assert_array_equal(blosc2.open(str(tmp_path / "v.b2nd"))[:], volume)


@pytest.mark.parametrize("dtype", ["int16", "float32", "float16"])
def test_volumes_as_nnunet_writes_them_are_read(tmp_path: Path, dtype: str) -> None:
    import blosc2

    volume, path = chest(20, 30, 40).astype(dtype), tmp_path / "case.b2nd"
    cparams = {"codec": blosc2.Codec.ZSTD, "clevel": 8}
    blosc2.asarray(volume, urlpath=str(path), chunks=(1, 10, 30, 40), blocks=(1, 5, 15, 20), cparams=cparams)
    assert read_headers(table_of(path))[0].shape == (1, 20, 30, 40)
    np.testing.assert_array_equal(load_volume(path), volume)
    decided = decide_preprocessing(table_of(path), (8, 8, 8), CHEST)
    same = load_sample(save(tmp_path / "v.npz", image=volume), decided)
    assert torch.equal(load_sample(path, decided), same)


def test_a_blosc2_file_that_is_no_scan_or_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    import blosc2

    blosc2.zeros((1, 2048, 2048, 2048), dtype=np.int16, urlpath=str(tmp_path / "bomb.b2nd"))
    blosc2.SChunk(data=bytes(1000), urlpath=str(tmp_path / "bytes.b2nd"), contiguous=True)
    blosc2.asarray(np.zeros((4, 4)), urlpath=str(tmp_path / "flat.b2nd"))
    for name in ("bomb", "bytes", "flat"):
        with pytest.raises(BadVolume, match=f"{name}.b2nd"):
            load_volume(tmp_path / f"{name}.b2nd")


def test_a_prepared_blosc2_file_cut_short_or_changed_anywhere_is_never_read_wrong(tmp_path: Path) -> None:
    volume, broken = chest(6, 20, 20), tmp_path / "broken.b2nd"
    whole = save_as(tmp_path / "v.b2nd", volume).read_bytes()
    changed = [whole[:length] for length in (0, 3, 20, 100, len(whole) // 2, len(whole) - 60, len(whole) - 1)]
    changed += [whole[:n] + bytes([whole[n] ^ 0x55]) + whole[n + 1 :] for n in range(300, len(whole), 97)]
    refused = 0
    for content in changed:
        broken.write_bytes(content)
        try:
            np.testing.assert_array_equal(load_volume(broken), volume)
        except BadVolume:
            refused += 1
    assert refused > len(changed) / 2


def test_a_missing_blosc2_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_as(tmp_path / "v.b2nd", chest(3, 4, 5))
    finetune_siglip.raw_library.cache_clear()
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(BadEnvironment, match="needs blosc2: pip install"):
        load_volume(path)


def test_npy_files_and_three_dimensions_are_read(tmp_path: Path) -> None:
    volume = chest(5, 6, 7)
    np.save(tmp_path / "v.npy", volume[0])
    np.testing.assert_array_equal(load_volume(tmp_path / "v.npy"), volume)
    np.savez(tmp_path / "stored.npz", image=volume[0])
    np.testing.assert_array_equal(load_volume(tmp_path / "stored.npz"), volume)
    (tmp_path / "v.npy").write_bytes((tmp_path / "v.npy").read_bytes()[:-1])
    with pytest.raises(BadVolume, match="does not match"):
        load_volume(tmp_path / "v.npy")


# Dataset and loader


@pytest.fixture
def scans(tmp_path: Path) -> Table:
    return table_of(*(save(tmp_path / f"{i}.npz", image=chest(6, 8, 8, seed=i)) for i in range(5)))


def test_items_and_their_pad_rows(scans: Table) -> None:
    dataset = CTVolumeDataset(scans, prep((4, 6, 6)))
    item, pad = dataset[3], dataset[~3]
    assert item["volume"].shape == (1, 4, 6, 6)
    assert item["volume"].dtype == torch.int16
    assert (item["targets"].tolist(), item["row"], item["bad"]) == ([1, 0], 3, False)
    assert torch.equal(pad["volume"], item["volume"])
    assert pad["targets"].isnan().all()
    assert pad["row"] == 3
    assert not np.isnan(scans.targets).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_yields_exactly_the_plan(scans: Table, workers: int) -> None:
    plan = [[4, 0], [2], [~1, 3, 1]]
    batches = list(build_loader(CTVolumeDataset(scans, prep((4, 6, 6))), plan, workers, CPU))
    assert [batch["row"].tolist() for batch in batches] == [[4, 0], [2], [1, 3, 1]]
    assert batches[2]["targets"].isnan().all(dim=1).tolist() == [True, False, False]
    assert batches[0]["volume"].dtype == torch.int16


def test_a_full_shared_memory_ends_the_run_in_one_line(
    scans: Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(size: int) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", full)
    with pytest.raises(RuntimeError, match="No space") as caught:
        list(build_loader(CTVolumeDataset(scans, prep((4, 6, 6))), [[0]], 1, CPU))
    assert finetune_siglip.say_why(caught.value) == 3
    assert "see /dev/shm" in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


@pytest.mark.parametrize(("batches", "workers"), [(9, 4), (8, 3), (3, 1), (2, 0), (0, 0)])
def test_workers_are_as_many_as_shared_memory_has_room_for(
    scans: Table, monkeypatch: pytest.MonkeyPatch, batches: int, workers: int
) -> None:
    """Two batches wait at each worker, and one is in use."""
    monkeypatch.setattr(finetune_siglip, "usable_cores", lambda: 4)
    room = batches * 2 * (2 * 4 * 6 * 6) / 0.8 + 1
    monkeypatch.setattr(finetune_siglip.shutil, "disk_usage", lambda _: Namespace(free=room))
    dataset = CTVolumeDataset(scans, prep((4, 6, 6)))
    list(build_loader(dataset, [[0, 1], [2]], 8, CPU, persist=True))
    started, dataset.loader = dataset.loader.num_workers, None  # which ends them
    assert started == workers


def test_processes_that_read_end_with_their_dataset(scans: Table) -> None:
    """The garbage collector ends queues before their loader, which then waits for processes that are told nothing."""
    dataset, others = CTVolumeDataset(scans, prep((4, 6, 6))), torch.multiprocessing.active_children()
    list(build_loader(dataset, [[0, 1], [2]], 1, CPU, persist=True))
    (reader,) = {*torch.multiprocessing.active_children()} - {*others}
    gc.disable()
    try:
        del dataset
        assert not reader.is_alive()
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_scan_that_goes_bad_is_tried_three_times_then_stops_the_run(
    scans: Table, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_siglip, "READ_DELAYS", (0.0, 0.01))
    scans.paths[2].write_bytes(b"gone bad")
    batches = iter(build_loader(CTVolumeDataset(scans, prep((4, 6, 6))), [[0], [2, 1]], workers, CPU))
    next(batches)
    with pytest.raises(BadVolume, match=r"series 's2' \(line 4\).*2.npz") as caught:
        next(batches)
    assert "Traceback" not in str(caught.value)


def test_a_scan_that_comes_back_is_read(scans: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_siglip, "READ_DELAYS", (0.0, 0.0))
    whole, tries = scans.paths[0].read_bytes(), []
    scans.paths[0].unlink()

    def come_back(_: float) -> None:
        tries.append(1)
        if len(tries) == 2:
            scans.paths[0].write_bytes(whole)

    monkeypatch.setattr(time, "sleep", come_back)
    assert not CTVolumeDataset(scans, prep((4, 6, 6)))[0]["bad"]
    assert len(tries) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_scan_is_marked_listed_and_without_targets(
    scans: Table, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_siglip, "READ_DELAYS", (0.0, 0.0))
    scans.paths[2].unlink()
    dataset = CTVolumeDataset(scans, prep((4, 6, 6)), on_bad_volume="skip")
    (batch,) = build_loader(dataset, [[1, 2]], workers, CPU)
    assert batch["bad"].tolist() == [False, True]
    assert batch["targets"].isnan().tolist() == [[False, False], [True, True]]
    assert (batch["volume"][1] == AIR).all()
    assert "2.npz" in batch["error"][1]
    assert np.isnan(dataset.targets).any(axis=1).tolist() == [False, False, True, False, False]
    assert not np.isnan(scans.targets).any()
    write_skipped(tmp_path / "skipped.csv", (scans, dataset.skipped))
    header, row = (tmp_path / "skipped.csv").read_text().splitlines()
    assert header == "series_id,split,line,reason"
    assert row.startswith("s2,train,4,")


# Augmentation


def test_augmentation_is_a_function_of_seed_epoch_and_row() -> None:
    volumes = torch.from_numpy(np.stack([chest(6, 16, 16, seed=i) for i in range(3)]))
    all_at_once = augment(volumes, [0, 1, 2], "strong", 7, 3, "hu")
    for row in range(3):
        assert torch.equal(augment(volumes[row : row + 1], [row], "strong", 7, 3, "hu")[0], all_at_once[row])
    for seed, epoch, rows in ((8, 3, [0, 1, 2]), (7, 4, [0, 1, 2]), (7, 3, [3, 4, 5])):
        assert not torch.equal(augment(volumes, rows, "strong", seed, epoch, "hu"), all_at_once)
    assert augment(volumes, [0, 1, 2], "none", 7, 3, "hu") is volumes


def test_augmented_batches_do_not_depend_on_the_number_of_workers(scans: Table) -> None:
    def epoch(workers: int) -> list[torch.Tensor]:
        loader = build_loader(CTVolumeDataset(scans, prep((4, 6, 6))), [[3, 1], [0, 4, 2]], workers, CPU)
        return [augment(batch["volume"], batch["row"].tolist(), "light", 1, 2, "hu") for batch in loader]

    alone = epoch(0)
    for workers in (2, 8):
        for one, other in zip(alone, epoch(workers), strict=True):
            assert torch.equal(one, other)


def test_moving_by_nothing_changes_nothing_and_sides_stay_sides() -> None:
    volume = torch.from_numpy(chest(6, 32, 48))
    assert (move_volume(volume, 0.0, 1.0, 1.0, (0, 0, 0), AIR) - volume).abs().max() < 0.1
    right = torch.full((1, 4, 32, 32), -1000, dtype=torch.int16)
    right[..., 4:10] = 500  # on the patient's right
    for row in range(20):
        moved = augment(right[None], [row], "strong", 0, 0, "hu")[0]
        assert moved[..., :16].mean() > moved[..., 16:].mean() + 100


def test_a_quarter_turn_of_slices_that_are_not_square_keeps_shapes() -> None:
    """With the field of view of rows and columns equal in voxels, a disc stays a disc."""
    y, x = torch.meshgrid(torch.arange(40) - 19.5, torch.arange(60) - 29.5, indexing="ij")
    disc = ((x**2 + y**2 < 100) * 1000).to(torch.int16)[None, None]
    assert (move_volume(disc, math.pi / 2, 1.0, 1.0, (0, 0, 0), 0.0) - disc).abs().max() < 400


def test_light_augmentation_stays_near_the_scan() -> None:
    volumes = torch.from_numpy(chest(8, 32, 32))[None].repeat(8, 1, 1, 1, 1)
    light = augment(volumes, list(range(8)), "light", 0, 0, "hu")
    assert light.dtype == torch.float32
    assert light.isfinite().all()
    assert (light.mean(dim=(1, 2, 3, 4)) - volumes.float().mean(dim=(1, 2, 3, 4))).abs().max() < 120
    windowed = augment(volumes.abs(), list(range(8)), "light", 0, 0, "windowed")
    assert windowed.isfinite().all()
