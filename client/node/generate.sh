#!/bin/sh
# Generates src/gen from the contract.
#
# GOOGLEAPIS is the folder that has google/rpc/error_details.proto: a checkout of googleapis, or
# site-packages of a Python with googleapis-common-protos.
set -eu
cd "$(dirname "$0")"
proto="${MODELYARD_PROTO:-../../proto}"
: "${GOOGLEAPIS:?set it to the folder that has google/rpc/error_details.proto}"

rm -rf src/gen
mkdir -p src/gen
protoc --plugin=node_modules/.bin/protoc-gen-ts_proto \
  --ts_proto_out=src/gen \
  --ts_proto_opt=outputServices=grpc-js,esModuleInterop=true,env=node,importSuffix=.js,forceLong=bigint,useOptionals=none,oneof=unions-value \
  -I "$proto" -I "$GOOGLEAPIS" \
  "$proto"/modelyard/v1/*.proto google/rpc/status.proto google/rpc/error_details.proto
