"Live views without a browser: the state behind them, scans in a thread, what is written into a page."
import os
import re
import subprocess
import sys
import threading
import time
from functools import cache

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsentry_nb.board import COLUMNS, METHODS, NUMBERS, Board, LiveScan
from gradsentry_nb.core import DataError, SettingError
from gradsentry_nb.data import load_samples
from gradsentry_nb.demo import demo_model, demo_samples
from gradsentry_nb.evaluate import evaluate
from gradsentry_nb.sentry import Sentry
from gradsentry_nb.widgets import RowTable, dashboard, late_front_ends, reload_note, renderer, view


@cache
def demo(): return Sentry(*demo_model(), name='demo'), *demo_samples(400, seed=5)


@cache
def verdict(): return demo()[0].filter(demo()[1], progress=False)


def board(): return Board(verdict().scores.frame, demo()[1], verdict().scores.info, verdict().cut)
def shown(**kw): return view(verdict(), demo()[1], demo()[0], renderer='plain', **kw)


HOSTILE = ['<script>alert(1)</script>', '<img src=x onerror=alert(1)>', '[link](javascript:alert(1))', '\x1b[31mred\x1b[0m', 'abc\u202edcba', 'zero\u200bwidth', '😀'*50, 'שלום עולם', 'x'*100_000,
           '<svg onload=alert(1)>', '"><b onmouseover=alert(1)>', '\ud800 lone', '</div></details>', '${alert(1)}', '{{7*7}}']


# ---- a scan in a thread

def test_a_live_scan_gives_what_score_gives():
    sentry, samples, _ = demo()
    seen = []
    live = LiveScan(sentry, samples, lambda s: seen.append((s.state, len(s.scan))), every=0).start().wait()
    whole = sentry.score(samples, progress=False).frame
    assert live.state == 'done' and seen[0][0] == 'running' and seen[-1] == ('done', 400) and [n for _, n in seen] == sorted(n for _, n in seen)
    for c in NUMBERS: np.testing.assert_allclose(live.numbers[c], whole[c], rtol=1e-9, equal_nan=True)
    pd.testing.assert_frame_equal(live.scan.scores().frame, whole, rtol=1e-9)


def test_pause_resume_stop():
    sentry, samples, _ = demo()
    held = threading.Event()
    def tell(s):
        if len(s.scan) > 20 and not held.is_set(): s.pause(); held.set()
    live = LiveScan(sentry, samples, tell, every=0).start()
    assert held.wait(60) and live.state == 'paused'
    time.sleep(.3); n = len(live.scan); time.sleep(.3)
    assert len(live.scan) == n < 400, 'nothing is scored while it is held'
    live.start()
    assert live.wait(60).state == 'done' and len(live.scan) == 400


def test_stop_keeps_what_is_done():
    sentry, samples, _ = demo()
    live = LiveScan(sentry, samples, lambda s: s.stop() if len(s.scan) else None, every=0).start().wait(60)
    assert live.state == 'stopped' and 0 < len(live.scan) < 400
    part = live.scan.partial()
    whole = sentry.score(samples, progress=False).frame.set_index('id')
    np.testing.assert_allclose(part.frame['log_volume'], whole.loc[part.frame['id'], 'log_volume'], rtol=1e-9)
    assert part.info['interrupted']
    assert LiveScan(sentry, samples).start().wait(60).state == 'done', 'the model can be scanned again'


def test_stop_before_the_start_and_while_held():
    sentry, samples, _ = demo()
    live = LiveScan(sentry, samples); live.stop()
    assert live.state == 'stopped'
    live = LiveScan(sentry, samples, lambda s: s.pause() if s.state == 'running' else None, every=0).start()
    while live.state != 'paused': time.sleep(.01)
    live.stop(wait=True)
    assert live.state == 'stopped'


def test_a_second_scan_of_the_same_model_stops_the_first():
    sentry, samples, _ = demo()
    first = LiveScan(sentry, samples, lambda s: s.pause(), every=0).start()
    while first.state != 'paused': time.sleep(.01)
    second = LiveScan(sentry, samples).start()
    assert first.state == 'stopped' and second.wait(60).state == 'done'


