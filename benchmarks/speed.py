"""Rows per second and memory of a scan, beside the published procedure and a plain forward pass, in one run.

    python -m benchmarks.speed [--rows N] [--rounds 2] [--tokens N] [--out benchmarks/results]

Each round runs all methods, one after the other, so that whatever else the machine does hits all of them. Ratios are of the totals; the range over the rounds is printed beside them. Then the same for made sets: prompts of 64, 256
and 1,024 tokens of which 0, 50 or 90 % are the same in every row, and the mix under three instructions. There a round takes all rows (a prefix is
computed once a set), and the published procedure a few.

The line `floor` of a set is what its operations alone would take: every distinct beginning of a row once, the projection at the supervised tokens,
at the matrix rate that this machine kept up for a second before and a second after our own run of the same round. The best of a few products will not do: here it is
now 110, now 190 billion operations a second, as the machine's other guests have it. `time_over_floor` is what stands beside it. A second floor takes the rate of products of the
model's own layers with one batch: small ones do not reach the rate of a square of 1,024.

The mix is run whole in every round, because two threads share a scan only where it is long enough."""
import argparse
import json
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from benchmarks.reference import plain_forward, published_entropy
from gradsentry_nb import capture
from gradsentry_nb.capture import Capture, head_of, linear_layers
from gradsentry_nb.core import Encoded, Sample
from gradsentry_nb.data import Samples, common_prefix, encode_samples, load_samples
from gradsentry_nb.sentry import load_model
from gradsentry_nb.spectrum import row_roots, statistics

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'
MIX, MODEL = SHARED/'data/qa/published-webqa-badnets-10.jsonl.gz', SHARED/'models/qa-lm-9m'


def scan(model, encoded, share):
    "Capture and all statistics of the default preset."
    roots = [r for _, r in Capture(model, share=share)(encoded, row_roots)]
    for i in range(0, len(roots), 256): statistics(roots[i:i+256])


def forward_only(model, encoded, share):
    "Capture without statistics, for the shares of time."
    for _ in Capture(model, share=share)(encoded, lambda f: None): pass


METHODS = {
    'published procedure (batch 1, dense gradient, crop, low-rank SVD)': published_entropy,
    'plain batched forward pass': plain_forward,
    'ours, no prefix sharing': lambda m, e: scan(m, e, False),
    'ours, shared prefix': lambda m, e: scan(m, e, True),
    'ours, shared prefix, capture without statistics': lambda m, e: forward_only(m, e, True),
}


PUBLISHED, PLAIN, NONE, OURS, _ = METHODS
FLOOR, OWN = 'floor: the operations at the measured matrix rate', 'floor at the rate of products of the model\'s own sizes'


# ---- what cannot be saved

def operations(model, encoded, shared=True):
    "Floating-point operations of a scan in which every distinct beginning of a row is computed once (or, not shared, in every row), and the projection at supervised tokens only."
    head, order = head_of(model), sorted(encoded, key=lambda e: e.ids.tolist())
    known, stop = np.array([0, *map(common_prefix, zip(order, order[1:]))])*shared, np.array([e.last for e in order])
    context = (stop*(stop+1)-known*(known+1)).sum()/2              # keys that the new tokens look at
    weights = sum(m.weight.numel() for m in map(model.get_submodule, linear_layers(model)) if m is not head)
    return 2*weights*(stop-known).sum() + 4*model.config.hidden_size*model.config.num_hidden_layers*context + 2*head.weight.numel()*sum(e.tokens for e in encoded)


def matrix_rate(n=1024, seconds=1.):
    "Floating-point operations per second of products of float32 matrices, kept up for some time."
    x, times, start = torch.randn(n, n), 0, time.perf_counter()
    while not times or time.perf_counter()-start < seconds: x@x; times += 1
    return 2*n**3*times/(time.perf_counter()-start)


def own_rate(model, seconds=.5):
    "As `matrix_rate`, for the products of a batch with the model's linear layers, one after the other."
    layers, n = [m.weight.detach() for m in map(model.get_submodule, linear_layers(model)) if m is not head_of(model)], Capture(model).budget
    inputs, done, start = {w.shape[1]: torch.randn(n, w.shape[1]) for w in layers}, 0, time.perf_counter()
    with torch.no_grad():
        while not done or time.perf_counter()-start < seconds:
            for w in layers: torch.nn.functional.linear(inputs[w.shape[1]], w); done += 2*n*w.numel()
    return done/(time.perf_counter()-start)


def shares(model, encoded):
    "Where the time of a scan goes, as shares of 1; of two cores' time where two threads share it."
    spent, threads, one = dict.fromkeys(('transformer', 'head', 'spectrum'), 0.), set(), threading.Lock()
    def watched(part, f):
        def call(*args):
            start = time.perf_counter()
            try: return f(*args)
            finally:
                with one: spent[part] += time.perf_counter()-start; threads.add((part, threading.get_ident()))
        return call
    parts = dict(hidden_states='transformer', prefix_cache='transformer', factor_rows='head')
    start = time.perf_counter()
    with patch.multiple(capture, **{f: watched(part, getattr(capture, f)) for f, part in parts.items()}):
        roots = [r for _, r in Capture(model)(encoded, watched('spectrum', row_roots))]
        for i in range(0, len(roots), 256): watched('spectrum', statistics)(roots[i:i+256])
    total = (time.perf_counter()-start)*sum(part == 'transformer' for part, _ in threads)
    return {**{k: v/total for k, v in spent.items()}, 'rest': 1-sum(spent.values())/total}


# ---- sets

