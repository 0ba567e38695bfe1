"""The example of docs/integrations.md that packs responses and shares their prompt, as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_packs_and_shares(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "packed_batches" in code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([6]) torch.Size([10])\n"  # 4 + 6 tokens: the prompt is there once
