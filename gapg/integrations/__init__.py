"""GAPG's parts inside other trainers."""
