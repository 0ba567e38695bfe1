"""The life of a run: its folder, identity, checkpoints, records, signals and outages."""
