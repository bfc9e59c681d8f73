"""Charts stay small, draw odd frames, show the numbers that they claim to show, and reach for nothing outside."""
import inspect
import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsentry_nb import charts
from gradsentry_nb.charts import (FAR, as_values, chart_svg, data_update, histogram_bins, layer_bins, layer_map, live_histogram, live_strip, precision_recall, roc,
                                  sample_map, score_against, score_by_length, score_histogram, score_strip, spectra, strip_rows, thin_out)
from gradsentry_nb.core import Cut, SettingError
from gradsentry_nb.threshold import calibrated, fixed, paper_valley, valley

NONE, MID = Cut(None, 'valley', 'One peak.'), Cut(.5, 'fixed', 'By hand.')


def frame(n, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(dict(row=np.arange(n), tokens=rng.integers(1, 400, n), score=rng.random(n), loss=rng.gamma(2, 1, n), x=rng.normal(size=n), y=rng.normal(size=n)))


def layered(f):
    return pd.concat([pd.DataFrame(dict(layer=f'model.layers.{i}', row=f['row'], value=f['score']*(i+1), score=f['score'])) for i in range(3)])


def truth(f): return np.arange(len(f)) % 3 == 0


PER_ROW = {
    'histogram': lambda f, cut: score_histogram(f, cut, 'entropy'),
    'by length': lambda f, cut: score_by_length(f, cut, 'entropy'),
    'strip': lambda f, cut: score_strip(f, cut, 'entropy'),
    'against loss': lambda f, cut: score_against(f, 'loss', cut, 'entropy'),
    'against tokens': lambda f, cut: score_against(f, 'tokens', cut, 'entropy'),
    'map': lambda f, cut: sample_map(f, cut, 'entropy'),
    'precision': lambda f, cut: precision_recall(f, truth(f), cut, ('score', 'loss')),
    'roc': lambda f, cut: roc(f, truth(f), cut, ('score', 'loss')),
    'layers': lambda f, cut: layer_map(layered(f), order='score'),
    'live histogram': lambda f, cut: live_histogram(histogram_bins(f['score'][np.isfinite(f['score'])].to_numpy()), 'entropy', cut),
    'live strip': lambda f, cut: live_strip(strip_rows(f), 'entropy', cut),
}
every_chart = pytest.mark.parametrize('draw', PER_ROW.values(), ids=PER_ROW)


def values(chart):
    "Every row of data in a chart."
    spec = chart.to_dict()
    found = [*spec.get('datasets', {}).values(), spec.get('data', {}).get('values', [])]
    return [r for rows in found for r in rows]


def having(chart, *keys):
    "The rows of data that have all these keys, as a frame."
    return pd.DataFrame([r for r in values(chart) if set(keys) <= set(r)])


def said(chart):
    "Title and subtitle as one text."
    title = chart.to_dict()['title']
    return ' '.join([*np.ravel(title['text']), *np.ravel(title.get('subtitle', []))])


# ---- size and sampling

@pytest.mark.parametrize('draw, size', [(score_histogram, 20_000), (score_by_length, 600_000)])
@pytest.mark.parametrize('cut', [NONE, MID])
def test_a_hundred_thousand_rows_make_a_small_chart(draw, size, cut):
    assert len(json.dumps(draw(frame(100_000), cut, 'entropy').to_dict())) < size


@every_chart
def test_many_rows_make_a_small_chart_that_says_so(draw):
    chart = draw(frame(20_000), MID)
    assert len(values(chart)) <= 6000
    counted = any(draw is PER_ROW[k] for k in ('histogram', 'live histogram', 'live strip'))
    assert counted or re.search('5,000 of 20,000 rows drawn|20,000 samples in 380 columns|through some of the points', said(chart))


def test_a_thinned_chart_says_so():
    spec = score_by_length(frame(6000), MID).to_dict()
    assert '5,000 of 6,000 rows drawn' in said(score_by_length(frame(6000), MID))
    assert max(map(len, spec['datasets'].values())) == 5000
    assert 'drawn' not in said(score_by_length(frame(5000), MID))


def test_thinning_keeps_the_flagged_and_is_the_same_each_time():
    flagged = np.arange(50_000) % 50 == 0
    pick = thin_out(flagged)
    assert flagged[pick].sum() == 1000 and len(pick) == len(set(pick)) == 5000
    assert (pick == thin_out(flagged)).all()
    assert thin_out(np.ones(9000, bool), 100).size == 100


@pytest.mark.parametrize('draw', [PER_ROW[k] for k in ('by length', 'strip', 'against loss')])
def test_a_thinned_chart_keeps_every_flagged_row(draw):
    f = frame(30_000); f['score'] *= .5; f.loc[::300, 'score'] = .9
    assert (having(draw(f, MID), 'score', 'side')['side'] == 'dropped').sum() == 100


def test_the_stored_table_measures_every_chart_of_rows():
    table = pd.read_csv(ROOT/'benchmarks/results/charts.csv').set_index('chart')
    takes_rows = {n for n, f in inspect.getmembers(charts, inspect.isfunction) if n in charts.__all__ and re.match('score_|sample_|layer_map|live_|spectra|precision|roc', n)}
    assert takes_rows <= set(table.index) and (table['rows'] == 100_000).all()
    assert (table['worst_ms'] < 2000).all() and (table.loc[[i for i in table.index if 'update' in i], 'worst_ms'] < 200).all()


def test_the_benchmark_runs_small():
    sys.path.insert(0, str(ROOT))
    from benchmarks import charts as bench
    made = bench.frames(600)
    lines = [bench.measure(n, make, 600, 1) for n, make in bench.drawings(*made).items()] + [bench.measure_update(n, make, 600, 1) for n, make in bench.updates(*made).items()]
    assert all(0 < x['drawn'] <= 5200 and x['spec_kB'] > 0 for x in lines)


# ---- odd frames

ODD = {'no row': [], 'one': [.5], 'two': [.2, .9], 'equal': [.5]*40, 'missing': [np.nan]*3, 'infinite': [np.inf, -np.inf], 'mixed': [.1, np.nan, .7, np.inf, .2, -np.inf],
       'huge': [0., 1e300, -1e300], 'tiny': [1e-300, 2e-300, 3e-9], 'many': list(np.random.default_rng(1).random(300))}


@every_chart
@pytest.mark.parametrize('cut', [NONE, MID, Cut(-1e9, 'calibrated', '', dict(fpr=.01, n=200))], ids=['none', 'inside', 'far below'])
@pytest.mark.parametrize('x', ODD.values(), ids=ODD)
def test_an_odd_frame_gives_a_valid_chart(draw, cut, x):
    f = frame(len(x)).assign(score=np.array(x, float))
    chart = draw(f, cut)
    assert 'NaN' not in json.dumps(chart.to_dict())
    svg = chart_svg(chart)
    if 'params' in chart.to_dict(): svg = re.sub('aria-label="[^"]*"', '', svg)      # Vega words the axis of a live chart without data as 'from NaN to NaN'
    assert svg.startswith('<svg') and 'NaN' not in svg and 'Infinity' not in svg


@every_chart
def test_other_columns_may_be_odd(draw):
    f = frame(8).assign(loss=[0, np.nan, np.inf, -np.inf, 1e300, -1., 5, 5], tokens=[0, 0, 1, 1, 2, 400, 1, 1], x=np.nan, y=[np.inf]*8)
    assert chart_svg(draw(f, MID)).startswith('<svg')


def test_frames_of_any_index_are_drawn_alike():
    f = frame(60); g = f.set_index(pd.Index([7]*60))
    numbered = lambda chart: re.sub(r'view_\d+', 'view', json.dumps(chart.to_dict()))     # Altair 5 counts views over charts
    for name, draw in PER_ROW.items(): assert numbered(draw(f, MID)) == numbered(draw(g, MID)), name


def test_a_chart_changes_nothing():
    f = frame(60); before = f.copy()
    for draw in PER_ROW.values(): draw(f, MID)
    pd.testing.assert_frame_equal(f, before)


@every_chart
def test_axes_have_titles_and_units(draw):
    spec = json.dumps(draw(frame(60), MID).to_dict())
    titles = re.findall(r'"title": "([^"]+)", "type": "quantitative"|"title": "([^"]+)"', spec)
    assert any(re.search('entropy|%', a+b) for a, b in titles), titles


# ---- the histogram

@pytest.mark.parametrize('cut', [-3., 0., .25, .5, 1., 1.5, 1e9, None])
@pytest.mark.parametrize('x', [[.5], [0., 1.], [.5]*7, [.25, .5, .75, 1.], [0., 1e-300], [-1e300, 1e300]])
def test_every_score_is_in_a_bin_of_its_side(x, cut):
    x = np.array(x)
    bins = histogram_bins(x, cut)
    assert bins['rows'].sum() == len(x) and len(bins) <= 160
    if cut is not None: assert bins['rows'][bins.side == 'dropped'].sum() == (x > cut).sum()


def test_the_curve_is_the_published_density():
    from scipy.stats import gaussian_kde
    x = np.r_[np.random.default_rng(2).normal(40, 8, 700), np.random.default_rng(3).normal(90, 5, 200)]
    bins = histogram_bins(x, 70.)
    exact = gaussian_kde(x, 1.06*x.std()*len(x)**-.2/x.std(ddof=1))(bins['middle'])*len(x)*(bins['stop']-bins['start'])
    np.testing.assert_allclose(bins['curve'], exact, rtol=.01, atol=.05)


def test_peaks_and_valley_are_drawn_on_the_curve_and_named():
    rng = np.random.default_rng(4)
    f = pd.DataFrame(dict(score=np.r_[rng.normal(.3, .05, 400), rng.normal(.8, .03, 100)]))
    for found in (valley(f['score']), paper_valley(f['score'])):
        chart = score_histogram(f, found, 'entropy')
        marks = having(chart, 'kind')
        assert sorted(marks['kind']) == ['peak', 'peak', 'valley']
        np.testing.assert_allclose(marks.loc[marks['kind'] == 'peak', 'x'], found.detail['peaks'])
        assert marks.loc[marks['kind'] == 'valley', 'x'].item() == found.detail['valley'] == found.value
        bins = having(chart, 'middle', 'curve').drop_duplicates('middle')
        np.testing.assert_allclose(marks['y'], np.interp(marks['x'], bins['middle'], bins['curve']))
        a, b = (f'{p:.3g}' for p in found.detail['peaks'])
        assert f'peaks at {a} and {b}' in said(chart) and f'valley at {found.value:.3g}' in said(chart) and 'kernel density' in said(chart)


def test_the_title_says_how_a_cut_was_found():
    rng = np.random.default_rng(5); f = pd.DataFrame(dict(score=rng.normal(.4, .05, 400)))
    assert 'published constant' in said(score_histogram(f, paper_valley(f['score'])))
    assert 'Calibrated on 400 known-clean rows so that at most 1 %' in said(score_histogram(f, calibrated(f['score'], f['score'], .01)))
    assert 'set by hand' in said(score_histogram(f, fixed(f['score'], .5)))
    none = valley(f['score']); assert not none.separated
    assert 'No separation' in said(score_histogram(f, none)) and 'no separation' in chart_svg(score_histogram(f, none))


@pytest.mark.parametrize('detail', [{}, {'peaks': [.2, .8], 'valley': .5}, {'peaks': [], 'valley': None}, {'peaks': np.array([.2, .8])}, {'peaks': 'far', 'valley': [[.5]]},
                                    {'peaks': np.array([.2]), 'valley': float('nan')}, {'peaks': [{'at': .2}]}, {'peaks': [np.float32(.25), 9, -4]}])
def test_any_detail_of_a_cut_can_be_drawn(detail):
    assert chart_svg(score_histogram(frame(50), Cut(.5, 'valley', '', detail))).startswith('<svg')


def test_no_separation_is_written_on_the_chart():
    assert 'no separation' in chart_svg(score_histogram(frame(50), NONE))
    assert 'no separation' not in chart_svg(score_histogram(frame(50), MID))


# ---- numbers

@pytest.mark.parametrize('k', [4, 16])
def test_the_bound_is_the_most_an_answer_can_have(k):
    from gradsentry_nb.spectrum import entropy_bound
    line = having(score_by_length(frame(300), MID, 'entropy', k=k), 'T', 'most')
    assert len(line) > 20 and k in set(line['T'])
    np.testing.assert_allclose(line['most'], np.log(np.minimum(line['T'], k))/np.log(k), atol=1e-12)
    assert line.loc[line['T'] == k, 'most'].item() == entropy_bound(k, k) == 1
    assert not len(having(score_by_length(frame(300), MID, 'log_volume'), 'T', 'most'))


def test_small_scores_are_not_rounded_away():
    f = frame(30); f['score'] *= 1e-9
    for name in ('by length', 'strip', 'against loss'): assert having(PER_ROW[name](f, NONE), 'score', 'side')['score'].nunique() > 20, name


def test_the_strip_is_in_scan_order_and_counts_rows_without_a_score():
    f = frame(400).sample(frac=1, random_state=0); f.loc[f['row'] % 50 == 3, 'score'] = np.nan
    chart = score_strip(f, MID)
    points, crosses = having(chart, 'row', 'score'), [r for r in values(chart) if set(r) == {'row'}]
    assert (points['row'].diff().dropna() > 0).all() and len(points) == 392
    assert [r['row'] for r in crosses] == list(range(3, 400, 50)) and '8 rows without a score' in said(chart)
    np.testing.assert_allclose(points['score'], f.sort_values('row')['score'].dropna(), rtol=1e-4)
    assert set(points.loc[points['side'] == 'dropped', 'row']) == set(f.loc[f['score'] > .5, 'row'])


def test_many_unscored_rows_are_thinned_and_counted():
    f = frame(9000); f.loc[:6999, 'score'] = np.nan
    chart = score_strip(f, MID)
    assert '7,000 rows without a score, 500 of them drawn' in said(chart) and sum(set(r) == {'row'} for r in values(chart)) == 500


def test_rank_correlation_is_of_all_rows():
    from scipy.stats import spearmanr
    f = frame(20_000); f['loss'] = np.round(f['score']+f['loss'], 1); f.loc[:99, 'loss'] = np.nan
    assert f'Rank correlation {spearmanr(f["loss"][100:], f["score"][100:])[0]:.2f} over 19,900 rows' in said(score_against(f, 'loss', MID))
    assert '100 rows without both numbers' in said(score_against(f, 'loss', MID))
    assert 'constant' in said(score_against(f.assign(loss=1.), 'loss'))


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(SettingError, match="no column 'los'.*'loss'"): score_against(frame(3), 'los')
    assert 'Nothing to draw' in said(score_against(frame(3).assign(word='x'), 'word'))
    assert score_against(frame(3).assign(n=['1', '2', 'x']), 'n').to_dict()


def test_spectra_show_shares_and_the_published_entropy():
    import torch

    from gradsentry_nb.spectrum import spectral_entropy
    rng = np.random.default_rng(6)
    s = {'long': rng.gamma(1, 1, 40), 'short': rng.gamma(1, 1, 5), 'one': np.array([3.])}
    d = having(spectra(s), 'name', 'share').drop_duplicates(['name', 'rank'])
    for name, x in s.items():
        x = np.sort(x)[::-1]
        drawn = d[d['name'].str.startswith(name)].sort_values('rank')
        np.testing.assert_allclose(drawn['share'], x/x.sum(), rtol=1e-4)
        assert drawn['name'].iloc[0].endswith(f'{spectral_entropy(torch.tensor(x.copy())).item():.3f}')
    assert having(spectra(s, 7), 'text')['rank'].unique() == 7.5
    assert 'all of them count' in said(spectra({'short': s['short']})) and not len(having(spectra({'short': s['short']}), 'text'))
    with pytest.raises(SettingError, match='at least 2'): spectra(s, 1)


def test_spectra_of_a_frame_and_of_odd_values():
    s = {'a': np.array([3., 2, 1]), 'b': np.array([1.])}
    assert spectra(pd.DataFrame({k: pd.Series(v) for k, v in s.items()})).to_dict() == spectra(s).to_dict()
    for odd in ({}, {'a': []}, {'a': [0., 0.]}, {'a': [np.nan, np.inf]}): assert 'Nothing to draw' in said(spectra(odd))
    many = spectra({i: [1., .5] for i in range(1000)})
    assert '10 of 1,000 spectra drawn' in said(many) and having(many, 'name')['name'].nunique() == 10
    assert chart_svg(spectra({'a': np.geomspace(1, 1e-15, 5000)})).startswith('<svg')


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0., 1., 2., 3., np.nan, np.inf]), st.booleans()), min_size=2, max_size=40))
def test_areas_are_those_of_scikit_learn(rows):
    from sklearn.metrics import average_precision_score, roc_auc_score
    score, y = np.array([s for s, _ in rows]), np.array([p for _, p in rows])
    f, ranked = pd.DataFrame(dict(score=score)), np.where(np.isfinite(score), score, -1)
    if y.all() or not y.any(): assert 'Nothing to draw' in said(roc(f, y)); return
    assert abs(area(precision_recall(f, y)) - average_precision_score(y, ranked)) < 6e-4
    assert abs(area(roc(f, y)) - roc_auc_score(y, ranked)) < 6e-4


