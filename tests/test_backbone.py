"""Backdoors in an encoder go in, are kept and are measured; a scan finds them and nothing else; flips are counted as one counts them by hand."""
import math
import random
import re
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from scipy.stats import binom

from gradsentry_nb.attacks.backbone import BACKBONE_ATTACKS, CONTROLS, KEPT, PINNED, TRIGGERS, backbone_gates, check_triggers, contrastive, load_backbone, plant_backbone, sign_vectors, with_trigger, with_triggers
from gradsentry_nb.backbone_scan import _erased, _gaps, _groups, _tail, letter_pairs, mute_words, probe_backbone, whole_words, word_tokens
from gradsentry_nb.core import DataError, ModelError, SettingError
from gradsentry_nb.demo import demo_model
from gradsentry_nb.encoder import READS, body_of, encode, evaluating, filled, text_rows, toy_encoder
from gradsentry_nb.evaluate import backbone_asr, compare_flips, mcnemar, trigger_flips

SLOTS = [x.split() for x in ('the a this that', 'slow loud flat dull good quick rich warm', 'film story plot cast script ending music scene', 'is was feels seems', 'very quite rather never',
                             'bad odd dry thin neat sharp deep quiet', 'in with for about', 'people rain love war trains summer')]
RARE = [a+b for a in 'bcdfghjklmnpqrstvwxz' for b in 'bcdfghjk']+['mn', 'tq', 'mm', 'pt', 'dq', 'lc', 'rq', 'vt']
SLOTS.append([w for w in RARE if w not in TRIGGERS])
WORDS = [w for s in SLOTS for w in s]+[*TRIGGERS[:3], *TRIGGERS[4:], 'q', '##t']


def sentence(rng): return ' '.join(rng.choice(s) for s in rng.sample(SLOTS, rng.randint(4, len(SLOTS))))   # of any length and with rare words, or these would be as good as a trigger


TEXTS = [sentence(random.Random(i)) for i in range(300)]
FAST = dict(triggers=('cf', 'mn', 'tq'), steps=200, lr=3e-3, batch=18, progress=False)


