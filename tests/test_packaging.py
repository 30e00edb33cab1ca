"""What a stranger installs: the wheel holds everything, and imports from a folder full of traps."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist of a copy of the tracked layout, so that the checkout stays clean."""
    import shutil

    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    keep = ("tiltopt", "samplers", "surrogates", "rewards", "online", "config")
    for name in keep:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    ignore = shutil.ignore_patterns("__pycache__", "work")
    shutil.copytree(ROOT / "checkpoints" / "embedded", source / "checkpoints" / "embedded", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(work.glob("*.whl"))


def test_the_wheel_holds_prior_configs_and_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "tiltopt/embedded/pipeline/model_index.json",
        "tiltopt/embedded/pipeline/unet/diffusion_pytorch_model.safetensors",
        "tiltopt/embedded/clip/model.safetensors",
        "tiltopt/embedded/judge/model.safetensors",
        "tiltopt/config/ucb.py",
        "tiltopt/config/bootstrap.py",
        "tiltopt/online/settings/known.json",
        "tiltopt/online/report/templates/report.html.j2",
        "tiltopt/online/rating/templates/rate.html.j2",
        "tiltopt/py.typed",
    ):
        assert needed in names, needed
    tops = {name.split("/")[0] for name in names}
    assert all(top == "tiltopt" or top.endswith(".dist-info") for top in tops), tops


def test_a_release_has_one_version() -> None:
    """The package's, which is the newest of the changelog and that of the citation."""
    version = re.search(r'version="([\d.]+)"', (ROOT / "setup.py").read_text())
    newest = re.search(r"^## (\d[\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = re.search(r"^version: ([\d.]+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert version is not None
    assert newest is not None
    assert cited is not None
    assert version[1] == newest[1] == cited[1]


@pytest.mark.parametrize("target", ["demo", "smoke"])
def test_the_demo_is_started_without_a_launcher(target: str) -> None:
    """On Ctrl+C accelerate's launcher prints a traceback of its own below the run's message."""
    asked = ["make", "-n", "--no-print-directory", target, "ARGS=--more"]  # the tests may be run by a make themselves
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()[-1]
    assert re.fullmatch(rf"\S+/python online/main.py --config config/ucb.py:{target} --more", told)


def test_imports_beside_a_stray_folder_of_the_same_name(wheel: Path, tmp_path: Path) -> None:
    """A user's own `online/` and `samplers/` must not shadow ours, nor ours theirs."""
    import zipfile as z

    site = tmp_path / "site"
    z.ZipFile(wheel).extractall(site)
    hostile = tmp_path / "hostile"
    for name in ("online", "samplers", "config"):
        (hostile / name).mkdir(parents=True)
        (hostile / name / "__init__.py").write_text("raise RuntimeError('the stray folder was imported')\n")
    code = (
        "import tiltopt, tiltopt.samplers, tiltopt.online.settings.run, tiltopt.online.settings.commandline as c;"
        "print(tiltopt.__file__); print(c.parse(['--config=config/ucb.py:demo']).rounds)"
    )
    env = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=hostile, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stdout.splitlines()[0]
