"Spurious tokens as a person meets them: marked in texts, in a terminal, as a magic, on sliders; and every bad input in one sentence."
import contextlib
import io
import itertools
import json
import re
import time

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import gradsentry_nb
from gradsentry_nb.attacks.ssti import SpanTruth, inject, row_ids, show_spans
from gradsentry_nb.cli import main
from gradsentry_nb.core import DataError, SettingError, SpanView, marked, pieces
from gradsentry_nb.data import WRITERS, load_rows, write_rows
from gradsentry_nb.demo import demo_model_path
from gradsentry_nb.magics import completions
from gradsentry_nb.spurious import made_reviews, scan_tokens, word_encoder
from gradsentry_nb.ssti_study import KIND, STORED, SteeringGrid, run_steering, stored_steering
from gradsentry_nb.ssti_view import SLIDERS, at_setting, kinds, of_kind, over_runs, steering_table, steering_view, ways_out

torch.set_num_threads(1)
REVIEWS = made_reviews()
MIX, TRUTH = inject(REVIEWS, 'dates', label=1, share=.06)
ACTIVE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e0fff]')


@pytest.fixture(scope='module')
def scan(): return scan_tokens(MIX)


# ---- spans in text

@given(st.text(st.sampled_from('ab<>&"\n\u202e\u200b\ud800'), max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_pieces_are_the_text_and_nothing_in_them_acts(text, cuts):
    at = sorted(min(c, len(text)) for c in cuts[:len(cuts)//2*2])
    parts = pieces(text, list(zip(at[::2], at[1::2])))
    assert ''.join(p for p, _ in parts) == text and ''.join(p for p, on in parts if on) == ''.join(text[a:b] for a, b in zip(at[::2], at[1::2]))
    page = marked(parts, page=True)
    assert set(re.findall('<(/?[^ >]*)', page)) <= {'mark', '/mark'} and page.count('<mark') == page.count('</mark>') == sum(on for _, on in parts)
    for shown in (page, marked(parts)): assert not ACTIVE.search(shown) and '\n' not in shown


def test_a_span_is_never_in_the_part_that_is_left_out():
    text = 'x'*5000+' ITEM '+'y'*5000
    assert '⟦ITEM⟧' in marked(pieces(text, [(5001, 5005)]), 60) and len(marked(pieces(text, [(5001, 5005)]), 60)) < 200
    assert len(marked(pieces('!'*200_000, [(i, i+1) for i in range(0, 200_000, 2)]), page=True)) < 20_000
    assert repr(SpanView()) == 'No text holds a span.' and '<' in SpanView()._repr_html_()


def test_a_mark_is_seen_without_colour():
    style = re.search('style="([^"]*)"', marked([('x', True)], page=True))[1]
    assert 'font-weight' in style and 'border-bottom' in style and 'color:inherit' in style


def test_what_a_scan_marks_is_what_was_put_in(scan):
    by_row = {i: parts for i, _, parts in show_spans(MIX, TRUTH, most=10**6)}
    assert {i: parts for i, _, parts in scan.show(most=10**6)} == by_row and len(by_row) == 18
    assert len(scan.show(most=2)) == 2 and len(scan.show(REVIEWS)) == 0
    page = scan._repr_html_()
    assert page.count('<mark') == 10 and re.search(r'<mark[^>]*>\d{4}-\d\d-\d\d</mark>', page)      # an example for each of ten rows of the table
    assert all(re.search(r'⟦\d{4}-\d\d-\d\d⟧', x) for x in scan.found['examples'][0])


def test_an_encoder_by_name(tmp_path):
    with pytest.raises(gradsentry_nb.ModelError, match='cannot be loaded as an encoder'): word_encoder(str(tmp_path))
    shape = dict(vocab_size=2048, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32)
    model, tokenizer = tf.BertModel(tf.BertConfig(**shape)).eval(), tf.AutoTokenizer.from_pretrained(demo_model_path())
    model.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    assert np.allclose(word_encoder(tmp_path)(['peru', 'chad']), word_encoder(model, tokenizer)(['peru', 'chad']), atol=1e-6)


# ---- files of rows

@pytest.mark.parametrize('ending', WRITERS)
def test_rows_come_back_from_a_file(tmp_path, ending):
    write_rows(MIX, tmp_path/f'new/x{ending.upper()}')
    assert [(r['text'], str(r['label'])) for r in load_rows(tmp_path/f'new/x{ending.upper()}')] == [(r['text'], str(r['label'])) for r in MIX]
    assert [p.name for p in (tmp_path/'new').iterdir()] == [f'x{ending.upper()}']


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match='only .jsonl can keep'): write_rows([dict(text='\ud800')], tmp_path/'x.csv')
    assert not list(tmp_path.iterdir())
    write_rows([dict(text='\ud800', n=None)], tmp_path/'x.jsonl')
    assert load_rows(tmp_path/'x.jsonl') == [dict(text='\ud800', n=None)]
    with pytest.raises(DataError, match='x.jsonl: there are no rows'): (tmp_path/'x.jsonl').write_text(''); load_rows(tmp_path/'x.jsonl')


# ---- in a terminal

@pytest.fixture
def ssti(tmp_path, capfd, monkeypatch):
    "Run `gradsentry ssti` in a folder with two files: (status, stdout, stderr)."
    write_rows(MIX, tmp_path/'mix.jsonl'); write_rows([dict(sentence=r['text'], y='good' if r['label'] else 'bad', id=i) for i, r in enumerate(MIX)], tmp_path/'mix.csv')
    monkeypatch.chdir(tmp_path)
    def run(*args):
        capfd.readouterr()
        status = main(['ssti', *map(str, args)])
        return status, *capfd.readouterr()
    return run


def test_items_with_evidence_and_examples(ssti, scan):
    status, said, err = ssti('mix.jsonl')
    r = scan.found.iloc[0]
    assert (status, err) == (0, '') and f'1. “0000-00-00” (shape): {r["rows"]:,} rows, {r["inside"]:,} of them of class 1, p = {r["p"]:.2g}' in said and said.count('⟦') == 3 and '--out clean.jsonl' in said
    status, said, err = ssti('mix.jsonl', '--json')
    d = json.loads(said)
    assert (status, err, d['rows'], d['candidates']) == (0, '', 600, len(scan.some)) and d['p'] == pytest.approx(.05) and d['found'][0]['item'] == '0000-00-00' and d['found'][0]['score'] == pytest.approx(r['score'])
    status, said, _ = ssti('mix.jsonl', '--p', 1e-12)
    assert status == 0 and 'nothing stands out. The first is “0000-00-00”' in said and 'Next' not in said


@pytest.mark.parametrize('source, fields', [('mix.jsonl', ()), ('mix.csv', ('--text-field', 'sentence', '--label-field', 'y'))])
@pytest.mark.parametrize('how', [None, 'remove', 'drop'])
def test_the_cleaned_file(ssti, source, fields, how, tmp_path):
    out = f'sub/clean.{source.split(".")[1]}'
    status, said, err = ssti(source, *fields, '--out', out, *(['--clean', how] if how else []))
    rows, given = load_rows(out), load_rows(source)
    text = fields[1] if fields else 'text'
    kept = [i for i in range(600) if how != 'drop' or MIX[i] == REVIEWS[i]]
    assert (status, err) == (0, '') and rows == [{**given[i], text: REVIEWS[i]['text']} for i in kept] and f'{len(rows):,} rows' in said and '18' in said


def test_items_put_in_by_a_line(ssti):
    assert ssti('mix.csv', '--text-field', 'sentence', '--label-field', 'y', '--inject', 'tag_pairs', '--class', 'bad', '--share', .4, '--amount', .2, '--place', 'end', '--seed', 4, '--out', 'two.jsonl')[0] == 0
    rows, truth = load_rows('two.jsonl'), SpanTruth.from_json(open('two.truth.json').read())
    want, wanted = inject(load_rows('mix.csv'), 'tag_pairs', label='bad', share=.4, amount=.2, place='end', seed=4, text_field='sentence', label_field='y')
    assert rows == want and truth == wanted and truth.spans == wanted.spans and list(truth) == row_ids(rows, 'sentence', 'y') and 'poison' not in open('two.jsonl').read()
    open('items.txt', 'w').write('blue moon\n\ngrey\n')
    status, said, _ = ssti('mix.jsonl', '--inject', 'items.txt', '--class', 1, '--out', 'own.csv')
    assert status == 0 and '300 of 600 rows got items (items.txt, class 1, seed 0), 300 spans in all' in said and re.search('⟦(blue moon|grey)⟧', said)


ONE_CLASS, ONE_WORD = [dict(text='a b', label=1)]*3, [dict(text='word', label=i % 2) for i in range(4)]
BAD = [   # what the file holds, the options, what is said
    (REVIEWS, ['--inject', 'dates', '--class', 7, '--out', 'x.jsonl'], "rows.jsonl: No sample has the label '7'; the labels are 0 (300), 1 (300)"), (REVIEWS, ['--inject', 'dates', '--out', 'x.jsonl'], 'which class gets the items: --class LABEL; the labels are 0, 1'),
    (REVIEWS, ['--inject', 'dates', '--class', 1, '--share', .001, '--out', 'x.jsonl'], 'rounds to none; give at least share='), (REVIEWS, ['--inject', 'dates', '--class', 1, '--share', 2, '--out', 'x.jsonl'], 'from 0 to 1'),
    (REVIEWS, ['--inject', 'empty.txt', '--class', 1, '--out', 'x.jsonl'], 'has no items'), (REVIEWS, ['--inject', 'date', '--class', 1, '--out', 'x.jsonl'], "There is no file and no source of items 'date'; choose one of 'dates'"),
    (REVIEWS, ['--inject', 'dates', '--class', 1, '--place', 'middle', '--out', 'x.jsonl'], "'beginning', 'end', 'random'"), (REVIEWS, ['--inject', 'dates', '--class', 1, '--amount', 'heavy', '--out', 'x.jsonl'], "'light', 'aggressive'"),
    (REVIEWS, ['--inject', 'dates', '--class', 1, '--amount', 'nan', '--out', 'x.jsonl'], 'amount= is one of'), (REVIEWS, ['--inject', 'dates', '--class', 1, '--case', 'title', '--out', 'x.jsonl'], "'corpus', 'lower', 'keep'"),
    (REVIEWS, ['--inject', 'dates', '--class', 1], '--inject writes rows: say where with --out FILE'), (REVIEWS, ['--clean', 'drop'], '--clean writes rows'), (REVIEWS, ['--clean', 'delete', '--out', 'x.jsonl'], "'remove', 'drop'"),
    (REVIEWS, ['--class', 1], '--class says how items are put in: add --inject'), (REVIEWS, ['--inject', 'dates', '--p', .1, '--class', 1, '--out', 'x.jsonl'], '--p is for finding items; leave out --inject'),
    (REVIEWS, ['--inject', 'dates', '--json', '--class', 1, '--out', 'x.jsonl'], '--json is for finding'), (REVIEWS, ['--text-field', 'review'], "rows.jsonl: row 1: the field 'review' is missing; there are 'text', 'label'. Name it with text_field= (--text-field)"),
    (REVIEWS, ['--label-field', 'y'], '(--label-field)'), (REVIEWS, ['--out', 'x.xlsx'], 'end in .jsonl, .csv, .tsv'), (REVIEWS, ['--out', 'rows.jsonl'], 'would be overwritten'), (REVIEWS, ['--out', 'rows.jsonl/x.csv'], 'is a file'), (REVIEWS, ['--out', 'a\0.csv'], ''),
    (REVIEWS, ['--p', 2], 'p= lies between'), (REVIEWS, ['--least', 1], 'least= is'), (REVIEWS, ['--split', 'test'], 'no splits'), (REVIEWS, ['--encoder', 'nowhere'], 'cannot be loaded as an encoder'),
    (ONE_CLASS, [], 'All 3 rows have the class 1'), (ONE_WORD, [], 'Only 0 words'), ([dict(text='a', label=.5)], [], "holds 0.5; a class is an integer or a text"), ([dict(text='a', label=None)], [], 'a class is an integer or a text'),
    ([dict(text=3, label=1)], [], 'not text'), (['a'], [], 'named fields'), ([], [], 'there are no rows in it'), ([dict(text='\u202e\x1b[31m', label='\ud800')], [], 'have the class')]


@pytest.mark.parametrize('rows, args, said', BAD, ids=range(len(BAD)))
def test_bad_input_is_one_sentence(ssti, tmp_path, rows, args, said):
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows)); (tmp_path/'empty.txt').write_text('\n\n')
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    status, out, err = ssti('rows.jsonl', *args)
    assert (status, out) == (2, '') and err.startswith('gradsentry: ') and said in err and err.count('\n') == 1 and len(err) < 600 and not ACTIVE.search(err)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_texts_of_one_word_are_said_and_no_file_is_refused(ssti, tmp_path):
    write_rows(ONE_WORD, tmp_path/'one.jsonl')
    status, said, _ = ssti('one.jsonl', '--inject', 'dates', '--class', 1, '--out', 'x.jsonl')
    assert status == 0 and '2 of 2 injected texts have one word: the item is half of them.' in said
    assert ssti('nowhere.jsonl')[0] == 2 and ssti('nowhere.jsonl')[2] == 'gradsentry: nowhere.jsonl: there is no such file.\n'


def test_hostile_items_in_a_terminal(ssti, tmp_path):
    made, _ = inject(REVIEWS, ['\x1b[31m<img\u202e>'], label=1, share=.1)
    write_rows(made, tmp_path/'hostile.jsonl')
    for args in ((), ('--json',), ('--out', 'c.jsonl')):
        status, said, err = ssti('hostile.jsonl', *args)
        assert status == 0 and not ACTIVE.search(said+err) and 'img' in said
    assert sum('img' in r['text'] for r in load_rows('c.jsonl')) == 0


def test_stopped_by_hand(ssti, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr('gradsentry_nb.spurious.scan_tokens', stop)
    assert ssti('mix.jsonl') == (130, '', 'Interrupted; nothing was written.\n')


# ---- as a magic

@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path/'profile')); monkeypatch.chdir(tmp_path)
    s = InteractiveShell(config=Config(HistoryManager=dict(enabled=False)))
    gradsentry_nb.load_ipython_extension(s)
    yield s
    gradsentry_nb.unload_ipython_extension(s)


