import hashlib

import pytest
import torch

from rarefy.builtin import model as builtin
from rarefy.builtin.corpus import documents, pack, split, stdlib_held_out
from rarefy.errors import BadInput
from rarefy.tasks.concepts import label
from rarefy.tasks.induction import induction_score


def test_a_missing_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_FOLDER", tmp_path)
    with pytest.raises(BadInput, match="missing from this installation"):
        builtin.builtin_folder()


@pytest.fixture(scope="module")
def opened():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = builtin.builtin_folder()
    except BadInput as error:
        pytest.skip(str(error))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "def f(x):\n\treturn x\r\n", "s = 'é \U0001f600'  # ünï\n", "\n\n    a=1\x0c", "<|endoftext"])
def test_the_tokenizer_loses_nothing_and_its_offsets_tile_the_text(opened, text):
    encoded = opened[1].backend_tokenizer.encode(text, add_special_tokens=False)
    assert opened[1].decode(encoded.ids) == text
    covered = {i for a, b in encoded.offsets for i in range(a, b)}
    assert covered == set(range(len(text)))


def test_the_model_predicts_files_it_never_saw(opened):
    _, held = split(documents("stdlib"), held_out=0.05)
    batch = next(pack(held, opened[1], 256, 4, each=255))
    with torch.no_grad():
        loss = opened[0](input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
    assert float(loss) < 3.2                                # bigrams reach 4.4 and even odds are 8.3


def test_the_card_is_of_these_weights_and_far_below_its_baselines(opened):
    card = builtin.card()
    digest = hashlib.sha256()
    for name, value in sorted(opened[0].state_dict().items()):
        digest.update(name.encode() + value.float().contiguous().numpy().tobytes())
    assert card["weights_sha256"] == digest.hexdigest()
    bits = card["model"]["bits_per_byte"]
    assert bits < 0.5 * card["baselines"]["bigram"]["bits_per_byte"] and bits < 0.6 * card["baselines"]["xz -9e"]["bits_per_byte_concatenated"]
    assert all(p["model"] < 0.75 * min(p["bigram"], p["xz -9e, file by file"]) for p in card["by_package"].values())
    assert card["induction"]["drop"][1] > 5
    held = set(card["training"]["held_out"])
    assert all((name in held) == stdlib_held_out(name) for name in (d.name for d in documents("stdlib")) if name in held)


@pytest.mark.slow
def test_the_model_copies_from_context(opened):
    score = induction_score(opened[0], range(300, 2000), period=48, batch=8, start=opened[1].eos_token_id)
    assert score.drop.low > 5


def test_labels_of_real_tokens(opened):
    text = "class Stack:\n    def push(self, item):\n        return self.items\n"
    encoded = opened[1].backend_tokenizer.encode(text, add_special_tokens=False)
    found = label(text, torch.tensor(encoded.offsets))
    def joined(name):
        return "".join(text[a:b] for (a, b), there in zip(encoded.offsets, found[name].tolist(), strict=True) if there)
    assert joined("class name") == " Stack" and joined("function name") == " push" and joined("keyword return") == "return"
    assert joined("self") == "self self" and joined("attribute") == "items"
