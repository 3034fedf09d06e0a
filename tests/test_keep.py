"""Room 11: files are whole or absent, damage is found, the top k is ranked as promised."""

import errno
import math
import os
import socket
from types import SimpleNamespace

import pytest
import torch

from finetune_siglip import (
    MODEL_KIND,
    RESUME_MAY_CHANGE,
    RUN_FILES,
    RUN_KIND,
    BadEnvironment,
    BadInput,
    Diverged,
    History,
    RunFolder,
    Schedule,
    checkpoint_name,
    digest_of,
    load_checked,
    pack_state,
    parse_args,
    restore_state,
    save_atomic,
    save_checked,
)
from helpers import random_hu, small_classifier, small_state


def content(**more):
    return {
        "kind": MODEL_KIND,
        "format": 1,
        "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3).bool()},
        **more,
    }


def test_save_then_load_gives_the_same(tmp_path):
    save_checked(tmp_path / "x.pth", content(labels=["A", "B"], none=None, number=0.1))
    loaded = load_checked(tmp_path / "x.pth", MODEL_KIND)
    assert digest_of(loaded) == digest_of(content(labels=["A", "B"], none=None, number=0.1))
    assert torch.equal(loaded["weights"]["a"], torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["weights"].update(a=c["weights"]["a"] + 1e-7),
        lambda c: c["weights"].update(a=c["weights"]["a"].view(3, 2)),
        lambda c: c["weights"].update(a=c["weights"]["a"].to(torch.int32)),
        lambda c: c.update(labels=["AB"]),
        lambda c: c.update(number=1),
        lambda c: c.pop("number"),
    ],
)
def test_the_digest_sees_every_change(change):
    before, after = (content(labels=["A", "B"], number=1.0) for _ in range(2))
    change(after)
    assert digest_of(before) != digest_of(after)


def test_one_flipped_bit_anywhere_is_found_or_harmless(tmp_path):
    """torch.load alone reads a flipped bit in the weights without a word."""
    path = tmp_path / "x.pth"
    save_checked(path, content(big=torch.zeros(500)))
    good, wanted = path.read_bytes(), digest_of(content(big=torch.zeros(500)))
    refused = 0
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            assert digest_of(load_checked(path, MODEL_KIND)) == wanted
        except BadInput as error:
            refused += str(path) in error.messages[0]
    assert refused > len(good) / 7 * 0.5


@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "missing", "kind", "format", "folder"])
def test_other_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "x.pth"
    save_checked(path, content(**{"kind": {"kind": RUN_KIND}, "format": {"format": 99}}.get(damage, {})))
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage in ("empty", "text"):
        path.write_text({"empty": "", "text": "<html>not found</html>"}[damage])
    elif damage in ("missing", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(BadInput, match=r"x\.pth"):
        load_checked(path, MODEL_KIND)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    save_atomic(path, lambda file: file.write(b"old"))

    def full_disk(file):
        file.write(b"half of the ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BadEnvironment, match="No space left"):
        save_atomic(path, full_disk)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(BadEnvironment, match="Input/output"):
        save_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["x.bin"]


def test_a_save_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    path, begun = tmp_path / "x.pth", []
    save_checked(path, content(number=1))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20 - 1))
    monkeypatch.setattr(torch, "save", lambda *_: begun.append(1))
    with pytest.raises(BadEnvironment, match="1,048,603 bytes are needed there, 1,048,575 are free"):
        save_checked(path, content(number=2))
    assert not begun
    assert load_checked(path, MODEL_KIND)["number"] == 1


def test_what_a_resumed_run_may_change_are_arguments_that_exist():
    given = vars(parse_args(["--csv", "x", "--pretrained", "y", "--label-columns", "A"]))
    assert set(given) >= RESUME_MAY_CHANGE


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadEnvironment, match="nowhere"):
        save_atomic(tmp_path / "nowhere" / "x", lambda file: file.write(b""))


def test_the_top_3_are_ranked_best_first_with_ties_to_the_earlier_epoch():
    top = History()
    scores = [0.5, 0.7, 0.7, -math.inf, 0.6, 0.7, 0.1]
    entered = [top.offer((score, 0.0), epoch) for epoch, score in enumerate(scores, start=1)]
    assert entered == [True, True, True, False, True, True, False]
    assert top.entries == [((0.7, 0.0), 2), ((0.7, 0.0), 3), ((0.7, 0.0), 6)]
    assert top.names == ["checkpoint_epoch_002.pth", "checkpoint_epoch_003.pth", "checkpoint_epoch_006.pth"]
    assert top.is_best(2)
    assert not top.is_best(3)


