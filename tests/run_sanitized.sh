#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UBSan in a copy of the tree and runs the kernel tests on it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath "${VENV:-.venv}")/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r engine setup.py pyproject.toml tests "$folder"
cd "$folder"
rm -f engine/*.so
ENGINE_SANITIZE=address,undefined "$python" setup.py --quiet build_ext --inplace
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
# The interpreter itself is not clean of leaks; a finding of UBSan must stop the run.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
PYTHONPATH=. "$python" -m pytest -q -p no:cacheprovider --numprocesses=logical --maxprocesses=4 \
    tests/test_kernels_formats.py tests/test_ops.py tests/test_program.py tests/test_request_server.py \
    tests/test_sampling_kernels.py
