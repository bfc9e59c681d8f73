"""How long every chart of `gradsentry_nb.charts` takes for 100,000 rows, stored as benchmarks/results/charts.csv.

    python -m benchmarks.charts

Best and worst of five runs on one thread, the first run apart (it loads what drawing needs): building the chart with its specification, and drawing it as SVG
after that. `drawn` is how many values the chart holds after counting and sampling. The promise is two seconds from frame to picture. The last two lines are what a
view does for one of its five updates a second: count or sample, and write the message that a chart on screen takes."""
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd

from gradsentry_nb import charts as c
from gradsentry_nb.core import Cut

OUT = Path(__file__).resolve().parent/'results/charts.csv'
N, RUNS = 100_000, 5


def frames(n=N, seed=0):
    "A scan of n rows with a tenth of them planted, the same rows as a map, and 24 layers of them."
    rng = np.random.default_rng(seed)
    planted = rng.random(n) < .1
    score = np.where(planted, rng.normal(300, 20, n), rng.lognormal(4, .6, n))
    score[rng.random(n) < .001] = np.nan
    f = pd.DataFrame(dict(id=[f'{i:032x}-0' for i in range(n)], row=np.arange(n), score=score, tokens=rng.integers(1, 400, n), loss=rng.gamma(2, 1, n),
                          window_loss=rng.gamma(9, 2, n), grad_norm=rng.lognormal(0, 1, n), ngram_rows=np.where(planted, planted.sum(), rng.integers(0, 5, n))))
    spots = f[['id', 'score']].assign(x=rng.normal(size=n)+3*planted, y=rng.normal(size=n), prompt=[f'the question with number {i}, and some more words' for i in range(n)])
    rows = n//24
    layers = pd.DataFrame(dict(layer=np.repeat([f'model.layers.{i}.mlp.down_proj' for i in range(24)], rows), row=np.tile(np.arange(rows), 24), value=rng.random(24*rows)))
    return f, planted, spots, layers


def drawings(f, planted, spots, layers):
    "name -> how to make the chart from rows."
    cut, x = Cut(190., 'valley', '', dict(peaks=[50., 300.], valley=190.)), f['score'].to_numpy()
    known = x[np.isfinite(x)]
    return {
        'score_histogram': lambda: c.score_histogram(f, cut, 'log_volume'),
        'score_by_length': lambda: c.score_by_length(f, cut, 'log_volume'),
        'score_strip': lambda: c.score_strip(f, cut, 'log_volume'),
        'score_against': lambda: c.score_against(f, 'ngram_rows', cut, 'log_volume'),
        'spectra': lambda: c.spectra({i: known[i:i+64] for i in range(len(known))}),
        'sample_map': lambda: c.sample_map(spots, cut, 'log_volume'),
        'precision_recall': lambda: c.precision_recall(f, planted, cut, ('score', 'tokens', 'loss', 'ngram_rows')),
        'roc': lambda: c.roc(f, planted, cut, ('score', 'tokens', 'loss', 'ngram_rows')),
        'layer_map': lambda: c.layer_map(layers),
        'live_histogram': lambda: c.live_histogram(c.histogram_bins(known), 'log_volume', cut),
        'live_strip': lambda: c.live_strip(c.strip_rows(f, cut.flags(x), 2000), 'log_volume', cut),
        'live_against': lambda: c.live_against(c.scatter_rows(f, 'ngram_rows', 'score', cut.flags(x))[0], 'ngram_rows', 'log_volume', cut),
        'live_map': lambda: c.live_map(c.scatter_rows(spots.assign(row=f['row']), 'x', 'y', cut.flags(x))[0], 'log_volume', cut),
    }


def updates(f, planted, spots, layers):
    "name -> the message for a chart that is on screen."
    x = f['score'].to_numpy(); known, flagged = x[np.isfinite(x)], x > 190
    return {'update of live_histogram': lambda: c.data_update('bins', c.histogram_bins(known)), 'update of live_strip': lambda: c.data_update('rows', c.strip_rows(f, flagged, 2000))}


def values(spec):
    "How many values the specification holds."
    return sum(map(len, spec.get('datasets', {}).values())) + len(spec.get('data', {}).get('values', []))


def measure(name, make, n=N, runs=RUNS):
    "One line of the table."
    build, draw = [], []
    for _ in range(runs+1):
        t = time.perf_counter(); chart = make(); spec = chart.to_dict(); build.append(time.perf_counter()-t)
        t = time.perf_counter(); svg = c.chart_svg(chart); draw.append(time.perf_counter()-t)
    both = np.add(build, draw)[1:]
    return dict(chart=name, rows=n, build_ms=round(1000*min(build[1:])), svg_ms=round(1000*min(draw[1:])), both_ms=round(1000*min(both)), worst_ms=round(1000*max(both)),
                first_ms=round(1000*(build[0]+draw[0])), spec_kB=round(len(json.dumps(spec))/1000), svg_kB=round(len(svg)/1000), drawn=values(spec))


def measure_update(name, make, n=N, runs=RUNS):
    "The same for a message."
    took = []
    for _ in range(runs+1):
        t = time.perf_counter(); text = json.dumps(make()); took.append(1000*(time.perf_counter()-t))
    return dict(chart=name, rows=n, build_ms=round(min(took[1:])), both_ms=round(min(took[1:])), worst_ms=round(max(took[1:])), first_ms=round(took[0]), spec_kB=round(len(text)/1000),
                drawn=len(json.loads(text)[0]['value']))


def main():
    made = frames()
    lines = [measure(*item) for item in drawings(*made).items()] + [measure_update(*item) for item in updates(*made).items()]
    table = pd.DataFrame(lines).astype(dict(svg_ms='Int64', svg_kB='Int64'))
    table.to_csv(OUT, index=False)
    print(table.to_string(index=False))


if __name__ == '__main__': main()
