"""A function in a process of its own, forked from this one, so that nothing is imported again."""

import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any


def fork(work: Callable[[], None]) -> int:
    """Do ``work`` in a forked process, which then ends; return its id."""
    with warnings.catch_warnings():
        # Threads of this process may hold locks: the child must not need them, and ours do not.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def told_by_fork(function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(*args)`` returns in a forked process; it has to be something to pickle."""
    reads, writes = os.pipe()

    def tell() -> None:
        with os.fdopen(writes, "wb") as told:
            pickle.dump(function(*args), told)

    child = fork(tell)
    os.close(writes)
    with os.fdopen(reads, "rb") as told:
        said = told.read()
    os.waitpid(child, 0)
    assert said, f"{function.__name__} said nothing"
    return pickle.loads(said)
