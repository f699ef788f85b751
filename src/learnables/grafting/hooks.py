"""What calls a grafted component: plain objects, so that a model with them is copied and pickled.

Shapes: B batch, N tokens, P tokens put in, D dim, H heads, K keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from learnables.errors import LearnablesError, ShapeError

# What torch says of shapes that do not go together: sums, products, convolutions.
_MISFITS = ("must match", "cannot be multiplied", "expected input", "normalized_shape")
_MIXED = ("same dtype", "expected scalar type", "should be the same")  # and of dtypes
_MASKS = ("attention_mask", "attn_mask")
_BETWEEN, _ASIDES = "forward_intermediates", "_learnables_asides"
_AGAIN = ("grad_checkpointing", "is_gradient_checkpointing")  # of timm and of transformers


@dataclass
class Enter:
    """Before a module: its first input goes through the component.

    Attributes:
        layer: Which of the layers of deep prompts.
        tokens: Whether the component puts tokens in.
    """

    component: nn.Module
    name: str
    layer: int | None = None
    tokens: bool = False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called by torch before the forward; returns what the forward gets.

        Raises:
            ShapeError: The module gets no tensor.
        """
        more = () if self.layer is None else (self.layer,)
        return _with_first(args, kwargs, self.name, lambda x: self.through(x, *more))

    def through(self, x: Tensor, *more: int) -> Tensor:
        """(B, N, D) → what the component makes of it.

        Raises:
            ShapeError: It is no sequence of tokens, or of another width.
        """
        if self.tokens and x.ndim != 3:
            raise ShapeError(
                "tokens can be put into a sequence of tokens only",
                where=self.name,
                found=f"an input of shape {tuple(x.shape)}",
                wanted="(B, N, D)",
                mend="at= the blocks that get (B, N, D), or where='input' or where='output'",
            )
        return _through(self, x, *more)


@dataclass
class Leave:
    """After a module: its first output goes through the component."""

    component: nn.Module
    name: str

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        """Called by torch after the forward; returns what comes out."""
        if isinstance(out, tuple):
            return (_through(self, out[0]), *out[1:])
        return _through(self, out)


@dataclass
class Strip:
    """After the last block: the tokens that were put in are taken out again."""

    first: int
    count: int

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        """Called by torch after the forward; returns what comes out."""
        if isinstance(out, tuple):
            return (self.without(out[0]), *out[1:])
        return self.without(out)

    def without(self, x: Tensor) -> Tensor:
        """(B, N + P, D) → (B, N, D)."""
        return torch.cat([x[:, : self.first], x[:, self.first + self.count :]], dim=1)


# --- between the blocks --------------------------------------------------------------------------


@dataclass
class Aside:
    """Where tokens wait between two blocks, while somebody looks at what is between them.

    Feature maps and hidden states of inner blocks are then the sequences that the model knows. At
    all other times the tokens stay in the sequence, which costs nothing.

    Attributes:
        name: The graft's.
        looks: How many calls that look are running.
        states: What waits.
    """

    name: str
    looks: int = 0
    states: Tensor | None = None

    def open(self, module: nn.Module) -> None:
        """A call of ``module`` begins that looks between its blocks.

        Raises:
            LearnablesError: Its blocks are to be computed again in backward: what waits would then
                be of another block.
        """
        again = any(getattr(module, name, False) is True for name in _AGAIN)
        if again and torch.is_grad_enabled():
            raise LearnablesError(
                "what is between checkpointed blocks cannot be handed out with tokens put in",
                where=self.name,
                found=f"{type(module).__qualname__} with gradient checkpointing",
                wanted="hidden states or intermediates without it, or without gradients",
                mend="with torch.no_grad(): …",
            )
        self.looks += 1

    def close(self) -> None:
        """It ended, or raised."""
        self.looks -= 1
        if not self.looks:
            self.states = None


@dataclass
class SetAside:
    """After a block that is not the last one: the tokens wait, where somebody looks."""

    aside: Aside
    strip: Strip

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        """Called by torch after the forward; returns what comes out."""
        if not self.aside.looks:
            return None
        x = out[0] if isinstance(out, tuple) else out
        self.aside.states = x[:, self.strip.first : self.strip.first + self.strip.count]
        return self.strip(module, args, out)


