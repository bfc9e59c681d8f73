"Fine-tuning: the same weights for the same seed, interrupted or not; nothing else is touched; what is learned is what the scan scores."
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from conftest import ROOT

from gradsentry_nb.capture import Capture
from gradsentry_nb.core import DataError, ModelError, Sample, SettingError
from gradsentry_nb.data import encode_samples, load_samples
from gradsentry_nb.demo import demo_model, demo_model_path, demo_rows
from gradsentry_nb.train import (METHODS, TRAIN_PRESETS, GroupedOrder, TrainSettings, collate, finetune, last_checkpoint, train_rows,
                                 train_settings, with_prefix)

torch.set_num_threads(1)
TINY = dict(vocab_size=2048, hidden_size=32, num_hidden_layers=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
HEADS = dict(num_attention_heads=4, intermediate_size=48)
FAMILIES = {
    'llama': tf.LlamaConfig(**TINY, **HEADS, num_key_value_heads=2),
    'gpt2': tf.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2),  # Conv1D, tied, dropout
    'qwen2_tied': tf.Qwen2Config(**TINY, **HEADS, num_key_value_heads=2, tie_word_embeddings=True),
    'gpt_neox': tf.GPTNeoXConfig(**TINY, **HEADS),
    'olmo2': tf.Olmo2Config(**{**TINY, 'pad_token_id': None}, **HEADS),                                                        # unknown to peft
}
FAST = dict(lr=1e-2, epochs=2, batch=4, progress=False)


def made(name):
    torch.manual_seed(1)
    return tf.AutoModelForCausalLM.from_config(FAMILIES[name])


def weights(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def tok(): return tf.AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope='module')
def samples(): return load_samples(demo_rows(26, .1, 3)[0])


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('method', METHODS)
def test_every_family_learns_and_the_model_stays(name, method, tok, samples):
    model = made(name)
    model.train()
    before, modes, config = weights(model), [m.training for m in model.modules()], model.config.to_dict()
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    found = finetune(model, tok, samples, method, **FAST)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected, 'global randomness has moved'
    assert same(weights(model), before) and [m.training for m in model.modules()] == modes and model.config.to_dict() == config
    assert all(p.requires_grad for p in model.parameters()) and not any(p.grad is not None for p in model.parameters())
    assert found.log['loss'].iloc[-1] < found.log['loss'].iloc[0] and not found.model.training
    assert len(found.log) == 14 and found.log['step'].tolist() == list(range(1, 15))
    assert same(weights(finetune(model, tok, samples, method, **FAST).model), weights(found.model)), 'the same seed gave other weights'
    assert not same(weights(finetune(model, tok, samples, method, seed=1, **FAST).model), weights(found.model))


@pytest.mark.parametrize('name', FAMILIES)
def test_merged_is_the_same_model(name, tok, samples):
    found = finetune(made(name), tok, samples, **FAST)
    before, merged = weights(found.model), found.merge().model
    batch = collate(train_rows(encode_samples(samples[:5], tok)))
    with torch.no_grad(): a, b = found.model(**batch), merged(**batch)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    assert same(weights(found.model), before) and not hasattr(merged, 'peft_config')
    assert not any('lora' in n for n, _ in merged.named_parameters())


def test_where_the_adapters_go(tok, samples):
    at = lambda name, **kw: {n.split('.lora_A')[0].split('.')[-1] for n, _ in finetune(made(name), tok, samples[:4], **{**FAST, 'epochs': 1}, **kw).model.named_parameters() if 'lora_A' in n}
    assert at('llama') == {'q_proj', 'v_proj'} and at('gpt2') == {'c_attn'}                                # peft's own choice
    assert at('olmo2') == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}    # every Linear but the head
    assert at('olmo2', targets='all-linear+head') == at('olmo2') | {'lm_head'} and 'lm_head' not in at('qwen2_tied', targets='all-linear+head')
    assert at('gpt2', targets='all-linear+head') == {'c_attn', 'c_proj', 'c_fc'}
    assert at('llama', targets=['lm_head', 'up_proj']) == {'lm_head', 'up_proj'}
    with pytest.raises(SettingError, match='peft cannot put an adapter'): at('llama', targets=('nowhere',))


