"""Every notebook's cells run from top to bottom: the lessons are tests."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import notebooks
import pytest
from conftest import ROOT

WORKERS = 2
LIMIT = 900  # seconds for one notebook


def run(path):
    threads = str(max(1, (os.cpu_count() or 1)//WORKERS))
    return subprocess.run([sys.executable, ROOT/'scripts'/'notebooks.py', 'test', path], cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT,
                          env={**notebooks.environment(), 'OMP_NUM_THREADS': threads})


@pytest.fixture(scope='module')
def runs(request):
    "The runs of all selected notebooks, a few at a time, each in a process of its own."
    chosen = [x.callspec.params['path'] for x in request.session.items if 'runs' in getattr(x, 'fixturenames', ())]
    pool = ThreadPoolExecutor(WORKERS)
    yield {path: pool.submit(run, path) for path in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize('path', notebooks.notebooks(), ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_notebook(path, runs):
    done = runs[path].result()
    assert done.returncode == 0, done.stdout
