"""The volume cache of room 4: an entry is the volume of this file under these settings, or it is not used."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune_siglip
from finetune_siglip import (
    CTVolumeDataset,
    Preprocessing,
    Table,
    VolumeCache,
    build_loader,
    fill_from,
    load_sample,
    say_why,
    write_entry,
)
from helpers import CHEST
from test_volume import CPU, chest, prep, save, table_of

GRID = (4, 6, 7)  # 336 bytes, so that entries are padded


@pytest.fixture
def scans(tmp_path: Path) -> Table:
    return table_of(*(save(tmp_path / f"{i}.npz", image=chest(6, 8, 8, seed=i)) for i in range(5)))


def cache_in(folder: Path, settings: Preprocessing | None = None) -> VolumeCache:
    return VolumeCache(folder / "cache", settings or prep(GRID))


def test_the_second_read_is_the_first_one_mapped(scans: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_in(tmp_path)
    expected = load_sample(scans.paths[0], prep(GRID))
    assert torch.equal(cache.load(scans.paths[0]), expected)
    monkeypatch.setattr(finetune_siglip, "load_sample", None)  # any use of it would fail
    for again in (cache, cache_in(tmp_path)):
        assert torch.equal(again.load(scans.paths[0]), expected)


@pytest.mark.parametrize(
    "change",
    [{"grid": (5, 6, 7)}, {"orientation": "RAS"}, {"hu_range": (-1000.0, 1000.0)}, {"spacing": (3.0, 1.5, 1.5)}],
)
def test_a_setting_that_changes_voxels_never_meets_an_old_entry(scans: Table, tmp_path: Path, change: dict) -> None:
    settings = prep(GRID, intensity="unit", trusted=True)
    changed = prep(**({"grid": GRID, "intensity": "unit", "trusted": True} | change))
    old, new = cache_in(tmp_path, settings), cache_in(tmp_path, changed)
    assert old.entry(scans.paths[0]) != new.entry(scans.paths[0])
    windows = prep(
        GRID, intensity="unit", trusted=True, windows=CHEST[::-1]
    )  # made on the device, from the same voxels
    assert cache_in(tmp_path, windows).entry(scans.paths[0]) == old.entry(scans.paths[0])


def test_a_changed_file_never_meets_its_old_entry(scans: Table, tmp_path: Path) -> None:
    cache, path = cache_in(tmp_path), scans.paths[0]
    before = cache.load(path)
    time.sleep(0.01)
    save(path, image=chest(6, 8, 8, seed=99))
    after = cache.load(path)
    assert not torch.equal(before, after)
    assert torch.equal(after, load_sample(path, prep(GRID)))
    os.utime(path, ns=(0, 0))
    assert cache.find(path) is None


def test_no_torn_entry_is_ever_read(scans: Table, tmp_path: Path) -> None:
    cache, path = cache_in(tmp_path), scans.paths[0]
    expected, read = cache.load(path), torch.empty((1, *GRID), dtype=torch.int16)
    entry = cache.entry(path)
    whole = entry.read_bytes()
    other = cache.entry(scans.paths[1])
    torn = [whole[:n] for n in (0, 10, 64, len(whole) - 1)] + [whole + b"\0", bytes(len(whole))]
    torn += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    torn.append(whole[:128] + whole[192:256] + whole[128:192] + whole[256:])  # two stretches exchanged
    for content in torn:
        entry.write_bytes(content)
        assert not fill_from(entry, read), content[:80]
        assert torch.equal(cache.load(path), expected)
        assert entry.read_bytes() == whole
    other.write_bytes(whole)  # a copy under another scan's name
    assert not fill_from(other, read)


def test_a_torn_entry_is_not_trained_on_and_is_made_again(scans: Table, tmp_path: Path) -> None:
    """A crash of the machine may leave the right length with wrong voxels: only reading them all tells."""
    dataset = CTVolumeDataset(scans, prep(GRID), cache_in(tmp_path))
    expected = torch.stack([dataset[row]["volume"] for row in range(5)])
    entry = dataset.cache.entry(scans.paths[3])
    whole = entry.read_bytes()
    for torn in (whole[:200] + bytes(len(whole) - 200), bytes(len(whole)), whole[:-8] + b"\1" * 8, whole[:-1], b""):
        entry.write_bytes(torn)
        for _ in range(2):
            (batch,) = build_loader(dataset, [[0, 1, 2, 3, 4]], 0, CPU)
            assert torch.equal(batch["volume"], expected)
        assert entry.read_bytes() == whole


def test_cached_scans_cost_a_worker_no_voxel(scans: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CTVolumeDataset(scans, prep(GRID), cache_in(tmp_path))
    plain = [dataset[row]["volume"] for row in range(5)]
    with monkeypatch.context() as patched:
        for name in ("fill_from", "load_sample"):
            patched.setattr(finetune_siglip, name, None)  # any use of it would fail
        batch = dataset.__getitems__([4, ~2])
    assert [source for _, source in batch["volume"].parts] == [scans.paths[4], scans.paths[2]]
    assert batch["targets"][1].isnan().all()
    assert batch["row"].tolist() == [4, 2]
    assert torch.equal(batch["volume"].assemble(), torch.stack([plain[4], plain[2]]))


def test_a_full_disk_warns_once_and_training_goes_on(
    scans: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(tmp_path)
    cache.load(scans.paths[0])

    def full_disk(path: Path, data: bytes) -> None:
        with path.open("wb") as stream:
            stream.write(data[:8])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    dataset = CTVolumeDataset(scans, prep(GRID), cache)
    with caplog.at_level("WARNING", "finetune_siglip"):
        batches = list(build_loader(dataset, [[0, 1], [2, 3], [4]], 0, CPU))
    assert [record.getMessage() for record in caplog.records if "No space" in record.getMessage()].__len__() == 1
    for batch in batches:
        for row, volume in zip(batch["row"].tolist(), batch["volume"], strict=True):
            assert torch.equal(volume, load_sample(scans.paths[row], prep(GRID)))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def fill(folder: Path, scans: Table, times: int) -> None:
    for _ in range(times):
        cache = cache_in(folder)
        for path in scans.paths:
            if not torch.equal(cache.load(path), load_sample(path, prep(GRID))):
                os._exit(1)
            cache.entry(path).unlink(missing_ok=True)
            cache.load(path)
    os._exit(0)


def test_processes_may_fill_and_clear_a_cache_at_once(scans: Table, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fill, args=(tmp_path, scans, 20)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 5
    assert all(name.endswith(".ct") for name in names)


def write_for_ever(folder: Path, scans: Table) -> None:
    cache = cache_in(folder, prep((64, 64, 64)))
    volume = load_sample(scans.paths[0], prep((64, 64, 64)))
    while True:
        write_entry(cache.entry(scans.paths[0]), volume.numpy())


def test_a_kill_at_any_moment_leaves_no_entry_that_is_not_whole(scans: Table, tmp_path: Path) -> None:
    settings = prep((64, 64, 64))
    expected = load_sample(scans.paths[0], settings)
    for _ in range(8):
        child = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path, scans))
        child.start()
        time.sleep(0.05 + np.random.default_rng().uniform(0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found = cache_in(tmp_path, settings).load(scans.paths[0])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_and_without_a_cache(scans: Table, tmp_path: Path, workers: int) -> None:
    plan = [[4, 0], [2, ~1], [3]]
    plain = list(build_loader(CTVolumeDataset(scans, prep(GRID)), plan, workers, CPU))
    cached = CTVolumeDataset(scans, prep(GRID), cache_in(tmp_path))
    cached[2], cached[4]  # some volumes of a batch are cached then, others not; all of them later
    for _ in range(3):
        for one, other in zip(plain, build_loader(cached, plan, workers, CPU), strict=True):
            assert torch.equal(one["volume"], other["volume"])
            assert torch.equal(one["row"], other["row"])
            assert torch.equal(one["targets"].nan_to_num(9), other["targets"].nan_to_num(9))


def test_an_entry_that_vanishes_on_the_way_is_read_again(scans: Table, tmp_path: Path) -> None:
    dataset = CTVolumeDataset(scans, prep(GRID), cache_in(tmp_path))
    dataset[0]
    batch = dataset.__getitems__([0, 1])["volume"]
    for entry in (tmp_path / "cache").iterdir():
        entry.unlink()
    assert torch.equal(batch.assemble()[0], load_sample(scans.paths[0], prep(GRID)))


def test_a_folder_that_cannot_be_used_is_the_environments_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="exists") as caught:
        cache_in(tmp_path)
    assert say_why(caught.value) == 3
    assert caplog.messages == [f"{tmp_path / 'cache'}: File exists: mend that, or name another path"]


def test_the_size_is_told_and_the_disk_is_not_filled_to_the_brim(
    scans: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spare = finetune_siglip.CACHE_SPARE
    monkeypatch.setattr(finetune_siglip.shutil, "disk_usage", lambda _: Namespace(free=spare + 20_000_000))
    with caplog.at_level("INFO", "finetune_siglip"):
        cache = cache_in(tmp_path, prep((64, 224, 224)))
    assert "6.4 MB a volume, room for 3 more" in caplog.messages[0]
    monkeypatch.setattr(finetune_siglip.shutil, "disk_usage", lambda _: Namespace(free=spare - 1))
    for path in scans.paths[:2]:
        assert torch.equal(cache.load(path), load_sample(path, cache.prep))
    assert not list((tmp_path / "cache").iterdir())
    assert len(caplog.messages) == 2