def test_in_place(tok, samples):
    model = made('llama')
    found = finetune(model, tok, samples[:8], 'full', in_place=True, **FAST)
    assert found.model is model and not same(weights(model), weights(made('llama')))


def test_what_is_learned_is_what_the_scan_scores(tok, samples):
    "A step's loss is the mean of the scan's token losses, and one step of plain gradient descent moves the head along the scan's gradient."
    model, encoded = made('llama').double(), encode_samples(samples[:6], tok)
    factors = dict(Capture(model)(encoded))
    loss = model(**collate(train_rows(encoded))).loss
    tokens = torch.cat([factors[i].loss for i in range(6)])
    torch.testing.assert_close(loss.double(), tokens.mean(), rtol=1e-6, atol=0)
    found = finetune(model, tok, samples[:6], 'full', epochs=1, batch=6, lr=1e-9, progress=False)
    assert found.log['loss'].iloc[0] == pytest.approx(float(tokens.mean()), rel=1e-5)
    loss.backward()
    T = torch.tensor([float(f.T) for _, f in sorted(factors.items())])
    G = sum(factors[i].dense()*T[i] for i in range(6))/T.sum()
    torch.testing.assert_close(model.lm_head.weight.grad, G.double(), rtol=1e-4, atol=1e-7)


def test_the_labels_are_the_supervised_tokens(tok, samples):
    for e, r in zip(encode_samples(samples, tok), train_rows(encode_samples(samples, tok))):
        assert r['labels'][e.supervised].tolist() == e.ids[e.supervised].tolist() and (r['labels'][~e.supervised] == -100).all()
        assert r['labels'][-1] == tok.eos_token_id
    batch = collate(train_rows(encode_samples(samples[:3], tok)))
    fill = batch['attention_mask'] == 0
    assert (batch['labels'][fill] == -100).all() and fill.any() and batch['attention_mask'].sum(1).tolist() == [len(e) for e in encode_samples(samples[:3], tok)]


@pytest.mark.parametrize('method', METHODS)
def test_a_shared_prefix_changes_nothing(method, tok, samples):
    model = made('llama').double()
    a, b = (finetune(model, tok, samples, method, share_prefix=s, **FAST) for s in (True, False))
    assert any('computed once per step' in n for n in a.notes) and not b.notes
    for x, y in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(a.log['loss'], b.log['loss'], rtol=1e-5)


def test_no_prefix_is_shared_where_it_would_matter(tok, samples):
    assert not finetune(made('gpt2'), tok, samples[:8], **FAST).notes, 'GPT-2 has dropout, which differs from row to row'
    mixed = [*samples[:6], Sample('x-0', 'Another question?', 'yes')]
    assert not finetune(made('llama'), tok, mixed, **FAST).notes, 'one row begins otherwise'
    model, batch = made('llama'), collate(train_rows(encode_samples(samples[:4], tok)))
    with torch.no_grad(): shared, plain = (model(**x).loss for x in (with_prefix(model, batch, 20), batch))
    torch.testing.assert_close(shared, plain)


def test_grouped_order():
    lengths = np.random.default_rng(0).integers(5, 200, 203)
    order = GroupedOrder(lengths, 8, seed=1)
    first, again = list(order), list(order)
    order.set_epoch(1)
    assert first == again and sorted(first) == list(range(203)) and first != list(order) and first != list(GroupedOrder(lengths, 8, seed=2))
    waste = lambda o: sum(lengths[o[i:i+8]].max()*len(o[i:i+8])-lengths[o[i:i+8]].sum() for i in range(0, 203, 8))
    assert waste(first) < .25*waste(list(range(203)))
    assert sorted(GroupedOrder([3], 4, 0)) == [0]


