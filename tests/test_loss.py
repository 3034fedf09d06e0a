"""Room 7: the losses against scikit-learn, PyTorch, timm and a plain loop."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch.nn import functional as F

from finetune_siglip import AsymmetricLoss, BalancedBCELoss, FocalLoss, MultilabelBCELoss, balancing_weights, build_loss

NAN = float("nan")


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (40, 5))).float()
    targets = torch.from_numpy((rng.random((40, 5)) < 0.3).astype(np.float32))
    return logits, targets


def with_unknown(targets):
    targets = targets.clone()
    targets[::3, 1] = NAN
    targets[5] = NAN
    return targets


def test_bce_is_the_log_loss_of_scikit_learn(batch):
    logits, targets = batch
    expected = log_loss(targets.numpy().ravel(), logits.double().sigmoid().numpy().ravel())
    assert MultilabelBCELoss()(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_focal_with_gamma_0_and_alpha_1_is_bce(batch):
    torch.testing.assert_close(FocalLoss(alpha=1.0, gamma=0.0)(*batch), F.binary_cross_entropy_with_logits(*batch))


@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 2.0), (0.25, 2.0), (3.0, 0.5), (1.0, 5.0)])
def test_focal_is_its_formula(batch, alpha, gamma):
    total = 0.0
    for z, t in zip(*(x.double().flatten().tolist() for x in batch), strict=True):
        p = 1 / (1 + math.exp(-z))
        p_t = p if t else 1 - p
        total += -alpha * (1 - p_t) ** gamma * math.log(p_t)
    assert FocalLoss(alpha, gamma)(*batch).item() == pytest.approx(total / 200, rel=1e-5)


def test_alpha_multiplies_negatives_as_well():
    """An alpha of 1 that weighted positives by 1 and negatives by 0 would train on positives alone."""
    loss = FocalLoss(alpha=1.0, gamma=2.0)(torch.zeros(1, 1), torch.zeros(1, 1))
    assert loss.item() == pytest.approx(0.25 * math.log(2))


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_focal_gradients_stay_finite_at_certainty(gamma):
    logits = torch.tensor([[200.0, -200.0, 200.0, 0.0]], requires_grad=True)
    FocalLoss(1.0, gamma)(logits, torch.tensor([[1.0, 0.0, 0.0, 1.0]])).backward()
    assert logits.grad.isfinite().all()


def test_asymmetric_is_the_loss_of_timm(batch):
    from timm.loss import AsymmetricLossMultiLabel

    reference = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05)
    for logits in (batch[0], batch[0] - 4):  # the second: mostly below the clip, where negatives count for nothing
        values, wanted = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        ours, theirs = AsymmetricLoss()(values, batch[1], reduction="sum"), reference(wanted, batch[1])
        ours.backward()
        theirs.backward()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(values.grad, wanted.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [200.0, -200.0])
def test_asymmetric_gradients_stay_finite_at_certainty(value):
    logits = torch.full((1, 2), value, requires_grad=True)
    AsymmetricLoss()(logits, torch.tensor([[1.0, 0.0]])).backward()
    assert logits.grad.isfinite().all()


def test_label_smoothing_is_bce_of_smoothed_targets(batch):
    weights = torch.tensor([1.0, 2.0, 5.0, 0.5, 100.0])
    for loss, pos_weight in ((MultilabelBCELoss(), None), (BalancedBCELoss(weights), weights)):
        loss.smoothing = 0.1
        targets = with_unknown(batch[1])
        known = ~targets.isnan()
        soft = F.binary_cross_entropy_with_logits(
            batch[0], batch[1] * 0.9 + 0.05, pos_weight=pos_weight, reduction="none"
        )
        torch.testing.assert_close(loss(batch[0], targets), soft[known].mean())


def test_balanced_weights_are_negatives_per_positive_clamped_and_1_without_positives():
    targets = np.array([[1, 0, 0, 1], [0, 0, NAN, 1], [0, 0, 1, 1], [0, 0, NAN, 1]], np.float32)
    assert balancing_weights(targets).tolist() == [3.0, 1.0, 1.0, 0.0]
    rare = np.zeros((1000, 1), np.float32)
    rare[0] = 1
    assert balancing_weights(rare).tolist() == [100.0]


def test_balanced_is_bce_with_pos_weight(batch):
    weights = torch.tensor([1.0, 2.0, 5.0, 0.5, 100.0])
    expected = F.binary_cross_entropy_with_logits(*batch, pos_weight=weights)
    torch.testing.assert_close(BalancedBCELoss(weights)(*batch), expected)


@pytest.mark.parametrize(
    "loss", [MultilabelBCELoss(), FocalLoss(), BalancedBCELoss(torch.tensor([1.0, 2, 3, 4, 5])), AsymmetricLoss()]
)
def test_unknown_labels_have_no_weight_and_no_gradient(batch, loss):
    logits, targets = batch[0].clone().requires_grad_(), with_unknown(batch[1])
    known = ~targets.isnan()
    loss(logits, targets).backward()
    assert (logits.grad[~known] == 0).all()
    clipped = isinstance(loss, AsymmetricLoss) & (targets == 0) & (batch[0].sigmoid() < 0.05)
    assert ((logits.grad[known] == 0) == clipped[known]).all()
    elementwise = loss.elementwise(batch[0], batch[1])
    torch.testing.assert_close(loss(logits, targets), elementwise[known].mean())
    torch.testing.assert_close(loss(logits, targets, reduction="sum"), elementwise[known].sum())


def test_a_batch_without_known_labels_costs_nothing():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = MultilabelBCELoss()(logits, torch.full((2, 3), NAN))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_shapes_that_differ_are_shown():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        MultilabelBCELoss()(torch.zeros(2, 3), torch.zeros(2, 4))


def test_build_loss_takes_balancing_from_training_targets():
    targets = np.array([[1, 0], [0, 0], [0, 1]], np.float32)
    loss = build_loss(Namespace(loss="balanced", label_smoothing=0.1), targets)
    assert loss.pos_weight.tolist() == [2.0, 2.0]
    assert loss.smoothing == 0.1
    focal = build_loss(Namespace(loss="focal", focal_alpha=0.5, focal_gamma=3.0, label_smoothing=0.0), targets)
    assert (focal.alpha, focal.gamma) == (0.5, 3.0)
    for name, kind in (("bce", MultilabelBCELoss), ("asl", AsymmetricLoss)):
        assert type(build_loss(Namespace(loss=name, label_smoothing=0.0), targets)) is kind
