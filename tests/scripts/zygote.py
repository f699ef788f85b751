"""Run many command lines of `learnables`, each in a process of its own, and import torch once.

Reads one JSON object a line: ``{"words": [...], "folder": ...}``; forks; runs the command there;
answers with ``{"code": ..., "out": ..., "err": ...}``. The parent never computes anything. Modules
named on the command line are imported once too.
"""

import importlib
import json
import os
import sys
import tempfile

import torch

import learnables.__main__
import learnables.auditing.example  # noqa: F401
import learnables.auditing.script  # noqa: F401


def run(words: list[str], folder: str) -> dict[str, object]:
    """One command line in a forked process."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(folder)
            sys.argv = ["learnables", *words]
            code = 70
            try:
                learnables.__main__.main()
                code = 0
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return {"code": status, "out": texts[0], "err": texts[1]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["words"], asked["folder"])), flush=True)
