import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lilliput.errors import DataError
from lilliput.metrics.generation import CONTEXT, continuations, first_differences, generation
from lilliput.model.stored import open_model

SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_the_first_difference_is_counted_from_the_start() -> None:
    ours = torch.tensor([[1, 2, 3], [1, 2, 3], [9, 2, 3], [1, 2, 4]])
    theirs = torch.tensor([[1, 2, 3], [1, 5, 3], [1, 2, 3], [1, 2, 3]])
    assert first_differences(ours, theirs).tolist() == [3, 1, 0, 2]


def test_continuations_are_the_greedy_ones(folder) -> None:
    path = folder("model")
    prompts = torch.arange(64).view(2, 32)
    found = continuations(open_model(str(path)), prompts, 6)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = prompts
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids[:, 32:])


def test_two_models_part_and_one_does_not(folder, text) -> None:
    path, other = folder("model"), folder("other", seed=1)
    same = generation(path, path, data=text, prompts=3, new_tokens=5)
    assert (same.first_difference.value, same.identical.value) == (5.0, 1.0)
    found = generation(path, other, data=text, prompts=3, new_tokens=5)
    assert found.first_difference.value < 5.0
    assert len(found.examples) == 3
    assert found.examples[0]["prompt"] == text.read_text()[:CONTEXT]
    assert found.to_json()["identical"]["value"] == pytest.approx(found.identical.value)


def test_models_of_few_positions_get_shorter_prompts_and_answers(folder, text) -> None:
    few = folder("few", LlamaConfig(**SMALL, max_position_embeddings=30))
    found = generation(few, few, data=text, prompts=2)
    assert found.new_tokens == 20
    with pytest.raises(DataError, match="30 positions"):
        generation(few, few, data=text, prompts=2, new_tokens=21)
    with pytest.raises(DataError, match="2 prompts"):
        generation(few, few, data=text, prompts=1)
