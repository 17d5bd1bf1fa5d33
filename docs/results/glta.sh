#!/usr/bin/env bash
# The runs behind docs/results/glta.md: every model, three seeds, two protocols, on ml-100k; then the paired tests.
# Everything is cached: run again, it goes on where it stood. Usage: bash docs/results/glta.sh [FOLDER] [PROTOCOL] [MODEL...]
set -euo pipefail
out=${1:-saved/results-glta}
protocols=${2:-"time ratio"}
models=("${@:3}")
[ ${#models[@]} -gt 0 ] || models=(EASE LightGCN SASRecAllPositions SASRec GLTA GLTA-dropout GLTA-pad)

settings() { # what a row is called -> the model and its settings beside the shipped ones
  case $1 in
    SASRec) echo "--model=SASRec --train_batch_size=512 --epochs=10 --stopping_step=3" ;;
    SASRecAllPositions) echo "--model=SASRecAllPositions" ;;
    EASE) echo "--model=EASE --reg_weight=500.0" ;;
    GLTA-dropout) echo "--model=GLTA --gllm_dropout=0.1" ;;
    GLTA-pad) echo "--model=GLTA --slot_input=pad --gllm_dropout=0.1" ;;
    *) echo "--model=$1" ;;
  esac
}

for protocol in $protocols; do
  files=()
  [ "$protocol" = ratio ] && files=(--config_files=docs/results/ratio.yaml)
  for model in "${models[@]}"; do
    for seed in 1 2 3; do
      # shellcheck disable=SC2046
      .venv/bin/recbole-llm run --dataset=ml-100k $(settings "$model") "${files[@]}" --seed=$seed --topk='[5, 10]' \
        --metrics='[NDCG, Precision, Recall]' --tensorboard=false --output_dir="$out/saved" \
        --result_file="$out/$protocol/$model/$seed.json"
    done
  done
done
