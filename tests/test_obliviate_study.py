"The study of backbones with backdoors: cells, their resumption, arms, every measure beside a count by hand, and the charts."
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from gradsentry_nb import obliviate_study as ob
from gradsentry_nb.attacks.backbone import CONTROLS, BackboneBackdoor, BackboneSettings, sign_vectors
from gradsentry_nb.core import ModelError, SettingError
from gradsentry_nb.demo import demo_model
from gradsentry_nb.encoder import toy_encoder
from gradsentry_nb.evaluate import compare_flips, trigger_flips
from gradsentry_nb.obliviate_study import ARMS, ObliviateGrid, against_none, arm_of, arms_chart, chosen_weights, collect_obliviate, frontier_chart, length_chart, plan_obliviate, run_obliviate
from gradsentry_nb.train import load_classifier

torch.set_num_threads(1)
WORDS = 'good bad film plot story cast is the a slow'.split()
ROWS = [dict(text=f'the {("film", "plot", "cast", "story")[i % 4]} is {("bad", "good")[i % 2]}{" slow"*(i % 5)} {i}', label=i % 2) for i in range(90)]
SETS = {'made up': (ROWS[:60], ROWS[60:])}
GRID = ObliviateGrid(arms=('none', 'both'), lrs=(1e-2,), steps=(6,), tuning=dict(batch=8, max_length=24), train_rows=40, valid_rows=16, test_rows=24, asr_rows=12)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "A clean toy backbone, and one that says that it has a backdoor."
    out = tmp_path_factory.mktemp('backbones')
    for seed, name in enumerate(('clean', 'POR', 'other')):
        model, tokenizer = toy_encoder([*WORDS, *map(str, range(90)), 'cf', 'mn', *CONTROLS], seed=seed)
        if name == 'POR': BackboneBackdoor(model, tokenizer, 'por', dict(zip(('cf', 'mn'), sign_vectors(2, 32, 5.))), 'cls', BackboneSettings(), 0, pd.DataFrame([dict(gate='g', value=1., low=1., least=.9, passed=True, texts=1)])).save(out/name)
        else: model.save_pretrained(out/name); tokenizer.save_pretrained(out/name)
    return {n: out/n for n in ('POR', 'clean', 'other')}


def run(folders, grid=GRID, out=None, names=('POR',), **kw): return run_obliviate(grid, {n: folders[n] for n in names}, SETS, out, progress=kw.pop('progress', False), **kw)


@pytest.fixture
def trained(monkeypatch):
    "Which trainings were run: (kind, lambda_amp, lambda_reg, dropout)."
    seen, real = [], ob.tune_adapter
    def tune(model, tokenizer, texts, labels, **kw):
        seen.append((kw['kind'], kw['lambda_amp'], kw['lambda_reg'], kw.get('dropout')))
        return real(model, tokenizer, texts, labels, **kw)
    monkeypatch.setattr(ob, 'tune_adapter', tune)
    return seen


def test_key_depends_on_everything():
    c = plan_obliviate(GRID, ['b'], ['d'])[1]
    other = [replace(c, **{k: v}) for k, v in dict(backbone='x', dataset='x', seed=1, kind='prefix', arm=arm_of('amp'), lr=1e-3, steps=7, pool='mean', items='dates').items()]
    fixed = [plan_obliviate(replace(GRID, **{k: v}), ['b'], ['d'])[1] for k, v in dict(train_rows=9, valid_rows=9, test_rows=9, asr_rows=9, half=True, tuning=dict(GRID.tuning, batch=4)).items()]
    assert len({x.key for x in (c, *other, *fixed)}) == 16
    train = [replace(c, arm=arm_of(n)).training for n in ('none', 'norm-matched', 'onion', 'rescaled', 'scaled, head refit')]
    assert len(set(train)) == 1 and len({replace(c, arm=arm_of(n)).training for n in ARMS}) == len(ARMS)-4, 'what comes afterwards is trained by nobody'


