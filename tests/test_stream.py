"""Scans that are killed, stopped, refused and cut short go on from what was written; an estimate is near the truth."""
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from gradsentry_nb import cli, report, stream
from gradsentry_nb.core import DataError, GradSentryError, ModelError, Sample, SettingError, Verdict
from gradsentry_nb.data import EMPTY, Source, load_samples, pick
from gradsentry_nb.demo import demo_model, demo_model_path, demo_path
from gradsentry_nb.sentry import Scan, ScanInterrupted, Sentry
from gradsentry_nb.stream import MANIFEST, StoredScan, StoredScores, about_chunk, chunk_bytes, chunk_plan, estimate, forget, scan_to, spread, write_whole


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Bytes are the same for the same number of threads, and of several the math library takes as many as the machine has to spare at that moment."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def demo():
    "The demo's model and tokenizer."
    return demo_model()


@pytest.fixture(scope='module')
def sentry(demo): return Sentry(*demo, name='demo', budget=64)   # chunks of about 13 rows


@pytest.fixture(scope='module')
def rows(): return load_samples(demo_path())[:60]


@pytest.fixture(scope='module')
def whole(sentry, rows, tmp_path_factory):
    "The scores of a scan that nothing disturbed."
    return scan_to(sentry, rows, tmp_path_factory.mktemp('whole')/'scan', False)


def same(a, b):
    "Are two frames the same to the last bit?"
    pd.testing.assert_frame_equal(a.frame, b.frame, check_exact=True)
    assert a.info == b.info


def stop_at(n):
    def tell(done, total):
        if done == n: raise KeyboardInterrupt
    return tell


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "Leaves in a folder what a scan leaves that was stopped after `n` rows, and says which chunks that is; the same scan is stopped once and copied."
    stopped = {}
    def leave(sentry, rows, folder, n=40):
        key = id(sentry), len(rows), n
        if key not in stopped:
            stopped[key] = sentry, tmp_path_factory.mktemp('begun')/'scan'
            with pytest.raises(ScanInterrupted) as e: scan_to(sentry, rows, stopped[key][1], stop_at(n))
            assert len(e.value.scores) == n
        if stopped[key][1].exists(): shutil.copytree(stopped[key][1], folder)
        return sorted(folder.glob('*.parquet'))
    return leave


# ---- chunks

def test_plan_covers_every_row_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 30, rng.integers(0, 40)).tolist()
        plan = chunk_plan(lengths, 40)
        assert [i for a, b in plan for i in range(a, b)] == list(range(len(lengths)))
        assert all(b-a == 1 or sum(lengths[a:b]) <= 40 for a, b in plan)


def test_a_row_comes_back_as_it_was(whole, tmp_path):
    "Numbers keep their bits, and NaN, infinities, broken text and what is missing stay what they are."
    frame = whole.frame.iloc[:3].drop(columns='score').copy()
    frame.loc[0, ['entropy', 'log_volume', 'loss']] = [float(np.nextafter(.1, 1)), np.nan, np.inf]
    frame.loc[1, 'problem'], frame.loc[2, 'ngram'] = 'broken ‹x›', 'ein "Satz", \x1b'
    frame.loc[1, ['window_start', 'window_stop', 'entropy']] = np.nan
    (tmp_path/'a').write_bytes(chunk_bytes(frame, dict(notes=['a', 'b'], budget=9)))
    assert about_chunk(tmp_path/'a') == dict(rows=3, notes=['a', 'b'], budget=9)
    back = StoredScores([tmp_path/'a'], 'entropy', {})
    pd.testing.assert_frame_equal(back.only(list(frame)), frame, check_exact=True)
    assert back.score.tolist()[::2] == frame['entropy'].tolist()[::2] and np.isnan(back.score[1])


@pytest.mark.parametrize('call', ['fsync', 'replace'])
@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt()], ids=['full', 'interrupt'])
def test_a_write_that_fails_changes_nothing(tmp_path, monkeypatch, call, error):
    (tmp_path/'a').write_bytes(b'first')
    def fail(*_): raise error
    monkeypatch.setattr(stream.os, call, fail)
    with pytest.raises(type(error)): write_whole(b'second', tmp_path/'a')
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {'a': b'first'}


