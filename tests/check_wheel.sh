#!/usr/bin/env bash
# Installs a wheel where no checkout is in reach and runs the main job. Usage: check_wheel.sh PYTHON WHEEL
set -euo pipefail
wheel=$(realpath "$2")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$1" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "$wheel"
cd "$folder"
"$folder/venv/bin/python" -m engine run --prompt "import os" --max-tokens 8
"$folder/venv/bin/python" - <<'PYTHON'
from engine import Engine

with Engine.open() as engine:
    assert engine.generate("import os").text
PYTHON
echo "the wheel works: $(basename "$wheel")"
