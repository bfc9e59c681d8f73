"What must not change a score, hand-computed spectra, and the properties of the statistics."
import json
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from hypothesis import assume, given, settings, strategies as st

from gradsentry_nb.capture import Capture, GradFactors, LongFactors, dense_gradient, inner
from gradsentry_nb.core import Encoded
from gradsentry_nb.data import common_prefix, encode_samples, fit, load_samples, plan_batches, prefix_groups
from gradsentry_nb.spectrum import (EPS, STATISTICS, WINDOW, effective_rank, entropy_bound, entropy_by_length, log_volume,
                                    row_roots, sketch, spectral_entropy, statistics, surprise_kernel, svals, window_loss)

torch.set_num_threads(1)
LN16 = math.log(16)


@cache
def tiny(dtype=torch.float64):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=150, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(6) if p.dim() == 2 else p
    return model.to(dtype).eval()


def row_statistics(f, crop=1): return statistics([row_roots(f, crop)])[0]
def scores_of(model, rows, **kw): return {i: row_statistics(f) for i, f in Capture(model, **kw)(rows)}


def same(a, b, tolerance=1e-9):
    assert set(a) == set(b)
    for i in a:
        for k in STATISTICS: assert a[i][k] == pytest.approx(b[i][k], rel=tolerance, abs=tolerance, nan_ok=True), (i, k)


row_of = st.tuples(st.lists(st.integers(0, 149), min_size=1, max_size=12), st.lists(st.integers(0, 149), min_size=1, max_size=20))
rows_of = st.tuples(st.booleans(), st.lists(row_of, min_size=1, max_size=7)).map(lambda x: [fit([3, 5, 7, 9]*x[0]+p, a, 99) for p, a in x[1]])


# ---- order, batches, room

@settings(max_examples=25)
@given(rows_of, st.randoms(use_true_random=False))
def test_row_order(rows, random):
    order = list(range(len(rows))); random.shuffle(order)
    moved = scores_of(tiny(), [rows[i] for i in order])
    same(scores_of(tiny(), rows), {order[j]: v for j, v in moved.items()})


@settings(max_examples=25)
@given(rows_of, st.integers(1, 400), st.integers(1, 5000), st.booleans())
def test_budget_room_and_sharing(rows, budget, room, share):
    same(scores_of(tiny(), rows), scores_of(tiny(), rows, budget=budget, room=room, share=share))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('room', [1, 150, 300, 1000, 150*29])
def test_long_answers_in_blocks(room, dtype):
    "Every statistic of block factors, whole and cropped, is that of the whole factors."
    rng = np.random.default_rng(0)
    rows = [Encoded(rng.integers(0, 150, n).astype(np.int32), np.arange(n) >= 3) for n in (33, 32, 20, 5)]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    whole = dict(Capture(tiny(dtype))(rows))
    assert all(isinstance(f, GradFactors) for f in whole.values())
    blocks = 0
    for i, f in Capture(tiny(dtype), room=room)(rows):
        blocks += isinstance(f, LongFactors)
        for crop in (1, 3, 8): same({i: row_statistics(whole[i], crop=crop)}, {i: row_statistics(f, crop=crop)}, tolerance)
        assert torch.allclose(svals(f), svals(whole[i]), atol=tolerance*float(svals(f)[0]))
        assert f.T == rows[i].tokens == len(f.loss)
    assert blocks


def test_block_factors_outlive_their_turn():
    "The blocks are made from the model when asked for; also after the loop they must not build a graph or depend on the mode."
    rng = np.random.default_rng(0)
    rows = [Encoded(rng.integers(0, 150, 30).astype(np.int32), np.arange(30) >= 3)]
    (_, whole), = Capture(tiny())(rows)
    (_, late), = list(Capture(tiny(), room=300)(rows))
    assert not late.part(0).requires_grad and not svals(late).requires_grad
    same({0: row_statistics(whole)}, {0: row_statistics(late)})