# ---- stopped and begun again

@pytest.mark.parametrize('n', [1, 13, 40, 59, 60])
def test_stopped_and_begun_again(begun, sentry, rows, whole, tmp_path, n):
    before = begun(sentry, rows, tmp_path/'scan', n)
    told = []
    again = scan_to(sentry, rows, tmp_path/'scan', False, told.append)
    same(again, whole)
    kept = StoredScan(sentry, rows, tmp_path/'scan')
    assert len(kept) == kept.total == 60 and {p.name for p in before} <= {p.name for p in (tmp_path/'scan').iterdir()}
    if before: assert len(told) == 1 and f'{kept.plan[len(before)-1][1]} of 60 rows' in told[0]
    else: assert not told


def test_only_the_rest_is_computed(begun, sentry, rows, whole, tmp_path, monkeypatch):
    chunks = begun(sentry, rows, tmp_path/'scan')
    plan = StoredScan(sentry, rows, tmp_path/'scan').plan
    seen, capture = [], Sentry.capture
    class Watched:
        def __init__(self, inner): self.inner = inner
        def __getattr__(self, name): return getattr(self.inner, name)
        def __call__(self, rows, *reduce): seen.append(len(rows)); return self.inner(rows, *reduce)
    monkeypatch.setattr(Sentry, 'capture', lambda self: Watched(capture(self)))
    same(scan_to(sentry, rows, tmp_path/'scan', False), whole)
    assert seen == [b-a for a, b in plan[len(chunks):]]
    seen.clear()
    same(scan_to(sentry, rows, tmp_path/'scan', False), whole)
    assert not seen, 'a finished scan was computed again'


def test_near_to_a_plain_scan(sentry, rows, whole):
    plain = sentry.score(rows, False)
    known = lambda x: {k: v for k, v in x.info.items() if k != 'notes'}          # every chunk has prefixes of its own
    assert list(plain.frame.dtypes) == list(whole.frame.dtypes) and known(plain) == known(whole)
    np.testing.assert_allclose(whole.frame['score'], plain.frame['score'], rtol=1e-4)
    np.testing.assert_allclose(whole.frame['entropy'], plain.frame['entropy'], rtol=1e-5, atol=1e-6)          # how the last digits are rounded depends on the processor


def test_other_numbers_of_threads(begun, sentry, rows, whole, tmp_path):
    "The same plan on more threads: not the same bytes, but the same to six digits after the point."
    before = torch.get_num_threads()
    begun(sentry, rows, tmp_path/'scan')
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        again = scan_to(sentry, rows, tmp_path/'scan', False)
    finally: torch.set_num_threads(before)
    np.testing.assert_allclose(again.frame['score'], whole.frame['score'], rtol=1e-6, atol=1e-6)


def test_rows_without_a_score(sentry, tmp_path):
    "Rows with an empty answer are kept with the others, and a set of nothing else needs no model."
    rows = [Sample(f'{i:012x}-0', f'Where is number {i}?', '' if i % 3 else f'near {i}', i) for i in range(12)]
    scores = scan_to(sentry, rows, tmp_path/'scan', False)
    assert scores.scorable.tolist() == [i % 3 == 0 for i in range(12)]
    same(scan_to(sentry, rows, tmp_path/'scan', False), scores)
    none = scan_to(sentry, [r for r in rows if not r.response], tmp_path/'none', False)
    assert len(none) == 8 and not none.scorable.any() and set(none.frame['problem']) == {EMPTY}


def test_a_layer(begun, demo, rows, tmp_path):
    sentry = Sentry(*demo, layer='layers.0.mlp.down_proj', budget=64)
    one = scan_to(sentry, rows[:30], tmp_path/'one', False)
    begun(sentry, rows[:30], tmp_path/'two', 20)
    same(scan_to(sentry, rows[:30], tmp_path/'two', False), one)


