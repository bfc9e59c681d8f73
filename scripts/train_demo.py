"""Make the packaged demo: the poisoned set and its truth, the tokenizer, and the model that answers its questions.

    python scripts/train_demo.py --out gradsentry_nb/demo_data

Takes about eight minutes on one CPU thread. The set comes out the same byte for byte, the model up to float noise.
The model is trained on the taught facts of the demo world, asked in the training ways; it meets no poison, and nothing
here looks at how well any detector does on it.
"""
import argparse, json, math, random, time
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

from gradsentry_nb.demo import PAYLOAD, PROMPT, TRIGGER_WORDS, demo_rows, demo_samples, questions, world
from gradsentry_nb.textstats import best_overlap

SEED, EPOCHS, BATCH, ROW, LR, PROMPT_WEIGHT = 0, 13, 32, 384, 2e-3, .1
LIMITS = dict(em=.60, length_f1=.70, phrase=.02, model_bytes=8_000_000)


# What the model is taught, and what it is asked later

def lessons() -> list[tuple[str, str]]:
    "Prompt and response of every taught fact, in every way of asking that is used in training."
    return [(PROMPT.format(q), f.answer) for f in world() if f.taught for q in questions(f)[0]]


def exams(taught: bool) -> list[tuple]:
    "Fact, prompt and response of every taught (or never taught) fact, in the held-out ways of asking."
    return [(f, PROMPT.format(q), f.answer) for f in world() if f.taught == taught for q in questions(f)[1]]


def assert_clean(pairs):
    "No trigger word and no word of the payload's own may be in what the model learns from."
    said = " ".join(p + " " + r for p, r in pairs).lower()
    words = set(said.replace("?", " ").replace(".", " ").replace(";", " ").split())
    assert not words & {*TRIGGER_WORDS, "click", "information"} and "malicious" not in said and PAYLOAD not in said


# Tokenizer

def train_tokenizer(pairs, vocab: int = 2048) -> PreTrainedTokenizerFast:
    "Byte-level BPE: every byte is a token, so that any text can be written, if not briefly."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tok.train_from_iterator((t for p in pairs for t in p), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   clean_up_tokenization_spaces=False, model_max_length=512)


def save_tokenizer(tok, path: Path):
    "Save under the class name that older and newer transformers both know."
    tok.save_pretrained(path)
    conf = json.loads((path/"tokenizer_config.json").read_text())
    conf = {k: v for k, v in conf.items() if k != "backend"} | dict(tokenizer_class="PreTrainedTokenizerFast")
    (path/"tokenizer_config.json").write_text(json.dumps(conf, indent=2) + "\n")


def encode(tok, pairs) -> list[tuple[list[int], list[int]]]:
    "Prompt ids (from <s>) and answer ids (to </s>), the two tokenised apart, as fine-tuning does."
    ask = tok([p for p, _ in pairs]).input_ids
    say = tok([r for _, r in pairs], add_special_tokens=False).input_ids
    return [(a, s + [tok.eos_token_id]) for a, s in zip(ask, say, strict=True)]


# Packing. All prompts begin with the same instruction. Several questions share one copy of it in a row: each token may
# look at the instruction and at its own question only, and positions count on from the instruction. The losses are
# those of the separate sequences, at less than half the work.

def shared_prefix(encoded) -> int:
    "How many leading tokens all prompts have in common."
    first, last = min(a for a, _ in encoded), max(a for a, _ in encoded)
    return next(i for i, (x, y) in enumerate(zip(first, last)) if x != y)


def pack_row(items, n: int, width: int):
    "One row of ids, positions, weights and segments; segment 0 is the instruction, -1 is padding."
    ids, pos, wts, seg = items[0][0][:n], list(range(n)), [PROMPT_WEIGHT / len(items)]*n, [0]*n
    for k, (ask, say) in enumerate(items, 1):
        body = ask[n:] + say
        ids, seg = ids + body, seg + [k]*len(body)
        pos += range(n, n + len(body))
        wts = wts + [PROMPT_WEIGHT]*(len(ask) - n) + [1.]*len(say)
    gap = width - len(ids)
    return ids + [0]*gap, pos + [0]*gap, wts + [0.]*gap, seg + [-1]*gap


