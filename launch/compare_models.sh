#!/usr/bin/env bash
# make compare: bundled books -> five small models, three seeds each -> who is better at which context.
# Made for 15 CPU cores and a GPU or two, which they share: all runs train at once, then all are
# evaluated. Finished steps are recognised and skipped. Arguments go to every training; WORKERS, COMPARE
# and EVALUATE (words of launch/evaluate.py) make it smaller:
#   WORKERS=2 COMPARE=runs/try EVALUATE="contexts=128..512 limit=4" launch/compare_models.sh train.total_tokens=64K
set -euo pipefail
cd "$(dirname "$0")/.."
export WORKERS=${WORKERS:-15} COMPARE=${COMPARE:-runs/compare} OMP_NUM_THREADS=1
EVALUATE=${EVALUATE:-contexts=128..8192 protocols=fixed,stream spans_per_document=8 stream_tokens=32768}
export EVALUATE

say() { printf '\n== %s  [%d s]\n' "$*" "$SECONDS"; }

say "1/4 preparing the bundled books (once)"
python launch/prepare.py data=books_sample

say "2/4 training, $WORKERS at a time"
python launch/sweep.py sweep=compare workers="$WORKERS" out_dir="$COMPARE" \
  model.loss_chunk_size=4096 "$@"

say "3/4 evaluating, $WORKERS at a time"
GPUS=$(python -c 'from pretrain.training.environment import visible_gpus; print(*visible_gpus())')
export GPUS
evaluate() {
  local run=$1
  if [ -n "$GPUS" ]; then # one of them, by the place of this process among those that run
    # shellcheck disable=SC2086
    set -- $GPUS
    shift $((SLOT % $#))
    export CUDA_VISIBLE_DEVICES=$1
  fi
  # shellcheck disable=SC2086  # several words
  python launch/evaluate.py run="$run" suite=perplexity $EVALUATE >"$run/evaluate.log" 2>&1 ||
    { echo "error: $run: $(tail -n 1 "$run/evaluate.log")  ($run/evaluate.log)" >&2; return 1; }
}
export -f evaluate
printf '%s\0' "$COMPARE"/*_seed[0-9] |
  xargs -0 -n 1 -P "$WORKERS" --process-slot-var=SLOT bash -c 'evaluate "$1"' _

say "4/4 comparing: the first row, windows only, is what plots are drawn against"
runs=()
for row in swa bst spade longvq mamba2; do
  runs+=("$COMPARE/${row}_tiny_seed"[0-9])
done
python launch/compare.py "${runs[@]}" out="${COMPARE}_report"
say "done"
