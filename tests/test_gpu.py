"""What only a GPU can show. Without one these are skipped; `--device cpu --small` runs them on the CPU, to see that
they work: float16 is then emulated, gloo stands in for NCCL, and resident memory for the allocator's count.

    pytest -m gpu tests/test_gpu.py
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import finetune_siglip as fs
from finetune_siglip import MultilabelBCELoss, Recipe, Runtime, train_one_epoch
from helpers import CHEST, ROOT, SMALL_TOWER, random_hu, small_classifier, small_scans, small_state

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(request):
    """The GPU, or with `--device cpu` the CPU."""
    chosen = torch.device(request.config.getoption("--device", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU; --device cpu --small runs this on the CPU")
    return chosen


@pytest.fixture
def small(request):
    return request.config.getoption("--small", False)


def state_on(device, dtype, **options):
    """A model on the device with all that training in this precision needs."""
    state = small_state(small_classifier(dropout=0.0).to(device), ema=True, **options)
    state.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=1024.0)
    state.loss_sum = state.loss_sum.to(device)
    return state


class Overflows(MultilabelBCELoss):
    """A loss whose gradient leaves the range of float16 on its second use."""

    used = 0

    def forward(self, logits, targets, reduction="mean"):
        self.used += 1
        return super().forward(logits, targets, reduction) * (1e30 if self.used == 2 else 1.0)


def test_float16_skips_the_step_that_overflows_in_every_count(device, tmp_path):
    runtime, state = Runtime(device, torch.float16), state_on(device, torch.float16)
    figures = train_one_epoch(state, small_scans(tmp_path, 6), Overflows(), Recipe(2, augment="light"), runtime)
    assert (state.skipped, state.schedule.steps, state.ema.steps) == (1, 2, 2)
    assert state.scaler.get_scale() == 512
    assert {int(s["step"]) for s in state.optimizer.state.values()} == {2}
    assert np.isfinite([figures["train_loss"], figures["grad_norm"]]).all()
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains_like_float32(device, dtype, tmp_path):
    losses = []
    for precision in (None, dtype):
        state = state_on(device, precision, lr=1e-3)
        for _ in range(3):
            figures = train_one_epoch(
                state, small_scans(tmp_path, 6), MultilabelBCELoss(), Recipe(2), Runtime(device, precision)
            )
            state.next_epoch()
        losses.append(figures["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 12])
def test_compiled_gradients_are_those_of_eager_ones(device, frozen):
    gradients = []
    for compiled in (False, True):
        model = small_classifier(dropout=0.0).to(device).train()
        fs.freeze_up_to(model.backbone, frozen)
        if compiled:
            fs.maybe_compile(model, "on", Runtime(device))
            assert model.backbone.blocks()[0]._compiled_call_impl is not None
        for n, s in ((2, 5), (1, 3)):
            model(random_hu(n, 1, s, 16, 16).to(device)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_slices_keep_is_what_the_allocator_counts(device, dtype, small):
    if device.type != "cuda":
        pytest.skip("test_engine.py compares with the memory of a process on the CPU")
    width, layers = (256, 2) if small else (768, 12)
    config = SMALL_TOWER | {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width,
                            "num_attention_heads": width // 64, "patch_size": 16, "image_size": 224}  # fmt: skip
    model, runtime = fs.SiglipClassifier(fs.build_backbone(config), CHEST, "hu", 3).to(device), Runtime(device, dtype)
    model.slice_chunk = 64
    volume = random_hu(1, 1, 32, 224, 224).to(device)
    with runtime.autocast():
        warm = model.slice_features(volume[:, :, :2])  # libraries and autocast's copies take theirs
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        features = model.slice_features(volume)
        kept, peak = torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
    del warm
    assert features.requires_grad
    assert fs.saved_bytes(model, volume, runtime) == pytest.approx(kept, rel=0.1)
    assert peak < 1.43 * kept  # the share of free memory that a plan leaves alone


def arguments(table, tower, out, device, *more):
    argv = [
        "--csv", table, "--pretrained", tower, "--label-columns", "Cardiomegaly", "Pleural effusion", "--num-slices", 4,
        "--batch-size", 4, "--num-workers", 0, "--wandb-mode", "disabled", "--bootstrap", 0, "--output-dir", out, *more,
    ]  # fmt: skip
    return [str(word) for word in argv]


def test_too_little_memory_is_one_line_that_says_what_helps(device, scans, tower, tmp_path, monkeypatch, capsys):
    def need_too_much(*_):
        if device.type == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 PiB. And much more")
        torch.empty(2**53, dtype=torch.int8, device=device)

    monkeypatch.setattr(fs, "forward_backward", need_too_much)
    assert fs.main(arguments(scans, tower, tmp_path / "run", device, "--epochs", 1)) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(said) == 1
    assert "lower --batch-size" in said[0]


def test_a_resumed_run_ends_with_the_same_bits(device, scans, tower, tmp_path):
    more = ("--amp", "--deterministic", "on", "--use-ema")
    for out, starts in (("whole", [2]), ("parts", [1, 2])):
        for number, epochs in enumerate(starts):
            again = ("--resume", "auto") if number else ()
            argv = arguments(scans, tower, tmp_path / out, device, "--epochs", epochs, *more, *again)
            assert fs.main(argv) == 0
    one, other = (fs.load_checked(tmp_path / out / "last.ckpt", fs.RUN_KIND) for out in ("whole", "parts"))
    for part in ("model", "ema", "optimizer"):
        assert fs.digest_of(one[part]) == fs.digest_of(other[part])
    lines = [(tmp_path / out / "results.jsonl").read_bytes() for out in ("whole", "parts")]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_one_process_under_torchrun_trains_as_one_without(device, scans, tower, tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    losses = []
    for name, start in (("alone", []), ("torchrun", launcher)):
        argv = arguments(scans, tower, tmp_path / name, device, "--epochs", 1)
        command = [sys.executable, *start, fs.__file__, *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(json.loads((tmp_path / name / "results.jsonl").read_text().splitlines()[0])["train_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


@pytest.mark.slow
def test_the_benchmark_says_how_fast_each_case_is(device, small):
    command = [sys.executable, str(ROOT / "tests/benchmarks/bench_gpu.py"), "--device", device.type, "--repeats", "1"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/benchmarks")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command += ["--small"] * (small or device.type == "cpu")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = dict(word.split("=") for word in done.stdout.splitlines()[-1].split())
    assert {f"{case}_{what}" for case in ("vit", "frozen", "lora", "resnet3d")
            for what in ("scans_per_s", "ratio", "peak_share", "waited_s")} <= figures.keys()  # fmt: skip
    assert all(np.isfinite(float(value)) for value in figures.values())
