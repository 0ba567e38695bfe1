"""Tests here share the float64 oracle beside this file; importlib mode does not put the folder on sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
