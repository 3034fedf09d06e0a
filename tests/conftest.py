"""Puts the script on the import path and makes what several end-to-end tests share."""

import logging
import os
import sys
from pathlib import Path

import pytest

SOURCE = os.environ.get("FINETUNE_SIGLIP_SOURCE", str(Path(__file__).parents[1]))  # set by seeded_bugs.py
sys.path[:0] = [SOURCE, str(Path(__file__).parent)]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; -m 'not slow' leaves it out")
    config.addinivalue_line("markers", "pictures: draws its pictures, which most tests of whole runs leave blank")
    config.addinivalue_line("markers", "gpu: needs a GPU, and is skipped without one unless there is --device cpu")


def pytest_collection_modifyitems(items):
    """The tests of a file that share a costly run stay in one process, which makes it once (`--dist loadgroup`)."""
    for item in items:
        name = item.module.__name__
        if name in ("test_crash", "test_explain", "test_main", "test_predicting", "test_ranks"):
            item.add_marker(pytest.mark.xdist_group(name))


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="where tests marked gpu run [cuda]")
    parser.addoption("--small", action="store_true", help="tests marked gpu take small models")


@pytest.fixture(autouse=True)
def heard_by_caplog():
    """caplog listens to loggers that pass nothing on when a test begins: ours is one, whatever ran before."""
    logging.getLogger("finetune_siglip").propagate = False


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Pictures take most of a small run's time, so they are blank where they are not what is tested.

    The runs that several tests of a file share are made before this and draw theirs.
    """
    whole_runs = ("test_engine", "test_main", "test_predicting", "test_tracker")
    if request.module.__name__ in whole_runs and "pictures" not in request.keywords:
        from matplotlib.figure import Figure

        import finetune_siglip as fs

        for name in ("draw_slices", "draw_progress", "draw_curves", "draw_contact_sheet"):
            monkeypatch.setattr(fs, name, lambda *_: Figure((1, 1)))


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """A folder with a random two-layer SigLIP tower for 16 x 16 images, written by transformers."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from helpers import SMALL_TOWER

    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    config = SiglipVisionConfig(**{key: value for key, value in SMALL_TOWER.items() if key != "family"})
    SiglipVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """A table of 17 + 6 + 5 small phantoms (train, val, test)."""
    import phantoms

    return phantoms.write_dataset(tmp_path_factory.mktemp("scans"), 17, 6, 5, seed=3, shape=(8, 32, 32))
