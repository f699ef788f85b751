"""The processes that train together: one alone, or those that torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from learnables._torch import end_process_group
from learnables.collectives import gather_texts
from learnables.errors import LearnablesError
from learnables.launch import join


@dataclass(frozen=True)
class Crew:
    """This process among those that train the same model.

    Attributes:
        device: Where this process computes.
        rank: Its number; 0 writes the files and talks.
        size: How many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def add(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all processes, which must all call."""
        if self.size > 1:
            x = x.clone()
            torch.distributed.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; all must call."""
        if self.size == 1:
            return flag
        return bool(self.add(torch.tensor([float(flag)], device=self.device)) > 0)

    def hear(self, text: str) -> str:
        """What the leader says, whatever the others do; all must call."""
        return text if self.size == 1 else gather_texts(text, self.device)[0]


@contextmanager
def assemble(device: str = "auto") -> Iterator[Crew]:
    """Join the processes that torchrun started, if it did, for the length of a ``with``.

    Args:
        device: ``"auto"``, or a torch device; each process gets a GPU of its own.

    Raises:
        LearnablesError: The device is not there, or there are fewer GPUs than processes.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = find_device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0)
    if size == 1:
        yield Crew(place)
        return
    join(place.type)
    try:
        yield Crew(place, rank, size)
    finally:
        end_process_group()


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this name, after a byte was put there.

    Args:
        name: ``"auto"``: CUDA where there is a GPU for this process, else the CPU.
        local_rank: Which process of this machine asks.

    Raises:
        LearnablesError: There is no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return _tried(name, local_rank)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LearnablesError(
            "the device is not there",
            found=f"{name!r}: {str(error).splitlines()[0]}",
            wanted=f"one of {', '.join(_present())}",
            mend="learnables train vit --device cpu",
        ) from error


def _tried(name: str, local_rank: int) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    torch.ones(1, device=device).item()  # the meta device has no values to give back
    return device


def _present() -> list[str]:
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ["cpu", *found]
