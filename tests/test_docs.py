"""The documentation site: everything public is in it, its links are whole, nothing in it runs or is loaded that it does not bring along."""
import ast
import functools
import http.server
import json
import re
import subprocess
import threading
from contextlib import contextmanager
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import docs
import docs_api
import docs_pages
import nbformat
import notebooks
import pytest
from conftest import ROOT
from lab import CHROMIUM, FLAGS

pytestmark = pytest.mark.filterwarnings('ignore:.*Check CHANGES for Sphinx API')
MODULES = {p: p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.').removesuffix('.__init__') for p in sorted((ROOT/'gradsentry_nb').rglob('*.py')) if p.name != '_modidx.py' and p.stat().st_size}
EVIL = '<script>window.ran = 1</script><img src=x onerror="window.ran = 1"><svg/onload="window.ran = 1">'


def exported(path):
    "The public names of a module, {name: its definition's syntax tree or None}, from what the export wrote."
    body = ast.parse(path.read_text(encoding='utf-8')).body
    names = next((ast.literal_eval(x.value) for x in body if isinstance(x, ast.Assign) and x.targets[0].id == '__all__'), []) if path.name != '__init__.py' else \
        [x.name for x in body if isinstance(x, ast.FunctionDef) and not x.name.startswith('_')]
    defined = {x.name: x for x in body if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
    return {n: defined.get(n) for n in names if not n.startswith('_')}


def methods(path, node):
    "The public methods of a class, with those that it is given after its definition; those of another class are explained there."
    found = [x.name for x in node.body if isinstance(x, ast.FunctionDef)]
    body = ast.parse(path.read_text(encoding='utf-8')).body
    defined = {x.name for x in body if isinstance(x, ast.FunctionDef)}
    for x in body:
        if not isinstance(x, ast.Assign) or not isinstance(x.targets[0], (ast.Attribute, ast.Tuple)): continue
        several = isinstance(x.targets[0], ast.Tuple)
        pairs = zip(x.targets[0].elts, x.value.elts) if several and isinstance(x.value, ast.Tuple) else [(x.targets[0], x.value)]
        found += [t.attr for t, v in pairs if isinstance(t, ast.Attribute) and ast.unparse(t.value) == node.name and (isinstance(v, (ast.Call, ast.Lambda)) or ast.unparse(v) in defined)]
    return [x for x in found if not x.startswith('_')]


def entry(page, name):
    "The signature of a name and all that is under it, as text, or None."
    at = page.find(f'id="{name}"')
    if at < 0: return None
    return unescape(re.sub(r'<[^>]+>', '', page[at:page.find('class="sig sig-object py" id="gradsentry_nb', at+10)].partition('>')[2]))


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site of the checkout."
    before = subprocess.run(['git', 'status', '--porcelain'], cwd=ROOT, capture_output=True, text=True).stdout
    out = tmp_path_factory.mktemp('docs')/'site'
    problems = docs.static_site(ROOT, out)
    assert not problems, '\n'.join(problems)
    assert subprocess.run(['git', 'status', '--porcelain'], cwd=ROOT, capture_output=True, text=True).stdout == before, 'the build leaves something in the checkout'
    return out


def checkout_of(folder, **cells):
    "A checkout with an index, a notebook `nbs/00_core.ipynb` of the given cells and a Markdown page."
    (folder/'nbs').mkdir(parents=True)
    new = nbformat.v4
    write = lambda name, found: nbformat.write(new.new_notebook(cells=found), folder/'nbs'/name)
    write('index.ipynb', [new.new_markdown_cell('# Small\n\n> A site of two pages.\n\nSee [core](00_core.ipynb#The-Idea) and `nbs/00_core.ipynb`.')])
    write('00_core.ipynb', cells['cells'])
    (folder/'NOTES.md').write_text(cells.get('notes', '# Notes\n\n[Home](nbs/index.ipynb)\n'))
    return folder


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    "A site whose titles, docstrings, comments, prose and stored outputs all try to run something, and that has charts of Altair's in both forms."
    import altair as alt
    import pandas as pd
    new = nbformat.v4
    bars = alt.Chart(pd.DataFrame(dict(x=['a', EVIL], y=[1, 2]))).mark_bar().encode(x='x:N', y='y:Q')
    output = lambda **data: new.new_output('display_data', {k.replace('_', '/'): v for k, v in data.items()})
    frame = f'<table><tr><td style="color:red;background:url(//evil.example/x)" onclick="window.ran = 1">kept</td></tr></table></div></div>{EVIL}<iframe srcdoc="x"></iframe>' \
            '<a href="javascript:window.ran = 1">go</a><style>body{display:none}</style><form action="//evil.example"></form>'
    source = f'#| export\ndef first(\n    a:int=1,  # {EVIL}\n    b:str="```{{raw}} html",\n):  # ```{{raw}} html\n    """{EVIL} `{EVIL}`\n\n```{{raw}} html\n{EVIL}\n```"""\n    return a'
    cells = [new.new_code_cell('#| default_exp core'), new.new_markdown_cell(f'# Core {EVIL}\n\n> Lead {EVIL}\n\n{EVIL}\n\n```{{raw}} html\n{EVIL}\n```\n\n## The Idea\n\n$\\text{{{EVIL}}}$'),
             new.new_code_cell(source, outputs=[new.new_output('stream', text=EVIL)]),
             new.new_code_cell('1', outputs=[output(text_html=frame, text_plain='x')]), new.new_code_cell('2', outputs=[output(text_plain=EVIL)]),
             new.new_code_cell('3', outputs=[output(text_markdown=f'{EVIL}\n\n```{{raw}} html\n{EVIL}\n```')]), new.new_code_cell('4', outputs=[output(application_javascript='window.ran = 1')]),
             new.new_code_cell('5', outputs=[new.new_output('display_data', {'image/svg+xml': '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>window.ran = 1</script></svg>'})]),
             new.new_code_cell('6', outputs=[new.new_output('display_data', {'application/vnd.vegalite.v6+json': bars.to_dict(), 'text/plain': 'chart'})]),
             new.new_code_cell('7', outputs=[output(text_html=bars.to_html(), text_plain='chart')]),
             new.new_code_cell('8', outputs=[new.new_output('display_data', bars._repr_mimebundle_())])]
    folder = tmp_path_factory.mktemp('hostile')
    return docs.static_site(checkout_of(folder/'checkout', cells=cells), folder/'site'), folder/'site'


@contextmanager
def served(folder):
    "A folder on this machine's own address."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/'
    finally: server.shutdown(); server.server_close()


@pytest.fixture(scope='module')
def chromium():
    if CHROMIUM is None: pytest.skip('there is no Chromium on this machine')
    pytest.importorskip('playwright')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def page_of(chromium, wrong, *allowed, **settings):
    "A page whose errors, messages of errors and requests to other places are put into `wrong`."
    page = chromium.new_page(**settings)
    page.on('pageerror', lambda e: wrong.append(f'{page.url}: {e}'))
    page.on('console', lambda m: wrong.append(f'{page.url}: {m.text}') if m.type in ('error', 'warning') else None)
    page.on('request', lambda r: None if r.url.startswith(('data:', 'blob:', *allowed)) else wrong.append(f'{page.url} asked {r.url}'))
    try: yield page
    finally: page.close()


@pytest.mark.parametrize('path', MODULES, ids=MODULES.get)
def test_every_public_name_has_an_entry_with_its_parameters(site, path):
    page = next((p for p in site.glob('*.html') if f'id="module-{MODULES[path]}"' in p.read_text(encoding='utf-8')), None)
    assert page is not None, 'no page is the page of this module'
    text, missing = page.read_text(encoding='utf-8'), []
    names = (site/'names.html').read_text(encoding='utf-8')
    for name, node in exported(path).items():
        full = f'{MODULES[path]}.{name}'
        said = entry(text, full)
        if said is None: missing.append(f'{name}: no entry'); continue
        if f'#{full}"' not in names: missing.append(f'{name}: not among all names')
        if isinstance(node, ast.ClassDef): missing += [f'{name}: no {x}' for x in methods(path, node) if entry(text, f'{full}.{x}') is None]
        if not isinstance(node, ast.FunctionDef): continue
        a = node.args
        missing += [f'{name}: no {x.arg}' for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])] if not re.search(rf'\b{x.arg}\b', said)]
    assert not missing, '\n'.join(missing)


