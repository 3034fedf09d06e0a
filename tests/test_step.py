"""Room 9: which scan goes where, what a step does to the weights, and what a step that is skipped leaves alone."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import finetune_siglip as fs
from finetune_siglip import (
    BadVolume,
    Diverged,
    MultilabelBCELoss,
    Recipe,
    Runtime,
    Schedule,
    optimizer_step,
    plan_epoch,
    predict,
    settle_step,
    train_one_epoch,
)
from helpers import small_classifier, small_scans, small_state

CPU = Runtime(torch.device("cpu"))


def targets_of(n, labels=3):
    targets = np.random.default_rng(0).integers(0, 2, (n, labels)).astype(np.float32)
    targets[::3, 0] = np.nan
    return targets


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("n", "batch_size", "accumulation"), [(1, 4, 1), (7, 2, 1), (24, 2, 2), (25, 3, 4)])
def test_an_epoch_has_every_row_once_and_as_many_passes_on_every_rank(n, batch_size, accumulation, world_size):
    targets, recipe = targets_of(n), Recipe(batch_size, accumulation)
    plans = [plan_epoch(targets, recipe, Runtime(CPU.device, None, rank, world_size), 3) for rank in range(world_size)]
    items = [item for plan in plans for window in plan for batch in window.batches for item in batch]
    assert sorted(item for item in items if item >= 0) == list(range(n))
    assert all(0 <= ~item < n for item in items if item < 0)  # pads are scans of this split
    for windows in zip(*plans, strict=True):  # the same number of steps everywhere
        lengths = [[len(batch) for batch in window.batches] for window in windows]
        assert all(length == lengths[0] for length in lengths)
        rows = [item for window in windows for batch in window.batches for item in batch if item >= 0]
        assert {window.known for window in windows} == {int((~np.isnan(targets[rows])).sum())}
        assert all(0 < length <= batch_size for length in lengths[0])


def test_an_epoch_is_a_function_of_seed_and_epoch():
    targets = targets_of(40)

    def order(seed, epoch, **more):
        windows = plan_epoch(targets, Recipe(4, seed=seed, **more), CPU, epoch)
        return [row for window in windows for batch in window.batches for row in batch]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) == order(1, 0, accumulation=3)  # dealt out in another way, but in the same order
    assert len({tuple(order(seed, epoch)) for seed, epoch in [(1, 0), (1, 1), (2, 0), (2, 1)]}) == 4


def gradients_after(folder, batch_size, accumulation, n=8):
    """The epoch's loss and the gradient of each of its steps."""
    dataset = small_scans(folder, n, unknown=0.4)
    model = small_classifier(dropout=0.0)
    state, steps = small_state(model, lr=1e-30), []

    def keep(optimizer, *_):
        steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    state.optimizer.register_step_pre_hook(keep)
    recipe = Recipe(batch_size, accumulation, max_grad_norm=0.0)
    return train_one_epoch(state, dataset, MultilabelBCELoss(), recipe, CPU), steps, dataset


def test_accumulation_gives_the_gradients_of_one_big_batch_in_the_short_last_window_too(tmp_path):
    (whole, big, _), (parts, small, _) = gradients_after(tmp_path, 6, 1), gradients_after(tmp_path, 2, 3)
    assert len(big) == len(small) == 2  # six scans, then the two that are left
    for one, other in zip(big, small, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-6)


def test_the_loss_of_an_epoch_is_the_mean_over_known_labels(tmp_path):
    figures, _, dataset = gradients_after(tmp_path, 3, 1)
    logits = predict(small_classifier(dropout=0.0), dataset, Recipe(4), CPU)
    known = ~np.isnan(dataset.table.targets)
    p, y = 1 / (1 + np.exp(-logits[known].astype(float))), dataset.table.targets[known]
    assert figures["train_loss"] == pytest.approx(-np.where(y == 1, np.log(p), np.log(1 - p)).mean(), abs=1e-5)


