#!/usr/bin/env bash
# Shows that one built library serves several versions of torch: takes the _native.so of this checkout, built with whatever torch built
# it, into a fresh environment of another Python and another torch, and compares its results with the definitions there.
#
#   tests/check_other_torch.sh [PYTHON] [TORCH]      default: python3.12 torch==2.11.0 (a CUDA build on Linux; several GB of download)
#
# ENVIRONMENT=FOLDER keeps and reuses the environment. Not part of the test suite.
set -euo pipefail
python=${1:-python3.12}
torch=${2:-torch==2.11.0}
root=$(cd "$(dirname "$0")/.." && pwd)
library=$root/fastdiff_kernels/_native.so
[ -f "$library" ] || { echo "$library is missing; build it first: make build" >&2; exit 1; }

environment=${ENVIRONMENT:-$(mktemp -d)}
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" numpy
# Nothing is compiled here: the package's files, the finished library among them, are used where they are.
cd "$root"
PYTHONPATH=$root "$environment/bin/python" -W error::RuntimeWarning -m tests.other_torch
