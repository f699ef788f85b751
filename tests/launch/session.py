"""Run many checks in one group of processes, and tell each of them apart afterwards."""

import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from tests.gloo import spawn

Check = Callable[[Path], None]


def outcomes(checks: Sequence[Check], ranks: int, folder: Path) -> dict[str, list[str]]:
    """Run ``check(folder)`` on every rank, one after the other: name → the traceback of each rank.

    An empty text is a check that passed.
    """
    spawn(_all, ranks, list(checks), folder)
    said = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {check.__name__: [one[check.__name__] for one in said] for check in checks}


def _all(rank: int, checks: Sequence[Check], folder: Path) -> None:
    said = {}
    for check in checks:
        own = folder / check.__name__
        own.mkdir(exist_ok=True)
        try:
            check(own)
            said[check.__name__] = ""
        except BaseException:
            said[check.__name__] = traceback.format_exc()
        dist.barrier()
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