def area(chart): return float(re.search(r'(?:precision|curve): score ([\d.]+)', said(chart))[1])


@pytest.mark.parametrize('draw', [precision_recall, roc])
def test_the_curve_goes_through_the_numbers_of_every_cut(draw):
    f, y = frame(9000), truth(frame(9000)); f['score'] += .3*y; f.loc[::100, 'score'] = np.nan
    chart = draw(f, y, Cut(.8, 'fixed', ''))
    curve = having(chart, 'at').sort_values('at')
    dropped = f['score'].to_numpy() > .8
    recall, precision, fpr = (100*x for x in ((dropped & y).sum()/y.sum(), (dropped & y).sum()/dropped.sum(), (dropped & ~y).sum()/(~y).sum()))
    point = having(chart, 'text').iloc[0]
    np.testing.assert_allclose(point[['x', 'y']].astype(float), (recall, precision) if draw is precision_recall else (fpr, recall))
    for value in np.nanquantile(f['score'], [.1, .5, .9]):                       # near every cut there is a drawn point
        d = f['score'].to_numpy() > value
        r, p, q = 100*(d & y).sum()/y.sum(), 100*(d & y).sum()/d.sum(), 100*(d & ~y).sum()/(~y).sum()
        near = np.abs(curve[['x', 'y']].to_numpy() - ((r, p) if draw is precision_recall else (q, r))).sum(1).min()
        assert near < 1
    assert len(curve) <= 410 and curve['x'].iloc[-1] == 100


