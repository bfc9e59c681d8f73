"""Every error that the package can raise, read from its syntax trees; `python scripts/error_page.py` names the messages that do not say what to do."""
import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LIB = Path(__file__).resolve().parent.parent/'gradsentry_nb'
FIRST = {'GradSentryError', 'UsageError'}                       # the project's errors are these and what is made of them
SHOWN = {'visible', 'repr', 'str', 'list', 'sorted', 'map', 'Path', 'html'}   # how a value gets into a message is nobody's business

# A message says what to do when a clause of it asks for something, or when it says what would have been right.
ASKS = ('give|name|choose|make|take|load|leave|use|set|write|put|drop|rename|scan|run|merge|remove|download|save|mend|quote|say|select|open|wait|please|ask|allow|start|show|poison|add|list|make|delete|stop|turn|call|'
        'convert|change|switch|compress|train|keep|check|install|try|pip install')
ACTION = re.compile(rf'(?:^|[;:,.?(}}] |\b(?:or|and|so|not|then) )(?:{ASKS})\b(?!=)', re.I)
RIGHT = re.compile(r'\b(?:must|has to|lies? between|at least|at most|needs?|wants?|takes (?:a|an|one|two)|(?:is|are) (?:a|an|one|None|the|0)\b.*(?:, not|or more|, this is)|an? [\w ]+ is an?)\b|\w= is an? '
                   r'|\b(?:are|has|have|from|classes|fit|uses|adds one:) \{|\b(?:says why|shows what there is|makes one|goes on|no such file)|%gs_\w+ [A-Z]| --\w|\?(?: |$)|\{e\}$')


@dataclass(frozen=True, order=True)
class Error:
    "One message of one error."
    module:str      # 'data', 'attacks.triggers'
    kind:str        # its class
    where:str       # the function or method that makes it
    message:str     # with what varies in braces

    @property
    def parts(self)->tuple:
        "(what is wrong, what to do): the clause that asks for something stands last."
        for at in [m.end() for m in re.finditer(r'[;:?.)] ', self.message)]:
            rest = self.message[at:]
            if re.match(rf'(?:or |and )?(?:{ASKS})\b(?!=)', rest, re.I) or re.match(r'(?:is|did you|has|was)\b.*\?', rest): return re.sub(r'[ ;:]+$', '.', self.message[:at].rstrip()), rest[0].upper()+rest[1:]
        if 'no such file' in self.message: return self.message, 'Check the path.'
        if re.search(r'\b(?:are|has|have|from|uses|there are) \{[^}]*\}[.?]?$|one of \{', self.message): return self.message, 'Take one of those that it lists.'
        return self.message, 'Do as it says.' if ACTION.search(self.message) or 'says why' in self.message else 'Give what it asks for.'

    @property
    def says(self)->bool:
        "One clear sentence that says what to do, or what would have been right?"
        whole = bool(re.search(r'[.?!)}:]$', self.message) or 'pip install' in self.message)
        return whole and bool(ACTION.search(self.message) or RIGHT.search(self.message))


def short(node):
    "What stands for a value in a message: a name where there is one."
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SHOWN and node.args: node = node.args[-1 if node.func.id == 'map' else 0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'join': node = node.args[0]
        elif isinstance(node, (ast.GeneratorExp, ast.ListComp)): node = node.generators[0].iter
        elif isinstance(node, ast.Attribute) and node.attr in ('name', '__name__') and isinstance(node.value, ast.Call): node = node.value
        elif isinstance(node, ast.NamedExpr): node = node.target
        else: break
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ('type', 'len', 'getattr'):
        return {'type': 'type', 'len': 'number', 'getattr': 'value'}[node.func.id]
    text = re.sub(r'^(?:self|a|s|t|e)\.|\[[^\]]*\]|\(\)', '', ast.unparse(node))
    return text if re.fullmatch(r'[\w.]{1,24}', text) else '…'


def render(node, given=lambda name: []):
    "A string expression as a message with what varies in braces; `given`: what a name was set to."
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.JoinedStr): return ''.join(render(v, given) for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add): return render(node.left, given)+render(node.right, given)
    if isinstance(node, ast.FormattedValue): node = node.value
    if isinstance(node, ast.Name) and len(found := given(node.id)) == 1 and isinstance(found[0], (ast.JoinedStr, ast.Constant)) and isinstance(getattr(found[0], 'value', ''), str):
        return render(found[0])
    if isinstance(node, ast.IfExp) and all(isinstance(x, ast.Constant) for x in (node.body, node.orelse)): return '{'+' or '.join(repr(x.value).strip("'") for x in (node.body, node.orelse))+'}'
    return '{'+short(node)+'}'


