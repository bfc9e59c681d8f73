"""Processes that share a scan end with what one process finds, also when some of them die on the way."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from gradsentry_nb import distributed
from gradsentry_nb.core import Sample, SettingError
from gradsentry_nb.data import load_samples
from gradsentry_nb.demo import demo_model, demo_model_path, demo_path
from gradsentry_nb.distributed import ScoreRows, SharedScan, Team, devices, score_on, share
from gradsentry_nb.sentry import ScanInterrupted, Sentry, run_scan


@pytest.fixture(scope='module')
def sentry(): return Sentry(*demo_model(), name='demo', budget=32)   # chunks of about 6 rows


@pytest.fixture(scope='module')
def rows(): return load_samples(demo_path())[:120]


@pytest.fixture(scope='module')
def one(sentry, rows):
    "The scores of a single process with a single thread."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield score_on(sentry, rows, 1, progress=False)
    finally: torch.set_num_threads(before)


def same(a, b): pd.testing.assert_frame_equal(a.frame, b.frame, check_exact=True)


# ---- shares

def test_shares_are_even_in_tokens():
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes, world = rng.lognormal(4, 1, rng.integers(0, 60)).astype(int).tolist(), int(rng.integers(1, 9))
        parts = [share(sizes, r, world) for r in range(world)]
        assert sum(parts, []) == list(range(len(sizes)))
        assert all(abs(sum(sizes[i] for i in p)-sum(sizes)/world) <= max(sizes, default=0) for p in parts)


def test_a_share_is_of_tokens_not_of_rows(sentry, tmp_path):
    rows = [Sample(f'{i:012x}-0', 'Where? '*(1 if i < 60 else 12), 'near the river', i) for i in range(90)]
    scan = SharedScan(sentry, rows, tmp_path/'scan')
    tokens, count = zip(*[(sum(scan.sizes[n] for n in s), sum(len(distributed._rows_of(scan, n)) for n in s)) for s in scan.shares(2)])
    assert abs(tokens[0]-tokens[1]) <= 2*max(scan.sizes) and count[0] > 1.5*count[1] and sum(count) == 90


def test_by_turns(sentry, rows, one, tmp_path):
    "Three processes on one folder, one of which never does its share; a fourth finds what is there and does the rest."
    scans = [SharedScan(sentry, rows, tmp_path/'scan') for _ in range(3)]
    shares = scans[0].shares(3)
    for scan, mine in zip(scans, (shares[0], shares[1][:2])): assert len(list(scan.run(mine))) == sum(len(distributed._rows_of(scan, n)) for n in mine)
    assert sum(scans[2].shares(2), []) == scans[2].todo()
    found = list(scans[2].of_others())
    assert found == sorted(i for n in (*shares[0], *shares[1][:2]) for i in distributed._rows_of(scans[2], n)) and not list(scans[2].of_others())
    ticks = []
    scans[2].mine = shares[2]
    same(run_scan(scans[2], lambda done, total: ticks.append((done, total))), one)
    assert [t[0] for t in ticks] == list(range(1, 121))
    assert score_on(sentry, rows, 5, tmp_path/'scan', False).frame.equals(one.frame), 'a finished scan needs no helpers'


# ---- from a notebook

@pytest.fixture
def crew(monkeypatch):
    "The helpers that were started."
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(distributed.subprocess, 'Popen', lambda *a, **kw: started.append(popen(*a, **kw)) or started[-1])
    return started


def test_two_processes_and_one(sentry, rows, one, crew):
    before = torch.get_num_threads()
    two = sentry.score(rows, progress=False, processes=2)
    same(two, one)
    assert two.info == one.info and len(crew) == 1 and crew[0].returncode == 0 and torch.get_num_threads() == before
    np.testing.assert_allclose(two.frame['entropy'], sentry.score(rows, False).frame['entropy'], rtol=1e-5, atol=2e-6)          # a plain scan shares longer prefixes; the last digit depends on the processor


def test_a_helper_that_is_killed(sentry, rows, one, crew, tmp_path):
    "An interrupt ends the helper and keeps what both have done; of a helper that is killed in the middle of its share the rest is redone here, and a note says so."
    kept = lambda: {int(p.name[:6]) for p in (tmp_path/'scan').glob('*.parquet')}
    def when_two_are_there(first, last, what):
        def tell(done, total):
            if done != 1: return
            end = time.monotonic()+120
            while len(kept() & set(range(first, last))) < 2 and time.monotonic() < end: time.sleep(.002)
            what()
        return tell
    def stop(): raise KeyboardInterrupt
    first, second = SharedScan(sentry, rows, tmp_path/'none').shares(2)
    half, n = len(first), len(first+second)
    with pytest.raises(ScanInterrupted): score_on(sentry, rows, 2, tmp_path/'scan', when_two_are_there(half, n, stop))
    before = kept()
    assert 2 <= len(before) < n-half and min(before) == half and crew[0].returncode == -signal.SIGKILL
    told, todo = [], sorted(set(range(n))-before)
    mine, other = SharedScan(sentry, rows, tmp_path/'scan').shares(2)
    scored = len(SharedScan(sentry, rows, tmp_path/'scan'))
    kill = when_two_are_there(other[0], n, lambda: crew[1].kill())
    two = score_on(sentry, rows, 2, tmp_path/'scan', lambda done, total: kill(done-scored, total), told.append)
    same(two, one)
    assert mine+other == todo and f'{scored} of 120 rows were scored before' in told[0]
    assert [x for x in two.info['notes'] if x not in one.info['notes']] == ['A process ended early (signal 9); what it had left was scored by the first one.']


def test_what_cannot_be_shared(sentry, rows, monkeypatch):
    for wrong in (0, -1, 1.5, 'two'):
        with pytest.raises(SettingError, match='at least 1'): sentry.score(rows, processes=wrong)
    monkeypatch.setattr(sentry.model, 'hf_device_map', {'a': 0, 'b': 1}, raising=False)
    with pytest.raises(SettingError, match='spread over several devices'): sentry.score(rows, processes=2)
    monkeypatch.setattr(sentry.model, 'hf_device_map', None)
    monkeypatch.setattr(sentry.model, 'extra', lambda: 0, raising=False)
    with pytest.raises(SettingError, match='cannot be handed to other processes'): sentry.score(rows, processes=2)


def test_each_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert devices('cuda', 3) == ['cuda:0', 'cuda:1', 'cuda:2'] and devices('cuda:3', 2) == ['cuda:3', 'cuda:0'] and devices('mps', 2) == ['mps']*2
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    taken = []
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: taken[-1])
    assert Team(5, 8, 1).device(None) == Team(5, 8, 1).device('cuda') == 'cuda:1' and Team(5, 8, 1).device('cpu') == 'cpu' and Team().device('auto') == 'auto'


# ---- from a terminal

def command(out, *more): return ['scan', str(demo_path()), '--model', str(demo_model_path()), '--device', 'cpu', '--limit', '120', '--budget', '32', '--out', str(out), *map(str, more)]


# Loads everything once and makes a child for each process that is asked for; the children alone run models and threads of theirs.
FORKS = """
import os, sys, json, pandas, torch, transformers, accelerate.utils, pyarrow.parquet
from gradsentry_nb import cli, magics, report, distributed
from transformers.models.llama import modeling_llama
print('ready', flush=True)
for line in sys.stdin:
    jobs, pids = json.loads(line), []
    for job in jobs:
        if not (child := os.fork()):
            for n, name in ((1, 'out'), (2, 'err')): os.dup2(os.open(job['said']+name, os.O_WRONLY|os.O_CREAT|os.O_TRUNC), n)
            os.environ.update(job['env'])
            try: status = cli.main(job['argv'])
            except SystemExit as e: status = e.code
            sys.stdout.flush(); sys.stderr.flush(); os._exit(status)
        pids.append(child)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]), flush=True)