def test_a_commit_keeps_the_one_before_and_falls_back_to_it_when_damaged(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    for epoch in (1, 2):
        folder.commit(state_of(epoch))
    assert folder.load()[1]["epoch"] == 2
    data = bytearray(folder.last.read_bytes())
    data[len(data) // 2] ^= 255
    folder.last.write_bytes(data[:-7])
    assert folder.load()[1]["epoch"] == 1


def test_deriving_removes_what_is_left_over_and_rewrites_results(tmp_path, tmp_path_factory):
    folder, history = RunFolder(tmp_path), History()
    for epoch, score in ((1, 0.1), (2, 0.3)):
        history.offer((score,), epoch)
        save_checked(tmp_path / checkpoint_name(epoch), content(epoch=epoch))
        history.lines.append(f'{{"epoch": {epoch}}}')
    leftovers = ["checkpoint_epoch_009.pth", "pictures/.00ff00ff00ff00ff.png.3.siglip.tmp"]
    for name in ("last.ckpt", "best_model.pth", "x.csv", "run.json"):
        save_atomic(tmp_path_factory.mktemp("x") / name, lambda file: leftovers.append(os.path.basename(file.name)))
    others = ["checkpoint_epoch_best.pth", "checkpoint_epoch_001.pth.bak", ".notes.tmp", ".other.ckpt.123.tmp"]
    (tmp_path / "pictures").mkdir()
    for name in leftovers + others:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "checkpoint_epoch_007.pth").mkdir()
    (tmp_path / "results.jsonl").write_text('{"epoch": 1}\n{"epo')
    folder.derive(history)
    expected = ["best_model.pth", "checkpoint_epoch_001.pth", "checkpoint_epoch_002.pth", "results.jsonl"]
    kept = ["checkpoint_epoch_007.pth", "pictures"]
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*expected, *others, *kept])
    assert not list((tmp_path / "pictures").iterdir())
    assert load_checked(tmp_path / "best_model.pth", MODEL_KIND)["epoch"] == 2
    assert (tmp_path / "results.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_a_second_run_in_the_folder_is_refused_naming_the_first(tmp_path):
    with RunFolder(tmp_path / "run").locked():
        child = os.fork()
        if not child:  # a record lock belongs to a process, so only another one can be refused
            code = 0
            try:
                with RunFolder(tmp_path / "run").locked():
                    code = 1
            except BadEnvironment as error:
                code = 0 if f"pid {os.getppid()} on {socket.gethostname()}" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    with RunFolder(tmp_path / "run").locked():
        pass


def used_state(steps=3, seed=0):
    """A run's state after some steps, every field of it other than at the start."""
    state = small_state(small_classifier(seed=seed), ema=True, amp=True)
    state.schedule = Schedule("plateau", 2, 50 + seed)
    for step in range(steps):
        torch.manual_seed(step)
        state.model(random_hu(2, 1, 3, 16, 16, seed=step)).square().mean().backward()
        state.schedule.apply(state.optimizer)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.schedule.steps += 1
        state.ema.update()
    if steps:
        state.schedule.end_epoch((0.5, 0.1))
        state.schedule.end_epoch((0.4, 0.1))
        state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 1024.0})
        state.epoch, state.micro, state.skipped, state.skipped_in_row = 4, 7, 2, 1
        state.tally = {"known": 11.0, "norm": 0.1, "steps": 3.0}
        state.loss_sum.fill_(0.1)
    history = History(lines=['{"epoch": 1}'], epochs_without_gain=2, digests={"checkpoint_epoch_001.pth": "d"})
    history.entries = [((0.5, 0.1), 1)]
    history.skipped = {"train": {3: "damaged"}}
    return state, history if steps else History()


def packed(state, history):
    return pack_state(state, [state.loss_sum.item()], history, {"arguments": {}})


def test_a_state_comes_back_whole_into_a_fresh_run(tmp_path):
    state, history = used_state()
    save_checked(tmp_path / "last.ckpt", packed(state, history))
    content = load_checked(tmp_path / "last.ckpt", RUN_KIND)
    fresh, empty = used_state(steps=0, seed=1)
    assert digest_of(packed(fresh, empty)) != digest_of(content)
    fresh.schedule.total_steps = state.schedule.total_steps
    restore_state(content, fresh, empty, 0)
    again = packed(fresh, empty)
    for name, part in content.items():
        assert digest_of(part) == digest_of(again[name]), name
    counts = ("epoch", "micro", "skipped", "skipped_in_row", "tally")
    assert [getattr(fresh, name) for name in counts] == [getattr(state, name) for name in counts]
    assert empty == history
    raw = dict(state.model.state_dict())
    assert all(torch.equal(raw[name], tensor) for name, tensor in content["model"].items())  # not the averaged weights
    assert any(not torch.equal(content["ema"]["average"][name], raw[name]) for name in content["ema"]["average"])


def test_an_extended_run_keeps_its_own_length_of_schedule():
    state, history = used_state()
    fresh, empty = used_state(steps=0, seed=1)
    restore_state(packed(state, history), fresh, empty, 0)
    assert fresh.schedule.total_steps == 51


