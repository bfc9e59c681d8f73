"The benchmarks' code paths, small: that they run and measure what they say; no time is asserted."
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import demo_seeds, published_mixes, speed


@pytest.fixture(scope='module')
def beside():
    if not speed.MODEL.exists(): pytest.skip('the data and the model beside the project (../shared) are not here')


def test_speed_table_is_measured_side_by_side(beside):
    t = speed.speed(48, 2)
    assert list(t['method']) == list(speed.METHODS) and (t['rows'] == 48).all() and (t['rows_per_second'] > 0).all()
    rate = t['rows_per_second'].to_numpy()
    np.testing.assert_allclose(t['times_faster_than_published'], rate/rate[0], rtol=.02, atol=.01)
    np.testing.assert_allclose(t['time_over_plain_forward'], rate[1]/rate, rtol=.02, atol=.01)


def test_repeated_rows_differ(beside):
    rows = speed.many(3500)
    assert len(rows) == 3500 and rows[0].prompt != rows[3401].prompt and rows[0].response == rows[3401].response


def test_mixes_know_which_rows_training_saw():
    samples = [type('S', (), {'id': str(i)}) for i in range(6)]
    assert published_mixes.seen(samples, {str(i): i > 3 for i in range(6)}) == {'0', '2'}


def test_one_fresh_set():
    from gradsentry_nb.demo import demo_model
    r = demo_seeds.row(301, 'default', *demo_model())
    assert r['recall'] >= .95 and r['precision'] >= .9 and r['tokens_alone_best_f1'] < .7