def test_a_table_says_what_the_docments_say(site):
    page = (site/'11_spectrum.html').read_text(encoding='utf-8')
    said = entry(page, 'gradsentry_nb.spectrum.spectral_entropy')
    for words in ('singular values, largest first', 'k', 'int', '16', 'returns', 'Tensor', 'between 0 and 1'): assert words in said
    assert 'def spectral_entropy(' in re.sub('<[^>]+>', '', page), 'the source is folded under it'


def test_every_notebook_and_every_markdown_file_has_a_page(site):
    wanted = [p.relative_to(ROOT/'nbs') for p in notebooks.notebooks()] + [p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.md')]
    wanted += [p.relative_to(ROOT) for p in ROOT.glob('*.md') if p.name != 'README.md']
    index = (site/'index.html').read_text(encoding='utf-8')
    for p in wanted:
        page = site/p.with_suffix('.html')
        assert page.is_file() and len(page.read_text(encoding='utf-8')) > 1000, p
        if page.name != 'index.html': assert f'href="{p.with_suffix(".html").as_posix()}"' in index, f'{p} is not in the sidebar'


def test_prose_leads_to_names_and_notebooks(site):
    page = (site/'10_capture.html').read_text(encoding='utf-8')
    assert re.search(r'href="00_core\.html#gradsentry_nb\.core\.Encoded"', page)
    assert re.search(r'href="tutorials/live_view\.html"', (site/'index.html').read_text(encoding='utf-8'))
    assert 'href="10_capture.html"><code' in (site/'CONTRIBUTING.html').read_text(encoding='utf-8').partition('<article')[2]
    assert re.search(r'<td><p><code[^>]*><span class="pre">train_rows</span>', (site/'44_ssti_study.html').read_text(encoding='utf-8')), 'a parameter that is called like a function is not it'
    assert '<math' in page and '$' not in re.sub(r'<pre>.*?</pre>|<code.*?</code>|<script.*?</script>|<annotation.*?</annotation>|<dt.*?</dt>', '', page.partition('<article')[2], flags=re.S)


def test_the_search_index_knows_a_function(site):
    text = (site/'searchindex.js').read_text(encoding='utf-8')
    index = json.loads(text[text.index('(')+1:text.rindex(')')])
    assert 'spectral_entropy' in [x[-1] for x in index['objects']['gradsentry_nb.spectrum']] and index['docnames']


def test_the_site_in_a_browser(site, chromium):
    wrong = []
    pages = ['index', '10_capture', '14_charts', 'tutorials/first_scan', 'CONTRIBUTING', 'names']
    with served(site) as url, page_of(chromium, wrong, url) as page:
        for name in pages:
            page.goto(f'{url}{name}.html', wait_until='load')
            assert page.locator('article h1').first.inner_text().strip()
            assert page.evaluate('[...document.images].every(i => i.naturalWidth > 0 || i.loading === "lazy")'), f'{name}: a picture is broken'
            for width in (1400, 700):
                page.set_viewport_size(dict(width=width, height=900))
                assert page.evaluate('document.documentElement.scrollWidth') <= width, f'{name} is wider than {width}'
        page.goto(f'{url}search.html?q=spectral_entropy')
        page.locator('#search-results a', has_text='spectral_entropy').first.wait_for(timeout=20_000)
        page.evaluate("localStorage.setItem('theme', 'dark')")
        page.goto(f'{url}index.html')
        assert page.evaluate('document.body.dataset.theme') == 'dark'
        dark = page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert sum(map(int, re.findall(r'\d+', dark)[:3])) < 150, dark
    assert wrong == []


def test_the_search_works_without_a_server(site, chromium):
    wrong = []
    with page_of(chromium, wrong, 'file:') as page:
        page.goto(f'{(site/"search.html").as_uri()}?q=threshold')
        page.locator('#search-results a', has_text='threshold').first.wait_for(timeout=20_000)
    assert wrong == []


def test_nothing_hostile_runs(hostile, chromium):
    problems, site = hostile
    wrong = []
    text = (site/'00_core.html').read_text(encoding='utf-8')
    active, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, a: active.extend([f'{tag} {k}={v}' for k, v in a if k.startswith('on') or re.match('javascript:|(https?:)?//evil', v or '')]+[tag]*(tag in ('iframe', 'object', 'embed')))
    parser.feed(text); parser.close()
    assert active == [] and 'evil.example' not in text and '{display:none}' not in text
    assert [x for x in re.findall(r'<script(?![^>]*(?:src|json))[^>]*>(.*?)</script>', text, re.S) if 'dataset.theme' not in x] == []
    assert 'gradsentry_nb.core.first' in text and 'class="docments' in text
    with served(site) as url, page_of(chromium, wrong, url) as page:
        for name in ('00_core', 'index', 'names'):
            page.goto(f'{url}{name}.html')
            page.wait_for_timeout(300)
            assert page.evaluate('window.ran') is None
        page.goto(f'{url}search.html?q=core')
        page.locator('#search-results li').first.wait_for(timeout=20_000)
        page.wait_for_timeout(300)
        assert page.evaluate('window.ran') is None
        page.goto(f'{url}00_core.html')
        assert 'kept' in page.locator('article').inner_text() and page.locator('.gs-vega svg').nth(2).wait_for(timeout=20_000) is None
        assert page.locator('.gs-vega svg').count() == 3 and page.evaluate('window.ran') is None
    assert [w for w in wrong if 'Content Security Policy' not in w] == []
    assert all('raw' in p for p in problems), problems


def test_links_that_lead_nowhere_are_listed(tmp_path):
    new = nbformat.v4
    notes = '# Notes\n\n[a](nbs/gone.ipynb) [b](nbs/00_core.ipynb#no-such-place) [c](LICENSE) [d](../outside.md) ![e](https://evil.example/x.png) `[f](nowhere.md)`\n'
    cells = [new.new_code_cell('#| default_exp core'), new.new_markdown_cell('# Core\n\n## The Idea\n\n$$\\nosuchthing{x}$$')]
    root = checkout_of(tmp_path/'checkout', cells=cells, notes=notes)
    (root/'LICENSE').write_text('x')
    problems = '\n'.join(docs.static_site(root, tmp_path/'site'))
    for said in ('there is no nbs/gone.ipynb', 'no-such-place', 'there is no ../outside.md', 'loads https://evil.example/x.png', 'nosuchthing'): assert said in problems, said
    assert 'LICENSE' not in problems and 'nowhere.md' not in problems
    page = (tmp_path/'site'/'NOTES.html').read_text(encoding='utf-8')
    assert '>c</a>' not in page and ' c ' in re.sub(r'<[^>]+>', '', page), 'what is in the checkout and not on the site is named without a link'


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path/'mine.txt').write_text('x')
    assert 'something else' in docs.static_site(ROOT, tmp_path)[0] and (tmp_path/'mine.txt').exists()


