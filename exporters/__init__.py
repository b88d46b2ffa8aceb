"""Exporters: trace the reference model into ONNX, TorchScript and torch.export bundles."""
