"""Room 6: windows, pooling, and the way from a volume to logits."""

import numpy as np
import pytest
import torch

from finetune_siglip import WINDOW_PRESETS, Backbone, CTWindows, SiglipClassifier, SlicePool, freeze_up_to
from helpers import CHEST, random_hu, small_backbone, small_classifier, small_resnet3d_classifier


@pytest.mark.parametrize("name", sorted(WINDOW_PRESETS))
def test_windows_are_a_plain_loop_over_voxels(name):
    volume = random_hu(2, 1, 3, 4, 5)
    got = CTWindows(WINDOW_PRESETS[name])(volume)
    assert got.shape == (2, 3, 3, 4, 5)
    assert got.dtype == torch.float32
    for n, d, h, w in np.ndindex(2, 3, 4, 5):
        hu = int(volume[n, 0, d, h, w])
        for k, (low, high) in enumerate(WINDOW_PRESETS[name]):
            expected = min(max((hu - low) / (high - low), 0.0), 1.0)
            assert got[n, k, d, h, w].item() == pytest.approx(expected, abs=1e-6)


def test_windowed_volumes_are_only_scaled_back():
    stored = torch.tensor([0, 16384, 32767], dtype=torch.int16).view(1, 3, 1, 1)
    got = CTWindows(CHEST, "windowed")(stored)
    assert got.flatten().tolist() == pytest.approx([0.0, 16384 / 32767, 1.0])


def test_gated_attention_is_its_formula():
    torch.manual_seed(0)
    pool, features = SlicePool(6, hidden=4), torch.randn(2, 5, 6)
    pooled, weights = pool(features)
    for n in range(2):
        scores = []
        for h in features[n]:
            v = torch.tanh(pool.content.weight @ h + pool.content.bias)
            u = torch.sigmoid(pool.gate.weight @ h + pool.gate.bias)
            scores.append((pool.score.weight @ (v * u) + pool.score.bias).item())
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(weights[n, :, 0].detach().numpy(), expected, rtol=1e-5)
        np.testing.assert_allclose(pooled[n].detach().numpy(), expected @ features[n].numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("mode", "reference"), [("mean", np.mean), ("max", np.max)])
def test_plain_pooling(mode, reference):
    features = torch.randn(2, 5, 6)
    np.testing.assert_allclose(SlicePool(6, mode)(features)[0].numpy(), reference(features.numpy(), axis=1), rtol=1e-6)


@pytest.mark.parametrize("make", [small_classifier, small_resnet3d_classifier])
def test_a_head_per_finding_takes_features_and_largest_tokens_of_each_slice_or_layer(make):
    model, size = make(labels=2, pooling="label").eval(), 16 if make is small_classifier else 32
    volume = random_hu(2, 1, 32, size, size)
    with torch.no_grad():
        features = model.slice_features(volume)
        assert features.shape == (2, *model.feature_shape(1, (32, size, size)))
        images = model.images(volume)
        if make is small_classifier:
            tokens = model.backbone.tokens(images.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 32))
            pooled = model.backbone(images.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 32))
        else:
            tokens = model.backbone.tokens(images)  # (N, layers, h, w, E)
            pooled = tokens.mean((2, 3))
            torch.testing.assert_close(pooled.mean(1), model.backbone(images))
        assert features.shape[1] == tokens.shape[1] > 1
        torch.testing.assert_close(features, torch.cat([pooled, tokens.amax((2, 3))], dim=2))
        logits, shares = model.weigh(features)
        torch.testing.assert_close(shares.sum(1), torch.ones(2, 2))
        torch.testing.assert_close(logits, (shares * model.head(features)).sum(1))


def test_slice_features_are_those_of_transformers():
    model, volume = small_classifier().eval(), random_hu(2, 1, 3, 16, 16)
    with torch.no_grad():
        features = model.slice_features(volume)
        for n, s in np.ndindex(2, 3):
            pixels = CTWindows(CHEST)(volume[n : n + 1, :, s]) * 2 - 1  # SigLIP's mean and deviation are 0.5
            expected = model.backbone.net(pixel_values=pixels).pooler_output[0]
            torch.testing.assert_close(features[n, s], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 7])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_and_recomputing_change_no_result(chunk, recompute):
    volume, targets = random_hu(2, 1, 5, 16, 16), torch.ones(2, 3)
    gradients, outputs = [], []
    for plain in (True, False):
        model = small_classifier().train()
        model.head[1].p = model.head[4].p = 0.0
        if not plain:
            model.slice_chunk, model.recompute = chunk, recompute
        outputs.append(model(volume))
        torch.nn.functional.binary_cross_entropy_with_logits(outputs[-1], targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-5, msg=name)


def test_the_output_bias_starts_at_the_logit_of_the_prevalence():
    model = small_classifier(labels=4)
    model.set_prevalence(torch.tensor([0.5, 0.1, 0.0, 1.0]))
    expected = torch.logit(torch.tensor([0.5, 0.1, 0.001, 0.999]))
    torch.testing.assert_close(model.head[-1].bias.detach(), expected)
    with torch.no_grad():
        probabilities = model.eval()(random_hu(4, 1, 3, 16, 16)).sigmoid().mean(0)
    assert (probabilities - torch.tensor([0.5, 0.1, 0.0, 1.0])).abs().max() < 0.1


def test_frozen_weights_stay_to_the_bit_and_build_no_graph():
    model = small_classifier()
    freeze_up_to(model.backbone, "all")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    features = model.train().slice_features(random_hu(1, 1, 2, 16, 16))
    assert not features.requires_grad
    assert not any(m.training for m in model.backbone.net.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.weigh(features)[0].sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("backbone."), name


class Corner(torch.nn.Module):
    """A 3D stand-in that returns the first voxel along each axis, so that the axes it is given can be told."""

    volumetric, orientation, width = True, "SRA", 3
    turn = Backbone.turn

    def forward(self, volume, maxima):  # (N, 3, S, R, A)
        assert not maxima
        return torch.stack([volume[:, 0, 0, 0, 0], volume[:, 0, 0, -1, 0], volume[:, 0, 0, 0, -1]], dim=1)


def test_a_3d_backbone_sees_superior_right_anterior_axes():
    volume = torch.zeros(1, 1, 4, 5, 6, dtype=torch.int16)  # SPL: rows rise to the back, columns to the left
    volume[0, 0, 0, -1, -1] = 100  # lowest slice, back, left: the first voxel of S R A
    volume[0, 0, 0, -1, 0] = 200  # back, right: R at its end
    volume[0, 0, 0, 0, -1] = 300  # front, left: A at its end
    model = SiglipClassifier(Corner(), ((0.0, 1000.0),) * 3, "hu", 2)
    features = model.slice_features(volume)
    assert features.shape == (1, 1, 3)
    assert features.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model(volume).shape == (1, 2)


def test_small_backbone_is_the_same_for_the_same_seed():
    first, second = small_backbone(1).state_dict(), small_backbone(1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