def test_the_drawn_steps_enclose_the_area_in_the_title():
    f, y = frame(150), truth(frame(150))
    c = having(precision_recall(f, y), 'at').sort_values('at')
    assert abs((np.diff(c['x'])*c['y'][1:]).sum()/1e4 - area(precision_recall(f, y))) < 6e-4
    c = having(roc(f, y), 'at').sort_values('at')
    assert abs(np.trapezoid(c['y'], c['x'])/1e4 - area(roc(f, y))) < 6e-4


def test_truth_must_fit_the_frame():
    with pytest.raises(SettingError, match='3 values for 4 rows'): roc(frame(4), [True, False, True])
    with pytest.raises(SettingError, match='something else'): precision_recall(frame(2), [0, 2])
    with pytest.raises(SettingError, match='something else'): precision_recall(frame(2), [None, True])
    assert roc(frame(4), [1, 0, 1, 0]).to_dict() == roc(frame(4), np.array([True, False, True, False])).to_dict()
    with pytest.raises(SettingError, match='no column'): roc(frame(4), [1, 0, 1, 0], columns=('scroe',))


def test_charts_know_no_truth():
    source = (ROOT/'gradsentry_nb/charts.py').read_text()
    assert 'evaluate' not in source and 'poisoned' not in source


def test_layer_columns_are_means_of_ordered_samples():
    rng = np.random.default_rng(7); f = pd.DataFrame(dict(layer=np.repeat(['a', 'b'], 1000), row=np.tile(rng.permutation(1000), 2), value=rng.random(2000)))
    f.loc[::17, 'value'] = np.nan
    got = layer_bins(f, most=300).set_index(['layer', 'start'])
    mean = f.groupby('row')['value'].mean()
    order = mean.loc[pd.unique(f['row'])].argsort(kind='stable').to_numpy()
    rank = pd.Series(np.argsort(order), pd.unique(f['row']))
    column = f['row'].map(rank)*300//1000
    start = column.map(f['row'].map(rank).groupby(column).min())
    want = f.assign(start=start).groupby(['layer', 'start'])['value'].mean().dropna()
    np.testing.assert_allclose(got['value'].sort_index(), want.sort_index())
    assert (got['stop'] > got.index.get_level_values('start')).all() and got['stop'].max() == 1000
    assert len(got.index.get_level_values('start').unique()) == 300


