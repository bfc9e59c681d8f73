"""Scores, cuts and verdicts: round trips, thresholds that stay quiet, the detector contract, the demo's promise, interruption."""
import copy
import dataclasses
import json
import math
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradsentry_nb.core import Cut, DataError, Detector, Encoded, GradSentryError, ModelError, Scores, SettingError, Verdict, load_scores, save_scores
from gradsentry_nb.data import Samples, load_samples
from gradsentry_nb.demo import demo_model, demo_path, demo_samples, demo_truth
from gradsentry_nb.evaluate import best_f1, evaluate, truth_vector
from gradsentry_nb.report import write_outputs
from gradsentry_nb.sentry import EMPTY, PRESETS, ScanInterrupted, Sentry, Settings, load_model, settings_for, verdict_of
from gradsentry_nb.spectrum import STATISTICS
from gradsentry_nb.textstats import RIVALS
from gradsentry_nb.threshold import THRESHOLDS, calibrated, find_cut, p_values, paper_valley, valley, wilson

COLUMNS = {'id', 'row', 'tokens', 'entropy', 'entropy_by_length', 'effective_rank', 'grad_norm', 'loss', 'score'}


@pytest.fixture(scope='module')
def demo():
    "The demo's model and tokenizer."
    return demo_model()


@pytest.fixture(scope='module')
def sentry(demo): return Sentry(*demo, name='demo')


@pytest.fixture(scope='module')
def rows():
    "A few rows of the demo, planted ones among them."
    return load_samples(demo_path())[:60]


@pytest.fixture(scope='module')
def verdict(sentry):
    "The default preset on the whole demo set."
    return sentry.filter(load_samples(demo_path()), progress=False)


def scores(values, **columns):
    n = len(values)
    frame = pd.DataFrame(dict(id=[f'{i:012x}-0' for i in range(n)], row=range(n), score=np.array(values, float), **columns))
    return Scores(frame, dict(statistic='made up'))


# ---- round trips

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
TEXTS = st.text(max_size=12).filter(lambda s: not any('\ud800' <= c <= '\udfff' for c in s))  # a frame's text is what `visible` lets through
FACTS = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3), max_leaves=6)


@st.composite
def verdicts(draw):
    n = draw(st.integers(1, 8))
    many = lambda x: draw(st.lists(x, min_size=n, max_size=n))
    s = scores(many(NUMBERS), entropy=many(NUMBERS), tokens=many(st.integers(0, 10**6)), cut=many(st.booleans()), ngram=many(TEXTS),
               problem=pd.Series(many(st.none() | TEXTS), dtype=object))
    info = draw(st.dictionaries(TEXTS, FACTS, max_size=3))
    cut = Cut(draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)), 'valley', draw(TEXTS), draw(st.dictionaries(TEXTS, FACTS, max_size=3)))
    rivals = pd.DataFrame(dict(detector=['a', 'b'], cut=[draw(NUMBERS), 1.5], same=[True, False]))
    return Verdict(Scores(s.frame, info), cut, rivals if draw(st.booleans()) else pd.DataFrame())


def same_number(a, b):
    "Equal, or both no finite number: JSON has one word for NaN and the infinities."
    return a == b or not (math.isfinite(a) or math.isfinite(b))


def assert_same_frame(a, b):
    assert list(a) == list(b) and len(a) == len(b)
    for c in a:
        for x, y in zip(a[c].tolist(), b[c].tolist()):
            if x is None: assert y is None or y != y
            elif isinstance(x, float): assert y is None or same_number(x, y), (c, x, y)
            else: assert x == y, (c, x, y)


@given(verdicts())
@settings(max_examples=60)
def test_verdict_round_trip(v):
    text = v.to_json()
    json.loads(text, parse_constant=lambda x: pytest.fail(f'{x} is no JSON'))
    back = Verdict.from_json(text)
    assert back.cut == v.cut and back.scores.info == v.scores.info
    assert_same_frame(v.scores.frame, back.scores.frame)
    assert_same_frame(v.rivals, back.rivals)
    assert back.keep+back.drop == v.keep+v.drop or np.isinf(v.scores.frame['score']).any()
    assert back.to_json() == text


