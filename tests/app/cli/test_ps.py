import time

from sapwood.app.cli.main import main
from sapwood.app.serving.running import RunningServer


def test_servers_are_listed(monkeypatch, capsys):
    servers = [
        RunningServer(
            pid=17,
            url="http://127.0.0.1:30000",
            model="tiny",
            memory_bytes=3 * 10**9,
            tokens_per_s=12.34,
            started_s=time.time() - 4000,
        ),
        RunningServer(
            pid=18,
            url=None,
            model=None,
            memory_bytes=5 * 10**6,
            tokens_per_s=None,
            started_s=time.time(),
        ),
    ]
    monkeypatch.setattr("sapwood.app.serving.running.running_servers", lambda: servers)
    assert main(["ps"]) == 0
    title, first, second = capsys.readouterr().out.splitlines()
    assert title.split() == ["PID", "URL", "MODEL", "MEMORY", "TOK/S", "STARTED"]
    assert first.split("  ")[0] == "17"
    assert "tiny" in first
    assert "3.0 GB  12.3   1 hour ago" in first
    assert "not listening yet" in second


def test_without_servers_there_is_a_hint(monkeypatch, capsys):
    monkeypatch.setattr("sapwood.app.serving.running.running_servers", list)
    assert main(["ps"]) == 0
    assert "sapwood serve" in capsys.readouterr().err
