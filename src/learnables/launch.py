"""A model and its optimizer made ready for many processes, in the only order that works.

The ranks are compared before anything is wrapped, because a difference is silent later. Layouts
and scalars are mended before sharding, because a shard cannot be. The optimizer is built after it,
because sharding replaces every Parameter. The audit comes last, because it judges the result.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import dtype_name, end_process_group, is_dtensor, is_uninitialised
from learnables.arguments import require_choice, require_names
from learnables.auditing.memory import checksum
from learnables.auditing.report import Report
from learnables.auditing.run import audit
from learnables.collectives import gather_texts
from learnables.entries import Entry, entries
from learnables.errors import LearnablesError, SelectionError, warn
from learnables.notes import note_of, put_note
from learnables.policy.attach import Attachment, attach, check_rounding
from learnables.policy.rounding import Mode
from learnables.runtime.layout import canonicalize_, declared_layout
from learnables.strides import lay_out_, wanted_strides

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

Strategy = Literal["none", "ddp", "fsdp2"]
STRATEGIES = ("none", "ddp", "fsdp2")
_NOTHING = ("", "nothing")
_MEND_OPTIMIZER = (
    "ln.prepare(model, lambda model: torch.optim.AdamW(ln.param_groups(model, lr=1e-3)), …)"
)


@final
@dataclass(frozen=True, eq=False)
class Prepared:
    """What `prepare` hands back; ``model, optimizer, report = ln.prepare(…)`` unpacks it.

    Attributes:
        model: What the loop calls: the model itself, sharded where it is FSDP2, or DDP around it.
        optimizers: What the function built, in its order.
        report: What the audit says of the result, without a step.
        attachment: The hooks of `ln.attach`.
    """

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    report: Report
    attachment: Attachment

    @property
    def optimizer(self) -> Optimizer:
        """The first optimizer, which is mostly the only one."""
        return self.optimizers[0]

    def __iter__(self) -> Iterator[Any]:
        """Model, optimizer, report."""
        return iter((self.model, self.optimizer, self.report))


def prepare(
    model: nn.Module,
    optimizer_fn: Callable[[nn.Module], Optimizer | Sequence[Optimizer]],
    strategy: Strategy = "none",
    *,
    mesh: "DeviceMesh | None" = None,
    units: Sequence[str] | None = None,
    methods: Sequence[str] = (),
    values: Literal["equal", "rank 0"] = "equal",
    rounding: Mode | None = None,
    state_dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Prepared:
    """Wrap or shard a model, build its optimizer after that, attach what was declared, audit it.

    * Before: all ranks must have built the same model; one that did not is named, with the
      parameter. FSDP2 would put a model together from the pieces of different ones.
    * Layouts: a parameter lies as declared (``memory_format=``), and without gaps (see
      `canonicalize_`). FSDP2 shards row-major memory only, so there all are laid out row-major.
    * FSDP2: a parameter of shape () becomes (1,), and the two load into each other. Each is cut
      along a dimension that the ranks divide evenly, so that a token of shape (1, N, D) is not one
      rank's alone and padding for the others. The names of a tied parameter stay in one group. What
      is stored in another dtype than its surroundings is gathered by itself.
    * After: the optimizer is built, `ln.attach` is called, and `ln.audit` looks at the result.

    Every rank must call.

    Args:
        model: The model, on its device, initialised alike on all ranks.
        optimizer_fn: Called with what the loop will call; returns the optimizer, or several.
        strategy: ``"ddp"`` copies the model to each rank, ``"fsdp2"`` shards it in place,
            ``"none"`` leaves it to this process alone.
        mesh: For FSDP2, of one dimension, or two to replicate over the first; all ranks when None.
        units: For FSDP2: globs over names of modules that are gathered one at a time, such as
            ``"blocks.*"``. When None, the members of module lists that have modules of their own.
        methods: For FSDP2: names of methods of ``model``, beside ``forward``, that may use its
            parameters.
        values: ``"rank 0"`` gives all ranks its values instead of demanding that they be equal.
        rounding: As in `learnables.attach`: how steps of parameters in 16 bits are rounded. On
            shards it happens where they lie; replicas stay equal; nothing is sent.
        state_dtype: As in `learnables.attach`.
        options: Handed on to ``DistributedDataParallel`` or ``fully_shard``.

    Returns:
        Model, optimizer and report.

    Raises:
        LearnablesError: There is no process group, ranks differ, a parameter cannot be sharded or
            reduced (it is sparse or in 8 bits, or shares a module with another dtype), or
            ``optimizer_fn`` is an optimizer already.
        PolicyError: There is no such ``rounding`` or ``state_dtype``.
        SelectionError: A glob of ``units`` picks nothing.
        AuditFailed: The audit finds an error, such as an optimizer that holds the parameters of
            before.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> def adam(model):
        ...     return torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.05))
        >>> model, optimizer, report = ln.prepare(model, adam)  # strategy="fsdp2" under torchrun
        >>> report.ok
        True

    Cost:
        Once: one read of all values for the comparison and one collective with a line a parameter.
        Nothing per step; see benchmarks/launch.py.

    Source:
        Zhao et al., *PyTorch FSDP*, arXiv:2304.11277; Li et al., *PyTorch Distributed*,
        arXiv:2006.15704.
    """
    _require_function(optimizer_fn)
    _require(strategy in STRATEGIES, "there is no such strategy", strategy, ", ".join(STRATEGIES))
    require_choice("values", values, ("equal", "rank 0"))
    require_names(methods, "methods")
    if units is not None:
        require_names(units, "units")
    check_rounding(rounding, state_dtype)
    _require_values(model)
    if strategy != "none":
        require_sendable(model, strategy)
        device = join(_device_type(model))
        if strategy == "ddp":
            model.to(device)
        compare_ranks(model, values)
    if strategy != "fsdp2" and not any(map(is_dtensor, model.parameters())):
        canonicalize_(model, undeclared="dense")
    runner = model
    if strategy == "ddp":
        place = [device.index] if device.type == "cuda" else None
        runner = nn.parallel.DistributedDataParallel(model, device_ids=place, **options)
    elif strategy == "fsdp2":
        shard_(model, mesh=mesh, units=units, methods=methods, **options)
    optimizers = _built(optimizer_fn, runner)
    attachment = attach(runner, optimizers, rounding=rounding, state_dtype=state_dtype)
    report = audit(runner, optimizers=optimizers)
    report.raise_for_errors()
    return Prepared(runner, optimizers, report, attachment)


# --- who takes part ------------------------------------------------------------------------------


def join(device_type: str = "cpu") -> torch.device:
    """Join the processes that torchrun started, unless this one belongs to a group already.

    Args:
        device_type: ``"cuda"`` meets over NCCL, everything else over gloo.

    Returns:
        The device of this process.

    Raises:
        LearnablesError: torch was built without what it takes, no torchrun started this process, or
            there are fewer GPUs than processes.
    """
    dist = torch.distributed
    if not dist.is_available():
        raise LearnablesError(
            "torch was built without torch.distributed",
            found=f"torch {torch.__version__}",
            wanted="a build with gloo or NCCL",
            mend="pip install torch",
        )
    if not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        there = dist.is_nccl_available() if backend == "nccl" else dist.is_gloo_available()
        if not there:
            raise LearnablesError(
                f"processes on {device_type} meet over {backend}, which this build does not have",
                found=f"torch {torch.__version__}",
                wanted="another build of torch, or another device",
                mend="ln.prepare(model.cpu(), …)" if backend == "nccl" else "pip install torch",
            )
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise LearnablesError(
                "many processes were asked for, and this one is alone",
                found="no process group, and no RANK and WORLD_SIZE in the environment",
                wanted="processes that torchrun started",
                mend="torchrun --standalone --nproc-per-node=2 train.py",
            )
        if backend == "nccl":
            torch.cuda.set_device(_gpu_of_this_process())
        _meet(backend)
    if device_type == "cuda":
        return _gpu_of_this_process()
    return torch.device(device_type)


def _meet(backend: str) -> None:
    """Start the group of the processes that torchrun started.

    On one machine, torchrun keeps one store for all its restarts, and in torch 2.13 those who start
    anew read the addresses of the dead in it ("Connection refused", or they wait for half an hour).
    So each attempt gets a part of the store for itself.
    """
    dist: Any = torch.distributed  # which does not say that it exports the stores
    env = os.environ
    is_kept = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_kept or env.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend)
        return
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    kept = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), size, is_master=False)
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"learnables/attempt {attempt}", kept)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size)


def leave() -> None:
    """Leave the group that `join` or `prepare` made, once all ranks are here; nothing if alone.

    A script calls it last. It waits until gloo's threads rest: without that, torch hangs or aborts
    now and then on a busy machine. Every rank must call; one that failed must not, or it waits for
    the others, who have left.
    """
    if _in_group():
        torch.distributed.barrier()
        end_process_group()


def _gpu_of_this_process() -> torch.device:
    index = int(os.environ.get("LOCAL_RANK", torch.distributed.get_rank() if _in_group() else 0))
    if index >= torch.cuda.device_count():
        raise LearnablesError(
            "there are fewer GPUs than processes on this machine",
            found=f"process {index} of this machine, {torch.cuda.device_count()} GPUs",
            wanted="a GPU for each process",
            mend=f"torchrun --nproc-per-node={max(1, torch.cuda.device_count())} train.py",
        )
    return torch.device("cuda", index)


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device_type(model: nn.Module) -> str:
    if _in_group():
        return "cuda" if "nccl" in str(torch.distributed.get_backend()) else "cpu"
    first = next(chain(model.parameters(), model.buffers()), None)
    return "cpu" if first is None else first.device.type


def compare_ranks(model: nn.Module, values: Literal["equal", "rank 0"] = "equal") -> None:
    """Nothing where all ranks hold the same model; a collective call.

    Args:
        model: The model of this rank, not yet wrapped.
        values: ``"rank 0"`` takes over its parameters and buffers instead of comparing them.

    Raises:
        LearnablesError: Names, shapes, dtypes, ties or values differ; the first parameter that does
            is named, with the ranks that the others do not agree with.
    """
    _require(
        values in ("equal", "rank 0"), "this is no way to compare", values, "'equal' or 'rank 0'"
    )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mine = [[name, looks, total] for name, looks, total in _described(model)]
    said = [json.loads(text) for text in gather_texts(json.dumps(mine), _meeting_place(device))]
    _demand_one_opinion(
        [[tuple(row[:2]) for row in rows] for rows in said],
        "the ranks have built different models",
        "one model, built by the same code with the same settings on every rank",
        "build the model from settings that do not depend on the rank",
    )
    if values == "rank 0":
        with torch.no_grad():
            for x in chain(model.parameters(), model.buffers()):
                whole = x.detach().contiguous()
                torch.distributed.broadcast(whole, src=0)
                x.copy_(whole)
        return
    _demand_one_opinion(
        [[(name, f"{looks}, sum {total:016x}") for name, looks, total in rows] for rows in said],
        "the ranks start from different values",
        "the same values on every rank",
        "torch.manual_seed(0) before the model is built, or ln.prepare(…, values='rank 0')",
    )


def _described(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Each parameter and buffer: its names, what it looks like, a sum over its bytes."""
    for entry in entries(model):
        looks = entry.looks.rpartition(",")[0]  # the device is another on each rank
        trains = "" if entry.trainable else ", frozen"
        yield ", ".join(entry.plain_names), looks + trains, _sum_of(entry.param)
    for name, x in model.named_buffers():
        looks = f"buffer of shape {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
        yield name, looks, _sum_of(x)


