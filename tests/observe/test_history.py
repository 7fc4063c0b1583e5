from sapwood.observe.history import SAMPLES, History, Sample


def sample(number: int) -> Sample:
    return Sample(
        at_s=float(number),
        num_running=number,
        num_waiting=0,
        output_tokens_per_s=0.0,
        prompt_tokens_per_s=0.0,
        cache_hit_rate=None,
        token_usage=0.0,
        ttft_s=[None] * 3,
        itl_s=[None] * 3,
    )


def test_only_what_is_new_is_told():
    history = History()
    assert history.since(0) == []
    for i in range(5):
        history.add(sample(i))
    assert [one.num_running for one in history.since(0)] == [0, 1, 2, 3, 4]
    assert [one.num_running for one in history.since(3)] == [3, 4]
    assert history.since(5) == []
    assert history.since(10**12) == []


def test_old_samples_are_forgotten_and_numbers_go_on():
    history = History()
    for i in range(SAMPLES + 10):
        history.add(sample(i))
    assert history.num_added == SAMPLES + 10
    assert [one.num_running for one in history.since(0)] == list(range(10, SAMPLES + 10))
    assert [one.num_running for one in history.since(SAMPLES + 8)] == [SAMPLES + 8, SAMPLES + 9]
