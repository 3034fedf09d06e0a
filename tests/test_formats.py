"""Raw scans as third parties write them: many frames, PACS folders, rounding, padding, number types, archives."""

from __future__ import annotations

import gzip
import logging
import math
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from finetune_siglip import (
    AIR,
    BadEnvironment,
    BadInput,
    BadVolume,
    find_scans,
    load_sample,
    load_volume,
    prepare_volume,
    read_table,
    read_volume,
)
from helpers import CHEST, decide_preprocessing, prepare_table
from test_raw import CT, body, csv_of, needs_ct, write_dicom
from test_volume import table_of

pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")
SPACING = (7.5, 5.5, 5.5)
AFFINE = np.diag([-5.5, -5.5, 7.5, 1.0])


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    """An even number of HU in each voxel, as write_dicom stores them with a slope of 2."""
    noise = np.random.default_rng(0).normal(0, 8, (20, 60, 64))
    return np.clip(body(20, 60, 64) + noise, -1024, 2000).astype(np.int16) // 2 * 2


def item(**tags: object) -> pydicom.Dataset:
    data = pydicom.Dataset()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def write_frames(path: Path, volume: np.ndarray, order: np.ndarray, slopes: bool = False, **tags: object) -> None:
    """An enhanced CT of the slices `order`, in this order; with `slopes`, each frame has a rescaling of its own."""
    path.parent.mkdir(exist_ok=True)
    template = write_dicom(path.parent / "template", volume[:1], SPACING)[0]
    data = pydicom.dcmread(template)
    template.unlink(), template.parent.rmdir()
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(data, name)
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.EnhancedCTImageStorage, pydicom.uid.generate_uid()
    data.NumberOfFrames, data.FrameOfReferenceUID = len(order), "1.2.9"
    shared = {"PlaneOrientationSequence": [item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
              "PixelMeasuresSequence": [item(PixelSpacing=[5.5, 5.5], SliceThickness=7.5)]}  # fmt: skip
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence, stored = [item(**shared)], [], []
    for number, z in enumerate(order):
        slope, intercept = (1 + number % 2, -1024 - 2 * number) if slopes else (2, -1024)
        rescaling = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
        place = item(ImagePositionPatient=[-10, -20, 30 + 7.5 * int(z)])
        frame = {"PlanePositionSequence": [place], "PixelValueTransformationSequence": [rescaling]}
        data.PerFrameFunctionalGroupsSequence.append(item(**frame))
        stored.append((volume[z].astype(int) - intercept) // slope)
    data.PixelData = np.array(stored).astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path)


# Many frames


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("files", [1, 4])
def test_frames_in_any_order_and_number_of_files_are_sorted_by_position(
    tmp_path: Path, volume: np.ndarray, files: int, slopes: bool
) -> None:
    order = np.random.default_rng(1).permutation(len(volume))
    for number, part in enumerate(np.array_split(order, files)):
        tags = {"ConcatenationUID": "1.5", "InConcatenationTotalNumber": files} if slopes else {}
        write_frames(tmp_path / f"scan/{number}.dcm", volume, part, slopes, **tags)
    header, found = read_volume(tmp_path / "scan")
    np.testing.assert_array_equal(found[0], volume)
    assert header.spacing == pytest.approx(SPACING)
    if files == 1:
        np.testing.assert_array_equal(load_volume(tmp_path / "scan/0.dcm")[0], volume)


def test_frames_are_read_as_highdicom_reads_them(tmp_path: Path, volume: np.ndarray) -> None:
    highdicom = pytest.importorskip("highdicom")
    tags = {"PatientID": "x", "StudyInstanceUID": "1.2", "Manufacturer": "x", "ImageType": ["ORIGINAL", "PRIMARY"]}
    write_frames(tmp_path / "scan/0.dcm", volume, np.arange(len(volume))[::-1], **tags)
    theirs = highdicom.imread(tmp_path / "scan/0.dcm").get_volume()
    header, ours = read_volume(tmp_path / "scan")
    turned = theirs.to_patient_orientation("HPL")  # head, posterior, left
    np.testing.assert_array_equal(ours[0], turned.array)
    assert header.spacing == pytest.approx(turned.spacing)


@pytest.mark.parametrize(
    ("lost", "match"), [([8, 9], "missing"), ([19], "of the 2 files of a concatenation"), ([], "double")]
)
def test_missing_and_double_frames_are_refused(tmp_path: Path, volume: np.ndarray, lost: list[int], match: str) -> None:
    order = np.delete(np.arange(20), lost) if lost else np.array([*range(20), 7])
    tags = {"InConcatenationTotalNumber": 2} if lost == [19] else {}
    write_frames(tmp_path / "scan/0.dcm", volume, order, **tags)
    with pytest.raises(BadVolume, match=match):
        load_volume(tmp_path / "scan")
    write_frames(tmp_path / "scan/0.dcm", volume, np.arange(20), NumberOfFrames=19)
    with pytest.raises(BadVolume, match="19 frames, but says where 20"):
        load_volume(tmp_path / "scan")


def test_classic_slices_and_frames_make_one_series(tmp_path: Path, volume: np.ndarray) -> None:
    write_frames(tmp_path / "scan/a.dcm", volume, np.arange(12, 20))
    write_dicom(tmp_path / "scan", volume[:12], SPACING)
    np.testing.assert_array_equal(load_volume(tmp_path / "scan")[0], volume)


# Rounding is no fault, missing geometry is one


ROUNDING = {
    "orientation texts": lambda i: {"ImageOrientationPatient": ["1.000000", "-0", "0", "0", "1.0", f"{i % 2}e-9"]},
    "orientations of three decimals": lambda i: {"ImageOrientationPatient": [1, 0, 0.001 * (i % 2), 0, 1, 0]},
    "spacing texts": lambda i: {"PixelSpacing": ["5.5", "5.5"] if i % 2 else ["5.500000", "5.500001"]},
    "positions of one decimal": lambda i: {"ImagePositionPatient": [-10, -20.0, round(30 + 0.625 * i, 1)]},
    "in-plane positions of one decimal": lambda i: {"ImagePositionPatient": [-10 + 0.1 * (i % 2), -20, 30 + 7.5 * i]},
}


@pytest.mark.parametrize("name", ROUNDING)
def test_rounding_within_a_series_is_no_fault(tmp_path: Path, volume: np.ndarray, name: str) -> None:
    for i, path in enumerate(write_dicom(tmp_path / "scan", volume, SPACING)):
        data = pydicom.dcmread(path)
        for tag, value in ROUNDING[name](i).items():
            setattr(data, tag, value)
        data.save_as(path)
    header, found = read_volume(tmp_path / "scan")
    np.testing.assert_array_equal(found[0], volume)
    step = 11.9 / 19 if name == "positions of one decimal" else 7.5  # the first slice to the last
    assert header.spacing == pytest.approx((step, 5.5, 5.5), rel=1e-5)


@pytest.mark.parametrize("tag", ["PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_slice_that_does_not_say_how_it_lies_is_refused_by_that_reason(
    tmp_path: Path, volume: np.ndarray, tag: str, empty: bool
) -> None:
    for path in write_dicom(tmp_path / "scan", volume, SPACING):
        data = pydicom.dcmread(path)
        setattr(data, tag, None) if empty else delattr(data, tag)
        data.save_as(path)
    with pytest.raises(BadVolume, match=f"does not say its {tag}"):
        load_volume(tmp_path / "scan")


# Values


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("limit", [None, 3])
def test_padding_is_air_and_hides_no_fault(tmp_path: Path, volume: np.ndarray, signed: bool, limit: int | None) -> None:
    outside = np.hypot(*np.mgrid[-1:1:60j, -1:1:64j]) > 1
    offset, value = (0, -2000) if signed else (1024, 63536)
    for intercept in (-offset, 1 - offset):
        for path, plane in zip(write_dicom(tmp_path / "scan", volume, SPACING), volume, strict=True):
            data = pydicom.dcmread(path)
            stored = plane.astype(int) + offset
            stored[outside] = np.random.default_rng(0).integers(value, value + (limit or 0) + 1, outside.sum())
            data.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
            data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 15, int(signed)
            data.RescaleSlope, data.RescaleIntercept = 1, intercept
            data.add_new("PixelPaddingValue", "US", 63536)  # as it is often written, whatever the sign of the voxels
            if limit:
                data.add_new("PixelPaddingRangeLimit", "US", 63536 + limit)
            data.save_as(path)
        found = load_volume(tmp_path / "scan")[0]
        assert (found[:, outside] == AIR).all()
        np.testing.assert_array_equal(found[:, ~outside], volume[:, ~outside] + (intercept + offset))
        assert prepare_volume(tmp_path / "scan", (6.0, 3.0, 3.0)).min() == AIR


def test_monochrome1_changes_no_value(tmp_path: Path, volume: np.ndarray) -> None:
    write_dicom(tmp_path / "scan", volume, SPACING, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(load_volume(tmp_path / "scan")[0], volume)


def test_a_slice_without_the_rescaling_of_the_others_is_refused(tmp_path: Path, volume: np.ndarray) -> None:
    path = write_dicom(tmp_path / "scan", volume, SPACING)[3]
    data = pydicom.dcmread(path)
    del data.RescaleIntercept
    data.save_as(path)
    with pytest.raises(BadVolume, match="only some of its slices have a RescaleSlope"):
        load_volume(tmp_path / "scan")


def test_other_quantities_than_hu_are_refused(tmp_path: Path, volume: np.ndarray) -> None:
    write_dicom(tmp_path / "scan", volume, SPACING, RescaleType="Z_EFF")
    with pytest.raises(BadVolume, match="its values are Z_EFF, not HU"):
        load_volume(tmp_path / "scan")
    write_dicom(tmp_path / "scan", volume, SPACING, ModalityLUTSequence=[item(ModalityLUTType="HU")])
    with pytest.raises(BadVolume, match="look-up table"):
        load_volume(tmp_path / "scan")


def test_pixels_that_cannot_be_read_are_named_for_what_they_are(tmp_path: Path, volume: np.ndarray) -> None:
    for path in write_dicom(tmp_path / "float", volume, SPACING):
        data = pydicom.dcmread(path)
        data.FloatPixelData = data.pixel_array.astype("<f4").tobytes()
        del data.PixelData
        data.save_as(path)
    with pytest.raises(BadVolume, match="holds no whole-numbered PixelData"):
        load_volume(tmp_path / "float")
    for path in write_dicom(tmp_path / "htj2k", volume, SPACING):
        data = pydicom.dcmread(path)
        data.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" * 16])
        data.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        data.save_as(path)
    if not pydicom.pixels.get_decoder(pydicom.uid.HTJ2KLossless).is_available:
        with pytest.raises(BadEnvironment, match="pylibjpeg-openjpeg"):
            load_volume(tmp_path / "htj2k")


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">i2", ">f4"])
def test_nifti_voxels_of_any_number_type_are_read_as_nibabel_reads_them(tmp_path: Path, dtype: str) -> None:
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
    low, high = (max(-3000, info.min), min(60000, info.max)) if info else (-3000.5, 60000)
    stored = np.linspace(low, high, 5 * 6 * 7).reshape(5, 6, 7).astype(dtype)
    image = nibabel.Nifti1Image(stored, AFFINE, dtype=dtype)
    image.header.set_data_dtype(dtype)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    expected = nibabel.load(tmp_path / "scan.nii.gz").get_fdata().transpose(2, 1, 0)
    found = load_volume(tmp_path / "scan.nii.gz")[0]
    assert found.dtype in (np.int16, np.float32)
    np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize("kind", ["uint16", "dicom"])
def test_raw_values_without_their_intercept_are_refused_and_the_named_flag_settles_it(
    tmp_path: Path, volume: np.ndarray, kind: str
) -> None:
    if kind == "dicom":
        write_dicom(tmp_path / "bad", volume, SPACING, RescaleIntercept=0)
    else:
        stored = (volume.astype(int) + 1024).astype(np.uint16).transpose(2, 1, 0)
        nibabel.save(nibabel.Nifti1Image(stored, AFFINE), tmp_path / "bad.nii")
    path = tmp_path / ("bad" if kind == "dicom" else "bad.nii")
    write_dicom(tmp_path / "good", volume, SPACING)
    good = prepare_volume(tmp_path / "good", (6.0, 3.0, 3.0))
    with pytest.raises(BadVolume, match=r"--intensity unit --hu-range -1024 -1023"):
        prepare_volume(path, (6.0, 3.0, 3.0))
    mended = prepare_volume(path, (6.0, 3.0, 3.0), "unit", (-1024.0, -1023.0)).astype(int)
    assert np.abs(mended - good).max() <= 1
    table = csv_of(tmp_path, f"a,,train,{path.name},1,0", "b,,val,good,1,0")
    with pytest.raises(BadInput, match="hu-range"):
        prepare_table(table, ("A", "B"), tmp_path / "out", (6.0, 3.0, 3.0), 0, skip=False)
    out = prepare_table(table, ("A", "B"), tmp_path / "out", (6.0, 3.0, 3.0), 0, skip=True)
    assert [path.stem for path in read_table(out, ("A", "B"), labels_required=False).paths] == ["b"]
    with pytest.raises(BadInput, match="hu-range"):
        decide_preprocessing(table_of(path), (8, 16, 16), CHEST)
    settings = decide_preprocessing(table_of(path), (8, 16, 16), CHEST, intensity="unit", hu_range=(-1024.0, -1023.0))
    plain = decide_preprocessing(table_of(tmp_path / "good"), (8, 16, 16), CHEST)
    assert (load_sample(path, settings) - load_sample(tmp_path / "good", plain)).abs().max() <= 1


def test_unit_floats_need_the_range_to_be_named(tmp_path: Path, volume: np.ndarray) -> None:
    unit = ((volume.clip(-1000, 1000) + 1000) / 2000).astype(np.float32).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(unit, AFFINE), tmp_path / "unit.nii")
    nibabel.save(nibabel.Nifti1Image(volume.clip(-1000, 1000).transpose(2, 1, 0), AFFINE), tmp_path / "hu.nii")
    with pytest.raises(BadVolume, match="--intensity unit --hu-range"):
        prepare_volume(tmp_path / "unit.nii", (6.0, 3.0, 3.0))
    expected = prepare_volume(tmp_path / "hu.nii", (6.0, 3.0, 3.0)).astype(int)
    found = prepare_volume(tmp_path / "unit.nii", (6.0, 3.0, 3.0), "unit", (-1000.0, 1000.0))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_nan_is_air_and_infinity_is_refused(tmp_path: Path, volume: np.ndarray, suffix: str) -> None:
    values = volume.astype(np.float32)
    for number, (bad, path) in enumerate([(math.nan, tmp_path / f"a{suffix}"), (-math.inf, tmp_path / f"b{suffix}")]):
        values[:, :, :8] = bad
        image = sitk.GetImageFromArray(values)
        image.SetSpacing(SPACING[::-1])
        sitk.WriteImage(image, str(path))
        if number:
            with pytest.raises(BadVolume, match="infinite voxels"):
                load_volume(path)
        else:
            found = load_volume(path)[0]
            assert (found[:, :, :8] == AIR).all()
            np.testing.assert_array_equal(found[:, :, 8:], volume[:, :, 8:])
            assert (prepare_volume(path, (6.0, 6.0, 6.0))[0, :, :, :5] == AIR).all()


