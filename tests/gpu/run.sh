#!/usr/bin/env bash
# Everything that has to be shown on a real GPU, by one command on a machine that has one and nothing else:
#
#   tests/gpu/run.sh OUT [STAGE...]
#
# OUT gets a log for each stage (and bench.json); the table at the end says which passed. Stages, in this order:
#   build       the library, the test program, the programs of this folder, the benchmark
#   suite       the whole C suite on the GPU
#   sanitizer   the suites that touch memory, graphs and soak (shortened), under compute-sanitizer
#   graphs      captured CUDA graphs over memory that is replaced; look-ahead while kernels run
#   fresh       are pages zero that the driver makes anew
#   bench       costs against raw driver calls, with their bounds
#   soak        1,000 cycles of sleep and wake, 10,000 of growing and shrinking
# Without any, all of them; build is done whenever its results are not there. A stage that fails stops none of the
# others. Exit: 0 all passed, 1 one did not, 2 usage.
#
# Needs: a C compiler, nvcc, coreutils; compute-sanitizer for that stage. No network, no make.
# From the environment:
#   CC, NVCC (cc, nvcc)        GPU_ARCH (native)            BUILD=DIR (OUT/build)
#   TOTAL_S=N (570)            no stage goes on after so many seconds
#   WITHOUT_SUITE=1            build does not make the test program
#   SUITE_ARGS, BENCH_ARGS, GRAPHS_ARGS, FRESH_ARGS, SOAK_ARGS   more arguments of the programs
#   FAKE=1                     no GPU: the driver of tests/vmm/fake_cuda.c, kernels on the CPU, small numbers; checks
#                              these programs and this script, no times, and skips the sanitizer
set -u

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
all_stages="build suite sanitizer graphs fresh bench soak"
default_stages=$all_stages
# shellcheck source=tests/gpu/arguments.sh
. "$here/arguments.sh"

build=${BUILD:-$out/build}
mkdir -p "$build" || exit 2
cc=${CC:-cc}
nvcc=${NVCC:-nvcc}
fake=${FAKE:-}
total=${TOTAL_S:-570}
jobs=$(nproc)
began=$SECONDS
flags="-std=c11 -O2 -g -fPIC -pthread -Wall -Wextra"
run_env=(env)
[ -n "$fake" ] && run_env+=("LD_LIBRARY_PATH=$build/fake" FAKE_CUDA_MEMORY=4294967296)

# ---- build ----

# compile FOLDER FLAGS FILE...: objects into FOLDER, as many at once as there are processors.
compile() {
  local folder=$1 options=$2
  shift 2
  mkdir -p "$folder"
  # shellcheck disable=SC2016
  printf '%s\n' "$@" | xargs -P "$jobs" -I{} sh -c '
    o=$1/$(basename "$2" .c).o; echo "'"$cc"' $3 -c $2"; exec '"$cc"' $3 -c -o "$o" "$2"' sh "$folder" {} "$options"
}

