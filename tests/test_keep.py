"""Room 11: files are whole or absent, damage is found, the top k is ranked as promised."""

import errno
import os
import socket

import pytest
import torch

from finetune_siglip import (
    FIELDS,
    MODEL_KIND,
    RUN_KIND,
    BadEnvironment,
    BadInput,
    History,
    RunFolder,
    TopKCheckpoints,
    digest_of,
    load_checked,
    save_atomic,
    save_checked,
)


def content(**more):
    return {
        "kind": MODEL_KIND,
        "format": 1,
        **{name: form() for name, form in FIELDS[MODEL_KIND].items()},
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


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadEnvironment, match="nowhere"):
        save_atomic(tmp_path / "nowhere" / "x", lambda file: file.write(b""))


def test_the_top_3_are_ranked_best_first_with_ties_to_the_earlier_epoch():
    top = TopKCheckpoints()
    scores = [0.5, 0.7, 0.7, None, float("nan"), 0.6, 0.7, 0.1]
    entered = [top.offer(score, epoch) for epoch, score in enumerate(scores, start=1)]
    assert entered == [True, True, True, False, False, True, True, False]
    assert top.entries == [(0.7, 2), (0.7, 3), (0.7, 7)]
    assert top.names == ["checkpoint_epoch_002.pth", "checkpoint_epoch_003.pth", "checkpoint_epoch_007.pth"]
    assert top.is_best(2)
    assert not top.is_best(3)


def test_a_commit_keeps_the_one_before_and_falls_back_to_it_when_damaged(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    for epoch in (1, 2):
        fields = {name: form() for name, form in FIELDS[RUN_KIND].items()}
        folder.commit({"kind": RUN_KIND, "format": 1, **fields, "epoch": epoch})
    assert folder.load()["epoch"] == 2
    data = bytearray(folder.last.read_bytes())
    data[len(data) // 2] ^= 255
    folder.last.write_bytes(data[:-7])
    assert folder.load()["epoch"] == 1


def test_deriving_removes_what_is_left_over_and_rewrites_results(tmp_path):
    folder, history = RunFolder(tmp_path), History()
    for epoch, score in ((1, 0.1), (2, 0.3)):
        history.top.offer(score, epoch)
        save_checked(tmp_path / history.top.name(epoch), content(epoch=epoch))
        history.lines.append(f'{{"epoch": {epoch}}}')
    leftovers = [
        "checkpoint_epoch_009.pth", ".last.ckpt.123.tmp", ".last.fresh.ckpt.9.tmp", "last.fresh.ckpt",
        ".best_model.pth.1.tmp", ".results.jsonl.77.tmp", ".checkpoint_epoch_002.pth.5.tmp", ".progress.png.5.tmp",
    ]  # fmt: skip
    others = ["checkpoint_epoch_best.pth", "checkpoint_epoch_001.pth.bak", ".notes.tmp", ".other.ckpt.123.tmp"]
    for name in leftovers + others:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "checkpoint_epoch_007.pth").mkdir()
    (tmp_path / "results.jsonl").write_text('{"epoch": 1}\n{"epo')
    folder.derive(history)
    expected = ["best_model.pth", "checkpoint_epoch_001.pth", "checkpoint_epoch_002.pth", "results.jsonl"]
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*expected, *others, "checkpoint_epoch_007.pth"])
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
