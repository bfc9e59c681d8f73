"""Bad, odd and hostile input through the real command: refused in one sentence, or scanned and accounted for."""
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from gradsentry_nb.cli import main
from gradsentry_nb.core import DataError, Verdict
from gradsentry_nb.data import load_samples
from gradsentry_nb.demo import demo_model_path, demo_path

MODEL = demo_model_path()
FILES = {'clean.jsonl', 'dropped.jsonl', 'report.html', 'scores.parquet', 'scores.parquet.json', 'verdict.json'}
ROWS = [dict(prompt=f'Where is {x}?', response=f'In the {y} hills') for x, y in zip('abcdef', 'green red old new far low'.split())]
# Nothing that acts on a terminal or hides in it; line breaks may stand between lines.
ACTIVE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e0fff]')


def jsonl(rows): return ''.join(json.dumps(r)+'\n' for r in rows)


GOOD = jsonl(ROWS)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.fixture
def gradsentry(tmp_path, capfd):
    "Run `gradsentry scan` in this process: (status, stdout, stderr)."
    def run(source, *args, model=MODEL, out=None):
        capfd.readouterr()
        status = main(['scan', str(source), '--model', str(model), '--out', str(out or tmp_path/'out'), '--quiet', *map(str, args)])
        return status, *capfd.readouterr()
    return run


@pytest.fixture
def refused(gradsentry, tmp_path):
    "Run it, expect a refusal in one sentence that says all of `words`, and nothing written; gives the sentence."
    def run(source, *words, args=(), model=MODEL, out=None):
        before = tree(tmp_path)
        status, said, err = gradsentry(source, *args, model=model, out=out)
        assert status == 2, err
        sentence(err)
        for w in words: assert w in err
        assert tree(tmp_path) == before
        return err
    return run


@pytest.fixture
def scanned(gradsentry, tmp_path):
    "Run it, expect success: (what it said, scores, verdict, rows of clean.jsonl, rows of dropped.jsonl)."
    def run(source, *args, model=MODEL):
        status, said, err = gradsentry(source, *args, model=model)
        assert status == 0, err
        assert err == '' and not ACTIVE.search(said)
        out = tmp_path/'out'
        assert {p.name for p in out.iterdir()} == FILES
        verdict = Verdict.from_json((out/'verdict.json').read_text(encoding='utf8'))
        scores = pd.read_parquet(out/'scores.parquet')
        clean, dropped = ((out/n).read_bytes().splitlines() for n in ('clean.jsonl', 'dropped.jsonl'))
        assert len(clean)+len(dropped) == len(scores) == len(verdict.scores)
        assert len(dropped) == scores['flagged'].sum() == len(verdict.drop)
        return said, scores, verdict, clean, dropped
    return run


def tree(folder):
    "Every path below `folder` with its size and time: what a refusal must leave alone."
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob('*'))


def sentence(err):
    "One line, one subject, readable, no traceback."
    assert err.startswith('gradsentry: ') and err.endswith('\n'), err
    line = err[:-1]
    assert '\n' not in line and 'Traceback' not in line and not ACTIVE.search(line), err
    assert len(line) < 500 and line[-1] in '.?', err


# ---- files that cannot be read

@pytest.mark.parametrize('name', ['nope.jsonl', 'no/such/folder/x.csv.gz', './nope', 'a\x1b[31mb\u202e.json', 'x'*300+'.jsonl'])
def test_missing_file(refused, tmp_path, name):
    refused(tmp_path/name if name[0] != '.' else name, 'there is no such file')


@pytest.mark.parametrize('name', ['no-such-set', 'nobody/no-such-set'])
def test_hub_name_without_a_hub(refused, name):
    assert refused(name, name, 'neither a file here nor a data set').count(name) <= 2


def test_folder_that_is_no_data_set(refused, tmp_path):
    (tmp_path/'some folder').mkdir()
    refused(tmp_path/'some folder', 'some folder', 'no saved data set', '.jsonl', 'save_to_disk')


@pytest.mark.parametrize('name', ['dataset_info.json', 'dataset_dict.json', 'state.json'])
def test_saved_data_set_that_is_broken(refused, tmp_path, name):
    (tmp_path/'set').mkdir()
    (tmp_path/'set'/name).write_text('{}')
    refused(tmp_path/'set', 'set', 'saved data set')


@pytest.mark.parametrize('name', ['x.xyz', 'x', 'x.zip', 'x.txt', 'x.gz', 'x.jsonl.zst'])
def test_unknown_format(refused, tmp_path, name):
    refused(write(tmp_path/name, GOOD), name, 'unknown format', '.jsonl', '.parquet')


def parquet(rows, folder):
    path = folder/'made.parquet'
    pd.DataFrame(rows).to_parquet(path)
    data = path.read_bytes()
    path.unlink()
    return data