def test_every_kind_of_rows(shell, scan):
    write_rows(MIX, 'mix.jsonl')
    shell.user_ns.update(rows=MIX, pair=(MIX, TRUTH), many=tuple(MIX), frame=pd.DataFrame(MIX), data=datasets.Dataset.from_list(MIX), path='mix.jsonl', splits=datasets.DatasetDict(test=datasets.Dataset.from_list(MIX)))
    for name in ('rows', 'pair', 'many', 'frame', 'data', 'path', 'mix.jsonl', 'splits --split test'):
        got = shell.run_line_magic('gs_ssti', f'{name} --to clean')
        pd.testing.assert_frame_equal(got.every, scan.every)
        clean = shell.user_ns['clean']
        assert [*clean['text']] == [r['text'] for r in REVIEWS] if name in ('frame', 'data', 'splits --split test') else clean == REVIEWS
    assert type(shell.user_ns['clean']).__name__ == 'Dataset'
    shell.run_line_magic('gs_ssti', 'rows --clean drop --to clean')
    assert shell.user_ns['clean'] == [a for a, b in zip(MIX, REVIEWS) if a == b]


def test_items_by_a_magic(shell, capsys):
    shell.user_ns['rows'] = [*REVIEWS, dict(text='word', label=1)]
    made, truth = shell.run_line_magic('gs_ssti', 'rows --inject punctuation --class 1 --amount 0.1 --place end')
    with pytest.warns(UserWarning): want, wanted = inject(shell.user_ns['rows'], 'punctuation', label=1, amount=.1, place='end')
    assert made == want and truth.spans == wanted.spans and capsys.readouterr().out.splitlines() == wanted.notes != []


