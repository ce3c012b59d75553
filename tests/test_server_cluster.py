"""Servers and workers over a cluster of three NATS servers, of which one is lost: all of them real processes."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from nnsight_go import LanguageModel
from references import Pair
from servers import Process, Program, Server
from test_remote_server import named

ROOT = pathlib.Path(__file__).parents[1]
JOBS, CLIENTS = 2000, 16
CONFIG = """
server_name: {name}
listen: 127.0.0.1:{port}
jetstream: {{store_dir: "{directory}"}}
cluster: {{name: lab, listen: 127.0.0.1:{route}, routes: [{routes}]}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """NATS's own server, of the version that the embedded one has."""
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    out = tmp_path_factory.mktemp("nats") / "nats-server"
    environment = {**os.environ, "CGO_ENABLED": "0"}
    build = ["go", "build", "-o", str(out), "github.com/nats-io/nats-server/v2"]
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    return out


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def nodes(program: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[tuple[str, list[Program]]]:
    """The addresses of a cluster, and its processes."""
    ports = free_ports(6)
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports[3:])
    with ExitStack() as stack:
        out = []
        for i in range(3):
            config = tmp_path / f"n{i}.conf"
            directory = tmp_path / f"n{i}"
            config.write_text(
                CONFIG.format(name=f"n{i}", port=ports[i], directory=directory, route=ports[3 + i], routes=routes)
            )
            out.append(stack.enter_context(Program([str(program), "-c", str(config)])))
        for node in out:
            node.wait_for(
                "JetStream cluster (new metadata leader|recovered)|Self is new JetStream cluster metadata leader"
            )
        yield ",".join(f"nats://127.0.0.1:{port}" for port in ports[:3]), out


@pytest.mark.slow
def test_no_job_is_lost(gpt2_pair: Pair, nodes: tuple[str, list[Program]], tmp_path: pathlib.Path) -> None:
    """Two workers, thousands of jobs; a node and a worker are killed in the middle. Every client gets its result."""
    addresses, servers = nodes
    cluster = ("--nats", addresses, "--replicas", 3)
    worker = ("worker", *cluster, "--model", named(gpt2_pair))
    prompts = [gpt2_pair.ids(1 + i % 6, seed=i) for i in range(50)]
    wanted = []
    for ids in prompts:
        with gpt2_pair.model.trace(ids):
            wanted.append(gpt2_pair.model.lm_head.output[0, -1].save())
    with Process(*worker) as first, Process(*worker) as second:
        first.wait_for("working")
        second.wait_for("working")
        with Server(tmp_path / "data", *cluster) as server:
            model = LanguageModel(gpt2_pair.model.name_or_path, remote=server.host, tokenizer=False)
            finished: list[int] = []

            def run(i: int) -> None:
                with model.trace(prompts[i % 50]):
                    logits = model.lm_head.output[0, -1].save()
                torch.testing.assert_close(logits, wanted[i % 50], rtol=1e-4, atol=1e-4)
                finished.append(i)
                if len(finished) == JOBS // 4:
                    first.kill()
                if len(finished) == JOBS // 2:
                    servers[0].kill()

            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
                list(clients.map(run, range(JOBS)))
            assert sorted(finished) == list(range(JOBS))
            assert server.end() == 0
        assert any("state=COMPLETED" in line for line in first.said)
        assert second.end() == 0
