"""The optional native kernels: C files beside this one, built at install where a compiler is there.

``pip install`` builds each ``NAME.c`` into a shared library ``_NAME*`` in this folder and goes on
without it when that fails. Nothing here is needed: whoever calls a kernel has a twin in torch.
In a checkout that was not installed: ``python -c "import setuptools; setuptools.setup()"
build_ext --inplace``.
"""

import ctypes
import functools
import os
from pathlib import Path

FOLDER = "LEARNABLES_NATIVE"
"""Environment variable: where to look for built kernels instead of this package's folder."""


@functools.cache
def load(name: str) -> tuple[ctypes.CDLL | None, str]:
    """The built library of ``name.c``, or None; and a sentence that says which or why not."""
    folder = Path(os.environ.get(FOLDER) or Path(__file__).parent)
    built = sorted(p for p in folder.glob(f"_{name}.*") if p.suffix in {".so", ".pyd", ".dylib"})
    if not built:
        return None, f"{name}.c was not built: no _{name}.* in {folder}"
    try:
        return ctypes.CDLL(str(built[0])), str(built[0])
    except OSError as error:  # built for another machine
        return None, f"{built[0].name} cannot be loaded: {error}"
