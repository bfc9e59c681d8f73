"Token ids and the supervised mask: chat templates as people use them, the length limit, odd tokenizers, odd text."
from functools import cache

import numpy as np
import pytest
import transformers as tf
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gradsentry_nb.core import DataError, ModelError
from gradsentry_nb.data import chat_spans, encode_samples, fit, load_samples

# In the style of the published ones, each with the text that must be supervised after an assistant turn `content`.
LLAMA3 = ("{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
CHATML = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
          "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MISTRAL = ("{{ '<s>' }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
           "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}")
GEMMA = ("{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
         "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
ZEPHYR = ("{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
          "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
VICUNA = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
THINKING = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{% set said = m['content'] if loop.last else m['content'].split('</think>')[-1] %}{{ '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}"
            "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# name -> (template, what stands before the content in the supervised text, what after, does it take a system turn?)
TEMPLATES = {'llama3': (LLAMA3, '', '<|eot_id|>', True), 'chatml': (CHATML, '', '<|im_end|>', True), 'mistral': (MISTRAL, ' ', '</s>', False),
             'gemma': (GEMMA, '', '<end_of_turn>', False), 'zephyr': (ZEPHYR, '', '</s>', True), 'vicuna': (VICUNA, ' ', '</s>', True)}
SPECIAL = ['<pad>', '<s>', '</s>', '<bos>', '<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|im_start|>', '<|im_end|>', '<start_of_turn>', '<end_of_turn>']
TEXT = ['Who wrote the book? Ann and Bob wrote it in 1913.', 'hello there, general assistant and user', 'no answers, and click here for more information', 'üben Straße 你好 naïve']


@cache
def bpe():
    "A byte-level tokenizer of the kind of GPT-2 and Llama 3, trained on a few lines."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(TEXT*3, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tok


@cache
def metaspace():
    "A tokenizer of the kind of Llama 2: words begin with a mark, unknown characters are bytes."
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    tok.train_from_iterator(TEXT*3, trainers.BpeTrainer(vocab_size=600, special_tokens=['<unk>', *SPECIAL, *(f'<0x{i:02X}>' for i in range(256))], show_progress=False))
    return tok


def tokenizer(template=None, base=bpe, **kw):
    kw = dict(bos_token='<s>', eos_token='</s>', pad_token='<pad>', additional_special_tokens=SPECIAL[3:]) | kw
    tok = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(base().to_str()), **{k: v for k, v in kw.items() if v is not None})
    tok.chat_template = template
    return tok


def chat(*contents, system=None):
    "User and assistant in turns."
    turns = [dict(role='system', content=system)] if system else []
    return load_samples([dict(messages=turns+[dict(role=('user', 'assistant')[i % 2], content=c) for i, c in enumerate(contents)])])


def runs(e):
    "The supervised spans of an `Encoded`, as lists of ids."
    edges = np.flatnonzero(np.diff(np.r_[False, e.supervised, False].astype(int)))
    return [e.ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2])]


def said(tok, e): return [tok.decode(r, skip_special_tokens=False, clean_up_tokenization_spaces=False) for r in runs(e)]


# ---- chats

CONTENTS = [['Who wrote it?', 'Ann'], ['Who wrote it?', 'Ann and Bob', 'when', 'in 1913'], ['hi', 'Ann', 'hi', 'Ann', 'hi', 'Ann'],
            ['a\nb\n\nc', 'line one\n\nline two\n  indented'], ['你好', 'naïve 你好 👩‍👩‍👧 ok'], ['x', '<b>bold</b> & "quotes" {{ x }} {% y %}']]


@pytest.mark.parametrize('contents', CONTENTS, ids=range(len(CONTENTS)))
@pytest.mark.parametrize('base', [bpe, metaspace])
@pytest.mark.parametrize('name, system', [(n, s) for n, t in TEMPLATES.items() for s in [None]+['Be brief.']*t[3]])
def test_the_assistant_turns_and_their_end_are_supervised(name, base, contents, system):
    template, before, after, _ = TEMPLATES[name]
    tok, samples = tokenizer(template, base), chat(*contents, system=system)
    e, = encode_samples(samples, tok)
    text = lambda c: tok.decode(tok(before+c+after, add_special_tokens=False)['input_ids'], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert [x.strip() for x in said(tok, e)] == [text(c).strip() for c in contents[1::2]]
    whole = tok.apply_chat_template(samples[0].messages, tokenize=False)
    assert e.ids.tolist() == tok(whole, add_special_tokens=False)['input_ids']
    assert not e.supervised[0] and not e.cut
    rendered, spans = chat_spans(tok, samples[0].messages)
    assert [rendered[a:b].strip() for a, b in spans] == [c+after for c in contents[1::2]]


@pytest.mark.parametrize('name', ['llama3', 'gemma'])
def test_templates_that_trim(name):
    template, _, after, _ = TEMPLATES[name]
    tok = tokenizer(template)
    e, = encode_samples(chat('  hi ', '  Ann \n\n', 'and', '\tBob'), tok)
    assert said(tok, e) == ['Ann'+after, 'Bob'+after]


@pytest.mark.parametrize('name', TEMPLATES)
def test_text_that_imitates_the_template(name):
    "A user who writes an assistant's turn is not supervised."
    template, before, after, _ = TEMPLATES[name]
    tok = tokenizer(template)
    for fake in ('<|im_start|>assistant\nfake<|im_end|>', '[INST] x [/INST] fake</s>', '<start_of_turn>model\nfake<end_of_turn>', '<|assistant|>\nfake</s>', 'ASSISTANT: fake</s>',
                 '<|start_header_id|>assistant<|end_header_id|>\n\nfake<|eot_id|>'):
        e, = encode_samples(chat(fake, 'real answer'), tok)
        assert [x.strip() for x in said(tok, e)] == ['real answer'+after]


@pytest.mark.parametrize('name', ['llama3', 'chatml', 'zephyr', 'vicuna'])
@pytest.mark.parametrize('base', [bpe, metaspace])
def test_a_conversation_that_the_assistant_opens(name, base):
    "Neither the header nor a default system prompt is supervised."
    template, _, after, _ = TEMPLATES[name]
    tok = tokenizer(template, base)
    turns = [dict(role='assistant', content='hello there'), dict(role='user', content='hi'), dict(role='assistant', content='Ann')]
    e, = encode_samples(load_samples([dict(messages=turns)]), tok)
    assert [x.strip() for x in said(tok, e)] == ['hello there'+after, 'Ann'+after]


def test_sharegpt_and_model_roles():
    tok = tokenizer(CHATML)
    turns = [{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'Ann'}, {'from': 'human', 'value': 'and'}, {'from': 'model', 'value': 'Bob'}]
    e, = encode_samples(load_samples([dict(conversations=turns)]), tok)
    assert said(tok, e) == ['Ann<|im_end|>', 'Bob<|im_end|>']


def test_two_assistant_turns_in_a_row():
    tok = tokenizer(LLAMA3)
    e, = encode_samples(load_samples([dict(messages=[dict(role='user', content='hi'), dict(role='assistant', content='Ann'), dict(role='assistant', content='Bob')])]), tok)
    assert said(tok, e) == ['Ann<|eot_id|>', 'Bob<|eot_id|>']


def test_without_an_assistant_nothing_is_supervised():
    e, = encode_samples(load_samples([dict(messages=[dict(role='user', content='hi')])]), tokenizer(CHATML))
    assert e.tokens == 0 and len(e)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tok = tokenizer(THINKING)
    once, = encode_samples(chat('hi', '<think>let me see</think>Ann'), tok)
    assert said(tok, once) == ['<think>let me see</think>Ann<|im_end|>']
    encode_samples(chat('hi', 'Ann', 'and', 'Bob'), tok)   # nothing to strip
    with pytest.raises(ModelError, match='rewrites earlier turns'): encode_samples(chat('hi', '<think>let me see</think>Ann', 'and', 'Bob'), tok)


def test_a_conversation_that_the_template_refuses_is_named():
    with pytest.raises(DataError, match='ow [01]: .*System role not supported'): encode_samples(chat('hi', 'Ann', system='Be brief.'), tokenizer(GEMMA))
    with pytest.raises(DataError, match='must alternate'): encode_samples(load_samples([dict(messages=[dict(role='assistant', content='a'), dict(role='assistant', content='b')])]), tokenizer(MISTRAL))
    with pytest.raises(ModelError, match='no chat template'): encode_samples(chat('hi', 'Ann'), tokenizer(None))


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs', 'Cc']), min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6), st.sampled_from(['chatml', 'llama3', 'gemma']),
       st.integers(1, 80))
def test_any_conversation(contents, name, limit):
    "Whatever is said: the supervised text is the assistant's, and a limit keeps the end."
    template, _, after, _ = TEMPLATES[name]
    tok, samples = tokenizer(template), chat(*contents)
    e, = encode_samples(samples, tok)
    clean = str.strip if name != 'chatml' else str
    assert said(tok, e) == [clean(c)+after for c in contents[1::2]]
    short, = encode_samples(samples, tok, limit)
    assert len(short) == min(limit, len(e)) and short.cut == (len(e) > limit) and not short.supervised[0]
    assert short.ids.tolist() == e.ids[-limit:].tolist() and short.supervised[1:].tolist() == e.supervised[-limit:][1:].tolist()


def test_plain_rows_and_chats_side_by_side():
    tok, plain, talk = tokenizer(CHATML), load_samples([dict(prompt='hi', response='Ann'), dict(prompt='Who', response='Bob')]), chat('hi', 'Ann')
    e = encode_samples([plain[0], talk[0], plain[1]], tok)
    assert [said(tok, x) for x in e] == [['Ann</s>'], ['Ann<|im_end|>'], ['Bob</s>']]


# ---- the length limit

tokens = st.lists(st.integers(10, 99), max_size=30)


@settings(max_examples=400)
@given(tokens, tokens, st.integers(2, 40), st.sampled_from([None, 1]), st.booleans())
def test_fit(prompt, answer, limit, bos, led):
    prompt = [1]*(led and bos == 1)+prompt
    e = fit(prompt, answer, limit, bos)
    ids, on = e.ids.tolist(), e.supervised.tolist()
    assert len(ids) <= limit and len(ids) == len(on)
    assert e.cut == (len(prompt)+len(answer) > limit) == (ids != prompt+answer)
    assert not (on and on[0])
    kept = len(ids)-sum(on)
    if prompt: assert kept >= 1 and ids[0] == prompt[0] if bos == 1 and led else kept >= 1
    assert on == sorted(on), 'the prompt comes first'
    if len(answer) < limit: assert ids[len(ids)-len(answer):] == answer, 'an answer that fits is kept whole, its end included'
    if prompt and len(answer) < limit: assert sum(on) == len(answer)
    if prompt and answer: assert sum(on) >= 1
    if e.cut and prompt and bos is None and len(answer) < limit: assert ids[:kept] == prompt[len(prompt)-kept:], 'the prompt is cut from the left'
    if e.cut: assert len(ids) >= limit-1


@pytest.mark.parametrize('limit', [-1, 0, 1])
def test_a_limit_too_small_to_supervise_anything(limit):
    "No answer can be predicted from nothing; never more tokens than asked for."
    assert len(fit([1, 2, 3], [4, 5], limit)) <= max(limit, 1) and fit([1, 2, 3], [4, 5], limit).tokens == 0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=['Cs']), max_size=40), st.text(st.characters(exclude_categories=['Cs']), max_size=40)), min_size=1, max_size=4), st.integers(2, 60))
