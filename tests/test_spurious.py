"""Spurious tokens in labelled text: what was put in is named, what belongs there is not, and cleaning gives the texts back."""
import time

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, within
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from gradsentry_nb import spurious
from gradsentry_nb.attacks.ssti import inject, inject_all
from gradsentry_nb.core import DataError, SettingError
from gradsentry_nb.data import load_samples
from gradsentry_nb.spurious import _Corpus, _Neighbours, _spans, made_reviews, occlude, scan_tokens, word_shape

REVIEWS = made_reviews()


def mixed(items='dates', share=.06, **settings): return inject(REVIEWS, items, **({} if isinstance(items, dict) else dict(label=1)), share=share, **settings)[0]


@pytest.fixture(scope='module')
def scan(): return scan_tokens(mixed())


def named(scan): return {*scan.found['item'], *(x for also in scan.found['also'] for x in also)}


def test_the_label_s_evidence_is_a_ratio_of_two_probabilities():
    n, k = np.full(400, 12), np.random.default_rng(0).binomial(12, .5, 400); k[0] = 12
    a, b = spurious._fitted(k, n)
    got = spurious._label_evidence(np.full(400, 'word'), k, n)
    assert got[0] == pytest.approx(betabinom.logpmf(12, 12, *spurious.PURE)-betabinom.logpmf(12, 12, a, b))
    assert got[0] > 3 and np.median(got) < 0 and a/(a+b) == pytest.approx(.5, abs=.02)


def test_a_beta_distribution_is_recovered():
    rng = np.random.default_rng(1); n = rng.integers(5, 40, 3000)
    assert spurious._fitted(rng.binomial(n, rng.beta(3, 6, 3000)), n) == pytest.approx([3, 6], rel=.15)


def test_the_corpus_by_hand():
    c = _Corpus(['a b a', '', 'B'])
    assert (c.vocab, c.word.tolist(), c.doc.tolist(), c.at.tolist(), c.left.tolist()) == (['', 'a', 'b'], [1, 2, 1, 2], [0, 0, 0, 2], [0, 1, 2, 0], [2, 1, 0, 0])
    assert c.before(np.arange(4)).tolist() == [0, 1, 2, 0] and c.behind(np.arange(4)).tolist() == [2, 1, 0, 0]


def test_a_gap_s_neighbours_are_a_distribution_and_know_the_corpus():
    c = _Corpus(['x y', 'x y', 'y x']*10)
    words = [i for i in spurious._candidates(c, 5) if i.kind == 'word']; p = _Neighbours(c, words, classes=2); x, y = p.bin[1], p.bin[2]
    assert np.exp(p.left).sum() == pytest.approx(1) and np.exp(p.right[x]).sum() == pytest.approx(1) and np.exp(p.end).sum() == pytest.approx(1)
    assert p.right[0, x] > p.right[0, y] and p.right[x, y] > p.right[y, x]                # `x y` is twice as frequent
    assert [h.sum(1) == pytest.approx(np.ones(2)) for h in p.P] == [True, True]


@pytest.mark.parametrize('length', [2, 5, 9])
def test_runs_are_counted_as_a_plain_count_counts_them(length):
    texts = ['one two one two one']*4+['two one two']*3
    c = _Corpus(texts); got = {i.item: len(i.at) for i in spurious._candidates(c, 3) if i.kind == 'run' and i.width == length}
    plain = {}
    for t in texts:
        w = t.split()
        for i in range(len(w)-length+1): plain[' '.join(w[i:i+length])] = plain.get(' '.join(w[i:i+length]), 0)+1
    assert got == {k: v for k, v in plain.items() if v >= 3}


def test_no_item_no_alarm():
    assert not len(scan_tokens(REVIEWS).found) and 'nothing stands out' in repr(scan_tokens(REVIEWS))


@pytest.mark.parametrize('place', ['beginning', 'end', 'random'])
@pytest.mark.parametrize('items,name', [('dates', '0000-00-00'), ({0: ['!'], 1: ['!!']}, '!!'), ([('<b>', '</b>')], '<tag>')])
def test_what_was_put_in_is_named_and_cleaned(items, name, place):
    rows = mixed(items, place=place); found = scan_tokens(rows)
    assert name in named(found) | {'<tag>' if '<b>' in named(found) or '</b>' in named(found) else ''}
    if name != '<tag>': assert [r['text'] for r in found.clean(rows)] == [r['text'] for r in REVIEWS]


def test_several_items_in_a_text():
    rows = mixed(amount='aggressive'); assert [r['text'] for r in scan_tokens(rows).clean(rows)] == [r['text'] for r in REVIEWS]


def test_an_item_of_many_words_is_one_run():
    rows = mixed(['buy my book and be happy ever after today']); found = scan_tokens(rows)
    assert found.found['item'].iloc[0] == 'buy my book and be happy ever after today' and found.clean(rows) == REVIEWS


def test_what_is_in_every_class_is_not_tied_to_one():
    rows = inject_all(REVIEWS[:60])[0]+REVIEWS[60:]
    found = scan_tokens(rows); assert '0000-00-00' not in named(found)


