"""Records say themselves whether they are what was written."""

import json

import pytest

from flowar.base.records import DamagedRecordError, create_record, read_record, write_record


def test_a_record_comes_back_whatever_its_formatting(tmp_path):
    values = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    write_record(tmp_path / "r.json", values)
    assert read_record(tmp_path / "r.json", "draw again") == values
    (tmp_path / "r.json").write_text(json.dumps(json.loads((tmp_path / "r.json").read_text()), separators=(",", ":")))
    assert read_record(tmp_path / "r.json", "draw again") == values


def test_keys_that_are_numbers_come_back_as_texts(tmp_path):
    write_record(tmp_path / "r.json", {"counts": {9: 1, 10: 2, 100: 3}})
    assert read_record(tmp_path / "r.json", "draw again") == {"counts": {"9": 1, "10": 2, "100": 3}}


def test_a_record_that_lacks_a_key_is_named(tmp_path):
    write_record(tmp_path / "r.json", {"step": 1})
    with pytest.raises(DamagedRecordError, match="it has no pid"):
        read_record(tmp_path / "r.json", "draw again", ("step", "pid"))


def test_no_changed_byte_of_a_record_passes_in_silence_with_other_values(tmp_path):
    values = {"step": 20, "names": ["raw", "std"], "rate": 0.125}
    write_record(tmp_path / "r.json", values)
    written = (tmp_path / "r.json").read_bytes()
    refused = 0
    for place in range(len(written)):
        changed = bytearray(written)
        changed[place] ^= 1
        (tmp_path / "r.json").write_bytes(changed)
        try:
            found = read_record(tmp_path / "r.json", "draw again")
        except DamagedRecordError as error:
            refused += 1
            assert "r.json is damaged" in str(error) and str(error).endswith("; draw again")
        else:
            assert {key: found.get(key) for key in values} == values
    assert refused > len(written) // 2


@pytest.mark.parametrize("text", ["", "[]", "3", '{"step": 2', "[" * 100_000, '{"step": 1, "xxh3": 7}'])
def test_what_is_no_record_is_named(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DamagedRecordError, match="r.json is damaged"):
        read_record(tmp_path / "r.json", "draw again")


def test_a_record_of_version_0_1_has_no_hash(tmp_path):
    (tmp_path / "r.json").write_text('{"step": 20}')
    assert read_record(tmp_path / "r.json", "draw again") == {"step": 20}


def test_a_record_that_is_there_is_not_written_over(tmp_path):
    assert create_record(tmp_path / "r.json", {"seed": 0}) and not create_record(tmp_path / "r.json", {"seed": 1})
    assert read_record(tmp_path / "r.json", "draw again") == {"seed": 0}
