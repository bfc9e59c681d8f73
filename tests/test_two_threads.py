"Two threads that share a scan: nothing else changes, and nothing is left running."
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_architectures import made
from test_invariance import same

from gradsentry_nb import capture
from gradsentry_nb.capture import Capture
from gradsentry_nb.core import Encoded
from gradsentry_nb.spectrum import row_roots, statistics

BUDGET = 80


@pytest.fixture(autouse=True)
def told(monkeypatch):
    "A machine of two cores, as far as torch says; what it was told is kept. No thread is left."
    running, told = threading.active_count(), []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: told.append((n, threading.current_thread() is threading.main_thread())))
    yield told
    assert threading.active_count() == running and (not told or told[-1] == (2, True))


def rows(n=150, prefix=5, vocab=90, longest=24):
    rng, out = np.random.default_rng(0), []
    for k in range(n):
        size = rng.integers(8, longest) if k%10 else rng.integers(1, 3)
        ids = np.r_[np.full(prefix, 7), rng.integers(8, vocab, size)].astype(np.int32)
        at = np.zeros(len(ids), bool); at[len(ids)-min(size, 6):] = k%17 > 0      # some rows have no answer
        out.append(Encoded(ids, at))
    return out


def scan(c, some): return {i: x for i, x in c(some, row_roots)}


def columns(found): return {i: statistics([r])[0] for i, r in found.items()}


@contextmanager
def sides():
    "How often threads were started."
    old, seen = Capture.side, []
    def side(self, *args): seen.append(threading.current_thread()); old(self, *args)
    Capture.side = side
    try: yield seen
    finally: Capture.side = old


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_scores_order_and_notes(family, told):
    some, model = rows(), made(family)
    one = Capture(model, budget=BUDGET); alone = {i: row_roots(f) for i, f in one(some)}
    with sides() as seen: two = Capture(model, budget=BUDGET); shared = scan(two, some)
    assert len(seen) == 2 and threading.main_thread() not in seen and told == [(1, False)]*2+[(2, True)]
    same(columns(alone), columns(shared), 1e-8)
    again = scan(Capture(model, budget=BUDGET), some)
    assert [*again] == [*shared] and all(torch.equal(again[i].D, shared[i].D) and torch.equal(again[i].H, shared[i].H) for i in shared)
    assert two.notes == one.notes != [] and two.budget == BUDGET and two.tail is not None and not model.training


@pytest.mark.parametrize('why', ['short', 'long', 'threads', 'quantised', 'no reduce', 'stretches'])
def test_one_thread_where_two_are_not_sure_to_pay(why, monkeypatch):
    some, model = rows(), made('llama', torch.float32)
    if why == 'short': some = some[:40]
    if why == 'long': some[0] = Encoded(np.arange(60, dtype=np.int32), np.arange(60) > 55)
    if why == 'threads': monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    if why == 'quantised': model.get_submodule(model.config.model_type != 'llama' or 'model.norm').weight = torch.nn.Parameter(torch.ones(model.config.hidden_size, dtype=torch.int8), requires_grad=False)
    if why == 'stretches': monkeypatch.setattr(capture, 'stretching', lambda m: 'dynamic')
    c = Capture(model, budget=BUDGET)
    todo = [r for r in some if r.tokens]
    if why == 'no reduce':
        with sides() as seen: assert len(list(c(some))) == len(todo) and not seen
    else: assert not c.two(todo, c.groups(todo))


def test_an_error_comes_through_and_names_the_batches():
    some, c, seen = rows(), Capture(made('llama'), budget=BUDGET), []
    def reduce(f):
        seen.append(f)
        if len(seen) > 40: raise ZeroDivisionError('forty-first')
    with pytest.raises(ZeroDivisionError, match='forty-first'): list(c(some, reduce))
    todo = [r for r in some if r.tokens]
    assert 0 < len(c.at) < 40 and max(c.at) < len(todo)


def test_left_early_and_looked_at_slowly():
    some, c, made_here = rows(400), Capture(made('llama'), budget=BUDGET), []
    it = c(some, made_here.append)
    for _ in range(3): next(it)
    time.sleep(.3)
    assert 3 <= len(made_here) < 3+2*64+2*8     # what waits in line, and a row of each thread
    it.close()


@pytest.mark.parametrize('unlucky', [2, 9])
def test_a_prefix_that_must_not_be_shared(unlucky, monkeypatch):
    some, model, calls = rows(), made('llama'), []
    def agree(a, b): calls.append(a); return False
    monkeypatch.setattr(capture, '_agree', agree)
    c = Capture(model, budget=BUDGET); found = scan(c, some)
    same(columns(found), columns(scan(Capture(model, budget=BUDGET, share=False), some)), 1e-8)
    assert calls and 'computed in every row' in c.notes[0] and len(c.notes) == 1


def test_memory_runs_out_in_one_of_them(monkeypatch):
    some, model, old, left = rows(), made('llama'), Capture.hidden, [4]
    def hidden(self, batch, prefix):
        left[0] -= len(batch) > 2
        if not left[0]: left[0] = -1; raise MemoryError()
        return old(self, batch, prefix)
    expected = columns(scan(Capture(model, budget=BUDGET), some))
    monkeypatch.setattr(Capture, 'hidden', hidden)
    c = Capture(model, budget=BUDGET)
    same(expected, columns(scan(c, some)), 1e-8)
    assert c.budget < BUDGET and sum('Memory ran out' in n for n in c.notes) == 1
