import csv
import json

import pytest

from lowmem_dpo.data.prompts import read_prompts


@pytest.mark.parametrize("dump", [json.dumps, str])
def test_read_prompts_refuses_messages_that_stand_as_text(tmp_path, dump):
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], ["hi"], [dump([{"role": "user", "content": "u"}])]])
    with pytest.raises(ValueError, match=r"line 3: every row .* with text, not messages, in"):
        read_prompts(str(path))
