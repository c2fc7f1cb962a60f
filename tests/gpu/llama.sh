#!/usr/bin/env bash
# llama-server on a real GPU, stock and patched, by one command on a machine without network:
#
#   tests/gpu/llama.sh OUT [STAGE...]
#
# Stages, in this order; each has a log of its own and says by its exit code whether it passed:
#   build       `kvpatch build --backend cuda` up to compiling, stock and then patched; packed into OUT/bins.tar.xz.*
#   smoke       equal tokens: stock, patched off, patched on with sleeps, trims and erased slots; several KV types
#   dates       an older llama.cpp, whose matrix products read a buffer's context: patched, switch off and on, equal tokens
#   sanitizer   a patched server on a small model under compute-sanitizer, asleep and awake
#   overhead    kvpatch bench overhead --check
#   idle        kvpatch bench idle --check
#   switch      kvpatch bench switch --check
#   split       a model larger than the free card: layers on GPU and CPU, as many as in stock
#   soak        tests/soak for SOAK_MINUTES
# Without any, all of them but dates and soak. Exit: 0 all passed, 1 one did not, 2 usage. OUT gets summary.txt,
# summary.json and results.tar.gz (logs, figures, plots), at most 8 files of 15 MiB in all with the binaries.
#
# Needs: git, cmake, ninja, nvcc, a C++ compiler, Python with numpy. From the environment:
#   SOURCE=DIR     what tests/gpu/llama_pack.py wrote: the trees, and wheels of what kvpatch needs
#   BUILD=DIR      trees, binaries, models; survives between calls on one machine (/tmp/kvpatch-llama)
#   BINS=DIR       a folder with bins.tar.xz.*: unpacked, nothing is built
#   STOCK, PATCHED=DIR   these builds are used, nothing is built
#   GPU_ARCH (90)  JOBS (all)  PYTHON (python3)  TOTAL_S (580: no stage goes on after so many seconds)
#   CMAKE_ADDED    more flags of both builds, behind kvpatch's own
#   OVERHEAD_ARGS, IDLE_ARGS, SWITCH_ARGS, SMOKE_ARGS, SPLIT_ARGS, SOAK_ARGS  more arguments     SOAK_MINUTES (8.5)
#   FAKE=1         no GPU: CPU builds and tiny models, small numbers; tries this script and its programs
set -u

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
all_stages="build smoke dates sanitizer overhead idle switch split soak"
default_stages="build smoke sanitizer overhead idle switch split"
# shellcheck source=tests/gpu/arguments.sh
. "$here/arguments.sh"

build=${BUILD:-/tmp/kvpatch-llama}
mkdir -p "$build" || exit 2
build=$(cd "$build" && pwd)
results=$build/results
mkdir -p "$results"
fake=${FAKE:-}
total=${TOTAL_S:-580}
jobs=${JOBS:-$(nproc)}
python=${PYTHON:-python3}
device=cuda
[ -n "$fake" ] && device=cpu
stock=${STOCK:-$build/stock}
patched=${PATCHED:-$build/patched}
began=$SECONDS

# ---- Python: what the machine has, and the wheels that were carried for the rest ----

export PYTHONPATH="$root:$build/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export GIT_PYTHON_REFRESH=quiet KVPATCH_CACHE=${KVPATCH_CACHE:-$build/cache}
# All that the stages import, so that what is missing is known before anything is built.
imports='import git, gguf, unidiff, kvpatch.cli.app, kvpatch.cli.bench, kvpatch.runtime, tests.soak.__main__'
prepare_python() {
  local wheels=${SOURCE:-/nonexistent}/whl
  if [ -d "$wheels" ] && ! PYTHONPATH=$root "$python" -c "$imports" 2>/dev/null; then
    # Again when other wheels were carried.
    if ! (cd "$wheels" && cksum -- *.whl) | cmp -s - "$build/site.wheels"; then
      rm -rf "$build/site" "$build/site.wheels"
      "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$build/site" "$wheels"/*.whl || return 1
      (cd "$wheels" && cksum -- *.whl) >"$build/site.wheels"
    fi
  fi
  "$python" -c "$imports" || { echo "a package is missing here: make SOURCE again by llama_pack.py"; return 1; }
}

# ---- build ----

# kvpatch calls cmake as it finds it. Here that is a script which adds what this machine wants besides kvpatch's own
# flags, so that nothing of those is written twice: what a user's build has, and visibly what differs.
prepare_cmake() {
  local cuda folder runpath="" real
  real=$(command -v cmake) || { echo "cmake is not on PATH"; return 1; }
  added="${CMAKE_ADDED:-}"
  if [ -z "$fake" ]; then
    # One card needs no NCCL, and a machine that gets the binaries may not have it.
    added="-DGGML_CUDA_NCCL=OFF $added"
    # Servers are started without LD_LIBRARY_PATH, so what it finds must be found otherwise; not by all of the linker's
    # folders: the driver's stub is in one of them.
    cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")") || return 1
    for folder in "$cuda/lib" ${LD_LIBRARY_PATH:+${LD_LIBRARY_PATH//:/ }} /usr/local/nvidia/lib64; do
      case $folder in */stubs) ;; *) [ -d "$folder" ] && runpath="$runpath;$folder" ;; esac
    done
  fi
  mkdir -p "$build/cmake"
  cat >"$build/cmake/cmake" <<END
