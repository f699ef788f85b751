"""Follow every parameter through the calls of a step, to say where its path to the loss ends.

A torch function mode sees each call with its inputs and outputs. Two sets travel along, as bits of
an integer: the parameters that a tensor *depends on through the graph*, and the *cuts* behind which
a value lives on without graph. A parameter without a useful gradient then has one of five endings:

* ``cut``: a call had it in a graph and gave back something without graph;
* ``dropped``: the last result that depends on it was never used;
* ``unused``: it entered no call at all;
* ``stale``: the graph that brings its gradient was built before the iteration began;
* ``silent``: it is in the graph of the loss, and its gradient is None, zero or not finite: a second
  look, with hooks on the results that depend on it, names the call that returns nothing useful.
"""

import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from learnables._torch import is_dtensor, leaves_of, remove_function_mode, sequence_now, tensors_in
from learnables.auditing.evidence import Ending
from learnables.auditing.patches import Patches
from learnables.auditing.places import is_users
from learnables.runtime.precision import Judge

_NUMBERS = (int, float, complex, bool, list)
_GETTERS_THAT_COUNT = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
# Calls that say nothing about where a value goes: shapes, flags, printing, fresh tensors.
_QUIET_NAMES = """
    size dim ndimension numel nelement stride storage_offset element_size is_contiguous data_ptr
    is_floating_point is_complex is_signed is_nonzero is_same_size is_set_to get_device __len__
    __repr__ __format__ __hash__ __str__ __dir__ __reduce_ex__ __deepcopy__ type requires_grad_
    retain_grad register_hook register_post_accumulate_grad_hook backward untyped_storage storage
    has_names is_pinned share_memory_ is_shared zeros_like ones_like empty_like rand_like randn_like
    randint_like full_like new_zeros new_ones new_empty new_full new_tensor zero_ fill_ normal_
    uniform_ trunc_normal_ is_tensor result_type isnan isinf isfinite is_inference
"""
_TO_PYTHON_NAMES = "item tolist __float__ __int__ __bool__ __index__ __complex__ __array__ numpy"
_VIEW_NAMES = """
    __getitem__ view reshape unsqueeze squeeze expand expand_as transpose permute flatten to float
    half double bfloat16 type_as contiguous t T mT select narrow view_as unflatten
"""
_SAID = frozenset({"data", "detach", "detach_", "item", "tolist", "numpy", "nn.Parameter(...)"})
_ADDITIVE_NAMES = "add add_ __add__ __radd__ __iadd__ sub __sub__ __rsub__ sub_"
_WITH_BIAS_NAMES = "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d"
_QUIET, _TO_PYTHON, _VIEWS, _ADDITIVE, _WITH_BIAS = (
    frozenset(names.split())
    for names in (_QUIET_NAMES, _TO_PYTHON_NAMES, _VIEW_NAMES, _ADDITIVE_NAMES, _WITH_BIAS_NAMES)
)


_JOIN_NAMES = "cat concat concatenate stack hstack vstack dstack pad"
_TAKE_NAMES = """
    __getitem__ __setitem__ narrow select split chunk unbind index_select index_copy index_copy_
    index_fill_ masked_fill masked_fill_ masked_scatter_ take gather slice_scatter select_scatter
"""
_JOINS, _TAKES = (frozenset(names.split()) for names in (_JOIN_NAMES, _TAKE_NAMES))
_REMOVES_SHIFT = re.compile("softmax|_norm$|attention|cross_entropy|nll_loss|std|var")


class Record:
    """One call whose result depends on a parameter."""

    __slots__ = (
        "bits",
        "code",
        "dead",
        "eaten",
        "gradient",
        "inputs",
        "line",
        "op",
        "own",
        "shift",
    )

    def __init__(self, op: str, code: CodeType | None, line: int, bits: int, dead: int) -> None:
        self.op, self.code, self.line, self.bits, self.dead = op, code, line, bits, dead
        self.eaten = False
        self.inputs: tuple[Record, ...] = ()  # second look only
        self.own = 0  # parameters that enter this call directly
        self.shift = 0  # parameters that enter it as a term that is added
        self.gradient: tuple[bool, bool, float] | None = None  # (zero, finite, sum of sizes)

    @property
    def location(self) -> str | None:
        """``file:line`` of the user's code."""
        return f"{self.code.co_filename}:{self.line}" if self.code is not None else None


