#!/usr/bin/env bash
# Checks what the system itself must have, which pip cannot bring.
#
#   tools/system_needs.sh PART...
#
# python      headers and venv module of the interpreter PY (default python3), 3.11 or newer
# build       a C++20 compiler, CXX (default c++)
# sanitizers  its AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# tests       GoogleTest
# bench       google-benchmark and h2load
# fuzz        clang with libFuzzer, FUZZ_CXX (default clang++)
# clients-node, clients-go, clients-cpp, clients-java
#             what the clients in these languages are built and run with; see docs/clients.md
#
# What is missing is installed where this runs as root on Debian or Ubuntu; elsewhere the one command
# to run is printed. MODELYARD_NO_INSTALL=1 only prints, everywhere.
#
# Exit status: 0 everything is there; 1 something without which nothing works is missing (python,
# build); 2 a wrong argument; 3 only optional parts are missing (a line beginning "skipped:" names
# each).
set -euo pipefail

CXX="${CXX:-c++}"
FUZZ_CXX="${FUZZ_CXX:-clang++}"
PY="${PY:-python3}"
# Where Debian's packages put jars and sources in Go.
JARS="${JARS:-/usr/share/java}"
GOCODE="${GOCODE:-/usr/share/gocode}"

readonly OPTIONAL_MISSING=3
readonly PARTS="python build sanitizers tests bench fuzz clients-node clients-go clients-cpp clients-java"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

say() { printf '%s\n' "$*" >&2; }

# Compiles standard input with the given compiler and flags; links unless -c or -E is among them.
compiles() {
  local compiler="$1"
  shift
  command -v "${compiler%% *}" >/dev/null 2>&1 || return 1
  # A compiler given with flags ("ccache g++") is meant to be split into words.
  # shellcheck disable=SC2086
  $compiler -std=c++20 -x c++ - -x none "$@" -o "$scratch/probe" >/dev/null 2>&1
}

# Include directories of packages that CMAKE_PREFIX_PATH names, as CMake itself would search them.
prefix_flags() {
  local prefixes="${CMAKE_PREFIX_PATH:-}" prefix
  for prefix in ${prefixes//[:;]/ }; do printf -- '-I%s/include ' "$prefix"; done
  if command -v brew >/dev/null 2>&1; then printf -- '-I%s/include ' "$(brew --prefix)"; fi
}

has_header() {
  local flags
  flags="$(prefix_flags)"
  # shellcheck disable=SC2086
  printf '#include <%s>\n' "$1" | compiles "$CXX" -E $flags
}

# True if each of the programs is on PATH.
has_programs() {
  local program
  for program in "$@"; do command -v "$program" >/dev/null 2>&1 || return 1; done
}

# protoc, and the contract's imports from google/protobuf beside it.
has_protoc() {
  printf 'syntax = "proto3";\nimport "google/protobuf/struct.proto";\n' >"$scratch/probe.proto"
  has_programs protoc && protoc -I "$scratch" -o /dev/null "$scratch/probe.proto" >/dev/null 2>&1
}

there() {
  case "$1" in
    python)
      "$PY" - <<'PROBE' >/dev/null 2>&1
import ensurepip, pathlib, sys, sysconfig, venv
assert sys.version_info >= (3, 11)
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()
PROBE
      ;;
    build)
      printf '#include <compare>\n#include <concepts>\n#include <span>\nint main() {}\n' |
        compiles "$CXX"
      ;;
    sanitizers)
      printf 'int main() {}\n' | compiles "$CXX" -fsanitize=address,undefined &&
        printf 'int main() {}\n' | compiles "$CXX" -fsanitize=thread
      ;;
    tests) has_header gtest/gtest.h ;;
    bench) has_header benchmark/benchmark.h && command -v h2load >/dev/null 2>&1 ;;
    fuzz)
      printf '%s\n' '#include <cstddef>' '#include <cstdint>' \
        'extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t*, std::size_t) { return 0; }' |
        compiles "$FUZZ_CXX" -fsanitize=fuzzer,address,undefined
      ;;
    clients-node) has_programs node npm && has_protoc ;;
    clients-go)
      # Either modules and today's plugins, or Debian's sources and the plugin that belongs to them.
      has_programs go protoc-gen-go && has_protoc &&
        { has_programs protoc-gen-go-grpc || [ -d "$GOCODE/src/google.golang.org/grpc" ]; }
      ;;
    clients-cpp)
      has_programs grpc_cpp_plugin pkg-config "${CXX%% *}" && has_protoc &&
        pkg-config --exists grpc++ protobuf
      ;;
    clients-java)
      has_programs javac java grpc_java_plugin && has_protoc &&
        [ -e "$JARS/grpc-netty.jar" ] && [ -e "$JARS/protobuf.jar" ] && [ -e "$JARS/gson.jar" ] &&
        [ -e "$JARS/perfmark-api.jar" ]
      ;;
    *) return 2 ;;
  esac
}