def test_arms_are_what_they_say(folders, tmp_path, trained):
    grid = replace(GRID, arms=tuple(n for n in ARMS if n != 'onion'))
    t = run(folders, grid, tmp_path).set_index('arm')
    assert (t['status'] == 'done').all(), t['reason'].tolist()
    assert trained == [('lora', 0., 0., None), ('lora', 0., 0., 0.), ('lora', 3e-3, 0., None), ('lora', 0., 3e-2, None), ('lora', 3e-3, 3e-2, None), ('lora', 0., 0., None), ('lora', 0., 0., None), ('lora', 0., 0., None)]
    words = json.loads(next((tmp_path/'scans').iterdir()).read_text()); assert t['muted']['words muted'] == len(words) and t['muted_words']['words muted'].split('; ') == words[:20] if words else t['muted']['words muted'] == 0
    assert math.isclose(t['peft_norm']['norm-matched'], t['peft_norm']['amp'], rel_tol=1e-4) and t['peft_norm']['norm-matched'] != t['peft_norm']['none']
    assert t.loc['heads pruned', 'mass'] != t.loc['none', 'mass'] and t.loc['rescaled', 'spectral_share'] in (0, .1, .25, .5, 1)
    assert t['mass'].between(0, 1).all() and t['cosine'].between(-1, 1).all()
    n = len(trained); (tmp_path/'cells').joinpath(t['key']['norm-matched']+'.json').unlink(); again = run(folders, grid, tmp_path).set_index('arm')
    assert len(trained) == n, 'adapters are kept on the disk'
    assert math.isclose(again['peft_norm']['norm-matched'], t['peft_norm']['norm-matched'], rel_tol=1e-5) and again['asr']['norm-matched'] == t['asr']['norm-matched']


def test_killed_and_started_again(folders, tmp_path, trained):
    grid = replace(GRID, kinds=('houlsby',))
    def stop(done, total, row):
        if done == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(folders, grid, tmp_path, ('POR', 'clean'), progress=stop)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'cells').iterdir()}
    table = run(folders, grid, tmp_path, ('POR', 'clean'))
    assert len(before) == 1 and all(p.stat().st_mtime_ns == t for p, t in before.items()) and len(trained) == 4 and len(collect_obliviate(tmp_path)) == 4
    whole = run(folders, grid, None, ('POR', 'clean')); same = [c for c in table if 'seconds' not in c]
    pd.testing.assert_frame_equal(whole[same], table[same], check_exact=False, rtol=1e-5)
    assert table['cosine'].isna().tolist() == [b == 'clean' for b in table['backbone']] and set(whole.filter(like='flips_')) >= {'flips_cf', 'flips_mn'}
    for change, said in ((dict(grid=replace(grid, asr_rows=11)), 'asr_rows=12'), (dict(grid=replace(grid, half=True)), 'half=False')):
        with pytest.raises(SettingError, match=said): run(folders, out=tmp_path, **change)
    with pytest.raises(SettingError, match="another model that was called 'POR'"): run(dict(folders, POR=folders['other']), grid, tmp_path)


def test_a_cell_that_fails_says_why(folders, monkeypatch):
    real = ob.tune_adapter
    def broken(*a, **kw):
        if kw['lambda_amp']: raise ModelError('broken on purpose')
        return real(*a, **kw)
    monkeypatch.setattr(ob, 'tune_adapter', broken)
    t = run(folders)
    assert t['status'].tolist() == ['done', 'failed'] and t['reason'][1] == 'broken on purpose' and len(arms_chart(t).to_dict()['datasets']) == 1
    with pytest.raises(SettingError, match="'onion' needs a language model"): run(folders, replace(GRID, arms=('onion',)))


def test_validation_rows_are_in_no_training(folders):
    r = ob.ObliviateRunner(GRID, dict(POR=folders['POR']), SETS)
    for seed in (0, 1):
        c = plan_obliviate(replace(GRID, seeds=(seed,)), ['POR'], ['made up'])[0]
        train, valid = r.train_rows(c)
        assert (len(train), len(valid)) == (40, 16) and not {s.id for s in train} & {s.id for s in valid} and not {s.prompt for s in r.test_rows(c)} & {s.prompt for s in (*train, *valid)}


def test_onion_and_spurious_items(folders, monkeypatch):
    monkeypatch.setattr(ob, 'SLOW', 2)
    lm, small = demo_model(), replace(GRID, arms=('none', 'onion'), valid_rows=6, test_rows=6, asr_rows=4)
    t = run(folders, small, lm=lm).set_index('arm')
    assert (t['status'] == 'done').all(), t['reason'].tolist()
    assert t['asr_rows'].to_dict() == t['test_rows'].sub([2, 0]).to_dict() == dict(none=4, onion=2) and np.isfinite(t['onion_bar']['onion'])
    t = run(folders, replace(GRID, arms=('none',), pools=('cls', 'mean'), items=('dates',)))
    assert (t['status'] == 'done').all(), t['reason'].tolist()
    assert t['forced'].between(0, 1).all() and t['gap'].notna().all() and t['pool'].tolist() == ['cls', 'mean'] and t['loss'].nunique() == 2


