"""Packaging. The top-level folders install under one import name, `tiltopt`; see docs/architecture.md."""

from pathlib import Path

from setuptools import find_packages, setup

# import name -> folder; everything else at the top level stays out of the wheel
PACKAGE_DIR = {
    "tiltopt": "tiltopt",
    "tiltopt.samplers": "samplers",
    "tiltopt.surrogates": "surrogates",
    "tiltopt.rewards": "rewards",
    "tiltopt.online": "online",
    "tiltopt.config": "config",
    "tiltopt.embedded": "checkpoints/embedded",
}


def packages() -> list[str]:
    """Every package: the folders above and, below each, whatever holds an `__init__.py`."""
    found = []
    for name, folder in PACKAGE_DIR.items():
        found += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]
    return found


setup(
    name="tiltopt",
    version="0.2.0",
    description="Black-box optimisation of designs by sampling a pretrained diffusion model tilted toward reward",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="diffusion bayesian-optimization black-box-optimization sequential-monte-carlo",
    packages=packages(),
    package_dir=PACKAGE_DIR,
    package_data={
        "tiltopt": ["py.typed"],
        "tiltopt.config": ["*.py"],
        "tiltopt.rewards": ["*.txt"],
        "tiltopt.online.settings": ["*.json"],
        "tiltopt.online.report": ["templates/*"],
        "tiltopt.online.rating": ["templates/*"],
        "tiltopt.online.serving": ["templates/*"],
        "tiltopt.embedded": ["README.md", "*.png", "pipeline/**/*", "pipeline/*", "clip/*", "judge/*"],
    },
    install_requires=[
        "torch>=2.13",
        "diffusers>=0.35",
        "transformers>=4.50",
        "accelerate>=1.6",
        "botorch>=0.14",
        "gpytorch>=1.14",
        "ml_collections>=1.0",
        "absl-py>=2.0",
        "safetensors>=0.5",
        "numpy>=1.26",
        "scipy>=1.12",
        "pillow>=10",
        "pandas>=2.2",
        "matplotlib>=3.9",
        "sqlalchemy>=2.0",
        "universal_pathlib>=0.3",
        "tqdm>=4.66",
        "psutil>=5.9",
        "jinja2>=3.1",
        "wandb>=0.19",
    ],
    extras_require={
        "test": [
            "setuptools>=77",
            "wheel",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff",
            "mypy",
            "build",
            "scikit-learn",
            "POT",
            "fonttools>=4.50",
            "peft>=0.17",
            "s3fs",
            "moto[s3]>=5",
            "flask",
            "flask-cors",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "tensorboard>=2.17",
            "wandb-workspaces>=0.4",
        ],
        "lora": ["peft>=0.17"],
        "s3": ["s3fs"],
        "recipe": ["fonttools>=4.50"],
        "bench": ["cma>=4", "POT", "scikit-learn"],
        "parquet": ["pyarrow>=16"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
        "dashboard": ["wandb-workspaces>=0.4"],
        "tensorboard": ["tensorboard>=2.17"],
        "trackio": ["trackio>=0.2", "accelerate>=1.10"],
        "server": ["starlette", "uvicorn", "httpx", "openai", "psycopg[binary]"],
    },
    entry_points={"console_scripts": ["tiltopt=tiltopt.cli:main"]},
)
