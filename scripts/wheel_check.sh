#!/usr/bin/env bash
# Build wheel and sdist, install each into a clean environment, and train a first model outside the repository.
#
# usage: scripts/wheel_check.sh      PYTHON chooses the interpreter, KEEP=DIR keeps the built files
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH VIRTUAL_ENV
pip() { "$place/$1/bin/python" -m pip --disable-pip-version-check install --quiet "${@:2}"; }

echo "Building wheel and sdist"
"$python" -m venv "$place/tools"
pip tools build
"$place/tools/bin/python" -m build --outdir "$place/dist" "$root" > "$place/build.log" || { tail -20 "$place/build.log" >&2; exit 1; }
ls "$place/dist"

echo "Installing the wheel into a clean environment"
"$python" -m venv "$place/clean"
pip clean --constraint "$root/constraints.txt" "$place"/dist/*.whl
mkdir "$place/elsewhere"
cd "$place/elsewhere"
"$place/clean/bin/entrenar" --version
"$place/clean/bin/entrenar" quickstart --minutes 0.1 < /dev/null
test -d runs/quickstart/checkpoints
"$place/clean/bin/entrenar" generate runs/quickstart --prompt 'One ' --max-new-tokens 20

echo "Installing the sdist over it"
pip clean --no-deps --force-reinstall "$place"/dist/*.tar.gz
"$place/clean/bin/entrenar" plan --preset tiny --batch-size 1 --seq-len 128 > /dev/null
if [ -n "${KEEP:-}" ]; then mkdir -p "$KEEP" && cp "$place"/dist/* "$KEEP"; fi
echo "Wheel and sdist work"
