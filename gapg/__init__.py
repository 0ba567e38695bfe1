"""Train a device language model to answer what it can and call a cloud model for the rest (arXiv 2509.24050)."""
