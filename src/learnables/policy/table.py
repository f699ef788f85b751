"""The inventory: every parameter once, as a table that prints and can be asked why."""

import difflib
import io
import shutil
from collections.abc import Iterator
from typing import final

from torch import nn

from learnables._torch import dtype_name
from learnables.arguments import require_text
from learnables.errors import SelectionError
from learnables.policy.resolve import Plan, Policy, resolve
from learnables.select import Selector, select


@final
class Inventory:
    """Every parameter of a model once; index it by name or position, iterate it, print it.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))
        >>> ln.inventory(model)["1.weight"].why
        ['weight_decay=False by default of its kind: norm (timm, nanoGPT, big_vision)']
    """

    def __init__(self, plans: tuple[Plan, ...]) -> None:
        self._plans = plans
        self._by_name = {
            name: plan for plan in plans for name in (*plan.entry.plain_names, *plan.entry.names)
        }

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self._plans)

    def __getitem__(self, key: int | str) -> Plan:
        """The plan at a position, or of the parameter with this name (or one of its names).

        Raises:
            ArgumentError: ``key`` is neither a position nor a name.
            SelectionError: There is no such parameter; the message offers the nearest names.
            IndexError: There is no such position.
        """
        if isinstance(key, int):
            return self._plans[key]
        require_text(key, "key")
        if key not in self._by_name:
            close = difflib.get_close_matches(key, self._by_name, 3, 0.4)
            raise SelectionError(
                "the model has no parameter of this name",
                where=key,
                found=f"{len(self)} parameters, none of them this",
                wanted="a name as named_parameters() gives it",
                mend=f"one of {', '.join(map(repr, close or list(self._by_name)[:3]))}",
            )
        return self._by_name[key]

    def select(self, selector: Selector) -> "Inventory":
        """The part of the inventory that ``selector`` picks; an empty pick is an error."""
        picked = {entry.index for entry in select([p.entry for p in self._plans], selector)}
        return Inventory(tuple(plan for plan in self._plans if plan.entry.index in picked))

    @property
    def counts(self) -> dict[str, int]:
        """Parameters, values, bytes; how many train, decay, and are tied."""
        found = [plan.entry for plan in self._plans]
        return {
            "parameters": len(found),
            "values": sum(e.param.numel() for e in found),
            "bytes": sum(e.param.numel() * e.param.element_size() for e in found),
            "trainable": sum(e.trainable for e in found),
            "decayed": sum(p.weight_decay is not False for p in self._plans if p.entry.trainable),
            "tied": sum(len(e.places) > 1 for e in found),
        }

    def __str__(self) -> str:
        return self._render(shutil.get_terminal_size((80, 24)).columns)

    __repr__ = __str__

    def _render(self, width: int) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("parameter", "shape", "dtype", "kind", "decay", "lr"):
            table.add_column(title, no_wrap=title != "parameter", overflow="fold")
        for plan in self._plans:
            entry = plan.entry
            name = "\n  = ".join(_printable(n) for n in entry.plain_names)
            table.add_row(
                Text(name),
                "×".join(map(str, entry.shape)) or "()",
                dtype_name(entry.dtype),
                plan.kind.name,
                _say_decay(plan),
                "frozen" if not entry.trainable else f"×{plan.lr_scale:g}",
            )
        out = io.StringIO()
        Console(file=out, width=width, color_system=None).print(table)
        c = self.counts
        lines = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
        total = (
            f"{c['parameters']} parameters, {c['values']:,} values, {c['bytes']:,} bytes; "
            f"{c['trainable']} trainable, {c['decayed']} decayed, {c['tied']} tied"
        )
        return "\n".join([*lines, "", total])


def _say_decay(plan: Plan) -> str:
    said = plan.weight_decay
    if isinstance(said, bool):
        return "yes" if said else "no"
    return "to init" if said == "init" else f"{said:g}"


def _printable(name: str) -> str:
    """A name is hostile input: control characters would move the reader's cursor."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)


def inventory(model: nn.Module, policy: Policy | None = None) -> Inventory:
    """Every parameter of ``model`` once: names, shape, kind, plan, and which line decided it.

    Args:
        model: The model, bare or wrapped, also on the meta device.
        policy: What would be given to `ln.param_groups`.

    Returns:
        An `Inventory`; ``print`` shows it as a table with counts,
        ``inventory["blocks.0.mix"].why`` lists which line decided what.

    Raises:
        PolicyError: Two declarations of one level disagree.
        SelectionError: A selector of ``policy``, or a name asked for, matches nothing.

    Cost:
        One pass over the modules; no tensor is read.
    """
    return Inventory(resolve(model, policy))


__all__ = ["Inventory", "SelectionError", "inventory"]
