#!/bin/sh
# A bundled model learns a task that it has never seen: `make finetune-demo`. Interrupted, it goes on where it was.
#   demo.sh [folder, default runs/finetune]
set -eu
here=$(dirname "$0")
root=$here/../..
runs=${1:-$root/runs/finetune}
python=$root/.venv/bin/python

[ -f "$runs/data/train.jsonl" ] || "$python" "$here/make_data.py" --out "$runs/data"
echo "as it is:"
"$python" "$here/solve.py" "$runs/data/test.jsonl" --count 64
"$root/.venv/bin/dgemma" finetune 6x6 "$runs/data/train.jsonl" --out "$runs/adapter" --resume \
  --device cpu --dtype float32 --targets attention,mlp,self-conditioning --rank 8 --alpha 16 \
  --steps 650 --batch 32 --rate 7e-3 --noise high --encoder-loss 0 \
  --eval "$runs/data/eval.jsonl" --eval-every 50 --chart "$runs/finetune.png"
echo "with the adapter, on puzzles that nothing has seen:"
"$python" "$here/solve.py" "$runs/data/test.jsonl" --adapter "$runs/adapter"
echo "the same adapter under transformers and PEFT:"
"$python" "$here/solve.py" "$runs/data/test.jsonl" --adapter "$runs/adapter" --engine transformers --count 200
