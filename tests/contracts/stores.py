"""What every database behind the query store must do. Inherit, and give the fixture `database`."""

from __future__ import annotations

import math
import re
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tiltopt.errors import StoreError
from tiltopt.online.queries import NewQuery, Origin, RoundRecord
from tiltopt.online.store.database import Database
from tiltopt.online.store.features import pack
from tiltopt.online.store.rows import TRANSITIONS, origin_of
from tiltopt.online.store.schema import SCHEMA_VERSION, comparisons, meta, queries, version_of
from tiltopt.online.store.store import Store


def new_queries(first: int, n: int, **numbers: float) -> list[NewQuery]:
    """`n` queries from number `first` on; features (number, 1/number, 0)."""
    return [
        NewQuery(i, i - first, f"a cat {i}", 2**62 + i, pack(torch.tensor([i, 1 / i, 0.0])), **numbers)
        for i in range(first, first + n)
    ]


class StoreContract:
    """Tests that a `Store` on any database passes."""

    @pytest.fixture
    def store(self, database: Database) -> Store:
        return Store.create(database, "run", {"seed": 1})

    @pytest.fixture
    def asked(self, store: Store) -> Store:
        store.add_round(RoundRecord(0, "plain", 4), new_queries(1, 4), "toy")
        return store

    def move(self, store: Store, number: int, to: str) -> None:
        actions = {
            "answered": lambda: store.answer(number, 1.0),
            "failed": lambda: store.fail(number, "plate broken"),
            "abandoned": lambda: store.abandon(number, "unsafe"),
        }
        actions[to]()

    def test_answers_are_restated_all_together_and_nothing_else_changes(self, asked: Store) -> None:
        asked.answer(1, 5.0, 0.5, "said")
        asked.answer(2, 7.0)
        before = asked.revision()
        asked.restate({1: (0.1, 0.01), 2: (0.3, None), 3: (9.0, None)})  # 3 has no answer to restate
        assert asked.revision() == before + 1
        rows = [asked.get(number) for number in (1, 2, 3)]
        assert [(row.state, row.value, row.sem, row.raw) for row in rows] == [
            ("answered", 0.1, 0.01, "said"),
            ("answered", 0.3, None, None),
            ("asked", None, None, None),
        ]
        assert asked.spent().queries == 2

    # ---- runs and rounds

    def test_a_run_is_created_once_and_found_again(self, database: Database, store: Store) -> None:
        assert Store.open(database, "run").config() == {"seed": 1}
        with pytest.raises(StoreError, match="already holds this run"):
            Store.create(database, "run", {})
        with pytest.raises(StoreError, match="holds no run"):
            Store.open(database, "other")

    def test_runs_of_one_database_do_not_see_each_other(self, database: Database, asked: Store) -> None:
        other = Store.create(database, "other", {"seed": 2})
        assert other.next() == (0, 1)
        other.add_round(RoundRecord(0, "plain", 1), new_queries(1, 1), "another map")
        other.answer(1, 7.0)
        assert asked.counts()["answered"] == 0
        assert len(other.frame()) == 1
        assert other.claim("w", 10) == []

    def test_changed_settings_are_kept_with_what_changed(self, store: Store) -> None:
        store.change_config({"seed": 2}, ["seed: 1 -> 2"])
        assert store.config() == {"seed": 2}
        assert store.changes() == ["seed: 1 -> 2"]

    def test_a_round_reads_back_as_it_was_written(self, asked: Store) -> None:
        record = RoundRecord(1, "tilted", 2, 0.02, 1.5, ("careful",), {"nll": 0.1}, "abc", 2.5, nats=61.5)
        asked.add_round(record, new_queries(5, 2, predicted=0.1 + 0.2, log_z=-1e-300), "toy")
        asked.add_answer_seconds(1, 0.5)
        asked.add_answer_seconds(1, 0.25)
        got = asked.rounds()[1]
        assert (got.kind, got.size, got.alpha, got.beta, got.nats) == ("tilted", 2, 0.02, 1.5, 61.5)
        assert (got.notes, got.score, got.fingerprint) == (("careful",), {"nll": 0.1}, "abc")
        assert (got.ask_seconds, got.answer_seconds) == (2.5, 0.75)
        assert asked.get(5).predicted == 0.1 + 0.2, "numbers keep every bit"
        assert asked.get(6).log_z == -1e-300
        assert asked.next() == (2, 7)

    def test_a_round_that_is_not_the_next_one_is_refused_whole(self, asked: Store) -> None:
        for record, new in (
            (RoundRecord(0, "plain", 1), new_queries(5, 1)),
            (RoundRecord(1, "plain", 1), new_queries(4, 1)),
            (RoundRecord(2, "plain", 1), new_queries(5, 1)),
        ):
            with pytest.raises(StoreError, match="expected round 1 with queries from 5 on"):
                asked.add_round(record, new, "toy")
        assert asked.next() == (1, 5)

    def test_features_of_another_map_are_refused(self, asked: Store) -> None:
        with pytest.raises(StoreError, match=r"'toy'.*got 'clip'"):
            asked.add_round(RoundRecord(1, "plain", 1), new_queries(5, 1), "clip")
        assert asked.next() == (1, 5)

    # ---- states

    @pytest.mark.parametrize("state", ["asked", *(s for s in TRANSITIONS if s != "asked")])
    @pytest.mark.parametrize("to", ["answered", "failed", "abandoned"])
    def test_exactly_the_sensible_transitions_happen(self, asked: Store, state: str, to: str) -> None:
        if state != "asked":
            self.move(asked, 2, state)
        before = tuple(asked.get(2))
        if to in TRANSITIONS[state]:
            self.move(asked, 2, to)
            assert asked.get(2).state == to
            return
        with pytest.raises(StoreError, match=f"query 2 is {state}.*cannot become {to}. Allowed: "):
            self.move(asked, 2, to)
        assert tuple(asked.get(2)) == before, "a refused transition changes nothing"

    def test_a_failed_query_is_retried_as_another_attempt(self, asked: Store) -> None:
        asked.fail(1, "no power")
        assert (asked.get(1).state, asked.get(1).error, asked.get(1).attempt) == ("failed", "no power", 1)
        asked.retry(1)
        assert (asked.get(1).state, asked.get(1).error, asked.get(1).attempt) == ("asked", None, 2)
        asked.answer(1, 0.5)
        for number in (1, 2):
            with pytest.raises(StoreError, match="cannot become asked"):
                asked.retry(number)

    def test_an_answer_is_undone_only_before_the_next_round(self, asked: Store) -> None:
        asked.answer(1, 0.5, 0.1, "raw")
        asked.undo(1)
        assert (asked.get(1).state, asked.get(1).value, asked.get(1).sem, asked.get(1).raw) == (
            "asked",
            None,
            None,
            None,
        )
        asked.answer(1, 0.7)
        asked.add_round(RoundRecord(1, "plain", 1), new_queries(5, 1), "toy")
        with pytest.raises(StoreError, match="no later round"):
            asked.undo(1)
        assert asked.get(1).value == 0.7

    def test_an_unknown_query_is_named_with_what_there_is(self, store: Store) -> None:
        with pytest.raises(StoreError, match="unknown query 1: nothing has been asked yet"):
            store.answer(1, 0.0)
        store.add_round(RoundRecord(0, "plain", 4), new_queries(1, 4), "toy")
        for number in (0, -1, 5, 10**12, 10**40):
            with pytest.raises(StoreError, match=f"unknown query {number}: the run has queries 1 to 4"):
                store.answer(number, 0.0)

    # ---- reading

    def test_data_is_what_was_answered_and_what_is_pending(self, asked: Store) -> None:
        asked.answer(3, -1.5, 0.25)
        asked.answer(1, 2.5)
        asked.fail(2, "broken")
        data = asked.data()
        expected = torch.tensor([[1.0, 1.0, 0.0], [3.0, 1 / 3, 0.0]]).double()
        assert torch.equal(data.X, expected.float().double()), "in order of numbers, not of arrival"
        assert torch.equal(data.Y, torch.tensor([[2.5], [-1.5]], dtype=torch.float64))
        assert data.sem is not None
        assert torch.equal(data.sem, torch.tensor([[0.0], [0.25]], dtype=torch.float64))
        assert torch.equal(data.pending, torch.tensor([[4.0, 0.25, 0.0]], dtype=torch.float64))
        assert data.X.dtype == torch.float64

    def test_data_of_an_empty_run_has_shapes(self, store: Store) -> None:
        data = store.data()
        assert (data.X.shape[0], data.Y.shape, data.sem, data.pending.shape[0]) == (0, (0, 1), None, 0)

    def test_answers_since_a_round(self, asked: Store) -> None:
        asked.add_round(RoundRecord(1, "plain", 2), new_queries(5, 2), "toy")
        for number, value in ((1, 1.0), (6, 6.0), (5, 5.0)):
            asked.answer(number, value)
        X, Y = asked.answers_since(1)
        assert Y.flatten().tolist() == [5.0, 6.0]
        assert X[:, 0].tolist() == [5.0, 6.0]

    def test_the_table_has_the_promised_columns(self, asked: Store) -> None:
        asked.answer(1, 0.1, 0.2)
        asked.fail(2, "broken")
        frame = asked.frame()
        assert " ".join(frame.columns) == (
            "id round prompt seed state value sem predicted predicted_sd error operator parents k0"
        )
        assert frame["id"].tolist() == [1, 2, 3, 4]
        assert frame["seed"].tolist() == [2**62 + i for i in (1, 2, 3, 4)], "63 bits survive"
        assert frame["state"].tolist() == ["answered", "failed", "asked", "asked"]
        assert frame["error"][1] == "broken"
        assert np.isnan(frame["value"][1])
        assert frame.dtypes["value"] == np.float64

    def test_counts(self, asked: Store) -> None:
        asked.answer(1, 0.0)
        asked.abandon(4, "unsafe")
        assert asked.counts() == {"asked": 2, "failed": 0, "answered": 1, "abandoned": 1}
        assert asked.counts(7) == {"asked": 0, "failed": 0, "answered": 0, "abandoned": 0}

    # ---- comparisons

    def test_a_comparison_answers_what_was_asked_and_undo_asks_again(self, asked: Store) -> None:
        first = asked.comparisons.add(2, 1, rater="ann", raw="nicer")
        second = asked.comparisons.add(2, 3, "tie")
        assert (first, second) == (1, 2)
        assert asked.counts() == {"asked": 1, "failed": 0, "answered": 3, "abandoned": 0}
        assert asked.get(2).value is None
        assert asked.comparisons.undo().id == 2
        assert [asked.get(i).state for i in (1, 2, 3, 4)] == ["answered", "answered", "asked", "asked"]
        assert asked.comparisons.undo(1).winner == 2
        assert asked.counts()["asked"] == 4
        with pytest.raises(StoreError, match="no comparison to take back"):
            asked.comparisons.undo()
        with pytest.raises(StoreError, match="comparison 1 was taken back already"):
            asked.comparisons.undo(1)
        with pytest.raises(StoreError, match="unknown comparison"):
            asked.comparisons.undo(10**30)
        assert asked.comparisons.add(4, 1) == 3, "numbers are never used again"
        frame = asked.comparisons.frame()
        assert frame[["id", "round", "winner", "loser", "outcome"]].values.tolist() == [[3, 0, 4, 1, "win"]]

    def test_a_failed_comparison_is_kept_and_answers_nothing(self, asked: Store) -> None:
        asked.comparisons.add(1, 2, "failed", error="the model refused", raw="no")
        assert asked.counts()["asked"] == 4
        row = asked.comparisons.rows()[0]
        assert (row.outcome, row.error, row.raw, row.undone) == ("failed", "the model refused", "no", 0)
        assert asked.comparisons.data().X.shape[0] == 0

    def test_the_best_of_several_is_one_answer_that_comes_and_goes_as_a_whole(self, asked: Store) -> None:
        asked.comparisons.add(1, 2)
        choice = asked.comparisons.choose(3, [1, 4], rater="ann")
        assert asked.counts()["answered"] == 4
        assert asked.spent().queries == 2, "a choice costs one answer"
        frame = asked.comparisons.frame()
        assert frame[["winner", "loser"]].values.tolist() == [[1, 2], [3, 1], [3, 4]]
        assert frame["choice"].isna().tolist() == [True, False, False]
        assert frame["choice"].iloc[1:].tolist() == [choice, choice]
        data = asked.comparisons.data()
        assert data.comparisons is not None
        assert data.choices is not None
        assert data.comparisons.tolist() == [[0, 1], [2, 0], [2, 3]]
        assert data.choices.tolist() == [0, 1, 1]
        assert asked.comparisons.undo(choice + 1).choice == choice, "any of its rows names the whole"
        assert asked.comparisons.frame()["id"].tolist() == [1]
        assert [asked.get(i).state for i in (1, 2, 3, 4)] == ["answered", "answered", "asked", "asked"]
        assert asked.comparisons.data().choices is None

    def test_a_choice_of_what_is_not_several_queries_is_refused(self, asked: Store) -> None:
        for first, others, outcome in ((1, [2, 1], "win"), (1, [2, 2], "win"), (1, [2, 3], "tie"), (1, [], "win")):
            with pytest.raises(StoreError, match="expected"):
                asked.comparisons.choose(first, others, outcome)
        with pytest.raises(StoreError, match="unknown query 9"):
            asked.comparisons.choose(1, [2, 9])
        assert asked.comparisons.rows() == []
        assert asked.counts()["asked"] == 4, "all of it or nothing"

    @pytest.mark.parametrize(
        ("pair", "outcome", "message"),
        [
            ((1, 9), "win", "unknown query 9: the run has queries 1 to 4"),
            ((0, 1), "win", "unknown query 0"),
            ((10**40, 1), "win", "unknown query 1000"),
            ((2, 2), "win", "query 2 cannot be compared with itself"),
            ((1, 4), "win", r"query 4 is abandoned \(unsafe\) and cannot be compared"),
            ((3, 1), "win", r"query 3 is failed \(broken\).*retry it first"),
            ((1, 2), "better", "win, tie, failed, got 'better'"),
        ],
    )
    def test_impossible_comparisons_are_refused(
        self, asked: Store, pair: tuple[int, int], outcome: str, message: str
    ) -> None:
        asked.abandon(4, "unsafe")
        asked.fail(3, "broken")
        with pytest.raises(StoreError, match=message):
            asked.comparisons.add(*pair, outcome)
        assert asked.comparisons.rows() == []
        assert asked.counts()["asked"] == 2

    def test_comparisons_that_a_later_round_used_stay(self, asked: Store) -> None:
        asked.comparisons.add(1, 2)
        asked.add_round(RoundRecord(1, "plain", 1), new_queries(5, 1), "toy")
        with pytest.raises(StoreError, match="made in round 0 and round 1 was drawn from it"):
            asked.comparisons.undo()
        asked.comparisons.add(5, 1)
        asked.comparisons.undo()
        assert (asked.get(5).state, asked.get(1).state) == ("asked", "answered")

    def test_comparison_data_does_not_depend_on_the_order_of_arrival(self, database: Database, asked: Store) -> None:
        other = Store.create(database, "other", {})
        other.add_round(RoundRecord(0, "plain", 4), new_queries(1, 4), "toy")
        answers = [(4, 2, "win"), (1, 4, "tie"), (2, 1, "win"), (1, 2, "failed")]
        for row in answers:
            asked.comparisons.add(*row)
        for row in reversed(answers):
            other.comparisons.add(*row)
        one, two = asked.comparisons.data(), other.comparisons.data()
        assert one.comparisons is not None
        assert two.comparisons is not None
        assert one.comparisons.tolist() == [[1, 0], [0, 2], [2, 0], [2, 1]], "rows of X: queries 1, 2, 4"
        assert torch.equal(one.comparisons, two.comparisons)
        assert torch.equal(one.X[:, 0], torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        assert torch.equal(one.X, two.X)
        assert one.pending[:, 0].tolist() == [3.0]
        asked.fail(3, "broken")
        again = asked.comparisons.data()
        assert again.failed is not None
        assert (len(again.pending), again.failed[:, 0].tolist()) == (0, [3.0])
        assert one.Y.shape == (0, 1)
        assert asked.data().X.shape[0] == 0, "a query without a value teaches no surrogate of values"
        assert torch.equal(asked.vectors_of([4, 1])[:, 0], torch.tensor([4.0, 1.0], dtype=torch.float64))

    def test_where_a_query_started_from_reads_back(self, asked: Store) -> None:
        started = [Origin("restart", (3, 1), 17), Origin("pool", (2,), 0), Origin("global")]
        new = [replace(q, origin=o) for q, o in zip(new_queries(5, 3), started, strict=True)]
        asked.add_round(RoundRecord(1, "tilted", 3), new, "toy")
        assert [origin_of(asked.get(number)) for number in (5, 6, 7)] == started
        assert origin_of(asked.get(1)) == Origin("global", (), None)
        frame = asked.frame(1)
        assert frame["operator"].tolist() == ["restart", "pool", "global"]
        assert frame["parents"].tolist() == ["3 1", "2", ""]
        assert frame["k0"].dropna().tolist() == [17, 0]

    def test_a_layout_without_origins_is_brought_up_to_date(self, database: Database, asked: Store) -> None:
        asked.add_round(RoundRecord(1, "imported", 1), new_queries(5, 1), "toy", {5: (0.5, None)})
        before = asked.frame().drop(columns=["operator", "parents", "k0"])
        with database.writing() as c:
            for name in ("operator", "parents", "k0"):
                c.exec_driver_sql(f"ALTER TABLE tiltopt_queries DROP COLUMN {name}")
            c.execute(meta.update().where(meta.c.name == "schema_version").values(value="3"))
        for _ in range(2):  # the second time there is nothing left to do
            database._check_version(create=False)
        with database.reading() as c:
            assert version_of(c) == SCHEMA_VERSION
        frame = asked.frame()
        assert frame["operator"].tolist() == ["global"] * 4 + ["imported"], "the past is what it was"
        assert (set(frame["parents"]), frame["k0"].notna().sum()) == ({""}, 0)
        assert frame.drop(columns=["operator", "parents", "k0"]).equals(before)
        asked.add_round(RoundRecord(2, "plain", 1), new_queries(6, 1), "toy")
        assert origin_of(asked.get(6)) == Origin()

    def test_a_layout_without_comparisons_is_brought_up_to_date(self, database: Database, asked: Store) -> None:
        with database.writing() as c:
            comparisons.drop(c)
            c.execute(meta.update().where(meta.c.name == "schema_version").values(value="1"))
        database._check_version(create=False)
        assert asked.comparisons.add(1, 2) == 1
        assert asked.counts()["answered"] == 2

    def test_many_raters_at_once_lose_no_comparison(self, database: Database, store: Store) -> None:
        store.add_round(RoundRecord(0, "plain", 20), new_queries(1, 20), "toy")
        errors: list[Exception] = []

        def work(k: int) -> None:
            try:
                mine = Store.open(database, "run")
                for i in range(1, 6):
                    mine.comparisons.add(i, i + 1 + k, rater=f"rater {k}")
            except Exception as error:  # told by the assertion below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert errors == []
        assert [row.id for row in store.comparisons.rows()] == list(range(1, 21))

    # ---- reference samples

    def reference(self, first: int, n: int) -> list[NewQuery]:
        return [replace(q, number=-q.number) for q in new_queries(first, n)]

    def test_reference_samples_are_paid_for_and_nothing_else(self, asked: Store) -> None:
        before = asked.data()
        asked.add_round(RoundRecord(-1, "reference", 2), self.reference(1, 2), "toy")
        asked.deliver(-1, 0.5, raw="said")
        asked.add_round(RoundRecord(-1, "reference", 1), self.reference(3, 1), "toy")
        asked.fail(-3, "broken")
        assert asked.next() == (1, 5)
        assert [record.round for record in asked.rounds()] == [0]
        assert asked.counts() == {"asked": 4, "failed": 0, "answered": 0, "abandoned": 0}
        assert asked.counts(-1) == {"asked": 1, "failed": 1, "answered": 1, "abandoned": 0}
        assert [row.number for row in asked.in_state("asked")] == [1, 2, 3, 4]
        assert [row.number for row in asked.in_state("asked", -1)] == [-2]
        assert [row.number for row in asked.claim("ann", 9)] == [1, 2, 3, 4]
        assert [row.number for row in asked.claim("ann", 9, round_=-1)] == [-2]
        after = asked.data()
        assert torch.equal(after.X, before.X)
        assert torch.equal(after.pending, before.pending)
        assert asked.comparisons.data().pending.shape[0] == 4
        assert asked.answers_since(-1)[0].shape[0] == 0
        assert asked.frame()["id"].tolist() == [1, 2, 3, 4]
        assert asked.frame(kind="reference")["id"].tolist() == [-1, -2, -3]
        assert asked.frame(kind="all")["id"].tolist() == [-1, -2, -3, 1, 2, 3, 4]
        assert asked.frame(-1)["value"].tolist()[0] == 0.5
        assert (asked.get(-1).value, asked.get(-1).raw) == (0.5, "said")
        asked.add_round(RoundRecord(1, "plain", 1), new_queries(5, 1), "toy")
        assert asked.next() == (2, 6)

    @pytest.mark.parametrize("numbers", [(-2, -3), (1, 2), (-1, -3)])
    def test_reference_samples_are_numbered_downwards(self, asked: Store, numbers: tuple[int, ...]) -> None:
        new = [replace(q, number=n) for q, n in zip(new_queries(1, 2), numbers, strict=True)]
        with pytest.raises(StoreError, match="expected round -1 with queries from -1 on"):
            asked.add_round(RoundRecord(-1, "reference", 2), new, "toy")

    # ---- money

    def test_a_call_is_counted_before_it_is_made(self, asked: Store) -> None:
        assert asked.hand_out([1, 2]) == [1, 2]
        assert asked.unknown() == [1, 2]
        asked.came_back([2, 3])
        assert (asked.spent().queries, asked.spent().calls) == (1, 2), "a call that gave nothing is no query"
        assert asked.unknown() == [1]
        asked.hand_out([2])
        assert (asked.spent().queries, asked.spent().calls) == (2, 3)
        asked.answer(1, 0.5)
        assert asked.unknown() == [2]
        asked.fail(2, "no power")
        assert asked.unknown() == []
        asked.retry(2)
        assert asked.hand_out([1, 2, 9]) == [2], "what is answered or unknown is passed over"
        assert (asked.spent().queries, asked.spent().calls) == (3, 4)

    def test_an_answer_told_by_hand_is_paid_for_once(self, asked: Store) -> None:
        asked.answer(1, 0.5)
        asked.undo(1)
        asked.answer(1, 0.25)
        assert asked.spent().queries == 1
        asked.hand_out([2])
        asked.answer(2, 0.5)
        asked.fail(3, "never measured")
        assert (asked.spent().queries, asked.spent().calls) == (2, 2)

    def test_budgets_hold_for_all_kinds_together(self, asked: Store) -> None:
        asked.add_round(RoundRecord(-1, "reference", 2), self.reference(1, 2), "toy")
        assert asked.hand_out([-1, -2, 1], max_queries=2) == [-1, -2]
        assert asked.hand_out([1], max_queries=2) == []
        asked.came_back([-1, -2])
        assert asked.hand_out([-1, -2], max_queries=2, max_calls=3) == [-1]
        assert asked.comparisons.hand_out([(1, 2)], max_calls=3) == []
        assert (asked.spent().queries, asked.spent().calls) == (1, 3)

    def test_measurements_from_elsewhere_cost_nothing(self, store: Store) -> None:
        store.add_round(RoundRecord(0, "imported", 1), new_queries(1, 1), "toy", {1: (0.5, None)})
        assert (store.spent().queries, store.spent().calls) == (0, 0)

    def test_many_who_hand_out_at_once_keep_a_budget(self, database: Database, store: Store) -> None:
        store.add_round(RoundRecord(0, "plain", 40), new_queries(1, 40), "toy")
        handed: list[int] = []

        def work(k: int) -> None:
            mine = Store.open(database, "run")
            for number in range(1 + 10 * k, 11 + 10 * k):
                handed.extend(mine.hand_out([number], max_queries=17))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(handed) == 17
        assert store.spent().queries == 17

    def test_seconds_add_up(self, database: Database, store: Store) -> None:
        for _ in range(4):
            Store.open(database, "run").tick(0.25)
        assert store.spent().seconds == 1.0

    def test_a_comparison_is_entered_before_its_judge_is_called(self, asked: Store) -> None:
        (first, second) = asked.comparisons.hand_out([(1, 2), (3, 2)])
        assert asked.comparisons.rows() == []
        assert len(asked.comparisons.frame()) == 0
        assert asked.comparisons.data().X.shape[0] == 0
        assert asked.counts()["asked"] == 4
        assert [(row.winner, row.loser) for row in asked.comparisons.unknown()] == [(1, 2), (3, 2)]
        asked.comparisons.deliver(second, "win", first_wins=False, rater="ann", raw="nicer")
        row = asked.comparisons.rows()[0]
        assert (row.winner, row.loser, row.outcome, row.rater) == (2, 3, "win", "ann")
        assert asked.counts()["answered"] == 2
        asked.comparisons.came_back([first])
        assert (asked.spent().queries, asked.spent().calls) == (1, 2)
        assert asked.comparisons.hand_out([(2, 1)]) == [first], "the same pair is the same comparison"
        assert (asked.spent().queries, asked.spent().calls) == (2, 3)
        asked.comparisons.deliver(first, "failed", error="the judge refused")
        assert asked.comparisons.unknown() == []
        asked.comparisons.deliver(first, "failed", error="the judge refused")
        with pytest.raises(StoreError, match="has the outcome failed already"):
            asked.comparisons.deliver(first, "tie")
        assert asked.comparisons.undo().id == first, "the newest by its verdict"

    # ---- what goes with an answer

    @pytest.mark.parametrize("text", ["half \ud83d an emoji", "NUL \0 inside", "\udcff", "x" * 300_000])
    def test_no_text_beside_a_value_can_block_it(self, asked: Store, text: str) -> None:
        asked.claim(text[:100], 1)
        asked.answer(1, 0.5, raw=text)
        asked.deliver(2, 0.25, raw=text)
        asked.fail(3, text, raw=text)
        asked.abandon(4, text)
        asked.comparisons.add(1, 2, rater=text, raw=text, error=text)
        assert [asked.get(i).state for i in (1, 2, 3, 4)] == ["answered", "answered", "failed", "abandoned"]
        assert (asked.get(1).value, asked.get(2).value) == (0.5, 0.25)
        kept = asked.get(1).raw
        assert kept.replace("\ufffd", "") == re.sub("[\ud800-\udfff\0]", "", text)
        asked.change_config({"prompt": text}, [text])
        assert asked.changes()[0] == kept
        asked.add_round(RoundRecord(1, "plain", 1, notes=(text,)), new_queries(5, 1), "toy")
        assert asked.rounds()[1].notes == (kept,)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_features_that_would_brick_the_run_are_refused(self, asked: Store, bad: float) -> None:
        wrong = replace(new_queries(5, 1)[0], vector=pack(torch.tensor([1.0, bad, 0.0])))
        with pytest.raises(StoreError, match="query 5 has a feature that is not a finite number"):
            asked.add_round(RoundRecord(1, "imported", 1), [wrong], "toy")
        short = replace(wrong, vector=pack(torch.tensor([1.0, 2.0])))
        with pytest.raises(StoreError, match="query 5 has 2 features, expected 3"):
            asked.add_round(RoundRecord(1, "imported", 1), [short], "toy")
        assert asked.next() == (1, 5)
        assert asked.data().pending.shape == (4, 3)

    # ---- workers

    def test_each_query_is_handed_to_one_worker(self, asked: Store) -> None:
        first = [row.number for row in asked.claim("ann", 3)]
        second = [row.number for row in asked.claim("bob", 3)]
        assert (first, second) == ([1, 2, 3], [4])
        assert asked.claim("cid", 3) == []

    def test_a_silent_workers_queries_are_handed_out_again(self, database: Database, asked: Store) -> None:
        def wait(seconds: float) -> None:
            with database.writing() as c:
                c.execute(queries.update().values(heard_at=queries.c.heard_at - seconds))

        asked.claim("ann", 2)
        asked.claim("bob", 2)
        wait(250)
        assert asked.heartbeat("bob") == 2
        wait(100)
        assert [row.number for row in asked.claim("cid", 9, patience_s=300)] == [1, 2]
        asked.answer(1, 0.5)
        assert asked.heartbeat("ann") == 0

    @pytest.mark.parametrize("name", [None, "", "  ", 3, "w" * 129])
    def test_a_worker_has_a_name(self, asked: Store, name: Any) -> None:
        for act in (lambda: asked.claim(name, 1), lambda: asked.heartbeat(name), lambda: asked.release(name)):
            with pytest.raises(StoreError, match="expected the name of a worker"):
                act()

    def test_time_is_the_databases(self, asked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        asked.claim("ann", 2)
        monkeypatch.setattr(time, "time", lambda: 4e9)  # the clock of bob's machine is ahead
        assert [row.number for row in asked.claim("bob", 9)] == [3, 4]

    def test_what_is_given_back_may_be_claimed(self, asked: Store) -> None:
        asked.claim("ann", 3)
        asked.hand_out([1, 2])
        asked.answer(1, 0.5)
        assert asked.unknown("ann") == [2]
        assert asked.unknown("bob") == []
        assert asked.release("ann") == 2
        assert [row.number for row in asked.claim("bob", 9)] == [2, 3, 4]

    def test_one_asker_at_a_time(self, database: Database, asked: Store) -> None:
        asked.take_over("first")
        other = Store.open(database, "run")
        other.take_over("second")
        for act in (
            lambda: asked.reserve(RoundRecord(1, "plain", 1), [5]),
            lambda: asked.add_round(RoundRecord(1, "plain", 1), new_queries(5, 1), "toy"),
        ):
            with pytest.raises(StoreError, match="another writer has been here"):
                act()
        other.reserve(RoundRecord(1, "plain", 1), [5])
        other.add_round(RoundRecord(1, "plain", 1), new_queries(5, 1), "toy")

    def test_many_workers_at_once_answer_everything_once(self, database: Database, store: Store) -> None:
        n = 60
        store.add_round(RoundRecord(0, "plain", n), new_queries(1, n), "toy")
        handed: list[int] = []
        errors: list[Exception] = []

        def work(name: str) -> None:
            try:
                mine = Store.open(database, "run")
                while rows := mine.claim(name, 3):
                    handed.extend(row.number for row in rows)
                    for row in rows:
                        mine.answer(row.number, float(row.number))
            except Exception as error:  # told by the assertion below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(f"worker {i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert errors == []
        assert sorted(handed) == list(range(1, n + 1)), "each handed out exactly once"
        assert store.counts()["answered"] == n
