import pytest

from sapwood.app.serving.stores import batch_runner, open_stores
from sapwood.base.errors import ConfigError
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.config.server import ServerConfig
from tests.scripted import scripted_services


def files_in(directory):
    return sorted(str(one.relative_to(directory)) for one in directory.rglob("*.sqlite"))


def test_state_is_kept_by_model_below_home(tmp_path):
    open_stores(ServerConfig(), tmp_path, "Qwen/Qwen3-0.6B").close()
    base = "state/Qwen_Qwen3-0.6B"
    assert files_in(tmp_path) == [f"{base}/batches.sqlite", f"{base}/responses.sqlite"]


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "..", "", "a\0b"])
def test_a_model_s_name_leads_nowhere_else(tmp_path, name):
    open_stores(ServerConfig(), tmp_path / "home", name).close()
    assert [one.name for one in tmp_path.iterdir()] == ["home"]
    assert len(list((tmp_path / "home" / "state").iterdir())) == 1


def test_options_say_what_is_kept_and_where(tmp_path):
    chosen = ServerConfig(state_dir=str(tmp_path / "mine"), responses_store="memory")
    stores = open_stores(chosen, tmp_path / "home", "m")
    assert stores.responses is not None
    stores.close()
    assert files_in(tmp_path) == ["mine/batches.sqlite"]
    nothing = ServerConfig(responses_store="none", batch_concurrency=0)
    stores = open_stores(nothing, tmp_path / "home", "m")
    assert (stores.responses, stores.batches) == (None, None)
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_written_costs_only_what_is_kept(tmp_path, caplog):
    (tmp_path / "state").write_text("a file where a directory should be")
    stores = open_stores(ServerConfig(), tmp_path, "m")
    assert stores.responses is not None
    assert stores.batches is None
    assert "kept in memory" in caplog.text
    stores.close()
    with pytest.raises(ConfigError, match="--state-dir"):
        open_stores(ServerConfig(state_dir=str(tmp_path / "state")), tmp_path, "m")


@pytest.mark.parametrize(
    ("scheduler", "priority"),
    [
        (SchedulerConfig(), -100),
        (SchedulerConfig(enable_priority_scheduling=True, default_priority_value=5), -95),
        (
            SchedulerConfig(
                enable_priority_scheduling=True, schedule_low_priority_values_first=True
            ),
            100,
        ),
    ],
)
def test_batches_are_less_urgent_whichever_way_round_priorities_are(tmp_path, scheduler, priority):
    services, _ = scripted_services()
    server = ServerConfig()
    stores = open_stores(server, tmp_path, "m")
    runner = batch_runner(server, scheduler, services, stores)
    assert runner is not None
    assert runner.priority == priority
    stores.close()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_concurrency": -1},
        {"batch_priority_gap": -1},
        {"responses_retention": 0.0},
        {"responses_retention": float("inf")},
        {"responses_store": "redis"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options)).replace("_", "-")):
        ServerConfig(**options)
