"""Paired intervals, curves, and verdicts from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lco_lite.evaluation.compare import t_quantile, two_sided
from lco_lite.study.base import judged
from lco_lite.study.statistics import Interval, mean_std, paired, samples_to


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (7, 2.3646), (30, 2.0423), (1e6, 1.95997)]
)
def test_quantiles_are_those_of_the_table_of_students_t(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-4)
    assert float(two_sided(quantile, degrees)) == pytest.approx(0.05, abs=1e-5)


def test_a_paired_interval_is_that_of_the_differences():
    # differences 0.1, 0.2, 0.3: mean 0.2, standard error 0.1/sqrt(3), t 4.3027
    found = paired({1: 0.6, 2: 0.8, 3: 1.0, 4: 9.0}, {1: 0.5, 2: 0.6, 3: 0.7})
    assert found is not None and found.n == 3
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - 0.248413, 0.2 + 0.248413), abs=1e-5)
    assert found.p == pytest.approx(0.0742, abs=1e-4)


@given(st.dictionaries(st.integers(0, 9), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2))
def test_the_other_way_round_is_the_mirror_image(scores):
    a, b = ({seed: pair[i] for seed, pair in scores.items()} for i in (0, 1))
    there, back = paired(a, b), paired(b, a)
    assert there is not None and back is not None
    assert there[:3] == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-12)
    assert there.p == pytest.approx(back.p)


def test_one_pair_has_no_interval():
    assert paired({1: 0.5}, {1: 0.2, 2: 0.3}) is None


def test_a_claim_is_judged_by_where_its_interval_lies():
    assert judged(Interval(0.2, 0.1, 0.3, 0.01, 8)) == "reproduced"
    assert judged(Interval(0.2, 0.1, 0.3, 0.01, 8), at_least=0.15) == "unclear"
    assert judged(Interval(0.2, 0.1, 0.3, 0.01, 8), at_least=0.4) == "not reproduced"
    assert judged(None) == judged(Interval(0.2, 0.2, 0.2, 0.0, 2)) == "unclear"


def test_samples_to_a_score_lie_between_the_points_of_a_curve():
    assert samples_to(0.5, [0, 100, 200], [0.2, 0.4, 0.8]) == pytest.approx(125)
    assert samples_to(0.1, [0, 100], [0.2, 0.4]) == 0
    assert samples_to(0.9, [0, 100], [0.2, 0.4]) is None


def test_numbers_are_told_with_their_spread():
    assert mean_std([0.9, 0.92, 0.94]) == "0.920 ± 0.020"
    assert mean_std([0.9]) == "0.900"
    assert mean_std([]) == "–"
