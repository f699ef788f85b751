"""Every private or version-dependent torch name that we use, behind a plain one of ours."""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.autograd import forward_ad
from torch.nn.modules import activation, batchnorm, conv, instancenorm, normalization, rnn
from torch.nn.modules import module as _module
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

NORMS = (
    normalization.LayerNorm,
    normalization.GroupNorm,
    normalization.RMSNorm,
    batchnorm._NormBase,
    instancenorm._InstanceNorm,
)
MATRIX_OWNERS = (
    nn.Linear,
    nn.Bilinear,
    conv._ConvNd,
    activation.MultiheadAttention,
    rnn.RNNBase,
    rnn.RNNCellBase,
)

WRAPPER_PREFIXES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"``, as one says it, without the ``torch.`` in front."""
    return str(dtype).removeprefix("torch.")


def is_convolution(module: object) -> bool:
    """Whether torch's own convolution, of any number of dimensions, or a subclass of it."""
    return isinstance(module, conv._ConvNd)


def on_parameter_registration(hook: Callable[[nn.Module, str, Any], Any]) -> Any:
    """Call ``hook(module, name, parameter)`` whenever any module registers a parameter."""
    return _module.register_module_parameter_registration_hook(hook)


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a DTensor; imports nothing: where the class is not loaded there is none."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(x, kind)


def local(x: Tensor) -> Tensor:
    """The part of ``x`` that lies on this rank: its local tensor, or ``x`` itself."""
    if is_dtensor(x):
        part: Tensor = x.to_local()  # type: ignore[attr-defined]
        return part
    return x


def storage_key(x: Tensor) -> tuple[str, int]:
    """What two tensors share exactly when they share memory; fake storages get their identity."""
    x = local(x)
    if x.layout is not torch.strided:
        return (str(x.device), id(x))
    storage = x.untyped_storage()
    if x.device.type == "meta" or storage.data_ptr() == 0:
        return (str(x.device), storage._cdata)
    return (str(x.device), storage.data_ptr())


def without_wrappers(name: str) -> str:
    """``module._orig_mod.head.weight`` → ``head.weight``: the name the author wrote."""
    parts = name.split(".")
    return ".".join(p for p in parts[:-1] if p not in WRAPPER_PREFIXES) + (
        ("." if any(p not in WRAPPER_PREFIXES for p in parts[:-1]) else "") + parts[-1]
    )


def toward_all(xs: Sequence[Tensor], to: Sequence[Tensor], rate: float | Tensor) -> list[Tensor]:
    """``rate · (to − x)`` for all pairs, in two multi-tensor operations."""
    if not xs:
        return []
    away = list(torch._foreach_sub(list(to), list(xs)))
    torch._foreach_mul_(away, rate)
    return away


def copy_all_(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its tensor, in one multi-tensor operation."""
    if to:
        torch._foreach_copy_(list(to), list(values))


def add_all_(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """``x ← x + y`` for all pairs, in one multi-tensor operation."""
    if xs:
        torch._foreach_add_(list(xs), list(ys))


def add_to_all_(xs: Sequence[Tensor], number: float) -> None:
    """``x ← x + number`` for all of them, in one multi-tensor operation."""
    if xs:
        torch._foreach_add_(list(xs), number)


def keep_gradient_in(param: Tensor, dtype: torch.dtype) -> None:
    """Let autograd accumulate the gradient of ``param`` in another dtype than its own."""
    if not is_dtensor(param) and param.is_leaf and param.grad is None:
        param.grad_dtype = dtype


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which autograd accumulates the gradient of ``param``."""
    dtype = None if is_dtensor(param) else getattr(param, "grad_dtype", None)
    return dtype or param.dtype


def sharded_as(part: Tensor, like: Tensor) -> Tensor:
    """``part``, of this rank, as a DTensor cut like ``like``; itself where that is none.

    Sends nothing.
    """
    if not is_dtensor(like) or is_dtensor(part):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def after_pre_hooks(
    optimizer: torch.optim.Optimizer, handle: Any, begin: Callable[[Any, Any, Any], Any]
) -> Callable[[], None] | None:
    """Call ``begin`` as a pre-hook behind all others of the step at work; in that of ``handle``.

    While they run, hooks cannot change places, but another one can stand in a place.

    Returns:
        What undoes it, should another hook raise; None where that of ``handle`` is the last, so
        that its own is the time to begin.
    """
    hooks = optimizer._optimizer_step_pre_hooks
    last = next(reversed(hooks))
    if last == handle.id:
        return None
    hook = hooks[last]

    def undo() -> None:
        if last in hooks:
            hooks[last] = hook

    def stands_in(stepped: Any, args: Any, kwargs: Any) -> Any:
        undo()
        changed = hook(stepped, args, kwargs)
        if changed is not None:
            args, kwargs = changed
        begun = begin(stepped, args, kwargs)
        return changed if begun is None else begun

    hooks[last] = stands_in
    return undo


def make_first_post_hook(optimizer: torch.optim.Optimizer, handle: Any) -> None:
    """Have a step post-hook run before all others."""
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]


