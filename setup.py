"""Installs the ``megavlm`` package and command. Dependencies: requirements*.txt; the torch pin: constraints.txt."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent


def read_requirements(name: str) -> list[str]:
    """Requirement lines of a file, comments and includes left out."""
    lines = (line.split("#", 1)[0].strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def read_version() -> str:
    """The version that the package states."""
    text = (HERE / "megavlm" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(
    name="megavlm",
    version=read_version(),
    description="Vision-language models on megatron-core, from one laptop CPU to a cluster of GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_namespace_packages(include=["megavlm", "megavlm.*"]),
    package_data={"megavlm.inspection": ["template/*"]},
    python_requires=">=3.11",
    install_requires=read_requirements("requirements.txt"),
    extras_require={
        "dev": read_requirements("requirements-dev.txt"),
        "gpu": read_requirements("requirements-gpu.txt"),
        "deepspeed": read_requirements("requirements-deepspeed.txt"),
        "filters": read_requirements("requirements-filters.txt"),
    },
    entry_points={"console_scripts": ["megavlm = megavlm.cli:main"]},
)