what() {
  case "$1" in
    python) echo "Python 3.11 or newer with headers and venv (looked for: $PY)" ;;
    build) echo "a C++20 compiler (looked for: $CXX)" ;;
    sanitizers) echo "the sanitizers' libraries (for: $CXX)" ;;
    tests) echo "GoogleTest" ;;
    bench) echo "google-benchmark and h2load" ;;
    fuzz) echo "clang with libFuzzer (looked for: $FUZZ_CXX)" ;;
    clients-node) echo "Node 18 or newer with npm, and protoc" ;;
    clients-go) echo "Go with grpc-go and its protoc plugins, and protoc" ;;
    clients-cpp) echo "gRPC for C++ with its protoc plugin, protoc and pkg-config" ;;
    clients-java) echo "a JDK, grpc-java with its jars in $JARS and its protoc plugin, and protoc" ;;
  esac
}

without() {
  case "$1" in
    python | build) echo "nothing can be built" ;;
    sanitizers) echo "skipped: the C++ tests under sanitizers" ;;
    tests) echo "skipped: the C++ tests" ;;
    bench) echo "skipped: the benchmarks" ;;
    fuzz) echo "skipped: fuzzing" ;;
    clients-node) echo "skipped: the client in Node" ;;
    clients-go) echo "skipped: the client in Go" ;;
    clients-cpp) echo "skipped: the client in C++" ;;
    clients-java) echo "skipped: the client in Java" ;;
  esac
}

family() {
  local tool
  for tool in apt-get dnf pacman brew; do
    if command -v "$tool" >/dev/null 2>&1; then
      echo "$tool"
      return
    fi
  done
  echo unknown
}

# Debian 12 and later keep libFuzzer's runtime apart from clang; older Ubuntus ship it with clang.
apt_fuzzer_runtime() {
  if apt-cache show libclang-rt-dev >/dev/null 2>&1; then echo libclang-rt-dev; fi
}