class Trace(TorchFunctionMode):
    """Watches the calls of a step. Use as a context manager, with `begin` and `end` inside it.

    Args:
        params: What to follow.
        stand_ins: Gives (tensor, the parameter it stands in for) for all that are registered at the
            moment: while a module runs, FSDP2 registers whole tensors in the place of shards.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        stand_ins: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None,
    ) -> None:
        super().__init__()
        self.params = list(params)
        self._stand_ins = stand_ins if any(map(is_dtensor, self.params)) else None
        self._standing: list[Tensor] = []  # kept alive, so that their ids stay theirs
        self.paused = 0
        self.is_on = False
        self.endings: dict[int, Ending] = {}
        self._stale: dict[int, Ending] = {}
        self.shifts: dict[int, float] = {}
        self.removed: set[int] = set()
        self.promotions: Judge | None = None
        """Judges what makes activations float32, where that is wanted."""
        self.written: dict[int, str] = {}
        self.functions: dict[type, tuple[Any, str | None]] = {}
        self._suspects = 0
        self._bit = {id(p): 1 << i for i, p in enumerate(self.params)}
        self._of: dict[int, tuple[Any, Record]] = {}
        self._kinds: dict[Any, tuple[str, int]] = {}
        self._patches = Patches()
        self.begin()

    def begin(self) -> None:
        """A new iteration: forget the calls of the last one."""
        self.on_graph: Callable[[int], None] | None = None
        """Called once, when the next graph begins, with a number older than all its nodes."""
        self._records: list[Record] = []
        self._of.clear()
        self._cuts: list[tuple[Record, int]] = []
        self._cut_index: dict[tuple[str, CodeType | None, int], int] = {}
        self._states: dict[int, int] = {}
        self._roots_bits = self._roots_dead = self._used = 0
        self._gradients: dict[int, tuple[bool, bool, float]] = {}
        self._strangers: dict[int, tuple[Tensor, CodeType | None, int]] = {}
        if self.promotions is not None:
            self.promotions.begin()

    # -- opening and closing --------------------------------------------------------------------

    def __enter__(self) -> "Trace":
        """Start to watch."""
        self._patches.wrap(torch.autograd.Function, "apply", self._wrap_apply)
        self._patches.wrap(torch.Tensor, "_make_subclass", self._wrap_make)
        super().__enter__()  # type: ignore[no-untyped-call]
        self.is_on = True
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, also where other modes were entered since and are still open."""
        self._patches.undo()
        if self.is_on:
            remove_function_mode(self)
        self.is_on = False

    def follow(self, param: Tensor) -> None:
        """Follow a Parameter more."""
        self._bit[id(param)] = 1 << len(self.params)
        self.params.append(param)

    def follow_state(self, x: Tensor) -> None:
        """Follow the value that ``x``, which asks for no gradient, has as the iteration begins."""
        index = len(self._cuts)
        record = Record("state", None, 0, 0, 1 << index)
        self._cuts.append((record, 0))
        self._states[id(x)] = index
        self._remember(x, record)

    def reached_loss(self, x: Tensor) -> bool:
        """Whether the value given to `follow_state` flowed into what backward was called on."""
        index = self._states.get(id(x))
        return index is not None and bool(self._roots_dead >> index & 1)

    # -- the calls ------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call; note what its result depends on."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        out = self._follow(func, args, kwargs)
        if self.promotions is not None and not self.paused:
            self.promotions.look(func, args, kwargs, out)
        return out

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        known = self._kinds.get(func)
        if known is None:
            known = self._kinds[func] = _kind_of(func)
        name, kind = known
        if kind == _IGNORED:
            return func(*args, **kwargs)
        bits, dead, inputs = self._gather(args, kwargs)
        if bits and self.on_graph is not None and torch.is_grad_enabled():
            before = sequence_now()
            out = func(*args, **kwargs)
            if any(x.requires_grad for x in tensors_in((out,))):
                self._tell_of_graph(before)
                bits, dead, inputs = self._gather(args, kwargs)
        else:
            out = func(*args, **kwargs)
        if (bits or dead) and not self.paused:
            self._note(name, kind, bits, dead, inputs, args, kwargs, out)
        return out

    def _tell_of_graph(self, before: int) -> None:
        tell, self.on_graph = self.on_graph, None
        if tell is not None:
            tell(before)

    def _gather(self, args: Any, kwargs: dict[str, Any]) -> tuple[int, int, list[Tensor]]:
        """What the inputs depend on, and the tensors among them."""
        bits = dead = 0
        inputs: list[Tensor] = []
        for x in tensors_in(args):
            inputs.append(x)
        if kwargs:
            inputs.extend(tensors_in(kwargs.values()))
        for x in inputs:
            own = self._bit.get(id(x), 0)
            if not own and self._stand_ins is not None and isinstance(x, torch.nn.Parameter):
                own = self._own_of_stand_in(x, self._stand_ins())
            if own:
                self._used |= own
                bits |= own if x.requires_grad else 0
            entry = self._of.get(id(x))
            if entry is not None:
                if x.requires_grad:
                    bits |= entry[1].bits
                dead |= entry[1].dead
            elif not own and x.requires_grad and x.grad_fn is not None:
                self._strangers.setdefault(id(x), (x, *_users_frame()))
        return bits, dead, inputs

    def _own_of_stand_in(self, x: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
        for stand_in, param in pairs:
            if stand_in is x and id(param) in self._bit:
                self._standing.append(x)
                self._bit[id(x)] = self._bit[id(param)]
        return self._bit.get(id(x), 0)

    def _note(
        self,
        name: str,
        kind: int,
        bits: int,
        dead: int,
        inputs: list[Tensor],
        args: Any,
        kwargs: dict[str, Any],
        out: Any,
    ) -> None:
        outs = list(tensors_in((out,)))
        if kind == _IN_PLACE and not outs and args and isinstance(args[0], Tensor):
            outs = [args[0]]  # __setitem__ gives nothing back
        alive = [x for x in outs if x.requires_grad]
        code, line = _users_frame()
        record = Record(name, code, line, bits if alive else 0, dead)
        if kind == _IN_PLACE and inputs:
            self._note_writing(inputs[0], record)
        for x in inputs:
            known = self._of.get(id(x))
            if known is not None and not (kind == _IN_PLACE and x is inputs[0]):
                known[1].eaten = True
        if bits and not alive and (outs or isinstance(out, _NUMBERS) or name in _TO_PYTHON):
            record.dead |= 1 << self._cut(record, bits)
        elif alive:
            if self._suspects & bits:
                self._look_twice(record, name, inputs, args, kwargs, alive[0])
            self._records.append(record)
        for x in outs:
            if record.bits or record.dead:
                self._remember(x, record)

    def _note_writing(self, x: Tensor, record: Record) -> None:
        """Who writes into a Parameter, itself or by way of ``.data``."""
        own = self._bit.get(id(x), 0)
        entry = self._of.get(id(x))
        if not own and entry is not None and entry[1].op in ("data", "detach"):
            index = self._cut_index.get((entry[1].op, entry[1].code, entry[1].line))
            own = self._cuts[index][1] if index is not None else 0
        if own and own & (own - 1) == 0 and record.location is not None:
            self.written[id(self.params[own.bit_length() - 1])] = record.location

    def _cut(self, record: Record, bits: int) -> int:
        if not torch.is_grad_enabled() and record.op not in ("data", "detach"):
            record.op = f"{record.op}() under no_grad"
        key = (record.op, record.code, record.line)
        index = self._cut_index.setdefault(key, len(self._cuts))
        if index == len(self._cuts):
            self._cuts.append((record, bits))
        else:
            self._cuts[index] = (self._cuts[index][0], self._cuts[index][1] | bits)
        return index

    def _remember(self, x: Tensor, record: Record) -> None:
        # No Python runs in the callback: a Ctrl-C that arrives in one is lost.
        forget = functools.partial(self._of.pop, id(x))
        self._of[id(x)] = (weakref.ref(x, forget), record)

    def _wrap_apply(self, original: Any) -> Any:
        raw = inspect.getattr_static(original.__self__, "apply")  # in C since torch 2.14

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if self.paused or cls.__module__ == "torch.utils.checkpoint":  # runs the user's calls
                return raw.__get__(None, cls)(*args, **kwargs)
            bits, dead, inputs = self._gather(args, kwargs)
            self.paused += 1
            try:
                out = raw.__get__(None, cls)(*args, **kwargs)
            finally:
                self.paused -= 1
            if bits or dead:
                name = f"{cls.__name__}.apply"
                self._note(name, _NORMAL, bits, dead, inputs, args, kwargs, out)
                if bits and not cls.__module__.startswith("torch.") and cls not in self.functions:
                    self._keep_function(cls, args, kwargs)
            return out

        return classmethod(apply)

    def _keep_function(self, cls: type, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the inputs of a user's Function, for the probe that checks its derivative."""
        small = sum(x.numel() for x in tensors_in(args)) <= 1 << 16
        if small and not kwargs:
            code, line = _users_frame()
            at = f"{code.co_filename}:{line}" if code is not None else None
            copies = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            owners = tuple(
                self._bits_of(x) if isinstance(x, Tensor) and x.requires_grad else 0 for x in args
            )
            self.functions[cls] = ((copies, owners), at)

    def _bits_of(self, x: Tensor) -> int:
        entry = self._of.get(id(x))
        return self._bit.get(id(x), 0) | (entry[1].bits if entry is not None else 0)

    def _wrap_make(self, original: Any) -> Any:
        def make(cls: Any, data: Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
            out = original(cls, data, requires_grad, **kwargs)
            if not self.paused and data.requires_grad:
                bits, dead, _ = self._gather((data,), {})
                if bits:
                    code, line = _users_frame()
                    record = Record("nn.Parameter(...)", code, line, 0, dead)
                    record.dead |= 1 << self._cut(record, bits)
                    self._remember(out, record)
                    entry = self._of.get(id(data))
                    if entry is not None:
                        entry[1].eaten = True
            return out

        return staticmethod(make)

    # -- the second look ------------------------------------------------------------------------

    def _look_twice(
        self,
        record: Record,
        name: str,
        inputs: list[Tensor],
        args: Any,
        kwargs: dict[str, Any],
        out: Tensor,
    ) -> None:
        """Hook a result that a suspect flows into, to see what gradient comes back to it."""
        record.inputs = tuple(
            entry[1] for x in inputs if (entry := self._of.get(id(x))) is not None
        )
        for x in inputs:
            record.own |= self._bit.get(id(x), 0)
        shifting: list[Any] = []
        if name in _ADDITIVE:
            shifting = [x for x in inputs if x.shape != out.shape or len(inputs) > 1]
        elif name in _WITH_BIAS:
            shifting = [kwargs.get("bias", args[2] if len(args) > 2 else None)]
        for x in shifting:
            if isinstance(x, Tensor):
                record.shift |= self._only_viewed(x)

        def note(gradient: Tensor) -> None:
            flat = gradient.detach()
            size = (
                flat.abs().sum(dtype=torch.float64) if not flat.is_complex() else flat.abs().sum()
            )
            known = record.gradient
            total = float(size) + (known[2] if known else 0.0)
            finite = bool(torch.isfinite(size)) and (known is None or known[1])
            zero = not bool(flat.any()) and (known is None or known[0])
            record.gradient = (zero, finite, total)

        out.register_hook(note)  # type: ignore[no-untyped-call]

    def _only_viewed(self, x: Tensor) -> int:
        """The bit of the parameter that ``x`` is, or is a mere view of."""
        own = self._bit.get(id(x), 0)
        entry = self._of.get(id(x))
        while not own and entry is not None and entry[1].op in _VIEWS and entry[1].own:
            own = entry[1].own
        return own if own & (own - 1) == 0 else 0

    # -- what the observer tells ----------------------------------------------------------------

    def backward_from(self, roots: Iterable[Tensor]) -> None:
        """Backward is called on these."""
        for root in roots:
            entry = self._of.get(id(root))
            if entry is not None:
                entry[1].eaten = True
                self._roots_bits |= entry[1].bits
                self._roots_dead |= entry[1].dead

    def arrived(self, param: Tensor, gradient: Tensor) -> None:
        """A backward delivered ``gradient`` to ``param``."""
        bit = self._bit.get(id(param), 0)
        if bit & self._suspects:
            size = gradient.detach().abs().sum(dtype=torch.float64)
            known = self._gradients.get(bit, (True, True, 0.0))
            zero = known[0] and not bool(gradient.any())
            finite = known[1] and bool(torch.isfinite(size))
            self._gradients[bit] = (zero, finite, known[2] + float(size))

    def stale(self, params: Iterable[Tensor]) -> None:
        """The graph of these was built before the iteration: say where its result enters."""
        for param in params:
            for x, code, line in self._strangers.values():
                if id(param) in leaves_of(x) and id(param) in self._bit:
                    at = f"{code.co_filename}:{line}" if code is not None else None
                    self._stale[id(param)] = Ending("stale", "", at)

    def suspect(self, params: Iterable[Tensor]) -> None:
        """Look twice at these from the next iteration on."""
        for p in params:
            self._suspects |= self._bit.get(id(p), 0)

    def used(self, param: Tensor) -> bool:
        """Whether it entered a call in this iteration."""
        return bool(self._used & self._bit.get(id(param), 0))

    def end(self, unhappy: Iterable[Tensor]) -> None:
        """The iteration is over: find the endings of the parameters without useful gradient."""
        for param in unhappy:
            bit = self._bit.get(id(param), 0)
            if bit:
                self.endings[id(param)] = self._ending(bit)
        self.endings.update(self._stale)
        self._strangers.clear()
        suspects = [p for p in self.params if self._bit[id(p)] & self._suspects]
        for param in suspects:
            self._measure_shift(param)

    def _ending(self, bit: int) -> Ending:
        if bit & self._roots_bits:
            return self._silent(bit)
        cuts = [(i, cut) for i, (cut, bits) in enumerate(self._cuts) if bits & bit]
        flowing = [cut for i, cut in cuts if self._roots_dead >> i & 1]
        if flowing:  # an action that was sampled on the way is no culprit where somebody detaches
            said = next((cut for cut in flowing if cut.op in _SAID), flowing[0])
            return Ending("cut", said.op, said.location)
        dropped = [r for r in self._records if r.bits & bit and not r.eaten]
        to_python = [cut for _, cut in cuts if cut.op.partition("(")[0] in _TO_PYTHON]
        if dropped and not to_python:
            return Ending("dropped", dropped[-1].op, dropped[-1].location)
        if cuts:
            return Ending("cut", cuts[0][1].op, cuts[0][1].location)
        if not self._used & bit:
            return Ending("unused")
        last = next((r for r in reversed(self._records) if r.bits & bit), None)
        return Ending("dropped", last.op, last.location) if last else Ending("unused")

    def _silent(self, bit: int) -> Ending:
        """The call closest to the loss that is given a good gradient and passes none on."""
        given = [r for r in reversed(self._records) if r.bits & bit and _is_good(r.gradient)]
        for record in given:
            behind = [r.gradient for r in record.inputs if r.bits & bit]
            if behind and not any(map(_is_good, behind)):
                taker = self._taker(record)
                return Ending("silent", taker.op, taker.location)
        # What arrives at the parameter is the sum over all its uses, so this is the weaker sign.
        if not _is_good(self._gradients.get(bit)):
            direct = next((r for r in given if r.own & bit), None)
            if direct is not None:
                taker = self._taker(direct)
                return Ending("silent", taker.op, taker.location)
        last = next((r for r in self._records if r.bits & bit), None)
        return Ending("silent", last.op, last.location) if last else Ending("silent")

    def _taker(self, record: Record) -> Record:
        """Joining tensors loses nothing; who takes or overwrites a part of the result does."""
        if record.op not in _JOINS:
            return record
        takes = (r for r in self._records if record in r.inputs and r.op in _TAKES)
        return next(takes, record)

    def _measure_shift(self, param: Tensor) -> None:
        """|sum of the gradients| ÷ sum of their sizes, where the parameter is a term that is added.

        Near the machine precision it says that the gradients cancel: nothing depends on it.
        """
        bit = self._bit[id(param)]
        own = self._gradients.get(bit)
        uses = [r for r in self._records if r.own & bit or r.shift & bit]
        if own is None or not uses or any(not r.shift & bit or r.gradient is None for r in uses):
            return
        if any(r.bits & bit and _REMOVES_SHIFT.search(r.op) for r in self._records):
            self.removed.add(id(param))
        total = sum(r.gradient[2] for r in uses if r.gradient is not None)
        if total > 0:
            self.shifts[id(param)] = max(self.shifts.get(id(param), 0.0), own[2] / total)


_IGNORED, _NORMAL, _IN_PLACE = range(3)


def _is_good(gradient: tuple[bool, bool, float] | None) -> bool:
    return gradient is not None and not gradient[0] and gradient[1]


def _kind_of(func: Any) -> tuple[str, int]:
    """(name as people write it, how to treat it) of a torch function."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name, _NORMAL if name in _GETTERS_THAT_COUNT else _IGNORED
    if name in ("__set__", "__delete__") or name in _QUIET:
        return name, _IGNORED
    if name.startswith("_") and not name.startswith("__"):
        return name, _NORMAL if name.startswith(("_foreach", "_thnn", "_weight")) else _IGNORED
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    return name, _IN_PLACE if in_place or name.startswith("__i") else _NORMAL


_users_code: dict[CodeType, bool] = {}


def _users_frame() -> tuple[CodeType | None, int]:
    """Code object and line of the innermost frame of the user's code."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        users = _users_code.get(code)
        if users is None:
            users = _users_code[code] = is_users(code.co_filename)
        if users:
            return code, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None, 0
