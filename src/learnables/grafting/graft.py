"""Put a component into a model that exists, and take it out again.

The component is an ordinary submodule of the model; what calls it are hooks that are plain objects,
so the model can be copied, pickled, compiled, exported, wrapped and sharded as before.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from keyword import iskeyword
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from learnables._torch import WRAPPER_PREFIXES, is_compiled, is_dtensor
from learnables.arguments import describe, require_module, require_text
from learnables.errors import ArgumentError, LearnablesError, SelectionError, ShapeError
from learnables.grafting import hooks
from learnables.grafting.anatomy import Anatomy
from learnables.grafting.beside import lay_beside
from learnables.grafting.changed import change, unchange
from learnables.grafting.family import anatomy_of, known_in
from learnables.grafting.freezing import hold_again, release
from learnables.grafting.stack import decoder_around
from learnables.nn.prompts import DeepPrompts
from learnables.nn.relative import AttentionBias, RelativeBias

Where: TypeAlias = Literal["tokens", "input", "output", "parameter", "bias"]
_ATTRIBUTE = "_learnables_grafts"
_WRAPPING = ("torch", "deepspeed", "fairscale")  # libraries whose classes wrap a model
_SPREADING = (nn.DataParallel, nn.parallel.DistributedDataParallel)


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
    _tokens: tuple[int, int] = field(default=(0, 0), repr=False)  # the first place, how many
    _biases: list[hooks.AddBias] = field(default_factory=list, repr=False)
    _looking: tuple[tuple[nn.Module, hooks.Aside], ...] = field(default=(), repr=False)
    # Who owns the parameter, since wrappers such as LoRA's move owners; and under which name.
    _owners: tuple[tuple[nn.Module, str], ...] = field(default=(), repr=False)
    _released: tuple[nn.Module, ...] = field(default=(), repr=False)  # frozen as a whole before

    def remove(self) -> None:
        """Take the component out; the model is bit for bit what it was before.

        Raises:
            LearnablesError: It was removed already, or a later graft at the same place is still in.
        """
        self._check_present()
        grafts = grafts_of(self.model)
        later = [g for g in grafts[grafts.index(self) + 1 :] if {*g.at} & {*self.at}]
        if later:
            raise LearnablesError(
                "a later graft at the same place has to be removed first",
                where=", ".join(sorted({*later[-1].at} & {*self.at})),
                found=f"{self.name!r} is below {later[-1].name!r}",
                wanted="the last one first",
                mend=f"remove {later[-1].name!r}, then {self.name!r}",
            )
        self._take_out()

    def merge(self) -> None:
        """Write what the component makes of a parameter into that parameter, and take it out.

        Of several grafts on one parameter the first one in is merged first: the others go on
        mapping what they mapped.

        Raises:
            LearnablesError: The graft changes no parameter, an earlier one on the same parameter is
                still in, or the parameter has other names, at which it is not changed.
        """
        if self.where != "parameter":
            raise LearnablesError(
                "only a graft on a parameter can be merged",
                where=self.name,
                found=f"where={self.where!r}",
                wanted="where='parameter'",
                mend="handle.remove()",
            )
        self._check_present()
        grafts = grafts_of(self.model)
        earlier = [g for g in grafts[: grafts.index(self)] if {*g.at} & {*self.at}]
        if earlier:
            raise LearnablesError(
                "an earlier graft on the same parameter has to be merged first",
                where=self.at[0],
                found=f"{self.name!r} maps what {earlier[0].name!r} makes",
                wanted="the first one first",
                mend=f"merge {earlier[0].name!r}, then {self.name!r}",
            )
        owner, local_name = self._owners[0]
        param = owner._parameters[local_name]
        assert param is not None, "a graft on a parameter has one"
        ours = {(id(module), name) for module, name in self._owners}
        others = [
            f"{path}.{name}" if path else name
            for path, module in self.model.named_modules(remove_duplicate=False)
            for name, value in module._parameters.items()
            if value is param and (id(module), name) not in ours
        ]
        if others:
            raise LearnablesError(
                "the parameter has other names, at which this graft does not act",
                where=", ".join([*self.at, *others]),
                found=f"the graft changes {', '.join(self.at)} only",
                wanted="a parameter of its own, or a graft on all of its names",
                mend=f"ln.untie(model, {self.at[0]!r})",
            )
        with torch.no_grad():
            param.copy_(self.component(param))
        self._take_out()

    def _check_present(self) -> None:
        grafts = grafts_of(self.model)
        if self not in grafts:
            raise LearnablesError(
                "this graft is in the model no more",
                where=self.name,
                found=f"grafts: {', '.join(g.name for g in grafts) or 'none'}",
            )

    def _take_out(self) -> None:
        for handle in self._handles:
            handle.remove()
        for owner, local_name in self._owners:
            unchange(owner, local_name, self.component)
        for module, aside in self._looking:
            hooks.look_no_more(module, aside)
        for module in self._counting:
            module.num_prefix_tokens -= self._tokens[1]  # type: ignore[operator, assignment]
        grafts = grafts_of(self.model)
        grafts.remove(self)
        lay_beside(self.model, (g.name for g in grafts))
        _count_tokens(grafts)
        if not grafts:
            del self.model.__dict__[_ATTRIBUTE]
        delattr(self.model, self.name)
        hold_again(self.model, self._released)


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
            list of blocks, or for their attention.
        where: How it is called. By default ``"parameter"`` where ``at`` is one, ``"bias"`` for
            `ln.nn.RelativeBias` and `ln.nn.AttentionBias`, ``"tokens"`` for components with
            ``tokens``, else ``"output"``.

            * ``"tokens"``: put in before the first of the modules, taken out after the last, so
              that pooling and heads see the sequence they know. Decoders of transformers get them
              in front of their embeddings, where positions, causal mask and cache count them.
            * ``"input"``, ``"output"``: the component maps the first one of each module.
            * ``"parameter"``: forwards read what the component makes of the parameter; at all
              other times the attribute is the Parameter.
            * ``"bias"``: what ``component.bias()`` returns, (H, N, N), is added to the logits of
              each attention.

    Returns:
        A handle: ``handle.remove()``, ``handle.merge()``.

    Raises:
        ArgumentError: An argument is of another kind than it takes.
        SelectionError: ``at`` names nothing; the message offers the nearest names.
        ShapeError: The component does not fit the width of the model.
        LearnablesError: The name is taken, the model takes no tokens, or it is already compiled,
            wrapped or sharded.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> handle = ln.graft(model, "scale", ln.nn.LayerScale(4), at="0")
        >>> [name for name, _ in model.named_parameters()][-1]
        'scale.gamma'
        >>> handle.remove()

    Cost:
        One call of a plain Python object for each hooked module beside the component itself; for a
        parameter two for each module around it, and the component at each read.
    """
    require_module(model)
    require_module(component, "component")
    require_text(name, "name")
    _require_paths(at)
    if any(module is model for module in component.modules()):
        raise LearnablesError(
            "a component cannot hold the model that it is put into",
            where=name,
            found=f"{type(component).__qualname__} with {type(model).__qualname__} in it",
            wanted="a module of its own",
        )
    _refuse_wrapped(model)
    if hasattr(model, name) or not name.isidentifier() or iskeyword(name):
        raise LearnablesError(
            "this name is taken" if hasattr(model, name) else "a submodule cannot have this name",
            where=name,
            found=f"{type(getattr(model, name)).__qualname__}"
            if hasattr(model, name)
            else repr(name),
            wanted="an identifier that the model has not",
            mend="another name, or handle.remove() of the earlier graft",
        )
    if where is not None and where not in get_args(Where):
        raise LearnablesError(
            "there is no such way to graft",
            found=f"where={where!r}",
            wanted=", ".join(map(repr, get_args(Where))),
        )
    where = where or _usual(model, component, at)
    _check_kind(name, component, where)
    anatomy = None
    if at is None:
        anatomy = anatomy_of(model)
        if where == "bias" and not anatomy.attention:
            raise SelectionError(
                "no attention that takes a bias is known in this model",
                where=name,
                found=type(model).__qualname__,
                wanted="modules whose forward takes attention_mask or attn_mask",
                mend="at=PATH of these modules",
            )
        at = anatomy.attention if where == "bias" else f"{anatomy.blocks}.*"
    paths = _paths(model, at, parameters=where == "parameter")
    if where == "tokens":
        anatomy = anatomy or _anatomy_at(model, paths)
    made = Graft(model, name, component, paths, where)
    _check_fit(made, anatomy)
    setattr(model, name, component)
    model.__dict__.setdefault(_ATTRIBUTE, []).append(made)
    lay_beside(model, (g.name for g in grafts_of(model)))
    _install(made, anatomy)
    _count_tokens(grafts_of(model))
    made._released = release(model)
    return made