def test_layers_are_ordered_as_asked():
    f = pd.DataFrame(dict(layer='a', row=[5, 6, 7], value=[3., 1., 2.], score=[.1, .3, .2]))
    assert [list(layer_bins(f, o)['value']) for o in ('mean', 'row', 'score')] == [[1, 2, 3], [3, 1, 2], [3, 2, 1]]
    with pytest.raises(SettingError, match="no order 'scroe'.*'score'"): layer_map(f, order='scroe')
    assert '20,000 samples in 380 columns, each the mean of up to 53' in said(layer_map(f.loc[[0]*20_000].assign(row=range(20_000))))


def test_layer_names_lose_what_they_share():
    f = pd.DataFrame(dict(layer=['model.layers.1.q', 'model.layers.2.q', 'model.layers.2.'+'k'*80], row=0, value=1.))
    names = having(layer_map(f), 'layer')['layer']
    assert list(names[:2]) == ['1.q', '2.q'] and len(names[2]) == 24 and 'begin with model.layers.' in said(layer_map(f))


# ---- hostile text

NASTY = '<script>alert(1)</script><img src=x onerror=alert(1)>\u202e\u200b\x1b[31m'


def test_text_in_a_chart_is_escaped():
    svg = chart_svg(score_histogram(frame(50), MID, '<script>x</script>'))
    assert '<script' not in svg and '&lt;script' in svg