packages() {
  case "$1:$2" in
    apt-get:python) echo "python3-dev python3-venv" ;;
    apt-get:build | apt-get:sanitizers) echo "g++" ;;
    apt-get:tests) echo "libgtest-dev" ;;
    apt-get:bench) echo "libbenchmark-dev nghttp2-client" ;;
    apt-get:fuzz) echo "clang $(apt_fuzzer_runtime)" ;;
    # A Node from elsewhere brings its own npm, and Debian's would not go with it.
    apt-get:clients-node)
      echo "$(has_programs node npm || echo nodejs npm) protobuf-compiler libprotobuf-dev" ;;
    # Of the plugins only this one fits Debian's grpc-go.
    apt-get:clients-go)
      echo "golang-go golang-google-grpc-dev protoc-gen-go-1-3 protobuf-compiler libprotobuf-dev" ;;
    apt-get:clients-cpp)
      echo "g++ libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev protobuf-compiler pkg-config" ;;
    apt-get:clients-java)
      echo "default-jdk-headless libgrpc-java protobuf-compiler-grpc-java-plugin libprotobuf-java" \
        "libnetty-java libguava-java libperfmark-java libgoogle-gson-java" \
        "libgeronimo-annotation-1.3-spec-java protobuf-compiler libprotobuf-dev" ;;
    dnf:python) echo "python3-devel" ;;
    dnf:build) echo "gcc-c++" ;;
    dnf:sanitizers) echo "libasan libubsan libtsan" ;;
    dnf:tests) echo "gtest-devel" ;;
    dnf:bench) echo "google-benchmark-devel nghttp2" ;;
    dnf:fuzz) echo "clang compiler-rt" ;;
    dnf:clients-node) echo "nodejs npm protobuf-compiler protobuf-devel" ;;
    dnf:clients-cpp) echo "gcc-c++ grpc-devel grpc-plugins protobuf-devel pkgconf-pkg-config" ;;
    pacman:python) echo "python" ;;
    pacman:build | pacman:sanitizers) echo "gcc" ;;
    pacman:tests) echo "gtest" ;;
    pacman:bench) echo "benchmark nghttp2" ;;
    pacman:fuzz) echo "clang compiler-rt" ;;
    pacman:clients-node) echo "nodejs npm protobuf" ;;
    pacman:clients-cpp) echo "gcc grpc protobuf pkgconf" ;;
    brew:python) echo "python" ;;
    brew:build | brew:sanitizers) echo "gcc" ;;
    brew:tests) echo "googletest" ;;
    brew:bench) echo "google-benchmark nghttp2" ;;
    brew:fuzz) echo "llvm" ;;
    brew:clients-node) echo "node protobuf" ;;
    brew:clients-go) echo "go protobuf protoc-gen-go protoc-gen-go-grpc" ;;
    brew:clients-cpp) echo "grpc protobuf pkgconf" ;;
  esac
}

command_for() {
  local part names=() from
  from="$(family)"
  for part in "$@"; do
    # shellcheck disable=SC2207
    names+=($(packages "$from" "$part"))
  done
  [ "${#names[@]}" -gt 0 ] || from=unknown
  case "$from" in
    apt-get) echo "sudo apt-get update && sudo apt-get install --no-install-recommends ${names[*]}" ;;
    dnf) echo "sudo dnf install ${names[*]}" ;;
    pacman) echo "sudo pacman -S --needed ${names[*]}" ;;
    brew) echo "brew install ${names[*]}" ;;
    *) echo "install with your system's package manager: $(for part in "$@"; do what "$part"; done | paste -sd ';' -)" ;;
  esac
}

install_with_apt() {
  local part names=() log="$scratch/apt.log"
  export DEBIAN_FRONTEND=noninteractive
  # Lists first: on a fresh image even `apt-cache show` knows nothing before.
  apt-get update -qq >"$log" 2>&1 || { tail -n 5 "$log" >&2; return 1; }
  for part in "$@"; do
    # shellcheck disable=SC2207
    names+=($(packages apt-get "$part"))
  done
  say "installing with apt-get: ${names[*]}"
  apt-get install -qq -y --no-install-recommends "${names[@]}" >"$log" 2>&1 ||
    { tail -n 5 "$log" >&2; return 1; }
}

missing_of() {
  local part
  for part in "$@"; do there "$part" || echo "$part"; done
}

main() {
  local part missing=() status=0
  [ "$#" -gt 0 ] || { say "usage: tools/system_needs.sh PART... ($PARTS)"; exit 2; }
  for part in "$@"; do
    [ -n "$(what "$part")" ] || { say "unknown part: $part ($PARTS)"; exit 2; }
  done
  # shellcheck disable=SC2207
  missing=($(missing_of "$@"))
  [ "${#missing[@]}" -gt 0 ] || return 0
  if [ "$(family)" = apt-get ] && [ "$(id -u)" -eq 0 ] && [ -z "${MODELYARD_NO_INSTALL:-}" ]; then
    install_with_apt "${missing[@]}" || say "apt-get could not install everything"
    # shellcheck disable=SC2207
    missing=($(missing_of "${missing[@]}"))
    [ "${#missing[@]}" -gt 0 ] || return 0
  fi
  for part in "${missing[@]}"; do
    say "$(without "$part") (missing: $(what "$part"))"
    case "$part" in
      python | build) status=1 ;;
      *) [ "$status" -eq 1 ] || status=$OPTIONAL_MISSING ;;
    esac
  done
  say "to have it: $(command_for "${missing[@]}")"
  exit "$status"
}

main "$@"