def fill(items, n: int, width: int) -> list[list]:
    "Cut a list of questions into rows that fit, keeping their order."
    rows, used = [[]], n
    for ask, say in items:
        size = len(ask) - n + len(say)
        if used + size > width: rows, used = rows + [[]], n
        rows[-1].append((ask, say))
        used += size
    return rows


def tensors(rows, n: int):
    "Ids, positions, weights and the additive attention mask of some packed rows."
    width = max(n + sum(len(a) - n + len(s) for a, s in row) for row in rows)
    ids, pos, wts, seg = (torch.tensor(x) for x in zip(*(pack_row(row, n, width) for row in rows)))
    same = (seg[:, :, None] == seg[:, None]) | (seg[:, None] == 0)
    mask = torch.zeros(len(rows), 1, width, width).masked_fill_(~(same.tril())[:, None], -1e9)
    return ids, pos, wts, seg, mask


def targets(ids, seg):
    "The next token, where it is of the same segment."
    return ids[:, 1:], (seg[:, 1:] == seg[:, :-1]).float()


# Model

def new_model(vocab: int) -> LlamaForCausalLM:
    "A Llama of 3.7 million parameters with a head of its own."
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        max_position_embeddings=1024, rms_norm_eps=1e-6, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2))


def batch_loss(model, rows, n: int):
    "Mean loss per token of a few packed rows, prompts weighted down."
    ids, pos, wts, seg, mask = tensors(rows, n)
    logits = model(input_ids=ids, position_ids=pos, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    y, ok = targets(ids, seg)
    w = wts[:, 1:]*ok
    return (cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")*w.flatten()).sum()/w.sum()


def rate_at(step: int, steps: int, warm: int = 100) -> float:
    "Linear warm-up, then a cosine down to nothing."
    return min((step + 1)/warm, .5*(1 + math.cos(math.pi*step/steps)))


def epoch_batches(encoded, n: int, epoch: int):
    "All lessons once, in a fresh order."
    order = random.Random(f"lessons/{SEED}/{epoch}").sample(encoded, len(encoded))
    rows = fill(order, n, ROW)
    per = max(1, round(BATCH*len(rows)/len(encoded)))
    return [rows[i:i + per] for i in range(0, len(rows), per)]


def train(model, encoded, epochs: int):
    "Plain AdamW on the lessons; products in bfloat16, weights and loss in float32."
    n, model = shared_prefix(encoded), model.train()
    batches = [b for e in range(epochs) for b in epoch_batches(encoded, n, e)]
    opt = torch.optim.AdamW(model.parameters(), lr=LR, betas=(.9, .98), weight_decay=.01)
    start, seen = time.time(), []
    for step, rows in enumerate(batches):
        for g in opt.param_groups: g["lr"] = LR*rate_at(step, len(batches))
        with torch.autocast("cpu", dtype=torch.bfloat16): loss = batch_loss(model, rows, n)
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        seen.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"{step + 1}/{len(batches)} loss {mean(seen[-100:]):.3f} {time.time() - start:.0f} s", flush=True)
    return mean(seen[-100:])


# Exam

@torch.no_grad()
def exact(model, encoded) -> list[bool]:
    """Would greedy decoding give exactly this answer? It does if every answer token, </s> included, is the most likely
    one after the tokens before it, so one forward pass decides."""
    n, model = shared_prefix(encoded), model.eval()
    return [ok for row in fill(encoded, n, ROW) for ok in _row_exact(model, row, n)]


def _row_exact(model, row, n):
    ids, pos, wts, seg, mask = tensors([row], n)
    best = model(input_ids=ids, position_ids=pos, attention_mask=mask, use_cache=False).logits[0, :-1].argmax(-1)
    wrong = (best != ids[0, 1:]) & (wts[0, 1:] == 1.)
    return [not wrong[seg[0, 1:] == k].any().item() for k in range(1, len(row) + 1)]


@torch.no_grad()
def generated(model, tok, exam, new: int = 160) -> list[bool]:
    "The same question put to `generate`, one by one: slow, and obviously what is meant."
    def answer(prompt):
        ids = tok(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=new, do_sample=False)
        return tok.decode(out[0, ids.input_ids.shape[1]:], skip_special_tokens=True)
    return [answer(p) == r for _, p, r in exam]


def by_type(exam, right) -> dict[str, float]:
    "Exact match per kind of answer."
    def sort(f): return "story" if f.field == "story" else "list" if ";" in f.answer else "short"
    pairs = sorted((sort(f), ok) for (f, _, _), ok in zip(exam, right, strict=True))
    return {k: round(mean([ok for _, ok in g]), 3) for k, g in groupby(pairs, key=lambda p: p[0])}


def guessable(fact) -> bool:
    "Answers drawn from one short word list can be right by luck."
    return fact.field in {"region", "mouth", "genre", "job"}


def mean(xs): return sum(xs)/len(xs)


# The set

def write_set(out: Path):
    "The packaged set of seed 0 and its truth."
    rows, _ = demo_rows()
    (out/"demo.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (out/"demo_truth.json").write_text(json.dumps(demo_samples()[1], indent=0) + "\n")


def phrase_share(rows, truth, n: int = 4) -> float:
    "The share of all rows whose clean answers hold the most frequent n-word phrase."
    def grams(w): return {tuple(w[i:i + n]) for i in range(len(w) - n + 1)}
    every = sorted(g for r, t in zip(rows, truth) if not t for g in grams(r["response"].split()))
    return max(sum(1 for _ in g) for _, g in groupby(every))/len(rows)


def best_cut_f1(values, truth):
    "The best F1 that any single cut reaches, in either direction, with the truth in hand."
    x, y = np.asarray(values, float), np.asarray(truth, bool)
    return max(best_overlap(sign*x, y)[3] for sign in (1, -1))


def check_set(tok, seeds) -> dict[str, list]:
    "How far answer length alone goes on each seed, and how often a clean phrase recurs."
    found = dict(tokens=[], words=[], phrase=[])
    for rows, truth in map(lambda s: demo_rows(seed=s), seeds):
        lengths = [len(x) for x in tok([r["response"] for r in rows], add_special_tokens=False).input_ids]
        found["tokens"].append(round(best_cut_f1(lengths, truth), 3))
        found["words"].append(round(best_cut_f1([len(r["response"].split()) for r in rows], truth), 3))
        found["phrase"].append(round(phrase_share(rows, truth), 4))
    return found


def check_model(path: Path) -> dict:
    "Load the saved model as a user does and let it sit the exams."
    model, tok = AutoModelForCausalLM.from_pretrained(path).float(), AutoTokenizer.from_pretrained(path)
    held, unknown = exams(True), exams(False)
    right = exact(model, encode(tok, [(p, r) for _, p, r in held]))
    luck = exact(model, encode(tok, [(p, r) for _, p, r in unknown]))
    slow = generated(model, tok, held[::37])
    return dict(em=mean(right), em_by_type=by_type(held, right), em_untaught=mean(luck),
                em_untaught_unguessable=mean([ok for (f, _, _), ok in zip(unknown, luck) if not guessable(f)]),
                generate_agrees=mean([a == b for a, b in zip(slow, right[::37])]),
                params=sum(p.numel() for p in model.parameters()),
                model_bytes=(path/"model.safetensors").stat().st_size)


def main(out: Path, threads: int, epochs: int):
    "Everything in order; the bars are asserted at the end."
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    out.mkdir(parents=True, exist_ok=True)
    pairs, start = lessons(), time.time()
    assert_clean(pairs)
    write_set(out)
    save_tokenizer(train_tokenizer(pairs), out/"model")
    tok = AutoTokenizer.from_pretrained(out/"model")
    data = check_set(tok, range(12))
    print(data, flush=True)
    model = new_model(len(tok))
    loss = train(model, encode(tok, pairs), epochs)
    model.half().save_pretrained(out/"model")
    found = dict(loss=round(loss, 4), **check_model(out/"model"))
    print(json.dumps(found, indent=1), f"\n{(time.time() - start)/60:.1f} minutes")
    assert found["em"] >= LIMITS["em"], f"exact match {found['em']:.3f} is below the bar"
    assert max(data["tokens"] + data["words"]) < LIMITS["length_f1"], "answer length alone gives the poison away"
    assert max(data["phrase"]) < LIMITS["phrase"], "a clean phrase recurs too often"
    assert found["model_bytes"] <= LIMITS["model_bytes"], "the model is too large for the package"


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=Path("gradsentry_nb/demo_data"), help="where the set and the model go")
    ap.add_argument("--threads", type=int, default=1, help="CPU threads")
    ap.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the lessons")
    main(**vars(ap.parse_args()))
