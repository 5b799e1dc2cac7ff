"""Noise levels of the VP diffusion against the table of the papers, and against each other."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.errors import SettingsError
from cmap_defense.purifiers import GDMP
from cmap_defense.purifiers.vp import TOTAL, vp_beta, vp_scale, vp_sigma, vp_sigma_at, vp_time

TABLE = {
    0: 0.0,
    10: 0.0436,
    20: 0.0762,
    30: 0.1083,
    36: 0.1276,
    40: 0.1405,
    45: 0.1566,
    50: 0.1728,
    60: 0.2053,
    75: 0.2546,
    100: 0.3388,
    125: 0.4264,
    150: 0.5182,
    200: 0.7193,
}


@pytest.mark.parametrize(("t", "sigma"), TABLE.items())
def test_levels_are_those_of_the_table(t: int, sigma: float) -> None:
    assert vp_sigma(t) == pytest.approx(sigma, abs=5e-5)


@given(st.integers(1, TOTAL))
def test_level_t_is_the_product_of_t_factors(t: int) -> None:
    kept = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * i / 999) for i in range(t))
    assert vp_sigma(t) == pytest.approx(math.sqrt((1 - kept) / kept), rel=1e-9)
    assert vp_scale(vp_sigma(t)) == pytest.approx(math.sqrt(kept), rel=1e-9)


@given(st.floats(1e-4, 1.0))
def test_continuous_time_and_back(time: float) -> None:
    assert vp_time(vp_sigma_at(time)) == pytest.approx(time, rel=1e-9)
    slope = (math.log(vp_scale(vp_sigma_at(time + 1e-6))) - math.log(vp_scale(vp_sigma_at(time - 1e-6)))) / 2e-6
    assert slope == pytest.approx(-vp_beta(time) / 2, rel=1e-3)


def test_level_100_is_reached_a_little_before_time_01() -> None:
    assert vp_time(vp_sigma(100)) == pytest.approx(0.0996, abs=5e-5)


def test_respaced_levels() -> None:
    assert GDMP.preset("imagenet-linf").level == pytest.approx(0.627, abs=5e-4)


@pytest.mark.parametrize("t", [-1, 1001, 0.5, "100", None])
def test_what_is_no_level_of_the_1000_is_refused(t: Any) -> None:
    with pytest.raises(SettingsError, match=r"vp_sigma\.t"):
        vp_sigma(t)
