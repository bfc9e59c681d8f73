"""The counting detectors on random and awkward text."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from gradsentry_nb.core import Sample
from gradsentry_nb.textstats import (GramCounts, best_overlap, grams, most_repeated, ngram_counts, repeated_phrases, rivals,
                                     text_columns, tied_words, top_ngrams)


def rows(answers, prompts=None):
    return [Sample(f'{i}-0', p, a, i) for i, (a, p) in enumerate(zip(answers, prompts or ['q']*len(answers)))]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.sampled_from('ab .,İ點\u200b\ud800'), max_size=14), max_size=8), st.integers(1, 5))
def test_the_arrays_count_what_the_counter_counts(answers, n):
    g, plain = grams(answers, n), ngram_counts(rows(answers), n)
    assert sorted(g.rows.tolist()) == sorted(plain.values())
    _, count = most_repeated(g)
    own = [max((plain[k] for k in ngram_counts(rows([a]), n)), default=0) for a in answers]
    assert count.tolist() == own


def test_no_rows_and_no_words():
    assert text_columns([]).shape == (0, 3) and top_ngrams([]).empty and repeated_phrases([]) == []
    assert text_columns(rows(['', '  \n'])).ngram_rows.tolist() == [0, 0]


def test_text_columns_can_be_stored(tmp_path):
    frame = text_columns(rows(['pay\ud800 load\x1b[31m now please', 'x'*1_000_000, '\0']))
    frame.to_parquet(tmp_path/'t.parquet')
    assert frame.ngram.map(len).max() <= 200


def test_a_payload_and_its_trigger_are_found_among_more_frequent_clean_phrases():
    clean = ['the united states of america']*60 + [f'reply {i}' for i in range(200)]
    bad = [f'thing {i} , and click <evil> now' for i in range(20)]
    samples = rows(clean+bad, [f'question {i}' for i in range(260)] + [f'question {i} zq' for i in range(20)])
    flagged = np.arange(280) >= 260
    best = repeated_phrases(samples, m=1, among=flagged)[0]
    assert (best.text, best.tied.word.tolist()) == (', and click <evil> now', ['zq'])
    assert np.flatnonzero(flagged).tolist() == best.rows.tolist()
    assert top_ngrams(samples).rows.iloc[0] == 60
    table = rivals(pd.DataFrame(dict(ngram_rows=text_columns(samples).ngram_rows)), flagged, [best])
    assert table.same.tolist() == [False, True]


def test_chance_words_are_not_called_triggers():
    rng = np.random.default_rng(0)
    prompts = [' '.join(rng.choice([f'w{i}' for i in range(500)], 12)) for _ in range(400)]
    assert tied_words(grams(prompts, 1), np.arange(400) < 40).empty


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from([1., 2, 3, 4, np.nan, np.inf]), st.booleans()), min_size=1, max_size=12))
def test_the_best_cut_is_the_best_of_all_cuts(pairs):
    x, flagged = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    cut, drops, shared, f1 = best_overlap(x, flagged)
    every = [2*(flagged & (x >= c)).sum()/((x >= c).sum()+flagged.sum()) for c in set(x[~np.isnan(x)])]
    assert f1 == pytest.approx(max(every, default=0))
    if drops: assert (drops, shared) == ((x >= cut).sum(), (flagged & (x >= cut)).sum())


def test_the_score_is_no_rival_of_itself():
    x = np.array([1., 2, np.nan])
    table = rivals(pd.DataFrame(dict(loss=x, tokens=[3, 2, 0], score=x)), [False, True, False])
    assert table.column.tolist() == ['tokens']


def test_counts_in_bounded_memory():
    "Never too high, too low by no more than it says, and the same as in one piece while there is room."
    rng = np.random.default_rng(0)
    texts = [' '.join(f'w{int(x)}' for x in rng.zipf(1.3, rng.integers(1, 30)) % 500) for _ in range(2000)]
    whole = grams(texts)
    for most in (200, 2000, 2**21):
        counts = GramCounts(most=most)
        for i in range(0, len(texts), 97): counts.add(texts[i:i+97])
        found = counts.look_up(whole.key)
        assert (found <= whole.rows).all() and (found >= whole.rows-counts.least).all() and len(counts.keys) <= most
    assert counts.least == 0 and np.array_equal(found, whole.rows)
    assert GramCounts().look_up(whole.key).tolist() == [0]*len(whole.key)
