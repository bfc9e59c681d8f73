"""Rows per second and memory of a scan, beside the published procedure and a plain forward pass, in one run.

    python -m benchmarks.speed [--rows N] [--rounds 3] [--out benchmarks/results/speed.csv]

Each round takes another share of the rows and runs all methods on it, one after the other, so that whatever else the machine does
hits all of them. Ratios are of the totals; the range over the rounds is printed beside them."""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from benchmarks.reference import plain_forward, published_entropy
from gradsentry_nb.capture import Capture
from gradsentry_nb.core import Sample
from gradsentry_nb.data import Samples, encode_samples, load_samples
from gradsentry_nb.sentry import load_model
from gradsentry_nb.spectrum import row_grams, statistics

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'
MIX, MODEL = SHARED/'data/qa/published-webqa-badnets-10.jsonl.gz', SHARED/'models/qa-lm-9m'


def scan(model, encoded, share):
    "Capture and all statistics of the default preset."
    grams = [row_grams(f) for _, f in Capture(model, share=share)(encoded)]
    for i in range(0, len(grams), 256): statistics(grams[i:i+256])


def forward_only(model, encoded, share):
    "Capture without statistics, for the shares of time."
    for _ in Capture(model, share=share)(encoded): pass


METHODS = {
    'published procedure (batch 1, dense gradient, crop, low-rank SVD)': published_entropy,
    'plain batched forward pass': plain_forward,
    'ours, no prefix sharing': lambda m, e: scan(m, e, False),
    'ours, shared prefix': lambda m, e: scan(m, e, True),
    'ours, shared prefix, capture without statistics': lambda m, e: forward_only(m, e, True),
}


def speed(n, rounds):
    "A table of rows per second and ratios."
    torch.set_num_threads(2)
    model, tokenizer = load_model(str(MODEL), 'cpu')
    rows = encode_samples(load_samples(MIX, limit=n), tokenizer)
    for f in METHODS.values(): f(model, rows[:64])  # warm up
    times = {name: [] for name in METHODS}
    for r in range(rounds):
        part = rows[r::rounds]
        for name, f in METHODS.items():
            start = time.perf_counter(); f(model, part); times[name].append(time.perf_counter()-start)
            print(f'round {r+1}/{rounds}: {name}: {len(part)/times[name][-1]:.0f} rows/s', file=sys.stderr, flush=True)
    t = pd.DataFrame(times)
    names = list(METHODS); pub, plain = names[:2]
    spread = lambda a, b: f'{(t[a]/t[b]).min():.2f}-{(t[a]/t[b]).max():.2f}'
    return pd.DataFrame([dict(method=m, rows=len(rows), rows_per_second=round(len(rows)/t[m].sum(), 1),
                              times_faster_than_published=round(t[pub].sum()/t[m].sum(), 2), range_published=spread(pub, m),
                              time_over_plain_forward=round(t[m].sum()/t[plain].sum(), 3), range_plain=spread(m, plain)) for m in names])


MEMORY = '''
import json, resource, sys, torch
from pathlib import Path
from benchmarks.speed import MIX, MODEL, many
from gradsentry_nb.sentry import Sentry
def rss(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])/1024
torch.set_num_threads(2)
sentry = Sentry.from_pretrained(str(MODEL), device='cpu', preset=sys.argv[2])
base = rss('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
verdict = sentry.filter(many(int(sys.argv[1])), progress=False)
print(json.dumps(dict(preset=sys.argv[2], rows=len(verdict.scores), model_loaded_mb=round(base), peak_growth_mb=round(rss('VmHWM')-base))))
'''


def many(n):
    "n rows made of the mix; a repeated row gets another number in its question."
    base = load_samples(MIX)
    return Samples([Sample(f'{s.id}-{i}', s.prompt.replace('\n\n\n\n### Answer', f' ({i//len(base)})\n\n\n\n### Answer') if i >= len(base) else s.prompt, s.response, i, None, s.raw)
                    for i, s in ((i, base[i % len(base)]) for i in range(n))], 'the mix, repeated')


def memory(sizes=(1000, 20000)):
    "Growth of resident memory over the loaded model while a whole scan runs, each in a process of its own."
    run = lambda n, preset: json.loads(subprocess.run([sys.executable, '-c', MEMORY, str(n), preset], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return pd.DataFrame([run(n, preset) for preset in ('default', 'paper') for n in sizes])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--out', type=Path, help='also write the tables as DIR/speed.csv and DIR/memory.csv')
    args = parser.parse_args()
    if not MODEL.exists(): sys.exit('The benchmark needs the data and the model beside the project (../shared); they are not here.')
    tables = dict(speed=speed(args.rows, args.rounds), memory=memory())
    for name, t in tables.items():
        print(f'\n{t.to_string(index=False)}')
        if args.out: args.out.mkdir(parents=True, exist_ok=True); t.to_csv(args.out/f'{name}.csv', index=False)


if __name__ == '__main__': main()
