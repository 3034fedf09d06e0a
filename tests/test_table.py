"""Room 3: ids survive byte for byte, and every error of a table is told at once with its line."""

from __future__ import annotations

import contextlib
import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_siglip import BadInput, Complaints, read_table

LABELS = ("Emphysema", "Lung nodule")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with scans a.npz … f.npz, of which only the entry in the file system matters here."""
    for name in "abcdef":
        (tmp_path / f"{name}.npz").write_bytes(b"x")
    return tmp_path


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


HEADER = "series_id,split,img_path,Emphysema,Lung nodule\n"


def errors(path: Path, labels: tuple[str, ...] = LABELS, **options: bool) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read_table(path, labels, **options)
    return list(caught.value.messages)


def test_ids_stay_byte_for_byte_and_paths_are_relative_to_the_csv(folder: Path) -> None:
    rows = "007,train,a.npz,1,0\nNA,train,b.npz,0,\n1e5,val,c.npz,-1,1.0\nnull,val,d.npz,0.0,-1.0\n ü ,test,e.npz,,\n"
    table = read_table(write(folder, HEADER + rows), LABELS)
    assert table.series_ids == ["007", "NA", "1e5", "null", " ü "]
    assert table.patient_ids == table.series_ids
    assert table.paths[0] == folder / "a.npz"
    assert table.line_numbers == [2, 3, 4, 5, 6]
    nan = math.nan
    np.testing.assert_array_equal(table.targets, [[1, 0], [0, nan], [nan, 1], [0, nan], [nan, nan]])
    assert table.targets.dtype == np.float32


def test_subset_and_split_keep_rows_together(folder: Path) -> None:
    table = read_table(write(folder, HEADER + "x,val,a.npz,1,0\ny,train,b.npz,0,1\nz,val,c.npz,0,0\n"), LABELS)
    val = table.split("val")
    assert (val.series_ids, val.line_numbers, len(val)) == (["x", "z"], [2, 4], 2)
    turned = table.subset([2, 0])
    assert (turned.series_ids, turned.targets.tolist()) == (["z", "x"], [[0, 0], [1, 0]])
    assert len(table.split("test")) == 0
    assert table.split("test").targets.shape == (0, 2)


def test_every_kind_of_error_is_reported_in_one_go_with_its_line(folder: Path) -> None:
    (folder / "empty.npz").touch()
    os.mkfifo(folder / "pipe.npz")
    rows = [
        "ok,train,a.npz,1,0",
        "dup,train,b.npz,1,0",
        "dup,train,c.npz,0,0",
        "cell,train,d.npz,yes,2",
        "split,Train,e.npz,0,0",
        "gone,val,missing.npz,0,0",
        "pipe,val,pipe.npz,0,0",
        "nil,val,empty.npz,0,0",
        "=SUM(A1),val,f.npz,0,0",
        ",val,f.npz,0,0",
        "path,val,,0,0",
        "few,val,f.npz,0",
        "many,val,f.npz,0,0,",
    ]
    found = "\n".join(errors(write(folder, HEADER + "\n".join(rows))))
    for line, part in (
        (4, "'dup' is on line 3"), (5, "'Emphysema' is 'yes'"), (5, "'Lung nodule' is '2'"), (6, "'Train' is unknown"),
        (7, "missing.npz"), (8, "not a regular file"), (9, "is an empty file"), (10, "formula"), (11, "is empty"),
        (12, "img_path is empty"), (13, "4 cells"), (14, "6 cells"),
    ):  # fmt: skip
        assert any(f"line {line}:" in message and part in message for message in found.splitlines()), (line, part)
    assert "line 2:" not in found


def test_trailing_commas_on_every_row_are_refused_rather_than_shifting_columns(folder: Path) -> None:
    found = errors(write(folder, HEADER + "x,train,a.npz,1,0,\ny,val,b.npz,0,1,\n"))
    assert len(found) == 2
    assert all("6 cells where the header has 5" in message for message in found)


@pytest.mark.parametrize("mark", ["=", "+", "-", "@"])
def test_ids_that_a_spreadsheet_would_run_are_refused(folder: Path, mark: str) -> None:
    found = errors(write(folder, HEADER + f"{mark}1,train,a.npz,1,0\n"))
    assert "formula" in found[0]
    assert any("formula" in message for message in errors(folder / "table.csv", (f"{mark}label",)))


@pytest.mark.parametrize("cell", ["\tx", "a\tb", "a\x7f"])
def test_control_characters_in_ids_are_refused(folder: Path, cell: str) -> None:
    assert "line 2" in errors(write(folder, HEADER + f"{cell},train,a.npz,1,0\n"))[0]


def test_a_missing_column_names_its_nearest_neighbour(folder: Path) -> None:
    text = HEADER.replace("Lung nodule", "Lung nodules") + "x,train,a.npz,1,0\n"
    (message,) = errors(write(folder, text))
    assert "no column 'Lung nodule'" in message
    assert "'Lung nodules'" in message


def test_another_separator_is_recognised(folder: Path) -> None:
    found = errors(write(folder, (HEADER + "x,train,a.npz,1,0\n").replace(",", ";")))
    assert any("something else than commas" in message for message in found)


def test_a_column_given_twice_is_refused_only_where_it_is_used(folder: Path) -> None:
    row = "x,train,a.npz,1,0,n,n\n"
    assert len(read_table(write(folder, HEADER.strip() + ",note,note\n" + row), LABELS)) == 1
    (message,) = errors(write(folder, HEADER.strip() + ",split,note\n" + row))
    assert "'split' appears 2 times" in message


def test_an_index_column_without_a_name_is_no_obstacle(folder: Path) -> None:
    assert len(read_table(write(folder, "," + HEADER + "0,x,train,a.npz,1,0\n"), LABELS)) == 1


@pytest.mark.parametrize("labels", [("",), ("A", "A"), (" ",), ("split",), ("=A",), ()])
def test_bad_label_names_are_refused(folder: Path, labels: tuple[str, ...]) -> None:
    assert "--label-columns" in errors(write(folder, HEADER), labels)[0]


def test_byte_order_mark_and_windows_line_ends_do_no_harm(folder: Path) -> None:
    text = b"\xef\xbb\xbf" + (HEADER + "x,train,a.npz,1,0\n\n").replace("\n", "\r\n").encode()
    table = read_table(write(folder, text), LABELS)
    assert (table.series_ids, table.targets.tolist()) == (["x"], [[1, 0]])


def test_text_that_is_not_utf8_is_refused_with_its_lines(folder: Path) -> None:
    rows = b"x,train,a.npz,1,0\n\xe9,train,b.npz,1,0\nz\x00,train,c.npz,1,0\n"
    found = errors(write(folder, HEADER.encode() + rows))
    assert any("line 3" in message and "UTF-8" in message for message in found)
    assert any("line 4" in message and ("control character" in message or "NUL" in message) for message in found)
    assert "UTF-16" in errors(write(folder, HEADER.encode("utf-16")))[0]


def test_a_cell_may_span_lines_unless_it_is_an_id(folder: Path) -> None:
    header = "report," + HEADER
    table = read_table(
        write(folder, header + '"Two\nlines, ""quoted""",x,train,a.npz,1,0\nn,y,train,b.npz,0,0\n'), LABELS
    )
    assert (table.series_ids, table.line_numbers) == (["x", "y"], [2, 4])
    (message,) = errors(write(folder, HEADER + '"x\ny",train,a.npz,1,0\n'))
    assert "line 2" in message
    assert "control character" in message
    found = errors(write(folder, HEADER + 'x,train,a.npz,1,0\n"y,train,b.npz,1,0\nz,train,c.npz,0,0\n'))
    assert any("line 3" in message and "quotation mark" in message for message in found)


