"""What Anthropic's client asks besides messages."""

import anthropic
import pytest


@pytest.fixture
def client(live):
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def test_models_have_anthropic_s_form_for_its_client_only(client, api):
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.type) == ("org/tiny", "org/tiny", "model")
    assert model.created_at.year == 2023
    assert client.models.retrieve("org/tiny") == model
    assert api.get("/v1/models").json()["object"] == "list"


def test_its_batches_are_refused_with_the_way_out(client):
    with pytest.raises(anthropic.BadRequestError, match="/v1/batches"):
        client.messages.batches.list()
    with pytest.raises(anthropic.BadRequestError, match="/v1/batches"):
        client.messages.batches.cancel("msgbatch_1")