def _sum_of(x: Tensor) -> int:
    if x.layout is not torch.strided or is_dtensor(x) or not x.numel():
        return 0
    return checksum(x.detach().reshape(-1).clone().untyped_storage())


def _meeting_place(device: torch.device) -> torch.device:
    """Where a tensor of the default group must lie."""
    return torch.device("cuda", torch.cuda.current_device()) if _speaks_nccl() else device


def _speaks_nccl() -> bool:
    return str(torch.distributed.get_backend()) == "nccl"


def _demand_one_opinion(said: list[list[Any]], what: str, wanted: str, mend: str) -> None:
    """Nothing where all ranks describe their model as most do.

    Raises:
        LearnablesError: One does not; it is raised on all ranks alike.
    """
    agreed = Counter(tuple(rows) for rows in said).most_common(1)[0][0]
    others = [rank for rank, rows in enumerate(said) if tuple(rows) != agreed]
    if not others:
        return
    theirs = said[others[0]]
    pairs = [
        (agreed[i] if i < len(agreed) else _NOTHING, theirs[i] if i < len(theirs) else _NOTHING)
        for i in range(max(len(agreed), len(theirs)))
    ]
    usual, odd = next((a, b) for a, b in pairs if a != b)
    name = usual[0] or odd[0]
    seen = odd[1] if odd[0] in (name, "") else f"{odd[0]}: {odd[1]}"
    ranks = ", ".join(map(str, others))
    raise LearnablesError(
        what,
        where=f"{name}, rank{'s' * (len(others) > 1)} {ranks}",
        found=f"{seen} on rank {others[0]}, {usual[1]} on the other ranks",
        wanted=wanted,
        mend=mend,
    )


