#!/bin/sh
# Export the bundled model to ONNX and TorchScript, verify that both match the reference, and stream
# text. Needs no network.
# Usage: demo.sh OUTPUT_DIR (`make demo` runs it)
set -eu

bundle=$1
began=$(date +%s)

step() {
    printf '\n== %s\n' "$1"
}

step "1. Export to ONNX and compare with the reference model (logits and every cached tensor)"
gemma3-export onnx --weights demo -o "$bundle" --force

step "2. Export to TorchScript, into the same folder, and compare again"
gemma3-export torchscript --weights demo -o "$bundle"

step "3. Compare the two runtimes with each other"
gemma3-export verify "$bundle" --runtime torchscript --against onnx

step "4. Stream text with ONNX Runtime"
gemma3-export generate "$bundle" --max-new-tokens 60 \
    --seed 3 --temperature 0.5 --top-k 20 --prompt "    def get(self"

step "5. Generate with the same seed on both runtimes and compare the texts"
sampled() {
    gemma3-export generate "$bundle" --runtime "$1" --max-new-tokens 40 \
        --seed 1 --temperature 0.5 --top-k 20 --prompt "This module provides "
}
onnx_text=$(sampled onnx)
torchscript_text=$(sampled torchscript)
printf '%s\n' "$onnx_text"
if [ "$onnx_text" != "$torchscript_text" ]; then
    printf 'TorchScript generated a different text:\n%s\n' "$torchscript_text" >&2
    exit 1
fi

step "Done in $(($(date +%s) - began)) s"
cat <<END
The model has 1.4 million parameters. This project trained it on the source code and documentation
of Python's standard library (docs/training.md), so its text looks like theirs but makes no sense.
\`make demo-270m\` does the same with the real Gemma 3 270M, a download of 253 MB.

  $bundle            the exported model, a self-contained folder
  gemma3-export inspect $bundle
  gemma3-export verify $bundle --html report.html
END
