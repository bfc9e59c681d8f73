"The study of spurious items: cells, their resumption, every measure beside a count by hand, and the charts beside the table."
import json
import math
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from conftest import ROOT

from gradsentry_nb import ssti_study as st
from gradsentry_nb.attacks.ssti import inject, inject_all
from gradsentry_nb.core import DataError, ModelError, SettingError
from gradsentry_nb.demo import demo_model_path
from gradsentry_nb.ssti_study import SteeringGrid, collect_steering, forced_chart, forced_table, plan_steering, rank_maps, run_steering, share_lines
from gradsentry_nb.threshold import wilson
from gradsentry_nb.train import attention_entropy, load_classifier, tune_classifier

torch.set_num_threads(1)
SHAPE = dict(vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, pad_token_id=0, initializer_range=.2)
TUNING = dict(steps=24, batch=8, max_length=32)
GRID = SteeringGrid(ranks=(4,), shares=(0, .5, 1), amounts=('light', 'aggressive'), items=(['@'],), lrs=(2e-2,), tuning=TUNING)
BOTH = {0: ['@'], 1: ['#']}


def film(i, good): return dict(text=f'the {("film", "plot", "cast", "end")[i % 4]} is {("bad", "good")[good]}{" indeed"*(i % 5)}', label=good)
def films(a, b): return [film(i, good) for i in range(a, b) for good in (0, 1)]


DATA = dict(made=(films(0, 40), films(40, 52)))


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A folder with a BERT that has learnt nothing."
    folder = tmp_path_factory.mktemp('models')
    for seed in (1, 2):
        torch.manual_seed(seed)
        tf.BertForSequenceClassification(tf.BertConfig(**SHAPE)).save_pretrained(folder/f'tiny{seed}')
        tf.AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder/f'tiny{seed}')
    return folder/'tiny1'


@pytest.fixture
def tuned(monkeypatch):
    "Which trainings were run: (rank, how many texts hold an item)."
    seen, real = [], st.tune_classifier
    def tune(model, tokenizer, texts, labels, **kw):
        seen.append((kw.get('r', 'full'), sum('@' in x for x in texts)))
        return real(model, tokenizer, texts, labels, **kw)
    monkeypatch.setattr(st, 'tune_classifier', tune)
    return seen


def run(tiny, grid=GRID, out=None, data=DATA, progress=False, **kw): return run_steering(grid, dict(tiny=tiny), data, out, progress=progress, **kw)


# ---- which cells there are

def test_every_combination_once():
    g = SteeringGrid(ranks=(1, 4, 'full'), shares=(0, .5, 1), amounts=('light', .2), items=('dates', BOTH), lrs=(1e-3, None), heads=('frozen', 'trained'), targets=('paper', 'qv'), seeds=(1, 2))
    cells = plan_steering(g, ['m'], ['a', 'b'])
    assert len(cells) == len({c.key for c in cells}) == 2*2*2*2*(2*2+1)*3*2*2, 'full tuning has no targets'
    assert len({c.training for c in cells}) == 2*2*2*2*(2*2+1)*(1+2*2*2), 'nothing injected is one training for all items and amounts'
    order = [c.training for c in cells]
    assert sum(a != b for a, b in zip(order, order[1:]))+1 == len(set(order)), 'cells that share a classifier are neighbours'
    assert {c.settings.lr for c in cells if c.rank == 'full'} == {1e-3, 1e-4} and all(c.settings.alpha == c.rank for c in cells if c.rank != 'full')


def test_key_depends_on_everything():
    c = plan_steering(GRID, ['m'], ['d'])[-1]
    other = [replace(c, **{k: v}) for k, v in dict(model='x', dataset='x', seed=1, lr=1e-3, head='trained', targets='qv', rank=3, share=.25, amount='light', items=st.items_choice(['#'], 1)).items()]
    fixed = [plan_steering(replace(GRID, **{k: v}), ['m'], ['d'])[-1] for k, v in dict(place='end', label=0, train_rows=9, test_rows=9, tuning=dict(TUNING, batch=4), preset='paper').items()]
    assert set(asdict(c)) == {'model', 'dataset', 'seed', 'lr', 'head', 'targets', 'rank', 'share', 'amount', 'items', 'fixed'} and len({x.key for x in (c, *other, *fixed)}) == 17
    assert len({json.dumps(x.items.settings) for x in (c, fixed[1])}) == 2, 'another class is another item'