@dataclass
class Rejoin:
    """Before a block that is not the first one: the tokens that waited are put in again."""

    aside: Aside
    first: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called by torch before the forward; returns what the forward gets."""
        states = self.aside.states
        if states is None:
            return None
        self.aside.states = None
        at = self.first

        def joined(x: Tensor) -> Tensor:
            return torch.cat([x[:, :at], states, x[:, at:]], dim=1)

        return _with_first(args, kwargs, self.aside.name, joined)


@dataclass
class Opening:
    """Before a model of transformers: whether this call is asked for what is between the blocks."""

    aside: Aside
    opened: list[bool] = field(default_factory=list)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Called by torch before the forward.

        Raises:
            LearnablesError: A backbone makes a map of what goes into the first block, where the
                tokens are already.
        """
        maps = getattr(module, "out_features", None)  # of backbones a list of names
        maps = maps if isinstance(maps, (list, tuple)) else ()
        if "stem" in maps:
            raise LearnablesError(
                "the stem's feature map cannot be handed out with tokens put in",
                where=self.aside.name,
                found=f"{type(module).__qualname__} with out_features={[*maps]}",
                wanted="feature maps of blocks",
                mend="out_features without 'stem'",
            )
        asked = kwargs.get("output_hidden_states")
        if asked is None:
            asked = getattr(module.config, "output_hidden_states", False)
        # Backbones make feature maps of inner blocks, asked or not; a list asks for some states.
        looks = asked not in (None, False) or bool(maps)
        if looks:
            self.aside.open(module)
        self.opened.append(looks)


@dataclass
class Closing:
    """After it, also where it raised."""

    opening: Opening
    strip: Strip

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        """Called by torch after the forward; returns what comes out."""
        if not (self.opening.opened and self.opening.opened.pop()):
            return None
        self.opening.aside.close()
        # The first of the hidden states was taken of what the first block has got.
        if isinstance(out, tuple):
            return tuple(self.without(part) for part in out)
        if not is_dataclass(out):
            return None
        kind: Any = type(out)
        return kind(**{part.name: self.without(getattr(out, part.name)) for part in fields(out)})

    def without(self, part: Any) -> Any:
        """The states of all blocks and of what went into the first one, which lacks the tokens."""
        if not isinstance(part, tuple) or len(part) < 2:
            return part
        first, second = part[:2]
        states = isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim == 3
        if not states or first.shape[1] == second.shape[1]:
            return part
        return (self.strip.without(first), *part[1:])


def look_between(module: nn.Module, aside: Aside) -> None:
    """Let ``module.forward_intermediates``, as timm's models have it, hand out what it knows."""
    asides = module.__dict__.setdefault(_ASIDES, [])
    asides.append(aside)
    # In the module's own __dict__: copied, pickled and moved with it.
    module.__dict__[_BETWEEN] = partial(_between, module)


def look_no_more(module: nn.Module, aside: Aside) -> None:
    """Undo `look_between`."""
    asides = module.__dict__[_ASIDES]
    asides.remove(aside)
    if not asides:
        del module.__dict__[_ASIDES], module.__dict__[_BETWEEN]


