"""Declare what a parameter is, in the line that makes it: ``parameter`` and ``annotate``."""

import difflib
import threading
from collections.abc import Callable, Iterable
from operator import index
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from learnables._torch import (
    gradient_dtype,
    is_dtensor,
    is_uninitialised,
    keep_gradient_in,
    on_parameter_registration,
)
from learnables.arguments import require_device, require_dtype, require_flag, towards_a_dtype
from learnables.conversion import after_conversion, during_conversion
from learnables.entries import Entry, entries
from learnables.errors import PolicyError, ShapeError
from learnables.init.base import Init, Initializer, initialise_
from learnables.init.fixed import zeros
from learnables.init.random import trunc_normal
from learnables.notes import (
    FIELDS,
    Note,
    Statement,
    add_annotation,
    caller,
    note_of,
    notes_of,
    put_note,
)
from learnables.select import Selector, select
from learnables.strides import fits, laid_out, lay_out_, wanted_strides

WeightDecay: TypeAlias = bool | float | Literal["init"]
ComputeDtype: TypeAlias = torch.dtype | Literal["autocast"]
Resize: TypeAlias = Callable[[Tensor, torch.Size], Tensor]

_PENDING = "_learnables_note"  # on a Parameter between its making and its registration
_HOOKED = "_learnables_hooked"  # on an owner: which of our hooks are in place
_IN_USE = "_learnables_in_use"  # on an owner: how many forwards are running
_hooked = False


