"""The exporters for TorchScript archives and torch.export programs."""
