import subprocess
import sys
import textwrap

import pytest

from learnables.runtime.atomic import replace_file


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "file"
    replace_file(target, lambda partial: partial.write_bytes(b"one") and None)
    replace_file(target, lambda partial: partial.write_bytes(b"two") and None)
    assert target.read_bytes() == b"two"
    assert names_in(target.parent) == ["file"]


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(partial):
        partial.write_bytes(b"ne")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_file(target, fail)
    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


SLOW_WRITER = """
    import sys, time
    from pathlib import Path
    from learnables.runtime.atomic import replace_file

    def write(partial):
        partial.write_bytes(b"half")
        print("half", flush=True)
        time.sleep(60)

    replace_file(Path(sys.argv[1]), write)
"""


def test_a_killed_writer_leaves_the_old_file_and_its_rest_is_swept_up(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    command = [sys.executable, "-c", textwrap.dedent(SLOW_WRITER), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "half\n"
        writer.kill()
    assert target.read_bytes() == b"old"
    assert len(names_in(tmp_path)) == 2
    replace_file(target, lambda partial: partial.write_bytes(b"new") and None)
    assert target.read_bytes() == b"new"
    assert names_in(tmp_path) == ["file"]
