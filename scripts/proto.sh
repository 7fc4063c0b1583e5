#!/bin/sh
# Reads the .proto files of sapwood.rpc; needs `pip install grpcio-tools`.
# Writes what sapwood loads of them at import (descriptors.binpb), and their types for mypy.
set -e
cd "$(dirname "$0")/../src"
"${PYTHON:-../.venv/bin/python}" -m grpc_tools.protoc -I. --include_imports \
  --descriptor_set_out=sapwood/rpc/descriptors.binpb --pyi_out=. sapwood/rpc/*.proto
