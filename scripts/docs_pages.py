"""Notebooks and Markdown files of a checkout as the sources of its site: no code runs, what the notebooks store is shown."""
import html
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import docs_api
import nbformat
from notebooks import DIRECTIVE, directives

TAGS = set('''a abbr b br caption code col colgroup details div em h3 h4 h5 h6 hr i img kbd li mark ol p pre s small span strong sub summary sup table tbody td tfoot
              th thead tr u ul var'''.split())
VOID = {'br', 'col', 'hr', 'img'}
ATTRIBUTES = set('alt border class colspan dir halign lang open rowspan scope title valign'.split())
STYLES = set('''background background-color border border-bottom border-left border-radius border-right border-top color display font font-family font-size font-style
                font-weight height line-height margin margin-bottom margin-left margin-right margin-top max-width min-width opacity overflow overflow-wrap overflow-x padding
                text-align text-decoration unicode-bidi vertical-align white-space width word-break'''.split())
PICTURE = re.compile(r'data:image/(?:png|jpeg|gif|webp|svg\+xml)[;,]')


class Cleaner(HTMLParser):
    "Writes HTML anew from what is allowed in it; whatever the parser takes for text is text afterwards, whatever it was meant to be."
    def __init__(self): super().__init__(); self.parts, self.open, self.hidden = [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag in ('script', 'style'): self.hidden += 1
        if tag not in TAGS or self.hidden: return
        said = ''.join(f' {k}="{html.escape(v)}"' for k, v in self.allowed(tag, attributes))
        self.parts.append(f'<{tag}{said}>')
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ('script', 'style'): self.hidden = max(0, self.hidden-1)
        if tag in self.open: self.close_to(tag)

    def handle_data(self, data):
        if not self.hidden: self.parts.append(html.escape(data, quote=False))

    def close_to(self, tag):
        while self.open:
            self.parts.append(f'</{(last := self.open.pop())}>')
            if last == tag: return

    def allowed(self, tag, attributes):
        for k, v in attributes:
            v = v or ''
            if k in ATTRIBUTES: yield k, v
            elif k == 'src' and tag == 'img' and PICTURE.match(v): yield k, v
            elif k == 'style': yield k, ';'.join(x for x in v.split(';') if self.harmless(x))

    def harmless(self, declaration):
        name, _, value = declaration.partition(':')
        return name.strip().lower() in STYLES and not re.search(r'[\\@<>]|url|expression|image|/\*', value, re.I)


def clean(text):
    "HTML without scripts, handlers, frames, forms, styles for the page and anything that is loaded."
    cleaner = Cleaner()
    cleaner.feed(text); cleaner.close(); cleaner.close_to(None)
    return ''.join(cleaner.parts)


def chart_spec(data):
    "The Vega-Lite specification among the forms of an output, or None."
    for kind, value in data.items():
        if kind.startswith('application/vnd.vegalite.'): return value
    page = data.get('text/html', '')
    for at in re.finditer(r'(?:\bspec = |\}\)\()(?=\{)', page) if 'vegaEmbed' in page else ():
        try: spec = json.JSONDecoder().raw_decode(page, at.end())[0]
        except ValueError: continue
        if 'vega-lite' in spec.get('$schema', ''): return spec


def chart(spec):
    "A chart that the page draws: the specification as text that no parser of HTML can leave early."
    return '<div class="gs-vega"><script type="application/json">'+re.sub('[<>&]', lambda m: f'\\u{ord(m[0]):04x}', json.dumps(spec))+'</script></div>'


def stored(output):
    "One stored output with the one form of it that is shown; Markdown is left to a cell of its own."
    data = output.get('data')
    if data is None: return output
    kinds = ['text/markdown', 'image/svg+xml', 'text/html', 'image/png', 'image/jpeg', 'text/plain']
    if spec := chart_spec(data): output.data = {'text/html': chart(spec)}
    elif kind := next((k for k in kinds if k in data), None):
        output.data = {kind: clean(data[kind]) if kind == 'text/html' else data[kind]}
    else: return None
    if 'image/svg+xml' in output.data and (m := re.search(r'''aria-label="Title text '([^"]*)'"''', data['image/svg+xml'])):
        output.metadata['alt'] = html.unescape(m[1])
    return output


def prose(text, change):
    "Markdown with `change` done to what is not code."
    parts = re.split(r'(^(`{3,}|~{3,})[^\n]*\n.*?^\2`*[ \t]*$|(?<!`)(`+)(?!`).*?(?<!`)\3(?!`))', text, flags=re.S | re.M)
    return ''.join(change(x) if i % 4 == 0 else x for i, x in enumerate(parts) if i % 4 < 2)


class Pages:
    "The pages of a checkout: which there are, and their texts with the links as the site has them."
    def __init__(self, root):
        self.root, self.problems, self.pictures, self.entries, self.charts = Path(root), [], set(), {}, False
        nbs, skip = self.root/'nbs', lambda p: any(x[0] in '._' for x in p.parts)
        found = {p: p.relative_to(nbs) for p in nbs.rglob('*') if p.suffix in ('.ipynb', '.md') and not skip(p.relative_to(nbs))}
        found |= {p: p.relative_to(self.root) for p in self.root.glob('*.md') if p.name != 'README.md'}
        self.at = {p.relative_to(self.root).as_posix(): x.as_posix() for p, x in sorted(found.items())}    # file of the checkout -> file of the site's sources

    def link(self, source, target):
        "A link of `source` as the site has it; None where what it leads to is in the checkout but not on the site."
        if re.match(r'[a-z][a-z0-9+.-]*:|//', target, re.I): return target
        path, hashed, part = target.partition('#')
        part = hashed+part.lower()                   # a notebook server keeps capitals in the anchors of headings, the site has none
        if not path: return part
        found = os.path.normpath(os.path.join(os.path.dirname(source), path))
        found = 'nbs/index.ipynb' if found == 'README.md' else found
        here = os.path.dirname(self.at[source]) or '.'
        if found in self.at: return os.path.relpath(self.at[found], here)+part
        if not (self.root/found).exists() or found.startswith('..'): self.problems.append(f'{source}: there is no {target}')
        elif Path(found).suffix in ('.png', '.svg', '.jpg', '.jpeg', '.gif', '.webp'):
            self.pictures.add(found)
            return os.path.relpath(os.path.join('pictures', found), here)

    def relinked(self, source, text):
        "Markdown with the links that the site has, and with displayed formulas as paragraphs of their own."
        def one(m):
            new = self.link(source, m[3])
            return f'{m[1]}{m[2]}]({new}{m[4]})' if new is not None else m[2]
        apart = lambda part: re.sub(r'^\$\$(?:(?!\$\$).)+\$\$[ \t]*$', r'\n\g<0>\n', part, flags=re.S | re.M)
        return prose(text, lambda part: re.sub(r'(!?\[)((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)((?:\s+"[^"]*")?)\)', one, apart(part)))

    def text(self, source): return self.relinked(source, (self.root/source).read_text(encoding='utf-8'))

    def notebook(self, source):
        "A notebook as the site reads it, and the module that it exports, or None."
        nb = nbformat.read(self.root/source, as_version=4)
        module = next((m for c in nb.cells if (m := directives(c.source).get('default_exp'))), None)
        self.entries[source] = []
        seen = {}
        cells = [new for cell in nb.cells for new in self.cells(source, cell, seen)]
        lead(cells, source, module and f'gradsentry_nb.{module}'.removesuffix('.__init__'))
        meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'), language_info=dict(name='python', pygments_lexer='ipython3'))
        return nbformat.v4.new_notebook(cells=cells, metadata=meta), module

    def cells(self, source, cell, seen):
        "What one cell of a notebook becomes; `seen`: functions of the cells before it."
        marks = directives(cell.source)
        if {'hide', 'default_exp'} & set(marks) or marks.get('include') == 'false': return
        if cell.cell_type == 'raw': return
        if cell.cell_type == 'markdown':
            yield nbformat.v4.new_markdown_cell(self.relinked(source, re.sub(r'\A---\n.*?\n---\n', '', cell.source, flags=re.S)))
            return
        code = '\n'.join(x for x in cell.source.splitlines() if not DIRECTIVE.match(x)).strip()
        exported = {'export', 'exports', 'exporti'} & set(marks)
        tags = ['hide-input'] if exported else ['remove-input'] if marks.get('echo') == 'false' else []
        if exported:
            parsed = docs_api.Cell(code, seen)
            if parsed.imports_only(): return
            if found := parsed.entries():
                self.entries[source] += found
                yield nbformat.v4.new_markdown_cell('\n\n'.join(map(docs_api.markdown, found)))
        outputs = [] if marks.get('output') == 'false' else [o for o in map(stored, cell.outputs) if o]
        self.charts |= any('gs-vega' in o.get('data', {}).get('text/html', '') for o in outputs)
        yield shown(code, outputs, tags)
        for text in (o.data['text/markdown'] for o in outputs if 'text/markdown' in o.get('data', {})):
            yield nbformat.v4.new_markdown_cell(self.relinked(source, text))


def shown(code, outputs, tags):
    "A code cell with its outputs; Markdown among them comes after it."
    outputs = [o for o in outputs if 'text/markdown' not in o.get('data', {})]
    alt = next((o.metadata['alt'] for o in outputs if 'alt' in o.get('metadata', {})), 'chart')
    return nbformat.v4.new_code_cell(code, outputs=outputs, metadata=dict(tags=tags, mystnb=dict(image=dict(alt=alt, classes='chart'))))


def lead(cells, source, module):
    "Mark the sentence under the title, and say which module the page is."
    first = next((c for c in cells if c.cell_type == 'markdown'), None)
    if first is None: return
    first.source = re.sub(r'^(?=> )', '{.lead}\n', first.source, count=1, flags=re.M)
    if module: first.source = re.sub(r'\A(# [^\n]*\n)', rf'\1\n{{.where}}\nModule `{module}`, written in `{source}`\n\n```{{py:module}} {module}\n```\n', first.source, count=1)
