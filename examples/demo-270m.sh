#!/bin/sh
# Export the real Gemma 3 270M, prove that nothing changed on the way, and print text.
# usage: demo-270m.sh WEIGHTS.gguf OUTPUT_DIR (what `make demo-270m` runs)
set -eu

weights=$1
bundle=$2
began=$(date +%s)

step() {
    printf '\n== %s\n' "$1"
}

step "1. Export to ONNX, and compare with the reference model (logits and every cached tensor)"
gemma3-export onnx --weights "$weights" -o "$bundle" --force

step "2. Continue two prompts, greedily"
gemma3-export generate "$bundle" --max-new-tokens 40 \
    --prompt "The capital of France is" --prompt "def fibonacci(n):"

step "3. Sample one more; the same seed always gives the same text"
gemma3-export generate "$bundle" --max-new-tokens 60 --seed 1 --top-k 64 --top-p 0.95 \
    --prompt "The lighthouse keeper opened the door and"

step "Done in $(($(date +%s) - began)) s"
cat <<END
The weights were read from a quantised GGUF file and dequantised, the reference model was traced
into an ONNX graph without loading them, and they were written beside the graph. Then the graph ran
in ONNX Runtime, and its results were held against the reference in float64: the error had to stay
within a small multiple of what float32 rounding alone causes. The last steps used ONNX Runtime
only, without PyTorch.

  $bundle            the exported model; it stands alone
  gemma3-export inspect $bundle
  gemma3-export verify $bundle --html report.html
END
