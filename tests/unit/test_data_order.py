"""Data order: resumable anywhere, different per seed, untouched by global randomness."""

from __future__ import annotations

import numpy as np
import pytest

from raylora.data.order import Order, Sample, derive_seed


def epoch(order: Order, number: int = 0) -> list[int]:
    first = number * order.steps_per_epoch
    return np.concatenate([order.indices(first + step) for step in range(order.steps_per_epoch)]).tolist()


def test_an_epoch_visits_every_row_once_and_may_end_short() -> None:
    order = Order(rows=10, batch=4, seed=1)
    assert order.steps_per_epoch == 3
    assert [len(order.indices(step)) for step in range(4)] == [4, 4, 2, 4]
    assert sorted(epoch(order)) == sorted(epoch(order, 1)) == list(range(10))
    assert epoch(order) != epoch(order, 1)


def test_step_alone_decides_so_that_a_run_resumes_anywhere() -> None:
    unbroken = Order(rows=101, batch=8, seed=5)
    seen = [unbroken.indices(step).tolist() for step in range(60)]
    np.random.seed(0)  # global state must not matter
    assert Order(rows=101, batch=8, seed=5).indices(47).tolist() == seen[47]


def test_seeds_give_different_orders() -> None:
    orders = {tuple(epoch(Order(rows=50, batch=8, seed=seed))) for seed in range(20)}
    assert len(orders) == 20


def test_bootstrap_draws_one_sample_with_replacement_for_all_epochs() -> None:
    order = Order(rows=1000, batch=32, seed=3, sample=Sample(1000, 5, with_replacement=True))
    first, second = epoch(order), epoch(order, 1)
    assert len(first) == 1000 and sorted(first) == sorted(second) and first != second
    assert 0.60 < len(set(first)) / 1000 < 0.66  # 1 - 1/e
    other = Order(rows=1000, batch=32, seed=3, sample=Sample(1000, 6, with_replacement=True))
    assert sorted(first) != sorted(epoch(other))


def test_a_part_of_the_rows_is_one_part_in_all_epochs_passed_through_as_often_as_fits() -> None:
    order = Order(rows=100, batch=8, seed=3, sample=Sample(40, 5, with_replacement=False))
    first, second = epoch(order), epoch(order, 1)
    assert len(first) == len(second) == 100 and order.steps_per_epoch == 13
    passes = [first[:40], first[40:80], first[80:]]
    assert set(passes[0]) == set(passes[1]) == set(second) and len(set(passes[0])) == 40  # the same forty, once a pass
    assert passes[0] != passes[1] and set(passes[2]) < set(passes[0]) and len(set(passes[2])) == 20
    assert set(epoch(Order(100, 8, 3, Sample(40, 6, with_replacement=False)))) != set(first)
    assert set(epoch(Order(100, 8, 3, Sample(100, 6, with_replacement=False)))) == set(range(100))


def test_a_small_bootstrap_sample_is_drawn_from_all_rows() -> None:
    first = epoch(Order(rows=1000, batch=32, seed=3, sample=Sample(500, 5, with_replacement=True)))
    assert len(first) == 1000 and 0.36 < len(set(first)) / 1000 < 0.43  # 1 - e^(-1/2)
    assert first[:500] != first[500:] and sorted(first[:500]) == sorted(first[500:])


@pytest.mark.parametrize("size", [0, 11])
def test_a_sample_larger_than_the_rows_or_of_none_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="a sample has from one to all 10 rows"):
        Order(rows=10, batch=2, seed=0, sample=Sample(size, 0, with_replacement=True))


def test_the_order_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Order(rows=4, batch=2, seed=0).indices(0)[0] = 3


@pytest.mark.parametrize(("rows", "batch"), [(0, 1), (1, 0)])
def test_an_empty_order_is_refused(rows: int, batch: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Order(rows=rows, batch=batch, seed=0)


def test_derived_seeds_keep_their_parts_apart_and_never_change() -> None:
    seeds = [derive_seed(*parts) for parts in [("a", 1), ("a", 2), ("a1",), ("a", "1"), (1, "a"), ("a", 1, 0)]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("member", 0) == 5018031388035461699  # a change would break every resumed run
