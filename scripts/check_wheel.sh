#!/usr/bin/env bash
# Build the wheel, install it with its dependencies into a new environment, run the demo in an empty folder.
# Takes minutes and a package index; `make test` does the same with borrowed dependencies (tests/test_wheel.py).
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$top/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --no-isolation --outdir "$work" "$top" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$python" -m venv "$work/env"
"$work/env/bin/pip" install -qq "$(grep '^torch==' "$top/constraints.txt")"
"$work/env/bin/pip" install -qq --constraint "$top/constraints.txt" "$work"/*.whl
"$work/env/bin/pip" check
mkdir "$work/empty"
cd "$work/empty"
"$work/env/bin/python" -c 'import gradsentry_nb; print(gradsentry_nb.__version__, "imported from the wheel")'
"$work/env/bin/gradsentry" demo --out demo
ls -l demo
