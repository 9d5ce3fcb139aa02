"""The page that runs an exported network, in a real browser where one is installed."""

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import TINY, script_module
from PIL import Image
from test_export import chooser_head, stage2  # whose networks tell images apart

import engine
from visual import browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api")
onnxruntime = pytest.importorskip("onnxruntime")

if not BROWSER:
    pytest.skip("no chromium here", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture
def page(folder, run, cifar_dir, runtime):
    """A loaded page, and the folder that it stands in: of a network that chooses for any penalty,
    as export.py --page makes it.
    """
    out = folder / "out"
    if not out.exists():
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=generator)
        extra = {"correctness": chooser_head().state_dict()}
        stage2(folder / "ckpt.t7", images, extra=extra)
        shutil.copytree(runtime, out / "ort")
        status, _, err = run(
            "export", "--model", TINY, "--load", folder / "ckpt.t7", "--penalty", "input",
            "--page", out, "--check", 40, "--data_dir", cifar_dir, "--skip_data_check",
        )  # fmt: skip
        assert status == 0, err
    handler = functools.partial(Quiet, directory=str(out))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        chromium = driver.chromium.launch(executable_path=BROWSER, args=options)
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        tab.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        assert all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in asked)
        yield tab, out
        chromium.close()
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def runtime(tmp_path_factory):
    """The runtime's files, from npm; skipped where it cannot be had."""
    export = script_module("export")
    root = tmp_path_factory.mktemp("runtime")
    try:
        with engine.npm.unpacked(export.RUNTIME, export.RUNTIME_BYTES, root) as package:
            kept = root / "ort"
            kept.mkdir()
            for name in export.RUNTIME_FILES:
                shutil.copy(package / "dist" / name, kept / name)
    except OSError as error:
        pytest.skip(f"no {export.RUNTIME}: {error}")
    return kept


def test_the_browser_computes_what_python_does(page):
    tab, out = page
    session = onnxruntime.InferenceSession(out / "model.onnx")
    facts = json.loads(tab.text_content("#facts"))
    assert facts["size"] == 32 and len(facts["images"]) == 40
    for number in range(10):
        penalty = (-0.5, -5.0, -50.0)[number % 3]
        found = tab.evaluate(
            "([i, p]) => window.run(window.testImages[i].bytes, p)", [number, penalty]
        )
        raw = tab.evaluate("i => Array.from(window.testImages[i].bytes)", number)
        image = np.array(raw, np.uint8).reshape(1, 32, 32, 3)
        feed = {"image": image, "penalty": np.array([penalty], np.float32)}
        logits, policy = session.run(["logits", "policy"], feed)
        assert found["policy"] == policy[0].tolist()
        assert np.abs(np.array(found["logits"]) - logits[0]).max() <= 1e-4 * np.abs(logits).max()


def test_a_larger_budget_never_has_fewer_blocks(page):
    tab, _ = page
    means = []
    for place in (0, 25, 50, 75, 100):
        tab.evaluate(
            "x => { const s = document.getElementById('penalty'); s.value = x;"
            " delete document.getElementById('strip').dataset.mean;"
            " s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change')); }",
            place,
        )
        tab.wait_for_function("document.getElementById('strip').dataset.mean !== undefined")
        means.append(float(tab.get_attribute("#strip", "data-mean")))
    assert means == sorted(means) and means[0] < means[-1]
    assert tab.evaluate("[window.penaltyAt(0), window.penaltyAt(100)]") == [-0.5, -50]


def test_pictures_and_other_files(page, tmp_path):
    tab, _ = page
    (tmp_path / "notes.png").write_text("no picture")
    tab.set_input_files("#file", str(tmp_path / "notes.png"))
    tab.wait_for_function("document.getElementById('error').textContent !== ''")
    assert tab.text_content("#error") == "notes.png is no picture that this browser can read."
    Image.new("RGB", (300, 200), (200, 100, 50)).save(tmp_path / "mine.png")
    tab.set_input_files("#file", str(tmp_path / "mine.png"))
    tab.wait_for_function(
        "document.getElementById('shown').getAttribute('aria-label').includes('mine.png')"
    )
    assert tab.text_content("#error") == ""
    assert "of 6 kept" in tab.text_content("#count")


def test_it_is_readable_and_reached_by_keys(page):
    tab, _ = page
    for width in (390, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.focus("#pictures button:nth-child(2)")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#pictures button:nth-child(2)[aria-pressed=true]")
    assert tab.evaluate("document.querySelectorAll('#blocks ol li[aria-label]').length") == 6
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('button, input')].filter(e => !(e.getAttribute('aria-label')"
        " || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_the_page_holds_no_markup_of_its_facts():
    facts = {"classes": ["</script><b>", "a & b"]}
    text = browser.page("x < y", facts, np.zeros((1, 2, 2, 3), np.uint8), [0], True)
    assert "</script><b>" not in text and "<title>x &lt; y</title>" in text
