"The magics in a real JupyterLab under headless Chromium, cell after cell without waiting. Skipped where Chromium is missing."
import pytest
from lab import CHROMIUM, browser, notebook, server

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium on this machine'), pytest.mark.slow]

CELLS = ['%load_ext gradsentry_nb', '%gs_model demo', 'live = %gs_live demo\nlive', 'verdict = %gs_scan demo --quiet --limit 300', '%gs_explain 12', '%gs_report', '%%gs_score\nhello', '%gs_scan demo --presset paper']


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    pytest.importorskip('playwright')
    folder = tmp_path_factory.mktemp('lab')
    (folder/'t.ipynb').write_text(notebook(*CELLS))
    with server(folder) as url, browser(folder, url) as b:
        b.open('t.ipynb', run=False)
        b.page.evaluate('''async n => { const w = jupyterapp.shell.currentWidget; await w.context.ready; await w.sessionContext.ready; await w.sessionContext.session.kernel.info;
          for (let i = 0; i < n; i++) { w.content.activeCellIndex = i; w.content.deselectAll(); await jupyterapp.commands.execute("notebook:run-cell") } }''', len(CELLS))
        yield b


def outputs(b, i): return b.page.evaluate('i => { const o = jupyterapp.shell.currentWidget.content.widgets[i].outputArea.model, all = []; for (let k = 0; k < o.length; k++) all.push(o.get(k).toJSON()); return all }', i)


def test_a_scan_in_a_cell_beside_one_in_a_live_view(lab):
    assert outputs(lab, 3) == []
    lab.until('print(live.live.state)', 'done', 120)
    same = 'print((live.verdict.scores.frame["score"][:300]-verdict.scores.frame["score"]).abs().max() < .01, len(live.verdict.drop))'
    lab.until(same, 'True 120')
    assert lab.errors == []


def test_what_a_report_is_and_that_nothing_was_written(lab):
    frame = lab.page.locator('iframe[sandbox]')
    frame.scroll_into_view_if_needed()
    assert frame.evaluate('f => f.offsetWidth <= f.parentElement.clientWidth')
    assert lab.page.frame_locator('iframe[sandbox]').locator('h1').inner_text().endswith('look planted')
    assert lab.page.get_by_text('Nothing was written: %gs_report --out FOLDER').count() == 1


@pytest.mark.parametrize('cell', [6, 7])
def test_wrong_usage_is_one_sentence(lab, cell):
    said, = outputs(lab, cell)
    assert said['output_type'] == 'stream' and said['text'].startswith('UsageError: ') and said['text'].count('\n') <= 1
