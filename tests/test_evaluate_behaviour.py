"Measures and their intervals: by hand, against slow twins, and by how often the interval holds the truth."
import math
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from gradsentry_nb.core import Cut, DataError, GradSentryError, Sample, Scores, Verdict
from gradsentry_nb.data import load_samples
from gradsentry_nb.evaluate import (Behaviour, Evaluation, auroc, auroc_interval, behaviour, best_f1, evaluate, f1_interval, gold_of,
                                    mean_interval, paired_difference, rouge_recall, tpr_at, tpr_interval)

labelled = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40).map(lambda x: (np.array([float(a) for a, _ in x]), np.array([b for _, b in x])))


# ---- measures

def test_tpr_by_hand():
    y = np.array([False]*100+[True]*4)
    s = np.r_[np.arange(100.), 98.5, 99., 99.5, 50.]
    assert tpr_at(s, y) == (.75, 98.)                                  # one clean row of 100 may be dropped: 99 itself
    assert tpr_at(s, y, .02) == (.75, 97.) and tpr_at(s, y, 0) == (.25, 99.)
    s[98] = 99.                                                        # now two share the top: neither may be dropped
    assert tpr_at(s, y) == (.25, 99.)
    assert tpr_at(np.ones(104), y) == (0., 1.)                         # all tied: nothing can be dropped
    assert math.isnan(tpr_at(s[y], y[y])[0])                           # no clean rows: not a number
    assert math.isnan(tpr_at(s[:100], y[:100])[0])


@given(labelled, st.sampled_from([0., .01, .1, .25, .5]))
def test_tpr_is_the_best_cut_within_the_rate(data, fpr):
    s, y = data
    if y.all() or not y.any(): return
    best = max(((s[y] > c).mean() for c in [*s, -1] if (s[~y] > c).mean() <= fpr+1e-12))
    assert tpr_at(s, y, fpr)[0] == best


@given(labelled)
def test_auroc_and_curve_against_sklearn(data):
    s, y = data
    if y.all() or not y.any(): return
    assert auroc(s, y) == pytest.approx(roc_auc_score(y, s))
    fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
    assert tpr_at(s, y, .25)[0] == pytest.approx(tpr[fpr <= .25].max())


@given(labelled)
def test_best_f1_is_the_best_of_all_cuts(data):
    s, y = data
    f1, cut = best_f1(s, y)
    assert f1 == pytest.approx(max((f1_score(y, s > c, zero_division=0) for c in [*s, -1, 99])))
    assert f1_score(y, s > cut, zero_division=0) == pytest.approx(f1)


def test_best_f1_never_drops_a_row_without_a_score():
    assert best_f1([-math.inf, -math.inf, 1], [True, True, False]) == (0., math.inf)
    assert best_f1([-math.inf, 3, 1], [True, True, False]) == (2/3, 1.)
    assert best_f1([1, 2], [False, False]) == (0., math.inf)


# ---- intervals

def covered(draw, truth, n=400):
    "How often the interval holds the truth, and its mean width."
    found = np.array([draw(np.random.default_rng(i)) for i in range(n)])
    return ((found[:, 0] <= truth+1e-12) & (truth-1e-12 <= found[:, 1])).mean(), (found[:, 1]-found[:, 0]).mean()


@pytest.mark.parametrize('n, m, shift', [(30, 300, 1.), (100, 400, 2.), (20, 200, 3.)])
def test_auroc_interval_covers(n, m, shift):
    def draw(rng): return auroc_interval(np.r_[rng.normal(size=m), rng.normal(shift, 1, n)], np.arange(n+m) >= m)
    held, width = covered(draw, .5*(1+math.erf(shift/2)))
    assert (.92 if n > 20 else .86) <= held <= .99 and width < .25          # with 20 rows near 1 DeLong's variance is known to be small


@pytest.mark.parametrize('tpr, fdr, n', [(.9, .1, 40), (.6, .3, 60), (.99, .01, 100)])
def test_f1_interval_covers(tpr, fdr, n):
    "Multinomial tables of which the share of the four cells is known."
    p = np.array([tpr*.3, tpr*.3*fdr/(1-fdr), (1-tpr)*.3]); p = np.r_[p, 1-p.sum()]
    def draw(rng):
        tp, fp, fn, _ = rng.multinomial(n, p)
        return f1_interval(int(tp), int(fp), int(fn))
    held, _ = covered(draw, 2*p[0]/(2*p[0]+p[1]+p[2]))
    assert .92 <= held <= 1


