from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iprox.errors import InputError
from iprox.proxy.search import CLOSENESS, LEAST, MOST, Try, cost_of, most_tries, smallest_faithful
from iprox.proxy.size import OutOfReachError


def make(size):
    return size.sparsity, SimpleNamespace(relative_flops=1 - size.sparsity)


@given(st.floats(0.2, 0.93))
def test_the_largest_sparsity_that_is_faithful_enough_is_found(edge):
    """Of a fidelity that falls with sparsity, and of its lower bound, which is what counts."""
    done = []
    asked = 1 - edge
    proxy, report, tries = smallest_faithful(make, asked, lambda proxy: (1.02 - proxy, 1 - proxy), done.append)
    assert edge - CLOSENESS <= proxy <= edge + 1e-12
    assert report.relative_flops == 1 - proxy
    assert len(tries) == len(done) <= most_tries()
    assert [each.sparsity for each in tries] == sorted(each.sparsity for each in tries)
    assert all(LEAST <= each.sparsity <= MOST for each in tries)


def test_a_fidelity_out_of_reach_is_refused_with_what_is_in_reach():
    with pytest.raises(InputError, match=r"reaches a fidelity of 0.950 \(at least 0.920\), not 0.97"):
        smallest_faithful(make, 0.97, lambda proxy: (1 - proxy, 0.97 - proxy))


def test_sizes_of_less_than_a_rank_a_layer_are_too_small_not_an_error():
    def make_some(size):
        if size.sparsity > 0.6:
            raise OutOfReachError("less than one rank per layer")
        return make(size)

    proxy, _, tries = smallest_faithful(make_some, 0.1, lambda proxy: (0.9, 0.8))
    assert 0.6 - CLOSENESS <= proxy <= 0.6
    assert len(tries) < most_tries()


def test_further_cost_is_interpolated_between_tries():
    tries = [Try(0.2, 0.8, 0.99, 0.98), Try(0.4, 0.6, 0.95, 0.90), Try(0.6, 0.4, 0.8, 0.7)]
    assert cost_of(0.94, tries) == pytest.approx({"fidelity": 0.94, "sparsity": 0.3, "relative_flops": 0.7})
    assert cost_of(0.8, tries)["sparsity"] == pytest.approx(0.5)
    assert cost_of(0.995, tries) is None
    assert cost_of(0.1, tries) is None