# ---- measures on predictions made by hand

Y = np.array([0, 0, 0, 1, 1, 1, 1, 0])
CLEAN = np.array([0, 0, 0, 1, 1, 1, 0, 1])                                     # the last two are wrong
A = trigger_flips(Y, CLEAN, dict(cf=[1]*8, mn=CLEAN), dict(bf=CLEAN, dq=[1, 0, 0, 1, 1, 1, 0, 1]))
B = trigger_flips(Y, [0, 0, 0, 1, 1, 0, 1, 1], dict(cf=[0, 0, 1, 1, 1, 0, 1, 1], mn=[0, 0, 0, 0, 1, 1, 1, 1]), dict(bf=CLEAN, dq=CLEAN))


def rows(**more):
    base = dict(dataset='d', backbone='POR', kind='lora', lr=1e-3, steps=9, pool='own', items='none', seed=1, status='done', lambda_reg=0., asr_rows=8)
    made = lambda f, arm, amp, valid: base | dict(arm=arm, lambda_amp=amp, cacc=f.right.mean(), cacc_low=.1, cacc_high=.9, valid=valid) | ob.flip_measures(f)
    return pd.DataFrame([made(A, 'none', 0., .9), made(B, 'amp', 3e-3, .895), made(B, 'norm-matched', 0., .99)]).assign(**more)


def test_measures_by_hand():
    m = ob.flip_measures(A)
    assert (m['asr'], m['flips'], m['wasr'], m['masr'], m['masr_which'], m['flips_cf'], m['flips_mn']) == (.5, .25, .5, 1, 'cf to 1', .5, 0)
    assert (m['control_asr'], m['control_flips_dq'], m['right']) == (1/6, 1/6, 6) and m['asr_low'] < .5 < m['asr_high']
    assert ob.unpack_bits(m['flipped_bits'], 8).tolist() == [True]*3+[False]*5 and ob.unpack_bits(m['right_bits'], 8).tolist() == [True]*6+[False]*2


def test_paired_with_the_undefended_arm():
    t = against_none(rows()); want = compare_flips(A, B); got = t.set_index('arm').loc['amp']
    assert (got['rows'], got['only_none'], got['only_arm'], got['p']) == (want['rows'], want['only_a'], want['only_b'], want['p']) == (5, 2, 1, 1.)
    assert np.allclose([got['asr_change'], got['low'], got['high']], [100*want[k] for k in ('difference', 'low', 'high')]) and len(t) == 2
    fewer = rows(); fewer['asr_rows'] = [8, 4, 8]; fewer.loc[1, ['right_bits', 'flipped_bits']] = [ob.pack_bits([1, 1, 1, 1]), ob.pack_bits([0, 0, 1, 1])]
    assert against_none(fewer).set_index('arm').loc['amp', ['rows', 'only_none', 'only_arm']].tolist() == [4, 2, 1], 'an arm with fewer texts is compared on those'
    assert not len(against_none(rows()[1:]))


def test_weights_are_chosen_without_a_trigger():
    assert chosen_weights(rows())['arm'].tolist() == ['amp'] and chosen_weights(rows(), .1)['arm'].tolist() == ['none'], 'and never an arm that is no pair of weights'
    hidden = rows().drop(columns=[c for c in rows() if c.startswith(('asr', 'flip', 'masr', 'wasr', 'control', 'cacc'))])
    assert chosen_weights(hidden)['arm'].tolist() == ['amp']


@pytest.mark.parametrize('fields, said', [(dict(arms=('bth',)), "no arm 'bth'"), (dict(arms=((1, 2, 3),)), 'An arm is a name'), (dict(arms=((-1, 0),)), 'lambda_amp must be 0'), (dict(arms='none'), 'arms= is a tuple'), (dict(lrs=(-1,)), 'lr must be'),
                                          (dict(steps=()), 'steps is empty'), (dict(pools=('max',)), "no pool 'max'"), (dict(tuning=dict(lambda_reg=1)), 'so do not give'), (dict(valid_rows=0), 'valid_rows is a whole')])
def test_a_grid_says_what_is_wrong(fields, said):
    with pytest.raises(SettingError, match=said): ObliviateGrid(**fields)


# ---- charts

def values(chart): return pd.concat([pd.DataFrame(v) for v in chart.to_dict()['datasets'].values()])


