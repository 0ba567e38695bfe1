"""The C++ algorithms without Python, under AddressSanitizer and UndefinedBehaviorSanitizer: `make test-native`."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_native_checks_hold_under_the_sanitizers(tmp_path: Path) -> None:
    make, compiler = shutil.which("make"), shutil.which("g++")
    if make is None or compiler is None:
        pytest.skip("needs make and g++")
    trial = tmp_path / "trial.cpp"
    trial.write_text("int main() {}")
    sanitizers = [compiler, "-fsanitize=address,undefined", str(trial), "-o", str(tmp_path / "trial")]
    if subprocess.run(sanitizers, capture_output=True).returncode != 0:
        pytest.skip("this g++ comes without the sanitizers' libraries")
    command = [make, "--no-print-directory", "test-native", f"NATIVE_BUILD={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all checks hold" in result.stdout
