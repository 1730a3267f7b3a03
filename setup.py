"""Builds the kernels of csrc/ while the package is installed; everything else is in pyproject.toml.

Where a compiler or torch is missing (torch is, under pip's build isolation: use --no-build-isolation), one line says so
and the package installs without them: the PyTorch operators serve. `make kernels` builds them later.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_builder():
    spec = importlib.util.spec_from_file_location("sparsemm_kernel_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """build_py, then the kernel libraries: beside the sources for an editable install, else into the wheel."""

    def run(self) -> None:
        super().run()
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        wanted = os.environ.get("SPARSEMM_BUILD", "")
        if wanted == "none":
            logging.info("sparsemm: kernels not built (SPARSEMM_BUILD=none); the PyTorch operators serve")
            return
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        try:
            builder = load_builder()
            builder.build(folder / "sparsemm" / "ops", (wanted,) if wanted else ("cpu", "cuda"))
        except Exception as error:  # an installation never fails for want of kernels
            logging.warning("sparsemm: kernels not built, the PyTorch operators serve: %s", str(error)[:2000])


class PlatformDistribution(Distribution):
    """A wheel that contains kernels is for one platform only."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels}, distclass=PlatformDistribution)
