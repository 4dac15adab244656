#!/usr/bin/env bash
# make speed: training speed on one GPU, ours by length and loop and beside public packages, then
# operators; docs/performance.md says what it gave. Blocks are compiled first, COMPILE models at a time.
# Every measurement is kept in SPEED: stopped, it goes on. Arguments go to every timing of steps; SIZE, T
# (the shortest length), MEGA_TOKENS, OPS make it smaller:
#   SIZE=tiny T=128 MEGA_TOKENS=128 OPS= launch/speed.sh device=cpu compile=false vocab_size=64 seconds=0.1
set -uo pipefail
cd "$(dirname "$0")/.."
export SPEED=${SPEED:-runs/speed}
COMPILE=${COMPILE:-4} SIZE=${SIZE:-350m} T=${T:-4096}
MEGA_TOKENS=${MEGA_TOKENS:-4096} OPS=${OPS-ssm bst_layer}
BATCH=$((16 * T)) LONG=$((8 * T)) LONGEST=$((32 * T))
bst=bst_$SIZE spade=spade_$SIZE swa=swa_$SIZE recurrent=block_recurrent
narrow=residual_in_fp32=false small="lengths=$T tokens=$((8 * T)) $narrow"

# A name, then words of evals.throughput.
jobs=(
  "short models=$swa,$bst,$spade peers=llama lengths=$T tokens=$BATCH $narrow"
  "loops models=$bst lengths=$T tokens=$BATCH loops=plain,deepspeed,trainer zero_stage=0 $narrow"
  "zero1 models=$bst lengths=$T tokens=$BATCH loops=deepspeed,trainer $narrow"
  "long models=$swa,$bst,$spade peers=llama lengths=$LONG tokens=$BATCH $narrow"
  "larger models=$swa,$bst,$spade lengths=$T tokens=$((22 * T)) $narrow"
  "longest models=$bst,$spade lengths=$LONGEST,$T tokens=$LONGEST checkpointing=true $narrow"
  "memory models=$bst peers=llama lengths=$((2 * T)) tokens=$((2 * T)),$LONG $narrow"
  "mamba2 models=mamba2_$SIZE like=$swa peers=mamba_ssm,fla_mamba2 $small"
  "longvq models=longvq_$SIZE,mega_$SIZE $small"
  "mega_pytorch models= like=$swa peers=mega_pytorch lengths=$T tokens=$MEGA_TOKENS"
  "$recurrent models=${recurrent}_$SIZE like=$swa peers=${recurrent}_pytorch $small"
)
failed=0
say() { printf '\n== %s  [%d s]\n' "$*" "$SECONDS"; }

run() { # a job, then words
  local words
  read -ra words <<<"$1"
  python -m evals.throughput "${words[@]:1}" "${@:2}" out="$SPEED/${words[0]}"
}
export -f run

if [[ " $* " != *" compile=false "* ]]; then
  say "compiling, $COMPILE models at a time"
  # Not loops and zero1: their blocks are the first one's.
  printf '%s\n' "${jobs[@]}" | grep -Ev '^(loops|zero1) ' |
    xargs -d '\n' -n 1 -P "$COMPILE" bash -c 'run "${@: -1}" "${@:1:$#-1}" compile_only=true' _ "$@"
fi
for job in "${jobs[@]}"; do
  say "$job"
  run "$job" "$@" || failed=1
done
for op in $OPS; do
  say "$op"
  case $op in bst_layer) sizes="lengths=4096,8192,16384 unrolled_blocks=128 timeout_s=300" ;; *) sizes= ;; esac
  # shellcheck disable=SC2086  # several words
  python -m evals.throughput.ops "$op" $sizes out="$SPEED" || failed=1
done
say "the tables"
for job in "${jobs[@]}"; do
  printf '\n### %s\n\n' "${job%% *}"
  cat "$SPEED/${job%% *}/throughput.md"
done | tee "$SPEED/speed.md"
exit $failed