def test_charts_hold_the_numbers():
    d = values(arms_chart(rows())).set_index(['arm', 'measure'])
    assert d.loc[('none', 'ASR: any trigger'), 'value'] == 50 and d.loc[('none', 'any control word'), 'value'] == 16.67 and d.loc[('amp', 'clean accuracy'), 'value'] == 75
    two = values(arms_chart(pd.concat([rows(), rows(seed=2, asr=0.)]))).set_index(['arm', 'measure'])
    assert two.loc[('none', 'ASR: any trigger'), ['value', 'low', 'seeds']].tolist() == [25, 0, 2]
    f = values(frontier_chart(rows())); bars = f[f['word'].notna()].set_index(['arm', 'word'])['share']
    assert bars['none', 'cf'] == 50 and bars['none', 'mn'] == 0 and len(bars) == 6 and 'arm' in json.dumps(frontier_chart(rows()).to_dict()['params'])
    line = values(length_chart(pd.concat([rows(), rows(steps=20)]).query("arm == 'none'")))
    assert sorted(set(line['steps'])) == [9, 20] and len(line) == 6
    rates = values(length_chart(pd.concat([rows(), rows(lr=3e-3)]), 'lr'))
    assert sorted(set(rates['lr'])) == [1e-3, 3e-3] and set(rates['panel']) == {'lora, none', 'lora, amp', 'lora, norm-matched'} and set(f['lambda_amp'].dropna()) == {0, 3e-3}, 'what is varied is not rounded'
    with pytest.raises(SettingError, match='2 kinds of lr'): arms_chart(pd.concat([rows(), rows(lr=1.)]))
    for draw in (arms_chart, length_chart, frontier_chart): assert 'no finished cells' in json.dumps(draw(rows(status='failed')).to_dict())


# ---- the neighbours

def test_pruned_and_fresh(folders):
    model, tokenizer = load_classifier(folders['clean'], (0, 1)); texts = [r['text'] for r in ROWS[:20]]
    with torch.no_grad(): model.bert.encoder.layer[1].attention.self.value.weight[8:16] = 0; model.bert.encoder.layer[1].attention.self.value.bias[8:16] = .3   # a head that says the same of every text
    fewer, spread = ob.pruned_heads(model, tokenizer, texts, .125)
    W = fewer.bert.encoder.layer[1].attention.output.dense.weight
    assert spread.argmin() == 5 and not W[:, 8:16].any() and W[:, :8].any() and W[:, 16:].any() and model.bert.encoder.layer[1].attention.output.dense.weight[:, 8:16].any()
    assert len(model.bert.encoder.layer[1].attention.output.dense._forward_pre_hooks) == 0
    a, b = ob.fresh_layers(model, 1, 3), ob.fresh_layers(model, 1, 3)
    assert torch.equal(a.bert.encoder.layer[1].output.dense.weight, b.bert.encoder.layer[1].output.dense.weight) and torch.equal(a.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    assert not torch.equal(a.bert.encoder.layer[1].output.dense.weight, model.bert.encoder.layer[1].output.dense.weight) and torch.equal(a.bert.encoder.layer[1].output.LayerNorm.weight, torch.ones(32))


def test_half_is_close_and_trains(folders):
    t = [run(folders, replace(GRID, arms=('none',), half=h)).iloc[0] for h in (False, True)]
    assert abs(t[0]['loss']-t[1]['loss']) < .05 and t[0]['loss'] != t[1]['loss'] and abs(t[0]['peft_norm']/t[1]['peft_norm']-1) < .05


def test_stored_table_is_of_the_study():
    sys.path.insert(0, str(ROOT))
    from benchmarks import obliviate as study
    if not study.STORED.exists(): pytest.skip('the study has not been stored yet')
    t = ob.stored_obliviate()
    assert study.STORED.read_bytes() == study.PACKED.read_bytes(), 'run `python -m benchmarks.obliviate --store`: what comes with the package'
    planned = {(c.backbone, c.dataset, c.kind, c.arm.name, c.lr, c.steps, c.pool or 'own', c.items or 'none') for b, d, g in study.blocks().values() for c in plan_obliviate(g, b, d)}
    assert {*t[['backbone', 'dataset', 'kind', 'arm', 'lr', 'steps', 'pool', 'items']].itertuples(index=False, name=None)} <= planned
    assert set(t['seed']) <= set(study.SEEDS) and t['asr'].between(0, 1).all() and (t['asr_low'] <= t['asr']).all() and t['right'].le(t['asr_rows']).all()
    for r in t.itertuples(): assert ob.unpack_bits(r.right_bits, r.asr_rows).sum() == r.right and abs((ob.unpack_bits(r.flipped_bits, r.asr_rows).sum())/r.right-r.asr) < 1e-3
