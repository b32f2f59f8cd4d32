import pytest

from jaxlab.core import kept_or_temporary, replace_file


def test_a_folder_is_kept_where_one_is_given(tmp_path):
    with kept_or_temporary(tmp_path / "own") as folder:
        assert folder == tmp_path / "own"
    with kept_or_temporary(None) as folder:
        (folder / "made").write_text("1")
    assert not folder.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    replace_file(path, "é")
    assert path.read_bytes() == "é".encode()
    replace_file(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "\udc80")
    assert path.read_bytes() == b"\x00"
    assert [each.name for each in path.parent.iterdir()] == ["file"]
