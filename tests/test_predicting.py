"""Room 13: predicting with what a run has left, from the command line and from Python, and scoring predictions."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

import finetune_siglip as fs
from finetune_siglip import MODEL_KIND, classifier_from, load_checked, load_classifier, main
from test_raw import body, write_dicom, write_image

LABELS = ["Cardiomegaly", "Pleural effusion", "Lung nodule"]


def words(*argv):
    return [str(word) for word in argv]


def read(path):
    """test_predictions.csv with Python's own floats: pandas 2 rounds the last digit."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    kinds = {"_prob": float, "_pred": int}
    return table.apply(lambda column: column.map(kinds.get(column.name[-5:], str)))


@pytest.fixture(scope="module")
def models(scans, tower, tmp_path_factory):
    """Two models of one table: another seed, another grid and other windows."""
    out = tmp_path_factory.mktemp("models")
    for name, more in (("a", ("--num-slices", 4)), ("b", ("--num-slices", 6, "--windows", "medsiglip"))):
        argv = (
            "--csv",
            scans,
            "--pretrained",
            tower,
            "--label-columns",
            *LABELS,
            "--output-dir",
            out / name,
            "--lr",
            1e-3,
        )
        common = (
            "--epochs",
            1,
            "--bootstrap",
            20,
            "--num-workers",
            0,
            "--batch-size",
            4,
            "--wandb-mode",
            "disabled",
            "--seed",
            ord(name),
        )
        assert main(words(*argv, *common, *more)) == 0
    return {name: out / name / "best_model.pth" for name in "ab"}


def test_a_prediction_replaces_nothing_of_another_run_unless_told_to(models, scans, tmp_path, capsys):
    before = {path: path.read_bytes() for path in models["a"].parent.iterdir() if path.is_file()}
    argv = ("--csv", scans, "--test-only", models["b"], "--num-workers", 0, "--output-dir")
    assert main(words(*argv, models["a"].parent)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in models["a"].parent.iterdir() if path.is_file()} == before
    assert main(words(*argv, tmp_path / "out", "--test-split", "val")) == 0
    assert main(words(*argv, tmp_path / "out")) == 2
    assert main(words(*argv, tmp_path / "other", "--test-output", tmp_path / "out" / "test_predictions.csv")) == 2
    assert main(words(*argv, tmp_path / "out", "--overwrite")) == 0
    assert not (tmp_path / "out" / "evaluation_val.json").exists()  # it was another prediction's
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    cut = tmp_path / "cut.npz"
    cut.write_bytes(b"PK")
    (tmp_path / "cut.csv").write_text(f"series_id,split,img_path\nx,test,{cut}\n")
    argv_of_bad = ("--csv", tmp_path / "cut.csv", *argv[2:], tmp_path / "out", "--overwrite")
    assert main(words(*argv_of_bad)) == 2
    assert {path: path.read_bytes() for path in before} == before  # one that fails has nothing to put in their place
    copied = shutil.copytree(models["a"].parent, tmp_path / "copy")
    assert main(words(*argv, copied, "--overwrite")) == 0
    assert (copied / "best_model.pth").exists()  # what was trained is never a prediction's to remove
    assert (copied / "last.ckpt").exists()


def test_from_python_a_checkpoint_predicts_as_it_does_from_the_command_line(models, scans, tmp_path):
    argv = ("--csv", scans, "--test-only", models["a"], "--num-workers", 0, "--output-dir", tmp_path)
    assert main(words(*argv, "--test-split", "val")) == 0
    written = read(tmp_path / "test_predictions.csv")
    classifier = load_classifier(models["a"])
    assert classifier.labels == LABELS
    assert classifier.thresholds.tolist() == [0.5] * 3
    assert load_classifier(models["a"], threshold=0.3).thresholds.tolist() == [0.3] * 3
    assert isinstance(classifier.module, torch.nn.Module)
    table = pd.read_csv(scans, dtype=str)
    paths = [scans.parent / path for path in table.img_path[table.split == "val"]]
    predicted = classifier.predict(paths)
    pd.testing.assert_frame_equal(predicted, written)
    one = classifier.predict(str(paths[2]))
    pd.testing.assert_frame_equal(one, written.iloc[[2]].reset_index(drop=True))
    with pytest.raises(fs.BadInput, match="batchsize"):
        load_classifier(models["a"], batchsize=3)
    (tmp_path / "cuts.json").write_text(json.dumps(dict(zip(LABELS, (0.1, 0.2, 0.3), strict=True))))
    told = load_classifier(models["a"], threshold=f"{tmp_path}/cuts.json", orientation="spl", cache_dir=f"{tmp_path}")
    assert told.thresholds.tolist() == [0.1, 0.2, 0.3]
    pd.testing.assert_frame_equal(told.predict(paths).filter(like="_prob"), written.filter(like="_prob"))
    with pytest.raises(fs.BadInput, match="--threshold: 2 is not at least 0 and at most 1"):
        load_classifier(models["a"], threshold=2)


