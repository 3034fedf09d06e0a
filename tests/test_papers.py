"""Room 12: the files a person reads, read back independently."""

import ast
import base64
import csv
import html.parser
import json
import re
import shutil
import subprocess
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import finetune_siglip as fs
from helpers import CHEST


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_round_trip_ids_numbers_and_decisions(tmp_path, dtype) -> None:
    ids = ["007", "NA", "1e5", 'quote " and, comma', "línea", " spaces "]
    rng = np.random.default_rng(0)
    probabilities = rng.random((6, 2)).astype(dtype)
    probabilities[0] = 0.7, 0.3
    thresholds = np.array([0.7, 0.3])
    rows = fs.prediction_rows(ids, probabilities, thresholds, ["Lung nodule", "Emphysema"])
    fs.write_rows(tmp_path / "p.csv", rows)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "Lung nodule_prob", "Lung nodule_pred", "Emphysema_prob", "Emphysema_pred"]
    assert [row[0] for row in rows] == ids
    read = np.array([[float(row[1]), float(row[3])] for row in rows])
    assert np.array_equal(read, probabilities.astype(np.float64))
    assert [[row[2], row[4]] for row in rows] == [[str(int(c)) for c in row] for row in read >= thresholds]
    old = {"float_precision": "round_trip"} if int(pd.__version__.split(".")[0]) < 3 else {}
    frame = pd.read_csv(tmp_path / "p.csv", dtype={"id": str}, keep_default_na=False, **old)  # as in the README
    assert frame["id"].tolist() == ids
    assert np.array_equal(frame[["Lung nodule_prob", "Emphysema_prob"]].to_numpy(), read)


