"""Why the model said so: the slices and places that an explanation names, against models whose reasons are known."""

import csv
import html.parser
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_siglip as fs
from helpers import CHEST, random_hu, small_backbone, small_classifier, small_scans

RAMP = ((-1000.0, 1000.0),) * 3
PLACES = [(0, 3, 5), (2, 6, 1), (3, 0, 0)]  # slice, row and column of a patch, in SPL


def planted_volume(place, patch=8, shape=(4, 64, 64)):
    """A scan (1, 1, S, H, W) of -500 HU with one patch of 800."""
    s, row, column = place
    volume = torch.full((1, 1, *shape), -500, dtype=torch.int16)
    volume[0, 0, s, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 800
    return volume


def blinkered_vit(pooling, use_head=True):
    """A ViT in which a token sees its own patch only, and whose head asks for what only the planted patch has."""
    torch.manual_seed(0)
    config = {
        "family": "siglip", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
        "intermediate_size": 48, "num_channels": 3, "image_size": 64, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "vision_use_head": use_head,
    }  # fmt: skip
    model = fs.SiglipClassifier(fs.build_backbone(config), RAMP, "hu", 2, pooling).eval()
    with torch.no_grad():
        model.backbone.net.embeddings.position_embedding.weight.zero_()
        for block in model.backbone.blocks():
            block.self_attn.out_proj.weight.zero_()
            block.self_attn.out_proj.bias.zero_()
        model.head = torch.nn.Linear(32, 2)
        features = model.slice_features(planted_volume(PLACES[0]))[0]
        difference = features[0] - features[1]
        other = features[1] / features[1].norm()
        model.head.weight[1] = difference - (difference @ other) * other  # what slices without the patch have counts 0
        model.head.weight[0] = -model.head.weight[1]
    return model


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
def test_a_vit_that_looks_at_one_patch_is_explained_by_that_patch(pooling, place):
    (found,) = fs.find_evidence(blinkered_vit(pooling), planted_volume(place), [1])
    s, row, column = place
    assert found.slices[0] == s
    assert found.gains[0] > 0
    inside = found.maps[0][row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
    assert inside.max() == found.maps[0].max() > 0
    cells = torch.nn.functional.avg_pool2d(torch.from_numpy(found.maps[0])[None], 8)[0]
    assert divmod(int(cells.argmax()), 8) == (row, column)
    assert (found.attention is None) == (pooling != "attention")


def test_with_plain_means_relevance_adds_up_to_the_logit_and_lies_on_the_patch_alone():
    model, volume = blinkered_vit("mean", use_head=False), planted_volume(PLACES[1])
    with torch.no_grad():
        logit = (model(volume)[0, 1] - model.head.bias[1]).item()
    found, against = fs.find_evidence(model, volume, [1, 0])
    assert found.slices == [PLACES[1][0]]  # the other slices add nothing
    assert found.gains[0] == pytest.approx(logit, rel=1e-4)
    tokens = fs.slice_relevance(model, volume[0, :, 2:3].transpose(0, 1), model.head.weight[1:] / 4)
    assert tokens.shape == (1, 8, 8)
    assert tokens.sum().item() == pytest.approx(logit, rel=1e-4)
    assert tokens[0, 6, 1].item() == pytest.approx(logit, rel=1e-3)
    assert max(against.gains) <= 1e-6  # what speaks for the one label speaks against the other
    assert len(against.slices) == 1


def plain_relevance(model, volume, label):
    """Gradient x activation of every token and of every slice's feature, by one graph over pooling and head."""
    with torch.no_grad():
        tokens, masks = [], []
        for hu in volume[0, 0]:
            keep = fs.patches_in_body(hu[None], 8) if model.skip_air else torch.ones(1, 4, dtype=torch.bool)
            keep[0, 0] |= not keep.any()
            x = model.backbone.net.embeddings.patch_embedding(model.images(hu[None, None]) * 2 - 1)
            x = x.flatten(2).transpose(1, 2) + model.backbone.net.embeddings.position_embedding.weight
            x = x[:, keep[0]]
            for block in model.backbone.blocks():
                x = block(x, None)
            tokens.append(model.backbone.net.post_layernorm(x))
            masks.append(keep[0])
    tokens = [x.requires_grad_() for x in tokens]
    largest = (lambda x: x.amax(1)) if model.pool.mode == "label" else (lambda x: x[:, 0, :0])
    features = torch.cat([torch.cat([model.backbone.pool(x), largest(x)], 1) for x in tokens])[None]
    features.retain_grad()
    model.weigh(features)[0][0, label].backward()
    maps = torch.zeros(len(tokens), 4)
    for out, x, keep in zip(maps, tokens, masks, strict=True):
        out[keep] = (x.grad * x).sum(-1)[0].detach()
    if model.pool.mode == "label":
        return maps.unflatten(1, (2, 2)), label_gains(model, features[0].detach(), label)
    return maps.unflatten(1, (2, 2)), (features.grad * features).sum(-1)[0].detach()


@torch.no_grad()
def label_gains(model, features, label):
    """What each slice adds to the logit of a head per finding, by a plain loop; their sum is the logit."""
    pool, logits = model.pool, [model.head(h)[label] for h in features]
    scores = [(pool.score.weight[label] @ (torch.tanh(pool.content(h)) * pool.gate(h).sigmoid())) for h in features]
    total, gate = sum(score.exp() for score in scores), pool.balance[label].sigmoid()
    attention = [gate * score.exp() / total for score in scores]
    attention[logits.index(max(logits))] += 1 - gate
    gains = torch.stack([a * logit for a, logit in zip(attention, logits, strict=True)])
    torch.testing.assert_close(gains.sum(), model.weigh(features[None])[0][0, label])
    return gains


@pytest.mark.parametrize("pooling", ["attention", "mean", "max", "label"])
@pytest.mark.parametrize("skip_air", [False, True])
def test_slices_and_maps_are_those_of_one_plain_graph_over_pooling_and_head(pooling, skip_air):
    model = small_classifier(pooling=pooling, skip_air=skip_air).eval()
    with torch.no_grad():
        model.head[-1].bias += 1  # some slice speaks for each label
    if pooling == "label":
        torch.nn.init.normal_(model.pool.balance)
    volume = random_hu(1, 1, 6, 16, 16)
    volume[:, :, 1, :, 6:], volume[:, :, 2], volume[:, :, 4, :10] = -1000, -1000, -1000
    assert fs.patches_in_body(volume[0, 0], 8).sum(1).tolist() == [4, 2, 0, 4, 2, 4]
    model.slice_chunk = 4
    for label, found in zip([2, 0], fs.find_evidence(model, volume, [2, 0]), strict=True):
        maps, gains = plain_relevance(model, volume, label)
        assert gains.max() > 0
        order = [s for s in gains.argsort(descending=True, stable=True).tolist() if gains[s] > gains.max() / 100][:3]
        assert found.slices == order
        np.testing.assert_allclose(found.gains, gains[found.slices], rtol=1e-3, atol=1e-6)
        expected = torch.nn.functional.interpolate(maps[found.slices].clamp(min=0)[None], (16, 16), mode="bilinear")[0]
        np.testing.assert_allclose(found.maps, expected, rtol=1e-3, atol=1e-6)
        if found.attention:
            weights = model.weigh(model.slice_features(volume))[1][0, found.slices, label if pooling == "label" else 0]
            np.testing.assert_allclose(found.attention, weights.detach(), rtol=1e-5)


class Averages(fs.Backbone):
    """A convolutional family whose last map is the image itself, averaged over cells of 8 voxels."""

    def __init__(self, volumetric):
        super().__init__({"image_size": 64}, torch.nn.Identity(), 3, 16)
        self.volumetric, self.orientation = volumetric, "SRA" if volumetric else "SPL"

    def encode(self, images):
        cells = (torch.nn.functional.avg_pool3d if self.volumetric else torch.nn.functional.avg_pool2d)(images, 8)
        return cells.movedim(1, -1), None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("volumetric", [False, True])
def test_a_convolutional_model_is_explained_where_its_map_is_high_in_the_scans_own_axes(volumetric, place):
    model = fs.SiglipClassifier(Averages(volumetric), RAMP, "hu", 1, "mean").eval()
    model.head = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.head.weight.fill_(1.0)
    if volumetric:  # a layer of the map is 8 slices thick, and shown at its middle
        s, row, column = place
        volume = torch.full((1, 1, 32, 64, 48), -500, dtype=torch.int16)
        volume[0, 0, 8 * s : 8 * s + 8, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 800
        middle = 8 * s + 4
    else:
        volume, middle = planted_volume(place), place[0]
    (found,) = fs.find_evidence(model, volume, [0])
    assert found.slices[0] == middle
    assert found.maps.shape == (3, *volume.shape[3:])
    cells = torch.nn.functional.avg_pool2d(torch.from_numpy(found.maps[0])[None], 8)[0]
    assert divmod(int(cells.argmax()), cells.shape[1]) == place[1:]
    with torch.no_grad():
        logit = (model(volume) - model.head.bias).item()
    rest = (len(volume[0, 0]) // (8 if volumetric else 1)) - 3  # layers that were not shown all add the same
    assert sum(found.gains) + rest * found.gains[-1] == pytest.approx(logit, rel=1e-4)


def test_for_the_3d_resnet_it_is_grad_cam():
    torch.manual_seed(0)
    config = {"family": "resnet3d", "layers": [1, 1, 1, 1], "block_inplanes": [4, 8, 16, 32], "num_channels": 3,
              "conv1_t_size": [3, 7, 7], "bias_downsample": False, "image_size": 64}  # fmt: skip
    model = fs.SiglipClassifier(fs.build_backbone(config), CHEST, "hu", 2).eval()
    volume = random_hu(1, 1, 48, 64, 96)
    (found,) = fs.find_evidence(model, volume, [1])
    images = model.windows(volume).flip(3, 4).transpose(3, 4)  # SPL -> SRA
    activations = model.backbone.tokens(images).detach().movedim(-1, 1).requires_grad_()  # (1, E, D, R, A)
    model.head(activations.mean((2, 3, 4)))[0, 1].backward()
    alpha = activations.grad.mean((2, 3, 4), keepdim=True)  # the weights of Grad-CAM, equation 1
    cam = (alpha * activations).sum(1)[0].detach().transpose(1, 2).flip(1, 2)  # D P L
    layers = cam.sum((1, 2)).argsort(descending=True)[: len(found.slices)]
    assert found.slices == [int((layer + 0.5) * 48 / len(cam)) for layer in layers]
    expected = torch.nn.functional.interpolate(cam[layers].relu()[None], (64, 96), mode="bilinear")[0]
    np.testing.assert_allclose(found.maps, expected, rtol=1e-3, atol=1e-8)


def test_windowed_volumes_are_explained_as_the_same_scan_in_hu():
    models = [fs.SiglipClassifier(small_backbone(), CHEST, kind, 2).eval() for kind in ("hu", "windowed")]
    models[1].load_state_dict(models[0].state_dict())
    volume = random_hu(1, 1, 5, 16, 16)
    windowed = (models[0].windows(volume) * 32767).round().to(torch.int16)
    (hu,), (stored,) = (fs.find_evidence(m, v, [1]) for m, v in zip(models, (volume, windowed), strict=True))
    assert stored.slices == hu.slices
    np.testing.assert_allclose(stored.gains, hu.gains, rtol=1e-2)
    np.testing.assert_allclose(stored.maps, hu.maps, atol=1e-2 * hu.maps.max())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_class_token_is_explained_by_what_the_last_norm_gives_to_attention(compiled):
    """Grad-CAM's layer for ViTs: of what the norm is given the gradient has no part along the token itself."""
    torch.manual_seed(0)
    arguments = {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
    config = {"family": "timm", "architecture": "vit_base_patch16_224", "patch_size": 8, "image_size": 32,
              "arguments": arguments, "num_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}  # fmt: skip
    model = fs.SiglipClassifier(fs.build_backbone(config), CHEST, "hu", 2).eval()
    for parameter in model.backbone.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    slices, gradients = random_hu(2, 1, 32, 32), torch.randn(2, 64)
    net, last = model.backbone.net, model.backbone.blocks()[-1]
    with torch.no_grad():
        tokens = net._pos_embed(net.patch_embed(model.backbone.normalised(model.images(slices))))
        given = net.blocks[1](net.blocks[0](tokens))
        normal = last.norm1(given)
    after = given + last.attn(normal.requires_grad_())
    feature = net.norm(after + last.mlp(last.norm2(after)))[:, 0]
    (gradient,) = torch.autograd.grad((feature * gradients).sum(), normal)
    expected = (gradient * normal).sum(-1)[:, 1:].unflatten(1, (4, 4)).detach()
    for block in model.backbone.blocks() if compiled else ():
        block.compile(backend="aot_eager_decomp_partition")
    with torch.no_grad():
        model.slice_features(slices[None].transpose(1, 2))  # after which hooks may come too late
        found = fs.slice_relevance(model, slices, gradients)
    assert expected.abs().max() > 0.01  # a hundred thousand times the rounding
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_tokens_of_a_convolutional_trunk_lie_on_the_grid_that_it_leaves():
    """Of timm's hybrids the patch that is projected is one pixel of the trunk's map, not of the image."""
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    config = {"family": "timm", "architecture": "vit_base_r50_s16_224", "patch_size": 1, "image_size": 64,
              "arguments": arguments, "num_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}  # fmt: skip
    model = fs.SiglipClassifier(fs.build_backbone(config), CHEST, "hu", 2).eval()
    assert model.backbone.tokens(torch.rand(1, 3, 64, 64)).shape == (1, 4, 4, 64)
    (found,) = fs.find_evidence(model, random_hu(1, 1, 3, 64, 64), [0])
    assert found.maps.shape[1:] == (64, 64)


def test_maps_cover_the_pixels_that_patches_cover():
    maps = fs.fit_to_image(torch.ones(2, 2, 2), (19, 17), 8)
    assert maps.shape == (2, 19, 17)
    assert (maps[:, :16, :16] == 1).all()
    assert maps.sum() == 2 * 16 * 16


def test_explaining_leaves_the_model_as_it_was_and_builds_no_graph_of_the_backbone():
    model, volume = small_classifier(), random_hu(1, 1, 3, 16, 16)
    before, graphs = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    for block in model.backbone.blocks():
        block.register_forward_hook(lambda block, inputs, output: graphs.append(output.requires_grad))
    first, again = (fs.find_evidence(model, volume, [0, 1]) for _ in range(2))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert len(graphs) > 0
    assert not any(graphs)
    assert all(np.array_equal(a.maps, b.maps) and a.gains == b.gains for a, b in zip(first, again, strict=True))


def test_the_most_probable_scans_called_of_each_label_are_explained():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.3], [0.9, 0.7], [0.2, 0.4], [0.95, 0.2]])
    thresholds = np.array([0.5, 0.4])
    chosen = fs.findings_to_explain(probabilities, thresholds, 2)
    assert chosen == {0: [0], 2: [1], 3: [1], 4: [0]}  # ties to the earlier row
    assert fs.findings_to_explain(probabilities / 10, thresholds, 3) == {}


def test_a_picture_shows_each_different_window_and_any_text_as_it_is(tmp_path):
    windows = np.random.default_rng(0).random((3, 6, 16, 16)).astype(np.float32)
    maps = np.zeros((2, 16, 16), np.float32)
    maps[0, 4, 4] = 2.0
    found = fs.Evidence([4, 1], [1.5, 0.1], None, maps)
    sizes = []
    for shown in (windows, windows[[0, 0, 0]]):
        figure = fs.draw_slices(shown, ["a", "b", "c"], r"$\frac{ <b> \n", found.slices, None, found.maps)
        fs.save_figure(tmp_path / "x.png", figure)
        sizes.append(Image.open(tmp_path / "x.png").size)
    assert sizes[0][1] > sizes[1][1]
    figure = fs.draw_slices(windows, ["a", "b", "c"], "nothing positive", [0], ["logit +0.00"], maps[1:])
    fs.save_figure(tmp_path / "x.png", figure)


HOSTILE = ['../../evil "<script>alert(1)</script>', "007", "plain$\\frac{"]
LABELS = ["A/../b", "B <i>"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Scans whose ids and labels want to be paths, markup and formulas."""
    folder = tmp_path_factory.mktemp("hostile")
    dataset = small_scans(folder, 12)
    splits = ["train"] * 7 + ["val"] * 2 + ["test"] * 3
    ids = [f"s{i}" for i in range(9)] + HOSTILE
    with open(folder / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["series_id", "split", "img_path", *LABELS])
        for row, path in enumerate(dataset.table.paths):
            writer.writerow([ids[row], splits[row], path.name, row % 2, (row + 1) % 2 if row != 10 else ""])
    return folder / "t.csv"


@pytest.fixture(scope="module")
def explained(table, tower, tmp_path_factory):
    """A short training with explanations of two findings per label."""
    out = tmp_path_factory.mktemp("explained")
    argv = ["--csv", table, "--pretrained", tower, "--label-columns", *LABELS, "--output-dir", out, "--epochs", "1"]
    argv += [
        "--num-workers",
        "0",
        "--wandb-mode",
        "disabled",
        "--explain",
        "2",
        "--threshold",
        "0.01",
        "--bootstrap",
        5,
    ]
    assert fs.main([str(word) for word in argv]) == 0
    return out


class Images(html.parser.HTMLParser):
    """The alternative texts of a page's pictures, by the heading of the section that they are in."""

    def __init__(self, text):
        super().__init__()
        self.under, self.reading, self.title = {}, False, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "h2":
            self.reading, self.title = True, ""
        if tag == "img" and "svg" not in dict(attributes)["src"][:20]:
            assert dict(attributes)["src"].startswith("data:image/png;base64,")
            self.under.setdefault(self.title, []).append(dict(attributes)["alt"])

    def handle_endtag(self, tag):
        self.reading &= tag != "h2"

    def handle_data(self, text):
        self.title += text if self.reading else ""


def test_a_run_explains_its_findings_in_files_and_in_the_report(explained):
    drawn = set()
    for split, size in (("val", 2), ("test", 3)):
        content = json.loads((explained / f"explanations_{split}.json").read_text())
        evaluation = json.loads((explained / f"evaluation_{split}.json").read_text())
        assert (content["split"], content["labels"]) == (split, LABELS)
        chosen = fs.findings_to_explain(np.array(evaluation["probabilities"]), np.full(2, 0.01), 2)
        pairs = [(evaluation["ids"][row], LABELS[i]) for row, labels in chosen.items() for i in labels]
        assert [(f["id"], f["label"]) for f in content["findings"]] == pairs
        assert len(pairs) == 2 * min(2, size)
        for f in content["findings"]:
            row, i = evaluation["ids"].index(f["id"]), LABELS.index(f["label"])
            assert f["probability"] == evaluation["probabilities"][row][i]
            assert f["target"] == evaluation["targets"][row][i]
            assert 1 <= len(f["slices"]) == len(f["gains"]) == len(f["attention"]) <= 3
            assert all(0 <= s < content["depth"] for s in f["slices"])
            picture = fs.picture_path(explained, f["id"], f["label"])
            assert Image.open(picture).format == "PNG"
            drawn.add(picture)
    assert {*(explained / "explanations").iterdir()} == drawn
    assert all(re.fullmatch(r"[0-9a-f]{16}\.png", path.name) for path in drawn)
    text = (explained / "report.html").read_text(encoding="utf-8")
    under = Images(text).under
    for split in ("test", "val"):
        alts = under[f"Why the model said so, {split} split"]
        assert len(alts) == 4
        assert all("relevance" in alt and "probability" in alt for alt in alts)
    assert "Not for diagnosis" in text
    assert "<script>alert" not in text
    assert fs.main(["--report", str(explained)]) == 0
    assert (explained / "report.html").read_text(encoding="utf-8") == text


def predict(table, model, out, *more):
    argv = ["--csv", table, "--test-only", model, "--label-columns", *LABELS, "--output-dir", out, "--num-workers", 0]
    return fs.main([str(word) for word in [*argv, *more]])


def test_scans_without_labels_are_explained_and_reported(explained, table, tmp_path):
    rows = table.read_text().splitlines()
    unlabelled = table.parent / "unlabelled.csv"
    with open(table, newline="") as source, open(unlabelled, "w", newline="") as file:
        csv.writer(file).writerows(row[:3] for row in csv.reader(source))
    assert len(rows) == 13
    assert predict(unlabelled, explained / "best_model.pth", tmp_path, "--threshold", 0.01, "--explain", 1) == 0
    findings = json.loads((tmp_path / "explanations_test.json").read_text())["findings"]
    assert {finding["label"] for finding in findings} == set(LABELS)
    assert {finding["target"] for finding in findings} == {None}
    assert list(Images((tmp_path / "report.html").read_text()).under) == ["Why the model said so, test split"]


def test_explanations_of_an_earlier_model_do_not_stay_beside_new_figures(explained, table, tmp_path):
    model = explained / "best_model.pth"
    assert predict(table, model, tmp_path, "--explain", 1, "--threshold", 0.01) == 0
    assert (tmp_path / "explanations_test.json").exists()
    assert predict(table, model, tmp_path, "--overwrite") == 0
    assert not (tmp_path / "explanations_test.json").exists()
    assert "Why the model said so" not in (tmp_path / "report.html").read_text()


def test_a_damaged_list_of_explanations_is_named(tmp_path):
    for broken in ("{}", '{"depth": 3, "labels": ["a"], "findings": [{}]}', "[]"):
        (tmp_path / "explanations_val.json").write_text(broken)
        with pytest.raises(fs.BadInput, match=r"explanations_val\.json"):
            fs.write_report(tmp_path)
