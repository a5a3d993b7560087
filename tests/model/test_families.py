import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_dpo.model.families import FAMILIES as RECORDS
from tests.tiny import FAMILIES, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_names_every_norm_of_a_layer(family):
    """And no other: by `DecoderLayer` a norm without a name would be refused, here is the rest."""
    model = tiny_model(family)
    record = RECORDS[model.config.model_type]
    named = {name for name in (*record.attention_norms, *record.mlp_norms) if name}
    children = dict(model.model.layers[0].named_children())
    assert named == {name for name in children if name.endswith("layernorm")}
    if record.rms_norm:
        assert {type(children[name]).__name__ for name in named} == {record.rms_norm.class_name}


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [
        ("llama", 1.0, None),
        ("cohere", 0.3, None),
        ("cohere2", 0.4, None),
        ("granite", 1 / 2.5, None),
        ("gemma2", 1.0, 5.0),
        ("gemma3", 1.0, 8.0),
    ],
)
def test_records_read_the_rule_of_the_logits_from_their_own_config(family, scale, softcap):
    config = tiny_model(family).config
    # What means something to another family means nothing here.
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if not hasattr(config, name):
            setattr(config, name, 7.0)
    record = RECORDS[config.model_type]
    assert (record.logit_scale(config), record.logit_softcap(config)) == (scale, softcap)


def test_records_are_read_without_torch():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in ("torch", "transformers"):
    sys.modules[name] = None
from lowmem_dpo.model.families import FAMILIES
assert list(FAMILIES) == {list(RECORDS)!r} == sorted(FAMILIES)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
