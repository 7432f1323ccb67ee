import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.text.permutation import Permutation


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 100))
def test_every_element_once(n: int, seed: int, epoch: int) -> None:
    order = Permutation(n, seed=(seed, epoch))(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))


@given(n=st.integers(2**40, 2**60), index=st.lists(st.integers(0, 2**40 - 1), unique=True))
def test_no_clash_in_a_range_that_no_memory_holds(n: int, index: list[int]) -> None:
    out = Permutation(n, seed=(1, 2))(np.array(index, np.int64))
    assert len(set(out.tolist())) == len(index)
    assert all(0 <= value < n for value in out.tolist())


def test_the_order_is_the_same_on_every_machine() -> None:
    # frozen: changing it would break the exact resume of saved runs
    permutation = Permutation(10, seed=(1337, 0))
    assert permutation(np.arange(10)).tolist() == [2, 7, 4, 8, 3, 1, 5, 0, 9, 6]
    assert permutation.extra == 13582406009521608908


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {
        tuple(Permutation(100, seed=(seed, epoch))(np.arange(100)).tolist())
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


@pytest.mark.parametrize("n", [18, 50, 101])
def test_every_element_lands_everywhere(n: int) -> None:
    draws = 1500
    counts = np.zeros((n, n))
    for epoch in range(draws):
        counts[np.arange(n), Permutation(n, seed=(0, epoch))(np.arange(n))] += 1
    expected = draws / n
    chi2 = ((counts - expected) ** 2 / expected).sum() / (n - 1) ** 2
    # chi-square over its degrees of freedom: 1 for a fair shuffle, with this standard deviation
    assert abs(chi2 - 1) < 5 * np.sqrt(2) / (n - 1)