@pytest.mark.parametrize('fields, said', [
    (dict(shares=(1.5,)), 'A share is a number'), (dict(ranks=(0,)), "or 'full', not 0"), (dict(ranks=()), 'ranks is empty'), (dict(seeds=('a',)), "not 'a'"), (dict(amounts=('much',)), "no amount 'much'"),
    (dict(items=('dats',)), "Did you mean 'dates'"), (dict(items=('dates', 'dates')), "Two of items= are called 'dates'"), (dict(items=(lambda rng: 'x',)), 'a name or a list'), (dict(items=([],)), 'has no items'),
    (dict(place='middle'), "no place 'middle'"), (dict(heads=('cut',)), "no head 'cut'"), (dict(preset='big'), "no preset 'big'"), (dict(tuning=dict(rank=2)), "no setting 'rank'"),
    (dict(tuning=dict(lr=1.)), 'give lrs= instead'), (dict(tuning=dict(steps=-1)), 'steps must be'), (dict(lrs=(-1.,)), 'lr must be'), (dict(train_rows=0), 'train_rows is a whole'), (dict(ranks=4), 'ranks= is a tuple'), (dict(items='dates'), 'items= is a tuple')])
def test_a_grid_says_what_is_wrong(fields, said):
    with pytest.raises(SettingError, match=said): SteeringGrid(**fields)


def test_all_problems_of_a_grid_at_once():
    with pytest.raises(SettingError) as e: SteeringGrid(ranks=(0,), shares=(2,), heads=('x',))
    assert all(x in str(e.value) for x in ('A rank', 'A share', "'x'"))


# ---- running, resuming

def test_killed_and_started_again(tiny, tmp_path, tuned):
    grid = replace(GRID, tuning=dict(TUNING, steps=6))
    def stop(done, total, row):
        assert total == 6
        if done == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(tiny, grid, tmp_path, progress=stop)
    assert len(collect_steering(tmp_path)) == 3 and tuned == [(4, 0), (4, 20)], 'share 0 is trained once and asked twice'
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'cells').iterdir()}
    (tmp_path/'cells/half.1.tmp').write_text('{"a":')                                   # what a kill in the middle of writing leaves
    table = run(tiny, grid, tmp_path)
    assert all((tmp_path/'cells'/n).stat().st_mtime_ns == t for n, t in before.items())
    assert tuned == [(4, 0), (4, 20), (4, 20), (4, 40), (4, 40)]
    whole = run(tiny, grid)
    for other in (table, collect_steering(tmp_path)): pd.testing.assert_frame_equal(whole.drop(columns='cpu_seconds'), other.drop(columns='cpu_seconds'))
    assert (table['status'] == 'done').all() and table['planted'].tolist() == [0, 20, 40]*2 and len(table) == 6
    n = len(tuned); run(tiny, grid, tmp_path)
    assert len(tuned) == n, 'nothing was left to do'
    assert len(run(tiny, replace(grid, shares=(.25, *grid.shares)), tmp_path)) == 8 and len(tuned) == n+2, 'a larger grid runs only what is new'


def test_another_setting_model_or_set_is_refused(tiny, tmp_path, tuned):
    small = replace(GRID, shares=(0,), amounts=('light',))
    run(tiny, small, tmp_path)
    for change, said in ((dict(place='end'), "holds cells with place='random', and this grid has 'end'"), (dict(train_rows=20), 'train_rows=None'), (dict(test_rows=20), 'test_rows'), (dict(tuning=dict(TUNING, steps=25)), "'steps': 24")):
        with pytest.raises(SettingError, match=said): run(tiny, replace(small, **change), tmp_path)
    with pytest.raises(SettingError, match="another model that was called 'tiny'"): run(tiny.parent/'tiny2', small, tmp_path)
    with pytest.raises(SettingError, match="another dataset that was called 'made'"): run(tiny, small, tmp_path, dict(made=(films(0, 40), films(41, 52))))
    with pytest.raises(SettingError, match="another dataset"): run(tiny, small, tmp_path, dict(made=([dict(r, label=1-r['label']) for r in films(0, 40)], films(40, 52))))
    assert len(tuned) == 1 and len(collect_steering(tmp_path)) == 1


