"""`bench` is a folder of scripts, not an installed package: found from the repository's root."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the folder kernels/ must not come before Hugging Face's package of that name