@pytest.mark.parametrize('source,expected', [
    ('def f(\n    a:int, # one\n    *b, # two\n    c=(1, 2), # three\n    **d, # four\n)->str: # five\n    "Doc."', [('a', 'int', '', 'one'), ('*b', '', '', 'two'), ('c', '', '(1, 2)', 'three'), ('**d', '', '', 'four'), 'five']),
    ('def f(a, b=2): return a  # b: how many', [('a', '', '', ''), ('b', '', '2', 'how many')]),
    ('def f(a:"Late")->"Later": return a  # what comes', [('a', 'Late', '', ''), 'what comes']),
    ('@dataclass\nclass C:\n    x:int           # [N] α\n    y:list = field(default_factory=list) # rows\n    z:int = field(init=False)', [('x', 'int', '', '[N] α'), ('y', 'list', 'list', 'rows')]),
    ('class C:\n    def __init__(self,\n        a, # one\n    ): pass\n    def _hidden(self): pass', [('a', '', '', 'one')])])
def test_docments_are_read(source, expected):
    [found] = docs_api.Cell(source).entries()
    got = [(p.name, p.type, p.default, p.doc) for p in found.parameters]
    assert got+([found.returns.doc] if found.returns else []) == expected


def test_methods_that_a_class_is_given_are_read():
    cell = docs_api.Cell('def _f(self,\n    a:int, # one\n)->str: "Doc."\ndef _g(x): pass\nC.f, C.g, C._h = _f, staticmethod(_g), _f\nC.p, _D.q = property(lambda self: 1), _f\nC.n = other')
    assert [docs_api.markdown(e).splitlines()[0].strip('~') for e in cell.entries()] == ['{py:method} C.f(a: int) -> str', '{py:method} C.g(x)', '{py:property} C.p']


@pytest.mark.parametrize('text,wanted', [
    ('<b>x</b><script>y</script>z', '<b>x</b>z'), ('</div><p>x', '<p>x</p>'), ('<img src="https://a.b/c.png">', '<img>'), ('<IMG SRC="data:image/png;base64,AA==">', '<img src="data:image/png;base64,AA==">'),
    ('<p style="color:red;position:fixed;background:URL(x)">x</p>', '<p style="color:red">x</p>'), ('<a href="javascript:x">y</a>', '<a>y</a>'), ('1 < 2 & 3', '1 &lt; 2 &amp; 3'),
    ('<p title="&quot;><script>x</script>">y</p>', '<p title="&quot;&gt;&lt;script&gt;x&lt;/script&gt;">y</p>'), ('<style>p{}</style><!-- c --><td>x', '<td>x</td>')])
def test_stored_html_is_cleaned(text, wanted):
    assert docs_pages.clean(text) == wanted


def test_code_in_prose_is_left_as_it_is():
    changed = docs_pages.prose('a `a` ``a ` a`` a\n```\na\n```\na', str.upper)
    assert changed == 'A `a` ``a ` a`` A\n```\na\n```\nA'
    assert Path(docs_pages.__file__).parent == ROOT/'scripts'