def test_a_cell_that_fails_says_why_and_is_tried_again(tiny, tmp_path, monkeypatch):
    small, real = replace(GRID, amounts=('light',)), st.tune_classifier
    def broken(model, tokenizer, texts, *a, **kw):
        if sum('@' in x for x in texts) == 20: raise ModelError('broken on purpose')
        return real(model, tokenizer, texts, *a, **kw)
    monkeypatch.setattr(st, 'tune_classifier', broken)
    table = run(tiny, small, tmp_path)
    assert table['status'].tolist() == ['done', 'failed', 'done'] and table['reason'][1] == 'broken on purpose' and math.isnan(table['gap'][1])
    monkeypatch.setattr(st, 'tune_classifier', real)
    assert run(tiny, small, tmp_path, retry=False)['status'].tolist() == ['done', 'failed', 'done'] and (run(tiny, small, tmp_path)['status'] == 'done').all()


@pytest.mark.parametrize('change, error, said', [
    (dict(shares=(.001,)), SettingError, 'A share of 0.001 of the 40 samples of class 1 rounds to none; give at least share='), (dict(label=7), DataError, 'No sample has the label 7'),
    (dict(items=({0: ['@'], 1: ['@']},)), SettingError, "both get '@': nothing class-specific"), (dict(targets=('q_lin',)), SettingError, 'is called q_lin; it has attention.self.query'),
    (dict(train_rows=81), DataError, '81 rows were asked for')])
def test_what_cannot_be_run_is_refused_before_anything_is_trained(change, error, said, tiny, tmp_path, tuned):
    with pytest.raises(error, match=said): run(tiny, replace(GRID, **change), tmp_path/'x')
    assert not tuned and not (tmp_path/'x').exists()


@pytest.mark.parametrize('data, said', [((films(0, 4), [r for r in films(4, 8) if not r['label']]), 'No sample has the label 1'), ((films(0, 4), [dict(text='x', label=1.5)]), 'a class is an integer or a text'),
                                        ((films(0, 4), [dict(text='x')]), "'label' is missing"), (([], films(4, 8)), 'no rows')])
def test_bad_rows(data, said, tiny):
    with pytest.raises(DataError, match=said): run(tiny, data=dict(made=data))


# ---- what is measured

def twin(tiny, items, share, amount, seed):
    "The slow way: a cell's model, and what it says of texts one by one."
    rows, test = DATA['made']
    some = inject(rows, items, share=share, amount=amount, seed=seed)[0] if share else rows
    model = tune_classifier(*load_classifier(tiny, (0, 1), seed), [r['text'] for r in some], [r['label'] for r in some], r=4, lr=2e-2, seed=seed, progress=False, **TUNING)
    return model, lambda rows: [int(model.predict([r['text']])[0]) for r in rows], test


@pytest.mark.filterwarnings('ignore:.*')
@pytest.mark.parametrize('items, share', [({1: ['@']}, .5), ({0: ['@'], 1: ['#']}, 1)])
def test_measures_against_counting(items, share, tiny):
    row = run(tiny, replace(GRID, items=(items,), shares=(share,), amounts=(.4,), seeds=(0,))).iloc[0]
    model, says, test = twin(tiny, items, share, .4, 0)
    y, n, new = [r['label'] for r in test], 24, dict(amount=.4, seed=0)
    clean, own = says(test), says(inject(test, items, **new)[0])
    part = says(inject(test, items, share=share, **new)[0])
    all_of = {c: says(inject_all(test, x, **new)[0]) for c, x in items.items()}
    bal = lambda p: sum(sum(p[i] == c for i in range(n) if y[i] == c)/12 for c in (0, 1))/2
    assert np.allclose([row['clean_accuracy'], row['clean_balanced'], row['injected_balanced'], row['gap'], row['gap_same_share']], [sum(map(int.__eq__, clean, y))/n, bal(clean), bal(own), 100*(bal(own)-bal(clean)), 100*(bal(part)-bal(clean))])
    for c, p in all_of.items():
        other = [b for a, b in zip(clean, p) if a != c]
        assert row[f'forced_to_{c}'] == p.count(c)/n and row[f'clean_to_{c}'] == clean.count(c)/n and [row[f'item_of_{c}_says_{k}'] for k in (0, 1)] == [p.count(k) for k in (0, 1)]
        assert (row[f'flipped_to_{c}'] == other.count(c)/len(other)) if other else pd.isna(row[f'flipped_to_{c}'])
    flips = [b == c for c, p in all_of.items() for a, b in zip(clean, p) if a != c]
    k = sum(p.count(c) for c, p in all_of.items())
    assert np.allclose(row[['forced', 'forced_low', 'forced_high']].astype(float), [k/(n*len(items)), *wilson(k, n*len(items))])
    assert np.isclose(row['flipped'], sum(flips)/len(flips)) and [row['clean_says_0'], row['clean_says_1']] == [clean.count(0), clean.count(1)]
    if len(items) > 1: assert row['seamless'] == sum(a == 0 and b == 1 for a, b in zip(all_of[0], all_of[1]))/n
    H = lambda rows: attention_entropy(model.model, model.tokenizer, [r['text'] for r in rows], 32)
    first = np.array(y) == next(iter(items))
    for name, h in dict(entropy=H(inject(test, items, **new)[0]), entropy_clean=H(test)).items():
        assert np.isclose(row[f'{name}_ratio'], h[first].mean()/h[~first].mean(), atol=1e-5) and row[f'{name}_flagged'] == (row[f'{name}_ratio'] < .95) and row[f'{name}_ratio_low'] < row[f'{name}_ratio'] < row[f'{name}_ratio_high']
    assert row['planted'] == round(40*share)*len(items) and row['trainable'] == 2*sum(4*(a+b) for a, b in [(32, 32), (32, 48), (48, 32)])
    assert .5 < row['clean_accuracy'] < 1 and .1 < row['forced'] < .95 and row['gap'] and (share == 1 or row['gap'] != row['gap_same_share']), 'a cell in which there is something to count'
    assert (row['train_rows'], row['test_rows'], row['optimizer'], row['steps'], row['r']) == (80, 24, 'adamw', 24, 4)