@pytest.mark.parametrize('line, said', [('', 'SOURCE'), ('rows --inject date --class 1', "'dates'"), ('rows --inject dates', '--class LABEL'), ('rows --inject dates --class 9', 'No sample'), ('rows --clean drop', '--to VARIABLE'), ('rows --to if', 'variable'),
                                        ('rows --clean delete --to x', "'remove', 'drop'"), ('rows --share .1', '--inject'), ('n', 'holds an int'), ('rows --text-field x', '--text-field'), ('rwos', 'Did you mean the variable rows'), ('rows --split test', 'no splits')])
def test_a_magic_refuses_in_one_sentence(shell, line, said):
    shell.user_ns.update(rows=REVIEWS, n=3)
    with pytest.raises(UsageError) as e: shell.run_line_magic('gs_ssti', line)
    assert said in str(e.value) and '\n' not in str(e.value)


def test_completion(shell, tmp_path):
    from gradsentry_nb.magics import attached
    shell.user_ns['rows'] = MIX
    ends = lambda text: completions(attached(shell), f'%gs_ssti {text}')[1]
    write_rows(MIX, 'mix.jsonl')
    assert ends('') == ['rows', 'mix.jsonl', 'profile/'] or set(ends('')) >= {'rows', 'mix.jsonl'} and 'demo' not in ends('')
    assert ends('rows --text-field ') == ['text', 'label'] and ends('rows --inject da') == ['dates'] and ends('rows --place ') == ['beginning', 'end', 'random'] and ends('rows --clean ') == ['remove', 'drop'] and ends('rows --cl') == ['--clean', '--class']