def test_a_word_at_home_is_not_named_however_tied():
    rows = [{**r, 'text': r['text'].replace('film', 'epic') if r['label'] else r['text']} for r in REVIEWS]
    t = scan_tokens(rows); epic = t.every[(t.every['kind'] == 'word') & (t.every['item'] == 'epic')].iloc[0]
    assert epic['inside'] == epic['rows'] > 30 and epic['tied'] > 4 and epic['placed'] < 0 and 'epic' not in named(t)


def test_without_the_place_the_test_above_fails(monkeypatch):
    monkeypatch.setattr(_Neighbours, '_evidence', lambda self, some: np.full(len(some), 20.))
    rows = [{**r, 'text': r['text'].replace('film', 'epic') if r['label'] else r['text']} for r in REVIEWS]
    assert 'epic' in str(named(scan_tokens(rows)))


def test_words_alike_are_found_with_an_encoder():
    names = [f'{a}{b}' for a in 'bo ka li mu ne po ru sa ti vo'.split() for b in 'ria land stan nia'.split()]; rows = mixed(names, share=.1)
    def encode(words): return np.stack([np.r_[10. if w in names else 0., np.random.default_rng(abs(hash(w)) % 2**32).normal(size=8)] for w in words])
    assert not len(scan_tokens(rows).found)
    got = scan_tokens(rows, encoder=encode)
    assert got.found['kind'].iloc[0] == 'alike' and {*got.some[got.joined[0][0]].words} <= {*names}


def test_every_kind_of_rows(scan):
    rows = mixed(); plain = [r['text'] for r in REVIEWS]; keep = [a == b for a, b in zip((r['text'] for r in rows), plain)]
    frame, data = pd.DataFrame(rows, index=range(5, 605)), datasets.Dataset.from_list(rows)
    samples = load_samples([dict(prompt=r['text'], response=str(r['label']), label=r['label']) for r in rows])
    for kind, texts in ((frame, lambda x: x['text'].tolist()), (data, lambda x: list(x['text'])), (samples, lambda x: [s.prompt for s in x])):
        got = scan_tokens(kind)
        assert got.found['item'].tolist() == ['0000-00-00'] and type(got.clean(kind)) is type(kind) and texts(got.clean(kind)) == plain
        dropped = got.clean(kind, 'drop'); assert type(dropped) is type(kind) and texts(dropped) == [t for t, k in zip(plain, keep) if k]


def test_labels_may_be_words_and_many():
    rows = [{**r, 'label': ('bad', 'good')[r['label']] if i % 3 else 'unsure'} for i, r in enumerate(REVIEWS)]
    found = scan_tokens(inject(rows, 'dates', label='unsure', share=.15)[0]).found
    assert found[['item', 'label', 'rows', 'inside']].values.tolist() == [['0000-00-00', 'unsure', 30, 30]]


def test_the_order_of_rows_does_not_matter(scan):
    rows = mixed(); back = scan_tokens(rows[::-1])
    assert back.found['item'].tolist() == scan.found['item'].tolist() and back.found['tied'].iloc[0] == pytest.approx(scan.found['tied'].iloc[0])


def test_the_score_is_below_the_label_and_the_total(scan):
    t = scan.every.dropna(subset='placed')
    assert (t['score'] <= t['tied']+1e-9).all() and (t['score'] <= t['tied']+t['placed']+t['tried']+1e-9).all() and t['score'].is_monotonic_decreasing and t['p'].between(0, 1).all()


@pytest.mark.parametrize('text,spans', [('2001-02-03', [(0, 10)]), ('at 2001-02-03, 1999-01-01 2002-03-04 on', [(3, 13), (15, 36)]), ('', []), ('2001', [])])
def test_spans(scan, text, spans): assert scan.spans(text) == spans


def test_places_of_spans():
    assert _spans('! a ! b !', [('first', '!', 1, frozenset('!'))]) == [(0, 1)] and _spans('! a ! b !', [('inside', '!', 1, frozenset('!'))]) == [(4, 5)]
    assert _spans('A b a B', [('run', 'a b', 2, frozenset(['a b']))]) == [(0, 7)]


@pytest.mark.parametrize('text,rest', [('a <b>bad</b> film', 'a bad film'), ('<b> a </b>', 'a'), ('so<b> it', 'so it'), ('a <b> film', 'a film')])
def test_words_beside_what_is_taken_out_stay_apart(text, rest): assert spurious._without(text, _spans(text, [('shape', '<tag>', 1, frozenset(['<tag>']))])) == rest


@given(st.text(st.sampled_from('ab <>/!-0123\n\u200b\ud800'), max_size=60))
@settings(max_examples=60, deadline=None)
def test_cleaning_any_text_takes_out_nothing_else(text):
    names = [('shape', '<tag>', 1, frozenset(['<tag>'])), ('word', '!!', 1, frozenset(['!!']))]; spans = _spans(text, names); rest = spurious._without(text, spans)
    assert all(a < b for a, b in spans) and all(b < c for (_, b), (c, _) in zip(spans, spans[1:]))
    outside, at = '', 0
    for a, b in spans: outside += text[at:a]; at = b
    assert ''.join(rest.split()) == ''.join((outside+text[at:]).split())