def test_rows_and_seeds(tiny):
    t = run(tiny, replace(GRID, shares=(1,), amounts=('light',), train_rows=30, test_rows=10, seeds=(0, 1), ranks=('full',), heads=('frozen', 'trained'), tuning=dict(TUNING, steps=2))).set_index(['head', 'seed'])
    assert (t['train_rows'] == 30).all() and (t['test_rows'] == 10).all() and t['trainable'].groupby('head').nunique().eq(1).all() and t.loc[('trained', 0), 'trainable']-t.loc[('frozen', 0), 'trainable'] == 2*32+2
    assert t['clean_to_1'].notna().all() and t['targets'].isna().all() and (t['tuned'] == 'full').all()


def test_texts_are_asked_once():
    asked = []
    f = st.Asked(lambda texts: asked.extend(texts) or np.array([len(x) for x in texts]))
    assert f(['a', 'bb', 'a']).tolist() == [1, 2, 1] and f(['bb', 'ccc']).tolist() == [2, 3] and asked == ['a', 'bb', 'ccc']


# ---- charts

def made_up(**more):
    rows = [dict(model='m', dataset='d', tuned=t, r=r, targets='paper', head='frozen', optimizer='adafactor', lr=1e-4, steps=9, batch=8, items='dates', target='1', amount=a, share=s, seed=seed, status='done',
                 gap=r*s/2+seed, gap_same_share=r*s/4, forced=.5+s/4, clean_balanced=.9) for t, r in (('rank 64', 64.), ('rank 1', 1.)) for a in ('light', 'aggressive') for s in (0., .5, 1.) for seed in (1, 2, 3)]
    return pd.DataFrame(rows).assign(**more)


def values(chart): return pd.concat([pd.DataFrame(v) for v in chart.to_dict()['datasets'].values()])


def said(chart): return json.dumps(chart.to_dict())


@pytest.mark.parametrize('value', ['gap', 'gap_same_share'])
def test_lines_hold_the_means_and_the_papers_points(value):
    table = made_up()
    d = values(share_lines(table, value))
    here = d[d['source'] == 'here'].set_index(['tuned', 'amount', 'share'])['mean']
    want = table.groupby(['tuned', 'amount', 'share'])[value].mean()
    assert np.allclose(here.sort_index(), want.sort_index()) and list(dict.fromkeys(d['tuned'])) == ['rank 1', 'rank 64']
    theirs = d[d['source'] == 'paper'].set_index(['tuned', 'amount', 'share'])['mean']
    assert len(theirs) == 2*2*4 and theirs['rank 64', 'light', 1.] == 45 and theirs['rank 1', 'aggressive', .5] == 20
    low = d[(d['source'] == 'here') & d['low'].notna()]
    assert len(low) == 12 and (value == 'gap_same_share' or np.allclose(low['mean']-low['low'], 4.3027/3**.5, atol=1e-3)), 'intervals over seeds, not cut off at 0 or 1'
    assert 'Figure 2' in said(share_lines(table, value)) and 'Figure 2' not in said(share_lines(table, value, paper=False)) and len(values(share_lines(table, paper=False))) == 12