def test_a_model_that_gives_nothing_leaves_nothing(rows, tmp_path):
    model, tokenizer = demo_model()
    with torch.no_grad(): model.model.norm.weight.fill_(float('nan'))
    with pytest.raises(ModelError, match='every row'): scan_to(Sentry(model, tokenizer, budget=64), rows, tmp_path/'scan', False)
    assert not (tmp_path/'scan').exists()


# ---- rows that are read anew

def many(path, n=150, repeat=7):
    "A file in which some rows occur again."
    rows = [dict(prompt=f'Where is number {i % (n-repeat)}?', response=f'It is near the house of number {i % (n-repeat) % 5}.') for i in range(n)]
    if path.suffix == '.parquet': pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == '.csv': pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == '.json': path.write_text(json.dumps(rows))
    else: path.write_text(''.join(json.dumps(r)+'\n' for r in rows))
    return path


@pytest.mark.parametrize('ending', ['jsonl', 'json', 'csv', 'parquet'])
def test_rows_are_the_same_however_they_are_read(tmp_path, ending):
    path = many(tmp_path/f'rows.{ending}')
    held, source = load_samples(path), Source(path)
    assert list(source) == held == list(source) and len(source) == 150 and source.said == held.said and source.path == held.path
    assert [s.raw for s in source] == [s.raw for s in held] and sum(s.id.endswith('-1') for s in source) == 7
    assert pick(source, [149, 3, 3]) == pick(held, [149, 3, 3]) == [held[149], held[3], held[3]]


def test_texts_are_not_held(sentry, tmp_path):
    "While a chunk is scored, the rows of others are not in memory."
    import gc
    source, alive = Source(many(tmp_path/'rows.jsonl', 600)), []
    def count(done, total):
        if done % 50 == 0: alive.append(sum(type(x) is Sample for x in gc.get_objects()))
    before = sum(type(x) is Sample for x in gc.get_objects())
    scores = scan_to(sentry, source, tmp_path/'scan', count)
    assert len(scores) == 600 and len(alive) == 12 and max(alive)-before < 100


def test_a_file_that_shrinks(sentry, tmp_path):
    source = Source(many(tmp_path/'rows.jsonl'))
    def cut(done, total):
        if done == 10: (tmp_path/'rows.jsonl').write_text('{"prompt": "a", "response": "b"}\n'*20)
    with pytest.raises(DataError, match='rows.jsonl'): scan_to(sentry, source, tmp_path/'scan', cut)


def test_a_very_large_set(tmp_path, monkeypatch, capsys):
    "Scores that stay on the disk make the same files as those in memory; here 60 rows are very many."
    path = tmp_path/'rows.jsonl'
    path.write_text(''.join(Path(demo_path()).read_text().splitlines(keepends=True)[:200]))
    args = lambda out: ['scan', str(path), '--model', str(demo_model_path()), '--out', str(tmp_path/out), '--quiet', '--budget', '128', '--threshold', '15']
    assert cli.main(args('held')) == 0
    plain = capsys.readouterr().out
    for module in (stream, report): monkeypatch.setattr(module, 'WHOLE', 60)
    monkeypatch.setattr(report, 'LOOKED', 80)
    assert cli.main(args('large')) == 0
    large = capsys.readouterr().out
    held = lambda name: (tmp_path/'held'/name).read_bytes()
    for name in ('clean.jsonl', 'dropped.jsonl', 'scores.parquet.json'): assert (tmp_path/'large'/name).read_bytes() == held(name), name
    assert held('dropped.jsonl') and held('clean.jsonl')
    table = lambda out: pd.read_parquet(tmp_path/out/'scores.parquet').astype(dict(problem=object)).fillna(dict(problem=''))
    pd.testing.assert_frame_equal(table('large'), table('held'), check_exact=True)
    text = (tmp_path/'large'/'verdict.json').read_text()
    back, wanted = Verdict.from_json(text, tmp_path/'large'), Verdict.from_json(held('verdict.json').decode())
    assert back.drop == wanted.drop and len(text) < len(held('verdict.json'))/2 and back.rivals.equals(wanted.rivals)
    with pytest.raises(GradSentryError, match='scores.parquet beside it'): Verdict.from_json(text)
    page = (tmp_path/'large'/'report.html').read_text()
    assert 'of the 200 rows, chosen by chance' in page and 'chosen by chance' not in held('report.html').decode()
    first = lambda said: [l for l in said.splitlines() if l.startswith(('  row', '  why', '  trivial'))]
    assert [l for l in first(large) if 'phrase' not in l] == [l for l in first(plain) if 'phrase' not in l] and len(first(large)) > 5
    ranks = lambda html: re.findall(r'#(\d+) · row ([\d,]+)', html)
    assert ranks(page) == ranks(held('report.html').decode())
    assert not (tmp_path/'large'/'scan').exists()


