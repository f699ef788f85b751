"""What is handed out holds what it needs."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout, so nothing to compare with")
    return set(listed.stdout.splitlines())


def test_the_source_distribution_is_the_repository(tmp_path: Path) -> None:
    wanted = {f for f in tracked() if not f.startswith((".ci/", ".git")) and (ROOT / f).is_file()}
    setup = "import setuptools; setuptools.setup()"
    command = [sys.executable, "-c", setup, "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted <= held, sorted(wanted - held)
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_every_file_of_the_package_that_is_no_module_is_package_data(tmp_path: Path) -> None:
    setup = "import setuptools; setuptools.setup()"
    command = [sys.executable, "-c", setup, "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {f.relative_to(tmp_path / "lib").as_posix() for f in (tmp_path / "lib").rglob("*.*")}
    for_tests_only = "learnables/report/assets/SHA256SUMS"
    wanted = {f.removeprefix("src/") for f in tracked() if f.startswith("src/")} - {for_tests_only}
    assert {f for f in wanted if (ROOT / "src" / f).is_file()} <= built
    assert not [f for f in built - wanted if not f.endswith(".py")]
