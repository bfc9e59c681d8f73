"""The repository agrees with its notebooks: exported, clean, run, published, and free of real defects."""
import ast
import re
import subprocess
import sys

import nbformat
import notebooks
import pytest
from conftest import ROOT, copy_checkout

NOTEBOOKS = notebooks.notebooks()
every_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())

# What a stored output must not hold: it would change from machine to machine or from run to run, or need a network.
UNPORTABLE = {
    'a path of one machine':
        r'(?<![\w./:~-])/(?:work|root|home|tmp|opt|usr|var|mnt|Users|private)/[\w.]|\b[A-Z]:\\[\w ]+',
    'a timing': r'\d ?(?:it|rows|s|samples|tok|examples)/s\b|\bs/it\b|\bWall time\b|\bCPU times\b|± [\d.]+ [mµn]?s\b',
    'a warning': r'\b[A-Z]\w*Warning\b',
    'a memory address': r'\b0x[0-9a-f]{8,}\b',
    'a load from the network': r'''(?:src|href)\s*=\s*["'](?:https?:)?//[^"']+\.(?:js|css)|cdn\.jsdelivr|unpkg\.com''',
}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A copy of the checkout in which nbdev has exported every module anew, and then cleaned the notebooks."
    folder = copy_checkout(tmp_path_factory.mktemp('made')/'checkout')
    for path in (folder/'gradsentry_nb').rglob('*.py'): path.unlink()
    code = 'from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__(); nbdev_clean.__wrapped__()'
    subprocess.run([sys.executable, '-c', code], cwd=folder, env=notebooks.environment(), check=True)
    return folder


def texts(outputs):
    "Every text in a cell's stored outputs."
    for out in outputs:
        yield out.get('text', '')
        yield from (v for v in out.get('data', {}).values() if isinstance(v, str) and len(v) < 2_000_000)


def unportable(text):
    "What in `text` would not be the same elsewhere: [(why, what)]."
    return [(why, m[0]) for why, pattern in UNPORTABLE.items() if (m := re.search(pattern, text))]


def unshown(cell):
    "Does the cell end on a value that is not among its stored outputs?"
    if cell.cell_type != 'code' or cell.outputs or notebooks.skipped(cell): return False
    if cell.source.lstrip().startswith('%%') or cell.source.rstrip().endswith(';'): return False
    source = '\n'.join('' if x.lstrip().startswith(('%', '!')) else x for x in cell.source.splitlines())
    try: body = ast.parse(source).body
    except SyntaxError: return False
    # A call may return None, and an awaited one too; a name, an index or a comparison is there to be seen.
    return bool(body) and isinstance(body[-1], ast.Expr) and isinstance(
        body[-1].value, (ast.Name, ast.Subscript, ast.Compare, ast.Tuple, ast.BinOp, ast.JoinedStr, ast.Dict, ast.List))


def test_there_are_notebooks():
    assert (ROOT/'nbs'/'index.ipynb') in NOTEBOOKS


def test_package_is_what_the_notebooks_export(made):
    sides = [{p.relative_to(x).as_posix(): p.read_bytes() for p in x.rglob('*.py')} for x in (ROOT/'gradsentry_nb', made/'gradsentry_nb')]
    differing = sorted(k for k in sides[0].keys() | sides[1].keys() if sides[0].get(k) != sides[1].get(k))
    assert not differing, f'run `make export`: the notebooks make something else of {", ".join(differing)}'
    assert (made/'pyproject.toml').read_text() == (ROOT/'pyproject.toml').read_text(), 'pyproject.toml and settings.ini disagree'


def test_notebooks_are_clean(made):
    unclean = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS
               if p.read_bytes() != (made/p.relative_to(ROOT)).read_bytes()]
    assert not unclean, f'run `make notebooks` (or nbdev_clean): superfluous metadata in {", ".join(unclean)}'


@every_notebook
def test_stored_outputs(path):
    wrong = []
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
        outputs = cell.get('outputs', [])
        wrong += [f'cell {i}: {why}: {what!r}' for text in texts(outputs) for why, what in unportable(text)]
        wrong += [f'cell {i}: an error is stored: {o.ename}' for o in outputs if o.output_type == 'error']
        wrong += [f'cell {i}: stderr is stored: {o.text[:80]!r}' for o in outputs if o.get('name') == 'stderr']
        if unshown(cell): wrong.append(f'cell {i}: ends on a value that is not stored; run the notebook')
    assert not wrong, f'{path.name}:\n' + '\n'.join(wrong)


@pytest.mark.parametrize('text', [
    'saved to /home/someone/x.json', 'PosixPath(\'/tmp/abc\')', 'C:\\Users\\x', '120 rows/s', '3.1 it/s',
    'Wall time: 3 s', 'UserWarning: old', '<object at 0x7f00deadbeef>', '<script src="https://a.b/c.js">',
    '1.2 ms ± 3 µs'])
def test_unportable_output_is_noticed(text):
    assert unportable(text)


@pytest.mark.parametrize('text', [
    'clean.jsonl', 'https://example.org/home/page', 'and/or', 'nbs/images/index-1.svg', '0x1f', 'a/tmp/b',
    '<a href="https://example.org/page">', 'x: \\alpha', 'warnings: 0'])
def test_portable_output_passes(text):
    assert not unportable(text)


@pytest.mark.parametrize('source,expected', [
    ('x', True), ('a, b', True), ('x;', False), ('print(x)', False), ('x = 1', False), ('%%time\nx', False),
    ('#| eval: false\nx', False), ('def f(): return 1', False), ('', False)])
def test_a_value_without_its_output_is_noticed(source, expected):
    assert unshown(nbformat.v4.new_code_cell(source)) is expected


def test_readme_is_what_index_makes():
    error = notebooks.publish(check=True)
    assert error is None, error


def test_ruff():
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--quiet', '--output-format', 'concise', '.']
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout+found.stderr


def test_exported_code_is_python_3_11():
    for path in (ROOT/'gradsentry_nb').rglob('*.py'):
        ast.parse(path.read_text(encoding='utf-8'), str(path), feature_version=(3, 11))


def test_the_lab_opens_a_notebook_that_is_there():
    "From the project's root, so that links between notebooks lead somewhere."
    said = subprocess.run(['make', '-n', 'lab'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'root_dir="{ROOT}"' in said and (ROOT/re.search(r'default_url=/lab/tree/(\S+)', said)[1]).is_file()
