"""Put a component into a model that exists, and take it out again.

The component is an ordinary submodule of the model; what calls it are hooks that are plain objects,
so the model can be copied, pickled, compiled, exported, wrapped and sharded as before.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from learnables._torch import WRAPPER_PREFIXES, is_dtensor
from learnables.errors import LearnablesError, SelectionError, ShapeError
from learnables.grafting.family import anatomy_of
from learnables.nn.prompts import DeepPrompts

Where: TypeAlias = Literal["tokens", "input", "output", "parameter"]
_ATTRIBUTE = "_learnables_grafts"


# --- hooks: plain objects, so that a model with them is copied and pickled ------------------------


@dataclass
class _Enter:
    """Before a module: its first input goes through the component."""

    component: nn.Module
    name: str
    layer: int | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        more = () if self.layer is None else (self.layer,)
        if args:
            return (_through(self, args[0], *more), *args[1:]), kwargs
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, key: _through(self, value, *more)}
        raise ShapeError(
            "the module that is grafted gets no tensor", where=self.name, wanted="one input tensor"
        )


@dataclass
class _Leave:
    """After a module: its first output goes through the component."""

    component: nn.Module
    name: str

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (_through(self, out[0]), *out[1:])
        return _through(self, out)


@dataclass
class _Strip:
    """After the last block: the tokens that were put in are taken out again."""

    first: int
    count: int

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (self.without(out[0]), *out[1:])
        return self.without(out)

    def without(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N - count, D)."""
        return torch.cat([x[:, : self.first], x[:, self.first + self.count :]], dim=1)


@dataclass
class _Change:
    """Before the owner of a parameter: for this forward the attribute is the changed value.

    An instance attribute shadows the registered Parameter, which stays where it is: names, state
    dict and optimizer do not notice.
    """

    component: nn.Module
    local_name: str

    def __call__(self, module: nn.Module, args: Any) -> None:
        value = module.__dict__.get(self.local_name)  # of an earlier graft on the same parameter
        if value is None:
            value = module._parameters[self.local_name]
        object.__setattr__(module, self.local_name, self.component(value))


@dataclass
class _Restore:
    """After the owner, also where it raised: the attribute is the Parameter again."""

    local_name: str

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        module.__dict__.pop(self.local_name, None)


def _through(hook: "_Enter | _Leave", x: Tensor, *more: int) -> Tensor:
    tokens = getattr(hook.component, "tokens", None)
    if isinstance(tokens, Tensor):
        _check_width(hook.name, tokens, tuple(x.shape), x.shape[-1])
    out: Tensor = hook.component(x, *more)
    return out


def _check_width(name: str, ours: Tensor, theirs: object, width: int) -> None:
    if ours.shape[-1] == width:
        return
    raise ShapeError(
        "the component does not fit the width of the model",
        where=name,
        found=f"component of shape {tuple(ours.shape)}",
        wanted=f"the last dimension of {theirs}",
        mend="build the component with the dim of the model",
    )


# --- graft ---------------------------------------------------------------------------------------


@final
@dataclass(eq=False)
class Graft:
    """A component in a model, and the way to take it out.

    Attributes:
        model: The model.
        name: The component's name in it.
        component: The component.
        at: Paths of the modules that call it, or of the parameter it changes.
        where: How it is called.
    """

    model: nn.Module = field(repr=False)
    name: str
    component: nn.Module = field(repr=False)
    at: tuple[str, ...]
    where: Where
    _handles: list[RemovableHandle] = field(default_factory=list, repr=False)
    _counting: tuple[nn.Module, ...] = field(default=(), repr=False)
    _count: int = field(default=0, repr=False)

    def remove(self) -> None:
        """Take the component out; the model is bit for bit what it was before.

        Raises:
            LearnablesError: It was removed already, or a later graft at the same place is still in.
        """
        grafts = grafts_of(self.model)
        if self not in grafts:
            raise LearnablesError(
                "this graft is in the model no more",
                where=self.name,
                found=f"grafts: {', '.join(g.name for g in grafts) or 'none'}",
            )
        later = [g for g in grafts[grafts.index(self) + 1 :] if {*g.at} & {*self.at}]
        if later:
            raise LearnablesError(
                "a later graft at the same place has to be removed first",
                where=", ".join(sorted({*later[-1].at} & {*self.at})),
                found=f"{self.name!r} is below {later[-1].name!r}",
                wanted="the last one first",
                mend=f"remove {later[-1].name!r}, then {self.name!r}",
            )
        for handle in self._handles:
            handle.remove()
        for module in self._counting:
            module.num_prefix_tokens -= self._count  # type: ignore[operator, assignment]
        grafts.remove(self)
        if not grafts:
            del self.model.__dict__[_ATTRIBUTE]
        delattr(self.model, self.name)

    def merge(self) -> None:
        """Write what the component makes of a parameter into that parameter, and take it out.

        Raises:
            LearnablesError: The graft changes no parameter, or as `remove` says.
        """
        if self.where != "parameter":
            raise LearnablesError(
                "only a graft on a parameter can be merged",
                where=self.name,
                found=f"where={self.where!r}",
                wanted="where='parameter'",
                mend="handle.remove()",
            )
        param = self.model.get_parameter(self.at[0])
        with torch.no_grad():
            value = self.component(param)
        self.remove()
        with torch.no_grad():
            param.copy_(value)


