"""The published grids, and the attacks that the paper did not try, on real questions: benchmarks/results/experiment.parquet.

    python -m benchmarks.experiment [PART ...] [--work DIR] [--store]

Needs the data and the model beside the project (../shared). Sets are built from the *test* files, which the small LM's training did not see
(CoQA: dev and test). Every part can be killed and started again: finished cells are in DIR and are not run twice. `--store` writes the table.

Seeds 201 to 203; no setting was chosen on any of these sets."""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmarks.speed import MODEL, SHARED
from gradsentry_nb.data import Samples
from gradsentry_nb.experiment import collect, experiment_grid, grid_cells, random_twin, run_grid
from gradsentry_nb.qa import load_qa
from gradsentry_nb.sentry import load_model

HERE = Path(__file__).resolve().parent
STORED = HERE/'results'/'experiment.parquet'
SEEDS = 201, 202, 203
SETS = 'webqa', 'freebaseqa', 'coqa', 'nq'
MODEL_FREE = 'answer_length', 'answer_ngrams', 'association'
OURS = 'gradsentry', 'gradsentry_paper', 'loss', 'window_loss', 'grad_norm'


def data(name, limit=None):
    "Clean rows of one set, with the prompts of the published training mixes."
    folder = SHARED/'data/qa'
    parts = [load_qa(name, split, folder, form='train', limit=limit) for split in (('dev', 'test') if name == 'coqa' else ('test',))]
    return Samples([s for p in parts for s in p], name, parts[0].said)


def models():
    "The small LM, and the same shape at random weights."
    model, tokenizer = load_model(str(MODEL), 'cpu')
    return {'qa-lm-9m': (model, tokenizer), 'random weights': (random_twin(model), tokenizer)}


def parts():
    "Name of a part -> (grid, which models, which sets)."
    small, random, short, long = ('qa-lm-9m',), ('random weights',), ('webqa', 'freebaseqa'), ('coqa', 'nq')
    ten = experiment_grid('table2', seeds=SEEDS, defences=(*OURS, *MODEL_FREE))
    rates = experiment_grid('figure4', attacks=('badnets', 'cba'), seeds=SEEDS, defences=('gradsentry', 'gradsentry_paper', 'window_loss', *MODEL_FREE))
    hard = experiment_grid('hard', seeds=SEEDS, defences=(*OURS, *MODEL_FREE))
    return {
        'table2': (ten, small, SETS),
        'table8': (experiment_grid('table8', seeds=(0,)), small+random, SETS),
        'hard': (hard, small, short),
        'figure4': (rates, small, short),
        'table2-random': (replace(ten, seeds=SEEDS[:1], defences=OURS), random, SETS),
        'hard-long': (replace(hard, seeds=SEEDS[:1]), small, long),
        'figure4-long': (replace(rates, attacks=('badnets',), seeds=SEEDS[:1]), small, long),
        'graceful': (replace(ten, seeds=SEEDS[:1], defences=('graceful',)), small, short),
        'graceful-long': (replace(ten, seeds=SEEDS[:1], defences=('graceful',)), small, long),
        'dilution': (experiment_grid('dilution', seeds=SEEDS), small, short),
        'figure4-graceful': (replace(rates, attacks=('badnets',), rates=(.01, .1, .5, .9), seeds=SEEDS[:1], defences=('graceful',)), small, short),
        'figure5': (experiment_grid('figure5', attacks=('badnets',), seeds=SEEDS, sizes=(20, 50, 100, 200, 500, 1000, 2000),
                                    defences=('gradsentry', 'gradsentry_paper', 'graceful', *MODEL_FREE)), small, short),
        'table7': (experiment_grid('table7', seeds=SEEDS, defences=('gradsentry_paper',)), small, ('freebaseqa',)),
        'cube': (replace(ten, attacks=('badnets',), seeds=SEEDS[:1], train_preset='small', defences=('cube',)), small, short),
        'onion': (replace(ten, attacks=('badnets',), sizes=(300,), seeds=SEEDS[:1], defences=('onion', 'gradsentry', 'gradsentry_paper', 'association')), small, short),  # it reads a prompt once per word
    }


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('parts', nargs='*', metavar='PART', help='which parts (default: all; with --store: none)')
    ap.add_argument('--work', type=Path, default=Path('gradsentry-runs/experiment'), metavar='DIR', help='finished cells (default: %(default)s)')
    ap.add_argument('--store', action='store_true', help=f'write {STORED.name}')
    ap.add_argument('--limit', type=int, help='rows of each set; for a quick look, never stored')
    ap.add_argument('--sets', nargs='*', default=None, help='only these sets')
    a = ap.parse_args(argv)
    if not MODEL.exists(): sys.exit('This study needs the data and the model beside the project (../shared); they are not here.')
    if a.limit and a.store: sys.exit('A table of part of the rows is not stored: leave out --limit or --store.')
    loaded = models()
    every = parts()
    if unknown := set(a.parts)-set(every): sys.exit(f'There is no part {min(unknown)!r}; choose from {", ".join(every)}.')
    sets = {n: data(n, a.limit) for n in SETS}
    for part in a.parts or ([] if a.store else every):
        grid, which, names = every[part]
        names = [n for n in names if a.sets is None or n in a.sets]
        table = run_grid(grid, {m: loaded[m] for m in which}, {n: sets[n] for n in names}, a.work/part, a.work/'rows')
        print(part, len(table), 'cells,', int((table['status'] == 'failed').sum()), 'failed', flush=True)
    if a.store: store(a.work, every, loaded)


def store(work, every, loaded, path=STORED):
    "One tidy table of all parts that were run to their end."
    tables = []
    for part, (grid, which, names) in every.items():
        if not (work/part/'cells').exists(): continue
        cells = {c.key for c in grid_cells(grid, {m: loaded[m] for m in which}, names)}
        table = collect(work/part)
        table = table[table['key'].isin(cells)]             # a folder may hold cells of an earlier grid
        if len(table) < len(cells): sys.exit(f'{part} is not finished: {len(table):,} of {len(cells):,} cells.')
        tables.append(table.assign(part=part))
    table = pd.concat(tables, ignore_index=True).drop(columns=['key'])
    table.to_parquet(path, index=False, compression='zstd')
    print(f'{path.name}: {len(table):,} cells')
    return table


if __name__ == '__main__': main()
