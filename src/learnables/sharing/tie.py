"""Tie parameters and keep them tied through everything that replaces Parameters.

A plain tie registers one Parameter under two names, as torch's users do by hand. What breaks such
ties by hand are ``to_empty`` and ``load_state_dict(assign=True)``, which make a new Parameter for
each name; here the model ties them again afterwards.

A transposed tie has no second Parameter: the target becomes a read-only property of its module, a
transposed view of the source, so there is nothing that could be counted, stepped or saved twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from learnables.arguments import as_annotated, optimizers_in
from learnables.conversion import after_conversion
from learnables.entries import Entry, Place, entries
from learnables.errors import ConstraintError, ShapeError, lay_out
from learnables.notes import Note, Statement, caller, notes_of, put_note
from learnables.select import select
from learnables.sharing.transposed import is_transposed, make_transposed, unmake_transposed

_ATTRIBUTE = "_learnables_ties"


@as_annotated
def tie(
    model: nn.Module,
    target: str,
    source: str,
    transpose: bool = False,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> nn.Parameter:
    """Make ``target`` another name of the Parameter that ``source`` names.

    One Parameter, one optimizer state, stored once. The tie holds through ``deepcopy``, pickling,
    ``.to()``, ``to_empty``, ``load_state_dict(assign=True)``, DDP, and FSDP2 where both owners are
    in one group. A checkpoint with two different values for the two names is refused.

    Tie before the optimizer is built, or pass it: otherwise it goes on holding the old target.

    Args:
        model: The model that has both.
        target: Qualified name of the parameter to give up, e.g. ``"head.weight"``.
        source: Qualified name of the parameter to keep, e.g. ``"embedding.weight"``.
        transpose: Make the target the transpose of the source: a read-only view, not registered.
        optimizer: Optimizers that hold the old target; it is taken out of them.

    Returns:
        The shared Parameter.

    Raises:
        SelectionError: A name is not a parameter of ``model``.
        ShapeError: Shapes, dtypes or devices do not fit.
        ConstraintError: One of the two is parametrized, both are constrained differently, or a
            constrained target would be transposed.

    Example:
        >>> class Coder(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encode = nn.Linear(8, 3, bias=False)
        ...         self.decode = nn.Linear(3, 8, bias=False)
        ...     def forward(self, x):
        ...         return self.decode(self.encode(x))
        >>> model = Coder()
        >>> _ = ln.tie(model, "decode.weight", "encode.weight", transpose=True)
        >>> [name for name, _ in model.named_parameters()]
        ['encode.weight']
        >>> torch.equal(model.decode.weight, model.encode.weight.T)
        True
    """
    new, old = _find(model, source), _find(model, target)
    _refuse_parametrized(new, old)
    _refuse_shapes(new[0], old[0], transpose)
    shared, gone = new[0].param, old[0].param
    place, home = old[1], new[0].places[0]
    if transpose and gone is shared:
        raise ConstraintError(
            "a parameter cannot be its own transpose",
            where=", ".join(new[0].names),
            found="one Parameter under both names",
            wanted="two Parameters, or transpose=False",
        )
    constraint = _common_constraint(new[0], old[0], transpose)
    ties = _ties_of(model)
    ties[:] = [t for t in ties if (t.owner, t.local_name) != (place.owner, place.local_name)]
    made = Tie(place.owner, place.local_name, home.owner, home.local_name, transpose)
    if transpose:
        note = Note(declared=Statement({"tied_to": home.name}, caller(), "ln.tie"))
        put_note(place.owner, place.local_name, note)
        make_transposed(place.owner, place.local_name, home.owner, home.local_name)
    ties.append(made)
    made.restore_()
    if constraint is not None and shared.device.type != "meta":
        with torch.no_grad():
            shared.copy_(constraint.project(shared))
    if gone is not shared:
        for opt in optimizers_in(optimizer):
            _take_out(opt, gone, shared)
    return shared


@as_annotated
def untie(model: nn.Module, target: str) -> nn.Parameter:
    """Give ``target`` a Parameter of its own again, with the value it has now.

    An optimizer has to be given the new Parameter.

    Args:
        model: The model.
        target: The name that `tie` was given, or one of several names of a Parameter shared by
            hand.

    Returns:
        The new Parameter.

    Raises:
        ConstraintError: ``target`` shares its Parameter with no other name.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = ln.tie(model, "1.weight", "0.weight")
        >>> ln.untie(model, "1.weight") is model[0].weight
        False
    """
    owner, local_name = _split(model, target)
    value = getattr(owner, local_name, None) if owner is not None else None
    transposed = owner is not None and is_transposed(owner, local_name)
    shared = transposed or (
        isinstance(value, nn.Parameter)
        and any(value is e.param and len(e.places) > 1 for e in entries(model))
    )
    if owner is None or not isinstance(value, Tensor) or not shared:
        raise ConstraintError(
            "nothing is shared under this name",
            where=target,
            found="a parameter of its own" if isinstance(value, Tensor) else "no parameter",
            wanted="a name that ln.tie was given",
        )
    if transposed:
        unmake_transposed(owner, local_name)
        notes_of(owner).pop(local_name, None)
    for module in model.modules():
        kept = module.__dict__.get(_ATTRIBUTE, [])
        kept[:] = [t for t in kept if (t.owner, t.local_name) != (owner, local_name)]
    param = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    owner._parameters[local_name] = None
    setattr(owner, local_name, param)
    return param


@final
@dataclass(eq=False)
class Tie:
    """One tie: who gave up a Parameter, and whose Parameter it has now."""

    owner: nn.Module
    local_name: str
    source: nn.Module
    source_name: str
    transpose: bool
    from_target: bool = False  # the file that is being loaded names the target only

    def restore_(self) -> None:
        """Register the source's Parameter under the target again, where it is another one."""
        if self.from_target:
            self.from_target = False
            self.source._parameters[self.source_name] = self.owner._parameters[self.local_name]
        param = self.source._parameters.get(self.source_name)
        if not self.transpose and param is not None:
            self.owner._parameters[self.local_name] = param


def _ties_of(model: nn.Module) -> list[Tie]:
    """The live list of ties that ``model`` keeps; the first call installs what keeps them."""
    if _ATTRIBUTE not in model.__dict__:
        model.__dict__[_ATTRIBUTE] = []
        after_conversion(model, _restore)
        model.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]
    ties: list[Tie] = model.__dict__[_ATTRIBUTE]
    return ties