@pytest.mark.parametrize('chart', [
    lambda: score_histogram(frame(50), MID, NASTY), lambda: score_strip(frame(50), MID, NASTY), lambda: live_histogram(None, NASTY),
    lambda: score_against(frame(50).assign(**{NASTY: range(50)}), NASTY, MID), lambda: spectra({NASTY: [1., 2.], NASTY+'2': [1.]}),
    lambda: sample_map(frame(50).assign(prompt=NASTY, **{NASTY: NASTY}), MID, NASTY), lambda: roc(frame(50).assign(**{NASTY: 1.}), truth(frame(50)), MID, ('score', NASTY)),
    lambda: layer_map(layered(frame(50)).replace({'layer': {'model.layers.1': NASTY}}), NASTY)])
def test_hostile_text_is_visible_and_does_nothing(chart):
    made = chart(); spec, svg = json.dumps(made.to_dict(), ensure_ascii=False), chart_svg(made)
    assert '<script' not in svg and '<img' not in svg
    assert not any(c in spec+svg for c in '\u202e\u200b\x1b')


def test_a_tooltip_has_no_field_that_a_viewer_would_load():
    f = frame(5).assign(image='http://example.org/x.png', Title='t', prompt='a\u200b'*4000)
    spec = sample_map(f).to_dict()
    titles = [t['title'] for layer in spec['layer'] for t in layer['encoding']['tooltip'] if 'title' in t]
    assert {'image:', 'Title:', 'prompt'} <= set(titles) and not {'image', 'title'} & {t.lower() for t in titles}
    assert max(len(r['t2']) for r in values(sample_map(f)) if 't2' in r) == 80
    with pytest.raises(SettingError, match='no column'): sample_map(f, texts=('promt',))


