"""Promises about the surface: what is exported, what importing costs, what the command line has."""

import ast
import subprocess
import sys
from pathlib import Path

import learnables as ln


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in ln.__all__:
        value = getattr(ln, name)
        assert getattr(value, "__doc__", None), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(ln, "nothing_of_this_name")


def test_importing_brings_in_no_third_party_package_and_patches_nothing() -> None:
    code = (
        "import sys, torch\n"
        "from torch.nn.modules import module as m\n"
        "from torch.optim import optimizer as o\n"
        "watched = (torch.nn.Module.__setattr__, torch.Tensor.backward, o.Optimizer.step)\n"
        "before = set(sys.modules)\n"
        "import learnables\n"
        "new = {n.split('.')[0] for n in set(sys.modules) - before}\n"
        "assert new <= {'learnables', 'importlib'}, new\n"
        "assert watched == (torch.nn.Module.__setattr__, torch.Tensor.backward, o.Optimizer.step)\n"
        "assert not m._global_parameter_registration_hooks\n"
        "assert not o._global_optimizer_pre_hooks and not o._global_optimizer_post_hooks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_shares_its_name_with_a_public_function() -> None:
    package = Path(ln.__file__).parent
    modules = {
        p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    functions = {name for name in ln.__all__ if callable(getattr(ln, name))}
    assert not modules & functions


def test_the_command_line_prints_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "learnables", "version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"learnables {ln.__version__}, torch ")


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse(Path(ln.__file__).read_text("utf-8"))
    typed = {
        alias.asname
        for block in tree.body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert typed == set(ln.__all__)