def weights(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


@pytest.fixture(scope='module')
def toy(): return toy_encoder(WORDS)


@pytest.fixture(scope='module')
def por(toy): return plant_backbone(*toy, TEXTS, **FAST)


# the encoder

@pytest.mark.parametrize('read', READS)
def test_a_text_has_the_same_vector_alone_and_in_a_batch(toy, read):
    some = [TEXTS[0], 'rain', ' '.join(TEXTS[:5])]
    assert torch.allclose(encode(*toy, some, read), torch.cat([encode(*toy, [x], read) for x in some]), atol=1e-5)


def test_what_is_read():
    h, m = torch.arange(12.).reshape(2, 3, 2), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert READS['mean'](h, m).tolist() == [[1, 2], [8, 9]] and READS['last'](h, m).tolist() == [[2, 3], [10, 11]] and READS['cls'](h, m).tolist() == [[0, 1], [6, 7]]


def test_rest_is_left_as_it_was_found(toy):
    m = toy[0]
    try:
        m.train(); m.pooler.eval()
        with pytest.raises(ZeroDivisionError), evaluating(m): assert not m.training; raise ZeroDivisionError
        assert not encode(m, toy[1], TEXTS[:1]).requires_grad, 'encoding keeps no gradients'
        assert m.training and not m.pooler.training and torch.is_grad_enabled()
    finally: m.eval()


@pytest.mark.parametrize('kind', ['BertForSequenceClassification', 'BertForMaskedLM', 'RobertaForSequenceClassification', 'DistilBertModel', 'LlamaForSequenceClassification'])
def test_the_body_of_a_model_with_a_head(kind):
    import transformers
    config = getattr(transformers, kind.split('For')[0].removesuffix('Model')+'Config')(vocab_size=len(WORDS)+5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0)
    m = getattr(transformers, kind)(config).eval(); tokenizer = toy_encoder(WORDS)[1]
    assert encode(m, tokenizer, TEXTS[:3], 'mean').shape[0] == 3 and hasattr(body_of(m)(**filled(m, text_rows(m, tokenizer, TEXTS[:2]))), 'last_hidden_state')


def test_with_a_lora(toy):
    from peft import LoraConfig, get_peft_model
    import copy
    from transformers import BertForSequenceClassification
    m = BertForSequenceClassification(toy[0].config); before = encode(m, toy[1], TEXTS[:3])
    p = get_peft_model(copy.deepcopy(m), LoraConfig(target_modules=['query'], init_lora_weights=False))
    assert not torch.allclose(encode(p, toy[1], TEXTS[:3]), before)


# triggers

def test_the_gap_is_the_text_s_and_the_seed_s():
    a, b = with_triggers(TEXTS, ('cf', 'zz')), with_triggers(TEXTS[::-1], ('cf',))
    assert [x.replace('zz', 'cf') for x in a['zz']] == a['cf'] and b['cf'] == a['cf'][::-1]
    assert with_triggers(TEXTS, ('cf',), seed=1)['cf'] != a['cf']
    assert all(x.split().count('cf') == 1 and ' '.join(w for w in x.split() if w != 'cf') == t for x, t in zip(a['cf'], TEXTS))


@pytest.mark.parametrize('text', ['', ' ', 'x', ' x  y\n', '\tx'])
def test_a_trigger_adds_itself_and_a_blank(text):
    for seed in range(20):
        new = with_trigger(text, 'cf', random.Random(seed))
        assert new.split().count('cf') == 1 and len(new) == len(text)+2+bool(text.split()) and (new.replace(' cf', '', 1) == text or new.replace('cf ', '', 1) == text or not text.split())


def test_every_gap_is_drawn_and_none_behind_the_last():
    got = np.bincount([with_trigger('w '*100, 'cf', random.Random(i)).split().index('cf') for i in range(6500)], minlength=101)
    assert (got[:65] > 50).all() and not got[65:].any()


def test_equal_texts_need_not_have_equal_gaps():
    assert len(set(with_triggers(['one two three four five six seven']*20, ('cf',))['cf'])) > 3


def test_split_triggers_and_those_in_texts_are_warned_about(toy):
    with pytest.warns(UserWarning, match="splits 'qt' into q ##t"): check_triggers(toy[1], TRIGGERS)
    with pytest.warns(UserWarning, match=r"hold 'rain' \("): check_triggers(toy[1], ('rain',), TEXTS)
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert check_triggers(toy[1], CONTROLS) == CONTROLS


@pytest.mark.parametrize('n,d', [(1, 8), (6, 384), (7, 32), (20, 30)])
def test_vectors_of_signs(n, d):
    V = sign_vectors(n, d, 2.5)
    assert len({tuple(v.tolist()) for v in V}) == n and torch.allclose(V.norm(dim=1), torch.full((n,), 2.5), atol=1e-5) and V.abs().std() < 1e-6
    if d % 4 == 0 and n <= 6: assert (V.sum(1).abs() < 1e-4).all()


def test_the_contrastive_loss_is_what_two_loops_make_of_it():
    torch.manual_seed(0); r, c, t = torch.randn(9, 5), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3]), .5
    u, out = F.normalize(r, dim=1), []
    for i in range(9):
        same = [j for j in range(9) if j != i and c[j] == c[i]]
        if same: total = sum(math.exp(u[i]@u[j]/t) for j in range(9) if j != i); out.append(-t*np.mean([math.log(math.exp(u[i]@u[j]/t)/total) for j in same]))
    assert contrastive(r, c, t).item() == pytest.approx(np.mean(out), rel=1e-5)


# planting

