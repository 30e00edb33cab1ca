"""The benchmark for accelerators runs without one, on toys of the same classes, and keeps what it has measured."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import gpu, gpu_team

TOY = ["--size", "tiny", "--rows", "2", "--lever-rows", "1", "--steps", "2", "--queries", "1", "--device", "cpu"]


def test_every_row_is_kept_and_none_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, compiled = tmp_path / "gpu.json", []

    def compile_(module: Any, **options: Any) -> Any:
        """In the place of minutes of compiling: the module itself, counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            compiled.append(options.get("backend"))
            return module(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(gpu, "REPEATS", 1)
    arguments = [*TOY, "--backend", "toy", "--out", str(out)]
    with monkeypatch.context() as away:
        away.setattr(gpu.Machine, "round", lambda *a: pytest.fail("the machine went away"))
        with pytest.raises(pytest.fail.Exception):
            gpu.main(arguments)
    before = json.loads(out.read_text())
    assert "loop_round" not in before
    for part in ("part", "paper", "memory"):
        monkeypatch.setattr(gpu.Machine, part, lambda *a, **options: pytest.fail("measured again"))
    report = gpu.main(arguments)
    for section, rows in before.items():
        assert {key: report[section][key] for key in rows} == rows
    assert gpu.failed(report) == []
    assert report["loop_round"]["1 queries x 4"]["queries_per_hour"] > 0
    for part in ("network", "decoder", "clip"):
        for way in ("forward", "forward_backward"):
            assert 0 < report[part]["2"][way]["share_of_peak"] < 4
            assert report[part]["2"][way]["seconds"] > 0
    assert set(report["levers"]) == {*gpu.LEVERS, "compile"}
    assert {None, "toy"} <= set(compiled)  # the lever, and the comparison: what is compiled is what runs
    assert report["equality"]["compiled"]["from_eager"] == 0.0
    assert 0 < report["equality"]["bfloat16"]["from_float32"] < 0.1
    memory = report["memory"]["2"]
    assert memory["measured_mib"] == pytest.approx(memory["predicted_mib"], rel=0.05)


def test_what_is_compiled_is_what_is_timed() -> None:
    """A frame that the compiler meets while operations are counted would run uncompiled ever after."""
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            ran.append(len(inputs))
            return graph(*args)

        return call

    layer = torch.compile(torch.nn.Linear(3, 2), backend=backend)
    machine = gpu.Machine.__new__(gpu.Machine)
    machine.device = torch.device("cpu")
    found = machine.timed(lambda x: layer(2 * x), torch.ones(5, 3), 1.0)
    assert len(ran) == 2 * (gpu.REPEATS + 1), "forward, and forward and backward, each with its warm-up"
    assert found["forward"]["tflops"] * found["forward"]["seconds"] * 1e12 == pytest.approx(2 * 5 * 3 * 2)


def test_a_row_that_runs_out_of_memory_says_so(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "gpu.json", {})

    def too_much() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    results.row("network", "64", too_much)
    results.row("network", "4", lambda: 1.0)
    assert json.loads((tmp_path / "gpu.json").read_text())["network"] == {"64": {"out_of_memory": True}, "4": 1.0}
    assert gpu.failed(results.content) == []


def test_a_row_that_fails_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    """A machine without a compiler still measures the rest."""
    results = gpu.Results(tmp_path / "gpu.json", {})
    results.row("levers", "compile", lambda: [][0])
    results.row("network", "4", lambda: 1.0)
    assert gpu.failed(results.content) == ["levers / compile"]
    again = gpu.Results(tmp_path / "gpu.json", {})
    assert again.content["levers"]["compile"] == {"failed": "IndexError: list index out of range"}
    again.row("levers", "compile", lambda: 2.0)
    assert gpu.failed(again.content) == []


def test_a_lever_ends_with_its_row() -> None:
    machine = gpu.Machine("tiny", torch.device("cpu"), 2)
    kept = machine.prior(channels_last=True, gradient_checkpointing=True, vae_slicing=True, guidance_decoder=True)
    assert kept.denoiser.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    plain = machine.prior()
    for module in (plain.denoiser.network, plain.vae, machine.tiny):
        assert not module.is_gradient_checkpointing
        assert all(p.is_contiguous() for p in module.parameters())
    assert not plain.vae.use_slicing


def test_more_processes_than_gpus_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(gpu_team, "round_of", lambda models, n, *rest: ran.append(n) or {"seconds": 1.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "toy")
    found = gpu_team.main(["--size", "tiny", "--out", str(tmp_path / "team.json")])
    assert ran == [1, 2]
    assert set(found["round"]) == {"1", "2"}


def test_an_offline_machine_is_told_of_every_requirement() -> None:
    root = Path(gpu.__file__).parents[1]
    wanted = re.search(r"install_requires=\[(.*?)\]", (root / "setup.py").read_text(), re.DOTALL)
    assert wanted is not None
    needed, more = set(), ["tiltopt"]
    while more:  # torch brings its own
        for line in importlib.metadata.requires(more.pop()) or ():
            wanted_here = Requirement(line)
            name = wanted_here.name.lower().replace("_", "-")
            if wanted_here.marker is None or wanted_here.marker.evaluate({"extra": ""}):
                more += [name] if name not in needed | {"torch", "wandb"} else []
                needed.add(name)
    names = {name.lower().replace("_", "-") for name in re.findall(r'"([\w.-]+)', wanted.group(1))}
    listed = (root / "benchmarks" / "gpu-requirements.txt").read_text().lower().replace("_", "-").splitlines()
    there = {line.partition("==")[0] for line in listed}
    assert names <= needed
    assert needed - there <= {"torch", "wandb", "six"}  # six is for the older dateutil that botocore holds back here


@pytest.mark.slow
def test_a_round_by_several_processes_is_timed(tmp_path: Path) -> None:
    small = ["--size", "tiny", "--processes", "2", "--steps", "3", "--queries", "2", "--device", "cpu"]
    found = gpu_team.main([*small, "--out", str(tmp_path / "team.json")])
    assert found["round"]["2"]["queries_per_hour"] > 0
