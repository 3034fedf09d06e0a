"""The training engine: memory that is planned, parts that are frozen, rates by depth, draws, air, cached features."""

import dataclasses
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

import finetune_siglip as fs
from finetune_siglip import (
    BadInput,
    MultilabelBCELoss,
    Recipe,
    Runtime,
    add_lora,
    balancing_draw,
    build_optimizer,
    cache_features,
    drop_lora,
    freeze_up_to,
    main,
    merged_weights,
    patches_in_body,
    plan_epoch,
    plan_memory,
    predict,
    rate_scales,
    recomputed,
    report_time,
    saved_bytes,
    train_backbone,
    train_one_epoch,
)
from helpers import CHEST, random_hu, small_backbone, small_classifier, small_scans, small_state

CPU = Runtime(torch.device("cpu"))


def memory_arguments(**changes):
    return Namespace(**{"slice_chunk": None, "grad_checkpointing": "auto", "batch_size": 2, "amp": False, **changes})


# Memory


def test_saved_bytes_are_those_that_the_allocator_still_holds(monkeypatch):
    """Against a plain count of the bytes of distinct tensors in the graph, which grow in step with the slices."""
    model = small_classifier()
    two, four = (saved_bytes(model, random_hu(1, 1, n, 16, 16), CPU) for n in (2, 4))
    block = 4 * 32 * 4  # P x E x 4 bytes of one image
    assert four == pytest.approx(2 * two, rel=0.1)
    assert two > 2 * 2 * 8 * block  # two images, two layers, at least eight such tensors each


@pytest.mark.parametrize(
    ("free", "mode", "expected"),
    [(1e12, "auto", [8, 0]), (1e12, "on", [8, 1]), (1e12, "off", [8, 0]), (3e6, "auto", [8, 1]), (1e6, "on", [2, 1])],
)
def test_memory_is_planned_from_what_is_free(monkeypatch, free, mode, expected):
    model = small_classifier()
    monkeypatch.setattr(fs, "free_memory", lambda device: int(free))
    plan = plan_memory(memory_arguments(grad_checkpointing=mode), model, (1, 64, 16, 16), CPU)
    assert plan == expected
    monkeypatch.setattr(fs, "free_memory", lambda device: int(free * 1.02))  # another start, a little later
    assert plan_memory(memory_arguments(grad_checkpointing=mode), model, (1, 64, 16, 16), CPU) == plan


def test_a_chunk_that_is_named_is_used_and_a_frozen_backbone_recomputes_nothing(monkeypatch):
    model = small_classifier()
    monkeypatch.setattr(fs, "free_memory", lambda device: 10**5)
    assert plan_memory(memory_arguments(slice_chunk=3), model, (1, 64, 16, 16), CPU) == [3, 1]
    freeze_up_to(model.backbone, "all")
    assert plan_memory(memory_arguments(), model, (1, 64, 16, 16), CPU)[1] == 0


def test_free_memory_is_a_plausible_number():
    assert 2**20 < fs.free_memory(CPU.device) < 2**50


class Residual(nn.Module):
    """A 3D stand-in with BatchNorm, whose statistics must see every input once."""

    family, volumetric, orientation, width = "resnet3d", True, "SRA", 4

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv3d(i, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()) for i in (3, 4, 4)
        )

    def blocks(self):
        return list(self.convs)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x.mean((2, 3, 4))