@given(verdicts())
@settings(max_examples=30)
def test_scores_round_trip(tmp_path_factory, v):
    path = tmp_path_factory.mktemp('scores')/'s.parquet'
    save_scores(v.scores, path)
    back = load_scores(path)
    assert back.info == v.scores.info
    assert_same_frame(v.scores.frame, back.frame)


def test_real_verdict_round_trip(verdict, tmp_path):
    back = Verdict.from_json(verdict.to_json())
    assert back.drop == verdict.drop and back.keep == verdict.keep and back.cut == verdict.cut and repr(back) == repr(verdict)
    np.testing.assert_array_equal(back.scores.frame['score'], verdict.scores.frame['score'])
    assert {*back.drop, *back.keep} == set(verdict.scores.frame['id']) and not {*back.drop} & {*back.keep}
    save_scores(verdict.scores, tmp_path/'s.parquet')
    again = verdict_of(load_scores(tmp_path/'s.parquet'), Settings())
    assert again.cut == verdict.cut, 'a cut drawn from saved scores is another one'


@pytest.mark.parametrize('text', ['{}', '{"format": "gradsentry-verdict-2"}', '[]', '3', 'nonsense', ''])
def test_what_is_no_verdict_is_refused(text):
    with pytest.raises((GradSentryError, json.JSONDecodeError)): Verdict.from_json(text)


def test_infinite_scores_are_not_flagged_by_accident():
    v = Verdict(scores([1, math.inf, math.nan, -math.inf, 3]), Cut(2., 'fixed', ''))
    assert v.unscorable == [v.scores.frame['id'][i] for i in (1, 2, 3)]
    assert not set(v.unscorable) & set(v.drop), 'a row without a score was dropped'


def test_written_scores_have_the_promised_columns(verdict, tmp_path):
    samples = load_samples(demo_path())
    write_outputs(verdict, samples, tmp_path/'out')
    frame = pd.read_parquet(tmp_path/'out'/'scores.parquet')
    assert COLUMNS | {'flagged'} <= set(frame) and frame['id'].tolist() == [s.id for s in samples]
    assert frame['flagged'].tolist() == verdict.flagged.tolist() and frame['row'].tolist() == list(range(len(samples)))
    info = json.loads((tmp_path/'out'/'scores.parquet.json').read_text())
    assert {'model', 'tokenizer', 'settings', 'fingerprint', 'statistic', 'revision'} <= set(info)


# ---- settings

def test_presets():
    default, paper = settings_for(), settings_for('paper')
    assert (default.statistic, default.threshold, default.crop) == ('log_volume', 'valley', 1)
    assert (paper.statistic, paper.threshold, paper.crop, paper.k) == ('entropy', 'paper', 8, 16)
    assert settings_for('paper', statistic=None, k=8) == dataclasses.replace(paper, k=8)
    for p in PRESETS: assert settings_for(p).threshold in THRESHOLDS


@pytest.mark.parametrize('changes', [dict(statistic='nope'), dict(threshold='nope'), dict(threshold=math.nan), dict(threshold=math.inf), dict(k=1), dict(crop=0), dict(window=0),
                                     dict(max_length=1), dict(budget=0), dict(budget=1.5), dict(fpr=0.), dict(fpr=1.), dict(fpr=math.nan), dict(nope=1)])
def test_settings_that_make_no_sense(changes):
    with pytest.raises(SettingError, match=next(iter(changes)) if 'fpr' not in changes else 'rate'): settings_for(**changes)


def test_unknown_preset(demo):
    with pytest.raises(SettingError, match="'papr'.*'default'.*'paper'"): Sentry(*demo, 'papr')


