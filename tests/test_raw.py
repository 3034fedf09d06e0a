"""Raw scans of room 4: geometry from the file, slope and intercept once, the same through --prepare."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import finetune_siglip
from finetune_siglip import (
    AIR,
    BadEnvironment,
    BadInput,
    BadVolume,
    Preprocessing,
    body_centre,
    load_sample,
    load_volume,
    prepare_volume,
    read_headers,
    read_table,
)
from helpers import CHEST, decide_preprocessing, prepare_table
from test_volume import CODES, chest, prep, save, table_of

pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")
CT = Path(os.environ.get("CT_DATA", Path(__file__).parents[1].parent / "shared/data/ct"))
needs_ct = pytest.mark.skipif(not CT.is_dir(), reason=f"the real scans are not at {CT} (set CT_DATA)")


def body(d: int = 40, h: int = 60, w: int = 64) -> np.ndarray:
    """int16 HU (D, H, W) in SPL: a body of soft tissue around two lungs, the left one smaller, and a spine behind."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (d, h, w)), indexing="ij")
    volume = np.full((d, h, w), -1000, np.int16)
    volume[(x / 0.8) ** 2 + (y / 0.7) ** 2 < 1] = 40
    for side, size in ((-0.35, 0.3), (0.35, 0.22)):
        volume[((x - side) / size) ** 2 + (y / 0.5) ** 2 + (z / 0.8) ** 2 < 1] = -850
    volume[(x / 0.1) ** 2 + ((y - 0.5) / 0.12) ** 2 < 1] = 500
    return volume


def write_image(path: Path, volume: np.ndarray, spacing: tuple[float, float, float], code: str = "SPL") -> Path:
    """Save an SPL volume with spacing (D, H, W) as a file stored in another orientation."""
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((-100.0, -120.0, 30.0))
    letters = {"S": "S", "P": "P", "L": "L", "I": "I", "A": "A", "R": "R"}
    sitk.WriteImage(sitk.DICOMOrient(image, "".join(letters[letter] for letter in reversed(code))), str(path))
    return path


