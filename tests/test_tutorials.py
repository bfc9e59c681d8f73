"""The tutorials: their order, their badges, and the first cell, which brings the project onto Colab and Kaggle and does nothing elsewhere."""
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import notebooks
import pytest
from conftest import ROOT, copy_checkout

FOLDER = ROOT/'nbs'/'tutorials'
NAMES = sorted(p.stem for p in FOLDER.glob('*.ipynb'))


def cells(name): return nbformat.read(FOLDER/f'{name}.ipynb', as_version=4).cells


def order():
    "The tutorials as nbs/index.ipynb lists them."
    return re.findall(r'^\d\. \[[^]]+\]\(tutorials/(\w+)\.ipynb\)', '\n'.join(c.source for c in nbformat.read(ROOT/'nbs/index.ipynb', as_version=4).cells), re.MULTILINE)


def test_every_tutorial_is_listed_and_names_the_next():
    assert sorted(order()) == NAMES and order()[0] == 'first_scan'
    for name, after in zip(order(), order()[1:]): assert re.search(rf'Next: \[[^]]+\]\({after}\.ipynb\)', cells(name)[-1].source), f'{name} does not end with a link to {after}'


@pytest.mark.parametrize('name', NAMES)
def test_a_tutorial_opens_with_its_lead_and_a_picture(name):
    head, first, *rest = cells(name)
    assert re.match(r'# .+\n\n> .+\n\n', head.source) and 'At the end you' in head.source
    assert notebooks.skipped(first) and first.source == notebooks.first_cell(name, notebooks.address()[0]) and not first.outputs
    assert '![' in re.sub(r'\[!\[.*', '', head.source) or any('image/svg+xml' in o.get('data', {}) for c in rest[:2] for o in c.get('outputs', ()))


@pytest.mark.parametrize('name', NAMES)
def test_links_between_pages_lead_somewhere(name):
    for c in cells(name):
        for target in re.findall(r'\]\(((?!https?:|#)[^)\s]+)\)', c.source) if c.cell_type == 'markdown' else (): assert (FOLDER/target.split('#')[0]).exists(), target


def test_badges_come_with_an_address():
    none, some = notebooks.hosted(''), notebooks.hosted('https://github.com/some-one/gradsentry_nb.git', 'dev')
    for path in none:
        name = path.rpartition('/')[2].removesuffix('.ipynb')
        assert b'Open in' not in none[path] and json.loads(none[path])['cells'][1]['source'][4] == '    !python -m zipfile -e gradsentry_nb.zip .\n'
        head, first = (''.join(c['source']) for c in json.loads(some[path])['cells'][:2])
        at = f'github.com/some-one/gradsentry_nb/blob/dev/{path}'
        assert head.split('\n\n')[2] == (f'[![Open in Colab](../images/open-in-colab.svg)](https://colab.research.google.com/{at.replace(".com", "", 1)}) '
                                         f'[![Open in Kaggle](../images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://{at})')
        assert '!git clone --quiet --depth 1 https://github.com/some-one/gradsentry_nb.git gradsentry_nb' in first and ('widget_manager' in first) == (name in notebooks.WIDGETS)
    assert all((ROOT/f'nbs/images/open-in-{k}.svg').exists() for k in notebooks.PLATFORMS)
    assert notebooks.badges('x', 'https://example.org/gradsentry_nb', 'main') == '' and not any(b'Open in' in x for x in notebooks.hosted('https://example.org/a/b').values())


def test_badges_are_taken_away_again(tmp_path, monkeypatch):
    before, checkout = notebooks.hosted(''), copy_checkout(tmp_path/'checkout')
    for path, data in notebooks.hosted('https://github.com/a/b').items(): (checkout/path).write_bytes(data)
    monkeypatch.setattr(notebooks, 'ROOT', checkout); monkeypatch.setattr(notebooks, 'NBS', checkout/'nbs')
    assert notebooks.hosted('') == before


@pytest.mark.slow
def test_the_first_cell_asks_for_this_package_alone(tmp_path):
    zipped = shutil.make_archive(tmp_path/'gradsentry_nb', 'zip', copy_checkout(tmp_path/'from'/'gradsentry_nb').parent)
    shutil.rmtree(tmp_path/'from')
    code = f'from IPython.core.interactiveshell import InteractiveShell as I; r = I.instance().run_cell({notebooks.first_cell("live_view", "")!r}); import os; print(r.success, os.getcwd())'
    def run(**env): return subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300).stdout
    assert run().split() == ['True', str(tmp_path)] and sorted(os.listdir(tmp_path)) == ['gradsentry_nb.zip'], zipped
    said = run(KAGGLE_KERNEL_RUN_TYPE='Interactive', PIP_DRY_RUN='1', PIP_NO_INDEX='1', PIP_NO_BUILD_ISOLATION='0', PIP_REPORT=str(tmp_path/'plan.json'))
    assert (tmp_path/'plan.json').exists() and f'True {tmp_path}/gradsentry_nb/nbs/tutorials' in said, said
    assert {x['metadata']['name'] for x in json.loads((tmp_path/'plan.json').read_text())['install']} == {'gradsentry_nb'}
