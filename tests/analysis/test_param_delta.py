from __future__ import annotations

import json

import pytest

from trialist.cli.analyze import main


@pytest.fixture
def models(tmp_path) -> dict[str, str]:
    from tests.weights.conftest import llama, perturbed
    from trialist.data.tokenizers import byte_tokenizer

    made = {
        "base": llama(),
        "post": perturbed(llama(), 1e-3, 1),
        "new": perturbed(llama(), 3e-3, 2),
        "foreign": llama(7),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in made}


def test_relatives_raise_no_objection_and_foreigners_do(models, tmp_path, capsys):
    shared = ["param-delta", "--post", models["post"], "--base", models["base"]]
    assert main([*shared, "--base-new", models["new"]]) == 0
    said = capsys.readouterr().out
    assert "objections " in said
    assert said.splitlines()[-1].split() == ["objections", "none"]
    file = tmp_path / "report.json"
    assert main([*shared, "--base-new", models["foreign"], "--output", str(file)]) == 0
    assert "not of one lineage" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["tensors"]) == 21
    with pytest.raises(ValueError, match="exists; give a new file"):
        main([*shared, "--base-new", models["new"], "--output", str(file)])
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; make it first"):
        main([*shared, "--base-new", "no model is read", "--output", str(tmp_path / "nowhere" / "report.json")])
    assert {path.name for path in tmp_path.iterdir()} == {*models, "report.json"}
