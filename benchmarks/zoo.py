"""What the audit finds in the zoo of real bugs, and how often it accuses a healthy program.

    python benchmarks/zoo.py

One process for all programs. Beside it, measured on the 125 bugs and 20 healthy programs that the
zoo was drawn from: the article's three prints 41 and 1, torcheck 1.0.1 44 and 6, torchtest 0.5 42
and 7, torch-audit 0.3.0 (warnings) 6 and 2, a graph walk 18 and 2, all existing tools together 56.
"""

import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from environment import save
from tests.zoo.scoring import cases, load, outcome


def main() -> None:
    warnings.simplefilter("ignore")
    found: Counter[str] = Counter()
    total: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    alarms = []
    for path in cases("b"):
        case = load(path)
        stage = case.STAGE
        total[stage] += 1
        told = outcome(path, "build")
        found[stage] += bool(told.hits)
        found["blind"] += bool(outcome(path, "build", blind=True).hits)
        if hasattr(case, "GUILTY"):
            lines["of"] += 1
            lines["right"] += any(case.GUILTY in finding.quote for finding in told.hits)
        if any(outcome(path, "build_fixed", blind=blind).loud for blind in (False, True)):
            alarms.append(path.stem)
    healthy = cases("n")
    for path in healthy:
        if any(outcome(path, "build", blind=blind).loud for blind in (False, True)):
            alarms.append(path.stem)
    bugs = sum(total.values())
    named = sum(found[stage] for stage in total)
    print(f"{'stage':12s} found of")
    for stage in sorted(total):
        print(f"{stage:12s} {found[stage]:5d} {total[stage]:3d}")
    print(f"{'all':12s} {named:5d} {bugs:3d}")
    print(f"{'told nothing':12s} {found['blind']:5d} {bugs:3d}")
    print(f"guilty line named: {lines['right']} of {lines['of']}")
    print(f"false alarms: {len(alarms)} of {bugs + len(healthy)} {' '.join(alarms)}")
    rows = {
        "found": named,
        "found_told_nothing": found["blind"],
        "bugs": bugs,
        "by_stage": {stage: [found[stage], total[stage]] for stage in sorted(total)},
        "guilty_lines": [lines["right"], lines["of"]],
        "false_alarms": alarms,
        "healthy": bugs + len(healthy),
    }
    save("zoo", rows)


if __name__ == "__main__":
    main()
