from __future__ import annotations

import numpy as np
import pytest

from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from tests.frontends.conftest import Api
from tests.frontends.pooling import EMBEDS, PoolingEngine, classifies, over, vector_of

LABELS = ("bad", "fine", "good")


def api_of(services: Services, *labels: str, **fields: object) -> Api:
    engine = PoolingEngine(num_values=len(labels))
    return Api(create_app(over(services, engine, classifies(*labels, **fields))))


def test_each_text_gets_its_label_and_probabilities(services: Services) -> None:
    api = api_of(services, *LABELS)
    body = api.post("/v1/classify", {"model": "org/tiny", "input": ["ab", "c"]}).json()
    assert body["object"] == "list"
    assert body["model"] == "org/tiny"
    assert body["usage"]["prompt_tokens"] == 3
    for index, (text, one) in enumerate(zip(("ab", "c"), body["data"], strict=True)):
        values = vector_of(services.tokenizer.encode(text), 3)
        want = np.exp(values) / np.exp(values).sum()
        assert one["index"] == index
        assert one["label"] == LABELS[int(values.argmax())]
        assert one["num_classes"] == 3
        np.testing.assert_allclose(one["probs"], want, rtol=1e-5)


@pytest.mark.parametrize(("labels", "fields"), [(("spam",), {}), (LABELS, {"multi_label": True})])
def test_labels_that_do_not_exclude_one_another(
    services: Services, labels: tuple[str, ...], fields: dict[str, bool]
) -> None:
    [one] = api_of(services, *labels, **fields).post("/v1/classify", {"input": "ab"}).json()["data"]
    values = vector_of(services.tokenizer.encode("ab"), len(labels))
    np.testing.assert_allclose(one["probs"], 1 / (1 + np.exp(-values)), rtol=1e-5)


def test_what_is_refused(services: Services) -> None:
    api = api_of(services, *LABELS)
    assert api.post("/v1/classify", {"input": []}).status_code == 400
    assert api.post("/v1/classify", {"input": "a", "model": "other"}).status_code == 404
    embeds = Api(create_app(over(services, PoolingEngine(), EMBEDS)))
    answer = embeds.post("/v1/classify", {"input": "a"})
    assert answer.status_code == 400
    assert "has no classification head" in answer.json()["message"]
