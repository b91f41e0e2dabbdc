"""Schedules at their ends and in between, early stopping."""

import math

import pytest

from compression.schedule import SCHEDULES, EarlyStopping, cubic_sparsity, linear, warmup_then_linear_decay


def test_cubic_sparsity_rises_fast_then_slowly():
    values = [cubic_sparsity(step / 10, 0.3) for step in range(11)]
    assert values[0] == 0 and values[-1] == 0.3
    gains = [after - before for before, after in zip(values, values[1:], strict=False)]
    assert all(early > late > 0 for early, late in zip(gains, gains[1:], strict=False))
    assert cubic_sparsity(0.5, 0.8) == 0.8 * 0.875
    assert cubic_sparsity(2, 0.3) == 0.3


def test_linear_stays_within_its_ends():
    assert [linear(progress, 10, 2) for progress in (-1, 0, 0.25, 1, 3)] == [10, 10, 8, 2, 2]


def test_learning_rate_factor():
    factors = [warmup_then_linear_decay(step, 10, 4) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[7] == 0.5 and factors[10] == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_alike_and_ends_at_zero(name):
    factors = [SCHEDULES[name](step, 20, 4) for step in range(21)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors[20] == 0
    assert all(later <= earlier for earlier, later in zip(factors[4:], factors[5:], strict=False))
    assert [SCHEDULES[name](step, 3, 0) > 0 for step in range(3)] == [True] * 3
    assert SCHEDULES[name](0, 1, 1) == 1


def test_cosine_decay():
    factors = [SCHEDULES["cosine"](step, 12, 4) for step in range(4, 13)]
    assert factors == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)])
    assert factors[4] == pytest.approx(0.5)


def test_wsd_is_flat_up_to_the_last_fifth():
    factors = [SCHEDULES["wsd"](step, 20, 4) for step in range(4, 21)]
    assert factors[:13] == [1.0] * 13, "up to step 16, four before the end"
    assert factors[13:] == pytest.approx([1 - math.sqrt(share) for share in (0.25, 0.5, 0.75, 1)])
    assert SCHEDULES["wsd"](18, 20, 18) == 1, "a warm-up into the last fifth leaves the decay what is behind it"


def test_early_stopping_needs_more_than_min_delta():
    stopping = EarlyStopping(patience=2, min_delta=0.01)
    assert stopping.update(0.80)
    assert not stopping.update(0.809) and not stopping.stop
    assert stopping.update(0.82) and stopping.waited == 0
    assert not stopping.update(0.82) and not stopping.update(0.82)
    assert stopping.stop