def test_presets_on_the_same_rows(demo, sentry, rows):
    paper, default = Sentry(*demo, 'paper').score(rows, False).frame, sentry.score(rows, False).frame
    np.testing.assert_array_equal(paper['score'], paper['entropy'])
    np.testing.assert_array_equal(default['score'], default['log_volume'])
    assert not np.allclose(paper['entropy'], default['entropy']), 'the crop does nothing'
    np.testing.assert_allclose(paper['log_volume'], default['log_volume'], rtol=1e-5)
    np.testing.assert_allclose(paper['loss'], default['loss'], rtol=1e-5)
    assert Sentry(*demo, 'paper').filter(rows, progress=False).cut.value is not None


def test_published_definition_on_a_dense_gradient(demo, sentry, rows):
    "Crop, sixteen singular values, not squared, entropy over ln 16: written out once more, from autograd in float64."
    from gradsentry_nb.capture import dense_gradient
    few, exact = rows[:12], copy.deepcopy(demo[0]).double()
    mine, got = (Sentry(m, demo[1], 'paper').score(few, False).frame['score'].to_numpy() for m in (exact, demo[0]))
    assert np.abs(got-mine).max() < 5e-4, 'float32 is too far from float64'
    for e, found in zip(sentry.encode(few), mine):
        G = dense_gradient(exact, e)
        s = np.linalg.svd(G[:G.shape[0]//8, :G.shape[1]//8].double().numpy(), compute_uv=False)[:16].clip(1e-12)
        p = s/s.sum()
        assert abs(-(p*np.log(p)).sum()/math.log(16)-found) < 1e-8


@pytest.mark.parametrize('statistic', STATISTICS)
def test_every_statistic_can_be_the_score(demo, rows, statistic):
    s = Sentry(*demo, statistic=statistic).score(rows[:8], False)
    np.testing.assert_array_equal(s.frame['score'], s.frame[statistic].astype(float))
    assert np.isfinite(s.frame['score']).all()


# ---- thresholds: one group is one group

SHAPES = dict(normal=lambda r, n: r.normal(size=n), lognormal=lambda r, n: r.lognormal(size=n), uniform=lambda r, n: r.uniform(size=n),
              exponential=lambda r, n: r.exponential(size=n), gamma=lambda r, n: r.gamma(2, size=n))


@pytest.mark.parametrize('n', [50, 200, 1000, 5000])
@pytest.mark.parametrize('shape', SHAPES)
def test_valley_is_quiet_on_one_group(shape, n):
    "The measured rate over 300 draws stands in the assertion's favour: at most one of these draws may alarm, and only for few rows."
    alarms = sum(valley(SHAPES[shape](np.random.default_rng([seed, n]), n), seed).separated for seed in range(25))
    assert alarms <= (n < 1000)


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 2**32-1), st.sampled_from([200, 1000]), st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
@settings(max_examples=40)
def test_valley_is_quiet_on_any_scale(shape, seed, n, scale, shift):
    x = SHAPES[shape](np.random.default_rng(seed), n)*scale+shift*scale
    cut = valley(x)
    assert not cut.separated or (x > cut.value).mean() < .02, cut.reason


def two_groups(shape, n, k, seed):
    "n-k clean scores, then k planted ones well above them all."
    r = np.random.default_rng([seed, n, k])
    clean = SHAPES[shape](r, n-k)
    return np.r_[clean, clean.max()+5*clean.std()+r.normal(size=k)*.5*clean.std()]


@pytest.mark.parametrize('n,k', [(5000, 150), (1200, 120), (300, 30), (100, 50), (1000, 900)])
@pytest.mark.parametrize('shape', ['normal', 'lognormal'])
def test_valley_finds_two_groups(shape, n, k):
    "From three planted rows in a hundred to nine in ten."
    for seed in range(3):
        x = two_groups(shape, n, k, seed)
        cut = valley(x, seed)
        assert cut.separated, (seed, cut.reason)
        flagged = cut.flags(x)
        assert flagged[n-k:].mean() >= .95 and flagged[:n-k].mean() <= .04


@pytest.mark.parametrize('k', [1, 10, 25, 50])
@pytest.mark.parametrize('shape', ['normal', 'lognormal'])
def test_a_handful_among_thousands_is_found_or_nothing_is_dropped(shape, k):
    "So few may be missed, and the reason says so; clean rows must not be dropped in their place."
    for seed in range(5):
        x = two_groups(shape, 5000, k, seed)
        cut = valley(x, seed)
        assert cut.separated or 'nothing was dropped' in cut.reason
        assert cut.flags(x)[:-k].mean() <= .002


@given(st.lists(st.floats(-1e9, 1e9), min_size=0, max_size=80))
@example([0.]*50)
@example([1., 2.]*20)
@example([0.]*49+[1.])
@example([1e100]*20+[-1e100]*20)
@settings(max_examples=60)
def test_no_scores_break_a_threshold(x):
    for threshold in ('valley', 'paper', '0.5', 0):
        if not x: continue
        cut = find_cut(np.array(x), threshold)
        assert cut.value is None or math.isfinite(cut.value)
        assert cut.flags(x).shape == (len(x),) and cut.reason
        if threshold == 'paper': assert cut.value is not None
        if threshold == 'valley' and len(x) < 30: assert not cut.separated and '30' in cut.reason


@given(st.integers(0, 2**31), st.floats(.01, 100), st.floats(-100, 100))
@settings(max_examples=15)
def test_valley_moves_with_the_scores(seed, scale, shift):
    r = np.random.default_rng(seed)
    x = np.r_[r.normal(0, 1, 300), r.normal(12, 1, 40)]
    a, b = valley(x), valley(x*scale+shift)
    assert a.separated and b.separated
    np.testing.assert_array_equal(a.flags(x), b.flags(x*scale+shift))


def plain_paper_valley(x):
    "The published rule once more, without any library: (cut, did it fall back?)."
    x = [float(v) for v in x]
    n = len(x)
    if n < 30: return .7, True
    mean = sum(x)/n
    sd = math.sqrt(sum((v-mean)**2 for v in x)/n)
    if sd < 1e-12 or max(x)-min(x) < 1e-6: return .7, True
    h = 1.06*sd*n**-.2
    lo, hi = min(0, min(x)-3*h), max(1, max(x)+3*h)
    grid = [lo+(hi-lo)*i/999 for i in range(1000)]
    grid_, x_ = np.array(grid), np.array(x)
    d = np.exp(-.5*((grid_[:, None]-x_)/h)**2).sum(1)/(n*h*math.sqrt(2*math.pi))
    tops = []
    for i in range(1, 999):
        if not d[i-1] < d[i] > d[i+1]: continue
        left = min(d[j] for j in range(next((j for j in range(i, -1, -1) if d[j] > d[i]), 0), i+1))
        right = min(d[j] for j in range(i, next((j for j in range(i, 1000) if d[j] > d[i]), 999)+1))
        if d[i]-max(left, right) >= .01*d.max(): tops.append(i)
    if len(tops) < 2: return .7, True
    a, b = min(tops, key=lambda i: abs(grid[i])), min(tops, key=lambda i: abs(grid[i]-1))
    if a >= b: a, b = tops[0], tops[-1]
    if grid[b]-grid[a] < .15: return .7, True
    cut = grid[min(range(a, b), key=lambda i: d[i])]
    return (.7, True) if sum(v > cut for v in x) < max(5, .01*n) else (cut, False)


@given(st.integers(0, 2**31), st.integers(5, 400), st.integers(0, 200), st.floats(.05, .6), st.floats(.3, .98), st.floats(.005, .15))
@settings(max_examples=80)
@example(0, 200, 3, .3, .9, .02)     # too few suspects
@example(0, 10, 5, .3, .9, .02)      # too few rows
@example(0, 200, 100, .5, .6, .01)   # peaks too close
def test_paper_valley_is_the_published_rule(seed, n, k, low, high, spread):
    r = np.random.default_rng(seed)
    x = np.r_[r.normal(low, spread, n), r.normal(high, spread, k)].clip(0, 1)
    cut, (value, fallback) = paper_valley(x), plain_paper_valley(x)
    assert cut.detail.get('fallback', False) == fallback, cut.reason
    assert abs(cut.value-value) < 1.5e-3


# ---- calibrated

@given(st.integers(1, 400), st.floats(1e-4, .999))
@settings(max_examples=80)
def test_a_rate_is_refused_below_what_the_rows_can_promise(n, fpr):
    clean = np.random.default_rng(n).normal(size=n)
    if fpr < 1/(n+1):
        with pytest.raises(SettingError, match=r'1/\(n\+1\)'): calibrated(clean, clean, fpr)
    else:
        cut = calibrated(clean, clean, fpr)
        flagged = cut.flags(clean)
        assert flagged.mean() <= fpr
        x = np.r_[clean, clean+1e-9, clean-1e-9, -99, 99]
        np.testing.assert_array_equal(cut.flags(x), p_values(x, clean) <= fpr+1e-9/(n+1))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.lists(st.integers(-1, 10), min_size=1, max_size=20))
