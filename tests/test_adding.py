"""The examples of docs/adding.md, as they stand there, through the contracts of what they are examples of."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contracts.designs import DesignContract
from tests.contracts.features import FeatureContract
from tests.contracts.priors import PriorContract, seeded
from tests.contracts.rewards import RewardContract
from tests.contracts.samplers import SamplerContract
from tests.contracts.surrogates import SurrogateContract
from tiltopt import designs, kinds
from tiltopt.online.optimizer import Optimizer
from tiltopt.rewards import REWARDS
from tiltopt.samplers import PriorOnly, registry
from tiltopt.surrogates import SURROGATES, blocks, io
from tiltopt.surrogates.features import ImageFeatures

MODULE = "the_example_of_adding"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding.md"
TABLES: tuple[dict[str, Any], ...] = (
    *(REWARDS, SURROGATES, io.CLASSES, blocks.BLOCKS, kinds.PARTS),
    *(registry.SAMPLERS, registry.OPTIONS, designs.DESIGNS),
)


def example(title: str) -> dict[str, Any]:
    """What the code under a heading defines; what it enters in the tables stays there."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    module = sys.modules[MODULE] = ModuleType(MODULE)  # where pickle looks for the classes
    exec(compile(code, f"{PAGE.name}: {title}", "exec", dont_inherit=True), vars(module))
    return vars(module)


class Example:
    """Runs the example called `title` for the tests of a class, and leaves the tables as they were."""

    title: str

    @pytest.fixture(scope="class", autouse=True)
    def names(self) -> Iterator[dict[str, Any]]:
        before = [dict(table) for table in TABLES]
        yield example(self.title)
        for table, known in zip(TABLES, before, strict=True):
            table.clear()
            table.update(known)


class TestReward(Example, RewardContract):
    title, name, rtol, gradient = "A reward", "warmth", 1e-6, True

    @pytest.fixture
    def options(self) -> Mapping[str, Any]:
        return {"blue": 0.5}


class TestFeatureBlock(Example, FeatureContract):
    title = "A feature block"

    @pytest.fixture
    def features(self, names: dict[str, Any]) -> ImageFeatures:
        return ImageFeatures("brightness_map")

    def test_it_says_where_it_is_bright(self, features: ImageFeatures, pictures: Tensor) -> None:
        seen = features(pictures)[2].view(4, 4)
        torch.testing.assert_close(seen, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4))


class TestSurrogate(Example, SurrogateContract):
    title, name = "A surrogate", "compressed"


class TestSampler(Example, SamplerContract):
    title, guided = "A sampler", False

    @staticmethod
    def make() -> Any:
        return registry.make_sampler("late_steering", {"after": 0.3})


class TestPrior(Example, PriorContract):
    title = "A prior"

    @pytest.fixture
    def prior(self, names: dict[str, Any]) -> Any:
        return names["SmoothCurves"](num_steps=4)

    @pytest.fixture
    def prior64(self, names: dict[str, Any]) -> Any:
        return names["SmoothCurves"](num_steps=4, dtype=torch.float64)

    def test_its_draws_have_its_covariance(self, names: dict[str, Any]) -> None:
        prior, n = names["SmoothCurves"](num_steps=100, dtype=torch.float64), 2000
        drawn = PriorOnly().sample(prior, None, prior.encode(["x"]), num_particles=n, generators=[seeded(1)]).x0[0]
        lag = torch.arange(16.0, dtype=torch.float64)
        want = torch.exp(-((lag[:, None] - lag) ** 2) / 8)
        error = (drawn.T @ drawn / n - want).abs().max()  # each entry has a standard error of at most sqrt(2 / n)
        assert error < 5 * (2 / n) ** 0.5 + 0.05  # and the chain of 100 kernels is a little narrow


class TestDesignType(Example, DesignContract):
    """The page's type of designs, and a run of it."""

    title = "A design type"

    @pytest.fixture(autouse=True)
    def _made(self, names: dict[str, Any]) -> None:
        self.made = names["Sound"]()

    def kind(self) -> Any:
        return self.made

    def events(self) -> torch.Tensor:
        return torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def test_a_run_draws_and_keeps_it(self, tmp_path: Path) -> None:
        curves = example("A prior")["SmoothCurves"]
        prior = type("Named", (curves,), {"fingerprint": "curves"})(num_steps=6)
        changes = {"design": "sound", "initial_batch_size": 3, "batch_size": 2, "rounds": 1, "micro_batch": 4}
        with Optimizer.create(tmp_path / "run", changes, prior=prior, prompts=["a sound"], reward=None) as opt:
            for query in opt.ask(3):
                assert query.design.dtype == np.int16
                opt.tell(query.id, float(query.design[0]))
            assert all(query.predicted is not None for query in opt.ask(2))
        assert len(list((tmp_path / "run" / "designs").glob("*.wav"))) == 5
