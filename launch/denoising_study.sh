#!/usr/bin/env bash
# make denoising-study CORPORA=FOLDER: what is pretraining worth to a small encoder-decoder, and what
# does it matter which encoder reads long inputs? Books -> three encoders on span corruption, at 512
# tokens and then at 4,096 -> fine-tuning on five tasks, SPADE's also from random weights, three seeds
# -> one table per task. FOLDER has books_large/ (train-00 and validation) and a folder per task of
# configs/task/. Every row tries all RATES with its first seed and takes the one that does best on
# validation. Processes are dealt out to the visible GPUs, WORKERS at a time; made for two GPUs and 32
# cores. Finished steps are recognised and skipped. Arguments go to both pretrainings (on GPUs
# `train.compile=true train.cuda_graphs=true` halve their time), FINETUNE (words of
# launch/finetune.py) to every fine-tuning:
#   WORKERS=2 STUDY=runs/try FINETUNE="steps=4 test_examples=8 max_target_tokens=8 truncate=true" \
#     launch/denoising_study.sh train.total_tokens=64K
set -euo pipefail
cd "$(dirname "$0")/.."
export CORPORA=${CORPORA:?the folder of books_large/ and of the tasks is missing: CORPORA=FOLDER}
export STUDY=${STUDY:-runs/denoising_study} FINETUNE=${FINETUNE:-} PRETRAIN=$* OMP_NUM_THREADS=1
WORKERS=${WORKERS:-32} SEEDS=${SEEDS:-3} RATES=${RATES:-3e-4 1e-3 3e-3}
export CORPUS=${CORPUS:-corpora/denoising_study}
GPUS=$(python -c 'from pretrain.training.environment import visible_gpus; print(*visible_gpus())')
export GPUS

JOBS=() MISSING=""
for task in ${TASKS:-sumpubmed_sample movie_reviews scitldr_a banking77 sentence_polarity}; do
  [ -d "$CORPORA/$task" ] || MISSING+=" $task"
  case $task in
    banking77 | sentence_polarity) rows="spade spade_random" ;; # short inputs: one encoder
    *) rows="full local spade spade_random" ;;
  esac
  for row in $rows; do JOBS+=("$task $row"); done
done
if [ -n "$MISSING" ]; then # now, not after the pretraining
  echo "error: CORPORA=$CORPORA has no folder of:$MISSING; add them, or name the others in TASKS=" >&2
  exit 2
fi

say() { printf '\n== %s  [%d s]\n' "$*" "$SECONDS"; }

take_gpu() { # one of them, by the place of this process among those that run
  # shellcheck disable=SC2086  # several words, here and below
  set -- $GPUS
  [ $# = 0 ] && return
  shift $((SLOT % $#))
  export CUDA_VISIBLE_DEVICES=$1
}

lengthen() { # MODEL: goes on at 4,096 tokens
  local log=$STUDY/pretrained/$1/lengthen.log
  mkdir -p "$STUDY/pretrained/$1"
  take_gpu
  # shellcheck disable=SC2086
  python launch/train.py experiment=denoising_study_long model="$1" name="$1" data.path="$CORPUS" \
    out_dir="$STUDY/pretrained" train.init_from="$STUDY/pretrained_512/$1" $PRETRAIN >>"$log" 2>&1 ||
    { echo "error: $1: $(tail -n 1 "$log")  ($log)" >&2; return 1; }
  echo "[$SECONDS s] $STUDY/pretrained/$1"
}

finetune() { # TASK ROW RATE SEEDS: into $STUDY/TASK/rate_RATE/ROW, unless its last seed is there
  local task=$1 row=$2 rate=$3 seeds=$4 run init=pretrained words
  local out=$STUDY/$task/rate_$rate/$row
  [ -e "$out/seed_$((seeds - 1))/result.json" ] && return
  case $row in
    full) run=t5_mini ;;
    local) run=local_t5_mini ;;
    spade) run=spade_t5_mini ;;
    spade_random) run=spade_t5_mini init=random ;;
  esac
  case $task in
    sentence_polarity) words="batch_size=64 epochs=5 lanes=256" ;;
    banking77) words="batch_size=64 epochs=8 lanes=256" ;;
    movie_reviews) words="batch_size=16 epochs=6 lanes=32" ;;
    scitldr_a)
      words="batch_size=32 epochs=8 check_every=124 validation_examples=200 lanes=128
             max_target_tokens=128 truncate=true no_repeat_ngram_size=3" ;;
    sumpubmed_sample)
      words="batch_size=16 epochs=6 check_every=120 lanes=80
             max_input_tokens=4096 max_target_tokens=512 truncate=true no_repeat_ngram_size=3" ;;
  esac
  take_gpu
  mkdir -p "$out"
  # Of a word that comes twice the last one counts.
  # shellcheck disable=SC2086
  python launch/finetune.py run="$STUDY/pretrained/$run" init=$init task="$task" \
    source="$CORPORA/$task" out="$out" learning_rate="$rate" seeds="$seeds" micro_batch_tokens=32768 \
    $words $FINETUNE >>"$out/finetune.log" 2>&1 ||
    { echo "error: $out: $(tail -n 1 "$out/finetune.log")  ($out/finetune.log)" >&2; return 1; }
  echo "[$SECONDS s] $out"
}
export -f take_gpu lengthen finetune

run_jobs() { # FUNCTION: with each line of words from standard input, WORKERS at a time
  xargs -L 1 -P "$WORKERS" --process-slot-var=SLOT bash -c "$1"' "$@"' _
}

best_rate() { # TASK ROW: the rate whose first seed did best on validation
  for rate in $RATES; do
    python -c 'import json, sys; print(json.load(open(sys.argv[1]))["validation"] or 0)' \
      "$STUDY/$1/rate_$rate/$2/seed_0/result.json" | tr '\n' ' '
    echo "$rate"
  done | sort -g | tail -n 1 | cut -d ' ' -f 2
}

say "1/5 preparing the books (once)"
python launch/prepare.py data="$CORPORA/books_large/train-00.jsonl.xz" \
  splits.validation="$CORPORA/books_large/validation.jsonl.xz" out="$CORPUS" \
  vocab_size=8192 n_sentinels=1024 workers="$(nproc)"

say "2/5 pretraining three encoders at 512 tokens, then at 4,096"
python launch/sweep.py sweep=denoising_study workers=3 out_dir="$STUDY/pretrained_512" \
  data.path="$CORPUS" "$@"
basename -a "$STUDY"/pretrained_512/*/ | run_jobs lengthen

say "3/5 fine-tuning one seed at each rate, $WORKERS at a time"
for job in "${JOBS[@]}"; do
  for rate in $RATES; do echo "$job $rate 1"; done
done | run_jobs finetune

say "4/5 fine-tuning the other seeds at the better rate"
chosen=() folders=()
for job in "${JOBS[@]}"; do
  read -r task row <<<"$job"
  rate=$(best_rate "$task" "$row")
  chosen+=("$job $rate $SEEDS")
  folders+=("$STUDY/$task/rate_$rate/$row")
done
printf '%s\n' "${chosen[@]}" | tee "$STUDY/rates.txt" | run_jobs finetune

say "5/5 comparing: differences are over SPADE pretrained"
python launch/finetune.py table "${folders[@]}" baseline=spade out="${STUDY}_table" workers="$WORKERS"
say "done"