@settings(max_examples=100)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 1000))
def test_batches_are_a_partition_within_the_budget(lengths, budget):
    plan = plan_batches(lengths, budget)
    assert sorted(i for b in plan for i in b) == list(range(len(lengths)))
    for b in plan: assert len(b) == 1 or len(b)*max(lengths[i] for i in b) <= budget
    longest = [lengths[i] for b in plan for i in b]
    assert longest == sorted(longest, reverse=True)


@settings(max_examples=100)
@given(st.lists(row_of, min_size=1, max_size=6), st.lists(st.integers(0, 149), max_size=8))
def test_common_prefix_is_the_longest_safe_one(parts, start):
    rows = [fit(start+p, a, 99) for p, a in parts]
    P = common_prefix(rows)
    slow = 0
    while len(rows) > 1 and all(slow < r.first-1 for r in rows) and len({int(r.ids[slow]) for r in rows}) == 1: slow += 1
    assert P == slow


starts = st.sampled_from([[], [3], [3, 5, 7, 9], [3, 5, 7, 9, 9, 9], [3, 5, 7, 9, 9, 8, 8], [3, 5, 7, 9, 9, 8, 8, 1, 2, 3], [6]*12, [6]*9])
grouped = st.lists(st.tuples(starts, row_of), max_size=30).map(lambda x: [fit(s+p, a, 99) for s, (p, a) in x])

def cost(groups, rows):
    "Tokens to compute, and the prefixes."
    own = [len(ids)-(len(groups[up][0]) if up is not None else 0) for ids, up, _ in groups]
    return sum(own)+sum(len(rows[i])-len(ids) for ids, _, members in groups for i in members), sum(n > 0 for n in own)


@settings(max_examples=200)
@given(grouped, st.integers(0, 60), st.randoms(use_true_random=False))
def test_prefix_groups_are_a_tree_over_all_rows(rows, least, random):
    groups = prefix_groups(rows, least)
    assert sorted(i for *_, members in groups for i in members) == list(range(len(rows)))
    for n, (ids, up, members) in enumerate(groups):
        for i in members: assert rows[i].ids[:len(ids)].tolist() == ids.tolist() and len(ids) <= max(rows[i].first-1, 0)
        if up is not None: assert up < n and 0 < len(groups[up][0]) < len(ids) and ids[:len(groups[up][0])].tolist() == groups[up][0].tolist()
    path = []                                       # a group comes while the one that it goes on from is still held
    for n, (_, up, _) in enumerate(groups):
        while path and path[-1] != up: path.pop()
        assert up is None or path
        path.append(n)
    tokens, k = cost(groups, rows)
    assert tokens <= sum(map(len, rows))-least*max(0, k-1), 'every cut but that of all rows saves `least`'
    order = list(range(len(rows))); random.shuffle(order)
    moved = prefix_groups([rows[i] for i in order], least)
    assert [(a.tolist(), u, sorted(order[j] for j in m)) for a, u, m in moved] == [(a.tolist(), u, m.tolist()) for a, u, m in groups]


def test_prefix_groups_find_what_is_worth_a_cut():
    "A system prompt and three instructions; a few rows more or less change which cuts pay."
    rng = np.random.default_rng(0); draw = lambda n: rng.integers(0, 99, n).tolist()
    system, three = [100, *draw(39)], [[101+i, *draw(29)] for i in range(3)]
    make = lambda n, k=3: [fit([*system, *three[i % k], 110+i], [1, 2], 999) for i in range(n)]
    shape = lambda rows, least: sorted((len(ids), up is not None, len(m)) for ids, up, m in prefix_groups(rows, least))
    assert shape(make(60), 256) == [(40, False, 0)] + [(70, True, 20)]*3
    assert shape(make(24), 256) == [(40, False, 24)], '7 times 30 tokens are not worth a pass'
    assert shape(make(60, 1), 256) == [(70, False, 60)], 'one instruction: its system prompt is no cut of its own'
    other = [fit([120, 7, 7, 7, 7], [1, 2], 99)]
    assert shape([*make(60), *other], 79) == [(0, False, 1), (40, False, 0)] + [(70, True, 20)]*3
    assert shape([*make(60), *other], 81) == [(0, False, 1)] + [(70, False, 20)]*3, 'the system prompt would be computed 3 times instead of once: 80 tokens'
    assert prefix_groups([]) == [] and shape(other, 0) == [(0, False, 1)], 'a row alone shares nothing'


