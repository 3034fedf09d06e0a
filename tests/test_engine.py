"""The training engine: memory that is planned, parts that are frozen, rates by depth, draws, air, cached features."""

import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import finetune_siglip as fs
from finetune_siglip import (
    BadInput,
    MultilabelBCELoss,
    Recipe,
    Runtime,
    add_lora,
    build_optimizer,
    cache_features,
    drop_lora,
    freeze_up_to,
    main,
    merged_weights,
    patches_in_body,
    plan_memory,
    predict,
    rate_scales,
    recomputed,
    saved_bytes,
    train_one_epoch,
)
from helpers import (
    CHEST,
    ROOT,
    random_hu,
    small_backbone,
    small_classifier,
    small_resnet3d_classifier,
    small_scans,
    small_state,
)

CPU = Runtime(torch.device("cpu"))


def memory_arguments(**changes):
    return Namespace(**{"slice_chunk": None, "grad_checkpointing": "auto", "batch_size": 2, "amp": False, **changes})


# Memory


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_saved_bytes_are_what_each_further_slice_keeps_whatever_the_precision(amp, lora):
    """Copies of weights are no slice's, so that few and many slices tell the same of each."""
    model, runtime = small_classifier(), Runtime(CPU.device, amp)
    if lora:
        add_lora(model.backbone, 2)

    def kept(n):
        """Bytes of all that autograd packs in a pass over n slices, weights aside, counted here anew."""
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        packed = []  # which keeps them, so that no address comes twice
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda kept: kept), runtime.autocast():
            features = model.train().slice_features(random_hu(1, 1, n, 16, 16))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
        assert features.requires_grad
        return sum(size for address, size in storages.items() if address not in parameters)

    truth = (kept(16) - kept(6)) / 10
    for n in (2, 6):
        assert saved_bytes(model, random_hu(1, 1, n, 16, 16), runtime) / n == pytest.approx(truth, rel=0.1)
    block = 4 * 32 * (4 if amp is None else 2)  # P x E x bytes of one image
    assert truth > 2 * 8 * block  # two layers, at least eight such tensors each