def grafts_of(model: nn.Module) -> list[Graft]:
    """What is grafted into ``model``, oldest first; the live list, empty where nothing is."""
    found: list[Graft] = model.__dict__.get(_ATTRIBUTE, [])
    return found


def graft(
    model: nn.Module,
    name: str,
    component: nn.Module,
    at: str | Sequence[str] | None = None,
    *,
    where: Where | None = None,
) -> Graft:
    """Put ``component`` into ``model``: registered as ``name``, called by hooks where ``at`` says.

    Graft before the optimizer is built and before compile, DDP and FSDP. Copies, pickles, compiled
    (without graph breaks) and exported models keep the graft.

    Args:
        model: The model; it gets the submodule ``name`` and hooks, nothing else.
        name: Name of the new submodule: its parameters are ``name.*``.
        component: Any module that takes one tensor, or, on several blocks, `ln.nn.DeepPrompts`.
        at: Path or glob, or several, of modules, or one parameter for ``where="parameter"``; ``""``
            is the whole model. None asks what is known of timm's and transformers' models for the
            list of blocks.
        where: ``"tokens"``: put in before the first of the modules, taken out after the last, so
            that pooling and heads see the sequence they know; ``"input"`` or ``"output"`` of each
            module; ``"parameter"``: the component maps the value of a parameter to the one that the
            forward of its owner uses. By default ``"tokens"`` for components with ``tokens``,
            ``"parameter"`` where ``at`` is one, else ``"output"``.

    Returns:
        A handle: ``handle.remove()``, ``handle.merge()``.

    Raises:
        SelectionError: ``at`` names nothing; the message offers the nearest names.
        ShapeError: The component does not fit the width of the model.
        LearnablesError: The name is taken, or the model is already compiled, wrapped or sharded.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> handle = ln.graft(model, "scale", ln.nn.LayerScale(4), at="0")
        >>> [name for name, _ in model.named_parameters()][-1]
        'scale.gamma'
        >>> handle.remove()

    Cost:
        One call of a plain Python object for each hooked module beside the component itself.
    """
    _refuse_wrapped(model)
    if hasattr(model, name) or not name.isidentifier():
        raise LearnablesError(
            "this name is taken" if hasattr(model, name) else "a submodule cannot have this name",
            where=name,
            found=f"{type(getattr(model, name, name)).__qualname__}",
            wanted="an identifier that the model has not",
            mend="another name, or handle.remove() of the earlier graft",
        )
    if where is not None and where not in get_args(Where):
        raise LearnablesError(
            "there is no such way to graft",
            found=f"where={where!r}",
            wanted=", ".join(map(repr, get_args(Where))),
        )
    tokens = getattr(component, "tokens", None)
    width = None
    if at is None:
        anatomy = anatomy_of(model)
        width, at = anatomy.width, f"{anatomy.blocks}.*"
    if where is None:
        params = dict(model.named_parameters(remove_duplicate=False))
        where = "tokens" if isinstance(tokens, Tensor) else "output"
        if isinstance(at, str) and at in params:
            where = "parameter"
    if where == "tokens" and not (isinstance(tokens, Tensor) and tokens.ndim == 3):
        raise ShapeError(
            "a component without tokens cannot be put in as tokens",
            where=name,
            found=type(component).__qualname__,
            wanted="a parameter `tokens` of shape (1, P, D) or (L, P, D)",
            mend="where='input' or where='output'",
        )
    if width and isinstance(tokens, Tensor):
        _check_width(name, tokens, f"(B, N, {width})", width)
    paths = _paths(model, at, parameters=where == "parameter")
    deep = isinstance(component, DeepPrompts)
    if deep and component.num_layers != len(paths):
        raise ShapeError(
            "deep prompts have one set of tokens for each module",
            where=name,
            found=f"{component.num_layers} layers",
            wanted=f"{len(paths)} layers, for {paths[0]} … {paths[-1]}",
        )
    made = Graft(model, name, component, paths, where)
    setattr(model, name, component)
    model.__dict__.setdefault(_ATTRIBUTE, []).append(made)
    _install(made, deep=deep)
    return made


