#!/usr/bin/env bash
# The tests with real timm, transformers, peft, accelerate and lightning, in an environment of their
# own beside .venv: `bash tests/integrations/run.sh [PYTEST ARGUMENTS]`.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/integrations
bash "$here/environment.sh"
pytest=(.venv-integrations/bin/python -m pytest -q)
export OMP_NUM_THREADS=1

if (($#)); then
  exec "${pytest[@]}" "$@"
fi
hangs=(-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true)
exec "${pytest[@]}" -n 2 --dist worksteal "${hangs[@]}" -m "integration and not slow" "$here"