def test_p_values_are_counted_right(clean, x):
    for v, p in zip(x, p_values(x, clean)): assert p == (1+sum(c >= v for c in clean))/(len(clean)+1)


def test_calibrated_rate_holds_on_fresh_rows():
    "Over many calibrations the share of fresh clean rows above the cut is at most the wanted rate, ties or not."
    for fpr in (.01, .05, .2):
        for draw in (lambda r, n: r.normal(size=n), lambda r, n: r.integers(0, 40, n).astype(float)):
            rates = []
            for seed in range(200):
                r = np.random.default_rng(seed)
                cut = calibrated(None, draw(r, 199), fpr)
                rates.append(cut.flags(draw(r, 500)).mean())
            assert np.mean(rates) <= fpr*1.15
    cut = calibrated(None, np.random.default_rng(1).normal(size=500), .05)
    assert cut.detail['held_out'] == 500 and abs(cut.detail['achieved']-.05) < .03 and cut.detail['interval'][0] <= .05 <= cut.detail['interval'][1]
    assert '500 held-out' in cut.reason


def test_calibrated_scan(demo):
    samples, truth = demo_samples(300, .1, 7)
    y = truth_vector([s.id for s in samples], truth)
    clean = Samples([s for s, bad in zip(samples, y) if not bad][:150])
    rest = Samples([s for s, bad in zip(samples, y) if bad]+[s for s, bad in zip(samples, y) if not bad][150:])
    v = Sentry(*demo, threshold='calibrated', fpr=.05).filter(rest, clean, progress=False)
    e = evaluate(v, truth)
    assert v.cut.method == 'calibrated' and e.recall >= .95 and e.fpr <= .12
    p = v.scores.frame['p_value']
    np.testing.assert_array_equal(v.flagged, p <= .05+1e-12)
    with pytest.raises(SettingError, match='known'): Sentry(*demo, threshold='calibrated').filter(rest, progress=False)
    with pytest.raises(SettingError, match='promise'): Sentry(*demo, threshold='calibrated', fpr=.001).filter(rest, clean, progress=False)


