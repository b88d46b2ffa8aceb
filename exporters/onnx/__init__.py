"""Write the model as an ONNX graph with external data."""
