"Grids: which cells there are, what resumes, what fails alone, what a config may say."
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from gradsentry_nb import experiment as ex
from gradsentry_nb.cli import main
from gradsentry_nb.core import DataError, SettingError
from gradsentry_nb.data import Samples
from gradsentry_nb.demo import demo_model, demo_samples
from gradsentry_nb.experiment import Cell, Choice, DataSet, Defence, Grid, RowStore, collect, over_seeds, plan_cells, read_config, run_grid

TEXT = 'answer_length', 'answer_ngrams'


@pytest.fixture(scope='module')
def model(): return demo_model()


@pytest.fixture(scope='module')
def clean(): return demo_samples(120, rate=0, seed=7)[0]


def run(grid, model, clean, out=None, **kw): return run_grid(grid, {'demo': model}, {'demo': clean}, out, progress=kw.pop('progress', False), **kw)


# ---- which cells there are

def test_every_combination_once():
    g = Grid(attacks=('badnets', 'cba'), payloads=('append', 'swapped'), rates=(.1, .2), defences=TEXT, seeds=(1, 2))
    cells = plan_cells(g, ['m'], ['a', 'b'])
    assert len(cells) == len({c.key for c in cells}) == 2*2*2*2*2*2


def test_a_set_without_attack_stands_once_for_all_rates():
    cells = plan_cells(Grid(attacks=('none', 'badnets'), rates=(.1, .2), payloads=('append', 'swapped'), defences=TEXT), ['m'], ['a'])
    assert sum(c.attack.label == 'none' for c in cells) == 2 and sum(c.attack.label == 'badnets' for c in cells) == 8


def test_key_depends_on_everything():
    c = Cell('m', 'd', None, Choice('badnets'), 'append', .1, 0, Defence('answer_length'))
    others = [replace(c, model='x'), replace(c, dataset='x'), replace(c, size=5), replace(c, attack=Choice('cba')), replace(c, attack=Choice('badnets', settings=(('trigger', 'x'),))), replace(c, payload='swapped'), replace(c, rate=.2), replace(c, seed=1),
              replace(c, defence=Defence('answer_length', 'x')), replace(c, defence=Defence('answer_length', settings=(('threshold', 3),))), replace(c, train='lora'), replace(c, extra=(1,))]
    assert len({x.key for x in [c, *others]}) == len(others)+1


@pytest.mark.parametrize('fields,says', [
    (dict(attacks=['badnet']), "Did you mean 'badnets'"), (dict(payloads=['apend']), "Did you mean 'append'"), (dict(defences=['gradsentri']), "Did you mean 'gradsentry'"),
    (dict(rates=[1.5]), 'between 0 and 0.9'), (dict(rates=[]), 'rates is empty'), (dict(seeds=['a']), 'whole number'), (dict(train='qlora'), "no fine-tuning method 'qlora'"),
    (dict(defences=['none']), 'needs fine-tuning'), (dict(defences=['answer_length', 'answer_length']), 'give one of them a label'),
    (dict(defences=[dict(name='clean', label='x', threshold=1)], train='lora'), 'takes no settings')])
def test_a_grid_says_what_is_wrong(fields, says):
    with pytest.raises(SettingError, match=says): Grid(**fields)


def test_all_problems_of_a_grid_at_once():
    with pytest.raises(SettingError) as e: Grid(attacks=['x'], payloads=['y'], rates=[7])
    assert "'x'" in str(e.value) and "'y'" in str(e.value) and '7' in str(e.value)


# ---- running, resuming

def counted(monkeypatch, fail=lambda cell: False):
    "Cells in the order in which they are run."
    seen, real = [], ex.Runner.run
    def run(self, cell):
        seen.append(cell.key)
        if fail(cell): raise ValueError('broken on purpose')
        return real(self, cell)
    monkeypatch.setattr(ex.Runner, 'run', run)
    return seen


def test_killed_and_started_again(tmp_path, monkeypatch, model, clean):
    grid, seen = Grid(rates=(.1, .2, .3), defences=TEXT, seeds=(1, 2)), counted(monkeypatch)
    def stop(done, total, row):
        if done == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(grid, model, clean, tmp_path, progress=stop)
    assert len(seen) == 5 and len(collect(tmp_path)) == 5
    table = run(grid, model, clean, tmp_path)
    assert len(seen) == len(set(seen)) == len(table) == 12
    pd.testing.assert_frame_equal(table, run(grid, model, clean))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/'table.parquet'), collect(tmp_path))