def write_dicom(folder: Path, volume: np.ndarray, spacing: tuple[float, float, float], **tags: object) -> list[Path]:
    """One file per slice, named in no order; stored values are (HU + 1024) / 2."""
    folder.mkdir(exist_ok=True)
    names = np.random.default_rng(0).permutation(len(volume))
    paths = [folder / f"s{name:03}.dcm" for name in names]
    for i, (path, plane) in enumerate(zip(paths, volume, strict=True)):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, f"1.2.3.{i}"
        data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID = "CT", "1.2.3", "1.2"
        data.ImagePositionPatient, data.ImageOrientationPatient = [-10, -20, 30 + i * spacing[0]], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.RescaleSlope, data.RescaleIntercept = list(spacing[1:]), 2, -1024
        data.Rows, data.Columns = plane.shape
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
        data.PixelData = ((plane.astype(np.int32) + 1024) // 2).astype("<u2").tobytes()
        for name, value in tags.items():
            setattr(data, name, value)
        pydicom.dcmwrite(path, data, enforce_file_format=True)
    return paths


# Geometry and values


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("code", ["SPL", "SAR", "IPR", "PSL", "LAI"])
def test_files_with_a_geometry_come_out_in_spl(tmp_path: Path, suffix: str, code: str) -> None:
    volume = body(8, 10, 12)
    path = write_image(tmp_path / f"scan{suffix}", volume, (3.0, 1.5, 1.25), code)
    np.testing.assert_array_equal(load_volume(path, "RAS"), volume[None])  # the flag is for files without a geometry
    (header,) = read_headers(table_of(path))
    assert header.raw
    assert header.orientation == "SPL"


@pytest.mark.parametrize("code", CODES)
def test_nifti_in_each_of_48_orientations_agrees_with_nibabel(tmp_path: Path, code: str) -> None:
    stored = chest(4, 5, 6)[0]
    turn = nibabel.orientations.axcodes2ornt(tuple(code))
    affine = np.eye(4)
    affine[:3, :3] = [[sign if axis == row else 0 for axis, sign in turn] for row in range(3)]
    nibabel.save(nibabel.Nifti1Image(stored, affine), tmp_path / "scan.nii")
    image = nibabel.load(tmp_path / "scan.nii")
    assert nibabel.aff2axcodes(image.affine) == tuple(code)
    to_spl = nibabel.orientations.ornt_transform(turn, nibabel.orientations.axcodes2ornt(tuple("SPL")))
    expected = nibabel.orientations.apply_orientation(stored, to_spl)
    np.testing.assert_array_equal(load_volume(tmp_path / "scan.nii")[0], expected)


def test_slope_and_intercept_are_applied_exactly_once(tmp_path: Path) -> None:
    stored = np.arange(0, 2000, dtype=np.int16)[:1000].reshape(10, 10, 10)
    image = nibabel.Nifti1Image(stored, np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.header.set_slope_inter(2, -1024)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    expected = 2 * stored.transpose(2, 1, 0).astype(np.float64) - 1024
    np.testing.assert_array_equal(load_volume(tmp_path / "scan.nii.gz")[0], expected)


def test_dicom_slices_are_sorted_by_position_and_rescaled_once(tmp_path: Path) -> None:
    volume = body(12, 20, 24) // 2 * 2
    write_dicom(tmp_path / "series", volume, (2.5, 1.5, 1.5))
    found = load_volume(tmp_path / "series")
    np.testing.assert_array_equal(found[0], volume)
    assert read_headers(table_of(tmp_path / "series"))[0].shape == found.shape


@needs_ct
def test_a_real_dicom_series_has_the_expected_voxels() -> None:
    volume = load_volume(CT / "dicom_cap001")
    assert volume.shape == (1, 24, 512, 512)
    np.testing.assert_array_equal(volume[0, :, 256], np.load(CT / "dicom_cap001_expected_first_row.npy"))


@needs_ct
def test_the_real_scans_are_read_as_the_chests_they_are() -> None:
    paths = [CT / f"{name}.npz" for name in ("covid_p001", "cap001", "normal001")]
    decided = decide_preprocessing(table_of(*paths), (32, 64, 64), CHEST)
    assert (decided.orientation, decided.intensity) == ("SPL", "hu")
    for path in paths:
        sample = load_sample(path, decided)[0].float()
        assert sample[:, :8, 28:36].mean() < -500  # air before the sternum
        assert sample[:, 40:56, 28:36].mean() > -300  # spine behind


# Refusals


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    return write_dicom(tmp_path / "series", body(12, 20, 24), (2.5, 1.5, 1.5))


def test_a_missing_slice_is_refused(series: list[Path]) -> None:
    series[5].unlink()
    with pytest.raises(BadVolume, match="missing"):
        load_volume(series[0].parent)


def test_a_double_slice_is_refused(series: list[Path]) -> None:
    shutil.copy(series[5], series[5].with_name("copy.dcm"))
    with pytest.raises(BadVolume, match="double"):
        load_volume(series[0].parent)


@pytest.mark.parametrize(
    ("tags", "word"),
    [
        ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "orientation"),
        ({"PixelSpacing": [3, 3]}, "pixel spacing"),
    ],
)
def test_mixed_series_are_refused(tmp_path: Path, series: list[Path], tags: dict[str, object], word: str) -> None:
    (other,) = write_dicom(tmp_path / "other", body(1, 20, 24), (2.5, 1.5, 1.5), **tags)
    shutil.copy(other, series[0].parent / "other.dcm")
    with pytest.raises(BadVolume, match=f"different {word}"):
        load_volume(series[0].parent)


def test_slices_of_a_tilted_gantry_are_refused(series: list[Path]) -> None:
    for i, path in enumerate(series):
        data = pydicom.dcmread(path)
        data.ImagePositionPatient = [-10, -20 + 0.3 * i, 30 + 2.5 * i]
        data.save_as(path)
    with pytest.raises(BadVolume, match="tilted gantry"):
        load_volume(series[0].parent)


def test_another_modality_is_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "mr", body(5, 20, 24), (2.5, 1.5, 1.5), Modality="MR")
    with pytest.raises(BadVolume, match="5 MR images"):
        load_volume(tmp_path / "mr")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BadVolume) as caught:
        load_volume(path)
    assert "\n" not in str(caught.value)
    write_image(path, body(8, 10, 12), (3.0, 1.5, 1.5))
    whole = path.read_bytes()
    path.write_bytes(whole[: -len(whole) // 3])
    with pytest.raises(BadVolume):
        load_volume(path)


def test_headers_that_point_to_other_files_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(body(8, 10, 12)), str(tmp_path / "scan.mhd"))
    (tmp_path / "scan.mhd").rename(tmp_path / "scan.mha")
    with pytest.raises(BadVolume, match="another file"):
        load_volume(tmp_path / "scan.mha")
    sitk.WriteImage(sitk.GetImageFromArray(body(8, 10, 12)), str(tmp_path / "scan.nhdr"))
    (tmp_path / "scan.nhdr").rename(tmp_path / "scan.nrrd")
    with pytest.raises(BadVolume, match="another file"):
        load_volume(tmp_path / "scan.nrrd")


def test_a_scan_turned_against_the_patients_axes_is_refused(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(body(8, 10, 12))
    cos, sin = np.cos(0.3), np.sin(0.3)
    image.SetDirection((cos, -sin, 0, sin, cos, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "scan.nii"))
    with pytest.raises(BadVolume, match="turned"):
        load_volume(tmp_path / "scan.nii")


def test_a_nifti_that_does_not_say_how_it_lies_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(chest(4, 5, 6)[0], None), tmp_path / "scan.nii")
    with pytest.raises(BadVolume, match="does not say how it lies"):
        load_volume(tmp_path / "scan.nii")


def test_capital_suffixes_are_read(tmp_path: Path) -> None:
    volume = body(8, 10, 12)
    write_image(tmp_path / "scan.nii.gz", volume, (3.0, 1.5, 1.5)).rename(tmp_path / "SCAN.NII.GZ")
    np.testing.assert_array_equal(load_volume(tmp_path / "SCAN.NII.GZ")[0], volume)


def test_series_over_time_are_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), tmp_path / "scan.nii")
    with pytest.raises(BadVolume, match=r"has shape \(4, 4, 4, 3\): save the one volume"):
        load_volume(tmp_path / "scan.nii")


