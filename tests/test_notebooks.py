"""Every notebook's cells run from top to bottom: the lessons are tests."""
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Timer

import notebooks
import pytest
from conftest import ROOT

WORKERS = 2
LIMIT = 900  # seconds for one notebook


def server():
    "A process that runs one notebook after the other, each in a fork of its own."
    threads = str(max(1, (os.cpu_count() or 1)//WORKERS))
    return subprocess.Popen([sys.executable, ROOT/'scripts'/'notebooks.py', 'serve'], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                            env={**notebooks.environment(), 'OMP_NUM_THREADS': threads, 'NUMBA_NUM_THREADS': threads})


def ask(p, path):
    "[failed?, what the notebook said]."
    late = Timer(LIMIT, lambda: os.killpg(p.pid, 9))
    late.start()
    try:
        print(path, file=p.stdin, flush=True)
        answer = p.stdout.readline()
    except BrokenPipeError: answer = ''
    finally: late.cancel()
    return json.loads(answer) if answer else [True, f'The process ended, or took more than {LIMIT} seconds.']


@pytest.fixture(scope='module')
def runs(request):
    "The runs of all selected notebooks, a few at a time."
    chosen = [x.callspec.params['path'] for x in request.session.items if 'runs' in getattr(x, 'fixturenames', ())]
    free, pool = queue.SimpleQueue(), ThreadPoolExecutor(WORKERS)
    with ExitStack() as ends:
        for _ in range(min(WORKERS, len(chosen))): free.put(ends.enter_context(server()))
        def run(path):
            p = free.get()
            try: return ask(p, path)
            finally: free.put(p)
        yield {path: pool.submit(run, path) for path in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize('path', notebooks.notebooks(), ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_notebook(path, runs):
    failed, said = runs[path].result()
    assert not failed, said
