"""Files by the official client, over HTTP."""

import time

import httpx
import openai
import pytest

from sapwood.frontends.batches import files, store

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'


@pytest.fixture
def server(serve):
    return serve(runs=False)


@pytest.fixture
def client(server, client_of):
    return client_of(server)


def upload(client, content=LINE, name="in.jsonl", **options):
    return client.files.create(file=(name, content), purpose="batch", **options)


def test_a_file_comes_back_as_it_was(client):
    content = bytes(range(256)) * 8192
    file = upload(client, content, name="ä b.jsonl")
    assert (file.bytes, file.purpose, file.object) == (len(content), "batch", "file")
    assert file.filename == "ä b.jsonl"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content


def test_files_are_listed_by_pages_in_either_order(client):
    ids = [upload(client).id for _ in range(5)]
    assert [one.id for one in client.files.list(limit=2)] == ids[::-1]
    assert [one.id for one in client.files.list(order="asc")] == ids
    assert list(client.files.list(purpose="batch_output")) == []
    page = client.files.list(limit=2, order="asc", after=ids[1])
    assert ([one.id for one in page.data], page.has_more) == (ids[2:4], True)
    with pytest.raises(openai.BadRequestError, match="order"):
        client.files.list(order="sideways")
    with pytest.raises(openai.BadRequestError, match="unknown query parameter 'colour'"):
        client.files.list(extra_query={"colour": "red"})


def test_a_deleted_file_is_gone_from_the_disk(client, server):
    file = upload(client)
    path = server.store.path_of(file.id)
    assert path.exists()
    assert client.files.delete(file.id).deleted
    assert not path.exists()
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


def test_the_input_of_an_open_batch_cannot_be_deleted(client):
    file = upload(client)
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    with pytest.raises(openai.BadRequestError, match=batch.id):
        client.files.delete(file.id)


def test_files_expire(serve, client_of, until, monkeypatch):
    server = serve()
    client = client_of(server)
    short = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    kept = upload(client)
    assert (short.expires_at, kept.expires_at) == (short.created_at + 3600, None)
    now = time.time()
    monkeypatch.setattr(store.time, "time", lambda: now + 3601)
    until(lambda: [one.id for one in client.files.list()] == [kept.id])
    until(lambda: not server.store.path_of(short.id).exists())


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"purpose": "vision"}, "purpose"),
        ({"file": ("x", b"")}, "file"),
        ({"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after.seconds"),
        ({"expires_after": {"seconds": 3600}}, "expires_after.anchor"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
def test_what_is_no_upload_is_refused(client, server, changes, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(**{"file": ("x", LINE), "purpose": "batch", **changes})
    assert refused.value.param == param
    assert list(server.store.path_of("").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"--b\r\n", "multipart/form-data"),
        (b"--b\r\nnonsense", "multipart/form-data; boundary=b"),
        (b"", "multipart/form-data; boundary=b"),
        (b"x" * 100, "multipart/form-data; boundary=\xff"),
        (b"{}", "application/json"),
        (
            b"--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\n"
            + b"x" * 9000
            + b"\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
        ),
    ],
)
def test_a_broken_form_is_refused(server, content, kind):
    answer = httpx.post(
        f"{server.url}/v1/files", content=content, headers={"content-type": kind.encode("latin1")}
    )
    assert answer.status_code == 400
    assert answer.json()["message"]


def test_what_is_too_large_is_refused_and_not_kept(client, server, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    with pytest.raises(openai.APIStatusError, match="more than 1000") as refused:
        upload(client, b"x" * 100_000)
    assert refused.value.status_code == 413

    def chunks():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(20):
            yield b"x" * 10_000

    answer = httpx.post(
        f"{server.url}/v1/files",
        content=chunks(),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert answer.status_code == 413
    assert list(server.store.path_of("").iterdir()) == []


@pytest.mark.parametrize("path", ["/v1/files/..%2fbatches.sqlite", "/v1/files/%2e%2e/content"])
def test_ids_lead_nowhere_else(server, path):
    assert httpx.get(server.url + path).status_code == 404
