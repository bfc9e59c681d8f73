"A JupyterLab or Notebook 7 server and headless Chromium, for tests that need to see what a person sees."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
ROOT = Path(__file__).resolve().parent.parent
RUN_ALL = '''async () => { const w = jupyterapp.shell.currentWidget; await w.context.ready; await w.sessionContext.ready;
  await w.sessionContext.session.kernel.info; await jupyterapp.commands.execute("notebook:run-all-cells") }'''
ASK = '''async code => { const k = jupyterapp.shell.currentWidget.sessionContext.session.kernel; const f = k.requestExecute({code, store_history: false}); let out = "";
  f.onIOPub = m => { if (m.header.msg_type === "stream") out += m.content.text; if (m.header.msg_type === "error") out += "ERROR " + m.content.ename + ": " + m.content.evalue };
  await f.done; return out }'''


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def notebook(*cells): return json.dumps(dict(cells=[dict(cell_type='code', execution_count=None, id=f'c{i}', metadata={}, outputs=[], source=c) for i, c in enumerate(cells)],
                                             metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), nbformat=4, nbformat_minor=5))


APPS = {'jupyterlab': ('LabApp', '/doc/tree/'), 'notebook': ('JupyterNotebookApp', '/notebooks/')}   # module -> (its settings, where a notebook opens)


@contextmanager
def server(folder, app='jupyterlab', python=sys.executable, **more):
    "A server of `APPS` over `folder`, run by `python`, with `more` in its environment; yields its address."
    port, hidden = free_port(), folder/'.jupyter'
    (hidden/'labconfig').mkdir(parents=True)
    (hidden/'labconfig/page_config.json').write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), **more, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', **{f'JUPYTER_{k}_DIR': str(hidden if k == 'CONFIG' else hidden/k) for k in ('CONFIG', 'DATA', 'RUNTIME')}}
    log = open(folder/'lab.log', 'w')
    p = subprocess.Popen([str(python), '-m', app, '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--allow-root', '--IdentityProvider.token=tok', f'--ServerApp.root_dir={folder}',
                          f'--{APPS[app][0]}.expose_app_in_browser=True'], env=env, stdout=log, stderr=log, cwd=folder)
    url = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f'{url}/api?token=tok', timeout=2); break
            except OSError: time.sleep(.25)
            if p.poll() is not None: raise RuntimeError((folder/'lab.log').read_text()[-2000:])
        yield url
    finally: p.terminate(); p.wait(20); log.close()


class Lab:
    "A page of Chromium with a notebook; `errors` collects page errors and requests to other hosts."
    def __init__(self, context, url, app='jupyterlab'):
        self.context, self.url, self.at, self.errors = context, url, APPS[app][1], []
        self.page = context.new_page()
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('request', lambda r: None if r.url.startswith((url, 'data:', 'blob:', url.replace('http', 'ws'))) else self.errors.append(f'asked {r.url}'))
        self.page.on('dialog', lambda d: (self.errors.append(f'dialog {d.message}'), d.dismiss()))

    def open(self, name, run=True):
        self.page.goto(f'{self.url}{self.at}{name}?token=tok&reset')
        self.page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=60_000)
        if run: self.page.evaluate(RUN_ALL)
        return self

    def ask(self, code): return self.page.evaluate(ASK, code)
    def until(self, code, wanted, seconds=60):
        "Ask the kernel until it prints `wanted`."
        end, said = time.time()+seconds, None
        while time.time() < end:
            said = self.ask(code).strip()
            if said == wanted: return said
            time.sleep(.2)
        raise AssertionError(f'{code!r} printed {said!r}, not {wanted!r}')
    def save(self): self.page.evaluate('async () => { await jupyterapp.commands.execute("docmanager:save") }')
    def shot(self, path): self.page.screenshot(path=str(path))


@contextmanager
def browser(folder, url, width=1366, height=900, dark=False, app='jupyterlab'):
    "Chromium with a profile of its own."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(str(folder/f'profile{width}{dark}'), executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                       viewport=dict(width=width, height=height), color_scheme='dark' if dark else 'light')
        try: yield Lab(context, url, app)
        finally: context.close()