def _install(made: Graft, *, deep: bool) -> None:
    model, component, name = made.model, made.component, made.name
    if made.where == "parameter":
        path, _, local = made.at[0].rpartition(".")
        owner = model.get_submodule(path)
        made._handles += [
            owner.register_forward_pre_hook(_Change(component, local)),
            owner.register_forward_hook(_Restore(local), always_call=True),
        ]
        return
    modules = [model.get_submodule(path) for path in made.at]
    if made.where == "output":
        made._handles += [m.register_forward_hook(_Leave(component, name)) for m in modules]
        return
    entered = modules if made.where == "input" or deep else modules[:1]
    made._handles += [
        m.register_forward_pre_hook(
            _Enter(component, name, layer if deep else None), with_kwargs=True
        )
        for layer, m in enumerate(entered)
    ]
    if made.where == "tokens":
        count = int(component.tokens.shape[1])  # type: ignore[index]
        first = int(getattr(component, "prefix", 0))
        # Before the hooks of earlier grafts: what was put in last lies innermost.
        made._handles.append(modules[-1].register_forward_hook(_Strip(first, count), prepend=True))
        made._count = count
        made._counting = tuple(  # rotary positions skip so many tokens
            inner
            for module in modules
            for inner in module.modules()
            if type(getattr(inner, "num_prefix_tokens", None)) is int
        )
        for inner in made._counting:
            inner.num_prefix_tokens += count  # type: ignore[operator, assignment]


def _paths(model: nn.Module, at: str | Sequence[str], *, parameters: bool) -> tuple[str, ...]:
    """The modules or the parameter that ``at`` names, in the order of the model.

    Raises:
        SelectionError: It names nothing, or more than one parameter.
    """
    patterns = (at,) if isinstance(at, str) else tuple(at)
    named = model.named_parameters(remove_duplicate=False) if parameters else model.named_modules()
    names = [name for name, _ in named]
    chosen = []
    for pattern in patterns:
        depth = pattern.count(".")
        found = [n for n in names if n.count(".") == depth and fnmatchcase(n, pattern)]
        if not found:
            close = difflib.get_close_matches(pattern, names, 3, 0.4)
            raise SelectionError(
                f"the model has no such {'parameter' if parameters else 'module'}",
                where=pattern,
                found=f"{len(names)} names, none of them this",
                wanted="a path as named_parameters() or named_modules() gives it",
                mend=f"one of {', '.join(map(repr, close or names[1:4]))}",
            )
        chosen += [n for n in found if n not in chosen]
    if parameters and len(chosen) > 1:
        raise SelectionError(
            "a graft changes one parameter", found=", ".join(chosen[:5]), wanted="one path"
        )
    return tuple(chosen)


def _refuse_wrapped(model: nn.Module) -> None:
    wrapped = [prefix for prefix in WRAPPER_PREFIXES if prefix in model._modules]
    wrapped = wrapped if len(model._modules) == 1 else []
    if wrapped or any(is_dtensor(p) for p in model.parameters()):
        raise LearnablesError(
            "the model is already compiled, wrapped or sharded",
            found=type(model).__qualname__,
            wanted="the bare model",
            mend="graft first, then compile, wrap, shard and build the optimizer",
        )
