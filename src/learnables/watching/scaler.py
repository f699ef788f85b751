"""A gradient scaler, listened to: which steps it skips, and when it has divided the gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from torch.optim import Optimizer

from learnables.errors import LearnablesError
from learnables.watching.gradient import steppable


def listen(
    scaler: Any, skipped: Callable[[Optimizer], None], unscaled: Callable[[Any], None]
) -> Callable[[], None]:
    """Have ``skipped`` called when ``scaler.step`` does not step, ``unscaled`` after ``unscale_``.

    The host knows then whether it steps, because the scaler itself has asked the device. However
    many listen, its methods are wrapped once; they are as they were when the last has stopped.

    Args:
        scaler: A ``torch.amp.GradScaler``, or what is called like one.
        skipped: Called with the torch optimizer that was not stepped.
        unscaled: Called with what ``unscale_`` was called with, unless the scaler itself did so.

    Returns:
        How to stop; to be called in any order, and more than once if need be.
    """
    tap = getattr(vars(scaler).get("step"), "tap", None)
    if not isinstance(tap, _Tap):
        tap = _Tap(scaler)
    listener = _Listener(skipped, unscaled)
    tap.listeners.append(listener)

    def stop() -> None:
        if listener in tap.listeners:
            tap.listeners.remove(listener)
            tap.let_go()

    return stop


def inside(optimizer: Any) -> Optimizer | None:
    """The torch optimizer in a wrapper; None where there is none."""
    try:
        return steppable(optimizer)
    except LearnablesError:
        return None


@final
class Stepped:
    """A step pre-hook that keeps whether there was a step, and changes no gradient."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, *_: object) -> None:
        """There is one."""
        self.happened = True


class _Listener(NamedTuple):
    skipped: Callable[[Optimizer], None]
    unscaled: Callable[[Any], None]


@final
class _Tap:
    """The wrapped methods of one scaler, and who listens."""

    def __init__(self, scaler: Any) -> None:
        self.listeners: list[_Listener] = []
        self.scaler = scaler
        self.before = {n: vars(scaler)[n] for n in ("step", "unscale_") if n in vars(scaler)}
        around = {"step": self._step, "unscale_": self._unscale}
        self._ours = {
            name: _Wrapped(self, name, wrap(_original(scaler, name, self.before.get(name))))
            for name, wrap in around.items()
            if hasattr(scaler, name)
        }
        self._at_work: list[object] = []  # steps: what they unscale nobody can clip before
        for name, ours in self._ours.items():
            setattr(scaler, name, ours)

    def let_go(self) -> None:
        """Put the methods back, unless somebody listens or has wrapped them once more."""
        if self.listeners:
            return
        for name, ours in self._ours.items():
            if vars(self.scaler).get(name) is not ours:
                continue  # another's wrapper calls ours, which does nothing any more
            if name in self.before:
                setattr(self.scaler, name, self.before[name])
            else:
                delattr(self.scaler, name)

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            inner = inside(optimizer)
            if inner is None or not self.listeners:
                # Somebody else's, which cannot be watched: that is no reason to stop.
                return original(optimizer, *args, **kwargs)
            stepped = Stepped()
            handle = inner.register_step_pre_hook(stepped)
            self._at_work.append(inner)
            try:
                result = original(optimizer, *args, **kwargs)
            finally:
                self._at_work.pop()
                handle.remove()
            if not stepped.happened:
                for listener in list(self.listeners):
                    listener.skipped(inner)
            return result

        return step

    def _unscale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def unscale_(optimizer: Any) -> None:
            original(optimizer)
            for listener in list(self.listeners) if not self._at_work else ():
                listener.unscaled(optimizer)

        return unscale_


@final
class _Wrapped:
    """One wrapped method; a copy of its scaler gets the method as it was, and nobody who listens.

    Args:
        tap: Who listens.
        name: The method.
        call: What is called in its place.
    """

    def __init__(self, tap: _Tap, name: str, call: Callable[..., Any]) -> None:
        self.tap, self._name, self._call = tap, name, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[object, ...]:
        return _original, (self.tap.scaler, self._name, self.tap.before.get(self._name))


@final
@dataclass(frozen=True)
class _Late:
    """A method as its class has it when it is called: an audit begun later puts its own there."""

    thing: Any
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.thing), self.name)(self.thing, *args, **kwargs)


def _original(thing: Any, name: str, own: Callable[..., Any] | None) -> Callable[..., Any]:
    """What was called before: what somebody had put there, or the method of the class."""
    if own is None and not hasattr(type(thing), name):
        own = getattr(thing, name)  # by __getattr__, of a wrapper
    return own or _Late(thing, name)
