"""Write the pages that are made from docstrings: one per audit rule, and their index.

``python docs/generate.py`` writes them; with ``--check`` it exits with 1 if one is out of date.
"""

import sys
from pathlib import Path

from learnables.auditing.rule import FAMILIES, Rule, load_rules

FOLDER = Path(__file__).parent / "en" / "rules"
NEEDS = {1: "the model", 2: "an optimizer", 3: "an observed backward", 4: "an observed step"}


def pages() -> dict[Path, str]:
    """Path → text of every generated page."""
    rules = load_rules().values()
    out = {FOLDER / f"{rule.code}.md": page(rule) for rule in rules}
    lines = ["# Rules", "", "Written from the docstrings of the rules by `make docs`."]
    for digit, family in FAMILIES.items():
        members = [rule for rule in rules if rule.code[3] == digit]
        if members:
            lines += ["", f"## {digit}: {family}", ""]
            lines += ["| code | name | severity | finds |", "|---|---|---|---|"]
            lines += [row(rule) for rule in members]
    out[FOLDER / "README.md"] = "\n".join(lines) + "\n"
    return out


def page(rule: Rule) -> str:
    """The page of one rule, with a line about what it is and what it needs."""
    title, _, rest = rule.page.partition("\n\n")
    family = FAMILIES[rule.code[3]]
    facts = f"{rule.severity} · {family} · needs {NEEDS[rule.needs]} · [all rules](README.md)"
    return f"{title}\n\n{facts}\n\n{rest}"


def row(rule: Rule) -> str:
    """The line of one rule in the index."""
    title = rule.title.replace("|", "\\|")
    return f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.severity} | {title} |"


def main(arguments: list[str]) -> int:
    """Write or check; the exit status."""
    wanted = pages()
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text("utf-8") != text]
    extra = sorted(set(FOLDER.glob("*.md")) - set(wanted))
    if "--check" in arguments:
        for path in (*stale, *extra):
            print(f"{path.relative_to(FOLDER.parents[2])} is out of date; mend: make docs")
        return 1 if stale or extra else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(wanted[path], "utf-8")
    for path in extra:
        path.unlink()
    print(f"{len(wanted)} pages in docs/en/rules, {len(stale) + len(extra)} of them changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