def test_a_killed_process_loses_nothing(tmp_path):
    code = textwrap.dedent(f'''
        import time
        from gradsentry_nb.demo import demo_model, demo_samples
        from gradsentry_nb.experiment import Grid, run_grid
        grid = Grid(rates=(.1, .2, .3, .4, .5), defences=('answer_length', 'answer_ngrams'), seeds=(1, 2, 3))
        slow = lambda done, total, row: time.sleep(.05)
        run_grid(grid, {{'demo': demo_model()}}, {{'demo': demo_samples(120, rate=0, seed=7)[0]}}, {str(tmp_path)!r}, progress=slow)
        ''')
    start = lambda: subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    p, cells = start(), tmp_path/'cells'
    for _ in range(1200):
        if cells.exists() and len(list(cells.glob('*.json'))) >= 4: break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    before = {f.name: f.stat().st_mtime_ns for f in cells.glob('*.json')}
    assert 4 <= len(before) < 30
    assert start().wait() == 0
    after = {f.name: f.stat().st_mtime_ns for f in cells.glob('*.json')}
    assert len(after) == 30 and all(after[n] == t for n, t in before.items())
    assert len(pd.read_parquet(tmp_path/'table.parquet')) == 30


def test_a_failed_cell_is_recorded_and_the_grid_goes_on(tmp_path, monkeypatch, model, clean):
    grid = Grid(rates=(.1, .2), defences=TEXT)
    seen = counted(monkeypatch, lambda c: c.rate == .1 and c.defence.name == 'answer_length')
    table = run(grid, model, clean, tmp_path)
    assert list(table['status']).count('failed') == 1 and len(table) == 4
    bad = table[table['status'] == 'failed'].iloc[0]
    assert 'broken on purpose' in bad['reason'] and np.isnan(bad['auroc'])
    monkeypatch.undo(); seen = counted(monkeypatch)
    again = run(grid, model, clean, tmp_path)
    assert len(seen) == 1 and (again['status'] == 'done').all() and len(collect(tmp_path)) == 4


def test_failed_cells_can_be_left(tmp_path, monkeypatch, model, clean):
    counted(monkeypatch, lambda c: True)
    run(Grid(defences=TEXT), model, clean, tmp_path)
    monkeypatch.undo()
    assert (run(Grid(defences=TEXT), model, clean, tmp_path, retry=False)['status'] == 'failed').all()


def test_a_rate_without_rows_fails_with_its_reason(model, clean):
    table = run(Grid(rates=(.002, .1), defences=TEXT[:1]), model, clean)
    assert list(table['status']) == ['failed', 'done'] and 'row' in table['reason'][0]


def test_a_larger_grid_in_the_same_folder_runs_only_what_is_new(tmp_path, monkeypatch, model, clean):
    run(Grid(rates=(.1,), defences=TEXT), model, clean, tmp_path)
    seen = counted(monkeypatch)
    assert len(run(Grid(rates=(.1, .3), defences=TEXT), model, clean, tmp_path)) == 4 and len(seen) == 2


def test_another_set_or_model_of_the_same_name_is_refused(tmp_path, model, clean):
    run(Grid(defences=TEXT), model, clean, tmp_path)
    with pytest.raises(SettingError, match='another dataset'): run(Grid(defences=TEXT), model, clean[:60], tmp_path)
    with pytest.raises(SettingError, match='another model'): run_grid(Grid(defences=TEXT), {'demo': (ex.random_twin(model[0]), model[1])}, {'demo': clean}, tmp_path, progress=False)


# ---- rows are scored once, and the numbers are the same