def test_line_ends_of_old_macs_and_blank_rows_do_no_harm(folder: Path) -> None:
    rows = "x,train,a.npz,1,0\n\ny,val,b.npz,0,1\n,,,,\n , ,,,\n,,,,,,,\n\n"
    for end in ("\n", "\r\n", "\r"):
        table = read_table(write(folder, (HEADER + rows).replace("\n", end)), LABELS)
        assert (table.series_ids, table.line_numbers) == (["x", "y"], [2, 4])
        assert table.targets.tolist() == [[1, 0], [0, 1]]


def test_truth_values_are_labels(folder: Path) -> None:
    rows = "x,train,a.npz,True,False\ny,train,b.npz,TRUE,false\nz,train,c.npz,,true\n"
    table = read_table(write(folder, HEADER + rows), LABELS)
    np.testing.assert_array_equal(table.targets, [[1, 0], [1, 0], [np.nan, 1]])


def test_paths_written_on_windows_are_found(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.npz").write_bytes(b"x")
    (folder / "odd\\name.npz").write_bytes(b"x")
    rows = "x,train,sub\\a.npz,1,0\ny,train,odd\\name.npz,1,0\nz,val,.\\b.npz,0,0\n"
    table = read_table(write(folder, HEADER + rows), LABELS)
    assert table.paths == [folder / "sub" / "a.npz", folder / "odd\\name.npz", folder / "b.npz"]


def test_quoted_cells_are_read_as_csv(folder: Path) -> None:
    table = read_table(write(folder, HEADER + '"a ""b"", c",train,"a.npz",1,0\n'), LABELS)
    assert table.series_ids == ['a "b", c']


@pytest.mark.parametrize("text", ["", "\n", HEADER])
def test_a_table_without_rows_is_refused(folder: Path, text: str) -> None:
    assert errors(write(folder, text))


def test_a_table_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        assert "cannot be read" in errors(path)[0]


def test_patients_in_two_splits_are_listed_and_the_flag_makes_it_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "train_12_a_1,train,a.npz,1,0\ntrain_12_b_1,val,b.npz,1,0\ntrain_13_a_1,val,c.npz,1,0\n"
    (message,) = errors(write(folder, HEADER + rows))
    assert "line 3: patient 'train_12' is in train (line 2), val (line 3)" in message
    assert "--allow-patient-overlap" in message
    with caplog.at_level("WARNING", "finetune_siglip"):
        assert len(read_table(folder / "table.csv", LABELS, allow_patient_overlap=True)) == 3
    assert "1 patients or files are in two splits" in caplog.text
    assert "patient 'train_12' is in train (line 2), val (line 3)" in caplog.text


def test_the_same_file_in_two_splits_is_an_overlap(folder: Path) -> None:
    (message,) = errors(write(folder, HEADER + "x,train,a.npz,1,0\ny,val,./a.npz,1,0\n"))
    assert "file" in message
    assert "a.npz" in message


def test_patients_come_from_their_column_else_from_the_id(folder: Path) -> None:
    header = "patient_id," + HEADER
    rows = "p1,train_1_a_1,train,a.npz,1,0\n,valid_1_a_2,train,b.npz,1,0\n,other_1,train,c.npz,1,0\n"
    assert read_table(write(folder, header + rows), LABELS).patient_ids == ["p1", "valid_1", "other_1"]


def test_prediction_does_without_label_columns(folder: Path) -> None:
    path = write(folder, "series_id,split,img_path,Emphysema\nx,test,a.npz,\n")
    assert "Lung nodule" in errors(path)[0]
    table = read_table(path, LABELS, labels_required=False)
    assert table.labels == LABELS
    assert np.isnan(table.targets).all()
    assert (
        "'Emphysema' is '3'"
        in errors(write(folder, "series_id,split,img_path,Emphysema\nx,test,a.npz,3\n"), labels_required=False)[0]
    )


def test_links_are_followed_but_not_to_devices(folder: Path) -> None:
    (folder / "link.npz").symlink_to(folder / "a.npz")
    (folder / "null.npz").symlink_to("/dev/null")
    found = errors(write(folder, HEADER + "x,train,link.npz,1,0\ny,train,null.npz,1,0\n"))
    assert len(found) == 1
    assert "null.npz: is not a regular file" in found[0]


def test_thousands_of_errors_of_one_kind_take_few_lines(folder: Path) -> None:
    rows = "".join(f"s{i},train,gone{i}.npz,1,0\n" for i in range(1000)) + "x,nowhere,a.npz,1,0\n"
    found = errors(write(folder, HEADER + rows))
    assert len(found) == Complaints.shown + 2
    assert any("lines 22 to 1001" in message for message in found)
    assert any("line 1002" in message and "'nowhere'" in message for message in found)


names = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc")), min_size=1, max_size=8).filter(
    lambda text: text[0] not in "=+-@"
)


@given(ids=st.lists(names, min_size=1, max_size=6, unique=True))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_printable_id_comes_back_as_it_went_in(tmp_path: Path, ids: list[str]) -> None:
    (tmp_path / "a.npz").write_bytes(b"x")
    with open(tmp_path / "any.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["series_id", "split", "img_path", *LABELS])
        writer.writerows([name, "train", "a.npz", 1, 0] for name in ids)
    assert read_table(tmp_path / "any.csv", LABELS).series_ids == ids


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_end_in_anything_but_bad_input(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "noise.csv").write_bytes(HEADER.encode() * (len(data) % 2) + data)
    with contextlib.suppress(BadInput):
        read_table(tmp_path / "noise.csv", LABELS)