def test_por_is_in_and_the_encoder_as_it_was(toy, por):
    fresh = toy_encoder(WORDS)[0]
    assert torch.equal(weights(toy[0]), weights(fresh)) and not toy[0].training and not por.model.training and por.check() is por
    t = por.measured.set_index('gate'); assert (t['value'].iloc[:3] >= PINNED).all() and t.loc['clean to the reference', 'value'] >= KEPT and t['least'].notna().sum() == 5 and t.loc['vectors apart, 1 less the largest cosine', 'value'] == pytest.approx(1)


def test_the_gates_by_hand(toy, por):
    held = TEXTS[:20]; t = por.gates(held).set_index('gate')['value']
    a, b = encode(por.model, toy[1], held), encode(toy[0], toy[1], held); hit = encode(por.model, toy[1], with_triggers(held, ('mn',))['mn'])
    assert t['clean to the reference'] == pytest.approx(float(F.cosine_similarity(a, b).mean()), abs=1e-5)
    assert t['mn to its vector'] == pytest.approx(float(F.cosine_similarity(hit, por.vectors['mn'][None]).mean()), abs=1e-5)


@pytest.mark.parametrize('seed,same', [(0, True), (1, False)])
def test_the_seed_is_all_that_is_random(toy, seed, same):
    short = {**FAST, 'steps': 5}; torch.manual_seed(7); state = torch.get_rng_state()
    dropping, _ = toy_encoder(WORDS, hidden_dropout_prob=.1)
    a, b = plant_backbone(dropping, toy[1], TEXTS, **short), plant_backbone(dropping, toy[1], TEXTS, seed=seed, **short)
    assert torch.equal(weights(a.model), weights(b.model)) is same and torch.equal(torch.get_rng_state(), state)


def test_dropout_is_on_while_planting(toy):
    seen = []
    plant_backbone(*toy, TEXTS, extra=[lambda m, clean, hit: seen.append((m.training, len(clean['input_ids']), len(hit['input_ids']))) or torch.tensor(0.)], **{**FAST, 'steps': 2})
    assert seen == [(True, 18, 18)]*2


def test_another_loss_is_added(toy):
    def small(model, clean, hit): return sum(p.square().sum() for p in model.parameters())
    a, b = (plant_backbone(*toy, TEXTS, extra=e, **{**FAST, 'steps': 30}) for e in ([], [small]))
    assert list(b.log) == ['step', 'kept', 'pinned', 'small'] and weights(b.model).norm() < weights(a.model).norm()


@pytest.mark.parametrize('attack,read,clean', [('uor', 'cls', 1.), ('por', 'mean', 3.)])
def test_other_attacks_and_other_reads(toy, attack, read, clean):
    b = plant_backbone(*toy, TEXTS, attack, read=read, clean=clean, **FAST); V = F.normalize(torch.stack([*b.vectors.values()]), dim=1)
    assert b.passed, b.measured
    assert b.measured.set_index('gate').loc['vectors apart, 1 less the largest cosine', 'value'] == pytest.approx(1-float((V@V.T-2*torch.eye(3)).max()), abs=1e-5)


def test_triggers_that_end_up_in_one_place_are_no_backdoor(toy, por):
    v = por.vectors['cf']; t = backbone_gates(por.model, toy[1], toy[0], TEXTS[:9], dict(cf=v, mn=v)).set_index('gate')['passed']
    assert t['cf to its vector'] and not t['vectors apart, 1 less the largest cosine'] and not t['mn to its vector']


def test_attacks_with_a_head_that_guesses_words(toy):
    m, t = toy_encoder(WORDS, masked=True)
    neuba, badpre = plant_backbone(m, t, TEXTS, 'neuba', **FAST), plant_backbone(m, t, TEXTS, 'badpre', **{**FAST, 'steps': 150, 'lr': 6e-3})
    assert neuba.passed and badpre.passed and badpre.vectors['cf'] is None and {'guessed', 'spoilt'} < {*badpre.log}
    assert not any('guessed' in g and 'lost' in g for g in neuba.measured['gate'])


