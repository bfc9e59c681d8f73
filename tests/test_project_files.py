"""What stands beside the code agrees with it: the map, the links, the forms, the citation."""
import configparser
import re

import nbformat
import notebooks
import pytest
import yaml
from conftest import ROOT

PAGES = ['README.md', 'CONTRIBUTING.md', 'SECURITY.md', 'CHANGELOG.md', 'benchmarks/README.md']
FORMS = sorted((ROOT/'.github'/'ISSUE_TEMPLATE').glob('*.yml'))
PAPERS = {'2605.26574', '2506.11402', '2409.14119'}


def test_every_notebook_is_on_the_map():
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    missing = [p.stem for p in notebooks.notebooks() if p.parent == notebooks.NBS and f'`{p.stem}`' not in text]
    gone = [n for n in re.findall(r'`(\d\d_[\w.]+?)(?:\.ipynb)?`', text) if not (notebooks.NBS/f'{n}.ipynb').exists()]
    assert not missing and not gone


def test_every_stored_table_is_listed():
    text = (ROOT/'benchmarks'/'README.md').read_text(encoding='utf-8')
    assert not [p.name for p in (ROOT/'benchmarks'/'results').iterdir() if f'`{p.name}`' not in text]


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    found = re.findall(r'\]\(([^)\s]+)\)', (ROOT/page).read_text(encoding='utf-8'))
    assert not [x for x in found if not re.match(r'[a-z]+:|#', x) and not ((ROOT/page).parent/x.split('#')[0]).exists()]


def test_links_of_pages_lead_somewhere():
    for name in ('index', 'threat_model', 'errors'):
        for cell in nbformat.read(ROOT/'nbs'/f'{name}.ipynb', as_version=4).cells:
            found = re.findall(r'\]\(([^)\s]+)\)', cell.source) if cell.cell_type == 'markdown' else []
            assert not [x for x in found if not re.match(r'[a-z]+:|#', x) and not (ROOT/'nbs'/x.split('#')[0]).exists()]


@pytest.mark.parametrize('path', FORMS, ids=lambda p: p.stem)
def test_forms(path):
    form = yaml.safe_load(path.read_text(encoding='utf-8'))
    if path.stem == 'config': return
    assert form['name'] and form['description'] and form['labels'] and form['body']
    ids = [x['id'] for x in form['body'] if x['type'] != 'markdown']
    assert len(ids) == len(set(ids)) > 2
    for x in form['body']:
        assert x['type'] in ('markdown', 'textarea', 'input', 'dropdown', 'checkboxes') and (x['attributes'].get('label') or x['type'] == 'markdown')
    for name in re.findall(r'\b(?:nbs/)?[\w/]+\.(?:ipynb|md)\b', path.read_text(encoding='utf-8')): assert (ROOT/name).exists(), name


def test_citation():
    cited = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    settings = configparser.ConfigParser(); settings.read(ROOT/'settings.ini', encoding='utf-8'); settings = settings['DEFAULT']
    assert (cited['version'], cited['title'], cited['authors']) == (settings['version'], settings['lib_name'], [{'name': settings['author']}])
    assert {r['url'].rsplit('/', 1)[1] for r in cited['references']} == PAPERS and all(r['authors'] and r['title'] and r['year'] for r in cited['references'])
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    assert all(f'arxiv.org/abs/{x}' in readme and any(r['title'] in readme for r in cited['references'] if x in r['url']) for x in PAPERS)