def test_what_is_public_is_there_and_says_what_it_is():
    assert fs.__all__ == sorted(fs.__all__, key=str)
    for name in fs.__all__:
        assert getattr(fs, name).__doc__, name
    named_in_the_contract = {"parse_args", "main", "load_volume", "SiglipClassifier", "FocalLoss", "BalancedBCELoss",
                             "read_pretrained", "build_backbone", "backbone_layers", "compute_metrics",
                             "tune_thresholds", "load_classifier"}  # fmt: skip
    assert named_in_the_contract <= set(fs.__all__)


def test_labels_may_be_left_out_where_a_checkpoint_knows_them(models, scans, tmp_path, capsys):
    argv = ("--csv", scans, "--test-only", models["a"], "--num-workers", 0, "--bootstrap", 0, "--output-dir")
    names = tmp_path / "findings.txt"
    names.write_text("\ufeff" + "\r\n".join(LABELS) + "\r\n\r\n", encoding="utf-8", newline="")
    assert main(words(*argv, tmp_path / "without")) == 0
    assert main(words(*argv, tmp_path / "file", "--label-columns", f"@{names}")) == 0
    without, file = ((tmp_path / name / "test_predictions.csv").read_bytes() for name in ("without", "file"))
    assert without == file
    assert main(words(*argv, tmp_path / "wrong", "--label-columns", *LABELS[::-1])) == 2
    assert "order" in capsys.readouterr().err
    checked = words("--csv", scans, "--check-data", "--output-dir", tmp_path / "check")
    assert main(checked) == 0
    assert "train: 17 scans" in capsys.readouterr().out


def test_files_and_folders_are_predicted_without_a_table_by_their_names(models, scans, tmp_path, capsys):
    folder = tmp_path / "scans"
    (folder / "below").mkdir(parents=True)
    sources = sorted(scans.parent.glob("volumes/*.npz"))[:3]
    for source, target in zip(sources, ("007.npz", "below/NA.npz", "below/007.npz"), strict=True):
        shutil.copy(source, folder / target)
    (folder / "notes.txt").write_text("no scan")
    argv = ("--test-only", models["a"], "--num-workers", 0, "--output-dir")
    assert main(words(*argv, tmp_path / "out", "--images", folder, folder / "007.npz")) == 0
    found = read(tmp_path / "out" / "test_predictions.csv")
    assert found.id.tolist() == [str(folder / "007.npz"), str(folder / "below" / "007.npz"), "NA"]
    expected = load_classifier(models["a"]).predict([sources[0], sources[2], sources[1]])
    assert (found.iloc[:, 1:].to_numpy() == expected.iloc[:, 1:].to_numpy()).all()
    capsys.readouterr()
    for wrong, named in ((tmp_path / "nowhere.npz", "nowhere.npz"), (tmp_path / "out", "no scan")):
        assert main(words(*argv, tmp_path / "none", "--images", wrong)) == 2
        assert named in capsys.readouterr().err