def _restore(model: nn.Module) -> None:
    for made in model.__dict__.get(_ATTRIBUTE, ()):
        made.restore_()


def _after_loading(model: nn.Module, _: object) -> None:
    _restore(model)  # assign=True has made two Parameters of one


def _before_loading(
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Refuse two values for one tie; note which side the file names."""
    names = {module: name for name, module in model.named_modules()}
    for made in model.__dict__[_ATTRIBUTE]:
        if made.owner not in names or made.source not in names:
            continue
        target = prefix + ".".join(filter(None, (names[made.owner], made.local_name)))
        source = prefix + ".".join(filter(None, (names[made.source], made.source_name)))
        a, b = state.get(target), state.get(source)
        if isinstance(a, Tensor):
            a = a.mT if made.transpose else a
            if not isinstance(b, Tensor):
                # Not filled in for a plain tie: safetensors' load_model counts on the name that
                # its file leaves out being reported as missing.
                made.from_target = not made.transpose
                if made.transpose:
                    state[source] = a
            elif a is not b and (a.shape != b.shape or not torch.equal(a, b)):
                errors.append(
                    lay_out(
                        "the file has two different values for one tied parameter",
                        where=f"{source}, {target}",
                        found="the largest difference is "
                        + (f"{float((a - b).abs().max()):.2g}" if a.shape == b.shape else "shape"),
                        wanted="equal values, or no tie",
                        mend=f"ln.untie(model, {target.removeprefix(prefix)!r})",
                    )
                )
            if made.transpose:
                del state[target]


def _find(model: nn.Module, name: str) -> tuple[Entry, Place]:
    (entry,) = (
        select(entries(model), lambda e: name in (*e.names, *e.plain_names))
        if any(name in (*e.names, *e.plain_names) for e in entries(model))
        else select(entries(model), name)
    )
    named = zip(entry.places, entry.plain_names, strict=True)
    return entry, next(place for place, plain in named if name in (place.name, plain))


def _split(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    path, _, local_name = name.rpartition(".")
    try:
        return model.get_submodule(path), local_name
    except AttributeError:
        return None, local_name


def _refuse_parametrized(*found: tuple[Entry, Place]) -> None:
    for entry, place in found:
        if isinstance(place.owner, parametrize.ParametrizationList):
            raise ConstraintError(
                "a parametrized parameter cannot be tied: its value is computed on access",
                where=entry.name,
                found=type(place.owner).__name__,
                wanted="a plain Parameter; tie first, then constrain the shared one",
                mend=f"ln.unconstrain(model, {entry.name!r})",
            )


def _refuse_shapes(new: Entry, old: Entry, transpose: bool) -> None:
    if transpose and new.param.ndim < 2:
        raise ShapeError(
            "only matrices have a transpose",
            where=new.name,
            found=new.looks,
            wanted="two dimensions or more",
        )
    wanted = new.param.mT if transpose else new.param
    if (old.shape, old.dtype, old.param.device) != (wanted.shape, wanted.dtype, wanted.device):
        swapped = old.param.ndim >= 2 and not transpose and old.param.mT.shape == new.shape
        raise ShapeError(
            "these two parameters cannot be one",
            where=f"{old.name}, {new.name}",
            found=f"{old.name}: {old.looks}; {new.name}: {new.looks}",
            wanted=f"shape {tuple(wanted.shape)}, the same dtype and device",
            mend=f"ln.tie(model, {old.name!r}, {new.name!r}, transpose=True)" if swapped else "",
        )


def _common_constraint(new: Entry, old: Entry, transpose: bool) -> Any:
    """The constraint that the target brings to a source without one.

    Raises:
        ConstraintError: Both have one and they differ, or the target of a transposed tie has one.
    """
    mine = [p.note.get("constraint") for p in new.places if p.note.get("constraint") is not None]
    other = [p.note.get("constraint") for p in old.places if p.note.get("constraint") is not None]
    if other and (transpose or (mine and mine[0] != other[0])):
        raise ConstraintError(
            "both sides of the tie are constrained" if mine else "the constrained side is given up",
            where=f"{new.name}, {old.name}",
            found=f"{old.name}: {other[0]!r}" + (f"; {new.name}: {mine[0]!r}" if mine else ""),
            wanted=f"a constraint on {new.name} only",
            mend=f"ln.unconstrain(model, {old.name!r})",
        )
    return other[0] if other and not mine else None


def _take_out(optimizer: Optimizer, gone: nn.Parameter, shared: nn.Parameter) -> None:
    """Remove ``gone`` from its group, or put ``shared`` in its place where nobody steps that."""
    held = any(p is shared for group in optimizer.param_groups for p in group["params"])
    for group in optimizer.param_groups:
        at = [i for i, p in enumerate(group["params"]) if p is gone]
        for i in at:
            if held:
                del group["params"][i]
                if "param_names" in group:
                    del group["param_names"][i]
            else:
                group["params"][i] = shared
    optimizer.state.pop(gone, None)