# ---- live charts

def test_live_charts_can_take_each_others_place():
    specs = [c.to_dict() for c in (live_histogram(), live_strip(cut=MID), live_histogram(cut=.3), live_strip(cut=NONE))]
    shape = lambda s: sorted((p['name'], p.get('select', {}).get('type'), p.get('select', {}).get('encodings') and tuple(p['select']['encodings'])) for p in s['params'])
    assert all(shape(s) == [('brush', 'interval', ('x',)), ('cut', None, None), ('shown', None, None)] for s in specs)
    assert [s['data']['name'] for s in specs] == ['bins', 'rows', 'bins', 'rows']
    assert [next(p['value'] for p in s['params'] if p['name'] == 'cut') for s in specs] == [FAR, .5, .3, FAR]


def test_an_update_is_plain_json():
    rows = strip_rows(frame(5).assign(score=[.1, np.nan, np.inf, .2, .3]))
    assert json.loads(json.dumps(data_update('rows', rows), allow_nan=False))[0]['value'] == as_values(rows)
    assert [r['score'] for r in as_values(rows)] == [.1, None, None, .2, .3]
    assert json.dumps(as_values(histogram_bins(np.ones(4))), allow_nan=False)


PAGE = '''async ({esm, state}) => {
  const {default: widget} = await import(URL.createObjectURL(new Blob([esm], {type: 'text/javascript'})));
  const on = {}, el = document.body.appendChild(document.createElement('div'));
  const model = window.model = {state, get: k => state[k], set: (k, v) => { state[k] = v }, save_changes: () => {}, on: (e, f) => (on[e] ??= []).push(f), off: () => {},
    send: async (k, v) => { state[k] = v; for (const f of on['change:'+k] ?? []) await f({changed: {[k]: v}}) }};
  await widget.render({model, el});
}'''


