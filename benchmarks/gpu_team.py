"""A tilted round of the loop on 1, 2 and 4 GPUs of one machine: queries per hour, and how much a further GPU brings.

python -m benchmarks.gpu_team                         # Stable Diffusion 1.5 with random weights, as benchmarks.gpu
python -m benchmarks.gpu_team --size tiny --processes 1 2 --steps 3 --queries 2 --device cpu    # shows that it runs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import HERE, SIZES, Machine, Results, failed

ROOT = HERE.parent


def round_of(models: Path, processes: int, steps: int, queries: int, rows: int, device: str) -> dict[str, float]:
    """Seconds of the drawing of a tilted round, and queries per hour, by so many processes."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    keys = {
        "prior.path": models / "pipeline", "prior.num_steps": steps, "prior.guidance_scale": 7.5, "prior.dtype": dtype,
        "prior.vae_dtype": dtype, "features.path": models / "clip", "features.kind": "projection",
        "features.dtype": dtype, "micro_batch": rows, "rounds": 1, "initial_batch_size": 2 * queries,
        "batch_size": queries, "free_reference_samples": 0, "sampler.num_particles": 4, "device": device,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        arguments = [f"--config.{key}={value}" for key, value in {**keys, "run_dir": f"{place}/run"}.items()]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, str(ROOT / "online" / "main.py"), "--config", str(ROOT / "config/ucb.py:demo")]
        subprocess.run([*command, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = json.loads(Path(place, "run", "round_001", "summary.json").read_text(encoding="utf-8"))["ask_seconds"]
    return {"seconds": seconds, "queries_per_hour": 3600 * queries / seconds}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse, measure, print, keep; returns the content of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="sd15")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16, help="per network call; as many for any number of processes")
    parser.add_argument("--device", default="auto", help="cpu, or what accelerate gives")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_team.json")
    args = parser.parse_args(arguments)
    on_gpus = args.device != "cpu" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpus else "cpu"
    about = {"device": name, "size": args.size, "steps": args.steps, "queries": args.queries, "rows": args.rows}
    results = Results(args.out, about)
    with tempfile.TemporaryDirectory() as place:
        machine = Machine(args.size, torch.device("cpu"), args.steps)
        machine.pipe.save_pretrained(Path(place) / "pipeline")
        machine.clip.save_pretrained(Path(place) / "clip")
        for n in args.processes:
            if on_gpus and n > torch.cuda.device_count():
                print(f"round / {n}: left out, {torch.cuda.device_count()} GPUs are here", flush=True)
                continue
            one = (Path(place), n, args.steps, args.queries, args.rows, args.device)
            results.row("round", str(n), lambda one=one: round_of(*one))  # type: ignore[misc]
    return results.content


if __name__ == "__main__":
    sys.exit(", ".join(f"{name} failed" for name in failed(main())) or 0)
