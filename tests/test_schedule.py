"""Schedules at their ends and in between, early stopping."""

from compression.schedule import EarlyStopping, cubic_sparsity, linear, warmup_then_linear_decay


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
    factors = [warmup_then_linear_decay(step, total=10, warmup=4) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[7] == 0.5 and factors[10] == 0


def test_early_stopping_needs_more_than_min_delta():
    stopping = EarlyStopping(patience=2, min_delta=0.01)
    assert stopping.update(0.80)
    assert not stopping.update(0.809) and not stopping.stop
    assert stopping.update(0.82) and stopping.waited == 0
    assert not stopping.update(0.82) and not stopping.update(0.82)
    assert stopping.stop