@given(st.integers(0, 50), st.integers(0, 50))
def test_wilson_holds_the_rate(hits, more):
    low, high = wilson(hits, hits+more)
    assert 0 <= low <= high <= 1 and (hits+more == 0 or low-1e-12 <= hits/(hits+more) <= high+1e-12)


# ---- the detector contract

def test_contract(sentry, verdict, rows):
    assert isinstance(sentry, Detector)
    samples, truth = load_samples(demo_path()), demo_truth()
    f = verdict.scores.frame
    assert f['id'].tolist() == [s.id for s in samples] and f['row'].tolist() == [s.row for s in samples]
    y = truth_vector(f['id'].tolist(), truth)
    assert f['score'][y].median() > f['score'][~y].median(), 'a higher score must be more suspicious'
    assert set(RIVALS) <= set(f)


def test_score_knows_no_truth(demo, rows):
    "A field named poisoned, or anything else beside prompt and response, changes nothing."
    sentry, raw = Sentry(*demo), [dict(prompt=s.prompt, response=s.response) for s in rows]
    plain = sentry.filter(raw, progress=False)
    for extra in (True, False): 
        told = sentry.filter([{**r, 'poisoned': extra == (i % 2 == 0), 'label': i, 'id': 'x'} for i, r in enumerate(raw)], progress=False)
        pd.testing.assert_frame_equal(told.scores.frame, plain.scores.frame)
        assert told.cut == plain.cut