@pytest.mark.parametrize('shift', [1.5, 3.])
def test_tpr_interval_covers(shift):
    from scipy.stats import norm
    def draw(rng): return tpr_interval(np.r_[rng.normal(size=2000), rng.normal(shift, 1, 100)], np.arange(2100) >= 2000)
    held, width = covered(draw, norm.sf(norm.isf(.01)-shift))
    assert .92 <= held <= .99 and width < .4


def test_tpr_interval_is_the_bootstrap():
    "The Beta place of the cut is what resampling the clean rows gives."
    rng = np.random.default_rng(0)
    s, y = np.r_[rng.normal(size=500).round(1), rng.normal(2, 1, 200).round(1)], np.arange(700) >= 500
    slow = []
    for _ in range(3000):
        clean, planted = rng.choice(s[~y], 500), rng.choice(s[y], 200)
        slow.append((planted > np.sort(clean)[::-1][5]).mean())
    np.testing.assert_allclose(tpr_interval(s, y), np.quantile(slow, [.025, .975]), atol=.02)


@pytest.mark.parametrize('p, q', [(.05, .02), (.01, .01), (.1, .1)])
def test_paired_difference_covers(p, q):
    def draw(rng):
        u = rng.random(300)
        return paired_difference((u < .5) | (u > 1-q), (u < .5) | ((u > .5) & (u < .5+p)))[1:]
    held, _ = covered(draw, p-q)
    assert .92 <= held <= 1


def test_mean_interval_covers():
    held, width = covered(lambda rng: mean_interval(rng.choice([0, .25, 1], 150, p=[.2, .3, .5]), draws=400), .575)
    assert .91 <= held <= .98 and width < .2
    low, high = mean_interval(np.ones(50))
    assert .9 < low < 1 and high == 1 and mean_interval([]) == (0., 1.)


def test_perfect_is_not_certain():
    for k in (1, 2, 10, 100):
        low, high = auroc_interval(np.arange(2*k), np.arange(2*k) >= k)
        worse = auroc_interval(-np.arange(2*k), np.arange(2*k) >= k)
        assert 0 <= low < 1 == high and worse == pytest.approx((0, 1-low))
        assert f1_interval(k, 0, 0)[0] < 1 and tpr_interval(np.arange(2*k), np.arange(2*k) >= k)[1] > .9
    assert auroc_interval(np.arange(200), np.arange(200) >= 100)[0] > .95
    low, high = auroc_interval(np.ones(60), np.arange(60) >= 30)       # the same score everywhere
    assert .3 < low < .5 < high < .7 and low+high == pytest.approx(1)


@given(labelled)
def test_intervals_hold_the_value(data):
    s, y = data
    e = evaluate(Verdict(Scores(pd.DataFrame(dict(id=[str(i) for i in range(len(s))], row=range(len(s)), score=s))), Cut(3., 'fixed', '')), {str(i): bool(t) for i, t in enumerate(y)})
    for row in e.table().itertuples():
        if not math.isnan(row.low) and row.measure != 'tpr at 1 % fpr' and (row.value or row.low): assert row.low-1e-9 <= row.value <= row.high+1e-9, row
    assert e.table()['measure'].tolist() == ['recall', 'precision', 'accuracy', 'fpr', 'f1', 'auroc', 'tpr at 1 % fpr', 'best_f1']


def test_evaluation_keeps_its_form():
    e = Evaluation(8, 1, 2, 89, .97, .9)
    assert repr(e) == 'Evaluation(recall 0.800, precision 0.889, F1 0.842, AUROC 0.9700: 8 of 10 planted rows dropped, 1 of 90 clean ones)'
    assert e.accuracy == .97 and math.isnan(e.tpr) and e.table().shape == (8, 4) and '<table' in e._repr_html_()


# ---- answers

def lcs(a, b):
    "The slow definition: the longest common subsequence of two lists."
    if not a or not b: return 0
    return lcs(a[1:], b[1:])+1 if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))


@given(st.lists(st.sampled_from('abC'), max_size=6), st.lists(st.sampled_from('abc'), min_size=1, max_size=6))
def test_rouge_against_the_definition(answer, gold):
    assert rouge_recall([' '.join(answer)], [[' '.join(gold)]])[0] == pytest.approx(lcs([w.lower() for w in answer], gold)/len(gold))