def _require_paths(at: object) -> None:
    """Refuse what names no place in a model.

    Raises:
        ArgumentError: ``at`` is neither None nor a path nor several.
    """
    several = isinstance(at, (list, tuple)) and at and all(isinstance(one, str) for one in at)
    if at is None or isinstance(at, str) or several:
        return
    path = f"{at}" if isinstance(at, int) and not isinstance(at, bool) else "blocks.0"
    raise ArgumentError(
        "this is no place in a model",
        where="at",
        found=describe(at),
        wanted="a path or a glob, as a str, a list of such, or None for what is known of the model",
        mend=f"at={path!r}",
    )


def _check_kind(name: str, component: nn.Module, where: Where) -> None:
    tokens = getattr(component, "tokens", None)
    if where == "tokens" and not (isinstance(tokens, Tensor) and tokens.ndim == 3):
        raise ShapeError(
            "a component without tokens cannot be put in as tokens",
            where=name,
            found=type(component).__qualname__,
            wanted="a parameter `tokens` of shape (1, P, D) or (L, P, D)",
            mend="where='input' or where='output'",
        )
    if where == "bias" and not callable(getattr(component, "bias", None)):
        raise ShapeError(
            "a component without a bias cannot be added to attention",
            where=name,
            found=type(component).__qualname__,
            wanted="a method `bias()` that returns (H, N, N), as RelativeBias has",
            mend="where='input' or where='output'",
        )