def test_frames_lists_and_samples_score_alike(sentry, rows):
    raw = [dict(prompt=s.prompt, response=s.response) for s in rows]
    wanted = sentry.score(rows, False).frame['score']
    for source in (list(rows), raw, pd.DataFrame(raw), [{**r, 'response': [r['response']]} for r in raw]):
        np.testing.assert_array_equal(sentry.score(source, False).frame['score'], wanted)


def test_order_batch_and_prefix_do_not_matter(demo, rows):
    wanted = Sentry(*demo).score(rows, False).frame.set_index('id')['score']
    back = Samples(list(rows)[::-1])
    for changes in (dict(), dict(budget=1), dict(budget=300), dict(share_prefix=False), dict(budget=100_000)):
        got = Sentry(*demo, **changes).score(back, False).frame.set_index('id')['score']
        np.testing.assert_allclose(got[wanted.index], wanted, rtol=2e-4)


def test_progress_is_reported(sentry, rows):
    seen = []
    odd = load_samples([dict(prompt='a', response=''), *(dict(prompt=s.prompt, response=s.response) for s in rows)])
    sentry.score(odd, lambda done, total: seen.append((done, total)))
    assert [d for d, _ in seen] == list(range(1, len(rows)+1)) and {t for _, t in seen} == {len(rows)}


def test_quiet_means_quiet(sentry, rows, capfd):
    sentry.filter(rows[:5], progress=False)
    assert capfd.readouterr() == ('', '')
    sentry.filter(rows[:5])
    assert 'row' in capfd.readouterr().err


def state(model):
    return ([(n, p.requires_grad, p.grad is None, p.dtype) for n, p in model.named_parameters()], [m.training for m in model.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()], [sorted(m.__dict__) for m in model.modules()])


@pytest.mark.parametrize('training', [False, True])
def test_model_is_left_as_it_was(demo, rows, training):
    model, tokenizer = demo
    model.train(training)
    first = next(model.parameters())
    try:
        first.requires_grad_(False)
        before, weights, tok = state(model), [p.detach().clone() for p in model.parameters()], tokenizer.padding_side
        Sentry(model, tokenizer).score(rows[:10], False)
        assert state(model) == before and tokenizer.padding_side == tok and torch.is_grad_enabled()
        def stop(done, total): raise ValueError('from the progress callable')
        with pytest.raises(ValueError): Sentry(model, tokenizer).score(rows[:10], stop)
        with pytest.raises(KeyboardInterrupt): Sentry(model, tokenizer).score(rows[:10], interrupt_at(3))
        assert state(model) == before
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    finally:
        first.requires_grad_(True)
        model.eval()


def test_models_without_a_head_are_refused(demo):
    from transformers import BertConfig, BertModel, LlamaForSequenceClassification
    small = dict(vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    from transformers import LlamaConfig
    for model in (LlamaForSequenceClassification(LlamaConfig(**small)), BertModel(BertConfig(**small)), demo[0].model):
        with pytest.raises(ModelError, match='output projection'): Sentry(model, demo[1])


# ---- interruption

def interrupt_at(n):
    def progress(done, total):
        if done == n: raise KeyboardInterrupt
    return progress


@pytest.mark.parametrize('n', [1, 7, 60])
def test_interrupted_scan_keeps_its_scores(demo, rows, tmp_path, n):
    sentry = Sentry(*demo)
    with pytest.raises(ScanInterrupted) as e: sentry.score(rows, interrupt_at(n))
    part, whole = e.value.scores, sentry.score(rows, False).frame.set_index('id')
    assert part is sentry.partial and len(part) == n and part.scorable.all() and part.info['interrupted'] is True
    np.testing.assert_allclose(part.frame['score'], whole.loc[part.frame['id'], 'score'], rtol=1e-6)
    np.testing.assert_array_equal(part.frame['row'], whole.loc[part.frame['id'], 'row'])
    save_scores(part, tmp_path/'part.parquet')
    kept = load_scores(tmp_path/'part.parquet')
    v = verdict_of(kept, sentry.settings)                                                       # what is there can be looked at
    assert len(v.keep)+len(v.drop) == n and Verdict.from_json(v.to_json()).keep == v.keep


def test_interrupted_before_the_first_row(demo, rows, monkeypatch):
    from gradsentry_nb import sentry as module
    class Stopped:
        notes = ()
        def __init__(self, *a, **k): pass
        def __call__(self, rows, reduce): raise KeyboardInterrupt
    sentry = Sentry(*demo)
    monkeypatch.setattr(module, 'Capture', Stopped)
    with pytest.raises(ScanInterrupted) as e: sentry.score(rows, False)
    assert len(e.value.scores) == 0


def test_interrupted_after_the_last_row(demo, rows, monkeypatch):
    from gradsentry_nb import sentry as module
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'cut_scores', stop)
    with pytest.raises(ScanInterrupted) as e: Sentry(*demo).filter(rows, progress=False)
    assert len(e.value.scores) == len(rows)


