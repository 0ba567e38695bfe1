"""Builds the C++ packer; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[Pybind11Extension("gapg._csrc", ["csrc/bindings.cpp"], depends=["csrc/packing.h"], cxx_std=20)],
    cmdclass={"build_ext": build_ext},
)
