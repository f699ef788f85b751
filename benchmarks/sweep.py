"""What a sweep over every architecture of timm and transformers takes, and what it sees.

    .venv-integrations/bin/python benchmarks/sweep.py    # after make test-integrations

The static audit on the meta device, construction included; then the library's own optimizer groups
beside ours. Figures are left out for a library that is not installed.
"""

import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import save
from tests.integrations.shim import ensure_torchvision

from learnables.errors import MissingExtraError
from learnables.integrations.sweep import Sweep, sweep


def row(seen: Sweep) -> dict[str, object]:
    theirs = [d for d in seen.decay if d.decayed_by == "theirs"]
    by_kind = Counter[str]()
    for d in theirs:
        by_kind[d.kind] += d.parameters
    return {
        "architectures": len(seen.audited),
        "not buildable": len(seen.failed),
        "seconds to build": round(seen.seconds_building, 1),
        "seconds to audit": round(seen.seconds_auditing, 1),
        "findings": dict(Counter(f"{f['code']} {f['severity']}" for f in seen.findings)),
        "found in": sorted({f["architecture"] for f in seen.findings}),
        "decayed by theirs, not by ours": sum(by_kind.values()),
        "in architectures": len({name for d in theirs for name in d.models}),
        "of them": dict(by_kind.most_common()),
    }


def main() -> None:
    torch.set_num_threads(1)
    ensure_torchvision()
    rows = {}
    for library in ("timm", "transformers"):
        try:
            audited = sweep(library)
        except MissingExtraError as error:
            print(error)
            continue
        rows[library] = {
            **row(sweep(library, decay=True)),
            "seconds to build": round(audited.seconds_building, 1),
            "seconds to audit": round(audited.seconds_auditing, 1),
        }
        for key, value in rows[library].items():
            print(f"{library:14} {key:32} {value}")
    save("sweep", rows)


if __name__ == "__main__":
    main()
