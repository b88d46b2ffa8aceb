"""Exporters: trace the reference model into ONNX and TorchScript bundles."""
