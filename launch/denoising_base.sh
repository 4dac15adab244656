#!/usr/bin/env bash
# make denoising-base: what SPADE's and full attention's encoder-decoders of T5 base's size cost, and
# how their losses begin, on inputs of 512 to 16,384 tokens: configs/sweep/denoising_base.yaml. One run
# per GPU at a time, so that speeds hold. Finished runs are recognised and skipped; one that fails is left
# out of the table. Arguments go to every training; DENOISING is the folder:
#   DENOISING=runs/try launch/denoising_base.sh train.compile=false
set -euo pipefail
cd "$(dirname "$0")/.."
DENOISING=${DENOISING:-runs/denoising_base}
GPUS=$(python -c 'from pretrain.training.environment import visible_gpus; print(len(visible_gpus()))')
failed=0

python launch/prepare.py data=books_denoising n_sentinels=1024 out=corpora/books_denoising_16k
python launch/sweep.py sweep=denoising_base workers=$((GPUS > 0 ? GPUS : 1)) out_dir="$DENOISING" "$@" ||
  failed=$?
[ $failed -ne 75 ] || exit 75 # stopped: the table is made when the same command has gone on
python launch/evaluate.py costs \
  "$DENOISING"/{spade_t5_base,t5_base}_seq_len512 "$DENOISING"/{spade_t5_base,t5_base}_seq_len4096 \
  "$DENOISING"/spade_t5_base_seq_len16384 out="${DENOISING}_costs"
exit $failed
