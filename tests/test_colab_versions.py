"Colab's versions of IPython, ipykernel, ipywidgets, altair, anywidget, numpy and pandas: what could differ there, run with exactly those."
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

# What meets those packages; the arithmetic behind it is the same with any version.
CHOSEN = '(test_magics or renderer or tab or brush or slider or mistakes or hostile or live or still) and not (any_line or test_attack or split_line or odd_frame or explained_while or live_scan)'


def there(colab, *args, seconds=900):
    "Run Python with Colab's versions."
    return subprocess.run([sys.executable, *args], cwd=ROOT, env={**os.environ, **colab}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)


def test_the_versions_are_those(colab):
    pins = dict(re.findall(r'^([\w-]+)==(\S+)$', (ROOT/'tests/colab.txt').read_text(), re.MULTILINE))
    names = dict(ipython='IPython', **{n: n for n in ('ipykernel', 'ipywidgets', 'altair', 'anywidget', 'numpy', 'pandas')})
    said = there(colab, '-c', f'from importlib import import_module as i; print({{n: i(m).__version__ for n, m in {names}.items()}}, i("gradsentry_nb").__file__)').stdout
    assert said.strip() == f'{ {n: pins[n] for n in names} } {ROOT/"gradsentry_nb/__init__.py"}'


def test_the_suite_passes(colab):
    done = there(colab, '-m', 'pytest', '-q', '-W', 'ignore', '-k', CHOSEN, *(f'tests/test_{t}.py' for t in ('widgets', 'magics', 'charts')))
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) >= 90


def test_the_lessons_pass(colab):
    done = there(colab, 'scripts/notebooks.py', 'test', 'nbs/50_widgets.ipynb')
    assert done.returncode == 0, done.stdout[-6000:]


def test_a_tutorial_runs(colab):
    done = there(colab, 'scripts/notebooks.py', 'test', 'nbs/tutorials/write_your_own.ipynb')
    assert done.returncode == 0, done.stdout[-6000:]