@pytest.fixture(scope='module')
def page():
    "An empty page of a browser without a network."
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium: pytest.skip('needs Chromium')
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, headless=True, args=['--no-sandbox', '--disable-gpu'])
        made = browser.new_page(viewport=dict(width=700, height=600)); made.problems = []
        made.on('pageerror', lambda e: made.problems.append(str(e))); made.on('requestfailed', lambda r: made.problems.append(r.url))
        made.on('console', lambda m: m.type == 'error' and made.problems.append(m.text))
        yield made
        browser.close()


@pytest.fixture(scope='module')
def offline():
    import altair as alt
    alt.JupyterChart.enable_offline()
    yield alt.JupyterChart
    alt.JupyterChart.enable_offline(False)


def show(page, widget):
    "Draw a JupyterChart with its own script, and this page in the place of a notebook."
    page.evaluate('document.body.replaceChildren()')
    state = {k: getattr(widget, k) for k in ('spec', 'debounce_wait', 'max_wait', 'embed_options', '_vl_selections', '_params')}
    page.evaluate(PAGE, dict(esm=widget._esm, state=state))
    page.wait_for_selector('.vega-embed svg.marks', state='attached')


def widths(page, color):
    "Summed width of the bars of one colour, in pixels."
    return page.evaluate('''c => [...document.querySelectorAll('.mark-rect.role-mark path')].filter(p => p.getAttribute('fill') == c)
        .map(p => p.getBBox().width).reduce((a, b) => a+b, 0)''', color)


def marks(page):
    "How many bars and points there are; the brush is neither."
    return page.evaluate("""c => [...document.querySelectorAll('.mark-rect.role-mark path, .mark-symbol.role-mark path')].filter(p => c.includes(p.getAttribute('fill'))).length""",
                         [charts.KEPT, charts.DROPPED])


def rule(page): return page.evaluate("document.querySelector('.mark-rule.role-mark line')?.getAttribute('transform') ?? ''")


def text(page): return page.evaluate("[...document.querySelectorAll('.mark-text.role-mark text')].map(t => t.textContent).join('|')")


def test_a_live_histogram_follows_cut_and_data(page, offline):
    x = np.random.default_rng(8).random(2000)
    show(page, offline(live_histogram(histogram_bins(x), 'entropy', .5)))
    kept, dropped, at = widths(page, charts.KEPT), widths(page, charts.DROPPED), rule(page)
    assert abs(kept-dropped) < 20 and text(page) == 'cut 0.5'
    page.evaluate("model.send('_params', {cut: 0.75})")
    assert abs(widths(page, charts.KEPT)/widths(page, charts.DROPPED)-3) < .3 and rule(page) != at and text(page) == 'cut 0.75'
    page.evaluate(f"model.send('_params', {{cut: {FAR}}})")
    assert widths(page, charts.DROPPED) == 0 and rule(page) == '' and text(page) == 'no cut'
    page.evaluate("model.send('_params', {cut: 1.5})")
    assert text(page) == 'cut 1.5, above all' and rule(page) == ''
    few = histogram_bins(x*1000, bins=20)
    page.evaluate("u => model.send('_py_to_js_updates', u)", data_update('bins', few))
    assert marks(page) == len(few)+1 and '800' in page.evaluate("document.querySelector('.mark-text.role-axis-label').textContent")
    assert page.problems == []