def test_known_clean_rows_go_on_too(tmp_path, monkeypatch, capsys):
    (tmp_path/'known.jsonl').write_text(''.join(Path(demo_path()).read_text().splitlines(keepends=True)[-120:]))
    args = command(tmp_path/'out', '--limit', 60, '--known-clean', tmp_path/'known.jsonl', '--threshold', 'calibrated', '--fpr', .05)
    kept, seen = StoredScan.keep, []
    def keep(self, n):
        if len(seen) == 3: raise KeyboardInterrupt
        seen.append(n); kept(self, n)
    with monkeypatch.context() as m:
        m.setattr(StoredScan, 'keep', keep)
        assert cli.main(args) == 130
    assert 'goes on from there' in capsys.readouterr().err and len(list((tmp_path/'out'/'scan-known').glob('*.parquet'))) == 3
    assert cli.main(args) == 0
    assert 'of 120 rows were scored before' in capsys.readouterr().out and not (tmp_path/'out'/'scan-known').exists()


# ---- refused

def changed(demo, **changes): return Sentry(*demo, name='demo', **{'budget': 64, **changes})


@pytest.mark.parametrize('changes, says', [(dict(k=8), 'k (16 before, 8 now)'), (dict(crop=2), 'crop (1 before, 2 now)'), (dict(window=5), 'window'), (dict(budget=128), 'budget (64 before, 128 now)'),
    (dict(max_length=30), 'the length limit'), (dict(share_prefix=False), 'share_prefix'), (dict(layer='layers.0.mlp.down_proj'), 'layer (None before')])
def test_a_changed_setting_is_refused(begun, demo, sentry, rows, tmp_path, changes, says):
    chunks = begun(sentry, rows, tmp_path/'scan')
    with pytest.raises(SettingError) as e: scan_to(changed(demo, **changes), rows, tmp_path/'scan', False)
    assert says in str(e.value) and 'delete the folder' in str(e.value) and str(tmp_path/'scan') in str(e.value) and '\n' not in str(e.value)
    assert sorted((tmp_path/'scan').glob('*.parquet')) == chunks, 'a refusal took something away'


@pytest.mark.parametrize('changes', [dict(threshold=.5), dict(seed=3), dict(statistic='entropy'), dict(threshold='calibrated', fpr=.2)])
def test_what_comes_after_the_scores_may_change(begun, demo, sentry, rows, whole, tmp_path, changes):
    begun(sentry, rows, tmp_path/'scan')
    again = scan_to(changed(demo, **changes), rows, tmp_path/'scan', False)
    np.testing.assert_array_equal(again.frame['log_volume'], whole.frame['log_volume'])


def test_a_changed_model_is_refused(begun, sentry, rows, tmp_path):
    begun(sentry, rows, tmp_path/'scan')
    model, tokenizer = demo_model()
    with torch.no_grad(): model.model.layers[0].mlp.down_proj.weight.mul_(1.001)
    with pytest.raises(SettingError, match="differs in the model's weights;"): scan_to(Sentry(model, tokenizer, budget=64), rows, tmp_path/'scan', False)
    model, tokenizer = demo_model()
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(SettingError, match="differs in the model's configuration;"): scan_to(Sentry(model, tokenizer, budget=64), rows, tmp_path/'scan', False)
    with pytest.raises(SettingError, match='dtype'): scan_to(Sentry(demo_model()[0].double(), tokenizer, budget=64), rows, tmp_path/'scan', False)