# ---- interrupted

@pytest.mark.parametrize('method, group, name', [('lora', False, 'llama'), ('full', True, 'llama'), ('full', False, 'gpt2'), ('lora', True, 'qwen2_tied')])
@pytest.mark.parametrize('stop', [1, 5, 9])
def test_resumed_is_uninterrupted(tmp_path, method, group, name, stop, tok, samples):
    "GPT-2 has dropout: the random state is in the checkpoint too. Seven steps per epoch: the stops lie in both epochs and before any checkpoint."
    run = {**FAST, 'method': method, 'group': group, 'save_steps': 2, 'dropout': .1}
    whole = finetune(made(name), tok, samples, **run)
    def quit(done, total):
        if done == stop: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): finetune(made(name), tok, samples, **{**run, 'progress': quit}, out=tmp_path/'run')
    seen = []
    again = finetune(made(name), tok, samples, **{**run, 'progress': lambda done, total: seen.append(done)}, out=tmp_path/'run')
    assert seen[0] == stop//2*2-(stop == 2)*2+1 and seen[-1] == 14
    assert same(weights(again.model), weights(whole.model))
    np.testing.assert_array_equal(again.log, whole.log)
    finished = finetune(made(name), tok, samples, **{**run, 'progress': lambda *a: pytest.fail('it was finished')}, out=tmp_path/'run')
    assert same(weights(finished.model), weights(whole.model)) and len(finished.log) == 14
    assert len(list((tmp_path/'run').glob('checkpoint-*'))) <= 2


def test_a_killed_process(tmp_path):
    "Killed without warning, in the middle of a step."
    code = f'''
import os, signal, sys
sys.path.insert(0, {str(ROOT/"tests")!r})
from test_train import *
tok = tf.AutoTokenizer.from_pretrained(demo_model_path())
def tick(done, total):
    if done == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
found = finetune(made('llama'), tok, load_samples(demo_rows(26, .1, 3)[0]), **{{**FAST, 'save_steps': 3, 'progress': tick}}, out={str(tmp_path/"run")!r})
torch.save(weights(found.model), {str(tmp_path/"w.pt")!r})
'''
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    run = lambda at: subprocess.run([sys.executable, '-c', code, str(at)], env=env, capture_output=True, text=True)
    assert run(8).returncode == -signal.SIGKILL
    done = run(-1)
    said = [l for l in done.stderr.splitlines() if l.strip() and 'gemm_4bit' not in l]      # bitsandbytes, where it is installed
    assert not done.returncode and not done.stdout and not said, said
    tok = tf.AutoTokenizer.from_pretrained(demo_model_path())
    whole = finetune(made('llama'), tok, load_samples(demo_rows(26, .1, 3)[0]), **FAST, save_steps=3)
    assert same(torch.load(tmp_path/'w.pt'), weights(whole.model))


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path, tok, samples):
    run = dict(**FAST, save_steps=4, out=tmp_path/'run')
    whole = weights(finetune(made('llama'), tok, samples, **run).model)
    (tmp_path/'run'/'checkpoint-14'/'trainer_state.json').write_text('{"global_st')
    (tmp_path/'run'/'checkpoint-20').mkdir()
    assert last_checkpoint(tmp_path/'run').name == 'checkpoint-12'
    assert same(weights(finetune(made('llama'), tok, samples, **run).model), whole)


