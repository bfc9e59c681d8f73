"""The page of errors says what the code says, and every message says what to do."""
import ast
import re

import error_page
import nbformat
from conftest import ROOT

# Messages that do not say so yet: module -> how many. A number here only ever gets smaller.
KNOWN = {'capture': 1}


def test_the_page_is_what_the_code_says():
    cells = nbformat.read(ROOT/'nbs'/'errors.ipynb', as_version=4).cells
    stored = [o['data']['text/markdown'] for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    current = error_page.page() in stored
    assert current, 'an error was changed: run `make notebooks NB=nbs/errors.ipynb`'


def test_every_raise_is_on_the_page():
    plain, kinds = lambda text: re.sub(r'\W+', ' ', text), error_page.kinds()
    said, missing, seen = plain(' '.join(e.message for e in error_page.errors())), [], 0
    for path in error_page.sources():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and getattr(node.exc.func, 'id', '') in kinds and node.exc.args): continue
            pieces = [x.value for x in ast.walk(node.exc.args[0]) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            longest, seen = max(pieces, key=len, default=''), seen+1
            if len(longest) > 15 and plain(longest).strip() not in said: missing.append(f'{path.name}:{node.lineno} {longest}')
    assert seen > 300 and not missing, '\n'.join(missing)


def test_every_message_says_what_to_do():
    silent = [e for e in error_page.errors() if not e.says]
    found = {m: sum(e.module == m for e in silent) for m in {e.module for e in silent}}
    more = [f'{e.module}.{e.where}: {e.message}' for e in silent if found[e.module] > KNOWN.get(e.module, 0)]
    assert not more, 'these say what is wrong, but not what to do (give ..., choose one of ..., must be ...):\n'+'\n'.join(more)


def test_what_says_too_little_is_noticed():
    says = lambda message: error_page.Error('m', 'DataError', 'f', message).says
    assert not any(map(says, ['It failed.', 'x.csv: broken CSV', 'The rows are of another kind.', 'There is nothing to score.']))
    assert all(map(says, ['x.csv: broken CSV; mend this line.', 'k must be at least 2, not {k}.', 'There is no {kind} {name}; choose one of {options}.', 'The labels are {known}.']))
