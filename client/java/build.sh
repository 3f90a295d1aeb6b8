#!/bin/sh
# Generates the stubs, compiles everything, and writes the programs `example` and `scenario` into a
# folder.
#
#   ./build.sh FOLDER
#
# JARS is the folder of the jars of grpc-java and what it needs; Debian's by default. GOOGLEAPIS is
# the folder that has google/rpc/error_details.proto: a checkout of googleapis, or site-packages of a
# Python with googleapis-common-protos. Who builds with Maven or Gradle lets that generate and fetch;
# README.md says what.
set -eu
cd "$(dirname "$0")"
out="${1:?the folder to build into}"
proto="${MODELYARD_PROTO:-../../proto}"
jars="${JARS:-/usr/share/java}"
: "${GOOGLEAPIS:?set it to the folder that has google/rpc/error_details.proto}"

mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -rf "$out/stubs" "$out/classes"
mkdir "$out/stubs" "$out/classes"

classpath="$out/classes"
for jar in grpc-api grpc-context grpc-core grpc-netty grpc-protobuf grpc-protobuf-lite grpc-stub \
  protobuf guava failureaccess gson perfmark-api geronimo-annotation-1.3-spec \
  netty-buffer netty-codec netty-codec-http netty-codec-http2 netty-codec-socks netty-common netty-handler \
  netty-handler-proxy netty-resolver netty-transport netty-transport-native-unix-common; do
  [ ! -e "$jars/$jar.jar" ] || classpath="$classpath:$jars/$jar.jar"
done

protoc -I "$proto" --java_out="$out/stubs" --grpc-java_out="$out/stubs" \
  --plugin=protoc-gen-grpc-java="$(command -v grpc_java_plugin)" "$proto"/modelyard/v1/*.proto
# Debian's jar of these is from before ErrorInfo.
protoc -I "$GOOGLEAPIS" --java_out="$out/stubs" google/rpc/status.proto google/rpc/error_details.proto
find "$out/stubs" src -name '*.java' >"$out/sources"
javac -encoding UTF-8 -nowarn -d "$out/classes" -cp "$classpath" "@$out/sources"

for program in example:Example scenario:Scenario; do
  file="$out/${program%%:*}"
  printf '#!/bin/sh\nexec java -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8 -cp "%s" dev.modelyard.client.%s "$@"\n' \
    "$classpath" "${program##*:}" >"$file"
  chmod +x "$file"
done
