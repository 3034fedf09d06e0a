"""What saving the state costs, against the time of an epoch of real size.

    python tests/benchmarks/bench_save.py [--epoch-minutes 20]

The model is SigLIP base (93 M parameters) with AdamW and averaged weights, as it lies on the disk in --folder; an epoch
of a few thousand volumes takes tens of minutes on one GPU. One save per epoch: the checkpoint, the state with its
reading back, and what follows from them. Last line: save_seconds=... state_mb=... percent_of_epoch=...
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epoch-minutes", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", help="where to write [the system's temporary folder]")
    args = parser.parse_args()
    from finetune_siglip import (
        History,
        RunFolder,
        SiglipClassifier,
        build_backbone,
        checkpoint_name,
        pack_model,
        pack_state,
        save_checked,
        tensor_bytes,
    )  # fmt: skip
    from helpers import CHEST, SMALL_TOWER, small_state

    size = {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": 12,
            "intermediate_size": 4 * args.width, "patch_size": 16, "image_size": 224}  # fmt: skip
    state = small_state(SiglipClassifier(build_backbone({**SMALL_TOWER, **size}), CHEST, "hu", 18), ema=True)
    for parameter in state.model.parameters():
        parameter.grad = parameter.detach() * 1e-3
    state.optimizer.step()
    times = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run, history = RunFolder(Path(folder)), History()
        for epoch in range(1, args.repeats + 1):
            started = time.perf_counter()
            content = pack_model(state.model, {}, epoch, {})
            history.offer(0.5, epoch)
            if checkpoint_name(epoch) in history.names:
                save_checked(Path(folder) / checkpoint_name(epoch), content)
            packed = pack_state(state, [0.0], history, {})
            run.commit(packed)
            run.derive(history)
            times.append(time.perf_counter() - started)
    seconds, megabytes = statistics.median(times), tensor_bytes(packed) / 2**20
    share = 100 * seconds / (60 * args.epoch_minutes)
    print(f"save_seconds={seconds:.1f} state_mb={megabytes:.0f} percent_of_epoch={share:.2f}")


if __name__ == "__main__":
    main()
