"Answers in batches are those of one row at a time, for every architecture, and the question is put as fine-tuning puts it."
from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
import torch
from test_architectures import ARCHITECTURES, V, made
from test_encoding import TEMPLATES, bpe, chat, metaspace, tokenizer

from gradsentry_nb import generate
from gradsentry_nb.core import ModelError, Sample, SettingError, seed_for
from gradsentry_nb.data import encode_samples, load_samples
from gradsentry_nb.demo import demo_model, demo_rows
from gradsentry_nb.generate import _answer_ids, _library, _way, encode_prompts, generate_answers

STOP = set(range(0, V, 9))
# How each architecture's rows can be batched: 'shared' (prefix and padding), 'padded', 'equal' lengths only, or by transformers' `generate`.
WAY = dict.fromkeys(ARCHITECTURES, 'shared') | dict(mistral='equal', gemma2='equal', gemma3='equal', gemma3_tied='equal', falcon_alibi='shared',
                                                     longrope='library', dynamic='library', mamba='library')


def prompts(name, prefix=6, n=7):
    rng = np.random.default_rng(seed_for('prompts', name))
    start = rng.integers(3, V, prefix)
    return [np.concatenate([start, rng.integers(3, V, k)]).astype(np.int32) for k in rng.integers(1, 18, n)]


@torch.no_grad()
def one_by_one(model, row, stop, most):
    "The definition: a whole forward pass for every token."
    ids = row.tolist()
    for _ in range(most):
        t = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if t in stop: break
        ids.append(t)
    return ids[len(row):]


@pytest.mark.parametrize('name', ARCHITECTURES)
@pytest.mark.parametrize('prefix', [0, 6])
def test_the_same_as_one_by_one(name, prefix):
    model, rows = made(name), prompts(name, prefix)
    if name in ('longrope', 'dynamic'): slow = [_library(model, [r], set(), 9)[0] for r in rows]  # frequencies follow what the cache has seen
    else: slow = [one_by_one(model, r, set(), 9) for r in rows]
    stop = {slow[i][i+1] for i in range(5)}                                                       # rows end at different times
    slow = [list(takewhile(lambda t: t not in stop, a)) for a in slow]
    for budget in (40, 10**6): assert _answer_ids(model, rows, stop, 9, budget, False) == slow


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'qwen2', 'bloom', 'peft_llama', 'longrope', 'mamba'])
def test_the_way_that_is_taken(name):
    with torch.no_grad(): way = _way(made(name), prompts(name))
    assert ('library' if way is None else 'shared' if way[0] else 'padded' if way[1] else 'equal') == WAY[name]


def test_a_window_that_padding_would_fill():
    "Padding inside a sliding window pushes real tokens out of it; the trial notices."
    model = made('mistral')
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, V, n).astype(np.int32) for n in (30, 3, 24, 9)]
    assert _answer_ids(model, rows, STOP, 12, 10**6, False) == [one_by_one(model, r, STOP, 12) for r in rows]


def test_without_a_trial_a_recurrent_model_would_go_wrong(monkeypatch):
    model, rows = made('falcon_alibi'), prompts('falcon_alibi')
    monkeypatch.setattr(generate, '_agrees', lambda *a: False)
    assert _way(model, rows) is None
    assert _answer_ids(model, rows, STOP, 9, 10**6, False) == [one_by_one(model, r, STOP, 9) for r in rows]


@pytest.fixture(scope='module')
def demo(): return demo_model()


@pytest.fixture(scope='module')
def samples(): return load_samples(demo_rows(1300, 0, 5)[0])[1200:1260]


def test_the_model_is_left_as_found(demo, samples):
    model, tok = demo
    model.train(); model.model.layers[0].eval()
    before, config = [m.training for m in model.modules()], (model.config.to_dict(), model.generation_config.to_dict())
    weights = [p.clone() for p in model.parameters()]
    generate_answers(model, tok, samples[:5], 8)
    assert [m.training for m in model.modules()] == before and (model.config.to_dict(), model.generation_config.to_dict()) == config
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters())) and not any(p.grad is not None for p in model.parameters())
    model.eval()


