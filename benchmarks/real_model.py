"""Identification with a pretrained model of real size: the paper's grid and the hard suite, benchmarks/results/real_model.csv.

    python -m benchmarks.real_model NAME [--data DIR] [--device cuda] [--dtype bfloat16] [--limit 2000] [--seeds 201 202 203]

NAME is a folder or a hub name. Rows come from DIR (files NAME-test.jsonl.gz with question, answers, context) or from the hub. Each row of the table names
model, machine and versions. The stored table is empty until someone has run this: no result of a pretrained model of real size is known."""
import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from gradsentry_nb.core import GradSentryError
from gradsentry_nb.experiment import experiment_grid, run_grid
from gradsentry_nb.qa import QA_SETS, load_qa
from gradsentry_nb.sentry import load_model

STORED = Path(__file__).resolve().parent/'results'/'real_model.csv'
DEFENCES = ('gradsentry', 'gradsentry_paper', 'graceful', 'loss', 'window_loss', 'answer_length', 'answer_ngrams', 'association')
COLUMNS = ('part', 'model', 'dataset', 'attack', 'payload', 'rate', 'seed', 'defence', 'status', 'reason', 'rows', 'planted', 'recall', 'precision', 'f1', 'fpr', 'auroc', 'best_f1',
           'separated', 'cut', 'dtype', 'machine', 'versions')


def machine():
    "What this ran on, in words."
    return f'{torch.cuda.get_device_name()} ({platform.machine()})' if torch.cuda.is_available() else f'{platform.machine()} CPU, {torch.get_num_threads()} threads'


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('name', metavar='NAME', help='a causal language model: folder or hub name')
    ap.add_argument('--data', help='folder with the question files (default: the hub)')
    ap.add_argument('--sets', nargs='+', default=list(QA_SETS), choices=list(QA_SETS))
    ap.add_argument('--device'), ap.add_argument('--dtype', default='auto')
    ap.add_argument('--limit', type=int, help='rows of each set')
    ap.add_argument('--seeds', nargs='+', type=int, default=[201, 202, 203])
    ap.add_argument('--parts', nargs='+', default=['table2', 'table8', 'hard'], choices=['table2', 'figure4', 'table8', 'dilution', 'hard'])
    ap.add_argument('--work', type=Path, default=Path('gradsentry-runs/real_model'), metavar='DIR', help='finished cells; a killed run goes on from here')
    ap.add_argument('--out', type=Path, default=STORED, metavar='FILE', help='the table; rows of other models in it stay (default: the stored one)')
    a = ap.parse_args(argv)
    try: table = run(a)
    except GradSentryError as e: sys.exit(f'real_model: {e}')
    before = pd.read_csv(a.out) if a.out.exists() else pd.DataFrame(columns=COLUMNS)
    pd.concat([before[before['model'] != a.name], table] if len(before) else [table]).to_csv(a.out, index=False)
    print(table.groupby(['part', 'dataset', 'attack', 'payload', 'defence'], sort=False)[['auroc', 'recall', 'f1']].mean().round(3).to_string())


def run(a):
    "The table of one model."
    model, tokenizer = load_model(a.name, a.device, a.dtype)
    sets = {n: load_qa(n, 'test', a.data, form='train', limit=a.limit) for n in a.sets}
    tables = [run_grid(experiment_grid(p, seeds=a.seeds, defences=DEFENCES), {a.name: (model, tokenizer)}, sets, a.work/p).assign(part=p) for p in a.parts]
    table = pd.concat(tables, ignore_index=True).assign(dtype=str(model.dtype).removeprefix('torch.'), machine=machine(),
                                                        versions=' '.join(f'{p} {version(p)}' for p in ('torch', 'transformers')))
    return table.reindex(columns=COLUMNS)


if __name__ == '__main__': main()
