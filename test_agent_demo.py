from agent_demo import total


def test_total_is_the_sum_of_the_prices() -> None:
    assert total([20, 1.5, 3]) == 24.5


def test_total_of_no_prices_is_zero() -> None:
    assert total([]) == 0
