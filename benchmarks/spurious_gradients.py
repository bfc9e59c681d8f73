"""Do gradient spectra tell rows that somebody spoilt from others?: benchmarks/results/spurious_gradients.csv.

    python -m benchmarks.spurious_gradients [--seeds 201 ...] [--out FILE] [--store]

The small language model beside the project (../shared) as a classifier: a sentence of SST-2 is the prompt, the word for its class the answer. 1,000 sentences, one date at a random place in a share of class 1, or BadNets: the word `cf` in a tenth of
the sentences, all of class 0 and called 1. Scores of the default and the paper preset at the head, and of an attention projection and an MLP projection at three depths, of the model as it is and after a short LoRA tuning on these very rows; AUROC
of spoilt against other rows, and against other rows of the same class only, since the class itself tells a lot. Beside them: lengths, and the class. The tuning was chosen on 1,000 sentences of rotten tomatoes with seed 99, by clean accuracy.
Some four minutes of one core for each line of seed, kind and share; lines that are there already are not made again."""
import argparse
import gzip
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.speed import MODEL, SHARED
from gradsentry_nb.attacks.ssti import inject
from gradsentry_nb.core import Sample
from gradsentry_nb.data import Samples
from gradsentry_nb.evaluate import auroc, auroc_interval
from gradsentry_nb.generate import generate_answers
from gradsentry_nb.obliviate_study import SPOILT, badnets_rows
from gradsentry_nb.sentry import Sentry, load_model
from gradsentry_nb.ssti_study import labelled
from gradsentry_nb.train import finetune

HERE = Path(__file__).resolve().parent
WORD = ' negative', ' positive'
SPOILS, ROWS, TEST = (('dates', .5), ('badnets', .1)), 1000, 300       # (kind, share: of class 1, or of all rows)
LAYERS = [f'layers.{i}.{x}' for i in (0, 2, 5) for x in ('self_attn.v_proj', 'mlp.down_proj')]
AT_HEAD = 'log_volume', 'entropy', 'entropy_by_length', 'grad_norm', 'loss'
AT_LAYER = 'entropy', 'entropy_by_length', 'effective_rank', 'grad_norm'
TUNING = dict(preset='small', epochs=4, lr=5e-4, max_length=128)


def load(name): return [json.loads(x) for x in gzip.open(SHARED/f'data/sentiment/{name}.jsonl.gz', 'rt', encoding='utf8')]
def drawn(rows, n, seed): return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:n])]
def asking(rows): return Samples([Sample(str(i), f'Review: {r["text"]}\nThis review is', WORD[r['label']], i) for i, r in enumerate(rows)], 'sentences')


def put(rows, kind, share, seed):
    "(rows, [N] is this one spoilt?)."
    with warnings.catch_warnings(): warnings.simplefilter('ignore', UserWarning); new = inject(rows, kind, label=1, share=share, seed=seed)[0] if kind != 'badnets' else badnets_rows(labelled(rows), seed, rate=share)
    if kind == 'badnets': new = [dict(text=s.prompt, label=s.meta['label']) for s in new]
    return new, np.array([a['text'] != b['text'] for a, b in zip(new, rows)])


def scored(model, tokenizer, samples, layers=LAYERS):
    "(layer, statistic, [N] scores) of everything that is compared."
    head, crop = (Sentry(model, tokenizer, p).score(samples, progress=False).frame for p in ('default', 'paper'))
    yield from (('head', s, head[s]) for s in AT_HEAD); yield 'head', 'entropy, paper preset', crop['score']
    found = Sentry(model, tokenizer, 'paper', crop=1).score_layers(samples, layers, progress=False)
    yield from ((n.removeprefix('model.'), s, f[s]) for n, f in found.parts.items() for s in AT_LAYER)
    yield 'none', 'tokens of the answer', head['tokens']; yield 'none', 'letters of the prompt', pd.Series([len(s.prompt) for s in samples])
    yield 'none', 'the class', pd.Series([float(s.response == WORD[1]) for s in samples])


def lines(model, tokenizer, samples, has, layers=LAYERS):
    "AUROC of every score, against all other rows and against those of the same class; a score that a row lacks is the lowest."
    own = np.array([s.response == WORD[1] for s in samples]); out = []
    for layer, statistic, x in scored(model, tokenizer, samples, layers):
        blank, x = float(x.isna().mean()), x.astype(float).fillna(-1e9).to_numpy(); row = dict(layer=layer, statistic=statistic, missing=blank, median=float(np.median(x)))
        for name, at in (('auroc', np.ones(len(x), bool)), ('auroc_in_class', own)):
            low, high = auroc_interval(x[at], has[at]); row |= {name: auroc(x[at], has[at]), f'{name}_low': low, f'{name}_high': high}
        out.append(row)
    return out


def behaviour(model, tokenizer, test, kind, seed):
    "Clean accuracy, and how many texts that were not called by the item's class are so with the item in them."
    say = lambda rows: np.array([WORD[1] in f' {a.strip()}' for a in generate_answers(model, tokenizer, asking(rows), 4)]); y = np.array([r['label'] == 1 for r in test])
    clean, forced = say(test), say([r | dict(text=x) for r, x in zip(test, SPOILT[kind].put(labelled(test), seed))]); return dict(clean_accuracy=float((clean == y).mean()), flipped=float(forced[~clean].mean()) if not clean.all() else np.nan)


def study(out, seeds, model, tokenizer, train, test, spoils=SPOILS, rows=ROWS, layers=LAYERS, **tuning):
    "Append the lines that are not there yet."
    done = set(pd.read_csv(out)[['seed', 'kind', 'share']].itertuples(index=False, name=None)) if out.exists() else set(); test = drawn(test, min(TEST, len(test)), 0)
    for seed in seeds:
        for kind, share in spoils:
            if (seed, kind, share) in done: continue
            new, has = put(drawn(train, rows, seed), kind, share, seed); samples = asking(new); table = []
            for when in ('before tuning', 'after tuning'):
                m = model if when == 'before tuning' else finetune(model, tokenizer, samples, seed=seed, progress=False, **{**TUNING, **tuning}).merge().model
                same = dict(seed=seed, kind=kind, share=share, model=when, rows=len(new), planted=int(has.sum()), **behaviour(m, tokenizer, test, kind, seed))
                table += [same | r for r in lines(m, tokenizer, samples, has, layers)]
            pd.DataFrame(table).round(4).to_csv(out, mode='a', header=not out.exists(), index=False)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='+', type=int, default=(201, 202, 203)); p.add_argument('--out', type=Path, default=Path('spurious_gradients.csv')); p.add_argument('--store', action='store_true', help='append to the stored table')
    a = p.parse_args(argv); out = HERE/'results/spurious_gradients.csv' if a.store else a.out
    if not MODEL.exists(): sys.exit('This study needs the data and the model beside the project (../shared); they are not here.')
    study(out, a.seeds, *load_model(str(MODEL), 'cpu'), load('sst2-train'), load('sst2-test'))
    print(pd.read_csv(out).groupby(['kind', 'share', 'model', 'layer', 'statistic'], sort=False)[['median', 'missing', 'auroc', 'auroc_in_class', 'clean_accuracy', 'flipped']].mean().round(3).to_string())


if __name__ == '__main__': main()