# ---- what a tokenizer or a file may do differently

@cache
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    vocab = {w: i for i, w in enumerate(['<s>', '</s>', '<unk>', '<pad>', *(chr(97+i) for i in range(26)), '; ', ';'])}
    tok = Tokenizer(models.WordLevel(vocab, '<unk>')); tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='<pad>')


def scored(source, **kw):
    samples = load_samples(source, **kw)
    return samples, {samples[i].id: v for i, v in scores_of(tiny(), encode_samples(samples, words())).items()}

letters = st.lists(st.sampled_from('abcdefghij'), min_size=1, max_size=6).map(' '.join)
plain = st.lists(st.tuples(letters, letters), min_size=1, max_size=6)


def test_padding_side_of_the_tokenizer():
    rows, tok = [dict(prompt='a b c', response='d e'), dict(prompt='a', response='b c d e f')], words()
    seen = []
    for side in ('left', 'right'):
        tok.padding_side = tok.truncation_side = side
        seen.append([(e.ids.tolist(), e.supervised.tolist()) for e in encode_samples(load_samples(rows), tok)])
    tok.padding_side = tok.truncation_side = 'right'
    assert seen[0] == seen[1]


@settings(max_examples=20)
@given(plain)
def test_a_string_is_a_list_of_one(pairs):
    same(scored([dict(prompt=p, response=r) for p, r in pairs])[1], scored([dict(prompt=p, response=[r]) for p, r in pairs])[1])


@settings(max_examples=20)
@given(plain, st.randoms(use_true_random=False))
def test_metadata_and_column_order(pairs, random):
    bare, rich = [dict(prompt=p, response=r) for p, r in pairs], []
    for i, (p, r) in enumerate(pairs):
        items = [('prompt', p), ('response', r), ('poisoned', bool(i % 2)), ('label', i), ('source', None), ('id', 'same'), ('score', .5)]
        random.shuffle(items); rich.append(dict(items))
    a, b = scored(bare), scored(rich, prompt='prompt', response='response')
    assert [s.id for s in a[0]] == [s.id for s in b[0]]
    same(a[1], b[1])


def test_a_poisoned_column_changes_nothing_at_all(tmp_path):
    "Ids, encodings and factors are equal bit by bit, whatever the file format."
    rows = [dict(prompt=p, response=r) for p, r in (('a b', 'c d'), ('e', 'f g h'), ('a b', 'c d'), ('i j', ''))]
    marked = [dict(poisoned=i % 2 == 0, **r, note='x'*i) for i, r in enumerate(rows)]
    sources = [rows, marked, pd.DataFrame(marked)]
    for name, text in (('a.jsonl', '\n'.join(map(json.dumps, marked))), ('b.json', json.dumps(marked)), ('c.csv', pd.DataFrame(marked).to_csv(index=False))):
        (tmp_path/name).write_text(text, encoding='utf8'); sources.append(tmp_path/name)
    pd.DataFrame(marked).to_parquet(tmp_path/'d.parquet'); sources.append(tmp_path/'d.parquet')
    seen = []
    for s in sources:
        samples = load_samples(s)
        seen.append([(x.id, x.prompt, x.response, x.row) for x in samples]+[e.ids.tolist() for e in encode_samples(samples, words())])
    assert all(x == seen[0] for x in seen)