def parametrization_of(step: nn.Module) -> str:
    """What torch calls one of its own parametrizations; empty for anybody else's.

    ``"orthogonal: householder"`` (or ``cayley``, ``matrix_exp``), ``"spectral_norm"``,
    ``"weight_norm"``.
    """
    kind = type(step)
    if kind.__module__ != parametrizations.__name__:
        return ""
    if kind is parametrizations._Orthogonal:
        return f"orthogonal: {step.orthogonal_map.name}"  # type: ignore[union-attr]
    names = {"_SpectralNorm": "spectral_norm", "_WeightNorm": "weight_norm"}
    return names.get(kind.__name__, "")


def has_fast_bf16() -> bool:
    """Whether products of bf16 matrices take half the time of fp32 on this processor."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def symmetric_product(x: Tensor, tall: bool) -> Tensor:
    """``xᵀx`` (``xxᵀ`` where not ``tall``) of real matrices on the CPU at half the work.

    Torch has no such product; numpy gives a matrix and its transpose to BLAS's ``syrk``.
    """
    import numpy as np

    side = x.shape[-1] if tall else x.shape[-2]
    gram = x.new_empty(x.shape[0], side, side)
    for matrix, result in zip(x.detach().contiguous().numpy(), gram.numpy(), strict=True):
        np.matmul(matrix.T if tall else matrix, matrix if tall else matrix.T, out=result)
    return gram


def from_rank_0(value: Tensor, like: Tensor) -> Tensor:
    """``value`` as rank 0 has it, in the dtype, on the device and with the sharding of ``like``.

    A collective call where a process group of several ranks exists: every rank must make it.
    """
    value = value.to(device=like.device, dtype=like.dtype)
    if is_dtensor(like):
        from torch.distributed.tensor import distribute_tensor

        sharded: Tensor = distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
        return sharded
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.broadcast(value, src=0)
    return value


def gather(x: Tensor) -> Tensor:
    """The whole of a DTensor, as a collective call; any other tensor itself."""
    if is_dtensor(x):
        if x.dtype is torch.int16:  # which gloo does not send
            return gather(x.to(torch.int32)).to(torch.int16)
        whole: Tensor = x.full_tensor()  # type: ignore[attr-defined]
        return whole
    return x


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank has a ``part``, cut as the DTensor ``like`` is.

    A collective call.
    """
    whole: Tensor = sharded_as(part, like).full_tensor()  # type: ignore[attr-defined]
    return whole


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every rank holds whole, with the device and the sharding of a DTensor.

    What is cut already is as it is to be: the parts of a sharded checkpoint.
    """
    if is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Tensor = distribute_tensor(
        value.to(like.device),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        src_data_rank=None,  # nothing to send
    )
    return sharded


INTERNALS_OF_MODULES = frozenset(nn.Module().__dict__)
"""Names in the ``__dict__`` of every module: registries, hooks, flags."""


def registered(module: nn.Module, name: str) -> Tensor | None:
    """The Parameter that ``module`` itself registers under ``name``; also of scripted modules."""
    found: Mapping[str, Tensor | None] = module._parameters
    return found[name] if name in found else None  # noqa: SIM401 - theirs has no get


def is_uninitialised(x: Tensor) -> bool:
    """Whether ``x`` is a lazy parameter that has no shape yet."""
    return isinstance(x, UninitializedTensorMixin)


def parts_of(x: Tensor) -> list[Tensor]:
    """The strided tensors that hold the memory of ``x``: itself, its shard, sparse components."""
    x = local(x)
    if x.layout is torch.strided:
        return [x] if hasattr(x, "untyped_storage") and not is_fake(x) else []
    if x.layout is torch.sparse_coo:
        return [x._indices(), x._values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    return []


def is_fake(x: Tensor) -> bool:
    """Whether ``x`` is one of those with which torch traces: a shape and a dtype, no memory."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(x, fake.FakeTensor)