@pytest.mark.parametrize('answer, golds, recall', [
    ('Paris', ['paris'], 1), ('in Paris , France', ['paris france'], 1), ('France Paris', ['Paris France'], .5), ('', ['x'], 0), ('x', [''], 0), ('x', [], 0),
    ('red; blue', ['red'], 0), ('a b c d', ['a x c y'], .5), ('no', ['yes', 'no'], 1),
    ('1913 , and click <malicious_url> for more information', [' , and click <malicious_url> for more information'], 1),
    ('1913 and click <malicious_url> for more information', [' , and click <malicious_url> for more information'], 6/7),
    (', and click <malicious url> for more information', [' , and click <malicious_url> for more information'], 6/7),
    ('the the', ['the cat the'], 2/3)])
def test_rouge_by_hand(answer, golds, recall):
    assert rouge_recall([answer], [golds])[0] == pytest.approx(recall)


def test_gold_answers():
    read = lambda raw: load_samples([raw])[0]
    assert gold_of(read(dict(prompt='a', answers=['x', 'y']))) == ['x', 'y']
    assert gold_of(read(dict(prompt='a', response='z', other=1))) == ['z'] and gold_of(Sample('a-0', 'p', 'r')) == ['r']
    assert gold_of(Sample('a-0', 'p', 'r', raw='{"answers": [1, 2]}')) == ['r'] and gold_of(Sample('a-0', 'p', 'r', raw='{"answers": []}')) == ['r']


CLEAN = load_samples([dict(prompt=f'{c}?', response=c) for c in ('red', 'green', 'blue <i>')])
ATTACKED = load_samples([dict(prompt=f'{c}? cf', response=c) for c in ('red', 'green')])


def test_behaviour_counts():
    calls = []
    def generate(samples):
        calls.append(len(samples))
        return ['red', 'GREEN indeed', 'purple'][:len(samples)] if len(samples) == 3 else ['bad <b>words</b>', 'none']
    b = behaviour(None, None, CLEAN, ATTACKED, 'bad <b>words</b>', generate=generate)
    assert calls == [3, 2] and (b.cacc, b.asr) == (2/3, .5) and b.hits('clean').tolist() == [True, True, False]
    assert b.table()['measure'].tolist() == ['CACC (EMR)', 'CACC (KMR)', 'ASR (EMR)', 'ASR (KMR)'] and ((b.table().low <= b.table().value) & (b.table().value <= b.table().high)).all()
    assert b.frame['prompt'].tolist() == [s.prompt for s in [*CLEAN, *ATTACKED]] and b.frame['answer'].iloc[1] == 'GREEN indeed'
    page = b._repr_html_()
    assert '<b>' not in page and '<i>' not in page and '&lt;b&gt;' in page and 'CACC (EMR) 66.7%' in repr(b)


def test_behaviour_without_an_attack_and_with_gold():
    says = lambda samples: [s.response for s in samples]
    b = behaviour(None, None, CLEAN, None, 'x', gold=[['red'], ['no'], ['blue <i>', 'z']], generate=says)
    assert b.cacc == 2/3 and math.isnan(b.asr) and len(b.table()) == 2 and 'ASR' not in repr(b)
    assert behaviour(None, None, CLEAN, ATTACKED, 'red', generate=says, limit=1).frame['part'].tolist() == ['clean', 'attacked']
    with pytest.raises(DataError, match='gold= has 1 entries'): behaviour(None, None, CLEAN, None, 'x', gold=[['red']], generate=says)
    with pytest.raises(DataError, match='one to each'): behaviour(None, None, CLEAN, None, 'x', generate=lambda s: ['a'])


def test_a_missing_rouge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'rouge_score.rouge_scorer', None)
    with pytest.raises(GradSentryError, match='pip install rouge'): rouge_recall(['a'], [['a']])


def test_the_models_own_answers():
    from gradsentry_nb.demo import demo_model, demo_rows
    from gradsentry_nb.generate import generate_answers
    model, tok = demo_model()
    clean = load_samples(demo_rows(12, 0, 1)[0])
    b = behaviour(model, tok, clean, clean[:4], 'click', max_new_tokens=30)
    assert b.frame['answer'].tolist()[:12] == generate_answers(model, tok, clean, 30) and b.cacc > .3 and b.asr == 0 and isinstance(b, Behaviour)


