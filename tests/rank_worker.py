"""What `test_ranks.py` runs under torchrun and, with one process, by itself: the same training at any number of ranks.

python -m torch.distributed.run --nproc-per-node 3 tests/rank_worker.py SCANS_FOLDER OUT.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from finetune_siglip import (
    CTVolumeDataset,
    MultilabelBCELoss,
    Recipe,
    Runtime,
    cache_features,
    compute_metrics,
    distribute,
    freeze_up_to,
    init_runtime,
    plan_epoch,
    predict,
    sigmoid,
    train_one_epoch,
)
from helpers import small_classifier, small_resnet3d_classifier, small_scans, small_state

ALONE = Runtime(torch.device("cpu"))
GLOBAL_BATCH = 6
SCENARIOS = {  # rows, and what is special about the training
    "accumulation": (20, {"accumulation": 2}),  # 12 rows a step, then 8: a short window and an uneven split
    "uneven": (11, {}),
    "fewer rows than ranks": (2, {}),
    "head only": (8, {"freeze": "all"}),
    "cached features": (7, {"freeze": "all", "cache": True}),
}


def train(folder: Path, runtime: Runtime, rows: int, options: dict) -> dict:
    """Two epochs of a scenario; what every rank must agree on, and how often each row was seen by this one."""
    model = small_classifier(dropout=0.0)
    freeze_up_to(model.backbone, options.get("freeze", 5))
    state = small_state(model, ema=True)
    state.model = distribute(model, runtime)
    recipe = Recipe(GLOBAL_BATCH // runtime.world_size, options.get("accumulation", 1))
    dataset = scans_of_all(folder, rows, runtime)
    if "cache" in options:
        dataset = cache_features(folder / "features", model, dataset, recipe, runtime)
    losses, norms, synchronised = [], [], []
    untrained = predict(state.model, dataset, recipe, runtime)
    for _ in range(2):
        figures = train_one_epoch(state, dataset, MultilabelBCELoss(), recipe, runtime)
        losses.append(figures["train_loss"])
        norms.append(figures["grad_norm"])
        if runtime.world_size > 1:
            synchronised.append(state.model._get_ddp_logging_data()["total_parameter_size_bytes"])
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert not synchronised or synchronised[-1] == trained, "frozen parts must not travel"
        state.next_epoch()
    plan = [
        item for window in plan_epoch(dataset.table.targets, recipe, runtime, 0) for b in window.batches for item in b
    ]
    with state.weights:
        logits = predict(state.model, dataset, recipe, runtime)
    metrics = compute_metrics(dataset.table.targets, sigmoid(logits), dataset.table.labels, np.full(3, 0.5))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {
        "losses": losses, "norms": norms, "logits": logits.tolist(), "metrics": counted(metrics),
        "untrained": untrained.tolist(), "weights": float(weights.double().sum()), "rows": [r for r in plan if r >= 0],
    }  # fmt: skip


def train_with_batchnorm(folder: Path, runtime: Runtime) -> dict:
    """What each rank scores after an epoch in which each saw other scans, and what its model gives by itself."""
    dataset, model, recipe = scans_of_all(folder, 12, runtime), small_resnet3d_classifier(3), Recipe(2)
    state = small_state(model)
    state.model = distribute(model, runtime)
    train_one_epoch(state, dataset, MultilabelBCELoss(), recipe, runtime)
    own = model.backbone.net.bn1.running_mean.tolist()
    together = predict(state.model, dataset, recipe, runtime)
    return {"own": own, "together": together.tolist(), "alone": predict(model, dataset, recipe, ALONE).tolist()}


def scans_of_all(folder: Path, rows: int, runtime: Runtime) -> CTVolumeDataset:
    """The same files for all ranks: the first writes them, the others find them there."""
    folder.mkdir(parents=True, exist_ok=True)
    if runtime.rank > 0:
        torch.distributed.barrier()
    dataset = small_scans(folder, rows)
    if runtime.rank == 0 and runtime.world_size > 1:
        torch.distributed.barrier()
    return dataset


def counted(metrics: dict) -> dict:
    """The scores that count or rank scans: the last bits of a probability do not show in them."""
    kinds = ("f1", "auc", "precision", "recall", "accuracy")
    values = {name: value for name, value in metrics.items() if name.endswith(kinds)}
    labels = metrics["per_label"].items()
    return values | {label: {k: v for k, v in scores.items() if k.endswith(kinds)} for label, scores in labels}


def results(folder: Path, runtime: Runtime) -> dict:
    found = {name: train(folder / name, runtime, *scenario) for name, scenario in SCENARIOS.items()}
    return found | {"batchnorm": train_with_batchnorm(folder / "batchnorm", runtime)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = init_runtime(amp=False)
    mine = results(Path(sys.argv[1]), place)
    Path(f"{sys.argv[2]}.{place.rank}").write_text(json.dumps(mine))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