def test_raw_scans_below_a_folder_are_prepared_as_the_checkpoint_was_trained(models, tmp_path, capsys):
    """With one warning on what is assumed, for it was trained on files of unknown spacing."""
    spacing, folder = (7.5, 5.5, 5.5), tmp_path / "pacs"
    (folder / "b").mkdir(parents=True)
    for name in ("a.nii.gz", "b/c.mha", "b/d.nrrd"):
        write_image(folder / name, body(), spacing, "LAI")
    write_dicom(folder / "series", body(), spacing)
    for number in (1, 2):
        series = write_dicom(tmp_path / f"s{number}", body(), spacing, SeriesInstanceUID=f"1.2.{number}")
        (folder / "two").mkdir(exist_ok=True)
        for path in series:
            shutil.copy(path, folder / "two" / f"{number}-{path.name}")
    argv = ("--test-only", models["a"], "--num-workers", 0, "--images", folder, "--output-dir")
    assert main(words(*argv, tmp_path / "out")) == 0
    said = capsys.readouterr().err
    assert said.count("unknown spacing") == 1
    assert "1.5 x 1.5 x 3 mm" in said
    found = read(tmp_path / "out" / "test_predictions.csv")
    assert sorted(found.id) == ["a", "c", "d", "series", "two#1.2.1", "two#1.2.2"]
    content = load_checked(models["a"], MODEL_KIND)
    np.savez(tmp_path / "prepared.npz", image=fs.prepare_volume(folder / "a.nii.gz", (3.0, 1.5, 1.5)))
    sample = fs.load_sample(tmp_path / "prepared.npz", fs.Preprocessing.from_dict(content["preprocessing"]))
    with torch.no_grad():
        expected = classifier_from(content).eval()(sample[None]).sigmoid()[0].numpy()
    for row in found.iloc[:, 1::2].to_numpy(float):
        np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_several_checkpoints_average_their_logits_each_with_its_own_preprocessing(models, scans, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for name, path in models.items():
        shutil.copy(path, both / f"{name}.pth")
    shutil.copy(models["a"], both / "twin.pth")
    argv = ("--csv", scans, "--num-workers", 0, "--bootstrap", 0, "--output-dir")
    runs = {"a": [models["a"]], "b": [models["b"]], "paths": models.values(), "folder": [both]}
    for name, paths in runs.items():
        assert main(words(*argv, tmp_path / name, "--test-only", *paths)) == 0
    tables = {name: read(tmp_path / name / "test_predictions.csv") for name in runs}
    logit = {name: np.log(p / (1 - p)) for name, t in tables.items() if (p := t.iloc[:, 1::2].to_numpy(float)).size}
    np.testing.assert_allclose(logit["paths"], (logit["a"] + logit["b"]) / 2, rtol=1e-9)
    pd.testing.assert_frame_equal(tables["paths"], tables["folder"])
    assert len(tables["paths"]) == 5


def test_thresholds_of_an_ensemble_are_tuned_for_its_mean_on_val(models, scans, tmp_path, capsys):
    argv = ("--csv", scans, "--num-workers", 0, "--test-only", *models.values(), "--output-dir")
    assert main(words(*argv, tmp_path / "val", "--test-split", "val")) == 0
    val = fs.read_evaluation(tmp_path / "val" / "evaluation_val.json")
    expected = fs.tune_thresholds(val["targets"], val["probabilities"])
    assert main(words(*argv, tmp_path / "auto", "--threshold", "auto")) == 0
    used = fs.read_evaluation(tmp_path / "auto" / "evaluation_test.json")
    assert used["cuts"].tolist() == expected.tolist()
    assert main(words(*argv, tmp_path / "val2", "--threshold", "auto", "--test-split", "val")) == 0
    assert fs.read_evaluation(tmp_path / "val2" / "evaluation_val.json")["tuned_here"] == "f1"
    images = (*argv[2:-1], "--images", scans.parent, "--threshold", "auto", "--output-dir", tmp_path / "none")
    assert main(words(*images)) == 2
    assert "split val" in capsys.readouterr().err


def test_checkpoints_of_different_labels_are_not_averaged(models, scans, tower, tmp_path, capsys):
    content = load_checked(models["b"], MODEL_KIND) | {"labels": [*LABELS[:2], "Emphysema"]}
    fs.save_checked(tmp_path / "other.pth", content)
    argv = words("--csv", scans, "--test-only", models["a"], tmp_path / "other.pth", "--output-dir", tmp_path / "out")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "Emphysema" in error
    assert "other.pth" in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def predictions(tmp_path):
    """120 scans of 60 patients, their probabilities in one file and their labels in another, in another order."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (120, 2))
    probabilities = np.clip(rng.normal(0.35 + 0.3 * truth, 0.2), 0, 1)
    ids = [f"train_{i // 2}_a_{i % 2}" for i in range(120)]
    made = pd.DataFrame(
        {"id": ids, "Mass_prob": probabilities[:, 0], "extra": "x", "Lung cyst_prob": probabilities[:, 1]}
    )
    made.to_csv(tmp_path / "p.csv", index=False)
    table = pd.DataFrame({"series_id": ids, "Mass": truth[:, 0], "Lung cyst": truth[:, 1]})
    table.iloc[::-1].to_csv(tmp_path / "t.csv", index=False)
    return tmp_path, truth, probabilities, table


def test_predictions_from_anywhere_are_scored_as_scikit_learn_scores_them(predictions):
    folder, truth, probabilities, _ = predictions
    argv = words(
        "--score", folder / "p.csv", "--csv", folder / "t.csv", "--bootstrap", 50, "--output-dir", folder / "out"
    )
    assert main(argv) == 0
    metrics = json.loads((folder / "out" / "evaluation_all.json").read_text())["metrics"]
    for i, label in enumerate(("Mass", "Lung cyst")):
        own = metrics["per_label"][label]
        assert own["auc"] == pytest.approx(roc_auc_score(truth[:, i], probabilities[:, i]))
        assert own["f1"] == pytest.approx(f1_score(truth[:, i], probabilities[:, i] >= 0.5))
    assert "macro AUROC" in (folder / "out" / "report.html").read_text()
    assert main(argv) == 2  # it replaces nothing either


def test_a_label_table_is_compared_with_its_corrected_one(predictions, capsys):
    """Labels are probabilities of 0 and 1; what is unknown in the corrected table is left out."""
    folder, truth, _, table = predictions
    corrected = table.copy().astype(object)
    corrected.loc[:9, "Mass"] = 1 - truth[:10, 0]
    corrected.loc[10:14, "Mass"] = ""
    corrected.to_csv(folder / "corrected.csv", index=False)
    renamed = {"series_id": "id", "Mass": "Mass_prob", "Lung cyst": "Lung cyst_prob"}
    table.rename(columns=renamed).to_csv(folder / "old.csv", index=False)
    argv = ("--score", folder / "old.csv", "--csv", folder / "corrected.csv", "--output-dir", folder / "out")
    assert main(words(*argv, "--bootstrap", 0)) == 0
    mass = json.loads((folder / "out" / "evaluation_all.json").read_text())["metrics"]["per_label"]["Mass"]
    assert (mass["n_known"], mass["accuracy"]) == (115, pytest.approx(105 / 115))


def test_ids_that_do_not_match_are_listed_from_both_sides(predictions, capsys):
    folder, _, _, table = predictions
    table.iloc[1:].assign(series_id=lambda t: t.series_id.replace("train_5_a_0", "other")).to_csv(folder / "t.csv")
    assert main(words("--score", folder / "p.csv", "--csv", folder / "t.csv", "--output-dir", folder / "out")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("p.csv: train_0_a_0, train_5_a_0" in line for line in lines)
    assert any(line.endswith("other") for line in lines)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("id,Mass_prob\na,0.5\na,0.4\n", "line 3: id 'a'"),
        ("id,Mass_prob\na,0.5\nb,1.4\nc,\n", "line 3"),
        ("name,Mass_prob\na,0.5\n", "'id'"),
        ("id,Mass\na,0.5\n", "_prob"),
        ("id,Mass_prob\na,nan\n", "line 2"),
    ],
)
def test_a_table_that_holds_no_predictions_is_refused(predictions, capsys, text, named):
    folder = predictions[0]
    (folder / "p.csv").write_text(text)
    assert main(words("--score", folder / "p.csv", "--csv", folder / "t.csv", "--output-dir", folder / "out")) == 2
    assert named in capsys.readouterr().err
