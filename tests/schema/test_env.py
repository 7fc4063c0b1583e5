from pathlib import Path

from sapwood.schema.env import environment, home


def test_the_environment_is_the_process_s(monkeypatch):
    monkeypatch.setenv("SAPWOOD_TEST_ONLY", "yes")
    assert environment()["SAPWOOD_TEST_ONLY"] == "yes"


def test_home_is_where_the_variable_says():
    assert home({"SAPWOOD_HOME": "/data/models"}) == Path("/data/models")


def test_home_may_begin_with_a_tilde():
    assert home({"SAPWOOD_HOME": "~/models"}) == Path.home() / "models"


def test_home_falls_back_to_the_user_s_cache():
    assert home({}) == home({"SAPWOOD_HOME": ""}) == Path.home() / ".cache" / "sapwood"