def _between(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    opened: list[Aside] = []
    try:
        for aside in module.__dict__[_ASIDES]:
            aside.open(module)
            opened.append(aside)
        return getattr(type(module), _BETWEEN)(module, *args, **kwargs)
    finally:
        for aside in opened:
            aside.close()


# --- masks and biases ----------------------------------------------------------------------------


@dataclass
class Widen:
    """Before a block: the mask that it is given gets the tokens that were put in, all visible.

    As torch's ``scaled_dot_product_attention`` and transformers have it: True, 1 or an added 0 is
    visible. The new tokens see what the first token sees: the text without its padding.

    Attributes:
        keyword: Name of the mask among the arguments of the block.
        place: Its place among them.
    """

    first: int
    count: int
    keyword: str
    place: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called by torch before the forward; returns what the forward gets.

        Raises:
            LearnablesError: The mask is no tensor, or what True means in it is not known.
        """
        mask = _given(args, kwargs, self.keyword, self.place)
        if mask is None:
            return args, kwargs
        if not isinstance(mask, Tensor):
            raise LearnablesError(
                "this mask of attention cannot be widened for further tokens",
                where=self.keyword,
                found=type(mask).__qualname__,
                wanted="a tensor (B, N), (B, 1, N, N) or None",
                mend="model.set_attn_implementation('sdpa')",
            )
        _refuse_unclear(module, self.keyword, mask)
        return _with(args, kwargs, self.keyword, self.place, self.wider(mask))

    def wider(self, mask: Tensor) -> Tensor:
        """(B, N) → (B, N + P); (…, N or 1, N) → (…, N + P or 1, N + P)."""
        visible = 0.0 if mask.is_floating_point() and mask.ndim > 2 else 1
        mask = _put_in(mask, -1, self.first, self.count, visible)
        if mask.ndim == 2 or mask.shape[-2] == 1:
            return mask
        rows = mask[..., :1, :].expand(*mask.shape[:-2], self.count, -1)
        return torch.cat([mask[..., : self.first, :], rows, mask[..., self.first :, :]], dim=-2)


def mask_of(module: nn.Module) -> tuple[str, int] | None:
    """Name and place of the mask of attention among the arguments of ``module``'s forward.

    None for torch's own modules, whose masks are bound to what else they are given.
    """
    names = arguments_of(module)
    theirs = type(module).__module__.startswith("torch.")
    for keyword in _MASKS:
        if keyword in names and not theirs:
            return keyword, names.index(keyword)
    return None


def _refuse_unclear(module: nn.Module, keyword: str, mask: Tensor) -> None:
    # True is visible in timm's attn_mask, as in scaled_dot_product_attention, and hidden in that of
    # nn.MultiheadAttention; in a module of somebody's own it may be either.
    timms = type(module).__module__.startswith("timm.")
    if keyword == "attn_mask" and mask.dtype == torch.bool and not timms:
        raise LearnablesError(
            "True may mean visible or hidden in this mask",
            where=keyword,
            found=f"a mask of booleans for {type(module).__qualname__}",
            wanted="a mask that is added to the logits: 0 is visible, −inf hidden",
        )


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of ``module``'s forward."""
    return tuple(signature(type(module).forward).parameters)[1:]


@dataclass
class AddBias:
    """Before attention: the component's bias is added to the mask, and so to the logits.

    Attributes:
        inserted: First place and number of the tokens of each graft that puts in tokens, in the
            order in which they are put in; they get no bias.
    """

    component: nn.Module
    name: str
    keyword: str
    place: int
    inserted: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called by torch before the forward; returns what the forward gets.

        Raises:
            ShapeError: The bias has another number of tokens than the input.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        bias: Tensor = self.component.bias()  # type: ignore[operator]
        for first, count in self.inserted:
            for dim in (-1, -2):
                bias = _put_in(bias, dim, first, count, 0.0)
        if bias.shape[-1] != x.shape[-2]:
            raise ShapeError(
                "the bias has another number of tokens than the model",
                where=self.name,
                found=f"{bias.shape[-1]} tokens, {tuple(bias.shape)}",
                wanted=f"{x.shape[-2]} tokens, for an input of shape {tuple(x.shape)}",
                mend="build it with the window and the prefix tokens of the model",
            )
        bias = bias.to(x.dtype)[None]  # (1, H, N, N)
        mask = _given(args, kwargs, self.keyword, self.place)
        if mask is not None and mask.dtype == torch.bool:
            _refuse_unclear(module, self.keyword, mask)
            bias = bias.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            bias = bias + mask
        return _with(args, kwargs, self.keyword, self.place, bias)


# --- decoders: ids, a causal mask, positions and a cache -----------------------------------------


@dataclass
class Front:
    """Before a decoder: the ids become vectors with the tokens among them; mask and positions fit.

    With a cache the tokens are put in once: they are in the cache afterwards.

    Attributes:
        arguments: Names of the arguments of the decoder's forward.
        put: How many tokens this forward has put in.
    """

    component: nn.Module
    name: str
    embedding: nn.Module
    arguments: tuple[str, ...]
    first: int
    count: int
    layer: int | None = None
    put: int = 0

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called by torch before the forward; returns what the forward gets."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        cache, ids = given.get("past_key_values"), given.pop("input_ids", None)
        self.refuse(given, cache)
        x = given.get("inputs_embeds")
        x = self.embedding(ids) if x is None else x
        past = 0 if cache is None else int(cache.get_seq_length())
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if past:
            self.check_continued(mask, positions, past + x.shape[1])
        if positions is not None:
            given["position_ids"] = positions + self.count
        if past == 0:
            self.check_whole(mask, positions)
            more = () if self.layer is None else (self.layer,)
            x = _through(self, x, *more)
            if positions is not None:
                given["position_ids"] = self.counted(positions)
        if mask is not None:
            given["attention_mask"] = _put_in(mask, -1, self.first, self.count, 1)
        self.put = 0 if past else self.count
        given["inputs_embeds"] = x
        return (), given

    def counted(self, positions: Tensor) -> Tensor:
        """(B, N) → (B, N + P): the tokens take the places from that of the first behind them."""
        front, back = positions[..., : self.first], positions[..., self.first :]
        own = torch.arange(self.count, device=positions.device, dtype=positions.dtype) + self.first
        own = own.expand(*positions.shape[:-1], -1)
        return torch.cat([front, own, back + self.count], dim=-1)

    def check_whole(self, mask: Tensor | None, positions: Tensor | None) -> None:
        """Whether each row is one text that begins where the tokens of ``prefix`` are.

        Raises:
            LearnablesError: Padding stands there, or positions begin anew, as transformers has it
                for packed texts.
        """
        if torch.compiler.is_compiling():  # values cannot be asked for there
            return
        found = ""
        if mask is not None and self.first and not bool(mask[..., : self.first].all()):
            found, wanted = f"padding within the first {self.first} ids", "prefix=0"
        several = mask is None and positions is not None and positions.shape[-1] > 1
        if several and bool((positions.diff(dim=-1) < 0).any()):  # type: ignore[union-attr]
            found, wanted = "packed texts: position_ids that begin anew", "one text in each row"
        if found:
            raise LearnablesError(
                "the tokens would not stand in front of each text",
                where=self.name,
                found=found,
                wanted=wanted,
            )

    def check_continued(self, mask: Tensor | None, positions: Tensor | None, seen: int) -> None:
        """Whether ids were left out, since a cache is longer than the text by the tokens in it.

        ``generate`` does that where it is handed a cache of an earlier call.

        Args:
            mask: (B, K), K the length of the text so far.
            positions: Of the ids of this call.
            seen: Length of the cache and of this call.

        Raises:
            LearnablesError: The text is longer than what the cache and this call hold.
        """
        text = 0 if mask is None else mask.shape[-1]
        several = positions is not None and positions.shape[-1] > 1  # one is never left out
        if mask is None and several and not torch.compiler.is_compiling():
            text = int(positions.max()) + 1  # type: ignore[union-attr]
        if text + self.count > seen:
            raise LearnablesError(
                "ids of this call were left out: the cache is longer than the text before it",
                where=self.name,
                found=f"a text of {text} ids, {seen - self.count} of them in the cache or given",
                wanted="all ids that are not in the cache",
                mend="generate without past_key_values=, or call the model with the new ids",
            )

    def refuse(self, given: dict[str, Any], cache: Any) -> None:
        """Refuse arguments that count tokens in a way that is not known here.

        Raises:
            LearnablesError: A mask that is no (B, K), a cache of fixed size, types of tokens.
        """
        mask = given.get("attention_mask")
        found = ""
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__qualname__
            found, wanted = f"attention_mask {shape}", "(B, K), or none"
        elif cache is not None and getattr(cache, "is_compileable", False):
            found, wanted = f"{type(cache).__qualname__}", "a DynamicCache, which grows"
        elif given.get("token_type_ids") is not None:
            found, wanted = "token_type_ids", "none"
        if found:
            raise LearnablesError(
                "tokens cannot be put in front of this call",
                where=self.name,
                found=found,
                wanted=wanted,
            )


@dataclass
class Replace:
    """Before a later block of a decoder: deep prompts are replaced, where they were put in."""

    front: Front
    layer: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called by torch before the forward; returns what the forward gets."""
        if not self.front.put:
            return args, kwargs
        return Enter(self.front.component, self.front.name, self.layer)(module, args, kwargs)


@dataclass
class Back:
    """After a decoder: the states of the tokens are taken out again, where they were put in."""

    front: Front

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        """Called by torch after the forward; returns what comes out."""
        if not self.front.put:
            return out
        strip = Strip(self.front.first, self.front.count)
        if not is_dataclass(out):
            return strip(module, args, out)
        changed: dict[str, Any] = {}
        for part in fields(out):
            value = getattr(out, part.name)
            if part.name == "last_hidden_state":
                value = strip.without(value)
            elif part.name == "hidden_states" and value is not None:
                value = tuple(strip.without(x) for x in value)
            changed[part.name] = value
        kind: Any = type(out)
        return kind(**changed)


# --- small parts ---------------------------------------------------------------------------------


def _through(hook: Enter | Leave | Front, x: Tensor, *more: int) -> Tensor:
    tokens = getattr(hook.component, "tokens", None)
    if isinstance(tokens, Tensor):
        check_width(hook.name, tokens, tuple(x.shape), x.shape[-1])
    try:
        out: Tensor = hook.component(x, *more)
    except RuntimeError as error:
        known = misfit(error, hook.component, hook.name, x)
        if known is None:
            raise
        raise known from error
    return out


def misfit(
    error: RuntimeError, component: nn.Module, name: str, x: Tensor
) -> LearnablesError | None:
    """What torch says when ``x`` goes through ``component``, by their names; None of other errors.

    Args:
        error: What was raised.
        component: The component.
        name: The graft's, or the parameter's.
        x: What went through it.
    """
    kind, said = type(component).__qualname__, str(error)
    if any(says in said for says in _MISFITS):
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in component.named_parameters())
        return ShapeError(
            "the component does not fit what goes through it",
            where=name,
            found=f"{kind} with {shapes}",
            wanted=f"parameters that fit a tensor of shape {tuple(x.shape)}",
            mend="build the component with the dim of the model",
        )
    dtypes = {param.dtype for param in component.parameters()} - {x.dtype}
    if dtypes and any(says in said for says in _MIXED):
        return LearnablesError(
            "the component has another dtype than what goes through it",
            where=name,
            found=f"{kind} in {', '.join(sorted(map(str, dtypes)))}",
            wanted=f"parameters in {x.dtype}, or a component that casts",
            mend=f"component.to({x.dtype})",
        )
    return None


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with their first tensor changed.

    Raises:
        ShapeError: There is none.
    """
    if args:
        return (change(args[0]), *args[1:]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, key: change(value)}
    raise ShapeError(
        "the module that is grafted gets no tensor", where=name, wanted="one input tensor"
    )


def check_width(name: str, ours: Tensor, theirs: object, width: int) -> None:
    """Compare the width of a component with that of the model.

    Raises:
        ShapeError: They differ.
    """
    if ours.shape[-1] == width:
        return
    raise ShapeError(
        "the component does not fit the width of the model",
        where=name,
        found=f"component of shape {tuple(ours.shape)}",
        wanted=f"the last dimension of {theirs}",
        mend="build the component with the dim of the model",
    )


def _put_in(x: Tensor, dim: int, first: int, count: int, value: float) -> Tensor:
    """``count`` entries of ``value`` after the first ``first`` along ``dim``."""
    size = list(x.shape)
    size[dim] = count
    front, back = x.narrow(dim, 0, first), x.narrow(dim, first, x.shape[dim] - first)
    return torch.cat([front, x.new_full(size, value), back], dim=dim)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], keyword: str, place: int) -> Any:
    return args[place] if place < len(args) else kwargs.get(keyword)


def _with(
    args: tuple[Any, ...], kwargs: dict[str, Any], keyword: str, place: int, value: object
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, keyword: value}