# --- sharding ------------------------------------------------------------------------------------


def shard_(
    model: nn.Module,
    *,
    mesh: "DeviceMesh | None" = None,
    units: Sequence[str] | None = None,
    methods: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Shard a model in place with ``fully_shard``; what `prepare` does for ``"fsdp2"``.

    Args:
        model: The model.
        mesh: See `prepare`, as for all that follow.
        units: Globs over names of modules.
        methods: Methods of ``model`` beside ``forward``.
        options: Handed on to ``fully_shard``.

    Returns:
        The model.

    Raises:
        LearnablesError: A parameter cannot be sharded, or ``model`` lacks one of ``methods``.
        SelectionError: A glob picks nothing.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for method in methods:
        there = callable(getattr(model, method, None))
        _require(there, "the model has no such method", method, "a method of the model")
    require_sendable(model, "fsdp2")
    whole = gathered_apart(model, units)
    make_ready_(model)
    if mesh is None:
        mesh = init_device_mesh(_device_type(model), (torch.distributed.get_world_size(),))
    parts = mesh.shape[-1]
    options.setdefault("shard_placement_fn", lambda param: placement_for(param.shape, parts))
    for unit in (*whole, model):
        fully_shard(unit, mesh=mesh, **options)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return model


def placement_for(shape: Sequence[int], parts: int) -> "Shard":
    """The dimension along which so many ranks cut a parameter, with as little padding as can be.

    The first that they divide evenly, dimension 0 before the others, the longer before the shorter;
    where they divide none, dimension 0, the only one that torch pads.

    Example:
        >>> placement_for((1, 197, 768), 4), placement_for((1000, 768), 4), placement_for((3,), 4)
        (Shard(dim=2), Shard(dim=0), Shard(dim=0))
    """
    from torch.distributed.tensor import Shard

    by_length = sorted(range(1, len(shape)), key=lambda dim: -shape[dim])
    fair = (dim for dim in (0, *by_length) if shape[dim] and shape[dim] % parts == 0)
    return Shard(next(fair, 0))


def gathered_apart(model: nn.Module, patterns: Sequence[str] | None = None) -> list[nn.Module]:
    """What FSDP2 gathers one at a time: the islands of another dtype, then the units around them.

    Raises:
        LearnablesError: An island shares its module with others, or has names outside of it.
        SelectionError: A glob picks nothing.
    """
    units = units_of(model, patterns)
    return [*islands_of(model, units), *units]


def units_of(model: nn.Module, patterns: Sequence[str] | None = None) -> list[nn.Module]:
    """The modules that FSDP2 gathers one at a time; the rest of the model is one more group.

    A module that shares a Parameter with the outside is left to the rest: a tie must not cross
    groups, or torch refuses it.

    Args:
        model: The model.
        patterns: Globs over module names; by default the members of module lists and sequences
            that have modules of their own and a forward.

    Raises:
        SelectionError: A glob picks nothing.
    """
    named = dict(model.named_modules())
    if patterns is None:
        chosen = list(_blocks(model))
    else:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named if name):
                raise SelectionError(
                    "no module has a name that fits",
                    found=repr(pattern),
                    wanted=", ".join(list(filter(None, named))[:8]) + ", …",
                    mend="ln.prepare(…, units=None) takes the members of module lists",
                )
        chosen = [
            m for name, m in named.items() if name and any(fnmatchcase(name, p) for p in patterns)
        ]
    taken: set[int] = set()
    units = []
    for unit in chosen:
        inside = {id(m) for m in unit.modules()}
        if id(unit) not in taken and any(True for _ in unit.parameters()):
            units.append((unit, inside))
            taken |= inside
    walk = entries(model)
    return [unit for unit, inside in units if not any(_crosses(entry, inside) for entry in walk)]


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for member in module:
                own_forward = type(member).forward is not nn.Module.forward
                if own_forward and any(True for _ in member.children()):
                    yield member


