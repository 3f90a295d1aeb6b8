#!/usr/bin/env bash
# Builds and runs the C++ core's tests, each variant in a build directory of its own:
#
#   tools/core_tests.sh [core-plain] [core-asan-ubsan] [core-tsan-stress]     (default: all three)
#
# All variants run even if one fails. Each leaves build/reports/NAME.started and NAME.json for
# tools/test_counts.py, which prints the counts. BIN (default .venv/bin) is where cmake, ninja and
# python are. Exit status: 0 all passed, or skipped for want of an optional part (a line says so).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BIN="${BIN:-.venv/bin}"
readonly REPORTS=build/reports
# Line numbers for reports, and little optimisation: most of the time goes into compiling the tests.
readonly CXX_FLAGS='-O1 -g1'
readonly OPTIONAL_MISSING=3

# Asks tools/system_needs.sh for a part; false if it is optional and missing, exits on anything else.
have() {
  local status=0
  tools/system_needs.sh "$1" || status=$?
  [ "$status" -eq 0 ] || [ "$status" -eq "$OPTIONAL_MISSING" ] || exit "$status"
  [ "$status" -eq 0 ]
}

# run NAME PROGRAM SANITIZERS [COMMAND...]: COMMAND, if given, runs the program.
run() {
  local name="$1" program="$2" sanitizers="$3"
  shift 3
  touch "$REPORTS/$name.started"
  "$BIN/cmake" -S . -B "build/$name" -G Ninja --log-level=WARNING \
    -DCMAKE_MAKE_PROGRAM="$PWD/$BIN/ninja" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DMODELYARD_BUILD_TESTS=ON -DMODELYARD_SANITIZE="$sanitizers" \
    -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="$CXX_FLAGS" &&
    "$BIN/cmake" --build "build/$name" --target "$program" &&
    "$@" "build/$name/$program" --gtest_brief=1 --gtest_output="json:$REPORTS/$name.json"
}

run_variant() {
  case "$1" in
    core-plain) run "$1" modelyard_core_tests "" env ;;
    core-asan-ubsan)
      run "$1" modelyard_core_tests address,undefined env UBSAN_OPTIONS=print_stacktrace=1
      ;;
    core-tsan-stress)
      # ThreadSanitizer wants a memory layout that some kernels randomise away; this holds it still.
      local still=()
      if setarch -R true 2>/dev/null; then still=(setarch -R); fi
      run "$1" modelyard_core_stress thread env TSAN_OPTIONS=halt_on_error=1 "${still[@]}"
      ;;
    *)
      echo "unknown variant: $1 (core-plain core-asan-ubsan core-tsan-stress)" >&2
      exit 2
      ;;
  esac
}

mkdir -p "$REPORTS"
rm -f "$REPORTS"/core-*
[ "$#" -gt 0 ] || set -- core-plain core-asan-ubsan core-tsan-stress
have tests || exit 0
sanitizers=unknown
status=0
for variant in "$@"; do
  if [ "$variant" != core-plain ]; then
    if [ "$sanitizers" = unknown ]; then have sanitizers && sanitizers=there || sanitizers=missing; fi
    [ "$sanitizers" = there ] || continue
  fi
  printf -- '--- %s\n' "$variant"
  run_variant "$variant" || status=1
done
"$BIN/python" tools/test_counts.py "$REPORTS" core- || status=1
exit "$status"