def test_a_changed_tokenizer_is_refused(begun, sentry, rows, tmp_path):
    begun(sentry, rows, tmp_path/'scan')
    model, tokenizer = demo_model()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    with pytest.raises(SettingError, match='differs in what the tokenizer makes of them;'): scan_to(Sentry(model, tokenizer, budget=64), rows, tmp_path/'scan', False)


def test_changed_rows_are_refused(begun, sentry, rows, tmp_path):
    begun(sentry, rows, tmp_path/'scan')
    with pytest.raises(SettingError, match=r'differs in the number of rows \(60 before, 59 now\), the texts of the rows;'): scan_to(sentry, rows[:59], tmp_path/'scan', False)
    with pytest.raises(SettingError, match='differs in the texts of the rows;'): scan_to(sentry, rows[::-1], tmp_path/'scan', False)


def test_another_version_is_refused(begun, sentry, rows, tmp_path):
    begun(sentry, rows, tmp_path/'scan')
    note = tmp_path/'scan'/MANIFEST
    note.write_text(json.dumps(json.loads(note.read_text()) | dict(torch='1.0')))
    with pytest.raises(SettingError, match=r'torch \(1.0 before, '): scan_to(sentry, rows, tmp_path/'scan', False)


def test_a_folder_of_something_else_is_refused(sentry, rows, tmp_path):
    (tmp_path/'letter.txt').write_text('dear')
    with pytest.raises(SettingError, match='something else'): scan_to(sentry, rows, tmp_path, False)
    forget(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['letter.txt']


# ---- damaged

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b[:200]+bytes([b[200]^1])+b[201:], lambda b: b+b'x'], ids=['short', 'empty', 'one bit', 'longer'])
def test_a_damaged_chunk_costs_its_own_rows(begun, sentry, rows, whole, tmp_path, damage):
    first, second, *_ = begun(sentry, rows, tmp_path/'scan')
    second.write_bytes(damage(second.read_bytes()))
    told = []
    same(scan_to(sentry, rows, tmp_path/'scan', False, told.append), whole)
    assert '1 damaged chunk' in told[0]
    assert len(StoredScan(sentry, rows, tmp_path/'scan')) == 60


def test_a_chunk_under_another_number(begun, sentry, rows, whole, tmp_path):
    first, second, *_ = begun(sentry, rows, tmp_path/'scan')
    second.rename(second.with_name(second.name.replace('000001', '000000')))
    shutil.copy(first, first.with_name(first.name.replace('000000', '000099')))
    shutil.copy(first, first.with_name('notes.parquet'))
    same(scan_to(sentry, rows, tmp_path/'scan', False), whole)


def test_a_broken_manifest(begun, sentry, rows, tmp_path):
    begun(sentry, rows, tmp_path/'scan')
    (tmp_path/'scan'/MANIFEST).write_text('{"form')
    with pytest.raises(SettingError, match='cannot be read; delete the folder'): scan_to(sentry, rows, tmp_path/'scan', False)


# ---- a disk that refuses

@pytest.mark.skipif(sys.platform == 'win32', reason='no limit on the size of files')
def test_a_full_disk(begun, sentry, rows, whole, tmp_path):
    "No file may grow beyond some bytes, as on a disk that is nearly full; afterwards there is room again."
    import resource
    before, (soft, hard) = begun(sentry, rows, tmp_path/'scan'), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        with pytest.raises(DataError) as e: scan_to(sentry, rows, tmp_path/'scan', False)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    n = StoredScan(sentry, rows, tmp_path/'scan').plan[len(before)-1][1]
    assert os.strerror(errno.EFBIG) in str(e.value) and f'{n} of 60 rows are kept' in str(e.value)
    assert sorted((tmp_path/'scan').glob('*.parquet')) == before
    same(scan_to(sentry, rows, tmp_path/'scan', False), whole)


