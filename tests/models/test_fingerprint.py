"""The sum by which a base is known again."""

from __future__ import annotations

import os

import pytest

from lco_lite.errors import DataError
from lco_lite.models.fingerprint import fingerprint, known_by


def test_a_fingerprint_is_of_contents_and_of_large_weights_the_first_and_the_last_byte_count(tmp_path):
    folder, other = tmp_path / "model", tmp_path / "moved"
    folder.mkdir()
    weights = bytearray(5 * 2**20)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    was = fingerprint(folder)
    (folder / "README.md").write_text("notes")
    os.utime(folder / "model.safetensors", (0, 0))
    assert fingerprint(folder.rename(other)) == was
    seen = {was}
    for place in (0, -1):
        weights[place] = 1
        (other / "model.safetensors").write_bytes(weights)
        seen.add(fingerprint(other))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt"):
        (other / name).write_text('{"a": 1}')
        seen.add(fingerprint(other))
    assert len(seen) == 8
    assert fingerprint(other / "model.safetensors") != was
    with pytest.raises(DataError, match="none.gguf: cannot be read"):
        fingerprint(tmp_path / "none.gguf")


def test_a_model_of_others_is_known_by_its_name_and_on_this_machine_by_its_content(tmp_path):
    assert known_by("org/model") == "org/model"
    (tmp_path / "config.json").write_text("{}")
    before = known_by(str(tmp_path))
    assert before.startswith(f"{tmp_path} ") and before == known_by(str(tmp_path))
    (tmp_path / "config.json").write_text('{"num_labels": 2}')
    assert known_by(str(tmp_path)) != before
