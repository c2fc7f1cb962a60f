# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by the scripts of this folder with their arguments OUT [STAGE...]: sets out and stages from them, or ends the
# script. all_stages and default_stages are the script's; its opening comment, up to `set -u`, is its help.

usage() { sed -n '2,/^set -u/p' "$0" | sed -n 's/^# \{0,1\}//p'; }
case ${1-} in
  --help | -h) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
  -*) echo "$1: not an option" >&2; usage >&2; exit 2 ;;
esac
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
stages=${*:-$default_stages}
for stage in $stages; do
  case " $all_stages " in
    *" $stage "*) ;;
    *) echo "$stage: no such stage; there are: $all_stages" >&2; exit 2 ;;
  esac
done
