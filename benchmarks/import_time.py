"""What ``import learnables`` costs on top of ``import torch``: whole processes, in turns.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

from environment import save

CODE = (
    "import time, torch\n"
    "start = time.perf_counter()\n"
    "import learnables\n"
    "imported = time.perf_counter()\n"
    "learnables.parameter, learnables.param_groups, learnables.inventory\n"
    "print(imported - start, time.perf_counter() - start)\n"
)


def main() -> None:
    rows = []
    for _ in range(9):
        out = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
        )
        rows.append([1e3 * float(number) for number in out.stdout.split()])
    imported, used = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"import learnables: {imported:.1f} ms; with the building half in use: {used:.1f} ms")
    save("import_time", {"import_ms": imported, "import_and_use_ms": used, "runs": len(rows)})


if __name__ == "__main__":
    main()