def test_pads_count_for_nothing(tmp_path):
    dataset = small_scans(tmp_path, 4)
    item, pad = dataset[2], dataset[~2]
    assert torch.equal(item["volume"], pad["volume"])
    assert torch.isnan(pad["targets"]).all()
    model, loss = small_classifier(dropout=0.0), MultilabelBCELoss()
    loss(model(torch.stack([pad["volume"]])), pad["targets"][None], reduction="sum").backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def spoilt_state(name, amp):
    """A state two good steps old whose next gradient is not finite."""
    model = small_classifier(dropout=0.0)
    state = small_state(model, optimizer=name, amp=amp, ema=True)
    for good in (True, True, False):
        for index, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 if good or index else math.nan) * state.scaler.get_scale()
        if state.scaler.is_enabled():
            state.scaler.scale(torch.zeros(()))  # creates its tensors, as scaling the loss does
        if good:
            settle_step(state, optimizer_step(state, 1.0), [], amp)
    return state


def contents(state):
    """Weights, moments, averages, schedule: all that a step may change, except the loss scale."""
    moments = [v.clone() for s in state.optimizer.state.values() for v in s.values()]
    weights = [p.detach().clone() for p in state.model.parameters()]
    return weights + moments + [v.clone() for v in state.ema.average.values()], state.schedule.state_dict()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_changes_nothing(name, amp):
    state = spoilt_state(name, amp)
    before, schedule = contents(state)
    scale = state.scaler.get_scale()
    norm = optimizer_step(state, 1.0)
    assert math.isnan(norm)
    settle_step(state, norm, [], may_skip=True)
    after, schedule_after = contents(state)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert schedule_after == schedule
    assert (state.skipped, state.skipped_in_row, state.schedule.steps) == (1, 1, 2)
    assert not amp or state.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("amp", [False, True])
def test_finite_gradients_of_an_infinite_norm_are_skipped_in_every_count(amp):
    state = spoilt_state("adamw", amp)
    for p in state.model.parameters():
        p.grad = torch.full_like(p, 1e20) * state.scaler.get_scale()
    before, schedule = contents(state)
    scale = state.scaler.get_scale()
    settle_step(state, optimizer_step(state, 1.0), [], may_skip=True)
    after, schedule_after = contents(state)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert (schedule_after, state.skipped, state.ema.steps) == (schedule, 1, 2)
    assert not amp or state.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_first_step_that_is_skipped_leaves_no_rubbish_behind(name):
    model, reference = small_classifier(dropout=0.0), small_classifier(dropout=0.0)
    states = [small_state(m, optimizer=name) for m in (model, reference)]
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    settle_step(states[0], optimizer_step(states[0], 1.0), [], may_skip=True)
    for state in states:
        for p in state.model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer_step(state, 1.0)
    for got, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("amp", [False, True])
def test_a_step_takes_the_gradient_clipped_as_pytorch_does_and_tells_the_norm_before(amp, limit):
    model, reference, taken = small_classifier(), small_classifier(), []
    state = small_state(model, amp=amp)
    state.optimizer.register_step_pre_hook(lambda *_: taken.extend(p.grad.clone() for p in model.parameters()))
    state.scaler.scale(torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        q.grad = torch.randn(p.shape, generator=generator)
        p.grad = q.grad * state.scaler.get_scale()
    norm = optimizer_step(state, limit)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), limit or math.inf)
    assert norm == pytest.approx(expected.item(), rel=1e-5)
    for got, q in zip(taken, reference.parameters(), strict=True):
        torch.testing.assert_close(got, q.grad, rtol=1e-5, atol=1e-7)


def test_the_schedule_counts_optimiser_steps_whatever_the_accumulation(tmp_path):
    from transformers import get_cosine_schedule_with_warmup

    dataset, state, rates = small_scans(tmp_path, 7), small_state(small_classifier(), lr=0.3), []
    recipe = Recipe(1, 3)  # steps of 3, 3 and 1 scans
    state.schedule = Schedule("cosine", 2, 2 * 3)
    state.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for _ in range(2):
        train_one_epoch(state, dataset, MultilabelBCELoss(), recipe, CPU)
        state.next_epoch()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference, expected = get_cosine_schedule_with_warmup(optimizer, 2, 6), []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates == pytest.approx(expected)


class Spoilt(MultilabelBCELoss):
    """A loss that turns into infinity on its n-th use."""

    def __init__(self, at):
        super().__init__()
        self.at, self.used = at, 0

    def forward(self, logits, targets, reduction="mean"):
        self.used += 1
        return super().forward(logits, targets, reduction) * (math.inf if self.used == self.at else 1.0)