def test_no_tensor_that_is_not_finite_is_written(tmp_path):
    for bad in (float("nan"), float("inf")):
        with pytest.raises(Diverged, match="weights/a"):
            save_checked(tmp_path / "x.pth", content(weights={"a": torch.tensor([1.0, bad])}))
    assert not list(tmp_path.iterdir())


def test_content_reaches_the_disk_before_its_name_and_the_name_before_we_return(tmp_path, monkeypatch):
    calls, real = [], {name: getattr(os, name) for name in ("fsync", "replace")}
    monkeypatch.setattr(os, "fsync", lambda h: calls.append(os.path.isdir(f"/proc/self/fd/{h}")) or real["fsync"](h))
    monkeypatch.setattr(os, "replace", lambda *a: calls.append("replace") or real["replace"](*a))
    save_atomic(tmp_path / "x", lambda file: file.write(b"x"))
    assert calls == [False, "replace", True]


def state_of(epoch):
    return {"kind": RUN_KIND, "format": 1, "epoch": epoch}


@pytest.mark.parametrize("failing", range(1, 8))
def test_wherever_a_commit_fails_a_whole_state_is_left(tmp_path, monkeypatch, failing):
    folder = RunFolder(tmp_path)
    for epoch in (1, 2):
        folder.commit(state_of(epoch))
    calls = []

    def failing_call(real):
        def call(*args, **more):
            calls.append(args)
            if len(calls) == failing:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **more)

        return call

    for name in ("replace", "fsync", "link"):
        monkeypatch.setattr(os, name, failing_call(getattr(os, name)))
    try:
        folder.commit(state_of(3))
    except BadEnvironment:
        pass
    assert folder.last.exists()
    assert load_checked(folder.last, RUN_KIND)["epoch"] in (2, 3)
    assert load_checked(folder.previous, RUN_KIND)["epoch"] in (1, 2)
    assert not [file.name for file in tmp_path.iterdir() if "tmp" in file.name]


def test_a_file_of_the_top_3_must_be_the_very_one_that_was_committed(tmp_path):
    folder, history = RunFolder(tmp_path), History()
    for epoch, score in ((1, 0.3), (2, 0.2)):
        history.offer((score,), epoch)
        name = checkpoint_name(epoch)
        history.digests[name] = save_checked(tmp_path / name, content(epoch=epoch))
    save_checked(tmp_path / "checkpoint_epoch_001.pth", content(epoch=1, more="from another run"))
    folder.load_top(history, [])
    assert history.entries == [((0.2,), 2)]
    assert history.best["epoch"] == 2


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_the_best_epoch_survives_in_best_model(tmp_path, damage, tuned):
    """People remove checkpoints and keep the best model: going on must not put a worse one in its place."""
    folder, history = RunFolder(tmp_path), History()
    for epoch, score in ((1, 0.3), (2, 0.2)):
        history.offer((score,), epoch)
        saved = content(epoch=epoch, thresholds=[0.5])
        history.digests[checkpoint_name(epoch)] = save_checked(tmp_path / checkpoint_name(epoch), saved)
    folder.derive(history)
    best, digest = tmp_path / "checkpoint_epoch_001.pth", history.digests["checkpoint_epoch_001.pth"]
    if tuned:
        save_checked(tmp_path / "best_model.pth", content(epoch=1, thresholds=[0.3]) | {"tuned_for": "f1"})
    best.unlink()
    if damage == "damaged":
        best.write_bytes(b"half")
    folder.load_top(history, [0.5])
    assert history.entries == [((0.3,), 1), ((0.2,), 2)]
    folder.derive(history)
    for name in ("checkpoint_epoch_001.pth", "best_model.pth"):
        assert load_checked(tmp_path / name, MODEL_KIND, digest)["epoch"] == 1


@pytest.mark.parametrize("name", ["best_model.pth", "evaluation_test.json", "test_predictions.csv", "last.ckpt"])
def test_what_a_new_run_would_replace_counts_as_a_run(tmp_path, name):
    folder = RunFolder(tmp_path / "out")
    assert not folder.ours(*RUN_FILES)
    folder.path.mkdir()
    for harmless in ("training.log", "data_check.png", "notes.txt", ".lock", "checkpoint_epoch_best.pth"):
        (folder.path / harmless).touch()
    assert not folder.ours(*RUN_FILES)
    (folder.path / name).touch()
    assert folder.ours(*RUN_FILES)


def test_a_disk_without_links_gets_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(errno.EPERM, "Operation not permitted")))
    folder = RunFolder(tmp_path)
    for epoch in (1, 2):
        folder.commit(state_of(epoch))
    assert load_checked(folder.previous, RUN_KIND)["epoch"] == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt", "last.previous.ckpt"]
