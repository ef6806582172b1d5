"""Both packages: the library `tdpo_kernels`, and what lives in `python/` beside it. Metadata is in pyproject.toml."""

from setuptools import find_packages, setup

library = find_packages(include=["tdpo_kernels", "tdpo_kernels.*"])
beside = find_packages("python", include=["tdpo_*"])

setup(
    packages=library + beside,
    package_dir={name: f"python/{name.replace('.', '/')}" for name in beside},
    package_data={"tdpo_kernels": ["py.typed", "tables/*.json"], "tdpo_trainer": ["py.typed", "README.md"]},
)