def test_saved_bytes_are_what_a_process_grows_by():
    """Against the kernel's count of resident memory, with an allocator that maps each large tensor by itself."""
    script = """
import ctypes, torch, finetune_siglip as fs
from helpers import SMALL_TOWER, CHEST, random_hu
ctypes.CDLL(None).mallopt(-3, 2**16)
config = SMALL_TOWER | {"hidden_size": 256, "intermediate_size": 1024, "patch_size": 16, "image_size": 224}
model = fs.SiglipClassifier(fs.build_backbone(config), CHEST, "hu", 3)
model.slice_chunk = 64
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
for amp in (None, torch.bfloat16):
    runtime = fs.Runtime(torch.device("cpu"), amp)
    with runtime.autocast():
        del (warm := {0: model.slice_features(random_hu(1, 1, 16, 224, 224))})[0]
        volume, before = random_hu(1, 1, 16, 224, 224), resident()
        features = model.slice_features(volume)
        grown = resident() - before
        del features
    print(grown / fs.saved_bytes(model, volume, runtime))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [float(line) for line in done.stdout.split()] == pytest.approx([1, 1], rel=0.1)


def test_of_a_slice_that_is_computed_again_only_its_voxels_and_its_features_are_kept():
    model = small_classifier()
    model.recompute = True
    few, many = (saved_bytes(model, random_hu(1, 1, n, 16, 16), CPU) for n in (16, 160))
    assert many - few <= 144 * (16 * 16 * 2 + 2 * 32 * 4)


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


def two_passes(model):
    """Gradients of two forward passes and what the model holds after them: BatchNorm must have seen each input once.

    The last maps hold 2 x 2 x 2 voxels of 4 scans: over fewer values BatchNorm blows rounding up.
    """
    for seed in (0, 1):
        model(random_hu(4, 1, 32, 64, 64, seed=seed)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.state_dict()


def assert_same_passes(one, other, tolerance):
    (grads, content), (grads_again, content_again) = one, other
    assert content.keys() == content_again.keys()
    for name, tensor in content.items():
        torch.testing.assert_close(content_again[name], tensor, rtol=0, atol=tolerance, msg=name)
    assert content["backbone.net.bn1.num_batches_tracked"] == 2
    assert grads.keys() == grads_again.keys()
    for name, gradient in grads.items():
        assert (grads_again[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_recomputed_blocks_of_a_3d_backbone_give_the_same_gradients_and_statistics():
    plain, again = small_resnet3d_classifier().train(), small_resnet3d_classifier().train()
    fs.apply_memory_plan(again, 8, 1)
    kept = [saved_bytes(model, random_hu(1, 1, 32, 32, 32), CPU) for model in (plain, again)]
    assert kept[1] < 0.8 * kept[0]
    assert_same_passes(two_passes(plain), two_passes(again), 0)
    for model in (plain, again):
        model.zero_grad()
        model.eval()  # frozen statistics are used by the backward pass and must not be touched before it
        model(random_hu(1, 1, 16, 32, 32)).sum().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=0)


def test_convolutions_on_a_gpu_are_given_channels_last_images():
    with FakeTensorMode():
        flat, whole = (torch.zeros(2, 3, *shape, device="cuda") for shape in ((8, 8), (4, 8, 8)))
        assert fs.channels_last(flat).is_contiguous(memory_format=torch.channels_last)
        assert fs.channels_last(whole).is_contiguous(memory_format=torch.channels_last_3d)


def test_a_3d_backbone_lays_its_maps_out_channels_last_in_bfloat16_only_and_its_weights_never(monkeypatch):
    model, volume = small_resnet3d_classifier().eval(), random_hu(1, 1, 32, 64, 64)
    seen, features = [], []
    model.backbone.net.conv1.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last_3d))
    )
    for amp, layout in ((torch.bfloat16, True), (torch.bfloat16, False), (None, True)):
        if not layout:
            monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
        with torch.no_grad(), dataclasses.replace(CPU, amp_dtype=amp).autocast():
            features.append(model.slice_features(volume).float())
    assert seen == [True, False, False]
    scale = features[2].abs().max()
    assert scale > 0.01
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=0.02 * scale.item())
    torch.testing.assert_close(features[0], features[2], rtol=0, atol=0.05 * scale.item())
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())


# Compiling


def test_a_machine_without_a_gpu_compiles_nothing_by_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_: pytest.fail("compiled"))
    for mode in ("auto", "off"):
        fs.maybe_compile(small_classifier(), mode, CPU)


def test_where_compiling_fails_the_run_goes_on_and_says_so(monkeypatch, caplog):
    def no_compiler(function):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = small_classifier()
    fs.maybe_compile(model, "on", CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "nothing is compiled, torch.compile fails here: No working C++ compiler found"
    ]
    assert all(block._compiled_call_impl is None for block in model.backbone.blocks())


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("family", ["siglip", "resnet3d"])
def test_compiled_blocks_give_the_same_gradients_and_statistics(family, recompute):
    from torch._dynamo.utils import counters

    def passes(compiled):
        if family == "resnet3d":
            model = small_resnet3d_classifier().train()
        else:
            model = small_classifier(dropout=0.0).train()
        if compiled:
            fs.maybe_compile(model, "on", CPU)
        fs.apply_memory_plan(model, 2, recompute)
        if family == "resnet3d":
            return two_passes(model)
        model(random_hu(2, 1, 3, 16, 16)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = passes(False), passes(True)
    assert counters["aot_autograd"]["ok"] > 1  # the probe, and blocks
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    if family == "resnet3d":
        assert_same_passes(plain, compiled, 1e-5)
    else:
        for name, gradient in plain.items():
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def compile_with(monkeypatch, model):
    """Compile the blocks with a backend that needs no compiler."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: plain(function, backend="aot_eager_decomp_partition"))
    fs.maybe_compile(model, "on", CPU)
    monkeypatch.undo()


