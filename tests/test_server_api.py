"""The server's routes against their description, and its page in a browser."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import playwright.sync_api
import pytest
from playwright.sync_api import expect

from nnsight_go import LanguageModel, NnsightError
from nnsight_go.remote.server import Server as Client
from references import Pair
from servers import Server, key_command
from test_remote_server import named

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No sandbox, for root; and nothing of a browser's own that looks for a network.
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()


@pytest.fixture(scope="module")
def keyed(gpt2_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server that lets one key in, and that key."""
    data = tmp_path_factory.mktemp("server")
    made = key_command(data, "create", "tests").strip()
    with Server(data, "--model", named(gpt2_pair), "--rate", 1e6) as server:
        yield server, made
        assert server.end() == 0, "".join(server.said)


@pytest.fixture
def model(gpt2_pair: Pair, keyed: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    server, key = keyed
    monkeypatch.setenv("NNSIGHT_GO_API_KEY", key)
    return LanguageModel(gpt2_pair.model.name_or_path, remote=server.host, tokenizer=False)


def test_routes_are_as_described(
    model: LanguageModel, keyed: tuple[Server, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random requests of every route: all answers are as openapi.yaml says, and the server goes on."""
    server, key = keyed
    requests: list[bytes] = []
    perform = Client.perform

    def noted(self: Client, request: bytes) -> bytearray:
        requests.append(bytes(request))
        return perform(self, request)

    monkeypatch.setattr(Client, "perform", noted)

    def trace() -> float:
        with model.trace([1, 2, 3]):
            model.transformer.h[0].output[0][:, 1] = 0
            out = model.lm_head.output[0, -1].sum().save()
        return float(out)

    before = trace()
    with model.generate([1, 2], max_new_tokens=3):
        model.generator.output.save()
    for i, request in enumerate(requests):
        (tmp_path / str(i)).write_bytes(request)
    # A schema cannot say which bytes are a request; DELETE ends a job, and what came of it stays.
    words = f"""-m schemathesis.cli run {server.host}/openapi.yaml --seed 0 --max-examples 40 --request-timeout 60
        --exclude-operation-id events --exclude-checks positive_data_acceptance,use_after_free --warnings off
        --suppress-health-check filter_too_much""".split()
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "NNSIGHT_GO_REQUESTS": str(tmp_path),
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, *words, "-H", f"Authorization: Bearer {key}"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Stateful" in done.stdout, done.stdout
    assert trace() == before


def test_only_what_is_there_is_answered(keyed: tuple[Server, str]) -> None:
    server, key = keyed
    for method, path, status in (("TRACE", "/v1/jobs", 405), ("PUT", "/healthz", 405), ("GET", "/v1/nothing", 404)):
        answer = httpx2.request(method, server.host + path, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status and answer.json()["error"]["message"]
        assert (status == 405) == ("allow" in answer.headers)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page(model: LanguageModel, keyed: tuple[Server, str]) -> None:
    server, key = keyed
    with model.trace([1, 2]):
        model.lm_head.output.save()
    with pytest.raises(NnsightError), model.trace([1, 2]):
        model.lm_head.output[0, 99].save()
    with playwright.sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page()
        failures: list[str] = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("requestfailed", lambda request: failures.append(request.url))
        page.goto(server.host)
        expect(page.get_by_role("status")).to_have_text("The server is ready.")
        expect(page.get_by_role("alert")).to_contain_text("does not know this API key")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Show").press("Enter")
        expect(page.get_by_role("alert")).to_be_empty()
        models = page.get_by_role("table", name="Models").locator("tbody tr")
        expect(models).to_have_count(1)
        expect(models.locator("td")).to_have_text(
            [model.name_or_path, "GPT2LMHeadModel", "float32", "1", re.compile("[0-9]+")]
        )
        jobs = page.get_by_role("table", name="Recent jobs of this key").locator("tbody tr")
        expect(jobs.nth(0)).to_contain_text("ERROR")
        expect(jobs.nth(1)).to_contain_text("COMPLETED")
        with model.trace([1, 2, 3]):
            model.lm_head.output.save()
        expect(jobs.nth(0)).to_contain_text("COMPLETED")  # without a click
        assert page.url.rstrip("/") == server.host and key not in page.content()
        for size in ((360, 640), (1280, 800)):
            page.set_viewport_size({"width": size[0], "height": size[1]})
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        page.screenshot(path=os.environ.get("NNSIGHT_GO_SCREENSHOT") or None, full_page=True)
        browser.close()
    assert not failures, failures
