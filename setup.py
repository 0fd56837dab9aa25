"""The build step that pyproject.toml cannot name: compile csrc/ into ptm/kernels/.

The wheel holds a library with a plain C interface: bound to the platform, not to a Python.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build as csrc  # noqa: E402


class BuildKernels(Command):
    """A sub-command of `build` as setuptools' documentation describes them."""

    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        base = ROOT if self.editable_mode else Path(self.build_lib or ROOT)
        csrc.build(base / "ptm" / "kernels")

    def get_source_files(self) -> list[str]:
        kinds = ("*.h", "*.cpp", "*.cu", "*.py")
        return [str(p.relative_to(ROOT)) for k in kinds for p in (ROOT / "csrc").rglob(k)]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_kernels", None)]


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build": Build, "build_kernels": BuildKernels, "bdist_wheel": Wheel})