def test_a_scan_that_fails_says_where(monkeypatch):
    from gradsentry_nb import sentry as module
    sentry, samples, _ = demo()
    real, n = module._roots, [0]
    def roots(f, s):
        n[0] += 1
        if n[0] > 50: raise RuntimeError('out of paper')
        return real(f, s)
    monkeypatch.setattr(module, '_roots', roots)
    d = dashboard(sentry, samples, renderer='plain'); d.live.wait(60)
    assert d.live.state == 'failed' and 'RuntimeError: out of paper' in d.status.value and re.search(r'the batch of rows \d+, \d+', d.status.value)
    assert np.isfinite(d.board.score).sum() == 50 and not d.go.disabled


def test_the_mode_of_the_model_is_left_alone():
    sentry, samples, _ = demo()
    sentry.model.train()
    try: LiveScan(sentry, samples, lambda s: s.stop(), every=0).start().wait(60); assert sentry.model.training
    finally: sentry.model.eval()


def test_a_process_may_end_under_a_scan_and_a_drawing():
    code = """
from gradsentry_nb.demo import demo_model, demo_samples
from gradsentry_nb.sentry import Sentry
from gradsentry_nb.widgets import dashboard
samples, truth = demo_samples(600, seed=1)
d = dashboard(Sentry(*demo_model()), samples, renderer='plain')
while len(d.live.scan) < 5: pass
d.pictures.cut()
print('end')
"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert p.returncode == 0 and p.stdout == 'end\n' and 'terminate' not in p.stderr, p.stderr


# ---- the state of a view

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(COLUMNS)), st.booleans(), st.sampled_from(['all', 'dropped', 'kept', 'selected', 'marked']), st.sampled_from(['', 'the', 'CLICK', 'no such text', '.']), st.integers(1, 40))
def test_pages_are_the_sorted_and_searched_rows(sort, down, show, query, size):
    b = board()
    b.selected, b.sort, b.down, b.show, b.query = b.frame['id'][5:60].tolist(), sort, down, show, query
    b.mark('clean', b.frame['id'][10:14].tolist())
    rows, found, pages = b.page_of(size)
    every = []
    for p in range(pages): b.page = p; every += b.page_of(size)[0]
    flagged = verdict().flagged
    text = [s.prompt+'\n'+s.response for s in demo()[1]]
    keep = dict(all=lambda i: True, dropped=lambda i: flagged[i], kept=lambda i: not flagged[i], selected=lambda i: 5 <= i < 60, marked=lambda i: 10 <= i < 14)[show]
    wanted = {b.frame['id'][i] for i in range(400) if keep(i) and query.lower() in text[i].lower()}
    assert {r['id'] for r in every} == wanted and len(every) == found == len(wanted)
    value = {id: getattr(s, sort) if sort in ('prompt', 'response') else b.marks.get(id) if sort == 'mark' else b.frame[sort][b.at[id]] for id, s in zip(b.frame['id'], demo()[1])}
    known = [value[r['id']] for r in every if value[r['id']] is not None and value[r['id']] == value[r['id']]]
    assert known == sorted(known, reverse=down)


def test_a_page_beyond_the_last_is_the_last():
    b = board(); b.page = 10**6
    rows, found, pages = b.page_of(12)
    assert rows and b.page == pages-1 == -(-found//12)-1


def test_regular_expressions():
    b = board(); b.query, b.regex = r'click on|<malicious', True
    assert b.page_of()[1] == sum(bool(re.search(r'click on|<malicious', s.prompt+'\n'+s.response, re.I)) for s in demo()[1]) > 0
    b.query = '[a'
    with pytest.raises(SettingError, match='no regular expression'): b.page_of()
    b.regex = False
    assert b.page_of()[1] == 0


@pytest.mark.parametrize('method', ['valley', 'paper'])
def test_cuts_are_those_of_the_library(method):
    from gradsentry_nb.threshold import find_cut
    b = board()
    for c in ('entropy', 'log_volume', 'loss'):
        b.use(c); b.recut(method)
        assert b.cut == find_cut(verdict().scores.frame[c].to_numpy(float), method)
        assert b.verdict.scores.info['statistic'] == c and b.verdict.drop == b.frame['id'][b.flagged].tolist()


def test_calibrating_needs_clean_rows_and_says_when_they_are_no_sample():
    b, keep = board(), [i for i in verdict().keep]
    with pytest.raises(SettingError, match='known to be clean'): b.recut('calibrated')
    b.fpr = .1
    drawn = b.draw(60)
    assert len(drawn) == len(set(drawn)) == 60 and set(b.draw(60)).isdisjoint(drawn)
    b.mark('clean', [i for i in drawn if i in keep])
    assert 'not guaranteed' not in b.recut('calibrated').reason
    b.mark('clean', [i for i in keep if i not in b.sampled][:1])
    assert 'not guaranteed' in b.recut('calibrated').reason
    assert 'p_value' in b.verdict.scores.frame


def test_marks_survive_another_score():
    b = board(); b.mark('poison', verdict().drop[:3]); b.use('loss')
    assert b.marks == dict.fromkeys(verdict().drop[:3], 'poison') and b.verdict.scores.frame['mark'].notna().sum() == 3
    b.mark(None, verdict().drop[:1])
    assert len(b.marks) == 2
    with pytest.raises(DataError): b.mark('clean', ['no such id'])
    with pytest.raises(SettingError): b.mark('dirty', [])


def test_the_view_leaves_the_verdict_alone():
    v = verdict()
    before = v.scores.frame.copy(), dict(v.scores.info), v.cut
    w = shown(); w.statistic.value = 'loss'; w.slider.value = 0; w.board.mark('clean', v.keep[:2])
    assert v.scores.frame.equals(before[0]) and v.scores.info == before[1] and v.cut == before[2]


# ---- controls

def test_the_slider_is_the_cut():
    w = shown(truth=demo()[2])
    x = w.board.score[np.isfinite(w.board.score)]
    for at in (100, 420, 800):
        w.slider.value = at
        assert len(w.verdict.drop) == (x > w.verdict.cut.value).sum() and w.method.value == 'by hand' and w.at.value == pytest.approx(w.verdict.cut.value, rel=1e-5)
        e = evaluate(w.verdict, demo()[2])
        assert f'{e.recall:.3f}' in w.counts.value and f'{e.precision:.3f}' in w.counts.value and f'<b>{len(w.verdict.drop):,}</b>' in w.counts.value
    w.slider.value = w.slider.max
    assert not w.verdict.drop and 'above all rows' in w.head.value
    w.at.value = float(np.quantile(x, .75))
    assert len(w.verdict.drop) == 100 and w.verdict.cut.value == pytest.approx(w.at.value, rel=1e-5)
    w.method.value = 'valley'
    assert w.verdict.drop == verdict().drop and w.verdict.cut.value == pytest.approx(w.at.value, rel=1e-5)
    lo, hi = x.min(), x.max()
    assert abs(w.slider.value/1000 - (w.at.value-lo)/(hi-lo)) < .03


def test_both_ways_of_moving_the_cut_wait_for_a_scan():
    "A control that is moved while the scan's thread refreshes the view is not lost."
    w = shown()
    w.lock.acquire(); w.busy = True
    t = threading.Thread(target=lambda: w.on_at(dict(new=float(np.median(w.board.score))))); t.start()
    time.sleep(.2); w.busy = False; w.lock.release(); t.join(5)
    assert len(w.verdict.drop) == 200


def test_mistakes_become_a_sentence():
    w = shown()
    before = w.board.cut
    w.method.value = 'calibrated'
    assert 'known to be clean' in w.status.value and w.board.cut == before
    w.regex.value = True; w.search.value = '('
    assert 'no regular expression' in w.status.value
    w.search.value = 'the'
    assert not w.status.value
    w.on_mark('clean')
    assert 'Select rows first' in w.status.value


def test_brush_open_mark_and_take_away(tmp_path):
    w = shown()
    lo, hi = np.quantile(w.board.score, [.9, 1])
    w.on_brush(dict(score=(hi, lo)))
    assert set(w.selected) == set(w.board.frame['id'][w.board.score >= lo]) and w.which.value == 'selected'
    w.on_mark('poison')
    assert w.marks == dict.fromkeys(w.selected, 'poison')
    w.on_open([verdict().drop[0]])
    assert 'malicious' in re.sub('<[^>]+>', '', w.detail.value) and w.selected == verdict().drop[:1]
    assert [s.id for s in w.clean] == verdict().keep
    w.folder.value = str(tmp_path/'out'); w.on_write(None)
    assert len((tmp_path/'out/clean.jsonl').read_text().splitlines()) == len(verdict().keep) and 'clean.jsonl' in w.status.value


def test_nearest_rows():
    w = shown()
    w.on_near(None)
    assert 'Open a row' in w.status.value
    w.on_open([verdict().drop[0]]); w.on_near(None)
    assert w.near.value.count('malicious') >= 6 and not w.status.value, 'planted rows lie together'


def test_the_dashboard_ends_in_the_verdict_of_filter():
    sentry, samples, truth = demo()
    d = dashboard(sentry, samples, truth, renderer='plain'); d.live.wait(60)
    assert d.verdict.drop == verdict().drop and d.verdict.cut.value == pytest.approx(verdict().cut.value)
    pd.testing.assert_frame_equal(d.verdict.scores.frame, verdict().scores.frame, rtol=1e-9)
    assert d.verdict.scores.info == verdict().scores.info
    before = d.live.thread
    d.k.value = 8
    assert d.verdict.scores.info['settings']['k'] == 8 and d.live.thread is before, 'another k needs no other scan'
    np.testing.assert_allclose(d.verdict.scores.frame['entropy'], Sentry(*demo_model(), k=8).score(samples, progress=False).frame['entropy'], rtol=1e-9)


def test_known_clean_rows_are_scored_first():
    sentry, samples, _ = demo()
    clean = demo_samples(120, rate=0, seed=9)[0]
    own = Sentry(*demo_model(), threshold='calibrated', fpr=.05)
    d = dashboard(own, samples, known_clean=clean, renderer='plain'); d.live.wait(60)
    wanted = own.filter(samples, clean, progress=False)
    assert d.verdict.cut.value == pytest.approx(wanted.cut.value) and d.verdict.cut.reason == wanted.cut.reason and d.verdict.drop == wanted.drop


def test_a_stopped_dashboard_shows_what_is_done():
    sentry, samples, _ = demo()
    d = dashboard(sentry, samples, renderer='plain', start=False)
    d.live.every, d.live.tell = 0, lambda s: (d.on_rows(s), s.stop())
    d.on_go(None); d.live.wait(60)
    f = d.verdict.scores.frame
    assert d.live.state == 'stopped' and 0 < f['score'].notna().sum() < 400 and f['problem'].str.contains('stopped').sum() == f['score'].isna().sum()
    assert d.verdict.scores.info['interrupted']


# ---- which number is the score, and how it is drawn

def watched(how='plain', **kw):
    d = dashboard(*demo()[:2], truth=demo()[2], renderer=how, **kw); d.live.wait(60)
    return d


@pytest.mark.parametrize('k', [2, 5, 64])
def test_another_k_is_what_a_scan_with_it_gives(k):
    d = watched(); d.statistic.value = 'entropy'; d.k.value = k
    sentry = Sentry(*demo_model(), statistic='entropy', k=k)
    wanted = sentry.filter(demo()[1], progress=False)
    np.testing.assert_allclose(d.board.score, wanted.scores.frame['score'], rtol=1e-9)
    assert d.verdict.drop == wanted.drop and d.verdict.scores.info['settings']['k'] == k


def test_k_can_be_changed_while_the_scan_runs():
    d = dashboard(*demo()[:2], renderer='plain', start=False)
    d.statistic.options = [*d.statistic.options, ('entropy', 'entropy')]
    d.live.every, d.live.tell = 0, lambda s: (d.on_rows(s), setattr(d.k, 'value', 4) if len(s.scan) > 30 else None)
    d.on_go(None); d.live.wait(60)
    np.testing.assert_allclose(d.board.frame['entropy'], Sentry(*demo_model(), k=4).score(demo()[1], progress=False).frame['entropy'], rtol=1e-9)


def test_a_view_of_a_verdict_has_no_k():
    w = shown()
    assert not any(w.k is c for row in w.widget.children for c in getattr(row, 'children', ()))
    with pytest.raises(SettingError, match='scan again'): w.board.use('entropy', k=8)
    for k in (1, 65, 2.5): 
        with pytest.raises(SettingError, match='k must be'): watched().board.use('entropy', k=k)


def test_the_score_for_its_length():
    from gradsentry_nb.threshold import length_trend
    w = shown(); raw = w.board.score
    w.adjusted.value = True
    T = w.board.frame['tokens']
    np.testing.assert_allclose(w.board.score, raw-length_trend(T, raw)(T))
    assert w.verdict.scores.info['length_adjusted'] and 'for its length' in repr(w.board)
    w.adjusted.value = False
    np.testing.assert_array_equal(w.board.score, raw)
    assert 'length_adjusted' not in w.verdict.scores.info and w.verdict.drop == verdict().drop


def test_known_clean_rows_are_adjusted_alike():
    clean = demo()[0].score(demo_samples(200, rate=0, seed=9)[0], progress=False)
    w = view(verdict(), demo()[1], known_clean=clean, renderer='plain')
    w.adjusted.value = True; w.method.value = 'calibrated'
    assert not w.status.value
    np.testing.assert_allclose(w.board.known(), clean.frame['score']-w.board.trend(clean.frame['tokens']))


def test_a_score_without_a_column_of_its_own_comes_back():
    from gradsentry_nb.core import Scores
    f = verdict().scores.frame
    foreign = Scores(f.assign(score=np.arange(400.)), dict(detector='x', statistic='onion'))
    from gradsentry_nb.threshold import cut_scores, decide
    w = view(decide(foreign, cut_scores(foreign, 200.)), demo()[1], renderer='plain')
    w.statistic.value = 'loss'; w.statistic.value = 'onion'
    np.testing.assert_array_equal(w.board.score, np.arange(400.))


def test_a_wrong_choice_leaves_the_controls_as_they_were():
    w = shown(); w.board.frame['tokens'] = np.nan
    w.adjusted.value = True
    assert 'cannot be adjusted' in w.status.value and not w.adjusted.value and not w.board.adjusted


def test_a_front_end_that_came_late(monkeypatch, tmp_path):
    monkeypatch.delenv('GRADSENTRY_RENDERER', raising=False); monkeypatch.setenv('JUPYTER_PATH', str(tmp_path)); monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '0')
    assert late_front_ends() == [] and reload_note('live') == reload_note('plain') == ''
    (tmp_path/'labextensions/anywidget').mkdir(parents=True); (tmp_path/'labextensions/anywidget/package.json').write_text('{}')     # stands before those of the environment
    assert late_front_ends() == ['anywidget'] and renderer() == 'plain' and renderer('live') == 'live'
    assert 'plain view' in reload_note('plain') and 'reload the page' in reload_note('live')
    with monkeypatch.context() as m: m.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Interactive'); assert renderer() == 'plain' and reload_note('plain') == ''     # where a restart would bring nothing else
    (tmp_path/'labextensions/@jupyter-widgets/jupyterlab-manager').mkdir(parents=True); (tmp_path/'labextensions/@jupyter-widgets/jupyterlab-manager/package.json').write_text('{}')
    assert late_front_ends() == ['anywidget', 'ipywidgets'] and 'anywidget and ipywidgets' in reload_note('plain')
    monkeypatch.setitem(sys.modules, 'google.colab', object()); assert late_front_ends() == []


@pytest.mark.parametrize('how', ['live', 'plain'])
def test_every_tab_draws(how):
    d = watched(how)
    names = [p.title for p in d.pictures.panels]
    assert names == ['scores', 'trivial detectors', 'spectra', 'map', 'against the truth']
    for i, p in enumerate(d.pictures.panels):
        d.pictures.widget.selected_index = i
        if p.title == 'map': p.make(None)
        html = getattr(p, 'html', None)
        for _ in range(100):
            if html is None or '<svg' in html.value: break
            time.sleep(.05)
        assert html is None or '<svg' in html.value, p.title
        if how == 'live' and html is None and p.title != 'scores': assert p.chart.widget.spec['data']['values'], p.title
        assert not p.stale and not d.status.value


def test_only_the_open_tab_is_drawn():
    d = watched('live')
    against = d.pictures.panels[1]
    assert against.chart is None and against.stale
    d.pictures.widget.selected_index = 1
    spec = against.chart.widget.spec
    d.at.value = float(np.median(d.board.score))
    assert against.chart.widget.params.cut == d.board.cut.value and against.chart.widget.spec is spec and d.pictures.panels[0].stale
    against.column.value = 'ngram_rows'
    assert against.chart.widget.spec is not spec and against.chart.widget.params.cut == d.board.cut.value
    d.pictures.widget.selected_index = 0
    assert d.pictures.panels[0].both['bins'].widget.params.cut == d.board.cut.value


def brushed(chart, **ranges):
    "What Altair's own JavaScript would send."
    chart.widget._vl_selections = {'brush': dict(value={f: list(x) for f, x in ranges.items()}, store=[])}


def test_brushes_of_every_chart_select():
    d = watched('live'); d.pictures.widget.selected_index = 3; d.pictures.panels[3].make(None)
    d.pictures.widget.selected_index = 1; d.pictures.widget.selected_index = 0
    f, m = d.board.frame, d.map.frame
    scores, against, _, on_map, _ = d.pictures.panels
    wanted = lambda ok: set(f['id'][np.asarray(ok)])
    brushed(scores.both['bins'], start=(100, 1000)); assert set(d.selected) == wanted(f['score'] >= 100)
    brushed(scores.both['rows'], row=(10, 50)); assert set(d.selected) == wanted(f['row'].between(10, 50))
    brushed(against.chart, tokens=(20, 40), score=(50, 500)); assert set(d.selected) == wanted(f['tokens'].between(20, 40) & f['score'].between(50, 500))
    x, y = m['x'].median(), m['y'].median()
    brushed(on_map.chart, x=(x, 9), y=(-9, y)); assert set(d.selected) == wanted((m['x'] >= x) & (m['y'] <= y)) and len(d.selected) > 20
    d.statistic.value = 'loss'; brushed(scores.both['bins'], start=(0, 1)); assert set(d.selected) == wanted(f['loss'] <= 1), 'another chart, and still listened to'


def test_the_dashboard_offers_what_was_computed():
    d = watched()
    assert {v for _, v in d.statistic.options} >= set(NUMBERS)


def test_curves_come_from_a_judge_and_the_view_holds_no_truth():
    d = watched()
    held = [v for o in (d, d.board, d.live, *d.pictures.panels) for v in vars(o).values()]
    assert not any(isinstance(v, dict) and set(v) == set(demo()[2]) and set(map(bool, v.values())) == {True, False} and set(map(type, v.values())) == {bool} for v in held)
    assert d.judge.curves(d.verdict)[0].to_dict()['title']['text'].startswith('Precision')


# ---- hostile text

def test_hostile_text_is_text():
    samples = load_samples([dict(prompt=f'{h} say', response=f'{h} said') for h in HOSTILE]*3)
    v = demo()[0].filter(samples, progress=False)
    w = view(v, samples, demo()[0], renderer='plain')
    for i in range(len(HOSTILE)): w.on_open([samples[i].id]); assert not re.search(r'<(script|img|svg|b) ?[^>]*(onerror|onload|onmouseover|alert)', w.detail.value), HOSTILE[i][:20]
    still = w.static_html()
    for bad in ('<script', '<img src=x', '<svg onload', '\u202e', '\u200b', '\x1b', '\ud800'): assert bad not in still.replace('<svg xmlns', ''), bad
    rows = w.board.page_of(60)[0]
    assert all(not re.search('[\u202e\u200b\x1b\ud800]', c) for r in rows for c in r['cells']) and max(len(c) for r in rows for c in r['cells']) <= 200
    w.search.value = '<script>alert(1)'
    assert 'alert' not in w.status.value and w.board.page_of()[1] == 3


def test_the_table_writes_text_only():
    assert 'innerHTML' not in RowTable._esm and 'textContent' in RowTable._esm


# ---- where it is shown

def test_renderer(monkeypatch):
    monkeypatch.delenv('GRADSENTRY_RENDERER', raising=False)
    assert renderer() == 'live'
    monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Interactive'); assert renderer() == 'plain'
    monkeypatch.setenv('GRADSENTRY_RENDERER', 'live'); assert renderer() == 'live' and renderer('plain') == 'plain'


@pytest.mark.parametrize('how', ['live', 'plain'])
def test_a_selection_is_larger_than_a_page(how):
    w = view(verdict(), demo()[1], renderer=how)
    w.on_brush(dict(score=np.quantile(w.board.score, [.8, 1])))
    w.on_page(1)
    assert len(w.selected) == 80 and '80 rows, page 2 of 7' in w.paging.value


@pytest.mark.parametrize('how', ['live', 'plain'])
def test_both_renderers_follow_the_board(how):
    w = view(verdict(), demo()[1], renderer=how)
    w.at.value = float(np.median(w.board.score))
    assert len(w.verdict.drop) == 200
    if how == 'live': assert w.pictures.open.both['bins'].widget.params.cut == w.board.cut.value
    assert set(METHODS) == set(w.method.options)


def test_a_row_can_be_explained_while_a_scan_runs():
    "Hooks of two threads on one model see their own passes only: neither the scan nor the explanation changes."
    from gradsentry_nb.explain import explain_row
    sentry, samples, _ = demo()
    alone = explain_row(sentry, samples[3])
    live, n = LiveScan(sentry, samples, every=0).start(), 0
    while live.state == 'running': x = explain_row(sentry, samples[3]); np.testing.assert_allclose(x.svals, alone.svals, rtol=1e-5); n += 1
    assert n > 3 and live.wait().state == 'done', live.error
    np.testing.assert_allclose(live.numbers['log_volume'], verdict().scores.frame['log_volume'], rtol=1e-4)
