#!/usr/bin/env bash
# Fail unless the generated code that is checked in is what the .proto files give.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
.ci/generate_protos.sh "$fresh"
if ! diff --recursive --brief --exclude='*.proto' --exclude=__pycache__ protos/motley "$fresh/motley"; then
  echo "The generated code is stale: run \`make protos\`." >&2
  exit 1
fi