def test_a_live_chart_may_start_empty(page, offline):
    for chart, name, data in ((live_histogram(), 'bins', histogram_bins(np.arange(50.))), (live_strip(), 'rows', strip_rows(frame(50)))):
        show(page, offline(chart))
        assert marks(page) == 0
        page.evaluate("u => model.send('_py_to_js_updates', u)", data_update(name, data))
        assert marks(page) == len(data)
    assert page.problems == []


@pytest.mark.parametrize('chart, field', [(lambda: live_histogram(histogram_bins(np.linspace(0, 1, 500)), 'entropy', .5), 'start'), (lambda: live_strip(strip_rows(frame(500)), 'entropy', .5), 'row')])
def test_a_brush_selects_a_range(page, offline, chart, field):
    show(page, offline(chart()))
    box = page.locator('.vega-embed svg.marks .background').first.bounding_box()
    page.mouse.move(box['x']+box['width']*.25, box['y']+box['height']*.5); page.mouse.down()
    page.mouse.move(box['x']+box['width']*.75, box['y']+box['height']*.6, steps=5); page.mouse.up()
    top = 1 if field == 'start' else 500
    page.wait_for_function(f"model.get('_vl_selections').brush?.value?.{field}?.[1] > {.7*top}")          # the last of a stream of values
    lo, hi = page.evaluate(f"model.get('_vl_selections').brush.value.{field}")
    assert abs(lo/top-.25) < .05 and abs(hi/top-.75) < .05 and page.problems == []


def test_live_scatters_sample_name_and_brush_both_sides():
    from gradsentry_nb.charts import live_against, live_map, scatter_rows
    rng = np.random.default_rng(0)
    f = pd.DataFrame(dict(row=range(5000), score=rng.normal(size=5000), tokens=rng.integers(1, 200, 5000), x=rng.normal(size=5000), y=rng.normal(size=5000)))
    f.loc[:9, 'score'] = np.nan
    flagged = (f['score'] > 2).to_numpy()
    rows, n = scatter_rows(f, 'tokens', 'score', flagged, 400)
    assert n == 4990 and len(rows) == 400 and set(f['row'][flagged]) <= set(rows['row']), 'all dropped rows among them'
    assert scatter_rows(f, 'x', 'y', flagged)[1] == 5000
    specs = [live_against(rows, 'tokens', 'entropy', 2., 'some').to_dict(), live_map(scatter_rows(f, 'x', 'y', flagged)[0], 'entropy', None).to_dict()]
    for s in specs:
        assert sorted(p['name'] for p in s['params']) == ['brush', 'cut', 'shown'] and next(p for p in s['params'] if p['name'] == 'brush')['select']['encodings'] == ['x', 'y']
        assert s['data']['name'] == 'points' and any(layer.get('data', {}).get('name') == 'picked' for layer in s['layer'])
    assert len(specs[0]['layer']) == len(live_against(rows, 'tokens', 'loss', 2.).to_dict()['layer'])+1, 'the bound of the entropy'
    assert 'Nothing to draw' in str(live_against(rows[:0], 'tokens').to_dict()['title']) and 'Nothing to draw' in str(live_map(rows[:0]).to_dict()['title'])


def test_the_strip_rings_rows_and_says_when_there_is_no_cut_yet():
    f = pd.DataFrame(dict(row=range(40), score=np.linspace(0, 1, 40)))
    assert len(score_strip(f, MID, picked=[3, 5]).to_dict()['layer']) == len(score_strip(f, MID).to_dict()['layer'])+1
    assert score_strip(f, Cut(None, 'uncut', '')).to_dict()['title']['text'] == 'Not cut yet'
