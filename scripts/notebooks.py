"""Run, test and publish the notebooks: `python scripts/notebooks.py run|test|serve|readme [--check] [NOTEBOOK ...]`."""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*(\w[\w-]*):?\s*(.*?)\s*$')
PICTURES = {'image/svg+xml': '.svg', 'image/png': '.png'}


def notebooks():
    "Every notebook of the project, in reading order."
    found = (p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))
    return sorted(found, key=lambda p: (p.parent != NBS, p.as_posix()))


def directives(source):
    "The `#| name: value` lines that open a cell, as a dict."
    marks = {}
    for line in source.splitlines():
        if m := DIRECTIVE.match(line): marks[m[1]] = m[2]
        elif line.strip(): break
    return marks


def skipped(cell):
    "Is this a cell that neither the tests nor a run execute?"
    marks = directives(cell.source)
    return cell.cell_type == 'code' and (marks.get('eval', '').lower() == 'false' or 'notest' in marks)


def environment():
    "The surroundings of a notebook: this checkout's package first, no network, no progress bars in what is stored."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    env = {**os.environ, 'PYTHONPATH': path, 'PYTHONHASHSEED': '0', 'HF_HUB_OFFLINE': '1', 'TQDM_DISABLE': '1',
           'TOKENIZERS_PARALLELISM': 'false', 'PYTHONDONTWRITEBYTECODE': '1'}
    # IN_TEST turns nbdev's commands into silent no-ops.
    return {k: v for k, v in env.items() if k != 'IN_TEST'}


def run(path):
    "Execute one notebook in a fresh kernel and store its outputs."
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    nb = nbformat.read(path, as_version=4)
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = []
    todo = nbformat.v4.new_notebook(cells=[c for c in nb.cells if not skipped(c)], metadata=nb.metadata)
    with tempfile.TemporaryDirectory() as home, open(Path(home)/'kernel.log', 'w+b') as log:
        client = NotebookClient(todo, timeout=1800, kernel_name='python3', record_timing=False,
                                resources={'metadata': {'path': str(path.parent)}})
        try: client.execute(env={**environment(), 'IPYTHONDIR': home}, stderr=log)
        except CellExecutionError as e: return f'{path.relative_to(ROOT)}: {e}'
        except Exception as e:
            log.seek(0)
            return f'{path.relative_to(ROOT)}: {e}\n{log.read().decode(errors="replace")}'
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = list(filter(None, map(portable, cell.outputs)))
    nb.metadata.pop('widgets', None)    # the state of widgets whose views were left out: long, and another at every run
    nbformat.write(nb, path)
    subprocess.run([sys.executable, '-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', '--fname', path],
                   cwd=ROOT, env=environment(), check=True)


def portable(output):
    "An output that still means something without its kernel, or None."
    data = output.get('data', {})
    data.pop('application/vnd.jupyter.widget-view+json', None)
    output.pop('transient', None)
    if str(data.get('text/plain', '')).startswith('Loading weights'): return None  # a progress bar, not a result
    return None if 'data' in output and not data else output


def test(path):
    "Run one notebook's cells the way `nbdev_test` does."
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=['notest'], basepath=ROOT)
    return None if passed else f'{path.relative_to(ROOT)}: a cell failed'


def serve():
    """Run the notebooks whose paths come in, one to a line, and answer each with [failed?, what it said].

    Every run is a fork of this process, which has what notebooks import at hand: a second or two instead of ten."""
    import importlib

    for heavy in ('altair', 'peft', 'scipy.stats', 'sklearn.cluster', 'torch', 'transformers', 'nbdev.test'): importlib.import_module(heavy)
    for line in sys.stdin:
        with tempfile.TemporaryFile('w+', encoding='utf8', errors='replace') as said:
            if not (child := os.fork()):
                for stream in (1, 2): os.dup2(said.fileno(), stream)
                failed = True
                try: failed = bool(error := test(Path(line.rstrip('\n')))); print(error or '')
                finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(failed)
            failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            print(json.dumps([bool(failed), said.read()]), flush=True)


def relink(text):
    "Links written for nbs/index.ipynb, rewritten for a file one folder up."
    def move(m): return m[0] if re.match(r'[a-z]+:|[#/]', m[2]) else m[1]+os.path.normpath(f'nbs/{m[2]}')+m[3]
    return re.sub(r'(\]\()([^)\s]+)(\))', move, text)


