#!/usr/bin/env bash
# Write the code generated from protos/motley into the given folder: .ci/generate_protos.sh OUT
set -euo pipefail
out=$(realpath "$1")
cd "$(dirname "$0")/.."
bin=$PWD/.venv-protos/bin
"$bin/python" -m grpc_tools.protoc -Iprotos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  --mypy_opt=quiet --mypy_grpc_opt=quiet \
  --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
  protos/motley/v1/*.proto