def _usual(model: nn.Module, component: nn.Module, at: str | Sequence[str] | None) -> Where:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    asked = (at,) if isinstance(at, str) else tuple(at or ())
    if asked and names.issuperset(asked):
        return "parameter"
    if isinstance(component, (RelativeBias, AttentionBias)):
        return "bias"
    return "tokens" if isinstance(getattr(component, "tokens", None), Tensor) else "output"


def _anatomy_at(model: nn.Module, paths: tuple[str, ...]) -> Anatomy | None:
    """What is known of the blocks that ``paths`` are; None where nothing is."""
    for anatomy in known_in(model):
        if all(fnmatchcase(path, f"{anatomy.blocks}.*") for path in paths):
            return anatomy
    return decoder_around(model, paths)


def _check_fit(made: Graft, anatomy: Anatomy | None) -> None:
    """Whether the component can act as it is meant to, as far as can be told beforehand.

    Raises:
        ShapeError: A shape does not fit.
        LearnablesError: The model takes no tokens, or not there, or would not see the change.
    """
    model, component, paths = made.model, made.component, made.at
    if made.where == "parameter":
        for path in paths:
            owner = model.get_submodule(path.rpartition(".")[0])
            if isinstance(owner, nn.RNNBase):
                raise LearnablesError(
                    "this module keeps a list of its parameters and would not see the change",
                    where=path,
                    found=type(owner).__qualname__,
                    wanted="a module that reads its parameter by name, such as nn.LSTMCell",
                )
        _check_shape(made)
    if made.where == "bias":
        _check_bias(made, anatomy)
    if made.where != "tokens":
        return
    if anatomy and anatomy.refuses:
        raise LearnablesError(
            "this model takes no further tokens",
            where=made.name,
            found=f"{type(model).__qualname__}: {anatomy.refuses}",
            wanted="a model whose blocks take a sequence of any length",
            mend="where='output' for a scale or a gate, or a delta on a parameter",
        )
    tokens: Tensor = component.tokens  # type: ignore[assignment]
    if anatomy:
        hooks.check_width(made.name, tokens, f"(B, N, {anatomy.width})", anatomy.width)
    if isinstance(component, DeepPrompts) and component.num_layers != len(paths):
        raise ShapeError(
            "deep prompts have one set of tokens for each module",
            where=made.name,
            found=f"{component.num_layers} layers",
            wanted=f"{len(paths)} layers, for {paths[0]} … {paths[-1]}",
        )
    if anatomy and anatomy.entrance is not None:
        every = _paths(model, f"{anatomy.blocks}.*", parameters=False)
        if paths != every:
            raise LearnablesError(
                "in a decoder tokens go in front of all layers, or they are not in its cache",
                where=made.name,
                found=f"at {paths[0]} … {paths[-1]}",
                wanted=f"all of {anatomy.blocks}.*",
                mend=f"at='{anatomy.blocks}.*'",
            )


