import fuzz
import pytest


@pytest.mark.parametrize("seed", range(20))
def test_hostile_arguments(seed):
    for number in range(50):
        fuzz.call(seed, number)