def test_recomputed_blocks_give_the_same_gradients_and_statistics():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = fs.SiglipClassifier(Residual(), CHEST, "hu", 2, dropout=0.0).train()
        if recompute:
            model.recompute_blocks()
        for seed in (0, 1):
            model(random_hu(2, 1, 4, 6, 6, seed=seed)).sum().backward()
        results.append(({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.state_dict()))
    (grads, buffers), (grads_again, buffers_again) = results
    assert buffers.keys() == buffers_again.keys()
    assert all(torch.equal(buffers[n], buffers_again[n]) for n in buffers if "convs" in n)
    assert buffers["backbone.convs.0.1.num_batches_tracked"] == 2
    for name, gradient in grads.items():
        torch.testing.assert_close(grads_again[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_dropout_draws_the_same_when_it_is_computed_again():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)), torch.randn(4, 8)
    gradients = []
    for run in (net, recomputed(net, net)):
        torch.manual_seed(1)
        net.zero_grad()
        run(x).square().sum().backward()
        gradients.append(net[0].weight.grad.clone())
    assert torch.equal(*gradients)


# Frozen parts


def test_a_frozen_backbone_has_no_graph_no_gradient_and_no_moments(tmp_path):
    model = small_classifier()
    freeze_up_to(model.backbone, "all")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = small_state(model, weight_decay=0.5, ema=True)
    assert saved_bytes(model, random_hu(1, 1, 4, 16, 16), CPU) == 0
    train_one_epoch(state, small_scans(tmp_path, 4), MultilabelBCELoss(), Recipe(2), CPU)
    trained = {id(p) for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert {id(p) for p in state.optimizer.state} == trained
    assert not any(name.startswith("backbone.") for name in state.ema.average)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("backbone."), name


def test_a_frozen_prefix_keeps_nothing_for_the_backward_pass():
    sizes = []
    for n in (0, 12, 20):
        model = small_classifier()
        freeze_up_to(model.backbone, n)
        sizes.append(saved_bytes(model, random_hu(1, 1, 4, 16, 16), CPU))
    assert sizes[0] > 1.3 * sizes[1] > 1.3 * sizes[2]


# Rates by depth


def test_rates_fall_by_the_decay_for_each_block_above():
    model = small_classifier()
    args = Namespace(optimizer="adamw", lr=0.1, weight_decay=0.5, layer_decay=0.5, backbone_lr_scale=0.2)
    optimizer = build_optimizer(args, model)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    expected = {"embeddings": 0.1 * 0.2 / 8, "layers.0.": 0.02 / 4, "layers.1.": 0.02 / 2, "post_layernorm": 0.02,
                "net.head": 0.02}  # fmt: skip
    for name, p in model.named_parameters():
        if name.startswith("backbone."):
            wanted = next(rate for part, rate in expected.items() if part in name)
            assert rates[p] == pytest.approx(wanted), name
        else:
            assert rates[p] == 0.1, name
    assert optimizer.param_groups[0]["lr"] == 0.1  # the head's, which is what the log shows


def test_without_decay_every_rate_is_the_same():
    assert set(rate_scales(small_classifier(), 1.0, 1.0).values()) == {1.0}


# Head first


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_held_backbone_waits_and_then_starts_with_fresh_moments(tmp_path, name):
    dataset, model = small_scans(tmp_path, 4), small_classifier(dropout=0.0)
    freeze_up_to(model.backbone, 3)
    state = small_state(model, optimizer=name, ema=True)
    backbone = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    train_backbone(state, False, CPU)
    train_one_epoch(state, dataset, MultilabelBCELoss(), Recipe(2), CPU)
    assert all(torch.equal(p, backbone[n]) for n, p in model.backbone.named_parameters())
    assert all(torch.equal(state.ema.average[f"backbone.{n}"], p) for n, p in backbone.items()
               if f"backbone.{n}" in state.ema.average)  # fmt: skip
    state.next_epoch()
    train_backbone(state, True, CPU)
    train_one_epoch(state, dataset, MultilabelBCELoss(), Recipe(2), CPU)
    frozen = [n for n, p in model.backbone.named_parameters() if not p.requires_grad]
    assert len(frozen) == 5  # two embeddings, with three tensors, and the first norm
    for n, p in model.backbone.named_parameters():
        assert torch.equal(p, backbone[n]) == (n in frozen), n
        assert torch.equal(state.ema.average.get(f"backbone.{n}", p), backbone[n]) == (n in frozen), n
    if name == "adamw":
        steps = {
            int(s["step"]) for p, s in state.optimizer.state.items() if any(p is q for q in model.head.parameters())
        }
        late = {int(state.optimizer.state[p]["step"]) for p in model.backbone.parameters() if p.requires_grad}
        assert (steps, late) == ({4}, {2})


# Balanced draws


def test_balanced_draws_even_out_rare_findings_and_scans_without_any():
    rng = np.random.default_rng(0)
    targets = np.zeros((1000, 2), np.float32)
    targets[:20, 0], targets[20:320, 1] = 1, 1
    targets[500:510] = np.nan  # nothing known is nothing found
    drawn = balancing_draw(targets, rng)
    assert len(drawn) == 1000
    shares = [(drawn < 20).mean(), ((drawn >= 20) & (drawn < 320)).mean(), (drawn >= 320).mean()]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)
    counts = np.bincount(drawn[drawn < 20], minlength=20)
    assert counts.min() >= 16  # 16.7 expected: each row as often as any of its kind
    assert counts.max() <= 17


def test_balanced_epochs_are_a_function_of_seed_and_epoch_under_any_number_of_processes():
    targets = (np.random.default_rng(1).random((30, 3)) < 0.1).astype(np.float32)

    def rows(epoch, world_size):
        recipe = Recipe(6 // world_size, 2, balance=True)
        plans = [
            plan_epoch(targets, recipe, Runtime(CPU.device, None, r, world_size), epoch) for r in range(world_size)
        ]
        return [sorted(i for w in step for b in w.batches for i in b if i >= 0) for step in zip(*plans, strict=True)]

    assert rows(0, 1) == rows(0, 2) == rows(0, 3)
    assert rows(0, 1) != rows(1, 1)


# LoRA


def test_lora_trains_adapters_only_and_saves_what_a_plain_model_loads():
    model, volume = small_classifier(dropout=0.0), random_hu(2, 1, 3, 16, 16)
    names = list(model.state_dict())
    freeze_up_to(model.backbone, 3)
    add_lora(model.backbone, 2)
    trained = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 4  # A and B of q, k, v and out in two blocks
    assert all(".lora_" in name for name in trained)
    before = model.eval()(volume).detach()
    torch.testing.assert_close(before, small_classifier(dropout=0.0).eval()(volume), rtol=0, atol=1e-6)
    state = small_state(model, lr=0.05, ema=True)
    model.train()
    for _ in range(3):
        model(volume).sum().backward()
        fs.settle_step(state, fs.optimizer_step(state, 0.0)(), lambda: "", False)
    adapted = model.eval()(volume).detach()
    assert (adapted - before).abs().max() > 1e-3
    merged = merged_weights(model)
    assert list(merged) == names
    plain = small_classifier(dropout=0.0)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.eval()(volume), adapted, rtol=0, atol=1e-5)
    drop_lora(model)
    model.load_state_dict(merged)
    torch.testing.assert_close(model(volume), adapted, rtol=0, atol=1e-5)


# Air


def chest_slice(size=224):
    """HU of a drawn slice: body wall, two lungs, a table below, noise in the air; and the masks of body and lungs."""
    y, x = np.mgrid[:size, :size] / size * 2 - 1
    body = (x / 0.75) ** 2 + ((y + 0.05) / 0.55) ** 2 < 1
    lungs = (((abs(x) - 0.36) / 0.3) ** 2 + ((y + 0.05) / 0.42) ** 2 < 1) & body
    hu = np.where(body, 40.0, -1000.0)
    hu[lungs] = -870
    hu[(abs(y - 0.75) < 0.02) & (abs(x) < 0.8)] = 300  # the table's shell
    hu += np.random.default_rng(0).normal(0, 20, hu.shape)
    return torch.from_numpy(hu.astype(np.int16)), body


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_patches_outside_the_body_are_left_out_and_none_inside(patch):
    hu, body = chest_slice()
    keep = patches_in_body(torch.stack([hu, torch.full_like(hu, -1000)]), patch)
    assert keep.shape == (2, (224 // patch) ** 2)
    touched = torch.from_numpy(body).float().unfold(0, patch, patch).unfold(1, patch, patch).amax((2, 3)).flatten() > 0
    assert (keep[0] | ~touched).all()
    assert 0.2 < (~keep[0]).float().mean() < 0.7
    assert not keep[1].any()


def test_lungs_that_the_field_of_view_cuts_and_emphysema_stay():
    hu, body = chest_slice()
    lung = (hu < -700) & torch.from_numpy(body)
    hu[lung] = -930  # emphysema throughout
    for view in (np.s_[:, 40:], np.s_[:, 30:160], np.s_[30:, 30:]):  # the left wall, both walls, a corner are cut off
        cut, inside = (nn.functional.interpolate(x[view][None, None].float(), (224, 224))[0] for x in (hu, lung))
        touched = nn.functional.max_pool2d(inside, 16).flatten() > 0
        assert touched.sum() > 20
        assert (patches_in_body(cut, 16)[0] | ~touched).all()


def test_a_model_that_skips_air_scores_what_one_scores_that_sees_only_the_body():
    model = small_classifier(skip_air=True).eval()
    volume = torch.full((1, 1, 2, 16, 16), -1000, dtype=torch.int16)
    volume[..., 8:, :] = random_hu(1, 1, 2, 8, 16)
    with torch.no_grad():
        features = model.slice_features(volume)
        seen = patches_in_body(volume[0, 0], 8)
        images = model.windows(volume[0].transpose(0, 1))
        torch.testing.assert_close(features[0], model.backbone(images, seen), rtol=0, atol=1e-6)
    with pytest.raises(BadInput, match="--skip-air"):
        fs.SiglipClassifier(small_backbone(), CHEST, "windowed", 2, skip_air=True)


# Features


@pytest.fixture
def frozen(tmp_path):
    model = small_classifier(dropout=0.0)
    freeze_up_to(model.backbone, "all")
    (tmp_path / "scans").mkdir()
    return model, small_scans(tmp_path / "scans", 6), tmp_path / "features"


def test_cached_features_train_and_score_like_computed_ones(frozen):
    model, dataset, folder = frozen
    cached = cache_features(folder, model, dataset, Recipe(2), CPU)
    assert cached[0]["volume"].shape == (3, 32)
    assert cached[0]["volume"].dtype == torch.float16
    assert torch.isnan(cached[~1]["targets"]).all()
    figures, logits = [], []
    for source in (dataset, cached):
        state = small_state(small_classifier(dropout=0.0))
        freeze_up_to(state.model.backbone, "all")
        figures.append(train_one_epoch(state, source, MultilabelBCELoss(), Recipe(2), CPU))
        logits.append(predict(state.model, source, Recipe(2), CPU))
    assert figures[0]["train_loss"] == pytest.approx(figures[1]["train_loss"], abs=1e-3)
    np.testing.assert_allclose(*logits, rtol=0, atol=5e-3)


def test_features_are_computed_once_and_again_only_where_something_changed(frozen, monkeypatch):
    model, dataset, folder = frozen
    computed = []
    slices = fs.SiglipClassifier.slice_features
    monkeypatch.setattr(fs.SiglipClassifier, "slice_features", lambda m, v: (computed.append(1), slices(m, v))[1])

    def fill(model=model, dataset=dataset, runtime=CPU):
        computed.clear()
        cache_features(folder, model, dataset, Recipe(2), runtime)
        return len(computed)

    assert fill() == 6
    assert fill() == 0
    torn = sorted(folder.iterdir())[0]
    torn.write_bytes(torn.read_bytes()[:-10])
    assert fill() == 1
    np.savez(dataset.table.paths[2], image=random_hu(1, 3, 16, 16, seed=99).numpy())
    assert fill() == 1
    other = fs.CTVolumeDataset(dataset.table, dataclasses.replace(dataset.prep, grid=(2, 16, 16)))
    assert fill(dataset=other) == 6
    assert fill(runtime=dataclasses.replace(CPU, amp_dtype=torch.bfloat16)) == 6
    with torch.no_grad():
        model.backbone.net.post_layernorm.bias += 1e-3
    assert fill() == 6


def test_a_backbone_that_learns_has_no_cache(frozen):
    model, dataset, folder = frozen
    freeze_up_to(model.backbone, 2)
    with pytest.raises(BadInput, match="--freeze-up-to all"):
        cache_features(folder, model, dataset, Recipe(2), CPU)


# The report of time


def test_the_report_of_time_advises_only_where_data_is_the_brake():
    (line,) = report_time({"data": 1.0, "train": 9.0, "validate": 2.0, "save": 0.5}, 20, CPU)
    assert "data 1.0 s, train 9.0 s, validate 2.0 s, save 0.5 s; 2.00 scans/s" in line
    assert "GiB" in line
    _, advice = report_time({"data": 3.0, "train": 1.0}, 20, CPU)
    assert "75%" in advice
    assert "--num-workers" in advice


# Through the command line


def run(scans, tower, out, *more, labels=("Cardiomegaly", "Pleural effusion")):
    argv = [
        "--csv", scans, "--pretrained", tower, "--label-columns", *labels, "--output-dir", out, "--num-slices", 4,
        "--batch-size", 4, "--num-workers", 0, "--wandb-mode", "disabled", "--lr", 1e-3, "--bootstrap", 0, *more,
    ]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_adapters_late_unfreezing_and_skipped_air_end_in_a_plain_checkpoint(scans, tower, tmp_path):
    more = ("--epochs", 2, "--lora-rank", 2, "--unfreeze-epoch", 1, "--skip-air", "--balance-sampler", "--use-ema",
            "--layer-decay", 0.5, "--backbone-lr-scale", 2, "--grad-checkpointing", "on")  # fmt: skip
    lines = run(scans, tower, tmp_path / "run", *more)
    content = fs.load_checked(tmp_path / "run" / "best_model.pth", fs.MODEL_KIND)
    assert not any("lora" in name for name in content["model"])
    model = fs.classifier_from(content)
    assert model.skip_air
    best = lines[content["epoch"] - 1]
    argv = [
        "--csv", scans, "--test-only", tmp_path / "run" / "best_model.pth", "--label-columns", "Cardiomegaly",
        "Pleural effusion", "--output-dir", tmp_path / "test", "--num-workers", 0, "--test-split", "val",
    ]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    evaluation = json.loads((tmp_path / "test" / "evaluation_val.json").read_text())
    assert "macro_f1" in json.dumps(evaluation)
    assert best["epoch"] == content["epoch"]
    log = (tmp_path / "run" / "training.log").read_text()
    assert "is held while the head learns" in log
    assert "learns from here on" in log


def test_a_run_on_cached_features_has_the_metrics_of_one_without(scans, tower, tmp_path):
    more = ("--epochs", 2, "--freeze-up-to", "all", "--dropout-rate", 0)
    plain = run(scans, tower, tmp_path / "plain", *more)
    cached = run(scans, tower, tmp_path / "cached", *more, "--cache-features", tmp_path / "features")
    for one, other in zip(plain, cached, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-3)
        assert other["val_loss"] == pytest.approx(one["val_loss"], abs=1e-3)
        assert other["macro_f1"] == one["macro_f1"]
        assert other["macro_auc"] == one["macro_auc"]
    log = (tmp_path / "cached" / "training.log").read_text()
    assert "no augmentation" in log
    assert "time: data" in log


def test_a_resumed_run_keeps_the_chunk_it_began_with(scans, tower, tmp_path, monkeypatch):
    used, apply = [], fs.apply_memory_plan
    monkeypatch.setattr(fs, "apply_memory_plan", lambda m, *plan: (used.append(plan), apply(m, *plan)))
    for free, more in ((10**12, ()), (10**5, ("--resume", "auto"))):
        monkeypatch.setattr(fs, "free_memory", lambda device, free=free: free)
        run(scans, tower, tmp_path / "run", "--epochs", 1 + len(more), *more)
    assert used == [(8, 0), (8, 0)]


@pytest.mark.parametrize(
    "flags",
    [("--cache-features", "d"), ("--cache-features", "d", "--freeze-up-to", "all", "--lora-rank", "2"),
     ("--cache-features", "d", "--freeze-up-to", "all", "--unfreeze-epoch", "1"), ("--layer-decay", "0"),
     ("--slice-chunk", "0"), ("--grad-checkpointing", "maybe")],
)  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        fs.parse_args(["--csv", "t.csv", "--pretrained", "m", "--label-columns", "A", *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err