def _check_bias(made: Graft, anatomy: Anatomy | None) -> None:
    for module in map(made.model.get_submodule, made.at):
        if hooks.mask_of(module) is None:
            raise SelectionError(
                "this module takes no bias of attention",
                where=made.name,
                found=f"{type(module).__qualname__}({', '.join(hooks.arguments_of(module))})",
                wanted="attention whose forward takes attention_mask, or attn_mask as timm's",
            )
        if any(getattr(inner, "is_causal", False) is True for inner in module.modules()):
            raise LearnablesError(
                "causal attention hides the future only where it is given no mask",
                where=made.name,
                found=f"{type(module).__qualname__} with is_causal=True",
                wanted="attention that sees all tokens",
            )
    ours = int(getattr(made.component, "prefix", 0))
    if anatomy and ours != anatomy.prefix:
        raise ShapeError(
            "the bias has another number of tokens in front of its window than the model",
            where=made.name,
            found=f"prefix={ours}",
            wanted=f"prefix={anatomy.prefix}",
        )


def _check_shape(made: Graft) -> None:
    """Compare the shape that a delta is for with that of the parameter.

    Raises:
        ShapeError: They differ.
    """
    param = made.model.get_parameter(made.at[0])
    wanted = getattr(made.component, "shape", None)
    if isinstance(wanted, (tuple, torch.Size)) and tuple(wanted) != tuple(param.shape):
        raise ShapeError(
            "the delta has another shape than the parameter",
            where=made.at[0],
            found=f"delta {tuple(wanted)}",
            wanted=f"parameter {tuple(param.shape)}",
            mend=f"{type(made.component).__qualname__}{tuple(param.shape)}",
        )


def _install(made: Graft, anatomy: Anatomy | None) -> None:
    model, component, name = made.model, made.component, made.name
    if made.where == "parameter":
        for path in made.at:
            owner, _, local_name = path.rpartition(".")
            made._handles += change(model, owner, local_name, component)
            made._owners += ((model.get_submodule(owner), local_name),)
        return
    modules = [model.get_submodule(path) for path in made.at]
    if made.where == "tokens":
        made._tokens = int(getattr(component, "prefix", 0)), int(component.tokens.shape[1])  # type: ignore[index]
        if anatomy is not None and anatomy.entrance is not None:
            _put_in_front(made, anatomy, modules)
        else:
            _put_among(made, modules)
        return
    for module in modules:
        if made.where == "bias" and (mask := hooks.mask_of(module)):
            bias = hooks.AddBias(component, name, *mask)
            made._biases.append(bias)
            made._handles.append(module.register_forward_pre_hook(bias, with_kwargs=True))
        elif made.where == "input":
            enter = hooks.Enter(component, name)
            made._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        else:
            made._handles.append(module.register_forward_hook(hooks.Leave(component, name)))


def _put_among(made: Graft, modules: list[nn.Module]) -> None:
    """Tokens go in before the first block and out after the last; masks and counters know them."""
    first, count = made._tokens
    deep = isinstance(made.component, DeepPrompts)
    aside = hooks.Aside(made.name)
    for layer, module in enumerate(modules):
        if layer > 0:
            rejoin = hooks.Rejoin(aside, first)
            made._handles.append(module.register_forward_pre_hook(rejoin, with_kwargs=True))
        if deep or layer == 0:
            enter = hooks.Enter(made.component, made.name, layer if deep else None, tokens=True)
            made._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        mask = hooks.mask_of(module)
        if mask is not None:
            widen = hooks.Widen(first, count, *mask)
            made._handles.append(module.register_forward_pre_hook(widen, with_kwargs=True))
    # Before the hooks of earlier grafts: what was put in last lies innermost.
    strip = hooks.Strip(first, count)
    made._handles.append(modules[-1].register_forward_hook(strip, prepend=True))
    for module in modules[:-1]:
        set_aside = hooks.SetAside(aside, strip)
        made._handles.append(module.register_forward_hook(set_aside, prepend=True))
    _look_between(made, aside, strip)
    made._counting = tuple(  # rotary positions skip so many tokens
        inner
        for module in modules
        for inner in module.modules()
        if type(getattr(inner, "num_prefix_tokens", None)) is int
    )
    for inner in made._counting:
        inner.num_prefix_tokens += count  # type: ignore[operator, assignment]


