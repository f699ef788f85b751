"""Which parameter makes which activation float32 where low precision was meant, and the cure.

Autocast casts the inputs of matrix products. An addition, a multiplication, a concatenation gets
what it gets, and one float32 Parameter among its inputs makes the result float32: a class token
joined to bfloat16 patches, a position added, a scale multiplied. From there on the whole residual
stream is float32, is kept for the backward as float32, and no line says so.
"""

import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from learnables._torch import dtype_name, tensors_in
from learnables.entries import entries

_OUTSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
_LOW = (torch.bfloat16, torch.float16)

# Operations whose result has the widest dtype of their inputs, by name without underscores.
_ARITHMETIC = ("add", "sub", "mul", "div", "truediv")
_JOINING = frozenset(
    [
        *(before + name for before in ("", "i", "r") for name in _ARITHMETIC),
        *("multiply", "subtract", "divide", "lerp", "addcmul", "addcdiv", "hypot", "atan2"),
        *("maximum", "minimum", "fmax", "fmin", "where", "copysign", "maskedscatter", "indexadd"),
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "columnstack"),
    ]
)
# Those that hand on what they get, as far as its dtype is concerned.
_PASSING = frozenset(
    [
        *("getitem", "select", "narrow", "indexselect", "gather", "chunk", "split", "unbind"),
        *("expand", "expandas", "broadcastto", "repeat", "repeatinterleave", "tile", "pad"),
        *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"),
        *("transpose", "permute", "movedim", "t", "roll", "flip", "clone", "detach", "dropout"),
        *("gelu", "relu", "silu", "tanh", "sigmoid", "softplus", "neg", "abs", "clamp"),
        "interpolate",
    ]
)


@dataclass(frozen=True)
class Promotion:
    """One activation that a parameter made float32.

    Attributes:
        parameter: Qualified name of the parameter.
        how: ``"made"`` where the parameter itself met a low-precision activation; ``"carried"``
            where an activation that it had made float32 before met another.
        op: The call, e.g. ``mul``.
        module: Qualified name of the module whose forward was running; empty for the model.
        location: ``file:line`` of the call outside torch and this library.
        shape: Shape of the result.
        low: The dtype it would have had.
        bytes: How much larger the result is for it.
    """

    parameter: str
    how: Literal["made", "carried"]
    op: str
    module: str
    location: str
    shape: tuple[int, ...]
    low: torch.dtype
    bytes: int

    def __str__(self) -> str:
        """One line: parameter, call, place, cost."""
        where = f" in {self.module}" if self.module else ""
        low = dtype_name(self.low)
        return (
            f"{self.parameter}: {self.how} float32 of {low} by {self.op}{where}, "
            f"shape {self.shape}, +{self.bytes:,} bytes  {self.location}"
        )


@dataclass(eq=False)
class _Label:
    """Whose doing it is that a tensor is float32."""

    parameter: str
    is_parameter: bool  # made of the parameter alone, not of an activation
    of: weakref.ref[Tensor] = field(repr=False)


