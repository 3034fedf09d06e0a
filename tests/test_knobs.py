"""Room 1: the command line that the user fixed, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune_siglip import WINDOW_PRESETS, Table, build_parser, parse_args, save_run

SCRIPT = Path(__file__).parents[1] / "finetune_siglip.py"
NEEDED = ["--csv", "t.csv", "--pretrained", "model", "--label-columns", "A", "B c"]


def test_defaults_are_the_ones_the_user_fixed():
    args = vars(parse_args(NEEDED))
    expected = {
        "epochs": 100, "batch_size": 16, "lr": 1e-4, "weight_decay": 1e-4, "optimizer": "adamw", "scheduler": "plateau",
        "warmup": 0, "freeze_up_to": 0, "dropout_rate": 0.1, "loss": "bce", "focal_gamma": 2.0, "focal_alpha": 1.0,
        "amp": False, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "early_stopping_patience": 10,
        "use_ema": False, "num_workers": 4, "seed": 42, "output_dir": Path("./outputs"),
        "wandb_project": "siglip-ct-classification", "log_interval": 50, "test_only": None,
        "test_output": Path("test_predictions.csv"), "threshold": 0.5, "slice_pooling": "attention",
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert args["label_columns"] == ["A", "B c"]


def test_pretrained_is_needed_unless_predicting(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--csv", "t.csv", "--label-columns", "A"])
    assert stopped.value.code == 2
    assert "--pretrained is required" in capsys.readouterr().err
    assert parse_args(["--csv", "t.csv", "--label-columns", "A", "--test-only", "best.pth"]).pretrained is None


@pytest.mark.parametrize("mode", [["--check-data"], ["--prepare", "out"]])
def test_checking_and_preparing_need_no_pretrained_model(mode):
    assert parse_args(["--csv", "t.csv", "--label-columns", "A", *mode]).pretrained is None


@pytest.mark.parametrize("missing", ["--csv", "--label-columns"])
def test_required_arguments_are_named(missing, capsys):
    at = NEEDED.index(missing)
    argv = NEEDED[:at] + NEEDED[at + (3 if missing == "--label-columns" else 2) :]
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert missing in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--epochs", "0"], ["--batch-size", "-1"], ["--lr", "nan"], ["--lr", "0"], ["--lr", "inf"],
        ["--threshold", "1.5"], ["--dropout-rate", "1"], ["--focal-gamma", "-1"], ["--warmup", "-5"],
        ["--warmup", "101%"], ["--warmup", "x%"],
        ["--freeze-up-to", "some"],
        ["--windows", "0:0,1:2,3:4"], ["--windows", "-100:200"], ["--orientation", "SPP"], ["--orientation", "RLA"],
        ["--spacing", "1", "1"], ["--spacing", "1", "1", "0"], ["--augment", "mild"], ["--on-bad-volume", "retry"],
        ["--resume", "auto", "--overwrite"],
        ["--explain", "-2"], ["--images", "a.npz"], ["--test-only", "m.pth", "--images", "a.npz"], ["--score"],
        ["--hu-range", "5", "5"], ["--loss", "mse"], ["--seed", "-1"], ["--label-columns", "A", "A"], ["--epo", "3"],
    ],
)  # fmt: skip
def test_wrong_values_end_in_one_message_and_exit_2(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(NEEDED + wrong)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("finetune_siglip.py: error:")


def test_windows_may_start_with_a_minus_sign():
    expected = ((-1000.0, 200.0), (-160.0, 240.0), (0.0, 80.0))
    assert parse_args([*NEEDED, "--windows", "-1000:200,-160:240,0:80"]).windows == expected
    assert parse_args([*NEEDED, "--windows=-1000:200,-160:240,0:80"]).windows == expected


def test_chest_windows_are_the_documented_centres_and_widths():
    centres_widths = ((-600, 1000), (40, 400), (700, 1500))
    assert WINDOW_PRESETS["chest"] == tuple((c - w / 2, c + w / 2) for c, w in centres_widths)
    assert parse_args([*NEEDED, "--windows", "chest"]).windows == WINDOW_PRESETS["chest"]


def test_a_run_json_gives_its_settings_again_and_arguments_win(tmp_path):
    more = [
        "--windows", "-1000:200,-160:240,0:80", "--hu-range", "-1000", "400", "--amp", "--freeze-up-to", "all",
        "--warmup", "5%", "--threshold", "auto", "--test-only", "007", "x y", "--cache-dir", "c", "--lr", "3e-5",
    ]  # fmt: skip
    then = parse_args([*NEEDED, *more, "--overwrite"])
    path = tmp_path / "run.json"
    save_run(tmp_path, "training", {}, then, Table(("A",), ["1"], ["1"], ["val"], [path], np.ones((1, 1)), [2]))
    again = parse_args(["--config", str(path), "--epochs", "3", "--label-columns", "Z"])
    assert again.command == f"finetune_siglip.py --config {path} --epochs 3 --label-columns Z"
    expected = vars(then) | {"epochs": 3, "label_columns": ["Z"], "overwrite": False, "config": path}
    expected["command"] = again.command
    plain = [json.loads(json.dumps(settings, default=str)) for settings in (vars(again), expected)]  # tuples are lists
    assert plain[0] == plain[1]


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}", '{"Settings, training": {"nonsense": 1}}'])
def test_a_config_that_is_no_run_is_one_message(tmp_path, capsys, content):
    if content:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit):
        parse_args(["--config", str(tmp_path / "run.json"), *NEEDED])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("finetune_siglip.py: error:")
    assert "run.json" in last or "--nonsense" in last


def test_every_argument_has_help_that_names_its_default():
    for action in build_parser()._actions:
        assert action.help, action.option_strings
        if action.default not in (None, False) and action.dest not in ("help", "version"):
            assert "[" in action.help, f"{action.option_strings} doesn't say its default"


def test_help_is_answered_without_importing_torch():
    """That import takes seconds; its absence is what makes --help quick."""
    probe = (
        "import runpy, sys\nsys.argv = ['finetune_siglip.py', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop: code = stop.code\n"
        "print('\\nloaded' if {'torch', 'numpy'} & set(sys.modules) else '\\nquick', code)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "quick 0"


def test_the_first_line_comes_before_the_seconds_that_importing_torch_takes(tmp_path):
    probe = (
        "import runpy, sys\n"
        f"sys.argv = ['finetune_siglip.py', *{NEEDED}]\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'numpy'): sys.exit(7)\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "loading PyTorch …\n")


def errors_of(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("finetune_siglip.py: error: ") for line in lines)  # no usage
    return lines


@pytest.mark.parametrize("name", ["deflate", "torch"])
def test_a_package_that_is_not_installed_is_one_line_with_the_command_that_mends_it(name):
    code = f"import sys, runpy; sys.modules[{name!r}] = None; sys.argv = ['x', *sys.argv[1:]]; " \
           f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", code, *NEEDED], capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert ended.stderr == f"error: needs {name}: pip install -r requirements.txt\n"


def test_all_that_is_wrong_is_told_at_once_a_line_each(capsys):
    wrong = [
        "--epo",
        "3",
        "--lr",
        "nan",
        "--loss",
        "mse",
        "--hu-range",
        "5",
        "1",
        "--batch-size=x",
        "--dropout-rate",
        "1",
    ]
    lines = errors_of([*NEEDED, *wrong], capsys)
    assert len(lines) == 6
    for named in ("--epo", "--lr", "--loss", "--hu-range", "--batch-size", "--dropout-rate"):
        assert any(named in line for line in lines)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--epo", "--epochs"), ("--learning-rate", "--lr"), ("--output", "--output-dir"),
        ("--batchsize", "--batch-size"), ("--workers", "--num-workers"),
        ("--use_ema", "--use-ema"), ("--label-colums", "--label-columns"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line_with_the_nearest_one(capsys, typed, meant):
    (line,) = errors_of([*NEEDED, typed, "3"], capsys)
    assert typed in line
    assert line.endswith(f"the nearest is {meant}")
    (line,) = errors_of([*NEEDED, "--quux"], capsys)
    assert line.endswith("--help lists all")


def test_a_value_without_a_flag_is_named(capsys):
    (line,) = errors_of([*NEEDED, "--epochs", "3", "5"], capsys)
    assert line.endswith("before 5")


def test_names_of_the_launcher_this_script_was_written_for_are_understood():
    assert parse_args([*NEEDED, "--use-3channel"]).windows == parse_args(NEEDED).windows
    for more, warmup in (((), "5%"), (("--warmup", "0"), "5%"), (("--warmup", "70"), 70), (("--warmup", "2%"), "2%")):
        args = parse_args([*NEEDED, "--scheduler", "warmup", *more])
        assert (args.scheduler, args.warmup) == ("cosine", warmup)


def test_labels_come_from_a_file_with_one_a_line_whatever_they_hold(tmp_path):
    names = [f"Finding {i}, left (a/b) 5 % --lr" for i in range(137)]
    path = tmp_path / "findings.txt"
    path.write_text("\ufeff" + "\r\n".join([*names[:100], "", *names[100:]]), encoding="utf-8", newline="")
    args = parse_args(["--csv", "t.csv", "--pretrained", "m", "--label-columns", f"@{path}", "--epochs", "3"])
    assert args.label_columns == names
    assert args.epochs == 3


def test_the_header_for_uv_holds_the_requirements_as_they_are():
    """PEP 723; `uv run finetune_siglip.py` installs what this header says."""
    header = re.match(r"#!.*\n# /// script\n((?:#.*\n)+?)# ///\n", SCRIPT.read_text())[1]
    text = "".join(line.removeprefix("#") for line in header.splitlines())
    requirements = (SCRIPT.parent / "requirements.txt").read_text()
    wanted = [line.split("#")[0].strip() for line in requirements.splitlines() if line.split("#")[0].strip()]
    assert 'requires-python = ">=3.10"' in text
    assert re.findall(r'"([^"]+)",', text) == wanted, "the header of the script lists requirements.txt, in its order"
