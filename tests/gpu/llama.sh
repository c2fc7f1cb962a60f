#!/usr/bin/env bash
# llama-server on a real GPU, stock and patched, by one command on a machine without network:
#
#   tests/gpu/llama.sh OUT [STAGE...]
#
# Stages, in this order; each has a log of its own and says by its exit code whether it passed:
#   build       both builds of one tree: stock, then what the patches change; packed into OUT/bins.tar.xz.*
#   smoke       equal tokens: stock, patched off, patched on with sleeps, trims and erased slots; several KV types
#   sanitizer   a patched server on a small model under compute-sanitizer, asleep and awake
#   overhead    kvpatch bench overhead --check
#   idle        kvpatch bench idle --check
#   switch      kvpatch bench switch --check
#   split       a model larger than the free card: layers on GPU and CPU, as many as in stock
#   soak        tests/soak for SOAK_MINUTES
# Without any, all of them but soak. Exit: 0 all passed, 1 one did not, 2 usage. OUT gets summary.txt, summary.json and
# results.tar.gz (logs, figures, plots), at most 8 files of 15 MiB in all with the binaries.
#
# Needs: cmake, ninja, nvcc, a C++ compiler, Python with numpy. From the environment:
#   SOURCE=DIR     what tests/gpu/llama_pack.py wrote: the trees, and wheels of what kvpatch needs
#   BUILD=DIR      trees, binaries, models; survives between calls on one machine (/tmp/kvpatch-llama)
#   BINS=DIR       a folder with bins.tar.xz.*: unpacked, nothing is built
#   STOCK, PATCHED=DIR   these builds are used, nothing is built
#   GPU_ARCH (90)  JOBS (all)  PYTHON (python3)  TOTAL_S (580: no stage goes on after so many seconds)
#   OVERHEAD_ARGS, IDLE_ARGS, SWITCH_ARGS, SMOKE_ARGS, SPLIT_ARGS, SOAK_ARGS  more arguments     SOAK_MINUTES (8.5)
#   FAKE=1         no GPU: CPU builds and tiny models, small numbers; tries this script and its programs
set -u

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
all_stages="build smoke sanitizer overhead idle switch split soak"
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

