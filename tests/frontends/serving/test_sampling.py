from __future__ import annotations

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.native.protocol import NativeSampling
from sapwood.frontends.openai.protocol import ChatRequest, CompletionRequest
from sapwood.frontends.serving.sampling import SamplingFields, renamed
from sapwood.schema.sampling import SamplingParams


def test_fields_have_the_names_and_defaults_of_the_parameters() -> None:
    assert set(SamplingFields.__struct_fields__) <= set(SamplingParams.__struct_fields__)
    assert SamplingParams(**SamplingFields().given()) == SamplingParams()
    assert SamplingParams(**NativeSampling().given()) == SamplingParams()
    for dialect in (ChatRequest, CompletionRequest, NativeSampling):
        assert set(SamplingFields.__struct_fields__) <= set(dialect.__struct_fields__)


def test_what_is_given_arrives_and_what_is_open_stays_open() -> None:
    fields = SamplingFields(min_p=0.0, stop="end", allowed_token_ids=[3, 4], logit_bias={5: 1.0})
    given = fields.given()
    assert given["min_p"] == 0.0
    assert "top_p" not in given
    sampling = SamplingParams(**given)
    assert (sampling.stop, sampling.allowed_token_ids) == (("end",), (3, 4))
    assert sampling.logit_bias == {5: 1.0}


def test_an_error_names_the_field_of_the_dialect() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(max_new_tokens=-1)
    error = renamed(caught.value, {"max_new_tokens": "num_predict"}, where="options")
    assert error.param == "options.num_predict"
    assert error.message.startswith("num_predict is -1")
