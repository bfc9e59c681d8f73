"The benchmarks' code paths, small: that they run and measure what they say; no time is asserted."
import gc
import gzip
import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import demo_seeds, layers, published_mixes, speed


@pytest.fixture(scope='module')
def beside():
    if not speed.MODEL.exists(): pytest.skip('the data and the model beside the project (../shared) are not here')


def test_speed_table_is_measured_side_by_side(beside, monkeypatch):
    some = ['64 tokens, 50% shared', 'the mix under three instructions']
    monkeypatch.setattr(speed, 'sets', lambda *a, every=speed.sets: {k: v for k, v in every(*a).items() if k in some})
    table = speed.speed(24, 1, 512)
    assert list(dict.fromkeys(table['set'])) == ['published WebQA mix', *some] and (table['rows_per_second'] > 0).all()
    for name, t in table.groupby('set', sort=False):
        assert list(t['method']) == [*(speed.METHODS if name not in some else (speed.PUBLISHED, speed.PLAIN, speed.OURS)), speed.FLOOR, speed.OWN]
        rate = t['rows_per_second'].to_numpy()
        np.testing.assert_allclose(t['times_faster_than_published'], rate/rate[0], rtol=.02, atol=.01)
        np.testing.assert_allclose(t['time_over_plain_forward'], rate[1]/rate, rtol=.02, atol=.01)
    mix = table[table['set'] == 'published WebQA mix']
    assert (mix['rows'] == 48).all() and (table['peak_mb'].dropna() > 100).all()
    parts = table[['transformer', 'head', 'spectrum', 'rest']].dropna()
    assert (table.loc[parts.index, 'method'] == speed.OURS).all() and len(parts) == 1+len(some) and (abs(parts.sum(axis=1)-1) < .01).all() and (parts > 0).all(axis=None)
    floor = table[table['method'] == speed.FLOOR].set_index('set')['rows_per_second']
    ours = table[table['method'] == speed.OURS].set_index('set')
    np.testing.assert_allclose(ours['time_over_floor'], floor/ours['rows_per_second'], rtol=.02, atol=.02)
    assert (ours['time_over_own_floor'] > 0).all()


