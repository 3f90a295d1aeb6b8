#!/bin/sh
# Generates the stubs and builds the example and the scenario into a folder.
#
#   ./build.sh FOLDER
#
# With protoc-gen-go-grpc on PATH: Go modules, as anybody uses them. Without: Debian's grpc-go, whose
# sources lie in GOCODE and which only goes with the plugin of protoc-gen-go-1-3.
set -eu
cd "$(dirname "$0")"
out="${1:?the folder to build into}"
proto="${MODELYARD_PROTO:-../../proto}"
gocode="${GOCODE:-/usr/share/gocode}"
module=modelyard.dev/client

rm -rf "$out/gopath" "$out/proto"
tree="$out/gopath/src/$module"
mkdir -p "$tree"
out="$(cd "$out" && pwd)"
tree="$out/gopath/src/$module"
cp -R go.mod modelyard cmd "$tree"

if command -v protoc-gen-go-grpc >/dev/null 2>&1; then
  # The contract names no Go package: whoever generates says where the stubs go.
  options="module=$module"
  for file in "$proto"/modelyard/v1/*.proto; do
    options="$options,Mmodelyard/v1/$(basename "$file")=$module/modelyardv1"
  done
  protoc -I "$proto" --go_out="$tree" --go_opt="$options" \
    --go-grpc_out="$tree" --go-grpc_opt="$options" "$proto"/modelyard/v1/*.proto
  cd "$tree"
  go mod tidy
else
  # Debian's plugin wants the package in the files, and does not know that fields can be optional: to
  # protoc that is a oneof of one field, and so it gets one. Nor has it heard of where the packages of
  # google/protobuf are today.
  mkdir -p "$out/proto/modelyard/v1"
  for file in "$proto"/modelyard/v1/*.proto; do
    sed -E -e "s|^package modelyard.v1;|&\noption go_package = \"$module/modelyardv1\";|" \
      -e 's/^( *)optional ([A-Za-z0-9_.]+) ([a-z0-9_]+) = ([0-9]+);/\1oneof _\3 { \2 \3 = \4; }/' \
      "$file" >"$out/proto/modelyard/v1/$(basename "$file")"
  done
  options="plugins=grpc"
  for name in any duration empty struct timestamp wrappers; do
    options="$options,Mgoogle/protobuf/$name.proto=github.com/golang/protobuf/ptypes/$name"
  done
  options="$options,Mgoogle/protobuf/field_mask.proto=google.golang.org/genproto/protobuf/field_mask"
  protoc -I "$out/proto" --go_out="$options:$out/gopath/src" "$out"/proto/modelyard/v1/*.proto
  cd "$tree"
  export GO111MODULE=off GOPATH="$out/gopath:$gocode"
fi
export GOCACHE="${GOCACHE:-$out/cache}" GOFLAGS="-p=2"
go vet ./modelyard ./cmd/...
go build -o "$out/example" ./cmd/example
go build -o "$out/scenario" ./cmd/scenario