def _look_between(made: Graft, aside: hooks.Aside, strip: hooks.Strip) -> None:
    """Watch for calls of the modules around that hand out what is between the blocks."""
    parts = made.at[0].split(".")
    for depth in range(len(parts)):
        module = made.model.get_submodule(".".join(parts[:depth]))
        if hasattr(type(module), "forward_intermediates"):
            hooks.look_between(module, aside)
            made._looking += ((module, aside),)
        elif hasattr(module, "config"):
            opening = hooks.Opening(aside)
            made._handles.append(module.register_forward_pre_hook(opening, with_kwargs=True))
            closing = hooks.Closing(opening, strip)
            made._handles.append(
                module.register_forward_hook(closing, prepend=True, always_call=True)
            )


def _put_in_front(made: Graft, anatomy: Anatomy, modules: list[nn.Module]) -> None:
    """Tokens go in front of what the embedding makes; so positions, mask and cache count them."""
    model, component = made.model, made.component
    entrance = model.get_submodule(anatomy.entrance or "")
    embedding = model.get_submodule(anatomy.embedding)
    deep = isinstance(component, DeepPrompts)
    arguments = hooks.arguments_of(entrance)
    front = hooks.Front(
        component, made.name, embedding, arguments, *made._tokens, layer=0 if deep else None
    )
    made._handles.append(entrance.register_forward_pre_hook(front, with_kwargs=True))
    for layer, module in enumerate(modules[1:] if deep else [], start=1):
        replace = hooks.Replace(front, layer)
        made._handles.append(module.register_forward_pre_hook(replace, with_kwargs=True))
    made._handles.append(entrance.register_forward_hook(hooks.Back(front), prepend=True))


def _count_tokens(grafts: list[Graft]) -> None:
    """Tell each bias of attention which tokens were put in around it, in order."""
    for made in grafts:
        for path, bias in zip(made.at, made._biases, strict=False):  # none but biases have some
            bias.inserted = [
                g._tokens
                for g in grafts
                if g.where == "tokens" and any(f"{path}.".startswith(f"{at}.") for at in g.at)
            ]


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
    if parameters and len({id(model.get_parameter(name)) for name in chosen}) > 1:
        raise SelectionError(
            "a graft changes one parameter",
            found=", ".join(chosen[:5]),
            wanted="one path, or all names of one tied parameter",
        )
    return tuple(chosen)


def _refuse_wrapped(model: nn.Module) -> None:
    found = _compiled(model) or _wrapped(model) or _sharded(model)
    if found:
        raise LearnablesError(
            "the model is already compiled, wrapped or sharded",
            found=found,
            wanted="the bare model",
            mend="graft first, then compile, wrap, shard and build the optimizer",
        )


def _compiled(model: nn.Module) -> str:
    for name, module in model.named_modules():
        kind = name or type(model).__qualname__
        if is_compiled(module):
            return f"{kind} is compiled"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{kind} is a script"
        if isinstance(module, torch.fx.GraphModule) and _is_exported(module):
            return f"{kind} is exported: its modules are never called"
    return ""


def _is_exported(module: torch.fx.GraphModule) -> bool:
    """Whether its graph reads the parameters itself, as after ``torch.export``."""
    called = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    holds = any(any(True for _ in module.get_submodule(name).parameters()) for name in called)
    return not holds and any(node.op == "get_attr" for node in module.graph.nodes)


def _wrapped(model: nn.Module) -> str:
    if len(model._modules) == 1 and any(p in model._modules for p in WRAPPER_PREFIXES):
        # What people write themselves may have a child called `module`, too.
        kinds = type(model).__mro__[: type(model).__mro__.index(nn.Module)]
        theirs = [kind for kind in kinds if kind.__module__.split(".")[0] in _WRAPPING]
        if theirs and not isinstance(model, (nn.Sequential, nn.ModuleDict)):
            return f"{type(model).__qualname__} around the model"
    for name, module in model.named_modules():
        # Outside of it the component would be one that no rank hears of from the others.
        if isinstance(module, _SPREADING) or "_fsdp_wrapped_module" in module._modules:
            return f"{type(module).__qualname__} around {name}"
    return ""


def _sharded(model: nn.Module) -> str:
    for name, param in model.named_parameters():
        if is_dtensor(param):
            return f"{type(model).__qualname__} with {[name]} sharded"
    return ""
