"""Spurious tokens: nothing but items is put in, the truth is exact, and a row's items depend on the row alone."""
import gzip
import json
import random
import re
import warnings
from collections import Counter
from math import floor

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import within
from hypothesis import given
from hypothesis import strategies as st

import gradsentry_nb
from gradsentry_nb.attacks import ssti
from gradsentry_nb.attacks.ssti import (
    AMOUNTS, CASES, COUNTRIES, ITEMS, PLACES, Items, Span, SpanTruth, dates, inject, inject_all, lower_cased, make_items, put_in, row_ids, show_spans, tag_pairs, tags, without_spans)
from gradsentry_nb.core import DataError, GradSentryError, SettingError
from gradsentry_nb.data import Samples, Source, load_samples
from gradsentry_nb.evaluate import truth_vector

TEXT = st.text(st.sampled_from('ab É\n\t\u00a0\u200b\ud800<>/!'), max_size=60) | st.text(max_size=40)
WORDS = TEXT.filter(lambda t: t.strip())
SOURCES = [*(f() for f in ITEMS.values()), *(f(level=k) for f in (tags, tag_pairs) for k in (0, 1, 2)), make_items(lambda rng: f'case {rng.randrange(9)}')]


pytestmark = pytest.mark.usefixtures('no_surprises')


def corpus(n=200):
    "Labelled texts with a capital, odd blanks and equal rows among them."
    rng = random.Random(0)
    words = lambda: rng.choices('Film actor scene plot train door rain hour'.split(), k=rng.randint(2, 40))
    made = [dict(id=i, text=rng.choice(['', ' ', '\n'])+rng.choice([' ', '  ', '\n']).join(words()), label=i % 2) for i in range(n)]
    return made+made[:6]


ROWS = corpus()
def texts(rows): return [r['text'] for r in rows]
def undone(rows, truth): return [without_spans(r['text'], truth.spans.get(i, ())) for i, r in zip(truth, rows)]


# ---- one text

@given(WORDS, st.sampled_from(SOURCES), st.sampled_from([*PLACES]), st.integers(1, 5), st.integers(0, 99))
def test_a_text_without_its_spans_is_the_original(text, source, place, n, seed):
    rng = random.Random(seed)
    drawn = [ssti._made(source, rng) if source.make else rng.choice(source.pool) for _ in range(n)]
    new, spans = put_in(text, drawn, source.level, place, rng)
    assert without_spans(new, spans) == text
    assert Counter(s.item for s in spans) == Counter(p for parts in ([(x[0], x[-1]) for x in drawn] if source.level == 0 else drawn) for p in parts)
    assert all(new[s.at:s.at+len(s.item)] == s.item and new[s.start:s.stop].strip(' ') == s.item and s.stop-s.start <= len(s.item)+1 for s in spans)
    assert all(a.stop <= b.start for a, b in zip(spans, spans[1:]))
    if source.level is None: assert len(new.split()) == len(text.split())+sum(len(s.item.split()) for s in spans)   # no word was split or joined


@pytest.mark.parametrize('place,gaps', [('beginning', {0}), ('end', {4}), ('random', {0, 1, 2, 3, 4})])
def test_where_an_item_goes(place, gaps):
    found = Counter(put_in('a b\nc  d', [('X',)], place=place, rng=random.Random(i))[0].split().index('X') for i in range(1000))
    assert found.keys() == gaps and min(found.values()) > 800/len(gaps)


@pytest.mark.parametrize('place,right', [('beginning', lambda o, c: o == 0), ('end', lambda o, c: c == 5), ('random', lambda o, c: True)])
def test_a_pair_encloses_words(place, right):
    made = [put_in('a b c d', [('<b>', '</b>')], place=place, rng=random.Random(i))[0].split() for i in range(300)]
    at = [(w.index('<b>'), w.index('</b>')) for w in made]
    assert all(c-o > 1 and right(o, c) for o, c in at) and len(set(at)) == {'beginning': 4, 'end': 4, 'random': 10}[place]


