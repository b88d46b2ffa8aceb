"""Write the model as a TorchScript archive or a torch.export program."""