class Copies(TorchDispatchMode):
    """Counts what a GPU would make the host wait for: copies between devices that don't say otherwise, scalars read."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        moved = name == "_to_copy" and torch.device(kwargs.get("device") or args[0].device) != args[0].device
        filled = name == "copy_" and args[0].device != args[1].device
        waits = (moved and not kwargs.get("non_blocking")) or (filled and not (*args, False)[2])
        if waits or name in ("_local_scalar_dense", "nonzero"):
            self.found.append(name)
        return function(*args, **kwargs)


@pytest.mark.parametrize("strength", ["light", "strong"])
@pytest.mark.parametrize("intensity", ["hu", "windowed"])
def test_augmentation_has_a_gpu_wait_for_no_copy(monkeypatch, strength, intensity):
    """On tensors that only pretend to be on a GPU, of which each operation is seen."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        volumes = torch.zeros(3, 2, 4, 16, 16, dtype=torch.int16, device="cuda")
        with Copies() as copies:
            torch.zeros(2).to("cuda")
            altered = fs.augment(volumes, [0, 1, 2], strength, 7, 0, intensity)
    assert altered.device.type == "cuda"
    assert copies.found == ["_to_copy"]  # the one above, that such are seen


@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_for_a_vit_has_a_gpu_wait_for_no_copy(channels):
    """The means of three channels, or for fewer the one they have in common, are on the device already."""
    config = {"family": "timm", "architecture": "vit_base_patch16_224", "patch_size": 8, "image_size": 16,
              "arguments": {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}, "num_channels": 3,
              "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}  # fmt: skip
    with torch.device("meta"):
        backbone = fs.build_backbone(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = backbone.to_empty(device="cuda")
        images = torch.zeros(2, channels, 16, 16, device="cuda")
        with Copies() as copies:
            torch.zeros(2).to("cuda")
            normal = backbone.normalised(images)
    assert normal.device.type == "cuda"
    assert copies.found == ["_to_copy"]  # the one above, that such are seen


def test_processes_that_read_stay_over_epochs_and_read_what_the_epoch_wants(tmp_path, monkeypatch):
    monkeypatch.setattr(fs, "usable_cores", lambda: 2)
    dataset, state = small_scans(tmp_path, 6), small_state(small_classifier(dropout=0.0), lr=1e-30)
    recipe, readers, losses = Recipe(2, num_workers=2, augment="light"), [], []
    for _ in range(3):
        losses.append(train_one_epoch(state, dataset, MultilabelBCELoss(), recipe, CPU)["train_loss"])
        readers.append([worker.pid for worker in dataset.loader._iterator._workers])
        state.next_epoch()
    assert len(readers[0]) == 2
    assert readers[0] == readers[1] == readers[2]
    assert len(set(losses)) == 3  # each epoch's scans are altered in another way
    alone, state = small_scans(tmp_path, 6), small_state(small_classifier(dropout=0.0), lr=1e-30)
    for loss in losses:
        figures = train_one_epoch(state, alone, MultilabelBCELoss(), Recipe(2, augment="light"), CPU)
        assert figures["train_loss"] == pytest.approx(loss, abs=1e-6)
        state.next_epoch()
    seen = [batch["row"].tolist() for batch in fs.build_loader(dataset, [[5, 1], [3, 0]], 2, CPU.device, persist=True)]
    assert seen == [[5, 1], [3, 0]]
    assert readers[0] == [worker.pid for worker in dataset.loader._iterator._workers]


def test_no_more_processes_read_than_there_are_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(fs, "usable_cores", lambda: 1)
    dataset = small_scans(tmp_path, 2)
    list(fs.build_loader(dataset, [[0], [1]], 8, CPU.device, persist=True))
    started, dataset.loader = dataset.loader.num_workers, None  # which ends it
    assert started == 1
    monkeypatch.undo()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert fs.usable_cores() == 1


def test_divergence_in_full_precision_names_the_scans_and_spoils_no_weight(tmp_path):
    dataset, model = small_scans(tmp_path, 6), small_classifier()
    state, seen = small_state(model, ema=True), []

    def keep():
        seen.append([p.detach().clone() for p in model.parameters()])

    with pytest.raises(Diverged) as stopped:
        train_one_epoch(state, dataset, Spoilt(3), Recipe(2), CPU, keep)
    rows = plan_epoch(dataset.table.targets, Recipe(2), CPU, 0)[2].batches[0]
    assert all(dataset.table.series_ids[row] in str(stopped.value) for row in rows)
    assert "epoch 1, after 2 steps" in str(stopped.value)
    assert state.schedule.steps == state.ema.steps == 2
    assert all(torch.equal(a, b) for a, b in zip(seen[1], model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_is_skipped_in_mixed_precision_and_spoils_no_figure(tmp_path):
    """The epoch is that of a plain loop over the steps that were taken: its loss, and every weight."""
    dataset, recipe = small_scans(tmp_path, 6, unknown=0.4), Recipe(2)
    mixed = Runtime(CPU.device, torch.bfloat16)
    state, plain = (small_state(small_classifier(dropout=0.0), ema=True) for _ in range(2))
    figures = train_one_epoch(state, dataset, Spoilt(2), recipe, mixed)
    assert (state.skipped, state.schedule.steps, state.ema.steps) == (1, 2, 2)
    first, _, third = plan_epoch(dataset.table.targets, recipe, CPU, 0)
    losses = []
    for window in (first, third):
        batch = dataset.__getitems__(window.batches[0])
        losses.append(fs.forward_backward(plain, batch, MultilabelBCELoss(), recipe, mixed, window.known, True))
        settle_step(plain, optimizer_step(plain, 1.0), [], True)
    assert figures["train_loss"] == pytest.approx(sum(losses).item() / (first.known + third.known))
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), plain.model.parameters(), strict=True))


def test_an_infinite_loss_with_a_finite_gradient_is_not_stepped_on(tmp_path):
    class Infinite(MultilabelBCELoss):
        def forward(self, logits, targets, reduction="mean"):
            return super().forward(logits, targets, reduction) + math.inf

    dataset, state = small_scans(tmp_path, 2), small_state(small_classifier())
    with pytest.raises(Diverged, match="scan_00"):
        train_one_epoch(state, dataset, Infinite(), Recipe(2), CPU)


def test_a_step_that_lacks_a_scan_is_taken_back_to_its_beginning(tmp_path, monkeypatch):
    """Weights, figures and running statistics are then those of the last whole step, and can be saved."""
    monkeypatch.setattr(fs, "READ_DELAYS", ())
    dataset, model = small_scans(tmp_path, 8), small_classifier(dropout=0.0)
    model.register_buffer("seen", torch.zeros(()))

    def count(*_):  # as BatchNorm does
        model.seen += 1

    model.register_forward_hook(count)
    state, recipe = small_state(model, ema=True), Recipe(1, accumulation=3)
    plan = plan_epoch(dataset.table.targets, recipe, CPU, 0)
    dataset.table.paths[plan[1].batches[2][0]].unlink()
    after = []

    def keep():
        after.append([t.clone() for t in (*model.state_dict().values(), state.loss_sum)] + [dict(state.tally)])

    with pytest.raises(BadVolume):
        train_one_epoch(state, dataset, MultilabelBCELoss(), recipe, CPU, keep)
    assert (state.micro, state.schedule.steps, model.seen.item()) == (3, 1, 3)
    found = [*model.state_dict().values(), state.loss_sum]
    assert all(torch.equal(a, b) for a, b in zip(after[0], found, strict=False))
    assert after[0][-1] == state.tally
    assert all(p.grad is None for p in model.parameters())


def test_ten_skipped_steps_in_a_row_end_a_run_in_mixed_precision():
    state = small_state(small_classifier(), amp=True)
    for _ in range(9):
        settle_step(state, math.inf, ["x"], may_skip=True)
    settle_step(state, 1.0, ["x"], may_skip=True)
    for _ in range(9):
        settle_step(state, math.nan, ["x"], may_skip=True)
    with pytest.raises(Diverged):
        settle_step(state, math.nan, ["x"], may_skip=True)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_predict_returns_each_row_once_in_order_whatever_the_batches(tmp_path, batch_size):
    dataset, model = small_scans(tmp_path, 7), small_classifier().eval()
    logits = predict(model, dataset, Recipe(batch_size), CPU)
    assert logits.shape == (7, 3)
    with torch.no_grad():
        for row in range(7):
            assert np.array_equal(logits[row], model(dataset[row]["volume"][None])[0].numpy())


@pytest.mark.parametrize(("n", "batch_size", "ranks"), [(7, 1, 2), (7, 2, 3), (6, 3, 2), (2, 1, 3)])
def test_ranks_are_asked_after_the_same_batches_of_a_prediction(tmp_path, monkeypatch, n, batch_size, ranks):
    """Or a question to all of them would wait for ever."""
    monkeypatch.setattr(fs, "gather_rows", lambda runtime, rows, values: (rows, values))
    dataset, model, asked = small_scans(tmp_path, n), small_classifier(), []
    for rank in range(ranks):
        calls = []
        runtime = Runtime(CPU.device, None, rank, ranks)
        predict(model, dataset, Recipe(batch_size), runtime, after_batch=lambda calls=calls: calls.append(1))
        asked.append(len(calls))
    assert asked == [n // ranks // batch_size] * ranks


@pytest.fixture
def free_order():
    """What add_in_fixed_order sets is of the whole process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def test_kernels_add_in_a_fixed_order_or_the_log_says_that_they_do_not(free_order, caplog, monkeypatch):
    model = small_classifier(skip_air=True)
    sample = fs.sample_volume(model, (1, 64, 16, 16), CPU)
    fs.add_in_fixed_order(model, sample, CPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert not caplog.records
    assert all(p.grad is None for p in model.parameters())
    model.pool.forward = lambda features: (features.new_zeros(1, 32).put_(torch.arange(32), features[0, 0]), None)
    fs.add_in_fixed_order(model, sample, CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic  # nor is its price paid
    assert "to rounding only" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: illegal")])
def test_any_other_error_is_not_taken_for_a_kernel_without_an_order(free_order, monkeypatch, caplog, error):
    model = small_classifier()

    def fail(volume):
        raise error

    model.forward = fail
    with pytest.raises(type(error), match="CUDA"):
        fs.add_in_fixed_order(model, fs.sample_volume(model, (1, 4, 16, 16), CPU), CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not caplog.records


class Bar:
    """A progress bar that keeps what it shows."""

    disable = False

    def __init__(self, title, total, runtime):
        self.total, self.done, self.shown = total, 0, []

    def update(self, n=1):
        self.done += n

    def set_postfix(self, **shown):
        self.shown.append((self.done, shown))

    def close(self):
        assert self.done == self.total


def test_the_bar_shows_the_running_loss_over_known_labels_and_the_rate(tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(fs, "progress_bar", lambda *told: bars.append(Bar(*told)) or bars[-1])
    dataset, state = small_scans(tmp_path, 7, unknown=0.4), small_state(small_classifier(dropout=0.0), lr=1e-30)
    recipe = Recipe(1, 2, log_interval=3)
    figures = train_one_epoch(state, dataset, MultilabelBCELoss(), recipe, CPU)
    shown = dict(bars[0].shown)
    assert list(shown) == [4, 6, 7]  # the first step that ends after every third pass, and the epoch's last
    windows = plan_epoch(dataset.table.targets, recipe, CPU, 0)
    logits = predict(state.model, dataset, Recipe(4), CPU)
    rows = [row for window in windows[:2] for batch in window.batches for row in batch]
    loss = MultilabelBCELoss()(torch.from_numpy(logits[rows]), torch.from_numpy(dataset.table.targets[rows]))
    assert float(shown[4]["loss"]) == pytest.approx(loss.item(), abs=1e-4)
    assert float(shown[7]["loss"]) == pytest.approx(figures["train_loss"], abs=1e-4)
    assert float(shown[4]["lr"]) == 1e-30


def test_training_gives_the_same_weights_twice(tmp_path):
    dataset, results = small_scans(tmp_path, 6), []
    for noise in (0, 1):
        state = small_state(small_classifier(dropout=0.3))
        torch.manual_seed(noise)  # what ran before must not matter
        figures = train_one_epoch(state, dataset, MultilabelBCELoss(), Recipe(2, augment="none"), CPU)
        figures.pop("seconds")
        results.append((figures, [p.detach().clone() for p in state.model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