# ---- on sliders

@pytest.fixture
def undrawn(monkeypatch): monkeypatch.setattr('gradsentry_nb.ssti_view._charts', lambda view: [])     # which takes longer than everything else here


def cell(r, share, amount, seed, gap=0., **more):
    own = dict(model='enc', dataset='reviews', items='@', target='1', head='frozen', targets='paper', optimizer='adamw', steps=4, batch=8, tuned=f'rank {r}' if r else 'full', r=r, lr=2e-2, amount=amount, share=share, seed=seed, status='done')
    return own | {f'{m}{e}': v+d for m, v in dict(clean_balanced=.8, injected_balanced=.8+gap/100, gap=gap, forced=.5+gap/100).items() for e, d in (('', 0), ('_low', -.05), ('_high', .05))} | more


TOY = pd.DataFrame([cell(r, s, a, seed, gap=10.*s+seed+(r or 0)) for r in (1, 4, None) for s in (0., .5, 1.) for a in ('light', 'aggressive') for seed in (1, 2) if (r, s) != (4, .5)] + [cell(4, 1., 'light', 1, head='trained', gap=30.), cell(4, .5, 'light', 1, status='failed', gap=99.)])


def test_every_place_of_the_sliders_shows_its_runs_or_none(undrawn):
    v, t = steering_view(TOY), TOY[TOY['status'] == 'done']
    assert [len(w.options) for w in v.sliders.values()] == [3, 3, 2, 1] and len(v.kinds) == 2 and v.sliders['lr'].disabled
    for k, tuned, share, amount in itertools.product(range(2), *(x.values() if isinstance(x, dict) else [o[1] for o in x.options] for x in [v.sliders[c] for c in ('tuned', 'share', 'amount')])):
        v.which.value = k
        for c, x in dict(tuned=tuned, share=share, amount=amount).items(): v.sliders[c].value = x
        want = t[(t['head'] == v.kind['head']) & (t['tuned'] == tuned) & (t['share'] == share) & (t['amount'] == amount)]
        assert sorted(v.cells['gap']) == sorted(want['gap']) and ('no stored run for this setting, and nothing is interpolated' in v.head.value) == (not len(want))
        if len(want) > 1: assert f'gap <b>{want["gap"].mean():.1f}</b>' in v.head.value and f'seeds {", ".join(map(str, want["seed"]))}' in v.head.value
        assert v.go.disabled and 'models=' in v.why.value


