"""What the site asks of Sphinx beyond its extensions: formulas without scripts, names and files that are links, a policy in every page."""
import base64
import hashlib
import re
from pathlib import Path

import furo
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

LOG = logging.getLogger(__name__)
NOT_INSIDE = nodes.reference, nodes.title, addnodes.desc_signature, nodes.literal_block
# What docutils does not know, in words that it does: sizes are left to the browser, one-digit fractions get their braces.
TEX = [(r'\\[bB]ig+[lrm]?(?![a-zA-Z])', ''), (r'\\[td]frac(?![a-zA-Z])', r'\\frac'), (r'\\frac\s*(\d)\s*(\d)', r'\\frac{\1}{\2}'), (r'\\frac\s*(\d)\s*\{', r'\\frac{\1}{'),
       (r'\\dots(?![a-zA-Z])', r'\\ldots')]


def mathml(tex, block):
    for pattern, new in TEX: tex = re.sub(pattern, new, tex)
    return tex2mathml(tex, as_block=block)


def visit_math(self, node, block=False):
    try: said = mathml(node.astext(), block)
    except MathError as e:
        LOG.warning(f'the formula {node.astext()!r} cannot be drawn: {e}', location=node)
        said = f'<code>{self.encode(node.astext())}</code>'
    self.body.append(f'<div class="formula">{said}</div>' if block else said)
    raise nodes.SkipNode


def visit_block(self, node): visit_math(self, node, block=True)


def telling(name):
    "Is a name in code surely that of an object, and not a column or an ordinary word?"
    return bool(re.fullmatch(r'(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:\(\))?', name)) and bool(re.search(r'[A-Z_.(]', name))


def of_table(node):
    "Is it the name of a parameter in a table of docments?"
    cell = node.parent.parent
    return isinstance(cell, nodes.entry) and cell.parent.index(cell) == 0 and 'docments' in cell.parent.parent.parent.parent['classes']


class Linked(SphinxPostTransform):
    "Code in prose that is a public name or a notebook of the project leads to it."
    default_priority = 200
    site = None                  # Sphinx's application

    def run(self, **_):
        files, names = self.config.gs_files, self.env.gs_names
        for node in list(self.document.findall(nodes.literal)):
            text, above = node.astext(), node.parent
            while above is not None and not isinstance(above, NOT_INSIDE): above = above.parent
            if above is not None or of_table(node): continue
            if text in files: to, anchor = files[text], ''
            elif telling(text) and (obj := names.get(text.removesuffix('()').removeprefix('gradsentry_nb.'))): to, anchor = obj
            else: continue
            if to == self.env.docname and not anchor: continue
            node.replace_self(make_refnode(self.site.builder, self.env.docname, to, anchor, node.deepcopy()))


def collect(app, env):
    "The names that code in prose may lead to: {name: (page, anchor)}; a name that two modules have leads nowhere."
    env.gs_names, doubtful = {}, set()
    for full, obj in env.domaindata['py']['objects'].items():
        if obj.objtype == 'module': env.gs_names[full] = env.gs_names[full.removeprefix('gradsentry_nb.')] = (obj.docname, obj.node_id); continue
        words = full.removeprefix('gradsentry_nb.').split('.')
        for name in {'.'.join(words[i:]) for i in range(len(words))}:
            if len(words) > 1 and obj.objtype in ('method', 'property') and '.' not in name: continue
            if env.gs_names.setdefault(name, (obj.docname, obj.node_id)) != (obj.docname, obj.node_id): doubtful.add(name)
    for name in doubtful: del env.gs_names[name]


def own_script():
    "The source expression of the one script that the theme has in its pages: it chooses between light and dark."
    text = re.search(r'<script>(.*?)</script>', (Path(furo.__file__).parent/'theme'/'furo'/'base.html').read_text(encoding='utf-8'), re.S)[1]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy(app, page, template, context, doctree):
    "Nothing from other hosts and no script of a page's own, also where the site is opened as files; charts are drawn by functions made on the fly."
    charts = 'class="gs-vega"' in context.get('body', '')
    for name in ['vega.js', 'charts.js']*charts: app.add_js_file(name)
    rules = {'default-src': "'self' file: data:", 'script-src': f"'self' file: {own_script()}"+" 'unsafe-eval'"*charts, 'style-src': "'self' file: 'unsafe-inline'",
             'object-src': "'none'", 'base-uri': "'none'"}
    said = '; '.join(f'{k} {v}' for k, v in rules.items())
    context['metatags'] = context.get('metatags', '')+f'<meta http-equiv="Content-Security-Policy" content="{said}">'


def setup(app):
    app.add_config_value('gs_files', {}, 'env')
    app.add_html_math_renderer('mathml', (visit_math, None), (visit_block, None))
    Linked.site = app
    app.add_post_transform(Linked)
    app.connect('env-check-consistency', collect)
    app.connect('html-page-context', policy)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
