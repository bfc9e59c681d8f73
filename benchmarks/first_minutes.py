"""How long a newcomer waits: benchmarks/results/first_minutes.csv.

    python -m benchmarks.first_minutes [--store]

Every way starts from a fresh clone of what is committed and a fresh environment. `clone` is `git clone` and `make demo`, until the verdict is printed. `hosted` and `bare` are a notebook that runs in JupyterLab in Chromium, where a cell installs the package and the next one opens the
live view of the demo set, until its charts are drawn: `hosted` has the large packages already, as Colab and Kaggle do; `bare` has JupyterLab alone, and the view is opened in a second notebook on a page of its own, because a page knows only the widgets that were there when it was opened. What pip downloads depends on the network and on what it has downloaded before, so these are minutes of one machine and no promise for another."""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STORED = HERE/'results'/'first_minutes.csv'
TORCH = re.search(r'^torch==\S+', (ROOT/'constraints.txt').read_text(), re.M)[0]
LARGE = 'transformers', 'peft', 'accelerate', 'datasets', 'pyarrow', 'scipy', 'scikit-learn', 'altair', 'ipywidgets', 'anywidget'     # besides torch, what hosted notebooks come with
CELL = '%load_ext gradsentry_nb\n%gs_model demo\nview = %gs_live demo\nview'
DRAWN = "() => [...document.querySelectorAll('.vega-embed svg, .widget-html svg')].some(s => s.checkVisibility() && s.querySelectorAll('path').length > 20)"


def quietly(*command, **more):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, env=env, **more)
    if done.returncode: sys.exit(f'{" ".join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}')
    return done.stdout


def timed(f, *args, **more):
    start = time.monotonic(); out = f(*args, **more)
    return time.monotonic()-start, out


def clone(work):
    "Seconds for `git clone` and for `make demo` in it, and what that says."
    took, _ = timed(quietly, 'git', 'clone', '-q', ROOT, work/'clone')
    made, said = timed(quietly, 'make', 'demo', cwd=work/'clone')
    return took, made, next(line for line in said.splitlines() if 'recall' in line.lower()).strip()


def environment(work, hosted):
    "A fresh environment with JupyterLab."
    quietly(sys.executable, '-m', 'venv', work/'env')
    pip = (work/'env/bin/python', '-m', 'pip', '--disable-pip-version-check', 'install', '-qq')
    if hosted: quietly(*pip, TORCH)
    quietly(*pip, '--constraint', ROOT/'constraints.txt', 'jupyterlab', 'ipykernel', *LARGE*hosted)
    return work/'env/bin/python'


def notebook(work, hosted):
    "Seconds until the cell that installs is done, and until the view is drawn."
    sys.path.insert(0, str(ROOT/'tests'))
    from lab import CHROMIUM, FLAGS, RUN_ALL, Lab, server
    from lab import notebook as cells
    from playwright.sync_api import sync_playwright
    python = environment(work, hosted)
    quietly('git', 'clone', '-q', ROOT, work/'clone')
    install = f'%pip install -qq {TORCH}\n'*(not hosted)+f'%pip install -qq {work/"clone"}\nprint("installed")'
    (work/'lab').mkdir(); (work/'lab/first.ipynb').write_text(cells(install, CELL) if hosted else cells(install)); (work/'lab/second.ipynb').write_text(cells(CELL))
    with server(work/'lab', python=python, PYTHONPATH='') as url, sync_playwright() as p:
        context = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS).new_context(viewport=dict(width=1400, height=1200))
        lab = Lab(context, url).open('first.ipynb', run=False)
        run_all = lambda: lab.page.evaluate(RUN_ALL.replace('await jupyterapp.commands', 'jupyterapp.commands'))     # and do not wait
        start = time.monotonic(); run_all()
        lab.page.locator('.jp-OutputArea-output', has_text='installed').first.wait_for(timeout=900_000)
        middle = time.monotonic()
        if not hosted: lab = Lab(context, url).open('second.ipynb', run=False); run_all()
        lab.page.wait_for_function(DRAWN, timeout=300_000)
        end = time.monotonic()
        lab.page.locator('.widget-html', has_text='done: ').first.wait_for(timeout=120_000)
        done = time.monotonic(); lab.page.wait_for_timeout(1500); lab.shot(Path(tempfile.gettempdir())/f"first-{work.name}.png")
    return middle-start, end-middle, done-end


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--store', action='store_true', help=f'write {STORED.name}')
    ap.add_argument('--ways', nargs='+', choices=('clone', 'hosted', 'bare'), default=('clone', 'hosted', 'bare'))
    a, rows = ap.parse_args(), []
    for way in a.ways:
        with tempfile.TemporaryDirectory(prefix=f'first-{way}-') as work:
            work = Path(work)/way; work.mkdir()
            if way == 'clone': took, made, said = clone(work); steps = [('git clone', took), ('make demo, to the verdict', made)]; print(said)
            else: steps = list(zip(('pip install in a cell', 'the live view, to its first picture', 'all 1,200 rows'), notebook(work, way == 'hosted')))
        rows += [dict(way=way, step=s, seconds=round(x, 1), cores=os.cpu_count()) for s, x in steps]
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
    if a.store:
        new = pd.DataFrame(rows)
        if STORED.exists(): old = pd.read_csv(STORED); new = pd.concat([old[~old['way'].isin(a.ways)], new])
        new.to_csv(STORED, index=False)


if __name__ == '__main__': main()