configure() {
  local flags=() line
  while read -r line; do flags+=("$line"); done < <("$python" "$here/llama_install.py" flags)
  [ ${#flags[@]} -gt 0 ] || return 1
  if [ -z "$fake" ]; then
    # Servers are started without LD_LIBRARY_PATH, so what it finds must be found otherwise; not by all of the linker's
    # folders: the driver's stub is in one of them.
    local cuda folder runpath
    cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")") || return 1
    # shellcheck disable=SC2016
    runpath='$ORIGIN'
    for folder in "$cuda/lib64" "$cuda/lib" ${LD_LIBRARY_PATH:+${LD_LIBRARY_PATH//:/ }} /usr/local/nvidia/lib64; do
      case $folder in */stubs) ;; *) [ -d "$folder" ] && runpath="$runpath;$folder" ;; esac
    done
    flags+=(-DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${GPU_ARCH:-90}" -DGGML_CUDA_NCCL=OFF
      "-DCMAKE_INSTALL_RPATH=$runpath")
  fi
  cmake -S "$build/llama.cpp" -B "$build/build" -G Ninja "${flags[@]}"
}

# compile NAME: builds what is in the tree now and keeps its binaries in the folder NAME.
compile() {
  cmake --build "$build/build" --target llama-server --parallel "$jobs" || return 1
  rm -rf "${build:?}/$1"
  mkdir -p "$build/$1/bin"
  cp -a "$build/build/bin/llama-server" "$build"/build/bin/*.so* "$build/$1/bin/" || return 1
  if (unset LD_LIBRARY_PATH; ldd "$build/$1"/bin/*.so "$build/$1/bin/llama-server") 2>&1 | grep 'not found'; then
    echo "FAIL: libraries are missing"
    return 1
  fi
  strip --strip-unneeded "$build/$1"/bin/llama-server "$build/$1"/bin/*.so 2>/dev/null
  echo "== $1: $((SECONDS - began)) s, $(du -sh "$build/$1" | cut -f1)"
}

stage_build() {
  [ -n "${SOURCE:-}" ] || { echo "SOURCE is not set"; return 1; }
  # Writing the large model takes one processor and the disk: meanwhile the others compile.
  local model=""
  if [ -z "$fake" ]; then
    "$python" "$here/llama_install.py" model 8b &
    model=$!
  fi
  if [ ! -e "$build/stock/kvpatch.json" ]; then
    if [ ! -e "$build/llama.cpp/CMakeLists.txt" ]; then
      mkdir -p "$build/llama.cpp"
      "$python" "$here/llama_install.py" unpack "$SOURCE/llama.cpp.tar.xz" "$build/llama.cpp" || return 1
    fi
    [ -e "$build/build/build.ninja" ] || configure || return 1
    compile stock || return 1
    "$python" "$here/llama_install.py" manifest "$SOURCE/source.json" "$build/stock" stock || return 1
  fi
  # The new files have the time of now, so exactly what they change is built again.
  "$python" "$here/llama_install.py" unpack "$SOURCE/patched.tar.xz" "$build/llama.cpp" || return 1
  cmake "$build/build" >/dev/null || return 1 # new source files are found by globbing
  compile patched || return 1
  (cd "$root/vmm" && cc -std=c11 -O2 -fPIC -fvisibility=hidden -shared -Wl,-soname,libkvcached.so -Iinclude \
    -o "$build/patched/bin/libkvcached.so" src/*.c -lpthread -ldl) || return 1
  "$python" "$here/llama_install.py" manifest "$SOURCE/source.json" "$build/patched" patched || return 1
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
    sanitizer) echo 150 ;;
    overhead) echo 400 ;;
    idle) echo 150 ;;
    switch) echo 240 ;;
    split) echo 120 ;;
    soak) echo 580 ;;
  esac
}

# In the background it runs as this script again, so that timeout can end it with all its children.
if [ -n "${KVC_GPU_STAGE:-}" ]; then
  "stage_$KVC_GPU_STAGE"
  exit $?
fi

table=""
json=""
failed=0
run_stage() {
  local stage=$1 rc start=$SECONDS left limit word line log=$results/$1.log
  left=$((total - (SECONDS - began)))
  limit=$(budget "$stage")
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then
    rc=124
    echo "no time was left for this stage" >"$log"
  else
    KVC_GPU_STAGE=$stage BUILD=$build timeout -k 10 "$limit" "$BASH" "$here/llama.sh" "$out" >"$log" 2>&1
    rc=$?
  fi
  case $rc in
    0) word=pass ;;
    77) word=skip ;;
    124 | 137) word=TIME ;;
    *) word=FAIL ;;
  esac
  [ $rc -eq 0 ] || [ $rc -eq 77 ] || failed=1
  line=$(grep -aE '^(ok|FAIL|FAILED|error|skipped|not built|bench .*bounds|\[.*\] (ok|FAILED))' "$log" | tail -n 1)
  table="$table$(printf '%-10s %-5s %4d s of %4d  %s' "$stage" "$word" $((SECONDS - start)) "$limit" "${line:0:110}")
"
  json="$json{\"stage\": \"$stage\", \"result\": \"$word\", \"exit\": $rc, \"seconds\": $((SECONDS - start))},"
  echo "== $stage: $word (exit $rc, $((SECONDS - start)) s)"
  case $stage in
    build) tail -n 15 "$log" ;;
    overhead | idle | switch) grep -av '^\(overhead\|idle\|switch\): ' "$log" | tail -n 60 ;;
    *) tail -n 40 "$log" ;;
  esac
}

prepare_python || exit 1
if [ -n "${BINS:-}" ] && [ ! -e "$build/patched/kvpatch.json" ]; then
  "$python" "$here/llama_install.py" join "$BINS" "$build" || exit 1
fi
echo "== ready after $((SECONDS - began)) s"
for stage in $all_stages; do
  case " $stages " in *" $stage "*) run_stage "$stage" ;; esac
done

{
  [ -z "$fake" ] && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  printf '%-10s %-5s %s\n%s' stage "" "time of budget" "$table"
  [ $failed -eq 0 ] && echo "all passed in $((SECONDS - began)) s" || echo "not all passed; $((SECONDS - began)) s"
} | tee "$out/summary.txt"
printf '{"stages": [%s], "seconds": %d}\n' "${json%,}" $((SECONDS - began)) >"$out/summary.json"
# Slot files and models are large and say nothing.
(cd "$build" && tar -czf "$out/results.tar.gz" --exclude='*.gguf' --exclude=slots --exclude='slot-*' --exclude='ledger*' results)
exit $failed