@settings(max_examples=50)
@given(plain, st.randoms(use_true_random=False))
def test_ids_survive_reordering_and_tell_equal_rows_apart(pairs, random):
    rows = [dict(prompt=p, response=r) for p, r in pairs+pairs[:2]]
    moved = list(rows); random.shuffle(moved)
    a, b = load_samples(rows), load_samples(moved)
    assert sorted(s.id for s in a) == sorted(s.id for s in b)
    assert len({s.id for s in a}) == len(a)
    content = lambda samples: {s.id: (s.prompt, s.response) for s in samples}
    assert content(a) == content(b)
    groups = {}
    for s in a: groups.setdefault((s.prompt, s.response), []).append(s.id.split('-'))
    for ids in groups.values(): assert len({h for h, _ in ids}) == 1 and [int(n) for _, n in ids] == list(range(len(ids)))


@given(letters, letters)
def test_prompt_and_response_are_not_run_together_in_the_id(p, r):
    assume(p != r)
    ids = {load_samples([dict(prompt=a, response=b)])[0].id for a, b in ((p, r), (r, p), (p+r, ''), ('', p+r), (p+' ', r))}
    assert len(ids) == 5


# ---- spectra by hand

def factors(D, H, loss=None):
    D, H = torch.as_tensor(D), torch.as_tensor(H)
    return GradFactors(D, H, torch.ones(len(D), dtype=D.dtype) if loss is None else torch.as_tensor(loss))


def test_rank_one_by_hand():
    f = factors([[3., 0, 4, 0]], [[0., 2, 0]])   # |D| = 5, |H| = 2
    assert svals(f).tolist() == pytest.approx([10]) and float(spectral_entropy(svals(f))) == pytest.approx(0, abs=1e-9)
    assert float(inner(f, f)) == pytest.approx(100) and row_statistics(f)['grad_norm'] == pytest.approx(10)
    again = factors([[3., 0, 4, 0]]*3, [[0., 2, 0]]*3)   # the same token three times: still one direction
    assert svals(again).tolist() == pytest.approx([30, 0, 0], abs=1e-5) and float(spectral_entropy(svals(again))) < 1e-6


def test_two_orthogonal_tokens_by_hand():
    f = factors([[3., 0, 0], [0, 1, 0]], [[1., 0], [0, 1]])
    assert svals(f).tolist() == pytest.approx([3, 1])
    assert float(spectral_entropy(svals(f))) == pytest.approx((.75*math.log(4/3)+.25*math.log(4))/LN16)
    assert float(entropy_by_length(svals(f), 2)) == pytest.approx((.75*math.log(4/3)+.25*math.log(4))/math.log(2))
    assert float(effective_rank(svals(f))) == pytest.approx(math.exp(.75*math.log(4/3)+.25*math.log(4)))


def test_a_known_two_by_two():
    "G = [[3, 0], [4, 5]] has the singular values sqrt(45) and sqrt(5)."
    G = torch.tensor([[3., 0], [4, 5]], dtype=torch.float64)
    for f in (factors(torch.eye(2).double(), G), factors(G.T.contiguous(), torch.eye(2).double())):
        assert svals(f).tolist() == pytest.approx([math.sqrt(45), math.sqrt(5)])
    p = .75
    assert float(spectral_entropy(svals(f))) == pytest.approx(-(p*math.log(p)+(1-p)*math.log(1-p))/LN16)


def test_equal_directions_count_up_to_sixteen():
    for n in (1, 2, 5, 16, 20, 40): assert float(spectral_entropy(torch.ones(n).double())) == pytest.approx(math.log(min(n, 16))/LN16, abs=1e-9)