#!$BASH
[ "\$1" = -S ] || exec "$real" "\$@"
words=()
for word; do
  case \$word in -DCMAKE_INSTALL_RPATH=*) word="\$word$runpath" ;; esac
  words+=("\$word")
done
exec "$real" "\${words[@]}" \$KVC_CMAKE_ADDED
END
  chmod +x "$build/cmake/cmake"
  echo "== besides kvpatch's flags: $added; run path:$runpath"
}

# What a build's environment lacks (kvpatch drops LD_LIBRARY_PATH and more) must not be what the compilers need.
compilers_work() {
  echo 'int main() { return 0; }' >"$build/try.cpp"
  mkdir -p "$build/cmake"
  # The machine's own choice, which kvpatch does not look at: it takes cc and c++ as it finds them.
  [ -z "${CC:-}" ] || printf '#!%s\nexec %s "$@"\n' "$BASH" "$CC" >"$build/cmake/cc"
  [ -z "${CXX:-}" ] || printf '#!%s\nexec %s "$@"\n' "$BASH" "$CXX" >"$build/cmake/c++"
  chmod +x "$build"/cmake/* 2>/dev/null
  local cxx
  cxx=$(PATH="$build/cmake:$PATH" "$python" -c \
    'from kvpatch import toolchain as t; print(t.ensure(t.CC, None).path, t.ensure(t.CXX, None).path)') || return 1
  echo "== compilers: $cxx"
  env -u LD_LIBRARY_PATH -u LIBRARY_PATH -u CPATH -u C_INCLUDE_PATH -u CPLUS_INCLUDE_PATH \
    "${cxx##* }" "$build/try.cpp" -o "$build/try" && (unset LD_LIBRARY_PATH && "$build/try") ||
    { echo "FAIL: ${cxx##* } does not compile"; return 1; }
}

# compile FOLDER SOURCE FLAGS WORDS...: `kvpatch build` of a carried tree into a folder of $build, without its smoke test.
compile() {
  local folder=$1 source=$2 flags=$3 start=$SECONDS cuda=()
  shift 3
  [ -z "$fake" ] && cuda=(--backend cuda --cuda-arch "${GPU_ARCH:-90}")
  local tree=$build/trees/$source
  if [ ! -e "$tree/CMakeLists.txt" ]; then
    mkdir -p "$tree"
    tar -xf "$SOURCE/$source.tar.xz" -C "$tree" || return 1
  fi
  PATH="$build/cmake:$PATH" KVC_CMAKE_ADDED="$added $flags" "$python" -m kvpatch build --until compile \
    --llama-cpp "$(cat "$SOURCE/$source.commit")" --llama-cpp-source "$tree" "${cuda[@]}" \
    --jobs "$jobs" --out "$build/$folder" "$@" || { tail -n 40 "$KVPATCH_CACHE"/work/*/logs/compile.log; return 1; }
  if (unset LD_LIBRARY_PATH; ldd "$build/$folder"/bin/*.so "$build/$folder/bin/llama-server") 2>&1 | grep 'not found'; then
    echo "FAIL: libraries are missing"
    return 1
  fi
  echo "== $folder: $((SECONDS - start)) s, $(du -sh "$build/$folder" | cut -f1), $(ls "$build/$folder/bin" | wc -l) files"
}

stage_build() {
  [ -n "${SOURCE:-}" ] || { echo "SOURCE is not set"; return 1; }
  # Writing the large model takes one processor and the disk: meanwhile the others compile.
  local model=""
  if [ -z "$fake" ]; then
    "$python" "$here/llama_install.py" model 8b &
    model=$!
    # shellcheck disable=SC2064
    trap "kill $model 2>/dev/null" EXIT
  fi
  compilers_work && prepare_cmake || return 1
  # In one work tree, whose build folder they share: of the patched one only what the patches change is compiled.
  compile stock llama.cpp "" --stock || return 1
  compile patched llama.cpp "" || return 1
  "$python" "$here/llama_install.py" pack "$build" "$out" stock patched || return 1
  ls -l "$out"/bins.tar.xz.*
  [ -z "$model" ] || wait "$model" || return 1
  echo "ok: built in $((SECONDS - began)) s"
}

# ---- the others ----

have() {
  local folder
  for folder in "$stock" "$patched"; do
    [ -x "$folder/bin/llama-server" ] || { echo "not built: $folder"; return 1; }
  done
}

both() { echo --stock "$stock" --patched "$patched" --device "$device"; }

stage_smoke() {
  have || return 1
  local size=""
  [ -n "$fake" ] && size="--shape tiny --short"
  # shellcheck disable=SC2046,SC2086
  "$python" "$here/llama_identity.py" $(both) --out "$results/smoke" $size ${SMOKE_ARGS:-}
}

stage_dates() {
  [ -n "${SOURCE:-}" ] || { echo "SOURCE is not set"; return 1; }
  compilers_work && prepare_cmake || return 1
  # Without the kernels that are most of a build for CUDA and no part of what is looked for.
  local flags=""
  [ -z "$fake" ] && flags="-DGGML_CUDA_FA=OFF -DGGML_CPU_ALL_VARIANTS=OFF"
  compile older older "$flags" || return 1
  "$python" "$here/llama_identity.py" --patched "$build/older" --device "$device" --out "$results/dates"
}

stage_sanitizer() {
  have || return 1
  if [ -n "$fake" ]; then
    echo "skipped: there is no compute-sanitizer without a GPU"
    return 77
  fi
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; return 1; }
  # shellcheck disable=SC2046
  "$python" "$here/llama_identity.py" $(both) --out "$results/sanitizer" --shape small --sanitizer
}

measure() { # name arguments...
  have || return 1
  local name=$1 size="--check"
  shift
  [ -n "$fake" ] && size="--shape tiny --short"
  # shellcheck disable=SC2046,SC2086
  "$python" -m kvpatch bench "$name" $(both) --out "$results/$name" $size "$@"
}

# shellcheck disable=SC2086
stage_overhead() { measure overhead ${OVERHEAD_ARGS:-}; }
# shellcheck disable=SC2086
stage_idle() { measure idle ${IDLE_ARGS:-}; }
# shellcheck disable=SC2086
stage_switch() { measure switch ${SWITCH_ARGS:-}; }

stage_split() {
  have || return 1
  local size=""
  [ -n "$fake" ] && size="--shape tiny"
  # shellcheck disable=SC2046,SC2086
  "$python" "$here/llama_split.py" $(both) --out "$results/split" $size ${SPLIT_ARGS:-}
}

stage_soak() {
  have || return 1
  local minutes=${SOAK_MINUTES:-8.5}
  [ -n "$fake" ] && minutes=${SOAK_MINUTES:-0.5}
  # shellcheck disable=SC2046,SC2086
  (cd "$root" && "$python" -m tests.soak $(both) --minutes "$minutes" --out "$results/soak" ${SOAK_ARGS:-})
}

budget() { # seconds
  case $1 in
    build) echo 575 ;;
    smoke) echo 150 ;;
    dates) echo 240 ;;
    sanitizer) echo 150 ;;
    overhead) echo 400 ;;
    idle) echo 150 ;;
    switch) echo 240 ;;
    split) echo 120 ;;
    soak) echo 580 ;;
  esac
}

logs=$results
ending() {
  grep -aE '^(ok|FAIL|FAILED|error|skipped|not built|bench .*bounds|\[.*\] (ok|FAILED))' "$2" | tail -n 1
}
told() {
  case $1 in
    build | dates) tail -n 25 "$2" ;;
    overhead | idle | switch) grep -av '^\(overhead\|idle\|switch\): ' "$2" | tail -n 60 ;;
    *) tail -n 40 "$2" ;;
  esac
}
# shellcheck source=tests/gpu/stages.sh
. "$here/stages.sh"

prepare_python || exit 1
if [ -n "${BINS:-}" ] && [ ! -e "$build/patched/kvpatch.json" ]; then
  "$python" "$here/llama_install.py" join "$BINS" "$build" || exit 1
fi
echo "== ready after $((SECONDS - began)) s"
run_stages
summary | tee "$out/summary.txt"
printf '{"stages": [%s], "seconds": %d}\n' "${rows%,}" $((SECONDS - began)) >"$out/summary.json"
# Slot files and models are large and say nothing.
(cd "$build" && tar -czf "$out/results.tar.gz" --exclude='*.gguf' --exclude=slots --exclude='slot-*' --exclude='ledger*' results)
exit $failed
