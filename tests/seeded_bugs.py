# ruff: noqa: E501
"""Test the tests: put one known bug at a time into a copy of the script, and see the tests fail.

    python tests/seeded_bugs.py [NAME ...]

Last line: caught=N/M. A bug whose text is no longer in the script, once, is an error: keep the list in step with it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers.models.siglip.modeling_siglip  # noqa: F401

ROOT = Path(__file__).parents[1]
KEEP, CRASH, FUZZ = "tests/test_keep.py", "tests/test_crash.py", "tests/test_fuzz.py"
MACHINE, STEP = "tests/test_machine.py", "tests/test_step.py"
EXPLAIN = "tests/test_explain.py"
SAME = f"{KEEP} -k comes_back_whole"

# name: text in the script, what takes its place, the tests that must notice
BUGS = {
    "EMA count dropped": ('        state.ema.steps = content["ema"]["steps"]\n', "", SAME),
    "averages dropped": ("            state.ema.average[name].copy_(average)\n", "            pass\n", SAME),
    "plateau state dropped": (
        '    state.schedule.load_state_dict({**content["schedule"], "total_steps": state.schedule.total_steps})\n', "", SAME,
    ),
    "optimiser state dropped": ('    state.optimizer.load_state_dict(content["optimizer"])\n', "", SAME),
    "scaler state dropped": ('    state.scaler.load_state_dict(content["scaler"])\n', "", SAME),
    "tally dropped": ('"skipped", "skipped_in_row", "tally")', '"skipped", "skipped_in_row")', SAME),
    "loss of the epoch dropped": ('    state.loss_sum.fill_(content["losses"][rank])\n', "", SAME),
    "patience dropped": (', "digests", "epochs_without_gain")\n', ', "digests")\n', SAME),
    "top 3 forgotten": ('("lines", "entries", "digests"', '("lines", "digests"', SAME),
    "raw weights replaced by averages": (
        '"model": cpu_weights(state.model),\n        "ema"',
        '"model": {**cpu_weights(state.model), **(state.ema.average if state.ema else {})},\n        "ema"', SAME,
    ),
    "old length of the schedule kept": (', "total_steps": state.schedule.total_steps}', "}", f"{KEEP} -k extended_run"),
    "written in place": ('    with put_in_place(path, size) as temporary, open(temporary, "xb") as file:\n',
                         '    with open(path, "wb") as file:\n', f"{KEEP} -k failed_write"),
    "content not synced": ("        if lasting:\n            sync(temporary)\n", "", f"{KEEP} -k reaches_the_disk"),
    "folder not synced": ("        if lasting:\n            sync(path.parent)\n", "", f"{KEEP} -k reaches_the_disk"),
    "half a file left over": ("            temporary.unlink()  # renaming", "            pass  # renaming", f"{KEEP} -k failed_write"),
    "named before its time": (
        "            os.link(source, temporary)\n        except OSError:\n",
        "            os.link(source, temporary)\n            os.replace(temporary, path)\n        except OSError:\n",
        f"{KEEP} -k wherever",
    ),
    "digest not checked": ("stored == digest_of(content)", "True", f"{KEEP} -k flipped"),
    "digest of the top 3 not checked": (" or digest not in (None, stored)", "", f"{KEEP} -k very_one"),
    "digest blind to shapes": ('f"tensor {value.dtype} {tuple(value.shape)}"', '"tensor"', f"{KEEP} -k digest_sees"),
    "removed before commit": ("        if self.last.exists():\n            link_atomic(self.last, self.previous)\n",
                              "        self.last.unlink(missing_ok=True)\n", f"{KEEP} -k wherever"),
    "previous state not kept": ("            link_atomic(self.last, self.previous)\n", "            pass\n",
                                f"{KEEP} -k keeps_the_one_before"),
    "non-finite written": ("        if numbers and not torch.stack(", "        if False and not torch.stack(", f"{KEEP} -k not_finite"),
    "F1 alone compares epochs": ('for name in (select, "macro_average_precision", "val_loss")', "for name in (select,)",
                                 "tests/test_scores.py -k ranks_findings_best"),
    "ties to the later epoch": ("(entry[0], -entry[1])", "(entry[0], entry[1])", f"{KEEP} -k ties"),
    "other people's files removed": ("if wanted.fullmatch(file.name)", "if wanted.match(file.name)", f"{KEEP} -k deriving"),
    "leftovers kept": ("for file in self.ours(CHECKPOINT, TEMPORARY):", "for file in self.ours(CHECKPOINT):",
                       f"{KEEP} -k deriving"),
    "folder not locked": ("                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "                pass\n",
                          f"{KEEP} -k second_run"),
    "vast tensor trusted": ("tensor_bytes(content) <= path.stat().st_size and ", "", f"{FUZZ} -k claims_more"),
    "unpickling allowed": ('map_location="cpu", weights_only=True)\n    except Exception as error:  # the unpickler',
                           'map_location="cpu", weights_only=False)\n    except Exception as error:  # the unpickler',
                           f"{FUZZ} -k unpickled"),
    "short last window trained twice": ("math.ceil(state.micro / recipe.accumulation)", "state.micro // recipe.accumulation",
                                        f"{CRASH} -k in_validation"),
    "damaged state kept as the previous one": (
        "            link_atomic(file, source.last)\n", "            pass\n", f"{CRASH} -k falling_back",
    ),
    "workers die of the signal": ("pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)", "pthread_sigmask(signal.SIG_BLOCK, ())",
                                  f"{MACHINE} -k reach_the_processes"),
    "readers outlive the run": ("    atexit.register(end_readers)\n", "", f"{MACHINE} -k holds_its_readers"),
    "a full disk behind the console ends the run": (
        "        except (OSError, ValueError, AttributeError):\n", "        except KeyError:\n", f"{MACHINE} -k behind_the_console",
    ),
    "a stop waits for data": (" = stop.waiting if runtime.world_size == 1 else nullcontext", " = nullcontext",
                              f"{CRASH} -k do_not_come"),
    "ranks asked unevenly": ("        if number < in_common:\n            after_batch()", "        after_batch()", f"{STEP} -k are_asked"),
    "loss of a skipped step counted": ("torch.where(finite, loss, 0.0)", "loss", f"{STEP} -k spoils_no_figure"),
    "infinite loss stepped on": ("(share + 0 * loss.detach())", "share", f"{STEP} -k infinite_loss"),
    "statistics of half a step kept": ("of it\n            buffer.copy_(value)\n", "of it\n            pass\n", f"{STEP} -k lacks_a_scan"),
    "skipped scans forgotten": ("        history.skipped.setdefault(split, {}).update(rows)\n", "        pass\n", SAME),
    "best model not looked at": ("if digest_of(content) == wanted:", "if False:", f"{KEEP} -k survives_in_best"),
    "first files before the first commit": (
        "        run.save()  # a new run: no file that counts is ever without a last.ckpt beside it\n", "", f"{CRASH} -k power_cut",
    ),
    "a kept model removed by a start": ("folder.ours(*in_the_way)", "folder.ours(STATE)", f"{CRASH} -k somebody_kept"),
    "another folder changed on falling back": ("        elif file != source.last:", "        if file != source.last:",
                                               f"{CRASH} -k falling_back_in_another"),
    "values of thresholds not compared": ('            "thresholds (--threshold)": self.setup["thresholds"],\n', "", f"{CRASH} -k file_of_thresholds"),
    "prediction without the lock": (
        "with folder.locked() if is_main else nullcontext():",
        "args.output_dir.mkdir(parents=True, exist_ok=True)\n    with nullcontext():",
        f"{CRASH} -k second_run",
    ),
    "map not turned back from SRA": (
        "self.backbone.turn_back(self.backbone.tokens(self.images(volume)))", "self.backbone.tokens(self.images(volume))",
        f"{EXPLAIN} -k convolutional",
    ),
    "slices ranked by attention alone": (
        "        gains = relevance.sum((1, 2)) if model.backbone.volumetric else relevance\n",
        "        gains = shares[0, :, 0].detach()\n",
        f"{EXPLAIN} -k plain_graph",
    ),
    "relevance of packed patches not put back": (
        "x.flatten(1, -2) * pack_kept(shares.flatten(1)[..., None], *kept)[0]",
        "x.flatten(1, -2) * shares.flatten(1)[:, : x.flatten(1, -2).shape[1], None]",
        f"{EXPLAIN} -k plain_graph",
    ),
    "changed argument accepted": ("if name not in RESUME_MAY_CHANGE}", "if False}",
                                  f"{CRASH} -k changed_arguments"),
    "ranks leave before rank 0": ("            torch.distributed.barrier(unhurried)\n", "", f"{CRASH} -k all_ranks_stay"),
    "a stop leaves no note": ("                save_bytes(folder.stopped,", "                print(folder.stopped,", f"{CRASH} -k before_training"),
    "an old note of a stop stays": ("            self.stopped.unlink(missing_ok=True)\n", "", f"{CRASH} -k a_signal_saves"),
    "said by every rank": ("    return (speakers if is_lost(error) else same) == 1\n", "    return True\n", f"{CRASH} -k said_once"),
    "nothing to resume refused": ("    found = bool(args.resume and source.ours(STATE))\n", "    found = bool(args.resume)\n",
                                  f"{CRASH} -k resume_auto"),
    "overwritten before the check": ("    source = check_folder(args, folder)\n    with folder",
                                     "    folder.clear() if args.overwrite else check_folder(args, folder)\n    with folder",
                                     f"{CRASH} -k overwrite_replaces"),
}  # fmt: skip


def caught(name: str) -> bool:
    """Whether the tests named for a bug fail once it is there."""
    old, new, tests = BUGS[name]
    source = (ROOT / "finetune_siglip.py").read_text()
    if source.count(old) != 1:
        raise SystemExit(f"{name}: its text is {source.count(old)} times in the script, it must be there once")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "finetune_siglip.py").write_text(source.replace(old, new))
        child = os.fork()  # torch and transformers are imported once, for all bugs
        if not child:
            run_tests(folder, tests)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, 1):  # no tests found, or they can't be read: proves nothing
            raise SystemExit(f"{name}: pytest ended with {code}\n{(Path(folder) / 'output').read_text()[-2000:]}")
    return code == 1


def run_tests(folder: str, tests: str) -> None:
    """In a child: pytest against the script in `folder`; never returns."""
    code = 9
    try:
        os.chdir(ROOT)
        os.environ |= {"FINETUNE_SIGLIP_SOURCE": folder, "OMP_NUM_THREADS": "1"}
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests.split(" ", 2)]))
    finally:
        os._exit(code)


def main() -> int:
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(BUGS)
    missed = []
    for name in names:
        if not caught(name):
            missed.append(name)
        print("missed" if name in missed else "caught", name, flush=True)
    print(f"caught={len(names) - len(missed)}/{len(names)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