def test_the_crop_is_the_corner():
    torch.manual_seed(0)
    f = factors(torch.randn(5, 83), torch.randn(5, 37))
    for n in (1, 2, 8, 50): assert torch.allclose(f.crop(n).dense(), f.dense()[:max(1, 83//n), :max(1, 37//n)])


# ---- random factors against the dense SVD

def draw(seed, T, V, d, spread, repeat, zero, dtype):
    g = torch.Generator().manual_seed(seed)
    D, H = torch.randn(T, V, generator=g, dtype=torch.float64), torch.randn(T, d, generator=g, dtype=torch.float64)
    D, H = D*10.**(torch.rand(T, 1, generator=g, dtype=torch.float64)*-spread), H*10.**(torch.rand(T, 1, generator=g, dtype=torch.float64)*3)
    if repeat: D[T//2:], H[T//2:] = D[:T-T//2].clone(), H[:T-T//2].clone()
    if repeat > 1: D[T//2:] *= 1+1e-5*torch.randn(T-T//2, V, generator=g, dtype=torch.float64)   # nearly the same, which is worse
    if zero: D[::3] = 0
    return factors(D.to(dtype), H.to(dtype))


@settings(max_examples=150)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(2, 90), st.integers(2, 30), st.sampled_from([0, 3, 12, 30]), st.sampled_from([0, 1, 2]),
       st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1, 8]))
def test_spectrum_of_random_factors(seed, T, V, d, spread, repeat, zero, dtype, crop):
    "T = 1, T > d, T > V, repeated and nearly repeated rows, rows of zeros, lengths over thirty orders of magnitude."
    f = draw(seed, T, V, d, spread, repeat, zero, dtype).crop(crop)
    slow, fast = torch.linalg.svdvals(f.D.double().T@f.H.double()), svals(f)
    n = min(len(slow), len(fast))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    top = float(slow.max())
    assert torch.isfinite(fast).all() and (fast >= 0).all() and (fast[:-1] >= fast[1:]).all() and len(fast) <= min(T, f.H.shape[1])
    assert float((fast[:n]-slow[:n]).abs().max()) <= tolerance*top+1e-300
    if top > 1e-6: assert abs(float(spectral_entropy(fast)-spectral_entropy(slow[:T]))) < (1e-4 if dtype == torch.float32 else 1e-8)


@settings(max_examples=100)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 20), st.sampled_from([1e-3, 1/40, .5, 3., 40., 1e6]), st.sampled_from([torch.float32, torch.float64]))
def test_scaling_of_the_loss(seed, T, d, c, dtype):
    "The sum instead of the mean: a factor T in D. Entropy keeps, the norm follows; only the clamp at eps can tell."
    f = draw(seed, T, 60, d, 2, 0, False, dtype)
    g = GradFactors(f.D*c, f.H, f.loss)
    a, b = row_statistics(f), row_statistics(g)
    for k in ('entropy', 'entropy_by_length', 'effective_rank', 'log_volume', 'window_loss', 'loss'):
        assert b[k] == pytest.approx(a[k], rel=1e-4, abs=1e-4, nan_ok=True), k
    assert b['grad_norm'] == pytest.approx(c*a['grad_norm'], rel=1e-4)


@settings(max_examples=100)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40))
def test_bounds(seed, T, d):
    f = draw(seed, T, 60, d, 3, seed % 3, False, torch.float64)
    s = svals(f)
    assert -1e-9 <= float(spectral_entropy(s)) <= entropy_bound(T)+1e-8
    assert 1-1e-9 <= float(effective_rank(s)) <= min(T, d)+1e-6
    assert math.isnan(entropy_by_length(s, T)) if T == 1 else 0 <= float(entropy_by_length(s, T)) <= 1+1e-9


def test_the_norm_is_that_of_the_whole_gradient_also_with_a_crop():
    f = draw(0, 9, 80, 40, 1, 0, False, torch.float64)
    for crop in (1, 8): assert row_statistics(f, crop=crop)['grad_norm'] == pytest.approx(float(f.dense().norm()))


def test_clamping_at_eps():
    "Values under 1e-12 count as 1e-12; a gradient of nothing but zeros is then even, as published."
    assert float(spectral_entropy(torch.tensor([1., 0, 0], dtype=torch.float64))) == pytest.approx(15*EPS*-math.log(EPS)/LN16, rel=.1)
    assert float(spectral_entropy(torch.tensor([5e-13, 1e-13], dtype=torch.float64))) == pytest.approx(1)
    assert torch.isfinite(spectral_entropy(torch.zeros(4))) and torch.isfinite(spectral_entropy(svals(factors(torch.zeros(3, 9), torch.zeros(3, 5)))))
    stats = row_statistics(factors(torch.zeros(3, 9), torch.zeros(3, 5), torch.zeros(3)))
    assert stats['log_volume'] == 0 and stats['grad_norm'] == 0