@pytest.mark.parametrize('after, code', [(0, errno.ENOSPC), (1, errno.ENOSPC), (3, errno.ENOSPC), (1, errno.EROFS), (3, errno.EIO)])
def test_a_disk_that_fails_at_any_write(sentry, rows, whole, tmp_path, monkeypatch, code, after):
    done, fsync = [], os.fsync
    def sync(f):
        if len(done) == after: raise OSError(code, os.strerror(code))
        done.append(f); fsync(f)
    with monkeypatch.context() as m:
        m.setattr(stream.os, 'fsync', sync)
        with pytest.raises(DataError, match=os.strerror(code)): scan_to(sentry, rows, tmp_path/'scan', False)
    kept = len(StoredScan(sentry, rows, tmp_path/'scan')) if (tmp_path/'scan'/MANIFEST).exists() else 0
    assert kept == 0 if after < 3 else kept > 0
    same(scan_to(sentry, rows, tmp_path/'scan', False), whole)


@pytest.mark.parametrize('where', ['/proc/nowhere/scan', 'file/scan'])
def test_a_place_that_cannot_be_written(sentry, rows, tmp_path, where):
    (tmp_path/'file').write_text('x')
    with pytest.raises(DataError, match='cannot be written there'): scan_to(sentry, rows, tmp_path/where, False)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_a_read_only_folder(begun, sentry, rows, tmp_path):
    before = begun(sentry, rows, tmp_path/'scan')
    (tmp_path/'scan').chmod(0o555)
    try:
        with pytest.raises(DataError, match='cannot be written there'): scan_to(sentry, rows, tmp_path/'scan', False)
    finally: (tmp_path/'scan').chmod(0o755)
    assert sorted((tmp_path/'scan').glob('*.parquet')) == before


# ---- the command

def command(out, *more): return ['scan', str(demo_path()), '--model', str(demo_model_path()), '--out', str(out), '--quiet', '--budget', '128', *map(str, more)]