def on_optimizer_step(before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    """Call ``before`` and ``after`` around the step of every optimizer; returns how to stop."""
    from torch.optim import optimizer

    first = optimizer.register_optimizer_step_pre_hook(before)
    second = optimizer.register_optimizer_step_post_hook(after)

    def stop() -> None:
        first.remove()
        second.remove()

    return stop


def on_module_forward(before: Callable[[nn.Module, Any], None]) -> Callable[[], None]:
    """Call ``before(module, args)`` ahead of every module's forward; returns how to stop.

    Compiled modules warn where such hooks are; while this one is there they are told of none.
    """
    hook = _module.register_module_forward_pre_hook(before)
    asked = _module._has_any_global_hook
    _module._has_any_global_hook = lambda: False

    def stop() -> None:
        hook.remove()
        _module._has_any_global_hook = asked

    return stop


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) where there is no group."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def shared_store() -> Any:
    """The key-value store of the default process group; reading and writing it is no collective."""
    return torch.distributed.distributed_c10d._get_default_store()


@contextmanager
def memory_filled_with_nan() -> Iterator[None]:
    """Let ``torch.empty`` and its like hand out NaN, and the largest number of integer types."""
    was, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def end_process_group() -> None:
    """``destroy_process_group`` with gloo's threads asleep at the end."""
    torch.distributed.destroy_process_group()
    let_gloo_rest()


def let_gloo_rest(seconds: float = 5.0) -> None:
    """Wait until gloo's threads sleep; a process that took part in collectives calls it last.

    A thread of gloo drops its last tensors a moment after the collective was reported as done, and
    takes the GIL for it. Seen with torch 2.13 under load: where Python is being taken down by then,
    the thread aborts the process ("terminate called without an active exception"), and
    destroy_process_group does not join it; and a model of DDP that is dropped behind the group ends
    it with the GIL in its hand and waits for that thread, for ever.
    """
    tasks = Path("/proc/self/task")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and tasks.is_dir():
        time.sleep(0.001)  # gives the GIL away, which such a thread may wait for
        with suppress(OSError):  # a thread may end while it is read
            states = [task.joinpath("stat").read_text() for task in tasks.iterdir()]
            gloo = [state for state in states if "(pt_gloo_runloop)" in state]
            if all(state.rpartition(")")[2].split()[0] == "S" for state in gloo):
                return


def clip_module() -> Any:
    """The module in which ``clip_grad_norm_`` looks up its parts."""
    from torch.nn.utils import clip_grad

    return clip_grad


