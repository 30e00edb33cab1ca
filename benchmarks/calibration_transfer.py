"""How far one learnt tempering carries: between prompts, rounds and acquisitions, and how few chains teach it.

    python benchmarks/calibration_transfer.py                      # about four minutes on one CPU core
    python benchmarks/calibration_transfer.py --chains chains.safetensors    # keeps the chains, or reads them

256 plain chains of the embedded prior, 16 on each of 16 prompts, 20 steps. Potentials are acquisitions of linear
surrogates, fitted to the answers of growing parts of the chains' ends, over a price alpha that makes log G spread 3 or
30 nats among the designs of one prompt. A kappa is held to the criterion that it minimises, in nats per look,

    L(kappa) = mean over looks k and prompts of { log mean_j exp v_kj - sum_j w_j v_kj },

on chains that it has not seen; its regret is L(kappa) - min L there. Nothing here is sampled from a tilted law.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from tiltopt import surrogates
from tiltopt.online.settings.prompts import load_prompts
from tiltopt.rewards.images import colorfulness, jpeg_kilobytes
from tiltopt.samplers import run_pilot
from tiltopt.samplers.diffusers_prior import load_prior
from tiltopt.samplers.tempering import KAPPAS, criterion, relative_uncertainty, usable_scale, within_prompts
from tiltopt.surrogates.acquisition import make_acquisition
from tiltopt.surrogates.features import make_features

HERE = Path(__file__).parent
PROMPTS, PER_PROMPT, STEPS = 16, 16, 20
ROUNDS = (60, 120, 240)
ACQUISITIONS = ("mean", "ucb", "thompson")
SPREADS = (3.0, 30.0)  # nats


@dataclass(frozen=True)
class Chains:
    """What the study needs of M plain chains; chains of one prompt are adjacent.

    looks: (S, M, d), features of decode(x0_hat).
    final: (M, d), features of the clean ends.
    distance: (S, M), |x_K - x0_hat|^2.
    answers: (2, M), higher is better: -kB and colourfulness.
    """

    looks: Tensor
    final: Tensor
    distance: Tensor
    answers: Tensor

    @property
    def prompt(self) -> Tensor:
        """(M,), the number of each chain's prompt."""
        return torch.arange(self.final.shape[0]) // PER_PROMPT


