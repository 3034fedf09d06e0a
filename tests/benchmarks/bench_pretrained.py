"""Peak memory of loading a backbone, as a multiple of its file, against reading the whole file into memory first.

    python tests/benchmarks/bench_pretrained.py [--width 768 --layers 12]

Each load runs in a process of its own, which has imported everything and loaded a tiny tower before its memory is
noted, and then loads the file and passes one image through, so that every weight has been touched. Mapped pages of the
file count like any other memory here, although the system can drop them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

CHILD = """
import json, sys, time
sys.path.insert(0, {root!r})
import torch
import finetune_siglip as fs
from transformers import SiglipVisionConfig, SiglipVisionModel

def load_naively(path):  # what a user of the library writes: build at random, read all, copy over
    model = SiglipVisionModel(SiglipVisionConfig(**settings))
    model.load_state_dict(torch.load(path, weights_only=True) if path.endswith("bin") else load_file(path))
    return lambda images: model(pixel_values=images * 2 - 1).pooler_output

def memory(field):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))

settings, images = {settings!r}, torch.rand(1, 3, 224, 224)
from safetensors.torch import load_file
load = {load}
with torch.no_grad():
    fs.load_backbone({tiny!r})(images[..., :16, :16])
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before, start = memory("VmRSS"), time.perf_counter()
    model = load({path!r})
    seconds = time.perf_counter() - start
    peak_of_load = memory("VmHWM") - before
    model(images)
    print(json.dumps([seconds, peak_of_load, memory("VmHWM") - before]))
"""


def measure(load: str, settings: dict, path: Path, tiny: Path) -> list[float]:
    """Seconds, peak MiB while loading, and peak MiB after a first image, in a new process."""
    code = CHILD.format(root=str(ROOT), settings=settings, load=load, path=str(path), tiny=str(tiny))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    from safetensors.torch import save_file
    from transformers import SiglipVisionConfig, SiglipVisionModel

    settings = {"hidden_size": args.width, "num_hidden_layers": args.layers, "intermediate_size": 4 * args.width}
    settings["num_attention_heads"] = args.width // 64
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder, "tiny.bin")
        small = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "image_size": 16}
        torch.save(SiglipVisionModel(SiglipVisionConfig(**small, num_attention_heads=1)).state_dict(), tiny)
        model = SiglipVisionModel(SiglipVisionConfig(**settings))
        files = {name: Path(folder, name) for name in ("pytorch_model.bin", "model.safetensors")}
        torch.save(model.state_dict(), files["pytorch_model.bin"])
        save_file(model.state_dict(), files["model.safetensors"])
        del model
        for name, path in files.items():
            size = path.stat().st_size / 2**20
            runs: dict[str, list[list[float]]] = {"fs.load_backbone": [], "load_naively": []}
            for _ in range(3):
                for load, results in runs.items():
                    results.append(measure(load, settings, path, tiny))
            for load, results in runs.items():
                seconds, loading, touched = (statistics.median(column) for column in zip(*results, strict=True))
                print(
                    f"{name} ({size:.0f} MiB) {load}: {seconds:.2f} s, peak {loading / size:.2f} x the file while "
                    f"loading, {touched / size:.2f} x with a first image"
                )
                if load == "fs.load_backbone":
                    ratios.append(loading / size)
    print(f"load_memory_ratio={max(ratios):.3f}")


if __name__ == "__main__":
    main()