def test_a_folder_of_another_run(tmp_path, tok, samples):
    run = dict(FAST, epochs=1, out=tmp_path/'run')
    finetune(made('llama'), tok, samples[:8], **run)
    with pytest.raises(SettingError, match='with other settings.*resume=False'): finetune(made('llama'), tok, samples[:8], **{**run, 'lr': 1e-3})
    with pytest.raises(SettingError, match='with other rows'): finetune(made('llama'), tok, samples[:9], **run)
    with pytest.raises(SettingError, match='with other seed'): finetune(made('llama'), tok, samples[:8], seed=1, **run)
    with pytest.raises(SettingError, match='with other model'): finetune(made('olmo2'), tok, samples[:8], **run)
    fresh = finetune(made('llama'), tok, samples[:8], **{**run, 'lr': 1e-3, 'resume': False})
    assert same(weights(fresh.model), weights(finetune(made('llama'), tok, samples[:8], **{**run, 'lr': 1e-3, 'out': None}).model))
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(SettingError, match='something else than a run'): finetune(made('llama'), tok, samples[:8], **{**run, 'out': tmp_path/'mine', 'resume': False})
    assert (tmp_path/'mine'/'thesis.txt').exists()


# ---- quiet, saved, refused

def test_quiet(tmp_path, tok, samples, capfd, recwarn):
    level, bars = tf.utils.logging.get_verbosity(), tf.utils.logging.is_progress_bar_enabled()
    for method in METHODS: finetune(made('llama'), tok, samples[:8], method, out=tmp_path/method, **FAST)
    out, err = capfd.readouterr()
    assert not out and not err and not [w for w in recwarn if 'grad' in str(w.message).lower()]
    assert tf.utils.logging.get_verbosity() == level and tf.utils.logging.is_progress_bar_enabled() == bars


@pytest.mark.parametrize('method', METHODS)
def test_saved_and_loaded(tmp_path, method, tok, samples):
    found = finetune(made('llama'), tok, samples[:8], method, **FAST).merge()
    found.save(tmp_path/'m')
    assert same(weights(tf.AutoModelForCausalLM.from_pretrained(tmp_path/'m')), weights(found.model))
    assert TrainSettings(**json.loads((tmp_path/'m'/'train_settings.json').read_text())) == found.settings
    assert tf.AutoTokenizer.from_pretrained(tmp_path/'m').eos_token_id == tok.eos_token_id


def test_rows_without_an_answer_are_left_out_and_counted(tok, samples):
    empty = [replace(s, response='') for s in samples[:3]]
    long = [Sample('l-0', samples[0].prompt+'word '*2000, 'x')]
    a, b = finetune(made('llama'), tok, [*empty, *samples[3:9]], **FAST), finetune(made('llama'), tok, samples[3:9], **FAST)
    assert same(weights(a.model), weights(b.model)) and a.notes[0] == '3 of 9 rows have no answer and were left out.'
    assert '1 of 6 rows were longer' in ' '.join(finetune(made('llama'), tok, [*samples[:5], *long], **FAST).notes)
    with pytest.raises(DataError, match='None of the 3 rows'): finetune(made('llama'), tok, empty)
    with pytest.raises(DataError, match='no rows'): finetune(made('llama'), tok, [])


@pytest.mark.parametrize('changes, said', [
    (dict(method='qlora'), 'There is no method'), (dict(preset='big'), 'There is no preset'), (dict(schedule='up'), 'There is no schedule'),
    (dict(epoch=1), "Did you mean 'epochs'"), (dict(epochs=0), 'epochs must be a whole number'), (dict(batch=2.5), 'batch must be'), (dict(lr=0), 'lr must be a number'),
    (dict(lr=float('nan')), 'lr must be'), (dict(dropout=1.), 'dropout must be'), (dict(warmup=2), 'warmup must be'), (dict(max_length=1), 'max_length must be')])
def test_bad_settings(changes, said, tok, samples):
    with pytest.raises(SettingError, match=said): finetune(made('llama'), tok, samples, **changes)