def test_row_store_equals_scoring_afresh(tmp_path, model, clean):
    from gradsentry_nb.detectors import make_detector
    from gradsentry_nb.evaluate import evaluate
    grid = Grid(rates=(.3,), defences=('gradsentry', 'gradsentry_paper', 'window_loss'))
    table = run(grid, model, clean, tmp_path)
    assert (table['status'] == 'done').all(), table['reason'].tolist()
    for r in table.itertuples():
        mix, truth = ex.make_mix(clean, Cell('demo', 'demo', None, Choice(r.attack), r.payload, r.rate, r.seed, Defence(r.defence)))
        e = evaluate(make_detector(r.defence, *model).filter(mix, progress=False), truth)
        assert (e.recall, e.precision) == (r.recall, r.precision) and e.auroc == pytest.approx(r.auroc, abs=2e-3)


def test_rows_are_scored_once(tmp_path, monkeypatch, model, clean):
    from gradsentry_nb.sentry import Sentry
    asked, real = [], Sentry.score
    def score(self, samples, progress=True): asked.extend((self.preset, s.id.rsplit('-')[0]) for s in samples); return real(self, samples, progress)
    monkeypatch.setattr(Sentry, 'score', score)
    grid = Grid(rates=(.1, .2, .3), defences=('gradsentry', 'loss', 'window_loss'))
    run(grid, model, clean, tmp_path)
    assert len(asked) == len(set(asked)) and len(asked) <= 120+36
    run(replace(grid, rates=(.15,)), model, clean, tmp_path)
    assert len(asked) == len(set(asked)) <= 120+36


def test_row_store_survives_the_process(tmp_path, clean):
    from gradsentry_nb.core import Scores
    calls = []
    def score(samples): calls.append(len(samples)); return Scores(pd.DataFrame(dict(id=[s.id for s in samples], row=0, score=[float(len(s.prompt)) for s in samples], problem=None)))
    first = RowStore(tmp_path).frame('k', clean[:50], score)
    again = RowStore(tmp_path).frame('k', Samples(list(reversed(clean[:60]))), score)
    assert calls == [50, 10]
    assert again['id'].tolist() == [s.id for s in reversed(clean[:60])] and again['score'].tolist() == [float(len(s.prompt)) for s in reversed(clean[:60])]
    assert first['score'].tolist() == again['score'].tolist()[::-1][:50]
    RowStore(tmp_path).frame('other', clean[:5], score)
    assert calls == [50, 10, 5]


def test_equal_rows_share_a_score_and_keep_their_ids(clean):
    from gradsentry_nb.core import Scores
    from gradsentry_nb.data import load_samples
    twice = load_samples([dict(prompt='a', response='b')]*3)
    out = RowStore().frame('k', twice, lambda s: Scores(pd.DataFrame(dict(id=[x.id for x in s], row=0, score=1.))))
    assert out['id'].tolist() == [s.id for s in twice] and len(set(out['id'])) == 3


# ---- draws and seeds

def test_smaller_draws_are_parts_of_larger_ones(clean):
    ids = lambda n, seed=0: {s.id for s in ex.draw_rows(clean, n, seed)}
    assert ids(10) < ids(50) < ids(120) and ids(10) != ids(10, 1) and len(ids(50)) == 50
    with pytest.raises(DataError, match='asked for'): ex.draw_rows(clean, 121, 0)


def test_over_seeds_by_hand():
    t = pd.DataFrame(dict(model='m', dataset='d', attack='a', payload='p', rate=.1, size=None, defence=['x']*3+['y'], train=None, seed=[1, 2, 3, 1], status='done', auroc=[.8, .9, 1., .5]))
    f = over_seeds(t).set_index('defence')
    assert f.loc['x', 'mean'] == pytest.approx(.9) and f.loc['x', 'low'] == pytest.approx(.9-4.30265*.1/3**.5, abs=1e-4) and f.loc['x', 'high'] == 1
    assert f.loc['y', 'seeds'] == 1 and np.isnan(f.loc['y', 'low'])


def test_failed_seeds_are_counted_not_averaged():
    t = pd.DataFrame(dict(defence='x', seed=[1, 2], status=['done', 'failed'], auroc=[.8, np.nan]))
    f = over_seeds(t, by=('defence',))
    assert f['mean'][0] == .8 and f['seeds'][0] == 1 and f['failed'][0] == 1


def test_unknown_measure_lists_the_known_ones():
    with pytest.raises(SettingError, match='auroc'): over_seeds(pd.DataFrame(dict(defence='x', status='done', auroc=[.8])), 'aurok')