def parameter(
    *shape: "int | Tensor",
    init: Init | None = None,
    weight_decay: WeightDecay | None = None,
    lr_scale: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    requires_grad: bool = True,
    storage_dtype: torch.dtype | None = None,
    compute_dtype: ComputeDtype | None = None,
    rounding: Literal["kahan", "stochastic", "master"] | None = None,
    memory_format: torch.memory_format | None = None,
    constraint: object | None = None,
    resize: Resize | None = None,
    role: str | None = None,
    tags: Iterable[str] = (),
) -> nn.Parameter:
    """An ordinary ``nn.Parameter`` that knows how it wants to be trained.

    Assign it like any other: ``self.cls_token = ln.parameter(1, 1, dim, weight_decay=False)``. What
    is declared is kept on the module that owns it, and read by `ln.param_groups`, `ln.attach`,
    `ln.audit` and the checkpoint; torch itself sees a plain Parameter.

    Args:
        shape: Sizes, or one tensor whose values are copied. No size at all makes shape ``(1,)``,
            because FSDP refuses 0-dim parameters; the two load into each other.
        init: One of ``ln.init.*`` or a ``torch.nn.init.*_`` function; ``trunc_normal(0.02)`` where
            neither it nor a tensor is given, zeros for shape ``(1,)``.
        weight_decay: False never, True with the group's coefficient, a float as its own
            coefficient, ``"init"`` toward the initial value (needs `ln.attach`). None leaves it to
            the default of the parameter's kind.
        lr_scale: Multiplied into the learning rate; ≥ 0.
        dtype: Storage dtype; torch's default dtype when None.
        device: Where it lives; torch's default device when None.
        generator: Source of randomness for ``init``.
        requires_grad: False makes a constant that is saved but never trained.
        storage_dtype: Dtype that it keeps whatever the model is converted to: ``torch.float32``
            makes an island that ``model.bfloat16()`` leaves alone. Nothing is kept when None.
        compute_dtype: Dtype it is used in: while its owner's ``forward`` runs, the attribute is the
            Parameter cast to it, also under autocast. The stored Parameter keeps ``dtype``.
            ``"autocast"`` is the dtype of the autocast region that the forward runs in, and
            ``dtype`` outside of one: a token or a scale then promotes nothing.
        rounding: How steps are rounded where ``dtype`` has 16 or 8 bits; see `ln.attach`, which
            does it. It needs nothing where the parameter is stored in float32.
        memory_format: Layout, e.g. ``torch.channels_last`` of a 4-D parameter; kept through
            ``.to(memory_format=…)``, ``load_state_dict(assign=True)``, copies and checkpoints.
            Row-major, and not kept against anybody's will, when None.
        constraint: A set from ``ln.sets`` to keep it in; enforced by `ln.attach`.
        resize: ``resize(value, shape) -> value`` for a checkpoint of another shape.
        role: How the dimensions are meant, where fans depend on it: ``"linear"`` (out, in),
            ``"conv"`` (out, in, …), ``"experts"`` (expert, in, out), ``"projection"`` (in, out).
        tags: Names for ``"tag:…"`` selectors.

    Returns:
        The Parameter. Deep-copying it *before* it is assigned to a module loses the note.

    Raises:
        ShapeError: A size is negative, or sizes and a tensor are mixed.
        PolicyError: A field has a value that means nothing.

    Example:
        >>> import learnables as ln
        >>> class Gate(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.alpha = ln.parameter(weight_decay=False)
        >>> Gate().alpha
        Parameter containing:
        tensor([0.], requires_grad=True)
    """
    require_flag(requires_grad, "requires_grad")
    if dtype is not None:
        require_dtype(dtype, "dtype")
        if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
            raise PolicyError(
                "a parameter of whole numbers has no gradient",
                where="dtype",
                found=f"dtype={dtype}",
                wanted="a floating or complex dtype, or requires_grad=False",
            )
    if device is not None:
        require_device(device, "device")
    if init is None and not (len(shape) == 1 and isinstance(shape[0], Tensor)):
        scalar = not shape or (len(shape) == 1 and shape[0] in ((), [], torch.Size([])))
        init = zeros() if scalar else trunc_normal(0.02)  # noted, so that it can be drawn again
    said = {
        "weight_decay": weight_decay,
        "lr_scale": lr_scale,
        "storage_dtype": storage_dtype,
        "compute_dtype": compute_dtype,
        "rounding": rounding,
        "memory_format": memory_format,
        "constraint": constraint,
        "resize": resize,
        "init": init,
        "role": role,
        "tags": tuple(tags) or None,
    }
    fields = check_fields({name: value for name, value in said.items() if value is not None})
    value = _make(shape, init, dtype or storage_dtype, device, generator, role)
    if storage_dtype is not None and value.dtype != storage_dtype:
        raise PolicyError(
            "a parameter cannot be made in one dtype and kept in another",
            found=f"dtype={dtype}, storage_dtype={storage_dtype}",
            wanted="one of the two, or the same",
        )
    if memory_format is not None:
        _check_layout(value, memory_format, "")
    value = laid_out(value, memory_format or torch.contiguous_format)
    param = nn.Parameter(value, requires_grad=requires_grad)
    if param.dtype.itemsize == 1 and requires_grad:  # eight bits hold no gradient
        keep_gradient_in(param, torch.float32)
    initial = value.clone() if weight_decay == "init" else None
    note = Note(declared=Statement(fields, caller(), "ln.parameter"), initial=initial)
    _install_hook()
    setattr(param, _PENDING, note)
    return param


def annotate(model: nn.Module, selector: Selector, **policy: Any) -> tuple[Entry, ...]:
    """Declare the same policy for parameters that exist already; stronger than `ln.parameter`.

    Args:
        model: The model, bare or wrapped.
        selector: What to pick: a glob, a pattern, a module class, a Parameter, a function.
        policy: Any of the policy keywords of `ln.parameter`: ``weight_decay``, ``lr_scale``,
            ``storage_dtype``, ``compute_dtype``, ``rounding``, ``memory_format``,
            ``constraint``, ``resize``, ``init``, ``role``, ``tags``.

    Returns:
        The entries it now applies to.

    Raises:
        SelectionError: The selector picks nothing.
        PolicyError: An unknown field, a value without meaning, or another line that annotated the
            same field of the same parameter otherwise; nothing is changed then.

    Example:
        >>> import learnables as ln
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> [entry.name for entry in ln.annotate(model, "1.*", lr_scale=0.1)]
        ['1.weight', '1.bias']
    """
    if "tags" in policy:
        policy["tags"] = tuple(policy["tags"])
    statement = Statement(check_fields(policy), caller(), "ln.annotate")
    picked = select(entries(model), selector)
    changes = []
    for entry in picked:
        for place in entry.places:
            note = add_annotation(place.note, statement, entry.name)
            if policy.get("memory_format") is not None and not is_uninitialised(entry.param):
                _check_layout(entry.param, policy["memory_format"], entry.name)
            if policy.get("weight_decay") == "init" and note.initial is None:
                note = Note(note.declared, note.annotated, entry.param.detach().clone())
            changes.append((place, note))
    for place, note in changes:  # only now: a refused annotation leaves nothing half done
        put_note(place.owner, place.local_name, note)
        _equip(place.owner)
        _store_declared(place.owner)
        _lay_out_declared(place.owner)
    return picked


