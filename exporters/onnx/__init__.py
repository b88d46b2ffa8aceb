"""The ONNX exporter: trace, graph passes and external data."""
