#!/usr/bin/env bash
# Fails when git tracks what must never be committed: generated or built files, weights, databases,
# and lines that tie the tree to one package index or registry. Run from inside the repository.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"

failed=0
report() {
  printf '%s\n' "$1" "$2" >&2
  failed=1
}

files="$(git ls-files | grep -E '_pb2(_grpc)?\.pyi?$|\.(so|dylib|pyd|o|a|pyc|whl|safetensors|pt|pth|ckpt|bin|binpb|onnx|gguf|db|sqlite3?)$' || true)"
[ -z "$files" ] || report "tracked, but generated, built or downloaded:" "$files"

# Where packages come from is each machine's own setting. The bracketed letters keep this file from
# matching itself.
index='(index-url|find-links|registry|"resolved")["'"'"' =:]+(https?|file)[:]//'
hosts='(py[p]i|files[.]python[h]osted|registry[.]npm[j]s|deb[.]deb[i]an|crates)[.](org|io)'
lines="$(git grep -nIE "$index|$hosts" -- . || true)"
[ -z "$lines" ] || report "tracked lines that name a package index or registry:" "$lines"

exit "$failed"