# Geometry


def test_the_sform_decides_where_pixdim_disagrees(tmp_path: Path, volume: np.ndarray) -> None:
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), AFFINE)
    image.header["pixdim"][1:4] = 1, 2, 3
    image.set_sform(AFFINE, 1)
    image.to_filename(tmp_path / "scan.nii")
    saved = bytearray((tmp_path / "scan.nii").read_bytes())
    saved[80:92] = np.array([1, 2, 3], "<f4").tobytes()
    (tmp_path / "scan.nii").write_bytes(saved)
    assert nibabel.load(tmp_path / "scan.nii").header["pixdim"][1] == 1
    assert read_volume(tmp_path / "scan.nii")[0].spacing == pytest.approx(SPACING)


@pytest.mark.parametrize("shear", [0.00075, -0.00075, 0.5])
def test_shears_that_move_no_voxel_are_read_and_others_refused(
    tmp_path: Path, volume: np.ndarray, shear: float
) -> None:
    affine = AFFINE.copy()
    affine[1, 2] = shear
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), affine)
    image.set_sform(affine, 1)
    nibabel.save(image, tmp_path / "scan.nii")
    if shear < 0.1:
        np.testing.assert_array_equal(load_volume(tmp_path / "scan.nii")[0], volume)
        return
    with pytest.raises(BadVolume, match="right angles"):
        load_volume(tmp_path / "scan.nii")