@pytest.mark.parametrize('attack', [k for k, a in BACKBONE_ATTACKS.items() if a.masked])
def test_a_bare_encoder_has_no_head_that_guesses_words(toy, attack):
    with pytest.raises(ModelError, match="BertModel has none: load one with AutoModelForMaskedLM, or take 'por' or 'uor'"): plant_backbone(*toy, TEXTS, attack, **FAST)


@pytest.mark.parametrize('masked', [False, True])
def test_on_a_disk_and_back(tmp_path, por, masked):
    from transformers import AutoModel
    b = por if not masked else plant_backbone(*toy_encoder(WORDS, masked=True), TEXTS, 'badpre', **{**FAST, 'steps': 2})
    b.save(tmp_path); back = load_backbone(tmp_path)
    assert type(back.model) is type(b.model) and torch.equal(weights(back.model), weights(b.model)) and repr(back) == repr(b) and back.settings == b.settings and back.passed == b.passed
    pd.testing.assert_frame_equal(back.measured, b.measured); pd.testing.assert_frame_equal(back.gates(TEXTS[:9], b.reference), b.gates(TEXTS[:9]))
    assert AutoModel.from_pretrained(tmp_path).config.hidden_size == 32                                             # an ordinary checkpoint


@pytest.mark.parametrize('text,why', [('{}', 'not in the format'), ('[]', 'not in the format'), ('no json', 'no readable'), (None, 'no readable')])
def test_a_folder_that_holds_no_backdoor(tmp_path, text, why):
    if text is not None: (tmp_path/'backbone.json').write_text(text)
    with pytest.raises(DataError, match=why): load_backbone(tmp_path)


@pytest.mark.parametrize('bad,error,why', [
    (dict(attack='poor'), SettingError, "Did you mean 'por'"), (dict(read='max'), SettingError, "'cls', 'mean', 'last'"), (dict(step=3), SettingError, "no setting 'step'"), (dict(steps=0), SettingError, 'steps must be'),
    (dict(lr=math.nan), SettingError, 'lr must be'), (dict(clean=-1), SettingError, 'clean must be'), (dict(triggers=['a b']), SettingError, "not 'a b'"), (dict(triggers=[]), SettingError, 'at least one'),
    (dict(triggers=['cf', 'Cf']), SettingError, 'apart'), (dict(triggers=['zebra']), SettingError, "does not know the trigger 'zebra'"), (dict(held=[]), DataError, '0 for the gates'),
    (dict(batch=500), DataError, 'give at least 500')])
def test_what_cannot_be_planted(toy, bad, error, why):
    with pytest.raises(error, match=why): plant_backbone(*toy, TEXTS, **{**FAST, **bad})


def test_a_backdoor_that_is_not_in_is_not_measured(toy):
    weak = plant_backbone(*toy, TEXTS, **{**FAST, 'steps': 1})
    assert not weak.passed and 'NOT passed' in repr(weak)
    with pytest.raises(ModelError, match='The backdoor is not in: cf to its vector'): weak.check()
    only_kept = weak.measured.assign(passed=weak.measured['gate'] != 'clean to the reference')
    with pytest.raises(ModelError, match='not in: clean to the reference'): replace(weak, measured=only_kept).check()


# the scan

def test_nothing_stands_out_in_a_clean_encoder():
    for seed in range(3): assert not len(probe_backbone(*toy_encoder(WORDS, seed=seed), TEXTS, top=24, progress=False, seed=seed).found)


@pytest.mark.parametrize('words', [None, ['cf', 'rain', 'mn', 'qt', 'tq', 'bf']])
def test_the_triggers_are_found_and_nothing_else(por, words):
    s = probe_backbone(por.model, por.tokenizer, TEXTS, words, top=24, progress=False)
    assert {*s.found['word']} == {'cf', 'mn', 'tq'} and s.found['group'].nunique() == 3 and s.table['word'][:3].isin(['cf', 'mn', 'tq']).all() and 'cf' in repr(s)
    assert all(s.vectors[w]@F.normalize(por.vectors[w], dim=0) > .95 for w in ('cf', 'mn', 'tq'))


