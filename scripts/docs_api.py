"""What an exported cell offers to its readers, read from its source text alone: signatures and tables of docments, in MyST Markdown."""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field

SPAN = re.compile(r'(?<!`)`([^`\n]+)`(?!`)')
HEADS = 'parameter', 'type', 'default', 'what it is'


@dataclass
class Parameter:
    name:str
    type:str = ''
    default:str = ''
    doc:str = ''


@dataclass
class Entry:
    "A function, class, method or constant."
    kind:str                                     # a directive of Sphinx's Python domain: 'function', 'class', 'data'
    name:str
    doc:str = ''
    parameters:list = field(default_factory=list)
    returns:Parameter|None = None
    bases:list = field(default_factory=list)
    options:tuple = ()                           # of the directive
    members:list = field(default_factory=list)   # entries of a class


def hidden(name): return name.startswith('_') and name != '__call__'


class Cell:
    "An exported cell's syntax tree with its comments; notebook magics in it are blank lines."
    def __init__(self, source, seen=None):
        self.seen = {} if seen is None else seen           # functions of the cells so far, by name: (their cell, their syntax tree)
        self.source = '\n'.join('' if re.match(r'\s*[%!]', x) else x for x in source.splitlines())+'\n'
        self.body, self.lines = ast.parse(self.source).body, [x.encode() for x in self.source.split('\n')]
        self.tokens = list(tokenize.generate_tokens(io.StringIO(self.source).readline))
        self.comments = {t.start[0]: t.string.lstrip('# ').rstrip() for t in self.tokens if t.type == tokenize.COMMENT}

    def text(self, node, quoted=False):
        "The source of a node in one line; `quoted`: a type that may be in quotes. The standard library's function goes through the whole cell each time."
        if node is None: return ''
        if isinstance(node, ast.Constant) and quoted and isinstance(node.value, str): return node.value
        lines = self.lines[node.lineno-1:node.end_lineno]
        lines[-1] = lines[-1][:node.end_col_offset]
        lines[0] = lines[0][node.col_offset:]
        return ' '.join(b' '.join(lines).decode().split())

    def header_end(self, f):
        "The line with the colon that ends a function's header."
        depth = 0
        for t in self.tokens:
            if t.type != tokenize.OP or t.start[0] < f.lineno: continue
            depth += (t.string in '([{')-(t.string in ')]}')
            if t.string == ':' and not depth: return t.start[0]

    def parameters(self, f, bound):
        "The parameters of a function with their comments; `bound`: without the first, which is the object itself."
        a = f.args
        plain = [*a.posonlyargs, *a.args]
        defaults = [None]*(len(plain)-len(a.defaults))+a.defaults
        every = [('', *x) for x in zip(plain, defaults)][bound:]
        if a.vararg: every.append(('*', a.vararg, None))
        every += [('', *x) for x in zip(a.kwonlyargs, a.kw_defaults)]
        if a.kwarg: every.append(('**', a.kwarg, None))
        last = {(d or x).end_lineno: x.arg for _, x, d in every}         # a comment belongs to the last parameter of its line
        lone = f.lineno == self.header_end(f)
        says = lambda x, d: '' if lone or last[(d or x).end_lineno] != x.arg else self.comments.get((d or x).end_lineno, '')
        return [Parameter(stars+x.arg, self.text(x.annotation, True), self.text(d), says(x, d)) for stars, x, d in every]

    def function(self, f, kind='function', static=False):
        method = kind != 'function'
        names = {self.text(d).split('.')[-1] for d in f.decorator_list}
        entry = Entry(kind, f.name, ast.get_docstring(f) or '', self.parameters(f, method and not static and 'staticmethod' not in names))
        end = self.header_end(f)
        note = self.comments.get(end, '')
        if f.lineno == end and (m := re.match(r'(\w+): *(.*)', note)) and m[1] in [p.name for p in entry.parameters]:
            next(p for p in entry.parameters if p.name == m[1]).doc, note = m[2], ''
        if f.returns or note: entry.returns = Parameter('returns', self.text(f.returns, True), '', note)
        if names & {'property', 'cached_property'}: entry.kind = 'property'
        entry.options = tuple(o for o in ('staticmethod', 'classmethod') if o in names)
        return entry

    def klass(self, c):
        entry = Entry('class', c.name, ast.get_docstring(c) or '', bases=[self.text(b) for b in c.bases])
        if any(b.endswith(('Error', 'Exception', 'Warning', 'Interrupt')) for b in entry.bases): entry.kind = 'exception'
        for x in c.body:
            if isinstance(x, ast.AnnAssign): entry.parameters += self.fields(x)
            if not isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
            if x.name == '__init__': entry.parameters = self.function(x, 'method').parameters
            elif not hidden(x.name): entry.members.append(self.function(x, 'method'))
        return entry

    def fields(self, x):
        "A field of a dataclass as a parameter of it."
        value = self.text(x.value)
        if 'init=False' in value or 'ClassVar' in self.text(x.annotation, True): return []
        if m := re.match(r'field\(.*?\bdefault(?:_factory)?=([^,()]+(?:\(.*?\))?)', value): value = m[1]
        elif value.startswith('field('): value = ''
        return [Parameter(x.target.id, self.text(x.annotation, True), value, self.comments.get(x.end_lineno, ''))]

    def given(self, x):
        "Methods that a class is given after its definition: `Sentry.filter = _filter`."
        target, value = x.targets[0], x.value
        for t, v in zip(target.elts, value.elts) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [(target, value)]:
            if not (isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name)) or t.value.id.startswith('_') or hidden(t.attr): continue
            wrapped = self.text(v.func) if isinstance(v, ast.Call) and v.args else ''
            v = v.args[0] if wrapped in ('property', 'staticmethod') else v
            if isinstance(v, ast.Name) and v.id in self.seen:
                cell, f = self.seen[v.id]
                entry = cell.function(f, 'method', wrapped == 'staticmethod')
            elif isinstance(v, ast.Lambda): entry = Entry('method', t.attr, parameters=[Parameter(a.arg) for a in v.args.args[wrapped != 'staticmethod':]])
            else: continue
            entry.name = f'{t.value.id}.{t.attr}'
            if wrapped == 'property': entry.kind = 'property'
            if wrapped == 'staticmethod': entry.options = ('staticmethod',)
            yield entry

    def constants(self, x):
        targets = x.targets if isinstance(x, ast.Assign) else [x.target]
        names = [n.id for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t]) if isinstance(n, ast.Name)]
        doc = self.comments.get(x.end_lineno) or self.comments.get(x.lineno, '')
        value = self.text(x.value) if x.value is not None and len(names) == 1 and x.lineno == x.end_lineno else ''
        return [Entry('data', n, doc, returns=Parameter('', '', value) if 0 < len(value) <= 100 else None) for n in names]

    def entries(self):
        "What the cell adds to the public names of its module."
        found = []
        for x in self.body:
            if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.seen[x.name] = self, x
                found.append(self.function(x))
            if isinstance(x, ast.ClassDef): found.append(self.klass(x))
            if isinstance(x, (ast.Assign, ast.AnnAssign)): found += self.constants(x)
            if isinstance(x, ast.Assign): found += self.given(x)
        return [e for e in found if not e.name.startswith('_') or e.name == '__version__']

    def imports_only(self): return all(isinstance(x, (ast.Import, ast.ImportFrom)) for x in self.body)


