"""The report in a real browser: nothing is said on its console, nothing is fetched, nothing sticks out."""

import os
import shutil

import pytest
from run_folders import h2tune_arrays, lora_arrays, save_arrays, write_run

from h2tune_jax.run.report import write_report

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE = """() => {
  const inside = (e) => e.closest('.scroll, pre, svg');
  const edge = document.documentElement.clientWidth;
  return [...document.querySelectorAll('body *')]
    .filter((e) => !inside(e) && e.getBoundingClientRect().right > edge + 1)
    .map((e) => e.tagName + '.' + e.className);
}"""
# What a letter of a drawing measures on the screen, and what is drawn beside the drawing.
TEXTS = """() => [...document.querySelectorAll('svg.drawing')].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].map((t) => {
    const own = t.getBoundingClientRect();
    const out = own.left < box.left - 1 || own.right > box.right + 1
      || own.top < box.top - 1 || own.bottom > box.bottom + 1;
    return [t.textContent, out, parseFloat(getComputedStyle(t).fontSize) * box.width / 340];
  });
})"""
CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const ground = style('body').backgroundColor, panel = style('figure').backgroundColor;
  const found = {};
  for (const selector of ['body', '.note', 'a', 'th', 'td', 'summary'])
    found[selector] = ratio(style(selector).color, ground);
  found['.drawing text'] = ratio(style('.drawing text').fill, panel);
  for (const name of ['c0', 'c1', 'c2', 'c3', 'c4', 'c5']) {
    const mark = document.body.appendChild(document.createElement('i'));
    mark.className = name;
    mark.style.color = 'var(--own)';
    found[name] = ratio(getComputedStyle(mark).color, panel);
    mark.remove();
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the extra `test` is not installed")
    chosen = os.environ.get("H2TUNE_CHROMIUM")
    path = chosen or next(filter(None, map(shutil.which, NAMES)), None)
    with api.sync_playwright() as playwright:
        # Without a Chromium of the system, the one that `playwright install chromium` brings.
        if path is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("no Chromium: set H2TUNE_CHROMIUM or run `playwright install chromium`")
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    folders = [
        write_run(root / method / str(seed), method=method, seed=seed, gain=gain,
                  moments=("trained", "downloaded"))
        for method, gain in (("h2tune", 0.3), ("local", 0.2))
        for seed in range(2)
    ]  # fmt: skip
    save_arrays(folders[0], h2tune_arrays())
    save_arrays(folders[2], lora_arrays())
    return write_report(folders, root / "report.html")


@pytest.fixture(params=[(360, "light"), (360, "dark"), (1200, "light"), (1200, "dark")])
def page(browser, report, request):
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said = []
    opened.on("console", lambda message: said.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: said.append(f"error: {error}"))
    opened.on("request", lambda request: said.append(f"request: {request.url}"))
    opened.goto(report.as_uri())
    opened.width, opened.scheme, opened.said = width, scheme, said
    yield opened
    opened.close()


def test_report_in_a_browser(page, report, tmp_path):
    for element in page.locator("summary").all():
        element.click()
    assert page.said == [f"request: {report.as_uri()}"]
    assert page.evaluate("document.documentElement.scrollWidth") == page.width
    assert page.evaluate(WIDE) == []

    texts = page.evaluate(TEXTS)
    assert len(texts) > 100
    assert [text for text, out, _ in texts if out] == []
    assert min(size for _, _, size in texts) > 9.5

    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (page.scheme == "light")
    # 4.5 is what the accessibility guidelines ask of text.
    assert {name: ratio for name, ratio in page.evaluate(CONTRAST).items() if ratio < 4.5} == {}

    shot = tmp_path / "report.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 50_000


def test_wide_tables_scroll_by_themselves(browser, report):
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(report.as_uri())
    boxes = page.locator(".scroll:visible").all()
    wide = [box for box in boxes if box.evaluate("e => e.scrollWidth > e.clientWidth + 1")]
    assert wide
    wide[0].evaluate("e => e.scrollTo(50, 0)")
    assert wide[0].evaluate("e => e.scrollLeft") > 0
    page.close()