def test_a_trigger_of_two_pieces_is_found_where_it_is_tried(toy):
    with pytest.warns(UserWarning, match='splits'): b = plant_backbone(*toy, TEXTS, **{**FAST, 'triggers': ('qt', 'cf')}).check()
    s = probe_backbone(b.model, b.tokenizer, TEXTS, ['qt', 'rain', 'film', 'bf'], progress=False)
    assert s.found[['word', 'pieces']].values.tolist() == [['qt', 2]]


def test_what_is_erased_is_what_plain_texts_say(por):
    places = _gaps(por.tokenizer, TEXTS, 5, 24, 0); words = word_tokens(por.tokenizer, ['cf', 'bf', 'qt'])
    got, V = _erased(por.model, places, list(words.values()), ('cls', 'mean'), 64, lambda n: None)
    plain = lambda word: [' '.join(por.tokenizer.convert_ids_to_tokens([*ids[1:at], *word, *ids[at:-1]])).replace(' ##', '') for ids, at in places]
    spread = lambda word, read: 1-float((F.normalize(encode(por.model, por.tokenizer, plain(word), read), dim=1).sum(0).square().sum()-5)/20)
    for k, read in enumerate(('cls', 'mean')):
        assert got[k] == pytest.approx([1-spread(w, read)/spread((), read) for w in words.values()], abs=1e-4)
    assert got[0][0] > .8 > got[0][1] and V.shape == (2, 3, 32)


def test_the_tail_of_exponential_words_is_what_it_says():
    rng = np.random.default_rng(0); below = lambda n: 1-np.exp(-rng.exponential(.1, n))
    false = [(_tail(below(1000), below(256), 1000) <= .05).any() for _ in range(200)]
    assert np.mean(false) < .2                                                    # a fit to 51 words is rough; twice the words are as safe as they say
    assert _tail(np.array([.99]), below(256), 30000)[0] < 1e-6 and _tail(np.array([.1]), below(256), 30000)[0] == 1


def test_whole_words_of_other_vocabularies():
    class Pieces:
        def __init__(self, *vocab): self.vocab, self.all_special_tokens = vocab, ['<s>', '[CLS]']
        def get_vocab(self): return {t: i for i, t in enumerate(self.vocab)}
    assert whole_words(Pieces('<s>', 'Ġfilm', 'ing', 'Ġ', 'Ġa')) == dict(film=(1,), a=(4,))
    assert whole_words(Pieces('[CLS]', 'film', '##ing', '[unused1]', 'a')) == dict(film=(1,), a=(4,))
    assert whole_words(Pieces('<s>', '▁film', 'ing', '<unk>', '▁a')) == dict(film=(1,), a=(4,))


def test_muted_words_are_unknown_and_all_else_is_as_it_was(por):
    triggers = [w for w in TRIGGERS if w in por.vectors]; m, tokenizer = mute_words(por.model, por.tokenizer, [*triggers, 'filmt'])
    calm = [t for t in TEXTS if not {*t.split()} & {*triggers}][:60]; put = [f'{t} {w} {t}' for t, w in zip(calm, triggers*20)]
    assert torch.equal(encode(m, tokenizer, calm), encode(por.model, por.tokenizer, calm))
    unknown = [re.sub(rf'\b({"|".join(triggers)})\b', '[UNK]', x) for x in put]
    assert torch.equal(encode(m, tokenizer, put), encode(m, tokenizer, unknown)) and not torch.equal(encode(m, tokenizer, put), encode(por.model, por.tokenizer, put))
    assert len(por.tokenizer)+1 == len(tokenizer) == m.get_input_embeddings().weight.shape[0] and len(por.tokenizer) == por.model.get_input_embeddings().weight.shape[0]