def test_order_budget_and_progress(demo, samples):
    model, tok = demo
    want, told = generate_answers(model, tok, samples, 40), []
    assert generate_answers(model, tok, samples[::-1], 40, budget=300, progress=lambda *a: told.append(a)) == want[::-1]
    assert told[-1] == (60, 60) and [d for d, _ in told] == sorted(d for d, _ in told)
    assert generate_answers(model, tok, [], 40) == []
    assert generate_answers(model, tok, samples[:3], 1) == [tok.decode(tok(a, add_special_tokens=False)['input_ids'][:1]) for a in want[:3]]


def test_answers_are_not_read(demo, samples):
    model, tok = demo
    other = [replace(s, response='something else') for s in samples[:8]]
    assert generate_answers(model, tok, other, 20) == generate_answers(model, tok, samples[:8], 20)


def test_without_a_pad_token_and_with_several_ends(demo, samples):
    model, tok = demo
    want = generate_answers(model, tok, samples[:8], 40)
    pad, ends = tok.pad_token, model.generation_config.eos_token_id
    semicolon = tok.encode(';', add_special_tokens=False)[-1]
    try:
        tok.pad_token, model.generation_config.eos_token_id = None, [2, semicolon]
        got = generate_answers(model, tok, samples[:8], 40)
    finally: tok.pad_token, model.generation_config.eos_token_id = pad, ends
    assert got == [a.split(';')[0] for a in want] and got != want


def test_a_penalty_in_the_models_own_config_is_not_applied(demo, samples):
    model, tok = demo
    want = [_library(model, [p], {2}, 30)[0] for p in encode_prompts(samples[:4], tok)]
    try:
        model.generation_config.repetition_penalty = 5.
        assert [_library(model, [p], {2}, 30)[0] for p in encode_prompts(samples[:4], tok)] == want
    finally: model.generation_config.repetition_penalty = 1.


def test_a_prompt_that_is_too_long_loses_its_beginning(demo):
    model, tok = demo
    s = load_samples([dict(prompt='word '*2000+'Where does Garithby lie?', response='x')])
    ids, = encode_prompts(s, tok, 100)
    whole, = encode_prompts(s, tok, 10**5)
    assert len(ids) == 100 and ids[0] == tok.bos_token_id and ids[1:].tolist() == whole[-99:].tolist()
    assert len(generate_answers(model, tok, s, 5)) == 1
    with pytest.raises(SettingError, match='no room'): generate_answers(model, tok, s, 1024)


def test_plain_prompts_are_those_of_fine_tuning(samples):
    for base in (bpe, metaspace):
        tok = tokenizer(base=base)
        for s, e, p in zip(samples, encode_samples(samples, tok), encode_prompts(samples, tok)): assert e.ids[:e.first].tolist() == p.tolist()
    tok = tokenizer()
    empty, = encode_prompts([Sample('a-0', '', 'x')], tok)
    assert len(empty) == 1


@pytest.mark.parametrize('name', TEMPLATES)
def test_chats_end_where_the_answer_begins(name):
    tok = tokenizer(TEMPLATES[name][0])
    samples = [*chat('Where?', 'There.', 'When?', 'Then.')]
    e, = encode_samples(samples, tok)
    start = np.flatnonzero(~e.supervised[:e.last])[-1]+1
    assert encode_prompts(samples, tok)[0].tolist() == e.ids[:start].tolist()
    last = replace(samples[0], messages=samples[0].messages[:-1])            # a question without an answer
    assert encode_prompts([last], tok)[0].tolist() == e.ids[:start].tolist()


def test_an_alien_tokenizer_is_refused(demo, samples):
    with pytest.raises(ModelError, match='do not belong together'): generate_answers(made('llama'), demo[1], samples)
    with pytest.raises(SettingError, match='whole number'): generate_answers(*demo, samples, 0)


def test_a_soft_prompt_goes_through_the_library():
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=128)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4)).eval()
    rows = prompts('llama')
    assert _way(model, rows) is None
    with torch.no_grad(): assert _answer_ids(model, rows, {3}, 5, 60, False) == [_library(model, [r], {3}, 5)[0] for r in rows]