def damaged(data):
    "The ways in which a file arrives broken. (Plain Parquet has no checksums: a flipped bit in it may just be other text.)"
    flipped = bytearray(data)
    for i in range(len(data)//3, len(data)//3+24): flipped[i] ^= 0x5a
    return dict(half=data[:len(data)//2], short=data[:-5], start=data[:7], flipped=bytes(flipped))


@pytest.mark.parametrize('how', ['half', 'short', 'start', 'flipped'])
@pytest.mark.parametrize('name', ['x.jsonl.gz', 'x.json.gz', 'x.csv.gz', 'x.parquet', 'x.parquet.gz'])
def test_broken_or_truncated(refused, tmp_path, name, how):
    if (name, how) == ('x.parquet', 'flipped'): how = 'short'
    plain = {'x.jsonl.gz': jsonl(ROWS*50), 'x.json.gz': json.dumps(ROWS*50), 'x.csv.gz': pd.DataFrame(ROWS*50).to_csv(index=False)}
    data = plain[name].encode() if name in plain else parquet(ROWS, tmp_path)
    refused(write(tmp_path/name, damaged(gzip.compress(data) if name.endswith('.gz') else data)[how]), name)


@pytest.mark.parametrize('name', ['x.jsonl.gz', 'x.json.gz', 'x.csv.gz', 'x.parquet.gz', 'x.parquet'])
def test_not_what_its_ending_says(refused, tmp_path, name):
    refused(write(tmp_path/name, GOOD), name)


def test_broken_crc(refused, tmp_path):
    data = bytearray(gzip.compress(GOOD.encode()))
    data[-6] ^= 255
    refused(write(tmp_path/'x.jsonl.gz', bytes(data)), 'x.jsonl.gz', 'compressed')


@pytest.mark.parametrize('text,words', [
    (json.dumps(ROWS)[:-20], ('line 1', 'broken JSON')), (json.dumps(ROWS, indent=1)[:-60], ('line 2', 'broken JSON')),
    ('{"prompt":', ('broken JSON',)), ('3', ('array of objects',)), ('"text"', ('array of objects',)), ('{"a": [{}], "b": [{}]}', ('a, b',)),
    ('['*100_000, ('nested',)), ('[{"prompt": "a", "response": "b", "n": '+'9'*5000+'}]', ('number',))])
def test_broken_json(refused, tmp_path, text, words):
    refused(write(tmp_path/'x.json', text), 'x.json', *words)


@pytest.mark.parametrize('line', ['{"prompt": "a" "response": "b"}', "{'prompt': 'a', 'response': 'b'}", '{"prompt": "a", "response": "b"', 'nul',
                                  '{"prompt": "a\tb", "response": "c"}', '{"prompt":'+'['*100_000, '{"prompt": "a", "response": "b", "n": '+'9'*5000+'}'])
@pytest.mark.parametrize('ending', ['.jsonl', '.jsonl.gz', '.ndjson'])
def test_broken_line(refused, tmp_path, line, ending):
    data = (jsonl(ROWS[:4])+'\n'+line+'\n'+GOOD).encode()
    refused(write(tmp_path/f'x{ending}', gzip.compress(data) if ending.endswith('.gz') else data), f'x{ending}', 'line 6')


@pytest.mark.parametrize('ending', ['.jsonl', '.json', '.csv', '.tsv'])
@pytest.mark.parametrize('code', ['latin-1', 'utf-16'])
@pytest.mark.parametrize('packed', [False, True])
def test_not_utf8(refused, tmp_path, ending, code, packed):
    row = dict(prompt='Müller?', response='Jürgen')
    text = {'.jsonl': GOOD+json.dumps(row, ensure_ascii=False), '.json': json.dumps([row], ensure_ascii=False, indent=1),
            '.csv': 'prompt,response\nMüller?,Jürgen\n', '.tsv': 'prompt\tresponse\nMüller?\tJürgen\n'}[ending]
    data, name = text.encode(code), f'x{ending}{".gz"*packed}'
    line = 'line 1:' if code == 'utf-16' else {'.jsonl': 'line 7', '.json': 'line 3'}.get(ending, 'line 2')
    refused(write(tmp_path/name, gzip.compress(data) if packed else data), name, line, 'UTF-8')


# ---- rows that cannot be read

@pytest.mark.parametrize('name,data', [
    ('x.jsonl', ''), ('x.jsonl', '\n \n\t\r\n'), ('x.jsonl', '\ufeff'), ('x.json', '[]'), ('x.json', ''), ('x.json', '\n\n'), ('x.csv', ''), ('x.csv', 'prompt,response\n'),
    ('x.tsv', '\n'), ('x.jsonl.gz', gzip.compress(b'', mtime=0)), ('x.jsonl.gz', b''), ('x.json.gz', gzip.compress(b'[]', mtime=0))])
def test_no_rows(refused, tmp_path, name, data):
    refused(write(tmp_path/name, data), name, 'no rows')


def test_no_rows_in_parquet(refused, tmp_path):
    refused(write(tmp_path/'x.parquet', parquet(dict(prompt=[], response=[]), tmp_path)), 'x.parquet', 'no rows')


@pytest.mark.parametrize('row,words', [
    ({'prompt': 'a'}, ("'response'", 'missing', "'prompt'")), ({'response': 'a', 'x': 1}, ("'prompt'", 'missing')), ({}, ("'prompt'", 'missing')),
    ('text', ('an object',)), (3, ('an object',)), (None, ('an object',)), (['a', 'b'], ('an object',))])
@pytest.mark.parametrize('ending', ['.jsonl', '.json'])
def test_rows_without_the_fields(refused, tmp_path, row, words, ending):
    rows = [*ROWS, row, *ROWS]
    text = jsonl(rows) if ending == '.jsonl' else json.dumps(rows)
    refused(write(tmp_path/f'x{ending}', text), f'x{ending}', 'line 7:' if ending == '.jsonl' else 'row 7:', *words)


@pytest.mark.parametrize('row', ['text', 3, None, [], ['a']])
def test_first_row_is_no_object(refused, tmp_path, row):
    refused(write(tmp_path/'x.jsonl', jsonl([row, *ROWS])), 'x.jsonl', 'line 1:', 'an object')


def test_first_row_is_empty(refused, tmp_path):
    assert 'columns are .' not in refused(write(tmp_path/'x.jsonl', jsonl([{}, *ROWS])), 'x.jsonl', 'prompt')


@pytest.mark.parametrize('field', ['prompt', 'response'])
@pytest.mark.parametrize('value', ['3', '1.5', 'null', 'true', 'NaN', '{"a": 1}', '["a", 3]', '["a", null]', '[["a"]]', '[{"text": "a"}]'])
def test_value_that_is_no_text(refused, tmp_path, field, value):
    other = 'prompt' if field == 'response' else 'response'
    row = f'{{"{other}": "x", "{field}": {value}}}\n'
    err = refused(write(tmp_path/'x.jsonl', GOOD+row), 'x.jsonl', 'line 7:', repr(field), value)
    assert 'NoneType' not in err


@pytest.mark.parametrize('text,words', [
    ('a,b\na,b,c\n', ('row 2', 'more fields')), ('a,b\na\n', ('row 2', "'response'")), ('a,b\n"a,b\n', ('broken CSV',)),
    ('a,b\n"a"x,b\n', ('line 3', 'broken CSV'))])
@pytest.mark.parametrize('ending', ['.csv', '.tsv'])
def test_broken_table(refused, tmp_path, text, words, ending):
    text = 'prompt,response\n'+text
    refused(write(tmp_path/f'x{ending}', text if ending == '.csv' else text.replace(',', '\t')), f'x{ending}', *words)


def test_table_with_a_column_twice(refused, tmp_path):
    refused(write(tmp_path/'x.csv', 'prompt,note,note,response\na,1,2,b\n'), 'x.csv', "'note'")


@pytest.mark.parametrize('row,names', [
    (dict(prompt='a', question='b', response='c'), 'prompt, question'), (dict(prompt='a', response='c', answer='d'), 'response, answer'),
    (dict(foo='a', bar='b'), 'foo, bar'), (dict(messages=[], conversations=[]), 'messages, conversations'),
    ({'prompt': 'a', 'r\x1b[31m\u202e<b>': 'c'}, 'r‹U+001B›[31m‹U+202E›<b>')])
def test_ambiguous_columns(refused, tmp_path, row, names):
    err = refused(write(tmp_path/'x.jsonl', jsonl([row])), 'x.jsonl', *names.split(', '), '--prompt', '--response')
    assert 'columns' in err


@pytest.mark.parametrize('turns,words', [
    ('text', ('list of chat turns',)), ([], ('list of chat turns',)), (None, ('list of chat turns',)), (['hello'], ('turn 1', '"role"')),
    ([dict(role='user', content='a'), dict(role='assistant')], ('turn 2', "'content'")),
    ([dict(role='user', content='a'), dict(role='assistant', content=None)], ('turn 2', "'content'", 'null')),
    ([dict(role='user', content=[dict(type='text', text='a')])], ('turn 1', "'content'")),
    ([{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 3}], ('turn 2', "'value'"))])
def test_broken_conversation(refused, tmp_path, turns, words):
    good = dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')])
    refused(write(tmp_path/'x.jsonl', jsonl([good, dict(messages=turns)])), 'x.jsonl', 'line 2', *words)


# ---- arguments

@pytest.mark.parametrize('args,words', [
    (('--threshold', 'vally'), ("'valley'",)), (('--threshold', 'nan'), ("'nan'",)), (('--threshold', 'calibrated'), ('--known-clean',)),
    (('--preset', 'papr'), ("'paper'",)), (('--statistic', 'entropie'), ("'entropy'",)), (('--limit', '0'), ('--limit',)), (('--limit', '-3'), ('--limit',)),
    (('--max-length', '1'), ('max_length',)), (('--budget', '0'), ('budget',)), (('--dtype', 'f32'), ("'float32'",)), (('--device', 'gpu'), ('gpu', 'cpu', 'cuda')),
    (('--device', 'cuda:99'), ('cuda:99',)), (('--prompt', 'prompt'), ('--response',)), (('--response', 'response'), ('--prompt',)),
    (('--prompt', 'p', '--response', 'r'), ("'p'", "'prompt', 'response'")), (('--messages', 'chat'), ("'chat'",)),
    (('--prompt', 'prompt', '--response', 'response', '--messages', 'prompt'), ('--messages',)), (('--context', 'passage'), ("'passage'",)),
    (('--split', 'test'), ('--split', 'test')), (('--known-clean', 'nope.jsonl'), ('nope.jsonl', 'no such file')), (('--fpr', '0.1'), ('--fpr', 'calibrated'))])
def test_arguments(refused, tmp_path, args, words):
    refused(write(tmp_path/'x.jsonl', GOOD), *words, args=args)


@pytest.mark.parametrize('fpr', ['0', '1', '-1', '0.001', 'nan'])
def test_false_positive_rate_that_cannot_be_had(refused, tmp_path, fpr):
    path = write(tmp_path/'x.jsonl', GOOD)
    refused(path, 'rate', args=('--known-clean', path, '--fpr', fpr))


@pytest.mark.parametrize('args', [(), ('scan',), ('scan', 'x.jsonl'), ('scan', 'x.jsonl', '--model', 'm', '--limit', 'x'), ('nope',), ('scan', 'x.jsonl', '--model', 'm', '--nope')])
def test_command_line_that_makes_no_sense(capsys, args):
    with pytest.raises(SystemExit) as e: main(list(args))
    assert e.value.code == 2 and 'usage: gradsentry' in capsys.readouterr().err


# ---- places for the results

@pytest.mark.parametrize('where', ['file', 'file/below', '/proc/nowhere/x'])
def test_out_that_cannot_be_written(refused, tmp_path, where):
    write(tmp_path/'file', 'mine')
    refused(write(tmp_path/'x.jsonl', GOOD), where.rpartition('/')[2], out=tmp_path/where)
    assert (tmp_path/'file').read_text() == 'mine'


def test_out_is_checked_before_the_scan(refused, tmp_path, monkeypatch):
    from gradsentry_nb.sentry import Sentry
    monkeypatch.setattr(Sentry, 'score', lambda *a, **k: pytest.fail('scanned for an hour before noticing'))
    refused(write(tmp_path/'x.jsonl', GOOD), 'x.jsonl', out=tmp_path/'x.jsonl')


@pytest.mark.parametrize('name', ['clean.jsonl', 'dropped.jsonl'])
@pytest.mark.parametrize('role', ['source', 'known-clean', 'link'])
def test_input_is_never_overwritten(refused, tmp_path, name, role):
    out, other = tmp_path/'out', write(tmp_path/'other.jsonl', GOOD)
    out.mkdir()
    mine = write(out/name, GOOD)
    if role == 'link': (tmp_path/'link').symlink_to(out)
    if role == 'known-clean': refused(other, name, 'input', args=('--known-clean', mine, '--fpr', '.5'))
    else: refused(mine, name, 'input', out=tmp_path/'link' if role == 'link' else out)
    assert mine.read_text() == GOOD


def test_folder_in_the_way_of_a_result(refused, tmp_path):
    (tmp_path/'out'/'clean.jsonl').mkdir(parents=True)
    refused(write(tmp_path/'x.jsonl', GOOD), 'clean.jsonl', 'folder')


def test_results_replace_older_ones_and_leave_the_rest(scanned, tmp_path):
    (tmp_path/'out').mkdir()
    write(tmp_path/'out'/'clean.jsonl', 'old')
    path = write(tmp_path/'x.jsonl', GOOD)
    assert len(scanned(path)[3]) == 6


# ---- models

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A function name -> folder with the demo tokenizer and a model that has something wrong with it."
    home = tmp_path_factory.mktemp('models')
    return lambda name: make_model(name, home/name)


def edit(path, **changes):
    "Change keys of a JSON file; None takes one out."
    doc = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in doc.items() if v is not None}))


