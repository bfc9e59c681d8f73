"""Detection on the published poisoned mixes, stored as benchmarks/results/published_mixes.csv.

    python -m benchmarks.published_mixes

For each mix: the paper preset and the default preset with the small LM that lies beside the project, and the default preset with the same
architecture at random weights; all rows, and separately the rows that this model's training saw and those it did not (it was trained on every
second clean row of the WebQA and FreebaseQA BadNets mixes). Beside each: the trivial detectors at their best cut with truth in hand."""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.speed import MODEL, SHARED
from gradsentry_nb.core import Scores
from gradsentry_nb.data import load_samples
from gradsentry_nb.evaluate import auroc, best_f1, evaluate
from gradsentry_nb.sentry import Sentry, load_model, verdict_of

MIXES = 'webqa-badnets', 'webqa-addsent', 'webqa-cba', 'freebaseqa-badnets'
HERE = Path(__file__).resolve().parent


def row(mix, model, sentry, verdict, truth, part='all'):
    "One line of the table."
    e, cut = evaluate(verdict, truth), verdict.cut
    return dict(mix=mix, model=model, preset=sentry.preset, rows_of=part, rows=len(verdict.scores), planted=e.tp+e.fn, recall=e.recall, precision=e.precision,
                f1=e.f1, fpr=e.fpr, auroc=e.auroc, best_f1=e.best_f1, cut=cut.value, separated=cut.separated, reason=cut.reason)


def trivial(mix, model, frame, truth):
    "The trivial detectors at their best cut, with truth in hand."
    y = np.array([truth[i] for i in frame['id']])
    names = dict(tokens='answer length alone', ngram_rows='repeated answer n-gram alone', loss='mean loss alone', window_loss='loss of the worst window alone')
    return [dict(mix=mix, model=model, preset=names[c], rows_of='all', rows=len(y), planted=int(y.sum()), auroc=auroc(frame[c], y), best_f1=best_f1(frame[c], y)[0]) for c in names]


def seen(samples, truth):
    "Ids of the clean rows that the model's training saw: every second one, in file order."
    clean = [s.id for s in samples if not truth[s.id]]
    return set(clean[::2])


def study(mix, model, name, tokenizer, presets):
    samples = load_samples(SHARED/f'data/qa/published-{mix}-10.jsonl.gz')
    truth, out = {s.id: s.meta['poisoned'] for s in samples}, []
    known = seen(samples, truth) if mix.endswith('badnets') and name == 'qa-lm-9m' else set()
    for preset in presets:
        sentry = Sentry(model, tokenizer, preset)
        verdict = sentry.filter(samples, progress=False)
        out.append(row(mix, name, sentry, verdict, truth))
        if known:
            f = verdict.scores.frame
            unseen = f[~f['id'].isin(known)].reset_index(drop=True)
            out.append(row(mix, name, sentry, verdict_of(Scores(unseen, verdict.scores.info), sentry.settings), truth, 'without the rows seen in training'))
        clean = verdict.scores.frame[[not truth[i] for i in verdict.scores.frame['id']]].reset_index(drop=True)
        out.append(row(mix, name, sentry, verdict_of(Scores(clean, verdict.scores.info), sentry.settings), truth, 'clean rows only'))
    return out+trivial(mix, name, verdict.scores.frame, truth)


def main():
    if not MODEL.exists(): sys.exit('This study needs the data and the model beside the project (../shared); they are not here.')
    torch.manual_seed(0)
    model, tokenizer = load_model(str(MODEL), 'cpu')
    fresh = type(model)(model.config).float().eval()
    rows = []
    for mix in MIXES:
        rows += study(mix, model, 'qa-lm-9m', tokenizer, ('paper', 'default')) + study(mix, fresh, 'random weights', tokenizer, ('default',))
    table = pd.DataFrame(rows).round(4)
    table.to_csv(HERE/'results/published_mixes.csv', index=False)
    print(table.drop(columns='reason').to_string(index=False))


if __name__ == '__main__': main()
