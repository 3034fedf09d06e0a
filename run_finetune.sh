#!/usr/bin/env bash
# Preset modes over finetune_siglip.py. `./run_finetune.sh help` lists them.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ── Settings: edit here, or override from the environment ───────────────────────────────────────────────────────────
CSV_FILE=${CSV_FILE:-all_ct_wlabels.csv}
PRETRAINED_PATH=${PRETRAINED_PATH:-/opt/project/logs/ckpt/pytorch_model.bin}
OUTPUT_BASE_DIR=${OUTPUT_BASE_DIR:-./outputs}
MODEL=${MODEL:-}                  # for inference: a checkpoint or a folder of them; the newest best model where empty
VENV_DIR=${VENV_DIR:-$HERE/.venv} # where the packages are installed, unless PYTHON names an interpreter
NPROC=${NPROC:-1}                 # processes on this machine, one per GPU
NUM_WORKERS=${NUM_WORKERS:-4}     # processes that read volumes, per training process
LABELS=(
  "Medical material" "Arterial wall calcification" "Cardiomegaly" "Pericardial effusion"
  "Coronary artery wall calcification" "Hiatal hernia" "Lymphadenopathy" "Emphysema" "Atelectasis"
  "Lung nodule" "Lung opacity" "Pulmonary fibrotic sequela" "Pleural effusion" "Mosaic attenuation pattern"
  "Peribronchial thickening" "Consolidation" "Bronchiectasis" "Interlobular septal thickening"
)