# The C files of tests/vmm that make the test program: all but the fake driver and what is a program by itself.
suite_files() {
  for f in "$root"/tests/vmm/*.c; do
    case $(basename "$f") in fake_* | fuzz_*) ;; *) echo "$f" ;; esac
  done
}

stage_build() {
  local public="-I$root/vmm/include" inner="-I$root/vmm/include -I$root/vmm/src" bench=$root/vmm/bench
  set -e
  # Nothing of an earlier build is left to run when this one fails.
  rm -f "$build"/done* "$build/libkvcached.so" "$build"/{graphs,fresh,soak,kvcached-bench,suite/vmm_tests}
  "$cc" --version | head -n 1
  compile "$build/lib.o" "$flags -fvisibility=hidden" "$root"/vmm/src/*.c
  "$cc" -shared -pthread -Wl,-soname,libkvcached.so -Wl,-z,defs -o "$build/libkvcached.so" "$build"/lib.o/*.o -ldl
  # The driver that is none: for FAKE, and for those tests of loading a driver that always use it.
  mkdir -p "$build/fake"
  # shellcheck disable=SC2086
  "$cc" $flags -fvisibility=hidden $inner -shared -Wl,-soname,libcuda.so.1 -o "$build/fake/libcuda.so.1" \
    "$root"/tests/vmm/fake_*.c -ldl
  compile "$build/bench.o" "$flags $public" "$bench"/*.c
  "$cc" -pthread -rdynamic -o "$build/kvcached-bench" "$build"/bench.o/*.o -L"$build" -lkvcached \
    "-Wl,-rpath,$build" -ldl
  compile "$build/gpu.o" "$flags $public -I$bench" "$here/program.c" "$here/graphs.c" "$here/fresh.c" "$here/soak.c" \
    "$bench/raw.c" "$bench/raw_cuda.c"
  local shared=("$build"/gpu.o/{program,raw,raw_cuda}.o) link
  if [ -n "$fake" ]; then
    compile "$build/gpu.o" "$flags" "$here/gpu_cpu.c"
    shared+=("$build/gpu.o/gpu_cpu.o")
    link="$cc -pthread"
  else
    "$nvcc" --version | tail -n 2
    "$nvcc" "-arch=${GPU_ARCH:-native}" -O2 -std=c++17 -Xcompiler -Wall,-Wextra -c -o "$build/gpu.o/gpu.o" "$here/gpu.cu"
    shared+=("$build/gpu.o/gpu.o")
    link="$nvcc"
  fi
  for program in graphs fresh soak; do
    # shellcheck disable=SC2086
    $link -o "$build/$program" "$build/gpu.o/$program.o" "${shared[@]}" -L"$build" -lkvcached -Xlinker -rpath \
      -Xlinker "$build" -lpthread -ldl
  done
  # Last, because the other stages can do without it.
  if [ -n "${WITHOUT_SUITE:-}" ]; then
    date >"$build/done$fake"
    return
  fi
  # shellcheck disable=SC2046
  compile "$build/suite.o" "$flags -fvisibility=hidden -DKVCACHED_TEST $inner" $(suite_files)
  # In a folder of their own: a part of the tests may be called as one of the library is.
  compile "$build/suite.lib" "$flags -fvisibility=hidden -DKVCACHED_TEST $inner" "$root"/vmm/src/*.c
  mkdir -p "$build/suite"
  "$cc" -pthread -o "$build/suite/vmm_tests" "$build"/suite.o/*.o "$build"/suite.lib/*.o -ldl
  date >"$build/done$fake"
}

# ---- the others: each prints to its log and says by its exit code whether it passed ----

# Whether build has made this program.
built() {
  [ -x "$build/$1" ] || { echo "not built: $build/$1"; return 1; }
}

stage_suite() {
  built suite/vmm_tests || return 1
  # One at a time: tests compare what the driver reports as used.
  # shellcheck disable=SC2086
  "${run_env[@]}" KVCACHED_BACKEND=cuda KVCACHED_FAKE_DRIVER="$build/fake" "$build/suite/vmm_tests" ${SUITE_ARGS:-}
}

stage_sanitizer() {
  if [ -n "$fake" ]; then
    echo "skipped: there is no compute-sanitizer for a driver that is none"
    return 77
  fi
  local tool="compute-sanitizer --tool memcheck --target-processes all --error-exitcode 9" rc=0
  built suite/vmm_tests && built graphs && built soak || return 1
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; return 1; }
  # Errors that the driver returns are not counted here: tests provoke them, and the library handles them.
  # shellcheck disable=SC2046
  KVCACHED_BACKEND=cuda KVCACHED_FAKE_DRIVER="$build/fake" $tool --report-api-errors no \
    "$build/suite/vmm_tests" $(memory_suites) || rc=1
  $tool "$build/graphs" --cycles 24 --size 16M --steps 32 --judge-times 0 || rc=1
  $tool "$build/soak" --sleeps 20 --grows 100 --size 256M || rc=1
  return $rc
}

# "--suite region --suite sleep ...": those suites of the test program that touch memory on a device.
memory_suites() {
  KVCACHED_BACKEND=cuda "$build/suite/vmm_tests" --list | cut -d. -f1 | sort -u | while read -r suite; do
    case $suite in
      api | backend | faults | gate | prepare | property | region | sleep | threads) printf ' --suite %s' "$suite" ;;
    esac
  done
}

stage_graphs() {
  built graphs || return 1
  local size=""
  [ -n "$fake" ] && size="--cycles 24 --size 4M --steps 32 --judge-times 0"
  # shellcheck disable=SC2086
  "${run_env[@]}" "$build/graphs" $size ${GRAPHS_ARGS:-}
}

stage_fresh() {
  built fresh || return 1
  local size=""
  [ -n "$fake" ] && size="--size 64M"
  # Its processes share the fake card's memory through this file.
  # shellcheck disable=SC2086
  FAKE_CUDA_STATE="$build/fake-fresh" "${run_env[@]}" "$build/fresh" $size ${FRESH_ARGS:-}
}

stage_soak() {
  built soak || return 1
  local size=""
  [ -n "$fake" ] && size="--sleeps 12 --grows 60 --size 64M"
  # shellcheck disable=SC2086
  "${run_env[@]}" "$build/soak" $size ${SOAK_ARGS:-}
}

stage_bench() {
  built kvcached-bench || return 1
  local size="--check"
  [ -n "$fake" ] && size="--rounds 2 --steps 1,8 --size 64M --kv-size 16M --sleep-rounds 2 --seconds 0.1 --processes 2"
  # shellcheck disable=SC2086
  "${run_env[@]}" "$build/kvcached-bench" --backend cuda $size --json "$out/bench.json" ${BENCH_ARGS:-}
}

# ---- one stage, with its budget ----

budget() { # seconds
  case $1 in
    build) echo 90 ;;
    suite) echo 200 ;;
    sanitizer) echo 150 ;;
    graphs) echo 60 ;;
    fresh) echo 60 ;;
    bench) echo 120 ;;
    soak) echo 280 ;;
  esac
}

logs=$out
# The last line that says how it ended; of the sanitizer all of its summaries.
ending() {
  if [ "$1" = sanitizer ] && grep -aq 'ERROR SUMMARY' "$2"; then
    grep -a 'ERROR SUMMARY' "$2" | sed 's/^=* *//' | sort | uniq -c | sed 's/^ *\([0-9]*\) /\1 x /' | paste -sd ';' -
  else
    grep -aE '^(ok|FAIL|[a-z0-9-]+: [0-9]+ passed|skipped|not built|[0-9]+ of [0-9]+ bounds)' "$2" | tail -n 1
  fi
}
told() { [ "$3" = pass ] || tail -n 40 "$2"; }
# shellcheck source=tests/gpu/stages.sh
. "$here/stages.sh"

case " $stages " in
  *" build "*) ;;
  *) [ -e "$build/done$fake" ] || stages="build $stages" ;;
esac
run_stages
echo
summary
exit $failed