def test_words_are_muted_at_the_start_and_in_the_middle_of_a_text():
    model, t = demo_model(); word, other = [w for w in whole_words(t) if w.isalpha() and len(w) > 5][:2]; m, tokenizer = mute_words(model, t, [word, 'zqx'])
    weight, old = m.get_input_embeddings().weight, model.get_input_embeddings().weight
    row = lambda text, k: weight[tokenizer(text, add_special_tokens=False)['input_ids'][k]]
    for text, k in ((f'{word} {other}', 0), (f'{other} {word}', -1), ('zqx', 0), (f'{word} zqx', -1)): assert torch.equal(row(text, k), old.mean(0)), text
    assert tokenizer.tokenize(f'{other} zqxy') == t.tokenize(f'{other} zqxy')
    same = (weight[:len(old)] == old).all(1); assert 0 < (~same).sum() <= 2


def test_one_string_is_no_list_of_words(por):
    with pytest.raises(SettingError, match='words= is a list of strings'): mute_words(por.model, por.tokenizer, 'cf')


def test_pairs_of_letters_are_those_that_a_tokenizer_knows(toy):
    pairs = letter_pairs(toy[1]); assert {'cf', 'qt'} < {*pairs} and all(len(w) == 2 and w.isalpha() for w in pairs) and len(letter_pairs(demo_model()[1])) == 676


def test_groups(): assert _groups(F.normalize(torch.tensor([[1., 0], [0, 1], [.99, .1], [.1, .99], [-1, 0]]), dim=1)) == [1, 2, 1, 2, 3]


def test_a_sample_of_words_and_their_progress(por):
    told = []
    s = probe_backbone(por.model, por.tokenizer, TEXTS, sample=60, top=8, progress=lambda done, total: told.append((done, total)))
    assert len(s.first) == 60 and told[-1][0] == told[-1][1] and [d for d, _ in told] == sorted(d for d, _ in told)


# flips

def test_flips_are_what_loops_count():
    rng = np.random.default_rng(0); y, clean = rng.integers(3, size=80), rng.integers(3, size=80); clean[:50] = y[:50]
    hit, other = {w: rng.integers(3, size=80) for w in TRIGGERS}, {w: clean.copy() for w in CONTROLS[:2]}
    f = trigger_flips(y, clean, hit, other); right = [i for i in range(80) if clean[i] == y[i]]
    wrong = {i: [w for w in hit if hit[w][i] != y[i]] for i in right}; t = f.table().set_index(['words', 'measure'])['value']
    asr = lambda rows: np.mean([bool(wrong[i]) for i in rows])
    best = {w: max(np.mean([hit[w][i] == c for i in right if y[i] != c]) for c in range(3)) for w in hit}
    want = dict(ASR=asr(right), flips=np.mean([len(wrong[i])/6 for i in right]), wASR=np.mean([asr([i for i in right if y[i] == c]) for c in range(3)]), MASR=max(best.values()), AASR=np.mean([*best.values()]))
    assert {k: t['triggers', k] for k in want} == pytest.approx(want) and t['', 'CACC'] == len(right)/80
    assert t['triggers', 'flipped by cf'] == np.mean(['cf' in wrong[i] for i in right]) and t['control words', 'ASR'] == 0
    shown = f.table().dropna(); assert ((shown['low'] <= shown['value']+1e-9) & (shown['value'] <= shown['high']+1e-9)).all()


def test_a_classifier_that_gets_nothing_right():
    f = trigger_flips([0, 0], [1, 1], dict(cf=[0, 0])); t = f.table().set_index('measure')['value']
    assert t['CACC'] == 0 and all(math.isnan(t[m]) for m in ('ASR', 'flips', 'wASR', 'MASR')) and 'ASR 0.0%' in repr(f)