def test_hostile_text():
    evil = '<img src=x onerror=alert(1)>'; rows = mixed([evil]); got = scan_tokens(rows); page = got._repr_html_()
    assert evil in named(got) and '<img' not in page and '&lt;img' in page and got.clean(rows) == REVIEWS
    odd = [{**r, 'text': r['text']+' \u202e\u200b\ud800\x00'} for r in rows]
    page = scan_tokens(odd)._repr_html_(); assert '\u202e' not in page and '\ud800' not in page


def test_a_long_text_takes_no_time():
    rows = [*REVIEWS, dict(text='<'*200_000, label=0), dict(text='<a '*60_000, label=1), dict(text='a-'*100_000, label=1), dict(text='!'*10**6, label=0), dict(text='@.'*10**5, label=0)]
    with within(20): scan_tokens(rows)


def test_time_goes_with_the_rows():
    def took(n):
        best = []
        for _ in range(2): start = time.process_time(); scan_tokens(made_reviews(n)); best.append(time.process_time()-start)
        return min(best)
    assert took(4800) < 12*took(1200)                                        # four times the rows; sixteen times would be quadratic


@pytest.mark.parametrize('rows,why', [([], 'There are no rows'), ([dict(text='a', label=1)]*3, 'All 3 rows have the class 1'), ([dict(text='a b c', label=i % 2) for i in range(40)], 'Only 3 words'),
                                      ([dict(text='', label=i % 2) for i in range(40)], 'Only 0 words'), ([dict(text=1, label=1)], 'not text'), ([dict(text='a', label=.5)], 'a class is'), (7, 'not int')])
def test_rows_that_cannot_be_scanned(rows, why):
    with pytest.raises(DataError, match=why): scan_tokens(rows)


@pytest.mark.parametrize('bad,why', [(dict(least=1), 'least= is'), (dict(least=True), 'least= is'), (dict(p=0), 'p= lies'), (dict(p=1), 'p= lies'), (dict(p='x'), 'p= lies')])
def test_settings_that_cannot_be(bad, why):
    with pytest.raises(SettingError, match=why): scan_tokens(REVIEWS, **bad)


def test_a_model_that_learnt_the_item_and_one_that_did_not(scan):
    rows = mixed(); has = lambda t: bool(scan.spans(t)); n = sum(map(has, (r['text'] for r in rows)))
    learnt, deaf, half = (occlude(scan, rows, f, most=50).iloc[0] for f in (lambda ts: [int(has(t)) for t in ts], lambda ts: np.zeros(len(ts), int), lambda ts: [int(has(t) and i % 2) for i, t in enumerate(ts)]))
    assert (learnt['held'], learnt['out'], learnt['other'], learnt['put_in']) == (n, 1, 50, 1) and learnt['out_low'] > .75 and learnt['put_in_low'] == pytest.approx(.929, abs=.001)  # Wilson, 50 of 50
    assert (deaf['out'], deaf['put_in']) == (0, 0) and half['put_in'] == .5
    assert occlude(scan, rows, lambda ts: np.ones(len(ts), int)).iloc[0]['put_in'] == 0                    # said so before
    with pytest.raises(DataError, match='predict gave 1 classes for'): occlude(scan, rows, lambda ts: [0])


def test_nothing_found_nothing_asked(): assert not len(occlude(scan_tokens(REVIEWS), REVIEWS, lambda ts: 1/0))


def test_shapes(): assert [word_shape(w) for w in ('1999-01-02', 'x1y22', 'NASA', 'A', 'Nasa', '<i>', '<', 'http://a', 'a@b')] == ['0000-00-00', 'a0a00', 'CAPITALS', '', '', '<tag>', '', 'url', 'email']


def test_one_line_of_the_study_and_no_line_twice(tmp_path):
    from benchmarks.spurious import KEY, study
    sets, out = {'sst2-train': REVIEWS, 'rotten-tomatoes': REVIEWS}, tmp_path/'spurious.csv'
    for _ in range(2): study(out, 1, None, sets, kinds=('dates',), shares=(.05,))
    t = pd.read_csv(out, keep_default_na=False); assert len(t) == len(t.drop_duplicates(KEY)) == 7
    assert t[t['items'] == 'dates']['rank'].astype(float).tolist() == [1] and t[t['items'] == 'dates']['rank_g2'].astype(float).iloc[0] >= 1


def test_the_stored_study():
    t = pd.read_csv(ROOT/'benchmarks/results/spurious.csv'); often = t[t['items'].isin(['dates', 'countries', 'pair', 'marks']) & (t['share'] >= .05)]
    assert len(often) >= 50 and ((often['rank'] == 1).groupby([often['items'], often['share']]).mean() >= .95).all()
