import pytest
import torch

from learnables.errors import LearnablesError
from learnables.recipes.vit.crew import Crew, assemble, find_device


@pytest.mark.parametrize("name", ["cuda:77", "toaster", "meta", "cpu:x"])
def test_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(LearnablesError, match="the device is not there") as caught:
        find_device(name)
    assert name in caught.value.found
    assert caught.value.wanted.startswith("one of cpu")


def test_auto_finds_a_device_that_works():
    assert torch.ones(2, device=find_device("auto")).sum().item() == 2


def test_one_process_alone_adds_nothing_to_its_numbers():
    with assemble("cpu") as crew:
        assert crew == Crew(torch.device("cpu"))
        assert crew.leads
        assert crew.add(torch.tensor([2.0])).item() == 2
        assert crew.any(True)
        assert not crew.any(False)