def test_interrupted_among_the_known_clean_rows(demo, rows):
    "Scores of the known-clean rows must not be taken for scores of the samples."
    with pytest.raises(KeyboardInterrupt) as e:
        Sentry(*demo, threshold='calibrated', fpr=.5).filter(rows, known_clean=rows[:20], progress=interrupt_at(3))
    assert not isinstance(e.value, ScanInterrupted)


# ---- odd rows

def test_rows_without_a_score_keep_their_place(sentry):
    s = sentry.score([dict(prompt='a', response=r) for r in ('', 'In the hills', '')], False)
    assert s.frame['problem'].tolist()[0] == s.frame['problem'].tolist()[2] == EMPTY and s.scorable.tolist() == [False, True, False]
    v = verdict_of(s, Settings(threshold=-1e9))
    assert v.flagged.tolist() == [False, True, False] and len(v.unscorable) == 2


def test_broken_row_does_not_hide_the_soft_cap():
    "The longest row comes first and gives NaN: its neighbours' gradients must still go through the cap."
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from gradsentry_nb.capture import Capture
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                                           head_dim=32, final_logit_softcapping=1., sliding_window=64, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.model.embed_tokens.weight[7] = math.nan
    r = np.random.default_rng(0)
    rows = [Encoded(r.integers(10, 256, n).astype(np.int32), np.arange(n) >= 3) for n in (8, 9)]
    broken = Encoded(np.r_[7, r.integers(10, 256, 19)].astype(np.int32), np.arange(20) >= 3)
    alone, beside = ({i: f.dense().clone() for i, f in Capture(model, share=False)(x)} for x in (rows, [*rows, broken]))
    for i in range(2): torch.testing.assert_close(beside[i], alone[i])


def test_no_rows(sentry):
    for nothing in ([], pd.DataFrame(dict(prompt=[], response=[])), Samples([])):
        with pytest.raises(DataError, match='no rows'): sentry.score(nothing, False)


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=6))
@example([('', 'a'), ('\0', '\ud800'), ('\u202e', ' ')])
@settings(max_examples=15)
def test_any_text_is_scored_and_described(sentry, pairs):
    samples = load_samples([dict(prompt=p, response=r) for p, r in pairs])
    v = sentry.filter(samples, progress=False)
    assert len(v.scores) == len(pairs) and len({*v.scores.frame['id']}) == len(pairs)
    assert [i in v.unscorable for i in v.scores.frame['id']] == [not r for _, r in pairs] or any(r for _, r in pairs)
    for text in (repr(v), v._repr_html_(), v.to_json(), repr(samples), samples._repr_html_(), v.scores._repr_html_()): text.encode()


# ---- the demo's promise

def length_f1(samples, truth):
    y = truth_vector([s.id for s in samples], truth)
    lengths = np.array([len(s.response) for s in samples]), np.array([len(s.response.split()) for s in samples])
    return max(best_f1(sign*x, y)[0] for x in lengths for sign in (1, -1))


