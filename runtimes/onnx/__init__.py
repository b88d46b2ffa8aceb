"""Run ONNX graphs with ONNX Runtime. Nothing here imports torch."""
