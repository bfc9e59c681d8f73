"""What watching costs: benchmarks/results/live.csv.

    python -m benchmarks.live [--rows 1200] [--repeat 7] [--browser] [--out benchmarks/results]

Side by side in one run, in turns: a silent scan in the main thread, the same in a thread that nobody watches, and under a dashboard (live renderer; without a browser, so what is
measured is the kernel's share); with the demo model and, where ../shared is there, with qa-lm-9m and the published WebQA mix.
Then the time from a moved slider to everything the kernel has to do about it, at 1,000, 10,000 and 100,000 rows, with the truth in hand; the memory of a process
that has run the dashboard's cell twenty times; and, with --browser, the time from a key on the slider to the rule and to the counts on screen, in JupyterLab under Chromium.
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd

from gradsentry_nb.board import LiveScan
from gradsentry_nb.core import Cut, Scores, Verdict
from gradsentry_nb.data import load_samples
from gradsentry_nb.demo import demo_model, demo_samples
from gradsentry_nb.sentry import Scan, Sentry
from gradsentry_nb.widgets import NUMBERS, dashboard, view

SLIDES = 1000, 10_000, 100_000


def settings(n):
    "(name, sentry, samples, truth) of what is scanned."
    yield 'demo model', Sentry(*demo_model()), *demo_samples(n, seed=11)
    shared = Path(__file__).resolve().parent.parent.parent/'shared'
    if shared.is_dir():
        samples = load_samples(shared/'data/qa/published-webqa-badnets-10.jsonl.gz')[:n]
        yield 'qa-lm-9m', Sentry.from_pretrained(shared/'models/qa-lm-9m'), samples, {s.id: False for s in samples}


def overhead(n, repeat):
    "Seconds from the first batch to the last, in turns."
    for name, sentry, samples, truth in settings(n):
        list(Scan(sentry, samples[:100]))
        for i in range(repeat):
            scan, start = Scan(sentry, samples), time.perf_counter(); list(scan)
            took = {'scan alone': time.perf_counter()-start, 'scan in a thread': LiveScan(sentry, samples, every=1e9).start().wait().seconds}
            d = dashboard(sentry, samples, truth, renderer='live', start=False)
            start = time.perf_counter(); d.live.start().wait()
            took |= {'scan under a dashboard': d.live.seconds, 'dashboard from start to verdict': time.perf_counter()-start}
            yield from (dict(what=f'{what}, {name}', rows=n, run=i, value=x, unit='s') for what, x in took.items())


def big_view(n):
    "A view of n made-up scores."
    rng = np.random.default_rng(n)
    samples = load_samples([dict(prompt=f'question {i}', response=f'answer {i}') for i in range(n)])
    score = np.where(rng.random(n) < .1, rng.normal(200, 20, n), rng.gamma(1, 20, n))
    frame = pd.DataFrame(dict(id=[s.id for s in samples], row=range(n), score=score, tokens=rng.integers(1, 60, n), problem=None, ngram_rows=1, ngram='', **{c: score for c in NUMBERS}))
    return view(Verdict(Scores(frame, dict(statistic='log_volume')), Cut(20., 'fixed', '')), samples, truth={s.id: x > 150 for s, x in zip(samples, score)}, renderer='live')


def slides(repeat):
    "Milliseconds from a moved slider to the last message that the kernel sends."
    for n in SLIDES:
        v = big_view(n)
        for i in range(repeat):
            start = time.perf_counter(); v.slider.value = 300+40*i
            yield dict(what='slider moved', rows=n, run=i, value=1000*(time.perf_counter()-start), unit='ms')


SEEN = """async () => { const rule = () => [...document.querySelectorAll('.vega-embed svg .mark-rule.role-mark line')].map(x => x.getAttribute('transform')).join();
  const counts = () => [...document.querySelectorAll('.widget-html')].map(x => x.textContent).find(x => x.includes('rows above the cut'));
  const before = [rule(), counts()], start = performance.now(), out = [null, null];
  document.querySelector('.noUi-handle').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: true}));
  while (performance.now()-start < 10000 && out.includes(null)) { await new Promise(requestAnimationFrame);
    [rule(), counts()].forEach((x, i) => { if (out[i] === null && x !== before[i]) out[i] = performance.now()-start }) }
  return out }"""


def on_screen(repeat):
    "Milliseconds from a key on the slider to the moved rule and to the new counts, in a real page."
    import sys
    import tempfile
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root/'tests'))
    from lab import browser, notebook, server
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for n in SLIDES: (folder/f'{n}.ipynb').write_text(notebook(f'from benchmarks.live import big_view\nv = big_view({n})\nv'))
        with server(folder) as url, browser(folder, url) as b:
            for n in SLIDES:
                b.open(f'{n}.ipynb')
                b.page.wait_for_selector('.gs-table table', timeout=120_000); b.page.wait_for_timeout(3000)
                for i in range(repeat+1):
                    rule, counts = b.page.evaluate(SEEN); b.page.wait_for_timeout(1500)
                    if i: yield from (dict(what=w, rows=n, run=i-1, value=x, unit='ms') for w, x in (('slider to rule on screen', rule), ('slider to counts on screen', counts)))
                b.save()


def resident():
    with open('/proc/self/status') as f: return next(int(line.split()[1])/1024 for line in f if line.startswith('VmRSS'))


def memory(times=20, n=1000):
    "Resident megabytes after each run of a dashboard's cell."
    sentry, (samples, truth) = Sentry(*demo_model()), demo_samples(n, seed=12)
    for i in range(times):
        d = dashboard(sentry, samples, truth, renderer='live'); d.live.wait()
        yield dict(what='memory after the cell', rows=n, run=i, value=resident(), unit='MB')


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--rows', type=int, default=1200)
    ap.add_argument('--repeat', type=int, default=7)
    ap.add_argument('--times', type=int, default=20)
    ap.add_argument('--browser', action='store_true')
    ap.add_argument('--out', type=Path)
    a = ap.parse_args(argv)
    table = pd.DataFrame([*overhead(a.rows, a.repeat), *slides(a.repeat), *memory(a.times), *(on_screen(a.repeat) if a.browser else ())])
    print(table.groupby(['what', 'rows', 'unit'])['value'].agg(['median', 'min', 'max']).round(3).to_string())
    w = table.pivot_table(index='run', columns='what', values='value')
    for name in sorted({c.rpartition(', ')[2] for c in w if c.startswith('scan')}):
        for what in ('scan in a thread', 'scan under a dashboard'):
            print(f'{what}, {name}, against alone, %:', ((w[f'{what}, {name}']/w[f'scan alone, {name}']-1)*100).dropna().round(1).tolist())
    if a.out: table.assign(cores=os.cpu_count()).round(4).to_csv(a.out/'live.csv', index=False)
    return table


if __name__ == '__main__': main()
