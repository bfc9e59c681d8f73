"""Importing the package is quiet and light, and needs none of the tools that it is written with."""
import json
import subprocess
import sys

from conftest import ROOT

HEAVY = {'torch', 'transformers', 'peft', 'accelerate', 'datasets', 'pandas', 'numpy', 'scipy', 'sklearn', 'pyarrow',
         'altair', 'IPython', 'ipywidgets', 'anywidget', 'nbdev', 'fastcore'}


def python(code):
    "Run `code` in a fresh interpreter that finds this checkout's package."
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_import_is_light_and_quiet():
    done = python('''
import json, logging, sys, warnings
state = lambda: (list(logging.root.handlers), logging.root.level, list(warnings.filters))
modules, before = set(sys.modules), state()
import gradsentry_nb
same = before == state()
handlers = [n for n in logging.root.manager.loggerDict if n.startswith('gradsentry') and logging.getLogger(n).handlers]
new = {m.partition('.')[0] for m in set(sys.modules)-modules}
print(json.dumps([same, handlers, sorted(new)]))
''')
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    same, handlers, new = json.loads(done.stdout)  # fails when the import prints anything itself
    assert same, 'the import changes logging or the warning filters'
    assert not handlers
    assert not HEAVY & set(new)


def test_every_module_imports_without_the_authoring_tools():
    done = python('''
import importlib, pkgutil, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'nbdev', 'fastcore', 'execnb', 'ghapi'}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import gradsentry_nb
names = [m.name for m in pkgutil.walk_packages(gradsentry_nb.__path__, 'gradsentry_nb.')]
for name in names: importlib.import_module(name)
print(len(names))
''')
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 1


def test_public_names_resolve():
    done = python('''
import gradsentry_nb
missing = [n for n in gradsentry_nb.__all__ if not hasattr(gradsentry_nb, n)]
unlisted = sorted(set(gradsentry_nb.__all__)-set(dir(gradsentry_nb)))
assert gradsentry_nb.__all__ and not missing and not unlisted, (missing, unlisted)
try: gradsentry_nb.no_such_name
except AttributeError: pass
else: raise AssertionError('a name that is not there')
''')
    assert done.returncode == 0, done.stderr
