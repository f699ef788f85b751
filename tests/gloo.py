"""Process groups for tests: one process in place, or several spawned."""

import contextlib
import socket
from collections.abc import Iterator

import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """A gloo group of this process alone: enough for DDP and FSDP2 to wrap a model."""
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
