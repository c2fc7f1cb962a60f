# shellcheck shell=bash disable=SC2154
# Sourced by the scripts of this folder behind their stage_NAME functions, after arguments.sh: runs stages, each with a
# time budget and a log of its own, and says how each ended. Of the script it uses $0, all_stages, stages, out, build,
# began, total, fake, and
#   logs         the folder for NAME.log
#   budget NAME  prints the seconds that a stage may take
#   ending NAME LOG   prints the line of the log that says how the stage ended
#   told NAME LOG     prints what of the log is to be seen at once
# A stage passes by exit 0; 77 says that it was skipped.

# In the background a stage runs as the script again, so that timeout can end it with all its children.
if [ -n "${KVC_GPU_STAGE:-}" ]; then
  "stage_$KVC_GPU_STAGE"
  exit $?
fi

table=""
rows=""
failed=0
run_stage() {
  local stage=$1 rc start=$SECONDS left limit word line log=$logs/$1.log
  left=$((total - (SECONDS - began)))
  limit=$(budget "$stage")
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then
    rc=124
    echo "no time was left for this stage" >"$log"
  else
    KVC_GPU_STAGE=$stage BUILD=$build timeout -k 10 "$limit" "$BASH" "$0" "$out" >"$log" 2>&1
    rc=$?
  fi
  case $rc in
    0) word=pass ;;
    77) word=skip ;;
    124 | 137) word=TIME ;;
    *) word=FAIL ;;
  esac
  [ $rc -eq 0 ] || [ $rc -eq 77 ] || failed=1
  line=$(ending "$stage" "$log")
  table="$table$(printf '%-10s %-5s %4d s of %4d  %s' "$stage" "$word" $((SECONDS - start)) "$limit" "${line:0:110}")
"
  rows="$rows{\"stage\": \"$stage\", \"result\": \"$word\", \"exit\": $rc, \"seconds\": $((SECONDS - start))},"
  echo "== $stage: $word (exit $rc, $((SECONDS - start)) s), log $log"
  told "$stage" "$log" "$word"
}

# Those that were asked for, in the script's order.
run_stages() {
  local stage
  for stage in $all_stages; do
    case " $stages " in *" $stage "*) run_stage "$stage" ;; esac
  done
}

summary() {
  [ -z "$fake" ] && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  printf '%-10s %-5s %s\n%s' stage "" "time of budget" "$table"
  [ $failed -eq 0 ] && echo "all passed in $((SECONDS - began)) s" || echo "not all passed; $((SECONDS - began)) s"
}