def readme():
    "README.md as nbs/index.ipynb has it, and the pictures that it shows: {path: bytes}."
    import base64

    nb = nbformat.read(NBS/'index.ipynb', as_version=4)
    parts, files = [], {}
    for cell in nb.cells:
        marks = directives(cell.source)
        if {'hide', 'default_exp'} & set(marks) or marks.get('include') == 'false': continue
        source = re.sub(r'\A---\n.*?\n---\n', '', cell.source, flags=re.S).strip()
        if cell.cell_type == 'markdown': parts.append(relink(source))
        if cell.cell_type != 'code': continue
        source = '\n'.join(x for x in source.splitlines() if not DIRECTIVE.match(x)).strip()
        if source and marks.get('echo') != 'false': parts.append(f'```python\n{source}\n```')
        for out in [] if marks.get('output') == 'false' else cell.outputs:
            data = out.get('data', {})
            kind = next((k for k in PICTURES if k in data), None)
            if kind:
                name = f'nbs/images/index-{len(files)+1}{PICTURES[kind]}'
                files[name] = data[kind].encode() if kind.startswith('image/svg') else base64.b64decode(data[kind])
                parts.append(f'![]({name})')
            elif 'text/markdown' in data: parts.append(relink(data['text/markdown'].strip()))
            elif text := out.get('text') or data.get('text/plain'): parts.append(f'```\n{text.rstrip()}\n```')
    note = '<!-- Written from nbs/index.ipynb by `make export`; edit the notebook. -->'
    return {'README.md': ('\n\n'.join([note, *filter(None, parts)])+'\n').encode(), **files}


# ---- tutorials on Colab and Kaggle: badges and the first cell, from the address in settings.ini

WIDGETS = {'live_view', 'spurious_tokens'}   # tutorials that show widgets
PLATFORMS = {'colab': 'https://colab.research.google.com/github/{at}', 'kaggle': 'https://kaggle.com/kernels/welcome?src=https://github.com/{at}'}


def address():
    "The address of the repository and its branch, as settings.ini has them; the first is empty until there is one."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']['git_url'].strip().rstrip('/'), ini['DEFAULT']['branch'].strip()


def badges(name, url, branch):
    "Links that open a tutorial on Colab and on Kaggle; both can only open what lies on GitHub."
    if not (repo := re.fullmatch(r'https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?', url)): return ''
    at = f'{repo[1]}/blob/{branch}/nbs/tutorials/{name}.ipynb'
    return ' '.join(f'[![Open in {k.title()}](../images/open-in-{k}.svg)]({link.format(at=at)})' for k, link in PLATFORMS.items())


def first_cell(name, url):
    "The code that brings the project onto Colab or Kaggle, with the stored tables; without an address it is a zip file of the repository, put there by hand."
    lines = ['#| eval: false', '# Colab and Kaggle: bring the project here and install what is missing. Elsewhere this does nothing.', 'import os, sys',
             "if ('google.colab' in sys.modules or 'KAGGLE_KERNEL_RUN_TYPE' in os.environ) and not os.path.exists('../../settings.ini'):",
             f'    !git clone --quiet --depth 1 {url} gradsentry_nb' if url else '    !python -m zipfile -e gradsentry_nb.zip .',
             '    %cd -q gradsentry_nb/nbs/tutorials', '    %pip install --quiet ../..']
    return '\n'.join(lines+["    if 'google.colab' in sys.modules: from google.colab import output; output.enable_custom_widget_manager()"]*(name in WIDGETS))


def hosted(url=None, branch='main'):
    "Every tutorial with its badges and its first cell: {path: bytes}."
    if url is None: url, branch = address()
    files = {}
    for path in sorted((NBS/'tutorials').glob('*.ipynb')):
        nb = json.loads(path.read_bytes())
        head, first = nb['cells'][:2]
        text = re.sub(r'\n\n\[!\[Open in [^\n]*', '', ''.join(head['source']))
        title, lead, rest = text.split('\n\n', 2)
        head['source'] = '\n\n'.join(filter(None, [title, lead, badges(path.stem, url, branch), rest])).splitlines(keepends=True)
        if first.get('id') != 'hosted': nb['cells'].insert(1, first := dict(cell_type='code', execution_count=None, id='hosted', metadata={}, outputs=[]))
        first['source'] = first_cell(path.stem, url).splitlines(keepends=True)
        files[path.relative_to(ROOT).as_posix()] = (json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False)+'\n').encode()
    return files


def publish(check):
    "Write README.md, its pictures and the first cells of the tutorials, or only say whether they are what the notebook and settings.ini make them."
    made = {**readme(), **hosted()}
    stale = [name for name, new in made.items() if not (ROOT/name).exists() or (ROOT/name).read_bytes() != new]
    if check: return f'{", ".join(stale)}: not what nbs/index.ipynb and settings.ini make of it; run `make export`' if stale else None
    for name in stale:
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(made[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('command', choices=['run', 'test', 'serve', 'readme'])
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: all of them')
    parser.add_argument('--check', action='store_true', help='readme: change nothing, fail when it is out of date')
    args = parser.parse_args()
    if args.command == 'readme': sys.exit(publish(args.check))
    if args.command == 'serve': return serve()
    failed = False
    for path in [p.resolve() for p in args.notebooks] or notebooks():
        print(path.relative_to(ROOT), flush=True)
        if error := (run if args.command == 'run' else test)(path):
            print(error, file=sys.stderr, flush=True)
            failed = True
    sys.exit(failed)


if __name__ == '__main__': main()