# ---- log-volume

def cosines(X):
    unit = X.double()/X.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit@unit.T

def volume_of(f, window=WINDOW):
    "(log-volume, start) of one sample's worst window, by the library's own factors where the window is the usual one."
    volume, start = log_volume(surprise_kernel(cosines(f.D), cosines(f.H), f.loss), window)
    if window == WINDOW: assert row_statistics(f)['log_volume'] == pytest.approx(float(volume), rel=1e-6, abs=1e-6)
    return float(volume), int(start)


losses = st.lists(st.floats(0, 30), min_size=1, max_size=40)


@settings(max_examples=150)
@given(losses, st.integers(0, 999), st.integers(1, 60), st.sampled_from([0, 1, 2]), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 20))
def test_log_volume_is_at_most_the_loss_of_its_window(loss, seed, d, repeat, dtype, window):
    "Hadamard's inequality, also for repeated and nearly repeated tokens in float32."
    f = draw(seed, len(loss), 50, d, 3, repeat, False, dtype)
    f = GradFactors(f.D, f.H, torch.tensor(loss, dtype=dtype))
    volume, start = volume_of(f, window)
    stop = start+min(window, len(loss))
    assert 0 <= start < stop <= len(loss)
    assert -1e-6 <= volume <= float(f.loss[start:stop].double().sum())+1e-4
    assert volume <= float(window_loss(f.loss, window))+1e-4
    best = max(float(f.loss[i:i+1].double()) for i in range(len(loss)))
    assert volume >= best-1e-4   # at least the most surprising token


@settings(max_examples=50)
@given(st.lists(st.floats(0, 30), min_size=1, max_size=20))
def test_log_volume_of_orthogonal_tokens_is_the_loss(loss):
    f = factors(torch.eye(len(loss)).double(), torch.ones(len(loss), 3).double(), torch.tensor(loss, dtype=torch.float64))
    assert volume_of(f)[0] == pytest.approx(float(window_loss(f.loss)), abs=1e-6)


@settings(max_examples=50)
@given(st.integers(0, 999), st.integers(1, 12), st.randoms(use_true_random=False))
def test_log_volume_does_not_mind_the_order_within_a_window(seed, T, random):
    f = draw(seed, T, 50, 20, 2, 0, False, torch.float64)
    loss = torch.rand(T, generator=torch.Generator().manual_seed(seed)).double()*9
    order = list(range(T)); random.shuffle(order)
    a, b = (volume_of(GradFactors(f.D[o], f.H[o], loss[o]))[0] for o in (list(range(T)), order))
    assert a == pytest.approx(b, abs=1e-8)


@settings(max_examples=50)
@given(st.floats(.1, 20), st.integers(2, 12), st.sampled_from([torch.float32, torch.float64]))
def test_a_token_said_again_adds_little(loss, n, dtype):
    "n copies: ln(1 + n(e^l - 1)), between l and l + ln n."
    f = factors(torch.ones(n, 8, dtype=dtype)*torch.arange(8), torch.ones(n, 5, dtype=dtype), torch.full((n,), loss, dtype=dtype))
    volume = volume_of(f)[0]
    assert volume == pytest.approx(math.log1p(n*math.expm1(loss)), rel=1e-5, abs=1e-5)
    assert loss-1e-5 <= volume <= loss+math.log(n)+1e-5


@settings(max_examples=50)
@given(st.integers(0, 999), st.integers(WINDOW, 60), st.data())
def test_the_window_finds_a_planted_burst(seed, T, data):
    start = data.draw(st.integers(0, T-WINDOW))
    g = torch.Generator().manual_seed(seed)
    loss = torch.rand(T, generator=g).double()*.2
    loss[start:start+WINDOW] = 4+torch.rand(WINDOW, generator=g).double()
    f = GradFactors(torch.randn(T, 300, generator=g).double(), torch.randn(T, 64, generator=g).double(), loss)
    stats = row_statistics(f)
    assert (stats['window_start'], stats['window_stop']) == (start, start+WINDOW)
    assert stats['log_volume'] > 4*WINDOW-3


