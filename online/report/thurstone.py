"""How good each query is, from comparisons alone: a number per query for summaries and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from tiltopt.surrogates.choices import FirstChoice, by_size, first_choice

UNIT = "utility"
"""One is the standard deviation of what a rater makes of one image."""

PRIOR_SD = 1.0
STEPS = 50


def utilities(comparisons: pd.DataFrame) -> dict[int, float]:
    r"""Thurstone's utilities of the queries compared, the mode of

        sum_c log P(winner of c is chosen) - sum_i u_i^2 / 2,

    where P is Phi((u_winner - u_loser) / sqrt 2) for two and `tiltopt.surrogates.choices.first_choice` for the best of
    several, and a tie counts half in each direction. No features and no surrogate enter, so they can be held against
    one. One unit is the standard deviation of the judgement of one image; the mean over the queries is near 0.

    Args:
        comparisons: columns `winner`, `loser`, `outcome`, `choice`; failed ones are left out.

    Returns:
        Utility by query number; empty without comparisons.

    Source: Thurstone 1927; the Gaussian prior makes the mode unique.
    """
    table = comparisons[comparisons["outcome"] != "failed"]
    numbers = sorted({*table["winner"].tolist(), *table["loser"].tolist()})
    place = {number: i for i, number in enumerate(numbers)}
    won = np.array([place[n] for n in table["winner"].tolist()], dtype=int)
    lost = np.array([place[n] for n in table["loser"].tolist()], dtype=int)
    tied = (table["outcome"] == "tie").to_numpy(dtype=bool)
    own = pd.Series(-1 - np.arange(len(table)), index=table.index)
    together = table["choice"].fillna(own).to_numpy(dtype=int) if "choice" in table else own.to_numpy()
    answers = []
    for rows in [found.numpy() for found in by_size(torch.tensor(together))] if len(table) else ():
        first, rest, weight = won[rows[:, 0]], lost[rows], np.where(tied[rows[:, 0]], 0.5, 1.0)
        answers.append(_Answers(first, rest, weight))
    back = np.nonzero(tied)[0]
    answers.append(_Answers(lost[back], won[back, None], np.full(len(back), 0.5)))
    u = _mode([part for part in answers if len(part.winners)], len(numbers))
    return dict(zip(numbers, u.tolist(), strict=True))


class _Answers(NamedTuple):
    """Answers with k losers each: winners (c,), losers (c, k), weight (c,)."""

    winners: np.ndarray
    losers: np.ndarray
    weight: np.ndarray

    def at(self, u: np.ndarray) -> FirstChoice:
        return first_choice(torch.from_numpy(u[self.winners][:, None] - u[self.losers]))


def _mode(answers: Sequence[_Answers], n: int) -> np.ndarray:
    """Newton's method from zero; the objective is concave, and halving steps makes it climb."""
    u = np.zeros(n)
    for _ in range(STEPS):
        gradient, H = -u / PRIOR_SD**2, np.eye(n) / PRIOR_SD**2
        for part in answers:
            k = part.losers.shape[1]
            turn = np.hstack([np.ones((k, 1)), -np.eye(k)])  # of (winner, losers) to differences
            _, slope, bend = (found.numpy() for found in part.at(u))
            where = np.hstack([part.winners[:, None], part.losers])
            np.add.at(gradient, where, part.weight[:, None] * (slope @ turn))
            block = part.weight[:, None, None] * np.einsum("ja,cjk,kb->cab", turn, bend, turn)
            np.add.at(H, (where[:, :, None], where[:, None, :]), block)
        step = np.linalg.solve(H, gradient) if n else gradient
        here = _objective(u, answers)
        while n and _objective(u + step, answers) < here and np.abs(step).max() > 1e-12:
            step = step / 2
        u = u + step
        if not n or np.abs(step).max() < 1e-10:
            break
    return u


def _objective(u: np.ndarray, answers: Sequence[_Answers]) -> float:
    data = sum(float((part.weight * part.at(u).log_p.numpy()).sum()) for part in answers)
    return data - 0.5 * float((u**2).sum()) / PRIOR_SD**2


def with_utilities(queries: pd.DataFrame, comparisons: pd.DataFrame) -> pd.DataFrame:
    """The table of queries with the utilities as `value` wherever an answer has none.

    What a surrogate of comparisons had predicted is left out: its utilities have another zero and another scale.
    """
    if not len(comparisons):
        return queries
    known = utilities(comparisons)
    out = queries.copy()
    missing = out["value"].isna() & (out["state"] == "answered")
    out["value"] = out["value"].astype("float64")
    out.loc[missing, "value"] = out.loc[missing, "id"].map(known).astype("float64")
    out[["predicted", "predicted_sd"]] = np.nan
    return out


def tallies(numbers: Sequence[int], comparisons: pd.DataFrame) -> pd.DataFrame:
    """Columns `wins`, `losses`, `ties` of the queries with these numbers, in their order."""
    win, tie = (comparisons[comparisons["outcome"] == outcome] for outcome in ("win", "tie"))
    columns = {
        "wins": win["winner"].value_counts(),
        "losses": win["loser"].value_counts(),
        "ties": pd.concat([tie["winner"], tie["loser"]]).value_counts(),
    }
    return pd.DataFrame({name: [int(found.get(number, 0)) for number in numbers] for name, found in columns.items()})