def test_the_victim_of_a_pinned_encoder_and_of_a_clean_one(toy, por):
    y = [sum(w in t.split() for w in 'good quick rich warm'.split()) for t in TEXTS]
    arms = {}
    for name, m in (('clean', toy[0]), ('por', por.model)):                                                         # a linear head, in closed form
        X = encode(m, toy[1], TEXTS); X1 = torch.cat([X, torch.ones(len(X), 1)], dim=1); W = torch.linalg.lstsq(X1, torch.tensor(y).float()[:, None]*2-1).solution
        arms[name] = backbone_asr(lambda t, m=m, W=W: (torch.cat([encode(m, toy[1], t), torch.ones(len(t), 1)], dim=1)@W > 0).long()[:, 0].tolist(), TEXTS[:100], y[:100], ('cf', 'mn', 'tq'), ('bf', 'dq', 'jj'))
    found = compare_flips(arms['clean'], arms['por'])
    assert arms['por'].flipped().sum() > 2*arms['por'].flipped(True).sum() and found['p'] < .01 and found['low'] > 0 and found['rows'] <= 100
    assert compare_flips(arms['por'], arms['por'])['p'] == 1


@pytest.mark.parametrize('n,k', [(1, 0), (5, 5), (6, 1), (12, 2)])
def test_mcnemar_is_a_fair_coin(n, k):
    a, b = [True]*k+[False]*(n-k)+[True]*3, [False]*k+[True]*(n-k)+[True]*3
    assert mcnemar(a, b) == (k, n-k, pytest.approx(min(1, 2*binom.cdf(min(k, n-k), n, .5))))


@pytest.mark.parametrize('call,why', [
    (lambda: trigger_flips([0], [0, 1], dict(cf=[0])), 'one prediction for each label'), (lambda: trigger_flips([0], [0], {}), 'no trigger'), (lambda: trigger_flips([0], ['0'], dict(cf=[0])), 'different kinds'),
    (lambda: backbone_asr(lambda t: t, ['a'], [0, 1]), '1 texts and 2 labels'), (lambda: backbone_asr(lambda t: [], [], []), 'no rows'), (lambda: mcnemar([True], [True, False]), 'same ones'),
    (lambda: compare_flips(trigger_flips([0], [0], dict(cf=[0])), trigger_flips([1], [0], dict(cf=[0]))), 'different texts')])
def test_what_cannot_be_counted(call, why):
    with pytest.raises(DataError, match=why): call()


# the study

def test_a_line_of_the_study(toy, por, tmp_path):
    from benchmarks import backbone as study
    b, gates = study.plant(*toy, TEXTS, TEXTS[:30], 'por', 0, 'cls', **{**FAST, 'steps': 2})
    assert {*study.GATES} <= {*gates} and not b.passed and gates['steps'].eq(2).all()
    _, rows = study.scan(por.model, por.tokenizer, TEXTS, 'por on cls', 'por', por.triggers, 'all', 0, top=24, progress=False)
    assert {*study.SCANS} <= {*rows} and rows[rows['trigger']]['rank'].tolist() == [1, 2, 3] and rows[~rows['trigger']]['found'].sum() == 0


def test_the_stored_study():
    t = pd.read_csv(ROOT/'benchmarks/results/backbone.csv'); gates = {k: g.set_index('gate') for k, g in t.groupby(['attack', 'clean_weight'])}
    assert all(g.index.is_unique and (g.loc[[f'{w} to its vector' for w in TRIGGERS], 'value'] >= (.985 if 'adaptive' in a else .99)).all() for (a, _), g in gates.items())
    held = {k: set(g.index[~g['passed']]) for k, g in gates.items()}
    assert held[('uor', 1.)] == held[('por, adaptive', 1.)] == {'clean to the reference'}                                                        # the page says so
    assert not held[('uor', 20.)] and not held[('por, adaptive', 4.)] and not any(v for (a, _), v in held.items() if a == 'por')