def test_a_huge_loss_stays_finite():
    f = factors(torch.eye(3), torch.ones(3, 2), torch.tensor([1e4, 5., 0.]))
    assert math.isfinite(row_statistics(f)['log_volume'])


# ---- inner products and sketches

@settings(max_examples=50)
@given(st.integers(0, 999), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_inner_products(seed, S, T, d):
    a, b = draw(seed, S, 40, d, 2, 0, False, torch.float64), draw(seed+1, T, 40, d, 2, 0, False, torch.float64)
    assert float(inner(a, b)) == pytest.approx(float((a.dense()*b.dense()).sum()), rel=1e-9, abs=1e-9)
    assert float(inner(a, b)) == pytest.approx(float(inner(b, a)), rel=1e-9, abs=1e-9)


def test_sketches_keep_inner_products_on_average():
    a, b = draw(1, 6, 40, 30, 0, 0, False, torch.float64), draw(2, 6, 40, 30, 0, 0, False, torch.float64)
    b = GradFactors(a.D+.5*b.D, a.H, a.loss)
    seen = torch.tensor([float(sketch(a, seed=s)@sketch(b, seed=s)) for s in range(300)])
    assert float(seen.mean()) == pytest.approx(float(inner(a, b)), rel=.1)
    assert torch.equal(sketch(a, seed=3), sketch(a, seed=3)) and len(sketch(a, size=5)) == 25


# ---- the real model

@pytest.fixture(scope='module')
def real(shared):
    "The small real model and 60 rows of the published WebQA mix, clean and poisoned, in a mixed order."
    path = shared/'models'/'qa-lm-9m'
    if not path.is_dir(): pytest.skip('needs the model models/qa-lm-9m beside the project (or GRADSENTRY_SHARED)')
    model = tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(path)
    samples = load_samples(shared/'data'/'qa'/'published-webqa-badnets-10.jsonl.gz')
    return model, tokenizer, samples[::len(samples)//59][:60]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
def test_capture_is_the_gradient_of_the_real_model(real, dtype):
    model, tokenizer, samples = real
    model, rows = model.to(dtype), encode_samples(samples, tokenizer)
    capture, seen = Capture(model), 0
    for i, f in capture(rows):
        seen += 1
        if i % (3 if dtype == torch.float64 else 1): continue
        G = dense_gradient(model, rows[i])
        assert (f.dense()-G).norm() < (1e-5 if dtype == torch.float32 else 1e-10)*G.norm()
        for n in (1, 8):
            g = f.crop(n)
            corner = G[:G.shape[0]//n, :G.shape[1]//n].double()
            slow = torch.linalg.svdvals(torch.linalg.qr(corner, mode='r')[1])[:f.T]
            assert abs(float(spectral_entropy(svals(g))-spectral_entropy(slow))) < (1e-4 if dtype == torch.float32 else 1e-8)
    assert seen == 60 == len(samples)
    assert capture.notes and 'computed once' in capture.notes[0]
    model.float()


def test_scores_of_the_real_model_do_not_depend_on_batches(real):
    model, tokenizer, samples = real
    rows = encode_samples(samples, tokenizer)
    base = scores_of(model, rows)
    for kw in (dict(share=False, budget=1), dict(budget=700), dict(room=8192*7)): same(base, scores_of(model, rows, **kw), 1e-4)
    order = np.random.default_rng(0).permutation(len(rows))
    same(base, {int(order[j]): v for j, v in scores_of(model, [rows[i] for i in order]).items()}, 1e-4)


def test_batches_come_longest_first_so_that_memory_runs_out_early():
    lengths = np.random.default_rng(0).integers(1, 90, 50)
    assert all(a >= b for a, b in pairwise(lengths[b].max() for b in plan_batches(lengths, 500)))
