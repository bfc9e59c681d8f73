"""The magics in a real shell: loaded and unloaded, each beside its Python twin, completed, and refusing in one sentence whatever the line."""
import contextlib
import copy
import io
import json
import re
import shutil
import string
import subprocess
import sys
import types

import pandas as pd
import pytest
from conftest import ROOT, within
from hypothesis import example, given, settings
from hypothesis import strategies as st
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import gradsentry_nb
from gradsentry_nb.attacks.triggers import ATTACKS, PAYLOADS
from gradsentry_nb.core import Cut, Scores, Verdict
from gradsentry_nb.data import Samples, load_samples
from gradsentry_nb.demo import demo_model, demo_model_path, demo_rows, demo_samples
from gradsentry_nb.encoder import toy_encoder
from gradsentry_nb.magics import MAGICS, attached, cell_samples, completions, line_function, parse_line, split_line, unfinished
from gradsentry_nb.sentry import PRESETS, Sentry
from gradsentry_nb.spurious import made_reviews

ROWS = demo_rows(25, rate=.1)[0]   # fewer than a valley needs: nothing here is about cuts


def new_shell(**config):
    quiet = Config(HistoryManager=dict(enabled=False), **config)
    return InteractiveShell(config=quiet)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test in a folder and a profile of its own."
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path/'profile'))
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    monkeypatch.setattr('gradsentry_nb.report._charts_html', lambda verdict: '')   # drawing takes longer than everything else here


@pytest.fixture
def shell():
    s = new_shell()
    gradsentry_nb.load_ipython_extension(s)
    yield s
    gradsentry_nb.unload_ipython_extension(s)


@pytest.fixture(scope='module')
def model(): return demo_model()


@pytest.fixture(scope='module')
def scanned(model):
    samples = load_samples(ROWS)
    sentry = Sentry(*model)
    return sentry, samples, sentry.filter(samples, progress=False)


@pytest.fixture
def ready(shell, model):
    "A shell with the embedded model kept, and rows in a variable."
    shell.user_ns.update(model_pair=model, rows=ROWS)
    shell.run_line_magic('gs_model', 'model_pair')
    return shell


@pytest.fixture
def stubs(monkeypatch):
    "Stand-ins for the two modules that draw and explain: they return what they were given."
    def module(name, **functions):
        m = types.ModuleType(f'gradsentry_nb.{name}')
        vars(m).update(functions)
        monkeypatch.setitem(sys.modules, m.__name__, m)
    module('widgets', dashboard=lambda sentry, samples: types.SimpleNamespace(sentry=sentry, samples=samples, verdict=None),
           view=lambda verdict, samples=None, sentry=None: (verdict, samples, sentry))
    module('explain', explain_verdict=lambda verdict, samples: ('verdict', verdict, samples), explain_row=lambda sentry, sample: ('row', sentry, sample))


def refused(shell, name, line, cell=None):
    "The one sentence that a line is refused with."
    with pytest.raises(UsageError) as e: shell.run_line_magic(name, line) if cell is None else shell.run_cell_magic(name, line, cell)
    said = str(e.value)
    assert type(e.value) is UsageError and said and '\n' not in said and 'Traceback' not in said
    assert e.value.__suppress_context__ or name not in MAGICS
    return said


def run(shell, code):
    "Run a cell as a notebook does: (result, stdout, stderr)."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): result = shell.run_cell(code)
    return result, out.getvalue(), err.getvalue()


def same(a, b): pd.testing.assert_frame_equal(a.scores.frame, b.scores.frame); assert a.drop == b.drop


# ---- coming and going

def tables(shell):
    return ({k: dict(v) for k, v in shell.magics_manager.magics.items()}, list(shell.configurables), list(shell.Completer.custom_matchers),
            list(shell.Completer.magic_arg_matchers), dict(vars(shell.magics_manager.user_magics)), set(shell.user_ns))


def test_unload_puts_everything_back():
    s = new_shell()
    mine = {n: (lambda line, n=n: n) for n in ('gs_scan', 'gradsentry')}
    for n, f in mine.items(): s.register_magic_function(f, 'line', n)
    s.register_magic_function(lambda line, cell: cell, 'cell', 'gs_score')
    before = tables(s)
    for _ in range(2):
        gradsentry_nb.load_ipython_extension(s)
        gradsentry_nb.load_ipython_extension(s)
        assert len([c for c in s.configurables if type(c).__name__ == 'GradSentry']) == 1
        assert {n for n in s.magics_manager.magics['line'] if n.startswith('gs_')} == set(MAGICS)
        assert s.magics_manager.magics['line']['gs_scan'] is not mine['gs_scan']
        gradsentry_nb.unload_ipython_extension(s)
        gradsentry_nb.unload_ipython_extension(s)
        assert tables(s) == before
    assert s.run_line_magic('gs_scan', 'x') == 'gs_scan'


def test_unload_leaves_what_came_later():
    s = new_shell()
    gradsentry_nb.load_ipython_extension(s)
    s.register_magic_function(later := lambda line: 'later', 'line', 'gs_scan')
    gradsentry_nb.unload_ipython_extension(s)
    assert s.magics_manager.magics['line']['gs_scan'] is later and 'gs_model' not in s.magics_manager.magics['line']


