"""Engines that generate on the device, in the trainer's process: transformers and vLLM."""
