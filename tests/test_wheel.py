"""The built wheel is the whole product: code, demo data, command, and ranges that leave installed packages alone."""
import configparser
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser

import pytest
from conftest import ROOT, copy_checkout
from packaging.requirements import Requirement

DATA = ROOT/'gradsentry_nb'/'demo_data'


def run(*command, cwd, **kwargs):
    done = subprocess.run([*map(str, command)], cwd=cwd, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=600, **kwargs)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    home = tmp_path_factory.mktemp('wheel')
    copy_checkout(home/'src')
    # sdist first, wheel from it: what MANIFEST.in forgets is then missing here too.
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', home, home/'src', cwd=home)
    return next(home.glob('*.whl'))


@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))
        return Parser().parsestr(z.read(name).decode())


def test_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as z: inside = {n for n in z.namelist() if '.dist-info/' not in n}
    files = (p for p in (ROOT/'gradsentry_nb').rglob('*') if p.is_file() and p.suffix != '.pyc')
    assert inside == {p.relative_to(ROOT).as_posix() for p in files}


def test_wheel_holds_the_licence_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        points = configparser.ConfigParser()
        points.read_string(z.read(next(n for n in names if n.endswith('entry_points.txt'))).decode())
    assert any(n.endswith('LICENSE') for n in names)
    assert points['console_scripts']['gradsentry'] == 'gradsentry_nb.cli:main'


def test_metadata(metadata):
    assert metadata['Name'] == 'gradsentry_nb' and metadata['Requires-Python'] == '>=3.11'
    assert metadata['License-Expression'] == 'Apache-2.0' and metadata['Description-Content-Type'] == 'text/markdown'


def test_run_time_requirements_have_lower_bounds_only(metadata):
    wanted = [r for r in map(Requirement, metadata.get_all('Requires-Dist')) if not r.marker]
    assert {'torch', 'transformers', 'peft'} <= {r.name for r in wanted}
    assert not [str(r) for r in wanted if {s.operator for s in r.specifier} - {'>='}]


# What hosted notebooks had preinstalled in August 2026; installing the package there must not replace any of it.
@pytest.mark.parametrize('service,installed', [
    ('Colab', 'torch 2.11.0 transformers 5.15.0 peft 0.20.0 accelerate 1.14.0 datasets 4.0.0 altair 5.5.0 '
              'anywidget 0.9.21 ipywidgets 7.7.1 ipython 7.34.0 numpy 2.1.3 pandas 2.2.3 scikit-learn 1.6.1'),
    ('Kaggle', 'torch 2.10.0 transformers 5.0.0 peft 0.19.1 accelerate 1.13.0 datasets 4.0.0 altair 5.5.0 '
               'ipywidgets 8.1.5 numpy 2.0.2 pandas 2.2.2'),
])
def test_hosted_notebooks_satisfy_the_ranges(metadata, service, installed):
    have = dict(zip(installed.split()[::2], installed.split()[1::2]))
    wanted = [r for r in map(Requirement, metadata.get_all('Requires-Dist')) if not r.marker]
    assert not [str(r) for r in wanted if r.name in have and have[r.name] not in r.specifier]


def test_demo_runs_from_the_wheel(wheel, tmp_path):
    """In a new environment that has the wheel instead of the editable install, and no source tree in reach.

    The dependencies are borrowed from this environment: a path in a .pth file adds them without running the .pth files
    among them, the editable install's being one. scripts/check_wheel.sh does the same with nothing borrowed."""
    if not DATA.is_dir(): pytest.skip('the demo data is not built yet')
    venv.create(tmp_path/'env', with_pip=False, symlinks=True)
    python, site = tmp_path/'env'/'bin'/'python', next((tmp_path/'env').glob('lib/python*/site-packages'))
    pip = [sys.executable, '-m', 'pip', '--python', python]
    run(*pip, 'install', '-qq', '--no-deps', '--no-index', wheel, cwd=tmp_path)
    (site/'borrowed.pth').write_text(sysconfig.get_path('purelib')+'\n')
    (tmp_path/'empty').mkdir()
    where = run(python, '-c', 'import gradsentry_nb; print(gradsentry_nb.__file__)', cwd=tmp_path/'empty')
    assert where.startswith(str(site)), where
    run(tmp_path/'env'/'bin'/'gradsentry', 'demo', '--out', 'out', cwd=tmp_path/'empty')
    written = {p.name for p in (tmp_path/'empty'/'out').iterdir()}
    assert {'clean.jsonl', 'dropped.jsonl', 'report.html', 'scores.parquet', 'verdict.json'} <= written
