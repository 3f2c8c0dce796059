#!/bin/sh
# The main job on the bundled model: convert, verify, look inside, run three prompts.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}"

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }

cd "$work"
ln -s "$here/tiny-qwen3.5-moe" tiny-qwen3.5-moe
say flashpack convert tiny-qwen3.5-moe
flashpack convert tiny-qwen3.5-moe tiny.flashpack
say flashpack verify tiny.flashpack
flashpack verify tiny.flashpack
say flashpack run tiny.flashpack --prompt "'Find \"driver\" in train.log.'"
flashpack run tiny.flashpack --prompt 'Find "driver" in train.log.'
say flashpack run tiny.flashpack --memory smallest --prompt "'Alarm at 19:30 Thursday, please.'"
flashpack run tiny.flashpack --memory smallest --prompt 'Alarm at 19:30 Thursday, please.'
say flashpack run tiny.flashpack --raw --max-tokens 60 --prompt "'The os module provides'"
flashpack run tiny.flashpack --raw --max-tokens 60 --prompt 'The os module provides'