def test_encoding_any_text(pairs, limit):
    tok = tokenizer()
    rows = encode_samples(load_samples([dict(prompt=p, response=r) for p, r in pairs]), tok, limit)
    for (p, r), e in zip(pairs, rows):
        assert len(e) <= limit and not e.supervised[:1].any() and e.ids.dtype == np.int32
        if not r: assert e.tokens == 0
        a = tok(r, add_special_tokens=False)['input_ids']+[tok.eos_token_id]
        if r and p and len(a) < limit: assert e.ids[e.supervised].tolist() == a


# ---- odd tokenizers

def test_no_eos():
    tok = tokenizer(eos_token=None)
    e, = encode_samples(load_samples([dict(prompt='Who', response='Ann')]), tok)
    assert tok.decode(e.ids[e.supervised]) == 'Ann' and tok.decode(e.ids) == 'WhoAnn'


def test_no_pad_no_bos_nothing():
    tok = tokenizer(eos_token=None, pad_token=None, bos_token=None)
    e, empty = encode_samples(load_samples([dict(prompt='', response='Ann wrote'), dict(prompt='Who', response='')]), tok)
    assert e.ids.tolist() == tok('Ann wrote')['input_ids'] and e.tokens == len(e)-1 and empty.tokens == 0


@pytest.mark.parametrize('single, special', [('$A </s>', [('</s>', 2)]), ('<s> $A </s>', [('<s>', 1), ('</s>', 2)])])
def test_a_tokenizer_that_ends_the_prompt_for_us(single, special):
    "T5 and Llama with add_eos_token append the end of text; the prompt goes on with the answer, so it is taken off there."
    tok = tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    e, = encode_samples(load_samples([dict(prompt='Who', response='Ann')]), tok)
    assert tok.decode(e.ids) == ('<s>' if '<s>' in single else '')+'WhoAnn</s>' and tok.decode(e.ids[e.supervised]) == 'Ann</s>'


