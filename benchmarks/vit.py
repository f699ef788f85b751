"""The ViT recipe over several seeds: python benchmarks/vit.py digits fashion-mnist.

Writes results/vit_digits.json and results/vit_fashion.json. Each seed is a run of the command that
a user types, in a process of its own. digits takes about a minute a seed on two cores,
fashion-mnist some minutes; ``fashion-mnist-gpu`` needs a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import save

# preset -> (file, seeds, lowest mean, lowest of all)
TARGETS = {
    "digits": ("vit_digits", (0, 1, 2), 0.980, 0.970),
    "fashion-mnist": ("vit_fashion", (0,), 0.85, 0.85),
    "fashion-mnist-gpu": ("vit_fashion_gpu", (0,), 0.94, 0.94),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["digits"], choices=list(TARGETS))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=None, help="keep the runs here")
    given = parser.parse_args()
    missed = [p for p in given.presets if not measure(p, given.threads, given.out)]
    sys.exit(f"below the target: {', '.join(missed)}" if missed else 0)


def measure(preset: str, threads: int, out: Path | None) -> bool:
    name, seeds, least_mean, least = TARGETS[preset]
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one(preset, seed, threads, out or Path(folder)))
        row = rows[-1]
        print(
            f"{preset:18} seed {seed}: {row['accuracy']:.2%}, {row['parameters']:,} parameters, "
            f"training {row['training_seconds']:.0f} s, command {row['command_seconds']:.0f} s",
            flush=True,
        )
    accuracies = [row["accuracy"] for row in rows]
    mean = statistics.mean(accuracies)
    reached = mean >= least_mean and min(accuracies) >= least
    print(f"{preset:18} mean {mean:.2%}, lowest {min(accuracies):.2%} (wanted {least_mean:.1%}, "
          f"{least:.1%}): {'reached' if reached else 'missed'}")  # fmt: skip
    print(save(name, rows, preset=preset, mean=mean, lowest=min(accuracies), threads=threads))
    return reached


def one(preset: str, seed: int, threads: int, out: Path) -> dict[str, object]:
    """Run the command once; what its folder says."""
    run = f"{preset}-{seed}"
    command = ["train", "vit", f"--preset={preset}", f"--seed={seed}", f"--threads={threads}"]
    begun = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "learnables", *command, f"--name={run}", f"--out={out}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - begun
    result = json.loads((out / run / "result.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "accuracy": result["accuracy"],
        "parameters": result["parameters"],
        "steps": result["steps"],
        "training_seconds": round(result["seconds"], 1),
        "command_seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