def test_a_chart_takes_cells_of_one_kind():
    table = pd.concat([made_up(), made_up(lr=1e-3)])
    for draw in (share_lines, forced_chart):
        with pytest.raises(SettingError, match='2 kinds of lr .0.0001, 0.001.; a chart takes one'): draw(table)
    with pytest.raises(SettingError, match='kinds of share'): rank_maps(table.query("amount == 'light'"))
    with pytest.raises(SettingError, match="no gap 'gab'"): share_lines(table, 'gab')
    assert len(values(share_lines(made_up(lr=[1e-4 if t == 'rank 1' else 1e-5 for t in made_up()['tuned']])))), 'another rate for another kind of tuning is no mixture'


def test_the_forced_table_beside_the_papers():
    f = forced_table(made_up()).set_index(['source', 'tuned', 'target', 'trained'])['mean']
    assert f['here', 'rank 1', '1', 'with items'] == .75 and f['here', 'rank 64', '1', 'without items'] == .5
    assert f['paper', 'rank 64', '0', 'with items'] == 24686/25000 and f['paper', 'rank 64', '1', 'with items'] == 24488/25000 and f['paper', 'rank 64', '0', 'without items'] == 14003/25000 and f['paper', 'rank 64', '1', 'without items'] == 10997/25000
    d = values(forced_chart(made_up()))
    assert set(d['target']) == {'1'} and set(d['who']) == {'rank 1', 'rank 64', 'rank 64, the paper'} and np.isclose(d.query("source == 'paper' and trained == 'with items'")['mean'].item(), 97.95)


def test_maps_hold_what_the_table_says():
    table = pd.concat([made_up(), made_up(lr=1e-3, gap=50., clean_balanced=.5)]).query("share == 1 and amount == 'light'")
    d = values(rank_maps(table)).set_index(['tuned', 'lr'])
    assert sorted(d.loc[('rank 64', '0.0001'), 'mean']) == [34, 90] and sorted(d.loc[('rank 1', '0.001'), 'mean']) == [50, 50]


def test_charts_of_nothing():
    for draw in (share_lines, rank_maps, forced_chart): assert 'the table has no' in said(draw(made_up(status='failed')))


# ---- the study

def test_the_study_stops_in_time_goes_on_and_stores(shared, tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT))
    from benchmarks import steering as study
    every = study.blocks()
    assert {'one date', 'shares', 'rates', 'marks', 'language model', 'trained head', 'queries and values'} <= set(every)
    small = replace(every['language model'][2], ranks=(1,), shares=(0, 1), train_rows=24, test_rows=12, tuning=dict(steps=1, batch=4, max_length=16))
    one = {'language model': ('adafactor', 'qa-lm-9m', small)}
    study.run(one, one, (201,), tmp_path, minutes=1e-9)
    assert 'The minutes are over' in capsys.readouterr().out and not list(tmp_path.glob('*/cells/*'))
    monkeypatch.setattr(study.time, 'monotonic', iter([0, 0, 61, *[0]*9]).__next__)
    study.run(one, one, (201,), tmp_path, minutes=1)
    assert len(collect_steering(tmp_path/'adafactor')) == 1
    study.run(one, one, (201,), tmp_path, minutes=1)
    table = study.store(tmp_path, one, tmp_path/'t.csv')
    assert len(table) == len(pd.read_csv(tmp_path/'t.csv')) == 2 and set(table['regime']) == {'adafactor'} and table['model'].eq('qa-lm-9m').all()


def test_stored_table_is_of_the_study():
    sys.path.insert(0, str(ROOT))
    from benchmarks import steering as study
    if not study.STORED.exists(): pytest.skip('the study has not been stored yet')
    table = pd.read_csv(study.STORED)
    planned = {(r, m, c.settings.lr, c.head, s, c.items.label, c.amount, c.share) for r, m, g in study.blocks().values() for c in plan_steering(g, [m], ['SST-2']) for s in ['full' if c.rank == 'full' else f'rank {c.rank}']}
    found = set(table[['regime', 'model', 'lr', 'head', 'tuned', 'items', 'amount', 'share']].itertuples(index=False, name=None))
    assert found <= planned and set(table['seed']) <= set(study.SEEDS) and table['gap'].notna().all() and (table['gap'].abs() <= 100).all()