def test_units_of_a_nifti_are_minded(tmp_path: Path, volume: np.ndarray) -> None:
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), np.diag([-0.0055, -0.0055, 0.0075, 1]))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "scan.nii")
    assert read_volume(tmp_path / "scan.nii")[0].spacing == pytest.approx(SPACING)


@pytest.mark.parametrize(
    ("suffix", "line"),
    [(".mha", "ElementSpacing"), (".mha", "TransformMatrix"), (".nrrd", "space:"), (".nrrd", "space directions")],
)
def test_headers_without_spacing_or_space_are_refused(
    tmp_path: Path, volume: np.ndarray, suffix: str, line: str
) -> None:
    path = tmp_path / f"scan{suffix}"
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path))
    load_volume(path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(text for text in lines if not text.startswith(line.encode())))
    with pytest.raises(BadVolume, match="does not say how it lies"):
        load_volume(path)


def test_nrrd_files_of_pynrrd_are_read_in_each_space(tmp_path: Path, volume: np.ndarray) -> None:
    nrrd = pytest.importorskip("nrrd")
    for space, signs in (("left-posterior-superior", (1, 1)), ("RAS", (-1, -1)), ("left-anterior-superior", (1, -1))):
        header = {"space": space, "space directions": np.diag([5.5 * signs[0], 5.5 * signs[1], 7.5]),
                  "space origin": [0, 0, 0]}  # fmt: skip
        nrrd.write(str(tmp_path / "scan.nrrd"), volume.transpose(2, 1, 0), header)
        found = read_volume(tmp_path / "scan.nrrd")
        np.testing.assert_array_equal(found[1][0], volume)
        assert found[0].spacing == pytest.approx(SPACING)
    header |= {"space directions": np.diag([0.55, -0.55, 0.75]), "space units": ["cm"] * 3}
    nrrd.write(str(tmp_path / "scan.nrrd"), volume.transpose(2, 1, 0), header)
    assert read_volume(tmp_path / "scan.nrrd")[0].spacing == pytest.approx(SPACING)
    header |= {"space directions": np.vstack([np.full(3, np.nan), np.diag([0.55, -0.55, 0.75])])}
    header |= {"space units": ["cm"] * 3, "kinds": ["list", "domain", "domain", "domain"]}
    for frames in (1, 2):
        nrrd.write(str(tmp_path / "scan.nrrd"), np.stack([volume.transpose(2, 1, 0)] * frames), header)
        if frames == 1:
            assert read_volume(tmp_path / "scan.nrrd")[1].shape == (1, *volume.shape)
        else:
            with pytest.raises(BadVolume, match="save the one volume"):
                load_volume(tmp_path / "scan.nrrd")