@pytest.mark.parametrize("how", ["frozen half", "lora", "skip air", pytest.param("resnet3d", marks=pytest.mark.slow)])
def test_no_way_to_run_a_model_is_left_uncompiled(monkeypatch, caplog, how):
    """Training and prediction, whole chunks and remainders, in two precisions."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    if how == "resnet3d":
        model = small_resnet3d_classifier()
    else:
        model = small_classifier(skip_air=how == "skip air", dropout=0.0)
    if how in ("frozen half", "lora"):
        freeze_up_to(model.backbone, 12)
    if how == "lora":
        add_lora(model.backbone, 2)
    compile_with(monkeypatch, model)
    fs.apply_memory_plan(model, 4, 1)
    size = 32 if how == "resnet3d" else 16
    for runtime in (dataclasses.replace(CPU, amp_dtype=torch.bfloat16), CPU):
        for n, s in ((2, size), (1, size - 3), (1, size)):
            volume = random_hu(n, 1, s, size, size)
            with runtime.autocast():
                model.train()(volume).sum().backward()
                with torch.no_grad():
                    model.eval()(volume)
    assert counters["frames"]["total"] == counters["frames"]["ok"] > 1
    assert not [r for r in caplog.records if r.name == fs.log.name and r.levelno >= logging.WARNING]


def test_a_limit_of_the_compiler_that_is_met_is_said_once(monkeypatch, caplog):
    torch._dynamo.reset()
    model = small_classifier().eval()
    compile_with(monkeypatch, model)
    monkeypatch.setattr(fs.CompilerWarnings, "said", set())
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    for runtime in (CPU, dataclasses.replace(CPU, amp_dtype=torch.bfloat16), CPU):
        with torch.no_grad(), runtime.autocast():
            model(random_hu(1, 1, 2, 16, 16))
    (said,) = [record.getMessage() for record in caplog.records if record.name == fs.log.name]
    assert "recompile_limit (1); that runs uncompiled" in said


@pytest.mark.slow
def test_a_run_that_wants_compiling_where_there_is_no_compiler_is_a_run_without(scans, tower, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    hidden = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    argv = arguments(scans, tower, tmp_path / "run", "--epochs", 1, "--compile", "on")
    done = subprocess.run(
        [sys.executable, fs.__file__, *argv], capture_output=True, text=True, timeout=300,
        env=hidden | {"PATH": str(empty), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing is compiled" in done.stderr
    assert "Traceback" not in done.stderr


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


class Casts(TorchDispatchMode):
    """Counts casts of tensors with two dimensions and as many numbers as a weight of the tower has."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        cast = function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16
        self.count += cast and args[0].ndim == 2 and args[0].shape in ((32, 32), (48, 32), (32, 48))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_frozen_weights_are_cast_once_and_stay_what_they_are(lora, recompute):
    """The features are those of plain autocast, and whoever reads the weights finds the ones that were loaded."""
    runtime, volume = dataclasses.replace(CPU, amp_dtype=torch.bfloat16), random_hu(1, 1, 4, 16, 16)
    model, plain = (small_classifier(dropout=0.0).train() for _ in range(2))
    for one in (model, plain):
        torch.manual_seed(1)
        add_lora(one.backbone, 2) if lora else freeze_up_to(one.backbone, "all")
        one.slice_chunk, one.recompute = 1, recompute
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counts, features = [], []
    for _ in range(2):
        with Casts() as casts, runtime.autocast():
            features.append(model.slice_features(volume))
        counts.append(casts.count)
    assert counts == [15, 0]  # q, k, v, out and two of the MLP in each of two blocks; three in the head
    with runtime.autocast(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "frozen_in_amp", lambda *_: nullcontext())
        expected = plain.slice_features(volume)
    assert torch.equal(features[1], expected)
    if lora:
        for out in (features[1], expected):
            out.float().square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.grad is None if q.grad is None else torch.equal(p.grad, q.grad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad(), runtime.autocast():
        for p in model.backbone.parameters():
            p.mul_(1.5)
        assert not torch.equal(model.slice_features(volume), features[1])  # other weights have other copies


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
        fs.settle_step(state, fs.optimizer_step(state, 0.0), [], False)
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


def test_adapters_stand_only_where_the_tower_is_not_frozen():
    model = small_classifier()
    freeze_up_to(model.backbone, "all")
    with pytest.raises(BadInput, match="--freeze-up-to"):
        add_lora(model.backbone, 2)
    first = next(i for i, (name, _) in enumerate(fs.backbone_layers(model.backbone)) if "layers.1." in name)
    freeze_up_to(model.backbone, first)
    add_lora(model.backbone, 2)
    trained = {name.rpartition(".lora_")[0] for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained == {f"net.encoder.layers.1.self_attn.{x}_proj" for x in ("q", "k", "v", "out")}
    scales = rate_scales(model, 0.5, 1.0)
    assert {scales[p] for p in model.backbone.parameters() if p.requires_grad} == {0.5}  # one block below the top


# Air


def chest_slice(size=224):
    """HU of a drawn slice and the mask of its body: wall and lungs, on a mattress as dense as these, on a table."""
    y, x = np.mgrid[:size, :size] / size * 2 - 1
    body = (x / 0.75) ** 2 + ((y + 0.05) / 0.55) ** 2 < 1
    lungs = (((abs(x) - 0.36) / 0.3) ** 2 + ((y + 0.05) / 0.42) ** 2 < 1) & body
    hu = np.where(body, 40.0, -1000.0)
    hu[lungs] = -870
    hu[(y > 0.2) & (y < 0.75) & (abs(x) < 0.9) & ~body] = -880
    hu[(abs(y - 0.75) < 0.02) & (abs(x) < 0.9)] = 300  # the table's shell
    hu += np.random.default_rng(0).normal(0, 20, hu.shape)
    return torch.from_numpy(hu.astype(np.int16)), body


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_patches_outside_the_body_are_left_out_and_none_inside(patch):
    hu, body = chest_slice()
    keep = patches_in_body(torch.stack([hu, torch.full_like(hu, -1000)]), patch)
    assert keep.shape == (2, (224 // patch) ** 2)
    touched = torch.from_numpy(body).float().unfold(0, patch, patch).unfold(1, patch, patch).amax((2, 3)).flatten() > 0
    assert (keep[0] | ~touched).all()
    near = nn.functional.max_pool2d(touched.float().view(1, 224 // patch, -1), 3, 1, 1).flatten() > 0
    assert not (keep[0] & ~near).any()  # neither mattress nor table
    assert (~keep[0]).float().mean() > 0.3
    assert not keep[1].any()


def test_lungs_that_the_field_of_view_cuts_and_emphysema_stay():
    hu, body = chest_slice()
    lung = (hu < -700) & torch.from_numpy(body)
    hu[lung] = -930  # emphysema throughout
    corners = (np.s_[30:, 30:], np.s_[30:, :194], np.s_[:110, 30:])
    for view in (np.s_[:, 40:], np.s_[:, 30:160], *corners):  # the left wall, both walls, corners are cut off
        cut, inside = (nn.functional.interpolate(x[view][None, None].float(), (224, 224))[0] for x in (hu, lung))
        touched = nn.functional.max_pool2d(inside, 16).flatten() > 0
        assert touched.sum() > 20
        assert (patches_in_body(cut, 16)[0] | ~touched).all()


def test_a_model_that_skips_air_scores_what_one_scores_that_sees_only_the_body():
    model = small_classifier(skip_air=True).eval()
    volume = torch.full((1, 1, 2, 16, 16), -1000, dtype=torch.int16)
    volume[..., 10:, :] = random_hu(1, 1, 2, 6, 16)
    with torch.no_grad():
        features = model.slice_features(volume)
        seen = patches_in_body(volume[0, 0], 8)
        assert seen.sum(1).tolist() == [2, 2]
        images = model.windows(volume[0].transpose(0, 1))
        torch.testing.assert_close(features[0], model.backbone(images, seen), rtol=0, atol=1e-6)
    with pytest.raises(BadInput, match="--skip-air"):
        fs.SiglipClassifier(small_backbone(), CHEST, "windowed", 2, skip_air=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_chunks_that_skip_air_give_each_slice_the_features_of_its_own_patches(chunk, recompute):
    """Slices that keep none, some and all of their patches, in an order that has to be found again."""
    model = small_classifier(skip_air=True, dropout=0.0).train()
    model.slice_chunk, model.recompute = chunk, recompute
    volume = torch.full((2, 1, 3, 16, 16), -1000, dtype=torch.int16)
    volume[0, 0, 1], volume[1, 0, 0, :6], volume[1, 0, 2, :6, :6] = (
        random_hu(16, 16), random_hu(6, 16, seed=1), random_hu(6, 6, seed=2)
    )  # fmt: skip
    features = model.slice_features(volume)
    images = model.windows(volume.transpose(1, 2).flatten(0, 1))
    seen = patches_in_body(volume.flatten(0, 2), 8)
    assert seen.sum(1).tolist() == [0, 4, 0, 2, 0, 1]
    expected = torch.cat([model.backbone(image[None], keep[None]) for image, keep in zip(images, seen, strict=True)])
    torch.testing.assert_close(features.flatten(0, 1), expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(f.square().sum(), model.backbone.parameters()) for f in (features, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class Waits(TorchDispatchMode):
    """Counts where the host has to wait for a value from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", [False, True])
def test_a_step_waits_for_the_device_once(tmp_path, amp):
    """For its gradient norm, after all its passes; for nothing else, air skipped or not."""
    dataset = small_scans(tmp_path, 8)
    for skip_air in (False, True):
        state = small_state(small_classifier(skip_air=skip_air), amp=amp, ema=True)
        state.model.slice_chunk, state.model.recompute = 2, True
        counts = []
        for batch_size in (1, 2):
            with Waits() as waits:
                train_one_epoch(state, dataset, MultilabelBCELoss(), Recipe(batch_size, augment="light"), CPU)
            state.next_epoch()
            counts.append(waits.count)
        assert counts[0] - counts[1] == 8 - 4


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
    torn, empty, flipped = sorted(folder.iterdir())[:3]
    torn.write_bytes(torn.read_bytes()[:-10])
    empty.write_bytes(b"")
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    assert fill() == 3
    np.savez(dataset.table.paths[2], image=random_hu(1, 3, 16, 16, seed=99).numpy())
    assert fill() == 1
    other = fs.CTVolumeDataset(dataset.table, dataclasses.replace(dataset.prep, grid=(2, 16, 16)))
    assert fill(dataset=other) == 6
    assert fill(runtime=dataclasses.replace(CPU, amp_dtype=torch.bfloat16)) == 6
    with torch.no_grad():
        model.backbone.net.post_layernorm.bias += 1e-3
    assert fill() == 6


def test_features_that_go_bad_under_a_run_stop_it_by_name(frozen, monkeypatch):
    monkeypatch.setattr(fs, "READ_DELAYS", (0.0, 0.0))
    model, dataset, folder = frozen
    cached = cache_features(folder, model, dataset, Recipe(2), CPU)
    file = cached.files[dataset.table.paths[3]]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(fs.BadVolume, match=file.name):
        predict(model, cached, Recipe(2), CPU)


def test_a_folder_of_dicom_files_has_new_features_when_one_of_them_changes(frozen, monkeypatch):
    model, dataset, folder = frozen
    monkeypatch.setattr(fs, "load_sample", lambda path, prep: random_hu(1, 3, 16, 16))
    series = folder.parent / "series"
    series.mkdir()
    (series / "1.dcm").write_bytes(b"1")
    one = fs.CTVolumeDataset(dataset.table.subset([0]), dataset.prep)
    one.table.paths[0] = series
    cache_features(folder, model, one, Recipe(2), CPU)
    (series / "1.dcm").write_bytes(b"another")
    cache_features(folder, model, one, Recipe(2), CPU)
    assert len(list(folder.iterdir())) == 2


def test_a_scan_that_cannot_be_read_has_no_features_and_counts_for_nothing(frozen, monkeypatch):
    monkeypatch.setattr(fs, "READ_DELAYS", (0.0, 0.0))
    model, dataset, folder = frozen
    dataset.table.paths[4].write_bytes(b"no volume")
    with pytest.raises(fs.BadVolume, match="scan_004"):
        cache_features(folder, model, dataset, Recipe(2), CPU)
    dataset.on_bad_volume = "skip"
    cached = cache_features(folder, model, dataset, Recipe(2), CPU)
    assert len(list(folder.iterdir())) == 5
    assert list(cached.skipped) == [4]
    assert np.isnan(cached.targets[4]).all()
    monkeypatch.setattr(fs.time, "sleep", lambda _: pytest.fail("waits for what is known to be missing"))
    figures = train_one_epoch(small_state(model), cached, MultilabelBCELoss(), Recipe(6), CPU)
    others = fs.CTVolumeDataset(dataset.table.subset([0, 1, 2, 3, 5]), dataset.prep)
    without = train_one_epoch(small_state(small_classifier(dropout=0.0)), others, MultilabelBCELoss(), Recipe(6), CPU)
    assert figures["train_loss"] == pytest.approx(without["train_loss"], abs=1e-3)
    assert "scan_004" in cached.skipped[4]


def test_a_full_disk_stops_before_or_between_features_and_loses_none(frozen, monkeypatch):
    model, dataset, folder = frozen
    with monkeypatch.context() as patch:
        patch.setattr(fs.shutil, "disk_usage", lambda _: Namespace(free=2**20 + 6 * (3 * 32 * 2 + 4) - 1))
        with pytest.raises(fs.BadEnvironment, match="are needed there"):
            cache_features(folder, model, dataset, Recipe(2), CPU)
        assert not list(folder.iterdir())
    written = []

    def two_fit(path, data, write=Path.write_bytes):
        written.append(path.name)
        write(path, data)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", two_fit)
        with pytest.raises(fs.BadEnvironment, match="No space left"):
            cache_features(folder, model, dataset, Recipe(2), CPU)
    assert len(list(folder.iterdir())) == 2
    cache_features(folder, model, dataset, Recipe(2), CPU)
    assert len(list(folder.iterdir())) == 6


def test_ranks_that_find_different_features_missing_leave_none_out(frozen, monkeypatch):
    """Another run may be writing into the folder while they look."""
    model, dataset, folder = frozen
    monkeypatch.setattr(fs, "agree", lambda runtime, *wishes: list(wishes))
    monkeypatch.setattr(fs, "share_skipped", lambda dataset, runtime: None)
    first = cache_features(folder, model, dataset, Recipe(2), CPU).files
    for row in (1, 3, 4):
        first[dataset.table.paths[row]].unlink()
    one, two = (Runtime(CPU.device, None, rank, 2) for rank in (0, 1))
    with pytest.raises(fs.BadEnvironment, match="the same --cache-features folder"):
        cache_features(folder, model, dataset, Recipe(2), one)  # makes 4 of 1, 3 and 4
    cache_features(folder, model, dataset, Recipe(2), two)  # finds 1 and 3
    assert all(file.exists() for file in first.values())


def test_a_backbone_that_learns_has_no_cache(frozen):
    model, dataset, folder = frozen
    freeze_up_to(model.backbone, 2)
    with pytest.raises(BadInput, match="--freeze-up-to all"):
        cache_features(folder, model, dataset, Recipe(2), CPU)


# Through the command line


def arguments(scans, tower, out, *more):
    argv = [
        "--csv", scans, "--pretrained", tower, "--label-columns", "Cardiomegaly", "Pleural effusion", "--num-slices", 4,
        "--batch-size", 4, "--num-workers", 0, "--wandb-mode", "disabled", "--lr", 1e-3, "--bootstrap", 0,
        "--output-dir", out, *more,
    ]  # fmt: skip
    return [str(word) for word in argv]


def run(scans, tower, out, *more):
    assert main(arguments(scans, tower, out, *more)) == 0
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


RICH = (
    "--epochs", 2, "--lora-rank", 2, "--freeze-up-to", 3, "--skip-air",
    "--use-ema", "--layer-decay", 0.5, "--backbone-lr-scale", 2, "--grad-checkpointing", "on",
    "--gradient-accumulation-steps", 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def rich(scans, tower, tmp_path_factory):
    """A finished run with adapters, without air."""
    folder = tmp_path_factory.mktemp("rich")
    with pytest.MonkeyPatch.context() as patch:

        def finish(run, finish=fs.finish_run):
            patch.setattr(torch, "load", lambda *_, **more: pytest.fail("the best weights are in memory"))
            finish(run)

        patch.setattr(fs, "finish_run", finish)
        run(scans, tower, folder, *RICH)
    return folder


def test_adapters_and_skipped_air_end_in_a_plain_checkpoint(scans, rich, tmp_path):
    content = fs.load_checked(rich / "best_model.pth", fs.MODEL_KIND)
    assert not any("lora" in name for name in content["model"])
    assert fs.classifier_from(content).skip_air
    argv = [
        "--csv", scans, "--test-only", rich / "best_model.pth", "--label-columns", "Cardiomegaly",
        "Pleural effusion", "--output-dir", tmp_path, "--num-workers", 0, "--test-split", "val",
    ]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    of_run, again = (json.loads((f / "evaluation_val.json").read_text()) for f in (rich, tmp_path))
    np.testing.assert_allclose(again["probabilities"], of_run["probabilities"], rtol=0, atol=1e-6)
    lines = (rich / "training.log").read_text()
    assert "17 training, 6 validation scans; effective batch 8 = 4 x 1 processes x 2" in lines


@pytest.mark.parametrize("moment", [(0, 2), (1, 4)])
def test_a_run_with_all_controls_stopped_anywhere_and_resumed_is_the_same_to_the_bit(
    scans, tower, rich, tmp_path, monkeypatch, moment
):
    poll = fs.Run.poll

    def stop(run, may_save=False):
        if may_save and run.position[:2] == moment:
            raise fs.Interrupted(signal.SIGTERM)
        poll(run, may_save)

    with monkeypatch.context() as patch:
        patch.setattr(fs.Run, "poll", stop)
        assert main(arguments(scans, tower, tmp_path, *RICH)) == 143
    stopped = fs.load_checked(tmp_path / "last.ckpt", fs.RUN_KIND)
    assert (stopped["progress"]["epoch"], stopped["progress"]["micro"]) == moment
    run(scans, tower, tmp_path, *RICH, "--resume", "auto")
    assert (tmp_path / "results.jsonl").read_bytes() == (rich / "results.jsonl").read_bytes()
    parts = ("model", "ema", "optimizer", "schedule")
    one, other = (fs.load_checked(folder / "last.ckpt", fs.RUN_KIND) for folder in (rich, tmp_path))
    assert [fs.digest_of(one[part]) for part in parts] == [fs.digest_of(other[part]) for part in parts]


def test_a_run_on_cached_features_has_the_metrics_of_one_without(scans, tower, tmp_path, capsys):
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
    folder = (tmp_path / "features").rename(tmp_path / "elsewhere")
    more = (*more[2:], "--epochs", 3, "--resume", "auto")
    assert len(run(scans, tower, tmp_path / "cached", *more, "--cache-features", folder)) == 3
    assert "17 of 17 scans" in (tmp_path / "cached" / "training.log").read_text()
    assert main(arguments(scans, tower, tmp_path / "cached", *more)) == 2
    assert "use of cached features" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_plan_of_memory_while_it_fits_and_else_makes_another(
    scans, tower, tmp_path, monkeypatch, capsys
):
    """Three starts, the last where there is far less memory; its epochs are those of a run that had plenty."""
    used, apply, lines = [], fs.apply_memory_plan, {}
    monkeypatch.setattr(fs, "apply_memory_plan", lambda m, *plan: (used.append(plan), apply(m, *plan)))
    for name, starts in (("whole", (10**12,)), ("parts", (10**12, 10**11, 10**5))):
        for number, free in enumerate(starts):
            monkeypatch.setattr(fs, "free_memory", lambda device, free=free: free)
            more = ("--resume", "auto") if number else ()
            epochs = 3 if name == "whole" else 1 + number
            lines[name] = run(scans, tower, tmp_path / name, "--epochs", epochs, "--warmup", 0, *more)
    assert used[:3] == [(8, 0)] * 3
    assert used[3] != (8, 0)
    assert used[3][1] == 1
    assert "less memory than the run began with" in capsys.readouterr().err
    for one, other in zip(*lines.values(), strict=True):
        for figure in ("train_loss", "val_loss"):
            assert other[figure] == pytest.approx(one[figure], abs=1e-5)
    assert lines["whole"][:2] == lines["parts"][:2]


@pytest.mark.parametrize(("named", "mode", "kept"), [(None, "auto", True), (2, "auto", False), (None, "on", False)])
def test_flags_overrule_the_plan_that_a_run_began_with(monkeypatch, named, mode, kept):
    monkeypatch.setattr(fs, "free_memory", lambda device: 10**12)
    args = memory_arguments(slice_chunk=named, grad_checkpointing=mode)
    assert fs.keep_plan(args, small_classifier(), 128, CPU, [8, 0], [2, 1]) == ([8, 0] if kept else [2, 1])


def test_predictions_have_larger_chunks_than_training_that_computes_again():
    model, sizes = small_classifier(), []
    model.backbone.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    model.backbone.blocks = lambda: [None] * 12  # as many as a ViT-B has
    fs.apply_memory_plan(model, 1, 1)
    with torch.no_grad():
        model(random_hu(1, 1, 9, 16, 16))
    model(random_hu(1, 1, 2, 16, 16))
    assert sizes == [6, 3, 1, 1]


@pytest.mark.parametrize(
    "flags",
    [("--cache-features", "d"), ("--cache-features", "d", "--freeze-up-to", "all", "--lora-rank", "2"),
     ("--layer-decay", "0"),
     ("--slice-chunk", "0"), ("--grad-checkpointing", "maybe")],
)  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        fs.parse_args(["--csv", "t.csv", "--pretrained", "m", "--label-columns", "A", *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err
