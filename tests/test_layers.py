"""Imports point one way: the import rules of CONTRIBUTING.md, held by a walk over the syntax trees."""
import ast
import re

import nbformat
import notebooks
import pytest
from conftest import ROOT

LIB = 'gradsentry_nb'
NO_MODEL = r'textstats|spectrum|threshold|charts|report'
DETECTORS = r'capture|spectrum|threshold|sentry|stream|distributed|spurious|backbone_scan|baselines\..+'
# Which modules (a pattern over names inside the package) never import what, and why.
NEVER = [
    (r'.*', {'nbdev', 'fastcore', 'execnb', 'ghapi'}, 'authoring tools are not installed where the package runs'),
    (NO_MODEL, {'transformers', 'peft', f'{LIB}.capture', f'{LIB}.sentry'}, 'these work on numbers, not on models'),
    (r'textstats|threshold|charts|report', {'torch'}, 'these work on numbers, not on models'),
    (r'attacks\..+', {f'{LIB}.capture', f'{LIB}.sentry'}, 'an attack knows no detector'),
    (DETECTORS, {f'{LIB}.attacks', f'{LIB}.evaluate'}, 'a detector never sees truth'),
]


def imported(source, module, package=False):
    "Absolute dotted names that `source`, the text of `module`, imports anywhere: [(line, name)]."
    home = module.split('.') if package else module.split('.')[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[:len(home)-node.level+1] if node.level else []
            base = '.'.join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, '.'.join(filter(None, [base, alias.name]))) for alias in node.names)


def inside(name, parent): return name == parent or name.startswith(f'{parent}.')


def violations(sources, numbers):
    "A sentence for each import and word in `sources` {module: text} that breaks a rule; `numbers` {module: number}."
    for module, source in sorted(sources.items()):
        short = module.removeprefix(f'{LIB}.')
        subpackage = any(other.startswith(f'{module}.') for other in sources)
        if module not in numbers:
            if source.strip(): yield f'{module}: no notebook exports it'
            continue
        for line, name in imported(source, module, package=subpackage):
            for pattern, forbidden, why in NEVER:
                if re.fullmatch(pattern, short) and any(inside(name, f) for f in forbidden):
                    yield f'{module}:{line} imports {name}: {why}'
            if not inside(name, LIB): continue
            # The longest known prefix is the module; what hangs off it is a name in it.
            target = max((m for m in numbers if inside(name, m)), key=len, default=module)
            if target != module and numbers[target] >= numbers[module]:
                yield f'{module}:{line} imports {target}: {numbers[module]} may not import from {numbers[target]}'
        if re.fullmatch(DETECTORS, short):
            lines = [i for i, text in enumerate(source.splitlines(), 1) if re.search(r'\bpoisoned\b', text, re.I)]
            yield from (f'{module}:{i} says `poisoned`: a detector never sees truth' for i in lines)


def numbered():
    "{module: number of the notebook that exports it}."
    numbers = {}
    for path in (ROOT/'nbs').glob('[0-9]*_*.ipynb'):
        for cell in nbformat.read(path, as_version=4).cells:
            if name := cell.cell_type == 'code' and notebooks.directives(cell.source).get('default_exp'):
                numbers[LIB if name == '__init__' else f'{LIB}.{name}'] = int(path.name.split('_')[0])
    return numbers


def exported():
    "{module: text} of the package's files."
    files = {p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.'): p
             for p in (ROOT/LIB).rglob('*.py') if p.name != '_modidx.py'}
    return {name.removesuffix('.__init__'): p.read_text(encoding='utf-8') for name, p in files.items()}


def test_every_numbered_notebook_exports_a_module():
    assert numbered().keys() <= exported().keys()


def test_notebook_numbers_are_unique():
    numbers = sorted(numbered().values())
    assert numbers == sorted(set(numbers))


def test_package_keeps_the_rules():
    found = list(violations(exported(), numbered()))
    assert not found, '\n'.join(found)


NUMBERS = {LIB: 90} | {f'{LIB}.{name}': number for name, number in {
    'core': 0, 'textstats': 3, 'capture': 10, 'spectrum': 11, 'sentry': 13, 'report': 16, 'attacks.triggers': 20,
    'baselines.text': 30, 'evaluate': 41, 'cli': 52}.items()}


@pytest.mark.parametrize('module,source', [
    ('core', 'from gradsentry_nb.data import load\nfrom .capture import x'),
    ('core', 'def f():\n    from .capture import GradFactors'),
    ('core', 'class A:\n    def f(self):\n        if self: import gradsentry_nb.capture as c'),
    ('core', 'try: from . import capture\nexcept ImportError: capture = None'),
    ('core', 'from gradsentry_nb import capture'),
    ('core', 'import gradsentry_nb'),
    ('core', 'from gradsentry_nb import Sentry'),
    ('core', 'from gradsentry_nb import *'),
    ('core', 'import fastcore.basics'),
    ('core', 'def f(): from nbdev.showdoc import show_doc'),
    ('capture', 'async def f():\n    from ..gradsentry_nb.sentry import Sentry'),
    ('textstats', 'import torch'),
    ('textstats', 'import torch.nn.functional as F'),
    ('spectrum', 'from transformers import AutoModel'),
    ('spectrum', 'from .capture import GradFactors'),
    ('report', 'from . import sentry'),
    ('attacks.triggers', 'from ..capture import GradFactors'),
    ('attacks.triggers', 'from .. import sentry'),
    ('attacks.triggers', 'from ..evaluate import recall'),
    ('sentry', 'def f():\n    """Rows that are poisoned."""'),
    ('sentry', 'x = row["Poisoned"]'),
    ('baselines.text', 'from ..attacks import triggers'),
    ('baselines.text', 'from ..attacks.triggers import badnets'),
    ('baselines.text', 'from gradsentry_nb.evaluate import f1'),
    ('unknown', 'x = 1'),
])
def test_a_breach_is_noticed(module, source):
    sources = {**dict.fromkeys(NUMBERS, ''), f'{LIB}.{module}': source}
    assert list(violations(sources, NUMBERS))


@pytest.mark.parametrize('module,source', [
    ('core', 'import os, json\nfrom collections import Counter'),
    ('spectrum', 'import torch\nfrom .core import Scores\nfrom . import core'),
    ('sentry', 'def f():\n    from transformers import AutoModel\n    from gradsentry_nb.capture import GradFactors'),
    ('attacks.triggers', 'from ..core import Sample\nfrom .. import core\nimport gradsentry_nb.core'),
    ('evaluate', 'from .attacks.triggers import registry\npoisoned = 1'),
    ('sentry', 'import nbdevelop, fastcorelike'),
    ('capture', 'unpoisoned_word = "poison"'),
])
def test_what_is_allowed_passes(module, source):
    sources = {**dict.fromkeys(NUMBERS, ''), f'{LIB}.{module}': source}
    assert not list(violations(sources, NUMBERS))


def test_the_top_module_may_import_everything():
    sources = {**dict.fromkeys(NUMBERS, ''), LIB: 'from . import core\nfrom .cli import main'}
    assert not list(violations(sources, NUMBERS))


def test_names_are_resolved():
    source = 'import a.b\nfrom . import x\nfrom .y import z\nfrom ..core import Sample\nfrom ... import far'
    assert [name for _, name in imported(source, 'p.q.m')] == ['a.b', 'p.q.x', 'p.q.y.z', 'p.core.Sample', 'far']
    assert [name for _, name in imported('from .x import y', 'p.q', package=True)] == ['p.q.x.y']
