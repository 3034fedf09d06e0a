"""Kill training runs with SIGKILL, resume them, and compare what comes out with a run that nobody disturbed.

    python tests/benchmarks/crash_test.py --kills 100

Real processes train on phantoms. Kills come at random moments, and at a given write, sync, rename, link or removal (see
`forkserver.Shim`), one to five of them per run. The matrix is plateau/cosine x averaged weights x accumulation 1/3,
whose last window is short, x 0/2 data-loading workers. `--every-operation` kills at each file operation but writes of
one epoch's save in turn, and at every 50th write. Last line: kills=... identical=... torn_files=...
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    os.environ.get("FINETUNE_SIGLIP_SOURCE", str(Path(__file__).parents[2])),
]

from forkserver import Ended, ForkServer

LABELS = ["Cardiomegaly", "Pleural effusion", "Lung nodule", "Consolidation", "Emphysema", "Atelectasis"]
EPOCHS = 4
MATRIX = list(itertools.product(("plateau", "cosine"), (True, False), (1, 3), (0, 2)))


@dataclass
class Bench:
    """Where runs take place, and what has been counted so far."""

    server: ForkServer
    scans: Path
    tower: Path
    folder: Path
    kills: int = 0
    chains: int = 0
    identical: int = 0
    torn: int = 0
    problems: list[str] = field(default_factory=list)
    references: dict = field(default_factory=dict)

    def arguments(self, config: tuple, out: Path, *more: str) -> list[str]:
        scheduler, ema, accumulation, workers = config
        return [
            "--csv", str(self.scans), "--pretrained", str(self.tower), "--label-columns", *LABELS,
            "--output-dir", str(out), "--num-slices", "4", "--batch-size", "2", "--num-workers", str(workers),
            "--lr", "2e-2", "--seed", "3", "--threshold", "0.41", "--wandb-mode", "disabled", "--bootstrap", "0",
            "--epochs", str(EPOCHS), "--scheduler", scheduler, "--warmup", "2",
            "--gradient-accumulation-steps", str(accumulation), "--save-every-minutes", "0.01",
            *["--use-ema"] * ema, *more,
        ]  # fmt: skip

    def reference(self, config: tuple) -> tuple[dict, float, list[str]]:
        """What an undisturbed run gives, how long it takes, and its file operations."""
        if config not in self.references:
            out = self.folder / "-".join(("reference", *map(str, config)))
            started = time.monotonic()
            ended = self.server.run(self.arguments(config, out), out.with_suffix(".log"), folder=str(out))
            assert ended.code == 0, ended.text
            self.references[config] = outcome(self, out), time.monotonic() - started, ended.operations
        return self.references[config]

    def chain(self, config: tuple, moments: list[float | int], seed: int = 0) -> bool:
        """Kill a run at each moment (seconds, or the number of a file operation), resume it, compare it."""
        wanted, _, _ = self.reference(config)
        out = self.folder / f"run-{self.chains}"
        self.chains += 1
        for moment in [*moments, None]:
            ended = self.attempt(config, out, moment)
            if ended.code == -signal.SIGKILL:
                self.kills += 1
            elif ended.code != 0:
                self.problems.append(f"{config} {moments}: exit {ended.code}: {ended.text[-2000:]}")
                return False
            if out.exists() and (torn := torn_files(out)):
                self.torn += len(torn)
                self.problems.append(f"{config} {moments}: torn {torn}")
        found = outcome(self, out)
        wrong = [name for name in wanted if wanted[name] != found[name]]
        leftover = [file.name for file in out.iterdir() if file.name.endswith(".tmp")]
        if wrong or leftover:
            self.problems.append(f"{config} {moments}: differs in {wrong}, leftovers {leftover}, see {out}")
        else:
            self.identical += 1
            shutil.rmtree(out)
        return not wrong and not leftover

    def attempt(self, config: tuple, out: Path, moment: float | int | None) -> Ended:
        """One process: from the start, or from where the last one was killed."""
        begun = (out / "last.ckpt").exists() or (out / "last.previous.ckpt").exists()
        argv = self.arguments(config, out, *["--resume", "auto"] * begun)
        log = out.with_suffix(".log")
        if not isinstance(moment, float):
            return self.server.run(argv, log, folder=str(out), at=moment or 0)
        pid = self.server.start(argv, log)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)  # it is waited for only below, so the number is still its own
        return self.server.wait(pid)


def outcome(bench: Bench, out: Path) -> dict[str, object]:
    """All that must be equal: every tensor and number of the state, results, the top 3, the model, its predictions."""
    from finetune_siglip import MODEL_KIND, RUN_KIND, digest_of, load_checked

    state = load_checked(out / "last.ckpt", RUN_KIND)
    state.pop("identity")
    top = {file.name: digest_of(load_checked(file, MODEL_KIND)) for file in sorted(out.glob("checkpoint_epoch_*.pth"))}
    predicted = out.parent / "predicted"
    argv = [
        "--csv", str(bench.scans), "--test-only", str(out / "best_model.pth"), "--label-columns", *LABELS,
        "--num-workers", "0", "--output-dir", str(predicted), "--test-output", str(predicted / "x.csv"), "--overwrite",
    ]  # fmt: skip
    ended = bench.server.run(argv, out.parent / "predict.log")
    assert ended.code == 0, ended.text
    return {
        "state": digest_of(state),
        **{f"state/{name}": digest_of(value) for name, value in state.items()},
        "results.jsonl": (out / "results.jsonl").read_bytes(),
        "top 3": top,
        "best model": digest_of(load_checked(out / "best_model.pth", MODEL_KIND)),
        "predictions": (predicted / "x.csv").read_bytes(),
    }


def torn_files(out: Path) -> list[str]:
    """Files under their final names that are not whole."""
    from finetune_siglip import MODEL_KIND, RUN_KIND, BadInput, load_checked

    torn = []
    for file in out.iterdir():
        try:
            if file.suffix in (".pth", ".ckpt") and not file.name.startswith("."):
                load_checked(file, MODEL_KIND if file.suffix == ".pth" else RUN_KIND)
            elif file.name == "results.jsonl":
                text, committed = file.read_text(), load_checked(out / "last.ckpt", RUN_KIND)["history"]["lines"]
                assert text.endswith("\n") or not text  # a run that was resumed before its first epoch
                assert all(json.loads(line) for line in text.splitlines())
                assert len(text.splitlines()) >= len(committed) - 1  # it follows the commit
            elif file.name == "progress.png":
                assert file.read_bytes().endswith(b"IEND\xaeB`\x82")
        except (BadInput, AssertionError, ValueError):
            torn.append(file.name)
    return torn


def random_moments(bench: Bench, config: tuple, rng: random.Random, most: int = 5) -> list[float | int]:
    """One to five moments: half of them seconds, half of them file operations, rare kinds as often as writes.

    Several in a row come early enough that the run, each time resumed, is probably not finished before its last one.
    """
    _, seconds, operations = bench.reference(config)
    number = rng.randint(1, most)
    near = operations[: len(operations) // number]
    moments: list[float | int] = []
    for _ in range(number):
        if rng.random() < 0.5:
            moments.append(rng.uniform(0.05, 0.8 * seconds / number))
        else:
            kind = rng.choice(sorted({line.split()[0] for line in near}))
            moments.append(1 + rng.choice([i for i, line in enumerate(near) if line.startswith(kind)]))
    return moments


def one_save(operations: list[str]) -> range:
    """Numbers of the operations from writing a checkpoint to the end of what follows its commit: the last such save."""
    named = max(i for i, line in enumerate(operations) if line.startswith("replace checkpoint_epoch"))
    first = next(i for i in range(named, 0, -1) if ".checkpoint_epoch" not in operations[i - 1])
    later = [i for i, line in enumerate(operations) if line == "replace last.ckpt" and i > named]
    return range(first + 1, (later[1] if len(later) > 1 else len(operations)) + 1)


def run_kills(bench: Bench, kills: int, seed: int) -> None:
    """Chains over the whole matrix until there were so many kills."""
    rng = random.Random(seed)
    order = MATRIX.copy()
    rng.shuffle(order)
    for config in itertools.cycle(order):
        if bench.kills >= kills:
            return
        moments = random_moments(bench, config, rng, min(5, kills - bench.kills))
        good = bench.chain(config, moments)
        shown = [f"{m:.2f} s" if isinstance(m, float) else f"operation {m}" for m in moments]
        print(
            f"{bench.kills:4d} kills  {'identical' if good else 'DIFFERENT'}  {config}  {', '.join(shown)}", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-operation", action="store_true", help="and kill at each file operation of one save")
    args = parser.parse_args()
    import phantoms
    from helpers import save_tower

    with tempfile.TemporaryDirectory() as folder, ForkServer() as server:
        scans = phantoms.write_dataset(Path(folder) / "scans", 15, 8, 5, seed=4, shape=(8, 32, 32))
        bench = Bench(server, scans, save_tower(Path(folder) / "tower"), Path(folder))
        run_kills(bench, args.kills, args.seed)
        if args.every_operation:
            config = ("plateau", True, 1, 0)
            operations = bench.reference(config)[2]
            for number in one_save(operations):
                if number % 50 == 0 or not operations[number - 1].startswith("write"):
                    bench.chain(config, [number])
        print(*bench.problems, sep="\n")
        print(f"kills={bench.kills} identical={bench.identical}/{bench.chains} torn_files={bench.torn}")
        return int(bool(bench.problems))


if __name__ == "__main__":
    sys.exit(main())