@pytest.mark.parametrize('name', ex.EXPERIMENTS)
def test_presets_are_grids(name):
    assert plan_cells(ex.experiment_grid(name), ['m'], ['d'])
    assert {'gradsentry', 'gradsentry_paper', 'none'} & {d.name for d in ex.experiment_grid(name).defences}


# ---- config files

GOOD = '''
[experiment]
preset = "table2"
seeds = [1, 2]
attacks = ["badnets"]
[models.demo]
path = "model"
[datasets.mine]
source = "rows.jsonl"
[[defence]]
name = "gradsentry"
label = "longer window"
window = 24
'''


def config(tmp_path, text):
    path = tmp_path/'grid.toml'; path.write_text(text)
    return read_config(path)


def test_config(tmp_path):
    _, grid = config(tmp_path, GOOD)
    assert grid.seeds == (1, 2) and grid.attacks == (Choice('badnets'),) and grid.rates == (.1,)
    assert grid.defences[-1] == Defence('gradsentry', 'longer window', (('window', 24),)) and len(grid.defences) > 3


@pytest.mark.parametrize('old,new,line,says', [
    ('seeds = [1, 2]', 'seed = [1, 2]', 4, "Did you mean 'seeds'"), ('seeds = [1, 2]', 'seeds = "1"', 4, 'a list of whole numbers'), ('seeds = [1, 2]', 'seeds = [true]', 4, 'a list of whole numbers'),
    ('"table2"', '"table3"', 3, "Did you mean 'table"), ('["badnets"]', '["badnet"]', 5, "Did you mean 'badnets'"), ('path = "model"', 'path = 7', 7, 'text in quotes'),
    ('path = "model"', 'device = "cpu"', 6, 'path is missing'), ('source = "rows.jsonl"', 'set = "webq"', 9, "Did you mean 'webqa'"), ('[[defence]]', '[defence]', 10, 'double brackets'),
    ('name = "gradsentry"', 'name = "gradsentri"', 11, "Did you mean 'gradsentry'"), ('[experiment]', '[experiments]', 2, 'no table')])
def test_config_problems_name_their_line(tmp_path, old, new, line, says):
    assert old in GOOD
    with pytest.raises(SettingError) as e: config(tmp_path, GOOD.replace(old, new))
    assert any(s.startswith(f'line {line}: ') and says in s for s in str(e.value).splitlines()), str(e.value)


def test_all_config_problems_at_once(tmp_path):
    with pytest.raises(SettingError) as e: config(tmp_path, GOOD.replace('seeds = [1, 2]', 'seeds = 1').replace('path =', 'pth =').replace('source', 'sorce'))
    assert [s.split(':')[0] for s in str(e.value).splitlines()[1:]] == ['line 4', 'line 6', 'line 7', 'line 8', 'line 9']


def test_values_of_a_config_are_checked_all_at_once(tmp_path):
    with pytest.raises(SettingError) as e: config(tmp_path, GOOD.replace('["badnets"]', '["x"]').replace('[1, 2]', '[]'))
    assert len(str(e.value).splitlines()) == 3


@pytest.mark.parametrize('text', ['a = ', 'a = 1\na = 2', '\udcff'])
def test_what_is_no_toml(tmp_path, text):
    path = tmp_path/'grid.toml'; path.write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(SettingError, match='no TOML'): read_config(path)


def test_missing_config(tmp_path):
    with pytest.raises(SettingError, match='cannot be read'): read_config(tmp_path/'none.toml')


# ---- the commands

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    "Run the command in `tmp_path`: (status, stdout, stderr)."
    monkeypatch.chdir(tmp_path)
    return lambda *args: (main([*map(str, args)]), *capsys.readouterr())