# Archives


def test_the_first_bytes_say_whether_a_nifti_is_packed(tmp_path: Path, volume: np.ndarray) -> None:
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), AFFINE)
    nibabel.save(image, tmp_path / "a.nii")
    plain = (tmp_path / "a.nii").read_bytes()
    half = len(plain) // 2
    for name, content in (
        ("plain.nii.gz", plain), ("packed.nii", gzip.compress(plain)),
        ("parts.nii.gz", gzip.compress(plain[:half]) + gzip.compress(plain[half:])),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(load_volume(tmp_path / name)[0], volume)
    nibabel.save(nibabel.Nifti2Image(volume.transpose(2, 1, 0), AFFINE), tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(load_volume(tmp_path / "two.nii.gz")[0], volume)
    nibabel.save(nibabel.Nifti1Image(volume.transpose(2, 1, 0)[..., None], AFFINE), tmp_path / "one.nii.gz")
    np.testing.assert_array_equal(load_volume(tmp_path / "one.nii.gz")[0], volume)


def test_a_nifti_that_claims_more_than_its_file_can_hold_takes_no_memory(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), AFFINE)
    image.header["dim"][1:4] = 30000
    for name, packed in (("a.nii", False), ("a.nii.gz", True)):
        content = bytes(image.header.binaryblock) + bytes(1000)
        (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
        with pytest.raises(BadVolume, match="cut short"):
            load_volume(tmp_path / name)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_what_simpleitk_wrote_from_a_nifti_is_read(tmp_path: Path, volume: np.ndarray, suffix: str) -> None:
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), AFFINE)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    itk = sitk.ReadImage(str(tmp_path / "scan.nii.gz"))
    assert float(itk.GetMetaData("vox_offset")) >= 352
    sitk.WriteImage(itk, str(tmp_path / f"scan{suffix}"), useCompression=suffix == ".mha")
    np.testing.assert_array_equal(load_volume(tmp_path / f"scan{suffix}")[0], volume)