def _make(
    shape: "tuple[int | Tensor, ...]",
    init: Init | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
    role: str | None,
) -> Tensor:
    if len(shape) == 1 and isinstance(shape[0], Tensor):
        given = shape[0].detach()
        value = given.to(device=device, dtype=dtype, copy=True).contiguous()
        value = value.reshape(1) if value.ndim == 0 else value
        return value if init is None else initialise_(value, init, role=role, generator=generator)
    if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
        shape = tuple(shape[0])
    countable = all(hasattr(n, "__index__") and not isinstance(n, (bool, Tensor)) for n in shape)
    sizes = [index(n) for n in shape] if countable else [-1]
    if min(sizes, default=0) < 0:
        raise ShapeError(
            "the shape of a parameter is a row of non-negative sizes, or one tensor",
            found=f"ln.parameter({', '.join(map(_short, shape))})",
            wanted="ln.parameter(1, 1, 192) or ln.parameter(torch.eye(3))",
        )
    value = torch.empty(sizes or [1], dtype=dtype, device=device)
    assert init is not None  # `parameter` chose one where only sizes are given
    return initialise_(value, init, role=role, generator=generator)


def _short(x: object) -> str:
    return f"tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def check_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` as they are, if every one is a policy field with a value that means something.

    Raises:
        PolicyError: One is not.
    """
    for name, value in fields.items():
        wanted = _wrong(name, value)
        if wanted:
            raise PolicyError(
                f"{name} has a value that means nothing"
                if name in FIELDS
                else "a policy field of this name does not exist",
                where=name,
                found=f"{name}={value!r}",
                wanted=wanted,
                mend=_mend(name, value),
            )
    return fields


_CHOICES = {
    "weight_decay": ("init",),
    "compute_dtype": ("autocast",),
    "rounding": ("kahan", "stochastic", "master"),
    "role": ("linear", "conv", "experts", "projection"),
}


def _mend(name: str, value: Any) -> str:
    """What to type instead, where what was meant can be guessed."""
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        return f"{near[0]}={value!r}" if near else ""
    if isinstance(value, type):
        return f"{name}={value.__name__}(…)"
    if name in ("storage_dtype", "compute_dtype") and towards_a_dtype(value, name):
        return towards_a_dtype(value, name)
    near = difflib.get_close_matches(str(value), _CHOICES.get(name, ()), n=1)
    return f"{name}={near[0]!r}" if near else ""


def _wrong(name: str, value: Any) -> str:
    """What was wanted instead, or the empty string where the value is fine."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    good, wanted = {
        "weight_decay": (
            isinstance(value, bool) or value == "init" or (number and value >= 0),
            'True, False, a coefficient ≥ 0, or "init"',
        ),
        "lr_scale": (number and 0 <= value < float("inf"), "a finite number ≥ 0"),
        "compute_dtype": (
            (isinstance(value, torch.dtype) and value.is_floating_point) or value == "autocast",
            'a floating dtype, e.g. torch.float32, or "autocast"',
        ),
        "storage_dtype": (
            isinstance(value, torch.dtype) and value.is_floating_point,
            "a floating dtype, e.g. torch.float32",
        ),
        "rounding": (
            value in _CHOICES["rounding"],
            "'kahan', 'stochastic' or 'master'",
        ),
        "memory_format": (
            isinstance(value, torch.memory_format) and value is not torch.preserve_format,
            "torch.contiguous_format, torch.channels_last or torch.channels_last_3d",
        ),
        "constraint": (
            hasattr(value, "project") and not isinstance(value, type),
            "a set with a project method: ln.sets.…",
        ),
        "resize": (callable(value), "a function (value, shape) -> value"),
        "init": (isinstance(value, Initializer) or callable(value), "one of ln.init.…"),
        "role": (
            value in _CHOICES["role"],
            "'linear', 'conv', 'experts' or 'projection'",
        ),
        "tags": (
            isinstance(value, tuple) and all(isinstance(tag, str) for tag in value),
            "a list of strings",
        ),
    }.get(name, (False, f"one of {', '.join(FIELDS)}"))
    return "" if good else wanted


