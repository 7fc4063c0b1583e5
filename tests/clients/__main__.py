"""Runs clients that others wrote, unchanged, against live servers: `make test-clients`.

Each client has an environment of its own below build/clients, made by pip or npm. The servers have
the default model, an embedding model, and a random cross-encoder. The results go into the table of
docs/clients.md. The exit status is 1 if a client failed.

    python -m tests.clients [NAME ...]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.clients.catalogue import CLIENTS, Client
from tests.clients.environments import HOME, ROOT, environment, version_in
from tests.e2e.server import serving
from tests.tiny import save_pooled

PAGE = ROOT / "docs" / "clients.md"
LIMIT_S = 600
_TABLE = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    version: str
    outcome: str


def run(name: str, client: Client, addresses: dict[str, str]) -> Result:
    """All runs of a client; its output goes to a log beside its environment."""
    try:
        python = environment(name, client)
    except subprocess.CalledProcessError as error:
        return Result(version="-", outcome=f"not installed: exit status {error.returncode}")
    except FileNotFoundError as error:  # npm
        return Result(version="-", outcome=f"not installed: there is no {error.filename}")
    version = version_in(python, client.package)
    program = Path(__file__).parent / "programs" / client.program
    log_path = HOME / f"{name}.log"
    if client.through_gateway:
        behind = dict.fromkeys(("CHAT_URL", "EMBEDDING_URL"), addresses["GATEWAY_URL"])
        addresses = addresses | behind
    with log_path.open("wb") as log:
        for arguments in client.arguments:
            try:
                subprocess.run(
                    [python, program, *arguments],
                    env=os.environ | addresses,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=LIMIT_S,
                    check=True,
                )
            except subprocess.CalledProcessError as error:
                what = " ".join([client.program, *arguments])
                return Result(
                    version=version, outcome=f"fails: {what} ended with {error.returncode}"
                )
            except subprocess.TimeoutExpired:
                return Result(version=version, outcome=f"fails: no end within {LIMIT_S} s")
    return Result(version=version, outcome="runs")


@contextmanager
def gateway_of(*workers: str) -> Iterator[str]:
    """The address of a gateway that is ready to serve what all of these workers serve."""
    command = [sys.executable, "-m", "sapwood", "gateway", *workers]
    with subprocess.Popen(
        [*command, "--port", "0", "--prometheus-port", "-1"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            found = (re.search(r"the gateway is at (\S+);", line) for line in process.stderr)
            url = next(match[1] for match in found if match)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            while len(httpx.get(f"{url}/v1/models").json()["data"]) < len(workers):
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def written(page: str, results: dict[str, Result]) -> str:
    """The page with these results in its table; other clients' rows stay."""
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", _TABLE.findall(page)[0], re.MULTILINE))
    for name, result in results.items():
        rows[name] = f"{result.version} | {CLIENTS[name].shows} | {result.outcome}"
    lines = [f"| `{name}` | {rows[name]} |" for name in CLIENTS if name in rows]
    head = ["", "| Client | Version | What was run | Result |", "|---|---|---|---|"]
    table = "\n".join([*head, *lines, "", ""])
    return _TABLE.sub(lambda _: table, page)


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(CLIENTS))
    if unknown:
        print(f"no client {', '.join(unknown)}; known are {', '.join(CLIENTS)}", file=sys.stderr)
        return 2
    HOME.mkdir(parents=True, exist_ok=True)
    results = {}
    with ExitStack() as stack:
        ranker = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_pooled(ranker, "BertForSequenceClassification", num_labels=1)
        models = {
            "CHAT_URL": "smollm2-135m",
            "EMBEDDING_URL": "all-minilm-l6-v2",
            "RANKING_URL": str(ranker),
        }
        addresses = {
            variable: stack.enter_context(serving("--model", model)).url
            for variable, model in models.items()
        }
        grpc = serving("--model", models["CHAT_URL"], "--grpc-mode")
        addresses["GRPC_URL"] = stack.enter_context(grpc).url
        workers = (addresses["CHAT_URL"], addresses["EMBEDDING_URL"])
        addresses["GATEWAY_URL"] = stack.enter_context(gateway_of(*workers))
        info = httpx.get(f"{addresses['CHAT_URL']}/model_info", timeout=60).json()
        # No client may ask a model hub; LiteLLM has its list of prices in its package.
        offline = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        settings = addresses | offline | {"TOKENIZER": info["tokenizer_path"]}
        for name in names or CLIENTS:
            results[name] = run(name, CLIENTS[name], settings)
            print(f"{name} {results[name].version}: {results[name].outcome}", flush=True)
            PAGE.write_text(written(PAGE.read_text("utf-8"), results), "utf-8")
    return int(any(result.outcome != "runs" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