# ── Messages ────────────────────────────────────────────────────────────────────────────────────────────────────────
say() { printf '%s\n' "$@"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

show_help() {
  cat <<EOF
Usage: ./run_finetune.sh MODE [any argument of finetune_siglip.py …]

Training on CSV_FILE with PRETRAINED_PATH, each mode into its own folder under OUTPUT_BASE_DIR:
  basic       binary cross-entropy, the defaults
  focal       focal loss, for many easy negatives
  balanced    positives weighted by rarity
  advanced    focal loss, mixed precision, averaged weights, cosine schedule with warm-up, accumulation
  debug       two short epochs without workers or tracker, to see whether everything fits together
After training:
  inference   predict with MODEL or the newest best_model.pth under OUTPUT_BASE_DIR that is not from debug or demo,
              into a new folder OUTPUT_BASE_DIR/predictions/MODEL-CSV
Before training:
  check       report on the table and the volumes, and draw some of them as a model will see them
  prepare     convert raw scans (DICOM, NIfTI, MHA, NRRD) to NPZ files and a new table
To begin with:
  demo        set up, make phantom CTs, train, predict and check the result (a few minutes on 2 cores)
  test        set up, then lint and tests
  help        this text

--dry-run anywhere prints the commands instead of running them. Arguments that you add go last and win.
Where your findings are not the 18 of LABELS: --label-columns "First finding" …, or @FILE with one a line.
Settings, from the environment or at the top of this file (now):
  CSV_FILE=$CSV_FILE
  PRETRAINED_PATH=$PRETRAINED_PATH
  OUTPUT_BASE_DIR=$OUTPUT_BASE_DIR
  MODEL=$MODEL
  VENV_DIR=$VENV_DIR
  NPROC=$NPROC  NUM_WORKERS=$NUM_WORKERS  PYTHON=${PYTHON:-}
EOF
}

# Run a command, or print it where --dry-run asks for that.
perform() {
  if [[ -z $DRY_RUN ]]; then "$@"; else printf '%q ' "$@" && printf '\n'; fi
}

# ── Set-up ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# A stamp with the hash of a requirements file says that just these requirements are installed.
install_requirements() {
  local file=$1 stamp
  stamp=$VENV_DIR/.installed-$(cksum <"$file" | tr ' ' '-')
  [[ -e $stamp ]] && return
  say "installing ${file#"$HERE"/} into $VENV_DIR (several GB, a few minutes) …"
  "$VENV_DIR/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
  touch "$stamp"
}

set_up() {
  local base=${PYTHON:-python3}
  [[ -n $DRY_RUN ]] && PYTHON=$VENV_DIR/bin/python && return
  command -v "$base" >/dev/null || fail "$base is not there; install Python 3.10 or newer"
  if [[ ! -x $VENV_DIR/bin/python ]]; then
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$base is older than 3.10; name a newer one in PYTHON"
    say "creating $VENV_DIR …"
    "$base" -m venv "$VENV_DIR"
  fi
  install_requirements "$HERE/requirements.txt"
  PYTHON=$VENV_DIR/bin/python
}

# Whether python3 has the packages: they are looked up and not imported, which would take seconds.
has_packages() {
  python3 -c 'import sys; from importlib.util import find_spec as find; sys.exit(not all(map(find, sys.argv[1:])))' \
    torch monai transformers sklearn pandas tqdm
}

# PYTHON if it is set, else the environment in VENV_DIR, else a python3 that has the packages, else a new VENV_DIR.
find_python() {
  [[ -n ${PYTHON:-}$DRY_RUN ]] && return
  if [[ ! -x $VENV_DIR/bin/python ]] && has_packages 2>/dev/null; then
    PYTHON=python3
  else
    set_up
  fi
}

system_information() {
  [[ -n $DRY_RUN ]] || "$PYTHON" - "$OUTPUT_BASE_DIR" <<'EOF'
import os, platform, shutil, sys
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
folder = os.path.abspath(sys.argv[1])
while not os.path.exists(folder):
    folder = os.path.dirname(folder)
print(f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, {memory / 2**30:.0f} GiB memory", flush=True)
import torch  # takes seconds, so it comes after the first line
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(f"torch {torch.__version__}, GPU: " + (", ".join(f"{g.name} ({g.total_memory / 2**30:.0f} GiB)" for g in gpus) or "none, running on the CPU"))
print(f"disk: {shutil.disk_usage(folder).free / 2**30:.0f} GiB free in {folder}")
EOF
}

# ── Running ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# torch.distributed.run as it is, but for its end: the process that failed has said why, so neither a traceback follows
# nor does the exit code become 1; and SIGUSR1, of which it would die, goes to its processes, which save and stop.
TORCHRUN='
import os, signal, sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

def pass_on(number, _):
    with open("/proc/thread-self/children") as children:
        for child in children.read().split():
            os.kill(int(child), number)

signal.signal(signal.SIGUSR1, pass_on)
try:
    run.main()
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 3)
except SignalException as error:
    sys.exit(128 + error.sigval)
'

# The script under one process, or under torchrun's launcher when NPROC asks for more.
launch() {
  local command=("${PYTHON:-python3}")
  ((NPROC > 1)) && command+=(-m torch.distributed.run --standalone --nproc-per-node "$NPROC")
  command+=("$HERE/finetune_siglip.py" "$@")
  if [[ -n $DRY_RUN ]]; then
    perform "${command[@]}"
  elif ((NPROC > 1)); then
    exec "${command[0]}" -c "$TORCHRUN" "${command[@]:3}"
  else
    exec "${command[@]}"
  fi
}

# --num-workers stands between the labels and what the user adds: without a flag there, a label list would swallow it.
train() {
  local name=$1
  shift
  if [[ -z $DRY_RUN ]]; then
    [[ -f $CSV_FILE ]] || fail "CSV_FILE=$CSV_FILE is not a file; set it, or try ./run_finetune.sh demo"
    [[ $PRETRAINED_PATH != /* && $PRETRAINED_PATH != ./* || -e $PRETRAINED_PATH ]] ||
      fail "PRETRAINED_PATH=$PRETRAINED_PATH is not there; set it to a file, a folder or a hub name"
  fi
  find_python
  system_information
  launch --csv "$CSV_FILE" --pretrained "$PRETRAINED_PATH" --output-dir "$OUTPUT_BASE_DIR/$name" \
    --label-columns "${LABELS[@]}" --num-workers "$NUM_WORKERS" "$@"
}

# Everything but training: the table of scans, the folder to write to, and what to do.
on_data() {
  local folder=$1
  shift
  [[ -n $DRY_RUN || -f $CSV_FILE ]] || fail "CSV_FILE=$CSV_FILE is not a file; set it to the table of scans"
  find_python
  launch --csv "$CSV_FILE" --output-dir "$folder" --num-workers "$NUM_WORKERS" "$@"
}

# The labels are the checkpoint's own. Models of demo and debug are of no use on patients.
inference() {
  local base=${OUTPUT_BASE_DIR%/} name
  if [[ -z $MODEL ]]; then
    MODEL=$(find "$base" \( -path "$base/demo" -o -path "$base/debug" \) -prune -o -name best_model.pth \
      -printf '%T@ %p\n' 2>/dev/null | sort -rn | head -n 1 | cut -d ' ' -f 2- || true)
    [[ -n $MODEL ]] || fail "no best_model.pth under OUTPUT_BASE_DIR=$base but of demo and debug; train first, or set MODEL"
  fi
  [[ -e $MODEL ]] || fail "MODEL=$MODEL is not there; set it to a checkpoint or a folder of them"
  name=${MODEL#"$base"/} && name=${name#/} && name=${name%/} && name=${name%.pth} && name=${name%/best_model}
  [[ -n $DRY_RUN ]] || say "predicting with $MODEL"
  on_data "$base/predictions/${name//\//-}-$(basename "${CSV_FILE%.csv}")" --test-only "$MODEL" "$@"
}

demo() {
  local out=$OUTPUT_BASE_DIR/demo script=$HERE/finetune_siglip.py started took kept=0
  set_up
  system_information
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that wait by spinning quadruple the time on shared cores
  started=$SECONDS
  say "" "1/3 making phantom chest CTs in $out/data …"
  perform "$PYTHON" "$HERE/tests/phantoms.py" "$out/data" --train 400 --val 60 --test 100 --prevalence 0.3 \
    --seed "${DEMO_SEED:-0}"
  say "" "2/3 fine-tuning the toy tower in tests/assets/tiny-siglip on split train …"
  perform "$PYTHON" "$script" --csv "$out/data/phantoms.csv" --pretrained "$HERE/tests/assets/tiny-siglip" \
    --label-columns "@$out/data/findings.txt" --output-dir "$out/run" --overwrite --num-workers 2 \
    --wandb-mode disabled --epochs 30 --batch-size 8 --lr 3e-3 --scheduler cosine --warmup 20 --num-slices 24 \
    --use-ema --freeze-up-to all --cache-features "$out/features" "$@"
  say "" "3/3 predicting split test, phantoms that were not trained on …"
  perform "$PYTHON" "$script" --csv "$out/data/phantoms.csv" --test-only "$out/run/best_model.pth" \
    --output-dir "$out/predicted" --overwrite --num-workers 2
  [[ -n $DRY_RUN ]] && return
  took=$((SECONDS - started))
  say ""
  judge_demo "$out/predicted/evaluation_test.json" || kept=$?
  say "the demo took $took s after the set-up; on 2 free cores it is promised to take less than 300"
  say "" "where everything is:"
  say "  report        $out/run/report.html (open it in a browser)"
  say "  predictions   $out/predicted/test_predictions.csv"
  say "  model         $out/run/best_model.pth"
  say "  log           $out/run/training.log"
  say "  phantoms      $out/data/phantoms.csv; some are drawn in $out/run/data_check.png"
  advise
  return "$kept"
}

# What to do after the demo, with the settings it was started with.
advise() {
  local start
  start=$(printf %q "$0")
  [[ $OUTPUT_BASE_DIR == ./outputs ]] || start="OUTPUT_BASE_DIR=$(printf %q "$OUTPUT_BASE_DIR") $start"
  [[ $VENV_DIR == "$HERE/.venv" ]] || start="VENV_DIR=$(printf %q "$VENV_DIR") $start"
  say "next, with your own scans (README.md, \"Data\", says what CSV and volumes look like); where the findings in it"
  say "are not the 18 of LABELS, add --label-columns \"First finding\" \"Second finding\" … to check and basic:"
  say "  CSV_FILE=your.csv $start check       # is the table sound, do the volumes look right?"
  say "  CSV_FILE=your.csv PRETRAINED_PATH=google/siglip-base-patch16-224 $start basic"
  say "  CSV_FILE=your.csv $start inference   # predict with that model"
}

# The demo's promise, measured on each run: exit 1 when it is missed.
judge_demo() {
  "$PYTHON" - "$1" <<'EOF'
import json, sys
content = json.load(open(sys.argv[1]))
metrics, spread = content["metrics"], content["intervals"]
def row(name, figure, ends, note):
    between = "{:.3f} to {:.3f}".format(*ends) if ends else ""
    print(f"  {name:36}{figure:.3f}  {between:16}{note}")
labels = {label: each for label, each in metrics["per_label"].items() if each["auc"] is not None}
print(f"AUROC on {metrics['n_scans']} phantoms not trained on, and its 95 % interval:")
for label, each in labels.items():
    row(label, each["auc"], spread.get("per_label", {}).get(label, {}).get("auc"), f"{each['n_positive']} have it")
macro = metrics["macro_auc"] or 0.0
row("macro", macro, spread.get("macro_auc"), f"over {len(labels)} findings")
missed = [] if macro >= 0.90 else [f"macro AUROC is {macro:.3f}"]
missed += [] if len(labels) >= 8 else [f"{len(labels)} findings could be averaged"]
missed += [f"no {small} among them" for small in ("nodule", "calcification") if not any(small in label for label in labels)]
print("promised: macro AUROC of at least 0.90 over at least 8 findings, a nodule and a calcification among them: ", end="")
print("missed, " + ", ".join(missed) if missed else "kept")
sys.exit(bool(missed))
EOF
}

run_tests() {
  set_up
  [[ -n $DRY_RUN ]] || install_requirements "$HERE/tests/requirements.txt"
  cd "$HERE"
  perform "$PYTHON" -m ruff check .
  perform "$PYTHON" -m ruff format --check .
  perform "$PYTHON" -m codespell_lib finetune_siglip.py run_finetune.sh README.md tests/*.py
  perform "$VENV_DIR/bin/shellcheck" run_finetune.sh .ci/run
  perform "$PYTHON" -m mypy
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests share the cores by processes
  perform "$PYTHON" -m pytest -n 2 --dist loadgroup -m "not slow" "$@"
}

# ── Modes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
DRY_RUN="" words=()
for word in "$@"; do [[ $word == --dry-run ]] && DRY_RUN=1 || words+=("$word"); done
set -- "${words[@]}"
MODE=${1:-help}
(($#)) && shift

# A new head learns fast, a pretrained tower slowly. On 140 phantoms (15 % each, 15 epochs, three seeds) these two rates
# reached more than one rate of 1e-4 for both, with which no probability reached 0.5 (tests/benchmarks/bench_rates.py).
RATES=(--lr 1e-3 --backbone-lr-scale 0.03)

case $MODE in
  basic) train basic --batch-size 16 "${RATES[@]}" "$@" ;;
  focal) train focal --loss focal --focal-gamma 2.0 --focal-alpha 1.0 --batch-size 16 "${RATES[@]}" "$@" ;;
  balanced) train balanced --loss balanced --batch-size 16 "${RATES[@]}" "$@" ;;
  advanced) train advanced --loss focal --amp --use-ema --scheduler cosine --warmup 5% --batch-size 8 \
    --gradient-accumulation-steps 4 "${RATES[@]}" --freeze-up-to 20 "$@" ;;
  debug) NUM_WORKERS=0 train debug --epochs 2 --batch-size 2 --num-slices 8 --log-interval 1 \
    --wandb-mode disabled --overwrite "$@" ;;
  inference) inference "$@" ;;
  check) NPROC=1 on_data "$OUTPUT_BASE_DIR/check" --label-columns "${LABELS[@]}" --check-data "$@" ;;
  prepare) NPROC=1 on_data "$OUTPUT_BASE_DIR/prepared" --prepare "$OUTPUT_BASE_DIR/prepared" "$@" ;;
  demo) demo "$@" ;;
  test) run_tests "$@" ;;
  help | -h | --help) show_help ;;
  *) fail "there is no mode '$MODE'; ./run_finetune.sh help lists them" ;;
esac