def draw_chains(seed: int) -> Chains:
    """The chains, eight at a time."""
    prior, features = load_prior("embedded", num_steps=STEPS, guidance_scale=4.0), make_features(kind="patch_stats")
    nouns = load_prompts("simple_animals")[:PROMPTS]
    parts: list[tuple[Tensor, ...]] = []
    for number, noun in enumerate(nouns):
        first = seed * 10_000 + number * PER_PROMPT
        generators = [Generator().manual_seed(first + i) for i in range(PER_PROMPT)]
        pilot = run_pilot(prior, prior.encode([f"a {noun}"] * PER_PROMPT), generators=generators, micro_batch=8)
        with torch.no_grad():
            designs = prior.decode(pilot.x_final)
            looks = torch.stack([features(prior.decode(x0)) for x0 in pilot.x0])
        pixels = (designs * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
        answers = torch.tensor([[-jpeg_kilobytes(Image.fromarray(p)) for p in pixels], colorfulness(designs).tolist()])
        gaps = (pilot.x_final - pilot.x0).double().square().flatten(2).sum(-1)
        parts.append((looks, features(designs).detach(), gaps, answers))
        print(f"chains of {noun}", flush=True)
    looks, final, distance, answers = zip(*parts, strict=True)
    return Chains(torch.cat(looks, 1), torch.cat(final), torch.cat(distance, 1), torch.cat(answers, 1))


@dataclass(frozen=True)
class Case:
    """log G along the chains for one potential.

    key: (reward, round, acquisition, spread).
    u: (S, M); u_final: (M,), nats.
    """

    key: tuple[str, int, str, float]
    u: Tensor
    u_final: Tensor


def cases(chains: Chains, seed: int = 0) -> list[Case]:
    """Every potential: two rewards, three rounds, three acquisitions, two spreads of log G within a prompt."""
    found = []
    order = torch.randperm(chains.final.shape[0], generator=Generator().manual_seed(seed))
    for name, answers in zip(("jpeg", "colourfulness"), chains.answers, strict=True):
        for number, count in enumerate(ROUNDS):
            rows = order[:count]
            X, Y = chains.final[rows].double(), answers[rows].double().unsqueeze(-1)
            model = surrogates.fit("linear", X, Y, generator=Generator().manual_seed(seed))
            for acquisition in ACQUISITIONS:
                chosen = make_acquisition(acquisition, model, beta=4.0, generator=Generator().manual_seed(seed + 1))
                with torch.no_grad():
                    final = chosen(chains.final.double().unsqueeze(-2))
                    u = chosen(chains.looks.double().flatten(0, 1).unsqueeze(-2)).view(chains.looks.shape[:2])
                sd = within_prompts(final, chains.prompt.tolist()).std()
                for spread in SPREADS:
                    found.append(Case((name, number, acquisition, spread), u * spread / sd, final * spread / sd))
    return found


def losses(u: Tensor, u_final: Tensor, c: Tensor, prompt: Tensor) -> Tensor:
    """L of every kappa, each prompt by itself, (prompts, kappas); s is the one that all of them teach together."""
    scale = usable_scale(within_prompts(u_final, prompt.tolist()))
    rows = [criterion(u[:, prompt == p], u_final[prompt == p], c, scale=scale) for p in prompt.unique()]
    return torch.stack(rows)


def fit(case: Case, c: Tensor, rows: Tensor, names: Sequence[int] | None, min_chains: int = 2) -> int:
    """The number of the best kappa on some chains; `names` are the prompts whose means are taken out, None: none."""
    u, u_final = case.u[:, rows], case.u_final[rows]
    if names is not None:
        u, u_final = within_prompts(u, names, min_chains), within_prompts(u_final, names, min_chains)
    return int(criterion(u, u_final, c, scale=usable_scale(u_final)).argmin())


def regret(curve: Tensor, at: int) -> float:
    """Nats per look above the best kappa of a curve (kappas,)."""
    return float(curve[at] - curve.min())


class Study:
    """Everything that the table needs; halves of each prompt's chains teach and test in turn."""

    def __init__(self, chains: Chains) -> None:
        self.cases, self.prompt = cases(chains), chains.prompt
        self.c = relative_uncertainty(chains.distance.mean(1))
        place = torch.arange(len(self.prompt)) % PER_PROMPT
        self.halves = [place % 2 == 0, place % 2 == 1]
        self.curves = [
            [losses(case.u[:, half], case.u_final[half], self.c, self.prompt[half]) for half in self.halves]
            for case in self.cases
        ]

    def turns(self) -> list[tuple[int, Case, int]]:
        """(number, case, half that teaches)."""
        return [(i, case, half) for i, case in enumerate(self.cases) for half in (0, 1)]

    def losses_of(self, number: int, teaching: int) -> Tensor:
        """The curve (kappas,) of the half that did not teach, mean over prompts."""
        return self.curves[number][1 - teaching].mean(0)

    def few_chains(self) -> dict[str, dict[str, float]]:
        """Regret by chains per prompt, with and without the means of prompts."""
        table: dict[str, dict[str, float]] = {}
        for count in (1, 2, 4, 8):
            regrets: dict[str, list[float]] = {"means kept": [], "means out": []}
            for number, case, half in self.turns():
                mine = self.halves[half].nonzero().squeeze(-1).view(PROMPTS, -1)
                for start in range(0, mine.shape[1], count):
                    rows = mine[:, start : start + count].flatten()
                    curve = self.losses_of(number, half)
                    regrets["means kept"].append(regret(curve, fit(case, self.c, rows, None)))
                    names = self.prompt[rows].tolist()
                    regrets["means out"].append(regret(curve, fit(case, self.c, rows, names)))
            table[str(count * PROMPTS)] = {name: statistics.fmean(values) for name, values in regrets.items()}
        return table

    def few_prompts(self) -> dict[str, float]:
        """Regret by the number of prompts that teach, 8 chains each; measured on all prompts."""
        table = {}
        for count in (1, 2, 4, 8, 16):
            regrets = []
            for number, case, half in self.turns():
                mine = self.halves[half].nonzero().squeeze(-1).view(PROMPTS, -1)
                for start in range(0, PROMPTS, count):
                    rows = mine[start : start + count].flatten()
                    at = fit(case, self.c, rows, self.prompt[rows].tolist())
                    regrets.append(regret(self.losses_of(number, half), at))
            table[str(count)] = statistics.fmean(regrets)
        return table

    def per_prompt(self) -> dict[str, float]:
        """Regret on one prompt's own curve: its own kappa, that of all prompts, that of the others."""
        regrets: dict[str, list[float]] = {"own": [], "all": [], "others": []}
        for number, case, half in self.turns():
            rows = self.halves[half].nonzero().squeeze(-1)
            pooled = fit(case, self.c, rows, self.prompt[rows].tolist())
            for p in range(PROMPTS):
                curve = self.curves[number][1 - half][p]
                own, others = rows[self.prompt[rows] == p], rows[self.prompt[rows] != p]
                regrets["own"].append(regret(curve, fit(case, self.c, own, [0] * len(own))))
                regrets["all"].append(regret(curve, pooled))
                regrets["others"].append(regret(curve, fit(case, self.c, others, self.prompt[others].tolist())))
        return {name: statistics.fmean(values) for name, values in regrets.items()}

    def transfer(self) -> dict[str, float]:
        """Regret of the kappa of a potential that differs in one thing."""
        best = {}
        for _, case, half in self.turns():
            rows = self.halves[half].nonzero().squeeze(-1)
            best[case.key, half] = fit(case, self.c, rows, self.prompt[rows].tolist())
        regrets: dict[str, list[float]] = {"itself": []}
        names = ("another reward", "another round", "another acquisition", "another spread")
        for number, case, half in self.turns():
            curve = self.losses_of(number, half)
            regrets["itself"].append(regret(curve, best[case.key, half]))
            for other in self.cases:
                differ = [name for name, a, b in zip(names, case.key, other.key, strict=True) if a != b]
                if len(differ) == 1:
                    regrets.setdefault(differ[0], []).append(regret(curve, best[other.key, half]))
            regrets.setdefault("no tempering", []).append(regret(curve, 0))
            regrets.setdefault("no twist", []).append(float(-curve.min()))
        return {name: statistics.fmean(values) for name, values in regrets.items()}

    def kappas(self) -> list[dict[str, Any]]:
        """The kappa of every potential, on all chains, and its range over prompts by their own chains."""
        rows, table = torch.arange(len(self.prompt)), []
        for case in self.cases:
            own = [KAPPAS[fit(case, self.c, rows[self.prompt == p], [0] * PER_PROMPT)] for p in range(PROMPTS)]
            quartiles = statistics.quantiles(own, n=4)
            table.append(
                dict(zip(("reward", "round", "acquisition", "spread"), case.key, strict=True))
                | {"kappa": KAPPAS[fit(case, self.c, rows, self.prompt.tolist())]}
                | {"prompts_lower_quartile": quartiles[0], "prompts_upper_quartile": quartiles[2]}
            )
        return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=Path, help="safetensors file that keeps the chains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "calibration_transfer.json")
    args = parser.parse_args()
    if args.chains is not None and args.chains.is_file():
        chains = Chains(**load_file(args.chains))
    else:
        chains = draw_chains(args.seed)
        if args.chains is not None:
            save_file({f.name: getattr(chains, f.name).contiguous() for f in fields(chains)}, args.chains)
    study = Study(chains)
    report = {
        "chains": len(study.prompt),
        "prompts": PROMPTS,
        "steps": STEPS,
        "c": study.c.tolist(),
        "regret_by_chains": study.few_chains(),
        "regret_by_prompts_of_8_chains": study.few_prompts(),
        "regret_on_one_prompt": study.per_prompt(),
        "regret_of_the_kappa_of": study.transfer(),
        "kappas": study.kappas(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "kappas"}, indent=1))
    for row in report["kappas"]:
        print(row)


if __name__ == "__main__":
    main()
