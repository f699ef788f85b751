"""What trains and what does not: parameters, and the layers that change without a gradient."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal, TypeAlias, get_args

from torch import nn

from learnables.entries import Entry, entries
from learnables.errors import LearnablesError
from learnables.select import Selector, select

Stays: TypeAlias = Literal["statistics", "eval", "nothing"]


def freeze(
    model: nn.Module, selector: Selector = "*", *, stays: Stays = "statistics"
) -> tuple[str, ...]:
    """Stop parameters from training, and the statistics of layers that are frozen as a whole.

    ``requires_grad=False`` alone leaves a frozen BatchNorm averaging over the new data at every
    ``model.train()``; the backbone that is meant to stay drifts. A layer whose parameters are all
    frozen stays in evaluation mode where ``stays`` says so, whatever ``model.train()`` does.

    Args:
        model: The model, bare or wrapped; changed in place.
        selector: Which parameters; see `learnables.select`. A parameter with several names is
            frozen where one of them is picked.
        stays: Which wholly frozen layers stay in evaluation mode: ``"statistics"`` those with
            running statistics (BatchNorm, InstanceNorm); ``"eval"`` all, dropout too, as visual
            prompt tuning has it; ``"nothing"`` leaves modes to ``train()`` and ``eval()``.

    Returns:
        Names of the parameters that are frozen now and were not.

    Raises:
        SelectionError: ``selector`` picks nothing.
        LearnablesError: There is no such ``stays``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> ln.freeze(model, ["0.*", "1.*"])
        ('0.weight', '0.bias', '1.weight', '1.bias')
        >>> [layer.training for layer in model.train()]
        [True, False, True]

    Cost:
        One walk over the modules; nothing per step.
    """
    if stays not in get_args(Stays):
        raise LearnablesError(
            "there is no such way to freeze",
            found=f"stays={stays!r}",
            wanted=", ".join(map(repr, get_args(Stays))),
        )
    changed = [entry for entry in select(entries(model), selector) if entry.trainable]
    for entry in changed:
        entry.param.requires_grad_(False)
    _set_modes(model, stays)
    return _names(changed)


def unfreeze(model: nn.Module, selector: Selector = "*") -> tuple[str, ...]:
    """Let parameters train again; the layers they belong to follow ``train()`` and ``eval()``.

    Args:
        model: The model; changed in place. What the optimizer holds is not: build it afterwards, or
            hand it the new parameters with ``optimizer.add_param_group``.
        selector: Which parameters.

    Returns:
        Names of those that train now and did not.

    Raises:
        SelectionError: ``selector`` picks nothing.

    Example:
        >>> from learnables.grafting import unfreeze
        >>> model = nn.Linear(2, 1).requires_grad_(False)
        >>> unfreeze(model, "bias")
        ('bias',)
    """
    picked = [entry for entry in select(entries(model), selector) if not entry.trainable]
    changed = [e for e in picked if e.param.is_floating_point() or e.param.is_complex()]
    for entry in changed:
        entry.param.requires_grad_(True)
    release(model)
    return _names(changed)


def train_only(
    model: nn.Module, selector: Selector, *, stays: Stays = "statistics"
) -> tuple[str, ...]:
    """Train what ``selector`` picks, and freeze everything else.

    Args:
        model: The model; changed in place.
        selector: What trains: ``["prompts.*", "head.*"]``.
        stays: As in `freeze`.

    Returns:
        Names of what trains.

    Raises:
        SelectionError: ``selector`` picks nothing; nothing was frozen then.
        LearnablesError: There is no such ``stays``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> ln.train_only(model, "1.*")
        ('1.weight', '1.bias')
        >>> [p.requires_grad for p in model.parameters()]
        [False, False, True, True]
    """
    chosen = select(entries(model), selector)
    freeze(model, "*", stays=stays)
    for entry in chosen:
        unfreeze(model, entry.param)
    return _names(chosen)


def _names(chosen: Iterable[Entry]) -> tuple[str, ...]:
    return tuple(entry.plain_names[0] for entry in chosen)


# --- modes ---------------------------------------------------------------------------------------


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """What ``module.train`` is while the module is frozen: ``eval()``, whatever is asked for."""
    return type(module).train(module, False)


def is_held(module: nn.Module) -> bool:
    """Whether ``module`` stays in evaluation mode because it is frozen."""
    own = module.__dict__.get("train")
    return isinstance(own, partial) and own.func is _stay


def _set_modes(model: nn.Module, stays: Stays) -> None:
    for module in _frozen(model):
        if stays == "eval" or (stays == "statistics" and has_statistics(module)):
            module.train(False)
            _hold(module)


def _hold(module: nn.Module) -> None:
    # In the module's own __dict__: copied, pickled and moved with it, called by its parent.
    module.__dict__["train"] = partial(_stay, module)


def release(model: nn.Module) -> tuple[nn.Module, ...]:
    """Let modules follow ``train()`` again that are no longer frozen as a whole.

    Returns:
        Those that were held until now.
    """
    frozen = {id(module) for module in _frozen(model)}
    held = [module for module in model.modules() if is_held(module) and id(module) not in frozen]
    for module in held:
        del module.__dict__["train"]
        module.train(model.training)
    return tuple(held)


def hold_again(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Undo `release` where a module is frozen as a whole now, as it was then."""
    frozen = {id(module) for module in _frozen(model)}
    for module in modules:
        if id(module) in frozen:
            module.train(False)
            _hold(module)


def _frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with parameters, none of which trains, and what is without any inside of them."""

    def walk(module: nn.Module, inside: bool) -> Iterator[nn.Module]:
        params = list(module.parameters())
        frozen = not any(p.requires_grad for p in params) and (bool(params) or inside)
        if frozen:
            yield module
        for child in module.children():
            yield from walk(child, frozen)

    return walk(model, False)


def has_statistics(module: nn.Module) -> bool:
    """Whether ``module`` averages over the batches that it sees."""
    return getattr(module, "running_mean", None) is not None
