"""Types of designs by themselves, and a whole run of sequences: asked, told, exported, imported, resumed, shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.contracts.designs import DesignContract
from tiltopt.cli import main as tiltopt
from tiltopt.designs import Pictures, Tensors, Tokens, design_type
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online.loop import run
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import Query
from tiltopt.rewards.base import BlackBox
from tiltopt.samplers.sequences import MarkovPrior, one_hot

SIZE, LENGTH = 4, 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestPictures(DesignContract):
    def kind(self) -> Pictures:
        return Pictures()

    def events(self) -> torch.Tensor:
        return torch.rand(3, 3, 8, 12, generator=seeded(0))


class TestNumbers(DesignContract):
    def kind(self) -> Tokens:
        return Tokens(30)

    def events(self) -> torch.Tensor:
        return torch.rand(4, 40, 30, generator=seeded(0))


class TestLetters(DesignContract):
    def kind(self) -> Tokens:
        kind = design_type("tokens:ACGT")
        assert isinstance(kind, Tokens)
        return kind

    def events(self) -> torch.Tensor:
        return one_hot(torch.randint(4, (4, 9), generator=seeded(0)), 4)


class TestVectors(DesignContract):
    def kind(self) -> Tensors:
        return Tensors()

    def events(self) -> torch.Tensor:
        return torch.randn(3, 20, generator=seeded(0))


class TestMaps(TestVectors):
    def events(self) -> torch.Tensor:
        return torch.randn(3, 2, 5, 7, generator=seeded(0))


def test_letters_and_numbers_are_written_as_such() -> None:
    assert Tokens(4, "ACGT").text([2, 0, 3]) == "GAT"
    assert Tokens(30).text([2, 0, 29]) == "2 0 29"
    assert Tokens(30).load(b"[2, 0, 29]").tolist() == [2, 0, 29]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("GAU", "expected letters of ACGT, got 'U'"),
        ("", "expected a sequence of integers"),
    ],
)
def test_unknown_letters_are_named(bad: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokens(4, "ACGT").parse(bad)


def test_unknown_tokens_are_named() -> None:
    with pytest.raises(ValueError, match="expected tokens 0 to 3, got 4"):
        Tokens(4).parse("1 4 2")
    with pytest.raises(ValueError, match="expected numbers with spaces between"):
        Tokens(4).parse("1, 2")
    with pytest.raises(ValueError, match="expected finite numbers"):
        Tensors().dump(np.array([1.0, np.nan]))


@pytest.mark.parametrize("bad", ["sound", "tokens", "tokens:1", "tokens:AA", "tokens:A", "image:png", "", "tensor:3"])
def test_what_is_no_type_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="`design`: expected"):
        design_type(bad)


def test_a_large_picture_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = Pictures().dump(Pictures().of(torch.rand(1, 3, 8, 8, generator=seeded(0)))[0])
    monkeypatch.setattr("tiltopt.designs.MAX_PIXELS", 63)
    with pytest.raises(ValueError, match="8 x 8 pixels, more than"):
        Pictures().load(content)


# ---- a run


class Motif(BlackBox):
    """How often token 3 follows token 1; what it is handed must be a sequence. Forbidden is a 2 at the end: -inf."""

    name, unit, batch_size = "motif", "times", 4

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, designs: list[np.ndarray], prompts: list[str]) -> list[float]:
        assert all(isinstance(x, np.ndarray) and x.dtype == np.int64 and x.shape == (LENGTH,) for x in designs)
        self.seen += [x.tolist() for x in designs]
        return [value(x) for x in designs]


def told(opt: Optimizer, query: Query) -> None:
    """The answer, or that there is none."""
    found = value(query.design)
    opt.tell(query.id, found) if np.isfinite(found) else opt.fail(query.id, "forbidden")


def value(x: np.ndarray) -> float:
    return -np.inf if x[-1] == 2 else float(((x[:-1] == 1) & (x[1:] == 3)).sum()) + 0.01 * float(x.sum())


def prior() -> MarkovPrior:
    transition = torch.full((SIZE, SIZE), 1 / SIZE, dtype=torch.float64)
    return MarkovPrior(torch.full((SIZE,), 1 / SIZE, dtype=torch.float64), transition, LENGTH, num_steps=6)


def create(folder: Path, **more: object) -> Optimizer:
    changes = {"rounds": 2, "batch_size": 4, "initial_batch_size": 10, "micro_batch": 8, "free_reference_samples": 0}
    return Optimizer.create(
        folder, changes | {"design": "tokens:ABCD"} | more, prompts=["a sequence"], reward=None, prior=prior()
    )


def test_a_run_of_sequences_is_asked_told_exported_imported_resumed_and_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with create(folder) as opt:
        queries = opt.ask(10)
        assert all(q.design.shape == (LENGTH,) and q.image.size[0] > 8 for q in queries)
        for query in queries[:6]:
            told(opt, query)
    files = sorted((folder / "designs").glob("*.json"))
    assert [json.loads(file.read_text()) for file in files] == [q.design.tolist() for q in queries]
    with Optimizer.open(folder) as opt:  # a process that has no prior tells, and shows what is pending
        waiting = opt.pending()
        assert [q.design.tolist() for q in waiting] == [q.design.tolist() for q in queries[6:]]
        for query in waiting:
            told(opt, query)
        with pytest.raises(ConfigError, match="handed over in Python"):
            opt.ask(2)
    with Optimizer.open(folder, prior=prior()) as opt:
        guided = opt.ask(4)
        assert all(q.predicted is not None and q.design.max() < SIZE for q in guided)
        for query in guided:
            told(opt, query)
        near = opt.refine(queries[0].id, strength=0.5, n=2)
        assert all(q.parents == (queries[0].id,) for q in near)
        for query in near:
            told(opt, query)
        (folder / "round_000" / "latents.safetensors").unlink()  # the design itself is left to start from
        again = opt.refine(queries[0].id, strength=0.5, n=1)
        opt.tell(again[0].id, 0.0)
        assert opt.report().is_file()
        assert (folder / "report.html").read_text().count("data:image/png;base64") >= 10
    table = tmp_path / "all.csv"
    assert tiltopt(["export", str(folder), "--csv", str(table)]) == 0
    written = pd.read_csv(table)
    letters = {q.id: "".join("ABCD"[t] for t in q.design) for q in queries}
    assert {row["id"]: row["design"] for _, row in written.iterrows() if row["id"] in letters} == letters
    other = tmp_path / "other"
    measured = tmp_path / "measured.csv"
    pd.DataFrame({"design": ["ABDABD", "AAAAAA"], "value": [2.0, 0.0]}).to_csv(measured, index=False)
    with create(other) as opt:
        from tiltopt.online.commands.import_table import import_measurements, read_measurements

        assert import_measurements(opt, read_measurements(measured, opt.settings), "measured.csv") == 2
        assert opt.design(1).tolist() == [0, 1, 3, 0, 1, 3]
        pd.DataFrame({"design": ["ABDABZ"], "value": [2.0]}).to_csv(measured, index=False)
        with pytest.raises(ConfigError, match=r"line 2: `design`: expected letters of ABCD, got 'Z'"):
            read_measurements(measured, opt.settings)


def test_the_loop_hands_sequences_to_the_black_box_and_learns_what_is_forbidden(tmp_path: Path) -> None:
    box = Motif()
    with create(tmp_path / "run", acquisition={"feasibility": True}) as opt:
        run(opt, box)
        frame = opt.queries()
    assert len(box.seen) == 10 + 2 * 4
    assert (frame["state"] == "failed").sum() == sum(x[-1] == 2 for x in box.seen)  # one query each, none repeated


def test_the_same_run_twice_draws_the_same_sequences(tmp_path: Path) -> None:
    def drawn(folder: Path) -> list[list[int]]:
        box = Motif()
        with create(folder) as opt:
            run(opt, box)
        return box.seen

    assert drawn(tmp_path / "a") == drawn(tmp_path / "b")


def test_a_design_that_cannot_be_read_fails_its_query_alone(tmp_path: Path) -> None:
    with create(tmp_path / "run") as opt:
        queries = opt.ask(10)
        (tmp_path / "run" / "designs" / "000003.json").write_text("[0, 9, 1, 1, 1, 1]")
        with pytest.warns(UserWarning, match=r"design of query 3 .*expected tokens 0 to 3, got 9"):
            assert len(opt.pending()) == len(queries) - 1
        with pytest.raises(StoreError, match="design of query 3"):
            opt.design(3)


def test_what_pictures_alone_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`design`: priors that `prior\.path` loads draw pictures"):
        Optimizer.create(tmp_path / "a", {"design": "tokens:4"}, reward=None)
    with pytest.raises(ConfigError, match="`features`: they are of pictures"):
        create(tmp_path / "b", features={"kind": "spectrum"})
    with pytest.raises(ConfigError, match="`design`: expected how many tokens"):
        create(tmp_path / "c", design="tokens")
    assert not list(tmp_path.glob("*/queries.sqlite"))
