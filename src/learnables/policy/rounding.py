"""What a step loses when it is rounded to the parameter's own dtype, and three ways to keep it.

Between two bfloat16 numbers near 1 lie 0.0078: AdamW with a learning rate of 1e-3 leaves such a
parameter exactly where it is, for ever. So for the time of the step the optimizer, whichever it is,
is given float32 copies in place of these parameters; afterwards they are rounded back, and what the
rounding cuts off is carried over or drawn for.

The optimizer's own groups and state hold the copies only between its pre-hooks and its post-hooks.
All that outlives a step lies in ``optimizer.state[parameter]``, so any checkpoint keeps it.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Literal, TypeAlias, TypeVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._native import rounding as native
from learnables._torch import (
    add_all_,
    add_to_all_,
    copy_all_,
    is_dtensor,
    keep_gradient_in,
    local,
    rank_and_world,
    sharded_as,
)
from learnables.errors import PolicyError

_T = TypeVar("_T")
Mode: TypeAlias = Literal["kahan", "stochastic", "master"]
MODES: tuple[Mode, ...] = ("kahan", "stochastic", "master")

# Our keys in the state of a parameter.
CARRY, MASTER, COUNT = "rounding_error", "rounding_master", "rounding_step"
_OURS = (CARRY, MASTER, COUNT)
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)  # halves of a float32
_HALF = 0x8000  # half a unit of the upper half
_ROOM = 1 << 21  # elements
_ALIGNED = 16  # elements: copies in one buffer start where vector instructions like it
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ROUNDED = (torch.bfloat16, torch.float16, *_FP8)
"""Dtypes whose steps can be rounded better than to the nearest."""
# Bits of the mantissa, and the exponent of the smallest normal number.
_FORMAT = {torch.float16: (10, -14), torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}


@dataclass(eq=False)
class Rounded:
    """One parameter that is rounded.

    Attributes:
        name: Its qualified name.
        param: The parameter.
        mode: ``"kahan"``, ``"stochastic"`` or ``"master"``.
    """

    name: str
    param: nn.Parameter
    mode: Mode
    copy: Tensor | None = None  # stands for it while the optimizer steps
    values: Tensor = field(default_factory=lambda: torch.empty(0))  # what the copy was given
    ours: dict[str, Any] = field(default_factory=dict)  # our part of its state, meanwhile


@final
class Rounding:
    """Gives an optimizer float32 copies of some parameters for the time of each step.

    Args:
        optimizer: Any torch optimizer.
        rounded: The parameters, which it holds.
        state_dtype: What its state of a parameter's shape is kept in: ``torch.float32`` as the
            optimizer computes it, or ``torch.bfloat16``, rounded stochastically.
    """

    def __init__(
        self, optimizer: Optimizer, rounded: Sequence[Rounded], state_dtype: torch.dtype
    ) -> None:
        self.optimizer, self.state_dtype = optimizer, state_dtype
        self.rounded = {id(one.param): one for one in rounded}
        self._live: list[Rounded] = []
        self._are_in = False
        self._loading: Mapping[str, Any] | None = None
        for one in rounded:
            self._check_state(one)
            if one.param.dtype is not torch.bfloat16 and rank_and_world()[1] == 1:
                # What a GradScaler can unscale; DDP's buckets have no room for it.
                keep_gradient_in(one.param, torch.float32)
        self._hooks = [
            optimizer.register_state_dict_pre_hook(lambda _: self.settle()),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

    def remove(self) -> None:
        """Leave the optimizer alone from now on; what was carried stays in its state."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # --- around the step ------------------------------------------------------------------------

    def before_step(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Put the copies in; returns other arguments where the step evaluates a closure."""
        self.settle()  # of a step that raised
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._put_in(every=callable(closure))
        if not callable(closure):
            return None

        def evaluate() -> Any:
            self._write_values(self._live)
            self._exchange(back=True)
            try:
                with torch.enable_grad():
                    return closure()
            finally:
                self._exchange()
                self._take_gradients()

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluate}
        return (args[0], evaluate, *args[2:]), kwargs

    @torch.no_grad()
    def after_step(self) -> None:
        """Round the copies back and take them out."""
        live = self._live
        if not live:
            return
        self._write_values(live, spoil=True)
        self._exchange(back=True)
        self._narrow_state()
        for one in live:
            one.ours[COUNT] = one.ours.get(COUNT, 0) + 1
        self.settle()

    def settle(self) -> None:
        """Take the copies out, if they are in, as they are: a step that raised moves nothing."""
        if not self._live:
            return
        if self._are_in:
            self._exchange(back=True)
            self._narrow_state()
        for one in self._live:
            if one.ours:
                self.optimizer.state[one.param].update(one.ours)
            one.copy, one.ours, one.values = None, {}, torch.empty(0)
        self._live = []

    def working(self, param: nn.Parameter) -> Tensor:
        """What stands for ``param`` at the moment: its copy during a step, else itself."""
        one = self.rounded.get(id(param))
        return param if one is None or one.copy is None else one.copy

    def _held(self) -> Iterable[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def _put_in(self, every: bool) -> None:
        # Without a gradient a parameter is not stepped; it may get one from a closure.
        live = [
            one
            for p in self._held()
            if (one := self.rounded.get(id(p))) is not None and (every or p.grad is not None)
        ]
        for one in live:
            state = self.optimizer.state.get(one.param, {})
            one.ours = {key: state.pop(key) for key in _OURS if key in state}
            if not state:  # an optimizer begins where it finds nothing
                self.optimizer.state.pop(one.param, None)
        self._live = live
        for device, some in _by(live, lambda one: one.param.device).items():
            held = [one for one in some if one.mode != "master"]
            views = _views([local(one.param) for one in held], device)
            for one, view in zip(held, views, strict=True):
                one.values = view
        for key, some in _by(live, lambda one: (one.mode, one.param.dtype)).items():
            _READ[key[0]](some)
        for one in live:
            copy = sharded_as(one.values, one.param).detach()
            one.copy = copy.requires_grad_()
        self._take_gradients()
        self._widen_state(live)
        self._exchange()

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for device, some in _by(self._live, lambda one: one.param.device).items():
            dense: list[tuple[Rounded, Tensor]] = []
            for one in some:
                gradient = one.param.grad
                assert one.copy is not None
                one.copy.grad = None
                if gradient is not None and gradient.layout is torch.strided:
                    dense.append((one, local(gradient)))
                elif gradient is not None:  # sparse, of an embedding
                    one.copy.grad = gradient.to(torch.float32)
            views = _views([one.values for one, _ in dense], device)
            _widen_(views, [gradient for _, gradient in dense])
            for (one, _), view in zip(dense, views, strict=True):
                one.copy.grad = sharded_as(view, one.param)  # type: ignore[union-attr]

    def _exchange(self, back: bool = False) -> None:
        """Put the copies where the parameters are, in groups and state; or the reverse."""
        pairs = [(one.param, one.copy) for one in self._live]
        to: dict[int, Any] = {id(c if back else p): (p if back else c) for p, c in pairs}
        for group in self.optimizer.param_groups:
            group["params"][:] = [to.get(id(p), p) for p in group["params"]]
        state = self.optimizer.state
        for param, copy in pairs:
            old, new = (copy, param) if back else (param, copy)
            if old in state:
                state[new] = state.pop(old)  # type: ignore[index, arg-type]
        self._are_in = not back

    def _widen_state(self, live: Sequence[Rounded]) -> None:
        narrow = [
            (one, key, value)
            for one in live
            for key, value in self.optimizer.state.get(one.param, {}).items()
            if _is_moment(one, key, value) and value.dtype.itemsize < 4
        ]
        for device, some in _by(narrow, lambda this: this[0].param.device).items():
            views = _views([local(value) for _, _, value in some], device)
            _widen_(views, [local(value) for _, _, value in some])
            for (one, key, value), view in zip(some, views, strict=True):
                self.optimizer.state[one.param][key] = sharded_as(view, value)

    # --- after it -------------------------------------------------------------------------------

    def _write_values(self, live: Sequence[Rounded], spoil: bool = False) -> None:
        with torch.no_grad():
            for one in live:
                now = local(one.copy.detach())  # type: ignore[union-attr]
                if now.data_ptr() != one.values.data_ptr() or now.dtype != one.values.dtype:
                    one.values.copy_(now)  # the optimizer gave its parameter other memory
            for key, some in _by(live, lambda one: (one.mode, one.param.dtype)).items():
                _WRITE[key[0]](some, spoil)

    @torch.no_grad()
    def _narrow_state(self) -> None:
        if self.state_dtype is not torch.bfloat16:
            return
        wide = [
            (one, key, value)
            for one in self._live
            for key, value in self.optimizer.state.get(one.param, {}).items()
            if _is_moment(one, key, value) and value.dtype is torch.float32
        ]
        for some in _by(wide, lambda this: this[0].param.device).values():
            count = max(one.ours.get(COUNT, 0) for one, _, _ in some)
            parts = [_dense(local(value)) for _, _, value in some]
            narrow = [torch.empty_like(x, dtype=torch.bfloat16) for x in parts]
            _round_stochastically_(narrow, parts, 2 * count + 1)
            for (one, key, value), x in zip(some, narrow, strict=True):
                self.optimizer.state[one.param][key] = sharded_as(x, value)

    # --- what was saved -------------------------------------------------------------------------

    def _check_state(self, one: Rounded) -> None:
        wanted = torch.int16 if one.param.dtype is torch.bfloat16 else torch.bfloat16
        state = self.optimizer.state.get(one.param, {})
        for key, dtype in ((CARRY, wanted), (MASTER, torch.float32)):
            if key in state and state[key].dtype is not dtype:
                raise PolicyError(
                    "the carried rounding error was converted when the optimizer loaded it",
                    where=one.name,
                    found=f"{key} in {state[key].dtype}",
                    wanted=f"{dtype}, as it was saved",
                    mend="ln.attach(model, optimizer), before optimizer.load_state_dict(…)",
                )

    def _before_loading(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self.settle()
        self._loading = state_dict

    def _after_loading(self, _: Optimizer) -> None:
        """Undo that torch converts all state to the dtype of the parameter."""
        saved, self._loading = self._loading, None
        if saved is None:
            return
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        for i, param in zip(ids, self._held(), strict=True):
            if id(param) not in self.rounded:
                continue
            for key, value in saved["state"].get(i, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    kept = value.detach().to(device=param.device, copy=True)
                    self.optimizer.state[param][key] = kept

    def full(self, one: Rounded) -> Tensor:
        """The value that a parameter stands for in float32, before rounding."""
        state = self.optimizer.state.get(one.param, {})
        with torch.no_grad():
            whole = Rounded(one.name, one.param, one.mode)
            whole.ours = {key: state[key] for key in _OURS if key in state}
            (whole.values,) = _views([local(one.param)], one.param.device)
            _READ[one.mode]([whole])
            return sharded_as(whole.values.clone(), one.param)


# --- between a parameter and its copy ----------------------------------------------------------


def _read_nearest(some: Sequence[Rounded]) -> None:
    _widen_([one.values for one in some], [local(one.param) for one in some])


def _read_kahan(some: Sequence[Rounded]) -> None:
    """Add what the last rounding cut off."""
    carried = [local(one.ours[CARRY]) if CARRY in one.ours else None for one in some]
    if some[0].param.dtype is torch.bfloat16:
        _widen_([one.values for one in some], [local(one.param) for one in some], carried)
        return
    _read_nearest(some)
    for one, error in zip(some, carried, strict=True):
        if error is not None:
            _keep_unless_written(one, one.values + error)


def _read_master(some: Sequence[Rounded]) -> None:
    """The copy that is kept; where somebody wrote to the parameter, what was written."""
    for one in some:
        own = local(one.param)
        kept = one.ours.get(MASTER)
        one.values = own.float() if kept is None else local(kept)
        if kept is not None:
            _keep_unless_written(one, one.values)


def _keep_unless_written(one: Rounded, whole: Tensor) -> None:
    own = local(one.param)
    rounded = whole.to(own.dtype)
    if own.device.type == "cpu" and own.dtype not in _FP8 and torch.equal(rounded, own):
        if whole is not one.values:
            one.values.copy_(whole)
        return
    same = rounded.float() == own.float()
    one.values.copy_(torch.where(same, whole, own.float()))


def _write_kahan(some: Sequence[Rounded], spoil: bool) -> None:
    if some[0].param.dtype is not torch.bfloat16:
        for one in some:
            own = local(one.param)
            own.copy_(_nearest(one.values, own.dtype))
            error = one.values - own.float()
            # Toward zero: an error that was rounded up might round to another number.
            bits = error.view(torch.int32).bitwise_and_(-65536).view(torch.float32)
            _keep(one, CARRY, bits.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).bfloat16())
        return
    for one in some:
        if CARRY not in one.ours:
            _keep(one, CARRY, torch.empty_like(one.values, dtype=torch.int16))
    wide = [one.values if spoil else one.values.clone() for one in some]
    _narrow_([local(one.param) for one in some], wide, [local(one.ours[CARRY]) for one in some])


def _write_stochastic(some: Sequence[Rounded], spoil: bool) -> None:
    parts = [one.values if spoil else one.values.clone() for one in some]
    seed = 2 * max(one.ours.get(COUNT, 0) for one in some)
    if some[0].param.dtype is torch.bfloat16:
        _round_stochastically_([local(one.param) for one in some], parts, seed)
        return
    for one, x, some_noise in zip(some, parts, _noise(parts, seed), strict=True):
        own = local(one.param)
        own.copy_(_stochastic(x, some_noise, own.dtype))


def _write_master(some: Sequence[Rounded], spoil: bool) -> None:
    for one in some:
        own = local(one.param)
        own.copy_(_nearest(one.values, own.dtype) if own.dtype in _FP8 else one.values)
        if MASTER not in one.ours:
            _keep(one, MASTER, one.values)


_READ: dict[Mode, Callable[[Sequence[Rounded]], None]] = {
    "kahan": _read_kahan,
    "stochastic": _read_nearest,
    "master": _read_master,
}
_WRITE: dict[Mode, Callable[[Sequence[Rounded], bool], None]] = {
    "kahan": _write_kahan,
    "stochastic": _write_stochastic,
    "master": _write_master,
}


def _keep(one: Rounded, key: str, value: Tensor) -> None:
    one.ours[key] = sharded_as(value, one.param)


def _nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest; 8 bits have no room for what is too large, and take their largest."""
    if dtype in _FP8:
        most = torch.finfo(dtype).max
        x = torch.where(x.isfinite(), x.clamp(-most, most), x)
    return x.to(dtype)


# --- bfloat16 and float32 ------------------------------------------------------------------------


def _widen_(
    wide: list[Tensor], narrow: Sequence[Tensor], lower: Sequence[Tensor | None] | None = None
) -> None:
    """Copy into float32; bfloat16 with its ``lower`` halves, signed, where there are any.

    Together they are the float32 exactly; where somebody wrote to the upper half since, the sum is
    that new value still, to within its own rounding. But not where he wrote 0: below it lie the
    bits of NaN.
    """
    halves = [None] * len(wide) if lower is None else list(lower)
    slow = _left_by_kernel(native.WIDEN, wide, narrow, halves)
    copy_all_(list(compress(wide, slow)), list(compress(narrow, slow)))
    rest = zip(wide, narrow, halves, slow, strict=True)
    carrying = [(x, y, z) for x, y, z, is_slow in rest if is_slow and z is not None]
    sums = [error * (upper != 0) for _, upper, error in carrying]
    add_all_([x.view(torch.int32) for x, _, _ in carrying], sums)


def _narrow_(narrow: list[Tensor], wide: list[Tensor], lower: list[Tensor]) -> None:
    """Round float32 to nearest, ties away from 0, and keep the lower halves; spoils ``wide``."""
    slow = _left_by_kernel(native.NARROW, wide, narrow, lower)
    wide = list(compress(wide, slow))
    for x in wide:
        x.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # one NaN: no overflow
    copy_all_(list(compress(lower, slow)), [_half(x, _LOW) for x in wide])
    add_to_all_([x.view(torch.int32) for x in wide], _HALF)
    to = [x.view(torch.int16) for x in compress(narrow, slow)]
    copy_all_(to, [_half(x, _HIGH) for x in wide])


def _left_by_kernel(
    operation: int,
    wide: Sequence[Tensor],
    narrow: Sequence[Tensor],
    lower: Sequence[Tensor | None],
) -> list[bool]:
    """Run the native kernel where it fits; which tensors it has left to do."""
    quick = [_fits(*tensors) for tensors in zip(wide, narrow, lower, strict=True)]
    if any(quick):
        native.run_(
            operation,
            list(compress(wide, quick)),
            list(compress(narrow, quick)),
            list(compress(lower, quick)),
            threads=torch.get_num_threads(),
        )
    return [not fits for fits in quick]


def _fits(wide: Tensor, narrow: Tensor, lower: Tensor | None = None) -> bool:
    """Whether the native kernel may walk all in the order of memory; ``wide`` has no gaps."""
    return (
        narrow.dtype is torch.bfloat16
        and narrow.device.type == "cpu"
        and wide.stride() == narrow.stride()
        and (lower is None or wide.stride() == lower.stride())
        and native.available()[0]
    )


# --- stochastic rounding -------------------------------------------------------------------------


def _noise(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Sixteen random bits for each element, a function of its place and the seed.

    So they are the same on all ranks, on all devices and at every resume, and nobody else's random
    numbers are drawn from.
    """
    starts = _starts(like)
    start = _signed(_mixed(seed))
    place = torch.arange(starts[-1] // 2, dtype=torch.int32, device=like[0].device).add_(start)
    place ^= (place >> 16) & 0xFFFF
    place *= 0x7FEB352D
    place ^= (place >> 15) & 0x1FFFF
    place *= _signed(0x846CA68B)
    place ^= (place >> 16) & 0xFFFF
    bits = place.view(torch.int16)
    return [bits.as_strided(x.shape, x.stride(), at) for at, x in zip(starts, like, strict=False)]


def _mixed(x: int) -> int:
    """One number of the same hash, lowbias32 of Wellons' hash prospector."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def _round_stochastically_(to: list[Tensor], xs: list[Tensor], seed: int) -> None:
    """Write ``xs``, float32, into ``to``, bfloat16: up or down, so that the mean is x; spoils xs.

    A random number below one unit is added to the bits before the lower half is cut off.
    """
    if all(_fits(x, y) for x, y in zip(xs, to, strict=True)):
        nothing: list[Tensor | None] = [None] * len(xs)
        native.run_(
            native.STOCHASTIC,
            xs,
            to,
            nothing,
            _starts(xs)[:-1],
            _mixed(seed),
            threads=torch.get_num_threads(),
        )
        return
    noise = _noise(xs, seed)
    for x in xs:
        x.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # one NaN: no overflow
    bits = [x.view(torch.int32) for x in xs]
    # Signed noise and half a unit are 0 to 65535. Infinity has a lower half of 0: no carry.
    add_to_all_(bits, _HALF)
    add_all_(bits, noise)
    copy_all_([x.view(torch.int16) for x in to], [_half(x, _HIGH) for x in xs])


def _stochastic(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Likewise for formats whose exponents are fewer than those of float32."""
    mantissa, smallest = _FORMAT[dtype]
    dropped = 23 - mantissa
    positive = noise.to(torch.int32) + _HALF  # 0 to 65535
    more = positive << (dropped - 16) if dropped > 16 else positive >> (16 - dropped)
    normal = ((x.view(torch.int32) + more) & -(1 << dropped)).view(torch.float32)
    unit = 2.0 ** (smallest - mantissa)  # below the smallest normal number steps are equal
    equal = (torch.floor(x.abs() / unit + positive.float() / 65536) * unit).copysign(x)
    found = torch.where(x.abs() < 2.0**smallest, equal, normal)
    return _nearest(torch.where(x.isfinite(), found, x), dtype)


# --- memory ------------------------------------------------------------------------------------


def _is_moment(one: Rounded, key: str, value: object) -> bool:
    """Whether it is state with one number for each of the parameter."""
    return (
        isinstance(value, Tensor)
        and key not in ("step", *_OURS)
        and value.shape == one.param.shape
        and value.ndim > 0
        and value.is_floating_point()
        and is_dtensor(value) == is_dtensor(one.param)
    )


def _dense(x: Tensor) -> Tensor:
    """``x`` without gaps or overlap, so that it can be viewed as whole bits."""
    size = sorted(zip(x.stride(), x.shape, strict=True))
    expected = 1
    for stride, length in size:
        if length > 1 and stride != expected:
            return x.contiguous()
        expected *= length if length > 1 else 1
    return x


def _starts(like: Sequence[Tensor]) -> list[int]:
    starts = [0]
    for x in like:
        starts.append(starts[-1] + -(-x.numel() // _ALIGNED) * _ALIGNED)
    return starts


def _views(like: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """New float32 tensors with these shapes and orders of memory, the small ones in one buffer."""
    views: list[Tensor] = []
    for some in _rooms(like):
        starts = _starts(some)
        room = torch.empty(starts[-1], dtype=torch.float32, device=device)
        views += [
            room.as_strided(x.shape, _order(x), at) for at, x in zip(starts, some, strict=False)
        ]
    return views


def _rooms(like: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    # Larger pieces of memory the C library gets from the system, and gives back, at every step.
    some: list[Tensor] = []
    count = 0
    for x in like:
        if some and count + x.numel() > _ROOM:
            yield some
            some, count = [], 0
        some.append(x)
        count += x.numel()
    if some:
        yield some


def _order(x: Tensor) -> tuple[int, ...]:
    return torch.empty_like(x, device="meta").stride()  # torch's: x's own where that is dense


def _half(x: Tensor, which: int) -> Tensor:
    """The upper or lower half of each float32, as int16 of the same shape."""
    shorts = x.view(torch.int32).as_strided((x.numel(),), (1,)).view(torch.int16)
    at = 2 * x.storage_offset() + which
    return shorts.as_strided(x.shape, [2 * s for s in x.stride()], at)


def _by(things: Iterable[_T], key: Callable[[_T], Any]) -> dict[Any, list[_T]]:
    found: dict[Any, list[_T]] = defaultdict(list)
    for thing in things:
        found[key(thing)].append(thing)
    return found