# Spacing, field of view, --prepare


def test_a_metaimage_that_scales_its_stored_values_is_read_in_hu(tmp_path):
    path, volume = tmp_path / "scan.mha", body() // 2 * 2
    write_image(path, ((volume + 1024) // 2).astype(np.int16), (5.0, 5.0, 5.0))
    scale = b"ElementToIntensityFunctionSlope = 2\nElementToIntensityFunctionOffset = -1024\n"
    path.write_bytes(path.read_bytes().replace(b"ElementDataFile", scale + b"ElementDataFile", 1))
    assert np.array_equal(load_volume(path)[0], volume)


def test_a_prepared_scan_has_its_spacing_and_its_body_in_the_middle(tmp_path: Path) -> None:
    path = write_image(tmp_path / "scan.mha", body(40, 60, 64), (5.0, 5.0, 5.0))
    volume = prepare_volume(path, (3.0, 1.5, 1.5))
    assert (volume.shape, volume.dtype) == ((1, 160, 224, 224), np.int16)
    expected = np.array(body_centre(body(40, 60, 64), (5.0, 5.0, 5.0)))
    assert np.abs(expected - [19.5, 29.5, 31.5]).max() <= 1.5
    tissue = np.argwhere(volume[0] > -500)
    extent = (np.ptp(tissue, axis=0) + 1) * [3.0, 1.5, 1.5]
    assert np.abs(extent - [200, 210, 256])[1:].max() < 12
    assert np.abs((tissue.min(0) + tissue.max(0)) / 2 - [79.5, 111.5, 111.5]).max() <= 3


def test_what_is_outside_the_scan_is_air_and_what_is_too_much_is_cut_around_the_body(tmp_path: Path) -> None:
    small = prepare_volume(write_image(tmp_path / "a.mha", body(20, 40, 40), (3.0, 3.0, 3.0)), (3.0, 1.5, 1.5))
    assert (small[0, :60] == AIR).all()
    assert (small[0, :, :60] == AIR).all()
    wide = np.full((40, 150, 150), -1000, np.int16)
    wide[:, 80:140, 10:74] = body(40, 60, 64)  # the body lies low and to the right
    wide[:, 146:148] = 200  # on a couch
    cut = prepare_volume(write_image(tmp_path / "b.mha", wide, (5.0, 4.0, 4.0)), (3.0, 1.5, 1.5))
    tissue = np.argwhere(cut[0, 60:100] > -500)
    assert np.abs((tissue.min(0) + tissue.max(0))[2] / 2 - 111.5) < 4


def test_other_spacings_keep_the_field_of_view(tmp_path: Path) -> None:
    path = write_image(tmp_path / "scan.mha", body(), (5.0, 5.0, 5.0))
    assert prepare_volume(path, (6.0, 3.0, 3.0)).shape == (1, 80, 112, 112)


def csv_of(folder: Path, *rows: str) -> Path:
    (folder / "scans.csv").write_text("series_id,note,split,img_path,A,B\n" + "".join(f"{row}\n" for row in rows))
    return folder / "scans.csv"


@pytest.fixture
def raw_table(tmp_path: Path) -> Path:
    write_image(tmp_path / "one.nii.gz", body(), (5.0, 5.0, 5.0))
    write_dicom(tmp_path / "two", body(20, 30, 32), (10.0, 10.0, 10.0))
    return csv_of(tmp_path, '007,"x, ""y""",train,one.nii.gz,1,0', "../e t/c,,val,two,,-1")


def test_preparing_as_b2nd_gives_the_same_voxels_and_keeps_what_is_there(raw_table: Path, tmp_path: Path) -> None:
    made = {}
    for kind in ("npz", "b2nd", "b2nd"):
        how = ((12.0, 6.0, 6.0), 0, False, "auto", (-1000.0, 1500.0), kind)
        paths = read_table(prepare_table(raw_table, ("A", "B"), tmp_path / kind, *how), ("A", "B")).paths
        times = [path.stat().st_mtime_ns for path in paths]
        assert made.get(kind, (paths, times))[1] == times
        made[kind] = paths, times
    for one, other in zip(made["npz"][0], made["b2nd"][0], strict=True):
        assert (one.suffix, other.suffix) == (".npz", ".b2nd")
        np.testing.assert_array_equal(load_volume(one), load_volume(other))


@pytest.mark.parametrize("workers", [0, 2])
def test_preparing_gives_files_and_a_table_that_train_like_the_raw_ones(
    raw_table: Path, tmp_path: Path, workers: int
) -> None:
    spacing = (12.0, 6.0, 6.0)
    out = prepare_table(raw_table, ("A", "B"), tmp_path / "out", spacing, workers, skip=False)
    lines = out.read_text().splitlines()
    assert lines[0] == "series_id,note,split,img_path,A,B"
    assert lines[1] == '007,"x, ""y""",train,volumes/007.npz,1,0'
    assert lines[2].startswith("../e t/c,,val,volumes/_e_t_c-")
    raw, prepared = (read_table(path, ("A", "B")) for path in (raw_table, out))
    a = decide_preprocessing(raw, (16, 24, 24), CHEST, spacing=spacing[::-1])
    b = decide_preprocessing(prepared, (16, 24, 24), CHEST)
    assert a == b
    assert a.spacing == spacing
    for one, other in zip(raw.paths, prepared.paths, strict=True):
        assert torch.equal(load_sample(one, a), load_sample(other, b))


def test_preparing_again_does_only_what_is_missing(
    raw_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spacing, done = (12.0, 6.0, 6.0), []
    real = finetune_siglip.prepare_volume
    monkeypatch.setattr(
        finetune_siglip, "prepare_volume", lambda path, *how: done.append(path.name) or real(path, *how)
    )
    out = prepare_table(raw_table, ("A", "B"), tmp_path / "out", spacing, 0, skip=False)
    prepare_table(raw_table, ("A", "B"), tmp_path / "out", spacing, 0, skip=False)
    assert done == ["one.nii.gz", "two"]
    (tmp_path / "out/volumes/007.npz").write_bytes(b"torn")
    os.utime(next((tmp_path / "two").iterdir()), (1, 1))
    prepare_table(raw_table, ("A", "B"), tmp_path / "out", spacing, 0, skip=False)
    assert done[2:] == ["one.nii.gz", "two"]
    prepare_table(raw_table, ("A", "B"), tmp_path / "out", (12.0, 6.0, 7.0), 0, skip=False)
    assert done[4:] == ["one.nii.gz", "two"]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert out.is_file()


def test_scans_that_cannot_be_prepared_are_told_after_all_others_are_done(raw_table: Path, tmp_path: Path) -> None:
    (tmp_path / "one.nii.gz").write_bytes(b"broken")
    with pytest.raises(BadInput, match=r"'007' \(line 2\)"):
        prepare_table(raw_table, ("A", "B"), tmp_path / "out", (12.0, 6.0, 6.0), 0, skip=False)
    assert not (tmp_path / "out/scans.csv").exists()
    assert len(list((tmp_path / "out/volumes").iterdir())) == 1
    out = prepare_table(raw_table, ("A", "B"), tmp_path / "out", (12.0, 6.0, 6.0), 0, skip=True)
    assert len(out.read_text().splitlines()) == 2
    assert (tmp_path / "out/skipped.csv").read_text().splitlines()[1].startswith("007,train,2,")
    for path in (tmp_path / "two").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(BadInput, match=r"\(line 3\)") as caught:  # a table without a scan is of no use
        prepare_table(raw_table, ("A", "B"), tmp_path / "none", (12.0, 6.0, 6.0), 0, skip=True)
    assert "other scans" not in str(caught.value)


def test_what_is_no_raw_scan_is_kept_if_it_can_be_read(tmp_path: Path) -> None:
    ready = save(tmp_path / "ready.npz", image=chest(4, 5, 6))
    (tmp_path / "one.dcm").write_bytes(b"DICM")
    write_image(tmp_path / "raw.mha", body(), (5.0, 5.0, 5.0))
    table = csv_of(tmp_path, "a,,train,ready.npz,1,0", "b,,val,one.dcm,1,0", "c,,val,raw.mha,1,0")
    with pytest.raises(BadInput, match=r"'b' \(line 3\): .*one\.dcm: is no DICOM file"):
        prepare_table(table, ("A", "B"), tmp_path / "out", (12.0, 6.0, 6.0), 0, skip=False)
    out = prepare_table(table, ("A", "B"), tmp_path / "out", (12.0, 6.0, 6.0), 0, skip=True)
    assert [row.split(",")[3] for row in out.read_text().splitlines()[1:]] == [str(ready), "volumes/c.npz"]


def test_the_source_table_is_never_overwritten(raw_table: Path, tmp_path: Path) -> None:
    before = raw_table.read_bytes()
    with pytest.raises(BadInput, match="overwrite"):
        prepare_table(raw_table, ("A", "B"), tmp_path, (12.0, 6.0, 6.0), 0, skip=False)
    assert raw_table.read_bytes() == before


def test_spacing_is_checked_when_a_volume_is_read(tmp_path: Path) -> None:
    settings: Preprocessing = prep((4, 6, 6), spacing=(3.0, 1.5, 1.5))
    stored = chest(8, 8, 6)
    right = save(tmp_path / "right.npz", image=stored, orientation="SPL", spacing=np.float32([3.0, 1.5, 1.5]))
    load_sample(right, settings)
    wrong = save(tmp_path / "wrong.npz", image=stored, orientation="SPL", spacing=[1.5, 1.5, 3.0])
    with pytest.raises(BadVolume, match="spacing"):
        load_sample(wrong, settings)
    turned = save(tmp_path / "turned.npz", image=stored, orientation="RAS", spacing=[1.5, 1.5, 3.0])
    assert decide_preprocessing(table_of(turned), (4, 6, 6), CHEST).spacing == (3.0, 1.5, 1.5)
    load_sample(turned, prep((4, 6, 6), orientation="RAS", spacing=(3.0, 1.5, 1.5)))


def test_a_raw_scan_among_prepared_ones_of_unknown_spacing_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "scan.mha", body(), (5.0, 5.0, 5.0))
    with pytest.raises(BadVolume, match="--prepare"):
        load_sample(path, prep((4, 6, 6)))
    with pytest.raises(BadVolume, match="windows are needed"):
        load_sample(path, dataclasses.replace(prep((4, 6, 6)), intensity="windowed", channels=3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_ends_the_preparation_in_one_line(
    raw_table: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune_siglip, "write_npz", fail)
    with pytest.raises(BadEnvironment, match="No space left") as caught:
        prepare_table(raw_table, ("A", "B"), tmp_path / "out", (12.0, 6.0, 6.0), workers, skip=True)
    assert "\n" not in str(caught.value)
