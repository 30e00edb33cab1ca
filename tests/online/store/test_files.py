"""JSON files of a run: whole, without NaN, and named when they cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tiltopt.errors import StoreError
from tiltopt.online.store.files import read_json, write_json


def test_json_is_whole_has_no_nan_and_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "summary.json"
    write_json(path, {"a": math.nan, "b": [np.float64(1.5), np.inf], "c": np.arange(2), "p": tmp_path, "n": None})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None],
        "c": [0, 1],
        "p": str(tmp_path),
        "n": None,
    }
    before = path.read_text()
    with pytest.raises(TypeError, match="expected numbers"):
        write_json(path, {"a": object()})
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("text", ['{"rounds": [', "[1, 2]", ""])
def test_a_damaged_file_is_named_and_a_missing_one_may_have_a_default(tmp_path: Path, text: str) -> None:
    path = tmp_path / "summary.json"
    assert read_json(path, {}) == {}
    path.write_text(text)
    with pytest.raises(StoreError, match=r"summary\.json: expected .*JSON"):
        read_json(path, {})


def test_text_that_is_no_text_comes_back_from_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"half": "\ud83d \N{SEEDLING}"})
    assert read_json(tmp_path / "a.json") == {"half": "\ud83d \N{SEEDLING}"}
