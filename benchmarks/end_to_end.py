"""Fine-tuning behind a scan, end to end, with the embedded model: benchmarks/results/end_to_end.csv.

    python -m benchmarks.end_to_end [--methods lora full] [--seeds 201 202 203] [--defences ...] [--small] [--out FILE]

The embedded set: 1,200 training questions of which BadNets plants 10 %, and 1,200 other questions for the test. Each seed draws both anew. Trained on the
clean rows (`clean`), on all rows (`none`), and on what a detector keeps. CACC: clean test questions answered right; ASR: triggered test questions answered with the payload.
Settings (the preset `small`) were chosen on seeds below 201."""
import argparse
import time
from pathlib import Path

import pandas as pd

from gradsentry_nb.data import Samples, load_samples
from gradsentry_nb.demo import demo_model, demo_rows
from gradsentry_nb.experiment import DataSet, Grid, run_grid

STORED = Path(__file__).resolve().parent/'results'/'end_to_end.csv'
ARMS = 'clean', 'none', 'gradsentry'


def data(seed, train=1200, test=1200):
    "Clean training rows and test rows that are none of them."
    rows = load_samples(demo_rows(train+test, 0, seed)[0])
    return DataSet(Samples(rows[:train], 'demo'), Samples(rows[train:], 'demo test'))


def run(methods, seeds, defences, train=1200, test=1200, out=None, tokens=128, preset='small', progress=True):
    "One row per method, seed and defence."
    model, tables = demo_model(), []
    for method in methods:
        for seed in seeds:
            start = time.perf_counter()
            grid = Grid(defences=defences, seeds=(seed,), train=method, train_preset=preset, max_new_tokens=tokens)
            tables.append(run_grid(grid, {'embedded': model}, {f'demo {seed}': data(seed, train, test)}, out and Path(out)/f'{method}-{seed}', progress=progress))
            print(f'{method}, seed {seed}: {time.perf_counter()-start:.0f} s', flush=True)
    return pd.concat(tables, ignore_index=True)


def bars(table):
    "The differences that are asked for, in points of accuracy, for each method and seed."
    rows = []
    for (method, seed), t in table.groupby(['train', 'seed'], sort=False):
        at = t.set_index('defence')
        rows.append(dict(method=method, seed=seed, clean_cacc=100*at.cacc['clean'], none_asr=100*at.asr['none'], none_cost=100*(at.cacc['clean']-at.cacc['none']),
                         filtered_asr=100*at.asr['gradsentry'], filtered_cost=100*(at.cacc['clean']-at.cacc['gradsentry'])))
    return pd.DataFrame(rows).round(2)


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--methods', nargs='+', default=['lora', 'full'], choices=['lora', 'full'])
    ap.add_argument('--seeds', nargs='+', type=int, default=[201, 202, 203])
    ap.add_argument('--defences', nargs='+', default=list(ARMS))
    ap.add_argument('--small', action='store_true', help='one seed, 400 training and 200 test rows')
    ap.add_argument('--work', help='folder for finished cells; a killed run goes on from here')
    ap.add_argument('--out', type=Path, help='where to write the table')
    a = ap.parse_args(argv)
    few = dict(seeds=a.seeds[:1], train=400, test=200) if a.small else dict(seeds=a.seeds)
    table = run(a.methods, defences=a.defences, out=a.work, **few)
    found = bars(table)
    print(found.to_string(index=False))
    if a.out: table.drop(columns=['key']).to_csv(a.out, index=False)


if __name__ == '__main__': main()