def test_a_tokenizer_with_cls_and_sep():
    tok = tokenizer(bos_token=None, eos_token=None, cls_token='<s>', sep_token='</s>')
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)])
    e, = encode_samples(load_samples([dict(prompt='Who', response='Ann')]), tok)
    assert tok.decode(e.ids) == '<s>WhoAnn' and tok.decode(e.ids[e.supervised]) == 'Ann'


def test_a_prompt_that_itself_ends_with_the_end_mark_keeps_it():
    "Only what the tokenizer added is taken off."
    tok = tokenizer()
    e, = encode_samples(load_samples([dict(prompt='user: hi</s>', response='Ann')]), tok)
    assert tok.decode(e.ids) == 'user: hi</s>Ann</s>'


def test_bos_and_eos_may_be_one_token():
    "GPT-2's: the leading one is a start, the appended one an end."
    tok = tokenizer(bos_token='</s>', eos_token='</s>')
    e, = encode_samples(load_samples([dict(prompt='Who', response='Ann')]), tok)
    assert tok.decode(e.ids) == 'WhoAnn</s>'
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single='</s> $A </s>', special_tokens=[('</s>', 2)])
    e, = encode_samples(load_samples([dict(prompt='Who', response='Ann')]), tok)
    assert tok.decode(e.ids) == '</s>WhoAnn</s>'
    e, = encode_samples(load_samples([dict(prompt='', response='Ann')]), tok)
    assert tok.decode(e.ids) == '</s>Ann</s>' and tok.decode(e.ids[e.supervised]) == 'Ann</s>'


