from pathlib import Path

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.observe.profiling import ProfileOrder, ProfileSession


class FakeRecorder:
    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.is_recording = False

    def start(self, order: ProfileOrder) -> None:
        assert not self.is_recording
        self.is_recording = True
        self.steps.append([])

    def stop(self, path: Path) -> None:
        assert self.is_recording
        self.is_recording = False
        path.write_text("trace")


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recorder = FakeRecorder()
        self.session = ProfileSession(self.recorder)

    def begin(self, **order) -> None:
        self.session.begin(ProfileOrder(folder=self.folder, name="p", **order))

    def run(self, stages: str, first: int = 0) -> list[Path] | None:
        """A step per letter, p for prefill and d for decode; the files of the profile's end."""
        files = None
        for step, letter in enumerate(stages, first):
            self.session.before_step(step, "prefill" if letter == "p" else "decode")
            if self.recorder.is_recording:
                self.recorder.steps[-1].append(step)
            files = self.session.after_step() or files
        return files


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "profiles")


def test_it_records_until_it_is_stopped(world):
    world.begin()
    assert world.run("pddd") is None
    files = world.session.end()
    assert world.recorder.steps == [[0, 1, 2, 3]]
    assert [path.name for path in files] == ["p-0.trace.json.gz"]
    assert files[0].exists()
    assert not world.session.is_active


def test_it_ends_after_so_many_steps(world):
    world.begin(num_steps=2)
    files = world.run("pddd")
    assert world.recorder.steps == [[0, 1]]
    assert len(files) == 1
    assert not world.session.is_active


def test_it_begins_at_a_step(world):
    world.begin(start_step=3, num_steps=2)
    world.run("ddddddd")
    assert world.recorder.steps == [[3, 4]]


def test_stages_go_into_files_of_their_own(world):
    world.begin(num_steps=2, by_stage=True)
    files = world.run("pdpddd")
    assert world.recorder.steps == [[0], [1], [2], [3]]
    assert [path.name for path in files] == [
        "p-prefill-0.trace.json.gz",
        "p-decode-1.trace.json.gz",
        "p-prefill-2.trace.json.gz",
        "p-decode-3.trace.json.gz",
    ]


def test_a_stage_that_has_its_steps_is_left_out(world):
    world.begin(num_steps=1, by_stage=True)
    files = world.run("ddddp")
    assert world.recorder.steps == [[0], [4]]
    assert len(files) == 2


def test_only_one_at_a_time_and_none_to_stop(world):
    with pytest.raises(InvalidRequest, match="no profile"):
        world.session.end()
    world.begin()
    with pytest.raises(InvalidRequest, match="stop_profile"):
        world.begin()
    world.session.end()
    world.begin()
    assert world.session.is_active


def test_a_profile_without_a_step_has_no_file(world):
    world.begin(num_steps=2, by_stage=True)
    assert world.session.end() == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    world = World(tmp_path / "file" / "x")
    with pytest.raises(InvalidRequest, match="cannot be made") as caught:
        world.begin()
    assert caught.value.param == "output_dir"
    assert not world.session.is_active


@pytest.mark.parametrize(
    ("order", "param"),
    [
        ({"activities": ("RPD",)}, "activities"),
        ({"activities": ()}, "activities"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 10**9}, "num_steps"),
        ({"start_step": -1}, "start_step"),
        ({"by_stage": True}, "num_steps"),
    ],
)
def test_impossible_orders_name_their_field(tmp_path, order, param):
    with pytest.raises(InvalidRequest) as caught:
        ProfileOrder(folder=tmp_path, name="p", **order)
    assert caught.value.param == param
