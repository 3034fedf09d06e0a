# ruff: noqa: PT017
"""Mangled input: no traceback, no hang, no wrong success, and every message names the file.

A few hundred cases by default; `FUZZ=full python -m pytest tests/test_fuzz.py` makes 10,000 volumes, 10,000 tables,
2,000 checkpoints and 2,000 command lines.
"""

import csv
import io
import logging
import math
import os
import random
import re
import signal
import string
import zlib
from collections import Counter
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_siglip import (
    MODEL_KIND,
    BadInput,
    Preprocessing,
    UserError,
    classifier_from,
    digest_of,
    load_checked,
    load_volume,
    main,
    pack_model,
    parse_args,
    read_table,
    read_volume,
    save_checked,
)
from helpers import CHEST, SMALL_TOWER, small_classifier

FULL = os.environ.get("FUZZ") == "full"
LABELS = ["Lung nodule", "Emphysema"]


def cases(few, many):
    return many if FULL else few


def examples(few, many):
    return settings(
        max_examples=cases(few, many), deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


class Hangs(BaseException):
    """Not an Exception, which the script would take for the fault of a damaged file."""


@contextmanager
def no_hang(seconds=20):
    def ring(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mangle(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bytes flipped, set, cut out, doubled, swapped with others, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) or 1), rng.choice([1, 1, 2, 4, 8, 64])
        kind = rng.randrange(7)
        if not data:
            break
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.choice([b"\x00", b"\xff", b"\x7f", b"\n", b",", b'"', b"'", b"9"]) * length
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            other = rng.randrange(len(data))
            data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
        elif kind == 5:
            data[at : at + length] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def names(error: UserError, path) -> bool:
    return all(str(path) in message or path.name in message for message in error.messages)


# volumes


def volume_bytes(rng, compressed=False):
    volume = np.random.default_rng(rng.randrange(99)).integers(-1024, 1500, (1, 4, 6, 5), np.int16)
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, image=volume)
    return volume, buffer.getvalue()


def read_or_refused(path):
    """The volume, or None where it is refused, and that by its name."""
    with no_hang():
        try:
            return load_volume(path)
        except BadInput as error:
            assert names(error, path), error
            return None


def test_mangled_volumes_are_refused_by_name_or_read_right(tmp_path):
    """The checksums of the archive guard the voxels, so what is read must be what was written."""
    rng, path, read = random.Random(0), tmp_path / "scan.npz", 0
    for number in range(cases(300, 8000)):
        volume, good = volume_bytes(rng, compressed=number % 2 == 0)
        path.write_bytes(mangle(good, rng))
        if (found := read_or_refused(path)) is None:
            continue
        assert found.dtype.kind in "if"
        assert np.array_equal(found, volume), number
        read += 1
    assert read < cases(300, 8000) / 2


def test_arrays_of_any_kind_in_a_whole_archive_are_refused_or_read_as_numpy_does(tmp_path):
    rng, path = random.Random(1), tmp_path / "scan.npz"
    for _ in range(cases(100, 2000)):
        dtype = rng.choice(["<i2", ">i2", "u1", "<f4", "<f8", "<f2", "?", "<c8", "<U3", "<M8[D]", "O", "<i8", "V4"])
        shape = tuple(rng.choice([0, 1, 2, 3, 5]) for _ in range(rng.randint(0, 6)))
        array = np.zeros(shape, dtype)
        if array.dtype.kind in "iuf" and array.size:
            array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
            if array.dtype.kind == "f" and rng.random() < 0.3:
                array.flat[0] = rng.choice([math.nan, math.inf])
        np.savez(path, **{rng.choice(["image", "image", "image", "arr_0"]): np.asarray(array, order=rng.choice("CF"))})
        if (found := read_or_refused(path)) is None:
            continue
        assert found.ndim == 4
        assert min(found.shape) > 0
        assert np.array_equal(found, array.reshape(found.shape), equal_nan=True)


