"""The phantoms hold what their labels say, and the shipped toy tower loads whole."""

import csv
from pathlib import Path

import numpy as np
import pytest

import phantoms

TINY_SIGLIP = Path(__file__).parent / "assets" / "tiny-siglip"
CALCIUM = ("Coronary artery wall calcification", "Arterial wall calcification")


def draw(findings, seed=0, shape=phantoms.SHAPE):
    return phantoms.make_phantom(np.random.default_rng(seed), findings, shape)


@pytest.mark.parametrize("seed", range(3))
def test_planted_findings_have_the_density_of_their_kind(seed):
    def planted(label):
        volume, masks = draw([label], seed)
        assert list(masks) == [label]
        assert masks[label].shape == volume.shape
        return volume[masks[label]]

    for label in CALCIUM:
        assert planted(label).min() > 300
    assert planted("Medical material").min() > 1000
    assert -10 < np.median(planted("Pleural effusion")) < 35
    assert -10 < np.median(planted("Pericardial effusion")) < 35
    assert -20 < np.median(planted("Consolidation")) < 80
    assert 20 < np.median(planted("Cardiomegaly")) < 70
    assert np.median(planted("Emphysema")) < -920
    assert -750 < np.median(planted("Lung opacity")) < -300
    assert planted("Lung nodule").max() > -50
    assert planted("Hiatal hernia").min() < -700  # gas in the sac


@pytest.mark.parametrize("seed", range(3))
def test_small_findings_lie_where_they_belong(seed):
    healthy, _ = draw([], seed)
    _, masks = draw(["Lung nodule"], seed)
    assert np.median(healthy[masks["Lung nodule"]]) < -500  # same seed, same anatomy: lung was there before
    _, masks = draw(["Cardiomegaly", *CALCIUM], seed)
    heart, calcium, plaque = (np.argwhere(masks[label]).mean(0) for label in ("Cardiomegaly", *CALCIUM))
    assert calcium[1] < heart[1] < plaque[1]  # coronaries in front of the heart's middle, descending aorta behind it


@pytest.mark.parametrize("seed", range(3))
def test_axes_run_feet_to_head_front_to_back_right_to_left(seed):
    volume, masks = draw(["Cardiomegaly", "Pleural effusion"], seed)
    _, height, width = volume.shape
    middle = volume[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
    lung = (middle < -600).mean((1, 2))
    assert lung[:3].mean() < 0.15 < 0.3 < lung[10:18].mean()  # liver and stomach at the feet, lungs above them
    bone = (volume[:, :, width // 2 - 6 : width // 2 + 6] > 130).sum((0, 2))
    assert bone[height // 2 :].sum() > 2 * bone[: height // 2].sum()  # spine at the back
    assert np.argwhere(masks["Cardiomegaly"]).mean(0)[2] > width / 2  # heart to the patient's left
    assert np.argwhere(masks["Pleural effusion"]).mean(0)[1] > height / 2  # fluid sinks to the back


@pytest.mark.parametrize("shape", [(24, 96, 96), (8, 32, 32), (6, 24, 40)])
def test_every_finding_leaves_voxels_at_every_size(shape):
    for seed in range(4):
        volume, masks = draw(phantoms.FINDINGS, seed, shape)
        assert volume.dtype == np.int16
        assert volume.shape == shape
        assert volume.min() >= -1024
        assert set(masks) == set(phantoms.FINDINGS)
        assert all(mask.any() for mask in masks.values())


def test_unknown_finding_is_refused_by_name():
    with pytest.raises(ValueError, match="Bronchiectasis"):
        draw(["Bronchiectasis"])


def test_data_set_is_the_same_for_the_same_seed_and_another_for_another(tmp_path):
    for name, seed, n_test in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        phantoms.write_dataset(tmp_path / name, 2, 1, n_test, seed, (8, 32, 32))
    files = sorted(path.name for path in (tmp_path / "a" / "volumes").iterdir())
    assert files == [f"phantom_{i}_a_1.npz" for i in (1, 2, 3, 4)]
    for file in files:
        a, b, c = ((tmp_path / name / "volumes" / file).read_bytes() for name in "abc")
        assert a == b != c


def test_csv_and_masks_agree(tmp_path):
    path = phantoms.write_dataset(tmp_path, 6, 2, 2, 0, (8, 32, 32), save_masks=True, all_columns=True)
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["series_id", "split", "img_path", *phantoms.CT_RATE_LABELS]
    assert [row["split"] for row in rows] == ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    for row in rows:
        image = np.load(tmp_path / row["img_path"])["image"]
        assert image.shape == (1, 8, 32, 32)
        assert image.dtype == np.int16
        masks = np.load((tmp_path / row["img_path"]).with_name(f"{row['series_id']}_mask.npz"))
        assert set(masks.files) == set(phantoms.FINDINGS)
        for label in phantoms.CT_RATE_LABELS:
            expected = str(int(masks[label].any())) if label in phantoms.FINDINGS else ""
            assert row[label] == expected


def test_only_the_findings_asked_for_become_columns(tmp_path):
    path = phantoms.write_dataset(tmp_path, 1, 1, 1, 0, (8, 32, 32), findings=("Lung nodule", "Cardiomegaly"))
    assert path.read_text().splitlines()[0] == "series_id,split,img_path,Cardiomegaly,Lung nodule"


def test_toy_tower_is_small_and_loads_without_a_missing_tensor():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert sum(file.stat().st_size for file in TINY_SIGLIP.iterdir() if file.is_file()) <= 3_000_000
    for kind in (transformers.SiglipVisionModel, transformers.SiglipModel):
        model, report = kind.from_pretrained(TINY_SIGLIP, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["mismatched_keys"]
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_toy_tower_tells_findings_from_captions():
    """Zero-shot, by text alone: slices that show a finding lie nearer to its name than slices of the same scans do."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.SiglipModel.from_pretrained(TINY_SIGLIP)
    words = (TINY_SIGLIP / "vocab.txt").read_text().splitlines()
    length = model.config.text_config.max_position_embeddings
    normal = [draw([], 900 + seed)[0] for seed in range(6)]
    for label in phantoms.FINDINGS:
        ids = [words.index(word) for word in label.lower().split()]
        tokens = torch.tensor([ids + [0] * (length - len(ids))])
        shown, healthy = [], []
        for seed in range(6):
            volume, masks = draw([label], 900 + seed)
            slice_index = int(masks[label].sum((1, 2)).argmax())
            shown.append(volume[slice_index])
            healthy.append(normal[seed][slice_index])
        hu = torch.from_numpy(np.stack(shown + healthy)).float()
        windows = ((-600, 1000), (40, 400), (700, 1500))
        pixels = torch.stack([((hu - c) / w + 0.5).clamp(0, 1) for c, w in windows], 1) * 2 - 1
        with torch.inference_mode():
            scores = model(input_ids=tokens, pixel_values=pixels).logits_per_image[:, 0]
        ranks = (scores[:6, None] > scores[None, 6:]).float().mean()  # AUROC
        assert ranks > 0.85, label
