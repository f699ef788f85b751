"""A model of DDP that outlives its group by a moment, on a busy machine.

With `torch.distributed.destroy_process_group` alone, each of the eight processes hung within the
first thousand groups (torch 2.13, two cores).
"""

import subprocess
import sys

import pytest

GROUPS = """
import torch
from torch import nn
from tests.gloo import one_process_group

torch.set_num_threads(1)
for _ in range(1500):
    with one_process_group():
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
    del model
"""


@pytest.mark.slow
def test_a_model_dropped_behind_its_group_does_not_hang(pytestconfig):
    command = [sys.executable, "-c", GROUPS]
    running = [subprocess.Popen(command, cwd=pytestconfig.rootpath) for _ in range(8)]
    try:
        for process in running:
            assert process.wait(timeout=300) == 0
    finally:
        for process in running:
            process.kill()
            process.wait()
