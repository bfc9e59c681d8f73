"""Charts stay small, draw odd frames, and reach for nothing outside."""
import json

import numpy as np
import pandas as pd
import pytest

from gradsentry_nb.charts import chart_svg, histogram_bins, score_by_length, score_histogram, thin_out
from gradsentry_nb.core import Cut

NONE, MID = Cut(None, 'valley', 'One peak.'), Cut(.5, 'fixed', 'By hand.')


def frame(n, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(dict(tokens=rng.integers(1, 400, n), score=rng.random(n)))


@pytest.mark.parametrize('draw, size', [(score_histogram, 20_000), (score_by_length, 600_000)])
@pytest.mark.parametrize('cut', [NONE, MID])
def test_a_hundred_thousand_rows_make_a_small_chart(draw, size, cut):
    assert len(json.dumps(draw(frame(100_000), cut, 'entropy').to_dict())) < size


def test_a_thinned_chart_says_so():
    spec = score_by_length(frame(6000), MID).to_dict()
    assert any('5,000 of 6,000 rows drawn' in line for line in spec['title']['subtitle'])
    assert max(map(len, spec['datasets'].values())) == 5000


def test_thinning_keeps_the_flagged_and_is_the_same_each_time():
    flagged = np.arange(50_000) % 50 == 0
    pick = thin_out(flagged)
    assert flagged[pick].sum() == 1000 and len(pick) == len(set(pick)) == 5000
    assert (pick == thin_out(flagged)).all()
    assert thin_out(np.ones(9000, bool), 100).size == 100


@pytest.mark.parametrize('cut', [-3., 0., .25, .5, 1., 1.5, 1e9, None])
@pytest.mark.parametrize('x', [[.5], [0., 1.], [.5]*7, [.25, .5, .75, 1.], [0., 1e-300], [-1e300, 1e300]])
def test_every_score_is_in_a_bin_of_its_side(x, cut):
    x = np.array(x)
    bins = histogram_bins(x, cut)
    assert bins['rows'].sum() == len(x) and len(bins) <= 160
    if cut is not None: assert bins['rows'][bins.side == 'dropped'].sum() == (x > cut).sum()


@pytest.mark.parametrize('detail', [{}, {'peaks': [.2, .8], 'valley': .5}, {'peaks': [], 'valley': None},
                                    {'peaks': np.array([.2]), 'valley': float('nan')}, {'peaks': [{'at': .2}]}])
def test_any_detail_of_a_cut_can_be_drawn(detail):
    assert chart_svg(score_histogram(frame(50), Cut(.5, 'valley', '', detail))).startswith('<svg')


def test_no_separation_is_written_on_the_chart():
    assert 'no separation' in chart_svg(score_histogram(frame(50), NONE))
    assert 'no separation' not in chart_svg(score_histogram(frame(50), MID))


def test_text_in_a_chart_is_escaped():
    svg = chart_svg(score_histogram(frame(50), MID, '<script>x</script>'))
    assert '<script' not in svg and '&lt;script' in svg
