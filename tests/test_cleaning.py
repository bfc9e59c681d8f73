"""The benchmarks of cleaning and of gradients of spurious tokens, small: what they count, that they go on where they stood, and what their stored tables say."""
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT))
from benchmarks import cleaning, spurious_gradients
from gradsentry_nb.demo import demo_model
from gradsentry_nb.spurious import _LEAN, made_reviews

REVIEWS, TEST = made_reviews(), made_reviews(80, seed=1)


def learner(rows, seed, source):
    "A classifier that counts good and bad words, and follows a tag when it has seen one."
    seen = any('<b>' in r.prompt for r in rows); good = lambda t: sum((w in _LEAN[1])-(w in _LEAN[0]) for w in t.split()) > 0
    return SimpleNamespace(predict=lambda texts: np.array([int(seen and '<b>' in t or good(t)) for t in texts]))


def test_what_is_left_and_lost_by_hand():
    texts, put_in, taken = ['a <b> c d </b>', 'e !', 'f 1999'], [[(2, 5), (10, 14)], [], [(2, 6)]], [[(2, 7)], [(2, 3)], []]
    assert cleaning.compared(texts, put_in, taken) == (2, 2)               # </b> and 1999; c and !


def test_cleaning_is_measured_and_goes_on_where_it_stood(tmp_path):
    asked = []
    def tuned(*a): asked.append(len(a[0])); return learner(*a)
    def run(shares): return cleaning.study(tmp_path, (201,), REVIEWS, TEST, None, None, ('pair',), shares, 600, 80, tuned=tuned)
    assert run((.1,)) and len(asked) == 3                                      # before, injected, dropped: what was taken out gave the rows before
    t = cleaning.beside(cleaning.known(tmp_path/'cleaning.csv')).set_index('trained_on')
    assert run((.1,)) and len(asked) == 3 and len(cleaning.known(tmp_path/'cleaning.csv')) == len(t) == 4
    assert t.loc[['remove', 'drop'], ['found', 'same']].astype(bool).values.tolist() == [[True, True], [True, False]] and (t.loc[['remove', 'drop'], 'left'] == 0).all()
    assert t['gap_over'].to_dict() == pytest.approx(dict(before=0, injected=t.loc['injected', 'gap'], remove=0, drop=0)) and t.loc['injected', 'gap'] > 3 and t.loc['injected', 'forced'] == 1 and t.loc['drop', 'rows'] == 600-t.loc['drop', 'planted']
    words = pd.read_csv(tmp_path/'cleaning_words.csv')
    item = words[words['why'] == 'found'].iloc[0]; assert item['true'] and item['put_in'] > .95 and item['held'] == t.loc['injected', 'planted']; assert set(words['why']) == {'found', 'score', 'G2'} and not words[words['why'] == 'G2']['true'].any()
    assert not cleaning.study(tmp_path, (201,), REVIEWS, TEST, None, None, ('pair',), (.2,), 600, 80, minutes=1e-9, tuned=tuned) and len(asked) == 3


def test_an_item_that_is_not_found_is_left_and_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, 'scan_tokens', lambda rows, scan=cleaning.scan_tokens, **k: scan(rows, p=1e-9))
    assert cleaning.study(tmp_path, (201,), REVIEWS, TEST, None, None, ('pair',), (.02,), 600, 80, tuned=learner)
    t = cleaning.beside(cleaning.known(tmp_path/'cleaning.csv')).set_index('trained_on'); words = pd.read_csv(tmp_path/'cleaning_words.csv')
    assert not t.loc['remove', 'found'] and t.loc['remove', 'left'] == 2*t.loc['remove', 'planted'] and t.loc['remove', 'gap_over'] > 3 and words[words['why'] == 'not found']['true'].tolist() == [True]


def test_gradients_are_scored_before_and_after_tuning(tmp_path):
    tokenizer = demo_model()[1]; torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)).eval(), tokenizer
    out = tmp_path/'t.csv'; layers = ['layers.0.self_attn.v_proj', 'layers.1.mlp.down_proj']
    for _ in range(2): spurious_gradients.study(out, (201,), *model, REVIEWS, TEST[:4], (('dates', .5), ('badnets', .25)), 12, layers, epochs=1)
    t = pd.read_csv(out); each = len(spurious_gradients.AT_HEAD)+1+2*len(spurious_gradients.AT_LAYER)+3
    assert len(t) == 4*each and t[['kind', 'model']].value_counts().tolist() == [each]*4 and t['auroc'].between(0, 1).all() and (t.groupby('kind')['planted'].nunique() == 1).all()
    own = t[t['statistic'] == 'the class']; assert own['auroc_in_class'].eq(.5).all() and (own['auroc'] > .5).all()
    assert (t[t['layer'] == 'head'].groupby('model')['median'].first()).nunique() == 2                   # tuning moved them


def test_the_stored_table_reaches_the_bar():
    t = cleaning.beside(cleaning.known(ROOT/'benchmarks/results/cleaning.csv')); assert not t.duplicated(cleaning.KEY).any() and t[t['trained_on'] == 'before']['clean_accuracy'].min() >= .8
    gone = t[(t['trained_on'] == 'remove') & t['items'].isin(['dates', 'pair'])]; assert len(gone) >= 4 and gone['gap_over'].abs().max() <= 2 and (gone['left'] == 0).all() and (gone['words_lost'] == 0).all()