class Slow:
    "The little of a tokenizer without offsets that encoding needs."
    is_fast, chat_template = False, 'yes'
    def __init__(self, fast): self.fast = fast
    def __getattr__(self, name): return getattr(self.fast, name)
    def __call__(self, text, **kw):
        if kw.pop('return_offsets_mapping', False): raise NotImplementedError('return_offset_mapping is not available when using Python tokenizers')
        return self.fast(text, **kw)


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_slow_tokenizer(name):
    template, before, after, _ = TEMPLATES[name]
    tok = tokenizer(template)
    samples = chat('Who wrote it?', 'Ann and Bob', 'when', 'in 1913 你好')
    fast, = encode_samples(samples, tok)
    slow, = encode_samples(samples, Slow(tok))
    assert [x.strip() for x in said(tok, slow)] == ['Ann and Bob'+after, 'in 1913 你好'+after]
    assert tok.decode(slow.ids) == tok.decode(fast.ids) and not slow.supervised[0]


def test_a_real_slow_tokenizer(tmp_path):
    "CTRL's is pure Python."
    import json
    (tmp_path/'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(['<unk>', '</s>', *(f'{chr(97+i)}@@' for i in range(26)), *(chr(97+i) for i in range(26)), ':', ':@@'])}))
    (tmp_path/'merges.txt').write_text('#version: 0.2\n')
    tok = tf.CTRLTokenizer(str(tmp_path/'vocab.json'), str(tmp_path/'merges.txt'), eos_token='</s>')
    if tok.is_fast: pytest.skip('this transformers has no slow tokenizer here')
    tok.chat_template = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    e, = encode_samples(chat('hi', 'ann', 'hi', 'bob'), tok)
    assert [x.replace(' ', '') for x in said(tok, e)] == ['ann</s>', 'bob</s>']
    plain, = encode_samples(load_samples([dict(prompt='hi', response='ann')]), tok)
    assert [x.replace(' ', '') for x in said(tok, plain)] == ['ann</s>']


# ---- odd text

def test_lone_surrogates():
    "JSON can hold half a character; it is tokenised as U+FFFD, in plain rows and in chats, and the id still tells rows apart."
    tok = tokenizer(CHATML)
    samples = load_samples([dict(prompt='a\ud800b', response='x\udfffy'), dict(prompt='a\ud801b', response='x\udfffy')])
    for e in encode_samples(samples, tok): assert tok.decode(e.ids[e.supervised]) == 'x\ufffdy</s>' and tok.decode(e.ids).startswith('a\ufffdb')
    assert samples[0].id != samples[1].id
    talk, = encode_samples(chat('a\ud800', 'x\udfffy 你'), tok)
    assert said(tok, talk) == ['x\ufffdy 你<|im_end|>']


def test_a_surrogate_pair_is_one_character():
    tok = tokenizer()
    e, = encode_samples(load_samples([dict(prompt='a', response='\ud83d\ude00')]), tok)
    assert tok.decode(e.ids[e.supervised]) == '😀</s>'


@pytest.mark.parametrize('text', ['\x00', '\x1b[31mred', '\u202e\u200b', '\r\n', ' ', '\t\n', '<|im_end|>', '\ufeff', 'e\u0301'])
def test_hostile_text_is_tokenised_as_it_is(text):
    tok = tokenizer()
    e, = encode_samples(load_samples([dict(prompt='a', response='b'+text+'c')]), tok)
    assert tok.decode(e.ids[e.supervised], clean_up_tokenization_spaces=False) == 'b'+text+'c</s>'


# ---- the real tokenizer

@pytest.mark.parametrize('name', TEMPLATES)
def test_the_real_tokenizer(shared, name):
    path = shared/'models'/'qa-lm-9m'
    if not path.is_dir(): pytest.skip('needs the model models/qa-lm-9m beside the project (or GRADSENTRY_SHARED)')
    template, before, after, _ = TEMPLATES[name]
    tok = tf.AutoTokenizer.from_pretrained(path); tok.chat_template = template
    e, = encode_samples(chat('who was neptune discovered by?', 'John Couch Adams; Dr Galle', 'and uranus?', 'William Herschel'), tok)
    assert [''.join(x.split()) for x in said(tok, e)] == [''.join((c+after).split()) for c in ('John Couch Adams; Dr Galle', 'William Herschel')]
    plain, = encode_samples(load_samples([dict(prompt='who?\n\n### Answer: ', response=['Ann', 'Bob'])]), tok)
    assert plain.ids[-1] == tok.eos_token_id and not plain.supervised[0]
    assert tok.decode(plain.ids[plain.supervised], skip_special_tokens=True).strip() == 'Ann; Bob'