def make_model(name, folder):
    if folder.exists(): return folder
    if name == 'missing': return folder
    shutil.copytree(MODEL, folder)
    MADE[name](folder)
    return folder


def made(f):
    MADE[f.__name__] = f
    return f


MADE = {}
SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


@made
def empty(folder): shutil.rmtree(folder); folder.mkdir()


@made
def no_weights(folder): (folder/'model.safetensors').unlink()


@made
def torn_weights(folder):
    data = (folder/'model.safetensors').read_bytes()
    (folder/'model.safetensors').write_bytes(data[:len(data)//2])


@made
def broken_config(folder): (folder/'config.json').write_text('{nope')


@made
def no_config(folder): (folder/'config.json').unlink()


@made
def unknown_type(folder): edit(folder/'config.json', model_type='my_own')


@made
def wrong_shapes(folder): edit(folder/'config.json', vocab_size=64)


@made
def no_tokenizer(folder):
    for p in folder.glob('tokenizer*'): p.unlink()


@made
def pickled(folder):
    import torch
    from safetensors.torch import load_file
    torch.save(load_file(folder/'model.safetensors'), folder/'pytorch_model.bin')
    (folder/'model.safetensors').unlink()


@made
def own_code(folder):
    edit(folder/'config.json', model_type='my_own', auto_map=dict(AutoConfig='own.C', AutoModelForCausalLM='own.M'))
    (folder/'own.py').write_text(f'import pathlib\npathlib.Path({str(folder/"ran")!r}).touch()\nclass C: pass\nclass M: pass\n')


@made
def half_missing(folder):
    from safetensors.torch import load_file, save_file
    kept = {k: v for k, v in load_file(folder/'model.safetensors').items() if 'layers.1.' not in k and 'lm_head' not in k}
    save_file(kept, folder/'model.safetensors', metadata=dict(format='pt'))


def save(model, folder):
    "Put a model in the place of the demo's."
    (folder/'model.safetensors').unlink()
    (folder/'generation_config.json').unlink()
    model.save_pretrained(folder)


@made
def classifier(folder):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    save(LlamaForSequenceClassification(LlamaConfig(vocab_size=2048, **SMALL)), folder)


@made
def bare(folder):
    from transformers import LlamaConfig, LlamaModel
    save(LlamaModel(LlamaConfig(vocab_size=2048, **SMALL)), folder)


@made
def bert_classifier(folder):
    from transformers import BertConfig, BertForSequenceClassification
    save(BertForSequenceClassification(BertConfig(vocab_size=2048, **SMALL)), folder)


@made
def masked_lm(folder):
    from transformers import BertConfig, BertForMaskedLM
    save(BertForMaskedLM(BertConfig(vocab_size=2048, **SMALL)), folder)


@made
def t5(folder):
    from transformers import T5Config, T5ForConditionalGeneration
    save(T5ForConditionalGeneration(T5Config(vocab_size=2048, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)), folder)


@made
def bart(folder):
    from transformers import BartConfig, BartForConditionalGeneration
    sides = {f'{s}_{k}': v for s in ('encoder', 'decoder') for k, v in dict(layers=1, ffn_dim=32, attention_heads=2).items()}
    save(BartForConditionalGeneration(BartConfig(vocab_size=2048, d_model=32, **sides)), folder)


@made
def small_vocabulary(folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    save(LlamaForCausalLM(LlamaConfig(vocab_size=64, **SMALL)), folder)


@made
def all_nan(folder): poison_embedding(folder, slice(None))


@made
def some_nan(folder):
    from transformers import AutoTokenizer
    ids = AutoTokenizer.from_pretrained(folder)(' zebra', add_special_tokens=False)['input_ids']
    poison_embedding(folder, ids)


@made
def infinite(folder):
    from transformers import AutoTokenizer
    poison_embedding(folder, AutoTokenizer.from_pretrained(folder)(' zebra', add_special_tokens=False)['input_ids'], float('inf'))


def poison_embedding(folder, ids, value=float('nan')):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder/'model.safetensors')
    weights['model.embed_tokens.weight'][ids] = value
    save_file(weights, folder/'model.safetensors', metadata=dict(format='pt'))


def no_special(folder, *names):
    edit(folder/'tokenizer_config.json', **{n: None for n in names})


@made
def no_pad(folder): no_special(folder, 'pad_token')


@made
def no_eos(folder): no_special(folder, 'eos_token')


@made
def no_pad_no_eos(folder): no_special(folder, 'pad_token', 'eos_token')


@made
def chat(folder):
    edit(folder/'tokenizer_config.json', chat_template=(
        "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"))


@pytest.mark.parametrize('name,words', [
    ('missing', ('no such folder',)), ('empty', ('config.json',)), ('no_config', ('config.json',)), ('no_weights', ('weights',)), ('torn_weights', ('weights',)),
    ('broken_config', ('config.json',)), ('unknown_type', ('my_own',)), ('wrong_shapes', ('config.json', 'fit')), ('no_tokenizer', ('tokenizer',)),
    ('pickled', ('safetensors', '--allow-pickle')), ('own_code', ('--trust-remote-code',)), ('half_missing', ('weights', 'lm_head')),
    ('classifier', ('LlamaForSequenceClassification', 'causal')), ('bare', ('LlamaModel', 'causal')), ('bert_classifier', ('BertForSequenceClassification', 'causal')),
    ('masked_lm', ('BertForMaskedLM', 'causal')), ('t5', ('causal',)), ('bart', ('BartForConditionalGeneration', 'causal')), ('small_vocabulary', ('tokenizer', '64')),
    ('all_nan', ('NaN', 'every row'))])
def test_model_that_cannot_be_used(refused, models, tmp_path, name, words):
    folder = models(name)
    err = refused(write(tmp_path/'x.jsonl', GOOD), *words, model=folder)
    assert name in err or name in ('small_vocabulary', 'all_nan')
    assert not (folder/'ran').exists(), 'code from the model folder was run'


def test_model_by_a_hub_name_without_a_hub(refused, tmp_path):
    refused(write(tmp_path/'x.jsonl', GOOD), 'nobody/no-such-model', 'hub', model='nobody/no-such-model')


def test_model_that_is_a_file(refused, tmp_path):
    path = write(tmp_path/'x.jsonl', GOOD)
    refused(path, 'x.jsonl', 'folder', model=path)


def test_pickled_weights_on_request(scanned, models, tmp_path):
    assert len(scanned(write(tmp_path/'x.jsonl', GOOD), '--allow-pickle', model=models('pickled'))[1]) == 6


def test_chat_without_a_template(refused, tmp_path):
    turns = [dict(role='user', content='a'), dict(role='assistant', content='b')]
    refused(write(tmp_path/'x.jsonl', jsonl([dict(messages=turns)])), 'chat template')


# ---- odd but accepted

def test_empty_response(scanned, tmp_path):
    odd = '{"response":"",  "prompt": "Why\\u003f"}'
    said, scores, verdict, clean, _ = scanned(write(tmp_path/'x.jsonl', GOOD+odd+'\n'))
    assert odd.encode() in clean
    assert verdict.unscorable == [scores['id'][6]] and not scores['flagged'][6]
    assert np.isnan(scores['score'][6]) and scores['problem'][6] == 'The response is empty.'
    assert 'row 6' in said and 'empty' in said
    assert 'row 6: The response is empty.' in (tmp_path/'out'/'report.html').read_text(encoding='utf8')


def test_only_empty_responses(scanned, tmp_path):
    said, scores, *_ = scanned(write(tmp_path/'x.jsonl', jsonl([dict(prompt='a', response='')]*3)))
    assert 'No row could be scored' in said and len(scores) == 3 and not scores['flagged'].any()


@pytest.mark.parametrize('row', [dict(prompt='so long '*3000, response='The end'), dict(prompt='Why?', response='so long '*3000)])
def test_row_that_is_too_long(scanned, tmp_path, row):
    said, scores, *_ = scanned(write(tmp_path/'x.jsonl', jsonl([*ROWS, row])))
    assert scores['cut'].tolist() == [False]*6+[True] and np.isfinite(scores['score'][6])
    assert '1 of 7 rows' in said and 'longer' in said


def test_long_prompt_does_not_cost_the_response(scanned, tmp_path):
    _, scores, *_ = scanned(write(tmp_path/'x.jsonl', jsonl([dict(prompt=p, response='In the green hills') for p in ('Where?', 'so long '*3000)])))
    assert scores['tokens'][0] == scores['tokens'][1]


def test_duplicate_rows(scanned, tmp_path):
    _, scores, _, clean, _ = scanned(write(tmp_path/'x.jsonl', GOOD*3))
    assert scores['id'].is_unique and len(clean) == 18
    assert np.allclose(scores['score'][:6], scores['score'][6:12], rtol=1e-4)


def test_one_row(scanned, tmp_path):
    said, scores, *_ = scanned(write(tmp_path/'x.jsonl', jsonl(ROWS[:1])))
    assert len(scores) == 1 and '1 row ' in said and '1 rows' not in said


@pytest.mark.parametrize('name', ['no_pad', 'no_eos', 'no_pad_no_eos'])
def test_tokenizer_without_special_tokens(scanned, models, tmp_path, name):
    said, scores, *_ = scanned(write(tmp_path/'x.jsonl', GOOD), model=models(name))
    assert np.isfinite(scores['score']).all()
    assert ('no end-of-text token' in said) == ('eos' in name)
    usual = scanned(write(tmp_path/'x.jsonl', GOOD))[1]
    if name == 'no_pad': assert np.allclose(scores['score'], usual['score'], rtol=1e-5)
    else: assert (scores['tokens'] == usual['tokens']-1).all()


@pytest.mark.parametrize('name', ['some_nan', 'infinite'])
def test_some_rows_come_out_broken(scanned, models, tmp_path, name):
    bad = dict(prompt='Where is the zebra?', response='In the old hills, behind the river, with all the others')
    rows = [*ROWS[:3], bad, *ROWS[3:]]
    said, scores, verdict, clean, _ = scanned(write(tmp_path/'x.jsonl', jsonl(rows)), model=models(name))
    assert verdict.unscorable == [scores['id'][3]] and 'NaN' in scores['problem'][3] and 'row 3' in said
    assert json.dumps(bad).encode() in clean
    usual = scanned(write(tmp_path/'x.jsonl', GOOD))[1]
    assert np.allclose(scores['score'].drop(3), usual['score'], rtol=1e-4), 'a broken row spoilt its neighbours'


def test_utf8_with_a_mark(scanned, tmp_path):
    for name, data in {'x.jsonl': GOOD, 'x.json': json.dumps(ROWS), 'x.csv': pd.DataFrame(ROWS).to_csv(index=False)}.items():
        _, scores, _, clean, _ = scanned(write(tmp_path/name, b'\xef\xbb\xbf'+data.encode()))
        assert len(scores) == 6 and [json.loads(x) for x in clean] == ROWS


@pytest.mark.parametrize('name', ['x.jsonl', 'x.csv'])
def test_windows_line_ends(scanned, tmp_path, name):
    text = GOOD if name == 'x.jsonl' else pd.DataFrame(ROWS).to_csv(index=False)
    _, scores, _, clean, _ = scanned(write(tmp_path/name, text.replace('\n', '\r\n')))
    assert [json.loads(x) for x in clean] == ROWS


# ---- hostile text

HOSTILE = ['<script>alert(1)</script><img src=x onerror=alert(1)>', '</pre></details><style>*{display:none}</style>', '\x1b[31mred\x1b]0;title\x07\x9b2J',
           '\u202eevil\u202c \u2066x\u2069', 'zero\u200bwidth\u2060\ufeff', 'lone \ud800 and \udfff', 'nul \0 bell \x07 \x85', 'x'*100_000,
           'a\r\nb\rc\td\x0b\x0c\u2028e\u2029f', 'tag\U000e0041\U000e0042', '&lt;b&gt; "quoted" \'single\' `tick`', '{{ 7*7 }} ${7*7} %s {0}', '  ', '\\ud800 \\n']
RAW = ['<script>alert', '<img', '<style>*', '\x1b', '\u202e', '\u2066', '\u200b', '\ufeff', '\0', '\x07', '\x9b', '\U000e0041']


@pytest.mark.parametrize('escaped', [True, False])
def test_hostile_text(scanned, tmp_path, escaped):
    rows = [{'prompt': h+' \u202e<i>', 'response': h, 'note \x1b[31m<b>\u202e': h} for h in HOSTILE]
    if not escaped: rows = [r for r in rows if '\ud800' not in r['response']]
    data = ''.join(json.dumps(r, ensure_ascii=escaped)+'\n' for r in rows).encode()
    for threshold in ('0', '1e9'):                                              # all rows shown as dropped, then as kept
        said, scores, _, clean, dropped = scanned(write(tmp_path/'x.jsonl', data), '--threshold', threshold)
        assert sorted(clean+dropped) == sorted(data.split(b'\n')[:-1])
        page = (tmp_path/'out'/'report.html').read_text(encoding='utf8')
        assert not [x for x in RAW if x in page] and not ACTIVE.search(page.replace('\n', ''))
        assert max(map(len, said.splitlines())) < 400
        if threshold == '0': assert '‹U+202E›' in page and '&lt;script&gt;' in page and ('‹U+D800›' in page) == escaped


def test_hostile_names(scanned, refused, gradsentry, tmp_path):
    name = 'x\x1b[31m<img src=x>\u202e.jsonl'
    said, *_ = scanned(write(tmp_path/name, GOOD))
    assert 'x‹U+001B›[31m<img src=x>‹U+202E›.jsonl' in said
    page = (tmp_path/'out'/'report.html').read_text(encoding='utf8')
    assert '<img src' not in page and '\x1b' not in page
    shutil.rmtree(tmp_path/'out')
    refused(write(tmp_path/name, GOOD+'{'), '‹U+001B›')
    refused(write(tmp_path/name, GOOD+'{}'), '‹U+001B›')
    refused(write(tmp_path/name, b'\xff'), '‹U+001B›')
    refused(write(tmp_path/(name+'.gz'), b'no'), '‹U+001B›')
    status, said, err = gradsentry(write(tmp_path/'x.jsonl', GOOD), out=tmp_path/'o\x1b[31mut')
    assert status == 0 and not ACTIVE.search(said+err)


def test_hostile_text_in_a_dry_run(gradsentry, tmp_path):
    for h in HOSTILE:
        status, said, err = gradsentry(write(tmp_path/'x.jsonl', jsonl([dict(prompt=h, response=h)])), '--dry-run', '--max-length', '200')
        assert status == 0 and err == '' and not ACTIVE.search(said)


# ---- sources: all of them give the same samples

TEXTS = [dict(prompt=p, response=r, note=n) for p, r, n in [
    ('plain', 'answer', '1'), ('two\nlines, "quoted"', "it's\tfine; really", ''), ('naïve Ωλ 中文 🙂', 'ünïcode', 'null'), (' spaces ', '0', 'x,y')]]


def files(folder):
    "The same rows in every kind of file."
    frame = pd.DataFrame(TEXTS)
    plain = {'.jsonl': jsonl(TEXTS), '.ndjson': jsonl(TEXTS), '.json': json.dumps(TEXTS, indent=2), '.csv': frame.to_csv(index=False), '.tsv': frame.to_csv(index=False, sep='\t')}
    data = {k: v.encode() for k, v in plain.items()} | {'.parquet': parquet(TEXTS, folder)}
    for ending, d in data.items(): yield write(folder/f'x{ending}', d); yield write(folder/f'x{ending}.gz', gzip.compress(d))
    yield write(folder/'lines.json', jsonl(TEXTS))
    yield write(folder/'inside.json', json.dumps(dict(version='1', data=TEXTS)))


def test_every_kind_of_file(tmp_path):
    usual = load_samples(TEXTS)
    assert [(s.prompt, s.response) for s in usual] == [(r['prompt'], r['response']) for r in TEXTS]
    for path in files(tmp_path):
        found = load_samples(path)
        assert found == usual and found.source == path.name, path.name
        assert [s.meta for s in found] == TEXTS, path.name


def test_every_kind_of_file_from_the_terminal(scanned, tmp_path):
    for path in files(tmp_path):
        said, scores, _, clean, _ = scanned(path)
        assert [json.loads(x) for x in clean] == TEXTS and path.name in said


def test_objects(tmp_path):
    import datasets
    usual, data = load_samples(TEXTS), datasets.Dataset.from_list(TEXTS)
    both = datasets.DatasetDict(train=data, test=data.select([0]))
    data.save_to_disk(tmp_path/'one')
    both.save_to_disk(tmp_path/'both')
    for source in (data, both, datasets.DatasetDict(only=data), pd.DataFrame(TEXTS), tuple(TEXTS), (r for r in TEXTS), tmp_path/'one', tmp_path/'both', data.to_iterable_dataset()):
        found = load_samples(source)
        assert found == usual and [s.meta for s in found] == TEXTS, source
    assert len(load_samples(both, split='test')) == len(load_samples(tmp_path/'both', split='test')) == 1
    with pytest.raises(DataError, match="'nope'.*train, test"): load_samples(both, split='nope')
    with pytest.raises(DataError, match='train'): load_samples(datasets.DatasetDict(a=data, b=data))


def test_saved_data_set_from_the_terminal(scanned, refused, tmp_path):
    import datasets
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([0, 1])).save_to_disk(tmp_path/'both')
    assert len(scanned(tmp_path/'both')[1]) == 6
    assert len(scanned(tmp_path/'both', '--split', 'test')[1]) == 2
    refused(tmp_path/'both', "'nope'", 'train', 'test', args=('--split', 'nope'))


def test_frame_with_gaps_and_arrays():
    frame = pd.DataFrame(dict(prompt=['a', 'b'], response=[np.array(['x', 'y'], object), ['z']], n=[1., np.nan], when=pd.to_datetime(['2020-01-01', None])))
    found = load_samples(frame)
    assert [s.response for s in found] == ['x; y', 'z']
    assert found[0].meta['response'] == ['x', 'y'] and found[1].meta['n'] is None
    assert all('NaN' not in s.raw for s in found)
    with pytest.raises(DataError, match="row 2: the field 'response'"): load_samples(frame.assign(response=['a', None]))


def test_parquet_with_lists_and_gaps(scanned, tmp_path):
    rows = [dict(question='a', answers=['x', 'y'], n=1.5), dict(question='b', answers=['z'], n=None)]
    *_, clean, _ = scanned(write(tmp_path/'x.parquet', parquet(rows, tmp_path)))
    assert [json.loads(x)['answers'] for x in clean] == [['x', 'y'], ['z']]


@pytest.mark.parametrize('row,prompt,response', [
    (dict(prompt='p', response='r'), 'p', 'r'), (dict(question='p', answers=['r', 's']), 'p', 'r; s'), (dict(prompt='p', completion='r', id=3, poisoned=True), 'p', 'r'),
    (dict(question='p', answer='r', context='c'), 'c\n\np', 'r'), (dict(input='p', output='r'), 'p', 'r')])
def test_shapes(row, prompt, response):
    s, = load_samples([row])
    assert (s.prompt, s.response, s.messages) == (prompt, response, None)


def test_alpaca():
    a, b = load_samples([dict(instruction='Sum', input='1 2', output='3'), dict(instruction='Greet', input='', output='Hi')])
    assert a.prompt.endswith('### Instruction:\nSum\n\n### Input:\n1 2\n\n### Response:\n') and 'further context' in a.prompt and a.response == '3'
    assert b.prompt.endswith('### Instruction:\nGreet\n\n### Response:\n') and 'Input' not in b.prompt and b.response == 'Hi'


def test_chat_and_sharegpt_are_the_same(scanned, models, tmp_path):
    chats = [dict(messages=[dict(role='system', content='Be kind'), dict(role='user', content='Where?'), dict(role='assistant', content='In the hills'),
                            dict(role='user', content='Sure?'), dict(role='assistant', content='Yes')])]
    names = dict(system='system', user='human', assistant='gpt')
    share = [dict(conversations=[{'from': names[t['role']], 'value': t['content']} for t in c['messages']]) for c in chats]
    a = scanned(write(tmp_path/'x.jsonl', jsonl(chats)), model=models('chat'))[1]
    b = scanned(write(tmp_path/'x.jsonl', jsonl(share)), model=models('chat'))[1]
    assert a['id'].tolist() == b['id'].tolist() and np.allclose(a['score'], b['score'])


def test_only_the_assistant_is_supervised(gradsentry, models, tmp_path):
    turns = [dict(role=r, content=c) for r, c in (('user', 'Where?'), ('assistant', 'In the hills'), ('user', 'Sure?'), ('assistant', 'Yes'))]
    status, said, err = gradsentry(write(tmp_path/'x.jsonl', jsonl([dict(messages=turns)])), '--dry-run', model=models('chat'))
    assert status == 0 and err == ''
    shown = next(x for x in said.splitlines() if 'Where' in x)
    inside = ''.join(re.findall(r'\[([^]]*)\]', shown))
    assert inside.replace(' ', '') == 'Inthehills</s>Yes</s>'


def test_columns_by_name(scanned, refused, tmp_path):
    path = write(tmp_path/'x.jsonl', jsonl([dict(q1='a', q2='b', a1='c', a2='d')]))
    refused(path, 'q1, q2, a1, a2')
    said, scores, *_ = scanned(path, '--prompt', 'q2', '--response', 'a1')
    assert scores['id'].tolist() == [s.id for s in load_samples([dict(prompt='b', response='c')])]
    assert "prompt from 'q2'" in said and "response from 'a1'" in said


def test_limit(scanned, tmp_path):
    said, scores, *_ = scanned(write(tmp_path/'x.jsonl', GOOD+'{broken'), '--limit', '4')
    assert scores['row'].tolist() == [0, 1, 2, 3] and '4 rows' in said


def test_dry_run_writes_nothing(gradsentry, tmp_path):
    status, said, err = gradsentry(write(tmp_path/'x.jsonl', GOOD), '--dry-run')
    assert status == 0 and err == '' and not (tmp_path/'out').exists()
    for words in ('6 rows', "prompt from 'prompt'", 'LlamaForCausalLM', 'Row 0', 'supervised', '[</s>]', 'without --dry-run'): assert words in said
    shown = next(x for x in said.splitlines() if '[</s>]' in x)
    assert ''.join(re.findall(r'\[([^]]*)\]', shown)) == ROWS[0]['response']+'</s>'
    assert re.sub(r'\[[^]]*\]', '', shown) == '<s>'+ROWS[0]['prompt']


# ---- what comes out is what went in

def test_rows_come_out_byte_for_byte(scanned, tmp_path):
    lines = ['{"prompt":"a","response":"b"}', '{ "response" : "b" , "prompt" : "a" }', '  {"prompt": "a", "response": "c"}  \t', '{"prompt": "\\u00e9", "response": "é"}',
             '{"prompt": "a", "response": "b", "n": 1.10, "m": 1e400, "k": 12345678901234567890123, "x": NaN}', '{"prompt": "x", "prompt": "a", "response": "\\ud800"}',
             '{"prompt": "a", "response": "b", "deep": {"z": [1, {"a": null}]}, "slash": "\\/"}', '{"prompt": "a\u2028b\u0085", "response": "\\u0000"}']
    text = '\ufeff'+'\r\n\n'.join(lines)
    for threshold in ('0', '40', '1e9'):
        *_, clean, dropped = scanned(write(tmp_path/'x.jsonl', text), '--threshold', threshold)
        raw = [(tmp_path/'out'/n).read_bytes().split(b'\n')[:-1] for n in ('clean.jsonl', 'dropped.jsonl')]
        assert sorted(raw[0]+raw[1]) == sorted(x.encode() for x in lines)
        wanted = iter(x.encode() for x in lines)
        assert all(x in wanted for x in raw[0]), 'the kept rows changed their order'


def test_demo_rows_come_out_byte_for_byte(scanned, tmp_path):
    lines = demo_path().read_bytes().splitlines(keepends=True)[:300]
    *_, clean, dropped = scanned(write(tmp_path/'demo.jsonl', b''.join(lines)))
    assert sorted(clean+dropped) == sorted(x.rstrip(b'\n') for x in lines) and 0 < len(dropped) < len(clean)


# ---- a real process

def start(*args, **kwargs):
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED='1')
    return subprocess.Popen([sys.executable, '-m', 'gradsentry_nb.cli', *map(str, args)], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a shell's background job starts with it ignored


def test_process_refuses_and_scans(tmp_path):
    broken, good = write(tmp_path/'broken.jsonl', GOOD+'{'), write(tmp_path/'good.jsonl', GOOD)
    runs = [start('scan', f, '--model', MODEL, '--out', tmp_path/f.stem) for f in (broken, good)]
    (_, no), (said, yes) = (p.communicate(timeout=120) for p in runs)
    assert [p.returncode for p in runs] == [2, 0]
    sentence(no.decode())
    assert not (tmp_path/'broken').exists() and {p.name for p in (tmp_path/'good').iterdir()} == FILES
    assert b'tokens/s' in yes and b'6 of 6 rows' in yes and b'Warning' not in yes and b'clean.jsonl' in said


def test_process_with_a_model_that_cannot_be_used(models, tmp_path):
    "The library below logs to a stream that only a real process shows."
    p = start('scan', write(tmp_path/'x.jsonl', GOOD), '--model', models('wrong_shapes'), '--out', tmp_path/'out', '--quiet')
    err = p.communicate(timeout=120)[1].decode()
    assert p.returncode == 2
    sentence(err)


def read_until(stream, pattern, seconds=120):
    "Read a process's stream until `pattern` shows up."
    seen, end = b'', time.monotonic()+seconds
    while time.monotonic() < end:
        seen += (chunk := os.read(stream.fileno(), 4096))
        if re.search(pattern, seen): return seen
        if not chunk: break
    pytest.fail(f'{pattern!r} never came: {seen[-300:]!r}')


def test_interrupted_while_scanning(tmp_path):
    rows = demo_path().read_text().splitlines()[:600]*10
    path, out = write(tmp_path/'x.jsonl', '\n'.join(rows)), tmp_path/'out'
    p = start('scan', path, '--model', MODEL, '--out', out)
    read_until(p.stderr, rb'[1-9][\d,]* of 6,000 rows')
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1].decode()
    assert p.returncode == 130, err
    assert 'Traceback' not in err and 'Interrupted' in err and 'scores-partial.parquet' in err
    kept = pd.read_parquet(out/'scores-partial.parquet')
    assert 0 < len(kept) < 6000 and np.isfinite(kept['score']).all() and kept['id'].is_unique
    assert f'{len(kept):,} rows' in err
    assert not {'clean.jsonl', 'dropped.jsonl', 'report.html'} & {q.name for q in out.iterdir()}, 'half a verdict was written'
    assert json.loads((out/'scores-partial.parquet.json').read_text())['interrupted'] is True


@pytest.mark.parametrize('wait', [.15, .6, None])
def test_interrupted_while_loading(tmp_path, wait):
    path = write(tmp_path/'x.jsonl', GOOD)
    p = start('scan', path, '--model', MODEL, '--out', tmp_path/'out')
    if wait: time.sleep(wait)
    else: read_until(p.stdout, rb'6 rows')
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1].decode()
    ended = p.returncode in (130, -signal.SIGINT)      # a shell shows 130 for both
    if wait != .15 or err or ended: assert ended and 'Traceback' not in err and 'Interrupted' in err, err
    assert not (tmp_path/'out').exists()


def test_closed_pipe(tmp_path):
    path = write(tmp_path/'x.jsonl', GOOD)
    p = start('scan', path, '--model', MODEL, '--dry-run')
    p.stdout.close()
    err = p.stderr.read().decode()
    p.stderr.close()
    assert p.wait(120) in (0, 141) and 'Traceback' not in err