def test_progress_picture_is_drawn_from_any_number_of_epochs(tmp_path) -> None:
    for n in (0, 3):
        results = [
            {"epoch": i, "train_loss": 1 / (i + 1), "val_loss": 1.0, "macro_f1": i / 9, "macro_auc": None, "lr": 1e-4}
            for i in range(n)
        ]
        fs.save_figure(tmp_path / "progress.png", fs.draw_progress(results, "macro_f1"))
        assert (tmp_path / "progress.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_thresholds_are_read_by_label_and_every_wrong_one_is_named(tmp_path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"b": 0.25, "a": 1, "other": 7}))
    assert fs.resolve_thresholds(path, ["a", "b"], None).tolist() == [1, 0.25]
    path.write_text(json.dumps({"thresholds": {"b": 0.25, "a": 1}}))
    assert fs.resolve_thresholds(path, ["a", "b"], None).tolist() == [1, 0.25]
    for content in ('{"a": 1.5, "b": "x"}', "{}", '{"a": NaN, "b": true}'):
        path.write_text(content)
        with pytest.raises(fs.BadInput) as caught:
            fs.resolve_thresholds(path, ["a", "b"], None)
        assert [message.split(" for ")[1][0] for message in caught.value.messages] == ["a", "b"]
    assert fs.resolve_thresholds(0.3, ["a", "b"], np.array([0.1, 0.2])).tolist() == [0.3, 0.3]
    assert fs.resolve_thresholds("auto", ["a", "b"], np.array([0.1, 0.2])).tolist() == [0.1, 0.2]
    path.write_text("[1, 2]")
    for wrong in (tmp_path / "none.json", tmp_path, path):
        with pytest.raises(fs.BadInput, match="JSON"):
            fs.resolve_thresholds(wrong, ["a"], None)


HOSTILE = '<script>window.hacked=1</script>"><img src=x onerror=window.hacked=1>'
COLUMNS = {
    "AUROC": "auc", "average precision": "average_precision", "F1": "f1", "precision": "precision",
    "sensitivity": "recall", "specificity": "specificity", "balanced accuracy": "balanced_accuracy",
    "accuracy": "accuracy", "Brier": "brier", "calibration error": "ece", "CRG": "crg", "prevalence": "prevalence",
}  # fmt: skip
LABELS = ["Lung nodule", "Emphysema & $\\frac{ 肺\n", "Hernia", f"Odd {HOSTILE}"]


def evaluated_folder(folder, n: int = 90):
    """A run's folder with everything that a report is made of; ids and a label hold markup."""
    rng = np.random.default_rng(0)
    targets = (rng.random((n, 4)) < [0.2, 0.5, 0.0, 0.4]).astype(np.float32)
    targets[rng.random(targets.shape) < 0.05] = np.nan
    probabilities = 1 / (1 + np.exp(1 - rng.normal(size=targets.shape) - 2 * np.nan_to_num(targets)))
    ids = [f"valid_{i // 2}_a_{i % 2}" for i in range(n - 1)] + [HOSTILE]
    wrong = np.flatnonzero(targets[:, 0] == 1)[0]
    ids[wrong], ids[-1], probabilities[wrong, 0] = HOSTILE, ids[wrong], 0.0  # the most confidently wrong scan
    patients = [f"valid_{i // 2}" for i in range(n)]
    table = types.SimpleNamespace(labels=tuple(LABELS), series_ids=ids, patient_ids=patients, targets=targets)
    tuned = fs.tune_thresholds(targets, probabilities)
    for split, thresholds, objective in (("val", tuned, "f1"), ("test", tuned, None)):
        scored = fs.evaluate(targets, probabilities, LABELS, thresholds, patients, objective, 50)
        fs.save_evaluation(folder, split, table, probabilities, thresholds, scored)
    fs.write_rows(folder / "test_predictions.csv", fs.prediction_rows(ids, probabilities, tuned, LABELS))
    lines = [
        {"epoch": i, "train_loss": 1 / i, "val_loss": 1.0, "macro_f1": 0.5, "macro_auc": None, "lr": 1e-4}
        for i in (1, 2)
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = {"Settings": {"csv": HOSTILE, "windows": [[-1, 1]]}, "Data": {HOSTILE: "5 scans of 3 patients"}}
    facts = {"date": "2026-05-04 03:02:01 +0000", "checkpoint": HOSTILE, "checkpoint digest": "0123456789abcdef" * 4}
    (folder / "run.json").write_text(json.dumps(run | {"Run, training": facts | {"threads": 16}}))
    volume = rng.random((3, 12, 20, 24)).astype(np.float32)
    picture = fs.draw_slices(volume, ["a", "b", "c"], HOSTILE, [1, 6])
    fs.save_figure(fs.picture_path(folder, HOSTILE), picture)
    return targets, probabilities, tuned


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The folder above with its report, for tests that only read; targets lie beside it."""
    folder = tmp_path_factory.mktemp("reported")
    targets, _, _ = evaluated_folder(folder)
    return folder, targets, fs.write_report(folder).read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tables, figures and tags of a report, read without the code that wrote it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.headlines, self.rows, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "data-figure" in attributes:
            self.open = attributes["data-figure"]
        elif tag == "b" and "data-v" in attributes:
            self.headlines.append((self.open, attributes["data-v"]))
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and "data-v" in attributes:
            self.rows[-1].append(attributes["data-v"])


def number(text: str) -> float | None:
    return float(text) if text else None


def test_every_figure_in_the_report_equals_the_evaluation_and_the_csv(reported) -> None:
    folder, targets, text = reported
    page = Page(text)
    evaluations = [json.loads((folder / f"evaluation_{s}.json").read_text()) for s in ("test", "val")]
    assert [name for name, _ in page.headlines] == list(fs.REPORT_HEADLINES) * 2
    rows = [row for row in page.rows if row and row[0] in LABELS]
    assert [row[0] for row in rows] == LABELS * 2
    heads = re.findall(r'<th scope="col">(.*?)</th>', text)
    assert heads == ["label", "positive / known", *COLUMNS, "threshold"] * 2
    for k, evaluation in enumerate(evaluations):
        metrics = evaluation["metrics"]
        assert {name: number(v) for name, v in page.headlines[8 * k : 8 * k + 8]} == {
            name: metrics[name] for name in fs.REPORT_HEADLINES
        }
        for row in rows[4 * k : 4 * k + 4]:
            expected = metrics["per_label"][row[0]]
            assert int(row[1]) == expected["n_positive"]
            assert [number(v) for v in row[2:-1]] == [expected[name] for name in COLUMNS.values()]
            assert float(row[-1]) == evaluation["thresholds"][row[0]]
        shown = re.findall(r'data-figure="(\w+)">.*?<small>(.*?)</small>', text)[8 * k : 8 * k + 8]
        ends = {name: evaluation["intervals"][name] for name in fs.REPORT_HEADLINES}
        assert shown == [(name, f"{low:.3f}–{high:.3f}") for name, (low, high) in ends.items()]
    assert_figures_follow_from_the_csv(folder / "test_predictions.csv", targets, rows[:4], dict(page.headlines[:8]))


def assert_figures_follow_from_the_csv(path, targets: np.ndarray, rows: list, headlines: dict) -> None:
    """All of a split's figures, computed anew by scikit-learn and plain sums from the probabilities and calls there."""
    with open(path, newline="", encoding="utf-8") as file:
        cells = np.array([row[1:] for row in list(csv.reader(file))[1:]], float)
    probabilities, calls, known = cells[:, ::2], cells[:, 1::2] == 1, np.isfinite(targets)
    figures = [from_scratch(*(a[known[:, i], i] for a in (targets, probabilities, calls))) for i in range(len(LABELS))]
    for row, wanted in zip(rows, figures, strict=True):
        for name, value in zip(COLUMNS.values(), row[2:-1], strict=True):
            assert number(value) == (None if wanted[name] is None else pytest.approx(wanted[name], abs=1e-12)), name
    pooled = from_scratch(*(a[known] for a in (targets, probabilities, calls)))
    for name, value in headlines.items():
        figure = name.removeprefix("macro_").removeprefix("micro_")
        defined = [f[figure] for f in figures if f[figure] is not None]
        wanted = np.mean(defined) if name.startswith("macro_") else pooled[figure]
        assert float(value) == pytest.approx(wanted, abs=1e-12), name


def from_scratch(y: np.ndarray, p: np.ndarray, called: np.ndarray) -> dict:
    """Figures of targets, probabilities and decisions (n,), None where undefined."""
    from sklearn import metrics as sk

    (tn, fp), (fn, tp) = sk.confusion_matrix(y, called, labels=[0, 1])
    both, positive, n = 0 < y.sum() < len(y), y == 1, len(y)
    bins = [(p >= b / 10) & ((p < (b + 1) / 10) | (b == 9)) for b in range(10)]
    r, u = (tn + fp) / (2 * (tp + fn)) if tp + fn else 0, (tn + fp) / 2
    return {
        "auc": sk.roc_auc_score(y, p) if both else None,
        "average_precision": sk.average_precision_score(y, p) if positive.any() else None,
        "f1": sk.f1_score(y, called) if tp + fp + fn else None,
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": tp / (tp + fn) if tp + fn else None,
        "specificity": tn / (tn + fp) if tn + fp else None,
        "balanced_accuracy": sk.balanced_accuracy_score(y, called) if both else None,
        "accuracy": (tp + tn) / n,
        "brier": sk.brier_score_loss(y, p),
        "ece": sum(abs(p[b].sum() - y[b].sum()) for b in bins) / n,
        "crg": u / (2 * u - (r * tp - r * fn - fp)) if both else None,
        "prevalence": positive.mean(),
    }


def test_the_report_is_one_file_that_escapes_text_names_its_pictures_and_asks_no_network(reported) -> None:
    folder, _, text = reported
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1
    assert not re.search(r"(?:https?:)?//\w+\.\w", text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    pictures = [a for a in images if a["src"].startswith("data:image/png;base64,")]
    assert len(pictures) == 2
    assert all(HOSTILE in a["alt"] for a in pictures)
    charts = [a for a in images if a["src"].startswith("data:image/svg+xml;base64,")]
    assert len(charts) == len(images) - 2 == 2 * 3 + 1  # curves of labels with both classes; training
    assert all(a["alt"] for a in charts)
    assert all(b"</svg>" in base64.b64decode(a["src"].partition(",")[2]) for a in charts)
    identities = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(identities)) == len(identities)
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= set(identities)
    assert fs.write_report(folder).read_text(encoding="utf-8") == text


def test_the_head_of_a_report_tells_it_from_another_at_a_glance(reported) -> None:
    folder, _, text = reported
    name = f"{folder.name} 2026-05-04 03:02:01 +0000"
    assert f"<title>{name}: SigLIP on chest CT</title>" in text
    assert f"<h1>{name}</h1>" in text
    head, facts, _ = re.split("<details>|</details>", text, maxsplit=2)
    assert "(0123456789ab)" in head
    assert "0123456789abc" not in head
    assert "threads" not in head
    assert "0123456789abcdef" * 4 in facts


def test_calibration_is_drawn_where_a_bin_holds_five_scans() -> None:
    probabilities = np.repeat([0.05, 0.15, 0.35, 0.95, 1.0], [5, 4, 7, 4, 1])  # 0.95 and 1.0 share a bin
    targets = np.arange(len(probabilities)) % 3 == 0
    metrics = {"per_label": {"a": {"auc": 0.5, "average_precision": 0.5, "ece": 0.5}}}
    e = {"labels": ["a"], "cuts": [0.5], "metrics": metrics}
    figure = fs.draw_curves({**e, "targets": targets[:, None] * 1.0, "probabilities": probabilities[:, None]}, 0)
    points = figure.axes[2].lines[1].get_xydata()
    groups = [probabilities < 0.1, abs(probabilities - 0.35) < 0.01, probabilities > 0.9]
    np.testing.assert_allclose(points, [[probabilities[g].mean(), targets[g].mean()] for g in groups])


def test_curves_are_those_of_scikit_learn_with_a_dot_where_the_threshold_is(reported) -> None:
    from sklearn.metrics import precision_recall_curve, precision_score, recall_score, roc_curve

    e = fs.read_evaluation(reported[0] / "evaluation_test.json")
    known, cut = np.isfinite(e["targets"][:, 0]), e["cuts"][0]
    y, p = e["targets"][known, 0] == 1, e["probabilities"][known, 0]
    roc, pr, _ = fs.draw_curves(e, 0).axes
    np.testing.assert_array_equal(roc.lines[1].get_xydata(), np.transpose(roc_curve(y, p)[:2]))
    sensitivity = recall_score(y, p >= cut)
    np.testing.assert_allclose(roc.lines[2].get_xydata()[0], [(p[~y] >= cut).mean(), sensitivity])
    np.testing.assert_allclose(pr.lines[1].get_xydata()[0], [sensitivity, precision_score(y, p >= cut)])
    precision, recall, _ = precision_recall_curve(y, p)
    np.testing.assert_array_equal(pr.lines[2].get_xydata(), np.transpose([recall, precision]))


def test_nothing_that_draws_is_imported_before_something_is_drawn() -> None:
    tree = ast.parse(Path(fs.__file__).read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for n in top for name in [getattr(n, "module", None) or n.names[0].name]}
    assert not names & {"matplotlib", "PIL", "jinja2", "markupsafe", "sklearn", "wandb"}


def test_a_report_needs_an_evaluation_and_little_else(tmp_path) -> None:
    with pytest.raises(fs.BadInput, match=r"evaluation_\*\.json"):
        fs.write_report(tmp_path)
    table = types.SimpleNamespace(labels=("a",), series_ids=["1"], patient_ids=["1"], targets=np.ones((1, 1)))
    scored = fs.evaluate(table.targets, np.full((1, 1), 0.7), ["a"], 0.5, ["1"], None, 0)
    fs.save_evaluation(tmp_path, "val", table, np.full((1, 1), 0.7), np.array([0.5]), scored)
    assert "No decision was wrong" in fs.write_report(tmp_path).read_text(encoding="utf-8")
    for broken in ("{}", "[1]", "{", '{"ids": [1], "labels": ["a"], "targets": [["x"]], "probabilities": [[1]]}'):
        (tmp_path / "evaluation_val.json").write_text(broken)
        with pytest.raises(fs.BadInput, match=r"evaluation_val\.json"):
            fs.write_report(tmp_path)


def test_the_most_confidently_wrong_scans_come_first_and_unknown_labels_never_count() -> None:
    targets = np.array([[1, 0], [0, 0], [np.nan, 1], [1, 1]])
    probabilities = np.array([[0.9, 0.8], [0.6, 0.1], [0.99, 0.02], [0.45, 0.9]])
    assert fs.most_wrong(targets, probabilities, np.array([0.5, 0.5])) == [(2, [1]), (0, [1]), (1, [0]), (3, [0])]
    assert fs.most_wrong(targets, probabilities, np.array([0.4, 0.5]), n=2) == [(2, [1]), (0, [1])]


def test_a_drawn_scan_shows_its_slices_in_order_with_equal_windows_once() -> None:
    windows = np.zeros((3, 10, 56, 112), np.float32)
    windows[0] = windows[1] = np.linspace(0, 0.9, 10)[:, None, None]
    windows[2, :, :28] = 1
    axes = fs.draw_slices(windows, ["a", "b", "c"], "x", [1, 3, 5, 7, 9]).axes
    assert [axis.get_ylabel() for axis in axes[::5]] == ["a", "c"]
    shown = [np.asarray(axis.images[0].get_array()) for axis in axes]
    assert [image[29, 57] for image in shown[:5]] == [windows[0, s, 29, 57] for s in (1, 3, 5, 7, 9)]
    assert (shown[5][5, 57], shown[5][50, 57]) == (1, 0)
    assert axes[4].get_title() == "slice 10 of 10"


def test_a_window_of_bone_is_brightened_for_the_eye_and_the_others_are_left() -> None:
    hu = np.random.default_rng(0).normal(40, 20, (4, 16, 16))  # muscle, a rib of 500 HU, air around
    hu[:, :6], hu[:, 12:, 6:8] = -1000, 500
    windows = np.stack([np.clip((hu - low) / (high - low), 0, 1) for low, high in CHEST])
    shown = fs.legible_windows(windows)
    assert list(shown) == [0, 1, 2]
    assert np.array_equal(shown[0], windows[0])
    assert np.array_equal(shown[1], windows[1])
    np.testing.assert_allclose(shown[2], np.sqrt(windows[2]))
    assert np.median(shown[2][hu > 0]) > 0.2 > 0.1 > np.median(windows[2][hu > 0])
    assert list(fs.legible_windows(windows[[0, 0, 0]])) == [0]


class Browser:
    """A real Chromium through chromedriver's own protocol."""

    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --force-prefers-reduced-motion"
    )

    def __init__(self, driver: str, chromium: str, profile):
        self.process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        line = next(line for line in self.process.stdout if "started successfully on port" in line)
        port = re.search(r"port (\d+)", line)[1]
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"binary": chromium, "args": [*self.flags.split(), f"--user-data-dir={profile}"]}
        try:
            session = self.ask("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        except BaseException:
            self.process.kill()
            raise
        self.url += "/" + session["sessionId"]

    def ask(self, path: str, body: dict | None = None, method: str | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str):
        return self.ask("/execute/sync", {"script": script, "args": []})

    def send(self, command: str, **parameters):
        return self.ask("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def press(self, key: str) -> None:
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def close(self) -> None:
        try:
            self.ask("", method="DELETE")
        except (OSError, urllib.error.URLError):
            pass
        self.process.terminate()
        self.process.wait(timeout=20)


@pytest.fixture
def browser(tmp_path_factory):
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not (driver and chromium):
        pytest.skip("the report is not looked at in a browser: no chromium with chromedriver here")
    started = Browser(driver, chromium, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


SCROLLING = "[...document.querySelectorAll('.wide')].map(box => box.scrollWidth > box.clientWidth + 1)"
HINTED = "[...document.querySelectorAll('.wide')].map(x => getComputedStyle(x, '::before').content.includes('scroll'))"
SKIP = "document.querySelector('.skip').getBoundingClientRect().right"
SMALLEST = """return Math.min(...[...document.images].filter(image => image.src.includes('svg')).map(
    image => 13.3 * image.clientWidth / image.naturalWidth))"""  # matplotlib's 10 pt as shown


def test_the_report_in_a_real_browser_at_two_widths(tmp_path, reported, browser) -> None:
    path = reported[0] / "report.html"
    browser.send("Page.enable")
    sizes = {}
    for width in (1280, 390):
        browser.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        browser.ask("/url", {"url": path.as_uri()})
        assert browser.run("return document.documentElement.scrollWidth") <= width
        fetched = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(name.startswith("data:") for name in fetched), fetched
        assert browser.run("return window.hacked") is None
        assert browser.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert browser.run(SMALLEST) >= 8
        scrolling, hinted = browser.run(f"return {SCROLLING}"), browser.run(f"return {HINTED}")
        assert scrolling == hinted
        assert any(scrolling) == (width == 390)
        assert browser.run(f"return {SKIP}") < 0
        browser.press("\ue004")
        assert browser.run("return document.activeElement.className") == "skip"
        assert browser.run(f"return {SKIP}") >= 0
        browser.run("document.activeElement.blur()")
        assert browser.run(f"return {SKIP}") < 0
        picture = base64.b64decode(browser.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        (tmp_path / f"report_{width}.png").write_bytes(picture)
        sizes[width] = browser.run("return document.documentElement.scrollHeight")
    assert sizes[390] > sizes[1280]
    browser.run("document.querySelector('nav a:last-child').focus()")
    browser.press("\ue004")  # Tab: whatever scrolls can be scrolled by keyboard
    assert browser.run("return document.activeElement.classList.contains('wide')")
    paper = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.send("Emulation.setEmulatedMedia", media="screen", features=features)
        paper[scheme] = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 21, 27)"}
    browser.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.send("Emulation.setDeviceMetricsOverride", width=1047, height=718, deviceScaleFactor=1, mobile=False)
    assert not any(browser.run(f"return {SCROLLING}"))  # paper doesn't
    assert browser.run("return Math.max(...[...document.images].map(image => image.clientHeight))") < 718
    assert base64.b64decode(browser.ask("/print", {})).startswith(b"%PDF")


@pytest.mark.filterwarnings("error")
def test_any_id_can_stand_beside_its_picture(tmp_path) -> None:
    series, volume = r"胸部 $\nothing{", torch.zeros(1, 6, 8, 8)
    prep = fs.Preprocessing("SPL", "hu", (-1000.0, 1500.0), CHEST, (6, 8, 8))
    fs.save_figure(tmp_path / "sheet.png", fs.draw_contact_sheet({series: volume}, prep))
    figure = fs.draw_slices(volume.numpy(), ["a"], series, [1, 3])
    fs.save_figure(tmp_path / "slices.png", figure)
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("slices", "sheet"))


def test_a_split_is_published_and_reported_with_its_pictures_and_the_settings(tmp_path, caplog) -> None:
    targets = np.array([[1, 0], [0, 1], [1, np.nan], [0, 0]], np.float32)
    ids, patients = ["007", "a/b", "x", "y"], ["007", "p", "p", "y"]
    paths = [fs.Path(name) for name in ids]
    table = fs.Table(("Nodule", "Hernia"), ids, patients, ["test"] * 4, paths, targets, [2, 3, 4, 5])

    class Dataset:
        def __getitem__(self, row: int) -> dict:
            return {"volume": torch.full((1, 6, 8, 8), 100 * row, dtype=torch.int16)}

    dataset = Dataset()
    dataset.table = table
    dataset.prep = types.SimpleNamespace(intensity="hu", windows=CHEST)
    probabilities = np.array([[0.9, 0.2], [0.8, 0.7], [0.6, 0.5], [0.1, 0.9]])
    with caplog.at_level("INFO"):
        scored = fs.publish(tmp_path, "test", table, probabilities, np.full(2, 0.5), None, 20, 0)
    fs.draw_most_wrong(tmp_path, dataset, probabilities, np.full(2, 0.5))
    assert scored["metrics"] == fs.compute_metrics(targets, probabilities, table.labels, 0.5)
    assert f"F1 {scored['metrics']['macro_f1']:.3f} at fixed" in caplog.text
    assert sorted((tmp_path / "pictures").iterdir()) == sorted(fs.picture_path(tmp_path, i) for i in ("a/b", "y"))
    fs.save_run(tmp_path, "training", {"device": "CPU"}, types.SimpleNamespace(lr=1e-4, spacing=None), table)
    fs.save_run(tmp_path, "prediction", {"device": "CPU"}, types.SimpleNamespace(threshold=0.5), table)
    page = Page(fs.write_report(tmp_path).read_text(encoding="utf-8"))
    assert sum(tag == "img" and "png" in attributes["src"][:20] for tag, attributes in page.tags) == 2
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["Settings, training"] == {"lr": 1e-4}
    assert run["Data, prediction"] == {"test": "4 scans of 3 patients"}


def test_thresholds_are_a_number_auto_or_a_file_and_a_report_needs_nothing_else(tmp_path) -> None:
    needed = ["--csv", "t.csv", "--label-columns", "A", "--test-only", "best.pth"]
    for text, value in (("0.3", 0.3), ("auto", "auto"), ("t.json", fs.Path("t.json"))):
        assert fs.parse_args([*needed, "--threshold", text]).threshold == value
    assert fs.parse_args(["--report", str(tmp_path)]).report == tmp_path