def test_attack_then_experiment(tmp_path, clean, command):
    rows = tmp_path/'rows.jsonl'
    rows.write_text(''.join(json.dumps(dict(prompt=s.prompt, response=s.response))+'\n' for s in clean))
    status, said, err = command('attack', 'rows.jsonl', '--rate', .1, '--out', 'bad')
    assert status == 0, err
    from gradsentry_nb.data import load_samples
    back, truth = load_samples(tmp_path/'bad'/'attacked.jsonl'), json.loads((tmp_path/'bad'/'truth.json').read_text())
    assert '12 of 120 rows planted' in said and 'poison' not in (tmp_path/'bad'/'attacked.jsonl').read_text()
    from gradsentry_nb.attacks.triggers import Truth
    planted = Truth.from_json(json.dumps(truth))
    assert sum(planted[s.id] for s in back) == 12 and all('malicious_url' in s.response for s in back if planted[s.id])

    from gradsentry_nb.demo import demo_model_path
    (tmp_path/'grid.toml').write_text(f'[experiment]\nseeds = [1]\ndefences = ["gradsentry", "answer_length"]\n[models.demo]\npath = {str(demo_model_path())!r}\n[datasets.mine]\nsource = "rows.jsonl"\n')
    status, said, _ = command('experiment', 'grid.toml', '--dry-run')
    assert status == 0 and '2 cells, 0 of them done' in said and not (tmp_path/'gradsentry-runs').exists()
    status, _, err = command('experiment', 'grid.toml', '--quiet')
    assert status == 0, err
    page = (tmp_path/'gradsentry-runs'/'grid'/'charts.html').read_text()
    assert '<svg' in page and '<script' not in page and len(pd.read_parquet(tmp_path/'gradsentry-runs'/'grid'/'table.parquet')) == 2
    assert '2 of them done' in command('experiment', 'grid.toml', '--dry-run')[1]


@pytest.mark.parametrize('args,says', [
    (('--attack', 'badnet'), "Did you mean 'badnets'"), (('--payload', 'apend'), "Did you mean 'append'"), (('--rate', .1, '--count', 3), 'not both'), (('--rate', .001), 'row'),
    (('--place', 'context'), 'context'), (('--rate', 2), 'rate')])
def test_attack_refuses(tmp_path, clean, command, args, says):
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(dict(prompt=s.prompt, response=s.response))+'\n' for s in clean))
    status, _, err = command('attack', 'rows.jsonl', *args)
    assert status == 2 and says in err and len(err.splitlines()) == 1 and not (tmp_path/'gradsentry-attack').exists()


def test_charts_of_every_preset_draw():
    from gradsentry_nb.charts import chart_svg
    rng = np.random.default_rng(0)
    for name in ex.EXPERIMENTS:
        rows = [ex.cell_row(c, 'done', dict(planted=0 if c.attack.name == 'none' else 9, auroc=np.nan if c.attack.name == 'none' else rng.random(), f1=rng.random(), recall=.5, fpr=.1,
                                            **(dict(asr=.1, cacc=.6, asr_low=0., asr_high=.2) if c.train else {}))) for c in plan_cells(ex.experiment_grid(name, seeds=(1, 2)), ['m'], ['a', 'b'])]
        table = ex.tidy(rows)
        charts = ex.experiment_charts(table)
        assert charts, name
        assert all(chart_svg(c).startswith('<svg') for c in charts.values())
        page = ex.experiment_html(table.assign(reason='<script>'), '<b>')
        assert '<script' not in page and '<b>' not in page


def test_data_set_without_test_rows_says_so(model, clean):
    table = run_grid(Grid(defences=('none',), train='lora'), {'demo': model}, {'demo': DataSet(clean)}, progress=False)
    assert table['status'][0] == 'failed' and 'no test rows' in table['reason'][0]


# ---- layers

def test_the_layers_of_a_grid_come_from_one_scan(monkeypatch, model, clean):
    "And have the numbers of their own scans; with one of them refused, each is scanned for itself."
    from gradsentry_nb.sentry import Sentry
    grid, calls = Grid(rates=(.1, .2), defences=('gradsentry_paper',), layers=('last',)), []
    def count(name, real): monkeypatch.setattr(Sentry, name, lambda *a, **kw: (calls.append(name), real(*a, **kw))[1])
    count('score', Sentry.score); count('score_layers', Sentry.score_layers)
    many = run(grid, model, clean[:20])
    assert len(many) == 16 and calls == ['score', 'score_layers']*2
    def refuse(*a, **kw): raise ex.GradSentryError('no gradient')
    monkeypatch.setattr(Sentry, 'score_layers', refuse); calls.clear()
    alone = run(grid, model, clean[:20])
    assert calls == ['score']*16
    pd.testing.assert_frame_equal(many, alone, atol=1e-4)
