"""Room 8: optimiser groups, schedules against transformers' formula, averaged weights against their recurrence."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from finetune_siglip import Ema, Schedule, announce_steps, build_optimizer, build_scheduler, parse_args, unwrap


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.linear = nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def arguments(**changes):
    return Namespace(**{"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.5, **changes})


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_biases_norms_and_embeddings_are_not_decayed_and_frozen_weights_not_held(name):
    model = Small()
    decay_of = {
        id(p): g["weight_decay"]
        for g in build_optimizer(arguments(optimizer=name), model).param_groups
        for p in g["params"]
    }
    names = {n: decay_of.get(id(p)) for n, p in model.named_parameters()}
    assert names == {
        "embed.weight": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "linear.weight": 0.5, "linear.bias": 0.0,
        "frozen.weight": None, "frozen.bias": None,
    }  # fmt: skip


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (4, 20), (7, 7), (10, 5)])
def test_cosine_with_warmup_is_the_schedule_of_transformers(warmup, total):
    from transformers import get_cosine_schedule_with_warmup

    parameter = nn.Parameter(torch.zeros(1))
    reference_optimizer, ours = torch.optim.SGD([parameter], lr=0.3), torch.optim.SGD([parameter], lr=0.3)
    reference = get_cosine_schedule_with_warmup(reference_optimizer, warmup, total)
    schedule = Schedule("cosine", warmup, total)
    for _ in range(total):
        schedule.apply(ours)
        assert ours.param_groups[0]["lr"] == pytest.approx(reference_optimizer.param_groups[0]["lr"], abs=1e-12)
        reference_optimizer.step()
        reference.step()
        schedule.steps += 1
    if warmup < total:
        assert schedule.factor() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("asked", "steps"), [("0", 0), ("7", 7), ("5%", 10), ("0.1%", 1), ("100%", 200), ("0%", 0)])
def test_warmup_is_a_number_of_steps_or_a_share_of_all_of_them(asked, steps):
    args = parse_args(["--csv", "t", "--pretrained", "m", "--label-columns", "A", "--epochs", "20", "--warmup", asked])
    schedule = build_scheduler(args, steps_per_epoch=10)
    assert (schedule.warmup, schedule.total_steps) == (steps, 200)
    schedule.steps = steps
    assert schedule.factor() == 1.0


@pytest.mark.parametrize(
    ("warmup", "patience", "warned"), [(10, 10, 0), (40, 10, 0), (41, 10, 1), (40, 3, 1), (40, 0, 0), (60, 3, 1)]
)
def test_a_warmup_that_takes_too_much_of_the_run_is_one_warning(caplog, warmup, patience, warned):
    caplog.set_level("INFO")
    announce_steps(Schedule("plateau", warmup, 200), 10, patience)
    told, *warnings = [record.getMessage() for record in caplog.records]
    assert told == f"200 optimiser steps at most, 10 an epoch; warm-up ends after {warmup} (epoch {warmup / 10})"
    assert ["--early-stopping-patience" in text for text in warnings] == [True] * warned


def test_warmup_is_linear_from_0_with_plateau_as_well():
    schedule = Schedule("plateau", 5, 100)
    factors = []
    for _ in range(8):
        factors.append(schedule.factor())
        schedule.steps += 1
    assert factors == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_plateau_is_torch_s_reduce_on_plateau():
    scores = [0.1, 0.2, 0.2, 0.19, 0.2, 0.1, 0.1, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=Schedule.FACTOR, patience=Schedule.PATIENCE, threshold=0
    )
    schedule = Schedule("plateau", 0, 100)
    for score in scores:
        reference.step(score)
        schedule.end_epoch((score,))
        assert schedule.factor() == optimizer.param_groups[0]["lr"]
    assert schedule.factor() < 0.5


def test_ema_follows_its_recurrence_with_a_warm_up_of_the_decay():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.6)
    expected = model.weight.detach().double().clone()
    for t in range(1, 12):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update()
        decay = min(0.6, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
        torch.testing.assert_close(ema.average["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ema.average["weight"], model.weight)


def test_ema_is_in_place_only_inside_the_block_and_raw_weights_return_to_the_bit():
    model = nn.Linear(3, 2)
    raw = {n: p.detach().clone() for n, p in model.named_parameters()}
    ema = Ema(model, decay=0.9)
    with torch.no_grad():
        ema.average["weight"].fill_(7.0)
    with ema.applied():
        assert (model.weight == 7).all()
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(torch.equal(p, raw[n]) for n, p in model.named_parameters())
    assert (ema.average["weight"] == 7).all()


def test_ema_leaves_frozen_weights_out():
    assert set(Ema(Small(), 0.9).average) == {
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "linear.weight",
        "linear.bias",
    }


def test_unwrap_finds_the_module_under_any_wrapping():
    model = nn.Linear(1, 1)
    outer = nn.Module()
    outer.module = nn.Module()
    outer.module._orig_mod = model
    assert unwrap(outer) is model
    assert unwrap(model) is model