# raw scans: nothing in them guards the voxels, so what is read may differ from what was written, but never from what
# other readers find in the changed file


@pytest.fixture(scope="module")
def raw_files(tmp_path_factory):
    """An even volume (D, H, W) and the files that hold it, the first one slice of a series."""
    pytest.importorskip("pydicom"), pytest.importorskip("SimpleITK")
    from test_formats import write_frames
    from test_raw import body, write_dicom, write_image

    folder = tmp_path_factory.mktemp("raw")
    noise = np.random.default_rng(0).normal(0, 9, (6, 12, 10))
    volume = np.clip(body(6, 12, 10) + noise, -1000, 900).astype(np.int16) // 2 * 2
    slices = write_dicom(folder / "series", volume, (7.5, 5.5, 5.5))
    write_frames(folder / "frames/frames.dcm", volume, np.arange(6)[::-1])
    paths = [
        slices[2],
        folder / "frames/frames.dcm",
        folder / "a.nii",
        folder / "a.nii.gz",
        folder / "a.mha",
        folder / "b.mha",
    ]
    for path in paths[2:]:
        write_image(path, volume, (7.5, 5.5, 5.5))
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.ReadImage(str(folder / "a.mha")), str(folder / "b.mha"), useCompression=True)
    return volume, paths


def read_with_itk(path):
    """(voxels (D, H, W) in SPL, spacing)."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO({".dcm": "GDCMImageIO", ".mha": "MetaImageIO"}.get(path.suffix, "NiftiImageIO"))
    image = sitk.DICOMOrient(reader.Execute(), "LPS")
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]


def read_plainly(path):
    """The same without ITK: its readers of MHA and enhanced CT fill in what a damaged header lacks."""
    if path.suffix == ".mha":
        head, _, data = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
        found = {name: re.search(rb"(?m)^%s = (.*)$" % name, head)[1] for name in (b"ElementSpacing", b"DimSize")}
        data = zlib.decompress(data) if b"\nCompressedData = True\n" in head else data
        spacing, size = (np.array(found[name].split(), float)[::-1] for name in (b"ElementSpacing", b"DimSize"))
        dtype = {b"S": "i2", b"U": "u2"}[re.search(rb"ElementType = MET_(.)SHORT|$", head)[1] or b"S"]
        return np.frombuffer(data, dtype).reshape(size.astype(int)), spacing
    if path.suffix == ".dcm":
        import pydicom

        data = pydicom.dcmread(path)
        frames = data.get("PerFrameFunctionalGroupsSequence") or [data]
        place = [float((f.get("PlanePositionSequence") or [f])[0].ImagePositionPatient[2]) for f in frames]
        rescaling = [(f.get("PixelValueTransformationSequence") or [f])[0] for f in frames]
        planes = data.pixel_array.reshape(len(frames), data.Rows, data.Columns)
        planes = [
            p * float(r.get("RescaleSlope", 1)) + float(r.get("RescaleIntercept", 0))
            for p, r in zip(planes, rescaling, strict=True)
        ]
        measures = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
        pixel = (measures.PixelMeasuresSequence[0] if measures else data).PixelSpacing
        return np.array(planes)[np.argsort(place)], (np.ptp(place) / max(1, len(place) - 1), *map(float, pixel))
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.load(path))
    return image.get_fdata().transpose(2, 1, 0)[:, ::-1, ::-1], image.header.get_zooms()[2::-1]


def agrees(found, header, path, volume):
    """Whether a reading is of the file as it now stands."""
    readings = [(volume, (7.5, 5.5, 5.5))]
    for read in (read_with_itk, read_plainly):
        with suppress(Exception):  # a reader that refuses the file says nothing of it
            readings.append(read(path))
    for voxels, spacing in readings:
        if path.parent.name == "series" and len(voxels) == 1:  # the one slice among the others
            voxels, spacing = np.array([*volume[:2], voxels[0], *volume[3:]]), (7.5, *spacing[1:])
        same = voxels.shape == found.shape and np.allclose(voxels, found, rtol=1e-5, equal_nan=True)
        if same and np.allclose(spacing, header.spacing, rtol=2e-3):
            return True
    return False


def test_mangled_raw_scans_are_refused_by_name_or_read_as_they_now_stand(raw_files, capfd):
    (volume, paths), rng, tally = raw_files, random.Random(7), Counter()
    for number in range(cases(240, 10000)):
        path = paths[number % len(paths)]
        good = path.read_bytes()
        cut = len(good) if number % 3 else rng.choice([200, 400, 800])  # often only the header
        path.write_bytes(mangle(good[:cut], rng) + good[cut:])
        target = path.parent if path.suffix == ".dcm" else path
        with no_hang():
            try:
                header, found = read_volume(target)
            except BadInput as error:
                assert names(error, target), error
                assert "\n" not in error.messages[0]
                tally[path.name, "refused"] += 1
            else:
                assert agrees(found[0], header, path, volume), (number, path.name)
                tally[path.name, "read"] += 1
        path.write_bytes(good)
    assert min(tally[path.name, what] for path in paths for what in ("refused", "read")) > 0, tally


# tables

ROWS = [
    ["series_id", "split", "img_path", "patient_id", *LABELS],
    ["a1", "train", "x.npz", "p1", "0", "1"],
    ["007", "train", "x.npz", "p2", "1.0", ""],
    ['quoted, "name"', "val", "y.npz", "p3", "-1", "0"],
    ["train_3_a_1", "val", "y.npz", "", "1", "1"],
    ["é", "test", "z.npz", "p5", "0", "0"],
]


def check_table(path):
    with no_hang():
        try:
            table = read_table(path, LABELS)
        except BadInput as error:
            places = (f"{path}, line ", "lines ", f"{path}: is UTF-16")
            assert all(any(place in message for place in places) for message in error.messages), error
            return False
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    assert table.series_ids == [row["series_id"] for row in rows]
    assert table.splits == [row["split"] for row in rows]
    for label, column in zip(LABELS, table.targets.T, strict=True):
        wanted = [{"": math.nan, "-1": math.nan, "-1.0": math.nan}.get(c := row[label].strip(), c) for row in rows]
        assert np.array_equal(column, np.array(wanted, np.float32), equal_nan=True)
    assert not any(name[0] in "=+-@\t\r" for name in table.series_ids)
    return True


def test_mangled_tables_are_refused_by_name_or_read_as_the_csv_module_does(tmp_path):
    for name in "xyz":
        (tmp_path / f"{name}.npz").write_bytes(b"x")
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(ROWS)
    rng, path, logged = random.Random(2), tmp_path / "table.csv", 0
    path.write_text(buffer.getvalue())
    assert check_table(path)
    for _ in range(cases(300, 8000)):
        path.write_bytes(mangle(buffer.getvalue().encode(), rng))
        logged += check_table(path)
    assert logged < cases(300, 8000) / 2


CELL = st.one_of(
    st.sampled_from(
        ["", "0", "1", "-1", "train", "val", "x.npz", "=1+1", "@x", "NaN", "nan", "1e5", " 1", "inf", "../x"]
    ),
    st.text(alphabet=st.characters(codec="utf-8"), max_size=6),
)


@examples(60, 2000)
@given(st.lists(st.lists(CELL, min_size=4, max_size=7), max_size=5), st.permutations(ROWS[0]))
def test_tables_of_any_cells_are_refused_by_name_or_read_as_the_csv_module_does(tmp_path, rows, header):
    (tmp_path / "x.npz").write_bytes(b"x")
    path = tmp_path / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    check_table(path)


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\tx"])
@pytest.mark.parametrize("where", ["id", "label"])
def test_what_a_spreadsheet_would_run_is_refused(tmp_path, capsys, text, where):
    (tmp_path / "x.npz").write_bytes(b"x")
    label = text if where == "label" else "A"
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["series_id", "split", "img_path", label],
                                    [text if where == "id" else "a", "train", "x.npz", "1"]])  # fmt: skip
    out = tmp_path / "out"
    argv = [
        "--csv",
        str(tmp_path / "t.csv"),
        "--pretrained",
        "none",
        f"--label-columns={label}",
        "--output-dir",
        str(out),
    ]
    assert main([*argv, "--output-dir", str(out)]) == 2
    assert ("control character" if text == "\tx" else "formula") in capsys.readouterr().err
    assert not list(out.glob("*.csv"))


# checkpoints


@pytest.fixture(scope="module")
def content():
    preprocessing = Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, (4, 16, 16))
    setup = {"labels": LABELS, "preprocessing": preprocessing.to_dict(), "backbone": SMALL_TOWER,
             "head": {"pooling": "attention", "dropout": 0.1}, "thresholds": [0.5, 0.5]}  # fmt: skip
    return pack_model(small_classifier(labels=2), setup, 3, {"macro_f1": 0.5})


def test_mangled_checkpoints_are_refused_by_name_or_read_right(tmp_path, content):
    path, rng = tmp_path / "best_model.pth", random.Random(3)
    save_checked(path, content)
    good, wanted = path.read_bytes(), digest_of(content)
    for _ in range(cases(60, 1500)):
        path.write_bytes(mangle(good, rng))
        with no_hang():
            try:
                found = load_checked(path, MODEL_KIND)
            except BadInput as error:
                assert names(error, path), error
                continue
        assert digest_of(found) == wanted


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.builds(dict), st.builds(lambda n: torch.zeros(n), st.integers(0, 5)),
)  # fmt: skip


@examples(25, 500)
@given(data=st.data())
def test_whole_checkpoints_of_wrong_content_are_refused_by_name(tmp_path, content, data):
    """Whoever can write a file can write its digest too."""
    changed = {name: dict(part) if isinstance(part, dict) else part for name, part in content.items()}
    part = data.draw(st.sampled_from(["", "preprocessing", "backbone", "head", "model"]))
    at = changed[part] if part else changed
    key = data.draw(st.sampled_from(sorted(at)))
    if data.draw(st.booleans()):
        at.pop(key)
    else:
        at[key] = data.draw(VALUES)
    path = tmp_path / "best_model.pth"
    torch.save({**changed, "digest": digest_of(changed)}, path)
    with no_hang():
        try:
            model = classifier_from(load_checked(path, MODEL_KIND), path).eval()
        except BadInput as error:
            assert names(error, path), error
        else:
            assert sum(p.numel() for p in model.parameters()) == sum(
                v.numel() for k, v in content["model"].items() if k in dict(model.named_parameters())
            )


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused_unseen(tmp_path, content, monkeypatch):
    path = tmp_path / "x.pth"
    vast = torch.zeros(1).expand(2**38)
    torch.save({**content, "model": {"w": vast}, "digest": "0" * 64}, path)
    monkeypatch.setattr("finetune_siglip.digest_of", lambda _: pytest.fail("it would take that much memory"))
    with no_hang(), pytest.raises(BadInput, match="damaged"):
        load_checked(path, MODEL_KIND)


# command lines

FLAGS = sorted(
    "--" + name.replace("_", "-")
    for name in vars(parse_args(["--csv", "x", "--pretrained", "y", "--label-columns", "A"]))
)
ARGUMENT = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(
        ["0", "1", "-1", "nan", "inf", "1e400", "all", "auto", "cosine", "bce", "SPL", "-1000:200,0:1,2:3", "--"]
    ),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.text(alphabet=string.printable, max_size=8),
    st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"), max_size=300),
)


@examples(60, 2000)
@given(st.lists(ARGUMENT, max_size=6), st.sampled_from(["none.csv", "table.csv", ".", "/dev/null"]))
def test_any_command_line_ends_with_a_reason(tmp_path, capsys, more, table):
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    (folder / "table.csv").write_text("series_id,split,img_path,A\na,train,none.npz,1\nb,val,none.npz,1\n")
    before, here = sorted(tmp_path.rglob("*")), os.getcwd()
    argv = [
        "--csv",
        table,
        "--pretrained",
        "no-such.pth",
        "--label-columns",
        "A",
        "--output-dir",
        "out",
        "--seed",
        "1",
        *more,
    ]
    capsys.readouterr()
    os.chdir(folder)
    try:
        with no_hang():
            try:
                code = main(argv)
            except SystemExit as end:
                code = end.code
    finally:
        os.chdir(here)
        for handler in list(logging.getLogger("finetune_siglip").handlers):
            handler.close()
    told = capsys.readouterr()
    assert code in (0, 2, 3), (code, argv)
    assert "Traceback" not in told.err
    assert "error: " in told.err if code else "--help" in argv or "-h" in argv, (argv, told)
    made = {path for path in set(tmp_path.rglob("*")) - set(before) if (folder / "out") not in (path, *path.parents)}
    elsewhere = ("--output-dir", "--test-output", "--prepare", "--cache", "--report")
    assert not made or any(word.startswith(elsewhere) for word in more), (made, argv)


# what is opened


@pytest.mark.parametrize(
    "name", ["table.csv", "scan.npz", "tower.pth", "tower/model.bin", "thresholds.json", "model.pth", "last.ckpt"]
)
def test_a_pipe_is_refused_by_name_and_never_waited_for(tmp_path, capsys, tower, name):
    table = tmp_path / "table.csv"
    voxels = np.random.default_rng(0).integers(-1000, 500, (2, 1, 4, 16, 16), np.int16)
    for scan, volume in zip(("scan", "other"), voxels, strict=True):
        np.savez(tmp_path / f"{scan}.npz", image=volume)
    table.write_text("series_id,split,img_path,A\na,train,scan.npz,1\nb,val,other.npz,1\n")
    (tmp_path / "tower").mkdir()
    path = tmp_path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    flag = {"tower.pth": "--pretrained", "model.bin": "--pretrained", "thresholds.json": "--threshold",
            "model.pth": "--test-only", "last.ckpt": "--resume"}  # fmt: skip
    given = path.parent if name.startswith("tower/") else path
    more = [flag[path.name], str(given)] if path.name in flag else []
    argv = ["--csv", str(table), "--label-columns", "A", "--pretrained", str(tower), "--num-slices", "4",
            "--wandb-mode", "disabled", "--output-dir", str(tmp_path / "out"), *more]  # fmt: skip
    with no_hang():
        assert main(argv) == 2
    assert str(given) in capsys.readouterr().err


# the source


def test_nothing_is_ever_unpickled():
    """weights_only=True and allow_pickle=False at every call, and no other way to run what a file says."""
    import ast
    from pathlib import Path

    import finetune_siglip

    tree = ast.parse(Path(finetune_siglip.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load")]
    assert loads
    for node in loads:
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        wanted = ("weights_only", "True") if "torch" in ast.unparse(node.func) else ("allow_pickle", "False")
        assert wanted in keywords.items(), ast.unparse(node)
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "torch.jit.load", "joblib.load", "np.frombuffer.load",
                 "pd.read_pickle", "pandas.read_pickle", "os.system", "marshal.loads", "torch.hub.load"}  # fmt: skip
    assert not forbidden & {ast.unparse(node.func) for node in calls}
    assert "weights_only=False" not in ast.unparse(tree)
    assert "allow_pickle=True" not in ast.unparse(tree)
    assert "trust_remote_code=True" not in ast.unparse(tree)
