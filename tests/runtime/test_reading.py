"""What kind of file it is, is told from more than its first byte."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

import learnables as ln
from learnables.errors import CheckpointError
from learnables.runtime.reading import read_state


def test_a_header_whose_length_begins_like_a_pickle_is_one_of_safetensors(tmp_path):
    """One file in 32: the length is a multiple of 8, and its first byte may be 0x80."""
    found = set()
    for width in range(400):
        raw = save({"x" * (width + 1): torch.ones(2)})
        if raw[0] == 0x80:
            found.add(width)
            (tmp_path / "model.safetensors").write_bytes(raw)
            file = read_state(tmp_path / "model.safetensors")
            assert file.kind == "safetensors"
    assert found, "there are such lengths"


def test_a_pickle_whose_ninth_byte_is_a_brace_is_still_one(tmp_path):
    raw = b"\x80\x04\x8c\x05hello{" + pickle.dumps({"x": torch.Size([1])})
    assert raw[:1] == b"\x80"
    (tmp_path / "last.pt").write_bytes(raw[:8] + b"{" + raw[8:])
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "last.pt")


def test_what_is_there_instead_of_a_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, found in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "no plain file"),
        (tmp_path / "nothing", "no such file"),
    ):
        for read in (read_state, lambda path: ln.load_checkpoint(path, nn.Linear(1, 1))):
            with pytest.raises(CheckpointError, match="there is no checkpoint") as error:
                read(path)
            assert error.value.found == found
