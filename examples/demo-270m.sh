#!/bin/sh
# Export the real Gemma 3 270M, verify it against the reference model, and generate text.
# Usage: demo-270m.sh WEIGHTS.gguf OUTPUT_DIR (`make demo-270m` runs it)
set -eu

weights=$1
bundle=$2
began=$(date +%s)

step() {
    printf '\n== %s\n' "$1"
}

step "1. Export to ONNX and compare with the reference model (logits and every cached tensor)"
gemma3-export onnx --weights "$weights" -o "$bundle" --force

step "2. Continue two prompts greedily"
gemma3-export generate "$bundle" --max-new-tokens 40 \
    --prompt "The capital of France is" --prompt "def fibonacci(n):"

step "3. Sample a third; the same seed always gives the same text"
gemma3-export generate "$bundle" --max-new-tokens 60 --seed 1 --top-k 64 --top-p 0.95 \
    --prompt "The lighthouse keeper opened the door and"

step "Done in $(($(date +%s) - began)) s"
cat <<END
The export traced the reference model into an ONNX graph without loading weights, then dequantized
the GGUF file's weights and wrote them next to the graph. The check ran the graph in ONNX Runtime and
compared it with the reference in float64: its error must stay within a small multiple of what
float32 rounding alone causes. Generation used ONNX Runtime only, without PyTorch.

  $bundle            the exported model, a self-contained folder
  gemma3-export inspect $bundle
  gemma3-export verify $bundle --html report.html
END
