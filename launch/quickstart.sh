#!/usr/bin/env bash
# make quickstart: bundled books -> shards -> two small models -> perplexity against context length.
# Every line below is a command you can type yourself. Finished steps are recognised and skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-quickstart}

say() { printf '\n== %s  [%d s]\n' "$*" "$SECONDS"; }

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  train() { deepspeed --num_gpus 1 launch/train.py "$@"; }
else
  # Two processes of one thread each: on two cores that is faster than one process with two.
  export DS_ACCELERATOR=cpu
  train() { OMP_NUM_THREADS=1 deepspeed --num_accelerators 2 launch/train.py "$@"; }
fi

say "1/4 preparing the bundled books (once)"
python launch/prepare.py data=books_sample

say "2/4 training a Block-State Transformer"
train experiment="${preset}_bst"

say "3/4 training the window-only model of equal size, equally long"
train experiment="${preset}_swa"

say "4/4 perplexity against context length, up to 4,096 tokens"
for model in bst swa; do
  python launch/evaluate.py run="runs/${preset}_${model}" suite=perplexity \
    contexts=256..4096 protocols=fixed,stream spans_per_document=2 stream_tokens=8192
done

say "report, with a byte 5-gram model trained on the same text beside them"
python launch/compare.py "runs/${preset}_bst" "runs/${preset}_swa" \
  out="runs/${preset}_report" ngram=true
