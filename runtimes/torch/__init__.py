"""Run TorchScript archives and torch.export programs."""
