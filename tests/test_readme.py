"""The README says what the script does: arguments as in --help, modes as in the wrapper, links that lead somewhere.

`python tests/test_readme.py` writes the table of arguments anew.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from finetune_siglip import build_parser  # noqa: E402

START = "<!-- arguments: made by `python tests/test_readme.py`, checked by the tests -->\n"
END = "<!-- end of arguments -->"


def argument_table() -> str:
    """Markdown: one table per group of arguments, texts as in --help."""
    lines = []
    for group in build_parser()._action_groups:
        rows = [action for action in group._group_actions if action.dest != "help"]
        if rows:
            lines += [f"\n**{group.title}**\n", "| argument | meaning [default] |", "|---|---|"]
        for action in rows:
            value = "" if action.nargs == 0 else " " + value_name(action)
            lines.append(
                f"| `{action.option_strings[-1]}{value}` | {action.help.replace('%%', '%')} |".replace("||", "|")
            )
    return "\n".join(lines).lstrip("\n") + "\n\n"


def value_name(action) -> str:
    """What stands for the value in the usage line; a bar would end the table's cell."""
    if action.choices:
        return ",".join(map(str, action.choices))
    names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or action.dest.upper(),)
    return " ".join(names).replace("|", " or ") + (" …" if action.nargs == "+" else "")


def test_the_table_of_arguments_is_that_of_the_script():
    text = (ROOT / "README.md").read_text()
    written = text[text.index(START) + len(START) : text.index(END)]
    assert written == argument_table(), "run: python tests/test_readme.py"


def test_every_mode_of_the_wrapper_is_described():
    modes = re.findall(r"^  ([a-z]+)(?: \|[^)]*)?\) ", (ROOT / "run_finetune.sh").read_text(), flags=re.M)
    text = (ROOT / "README.md").read_text()
    assert len(modes) >= 9
    for mode in modes:
        assert f"| `{mode}` |" in text, mode


def test_links_within_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, flags=re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


OTHER_PROGRAMS = """--kills --cov --nnodes --nproc-per-node --standalone --rdzv-backend --rdzv-endpoint --rdzv-id
--shm-size --ipc --nodes --ntasks-per-node --gpus-per-node --cpus-per-task --signal --requeue --open-mode --time
--gres"""  # flags of the benchmarks, torchrun, docker and SLURM


def test_flags_that_the_readme_names_exist():
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    known |= {"--dry-run", *OTHER_PROGRAMS.split()}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / "README.md").read_text())):
        assert flag in known, flag


def test_messages_that_the_readme_explains_are_those_of_the_script():
    """A gap in a message, `…`, is what the script fills in."""
    rows = re.search(r"^## Troubleshooting\n(.*?)^## ", (ROOT / "README.md").read_text(), flags=re.M | re.S)[1]
    told = re.findall(r"^\| `([^`]+)` \|", rows, flags=re.M)
    script = re.sub(r'"\n\s+f?"', "", (ROOT / "finetune_siglip.py").read_text())  # strings that go on in the next line
    assert len(told) >= 7
    assert [part for message in told for part in message.split("…") if part.strip(" ,") not in script] == []


def test_only_the_promised_files_stand_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    visible = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    if tracked:
        assert visible <= {"finetune_siglip.py", "run_finetune.sh", "requirements.txt", "tests", "README.md", "LICENSE"}


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(before + START + argument_table() + END + rest.split(END)[1])
