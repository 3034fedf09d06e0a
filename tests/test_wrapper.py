"""run_finetune.sh: each mode's command is one that the script accepts, and mistakes are named."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import phantoms
from finetune_siglip import parse_args
from helpers import save_tower

ROOT = Path(__file__).parents[1]
LABELS = [
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
]  # fmt: skip


def wrapper(*argv, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(
        [ROOT / "run_finetune.sh", *argv], capture_output=True, text=True, env=environment, cwd=environment.get("CWD")
    )


def arguments_of(mode, *extra, **environment):
    done = wrapper(mode, "--dry-run", *extra, **environment)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    return parse_args(command[command.index(str(ROOT / "finetune_siglip.py")) + 1 :]), command


@pytest.mark.parametrize("mode", ["basic", "focal", "balanced", "advanced", "debug"])
def test_training_modes_give_arguments_that_the_script_accepts(mode):
    args, _ = arguments_of(mode)
    assert args.label_columns == LABELS
    assert str(args.csv) == "all_ct_wlabels.csv"
    assert args.pretrained == "/opt/project/logs/ckpt/pytorch_model.bin"
    assert args.output_dir == Path("outputs") / mode


def test_modes_do_what_their_names_say():
    assert arguments_of("focal")[0].loss == "focal"
    assert arguments_of("balanced")[0].loss == "balanced"
    advanced = arguments_of("advanced")[0]
    assert (advanced.loss, advanced.amp, advanced.use_ema, advanced.scheduler) == ("focal", True, True, "cosine")
    assert advanced.warmup == "5%"
    assert advanced.gradient_accumulation_steps > 1
    debug = arguments_of("debug")[0]
    assert (debug.epochs, debug.num_workers, debug.wandb_mode) == (2, 0, "disabled")


def test_the_data_modes_need_no_model(tmp_path):
    check, prepare = (arguments_of(mode, OUTPUT_BASE_DIR=str(tmp_path))[0] for mode in ("check", "prepare"))
    assert check.check_data
    assert check.pretrained is None
    assert prepare.prepare == tmp_path / "prepared"


def test_extra_arguments_go_last_and_win_even_after_the_labels():
    args, _ = arguments_of("focal", "--epochs", "3", "--lr", "5e-6", "--label-columns", "Emphysema")
    assert (args.epochs, args.lr, args.label_columns) == (3, 5e-6, ["Emphysema"])


def test_settings_come_from_the_environment(tmp_path):
    args, command = arguments_of(
        "basic", CSV_FILE="a b.csv", PRETRAINED_PATH="google/siglip", OUTPUT_BASE_DIR=str(tmp_path / "o p"), NPROC="2"
    )
    assert (str(args.csv), args.pretrained, args.output_dir) == ("a b.csv", "google/siglip", tmp_path / "o p" / "basic")
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert command[command.index("--nproc-per-node") + 1] == "2"


def make_models(folder, ages):
    """Empty best_model.pth files in these folders, so many seconds old."""
    for name, age in ages.items():
        path = folder / name / "best_model.pth"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)


def test_inference_takes_the_newest_model_that_is_of_use_and_says_which(tmp_path):
    make_models(tmp_path, {"old": 100, "new run": 10, "middle": 50, "demo/run": 0, "debug": 0, "my debug": 90})
    args, command = arguments_of("inference", OUTPUT_BASE_DIR=f"{tmp_path}/", CSV_FILE="sets/external.csv")
    assert args.test_only == [tmp_path / "new run" / "best_model.pth"]
    assert args.output_dir == tmp_path / "predictions" / "new run-external"
    assert "--label-columns" not in command
    table = tmp_path / "t.csv"
    table.write_text("")
    said = wrapper("inference", OUTPUT_BASE_DIR=str(tmp_path), CSV_FILE=str(table)).stdout
    assert "new run/best_model.pth" in said.splitlines()[0]
    of_use = [tmp_path / name for name in ("old", "new run", "middle", "my debug")]
    for folder in of_use:
        (folder / "best_model.pth").unlink()
    assert wrapper("inference", OUTPUT_BASE_DIR=str(tmp_path), CSV_FILE=str(table)).returncode == 2


def test_inference_takes_the_model_it_is_told_to(tmp_path):
    make_models(tmp_path, {"seeds/1": 100, "new": 0})
    chosen = tmp_path / "seeds" / "1" / "best_model.pth"
    args, _ = arguments_of("inference", OUTPUT_BASE_DIR=str(tmp_path), MODEL=str(chosen))
    assert (args.test_only, args.output_dir.name) == ([chosen], "seeds-1-all_ct_wlabels")
    done = wrapper("inference", "--dry-run", MODEL=str(tmp_path / "none.pth"))
    assert done.returncode == 2
    assert "none.pth" in done.stderr


@pytest.mark.parametrize("mode", ["basic", "check", "demo", "test"])
def test_a_dry_run_prints_commands_and_runs_none_wherever_it_stands(tmp_path, mode):
    printed = []
    for argv in (
        [mode, "--dry-run", "--seed", "7"],
        [mode, "--seed", "7", "--dry-run"],
        ["--dry-run", mode, "--seed", "7"],
    ):
        done = wrapper(*argv, OUTPUT_BASE_DIR=str(tmp_path / "out"), VENV_DIR=str(tmp_path / "venv"))
        assert (done.returncode, done.stderr) == (0, "")
        printed.append(done.stdout)
    assert printed[0] == printed[1] == printed[2]
    commands = [shlex.split(line) for line in printed[0].splitlines() if "python" in line]
    assert any(command[-2:] == ["--seed", "7"] for command in commands)
    assert not list(tmp_path.iterdir())
    if mode == "demo":
        script = str(ROOT / "finetune_siglip.py")
        argv = [command[command.index(script) + 1 :] for command in commands if script in command]
        assert len(argv) == 2
        assert parse_args(argv[1]).test_only == [tmp_path / "out" / "demo" / "run" / "best_model.pth"]


def advice(folder, **environment):
    """The commands that the demo prints at its end."""
    text = (ROOT / "run_finetune.sh").read_text()
    told = text[text.index("advise() {") : text.index("# The demo's promise")]
    command = ["bash", "-c", f"say() {{ printf '%s\\n' \"$@\"; }}; HERE={ROOT}; {told} advise", "./run_finetune.sh"]
    usual = {"OUTPUT_BASE_DIR": "./outputs", "VENV_DIR": f"{ROOT}/.venv"}
    done = subprocess.run(command, capture_output=True, text=True, env={**usual, **environment}, check=True)
    return [line.strip() for line in done.stdout.splitlines() if "run_finetune.sh" in line]


def test_what_the_demo_advises_keeps_the_settings_it_was_started_with(tmp_path):
    assert all(" ./run_finetune.sh " in line and "OUTPUT" not in line for line in advice(tmp_path))
    for line in advice(tmp_path, OUTPUT_BASE_DIR="/a b", VENV_DIR="/v"):
        assert "VENV_DIR=/v OUTPUT_BASE_DIR=/a\\ b ./run_finetune.sh" in line


@pytest.mark.slow
def test_what_the_demo_advises_works_as_printed(tmp_path):
    """With a table of the 18 findings in the place of your.csv, and a hub that holds a small tower."""
    table = phantoms.write_dataset(tmp_path, 8, 4, 4, shape=(16, 32, 32), all_columns=True, prevalence=0.6)
    table.rename(tmp_path / "your.csv")
    for name in ("finetune_siglip.py", "run_finetune.sh"):
        (tmp_path / name).symlink_to(ROOT / name)
    hub = tmp_path / "hf" / "hub" / "models--google--siglip-base-patch16-224"
    save_tower(hub / "snapshots" / "0")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0")
    make_models(tmp_path / "outputs", {"demo/run": -60})
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HOME": str(tmp_path / "hf"), "WANDB_MODE": "disabled"}
    for line in advice(tmp_path):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "outputs" / "predictions" / "basic-your" / "test_predictions.csv").exists()


@pytest.mark.parametrize(
    ("argv", "environment", "named"),
    [
        (["basics"], {}, "basics"),
        (["basic"], {"CSV_FILE": "nowhere.csv"}, "nowhere.csv"),
        (["basic"], {"CSV_FILE": __file__, "PRETRAINED_PATH": "/nowhere/model.bin"}, "/nowhere/model.bin"),
        (["inference"], {"OUTPUT_BASE_DIR": "/nowhere"}, "/nowhere"),
        (["inference", "--dry-run"], {"OUTPUT_BASE_DIR": "/nowhere"}, "/nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv, environment, named):
    done = wrapper(*argv, **environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


def test_help_names_every_mode():
    text = wrapper("help").stdout
    modes = ["basic", "focal", "balanced", "advanced", "debug", "inference", "check", "prepare", "demo", "test", "help"]
    for mode in modes:
        assert f"\n  {mode} " in text
    assert wrapper().stdout == text


def judged(folder, aurocs, intervals=True):
    """What the demo says of these AUROCs (label -> figure or None), as its own function prints it."""
    defined = [figure for figure in aurocs.values() if figure is not None]
    each = {label: {"auc": figure, "n_positive": 30} for label, figure in aurocs.items()}
    metrics = {"macro_auc": sum(defined) / len(defined) if defined else None, "n_scans": 100, "per_label": each}
    spread = {"macro_auc": [0.8, 0.99], "per_label": {label: {"auc": [0.7, 1.0]} for label in aurocs}}
    path = folder / "evaluation_test.json"
    path.write_text(json.dumps({"metrics": metrics, "intervals": spread if intervals else {}}))
    text = (ROOT / "run_finetune.sh").read_text()
    judge = text[text.index("judge_demo() {") : text.index("run_tests() {")]
    command = ["bash", "-c", judge + 'judge_demo "$1"', "-", path]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHON": sys.executable})
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("intervals", [True, False])
def test_the_demo_prints_every_auroc_and_keeps_its_promise_only_with_small_findings_among_eight(tmp_path, intervals):
    others = {label: 0.95 for label in LABELS if "calcification" not in label and "nodule" not in label}
    six = dict(list(others.items())[:6])
    small = {"Lung nodule": 0.85, "Coronary artery wall calcification": 0.9}
    code, said = judged(tmp_path, {**six, **small}, intervals)
    assert code == 0
    assert said.rstrip().endswith("kept")
    for label, figure in small.items():
        assert any(label in line and f"{figure:.3f}" in line for line in said.splitlines())
    assert ("0.800 to 0.990" in said) == intervals
    for aurocs, reason in (
        (dict.fromkeys([*six, *small], 0.89), "0.890"),
        ({**dict(list(others.items())[:5]), **small}, "7 findings"),
        ({**others, "Lung nodule": None, "Arterial wall calcification": 0.99}, "no nodule"),
        ({**others, "Lung nodule": 0.9}, "no calcification"),
        (dict.fromkeys(small), "0 findings"),
    ):
        code, said = judged(tmp_path, aurocs, intervals)
        assert code == 1
        assert "missed" in said.splitlines()[-1]
        assert reason in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "said"), [(["--lr", "-1"], "--lr"), (["--label-columns", "No column"], "No column")]
)
def test_with_several_processes_a_mistake_is_said_once_with_its_own_exit_code(scans, tower, tmp_path, mistake, said):
    done = wrapper(
        "basic", *mistake, NPROC="2", CSV_FILE=str(scans), PRETRAINED_PATH=str(tower), OUTPUT_BASE_DIR=str(tmp_path),
        OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert sum(said in line for line in (done.stdout + done.stderr).splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_wrapper_saves_with_several_processes(scans, tower, tmp_path, number):
    environment = {
        **os.environ, "PYTHON": sys.executable, "NPROC": "2", "CSV_FILE": str(scans), "PRETRAINED_PATH": str(tower),
        "OUTPUT_BASE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [
        ROOT / "run_finetune.sh",
        "debug",
        "--num-slices",
        "4",
        "--epochs",
        "1000",
        "--label-columns",
        "Emphysema",
    ]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "debug" / "results.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(number)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 128 + number, said[-3000:]
    assert (tmp_path / "debug" / "stopped").read_text() == f"{number.name}\n"
    assert "Traceback" not in said
