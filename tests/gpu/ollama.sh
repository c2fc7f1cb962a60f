#!/usr/bin/env bash
# Ollama on a real GPU, stock and patched, by one command on a machine without network and without Go:
#
#   tests/gpu/ollama.sh OUT [STAGE...]
#
# Stages, in this order; each has a log of its own and says by its exit code whether it passed:
#   build       llama-server for CUDA by `tests/gpu/llama.sh OUT build`, stock and then patched
#   install     laid out with the carried `ollama`, as a build of Ollama is
#   models      the models of the benchmarks, 4.08 GB each
#   switch      kvpatch bench switch --check
#   capacity    kvpatch bench capacity --check
# Without any, all of them. `build` takes most of a call of 10 minutes: call it first, and the others while the machine
# lasts. Exit: 0 all passed, 1 one did not, 2 usage. OUT gets summary.txt, summary.json and results.tar.gz (logs,
# figures, plots), at most 8 files of 15 MiB in all with the binaries.
#
# Needs what llama.sh needs. From the environment:
#   SOURCE=DIR     what `tests/gpu/llama_pack.py DIR --ollama STOCK PATCHED` wrote
#   BUILD=DIR      trees, binaries, models; survives between calls on one machine (/tmp/kvpatch-llama)
#   BINS=DIR       a folder with bins.tar.xz.*: unpacked, llama-server is not built
#   STOCK, PATCHED=DIR   these builds of Ollama are used, nothing is built or installed
#   GPU_ARCH (90)  JOBS (all)  PYTHON (python3)  TOTAL_S (580: no stage goes on after so many seconds)
#   MODELS (5)     how many are written: as many as the benchmarks ask for
#   SWITCH_ARGS, CAPACITY_ARGS    more arguments
#   FAKE=1         no GPU: CPU builds and tiny models, small numbers; tries this script and its programs
set -u

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
all_stages="build install models switch capacity"
default_stages=$all_stages
# shellcheck source=tests/gpu/arguments.sh
. "$here/arguments.sh"

build=${BUILD:-/tmp/kvpatch-llama}
mkdir -p "$build" || exit 2
build=$(cd "$build" && pwd)
results=$build/ollama-results
mkdir -p "$results"
fake=${FAKE:-}
total=${TOTAL_S:-580}
python=${PYTHON:-python3}
device=cuda
shape=8b
if [ -n "$fake" ]; then
  device=cpu
  shape=tiny
fi
stock=${STOCK:-$build/ollama/stock}
patched=${PATCHED:-$build/ollama/patched}
began=$SECONDS

export PYTHONPATH="$root:$build/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export GIT_PYTHON_REFRESH=quiet KVPATCH_CACHE=${KVPATCH_CACHE:-$build/cache}
unset OLLAMA_HOST OLLAMA_MODELS OLLAMA_KEEP_ALIVE OLLAMA_KV_CACHE_TYPE

carried() {
  [ -z "${STOCK:-}${PATCHED:-}" ] || { echo "skipped: STOCK and PATCHED are given"; return 77; }
  [ -n "${SOURCE:-}" ] || { echo "SOURCE is not set"; return 1; }
}

stage_build() {
  carried || return
  if [ -n "${BINS:-}" ]; then
    echo "skipped: BINS is given"
    return 77
  fi
  mkdir -p "$build/llama-out"
  env -u STOCK -u PATCHED BUILD="$build" TOTAL_S=$((total - 5)) "$BASH" "$here/llama.sh" "$build/llama-out" build
  local rc=$?
  # The binaries alone: its summary would lie where this script's does.
  cp "$build"/llama-out/bins.tar.xz.* "$out" 2>/dev/null
  return $rc
}

stage_install() {
  carried || return
  local toolkit=cuda_v0 side
  if [ -n "${BINS:-}" ] && [ ! -e "$build/patched/kvpatch.json" ]; then
    "$python" "$here/llama_install.py" join "$BINS" "$build" || return 1
  fi
  if [ -z "$fake" ]; then
    toolkit=cuda_v$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p') || return 1
  fi
  "$python" "$here/ollama_install.py" layout "$SOURCE" "$build" "$build/ollama" "$toolkit" || return 1
  for side in stock patched; do
    (
      cd "$build/ollama/$side/lib/ollama" || exit 1
      # As Ollama starts llama-server.
      export LD_LIBRARY_PATH=$PWD:$PWD/$toolkit
      [ -n "$fake" ] || [ -e "$toolkit/libggml-cuda.so" ] || { echo "FAIL: $side has no CUDA backend"; exit 1; }
      ! ldd ./*.so llama-server "$toolkit"/*.so 2>/dev/null | grep 'not found' || { echo "FAIL: libraries are missing"; exit 1; }
    ) || return 1
    OLLAMA_HOST=127.0.0.1:1 HOME="$build" "$build/ollama/$side/bin/ollama" --version 2>&1 | grep -v Warning:
  done
  echo "ok: installed in $build/ollama"
}

stage_models() {
  "$python" "$here/ollama_install.py" models "$shape" "${MODELS:-5}"
}

measure() { # name arguments...
  local name=$1 size="--check"
  shift
  [ -n "$fake" ] && size="--shape tiny --short --budget 36MB"
  # shellcheck disable=SC2086
  "$python" -m kvpatch bench "$name" --stock "$stock" --patched "$patched" --device "$device" --out "$results/$name" \
    $size "$@"
}

# shellcheck disable=SC2086
stage_switch() { measure switch ${SWITCH_ARGS:-}; }
# shellcheck disable=SC2086
stage_capacity() { measure capacity ${CAPACITY_ARGS:-}; }

budget() { # seconds
  case $1 in
    build) echo 575 ;;
    install) echo 60 ;;
    models) echo 150 ;;
    switch) echo 420 ;;
    capacity) echo 240 ;;
  esac
}

logs=$results
ending() {
  grep -aE '^(ok|FAIL|FAILED|error|skipped|bench .*bounds|all passed|not all passed)' "$2" | tail -n 1
}
told() {
  case $1 in
    switch | capacity) grep -av "^\($1\): " "$2" | tail -n 80 ;;
    *) tail -n 40 "$2" ;;
  esac
}
# shellcheck source=tests/gpu/stages.sh
. "$here/stages.sh"

# The wheels that were carried are unpacked by llama.sh's first call.
if ! "$python" -c 'import git, gguf, unidiff, kvpatch.cli.app, kvpatch.cli.bench, kvpatch.runtime' 2>/dev/null; then
  [ -d "${SOURCE:-/nonexistent}/whl" ] || { echo "a package is missing here, and SOURCE has no wheels"; exit 1; }
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --upgrade --target "$build/site" "$SOURCE"/whl/*.whl || exit 1
  (cd "$SOURCE/whl" && cksum -- *.whl) >"$build/site.wheels"
fi
echo "== ready after $((SECONDS - began)) s"
run_stages
summary | tee "$out/summary.txt"
printf '{"stages": [%s], "seconds": %d}\n' "${rows%,}" $((SECONDS - began)) >"$out/summary.json"
(cd "$build" && tar -czf "$out/results.tar.gz" --exclude='home-*' --exclude='ledger*' ollama-results)
exit $failed
