"""Builds the C++ packer; everything else about the package is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# A contracted multiply-add rounds once instead of twice: without it, modelled costs, and so packings, are the same on
# every machine.
packer = Pybind11Extension(
    "gapg_packing._csrc",
    ["csrc/bindings.cpp"],
    depends=sorted(glob("csrc/*.h")),
    cxx_std=20,
    extra_compile_args=["-O3", "-ffp-contract=off"],
)

setup(ext_modules=[packer], cmdclass={"build_ext": build_ext})