"""


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


ENV = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', HF_HUB_OFFLINE='1', GLOO_SOCKET_IFNAME='lo')


@pytest.fixture(scope='module')
def launch(tmp_path_factory):
    "Run a command in several processes, without a launcher that ends them: (status, standard output and error) of each."
    if not hasattr(os, 'fork'): pytest.skip('processes are not forked here')
    p = subprocess.Popen([sys.executable, '-c', FORKS], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    said = str(tmp_path_factory.mktemp('said')/'it')
    def run(world, argv, meanwhile=None):
        here = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), WORLD_SIZE=str(world))
        jobs = [dict(said=f'{said}{r}', argv=[str(a).replace('RANK', str(r)) for a in argv], env=dict(here, RANK=str(r), LOCAL_RANK=str(r)) if world > 1 else {}) for r in range(world)]
        print(json.dumps(jobs), file=p.stdin, flush=True)
        pids = json.loads(p.stdout.readline())
        if meanwhile: meanwhile(pids)
        return [(s, *(open(f'{said}{r}{n}').read() for n in ('out', 'err'))) for r, s in enumerate(json.loads(p.stdout.readline()))]
    try:
        assert p.stdout.readline() == 'ready\n'
        yield run
    finally: p.stdin.close(); p.wait(60); p.stdout.close()


def results(out): return {name: (out/name).read_bytes() for name in ('scores.parquet', 'scores.parquet.json', 'clean.jsonl', 'dropped.jsonl', 'verdict.json')}


def when(chunks, what):
    "Wait until so many chunks are there, then do it to the second process."
    def do(folder):
        def look(pids):
            end = time.monotonic()+60
            while len(list((folder/'scan').glob('*.parquet'))) < chunks and time.monotonic() < end: time.sleep(.002)
            os.kill(pids[1], what)
        return look
    return do


@pytest.fixture(scope='module')
def alone(launch, tmp_path_factory):
    "What one process says, and its folder."
    out = tmp_path_factory.mktemp('alone')/'one'
    (status, said, _), = launch(1, command(out, '--quiet'))
    assert status == 0
    return said.replace(str(out), 'OUT'), out


def test_processes_of_one_command(launch, alone, tmp_path):
    "One of two is killed; begun again with three, the scan ends with the bytes of a single process, and the first one alone speaks."
    first, second = launch(2, command(tmp_path/'two', '--quiet'), when(5, signal.SIGKILL)(tmp_path/'two'))
    assert second[0] == -signal.SIGKILL and first[0] == 2 and first[2].count('\n') == 1 and 'has lost the others' in first[2]
    kept = {p.name for p in (tmp_path/'two'/'scan').glob('*.parquet')}
    assert 5 <= len(kept) < 20
    again = launch(3, command(tmp_path/'two', '--quiet'))
    said = again[0][1].replace(str(tmp_path/'two'), 'OUT').splitlines()
    assert [s for s, _, _ in again] == [0]*3 and [x for _, *out in again[1:] for x in out] == ['']*4
    assert 'of 120 rows were scored before and are kept.' in said.pop(1) and said == alone[0].splitlines()
    assert results(tmp_path/'two') == results(alone[1]) and not (tmp_path/'two'/'scan').exists()


def test_a_refusal_is_told_once(launch, tmp_path):
    both = launch(2, ['scan', str(demo_path()), '--model', tmp_path/'none', '--out', tmp_path/'out'])
    assert [s for s, _, _ in both] == [2, 2] and both[0][2].count('\n') == 1 and 'there is no such folder' in both[0][2] and both[1][1:] == ('', '')
    for r, limit in enumerate((40, 41)): (tmp_path/f'mine{r}.jsonl').write_text(''.join(demo_path().read_text().splitlines(True)[:limit]))
    both = launch(2, ['scan', tmp_path/'mineRANK.jsonl', '--model', demo_model_path(), '--out', tmp_path/'out', '--device', 'cpu'])
    assert [s for s, _, _ in both] == [2, 2] and 'Process 1 of 2: it finds a scan that differs in the number of rows (40 before, 41 now), ' in both[0][2] and both[1][1:] == ('', '')
    (tmp_path/'rows0.jsonl').write_bytes(demo_path().read_bytes())
    both = launch(2, ['scan', tmp_path/'rowsRANK.jsonl', '--model', demo_model_path(), '--out', tmp_path/'out', '--limit', 20])
    assert [s for s, _, _ in both] == [2, 2] and both[0][2].startswith('gradsentry: Process 1 of 2: ') and 'rows1.jsonl: there is no such file' in both[0][2] and both[1][1:] == ('', '')
    assert not (tmp_path/'out').exists()


def test_an_end_from_outside(launch, tmp_path):
    "As a launcher does it, first to one process and then to the other."
    def end(pids): when(3, signal.SIGTERM)(tmp_path/'out')(pids); os.kill(pids[0], signal.SIGTERM); os.kill(pids[0], signal.SIGTERM)
    first, second = launch(2, command(tmp_path/'out', '--quiet'), end)
    assert second == (-signal.SIGTERM, '', '') and first[0] == 130 and 'ended from outside' in first[2] and 'The same command goes on from there.' in first[2]
    assert first[2].count('\n') == 2 and list((tmp_path/'out'/'scan').glob('*.parquet'))


def test_accelerate_launch(alone, tmp_path):
    "The real launcher."
    run = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no',
           '--main_process_port', str(free_port()), '-m', 'gradsentry_nb.cli', *command(tmp_path/'two', '--quiet')]
    done = subprocess.run(run, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.replace(str(tmp_path/'two'), 'OUT') == alone[0] and results(tmp_path/'two') == results(alone[1])


# ---- in a Ray cluster

def test_a_stage_for_frames(rows):
    frame = pd.DataFrame([dict(prompt=r.prompt, response='' if i == 3 else r.response, mine=i) for i, r in enumerate(rows[:20])], index=range(7, 27))
    out = ScoreRows(str(demo_model_path()), budget=64, device='cpu')(frame)
    assert out[['prompt', 'response', 'mine']].equals(frame) and out['score'].isna().tolist() == [i == 3 for i in range(20)] == out['problem'].notna().tolist()
    plain = Sentry(*demo_model(), budget=64).score(frame, False).frame
    for c in ('tokens', 'entropy', 'log_volume', 'window_stop', 'score'): np.testing.assert_array_equal(out[c].to_numpy(float, na_value=np.nan), plain[c].to_numpy(float))


@pytest.mark.filterwarnings('ignore')
def test_two_workers_of_ray(rows, tmp_path, monkeypatch):
    ray = pytest.importorskip('ray', reason='needs Ray: pip install "ray[data]"')
    pytest.importorskip('ray.data', reason='needs Ray with its data part: pip install "ray[data]"')
    frame = pd.DataFrame([dict(prompt=r.prompt, response='' if i == 3 else r.response, place=i) for i, r in enumerate(rows[:60])])
    (tmp_path/'met').mkdir()

    class Meeting(ScoreRows):
        "Waits at its first batch until the other worker has one, too."
        def __call__(self, batch, met=str(tmp_path/'met')):
            import os, time
            first = not os.path.exists(mine := f'{met}/{os.getpid()}')
            open(mine, 'w').close()
            end = time.monotonic()+30*first
            while len(os.listdir(met)) < 2 and time.monotonic() < end: time.sleep(.02)
            return ScoreRows.__call__(self, batch).assign(worker=os.getpid())

    for k, v in dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', RAY_AUTH_MODE='disabled', RAY_USAGE_STATS_ENABLED='0').items(): monkeypatch.setenv(k, v)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=100_000_000)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        scored = ray.data.from_pandas([frame[i:i+15] for i in range(0, 60, 15)]).map_batches(
            Meeting, fn_constructor_kwargs=dict(model=str(demo_model_path()), budget=64, device='cpu'), batch_format='pandas', batch_size=15,
            compute=ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1))
        out = scored.to_pandas().sort_values('place', ignore_index=True)
    finally: ray.shutdown()
    plain = Sentry(*demo_model(), budget=64).score(frame, False).frame
    assert out['worker'].nunique() == 2 and out['problem'].notna().tolist() == [i == 3 for i in range(60)]
    np.testing.assert_allclose(out['entropy'].astype(float), plain['entropy'], atol=1e-6)
    np.testing.assert_allclose(out['score'].astype(float), plain['score'], rtol=1e-4)