def _crosses(entry: Entry, inside: set[int]) -> bool:
    return len({id(place.owner) in inside for place in entry.places}) == 2


def islands_of(model: nn.Module, units: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules whose parameters are of another dtype than most of their unit, to be units too.

    FSDP2 gathers a group in one piece of memory, and so in one dtype.

    Args:
        model: The model.
        units: What `units_of` says of it.

    Raises:
        LearnablesError: One shares its module with others, or has names outside of it.
    """
    insides = [(unit, {id(m) for m in unit.modules()}) for unit in units]
    groups: dict[int, list[Entry]] = {}
    for entry in entries(model):
        owners = {id(place.owner) for place in entry.places}
        unit = next((unit for unit, inside in insides if owners <= inside), model)
        if entry.trainable and not is_dtensor(entry.param):
            groups.setdefault(id(unit), []).append(entry)
    islands: dict[int, nn.Module] = {}
    for held in groups.values():
        counts: Counter[torch.dtype] = Counter()
        for entry in held:
            counts[entry.dtype] += entry.param.numel()
        usual = counts.most_common(1)[0][0]
        for entry in held:
            if entry.dtype == usual:
                continue
            owner = entry.owner
            own = {p.dtype for p in owner.parameters(recurse=False) if p.requires_grad}
            alone = len({id(place.owner) for place in entry.places}) == len(own) == 1
            called = type(owner).forward is not nn.Module.forward
            if not alone or not called or any(True for _ in owner.children()):
                raise LearnablesError(
                    "a parameter is stored in another dtype than what FSDP2 gathers with it",
                    where=entry.name,
                    found=f"{dtype_name(entry.dtype)}; its group is {dtype_name(usual)}",
                    wanted="one dtype, or a module of its own, such as ln.nn.LayerScale",
                    mend=f"ln.annotate(model, {entry.name!r}, storage_dtype={usual})",
                )
            islands[id(owner)] = owner
    return list(islands.values())


def require_sendable(model: nn.Module, strategy: Strategy) -> None:
    """Nothing where every parameter has a dtype that can be sent and summed.

    Args:
        model: The model.
        strategy: How it is to be spread.

    Raises:
        LearnablesError: One is in 8 bits.
    """
    for entry in entries(model):
        sent = entry.trainable or entry.param.device.type == "cpu"  # NCCL sends what gloo does not
        if sent and entry.dtype.itemsize == 1 and entry.dtype.is_floating_point:
            raise LearnablesError(
                "a parameter in 8 bits cannot be sent from rank to rank, nor its gradient summed",
                where=entry.name,
                found=f"{dtype_name(entry.dtype)}, strategy={strategy!r}",
                wanted="16 bits or more; rounding='stochastic' takes nothing beyond them",
                mend=f"ln.annotate(model, {entry.name!r}, storage_dtype=torch.bfloat16)",
            )


def make_ready_(model: nn.Module) -> None:
    """Lift parameters of shape () to (1,) and make all row-major, as ``fully_shard`` wants them.

    Raises:
        LearnablesError: A parameter is sparse, which cannot be sharded.
    """
    for entry in entries(model):
        param = entry.param
        if is_dtensor(param):  # tensor parallel already; fully_shard goes on from there
            continue
        if param.layout is not torch.strided:
            raise LearnablesError(
                "a sparse parameter cannot be sharded",
                where=entry.name,
                found=f"{entry.looks}, layout {param.layout}",
                wanted="a strided parameter",
                mend="ln.nn.BlockSparseLinear.from_dense(weight, block=64)",
            )
        if param.ndim == 0:
            _lift_(entry)
            continue
        declared = declared_layout(entry)
        if declared not in (None, torch.contiguous_format):
            warn(
                "a declared layout is lost: FSDP2 shards row-major memory only",
                where=entry.name,
                found=f"memory_format={declared}",
                wanted="a row-major parameter under FSDP2, or DDP, which keeps layouts",
                mend=f"ln.annotate(model, {entry.name!r}, memory_format=torch.contiguous_format)",
            )
        lay_out_(param, wanted_strides(param.shape))


def _lift_(entry: Entry) -> None:
    """One Parameter of shape (1,) in all the places of one of shape ()."""
    lifted = nn.Parameter(entry.param.data.reshape(1), requires_grad=entry.param.requires_grad)
    for place in entry.places:
        note = note_of(place.owner, place.local_name)
        setattr(place.owner, place.local_name, lifted)
        if note.initial is not None:
            note = replace(note, initial=note.initial.reshape(1))
        put_note(place.owner, place.local_name, note)
        place.owner.register_load_state_dict_pre_hook(_take_scalars)  # type: ignore[no-untyped-call]


def _take_scalars(owner: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for local_name, param in owner.named_parameters(recurse=False, remove_duplicate=False):
        value = state.get(prefix + local_name)
        if isinstance(value, Tensor) and value.ndim == 0 and param.shape == (1,):
            state[prefix + local_name] = value.reshape(1)


# --- the optimizer -------------------------------------------------------------------------------


def _built(
    optimizer_fn: Callable[[nn.Module], Optimizer | Sequence[Optimizer]], model: nn.Module
) -> tuple[Optimizer, ...]:
    made = optimizer_fn(model)
    optimizers = (made,) if isinstance(made, Optimizer) else tuple(made or ())
    if not optimizers or not all(isinstance(o, Optimizer) for o in optimizers):
        raise LearnablesError(
            "optimizer_fn has to return an optimizer, or several",
            found=f"a {type(made).__name__}",
            wanted="torch.optim.Optimizer",
            mend=_MEND_OPTIMIZER,
        )
    return optimizers


def _require_function(optimizer_fn: object) -> None:
    if isinstance(optimizer_fn, Optimizer):
        raise LearnablesError(
            "the optimizer is built too early: sharding replaces the Parameters that it holds",
            found=f"a {type(optimizer_fn).__name__} of "
            f"{sum(len(g['params']) for g in optimizer_fn.param_groups)} parameters",
            wanted="a function that builds it, called after the model is wrapped",
            mend=_MEND_OPTIMIZER,
        )
    is_class = isinstance(optimizer_fn, type) and issubclass(optimizer_fn, Optimizer)
    if is_class or not callable(optimizer_fn):
        raise LearnablesError(
            "optimizer_fn is no function of the model",
            found=repr(optimizer_fn),
            wanted="a function that takes the model and returns its optimizer",
            mend=_MEND_OPTIMIZER,
        )


def _require_values(model: nn.Module) -> None:
    for entry in entries(model):
        if is_uninitialised(entry.param) or entry.param.device.type == "meta":
            raise LearnablesError(
                "a parameter has no values yet",
                where=entry.name,
                found="a lazy parameter" if is_uninitialised(entry.param) else "device meta",
                wanted="an initialised model",
                mend="model.to_empty(device='cpu'); ln.init.reset_(model)",
            )


def _require(is_fine: bool, what: str, found: object, wanted: str) -> None:
    if not is_fine:
        raise LearnablesError(what, found=repr(found), wanted=wanted)