def test_sets_of_the_speed_table():
    rng = np.random.default_rng(0)
    pool = [speed.Encoded(np.r_[5, 6, 7, 8, 9, rng.integers(10, 9999, n+3)].astype(np.int32), np.arange(n+8) >= n+5) for n in range(40, 80)]
    sets = speed.sets(pool, 2**12)
    assert len(sets) == 10
    for name, (rows, longest) in sets.items():
        assert all(e.tokens == 3 for e in rows), name
        if 'shared' not in name: continue
        n, share = name.replace(',', '').split(' tokens '); want = int(int(n)*float(share.split('%')[0])/100)
        assert len(rows) == max(4, 2**12//int(n)) and want <= speed.common_prefix(rows) <= want+3 and {e.first for e in rows} == {int(n)} == {longest}, name
    rows, _ = sets['the mix under three instructions']
    assert len({tuple(e.ids[:5]) for e in rows}) == 3 and len(rows) == 40


def test_operations_of_the_floor():
    "By hand, for a model of one layer: 4 squares of attention and 3 of the rest, 2 operations a weight."
    import transformers as tf
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    row = lambda *ids: speed.Encoded(np.array(ids, np.int32), np.arange(len(ids)) >= len(ids)-2)
    count = lambda tokens, context, heads: 2*7*64*tokens + 4*8*context + 2*50*8*heads
    assert speed.operations(model, [row(1, 2, 3, 4, 5, 6)]) == count(5, 15, 2), 'the last token need not be read'
    assert speed.operations(model, [row(1, 2, 3, 4, 5, 6), row(1, 2, 3, 7, 5, 6)]) == count(5+2, 15+4+5, 4), 'what both begin with is computed once, up to the token that predicts'


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


# ---- studies of whole experiments, small

def question_file(folder, name, n, context=''):
    with gzip.open(folder/f'{name}-test.jsonl.gz', 'wt') as f:
        for i in range(n): f.write(json.dumps(dict(question=f'what is the {i}th of {name}?', answers=[f'the answer {i*i}'], **(dict(context=f'{context} {i}') if context else {})))+'\n')


def test_real_model_runs_small(tmp_path):
    from benchmarks import real_model
    from gradsentry_nb.demo import demo_model_path
    question_file(tmp_path, 'webqa', 60), question_file(tmp_path, 'nq', 60, 'a passage about')
    args = [str(demo_model_path()), '--data', str(tmp_path), '--sets', 'webqa', 'nq', '--limit', '60', '--seeds', '1', '--parts', 'table2', 'table8', '--device', 'cpu',
            '--work', str(tmp_path/'work'), '--out', str(tmp_path/'out.csv')]
    real_model.main(args)
    table = pd.read_csv(tmp_path/'out.csv')
    assert list(table.columns) == list(real_model.COLUMNS) and len(table) == 2*4*8+2*8
    assert (table['status'] == 'done').all() and table['machine'].notna().all() and 'torch' in table['versions'][0]
    real_model.main(args)                        # the rows of the same model are replaced, not doubled
    assert len(pd.read_csv(tmp_path/'out.csv')) == len(table)


def test_stored_table_of_a_real_model_is_empty_or_real():
    from benchmarks import real_model
    table = pd.read_csv(real_model.STORED)
    assert list(table.columns) == list(real_model.COLUMNS)
    assert not len(table) or table['machine'].notna().all()


def test_experiment_runs_small(tmp_path, shared):
    from benchmarks import experiment
    experiment.main(['table2', 'table8', '--work', str(tmp_path), '--limit', '60', '--sets', 'webqa'])
    from gradsentry_nb.experiment import collect
    table = collect(tmp_path/'table2')
    assert set(table['attack']) == {'badnets', 'addsent', 'cba', 'stylebkd'} and (table['status'] == 'done').all()
    assert set(collect(tmp_path/'table8')['model']) == {'qa-lm-9m', 'random weights'}
    every, loaded = experiment.parts(), experiment.models()
    with pytest.raises(SystemExit, match='table2 is not finished: 96 of 384'): experiment.store(tmp_path, every, loaded, tmp_path/'t.parquet')
    grid, which, _ = every['table2']
    part = dict(table2=(replace(grid, seeds=(201,)), which, ('webqa',)))
    table = experiment.store(tmp_path, part, loaded, tmp_path/'t.parquet')
    assert set(table['seed']) == {201} and len(table) == 32, 'cells of another grid are left out'


def test_stored_experiment_is_what_the_study_makes():
    from benchmarks import experiment
    if not experiment.STORED.exists(): pytest.skip('the study has not been stored yet')
    table = pd.read_parquet(experiment.STORED)
    assert (table['status'] == 'done').all() and set(table['part']) == set(experiment.parts())
    for part, (grid, models, sets) in experiment.parts().items():
        found = table[table['part'] == part]
        if not len(found): continue
        assert set(found['dataset']) == set(sets) and set(found['model']) == set(models), part
        assert set(found['seed']) == set(grid.seeds) and {d.label for d in grid.defences} <= set(found['defence']), part


def test_live_runs_small(tmp_path, monkeypatch):
    from benchmarks import live
    monkeypatch.setattr(live, 'SLIDES', (50,))
    monkeypatch.setattr(live, 'settings', lambda n, every=live.settings: [next(every(n))])
    monkeypatch.setattr(live, 'memory', lambda times, some=live.memory: some(times, 60))
    table = live.main(['--rows', '60', '--repeat', '2', '--times', '2', '--out', str(tmp_path)])
    scans = {f'{x}, demo model' for x in ('scan alone', 'scan in a thread', 'scan under a dashboard', 'dashboard from start to verdict')}
    assert set(table['what']) == scans | {'slider moved', 'memory after the cell'}
    assert (table['value'] > 0).all() and len(pd.read_csv(tmp_path/'live.csv')) == len(table) == 2*4+2+2


# ---- quantised weights, GPUs

def test_gpu_runs_small(beside, tmp_path):
    from benchmarks import gpu
    gpu.main(['--size', 'tiny', '--device', 'cpu', '--rows', '70', '--few', '5', '--out', str(tmp_path/'gpu.csv')])
    table = pd.read_csv(tmp_path/'gpu.csv').set_index('method')
    assert list(table.reset_index().reindex(columns=gpu.COLUMNS).columns) == list(gpu.COLUMNS) and list(table['rows']) == [5, 70, 70, 70]
    np.testing.assert_allclose(table['times_faster_than_published'], table['rows_per_second']/table['rows_per_second'].iloc[0], rtol=.01)
    assert (table['budget'] == 1024).all() and table['share_of_rate'].notna().tolist() == [False, False, True, True]
    rows, model = gpu.random_rows(500, 70), gpu.build('tiny', 'cpu')
    assert model.dtype == torch.bfloat16 and speed.common_prefix(rows) >= 20 and gpu.operations(model, rows, False) > 1.5*gpu.operations(model, rows)
    with pytest.raises(SystemExit, match='--out'): gpu.main(['--size', 'tiny', '--device', 'cpu'])


def test_stored_table_of_gpus_is_empty_or_real():
    from benchmarks import gpu
    table = pd.read_csv(gpu.STORED)
    assert list(table.columns) == list(gpu.COLUMNS) and not table['device'].astype(str).str.contains('CPU').any()


def test_quantised_runs_small(tmp_path, monkeypatch):
    pytest.importorskip('bitsandbytes')
    from benchmarks import quantised
    monkeypatch.setattr(quantised, 'MODEL', tmp_path/'none')
    table = quantised.main(['--limit', '40', '--out', str(tmp_path/'q.csv')])
    assert list(table['weights']) == ['float32', '8bit', '4bit'] and table['rank_correlation'][0] == 1 and (table['rank_correlation'] > .8).all() and (table['rows'] == 40).all()
    assert table['megabytes'].is_monotonic_decreasing


def test_layers_are_studied_beside_answer_length(beside, monkeypatch):
    monkeypatch.setattr(layers, 'STATISTICS', ('entropy', 'grad_norm')); monkeypatch.setattr(layers, 'BOUNDED', ('entropy',))
    model, some = layers.load_model(str(layers.MODEL), 'cpu'), ['lm_head', 'layers.2.mlp.up_proj']
    t = pd.DataFrame(layers.study('freebaseqa-badnets', *model, limit=90, layers=some))
    assert list(t['layer'][:5]) == ['model.layers.2.mlp.up_proj']*2+['lm_head']*2+['answer length alone'] and len(t) == 10
    assert (t['rows'][:5] == 90).all() and (t['rows'][5:] < 90).all() and t['planted'].nunique() == 1
    head, every = t.loc[2], layers.load_samples(layers.SHARED/'data/qa/published-freebaseqa-badnets-10.jsonl.gz')
    found, truth = layers.Sentry(*model, 'paper').score(layers.drawn(every, 90), progress=False), {s.id: s.meta['poisoned'] for s in every}
    assert head['auroc'] == pytest.approx(layers.evaluate(layers.Verdict(found, layers.cut_scores(found, 'paper')), truth).auroc, abs=1e-3) and head['auroc_low'] < head['auroc']
    assert (t['f1_paper'].isna() == (t['statistic'] != 'entropy')).all() and (t['best_f1'] >= t['f1_valley']-1e-9).all()
    times = pd.DataFrame(layers.speed(*model, n=4, layers=some))
    assert list(times['layers']) == [1, 2, 2] and times['times_slower'].iloc[2] == times['seconds'].iloc[2]/times['seconds'].iloc[1]


# ---- long scans, several processes

def test_a_long_scan_runs_small(tmp_path):
    from benchmarks import stream
    gc.collect(); gc.freeze()                                     # rows that other tests hold are not counted
    table = stream.main(['--rows', '300', '--out', str(tmp_path)])
    assert list(dict.fromkeys(table['step'])) == ['loaded', 'read', 'surveyed', 'scan', 'cut', 'report', 'summary']
    assert table['done'].max() == 300 and table['held'].max() >= 300 > table['held'].iloc[-1] and len(pd.read_csv(tmp_path/'stream.csv')) == len(table)


def test_the_stored_curve_is_flat():
    "A million rows: memory in the second half of the scan is that of the first, and the texts of one chunk are all that is held."
    t = pd.read_csv(ROOT/'benchmarks'/'results'/'stream.csv')
    scan = t[t['step'] == 'scan']
    first, second = (scan[x]['resident_mb'] for x in (scan['done'] <= 500_000, scan['done'] > 500_000))
    assert (t['rows'] == 1_000_000).all() and len(scan) >= 20 and scan['held'].max() < 5000
    assert abs(second.max()/first.max()-1) < .05


def test_several_processes_run_small(beside):
    from benchmarks import distributed
    seconds, first, scores = distributed.measure(240, 2, 1)
    assert len(first) == 2 and 0 < max(first) <= seconds and len(scores) == 240 and np.isfinite(scores).all()
