"""Where files may be written, by all command lines, and that they are written whole or not at all."""

import os

import pytest

from latentsync.errors import UserError
from latentsync.paths import check_writable, is_own_file, is_own_folder, write_text


def test_a_new_name_and_a_regular_file_will_do_and_nothing_is_left_of_the_check(tmp_path):
    (tmp_path / "there.json").write_text("{}")
    others = tmp_path / "another", tmp_path / "no such folder" / "x"
    for name in ("there.json", "new.json"):
        assert check_writable(tmp_path / name, others) == tmp_path / name
    assert os.listdir(tmp_path) == ["there.json"] and (tmp_path / "there.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="The picture .* cannot be written"):
        check_writable(tmp_path / name, what="The picture")


def test_the_same_new_file_by_two_names_is_noticed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for one, other in (("new", "./new"), ("link", "new"), ("new", "link")):
        with pytest.raises(UserError, match="would be overwritten"):
            check_writable(f"{tmp_path}/{one}", (f"{tmp_path}/{other}",))


def test_a_link_into_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "new")
    with pytest.raises(UserError, match="does not exist"):
        check_writable(tmp_path / "link")


def test_what_is_written_leaves_the_other_names_of_an_earlier_file_alone(tmp_path):
    """Even where a link was made after the check."""
    (tmp_path / "recording").write_text("irreplaceable")
    os.link(tmp_path / "recording", tmp_path / "report")
    os.chmod(tmp_path / "recording", 0o640)
    (tmp_path / "link").symlink_to(tmp_path / "report")
    write_text(tmp_path / "link", "{}")
    assert (tmp_path / "recording").read_text() == "irreplaceable" and (tmp_path / "report").read_text() == "{}"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "report").stat().st_mode & 0o777 == 0o640
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps pipes elsewhere")
def test_a_pipe_that_has_taken_the_name_since_the_check_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "report")
    with pytest.raises(UserError, match="no regular file any more"):
        write_text(tmp_path / "report", "{}", "The report")


def test_a_text_that_cannot_be_written_leaves_the_earlier_one_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "report").write_text("earlier")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="The report .*No space left"):
        write_text(tmp_path / "report", "{}", "The report")
    assert os.listdir(tmp_path) == ["report"] and (tmp_path / "report").read_text() == "earlier"


def test_own_folders_and_files_are_no_links_and_nobody_else_s(tmp_path, monkeypatch):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir(), file.touch()
    (tmp_path / "to folder").symlink_to(folder), (tmp_path / "to file").symlink_to(file)
    assert is_own_folder(folder) and is_own_file(file)
    assert not any(map(is_own_folder, (file, tmp_path / "to folder", tmp_path / "to file")))
    assert not any(map(is_own_file, (folder, tmp_path / "to file", tmp_path / "missing")))
    if hasattr(os, "geteuid"):
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        assert not is_own_folder(folder) and not is_own_file(file)


def test_every_command_line_checks_before_it_works(tmp_path, capsys):
    """The others are in test_cli.py."""
    from latentsync.evaluation.__main__ import main as evaluation
    from optim.benchmark.__main__ import main as benchmark
    from optim.quality import main as quality

    video, sound = tmp_path / "a.mp4", tmp_path / "a.wav"
    video.write_bytes(b"a recording"), sound.write_bytes(b"a voice")
    os.link(video, other := tmp_path / "other.json")
    os.link(sound, picture := tmp_path / "other.png")
    for main, arguments in (
        (quality, [video, sound, "--json", other]),
        (benchmark, ["--job", video, sound, "--model", "demo", "--device", "cpu", "--json", other]),
        (evaluation, ["strip", video, sound, video, picture]),
    ):
        assert main([str(argument) for argument in arguments]) == 2, arguments
        assert "would be overwritten" in capsys.readouterr().err
    assert video.read_bytes() == b"a recording" and sound.read_bytes() == b"a voice"