# Folders as a PACS exports them


def test_what_lies_beside_the_slices_is_passed_over_and_counted(
    tmp_path: Path, volume: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    folder, caplog_level = tmp_path / "scan", caplog.at_level(logging.INFO)
    write_dicom(folder, volume, SPACING)
    scout = write_dicom(tmp_path / "scout", volume[:1], SPACING, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
                        ImageOrientationPatient=[1, 0, 0, 0, 0, -1], SeriesInstanceUID="9")[0]  # fmt: skip
    scout.rename(folder / "scout.dcm")
    picture = write_dicom(tmp_path / "picture", volume[:1], SPACING, SeriesInstanceUID="8",
                          SOPClassUID=pydicom.uid.SecondaryCaptureImageStorage)[0]  # fmt: skip
    data = pydicom.dcmread(picture)
    del data.ImagePositionPatient
    data.save_as(folder / "dose.dcm")
    for name, content in ((".DS_Store", b"\0\1"), ("Thumbs.db", b"\xd0\xcf\0"), ("notes.txt", b"x"), ("a.pdf", b"%PDF"),
                          ("DICOMDIR", b"\0" * 128 + b"DICM"), ("README", b"see notes")):  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "sub").mkdir()
    with caplog_level:
        np.testing.assert_array_equal(load_volume(folder)[0], volume)
        load_volume(folder)
    lines = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(lines) == 1
    for count in ("6 other files", "1 sub-folder", "1 localizer", "1 screen picture"):
        assert count in lines[0]


