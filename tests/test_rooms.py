"""The script as a book: its rooms in order, each of a readable size."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from seeded_bugs import BUGS

SCRIPT = Path(__file__).parents[1] / "finetune_siglip.py"
TEXT = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
RULES = [(n, re.fullmatch(r"# ── (\d+) (\w+) ─+", line)) for n, line in enumerate(TEXT.splitlines(), start=1)]
ROOMS = [(number, int(match[1]), match[2]) for number, match in RULES if match]
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def room_of(node: ast.stmt) -> int:
    return max(room for number, room, _ in ROOMS if number <= node.lineno)


def names_of(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


def test_the_rooms_stand_in_order_and_as_the_docstring_lists_them():
    assert [room for _, room, _ in ROOMS] == list(range(14))
    listed = re.findall(r"(?<!\S)(\d{1,2}) ([A-Z][a-z]+) {2,}", ast.get_docstring(TREE))
    assert sorted((int(number), name) for number, name in listed) == [(room, name) for _, room, name in ROOMS]


def test_a_room_uses_only_rooms_above_it():
    first = ROOMS[0][0]
    body = [statement for statement in TREE.body if statement.lineno > first]
    home = {name: room_of(statement) for statement in body for name in names_of(statement)}
    assert home["main"] == 13
    climbing = [
        f"{' '.join(names_of(statement))} (room {room_of(statement)}) uses {name.id} (room {home[name.id]})"
        for statement in body
        for name in ast.walk(statement)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load) and home.get(name.id, 0) > room_of(statement)
    ]
    assert not climbing


def test_no_function_is_longer_than_a_screen_but_the_table_of_arguments():
    assert [f.name for f in FUNCTIONS if f.end_lineno - f.lineno + 1 > 60] == ["build_parser"]


LONGEST = 6082
BUDGET = {
    "Door": 41, "Knobs": 289, "Machine": 455, "Table": 230, "Volume": 1326, "Backbone": 952, "Model": 360, "Loss": 83,
    "Optim": 139, "Step": 363, "Scores": 264, "Keep": 392, "Papers": 399, "Main": 699,
}  # fmt: skip


def test_the_file_and_each_room_are_no_longer_than_they_may_be():
    """It can be read in an evening as long as what is added is paid for by what is removed."""
    lines = len(TEXT.splitlines())
    ends = [*(start for start, _, _ in ROOMS[1:]), lines + 1]
    lengths = {name: end - start for (start, _, name), end in zip(ROOMS, ends, strict=True)}
    assert lengths.keys() == BUDGET.keys()
    assert {name: length for name, length in lengths.items() if length > BUDGET[name]} == {}
    assert lines <= LONGEST


@pytest.mark.parametrize("kind", [ast.FunctionDef, ast.ClassDef])
def test_whatever_is_longer_than_a_few_lines_says_what_it_is_for(kind):
    bare = [
        node.name
        for node in TREE.body
        if isinstance(node, kind) and node.end_lineno - node.lineno > 4 and not ast.get_docstring(node)
    ]
    assert not bare


def test_no_two_definitions_share_a_name():
    names = sorted(name for statement in TREE.body for name in names_of(statement) if name != "add")
    assert not [one for one, other in pairwise(names) if one == other]


def test_the_environment_is_read_in_room_2_alone():
    reads = [
        room_of(node)
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and node.lineno > ROOMS[0][0]
    ]
    assert set(reads) == {2}


def test_known_bugs_still_have_their_place_in_the_script():
    """Which tests notice them is shown by seeded_bugs.py itself."""
    assert {name: TEXT.count(text) for name, (text, _, _) in BUGS.items() if TEXT.count(text) != 1} == {}