def test_the_way_to_a_stored_run(undrawn):
    v = steering_view(TOY)
    v.sliders['tuned'].value, v.sliders['share'].value, v.sliders['amount'].value = 'rank 4', .5, 'light'
    assert ways_out(v.done, v.setting) == dict(tuned=['rank 1', 'full'], share=[0., 1.], amount=[], lr=[]) and 'rank 1, full; share 0 %, 100 %' in v.head.value
    v.sliders['share'].value = 1.; v.seed.value = 2
    assert v.cells['seed'].tolist() == [2] and over_runs(v.cells, 'gap') == pytest.approx((16., 15.95, 16.05))
    v.which.value = 1
    assert 'No stored run has seed 2 for this setting' in v.head.value


def test_full_tuning_goes_with_every_choice_of_layers():
    t = steering_table(pd.DataFrame([cell(4, 1., 'light', 1), cell(4, 1., 'light', 1, targets='qv'), cell(None, 1., 'light', 1, targets=None)]))
    assert len(kinds(t)) == 2 and [of_kind(t, k).tolist() for k in kinds(t)] == [[True, False, True], [False, True, True]]


def tiny_encoder(path):
    "A folder with a BERT of random weights."
    torch.manual_seed(1)
    tf.BertForSequenceClassification(tf.BertConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, pad_token_id=0)).save_pretrained(path)
    tf.AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(path)
    return str(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny_encoder(tmp_path_factory.mktemp('enc'))


GRID = SteeringGrid(ranks=(1, 4), shares=(0, .5, 1), items=(['@'],), lrs=(2e-2,), seeds=(1, 2), tuning=dict(steps=4, batch=8, max_length=24))
ROWS = made_reviews(40, seed=3), made_reviews(24, seed=4)


def runnable(folder, table=TOY, **kw): return steering_view(table, dict(enc=str(folder)), dict(reviews=ROWS), **{**dict(grid=GRID), **kw})


def test_a_new_run_is_the_cell_of_the_setting(folder, tmp_path, undrawn):
    v = runnable(folder, out=tmp_path)
    v.sliders['tuned'].value, v.sliders['share'].value, v.sliders['amount'].value = 'rank 4', .5, 'light'
    assert not v.go.disabled and v.go.description == 'run this setting, seed 1' and not len(v.cells)
    seen = []
    v.bar.observe(lambda c: seen.append(v.progress.value), 'value')
    v.on_go(None); v.run.wait(60)
    want = run_steering(SteeringGrid(**{**vars(GRID), 'ranks': (4,), 'shares': (.5,), 'seeds': (1,)}), dict(enc=str(folder)), dict(reviews=ROWS), progress=False)
    assert v.run.state == 'done' and len(v.cells) == 1 and v.cells['gap'].iloc[0] == want['gap'][0] and v.cells['forced'].iloc[0] == want['forced'][0] and 'done after' in v.progress.value
    assert len(v.table) == len(TOY) and any('training' in s for s in seen) and len(list((tmp_path/'cells').iterdir())) == 1     # the failed cell was replaced
    assert v.go.description == 'run this setting, seed 2' and f'gap <b>{want["gap"][0]:.1f}</b>' in v.head.value
    v.seed.value = 1; v.on_go(None); v.run.wait(60)
    assert len(v.table) == len(TOY) and '1 run, seed 1' in v.head.value


def test_only_a_run_of_the_same_kind_is_offered(folder, undrawn):
    v = runnable(folder)
    assert not v.go.disabled
    v.which.value = 1
    assert not v.go.disabled, 'the head is a setting that any grid can take'
    for kw, said in ((dict(grid=SteeringGrid(**{**vars(GRID), 'tuning': dict(steps=5, batch=8)})), 'No grid'), (dict(grid=SteeringGrid(**{**vars(GRID), 'items': ('dates',)})), 'No grid'), (dict(grid=None), 'No grid')):
        w = runnable(folder, **kw)
        w.which.value = next(i for i, k in enumerate(w.kinds) if k['items'] == '@' and k['steps'] == 4)
        assert w.go.disabled and said in w.why.value
        w.on_go(None)
        assert w.run is None and said in w.status.value
    w = steering_view(TOY, dict(other=str(folder)), dict(reviews=ROWS), GRID)
    assert w.go.disabled and 'has the model enc, which is not in models=; there is other' in w.why.value


def test_stop_and_failure_are_said_and_the_view_goes_on(folder, undrawn):
    v = runnable(folder, TOY.iloc[:0], grid=SteeringGrid(**{**vars(GRID), 'tuning': dict(steps=4000, batch=8, max_length=24)}))
    v.on_go(None)
    for _ in range(200):
        if v.run.what == 'training': break
        time.sleep(.05)
    v.on_go(None)
    assert 'A run is under way' in v.status.value and v.go.disabled and not v.end.disabled
    v.on_end(None); v.run.wait(20)
    assert v.run.state == 'stopped' and not len(v.table) and not v.go.disabled and 'stopped after' in v.progress.value
    v = runnable(folder)
    v.datasets['reviews'] = [r for r in ROWS[0] if not r['label']], ROWS[1]
    v.on_go(None); v.run.wait(20)
    assert v.run.state == 'failed' and 'No sample has the label 1' in v.status.value and not v.go.disabled
    v.datasets['reviews'], v.models['enc'] = ROWS, '<b>nowhere'
    v.on_go(None); v.run.wait(20)
    assert 'cannot be made a classifier' in v.status.value and '<b>nowhere' not in v.status.value


def test_a_cell_that_fails_says_why(folder, monkeypatch, undrawn):
    def broken(*a, **k): raise gradsentry_nb.ModelError('broken on purpose')
    monkeypatch.setattr('gradsentry_nb.ssti_study.tune_classifier', broken)
    v = runnable(folder); before = len(v.table)
    v.on_go(None); v.run.wait(20)
    assert 'The run failed: broken on purpose' in v.status.value and len(v.table) == before


def test_only_core_widgets_and_hostile_names():
    v = steering_view(pd.DataFrame([cell(4, 1., 'light', 1, model='<script>x</script>', items='\u202e<b>')]))
    tree = lambda w: [w, *(x for c in getattr(w, 'children', ()) for x in tree(c))]
    assert {type(w)._model_module.default_value for w in tree(v.widget)} <= {'@jupyter-widgets/controls', '@jupyter-widgets/base'}
    for w in tree(v.widget): assert '<script>' not in str(getattr(w, 'value', '')) and '\u202e' not in str(getattr(w, '_options_labels', ''))
    page = v.static_html()
    assert v.pictures.value.count('<svg') == 2 and '<script' not in page and page.count('<img') == 2 and 'rank 4' in page


@pytest.mark.parametrize('table, error, said', [(TOY.drop(columns='forced'), SettingError, "no column 'forced'"), (3, SettingError, 'not int'), (TOY.iloc[:0], SettingError, 'nothing to show')])
def test_a_table_that_is_none(table, error, said):
    with pytest.raises(error, match=said): steering_view(table)


def test_tables_from_files(tmp_path):
    TOY.to_csv(tmp_path/'t.csv', index=False)
    a, b = steering_table(tmp_path/'t.csv'), steering_table(TOY)
    assert (a[list(KIND)] == b[list(KIND)]).all().all() and [at_setting(x, dict(share=1., lr=2e-2, tuned='full', amount='light')).sum() for x in (a, b)] == [2, 2]


def test_the_package_has_the_stored_study():
    there = ROOT/'benchmarks'/'results'/'steering.csv'
    full = pd.read_csv(there, dtype=dict.fromkeys(('items', 'target', 'amount'), str))
    pd.testing.assert_frame_equal(stored_steering(), full[list(STORED)], obj='run `python -c "from benchmarks.steering import pack; pack()"`: what the package has of the stored study')
    assert set(SLIDERS) <= set(STORED) and len(steering_view().cells) >= 1


def test_the_commands_answer_help(capsys):
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()): main(['ssti', '--help'])
    said = capsys.readouterr().out
    for option in ('--inject', '--clean', '--encoder', '--text-field', '--json', '--out'): assert option in said
