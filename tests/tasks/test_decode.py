from dataclasses import replace

import pytest
import torch

from lilliput.errors import DataError
from lilliput.tasks.answers import AnswerStore
from lilliput.tasks.decode import greedy

PROMPTS = ["The assignment statement", "A", "Names refer to objects. Names are introduced by", "An"]


def slow(model, prompt, tokens):
    ids = model.tokenizer(prompt)["input_ids"]
    count = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            best = int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == model.tokenizer.eos_token_id:
            break
        ids.append(best)
    return model.tokenizer.decode(ids[count:])


def test_batches_write_what_each_prompt_alone_would(llama):
    assert greedy(replace(llama, answers=AnswerStore()), PROMPTS, tokens=12) == [slow(llama, x, 12) for x in PROMPTS]


def test_a_stop_string_ends_the_answer_and_is_left_out(llama):
    whole = greedy(llama, PROMPTS[:1], tokens=12)[0]
    stop = whole[3:5]
    found = greedy(llama, PROMPTS[:1], stop=(stop,), tokens=12)[0]
    assert found == whole[: whole.index(stop)]


def test_long_prompts_lose_their_left(llama):
    long = "statement " * 400 + "binds"
    ids = llama.tokenizer(long)["input_ids"][-(256 - 8) :]
    assert greedy(llama, [long], tokens=8) == greedy(llama, [llama.tokenizer.decode(ids)], tokens=8)


def test_bad_requests(llama):
    with pytest.raises(DataError, match="leave no room"):
        greedy(llama, PROMPTS, tokens=256)
    with pytest.raises(DataError, match="a prompt is empty"):
        greedy(llama, [""], tokens=4)
