"""Earlier measurements as a warm start: they teach the surrogate, are not paid for again, enter whole or not at all."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.fakes.engine import CONFIG, FakeEngine, LoggedReward, points, to_image, truth
from tiltopt import cli
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online.commands.import_table import csv_of, import_measurements, read_measurements, unescaped
from tiltopt.online.loop import run as run_loop
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.report.pages import write_report


@pytest.fixture
def pictures(tmp_path):
    """Seven measured pictures and their table."""
    folder = tmp_path / "lab"
    folder.mkdir()
    lines = ["image,prompt,value,sem"]
    for i in range(7):
        image = to_image(points(100 + i, 1)[0])
        image.save(folder / f"{i}.png")
        lines.append(f"{i}.png,a cat,{truth(image)!r},{'0.1' if i % 2 else ''}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def test_pictures_enter_as_a_round_and_teach_the_first_surrogate(pictures, tmp_path):
    engine = FakeEngine()
    log = tmp_path / "asked"
    with Optimizer.create(tmp_path / "run", CONFIG, engine=engine) as optimizer:
        assert import_measurements(optimizer, read_measurements(pictures), "table.csv") == 7
        frame = optimizer.queries()
        assert frame["state"].tolist() == ["answered"] * 7
        assert frame["sem"].notna().tolist() == [False, True] * 3 + [False]
        for number, value in zip(frame["id"], frame["value"], strict=True):
            assert truth(optimizer.image(number)) == pytest.approx(value, abs=1e-12)
        run_loop(optimizer, LoggedReward(log))
        after = optimizer.queries()
    assert torch.equal(engine.seen[0].Y[:7].flatten(), torch.tensor(frame["value"].tolist(), dtype=torch.float64))
    assert len(log.read_text().splitlines()) == len(after) - 7 == 5 + 3 + 3
    assert after["predicted"].notna().tolist() == [False] * 7 + [True] * 11
    page = write_report(tmp_path / "run").read_text()
    assert "Round 0: imported measurements" in page


def test_features_enter_without_pictures(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.random((6, 4)).astype(np.float32)
    rows = [",".join([*(repr(float(v)) for v in x), str(i)]) for i, x in enumerate(X)]
    (tmp_path / "t.csv").write_text("f0,f1,f2,f3,value\n" + "\n".join(rows))
    with Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine()) as optimizer:
        import_measurements(optimizer, read_measurements(tmp_path / "t.csv"), "t.csv")
        data = optimizer.store.data()
    assert np.array_equal(data.X.numpy(), X.astype(np.float64))
    assert data.Y.flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_the_same_table_twice_is_refused(pictures, tmp_path):
    with Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine()) as optimizer:
        found = read_measurements(pictures)
        import_measurements(optimizer, found, "table.csv")
        with pytest.raises(StoreError, match="imported into this run before"):
            import_measurements(optimizer, found, "table.csv")
        assert len(optimizer.queries()) == 7


def test_outstanding_queries_come_first(pictures, tmp_path):
    with Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine()) as optimizer:
        optimizer.ask(2)
        with pytest.raises(StoreError, match="2 queries that wait"):
            import_measurements(optimizer, read_measurements(pictures), "table.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,value\n0.png,nan\n", r"line 2: `value` must be a finite number"),
        ("image,value\n0.png,1\n1.png,inf\n", r"line 3: `value` must be a finite number"),
        ("image,value\n0.png,good\n", "got 'good'"),
        ("image,value,sem\n0.png,1,-1\n", "`sem` must be a number >= 0"),
        ("image,value\nmissing.png,1\n", "line 2: `image` must name a file, got 'missing.png'"),
        ("image,reward\n0.png,1\n", "got the columns image, reward"),
        ("image,f0,value\n0.png,1,1\n", "expected a table with the columns"),
        ("f0,f2,value\n1,1,1\n", r"expected the feature columns f0 \.\.\. f1"),
        ("image,value\n", "expected at least one row"),
        ("", "expected a table with the columns"),
    ],
)
def test_a_bad_table_says_where_and_what(pictures, text, message):
    pictures.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_measurements(pictures)


def test_the_command_needs_a_run_or_a_configuration(pictures, tmp_path, capsys):
    assert cli.main(["import", str(tmp_path / "none"), str(pictures)]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "none"), str(pictures), "--config", "config/none.py"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_first_table_of_another_width_is_refused_and_the_run_goes_on(tmp_path):
    """Nothing is stored yet that it could be held against, and it would be the measure of all that comes."""
    (tmp_path / "t.csv").write_text("value,f0,f1\n1,0.1,0.2\n2,0.3,0.1\n")
    with Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine()) as optimizer:
        with pytest.raises(StoreError, match="has 2 features, expected 4"):
            import_measurements(optimizer, read_measurements(tmp_path / "t.csv"), "t.csv")
        assert [query.id for query in optimizer.ask(3)] == [1, 2, 3]


def test_a_table_as_spreadsheets_write_it(pictures, tmp_path):
    """With a byte order mark, as Excel does."""
    pictures.write_bytes(b"\xef\xbb\xbf" + pictures.read_bytes())
    assert len(read_measurements(pictures).values) == 7
    assert unescaped("'=SUM(A1)") == "=SUM(A1)"
    content = csv_of(pd.DataFrame({"=cmd": ["+1", "a cat", "'=x"]}))
    assert content.decode().splitlines() == ["'=cmd", "'+1", "a cat", "''=x"]