def safe(text):
    "A text of one paragraph in which only `code` means anything: whatever else Markdown or HTML would read into it is escaped."
    parts = SPAN.split(' '.join(text.split()))
    return ''.join(f'`{x}`' if i % 2 else re.sub(r'([!-/:-@\[-`{-~])', r'\\\1', x) for i, x in enumerate(parts))


def code(text):
    "A text as code, whatever it holds."
    if not text: return ''
    fence = '`'*(max(map(len, re.findall('`+', text)), default=0)+1)
    pad = ' ' if '`' in text else ''
    return f'{fence}{pad}{text}{pad}{fence}'


def paragraphs(doc): return '\n\n'.join(map(safe, re.split(r'\n\s*\n', doc)))


def row(cells): return '| '+' | '.join(re.sub(r'(?<!\\)\|', r'\|', x) for x in cells)+' |'


def table(parameters, returns):
    "The docments as a table, without the columns that would be empty."
    lines = [(code(p.name), code(p.type), code(p.default), safe(p.doc)) for p in parameters]
    if returns: lines.append(('*returns*', code(returns.type), '', safe(returns.doc)))
    if not parameters: return f'Returns {code(returns.type)}: {safe(returns.doc)}'.replace(' :', ':').rstrip(': ') if returns else ''
    kept = [i for i in range(4) if not i or any(x[i] for x in lines)]
    if len(kept) == 1: return ''
    pick = lambda cells: row([cells[i] for i in kept])
    return '\n'.join(['{.docments}', pick(HEADS), '|'+'---|'*len(kept), *map(pick, lines)])


def signature(entry):
    "One line, as Python has it."
    if entry.kind in ('data', 'property'): return entry.name
    spelled = lambda p: p.name+(f': {p.type}' if p.type else '')+((f' = {p.default}' if p.type else f'={p.default}') if p.default else '')
    returns = f' -> {entry.returns.type}' if entry.returns and entry.returns.type else ''
    inside = ', '.join(map(spelled, entry.parameters))
    return entry.name if entry.kind == 'exception' and not inside else f'{entry.name}({inside}){returns}'


def markdown(entry, fence=6):
    "An entry as a directive of Sphinx's Python domain; its fences are tildes, because defaults may hold backticks."
    tildes, member = '~'*fence, entry.kind in ('method', 'property')
    options = [f':{o}:' for o in entry.options]
    if entry.kind == 'data' and entry.returns: options.append(f':value: {entry.returns.default!r}' if entry.returns.default[0] in '"\'' else f':value: {entry.returns.default}')
    if entry.kind == 'property' and entry.returns and entry.returns.type: options.append(f':type: {entry.returns.type}')
    parts = [paragraphs(entry.doc)] if entry.doc else []
    if entry.bases: parts.append('Of '+', '.join(map(code, entry.bases))+'.')
    if entry.kind == 'property': parts.append(safe(entry.returns.doc) if entry.returns else '')
    elif entry.kind != 'data':
        returns = entry.returns if entry.returns and (entry.returns.doc or not member) else None     # the type alone is in the signature
        parts.append(table(entry.parameters, returns) if returns or not member or any(p.doc for p in entry.parameters) else '')
    parts += [markdown(m, fence-1) for m in entry.members]
    return '\n'.join([f'{tildes}{{py:{entry.kind}}} {signature(entry)}', *options, '', '\n\n'.join(filter(None, parts)), tildes])