def test_load_reload_unload_through_ipython():
    s = new_shell()
    for line in ('%unload_ext gradsentry_nb', '%load_ext gradsentry_nb', '%load_ext gradsentry_nb', '%reload_ext gradsentry_nb', '%reload_ext gradsentry_nb',
                 '%gs_scan --help', '%unload_ext gradsentry_nb', '%unload_ext gradsentry_nb', '%load_ext gradsentry_nb'):
        result, out, err = run(s, line)
        assert result.success and not err, (line, err)
    assert attached(s) is not None
    assert 'is not loaded' not in run(s, '%gs_model --forget')[1]


def test_loading_imports_nothing_heavy():
    code = '''
import sys
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
s = InteractiveShell(config=Config(HistoryManager=dict(enabled=False)))
before = set(sys.modules)
s.run_line_magic('load_ext', 'gradsentry_nb'); s.run_line_magic('gs_scan', '--help')
new = {m.partition('.')[0] for m in set(sys.modules)-before}
sys.exit(', '.join(new & {'torch', 'transformers', 'numpy', 'pandas', 'altair', 'ipywidgets', 'datasets'}) or None)'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- help, twins, `_`

@pytest.mark.parametrize('name', MAGICS)
@pytest.mark.parametrize('flag', ['--help', '-h', 'x --help'])
def test_help(shell, capsys, name, flag):
    assert shell.run_line_magic(name, flag) is None
    said = capsys.readouterr().out
    assert f'usage: {MAGICS[name].sign}' in said and 'in Python' in said and '%config GradSentry' in said
    for line, code in MAGICS[name].twins.items(): assert line in said and code in said
    doc = shell.magics_manager.magics['line'][name].__doc__
    assert doc.startswith(MAGICS[name].run.__doc__.splitlines()[0]) and said.strip() in doc
    if MAGICS[name].kind == 'cell': assert shell.run_cell_magic(name, '--help', 'x') is None


@pytest.mark.filterwarnings('ignore:.*hold the trigger already')
def test_every_twin_is_the_same(ready, stubs, scanned, model, monkeypatch):
    "Run each line that stands in a help text, then the Python beside it, and compare."
    sentry, samples, verdict = scanned
    with open('data.jsonl', 'w') as f: f.writelines(json.dumps(r)+'\n' for r in ROWS)
    shutil.copytree(demo_model_path(), 'my-model')
    monkeypatch.setattr('gradsentry_nb.demo.demo_path', lambda: 'data.jsonl')
    clean = samples[:11]
    ns = {n: getattr(gradsentry_nb, n) for n in ('Sentry', 'load_samples', 'demo_model', 'poison', 'write_outputs', 'report_html', 'scan_tokens', 'inject', 'defend', 'probe_backbone', 'load_classifier')}
    ns.update(widgets=sys.modules['gradsentry_nb.widgets'], explain=sys.modules['gradsentry_nb.explain'], model=model[0], tokenizer=model[1], sentry=sentry,
              samples=samples, demo_path=lambda: 'data.jsonl', rows=ROWS, reviews=made_reviews())
    ready.user_ns.update(rows=ROWS, reviews=made_reviews())
    pair = toy_encoder([*dict.fromkeys(' '.join(r['text'] for r in made_reviews(40)).split()), *(x+y for x in string.ascii_lowercase for y in 'bcdfghjklmnpqrstvwxyz')])
    for x in pair: x.save_pretrained('my-encoder')
    checked = 0
    for m in MAGICS.values():
        for line, code in m.twins.items():
            calibrated = 'known-clean' in line
            ready.run_line_magic('gs_scan', 'data.jsonl --quiet')
            if m.name == 'gs_view': ready.user_ns['mine'] = attached(ready).verdict
            ns.update(verdict=attached(ready).verdict, mine=ready.user_ns.get('mine'), sentry=attached(ready).sentry)
            words = line.partition(' ')[2].replace('--known-clean mine', '--known-clean mine --fpr 0.1' if calibrated else '')
            if m.name == 'gs_obliviate':
                few = ready.user_ns['reviews'] = made_reviews(40); ns.update({c: [r[c[:-1]] for r in few] for c in ('texts', 'labels')})
                words, code = (x.replace('2000', '40').replace('epochs 5', 'steps 1').replace('epochs=5', 'steps=1') for x in (words, code))
            if calibrated: code = code.replace("threshold='calibrated'", "threshold='calibrated', fpr=.1"); ready.user_ns['mine'] = ns['mine'] = clean
            got = ready.run_line_magic(m.name, words) if m.kind == 'line' else ready.run_cell_magic(m.name, words, '{"prompt": "...", "response": "..."}')
            made = dict(ns)
            body, _, last = code.rpartition('; ')
            exec(body, made)
            target, eq, value = last.partition(' = ')
            last = value if eq and re.fullmatch(r'[\w, ]+', target) else last
            exec(f'wanted = {last}', made)
            alike(got, made['wanted'])
            checked += 1
    assert checked >= 14


def alike(got, wanted):
    if isinstance(got, Verdict) and isinstance(wanted, Verdict): return same(got, wanted)
    if isinstance(got, Verdict): return same(got, Verdict.from_json(wanted['verdict'].read_text()))   # the twin of --out ends on the files
    if isinstance(got, Scores): return pd.testing.assert_frame_equal(got.frame, wanted.frame)
    if isinstance(got, Sentry): assert (got.settings, got.preset, type(got.model)) == (wanted.settings, wanted.preset, type(wanted.model)); return
    if isinstance(got, (tuple, list)) and not isinstance(got, Samples):
        assert len(got) == len(wanted)
        for x, y in zip(got, wanted): alike(x, y)
        return
    if isinstance(got, types.SimpleNamespace): alike((got.sentry, got.samples), (wanted.sentry, wanted.samples)); return
    if hasattr(got, 'page'): assert got.page == wanted; return
    if hasattr(got, 'sweep'): return pd.testing.assert_frame_equal(got.table(), wanted.table())
    if hasattr(got, 'first'): return pd.testing.assert_frame_equal(got.table, wanted.table)
    if hasattr(got, 'every'): return pd.testing.assert_frame_equal(got.every, wanted.every)
    assert got == wanted


def test_value_can_be_assigned_and_is_the_last_output(ready):
    result, out, err = run(ready, 'v = %gs_scan rows --quiet\nw = v')
    assert result.success and not err and isinstance(ready.user_ns['v'], Verdict)
    run(ready, '%gs_scan rows --quiet')
    assert isinstance(ready.user_ns['_'], Verdict) and 'Verdict' in repr(ready.user_ns['_'])
    run(ready, 'samples, truth = %gs_attack badnets rows --rate 0.5;')
    assert len(ready.user_ns['samples']) == len(ready.user_ns['truth']) == len(ROWS)
    for comment in ('  # mine', ';'): assert run(ready, f'u = %gs_scan rows --quiet{comment}')[0].success


def test_demo_needs_no_model_and_keeps_none(shell, monkeypatch, scanned):
    monkeypatch.setattr('gradsentry_nb.demo.demo_path', lambda: ROWS)
    v = shell.run_line_magic('gs_scan', 'demo --quiet')
    assert v.drop == scanned[2].drop and v.scores.info['model'] == 'the embedded demo model'
    shell.user_ns['rows'] = ROWS
    assert '%gs_model' in refused(shell, 'gs_scan', 'rows')


# ---- where rows come from

def sources(tmp):
    frame = pd.DataFrame(ROWS)
    import datasets
    samples = load_samples(ROWS)
    return dict(samples=samples, plain=list(samples), dicts=ROWS, frame=frame, dataset=datasets.Dataset.from_pandas(frame), pair=(samples, {}),
                splits=datasets.DatasetDict(train=datasets.Dataset.from_pandas(frame)), path=tmp, text=str(tmp))


def test_every_kind_of_variable(ready, tmp_path, scanned):
    path = tmp_path/'x.jsonl'
    path.write_text(''.join(json.dumps(r)+'\n' for r in ROWS))
    ready.user_ns['box'] = types.SimpleNamespace(**sources(path))
    ready.user_ns.update(sources(path))
    for name in sources(path):
        same(ready.run_line_magic('gs_scan', f'{name} --quiet'), scanned[2])
        assert len(ready.run_line_magic('gs_scan', f'box.{name} --quiet --limit 7').scores) == 7
    v = ready.run_line_magic('gs_scan', 'frame --quiet --prompt response --response prompt')
    assert v.scores.info['read'] == ["prompt from 'response', response from 'prompt'"] and v.scores.info['source'] == 'frame'
    assert 'leave out' in refused(ready, 'gs_scan', 'samples --prompt prompt --response response')


def test_local_variables_count(ready):
    f = ready.user_ns
    run(ready, 'def f(these):\n    return get_ipython().run_line_magic("gs_scan", "these --quiet")\nout = f(rows[:5])')
    assert len(f['out'].scores) == 5


def test_variable_wins_over_file_and_says_so(ready, capsys, tmp_path):
    with open('rows', 'w') as f: f.write('a file')
    assert len(ready.run_line_magic('gs_scan', 'rows --quiet').scores) == len(ROWS)
    assert 'variable' in (said := capsys.readouterr().out) and './rows' in said and said.count('\n') == 1
    assert 'unknown format' in refused(ready, 'gs_scan', './rows')
    ready.user_ns['demo'] = ROWS[:3]
    assert len(ready.run_line_magic('gs_scan', 'demo --quiet').scores) == 3 and 'embedded' in capsys.readouterr().out
    ready.user_ns['data'] = 3            # holds no rows, so it hides no file
    with open('data', 'w') as f: f.write('a file')
    assert 'unknown format' in refused(ready, 'gs_scan', 'data')
    ready.user_ns['number'] = 3
    assert 'holds an int' in refused(ready, 'gs_scan', 'number')


def test_home_folder(ready, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'x.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in ROWS))
    v = ready.run_line_magic('gs_scan', '~/x.jsonl --quiet --out ~/found')
    assert len(v.scores) == len(ROWS) and (tmp_path/'found'/'report.html').exists()


# ---- settings

def test_options_reach_the_scan(ready, scanned):
    s = ready.run_line_magic('gs_scan', 'rows --quiet --preset paper --k 8 --crop 2 --threshold 0.5 --max-length 64 --budget 512 --seed 3').scores.info['settings']
    assert (s['statistic'], s['k'], s['crop'], s['threshold'], s['max_length'], s['budget'], s['seed']) == ('entropy', 8, 2, '0.5', 64, 512, 3)
    layered = ready.run_line_magic('gs_scan', 'rows --quiet --layer layers.0.mlp.down_proj')
    assert layered.scores.info['layer'].endswith('layers.0.mlp.down_proj') and layered.scores.info['statistic'] == 'entropy'
    calibrated = ready.run_line_magic('gs_scan', 'rows --quiet --known-clean rows --fpr 0.1')
    assert calibrated.cut.method == 'calibrated' and 'p_value' in calibrated.scores.frame
    for line, word in {'rows --threshold calibrated': '--known-clean', 'rows --known-clean rows --threshold 3': '--known-clean', 'rows --fpr 0.1': '--known-clean',
                       'rows --limit 0': '--limit', 'rows --preset papr': "'paper'", 'rows --k 1': 'k must', 'rows --layer nope': 'layer', 'rows --k 3.5': '--k',
                       'rows --k 99999999999999999999999999': 'large'}.items():
        assert word in refused(ready, 'gs_scan', line+' --quiet')


def test_config(ready, capsys):
    g = attached(ready)
    assert run(ready, '%config GradSentry')[0].success
    run(ready, '%config GradSentry.preset = "paper"')
    run(ready, '%config GradSentry.threshold = 0.25')
    info = ready.run_line_magic('gs_scan', 'rows --quiet').scores.info
    assert info['preset'] == 'paper' and info['settings']['threshold'] == .25
    info = ready.run_line_magic('gs_scan', 'rows --quiet --preset default --threshold 3').scores.info
    assert info['preset'] == 'default' and info['settings']['threshold'] == '3'
    assert ready.run_line_magic('gs_scan', 'rows --quiet --known-clean rows --fpr .1 --threshold calibrated').cut.method == 'calibrated'
    for wrong in ('preset = "papr"', 'threshold = "vally"', 'k = 1', 'k = "many"', 'statistic = "entropi"', 'device = "cuda:77"', 'dtype = "float8"', 'progress = 3',
                  'max_length = 0'):
        before = copy.copy(g._trait_values)
        result, out, err = run(ready, f'%config GradSentry.{wrong}')
        assert result.success and g._trait_values == before, wrong
    assert g.preset == 'paper'
    run(ready, '%config GradSentry.preset = None')
    assert g.preset is None


def test_known_clean_on_the_line_goes_before_a_configured_threshold(ready):
    attached(ready).threshold = .3
    assert ready.run_line_magic('gs_scan', 'rows --quiet --known-clean rows --fpr .1').cut.method == 'calibrated'


def test_configuration_file(model):
    s = new_shell(GradSentry=dict(preset='paper', progress=False))
    gradsentry_nb.load_ipython_extension(s)
    assert (attached(s).preset, attached(s).progress) == ('paper', False)
    s = new_shell(GradSentry=dict(preset='papr'))
    with contextlib.redirect_stdout(io.StringIO()) as out: gradsentry_nb.load_ipython_extension(s)
    assert attached(s).preset is None and "'paper'" in out.getvalue()


# ---- models

def test_models_from_variables_names_and_twice(shell, model, monkeypatch, capsys):
    made = Sentry(*model, 'paper', 'mine', threshold=.4)
    shell.user_ns.update(made=made, pair=model, tuned=types.SimpleNamespace(model=1), n=3, rows=ROWS[:4])
    assert shell.run_line_magic('gs_model', 'made') is made
    assert shell.run_line_magic('gs_scan', 'rows --quiet').scores.info['settings']['threshold'] == .4
    assert shell.run_line_magic('gs_scan', 'rows --quiet --k 4').scores.info['settings'] | {'k': 16} == made.score(ROWS[:4], progress=False).info['settings']
    assert shell.run_line_magic('gs_scan', 'rows --quiet --preset default').scores.info['statistic'] == 'log_volume'
    assert shell.run_line_magic('gs_model', 'pair').model is model[0] and shell.run_line_magic('gs_model', '').model is model[0]
    loads = []
    monkeypatch.setattr('gradsentry_nb.sentry.load_model', lambda *a: loads.append(a) or model)
    shutil.copytree(demo_model_path(), 'mine')
    for line in ('./mine', './mine', './mine --dtype float32', 'demo', 'demo'): shell.run_line_magic('gs_model', line)
    assert len(loads) == 3 and loads[1][2] == 'float32' and loads[0][0] == './mine'
    assert shell.run_line_magic('gs_model', 'demo').name == 'the embedded demo model' and len(loads) == 3
    shell.run_line_magic('gs_model', './mine')
    (shutil.os).utime('mine/config.json', (1e10, 1e10))
    shell.run_line_magic('gs_model', './mine')
    assert len(loads) == 5, 'a folder that was written to is loaded again'
    assert 'holds an int' in refused(shell, 'gs_model', 'n') and 'SimpleNamespace' in refused(shell, 'gs_model', 'tuned')
    assert '--device' in refused(shell, 'gs_model', 'pair --device cpu')
    assert shell.run_line_magic('gs_model', '--forget') is None
    assert '%gs_model' in refused(shell, 'gs_model', '')


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(ready, model):
    assert 'cannot be loaded' in refused(ready, 'gs_model', './nowhere') or 'no such' in refused(ready, 'gs_model', './nowhere')
    assert ready.run_line_magic('gs_model', '').model is model[0]


# ---- a scan that is stopped

def test_interrupted(ready, monkeypatch, capsys):
    import gradsentry_nb.sentry as s
    ready.run_line_magic('gs_scan', 'rows --quiet')
    assert 'stopped' in refused(ready, 'gs_scan', '--partial')
    roots, seen = s._roots, []
    def slow(*a):
        seen.append(1)
        if len(seen) > 7: raise KeyboardInterrupt
        return roots(*a)
    monkeypatch.setattr(s, '_roots', slow)
    before = attached(ready).verdict
    result, out, err = run(ready, 'ran = False\nv = %gs_scan rows --quiet\nran = True')
    assert isinstance(result.error_in_exec, s.ScanInterrupted) and not ready.user_ns['ran'] and 'v' not in ready.user_ns
    assert 'Traceback' not in out+err and '7 rows' in out+err and '--partial' in out+err and (out+err).strip().count('\n') == 0
    partial = ready.run_line_magic('gs_scan', '--partial')
    assert isinstance(partial, Scores) and len(partial) == 7 and partial.info['interrupted']
    assert attached(ready).verdict is before
    run(ready, 'from gradsentry_nb.sentry import ScanInterrupted\ntry: v = %gs_scan rows --quiet\nexcept ScanInterrupted as e: kept = e.scores')
    assert len(ready.user_ns['kept']) == 0
    seen.clear(); seen += [1]*7
    said = ''.join(run(ready, '%gs_scan rows --quiet')[1:])
    assert 'before any row' in said and 'Traceback' not in said
    assert 'stopped' in refused(ready, 'gs_scan', '--partial')


def test_interrupted_elsewhere(shell, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr('gradsentry_nb.sentry.load_model', stop)
    result, out, err = run(shell, '%gs_model demo')
    assert isinstance(result.error_in_exec, KeyboardInterrupt) and (out+err).strip() == 'Stopped.'


# ---- views, explanations, attacks, reports

def test_live_and_view(ready, stubs, scanned):
    live = ready.run_line_magic('gs_live', 'rows --preset paper --limit 9 --threshold 0.6')
    assert live.sentry.preset == 'paper' and len(live.samples) == 9 and live.sentry.settings.threshold == '0.6'
    assert 'no verdict yet' in refused(ready, 'gs_view', '')
    live.verdict = live.sentry.filter(live.samples, progress=False)
    ready.user_ns['live'] = live
    for line in ('', 'live', 'live.verdict'):
        verdict, samples, sentry = ready.run_line_magic('gs_view', line)
        assert verdict is live.verdict and samples is live.samples and sentry is live.sentry
    v = ready.run_line_magic('gs_scan', 'rows --quiet')
    assert ready.run_line_magic('gs_view', '')[0] is v, 'a later scan goes before the view'
    ready.user_ns.update(v=v, other=scanned[2], mine=scanned[1])
    assert ready.run_line_magic('gs_view', 'v')[1] is attached(ready).samples
    ready.user_ns['rows'] = ROWS[:3]
    attached(ready).samples = None
    assert ready.run_line_magic('gs_view', 'other')[1] is ready.user_ns['mine'], 'rows are found by their ids'
    del ready.user_ns['mine']
    assert ready.run_line_magic('gs_view', 'other')[1:] == (None, None)
    assert 'other rows' in refused(ready, 'gs_view', 'other --samples rows')
    assert '--samples' in refused(ready, 'gs_explain', '--verdict other')
    for line, word in {'rows': 'list', 'nope': 'nope', 'nope.json': 'no file'}.items(): assert word in refused(ready, 'gs_view', line)


def test_explain(ready, stubs, scanned):
    for line in ('', '3', '3 --samples nope.jsonl'): refused(ready, 'gs_explain', line)
    what, sentry, sample = ready.run_line_magic('gs_explain', '3 --samples rows')
    assert what == 'row' and sample.row == 3 and sentry.model is ready.user_ns['model_pair'][0]
    v = ready.run_line_magic('gs_scan', 'rows --quiet --preset paper')
    assert ready.run_line_magic('gs_explain', '') == ('verdict', v, attached(ready).samples)
    assert ready.run_line_magic('gs_explain', '7')[1:] == (attached(ready).sentry, attached(ready).samples[7])
    assert ready.run_line_magic('gs_explain', attached(ready).samples[5].id)[2].row == 5
    for line in ('25', '-1', 'x', '1.5', '9'*5000): assert 'There is no row' in refused(ready, 'gs_explain', line)
    (v_file := 'verdict.json') and open(v_file, 'w').write(v.to_json())
    assert ready.run_line_magic('gs_explain', '--verdict verdict.json')[1].drop == v.drop
    with open('broken.json', 'w') as f: f.write('{"format": "gradsentry-verdict-1"}')
    assert 'verdict.json' in refused(ready, 'gs_explain', '--verdict broken.json')


def test_a_module_that_is_missing(ready, monkeypatch):
    ready.run_line_magic('gs_scan', 'rows --quiet')
    monkeypatch.setitem(sys.modules, 'gradsentry_nb.explain', None)
    assert 'gradsentry_nb.explain' in refused(ready, 'gs_explain', '')


@pytest.mark.parametrize('attack', ATTACKS)
def test_attack(shell, attack, capsys):
    shell.user_ns['clean'] = demo_samples(60, rate=0)[0]
    got = shell.run_line_magic('gs_attack', f'{attack} clean --rate 0.2 --payload refusal --seed 4 --out planted')
    from gradsentry_nb.attacks.triggers import poison, truth_from_json
    rows, truth = poison(shell.user_ns['clean'], attack, rate=.2, payload='refusal', seed=4)
    assert got == (rows, truth)
    assert [s.prompt for s in load_samples('planted/attacked.jsonl')] == [s.prompt for s in rows] and truth_from_json(open('planted/truth.json').read()) == truth
    assert 'Written to planted' in capsys.readouterr().out


def test_attack_refusals(shell):
    shell.user_ns['rows'] = ROWS
    for line, word in {'badnet rows': "'badnets'", 'badnets rows --payload appnd': "'append'", 'badnets rows --rate .1 --count 3': 'not both', 'badnets': 'SOURCE',
                       'badnets rows --rate 2': 'rate', 'addsent rows --place sufix': 'suffix', '': 'NAME'}.items():
        assert word in refused(shell, 'gs_attack', line)


@pytest.mark.parametrize('text', ['x', '<img src=x onerror=alert(1)> \x1b[31m\u202e\u200b שלום 😀 [a](javascript:alert(1)) '])
def test_rows_of_a_megabyte_stay_short(ready, text, capsys):
    big = text*(1_000_000//len(text))
    ready.user_ns['large'] = [dict(prompt=big, response='here'), dict(prompt='Where?', response=big), *ROWS]
    with within(120):
        shown = [ready.run_line_magic('gs_scan', 'large --quiet --max-length 256'), ready.run_line_magic('gs_explain', '0'), ready.run_line_magic('gs_explain', '1'), ready.run_line_magic('gs_explain', ''),
                 ready.run_cell_magic('gs_score', '--max-length 256', json.dumps(ready.user_ns['large'][1])), *ready.run_line_magic('gs_attack', 'badnets large --count 3')]
        page = ready.run_line_magic('gs_report', '')
    for x in shown:
        said = repr(x)+getattr(x, '_repr_html_', str)()
        assert len(said) < 400_000 and not re.search('<img|[\x1b\u202e\u200b]', said), type(x)
    assert '<img' not in page.page and len(page.page) < 1_000_000
    ready.run_line_magic('gs_scan', 'large --help')
    assert len(capsys.readouterr().out) < 10_000


def test_report(ready, scanned, capsys):
    assert 'no verdict' in refused(ready, 'gs_report', '')
    v = ready.run_line_magic('gs_scan', 'rows --quiet --out first')
    page = ready.run_line_magic('gs_report', '')
    shown = page._repr_html_()
    assert 'sandbox' in shown and 'allow-scripts' not in shown and '<script' not in shown and shown.count('<iframe') == 1 and str(len(page.page))[:1] in repr(page)
    files = ready.run_line_magic('gs_report', '--out found')
    assert {f.name for f in files.values()} == {p.name for p in (files['clean'].parent).iterdir()} and 'Written to found' in capsys.readouterr().out
    assert (files['clean'].read_bytes(), files['verdict'].read_text()) == (open('first/clean.jsonl', 'rb').read(), v.to_json())
    with open('plain', 'w') as f: f.write('mine')
    for line in ('--out plain', '--out plain/x'): assert 'plain' in refused(ready, 'gs_report', line)
    ready.user_ns['source'] = 'first/clean.jsonl'
    ready.user_ns['rows'] = ROWS
    assert 'input' in refused(ready, 'gs_scan', 'source --quiet --out first')


# ---- a cell of samples

@pytest.mark.parametrize('text,rows', [
    ('prompt: a\nresponse: b', [('a', 'b')]),
    ('Prompt:a\nRESPONSE:  b ', [('a', ' b ')]),
    ('\n\nprompt: a\n\nb\n\nresponse:\nc\nd\n\n\nprompt: e\nresponse: f\n', [('a\n\nb', 'c\nd'), ('e', 'f')]),
    ('prompt: a response: b\nresponse: the prompt: x', [('a response: b', 'the prompt: x')]),
    ('prompt: a\nresponse:', [('a', '')]),
    ('{"prompt": "a", "response": "b"}', [('a', 'b')]),
    ('{"prompt": "a", "response": "b"}\n\n{"prompt": "c", "response": "d"}\n', [('a', 'b'), ('c', 'd')]),
    (' [{"question": "a", "answer": "b"},\n {"question": "c",\n "answer": "prompt: d"}]', [('a', 'b'), ('c', 'prompt: d')]),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', [('a', 'b')]),
])
def test_cells(text, rows):
    got = cell_samples(text)
    assert [(s.prompt, s.response) for s in got] == rows and got.source == 'cell'


def test_score(ready, scanned):
    scores = ready.run_cell_magic('gs_score', '--to kept', '\n'.join(map(json.dumps, ROWS)))
    pd.testing.assert_frame_equal(scores.frame, scanned[2].scores.frame)
    assert ready.user_ns['kept'] is scores and {'answer_words', 'ngram_rows'} <= set(scores.frame)
    assert run(ready, '%%gs_score --statistic loss\nprompt: a b c\nresponse: d e f')[0].success and ready.user_ns['_'].info['statistic'] == 'loss'
    for cell, word in {'x': 'prompt:', '\n': 'prompt:', 'prompt: a': 'take turns', 'prompt: a\nprompt: b\nresponse: c': 'take turns', '{"prompt": "a"}': 'response',
                       '{"prompt": "a", "response": "b"}\n{': 'line 2', '[3]': 'cell', '[]': 'no rows', '['*100_000: 'cell', '{"prompt": "a", "response": 3}': 'not text'}.items():
        assert word in refused(ready, 'gs_score', '', cell)
    assert '%%gs_score' in refused(ready, 'gs_score', '') and 'variable' in refused(ready, 'gs_score', '--to if', 'prompt: a\nresponse: b')


# ---- whatever the line

WORDS = ['demo', 'rows', 'pair', 'n', 'v', 'nope', 'x.jsonl', '.', '~', '--', '-', '-1', '3', '0.5', 'nan', '1e999', '"', "'", '\\', '#', ';', '=', '--preset', '--preset=paper',
         '--preset=', '--threshold', '--k', '--limit', '--out', '--partial', '--samples', '--known-clean', '--fpr', '--layer', '--rate', '--count', '--payload', 'badnets',
         'append', '--seed', '--verdict', '--to', '--quiet', '--device', '--dtype', '--forget', '--help', '--nope', '\x00', '\ud800', '\u202e', 'é' * 300, '9' * 400, '$n', '{n}',
         '{', '}', '%', '%s', '%(prog)s', 'rows.x', '..', './', 'a/b']
lines = st.one_of(st.text(st.characters(blacklist_characters='\n\r'), max_size=40), st.lists(st.sampled_from(WORDS), max_size=7).map(' '.join),
                  st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=5).map(' '.join))


@pytest.fixture(scope='module')
def fuzzed(tmp_path_factory, model, scanned):
    "A shell whose magics do everything but compute."
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('fuzz'))
        m.setenv('IPYTHONDIR', str(tmp_path_factory.mktemp('profile')))
        s = new_shell()
        gradsentry_nb.load_ipython_extension(s)
        verdict = Verdict(Scores(scanned[2].scores.frame, {}), Cut(1., 'fixed', 'x'))
        m.setattr(Sentry, 'filter', lambda self, rows, *a, **k: Verdict(verdict.scores, verdict.cut))
        m.setattr(Sentry, 'score', lambda self, rows, *a, **k: verdict.scores)
        m.setattr('gradsentry_nb.demo.demo_model', lambda: model)
        m.setattr('gradsentry_nb.demo.demo_path', lambda: ROWS)
        m.setattr('gradsentry_nb.report.report_html', lambda *a: '')
        m.setattr('gradsentry_nb.magics.write_attack', lambda *a: ())
        m.setattr('gradsentry_nb.report.write_outputs', lambda *a: {})
        m.setattr('gradsentry_nb.magics._wrote', lambda *a: None)
        m.setattr('gradsentry_nb.data._hub_rows', lambda name, *a: (_ for _ in ()).throw(gradsentry_nb.DataError('no hub')))
        m.setattr('gradsentry_nb.sentry.load_model', lambda name, *a: (_ for _ in ()).throw(gradsentry_nb.ModelError('no hub')))
        for name, functions in dict(widgets=('dashboard', 'view'), explain=('explain_row', 'explain_verdict')).items():
            stub = types.ModuleType(name)
            vars(stub).update(dict.fromkeys(functions, lambda *a, **k: None))
            m.setitem(sys.modules, f'gradsentry_nb.{name}', stub)
        s.user_ns.update(rows=ROWS, pair=model, n=3, v=verdict)
        yield s


@pytest.mark.parametrize('name', MAGICS)
@given(line=lines, cell=st.one_of(st.none(), st.text(min_size=1, max_size=60)))
@settings(max_examples=120)
@example(line='rows --known-clean rows --fpr 0.5', cell='prompt: a\nresponse: b')
@example(line='"', cell='{')
def test_any_line(fuzzed, name, line, cell):
    f = line_function(attached(fuzzed), MAGICS[name])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try: f(line) if cell is None else f(line, cell)
        except UsageError as e: assert type(e) is UsageError and str(e).strip() and '\n' not in str(e)
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]', out.getvalue())


@given(line=lines)
@settings(max_examples=60)
def test_any_line_in_a_cell(fuzzed, line):
    "Through IPython's own transformations."
    line = line.splitlines()[0] if line.splitlines() else ''
    if '?' in line or '\\' in line or '\ud800' in line: return        # IPython's help and line joining
    result, out, err = run(fuzzed, f'%gs_scan {line}')
    assert result.error_in_exec is None or type(result.error_in_exec) is UsageError, err
    assert 'Traceback' not in out+err


# ---- tab

def tab(shell, text):
    "What the completer offers, as (text up to the cursor with the offer in place)."
    with provisionalcompleter(): found = list(shell.Completer.completions(text, len(text)))
    return [text[:c.start]+c.text for c in found]


def test_completion(ready, scanned):
    with open('my rows.jsonl', 'w') as f: f.write('{}')
    with open('notes.txt', 'w') as f: f.write('x')
    shutil.os.mkdir('folder')
    ready.user_ns.update(ready_rows=load_samples(ROWS), found=scanned[2], number=3)
    ends = lambda text: [t.removeprefix(text.rpartition(' ')[0]+' ') for t in tab(ready, text)]
    assert ends('%gs_scan ') == ['ready_rows', 'rows', 'demo', 'folder/', 'my\\ rows.jsonl']
    assert ends('%gs_scan re') == ends('v = %gs_scan re') == ends('  %gs_scan re') == ends('x = 1\nv = %gs_scan re') == ['ready_rows']
    assert ends('gs_scan re') == ['ready_rows']
    assert tab(ready, '%gs_scan my') == ['%gs_scan my\\ rows.jsonl'] == tab(ready, '%gs_scan my\\ r')
    assert tab(ready, '%gs_scan "my r') == ['%gs_scan "my rows.jsonl"'] and tab(ready, "%gs_scan 'm") == ["%gs_scan 'my rows.jsonl'"]
    assert ends('%gs_scan rows --pre') == ['--preset'] and ends('%gs_scan rows --preset ') == list(PRESETS) and tab(ready, '%gs_scan --preset=pa') == ['%gs_scan --preset=paper']
    assert set(ends('%gs_scan rows --')) == {o for o in MAGICS['gs_scan'].parser().options() if o[:2] == '--'}
    assert '--preset' not in ends('%gs_scan rows --preset paper --')
    assert ends('%gs_scan rows --prompt ') == ['prompt', 'response'] and ends('%gs_scan rows --threshold v') == ['valley'] and ends('%gs_scan rows --dtype ') != []
    assert ends('%gs_attack ') == list(ATTACKS) and ends('%gs_attack badnets ro') == ['rows'] and ends('%gs_attack badnets rows --payload ') == list(PAYLOADS)
    assert ends('%gs_view ') == ['found', 'folder/'] and ends('%gs_report fo') == ['found', 'folder/'] and ends('%gs_model mod') == ['model_pair']
    assert ends('%gs_report --out f') == ['folder/'] and ends('%%gs_score --stat') == ['--statistic']
    assert 'layers.0.mlp.down_proj' in ' '.join(ends('%gs_scan rows --layer model.'))
    v = ready.run_line_magic('gs_scan', 'rows --quiet --threshold 0')
    assert ends('%gs_explain ') == v.drop[:50]
    assert '%config GradSentry.preset' in tab(ready, '%config GradSentry.pre') and '%gs_scan' in tab(ready, '%gs_sc')


@given(text=lines)
@settings(max_examples=150)
def test_completing_any_line(fuzzed, text):
    for name in ('gs_scan', 'gs_attack', 'gs_model', 'gs_explain'):
        raw, found = completions(attached(fuzzed), f'%{name} {text}')
        assert isinstance(raw, str) and all(isinstance(t, str) for t in found)
        before, last, quote = unfinished(text)
        assert before+last == text


@given(st.lists(st.text(st.characters(blacklist_characters='#\x00', blacklist_categories=['Cs']), min_size=1, max_size=8), max_size=4))
def test_split_line_reads_what_a_shell_would_write(words):
    import shlex
    assert split_line(shlex.join(words)) == words


def test_unknown_options_name_the_nearest(shell):
    for m in MAGICS.values():
        for option in m.parser().options():
            if option[:2] != '--': continue
            wrong = option[:-1]+'qz'
            said = refused(shell, m.name, wrong) if m.kind == 'line' else refused(shell, m.name, wrong, 'x')
            assert m.sign in said and wrong in said and ('did you mean' in said or 'there are' in said)
    assert 'did you mean --threshold?' in refused(shell, 'gs_scan', 'x --treshold 3')
    assert 'too many' in refused(shell, 'gs_scan', 'a b') and 'quote' in refused(shell, 'gs_scan', 'a "b') and 'quote' in refused(shell, 'gradsentry', 'a "b')


def test_the_command_line_magic_still_runs(shell, capfd):
    assert run(shell, '%gradsentry scan nope.jsonl --model x')[2].count('Traceback') == 0
    assert '%gradsentry' in refused(shell, 'gradsentry', 'scan nope.jsonl --model x') and 'no such file' in capfd.readouterr().err


def test_parsing_leaves_open_what_the_configuration_may_say():
    a = parse_line(MAGICS['gs_scan'], 'x')
    assert all(getattr(a, n) is None for n in ('preset', 'statistic', 'layer', 'threshold', 'k', 'crop', 'max_length', 'budget', 'seed', 'fpr', 'out'))
