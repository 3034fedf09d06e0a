"""Does an explanation point at the finding? Measured on phantoms, where the place of each planted finding is known.

    python tests/benchmarks/bench_explain.py [--seed 0] [--slice-pooling attention] [--folder DIR]

Makes the phantoms of the demo with their masks, fine-tunes the toy tower on them as the demo does (a minute or two) and
explains every true positive of split test: a finding that was planted and is called at probability 0.5 or above.

`top_slice_in_finding`: in what share of them the first slice shown holds a voxel of the finding's mask.
`relevance_vs_chance`: the share of the relevance in the slices shown that falls inside the mask, over the share that a
map without any knowledge would put there, which is the mask's part of the area shown; both are means over the true
positives before they are divided, so that no tiny mask makes a huge ratio. Where the slices shown miss the finding the
share is 0 and chance is the mask's part of the whole scan. Printed beside it: a stricter chance, of a map that knows
the body's outline but nothing else; and how often the slice with the largest attention weight lies in the finding (the
same slice for all labels, or with `--slice-pooling label` each label's own share).
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import finetune_siglip as fs
import phantoms

TRAINING = [
    *("--epochs", 30, "--batch-size", 8, "--lr", 3e-3, "--scheduler", "cosine", "--warmup", 20, "--num-slices", 24),
    *("--use-ema", "--freeze-up-to", "all", "--num-workers", 0, "--wandb-mode", "disabled", "--bootstrap", 0),
    "--overwrite",
]


def train(folder: Path, seed: int, pooling: str) -> tuple[fs.SiglipClassifier, fs.CTVolumeDataset]:
    """The demo's run on phantoms of this seed; its best model and the scans of split test."""
    table = phantoms.write_dataset(folder, 160, 48, 64, seed=seed, save_masks=True)
    argv = ["--csv", table, "--pretrained", ROOT / "tests" / "assets" / "tiny-siglip", "--output-dir", folder / "run"]
    argv += [
        "--cache-features",
        folder / "features",
        *TRAINING,
        "--slice-pooling",
        pooling,
        "--label-columns",
        *phantoms.FINDINGS,
    ]
    if code := fs.main([str(word) for word in argv]):
        raise SystemExit(code)
    content = fs.load_checked(folder / "run" / "best_model.pth", fs.MODEL_KIND)
    rows = fs.read_table(table, content["labels"]).split("test")
    dataset = fs.CTVolumeDataset(rows, fs.Preprocessing.from_dict(content["preprocessing"]))
    return fs.classifier_from(content).eval(), dataset


@torch.no_grad()
def examine(model: fs.SiglipClassifier, dataset: fs.CTVolumeDataset) -> dict[str, list[list[float]]]:
    """For each finding and true positive: top slice inside, the same by attention, by chance; share, chance, body's."""
    table, found = dataset.table, {label: [] for label in dataset.table.labels}
    for row, path in enumerate(table.paths):
        volume, masks = dataset[row]["volume"][None], np.load(path.with_name(f"{path.stem}_mask.npz"))
        features = model.slice_features(volume)
        logits, shares = (x[0] for x in model.weigh(features))  # (L,), (S, 1 or L)
        by_attention = shares.expand(-1, len(logits)).argmax(0).tolist()
        called = [i for i in range(len(table.labels)) if table.targets[row, i] == 1 and logits[i] >= 0]
        body = body_of(volume[0, 0].numpy() > -500)
        for i, evidence in zip(called, fs.find_evidence(model, volume, called), strict=True):
            mask = masks[table.labels[i]]
            assert mask.shape == volume.shape[2:], "the model must see the phantoms at their own grid"
            shown, inside = mask[evidence.slices], mask.any((1, 2))
            share = (evidence.maps * shown).sum() / max(evidence.maps.sum(), 1e-12)
            seen = body[evidence.slices] | shown
            chance = [shown.mean(), shown.sum() / seen.sum()] if shown.any() else [mask.mean(), mask.sum() / body.sum()]
            found[table.labels[i]].append(
                [inside[evidence.slices[0]], inside[by_attention[i]], inside.mean(), share, *chance]
            )
    return found


def body_of(tissue: np.ndarray) -> np.ndarray:
    """The body (D, H, W): tissue and what it encloses within each slice."""
    from scipy import ndimage

    return np.stack([ndimage.binary_fill_holes(plane) for plane in tissue])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure explanations on phantoms.")
    parser.add_argument("--seed", type=int, default=0, help="of the phantoms [0]")
    parser.add_argument("--folder", type=Path, help="keep phantoms and run there [a temporary folder]")
    parser.add_argument("--slice-pooling", default="attention", help="attention, label, mean or max [attention]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = examine(*train(args.folder or Path(temporary), args.seed, args.slice_pooling))
    print(f"\n{'true positives of':36}    n   top slice in finding:      relevance inside, against chance")
    print(f"{'':36}        ours attention chance    share     area  ratio  body's")
    rows = {label: np.array(values, float) for label, values in found.items() if values}
    rows["all"] = np.concatenate(list(rows.values()))
    for label, values in rows.items():
        top, attention, random, share, area, body = values.mean(0)
        print(f"{label:36} {len(values):4} {top:11.2f} {attention:9.2f} {random:6.2f} {share:8.3f} {area:8.4f} "
              f"{share / area:6.1f} {share / body:7.1f}")  # fmt: skip
    print(f"top_slice_in_finding={top:.3f} relevance_vs_chance={share / area:.2f} true_positives={len(values)}")


if __name__ == "__main__":
    main()