# Loads everything once and makes a child for each command on its standard input; the child alone runs models and threads of theirs.
FORKS = """
import os, sys, json, pandas, torch, transformers, pyarrow.parquet
from gradsentry_nb import cli, magics, report, stream
from transformers.models.llama import modeling_llama
print('ready', flush=True)
for line in sys.stdin:
    if not (child := os.fork()):
        out = os.open(os.devnull, os.O_WRONLY); os.dup2(out, 1)
        os._exit(cli.main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are not forked here')
def test_twenty_kills(tmp_path):
    "Killed at twenty random moments, while it loads, computes and writes; the twenty-first run ends with the bytes of a run that was left alone."
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    p = subprocess.Popen([sys.executable, '-c', FORKS], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    def run(out, kill_after=None):
        "Exit status of the command, killed `kill_after` seconds after a random number of chunks."
        print(json.dumps(command(out)), file=p.stdin, flush=True)
        child, folder = int(p.stdout.readline()), out/'scan'
        if kill_after is not None:
            more, wait = kill_after
            chunks = lambda: len(list(folder.glob('*.parquet')))
            until, end = chunks()+more, time.monotonic()+60
            while chunks() < until and time.monotonic() < end: time.sleep(.002)
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        return int(p.stdout.readline())
    try:
        assert p.stdout.readline() == 'ready\n'
        assert run(tmp_path/'whole') == 0
        rng, held = random.Random(0), []
        for i in range(20):
            status = run(tmp_path/'out', (rng.choice([0, 1, 1, 2]), rng.uniform(0, 1.5 if i%4 == 0 else .1)))
            assert status == -signal.SIGKILL, f'kill {i} came too late: {status}'
            now = {q.name for q in (tmp_path/'out'/'scan').glob('*.parquet')}
            assert not held or held[-1] <= now, 'something that was written is gone'
            held.append(now)
        assert 5 < len(held[-1]), 'the runs got nowhere'
        assert run(tmp_path/'out') == 0
    finally: p.stdin.close(); p.wait(60); p.stdout.close()
    for name in ('scores.parquet', 'scores.parquet.json', 'clean.jsonl', 'dropped.jsonl', 'verdict.json'):
        assert (tmp_path/'out'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes(), name
    assert not (tmp_path/'out'/'scan').exists()


def test_the_command_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path/'out'
    kept = StoredScan.keep
    def keep(self, n):
        if n == 3: raise KeyboardInterrupt
        kept(self, n)
    with monkeypatch.context() as m:
        m.setattr(StoredScan, 'keep', keep)
        assert cli.main(command(out, '--limit', 120)) == 130
    assert 'The same command goes on from there.' in capsys.readouterr().err and len(list((out/'scan').glob('*.parquet'))) == 3
    assert cli.main(command(out, '--limit', 119)) == 2
    assert 'the number of rows (120 before, 119 now)' in capsys.readouterr().err
    assert cli.main(command(out, '--limit', 120)) == 0
    said = capsys.readouterr().out
    assert 'of 120 rows were scored before and are kept.' in said and not (out/'scan').exists()
    assert cli.main(command(tmp_path/'other', '--limit', 120)) == 0
    assert (out/'scores.parquet').read_bytes() == (tmp_path/'other'/'scores.parquet').read_bytes()
    assert 'were scored before' not in capsys.readouterr().out
    assert cli.main(command(out, '--limit', 50, '--k', 8)) == 0, 'a finished scan stands in the way of another'


def test_results_that_cannot_be_written_cost_no_scores(tmp_path, monkeypatch, capsys):
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr('gradsentry_nb.report._write_all', full)
        assert cli.main(command(tmp_path/'out', '--limit', 50)) == 2
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err
    assert cli.main(command(tmp_path/'out', '--limit', 50)) == 0 and '50 of 50 rows were scored before' in capsys.readouterr().out


# ---- what it will cost

def test_a_fair_sample():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4, .5, 5000).astype(int)
    at = spread(lengths, 32)
    assert len(set(at)) == 32 and abs(lengths[at].mean()/lengths.mean()-1) < .05
    assert sorted(spread(lengths[:5], 32)) == list(range(5)) and spread([7], 3) == [0]


def test_the_estimate_is_near_the_truth(demo):
    "Loose on purpose: the machine may be busy in one of the two."
    sentry, rows = Sentry(*demo), load_samples(demo_path())[:600]
    sentry.score(rows[:50], False)
    for _ in range(3):
        cost, began = estimate(sentry, rows), time.perf_counter()
        sentry.score(rows, False)
        took = time.perf_counter()-began
        if took/2 < cost.seconds < took*2: break
    else: pytest.fail(f'{cost.seconds} seconds were expected, {took} it took')
    assert len(set(cost.sampled)) == len(cost.sampled) >= 32 and cost.rows == 600
    assert cost.tokens == sum(len(e) for e in Scan(sentry, rows).encoded) and 2**27 < cost.memory < 2**36
    for n in (1, 2, 3, 7):
        shares = cost.split(n)
        assert len(shares) == n and sum(s['rows'] for s in shares) == 600 and sum(s['tokens'] for s in shares) == cost.tokens
        assert sum(s['seconds'] for s in shares) == pytest.approx(cost.seconds)


def test_nothing_to_estimate(sentry, rows):
    with pytest.raises(DataError, match='nothing to score'): estimate(sentry, [Sample('a-0', 'Where?', '')])
    for wrong in (lambda: estimate(sentry, rows, 0), lambda: estimate(sentry, rows, 4).split(0)):
        with pytest.raises(SettingError): wrong()


def test_the_command_estimates(tmp_path, capsys):
    assert cli.main(command(tmp_path/'out', '--estimate')) == 0
    said = capsys.readouterr().out
    assert 'Expected: ' in said and '1,200 rows' in said and 'on 2 such devices: ' in said and 'GiB of main memory' in said and not (tmp_path/'out').exists()
