"""The check of room 4: what is wrong with the data is said, with its line, and a wrong axis is seen."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

import finetune_siglip
from finetune_siglip import BadInput, Table, check_data, read_headers
from helpers import CHEST, decide_preprocessing
from phantoms import make_phantom
from test_raw import CT, needs_ct
from test_volume import chest, prep, save, table_of

GRID = (24, 96, 96)


@pytest.fixture
def phantom() -> np.ndarray:
    return make_phantom(np.random.default_rng(0), ["Emphysema"])[0][None]


def report(table: Table, picture: Path | None = None) -> str:
    return "\n".join(check_data(table, prep(GRID), picture))


def test_counts_shapes_and_settings_are_told(phantom: np.ndarray, tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.npz", image=np.roll(phantom, i, 3)) for i in range(4)]
    table = table_of(*paths)
    table = dataclasses.replace(table, splits=["train", "train", "val", "test"])
    table.targets[1] = [0, np.nan]
    found = report(table, tmp_path / "data_check.png")
    assert "train: 2 scans of 2 patients" in found
    row = next(line for line in found.splitlines() if line.startswith("A "))
    assert row.split()[1:] == ["1/1/0", "1/0/0", "1/0/0"]
    row = next(line for line in found.splitlines() if line.startswith("B "))
    assert row.split()[1:] == ["0/1/1", "0/1/0", "0/1/0"]
    assert "4 x (1, 24, 96, 96) int16" in found
    assert "--orientation SPL --intensity hu" in found
    assert "warning" not in found
    assert (tmp_path / "data_check.png").read_bytes().startswith(b"\x89PNG")


def test_slices_too_far_apart_for_small_findings_are_warned_of(phantom: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", image=phantom, spacing=np.array([12.5, 3.75, 3.75]))
    table = dataclasses.replace(table_of(path), labels=("Lung nodule", "Cardiomegaly"))
    assert "slices lie 12.5 mm apart" in report(table)
    assert "warning: more than 3 mm hide small findings (Lung nodule): --num-slices 100 avoids it" in report(table)
    fine = "\n".join(check_data(table, prep((100, 96, 96))))
    assert "slices lie 3.0 mm apart" in fine
    assert "more than 3 mm" not in fine
    assert "more than 3 mm" not in report(dataclasses.replace(table, labels=("Emphysema", "Cardiomegaly")))
    assert "mm apart" not in report(table_of(save(tmp_path / "b.npz", image=phantom)))  # nothing known, nothing said


def test_copies_of_a_scan_and_overlapping_splits_are_named(phantom: np.ndarray, tmp_path: Path) -> None:
    one, other = (save(tmp_path / f"{name}.npz", image=phantom) for name in "ab")
    (tmp_path / "link.npz").symlink_to(one)
    table = table_of(one, other, tmp_path / "link.npz")
    table = dataclasses.replace(table, splits=["train", "val", "val"], patient_ids=["p", "p", "q"])
    found = report(table)
    assert "series 's0' (line 2) and series 's1' (line 3) have the same voxels" in found
    assert "series 's0' (line 2) and series 's2' (line 4) have the same voxels" in found


def test_what_is_no_chest_is_refused_or_suspected_where_the_intensity_is_named(
    phantom: np.ndarray, tmp_path: Path
) -> None:
    inside = np.zeros(phantom.shape[1:], bool)
    inside[:, 20:76, 10:86] = True
    head = np.where(inside[None], np.maximum(phantom, 30), -1000).astype(np.int16)
    air = np.full_like(phantom, -1000)
    air[0, 3, 3, 3] = 200
    table = table_of(*(save(tmp_path / f"{i}.npz", image=volume) for i, volume in enumerate((phantom, head, air))))
    with pytest.raises(BadInput, match="no lungs and muscle") as caught:
        report(table)
    assert len(caught.value.messages) == 2
    warnings = [line for line in check_data(table, prep(GRID, trusted=True)) if line.startswith("warning")]
    assert len(warnings) == 2
    for line, number in zip(warnings, (3, 4), strict=True):
        assert f"(line {number})" in line
        assert "no lungs and muscle" in line


def test_a_spine_in_front_is_suspected_with_the_codes_that_would_be_right(phantom: np.ndarray, tmp_path: Path) -> None:
    turned = save(tmp_path / "turned.npz", image=np.ascontiguousarray(phantom[:, :, ::-1, ::-1]))
    (line,) = [line for line in report(table_of(turned)).splitlines() if line.startswith("warning")]
    assert "spine in front: is it --orientation SAL, SAR or depth last" in line
    for code in ("SAR", "SAL"):
        assert "spine" not in "\n".join(check_data(table_of(turned), prep(GRID, orientation=code)))


@needs_ct
def test_the_check_is_silent_about_real_chests_and_sees_their_wrong_axes() -> None:
    paths = [CT / f"{name}.npz" for name in ("covid_p001", "cap001", "normal001")]
    table = table_of(*paths)
    for grid in ((64, 224, 224), GRID):
        assert "warning" not in "\n".join(check_data(table, prep(grid)))
    for wrong in ("SAL", "SAR", "IAL"):  # all files are SPL
        assert "\n".join(check_data(table, prep(GRID, orientation=wrong))).count("spine in front") == 3


def test_scans_that_cannot_be_read_are_all_listed(phantom: np.ndarray, tmp_path: Path) -> None:
    good = save(tmp_path / "good.npz", image=phantom)
    damaged = tmp_path / "damaged.npz"
    whole = good.read_bytes()
    damaged.write_bytes(whole[:2000] + bytes(50) + whole[2050:])  # the header is whole, the voxels are not
    blank = save(tmp_path / "blank.npz", image=np.zeros_like(phantom))
    nan = save(tmp_path / "nan.npz", image=np.where(np.arange(96) == 5, np.nan, phantom).astype(np.float32))
    with pytest.raises(BadInput) as caught:
        report(table_of(good, damaged, blank, nan))
    assert len(caught.value.messages) == 3
    for message, line in zip(caught.value.messages, (3, 4, 5), strict=True):
        assert f"line {line}" in message


def test_damaged_scans_are_warnings_where_they_may_be_skipped(phantom: np.ndarray, tmp_path: Path) -> None:
    good, damaged = save(tmp_path / "good.npz", image=phantom), tmp_path / "damaged.npz"
    whole = good.read_bytes()
    damaged.write_bytes(whole[:2000] + bytes(50) + whole[2050:])
    table = table_of(damaged, good)
    with pytest.raises(BadInput, match="damaged"):
        decide_preprocessing(table, GRID, CHEST)
    decided = decide_preprocessing(table, GRID, CHEST, on_bad_volume="skip")
    assert decided.intensity == "hu"
    assert decide_preprocessing(table_of(damaged, good, damaged), GRID, CHEST, on_bad_volume="skip") == decided
    found = check_data(table, decided, tmp_path / "data_check.png", skip=True)
    assert any(line.startswith("warning: series 's0' (line 2): ") and "damaged" in line for line in found)
    for alone in (lambda: decide_preprocessing(table_of(damaged), GRID, CHEST, on_bad_volume="skip"),
                  lambda: check_data(table_of(damaged), decided, skip=True)):  # fmt: skip
        with pytest.raises(BadInput, match="damaged"):
            alone()


def test_a_folder_that_cannot_be_made_is_no_matter_of_the_picture(phantom: np.ndarray, tmp_path: Path) -> None:
    table = table_of(save(tmp_path / "a.npz", image=phantom))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileExistsError):
        check_data(table, prep((8, 64, 64)), tmp_path / "file" / "sheet.png")


def test_no_anatomy_is_suspected_on_a_grid_too_coarse_to_show_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    paths = [save(tmp_path / f"{i}.npz", image=make_phantom(rng, ["Lung nodule"])[0][None]) for i in range(6)]
    for grid in ((4, 16, 16), (8, 32, 32), (24, 48, 48), (64, 64, 64)):
        assert "warning" not in "\n".join(check_data(table_of(*paths), prep(grid)))


def test_a_wrong_axis_is_seen_in_the_picture(
    phantom: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The axial panel shows an axial slice and the others have the head up, however files are stored."""
    from matplotlib.axes import Axes

    shown: list[np.ndarray] = []
    monkeypatch.setattr(Axes, "imshow", lambda self, picture, **how: shown.append(np.array(picture)))
    path = save(tmp_path / "v.npz", image=phantom)
    check_data(table_of(path), prep(GRID), tmp_path / "a.png")
    assert shown[0].shape == (256, 9 * 256)
    lo, hi = CHEST[0]
    for place, view in enumerate((phantom[0, 12], phantom[0, ::-1, 48], phantom[0, ::-1, :, 48])):
        rows, columns = (np.arange(256) * n // 256 for n in view.shape)
        tile = shown[0][:, 256 * place : 256 * (place + 1)]
        np.testing.assert_allclose(tile, (view[rows][:, columns] - lo) / (hi - lo), atol=1e-6)
    turned = save(tmp_path / "turned.npz", image=np.ascontiguousarray(phantom.transpose(0, 3, 2, 1)[:, ::-1, ::-1]))
    check_data(table_of(turned), prep(GRID, orientation="RAS"), tmp_path / "b.png")
    np.testing.assert_array_equal(shown[1], shown[0])
    assert shown[0][:, 1024:1280].std() > 0.1


def test_windowed_channels_are_drawn_as_they_are(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).random((4, 6, 8, 8), np.float32)
    table = table_of(save(tmp_path / "v.npz", image=stored))
    settings = decide_preprocessing(table, (6, 8, 8), CHEST)
    assert "data_check.png" in check_data(table, settings, tmp_path / "data_check.png")[-1]


def test_headers_keep_the_order_of_the_table(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{n}.npz", image=chest(n, 4, 4)) for n in range(2, 22)]
    assert [header.shape[1] for header in read_headers(table_of(*paths))] == list(range(2, 22))


def test_spread_takes_rows_from_everywhere() -> None:
    assert finetune_siglip.spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert finetune_siglip.spread(range(3), 5) == [0, 1, 2]
    for n, k in itertools.product((1, 7, 100), (1, 6, 12)):
        assert len(set(finetune_siglip.spread(range(n), k))) == min(n, k)