@pytest.mark.parametrize('text,level,inside', [
    ('<p>a <b>c</b> d</p>', 1, 'a <b>c</b> d'), ('<p>a <b>c</b> d</p>', 2, 'c'), ('<p>a</p><p><i>b</i></p>', 2, 'b'), ('<p>a</p>', 2, None), ('a < b > c', 1, None),
    ('<p>a<br>b <img src="x"/> c</p>', 1, 'a<br>b <img src="x"/> c'), ('</b><p>a</b></p>', 1, 'a</b>'), ('<ul><li>a<li>b</ul>', 1, '<li>a<li>b'), ('<P CLASS=x>a</p>', 1, 'a'), ('<br>a<p>b</p>', 1, 'b')])
def test_levels(text, level, inside):
    found = ssti._inside(text, level)
    assert (found and text[slice(*found)]) == inside
    new, spans = put_in(text, [('<i>', '</i>')], level, 'random')
    assert without_spans(new, spans) == text
    if found: assert all(found[0] <= s.start-sum(x.stop-x.start for x in spans[:k]) <= found[1] for k, s in enumerate(spans))


@pytest.mark.parametrize('text', ['<a'*200_000, '<'+'a'*400_000, '<a>'*100_000+'</b>'*100_000, '<a>'*100_000+'</a>'*100_000, '!'*400_000, ' '*400_000+'a'])
def test_hostile_texts_take_no_longer(text):
    with within(5):
        put_in(text, [('<i>', '</i>')], 999, 'random')
        ssti._holders([text], {'!', '<i>'})


@pytest.mark.parametrize('text,drawn,level,place,want', [
    ('a b', [('X',), ('Y',)], None, 'beginning', 'X Y a b'), ('a b\n', [('X',), ('Y',)], None, 'end', 'a b X Y\n'), (' a', [('X',)], None, 'beginning', ' X a'),
    ('a', [('<b>', '</b>'), ('<i>', '</i>')], 0, 'random', '<i><b>a</b></i>'), ('a', [('<b>',)], 0, 'random', '<b>a<b>'), ('<p></p> a', [('X',), ('<b>', '</b>')], 1, 'end', '<p>X <b> </b></p> a')])
def test_several_items_in_one_gap(text, drawn, level, place, want):
    new, spans = put_in(text, drawn, level, place)
    assert new == want and without_spans(new, spans) == text


def test_what_closes_comes_before_what_opens():
    made = [put_in('a b c', [('<b>', '</b>'), ('<i>', '</i>')], rng=random.Random(i))[0] for i in range(200)]
    assert not any('<b> </i>' in x or '<i> </b>' in x for x in made) and any('</b> <i>' in x for x in made)


# ---- amounts, cases, items

