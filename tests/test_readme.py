"""The README says what the script does: arguments as in --help, modes as in the wrapper, links that lead somewhere.

`python tests/test_readme.py` writes the table of arguments anew.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import phantoms  # noqa: E402
from finetune_siglip import build_parser  # noqa: E402
from helpers import save_tower  # noqa: E402

START = "<!-- arguments: made by `python tests/test_readme.py`, checked by the tests -->\n"
END = "<!-- end of arguments -->"


def argument_table() -> str:
    """Markdown: one table, its groups and texts as in --help."""
    lines = ["| argument | meaning [default] |", "|---|---|"]
    for group in build_parser()._action_groups:
        rows = [action for action in group._group_actions if action.dest not in ("help", "version")]
        for action in rows:
            value = "" if action.nargs == 0 else " " + value_name(action)
            text = action.help.replace("%%", "%").replace("|", "\\|")
            lines.append(f"| `{action.option_strings[-1]}{value}` | {text} |")
    return "\n".join(lines) + "\n"


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


OTHER_PROGRAMS = "--kills --index-url --shm-size --ipc --gpus-per-node --nodes"  # of benchmarks, pip, docker and SLURM


def test_flags_that_the_readme_names_exist():
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    known |= {"--dry-run", *OTHER_PROGRAMS.split()}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (ROOT / "README.md").read_text())):
        assert flag in known, flag


def test_each_flag_has_a_sentence_on_what_it_is_for():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"<!-- arguments.*?<!-- end of arguments -->", "", text, flags=re.S)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", prose))
    flags = {flag for action in build_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert flags - named == {"--help"}


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


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder as a reader of the README has it: the program, a table, weights, and a hub in small."""
    import SimpleITK as sitk

    folder = tmp_path / "reader"
    table = phantoms.write_dataset(folder, 8, 4, 4, shape=(16, 32, 32), all_columns=True, prevalence=0.6)
    for name in ("scans.csv", "all_ct_wlabels.csv"):
        shutil.copy(table, folder / name)
    for name in ("finetune_siglip.py", "run_finetune.sh"):
        (folder / name).symlink_to(ROOT / name)
    save_tower(folder / "ckpt")
    hub = folder / "hf" / "hub" / "models--google--siglip-base-patch16-224"
    shutil.copytree(folder / "ckpt", hub / "snapshots" / "0")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0")
    volume, _ = phantoms.make_phantom(np.random.default_rng(0), ["Cardiomegaly"], (16, 32, 32))
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((10.0, 10.0, 18.0))
    image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(folder / "raw.mha"))
    (folder / "raw.csv").write_text("series_id,split,img_path,Cardiomegaly\na,test,raw.mha,1\n")
    (folder / "dicom_export").mkdir()
    shutil.copy(folder / "raw.mha", folder / "dicom_export" / "b.mha")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("PRETRAINED_PATH", "ckpt/")  # for the command that leaves it to the wrapper
    monkeypatch.chdir(folder)
    return folder


def test_the_slurm_script_that_the_readme_names_is_the_one_that_is_tested():
    assert "sbatch tests/assets/train.sbatch" in (ROOT / "README.md").read_text()
    assert "train.sbatch" in (ROOT / "tests" / "test_slurm.py").read_text()
    assert os.access(ROOT / "tests" / "assets" / "train.sbatch", os.R_OK)


MAKES = {  # the beginning of each bash block of the README but the first, what is there after it has run
    "export CSV_FILE=scans.csv": "outputs/basic/report.html",
    "python finetune_siglip.py --test-only outputs/basic/best_model.pth --images": "predicted/test_predictions.csv",
    "python finetune_siglip.py --score": "scored/report.html",
    "python finetune_siglip.py --csv raw.csv": "prepared/volumes/a.npz",
    "python finetune_siglip.py --csv scans.csv --pretrained": "outputs/first/best_model.pth",
    "python finetune_siglip.py --csv scans.csv --test-only": "outputs/first_test/test_predictions.csv",
}


@pytest.mark.slow
def test_every_command_runs_as_printed(reader):
    """All but `demo` and `test`, which install: `.ci/run` and whoever changes the demo run those."""
    text = (ROOT / "README.md").read_text()
    first, *blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    assert [line.split("#")[0].strip() for line in first.splitlines()] == [
        "./run_finetune.sh demo",
        "./run_finetune.sh test",
    ]
    assert len(blocks) == len(MAKES)
    for block, (start, made) in zip(blocks, MAKES.items(), strict=True):
        assert block.startswith(start)
        run(["bash", "-euo", "pipefail", "-c", block])
        assert (reader / made).exists(), block
    assert len(list((reader / "outputs" / "predictions").glob("*/test_predictions.csv"))) == 1
    (python,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    told = run([sys.executable, "-c", f"{python}print(list(table.columns)[:3], len(table), type(model).__name__)"])
    assert "['id', 'Medical material_prob', 'Medical material_pred'] 17 SiglipClassifier" in told


def run(command: list[str]) -> str:
    """What a command prints, that ends well."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(before + START + argument_table() + END + rest.split(END)[1])