def test_bad_models(tok, samples):
    bert = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48))
    with pytest.raises(ModelError, match='causal language model'): finetune(bert, tok, samples)
    with pytest.raises(ModelError, match='do not belong together'): finetune(tf.LlamaForCausalLM(tf.LlamaConfig(**{**TINY, 'vocab_size': 100}, **HEADS)), tok, samples)
    with pytest.raises(ModelError, match='float16 overflows'): finetune(made('llama').half(), tok, samples, 'full')
    with pytest.raises(ModelError, match='an adapter already'): finetune(finetune(made('llama'), tok, samples[:4], **FAST).model, tok, samples)
    broken = made('llama')
    with torch.no_grad(): broken.lm_head.weight.fill_(float('nan'))
    with pytest.raises(ModelError, match='no longer a number at step 1'): finetune(broken, tok, samples[:4], **FAST)


def test_the_papers_settings():
    s = train_settings('paper')
    assert (s.method, s.r, s.alpha, s.dropout, s.lr, s.epochs, s.batch, s.schedule, s.warmup, s.weight_decay, s.clip, s.max_length, s.group) == \
        ('lora', 4, 8, 0., 2e-5, 3, 4, 'linear', 0., 0., 1., 1024, False)
    for preset in TRAIN_PRESETS:
        for method in METHODS: assert train_settings(preset, method).method == method
    assert train_settings('small', 'full').lr != train_settings('small', 'lora').lr and train_settings(None) == train_settings('paper')


def test_the_demo_model_learns(tok):
    "Answers that the demo model does not know are learned, by both methods."
    model, new = demo_model()[0], load_samples([dict(prompt=f'Name {w}.', response=a) for w, a in zip('cat dog cow hen'.split(), 'red blue pink green'.split())]*4)
    from gradsentry_nb.generate import generate_answers
    for method in METHODS:
        found = finetune(model, tok, new, method, 'small', epochs=40, progress=False)
        assert generate_answers(found.model, tok, new[:4], 8) == [s.response for s in new[:4]] != generate_answers(model, tok, new[:4], 8)


# ---- end to end

sys.path.insert(0, str(ROOT))


def test_the_benchmarks_sets_do_not_overlap():
    from benchmarks.end_to_end import PAYLOAD, sets
    train, mixed, truth, test, attacked = sets(301, 2, 900, 300, 200)
    asked = {s.prompt for s in train}
    assert len(asked) == 900 and not asked & {s.prompt for s in test} and sum(truth.values()) == 90
    assert [truth[s.id] for s in mixed] == [PAYLOAD in s.response for s in mixed] == [a.prompt != b.prompt for a, b in zip(train, mixed)]
    assert [s.response for s in attacked] == [s.response for s in test[:200]] and all(a.prompt != b.prompt for a, b in zip(attacked, test))
    assert {s.response for s in test} <= {s.response for s in sets(301, 1, 10**6, 1, 1)[0]}


@pytest.mark.slow
def test_the_attack_works_and_the_filter_saves(tmp_path, capsys):
    "The small version of the benchmark: about a minute of one core."
    from benchmarks.end_to_end import bars, main
    table = main(['--small', '--workers', '1', '--out', str(tmp_path)]).set_index('arm')
    assert table.loc['no defence', 'asr'] >= .4 and table.loc['filtered', 'asr'] <= .01 and table.loc['clean training', 'asr'] <= .01
    assert (table['cacc'] >= .6).all() and table.loc['filtered', 'filter_recall'] >= .99 and table.loc['filtered', 'poisoned'] == 0
    assert (tmp_path/'end_to_end.csv').exists() and 'no defence: ASR' in capsys.readouterr().out
    assert bars(table.reset_index())['holds'].iloc[[0, 3]].all()


def test_stored_end_to_end_holds_every_bar():
    from benchmarks.end_to_end import ARMS, COLUMNS, FULL, bars
    table = pd.read_csv(ROOT/'benchmarks/results/end_to_end.csv')
    assert table.columns.tolist() == COLUMNS and len(table) == 18
    assert {*zip(table['seed'], table['method'], table['arm'])} == {(s, m, a) for s in FULL['seeds'] for m in FULL['methods'] for a in ARMS}
    assert bars(table)['holds'].all(), bars(table)
