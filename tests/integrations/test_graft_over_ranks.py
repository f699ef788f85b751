"""A grafted decoder that is sharded by FSDP2 generates what it generates on one process."""

import torch
from tests.gloo import spawn
from tests.integrations.shim import ensure_torchvision
from tests.integrations.test_graft_text import decoder
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import learnables as ln

IDS = torch.arange(1, 11).view(2, 5)


def grafted(name: str):
    model = decoder(name)
    ln.graft(model, "prompts", ln.nn.Prompts(3, 48, init=ln.init.normal(1.0)))
    return model


@torch.no_grad()
def generated(model, cached: bool):
    return model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=cached)


def compare(rank: int, wanted) -> None:
    ensure_torchvision()
    mesh = init_device_mesh("cpu", (2,))
    for (name, cached), ids in wanted.items():
        model = grafted(name)
        for layer in model.transformer.h if name == "GPT2" else model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):  # the first call of all is not a forward but generate
            assert torch.equal(generated(model, cached), ids), (name, cached)


def test_generation_under_fsdp2_is_that_of_one_process() -> None:
    wanted = {
        (name, cached): generated(grafted(name), cached)
        for name in ("GPT2", "Llama")
        for cached in (False, True)
    }
    spawn(compare, 2, wanted)