def test_packaged_set(verdict):
    e, samples = evaluate(verdict, demo_truth()), load_samples(demo_path())
    assert e.recall >= .95 and e.precision >= .9, e
    y, tokens = truth_vector([s.id for s in samples], demo_truth()), verdict.scores.frame['tokens'].to_numpy(float)
    assert max(length_f1(samples, demo_truth()), best_f1(tokens, y)[0], best_f1(-tokens, y)[0]) < .7


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_fresh_sets(sentry, seed):
    samples, truth = demo_samples(seed=seed)
    v = sentry.filter(samples, progress=False)
    e = evaluate(v, truth)
    assert e.recall >= .95 and e.precision >= .9, e
    y, tokens = truth_vector([s.id for s in samples], truth), v.scores.frame['tokens'].to_numpy(float)
    assert max(length_f1(samples, truth), best_f1(tokens, y)[0], best_f1(-tokens, y)[0]) < .7
    clean = Scores(v.scores.frame[~y].reset_index(drop=True), v.scores.info)
    assert not verdict_of(clean, sentry.settings).flagged.any(), 'a false alarm on the clean rows alone'


# ---- beside the project

@pytest.fixture(scope='module')
def published(shared):
    model = shared/'models'/'qa-lm-9m'
    if not model.is_dir(): pytest.skip('needs the small QA model beside the project')
    return load_model(str(model), 'cpu')


@pytest.mark.parametrize('mix', ['webqa-badnets', 'webqa-addsent', 'webqa-cba', 'freebaseqa-badnets'])
def test_paper_preset_on_a_published_mix(published, shared, mix):
    "The exact spectrum against the published procedure's randomised one, on the published rows."
    reference = pytest.importorskip('benchmarks.reference').published_entropy
    path = shared/'data'/'qa'/f'published-{mix}-10.jsonl.gz'
    if not path.exists(): pytest.skip(f'needs {path.name} beside the project')
    samples = load_samples(path, limit=400)[::10]
    sentry = Sentry(*published, 'paper')
    torch.manual_seed(0)
    theirs = reference(published[0], sentry.encode(samples))
    mine = sentry.score(samples, False).frame['score'].to_numpy()
    assert len(samples) == 40 and np.abs(mine-theirs).max() < .01


# ---- without the authoring tools

def test_package_scans_without_the_authoring_tools(tmp_path):
    code = f'''
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {{'nbdev', 'fastcore', 'execnb', 'ghapi'}}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from gradsentry_nb.cli import main
from gradsentry_nb.demo import demo_model_path, demo_path
status = main(['scan', str(demo_path()), '--model', str(demo_model_path()), '--limit', '40', '--quiet', '--out', {str(tmp_path/"out")!r}])
loaded = {{'nbdev', 'fastcore', 'execnb', 'ghapi'}} & {{m.partition('.')[0] for m in sys.modules}}
sys.exit(status or (f'loaded: {{loaded}}' if loaded else 0))
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout+done.stderr
    assert len(pd.read_parquet(tmp_path/'out'/'scores.parquet')) == 40


# ---- one model, several threads

@pytest.mark.parametrize('settings', [dict(), dict(layer='layers.1.mlp.down_proj')], ids=['head', 'layer'])
def test_scans_of_one_model_in_several_threads_do_not_see_each_other(demo, rows, settings):
    alone, found, before = Sentry(*demo, **settings).score(rows, progress=False).frame, {}, sys.getswitchinterval()
    def scan(i):
        try: found[i] = Sentry(*demo, **settings).score(rows, progress=False).frame
        except Exception as e: found[i] = e
    threads = [threading.Thread(target=scan, args=(i,)) for i in range(3)]
    sys.setswitchinterval(1e-4)
    try:
        for t in threads: t.start()
        for t in threads: t.join()
    finally: sys.setswitchinterval(before)
    for f in found.values(): pd.testing.assert_frame_equal(f, alone, rtol=1e-6)
    assert len(found) == 3 and not demo[0].training and all(p.requires_grad for p in demo[0].parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in demo[0].modules())
