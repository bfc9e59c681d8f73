"""What every test may lean on: the checkout, a copy of it, and the data beside the project."""
import gc
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ('.git', '.venv', '.*_cache', '.hypothesis', '.ipynb_checkpoints', '__pycache__', '*.egg-info', 'build',
            'dist', '_proc', '_docs', 'gradsentry-demo', 'gradsentry-out', 'gradsentry-runs', 'gradsentry-attack')

# Nothing that is tested may reach for a network, and a failure found by chance must come back on the next run.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# Several files run side by side. Numba, which UMAP runs on, gives torch as many threads as it has itself: after one map or CUBE all later tests of the process would have two, waiting for each other.
if 'PYTEST_XDIST_WORKER' in os.environ:
    for name in ('OMP_NUM_THREADS', 'NUMBA_NUM_THREADS'): os.environ.setdefault(name, '1')
# Files that take minutes, in the order in which they begin; left to the end, one of them would run while the other process has nothing to do.
LONG = ('test_browser', 'test_colab_versions', 'test_browser_platforms', 'test_benchmarks', 'test_browser_magics', 'test_distributed', 'test_notebooks', 'test_stream', 'test_bad_input',
        'test_widgets', 'test_magics', 'test_sentry', 'test_wheel', 'test_train', 'test_experiment')
settings.register_profile('repeatable', deadline=None, derandomize=True, database=None)
settings.load_profile('repeatable')


def pytest_configure(config):
    "Files are begun in the order of their tests; xdist would sort them by how many tests they have, and the longest have few."
    if hasattr(config.option, 'loadscopereorder'): config.option.loadscopereorder = False


def pytest_collection_modifyitems(items): items.sort(key=lambda i: LONG.index(i.path.stem) if i.path.stem in LONG else len(LONG))


@pytest.fixture(scope='module', autouse=True)
def settled():
    "What was imported and what earlier files left behind is not gone through by every garbage collection; the Trainer collects in every run."
    gc.collect(); gc.freeze()


def copy_checkout(folder):
    "Copy the checkout as it is on disk, committed or not, to a new `folder`."
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))


@pytest.fixture(scope='session')
def shared():
    "The folder of data and models beside the project."
    path = Path(os.environ.get('GRADSENTRY_SHARED', ROOT.parent/'shared'))
    if not (path/'data').is_dir(): pytest.skip('needs the data folder beside the project (or GRADSENTRY_SHARED)')
    return path


@pytest.fixture(scope='session')
def colab():
    "The environment variables of a process that is to have Colab's versions; they are installed once, beside the others."
    wanted = ROOT/'tests'/'colab.txt'
    folder = Path(sys.prefix)/f'colab-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:12]}'
    if not folder.is_dir():
        new = tempfile.mkdtemp(dir=sys.prefix)
        done = subprocess.run([sys.executable, '-m', 'pip', 'install', '-qq', '--no-deps', '--target', new, '-r', wanted], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(new)
            pytest.skip(f"Colab's versions could not be installed: {done.stderr.strip()[-300:]}")
        try: os.rename(new, folder)
        except OSError: shutil.rmtree(new)                 # another process was faster
    return dict(PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]), JUPYTER_PATH=str(folder/'share'/'jupyter'))


@pytest.fixture
def no_surprises():
    "A warning that a test does not expect is an error."
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        yield


@contextmanager
def within(seconds):
    "Fail where a row of a megabyte would otherwise be looked at for hours."
    def late(*_): raise AssertionError(f'not done in {seconds} seconds')
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)
