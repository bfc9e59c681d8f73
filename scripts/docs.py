"""Build the documentation site: `python scripts/docs.py [--out _docs] [--static]`. With Quarto on the PATH it makes the site, else Sphinx does."""
import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import docs_api
import nbformat
from docs_pages import Pages
from notebooks import ROOT, environment

ASSETS = Path(__file__).resolve().parent/'docs'
LAYERS = {'0': 'Core and data', '1': 'Capture to report', '2': 'Attacks', '3': 'Detectors', '4': 'Training, evaluation, studies', '5': 'Views and commands'}
TAG, ATTRIBUTE = re.compile(r'<([a-z]\w*)((?:\s+[\w:.-]+(?:="[^"]*")?)+)'), re.compile(r'\s(id|name|href|src)="([^"]*)"')
START, GUIDES, PROJECT = 'Start', 'Guides', 'The project'


def caption(source):
    "The part of the sidebar in which a file of the checkout is."
    if not source.startswith('nbs/'): return PROJECT
    if '/tutorials/' in source or source == 'nbs/index.ipynb': return START
    if m := re.match(r'nbs/(\d)\d_', source): return LAYERS.get(m[1], LAYERS['5'])
    return GUIDES


def sidebar(pages, modules):
    "The tables of contents that become the sidebar, in the order of the layers."
    parts = {name: [] for name in (START, GUIDES, *LAYERS.values(), PROJECT)}
    for source in sorted(pages, key=lambda s: ('first_scan' not in s, s)):
        if source == 'nbs/index.ipynb': continue
        name = re.sub(r'\.\w+$', '', pages[source])
        module = modules.get(source)
        parts[caption(source)].append(f'{"the package" if module == "__init__" else module} <{name}>' if module else name)
    parts[START] = ['self', *parts[START], 'names']
    return '\n\n'.join(f'````{{toctree}}\n:hidden:\n:caption: {part}\n\n'+'\n'.join(found)+'\n````' for part, found in parts.items() if found)


def names_page(found):
    "A page with every public name, module by module: found is [(module, its page, entries)]."
    text = ['# All names', '{.lead}\n> Every public name of the package, with the page that explains it.']
    for module, page, entries in found:
        if not entries: continue
        dotted = f'gradsentry_nb.{module}'.removesuffix('.__init__')
        rows = [docs_api.row([f'{{py:obj}}`{e.name} <{dotted}.{e.name}>`', docs_api.safe(e.doc.split('\n\n')[0])]) for e in entries if e.kind not in ('method', 'property')]
        text += [f'## [{dotted}]({page})', '{.names}\n| name | what it is |\n|---|---|\n'+'\n'.join(rows)]
    return '\n\n'.join(text)+'\n'


def sources(root, folder):
    "Write the sources of a checkout's site to a folder; gives the pages and what is wrong with them."
    pages = Pages(root)
    notebooks = {s: pages.notebook(s) for s in pages.at if s.endswith('.ipynb')}
    modules = {s: module for s, (_, module) in notebooks.items() if module}
    listed = [(module, pages.at[s], pages.entries[s]) for s, module in modules.items()]
    files = {pages.at[s]: pages.text(s) for s in pages.at if s.endswith('.md')} | {'names.md': names_page(listed)}
    notebooks['nbs/index.ipynb'][0].cells.append(nbformat.v4.new_markdown_cell(sidebar(pages.at, modules)))
    files |= {pages.at[s]: nbformat.writes(nb) for s, (nb, _) in notebooks.items()}
    for name, text in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(text, encoding='utf-8')
    for name in pages.pictures:
        (folder/'pictures'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pages.root/name, folder/'pictures'/name)
    return pages


def drawing(folder):
    "What a page needs to draw a chart of Altair's without a network, as one file, and the lines that use it."
    import vl_convert
    folder.mkdir()
    (folder/'vega.js').write_text(f'(()=>{{{vl_convert.javascript_bundle()}}})();', encoding='utf-8')
    return str(folder)