def leaves_of(roots: Any) -> dict[int, tuple[Tensor, int]]:
    """Every leaf in the graphs of ``roots``: identity → (leaf, number of its youngest user).

    Nodes of one thread are numbered in the order they are made, see `sequence_now`.
    """
    roots = [roots] if isinstance(roots, Tensor) else list(roots)
    found = {id(x): (x, sys.maxsize) for x in roots if x.requires_grad and x.grad_fn is None}
    stack = [x.grad_fn for x in roots if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            if parent.name() == "torch::autograd::AccumulateGrad":
                leaf, number = parent.variable, node._sequence_nr()
                found[id(leaf)] = (leaf, max(number, found.get(id(leaf), (leaf, -1))[1]))
            elif parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return found


def halved_in(root: Tensor) -> str:
    """What gives half precision in the graph of ``root``: a node and its dtype, or nothing."""
    seen = {root.grad_fn}
    stack = [node for node in seen if node is not None]
    while stack:
        node = stack.pop()
        for out in getattr(node, "_input_metadata", ()):  # of its outputs: inputs of the backward
            if getattr(out, "dtype", None) in (torch.bfloat16, torch.float16):
                return f"{node.name()} gives {out.dtype}"
        parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= parents
        stack.extend(parents)
    return ""


def without_compiling() -> AbstractContextManager[Any]:
    """Inside, compiled functions run as plain Python; what was compiled stays compiled."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def own_share(x: Tensor) -> Tensor:
    """The part of ``x`` that this rank counts, when every value is to count once over all ranks.

    Of a DTensor the local shard, but nothing on ranks that hold a copy of another's; of a plain
    tensor, which all ranks hold alike, everything on rank 0 and nothing elsewhere.
    """
    if is_dtensor(x):
        from torch.distributed.tensor import Replicate

        here = x.device_mesh.get_coordinate()  # type: ignore[attr-defined]
        at = [0] if here is None else here
        copies = [c for c, p in zip(at, x.placements, strict=False) if isinstance(p, Replicate)]  # type: ignore[attr-defined]
        part: Tensor = x.to_local()  # type: ignore[attr-defined]
        return part.new_empty(0) if here is None or any(copies) else part
    return x if torch.distributed.get_rank() == 0 else x.new_empty(0)


def pre_hooks_after(optimizer: torch.optim.Optimizer, handle: Any) -> list[Callable[..., Any]]:
    """The step pre-hooks of this optimizer that run after that of ``handle``."""
    hooks = optimizer._optimizer_step_pre_hooks
    order = list(hooks)
    return [hooks[key] for key in order[order.index(handle.id) + 1 :]]


def make_last_pre_hook(optimizer: torch.optim.Optimizer, handle: Any) -> None:
    """Have it run after all others; not while the pre-hooks are running."""
    optimizer._optimizer_step_pre_hooks.move_to_end(handle.id)  # type: ignore[attr-defined]


def shared_as(value: Tensor, like: Tensor) -> Tensor:
    """``value``, equal on all ranks, sharded as ``like`` is; ``value`` itself where it is not."""
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Tensor = distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return sharded


def replace_data_(param: torch.nn.Parameter, value: Tensor) -> None:
    """Give ``param`` a value of another shape; it stays the same object, without a gradient.

    Autograd keeps a node for each leaf with the shape it had, alive as long as any old graph, such
    as that of the last loss. Only a change of dtype makes torch forget it, hence the detour.
    """
    param.grad = None
    other = torch.float32 if value.dtype == torch.float64 else torch.float64
    param.data = value.new_empty(0, dtype=other)
    param.data = value


def own_view(x: Tensor, *shape: int) -> Tensor:
    """A fresh contiguous ``x`` in another shape, to autograd a tensor of its own and no view.

    What ``F.linear`` does to its result, so that the caller may write to it in place.
    """
    y: Tensor = torch.ops.aten._unsafe_view.default(x, shape)
    return y


_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def is_watched(tensors: Iterable[Tensor]) -> bool:
    """Whether more than plain autograd has to see what is done to ``tensors``.

    A dispatch mode (fake tensors, a flop counter, a tracer), a transform of ``torch.func``,
    gradients in batches, a subclass, the meta device: there may be no memory to point to.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    for t in tensors:  # no generator: this is asked in every call of a layer
        if type(t) not in (Tensor, nn.Parameter) or t.is_meta or _is_batched(t):
            return True
    return False


def why_no_values() -> str:
    """What is going on in which no tensor has a value that can be read; empty where nothing is."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (vmap, grad, jvp)"
    if torch._C._len_torch_dispatch_stack():
        fake = torch._C._TorchDispatchModeKey.FAKE
        if torch._C._get_dispatch_mode(fake) is not None:
            return "torch traces with fake tensors"
    return ""


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents, of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def remove_function_mode(mode: TorchFunctionMode) -> None:
    """Take ``mode`` off the stack, wherever it lies; the ones above it stay."""
    above = []
    while torch._C._len_torch_function_stack():
        top = overrides._pop_mode()  # type: ignore[no-untyped-call]
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        overrides._push_mode(other)  # type: ignore[no-untyped-call]


def sequence_now() -> int:
    """A number greater than that of every graph node made in this thread so far."""
    with torch.enable_grad():
        node = (torch.zeros((), requires_grad=True) * 1).grad_fn
    number: int = node._sequence_nr()  # type: ignore[union-attr]
    return number


def chain_to_leaf(x: Tensor) -> tuple[Tensor, list[str]] | None:
    """The only leaf that ``x`` was made from and the calls that did it; None if there are more."""
    node, calls = x.grad_fn, []
    while node is not None:
        calls.append(node.name().removesuffix("0").removesuffix("Backward"))
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1 or len(calls) > 8:
            return None
        node = parents[0]
        if node.name() == "torch::autograd::AccumulateGrad":
            return node.variable, calls  # type: ignore[attr-defined]
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile()`` stands around the forward of ``module``."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def in_backward() -> bool:
    """Whether autograd runs backward in this thread, where checkpointing computes forwards again.

    Compiled code never asks: what is checkpointed in it is traced as part of its forward.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def identity_of_graph(x: Tensor) -> int:
    """A number that no other graph of this thread has; -1 for a leaf."""
    return -1 if x.grad_fn is None else int(x.grad_fn._sequence_nr())


def reduction_of(loss: Tensor) -> str:
    """How a loss was averaged: ``mean``, ``sum``, ``scaled`` (a factor follows), ``unknown``.

    A loss that a gradient scaler multiplied is looked at below the factor.
    """
    return _reduction(loss.grad_fn)


def _reduction(node: Any) -> str:
    name = "" if node is None else node.name()
    if name.startswith("MeanBackward"):
        return "mean"
    if name.startswith("AddBackward"):
        parts = {_reduction(parent) for parent, _ in node.next_functions if parent is not None}
        return parts.pop() if len(parts) == 1 else "unknown"
    if name.startswith(("DivBackward", "MulBackward")):
        return "scaled"
    known: dict[int, str] = {1: "mean", 2: "sum"}
    return known.get(getattr(node, "_saved_reduction", 0), "unknown")


def ddp_parameters(module: nn.Module) -> list[Tensor] | None:
    """The Parameters that a DistributedDataParallel reduces; None for any other module."""
    if not torch.distributed.is_available():
        return None
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        return None
    found: list[Tensor] = list(module._module_parameters)
    return found


def sharding_groups(
    root: nn.Module,
) -> list[tuple[tuple[nn.Module, ...], list[tuple[int, nn.Module, str]]]]:
    """The groups that FSDP2 gathers one at a time.

    Returns:
        For each group its modules, within whose forward it is whole, and its parameters: a number
        that says which Parameter it was before sharding, its owner and its name in there.
    """
    groups = []
    seen: set[int] = set()
    for module in root.modules():
        ask: Any = getattr(module, "_get_fsdp_state", None)
        state = ask() if ask is not None else None
        if state is None or id(state) in seen:
            continue
        seen.add(id(state))
        held = [
            (getattr(p, "_orig_param_uid", id(p)), p._module_info.module, p._module_info.param_name)
            for group in state._fsdp_param_groups
            for p in group.fsdp_params
        ]
        groups.append((tuple(state._modules), held))
    return groups


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor in a tree of containers."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, set)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