class Module:
    "The errors of one file."
    def __init__(self, path, kinds):
        self.tree, self.kinds = ast.parse(path.read_text(encoding='utf-8')), kinds
        self.name = path.relative_to(LIB).with_suffix('').as_posix().replace('/', '.')
        self.up, self.nodes = {}, [self.tree]
        for node in self.nodes:                                  # grows on the way
            for child in ast.iter_child_nodes(node): self.up[child] = node; self.nodes.append(child)
        self.functions = {f.name: f for f in self.nodes if isinstance(f, ast.FunctionDef)}

    def around(self, node, kinds=(ast.FunctionDef, ast.Lambda)):
        while (node := self.up.get(node)) and not isinstance(node, kinds): pass
        return node

    def where(self, node):
        names = []
        while node := self.up.get(node):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.insert(0, node.name)
        return '.'.join(names)

    def messages(self, node, scope, depth=0):
        "Every message that an expression can stand for."
        again = lambda x: self.messages(x, scope, depth+1)
        if depth > 6 or node is None: return []
        if isinstance(node, ast.IfExp): return again(node.body)+again(node.orelse)
        if isinstance(node, ast.BoolOp): return [m for x in node.values for m in again(x)]
        if isinstance(node, (ast.List, ast.Tuple)): return [m for x in node.elts for m in again(x)]
        if isinstance(node, (ast.GeneratorExp, ast.ListComp)): return again(node.elt)
        if isinstance(node, ast.Starred): return again(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'join': return again(node.args[0])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            f = self.functions[node.func.id]
            return [m for x in ast.walk(f) if isinstance(x, (ast.Return, ast.Yield)) and self.around(x) is f for m in self.messages(x.value, f, depth+1)]
        if isinstance(node, ast.Name): return [m for x in self.given(node.id, scope) for m in again(x)] or ['{'+node.id+'}']
        if isinstance(node, ast.Constant) and not isinstance(node.value, str): return []
        return [render(node, lambda name: self.given(name, scope))]

    def given(self, name, scope):
        "What a name is set to, or a list of that name gets, in a function; or in the module."
        return next((found for part in (scope, self.tree) if part and (found := self.names(part).get(name))), [])

    @cache
    def names(self, part):
        "{name: every expression that it is set to, or that is put into a list of that name} in a part of the tree."
        found = {}
        def add(to, *values):
            if isinstance(to, ast.Name): found.setdefault(to.id, []).extend(values)
            if isinstance(to, ast.Tuple) and isinstance(values[0], ast.Tuple): [add(n, v) for n, v in zip(to.elts, values[0].elts)]
        for x in self.nodes if part is self.tree else ast.walk(part):
            if isinstance(x, ast.Assign): [add(to, x.value) for to in x.targets]
            if isinstance(x, (ast.AugAssign, ast.NamedExpr)): add(x.target, x.value)
            if isinstance(x, ast.Call) and isinstance(x.func, ast.Attribute) and x.func.attr in ('append', 'extend'): add(x.func.value, *x.args)
        return found

    def errors(self):
        for x in self.nodes:
            if not (isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.func.id in self.kinds and x.args): continue
            for m in self.messages(x.args[0], self.around(x)):
                if len(re.findall(r'[a-z]{2,}', re.sub(r'\{[^}]*\}', '', m))) > 2: yield Error(self.name, x.func.id, self.where(x), m)   # not what only passes on another's message


def sources(): return sorted(p for p in LIB.rglob('*.py') if p.name != '_modidx.py')


@cache
def kinds():
    "The names of the project's error classes."
    found, classes = set(FIRST), [c for p in sources() for c in re.findall(r'^class ([A-Za-z]\w*)\((.*?)\)', p.read_text(encoding='utf-8'), re.M)]
    for _ in range(4): found |= {name for name, bases in classes if found & set(re.split(r'\W+', bases))}
    return found


@cache
def errors():
    "Every error that the package can raise, in the order of its modules."
    return sorted({e for p in sources() for e in Module(p, kinds()).errors()})


def cell(text): return re.sub(r'([|<>*_`\\$\[\]])', r'\\\1', text)


def page():
    "The table of all of them in Markdown."
    parts, found = [], errors()
    for module in dict.fromkeys(e.module for e in found):
        rows = [(e.kind, *e.parts) for e in found if e.module == module]
        name = 'gradsentry_nb' if module == '__init__' else module
        parts.append('\n'.join([f'### `{name}`', '', '| error | what is wrong | what to do |', '|---|---|---|', *(f'| {k} | {cell(wrong)} | {cell(do)} |' for k, wrong, do in rows)]))
    return '\n\n'.join(parts)


if __name__ == '__main__':
    found = errors()
    for e in found:
        if not e.says: print(f'{e.module}.{e.where}: {e.message}')
    print(f'{sum(not e.says for e in found)} of {len(found)} messages do not say what to do')