def settings(root, pages, static):
    "Sphinx's configuration."
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(Path(root)/'settings.ini')
    said = ini['DEFAULT']
    shown = dict(myst_enable_extensions=['dollarmath', 'attrs_block'], myst_heading_anchors=4, myst_disable_syntax=['html_block', 'html_inline'],
                 nb_execution_mode='off', nb_code_prompt_show='▸ Source', nb_code_prompt_hide='▾ Source', nb_mime_priority_overrides=[('html', 'application/javascript', None)])
    python = dict(add_module_names=False, python_maximum_signature_line_length=90, python_display_short_literal_types=True, toc_object_entries_show_parents='hide')
    page = dict(html_theme='furo', html_title=said.get('title', 'gradsentry_nb'), html_static_path=[str(ASSETS), *static], html_css_files=['site.css'], html_js_files=['search.js'],
                html_favicon=str(ASSETS/'icon.svg'), html_copy_source=False, html_show_sourcelink=False, html_math_renderer='mathml', html_last_updated_fmt=None, templates_path=[],
                html_theme_options=dict(light_css_variables={'color-brand-primary': '#0b5c93', 'color-brand-content': '#0b5c93'},
                                        dark_css_variables={'color-brand-primary': '#6cb8ef', 'color-brand-content': '#6cb8ef'}))
    names = {s: re.sub(r'\.\w+$', '', at) for s, at in pages.at.items()}                       # the files that code in prose may name, numbered ones by their names alone, too
    names |= {at.removesuffix('.ipynb'): at.removesuffix('.ipynb') for at in pages.at.values() if re.match(r'\d\d_.*\.ipynb$', at)}
    return dict(project=said.get('title', 'gradsentry_nb'), author=said.get('author', ''), copyright=said.get('copyright', ''), version=said.get('version', ''), release=said.get('version', ''),
                language='en', smartquotes=False, root_doc='index', extensions=['myst_nb', 'sphinx_copybutton', 'docs_sphinx'], exclude_patterns=[],
                gs_files=names, **shown, **python, **page)


def static_site(root, out):
    "Build the site of a checkout into a folder with Sphinx; gives what is wrong with it."
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    out = Path(out).resolve()
    if out.exists() and any(out.iterdir()) and not (out/'searchindex.js').exists(): return [f'{out} holds something else than a site; choose another folder']
    with tempfile.TemporaryDirectory() as work:
        src, said = Path(work)/'src', io.StringIO()
        src.mkdir()
        pages = sources(root, src)
        (src/'docutils.conf').write_text('[general]\nraw_enabled: no\nfile_insertion_enabled: no\n')
        with patch_docutils(str(src)), docutils_namespace():
            static = [drawing(Path(work)/'static')] if pages.charts else []
            Sphinx(str(src), None, f'{work}/made/html', f'{work}/trees', 'html', settings(root, pages, static), status=None, warning=said).build()
        if out.exists(): shutil.rmtree(out)
        shutil.move(f'{work}/made/html', out)      # extensions write beside the folder of the pages, too
    (out/'.buildinfo').unlink(missing_ok=True)
    shutil.rmtree(out/'_sources', ignore_errors=True)
    (out/'.nojekyll').touch()                      # a host of pages that skips names with an underscore is told not to
    return [*pages.problems, *filter(None, said.getvalue().splitlines()), *broken(out)]


class Links:
    "What a page of the site offers to links, and where its own lead. Sphinx quotes every attribute and escapes every `<` of a text."
    def __init__(self, text):
        self.ids, self.links, self.loads = set(), [], []
        for tag, said in TAG.findall(text):
            a = {k: unescape(v) for k, v in ATTRIBUTE.findall(said)}
            self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
            if tag == 'a' and a.get('href'): self.links.append(a['href'])
            if tag == 'link' and a.get('href'): self.loads.append(a['href'])
            if a.get('src'): self.loads.append(a['src'])


def broken(out):
    "Links of a site that lead nowhere, and what its pages would load from elsewhere."
    out, wrong = Path(out).resolve(), []
    pages = {p: Links(p.read_text(encoding='utf-8')) for p in out.rglob('*.html')}
    for page, found in sorted(pages.items()):
        for url in dict.fromkeys(found.links+found.loads):
            name, to = page.relative_to(out).as_posix(), urlsplit(url)
            if to.scheme or to.netloc:
                if url in found.loads and to.scheme != 'data': wrong.append(f'{name}: loads {url[:200]}')
                continue
            target = (page.parent/unquote(to.path)).resolve() if to.path else page
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): wrong.append(f'{name}: {url} is not there')
            elif to.fragment and target in pages and unquote(to.fragment) not in pages[target].ids: wrong.append(f'{name}: {url} has no such place')
    return wrong


def quarto():
    "Build the site with nbdev and Quarto, which write it to the `doc_path` of settings.ini."
    subprocess.run([sys.executable, '-c', 'from nbdev.quarto import nbdev_docs; nbdev_docs()'], cwd=ROOT, env=environment(), check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT/'_docs', help='folder of the static site, made anew; default: _docs')
    parser.add_argument('--static', action='store_true', help='the static site, even where Quarto is at hand')
    args = parser.parse_args()
    if shutil.which('quarto') and not args.static: return quarto()
    problems = static_site(ROOT, args.out)
    print('\n'.join(problems) or f'{len(list(args.out.rglob("*.html")))} pages in {os.path.relpath(args.out)}', file=sys.stderr if problems else sys.stdout)
    sys.exit(bool(problems))


if __name__ == '__main__': main()