def _install_hook() -> None:
    global _hooked
    if not _hooked:
        on_parameter_registration(_move_note)
        _hooked = True


def _move_note(owner: nn.Module, local_name: str, param: Tensor | None) -> None:
    """At registration, move the note from the new Parameter to the module that owns it."""
    note = getattr(param, "__dict__", {}).pop(_PENDING, None)
    if note is not None:
        put_note(owner, local_name, note)
        _equip(owner)


def _equip(owner: nn.Module) -> None:
    """Give ``owner`` the hooks that its notes ask for, once; they are copied along with it."""
    hooked = owner.__dict__.setdefault(_HOOKED, set())
    if "resize" not in hooked:
        hooked.add("resize")
        owner.register_load_state_dict_pre_hook(_ResizeOnLoad())  # type: ignore[no-untyped-call]
    if "cast" not in hooked and any(note.get("compute_dtype") for note in notes_of(owner).values()):
        hooked.add("cast")
        owner.register_forward_pre_hook(_cast_for_use)
        owner.register_forward_hook(_end_of_use, always_call=True)
    if any(note.get("storage_dtype") for note in notes_of(owner).values()):
        during_conversion(owner, _keep_stored)
    if any(note.get("memory_format") for note in notes_of(owner).values()):
        after_conversion(owner, _lay_out_declared)


_uses = threading.Lock()


def _cast_for_use(owner: nn.Module, _: object) -> None:
    """For the time of the forward, let the attribute be the Parameter in the dtype it is used in.

    An instance attribute shadows the registered Parameter, which stays where it is: names, state
    dict and optimizer do not notice, and the gradient arrives through the cast.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        with _uses:  # other threads and outer calls of the same module may be using it too
            owner.__dict__[_IN_USE] = owner.__dict__.get(_IN_USE, 0) + 1
    for local_name, param in owner.named_parameters(recurse=False, remove_duplicate=False):
        dtype = note_of(owner, local_name).get("compute_dtype")
        if dtype is not None:
            used = _used_in(param, dtype)
            if used != param.dtype:
                object.__setattr__(owner, local_name, _cast(param, used, compiling))


def _used_in(param: Tensor, dtype: ComputeDtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    kind = param.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else param.dtype


def _cast(param: Tensor, dtype: torch.dtype, compiling: bool) -> Tensor:
    if compiling or torch.is_grad_enabled():
        return _to(param, dtype, compiling)
    # A thread that trains may find it here while this one does not: it needs the graph.
    with torch.inference_mode(False), torch.enable_grad():
        return _to(param, dtype, compiling)


def _to(param: Tensor, dtype: torch.dtype, compiling: bool) -> Tensor:
    if param.dtype.itemsize > 1 and (compiling or gradient_dtype(param) == param.dtype):
        return param.to(dtype)
    if not compiling and param.requires_grad and gradient_dtype(param) == param.dtype:
        keep_gradient_in(param, torch.float32)  # a copy has forgotten it
    value: Tensor = _CastOneWay.apply(param, dtype)  # type: ignore[no-untyped-call]
    return value


class _CastOneWay(torch.autograd.Function):
    """Cast the value; its gradient comes back as it is, not squeezed into what it is stored in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _end_of_use(owner: nn.Module, *_: object) -> None:
    if not torch.compiler.is_compiling():
        with _uses:
            owner.__dict__[_IN_USE] = left = max(owner.__dict__.get(_IN_USE, 1) - 1, 0)
        if left:
            return
    for local_name, note in notes_of(owner).items():
        if note.get("compute_dtype") is not None:
            owner.__dict__.pop(local_name, None)