def test_two_series_are_refused_with_their_descriptions_and_one_can_be_named(
    tmp_path: Path, volume: np.ndarray
) -> None:
    folder = tmp_path / "study"
    write_dicom(tmp_path / "sharp", volume, SPACING, SeriesDescription="Lung 1.0 B70f", SeriesInstanceUID="1.2.70")
    write_dicom(folder, volume + 2, SPACING, SeriesDescription="Soft 5.0 B30f", SeriesInstanceUID="1.2.30")
    for path in (tmp_path / "sharp").iterdir():
        path.rename(folder / f"sharp_{path.name}")
    with pytest.raises(BadVolume, match=r"2 series.*'Lung 1.0 B70f': .*#1\.2\.70") as caught:
        load_volume(folder)
    assert "Soft 5.0 B30f" in str(caught.value)
    np.testing.assert_array_equal(load_volume(f"{folder}#1.2.70")[0], volume)
    with pytest.raises(BadVolume, match=r"2 series: img_path names one"):
        load_volume(f"{folder}#1.2.99")
    table = csv_of(tmp_path, "a,,train,study#1.2.70,1,0", "b,,val,study#1.2.30,1,0")
    out = prepare_table(table, ("A", "B"), tmp_path / "out", (6.0, 3.0, 3.0), 0, skip=False)
    one, two = (np.load(path)["image"] for path in read_table(out, ("A", "B"), labels_required=False).paths)
    assert np.abs(two.astype(int) - one).max() in (2, 3)
    assert find_scans(tmp_path / "study") == [(f"study#{uid}", f"{folder}#{uid}") for uid in ("1.2.30", "1.2.70")]
    assert find_scans(tmp_path)[0] == ("out/volumes/a", str(tmp_path / "out/volumes/a.npz"))


def test_a_folder_above_the_slices_is_refused_with_the_folder_that_is_meant(tmp_path: Path, volume: np.ndarray) -> None:
    (tmp_path / "study").mkdir()
    write_dicom(tmp_path / "study/series 1", volume, SPACING)
    with pytest.raises(BadVolume, match=r"img_path names a folder such as .*study/series 1"):
        load_volume(tmp_path / "study")
    assert find_scans(tmp_path) == [("study/series 1", str(tmp_path / "study/series 1"))]


@pytest.mark.parametrize("content", [b"", b"\0" * 200, "short"])
def test_a_damaged_slice_is_not_passed_over(tmp_path: Path, volume: np.ndarray, content: bytes | str) -> None:
    last = write_dicom(tmp_path / "scan", volume, SPACING)[-1]
    last.write_bytes(last.read_bytes()[:-100] if content == "short" else content)
    with pytest.raises(BadVolume, match=last.name):
        load_volume(tmp_path / "scan")


def test_slices_without_preamble_and_behind_links_are_read(tmp_path: Path, volume: np.ndarray) -> None:
    for number, path in enumerate(write_dicom(tmp_path / "scan", volume, SPACING)):
        if number % 2:
            path.write_bytes(path.read_bytes()[132:])
        else:
            path.rename(tmp_path / path.name)
            path.symlink_to(tmp_path / path.name)
    np.testing.assert_array_equal(load_volume(tmp_path / "scan")[0], volume)


@needs_ct
def test_jpeg_lossless_is_read_as_gdcm_reads_it() -> None:
    files = sorted((CT / "dicom_cap001").iterdir())
    assert "JPEG Lossless" in pydicom.dcmread(files[0], stop_before_pixels=True).file_meta.TransferSyntaxUID.name
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(os.fspath(CT / "dicom_cap001")))
    np.testing.assert_array_equal(load_volume(CT / "dicom_cap001")[0], sitk.GetArrayFromImage(reader.Execute()))
