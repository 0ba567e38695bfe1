"""GPU kernels of the policy update and their plain-PyTorch references: tensors only, no model, no config, no loop."""