def _store_declared(owner: nn.Module) -> None:
    """Give the parameters of ``owner`` and their gradients the dtype that they are to keep."""
    for local_name, param in owner.named_parameters(recurse=False, remove_duplicate=False):
        dtype = note_of(owner, local_name).get("storage_dtype")
        if dtype is not None and dtype != param.dtype and not is_uninitialised(param):
            gradient, param.grad = param.grad, None
            param.data = param.data.to(dtype)
            if gradient_dtype(param) != dtype and dtype.itemsize > 1:  # that of 8 bits before
                keep_gradient_in(param, dtype)
            if gradient is not None:
                param.grad = gradient.to(gradient_dtype(param))


def _keep_stored(owner: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    """What a conversion makes of a tensor: in its declared dtype, as it was, not rounded twice."""
    for local_name, note in notes_of(owner).items():
        dtype = note.get("storage_dtype")
        param = owner._parameters.get(local_name) if dtype is not None else None
        if param is not None and (before is param or before is param.grad):
            if after.dtype == dtype or not after.is_floating_point():
                return after
            kept = torch.empty_like(after, dtype=dtype, requires_grad=False)
            with torch.no_grad():
                return kept.copy_(before)
    return after


def _lay_out_declared(owner: nn.Module) -> None:
    """Give the parameters of ``owner`` and their gradients the layout that was declared."""
    for local_name, param in owner.named_parameters(recurse=False, remove_duplicate=False):
        memory_format = note_of(owner, local_name).get("memory_format")
        if memory_format is not None and _has_layout(param, memory_format):
            lay_out_(param, wanted_strides(param.shape, memory_format))


def _has_layout(x: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether it can be laid out like that; a shard cannot, its whole does not exist."""
    strided = x.layout is torch.strided and not (is_uninitialised(x) or is_dtensor(x))
    return strided and fits(x.ndim, memory_format)


def _check_layout(x: Tensor, memory_format: torch.memory_format, name: str) -> None:
    if not fits(x.ndim, memory_format):
        raise PolicyError(
            "a parameter of this many dimensions cannot be laid out like that",
            where=name,
            found=f"memory_format={memory_format}, shape {tuple(x.shape)}",
            wanted="4 dimensions for torch.channels_last, 5 for torch.channels_last_3d",
        )


class _ResizeOnLoad:
    """Give what is loaded the shape that the model has and, where assigned, the declared layout."""

    def __call__(
        self, owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *_: object
    ) -> None:
        assigns = metadata.get("assign_to_params_buffers", False)
        for local_name, param in owner.named_parameters(recurse=False, remove_duplicate=False):
            value = state.get(prefix + local_name)
            if not isinstance(value, Tensor):
                continue
            note = note_of(owner, local_name)
            resize, memory_format = note.get("resize"), note.get("memory_format")
            if value.shape == param.shape:
                pass
            elif {value.shape, param.shape} == {torch.Size([]), torch.Size([1])}:
                value = value.reshape(param.shape)
            elif resize is not None:
                value = resize(value, param.shape)
            dtype = note.get("storage_dtype")
            if assigns and dtype is not None and value.dtype != dtype:
                value = value.detach().to(dtype)
            if assigns and memory_format is not None and _has_layout(value, memory_format):
                value = _assigned(value, memory_format)
            state[prefix + local_name] = value


def _assigned(value: Tensor, memory_format: torch.memory_format) -> Tensor:
    made = laid_out(value, memory_format)
    if made is value or not isinstance(value, nn.Parameter):
        return made
    return nn.Parameter(made, requires_grad=value.requires_grad)  # as a file of Parameters has it