@final
class Judge:
    """Judges calls of torch, one by one, for `promotions` and for the audit.

    Args:
        parameters: What may be to blame, with its name.
        line: Tells where the call comes from.
        module: Tells which module's forward is running.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[Tensor, str]],
        line: Callable[[], str | None],
        module: Callable[[], str] = str,
    ) -> None:
        self.found: list[Promotion] = []
        self._parameters = list(parameters)
        self._line, self._module = line, module
        self._names: dict[Any, str] = {}
        self.begin()

    def begin(self) -> None:
        """Forget all tensors but the parameters."""
        self._labels: dict[int, _Label] = {}
        for param, name in self._parameters:
            self._label(param, name, is_parameter=True)

    def follow(self, param: Tensor, name: str) -> None:
        """One more parameter that may be to blame."""
        self._parameters.append((param, name))
        self._label(param, name, is_parameter=True)

    def _label(self, x: Tensor, parameter: str, *, is_parameter: bool) -> None:
        self._labels[id(x)] = _Label(parameter, is_parameter, weakref.ref(x))

    def _label_of(self, x: Tensor) -> _Label | None:
        label = self._labels.get(id(x))
        return label if label is not None and label.of() is x else None  # ids are used again

    def look(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Judge one call that was made."""
        op = self._names.get(func)
        if op is None:
            op = getattr(func, "__name__", "").replace("_", "")
            self._names[func] = op
        joins = op in _JOINING
        if not joins and op not in _PASSING:
            return
        made = list(tensors_in((result,)))
        wide = [out for out in made if out.dtype is torch.float32]
        inputs = [x for x in tensors_in((args, kwargs)) if x.is_floating_point()]
        labels = [(x, self._label_of(x)) for x in inputs]
        own = [label for _, label in labels if label is not None and label.is_parameter]
        if not wide:  # what is made of a parameter alone, such as its detached self
            if own and len(own) == len(labels):
                for out in made:
                    self._label(out, own[0].parameter, is_parameter=True)
            return
        blamed = [label for x, label in labels if label is not None and x.dtype is torch.float32]
        if not blamed:
            return
        first = next((label for label in blamed if not label.is_parameter), blamed[0])
        others = any(x.dtype is torch.float32 and label is None for x, label in labels)
        activations = [x for x, label in labels if label not in own]
        low = [x.dtype for x in activations if x.dtype in _LOW]  # an average of one is no stream
        for out in wide:
            if low and joins and not others:
                self._add(first, op, low[0], out)
                self._label(out, first.parameter, is_parameter=False)
            elif not others:  # float32 through and through
                self._label(out, first.parameter, is_parameter=len(own) == len(labels))

    def _add(self, label: _Label, op: str, low: torch.dtype, out: Tensor) -> None:
        self.found.append(
            Promotion(
                parameter=label.parameter,
                how="made" if label.is_parameter else "carried",
                op=op,
                module=self._module(),
                location=self._line() or "",
                shape=tuple(out.shape),
                low=low,
                bytes=out.numel() * (out.element_size() - low.itemsize),
            )
        )


@final
class promotions:  # noqa: N801 - used like a function: `with ln.promotions(model) as found:`
    """Watch which parameters make which activations float32, while the model runs as it is.

    Looks at every call of torch inside the ``with``; changes no value and runs nothing twice. A
    compiled model is to be looked at before it is compiled.

    Args:
        model: The model whose parameters may be to blame, bare or wrapped.

    Example:
        >>> class Scaled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        ...     def forward(self, x):
        ...         return self.linear(x) * self.gamma
        >>> model = Scaled()
        >>> with ln.promotions(model) as seen, torch.autocast("cpu", torch.bfloat16):
        ...     y = model(torch.ones(2, 4))
        >>> [(p.parameter, p.how, p.op) for p in seen.found], y.dtype
        ([('gamma', 'made', 'mul')], torch.float32)
        >>> print(seen.mend)
        ln.annotate(model, 'gamma', compute_dtype='autocast')
        >>> _ = ln.annotate(model, "gamma", compute_dtype="autocast")
        >>> with ln.promotions(model) as seen, torch.autocast("cpu", torch.bfloat16):
        ...     y = model(torch.ones(2, 4))
        >>> len(seen.found), y.dtype
        (0, torch.bfloat16)

    Cost:
        A few microseconds for each call of torch; made for one forward, not for a whole training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inside: list[str] = []
        self._handles: list[Any] = []
        self._judge = Judge(
            ((entry.param, entry.name) for entry in entries(model)), _line, self._running
        )
        self._mode = _Looking(self._judge)

    @property
    def found(self) -> list[Promotion]:
        """One for each activation, in the order they came."""
        return self._judge.found

    def _running(self) -> str:
        return self._inside[-1] if self._inside else ""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that made something float32 themselves, in order."""
        return tuple(dict.fromkeys(p.parameter for p in self.found if p.how == "made"))

    @property
    def bytes(self) -> int:
        """How much larger all these activations together are for it."""
        return sum(p.bytes for p in self.found)

    @property
    def mend(self) -> str:
        """The lines to type; nothing where nothing was found."""
        return "\n".join(
            f"ln.annotate(model, {name!r}, compute_dtype='autocast')" for name in self.parameters
        )

    def __str__(self) -> str:
        """What was found, one line each, and what to do about it."""
        if not self.found:
            return "no parameter makes an activation float32"
        head = (
            f"{len(self.found)} activations are float32 because of {len(self.parameters)} "
            f"parameters, +{self.bytes:,} bytes"
        )
        return "\n".join([head, *map(str, self.found), "mend:", self.mend])

    def __enter__(self) -> "promotions":
        self._judge.begin()
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside = [], []

    def _leave(self, *_: object) -> None:
        self._inside.pop()


@final
class _Looking(TorchFunctionMode):
    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.judge.look(func, args, kwargs or {}, result)
        return result


def _line() -> str:
    """``file:line`` of the nearest frame outside torch and this library."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OUTSIDE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