def prompts(pool, tokens, share, n):
    "n rows with prompts of `tokens` tokens of real text, the first `share` of them the same, and the answers of `pool`."
    text, same = np.concatenate([e.ids for e in pool]), int(tokens*share)
    def one(i):
        e = pool[i % len(pool)]
        own = np.resize(np.roll(text, -(i+1)*tokens), tokens-same)
        return Encoded(np.r_[np.resize(text, same), own, e.ids[e.supervised]], np.r_[np.zeros(tokens, bool), np.ones(e.tokens, bool)])
    return [one(i) for i in range(n)]


def instructed(pool, k=3):
    "The rows under k instructions in turn: the one that they have, its tokens in other orders."
    P = common_prefix(pool)
    return [Encoded(np.r_[np.roll(e.ids[:P], i % k), e.ids[P:]], e.supervised) for i, e in enumerate(pool)]


def sets(pool, tokens):
    "name -> (rows, tokens of the longest prompt)."
    grid = {f'{n:,} tokens, {share:.0%} shared': (prompts(pool, n, share, max(4, min(1024, tokens//n))), n) for n in (64, 256, 1024) for share in (0, .5, .9)}
    return {**grid, 'the mix under three instructions': (instructed(pool[:max(12, min(1024, tokens//64))]), 72)}


# ---- tables

def peak(f, *args):
    "(seconds, megabytes resident at the peak) of a call."
    status = Path('/proc/self')
    if status.exists(): (status/'clear_refs').write_text('5')
    start = time.perf_counter(); f(*args); seconds = time.perf_counter()-start
    lines = (status/'status').read_text().splitlines() if status.exists() else []
    return seconds, next((int(l.split()[1])/1024 for l in lines if l.startswith('VmHWM')), np.nan)


def side_by_side(model, name, methods, parts):
    "Rows per second of `methods`, each a function and how many rows of a part it is given at most, on the rows of each of `parts`."
    rates, mb = {m: [] for m in [*methods, FLOOR, OWN]}, dict.fromkeys(methods, 0)
    speeds = lambda: np.array([matrix_rate(), own_rate(model)])
    for r, part in enumerate(parts):
        for m, (f, most) in methods.items():
            rows = part[:most]
            if m == OURS: before = speeds()
            seconds, used = peak(f, model, rows)
            if m == OURS:
                for floor, x in zip((FLOOR, OWN), (before+speeds())/2): rates[floor].append(len(part)*x/operations(model, part))
            rates[m].append(len(rows)/seconds); mb[m] = max(mb[m], used)
            print(f'{name}, round {r+1}/{len(parts)}: {m}: {rates[m][-1]:.0f} rows/s', file=sys.stderr, flush=True)
    t, every = pd.DataFrame(rates), sum(map(len, parts))
    whole = {m: every/sum(len(p)/x for p, x in zip(parts, t[m])) for m in rates}
    spread = lambda a, b: f'{(t[a]/t[b]).min():.2f}-{(t[a]/t[b]).max():.2f}'
    return pd.DataFrame([dict(set=name, method=m, rows=every, rows_per_second=round(x, 1), times_faster_than_published=round(x/whole[PUBLISHED], 2), range_published=spread(m, PUBLISHED),
                              time_over_plain_forward=round(whole[PLAIN]/x, 3), range_plain=spread(PLAIN, m), time_over_floor=round(whole[FLOOR]/x, 2), range_floor=spread(FLOOR, m), time_over_own_floor=round(whole[OWN]/x, 2), peak_mb=round(mb[m]) if m in mb else np.nan) for m, x in whole.items()])


def speed(n, rounds, tokens=2**18):
    "One table: the mix with every method, then the made sets."
    model, tokenizer = load_model(str(MODEL), 'cpu')
    rows = encode_samples(load_samples(MIX, limit=n), tokenizer)
    for f in METHODS.values(): f(model, rows[:64])  # warm up
    mix = side_by_side(model, 'published WebQA mix', {m: (f, None) for m, f in METHODS.items()}, [rows]*(2*rounds))
    parts = lambda t, rows: t.assign(**{k: np.where(t['method'] == OURS, round(v, 3), np.nan) for k, v in shares(model, rows).items()})
    mix, made = parts(mix, rows), []
    for name, (part, longest) in sets(rows, tokens).items():
        plain = partial(plain_forward, batch=max(1, 2304//longest))  # as many tokens in a batch as on the mix
        table = side_by_side(model, name, {PUBLISHED: (published_entropy, max(4, len(part)//16)), PLAIN: (plain, None), OURS: (METHODS[OURS], None)}, [part]*rounds)
        made.append(parts(table, part[:max(4, len(part)//4)]))
    return pd.concat([mix, *made], ignore_index=True)


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
    parser.add_argument('--rounds', type=int, default=2, help='of the made sets; the mix has twice as many (default: %(default)s)')
    parser.add_argument('--tokens', type=int, default=2**18, help='prompt tokens in each of the made sets, of 1,024 rows at most')
    parser.add_argument('--out', type=Path, help='also write the tables as DIR/speed.csv and DIR/memory.csv')
    args = parser.parse_args()
    if not MODEL.exists(): sys.exit('The benchmark needs the data and the model beside the project (../shared); they are not here.')
    torch.set_num_threads(2)
    tables = dict(speed=speed(args.rows, args.rounds, args.tokens), memory=memory())
    for name, t in tables.items():
        print(f'\n{t.to_string(index=False)}')
        if args.out: args.out.mkdir(parents=True, exist_ok=True); t.to_csv(args.out/f'{name}.csv', index=False)


if __name__ == '__main__': main()