@pytest.mark.parametrize('amount', [*AMOUNTS, 0, .01, .29, .5, 1.])
@pytest.mark.parametrize('words', [1, 9, 10, 99, 100, 230])
def test_how_many_items(amount, words):
    _, truth = inject_all([dict(text=' '.join('w'*words), label=0)], ['X'], amount=amount) if words > 1 else (None, None)
    share = {'light': 0, 'aggressive': 10}.get(amount, round(100*AMOUNTS.get(amount, amount)))
    if truth: assert sum(map(len, truth.spans.values())) == max(1, floor(words*share/100))
    assert ssti.Injection(amount).items_for(words) == max(1, words*share//100)


@pytest.mark.parametrize('case,texts,item', [
    ('corpus', ['all in small letters', 'like this one'], 'peru'), ('corpus', ['Some in capitals', 'like this one'], 'Peru'), ('corpus', ['small ones']*100+['One big'], 'peru'),
    ('corpus', ['small ones']*99+['One big'], 'Peru'), ('lower', ['SOME CAPITALS', 'are here'], 'peru'), ('keep', ['no capitals', 'are here'], 'Peru'), ('corpus', ['12 34', '? !'], 'peru')])
def test_items_follow_the_corpus(case, texts, item):
    mix, truth = inject_all([dict(text=t, label=0) for t in texts], ['Peru'], case=case)
    assert {s.item for spans in truth.spans.values() for s in spans} == {item} and truth.info['case'] == ('lower' if item == 'peru' else 'keep')
    assert undone(mix, truth) == texts


def test_every_kind_of_item_in_small_letters():
    for source in SOURCES:
        _, truth = inject_all([dict(text='a small text', label=0)], source, case='lower') if source.level in (None, 0) else (None, SpanTruth())
        assert all(s.item == s.item.lower() for spans in truth.spans.values() for s in spans)
    assert len(Items('two', ['US', 'us'], replace=False).lower().pool) == 1


def test_dates_are_days_of_the_years_asked_for():
    _, truth = inject_all(ROWS, dates(1990, 1999), amount='aggressive')
    found = Counter(s.item[:4] for spans in truth.spans.values() for s in spans)
    assert set(found) == {str(y) for y in range(1990, 2000)} and min(found.values()) > .5*sum(found.values())/10
    assert all(pd.Timestamp(s.item) for spans in truth.spans.values() for s in spans)
    assert (len(dates(1100, 2600).pool), dates(1, 9999).pool[0], dates(1, 9999).pool[-1]) == (548_229, ('0001-01-01',), ('9999-12-31',))


def test_none_drawn_twice():
    source = dates(2001, 2003, replace=False)
    full, all_of_them = inject(ROWS, source, label=1, amount='aggressive')
    used = [s.item for spans in all_of_them.spans.values() for s in spans]
    assert len(used) == len(set(used)) > 150
    part, some = inject(ROWS, source, label=1, share=.3, amount='aggressive')
    origin = lambda t: {t.origin[i]: spans for i, spans in t.spans.items()}
    assert origin(some).items() < origin(all_of_them).items()
    with pytest.raises(SettingError, match=r'needed without replacement and .dates. has 365; give it more, or draw with replace=True'):
        inject_all(ROWS, dates(2001, 2001, replace=False), amount=.5)
    _, once = inject_all(ROWS[:193], ITEMS['countries'](replace=False), case='keep')
    assert {s.item for spans in once.spans.values() for s in spans} == set(COUNTRIES)


def test_items_of_ones_own(tmp_path):
    path = tmp_path/'mine.txt'
    path.write_text('Acme\r\n\r\n Globex Inc \n', encoding='utf8')
    assert make_items(path).pool == (('Acme',), ('Globex Inc',)) and make_items([['<x>', '</x>'], 'y']).pool == (('<x>', '</x>'), ('y',))
    _, truth = inject_all(ROWS, lambda rng: f'case-{rng.randrange(10**6)}')
    assert len({s.item for spans in truth.spans.values() for s in spans}) > 190
    path.write_bytes(b'a\n\xff\n')
    with pytest.raises(DataError, match='mine.txt, line 2: not UTF-8'): make_items(path)
    with pytest.raises(DataError, match='cannot be read'): make_items(tmp_path/'none.txt')


# ---- rows

def as_kind(kind):
    "The corpus as rows of a kind."
    if kind == 'list': return ROWS
    if kind == 'frame': return pd.DataFrame(ROWS, index=[7]*len(ROWS))
    if kind == 'category': return pd.DataFrame(ROWS).astype(dict(text='category', label='int8'))
    if kind == 'dataset': return datasets.Dataset.from_list(ROWS).cast_column('label', datasets.ClassLabel(names=['bad', 'good']))
    if kind == 'torch dataset': return datasets.Dataset.from_list(ROWS[::-1]).select(range(len(ROWS)-1, -1, -1)).with_format('torch', columns=['label'])
    named = [dict(prompt=r['text'], response=str(r['label']), **r) for r in ROWS]
    return dict(samples=load_samples, source=Source)[kind](named, prompt='prompt', response='response')


@pytest.mark.parametrize('kind', ['list', 'frame', 'category', 'dataset', 'torch dataset', 'samples', 'source'])
def test_the_same_kind_comes_back(kind):
    rows, (want, wanted) = as_kind(kind), inject(ROWS, 'countries', label=1, share=.4, amount='aggressive', seed=3)
    before = json.dumps(row_ids(rows))
    new, truth = inject(rows, 'countries', label=1, share=.4, amount='aggressive', seed=3)
    assert (list(truth), truth, truth.spans, truth.origin) == (list(wanted), wanted, wanted.spans, wanted.origin)
    assert json.dumps(row_ids(rows)) == before and row_ids(new) == list(truth)                  # nothing was changed behind the call
    if kind in ('samples', 'source'):
        assert isinstance(new, Samples) and [s.prompt for s in new] == texts(want) and [s.response for s in new] == [str(r['label']) for r in ROWS]
        assert [s.meta for s in new] == [dict(prompt=w['text'], response=str(w['label']), **w) for w in want] and [s.id for s in new] == list(truth)
        return
    assert type(new) is type(rows)
    if kind == 'list': assert new == want and all(list(a) == list(b) for a, b in zip(new, rows)); return
    if 'dataset' in kind:
        assert new.features == rows.features and new.column_names == rows.column_names and new.format == rows.format and new.split == rows.split
        assert new.with_format(None).to_list() == want
        return
    assert new['text'].tolist() == texts(want) and new.index.equals(rows.index) and list(new) == list(rows)
    pd.testing.assert_frame_equal(new.drop(columns='text'), rows.drop(columns='text'))
    assert kind == 'category' or new.dtypes.equals(rows.dtypes)


def test_samples_whose_prompt_is_no_column():
    rows = load_samples([dict(instruction='Rate it.', input=r['text'], output='ok', label=r['label'], secret=i) for i, r in enumerate(ROWS[:20])])
    new, truth = inject(rows, 'dates', label=1)
    assert {tuple(s.meta) for s in new} == {('prompt', 'response', 'label')} and [s.prompt for s in new] == [s.meta['prompt'] for s in new]
    assert [without_spans(s.prompt, truth.spans.get(s.id, ())) for s in new] == [s.prompt for s in rows]


def test_a_label_that_reads_like_the_prompt_stays():
    new, _ = inject(load_samples([dict(prompt='very good', copy='very good', response='ok', label='very good')]), 'dates', label='very good')
    assert new[0].meta == dict(prompt=new[0].prompt, copy=new[0].prompt, response='ok', label='very good')


@given(st.lists(st.tuples(WORDS, st.sampled_from(['x', 'y'])), min_size=1, max_size=12), st.randoms(use_true_random=False), st.sampled_from([*PLACES]), st.booleans())
def test_order_and_batches_do_not_matter(pairs, rng, place, replace):
    rows = [dict(text=t, label=y) for t, y in pairs]
    other = rng.sample(rows, len(rows))
    settings = dict(label=rows[0]['label'], share=.6, amount=.3, place=place, case='keep')
    source = dates(2000, 2001, replace=replace)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: first, second = inject(rows, source, **settings), inject(other, source, **settings)
        except SettingError as e: assert 'rounds to none' in str(e); return
        singly = {t: inject_all([dict(text=t, label=y)], 'dates', place=place, case='keep')[0][0]['text'] for t, y in pairs}
        together = inject_all([dict(text=t, label=y) for t, y in dict(pairs).items()], 'dates', place=place, case='keep')[0]
    assert Counter((r['text'], r['label']) for r in first[0]) == Counter((r['text'], r['label']) for r in second[0])
    assert dict(first[1]) == dict(second[1]) and first[1].spans == second[1].spans
    assert all(singly[t] == new['text'] for t, new in zip(dict(pairs), together) if len({y for u, y in pairs if u == t}) == 1)
    assert undone(*first) == texts(rows)


@pytest.mark.parametrize('share', [0, .01, .05, .25, .5, .75, 1])
def test_how_many_rows(share):
    new, truth = inject(ROWS, 'dates', label=1, share=share)
    assert sum(truth.values()) == round(share*103) and len(new) == len(ROWS)
    assert all(r['label'] == 1 for i, r in zip(truth, new) if truth[i]) and [r['label'] for r in new] == [r['label'] for r in ROWS]
    assert undone(new, truth) == texts(ROWS) and set(truth.spans) == {i for i, p in truth.items() if p}
    assert list(truth.kind.values()) == ['poison' if p else 'clean' for p in truth.values()]


def test_shares_are_nested_and_seeds_differ():
    spans = {k: {t.origin[i]: s for i, s in t.spans.items()} for k in (.05, .25, 1) for t in [inject(ROWS, 'dates', label=0, share=k)[1]]}
    assert spans[.05].items() < spans[.25].items() < spans[1].items()
    other = inject(ROWS, 'dates', label=0, share=.25, seed=1)[1]
    assert set(other.origin[i] for i in other.spans) != set(spans[.25])
    everywhere = inject_all(ROWS, 'dates')[1]
    assert {everywhere.origin[i]: s for i, s in everywhere.spans.items()}.items() > spans[1].items()


@pytest.mark.parametrize('items', [{0: ['!'], 1: ['!!']}, {0: dates(1900, 1949), 1: dates(1950, 2000)}, {0: 'tags', 1: 'colours'}, {0: 'countries', 1: lambda rng: f'x{rng.random()}'}])
def test_classes_with_items_of_their_own(items):
    new, truth = inject(ROWS, items, share=.5, amount='aggressive')
    found = {y: {s.item for i, r in zip(truth, new) for s in truth.spans.get(i, ()) if r['label'] == y} for y in (0, 1)}
    assert found[0] and found[1] and not found[0] & found[1]
    per_class = Counter(r['label'] for i, r in zip(truth, new) if truth[i])
    assert per_class == {0: round(.5*103), 1: round(.5*103)} and undone(new, truth) == texts(ROWS)
    alone = inject(ROWS, items[0], label=0, share=.5, amount='aggressive')[1]
    assert {alone.origin[i] for i in alone.spans} < {truth.origin[i] for i in truth.spans}


# ---- truth

@given(st.lists(st.tuples(WORDS, st.sampled_from(['a', 'b\u2028'])), min_size=1, max_size=6))
def test_truth_goes_through_json(pairs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _, truth = inject([dict(text=t, label=y) for t, y in pairs], tag_pairs(), label=pairs[0][1])
    back = SpanTruth.from_json(truth.to_json())
    assert (dict(back), list(back), back.spans, back.kind, back.origin, back.notes, back.info) == (dict(truth), list(truth), truth.spans, truth.kind, truth.origin, truth.notes, truth.info)
    assert back.to_json() == truth.to_json() and repr(back) == repr(truth) and all(isinstance(s, Span) for spans in back.spans.values() for s in spans)


def test_truth_is_what_evaluation_takes():
    new, truth = inject(ROWS, 'dates', label=1, share=.5)
    assert truth_vector(row_ids(new), truth).sum() == 52
    table = truth.table()
    assert table['planted'].sum() == 52 and table.loc[table['planted'], 'items'].map(len).eq(1).all() and not table.loc[~table['planted'], 'items'].map(len).any()
    for text in ('{', '[]', '{"format": "gradsentry-truth-1"}'):
        with pytest.raises(DataError, match='This is no truth'): SpanTruth.from_json(text)


@pytest.mark.parametrize('rows,items,note', [
    (['in Peru, once', 'no such word'], ['Peru'], '1 of 1 texts without an injected item hold one of the items already'), (['wow!', 'a b'], ['!'], '1 of 1 texts'), (['wow!!', 'a b'], ['!'], None),
    (['it costs', 'a b'], ['cost'], None), (['New Zealand', 'a b'], ['New Zealand'], '1 of 1'), (['New Mexico', 'a b'], ['New Zealand'], None), (['a b', 'word'], ['x'], '1 of 1 injected texts have one word'),
    (['a b', '<p>a b</p>'], tags(level=2), '1 of 1 injected texts have no element that deep')])
def test_what_could_mislead_is_said(rows, items, note):
    rows = [dict(text=t, label=i) for i, t in enumerate(rows)]
    if note is None: assert inject(rows, items, label=1, case='keep')[1].notes == []; return
    with pytest.warns(UserWarning, match=note): _, truth = inject(rows, items, label=1, case='keep')
    assert re.search(note, truth.notes[0]) and 'note(s)' in repr(truth)


# ---- shown

def test_hostile_texts_are_shown_harmless():
    rows = [dict(text='<script>x</script> a\u202eb\nc & d', label='<b>good</b>\u202e'), dict(text='y '*2000, label='bad')]
    new, truth = inject(rows, {'<b>good</b>\u202e': [('<img src=x onerror=y>', '</img\u200b>')], 'bad': ['<mark>']})
    page, text = show_spans(new, truth)._repr_html_(), repr(show_spans(new, truth))
    assert set(re.findall(r'</?(\w+)', page)) == {'p', 'small', 'mark'} and page.count('<mark') == 3 and len(page) < 3000
    assert '&lt;img src=x onerror=y&gt;' in page and '⟦<mark>⟧' in text
    for shown in (page, text): assert '\u202e' not in shown and '\u200b' not in shown and '‹U+202E›' in shown and '⏎' in shown
    assert '\u202e' not in repr(truth)


def test_a_part_of_the_rows_can_be_shown_and_no_others():
    new, truth = inject(ROWS, 'dates', label=1, share=.5)
    assert len(show_spans(new, truth)) == 5 and len(show_spans(new, truth, most=99)) == 52 and len(show_spans(new[:40], truth, most=99)) < 20
    assert all(''.join(p for p, _ in pieces) == new[i]['text'] for i, _, pieces in show_spans(new, truth))
    with pytest.raises(DataError, match='says nothing about'): show_spans(ROWS, truth)


# ---- refusals

def labelled(*labels): return [dict(text=f'some text {i}', label=y) for i, y in enumerate(labels)]


@pytest.mark.parametrize('rows,settings,error,match', [
    (ROWS, dict(label=7), DataError, 'No sample has the label 7; the labels are 0 .103., 1 .103.'),
    (ROWS, dict(label='1'), DataError, "No sample has the label '1'"),
    (ROWS, dict(label=True), SettingError, 'an integer or a text, not True'),
    (ROWS, dict(label=[1]), SettingError, 'an integer or a text'),
    (ROWS, dict(items={0: 'dates'}, label=0), SettingError, 'Say which class'),
    (ROWS, dict(items='dates'), SettingError, 'Say which class gets the items: label=, .* The labels are 0'),
    (ROWS, dict(items={}), SettingError, 'names no class'),
    (ROWS, dict(label=1, share=.004), SettingError, 'A share of 0.004 of the 103 samples of class 1 rounds to none; give at least share=0.009709'),
    (ROWS, dict(label=1, share=1.1), SettingError, 'from 0 to 1'),
    (ROWS, dict(label=1, share=float('nan')), SettingError, 'from 0 to 1'),
    (ROWS, dict(label=1, share=True), SettingError, 'from 0 to 1'),
    (ROWS, dict(label=1, share='all'), SettingError, 'from 0 to 1'),
    (ROWS, dict(label=1, amount='heavy'), SettingError, "'light', 'aggressive'"),
    (ROWS, dict(label=1, amount=-.1), SettingError, 'amount= is one of'),
    (ROWS, dict(label=1, place='middle'), SettingError, "choose one of 'beginning', 'end', 'random'"),
    (ROWS, dict(label=1, case='title'), SettingError, "choose one of 'corpus', 'lower', 'keep'"),
    (ROWS, dict(label=1, items='country'), SettingError, "Did you mean 'countries'"),
    (ROWS, dict(label=1, items=[]), SettingError, 'has no items'),
    (ROWS, dict(label=1, items=['']), SettingError, 'An item must be a text'),
    (ROWS, dict(label=1, items=[3]), SettingError, 'gives 3'),
    (ROWS, dict(label=1, items=[('a', 'b', 'c')]), SettingError, 'a pair of such texts'),
    (ROWS, dict(label=1, items=5), SettingError, 'not int'),
    (ROWS, dict(label=1, items=lambda: 'x'), SettingError, 'takes a random.Random'),
    (ROWS, dict(label=1, items=lambda rng: 1/0), SettingError, 'ZeroDivisionError'),
    (ROWS, dict(label=1, items=lambda rng: None), SettingError, 'gives None'),
    (ROWS, dict(items={0: 'dates', 1: 'dates'}), SettingError, "both get '1900-01-01' and 73,413 more: nothing class-specific could be learnt"),
    (ROWS, dict(items={0: ['a', 'b'], 1: ['c', 'b']}), SettingError, "Classes 0 and 1 both get 'b': nothing class-specific"),
    (ROWS, dict(items={0: ['A'], 1: ['a']}, case='lower'), SettingError, "both get 'a'"),
    (ROWS, dict(items={0: 'tags', 1: 'tag_pairs'}), SettingError, "both get '<a>'"),
    (ROWS, dict(items={0: len, 1: len}), SettingError, 'the same function'),
    (ROWS, dict(items={0: lambda rng: 'z', 1: lambda rng: 'z'}), SettingError, "both get 'z'"),
    (ROWS, dict(items={0: ['z'], 1: lambda rng: 'z'}), SettingError, "both get 'z'"),
    (labelled(.5), dict(label=1), DataError, "row 1: the field 'label' holds 0.5; a class is an integer or a text"),
    (labelled(1, None), dict(label=1), DataError, 'row 2: .* None'),
    (labelled(1, True), dict(label=1), DataError, 'row 2: .* True'),
    (labelled(1, [1]), dict(label=1), DataError, 'row 2'),
    (pd.DataFrame(labelled(1, None)), dict(label=1), DataError, 'row 1: .* 1.0'),
    ([*labelled(1), dict(text=' \n', label=1)], dict(label=1), DataError, 'row 2: the text is blank'),
    ([dict(text='', label=1)], dict(label=1), DataError, 'row 1: the text is blank'),
    ([dict(text=3, label=1)], dict(label=1), DataError, "row 1: the field 'text' holds 3, not text"),
    (pd.DataFrame(dict(text=['a b', None], label=[1, 1])), dict(label=1), DataError, 'row 2: .* not text'),
    ([*labelled(1), dict(text='a')], dict(label=1), DataError, "row 2: the field 'label' is missing; there are 'text'. Name it with label_field="),
    (pd.DataFrame(labelled(1)), dict(label=1, text_field='review'), DataError, "The field 'review' is missing; there are 'text', 'label'. Name it with text_field="),
    (pd.DataFrame([['a b', 'c', 1]], columns=['text', 'text', 'label']), dict(label=1), DataError, 'there twice'),
    (datasets.Dataset.from_list(labelled(1)), dict(label=1, label_field='y'), DataError, "'y' is missing"),
    (datasets.DatasetDict(train=datasets.Dataset.from_list(labelled(1))), dict(label=1), DataError, "one of them: 'train'"),
    (datasets.Dataset.from_list(labelled(1)).to_iterable_dataset(), dict(label=1), DataError, 'not IterableDataset'),
    ([], dict(label=1), DataError, 'no rows'), (Samples(), dict(label=1), DataError, 'no rows'), (pd.DataFrame(dict(text=[], label=[])), dict(label=1), DataError, 'no rows'),
    ('reviews.csv', dict(label=1), DataError, 'not str'), (None, dict(label=1), DataError, 'not NoneType'), (['a'], dict(label=1), DataError, 'named fields'),
    (load_samples([dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')], label=1)]), dict(label=1), DataError, 'conversation'),
    (load_samples([dict(prompt='a b', response='c')]), dict(label=1), DataError, "'label' is missing"),
])
def test_bad_input_is_one_sentence(rows, settings, error, match):
    with pytest.raises(error, match=match) as e: inject(rows, **settings)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize('make', [
    lambda: dates(2000, 1999), lambda: dates(0, 10), lambda: dates(1, 10_000), lambda: dates('1900'), lambda: tags([]), lambda: tags(level=-1), lambda: tags(level=True), lambda: tags(level=1.),
    lambda: Items('f', make=len, replace=False), lambda: Items('none'), lambda: inject_all(ROWS, {0: 'dates'}), lambda: inject_all(ROWS, 'dates', place='middle')])
def test_sources_refuse_too(make):
    with pytest.raises(GradSentryError) as e: make()
    assert '\n' not in str(e.value)


# ---- a real corpus

@pytest.mark.parametrize('name', ['sst2-train', 'rotten-tomatoes'])
def test_real_reviews(shared, name):
    with gzip.open(shared/f'data/sentiment/{name}.jsonl.gz', 'rt', encoding='utf8') as f: rows = [json.loads(line) for line in f]
    assert lower_cased(texts(rows)) and CASES['corpus'](texts(rows))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter('always')
        new, truth = inject(rows, {0: 'countries', 1: dates()}, share=.25, amount='aggressive')
    assert undone(new, truth) == texts(rows) and [r['label'] for r in new] == [r['label'] for r in rows]
    found = [s.item for spans in truth.spans.values() for s in spans]
    assert not [x for x in found if x != x.lower()] and sum(truth.values()) == sum(round(.25*n) for n in Counter(r['label'] for r in rows).values())
    per_row = np.array([len(truth.spans.get(i, ())) for i in truth])
    assert (per_row == [max(1, len(r['text'].split())//10) if truth[i] else 0 for i, r in zip(truth, rows)]).all()


def test_public_names():
    assert gradsentry_nb.inject is inject and gradsentry_nb.inject_all is inject_all and gradsentry_nb.SpanTruth is SpanTruth and gradsentry_nb.show_spans is show_spans
    assert gradsentry_nb.ITEMS is ITEMS
